"""The asset: for each tenant, compute the window; then report."""

import warnings
from collections.abc import Iterator
from typing import Any

import dagster as dg
import sqlalchemy as sa
from pydantic import Field

from assets.marketplace_job_stats.report import RunReport, action_codes, explain
from assets.marketplace_job_stats.upsert import TenantResult, write_tenant
from assets.sources import column_schema, source_keys
from models.stats import MarketplaceJobStats
from pipelines.database import make_durable, server_and_database
from pipelines.failure import RunFailure
from pipelines.partitions import Window
from pipelines.resources import TenantDatabase
from pipelines.settings import UsageError
from pipelines.tenants import Tenant, find_tenants

# Dagster calls `backfill_policy` beta, six times each time that it loads the asset. The design rests on it knowingly,
# and the tests of the command line would show a change.
warnings.filterwarnings("ignore", message="Parameter `backfill_policy`", category=dg.BetaWarning)

DESCRIPTION = """
What every customer's jobs did, per action type, marketplace and day: the table `marketplace_job_stats` in each tenant's
schema.

A day is **recomputed whole** from the jobs that ended on it and from their tasks, and only rows that differ are
written. So it can be materialized again at any time, in any order, for any range: late or corrected jobs come right.

- **Materialized** means that the day was run for every tenant. Which tenants were skipped or failed stands in the
  metadata; what was computed for which tenant and day, in its table `marketplace_job_stats_days`.
- **A failed run** has computed every tenant but those that it names. Mend what it says, and materialize the days again.
- **Held back**: the application has deleted old jobs or tasks of that day, so a stored number would fall. The stored
  rows are kept. To have the smaller numbers all the same, run the days with `allow_shrink: true`.
"""


class StatsConfig(dg.Config):
    """What a run may be told."""

    tenants: list[str] = Field(
        default=[], description="Schema names, for instance user_7; default all. The days are then only observed."
    )
    allow_shrink: bool = Field(
        default=False, description="Write a day even where rows deleted from the source make stored numbers fall."
    )


def build_marketplace_job_stats(
    partitions: dg.DailyPartitionsDefinition, key_prefix: tuple[str, ...] = ()
) -> dg.AssetsDefinition:
    """The asset over these days."""

    @dg.asset(
        key_prefix=list(key_prefix) or None,
        partitions_def=partitions,
        backfill_policy=dg.BackfillPolicy.single_run(),
        deps=source_keys(key_prefix),
        description=DESCRIPTION,
        group_name="marketplace_stats",
        kinds={"postgres", "sqlalchemy"},
        owners=["team:data"],
        metadata={
            "dagster/column_schema": column_schema(MarketplaceJobStats.__table__),
            "dagster/table_name": "marketplace_job_stats",
        },
        # A run of some tenants only observes, and one with failed tenants has said all when it fails.
        output_required=False,
    )
    def marketplace_job_stats(
        context: dg.AssetExecutionContext, config: StatsConfig, tenant_database: TenantDatabase
    ) -> Iterator[dg.MaterializeResult[Any] | dg.AssetMaterialization | dg.AssetObservation]:
        try:
            window = Window.of(partitions, context.partition_keys)
            report = _compute(context, config, tenant_database, window)
        except UsageError as error:
            raise RunFailure(error.message) from None
        context.log.info(report.summary())

        days = {key: report.day_metadata(day) for key, day in zip(context.partition_keys, window.dates, strict=True)}
        # What belongs to the whole run is stored once, with its last day: that is the one that Dagit shows first.
        days[context.partition_keys[-1]] |= report.run_metadata()
        if config.tenants:
            for key, metadata in days.items():
                yield dg.AssetObservation(context.asset_key, partition=key, metadata=metadata)
        elif not report.failed:
            for key, metadata in days.items():
                context.add_asset_metadata(metadata, partition_key=key)
            yield dg.MaterializeResult()
        elif report.done:
            # Yielded, not logged: what is logged after the last yield of a step that fails is lost.
            for key, metadata in days.items():
                yield dg.AssetMaterialization(context.asset_key, partition=key, metadata=metadata)
        if report.failed:
            raise RunFailure(report.failure(), metadata=report.run_metadata())

    return marketplace_job_stats


def _compute(
    context: dg.AssetExecutionContext, config: StatsConfig, database: TenantDatabase, window: Window
) -> RunReport:
    """Computes the window for the chosen tenants, several at once. What is returned is durable. Raises UsageError."""

    def work(connection: sa.Connection, tenant: Tenant) -> TenantResult | Tenant:
        if tenant.skipped or tenant.failed:
            return tenant
        try:
            return write_tenant(connection, tenant.schema, window, context.run.run_id, config.allow_shrink)
        except sa.exc.DBAPIError:
            if connection.invalidated:
                raise
            # The tenant may have changed since it was looked at; then its new state says more than the error.
            with connection.begin():
                found = find_tenants(connection, [tenant.schema])
            if found == [tenant]:
                raise
            return found[0] if found else Tenant(tenant.schema, skipped="gone: dropped while the run went on")

    with database.connect() as (engine, connection):
        with connection:
            tenants = _choose(connection, config.tenants)
            report = RunReport(window, server_and_database(connection), action_codes(connection))
        context.log.info(f"Computing {window}, for {len(tenants)} tenants of {report.database}")
        for number, (tenant, outcome) in enumerate(database.for_each(engine, tenants, work), start=1):
            report.add(tenant, outcome)
            if tenant.schema in report.failed:
                context.log.error(f"{tenant.schema} failed: {report.failed[tenant.schema]}")
            if number % 1000 == 0:
                context.log.info(f"{number} of {len(tenants)} tenants")
        if not report.done and not report.failed:
            raise UsageError(f"Nothing to compute in {report.database}. {report.reasons(report.skipped)}.")
        if report.done:
            try:
                make_durable(engine, context.run.run_id)
            except sa.exc.DBAPIError as error:
                raise UsageError(
                    f"{report.summary()}. But that may not be on disk: {explain(error)}. Run it again."
                ) from None
    return report


def _choose(connection: sa.Connection, names: list[str]) -> list[Tenant]:
    """The tenants to compute. Raises UsageError if there are none, or not all of those that are named."""
    with connection.begin():
        tenants = find_tenants(connection, names)
    database = server_and_database(connection)
    if missing := sorted(set(names) - {tenant.schema for tenant in tenants}):
        raise UsageError(f"There is no tenant {', '.join(missing)} in {database}: check the run's `tenants`.")
    if not tenants:
        raise UsageError(f"No schema named user_<number> in {database}: is DATABASE_URL the right one?")
    return tenants
