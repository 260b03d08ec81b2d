"""The asset `marketplace_job_stats`: what every tenant's jobs did, per action type, marketplace and day.

One row says: of the jobs of this action type on this marketplace that ended on this day, so many completed, failed,
were cancelled or expired; they took so long, were retried so often, and had so many tasks. `models.stats` defines each
column.

The flow, in order, for a range of days:

1. `asset`      finds the tenants and gives each to a worker;
2. `upsert`     in one transaction per tenant: locks its stats table, looks into its ledger, and then, in one statement,
3. `aggregate`  counts the jobs and tasks of the window,
   `upsert`     compares them with the stored rows, decides which days must be held back, writes the difference and the
                ledger; in another, reads the rows back and proves that they are what was counted;
4. `report`     turns what came back into what Dagit shows.
"""

DEFINITION = 2
"""The definition of the numbers, as the ledger keeps it: raised when a number's meaning, or the columns, change."""
