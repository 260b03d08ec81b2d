"""The asset `marketplace_daily_summary`: the stats of all tenants together, one small table for analysts.

The flow, in order, for a range of days:

1. `asset`         finds the tenants and gives them to the workers in batches;
2. `aggregate`     adds up a batch in the database, and the batches in pandas;
3. `completeness`  says which tenants stand behind each day, and which days have changed since they were summarized;
4. `table`         writes what differs into `marketplace_stats.marketplace_daily_summary` and `..._days`.
"""
