"""The asset `marketplace_job_stats`: what every tenant's jobs did, per action type, marketplace and day.

One row says: of the jobs of this action type on this marketplace that ended on this day, so many completed, failed,
were cancelled or expired; they waited and took so long, were retried so often, and had so many tasks. `models.stats`
defines each column.

The flow, in order, for a range of days:

1. `asset`        finds the tenants and gives each to a worker;
2. `transaction`  in one transaction per tenant: locks its stats table, looks into its ledger, and then
3. `facts`        brings the facts of the window in line with the source: one row per finished job, as last seen;
4. `stats`        aggregates the facts of the days that changed, writes the difference, ledger and journal, and proves
                  that what is stored is what was counted;
5. `report`       turns what came back into what the Dagster UI shows; `checks` judges it.

`reasons` says why jobs failed, and `statement` puts each tenant's schema into the statements.
"""

from models.stats import DEFINITION as DEFINITION
