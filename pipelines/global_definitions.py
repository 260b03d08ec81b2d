"""What Dagster loads in the code location over several databases: one summary of them all, put together here.

Each database is a code location of its own, with `pipelines.definitions`; this one reads what those have made.
"""

import os
from collections.abc import Sequence
from functools import cache

import dagster as dg

from assets.marketplace_global_summary.asset import build_marketplace_global_summary
from models.summary import MarketplaceDailySummary
from pipelines.alerts import build_alert_sensor
from pipelines.databases import OtherDatabases, database_names
from pipelines.partitions import day_partitions
from pipelines.resources import TenantDatabase
from pipelines.sensors import RETRY_HOURS, build_summary_sensor
from pipelines.settings import Settings

SENSOR_DESCRIPTION = f"""
Requests the global summary of every day whose summary was made in one of the databases since it was last requested, as
one run for each unbroken chain of days. And of every day that a run could not make wholly, since a database could not
be read, or counts a customer of another one; the same days at most every {RETRY_HOURS} hours.

When it is off, materialize the global summary by hand.
"""


def build_global_defs(settings: Settings, names: Sequence[str]) -> dg.Definitions:
    """The definitions over the databases of these names; the same for production and for tests. Connects to nothing."""
    partitions = day_partitions(settings)
    upstream = [dg.AssetKey([name, MarketplaceDailySummary.__tablename__]) for name in names]
    summary = build_marketplace_global_summary(partitions, upstream, settings.key_prefix)
    job = dg.define_asset_job(
        "marketplace_global_summary_job",
        selection=[summary],
        description="Adds up the summaries of all databases. Its sensor starts it, after one of them has changed.\n\n"
        "*When it is red*, the error names the databases that could not be read, and the customers that two of them "
        "count. Fix the reported cause; the sensor starts it again, or start it by hand.",
    )
    limits = {"lock_timeout_ms": settings.lock_timeout_ms, "statement_timeout_ms": settings.statement_timeout_ms}
    return dg.Definitions(
        assets=[summary],
        jobs=[job],
        sensors=[
            build_summary_sensor(
                partitions, upstream, summary.key, job.name, "marketplace_global_summary_sensor", SENSOR_DESCRIPTION
            ),
            build_alert_sensor(settings),
        ],
        resources={
            "tenant_database": TenantDatabase(workers=1, **limits),
            "other_databases": OtherDatabases(names=list(names), **limits),
        },
        executor=dg.in_process_executor,
    )


@dg.definitions
@cache
def defs() -> dg.Definitions:
    """What Dagster loads. Raises UsageError where the environment holds a value that is not allowed."""
    return build_global_defs(Settings.from_env(), database_names(os.environ))
