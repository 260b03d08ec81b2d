"""The asset: for each batch of tenants, add up their stored stats; then all batches; then write and show."""

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import date, datetime
from functools import partial
from typing import Any

import dagster as dg
import sqlalchemy as sa

from assets import lineage
from assets.lineage import column_lineage
from assets.marketplace_daily_summary.table import read_days, write
from assets.reporting import MOST_ROWS, counted, explain, first_reasons, table
from assets.sources import column_schema
from models.sources import MarketplaceActionType
from models.stats import MarketplaceJobStats
from models.summary import MarketplaceDailySummary
from pipelines.action_types import UNKNOWN, action_types
from pipelines.database import server_and_database
from pipelines.failure import RunFailure
from pipelines.partitions import Window
from pipelines.resources import TenantDatabase
from pipelines.settings import UsageError
from pipelines.tenants import Tenant, choose_tenants, find_tenants, superuser_warning

BATCH = 50
"""How many tenants one statement adds up; a hundred more branches are planned much slower."""

SUMS = "sums_are_the_ledgers"

DESCRIPTION = """
What the jobs of all customers together did, per day, marketplace and action, in one small table for any BI tool.

It is the table `marketplace_stats.marketplace_daily_summary`. It adds up what `marketplace_job_stats` holds, whatever
has become of the sources, so it runs after it, in a job of its own: also after a run in which single tenants failed,
whose former numbers are then in the sums. `tenants_active` counts the tenants with a job in the row, cancelled and
expired ones included; `top_failing` names those with the most failed jobs, `top_reasons` why most jobs failed, over all
tenants. Percentiles are those of all jobs of the row, within 1 %.

**How complete a day is** stands in its metadata and in `marketplace_stats.marketplace_daily_summary_days`: of the
tenants that are expected, for how many the day is computed, held back, still open (computed before it was over), there
from the old counter only, or missing.
Expected is who has an earlier day in its ledger, or jobs that ended by then, and still has a table of jobs.

`tenants_older_definition` counts the active tenants whose numbers of that day are not known to be of the newest
definition: computed by an older one, held back, or never computed by the batch. Such numbers are in the sums, but lack
what the definition before did not have, for instance waits.

**A dropped tenant, a renamed action**: the summary is of the tenants that there are, under the names that actions have
now, on all days. Each run looks for days that were summarized before, and has its sensor request them.

*When it is red*, the error names the tenants whose stats could not be read. Days in which they have a part are left as
they were; days that were never summarized are there without them, and say so. Fix what it says; its sensor requests
these days again every few hours.
"""
_CHECK = """
**Warns** if the sums are not those of the ledgers: on the days of the run, if a tenant's rows are not what its ledger
says; on all others, if their ledgers, their rows here or the names of their actions have changed since they were
summarized. Days with a part of a tenant that cannot be read just now are not judged.

*When it is red:* the sensor requests the days that have changed, and the next run is green. Rows that somebody else
has written to are made right when the stats of that day are materialized again.
"""


@dataclass
class _Read:
    """What was read of the days: the frame of the rows, what stands behind each day, and what is wrong.

    `older`: how many of each day's active tenants have numbers of an older definition. `unread`, `without_reasons`:
    whose stats, or only whose facts, could not be read, with the reason. `differing`: stored rows that are not what
    their ledger says. `changed`: other days, whose summary is not what would be read now, with the reason.
    """

    frame: Any
    days: dict[date, dict[str, Any]]
    older: Counter[date]
    unread: dict[str, str]
    without_reasons: dict[str, str]
    differing: list[dict[str, Any]]
    changed: dict[date, str]


def build_marketplace_daily_summary(
    partitions: dg.DailyPartitionsDefinition, key_prefix: tuple[str, ...] = ()
) -> dg.AssetsDefinition:
    """The asset over these days."""
    key = dg.AssetKey([*key_prefix, MarketplaceDailySummary.__tablename__])

    @dg.asset(
        key=key,
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
        check_specs=[dg.AssetCheckSpec(SUMS, asset=key, description=_CHECK)],
        io_manager_key="summary_table",
        output_required=False,
    )
    def marketplace_daily_summary(
        context: dg.AssetExecutionContext, tenant_database: TenantDatabase
    ) -> Iterator[dg.MaterializeResult[Any] | dg.AssetMaterialization | dg.AssetObservation | dg.AssetCheckResult]:
        try:
            window = Window.of(partitions, context.partition_keys)
            with tenant_database.connect() as (engine, connection):
                found = read_tenants(context, tenant_database, engine, connection, window, partitions)
                records = found.frame.to_dict("records")
                changes, kept = write(connection, records, found.days, found.unread, bool(found.without_reasons))
        except UsageError as error:
            raise RunFailure(error.message) from None
        except sa.exc.DBAPIError as error:
            raise RunFailure(f"The stats could not be read, or the summary not written: {explain(error)}.") from None
        days = {day: day_metadata(found, day) for day in window.dates if day not in kept}
        run = {
            **{f"run_{name}": number for name, number in changes.items()},
            "run_tenants_not_read": len(found.unread),
            "run_tenants_without_reasons": len(found.without_reasons),
            "run_days_kept": len(kept),
            "run_other_days_changed": len(found.changed),
            "run_preview": table(preview(found.frame)),
        }
        if days:
            # What belongs to the whole run is stored once, with its last day: that is the one that Dagit shows first.
            days[max(days)] |= run
        is_whole = not (found.unread or found.without_reasons)
        for day, metadata in days.items():
            if is_whole:
                context.add_asset_metadata(metadata, partition_key=day.isoformat())
            else:
                yield dg.AssetMaterialization(key, partition=day.isoformat(), metadata=metadata)
        if is_whole:
            yield dg.MaterializeResult()
        # Observed after it was materialized: by that the sensor knows that a day is to be summarized again.
        again = dict(found.changed)
        if not is_whole:
            again |= dict.fromkeys(window.dates, "not all that is stored could be read")
        for day, reason in again.items():
            yield dg.AssetObservation(key, partition=day.isoformat(), metadata={"again_because": reason})
        yield _check(key, found, window)
        if not is_whole:
            raise RunFailure(_failure(found, kept), metadata=run)

    return marketplace_daily_summary


def day_metadata(found: _Read, day: date) -> dict[str, Any]:
    rows = found.frame[found.frame["date"] == day]
    record = found.days[day]
    missing = record["missing_tenants"]
    more = f", and {len(missing) - MOST_ROWS} more" if len(missing) > MOST_ROWS else ""
    return {
        "dagster/row_count": len(rows),
        "jobs": int(rows["total_jobs"].sum()),
        "failed_jobs": int(rows["failure_count"].sum()),
        "tasks": int(rows["total_tasks"].sum()),
        **{name: number for name, number in record.items() if name.startswith("tenants_")},
        "tenants_older_definition": found.older[day],
        **({"missing_tenants": ", ".join(missing[:MOST_ROWS]) + more} if missing else {}),
    }


def _check(key: dg.AssetKey, found: _Read, window: Window) -> dg.AssetCheckResult:
    """The result of the check SUMS."""
    rows = [*found.differing, *({"date": str(day), "what": reason} for day, reason in found.changed.items())]
    sentence = f"{counted(len(found.differing), 'ledger entry', 'ledger entries')} not as stored on {window}; " + (
        f"{counted(len(found.changed), 'other day')} to be summarized again"
    )
    return dg.AssetCheckResult(
        asset_key=key,
        check_name=SUMS,
        passed=not rows,
        severity=dg.AssetCheckSeverity.WARN,
        description=sentence,
        metadata={"differences": table(rows)} if rows else {},
    )


def _failure(found: _Read, kept: Collection[date]) -> str:
    sentences = [
        f"{counted(len(tenants), 'tenant')} could not be read{what}. {first_reasons(tenants)}."
        for what, tenants in (("", found.unread), (" for the failure reasons", found.without_reasons))
        if tenants
    ]
    if kept:
        days = f"{counted(len(kept), 'day')}, {min(kept)} to {max(kept)}," if len(kept) > 1 else str(min(kept))
        sentences.append(f"{days} left as summarized before, so that nothing of them is lost.")
    return " ".join(sentences)


def read_tenants(
    context: dg.AssetExecutionContext,
    database: TenantDatabase,
    engine: sa.Engine,
    connection: sa.Connection,
    window: Window,
    partitions: dg.DailyPartitionsDefinition,
    others: bool = True,
) -> _Read:
    """What the tenants did on these days, and which `others` have changed since they were read. Raises UsageError."""
    # They need pandas: not for every import.
    from assets.marketplace_daily_summary.aggregate import (
        active_query,
        add_up,
        add_up_reasons,
        batch_query,
        reasons_query,
    )
    from assets.marketplace_daily_summary.completeness import Day, changed_days, exceptions_query, ledgers_query

    with connection.begin():
        found = {tenant.schema: tenant for tenant in choose_tenants(connection)}
        if warning := superuser_warning(connection):
            context.log.warning(warning)
    types = action_types(connection)
    if types is None and any(
        code != UNKNOWN
        for record in read_days(connection).values()
        for code, _ in (record["action_types"] or {}).values()
    ):
        raise UsageError(
            f"{MarketplaceActionType.__table__.fullname} is missing in {server_and_database(connection)}, and the "
            "summary has names from it, which would become unknown: restore it, or make it without rows."
        )
    types = types or {}
    parameters = window.parameters | {
        "action_type_ids": list(types),
        "action_codes": [code for code, _ in types.values()],
        "action_names": [name for _, name in types.values()],
    }
    # What is stored counts, whatever has become of the source; but where there never was a table, nothing is stored.
    unread = {schema: it.unreadable for schema, it in found.items() if it.has_stored and it.unreadable}
    schemas = [schema for schema, it in found.items() if not it.unreadable]
    context.log.info(f"Adding up {window}, of {len(schemas)} tenants of {server_and_database(connection)}")
    without_reasons: dict[str, str] = {}

    def read(
        schemas: Sequence[str],
        queries: Sequence[Callable[[Sequence[str]], sa.Executable]],
        failed: dict[str, str],
    ) -> Iterator[tuple[Sequence[Mapping[Any, Any]], ...]]:
        """The rows of these queries over each batch of tenants, in one snapshot. A batch that fails is read tenant by
        tenant, to know which it was; that one goes into `failed`.
        """

        def work(connection: sa.Connection, batch: Sequence[str]) -> tuple[Sequence[Mapping[Any, Any]], ...]:
            with connection.begin():
                # Several batches are read at once anyway, and parallel workers take longer to start than a day to read.
                connection.exec_driver_sql("SET LOCAL max_parallel_workers_per_gather = 0")
                return tuple(connection.execute(query(batch), parameters).mappings().all() for query in queries)

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
    days: defaultdict[date, Day] = defaultdict(Day)
    differing: list[dict[str, Any]] = []
    empty: set[str] = {schema for schema, it in found.items() if not it.has_stored}
    with_rows: set[tuple[str, date]] = set()
    # To look at whole ledgers takes longer than to read a day.
    of_ledgers = (partial(ledgers_query, in_window=not others), partial(exceptions_query, in_window=not others))
    queries = (batch_query, *of_ledgers, active_query)
    for rows, ledgers, exceptions, active in read(schemas, queries, unread):
        parts.extend(rows)
        older.update({row["date"]: row["tenants_older_on_date"] or 0 for row in rows})
        for row in rows:
            of_day = days[row["date"]]
            of_day.action_types |= {str(id_): [*types.get(id_, (UNKNOWN, UNKNOWN))] for id_ in row["action_ids"]}
        for row in ledgers:
            of_day = days[row["date"]]
            of_day.computed += row["computed"]
            of_day.held_back += row["held_back"]
            of_day.open += row["open"]
            of_day.state += row["state"]
        for row in active:
            days[row["date"]].active[row["tenant"]] = row["first_written"]
        for row in exceptions:
            if row["has_entry"]:
                differing.append({"date": str(row["date"]), "what": f"{row['tenant']}: rows differ from its ledger"})
            elif row["has_rows"]:
                days[row["date"]].counter_only += 1
                with_rows.add((row["tenant"], row["date"]))
            elif row["first_date"] is None:
                empty.add(row["tenant"])
            elif not found[row["tenant"]].skipped:  # Else there is nothing to compute the day from.
                days[row["date"]].missing.add(row["tenant"])
    if unread:  # Who was dropped meanwhile is no longer expected.
        with connection.begin():
            left = {tenant.schema for tenant in find_tenants(connection, list(unread))}
        unread = {schema: reason for schema, reason in unread.items() if schema in left}
    has_numbers = [schema for schema in schemas if schema not in unread]
    unreadable = {schema: it.unreadable for schema, it in found.items() if it.unreadable and not it.skipped} | unread
    if unreadable and not has_numbers:
        # Nothing is known, so nothing is written: else what is there would go.
        raise UsageError(f"No tenant could be read in {server_and_database(connection)}. {first_reasons(unreadable)}.")
    for schema, end in _first_jobs(database, engine, [found[schema] for schema in empty], window, partitions):
        for day, day_end in zip(window.dates, (*window.starts[1:], window.end), strict=True):
            if end < day_end and (schema, day) not in with_rows:
                days[day].missing.add(schema)
    # In statements of their own, so that a tenant whose facts cannot be read keeps its numbers.
    batches = read(has_numbers, (reasons_query,), without_reasons)
    reasons = add_up_reasons(row for (rows,) in batches for row in rows)
    frame = add_up(parts, reasons)
    ended = frame["total_jobs"] + frame["cancelled_count"] + frame["expired_count"]
    for day in window.dates:
        days[day].missing |= set(unread)
        days[day].job_count = int(ended[frame["date"] == day].sum())
    closed = {date.fromisoformat(key) for key in partitions.get_partition_keys()} if others else set()
    compared = closed - set(window.dates)
    recorded = {day: record for day, record in read_days(connection).items() if day in compared}
    states = {day: it.state for day, it in days.items() if day in compared}
    return _Read(
        frame,
        {day: days[day].record(window.time_zone) for day in window.dates},
        older,
        unread,
        without_reasons,
        differing,
        changed_days(recorded, states, types, unread),
    )


def _first_jobs(
    database: TenantDatabase,
    engine: sa.Engine,
    tenants: Sequence[Tenant],
    window: Window,
    partitions: dg.DailyPartitionsDefinition,
) -> Iterator[tuple[str, datetime]]:
    """Tenants of which nothing is stored, although jobs of theirs have ended, and when the first one did.

    Only of such a tenant the source is asked: a new customer is not missing on the days before. Where it cannot be
    read, the tenant counts as missing on all days.
    """
    from assets.marketplace_daily_summary.completeness import first_job_query

    start = partitions.time_window_for_partition_key(partitions.get_first_partition_key() or "").start

    def work(connection: sa.Connection, schema: str) -> datetime | None:
        with connection.begin():
            found: datetime | None = connection.scalar(first_job_query(schema), {"start": start, "end": window.end})
            return found

    schemas = [tenant.schema for tenant in tenants if not tenant.skipped]
    with closing(database.for_each(engine, schemas, work)) as outcomes:
        for schema, outcome in outcomes:
            if isinstance(outcome, datetime):
                yield schema, outcome
            elif outcome is not None:
                yield schema, start


def preview(frame: Any) -> list[dict[str, Any]]:
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
