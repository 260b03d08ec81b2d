"""The asset: read what is new in each database, keep it, add it up in the home, show it."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from typing import Any

import dagster as dg
import sqlalchemy as sa

from assets.marketplace_daily_summary.table import upsert, write_days, write_rows
from assets.reporting import counted, explain, first_reasons, table
from assets.sources import column_schema
from models.summary import (
    MarketplaceDailySummary,
    MarketplaceDailySummaryDay,
    MarketplaceGlobalSummary,
    MarketplaceGlobalSummaryDay,
    MarketplaceGlobalSummaryPart,
)
from pipelines.completeness import describe
from pipelines.database import require_table, server_and_database
from pipelines.databases import OtherDatabases
from pipelines.failure import RunFailure
from pipelines.partitions import Window
from pipelines.resources import TenantDatabase
from pipelines.settings import UsageError

DESCRIPTION = """
What the jobs of the customers of all databases together did, per day, marketplace and action: the same columns as
`marketplace_daily_summary`, added up exactly, with percentiles of all jobs.

It is the table `marketplace_stats.marketplace_global_summary` of the database at `DATABASE_URL`, its home. Each run
reads from every database in `STATS_DATABASES` the days of its summary that have changed since they were last read,
whatever days it was asked for, and keeps them in the home. So a database that is down stays in the sums as it was last
seen, and the first run after it is back makes up for it.

**How complete a day is** stands in its metadata and in `marketplace_stats.marketplace_global_summary_days`: over how
many tenants, and which databases are missing, or old since they could not be read. A missing one counts as the tenants
that it had on the last day before.

**A customer that two databases count** on a day, since a copy of its schema was left behind or a summary was not made
again after a move, is named, and the rows of that day stay as they were until it is in one of them only.

*When it is red*, the days are there, but for what the error names. Fix what it says; its sensor requests the days
again every few hours.
"""

_rows, _days, _parts = (
    model.__table__ for model in (MarketplaceGlobalSummary, MarketplaceGlobalSummaryDay, MarketplaceGlobalSummaryPart)
)
_one_rows, _one_days = MarketplaceDailySummary.__table__, MarketplaceDailySummaryDay.__table__

# Of each day that a database has summarized, a hash of when its rows were written, and how many tenants it expects.
_VERSIONS = sa.text(f"""
    SELECT CAST(days.date AS date) AS date, days.time_zone,
           md5(concat_ws('/', extract(epoch FROM days.computed_at), rows.hash)) AS version
      FROM {_one_days.fullname} AS days
      LEFT JOIN (SELECT date, sum(CAST(hashtextextended(
                            concat_ws('/', marketplace, action_code, extract(epoch FROM computed_at)), 0
                        ) AS numeric)) AS hash
                   FROM {_one_rows.fullname} GROUP BY date) AS rows ON rows.date = days.date""")
# The summary of these days: as JSON, which is how it is kept.
_READ = sa.text(f"""
    SELECT CAST(days.date AS date) AS date, to_jsonb(days) - 'computed_at' AS day,
           coalesce((SELECT jsonb_agg(to_jsonb(one) - 'computed_at' ORDER BY one.marketplace, one.action_code)
                       FROM {_one_rows.fullname} AS one WHERE one.date = days.date), '[]') AS rows
      FROM {_one_days.fullname} AS days WHERE days.date = ANY (:dates)""").bindparams(
    sa.bindparam("dates", type_=sa.ARRAY(sa.Date))
)
_KNOWN = sa.text(f"""
    SELECT CAST(date AS date) AS date, database, version, CAST(day ->> 'tenants_expected' AS integer) AS tenants
      FROM {_parts.fullname} ORDER BY date""")
# In any of these a day may be better today.
_MARKED = sa.text(f"""
    SELECT date FROM {_days.fullname} WHERE missing_databases || old_databases || tenants_twice <> '{{}}'""")


@dataclass
class _Run:
    """What a run found: the record of each day, which databases could not be read, who is counted twice and where, who
    was in the numbers of a day and is no longer, and the days whose rows stay as they were."""

    days: dict[date, dict[str, Any]] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    unread: dict[str, str] = field(default_factory=dict)
    twice: dict[date, dict[str, list[str]]] = field(default_factory=dict)
    gone: dict[str, list[date]] = field(default_factory=dict)
    changes: dict[str, int] = field(default_factory=dict)
    read: dict[str, int] = field(default_factory=dict)

    def failure(self) -> str:
        sentences = []
        if self.unread:
            sentences.append(f"{counted(len(self.unread), 'database')} not read. {first_reasons(self.unread)}.")
        found: defaultdict[tuple[str, tuple[str, ...]], list[date]] = defaultdict(list)
        for day, customers in self.twice.items():
            for tenant, databases in customers.items():
                found[tenant, tuple(databases)].append(day)
        sentences += [
            f"{tenant} is counted in {' and in '.join(databases)} on {counted(len(days), 'day')}, {min(days)} to "
            f"{max(days)}, which stay as they were: drop or rename the copy in the place that it has left, and "
            "materialize the summary of these days there."
            for (tenant, databases), days in list(found.items())[:3]
        ]
        more = f" And {len(found) - 3} more customers." if len(found) > 3 else ""
        return " ".join(sentences) + more


def build_marketplace_global_summary(
    partitions: dg.DailyPartitionsDefinition, upstream: Sequence[dg.AssetKey], key_prefix: tuple[str, ...] = ()
) -> dg.AssetsDefinition:
    """The asset over these days, of the summaries with these keys."""
    key = dg.AssetKey([*key_prefix, MarketplaceGlobalSummary.__tablename__])

    @dg.asset(
        key=key,
        partitions_def=partitions,
        backfill_policy=dg.BackfillPolicy.single_run(),
        deps=list(upstream),
        description=DESCRIPTION,
        group_name="marketplace_stats",
        kinds={"postgres", "pandas"},
        owners=["team:data"],
        tags={"scope": "all-databases"},
        metadata={
            "dagster/column_schema": column_schema(_rows),
            "dagster/table_name": _rows.fullname,
        },
        output_required=False,
    )
    def marketplace_global_summary(
        context: dg.AssetExecutionContext, tenant_database: TenantDatabase, other_databases: OtherDatabases
    ) -> Iterator[dg.MaterializeResult[Any] | dg.AssetMaterialization | dg.AssetObservation]:
        try:
            window = Window.of(partitions, context.partition_keys)
            with tenant_database.connect() as (_, home):
                run = _update(context, home, other_databases, window, set(partitions.get_partition_keys()))
        except UsageError as error:
            raise RunFailure(error.message) from None
        except sa.exc.DBAPIError as error:
            raise RunFailure(f"The global summary could not be written: {explain(error)}.") from None
        for tenant, days in run.gone.items():
            context.log.warning(
                f"{tenant} is in no database any more on {counted(len(days), 'day')} where it was before"
            )
        metadata = {day: _metadata(run, day) for day in run.days if day not in run.twice}
        whole = {
            **{f"run_{name}": number for name, number in run.changes.items()},
            "run_databases_not_read": len(run.unread),
            "run_customers_gone": len(run.gone),
            "run_days_read": table([{"database": name, "days": number} for name, number in run.read.items()]),
        }
        is_whole = not (run.unread or run.twice)
        asked = {date.fromisoformat(key) for key in context.partition_keys}
        if metadata:
            metadata[max(asked.intersection(metadata), default=max(metadata))] |= whole
        for day, of_day in metadata.items():
            if is_whole and day in asked:
                context.add_asset_metadata(of_day, partition_key=day.isoformat())
            else:  # Yielded, not logged: what is logged after the last yield of a step that fails is lost.
                yield dg.AssetMaterialization(key, partition=day.isoformat(), metadata=of_day)
        if is_whole:
            yield dg.MaterializeResult()
            return
        # Observed after it was materialized: by that the sensor knows that a day is to be made again.
        for day in sorted({*asked, *run.twice}):
            yield dg.AssetObservation(key, partition=day.isoformat(), metadata={"again_because": run.failure()})
        raise RunFailure(run.failure(), metadata=whole)

    return marketplace_global_summary


def _metadata(run: _Run, day: date) -> dict[str, Any]:
    record = run.days[day]
    rows = [row for row in run.rows if row["date"] == day]
    return {
        "dagster/row_count": len(rows),
        "jobs": sum(row["total_jobs"] for row in rows),
        "failed_jobs": sum(row["failure_count"] for row in rows),
        "tasks": sum(row["total_tasks"] for row in rows),
        **{name: number for name, number in record.items() if name.startswith("tenants_") and name != "tenants_twice"},
        "complete": describe(record),
    }


def _update(
    context: dg.AssetExecutionContext,
    home: sa.Connection,
    databases: OtherDatabases,
    window: Window,
    partition_keys: set[str],
) -> _Run:
    """Reads what is new and makes the days again that it touches, in one durable transaction. Raises UsageError.

    The lock comes first, so that of two runs the later one reads later, too; readers are not disturbed.
    """
    from assets.marketplace_daily_summary.aggregate import add_up, add_up_reasons
    from assets.marketplace_global_summary import merge

    run = _Run()
    with home.begin():
        for one in (_rows, _days, _parts):
            require_table(home, one)
        home.execute(sa.text("SET LOCAL synchronous_commit = on"))
        home.execute(sa.text(f"LOCK TABLE {_rows.fullname} IN SHARE ROW EXCLUSIVE MODE"))
        known = {(row.date, row.database): row.version for row in home.execute(_KNOWN)}
        touched = {day for day, database in known if database not in databases.names} | set(home.scalars(_MARKED))
        before: dict[date, dict[str, merge.Part]] = {}
        for name in databases.names:
            have = {day: version for (day, database), version in known.items() if database == name}
            try:
                found, gone = _read(databases, name, have, window.time_zone)
            except UsageError as error:
                run.unread[name] = error.message
                continue
            except sa.exc.DBAPIError as error:
                run.unread[name] = explain(error)
                continue
            run.read[name] = len(found)
            touched |= {row["date"] for row in found} | gone
            for day, parts in _kept(home, touched - before.keys()).items():
                before[day] = parts
            home.execute(sa.delete(_parts).where(_parts.c.database == name, _parts.c.date.in_(sorted(gone))))
            upsert(home, _parts, ("date", "database"), found)
        if len(run.unread) == len(databases.names):
            raise UsageError(f"No database could be read. {first_reasons(run.unread)}.")
        home.execute(sa.delete(_parts).where(_parts.c.database.not_in(databases.names)))
        touched = {day for day in touched | set(window.dates) if day.isoformat() in partition_keys}
        context.log.info(
            f"Adding up {counted(len(touched), 'day')} of {len(run.read)} databases, in {server_and_database(home)}"
        )
        history: defaultdict[str, dict[date, int]] = defaultdict(dict)
        for row in home.execute(_KNOWN):
            history[row.database][row.date] = row.tenants
        after = _kept(home, touched)
        rows: list[dict[str, Any]] = []
        for day in sorted(touched):
            parts = after.get(day, {})
            missing = {
                name: _tenants_before(history[name], day)
                for name in databases.names
                if name not in parts and (not history[name] or min(history[name]) < day)
            }
            run.days[day] = merge.record_of(parts, missing, run.unread.keys() & parts.keys())
            if twice := merge.counted_twice(parts):
                run.twice[day] = twice
            else:
                rows += merge.rows_of(day, parts)
            for tenant, _ in merge.active_tenants(before.get(day, {})) - merge.active_tenants(parts):
                run.gone.setdefault(tenant, []).append(day)
        try:
            frame = add_up(rows, add_up_reasons(merge.reasons_of(rows)))
        except ValueError as error:
            raise UsageError(f"{error}: bring all databases to one release, and make their summaries again.") from None
        run.rows = [{str(name): value for name, value in row.items()} for row in frame.to_dict("records")]
        run.changes = write_rows(home, _rows, run.rows, run.days.keys() - run.twice.keys())
        write_days(home, _days, run.days)
    return run


def _tenants_before(tenants: Mapping[date, int], day: date) -> int:
    """For how many tenants a database stands on a day that it does not have: as many as on the last one before."""
    return tenants[max(earlier for earlier in tenants if earlier < day)] if tenants else 1


def _kept(home: sa.Connection, days: set[date]) -> dict[date, dict[str, Any]]:
    """What is kept of each database, by day."""
    found: dict[date, dict[str, Any]] = {}
    query = sa.select(_parts.c.date, _parts.c.database, _parts.c.rows, _parts.c.day)
    for row in home.execute(query.where(_parts.c.date.in_(sorted(days)))).mappings():
        found.setdefault(row["date"], {})[row["database"]] = row
    return found


def _read(
    databases: OtherDatabases, name: str, have: Mapping[date, str], time_zone: str
) -> tuple[list[dict[str, Any]], set[date]]:
    """The parts of a database that are not those which the home has, and the days that it no longer has.

    Raises UsageError, or what the database raises.
    """
    with databases.connect(name) as connection, connection.begin():
        require_table(connection, _one_rows)
        require_table(connection, _one_days)
        versions = connection.execute(_VERSIONS).all()
        if others := {row.time_zone for row in versions} - {time_zone}:
            raise UsageError(f"its days are in {sorted(others)[0]}, not in {time_zone}, and days of two zones overlap")
        new = {row.date: row.version for row in versions if have.get(row.date) != row.version}
        rows = connection.execute(_READ, {"dates": sorted(new)}).mappings()
        parts = [{**row, "database": name, "version": new[row["date"]]} for row in rows]
    return parts, have.keys() - {row.date for row in versions}
