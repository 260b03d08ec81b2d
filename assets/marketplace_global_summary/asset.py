"""The asset: read what is new in each database, keep it, add it up in the home, show it."""

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence, Set
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

PIECE = 31
"""How many days are read, and added up, at once."""

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
    """What a run found: the record of each day and its numbers, which databases could not be read, who is counted twice
    and where, on days whose rows stay as they were, and who was in the numbers of a day and is no longer."""

    days: dict[date, dict[str, Any]] = field(default_factory=dict)
    numbers: dict[date, Counter[str]] = field(default_factory=dict)
    unread: dict[str, str] = field(default_factory=dict)
    twice: dict[date, dict[str, list[str]]] = field(default_factory=dict)
    gone: dict[str, list[date]] = field(default_factory=dict)
    changes: Counter[str] = field(default_factory=Counter)
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
    record, numbers = run.days[day], run.numbers.get(day, Counter())
    return {
        "dagster/row_count": numbers["rows"],
        "jobs": numbers["total_jobs"],
        "failed_jobs": numbers["failure_count"],
        "tasks": numbers["total_tasks"],
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
        touched |= set(window.dates)
        left: defaultdict[date, set[tuple[str, str]]] = defaultdict(set)
        for name in databases.names:
            have = {day: version for (day, database), version in known.items() if database == name}
            try:
                with home.begin_nested(), databases.connect(name) as connection, connection.begin():
                    new, gone = _changed(connection, have, window.time_zone, partition_keys)
                    days = new.keys() | gone
                    for some in _in_pieces(days):
                        read = connection.execute(_READ, {"dates": [day for day in some if day in new]}).mappings()
                        parts = [{**row, "database": name, "version": new[row["date"]]} for row in read]
                        now = {row["date"]: merge.active_tenants({name: row}) for row in parts}
                        for day, before in _kept(home, some, name).items():
                            left[day] |= merge.active_tenants(before) - now.get(day, set())
                        upsert(home, _parts, ("date", "database"), parts)
                    home.execute(sa.delete(_parts).where(_parts.c.database == name, _parts.c.date.in_(sorted(gone))))
            except UsageError as error:
                run.unread[name] = error.message
            except sa.exc.DBAPIError as error:
                if home.invalidated:
                    raise
                run.unread[name] = explain(error)
            else:
                run.read[name] = len(new)
                touched |= days
        if len(run.unread) == len(databases.names):
            raise UsageError(f"No database could be read. {first_reasons(run.unread)}.")
        home.execute(sa.delete(_parts).where(_parts.c.database.not_in(databases.names)))
        touched = {day for day in touched if day.isoformat() in partition_keys}
        where = server_and_database(home)
        context.log.info(
            f"Adding up {counted(len(touched), 'day')} of {counted(len(run.read), 'database')}, in {where}"
        )
        history: defaultdict[str, dict[date, int]] = defaultdict(dict)
        for row in home.execute(_KNOWN):
            history[row.database][row.date] = row.tenants
        for some in _in_pieces(touched):
            after = _kept(home, some)
            for day in some:
                _look_at(run, day, after.get(day, {}), left[day], databases.names, history)
            rows = [row for day in some if day not in run.twice for row in merge.rows_of(day, after.get(day, {}))]
            try:
                frame = add_up(rows, add_up_reasons(merge.reasons_of(rows)))
            except ValueError as error:
                raise UsageError(
                    f"{error}: bring all databases to one release, and make their summaries again."
                ) from None
            records: list[dict[Any, Any]] = frame.to_dict("records")
            run.changes.update(write_rows(home, _rows, records, set(some) - run.twice.keys()))
            for record in records:
                numbers = run.numbers.setdefault(record["date"], Counter())
                numbers["rows"] += 1
                numbers.update({name: record[name] for name in ("total_jobs", "failure_count", "total_tasks")})
        write_days(home, _days, run.days)
    return run


def _look_at(
    run: _Run,
    day: date,
    parts: Mapping[str, Any],
    left: Set[tuple[str, str]],
    names: Sequence[str],
    history: Mapping[str, Mapping[date, int]],
) -> None:
    """What stands behind a day, from its parts.

    `left`: who is not where it was any more. `history`: for how many tenants each database stands on its days.
    """
    from assets.marketplace_global_summary import merge

    missing = {}
    for name in names:
        tenants = history.get(name, {})
        earlier = [other for other in tenants if other < day]
        if name not in parts and (earlier or not tenants):  # Else it has only begun later.
            missing[name] = tenants[max(earlier)] if earlier else 1
    run.days[day] = merge.record_of(parts, missing, run.unread.keys() & parts.keys())
    if twice := merge.counted_twice(parts):
        run.twice[day] = twice
    for tenant, _ in left - merge.active_tenants(parts):
        run.gone.setdefault(tenant, []).append(day)


def _in_pieces(days: Iterable[date]) -> Iterator[list[date]]:
    """The days in order, some at a time: so many rows with their sketches are held at once."""
    found = sorted(days)
    for start in range(0, len(found), PIECE):
        yield found[start : start + PIECE]


def _kept(home: sa.Connection, days: Collection[date], database: str | None = None) -> dict[date, dict[str, Any]]:
    """What is kept of each database, or of one, by day."""
    found: dict[date, dict[str, Any]] = {}
    query = sa.select(_parts.c.date, _parts.c.database, _parts.c.rows, _parts.c.day)
    if database is not None:
        query = query.where(_parts.c.database == database)
    for row in home.execute(query.where(_parts.c.date.in_(sorted(days)))).mappings():
        found.setdefault(row["date"], {})[row["database"]] = row
    return found


def _changed(
    connection: sa.Connection, have: Mapping[date, str], time_zone: str, partition_keys: Set[str]
) -> tuple[dict[date, str], set[date]]:
    """The days of a database that are not those which the home has, with their versions, and those that it has lost.

    Raises UsageError, or what the database raises.
    """
    require_table(connection, _one_rows)
    require_table(connection, _one_days)
    versions = [row for row in connection.execute(_VERSIONS) if row.date.isoformat() in partition_keys]
    if others := {row.time_zone for row in versions} - {time_zone}:
        raise UsageError(f"its days are in {min(others)}, not in {time_zone}, and days of two zones overlap")
    new = {row.date: row.version for row in versions if have.get(row.date) != row.version}
    return new, have.keys() - {row.date for row in versions}
