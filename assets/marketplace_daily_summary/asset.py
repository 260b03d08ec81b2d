"""The asset: for each batch of tenants, add up their stored stats; then all batches; then write and show."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from datetime import date
from typing import Any, NamedTuple

import dagster as dg
import sqlalchemy as sa

from assets import lineage
from assets.lineage import column_lineage
from assets.reporting import explain, first_reasons, table
from assets.sources import column_schema
from models.stats import MarketplaceJobStats
from models.summary import MarketplaceDailySummary
from pipelines.action_types import action_types
from pipelines.database import server_and_database
from pipelines.failure import RunFailure
from pipelines.partitions import Window
from pipelines.resources import TenantDatabase
from pipelines.settings import UsageError
from pipelines.tenants import choose_tenants, superuser_warning

BATCH = 50
"""How many tenants one statement adds up; a hundred more branches are planned much slower."""

DESCRIPTION = """
What the jobs of all customers together did, per day, marketplace and action, in one small table for any BI tool.

It is the table `marketplace_stats.marketplace_daily_summary`. It adds up what `marketplace_job_stats` holds, so it runs
after it, in a job of its own: also after a run in which single tenants failed, whose former numbers are then in the
sums. `tenants_active` counts the tenants with a job in the row, cancelled and expired ones included; `top_failing`
names those with the most failed jobs, `top_reasons` why most jobs failed, over all tenants. Percentiles are those of
all jobs of the row, within 1 %.

`tenants_older_definition` counts the active tenants whose numbers of that day are not known to be of the newest
definition: computed by an older one, held back, or never computed by the batch. Such numbers are in the sums, but lack
what the definition before did not have, for instance waits.

*When it is red*, the rows are there, without the tenants, or without the failure reasons of the tenants, that the error
names. Fix what it says, and materialize the days again.
"""


class _Sums(NamedTuple):
    """What was added up, and whose stats, or only whose facts, could not be read, with the reason."""

    frame: Any
    # How many of each day's active tenants have numbers of an older definition.
    older: Counter[date]
    failed: dict[str, str]
    without_reasons: dict[str, str]


def build_marketplace_daily_summary(
    partitions: dg.DailyPartitionsDefinition, key_prefix: tuple[str, ...] = ()
) -> dg.AssetsDefinition:
    """The asset over these days."""

    @dg.asset(
        name=MarketplaceDailySummary.__tablename__,
        key_prefix=list(key_prefix) or None,
        partitions_def=partitions,
        backfill_policy=dg.BackfillPolicy.single_run(),
        deps=[dg.AssetKey([*key_prefix, MarketplaceJobStats.__tablename__])],
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
        io_manager_key="summary_table",
        output_required=False,
    )
    def marketplace_daily_summary(
        context: dg.AssetExecutionContext, tenant_database: TenantDatabase
    ) -> Iterator[dg.MaterializeResult[Any]]:
        try:
            window = Window.of(partitions, context.partition_keys)
            with tenant_database.connect() as (engine, connection):
                sums = _add_up(context, tenant_database, engine, connection, window)
        except UsageError as error:
            raise RunFailure(error.message) from None
        except sa.exc.DBAPIError as error:
            raise RunFailure(f"The stats could not be read: {explain(error)}.") from None
        for key, day in zip(context.partition_keys, window.dates, strict=True):
            rows = sums.frame[sums.frame["date"] == day]
            metadata: dict[str, Any] = {
                "dagster/row_count": len(rows),
                "jobs": int(rows["total_jobs"].sum()),
                "failed_jobs": int(rows["failure_count"].sum()),
                "tasks": int(rows["total_tasks"].sum()),
                "tenants_older_definition": sums.older[day],
            }
            # What belongs to the whole run is stored once, with its last day: that is the one that Dagit shows first.
            if day == window.dates[-1]:
                metadata |= {
                    "run_tenants_failed": len(sums.failed),
                    "run_tenants_without_reasons": len(sums.without_reasons),
                    "run_preview": table(_preview(sums.frame)),
                }
            context.add_asset_metadata(metadata, partition_key=key)
        yield dg.MaterializeResult(value=sums.frame)
        sentences = [
            f"{len(tenants)} tenants are not in {what}. {first_reasons(tenants)}."
            for what, tenants in (("the summary", sums.failed), ("its failure reasons", sums.without_reasons))
            if tenants
        ]
        if sentences:
            raise RunFailure(" ".join(sentences))

    return marketplace_daily_summary


def _add_up(
    context: dg.AssetExecutionContext,
    database: TenantDatabase,
    engine: sa.Engine,
    connection: sa.Connection,
    window: Window,
) -> _Sums:
    """What the tenants did on these days. Raises UsageError."""
    # They need pandas: not for every import.
    from assets.marketplace_daily_summary.aggregate import add_up, batch_query, reasons_query, top_reasons

    with connection.begin():
        found = choose_tenants(connection)
        if warning := superuser_warning(connection):
            context.log.warning(warning)
    # What is stored counts, whatever has become of the source; but where there never was one, nothing is missing.
    tenants = [tenant for tenant in found if not (tenant.skipped and tenant.unreadable)]
    types = action_types(connection)
    parameters = window.parameters | {
        "action_type_ids": [row.id for row in types],
        "action_codes": [row.code for row in types],
        "action_names": [row.name for row in types],
    }
    failed = {tenant.schema: tenant.unreadable for tenant in tenants if tenant.unreadable}
    schemas = [tenant.schema for tenant in tenants if not tenant.unreadable]
    context.log.info(f"Adding up {window}, of {len(schemas)} tenants of {server_and_database(connection)}")
    without_reasons: dict[str, str] = {}

    def read(
        schemas: Sequence[str], query: Callable[[Sequence[str]], sa.Select[Any]], failed: dict[str, str]
    ) -> Iterator[Sequence[Mapping[Any, Any]]]:
        """The rows of this query over each batch of tenants. A batch that fails is read tenant by tenant, to know which
        it was; that one goes into `failed`.
        """

        def work(connection: sa.Connection, batch: Sequence[str]) -> Sequence[Mapping[Any, Any]]:
            with connection.begin():
                # Several batches are read at once anyway, and parallel workers take longer to start than a day to read.
                connection.exec_driver_sql("SET LOCAL max_parallel_workers_per_gather = 0")
                return connection.execute(query(batch), parameters).mappings().all()

        for size in (BATCH, 1):
            batches = [schemas[start : start + size] for start in range(0, len(schemas), size)]
            schemas = []
            with closing(database.for_each(engine, batches, work)) as outcomes:
                for batch, outcome in outcomes:
                    if not isinstance(outcome, Exception):
                        yield outcome
                    elif size > 1:
                        schemas.extend(batch)
                    else:
                        failed[batch[0]] = explain(outcome)

    parts: list[Mapping[Any, Any]] = []
    older: Counter[date] = Counter()
    for rows in read(schemas, batch_query, failed):
        parts.extend(rows)
        older.update({row["date"]: row["tenants_older_on_date"] or 0 for row in rows})
    if failed and len(failed) == len(tenants):
        # Nothing is known, so nothing is written: else what is there would go.
        raise UsageError(f"No tenant could be read in {server_and_database(connection)}. {first_reasons(failed)}.")
    # In statements of their own, so that a tenant whose facts cannot be read keeps its numbers.
    has_numbers = [schema for schema in schemas if schema not in failed]
    batches = read(has_numbers, reasons_query, without_reasons)
    reasons = top_reasons(row for rows in batches for row in rows)
    return _Sums(add_up(parts, reasons), older, failed, without_reasons)


def _preview(frame: Any) -> list[dict[str, Any]]:
    """The last days first, the busiest rows of each first."""
    newest = frame.sort_values(["date", "total_jobs"], ascending=False)
    return [
        {
            "date": str(row["date"]),
            "marketplace": row["marketplace"],
            "action": row["action_code"],
            "tenants": row["tenants_active"],
            "jobs": row["total_jobs"],
            "failed": row["failure_count"],
            "success %": None if row["success_rate"] is None else round(100 * row["success_rate"], 1),
            "p50 ms": None if row["p50_duration_ms"] is None else round(row["p50_duration_ms"]),
            "p95 ms": None if row["p95_duration_ms"] is None else round(row["p95_duration_ms"]),
            "p95 wait ms": None if row["p95_wait_ms"] is None else round(row["p95_wait_ms"]),
            "most failures": ", ".join(f"{entry['tenant']} ({entry['failures']})" for entry in row["top_failing"][:3]),
            "top reason": ", ".join(f"{entry['reason']} ({entry['jobs']})" for entry in row["top_reasons"][:1]),
        }
        for row in newest.to_dict("records")
    ]
