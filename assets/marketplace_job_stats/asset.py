"""The asset: for each tenant, compute the window; then report."""

import time
import warnings
from collections.abc import Iterator
from contextlib import closing
from datetime import date, timedelta
from typing import Any

import dagster as dg
import sqlalchemy as sa
from pydantic import Field

from assets import lineage
from assets.lineage import column_lineage
from assets.marketplace_job_stats.checks import check_results, check_specs
from assets.marketplace_job_stats.report import RunReport
from assets.marketplace_job_stats.transaction import ComputeSpec, Day, TenantResult, stored_days, write_tenant
from assets.reporting import explain, first_reasons
from assets.sources import column_schema
from assets.tenant_tables import table_key
from models.stats import MarketplaceJobFact, MarketplaceJobStats
from pipelines.action_types import action_types
from pipelines.database import make_durable, require_answer, server_and_database
from pipelines.failure import RunFailure
from pipelines.partitions import Days, Window
from pipelines.resources import NoConnection, TenantDatabase
from pipelines.settings import UsageError
from pipelines.tenants import Tenant, choose_tenants, find_tenants, superuser_warning

# Dagster calls `backfill_policy` beta, six times each time that it loads the asset. The design rests on it knowingly,
# and the tests of the command line would show a change.
warnings.filterwarnings("ignore", message="Parameter `backfill_policy`", category=dg.BetaWarning)

SCHEDULE_TAG = "marketplace_job_stats/schedule"
"""The tag by which a run knows what it was scheduled for: NIGHTLY, WEEKLY or TODAY; other runs do not have it."""
NIGHTLY, WEEKLY, TODAY = "nightly", "weekly", "today"

PASSES = 3
"""How often a run begins again, because the server was lost while it went on, before it gives up."""
PATIENCE_S = 60
"""How long it then waits for the server to come back; and at the beginning, if a schedule has started it."""
SENTINEL_S = 30
"""How often the sentinel connection is looked at, at most."""

DESCRIPTION = """
What every customer's jobs did, per action type, marketplace and day, in a table of each tenant's schema.

A day is **recomputed whole** from the jobs that ended on it and from their tasks, and only rows that differ are
written. So it can be materialized again at any time, in any order, for any range: late or corrected jobs come right.
**A counted job stays counted**, whatever the application deletes: it is remembered in `marketplace_job_facts`, as it
was last seen. To have the numbers of what the source still holds, run the days with `allow_shrink: true` and `tenants`.

- **Materialized** means that the day was run for every tenant. Its metadata show what is stored for all tenants, also
  for those that the run has not computed, and under `run_` what the run itself did; if what is stored for a tenant
  could not be read, only that. A dropped tenant is no longer in the numbers of the runs after it. What was computed for
  which tenant and day stands in its table `marketplace_job_stats_days`; and how a row has changed since, in
  `marketplace_job_stats_changes`.
- **Held back**: a day whose numbers no facts stand behind, such as the old counter's, and one would fall. The stored
  rows are kept, until the days are run with `allow_shrink: true`.

*When it is red*, every tenant is computed but those that the error names. Fix what it says, and materialize the days
again. With `only_missing: true`, a run computes only days that were not computed for a tenant since they were
over, or by an older definition of the numbers.
"""


class StatsConfig(dg.Config):
    """The options of a run."""

    tenants: list[str] = Field(
        default=[], description="Schema names, for instance user_7; default all. The days are then only observed."
    )
    only_missing: bool = Field(
        default=False,
        description="Compute, of these days, only those that a tenant's ledger lacks, or has open, or by an older "
        "definition.",
    )
    allow_shrink: bool = Field(
        default=False, description="Forget, for these days, what the source no longer holds; needs `tenants`."
    )


def build_marketplace_job_stats(
    partitions: dg.DailyPartitionsDefinition,
    sweep_days: int,
    key_prefix: tuple[str, ...] = (),
    failure_reasons: bool = True,
) -> dg.AssetsDefinition:
    """The asset over these days; its nightly runs look for days that are due among the last `sweep_days`."""
    key = dg.AssetKey([*key_prefix, MarketplaceJobStats.__tablename__])

    # One asset only; but for a plain one, Dagster demands a result of every check of every run.
    @dg.multi_asset(
        name=key.to_python_identifier(),
        specs=[
            dg.AssetSpec(
                key,
                deps=[table_key(MarketplaceJobFact, key_prefix)],
                # A run of some tenants only observes, and one with failed tenants has said all when it fails.
                skippable=True,
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
            )
        ],
        check_specs=check_specs(key),
        can_subset=True,
        # Where the instance limits it, as deploy/dagster.yaml does, runs follow each other.
        pool=key.to_python_identifier(),
        partitions_def=partitions,
        backfill_policy=dg.BackfillPolicy.single_run(),
    )
    def marketplace_job_stats(
        context: dg.AssetExecutionContext, config: StatsConfig, tenant_database: TenantDatabase
    ) -> Iterator[dg.MaterializeResult[Any] | dg.AssetMaterialization | dg.AssetObservation | dg.AssetCheckResult]:
        try:
            if key not in context.selected_asset_keys:
                raise UsageError("These checks are evaluated when days are computed: materialize the asset.")
            spec = _spec(context, config, partitions, sweep_days, failure_reasons)
            report = compute(context, config, tenant_database, spec)
        except UsageError as error:
            raise RunFailure(error.message) from None
        context.log.info(report.summary())

        days = {
            k: report.day_metadata(day, of_all=not config.tenants)
            for k, day in zip(context.partition_keys, spec.window.dates, strict=True)
        }
        # What belongs to the whole run is stored once, with its last day: that is the one that Dagit shows first.
        days[context.partition_keys[-1]] |= report.run_metadata()
        if config.tenants:
            for day, metadata in days.items():
                yield dg.AssetObservation(key, partition=day, metadata=metadata)
        elif not report.failed:
            for day, metadata in days.items():
                context.add_asset_metadata(metadata, asset_key=key, partition_key=day)
            yield dg.MaterializeResult(asset_key=key)
        elif report.done:
            # Yielded, not logged: what is logged after the last yield of a step that fails is lost.
            for day, metadata in days.items():
                yield dg.AssetMaterialization(key, partition=day, metadata=metadata)
        # What is true of some tenants says nothing about the others, and what was not looked at is not right.
        if not config.tenants and not config.only_missing:
            yield from check_results(report, key)
        if report.failed:
            raise RunFailure(report.failure(), metadata=report.run_metadata())

    return marketplace_job_stats


def _spec(
    context: dg.AssetExecutionContext,
    config: StatsConfig,
    partitions: dg.DailyPartitionsDefinition,
    sweep_days: int,
    failure_reasons: bool,
) -> ComputeSpec:
    """What this run asks of every tenant. Raises UsageError if that makes no sense."""
    if config.allow_shrink and not config.tenants:
        raise UsageError(
            "allow_shrink forgets what the source no longer holds: name the `tenants` that it is meant for."
        )
    keys = context.partition_keys
    schedule = context.run.tags.get(SCHEDULE_TAG)
    catch_up = None
    if schedule == NIGHTLY:
        bound = date.fromisoformat(keys[-1]) - timedelta(days=sweep_days - 1)
        since = max(str(partitions.get_first_partition_key()), bound.isoformat())
        if since < keys[0]:
            earlier = dg.PartitionKeyRange(since, keys[-1])
            catch_up = Window.of(partitions, partitions.get_partition_keys_in_range(earlier))
    return ComputeSpec(
        window=Window.of(partitions, keys),
        run_id=context.run.run_id,
        days=Days(partitions),
        only_missing=config.only_missing,
        catch_up=catch_up,
        allow_shrink=config.allow_shrink,
        count_no_end=schedule == WEEKLY,
        reasons=failure_reasons,
    )


def compute(
    context: dg.AssetExecutionContext, config: StatsConfig, database: TenantDatabase, spec: ComputeSpec
) -> RunReport:
    """Computes the days for the chosen tenants. What is returned is durable. Raises UsageError."""
    failed: dict[str, str] = {}  # While the server was lost: perhaps one of them is why.
    try:
        return _compute_in_passes(context, config, database, spec, failed)
    except UsageError as error:
        if not failed:
            raise
        raise UsageError(f"{error.message} Before that, {first_reasons(failed)}.") from None


def _compute_in_passes(
    context: dg.AssetExecutionContext,
    config: StatsConfig,
    database: TenantDatabase,
    spec: ComputeSpec,
    failed: dict[str, str],
) -> RunReport:
    # At night there is nobody to begin again; a person rather knows at once that the server is down.
    patience_s = PATIENCE_S if SCHEDULE_TAG in context.run.tags else 0
    for _ in range(PASSES):
        with database.connect(patience_s) as (engine, sentinel):
            report = RunReport(spec, server_and_database(sentinel), _action_types(context, sentinel))
            try:
                _compute_once(context, config, database, report, engine, sentinel)
            except sa.exc.DBAPIError as error:
                if not sentinel.invalidated:
                    doubt = "But that may not be on disk" if report.done else "The reason"
                    raise UsageError(f"{report.summary()}. {doubt}: {explain(error)}. Run it again.") from None
                # A server that crashes forgets what was committed last, so nobody is done; to compute a tenant again
                # that is done after all changes nothing.
                patience_s = PATIENCE_S
                failed |= report.failed
                context.log.warning(f"The server was lost ({explain(error)}): beginning again, with every tenant")
            else:
                return report
    raise UsageError(
        f"The server was lost in each of {PASSES} tries, so nothing is sure to be on disk: look after "
        f"{report.database}, then run it again."
    )


def _action_types(context: dg.AssetExecutionContext, sentinel: sa.Connection) -> dict[int, tuple[str, str]] | None:
    """The names of the actions, which are shown beside the numbers and change none; None if they cannot be read."""
    try:
        return action_types(sentinel) or {}
    except sa.exc.DBAPIError as error:
        if sentinel.invalidated:
            raise UsageError(f"The server was lost: {explain(error)}. Run it again.") from None
        context.log.warning(f"Actions are shown by their ids, as their names could not be read: {explain(error)}")
        return None


def _compute_once(
    context: dg.AssetExecutionContext,
    config: StatsConfig,
    database: TenantDatabase,
    report: RunReport,
    engine: sa.Engine,
    sentinel: sa.Connection,
) -> None:
    """One pass over the tenants, several at once. Raises UsageError, or a DBAPIError if the sentinel was lost."""

    def work(connection: sa.Connection, tenant: Tenant) -> TenantResult | Tenant:
        if tenant.skipped or tenant.failed:
            return tenant
        try:
            return write_tenant(connection, tenant.schema, report.spec, tenant.has_tasks)
        except sa.exc.DBAPIError:
            if connection.invalidated:
                raise
            # The tenant may have changed since it was looked at; then its new state says more than the error.
            with connection.begin():
                found = find_tenants(connection, [tenant.schema])
            if found == [tenant]:
                raise
            if found and not found[0].skipped and not found[0].failed:
                return write_tenant(connection, tenant.schema, report.spec, found[0].has_tasks)
            return (
                found[0]
                if found
                else Tenant(tenant.schema, skipped="gone: dropped while the run went on", has_stored=False)
            )

    def stored(connection: sa.Connection, tenant: Tenant) -> dict[date, Day]:
        return stored_days(connection, tenant.schema, report.spec)

    with sentinel.begin():
        tenants = choose_tenants(sentinel, config.tenants)
        if warning := superuser_warning(sentinel):
            context.log.warning(warning)
    context.log.info(f"Computing {report.spec.window}, for {len(tenants)} tenants of {report.database}")
    try:
        with closing(database.for_each(engine, tenants, work)) as outcomes:
            looked_at = time.monotonic()
            for number, (tenant, outcome) in enumerate(outcomes, start=1):
                report.add(tenant, outcome)
                if tenant.schema in report.failed:
                    context.log.error(f"{tenant.schema} failed: {report.failed[tenant.schema]}")
                # Is it the tenant, or the server? And a connection that is silent for minutes may be ended on the way.
                if tenant.schema in report.failed or time.monotonic() > looked_at + SENTINEL_S:
                    require_answer(sentinel)
                    looked_at = time.monotonic()
                if number % 1000 == 0:
                    context.log.info(f"{number} of {len(tenants)} tenants")
    except NoConnection:
        require_answer(sentinel)
        raise
    if not config.tenants:
        # What is shown of a day is what is stored for all, whether the run has computed them or not.
        left = [tenant for tenant in report.left if tenant.has_stored]
        with closing(database.for_each(engine, left, stored)) as read:
            for tenant, outcome_of in read:
                report.add_stored(tenant, outcome_of)
    if not report.done and not report.failed:
        raise UsageError(f"Nothing to compute in {report.database}. {first_reasons(report.skipped)}.")
    if report.done:
        make_durable(sentinel, report.spec.run_id)
