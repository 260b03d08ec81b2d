"""The asset `marketplace_report`: the last weeks as pictures, tables and sentences, in Dagit and as one HTML page.

The flow, in order:

1. `asset`     reads the summary of the last 90 closed days;
2. `numbers`   adds up its rows by day, action and week, and says what stands out;
3. `pictures`  draws them;
4. `page`      puts it all into one file that needs no network.
"""
