"""The summary of the day that is not over."""

from datetime import UTC, date, datetime
from typing import Any

import dagster as dg
import sqlalchemy as sa

from assets import lineage
from assets.lineage import column_lineage
from assets.marketplace_daily_summary.asset import day_metadata, preview, read_tenants
from assets.marketplace_daily_summary.table import write
from assets.marketplace_job_stats import today
from assets.reporting import explain, first_reasons, table
from assets.sources import column_schema
from models.summary import MarketplaceDailySummary
from pipelines.failure import RunFailure
from pipelines.partitions import Window
from pipelines.resources import TenantDatabase
from pipelines.settings import UsageError

DESCRIPTION = """
What the jobs of all customers together have done **so far today**, in the same table as all other days; after each run
of the stats of today.

In `marketplace_stats.marketplace_daily_summary_days` such a day is not complete: `tenants_open` counts the tenants for
which it was computed before it was over. Readers who want whole days leave it out by that. The summary of the night
replaces it.

*When it is red*, the error says what could not be read or written; the next run tries again. Tenants that could not be
read are named in the metadata, and are not in the numbers until the next run.
"""


def build_marketplace_daily_summary_today(
    partitions: dg.DailyPartitionsDefinition, key_prefix: tuple[str, ...] = ()
) -> dg.AssetsDefinition:
    """The asset; its day is the one that the stats of today were last computed for."""
    stats = dg.AssetKey([*key_prefix, today.NAME])

    @dg.asset(
        key=dg.AssetKey([*key_prefix, f"{MarketplaceDailySummary.__tablename__}_today"]),
        deps=[stats],
        description=DESCRIPTION,
        group_name="marketplace_stats",
        kinds={"postgres", "pandas"},
        owners=["team:data"],
        tags={"scope": "all-tenants"},
        metadata={
            "dagster/column_schema": column_schema(MarketplaceDailySummary.__table__),
            "dagster/column_lineage": column_lineage(lineage.SUMMARY, key_prefix),
            "dagster/table_name": MarketplaceDailySummary.__table__.fullname,
        },
    )
    def marketplace_daily_summary_today(
        context: dg.AssetExecutionContext, tenant_database: TenantDatabase
    ) -> dg.MaterializeResult[Any]:
        try:
            day = _computed_day(context.instance, stats)
            window = Window.of(partitions, [day.isoformat()])
            with tenant_database.connect() as (engine, connection):
                found = read_tenants(context, tenant_database, engine, connection, window, partitions, others=False)
                # Of today, numbers that are new are worth more than those of all tenants: who could not be read is
                # missing until the next run.
                unread = found.unread if window.end <= datetime.now(UTC) else ()
                records = found.frame.to_dict("records")
                changes, _ = write(connection, records, found.days, unread, bool(found.without_reasons))
        except UsageError as error:
            raise RunFailure(error.message) from None
        except sa.exc.DBAPIError as error:
            raise RunFailure(f"The stats could not be read, or the summary not written: {explain(error)}.") from None
        for tenants, what in (
            (found.unread, "could not be read"),
            (found.without_reasons, "are there without reasons"),
        ):
            if tenants:
                context.log.warning(f"{len(tenants)} tenants {what}. {first_reasons(tenants)}.")
        return dg.MaterializeResult(
            metadata={
                "date": day.isoformat(),
                **day_metadata(found, day),
                **{f"run_{name}": number for name, number in changes.items()},
                "run_tenants_not_read": len(found.unread),
                "run_preview": table(preview(found.frame)),
            }
        )

    return marketplace_daily_summary_today


def _computed_day(instance: dg.DagsterInstance, stats: dg.AssetKey) -> date:
    """The day that the stats of today were last computed for: another may have begun since. Raises UsageError."""
    event = instance.get_latest_materialization_event(stats)
    if event is None or event.asset_materialization is None:
        raise UsageError(f"Nothing was computed yet: materialize {stats.to_user_string()} first.")
    return date.fromisoformat(str(event.asset_materialization.metadata["date"].value))
