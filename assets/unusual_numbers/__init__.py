"""The check `nothing_is_unusual` of the summary: the last closed day against the same weekdays of the weeks before.

The flow, in order:

1. `check`       chooses the day, shows the findings, and warns;
2. `reading`     reads the day and its baseline days: of all tenants from the summary, of each from its own stats;
3. `statistics`  says what is unusual, and how sure that is.
"""
