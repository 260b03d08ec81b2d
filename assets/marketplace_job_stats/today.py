"""The asset of the day that is not over: the same transaction, over that one day, which the ledger then has as open."""

from collections.abc import Iterator
from datetime import UTC, date, datetime
from typing import Any

import dagster as dg

from assets import lineage
from assets.lineage import column_lineage
from assets.marketplace_job_stats.asset import StatsConfig, compute
from assets.marketplace_job_stats.checks import TENANTS, check_results
from assets.marketplace_job_stats.transaction import ComputeSpec
from assets.sources import column_schema
from assets.tenant_tables import table_key
from models.stats import MarketplaceJobFact, MarketplaceJobStats
from pipelines.failure import RunFailure
from pipelines.partitions import Days
from pipelines.resources import TenantDatabase
from pipelines.settings import UsageError

NAME = f"{MarketplaceJobStats.__tablename__}_today"

DESCRIPTION = """
What every customer's jobs have done **so far today**: the day that is running in the reporting time zone, in the same
tables as all others. Every few minutes, if its schedule is on.

- The ledger, `marketplace_job_stats_days`, has such a day as `open`. It is never taken for computed, and the journal
  does not tell of its changes: the nightly run settles it.
- A tenant that has nothing new costs a look, and nothing is written for it.
- A job whose end is dated later today counts already.

*When it is red*, no tenant could be computed, for the reason that the error says. If only its check is red, the tenants
that it names could not be computed this time; the next run tries them again, and the nightly run is red if they still
fail then.
"""
_CHECK = """
**Warns** of tenants that the last run could not compute: locked, not migrated, without a privilege, or broken in
another way. What they had of today is still there.

*When it is red:* each is named with what to do. The next run tries them again.
"""


def running_day(partitions: dg.DailyPartitionsDefinition, now: datetime) -> date | None:
    """The day that is running; None before the first partition."""
    [day] = Days(partitions).window_at(now).dates
    return day if day >= partitions.start.date() else None


def build_marketplace_job_stats_today(
    partitions: dg.DailyPartitionsDefinition, key_prefix: tuple[str, ...] = (), failure_reasons: bool = True
) -> dg.AssetsDefinition:
    """The asset of the day that is running, by the clock of these partitions."""
    key = dg.AssetKey([*key_prefix, NAME])

    @dg.asset(
        key=key,
        deps=[table_key(MarketplaceJobFact, key_prefix)],
        description=DESCRIPTION,
        group_name="marketplace_stats",
        kinds={"postgres", "sqlalchemy"},
        owners=["team:data"],
        tags={"scope": "tenant"},
        metadata={
            "dagster/column_schema": column_schema(MarketplaceJobStats.__table__),
            "dagster/column_lineage": column_lineage(lineage.STATS, key_prefix),
            "dagster/table_name": MarketplaceJobStats.__tablename__,
        },
        check_specs=[dg.AssetCheckSpec(TENANTS, asset=key, description=_CHECK)],
        # Its own: a backfill of the stats may last for hours, and each tenant is locked only while its turn lasts.
        pool=key.to_python_identifier(),
    )
    def marketplace_job_stats_today(
        context: dg.AssetExecutionContext, tenant_database: TenantDatabase
    ) -> Iterator[dg.MaterializeResult[Any] | dg.AssetCheckResult]:
        now = datetime.now(UTC)
        try:
            if running_day(partitions, now) is None:
                raise UsageError(f"The first day, {partitions.start:%F} (STATS_START_DATE), has not begun.")
            days = Days(partitions)
            window = days.window_at(now)
            spec = ComputeSpec(window, context.run.run_id, days, is_open=True, reasons=failure_reasons)
            report = compute(context, StatsConfig(), tenant_database, spec)
        except UsageError as error:
            raise RunFailure(error.message) from None
        context.log.info(report.summary())
        if not report.done:
            raise RunFailure(report.failure(), metadata=report.run_metadata())
        numbers = report.day_metadata(window.dates[0]) | report.run_metadata()
        yield dg.MaterializeResult(
            metadata={"date": window.dates[0].isoformat(), "until": now.isoformat(timespec="seconds"), **numbers}
        )
        yield from (result for result in check_results(report, key) if result.check_name == TENANTS)

    return marketplace_job_stats_today
