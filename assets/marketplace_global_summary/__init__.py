"""The asset `marketplace_global_summary`: the summaries of several databases together, in the one that is their home.

The flow, in order:

1. `asset`  reads of each database what has changed since it was last read, keeps it in the home, and shows the days;
2. `merge`  says what stands behind a day, and who is counted twice, from what is kept of each database.

The rows of a day are added up by the same code that adds up a database's tenants.
"""
