"""The read side: the stats of some days as a frame, and `python -m pipelines.stats` for the command line.

All tenants together come from the summary, those that are named from their own tables. Nothing is written.

The command takes half a second, and would take two with Dagster and pandas, so neither is imported for it.
"""

import difflib
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from zoneinfo import ZoneInfo

import click
import sqlalchemy as sa

from assets.sketch import MEASURES, VERSION, percentile
from models import MARKETPLACES
from models.stats import DEFINITION, MarketplaceJobFact, MarketplaceJobStats, MarketplaceJobStatsDay
from models.summary import (
    MOST_NAMED,
    MarketplaceDailySummary,
    MarketplaceDailySummaryDay,
    MarketplaceGlobalSummary,
    MarketplaceGlobalSummaryDay,
)
from pipelines.action_types import UNKNOWN, action_types
from pipelines.completeness import COUNTS, MOST_NAMES, OUTCOMES, Record, notes
from pipelines.database import (
    connected,
    connection_reason,
    conninfo,
    create_engine,
    error_text,
    require_table,
    server_and_database,
)
from pipelines.output import BY, DTYPES, Found, print_rows, write_rows
from pipelines.settings import Settings, UsageError
from pipelines.tenants import Tenant, choose_tenants, find_tenants, on_tenant

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = (
    "date",
    "marketplace",
    "action_code",
    "action_name",
    "total_jobs",
    "success_count",
    "failure_count",
    "success_rate",
    "cancelled_count",
    "expired_count",
    "retry_count",
    "avg_duration_ms",
    "p50_duration_ms",
    "p95_duration_ms",
    "p99_duration_ms",
    "avg_wait_ms",
    "p50_wait_ms",
    "p95_wait_ms",
    "total_tasks",
    "task_success_count",
    "task_failure_count",
    "task_retry_count",
    "top_reasons",
    "tenants_older_definition",
    *COUNTS,
)
"""The columns of the frame; what each means stands in `models.summary`, of COUNTS at the day."""

_KEY = ("date", "marketplace", "action_code")
_NUMBERS = COLUMNS[COLUMNS.index("action_name") + 1 :]
_SUMS = (
    *(name for name in _NUMBERS if name.endswith(("_count", "_jobs", "_tasks"))),
    *(name for measure in MEASURES for name in (measure.count, measure.sum)),
)
_SKETCHES = tuple(name for measure in MEASURES for name in measure.sketch)
_PERCENTILES = tuple(name for measure in MEASURES for name in measure.percentiles)

_stats, _ledger, _facts, _summary, _days = (
    model.__table__
    for model in (
        MarketplaceJobStats,
        MarketplaceJobStatsDay,
        MarketplaceJobFact,
        MarketplaceDailySummary,
        MarketplaceDailySummaryDay,
    )
)
_global, _global_days = MarketplaceGlobalSummary.__table__, MarketplaceGlobalSummaryDay.__table__


def get_stats(
    days: int | None = None,
    marketplace: str | None = None,
    tenant: str | Sequence[str] | None = None,
    all_databases: bool = False,
    *,
    start: date | str | None = None,
    end: date | str | None = None,
    action: str | None = None,
    by: str | Sequence[str] = (),
    today: bool = False,
) -> "pd.DataFrame":
    """The stats of the last `days` closed days (default 7), or of those from `start` to `end`, both included.

    One row per day, marketplace and action, with the columns COLUMNS, of all marketplaces and actions unless one is
    named; of the tenants that are named, else the sums over all, from the summary; with `all_databases` those of all
    databases, from the global one, where it is at home. With `by` (of the keys of BY) one row for each of its groups,
    the columns of `by` first, then the numbers. With `today` also the day that is not over, as far as it was computed:
    its `tenants_open` is not 0.

    `date` is datetime64, texts are string, `success_rate` is Float64 from 0 to 1, `top_reasons` object, all else Int64,
    also when there are no rows. Durations and waits are whole milliseconds; percentiles are within 1 % before they are
    rounded to them. Null is what is not known, or has nothing to divide by.

    How many tenants stand behind a row is in it; in one over several days they are added up, each tenant counting once
    for each day, and null if a day of them was not summarized. In groups, `tenants_older_definition` is a lower bound,
    and `top_reasons` null where several rows of the summary were added up, each of which has five only.
    `frame.attrs["notes"]` has a sentence for each day that is not complete, with the names of those that are missing (a
    day without rows may be one on which nothing ran, or one that nobody has computed), and one for the tenants without
    rows. Raises UsageError for a marketplace, action or tenant that is not there, and for what cannot be read.
    """
    import pandas as pd  # Not at the top: the command line makes no frame.

    tenants = [tenant] if isinstance(tenant, str) else tenant or ()
    groups = [by] if isinstance(by, str) else by
    found = _read_stats(days, start, end, marketplace, action, tenants, all_databases, groups, today)
    types = {name: DTYPES.get(name, "Int64") for name in found.columns}
    frame = pd.DataFrame(found.rows, columns=list(types), dtype=object).astype(types)
    frame.attrs["notes"] = found.notes
    return frame


class _Choice(NamedTuple):
    """Which rows are read; `is_added_up`: with what adding them up needs."""

    first: date
    last: date
    marketplace: str | None
    action: str | None
    is_added_up: bool

    @property
    def days(self) -> list[date]:
        return [self.first + timedelta(days=number) for number in range((self.last - self.first).days + 1)]

    def names(self, table: sa.Table) -> list[str]:
        wanted = (*COLUMNS, *_SUMS, *_SKETCHES) if self.is_added_up else COLUMNS
        return [name for name in dict.fromkeys(wanted) if name in table.c]

    def of(self, table: sa.Table, *more: sa.ColumnElement[Any]) -> sa.Select[Any]:
        query = sa.select(*more, *(table.c[name] for name in self.names(table)))
        query = query.where(table.c.date.between(self.first, self.last))
        return query if self.marketplace is None else query.where(table.c.marketplace == self.marketplace)


class _Part(NamedTuple):
    """What the summary has, or one tenant; its rows have all their `reasons` as well, with the number of jobs of each.

    `records`: how complete each day is.
    """

    tenant: str | None
    rows: list[dict[str, Any]]
    records: Mapping[date, Record]


def _read_stats(
    days: int | None,
    start: date | str | None,
    end: date | str | None,
    marketplace: str | None,
    action: str | None,
    tenants: Sequence[str],
    all_databases: bool,
    by: Sequence[str],
    today: bool,
    say: Callable[[str], None] = lambda text: None,
) -> Found:
    if all_databases and (tenants or "tenant" in by):
        raise UsageError("A tenant is in one database: give --tenant there, without --all-databases.")
    if today and all_databases:
        raise UsageError("Today so far is in each database's own summary: leave out --all-databases, or --today.")
    settings = Settings.from_env()
    first, last, left_out = _chosen_days(settings, days, start, end, datetime.now(UTC), today)
    if marketplace is not None and marketplace not in MARKETPLACES:
        raise UsageError(f"There is no marketplace {marketplace!r}: {_hint(marketplace, MARKETPLACES)}")
    if unknown := [name for name in by if name not in BY]:
        raise UsageError(f"--by {unknown[0]} is not allowed: use {', '.join(BY)}.")
    tenants = tuple(dict.fromkeys(tenants))
    by = tuple(dict.fromkeys(by))
    choice = _Choice(first, last, marketplace, action, is_added_up=bool(by) or len(tenants) > 1)
    is_of_tenants = bool(tenants) or "tenant" in by
    where = conninfo()
    engine = create_engine(
        where,
        is_reader=True,
        row_security="off",  # Rows that a policy hides would be missing in the numbers: it is an error.
        lock_timeout=settings.lock_timeout_ms,  # A table that somebody keeps locked is an error, too.
        statement_timeout=settings.statement_timeout_ms,
    )
    summary = (_global, _global_days) if all_databases else (_summary, _days)
    unread: list[str] = []
    with connected(engine, where) as connection:
        who = ", ".join(tenants) or ("all databases" if all_databases else "all tenants")
        say(f"Reading {who}, {first} to {last}, from {server_and_database(connection)}.")
        try:
            types = action_types(connection) or {} if is_of_tenants or action is not None else {}
            if action is not None:
                _require_action(connection, action, types, summary[0])
            parts = (
                _of_tenants(connection, tenants, choice, types, unread)
                if is_of_tenants
                else [_of_all(connection, choice, *summary)]
            )
            rows, records, absent = _arranged(parts, choice, by)
        except sa.exc.DBAPIError as error:
            remedy = _REMEDIES.get(getattr(error.orig, "sqlstate", None) or "", "See to it")
            raise UsageError(f"The stats could not be read: {error_text(error)}. {remedy}.") from None
    for row in rows:
        row |= {name: None if row[name] is None else round(row[name]) for name in _PERCENTILES}
    columns = (*(BY[name] for name in by), *_NUMBERS) if by else COLUMNS
    if absent:
        more = f" and {len(absent) - MOST_NAMES:,} more" if len(absent) > MOST_NAMES else ""
        unread.append(f"No rows of {', '.join(absent[:MOST_NAMES])}{more} in what was asked for.")
    found = [{name: row[name] for name in columns} for row in rows]
    return Found(columns, found, [*left_out, *notes(choice.days, records), *unread])


def _hint(wrong: str, names: Iterable[str]) -> str:
    """What may have been meant, or, if there is nothing like it, what there is."""
    folded = {name.casefold(): name for name in names}
    near = difflib.get_close_matches(wrong.strip().casefold(), folded)
    if near:
        return f"did you mean {' or '.join(folded[name] for name in near)}?"
    return f"use one of {', '.join(folded.values())}."


def _day(name: str, value: date | str) -> date:
    if isinstance(value, datetime):
        return value.date()
    if isinstance(value, date):
        return value
    try:
        if not re.fullmatch(r"[0-9]{4}-[0-9]{2}-[0-9]{2}", value):
            raise ValueError
        return date.fromisoformat(value)
    except ValueError:
        raise UsageError(
            f"--{name} {value!r} is not a date: write it as YYYY-MM-DD, for instance 2026-01-31."
        ) from None


def _chosen_days(
    settings: Settings, days: int | None, start: date | str | None, end: date | str | None, now: datetime, today: bool
) -> tuple[date, date, list[str]]:
    """The first and the last day, and a sentence for those that were asked for and are left out."""
    if start is None and end is None:
        if days is not None and days < 1:
            raise UsageError(f"--days {days} is not allowed: give 1 or more.")
        first, last = closed_days(settings, 7 if days is None else days, now)
        return first, last + timedelta(days=today), []
    if days is not None:
        raise UsageError("--days does not go together with --from and --to: give one of them.")
    if start is None:
        raise UsageError("--to needs --from: give the first day, too.")
    closed = closed_days(settings, 1, now)[1] + timedelta(days=today)
    first = _day("from", start)
    last = closed if end is None else _day("to", end)
    if end is not None and last < first:
        raise UsageError(f"--from {first} is after --to {last}: give the earlier day first.")
    left_out = []
    if first < settings.start_date:
        left_out.append(f"Days before {settings.start_date} (STATS_START_DATE) are left out.")
    if last > closed or first > closed:
        left_out.append(f"Days after {closed} are left out: they have not closed yet.")
    return max(first, settings.start_date), min(last, closed), left_out


def closed_days(settings: Settings, days: int, now: datetime) -> tuple[date, date]:
    """The first and the last of the last `days` days that have closed by now; the first is later if there is none.

    They are those of `pipelines.partitions`, which needs Dagster. Only days are chosen here, no instants of a day.
    """
    last = now.astimezone(ZoneInfo(settings.time_zone)).date() - timedelta(days=1)
    return last - timedelta(days=min(days, (last - settings.start_date).days + 1) - 1), last


_REMEDIES = {
    "42501": "Run `alembic upgrade head` with MIGRATION_DATABASE_URL set, which grants what is missing; where a policy "
    "would hide rows, give the role BYPASSRLS, or drop the policy",
    "55P03": "Another session keeps a lock for longer than STATS_LOCK_TIMEOUT_MS: end it, or wait",
    "57014": "It took longer than STATS_STATEMENT_TIMEOUT_MS: raise it, or ask for fewer days",
}


def _require_action(
    connection: sa.Connection, action: str, types: Mapping[int, tuple[str, str]], summary: sa.Table
) -> None:
    """Raises UsageError, with the nearest ones, if there is no such action, now or in the summary."""
    known = {UNKNOWN, *(code for code, _ in types.values())}
    if action in known:
        return
    with connection.begin():
        if connection.scalar(sa.select(sa.func.to_regclass(summary.fullname))) is not None:
            known.update(connection.scalars(sa.select(summary.c.action_code).distinct()))
    if action not in known:
        raise UsageError(f"There is no action {action!r}: {_hint(action, sorted(known))}")


def _of_all(connection: sa.Connection, choice: _Choice, table: sa.Table, days: sa.Table) -> _Part:
    with connection.begin():
        require_table(connection, table)
        require_table(connection, days)
        query = choice.of(table)
        if choice.action is not None:
            query = query.where(table.c.action_code == choice.action)
        rows = [dict(row) for row in connection.execute(query).mappings()]
        found = connection.execute(sa.select(days).where(days.c.date.between(choice.first, choice.last))).mappings()
        return _Part(None, rows, {record["date"]: dict(record) for record in found})


def _of_tenants(
    connection: sa.Connection,
    names: Sequence[str],
    choice: _Choice,
    types: Mapping[int, tuple[str, str]],
    unread: list[str],
) -> Iterator[_Part]:
    """Each of these tenants, or all: then a sentence on each that cannot be read goes to `unread`."""
    with connection.begin():
        try:
            tenants = choose_tenants(connection, names)
        except UsageError:
            schemas = {tenant.schema for tenant in find_tenants(connection)}
            if not schemas:
                raise
            [wrong, *_] = (name for name in names if name not in schemas)
            number = re.search("[0-9]+", wrong)
            near = f"user_{int(number[0])}" if number else ""
            hint = f"did you mean {near}?" if near in schemas else f"there are {len(schemas):,}, named user_<number>."
            where = server_and_database(connection)
            raise UsageError(f"There is no tenant {wrong} in {where}: {hint}") from None
    for tenant in tenants:
        if not tenant.unreadable:
            try:
                yield _of_tenant(connection, tenant, choice, types)
            except sa.exc.DBAPIError as error:
                reason = connection_reason(error)
                raise UsageError(f"The stats of {tenant.schema} could not be read: {reason}.") from None
        elif names:
            raise UsageError(f"{tenant.schema} has no stats: {tenant.unreadable}.")
        elif not tenant.skipped or tenant.has_stored:
            if len(unread) < MOST_NAMES:  # All of them are counted as missing.
                unread.append(f"{tenant.schema} could not be read: {tenant.unreadable}.")
            yield _Part(tenant.schema, [], {day: _record(tenant.schema, "missing") for day in choice.days})


def _record(schema: str, outcome: str, *, is_expected: bool = True) -> Record:
    """A day of one tenant, as a record of how complete it is."""
    return {f"tenants_{name}": int(name == outcome and is_expected) for name in OUTCOMES} | {
        "tenants_expected": int(is_expected),
        "missing_tenants": [schema] if outcome == "missing" and is_expected else [],
    }


def _of_tenant(
    connection: sa.Connection, tenant: Tenant, choice: _Choice, types: Mapping[int, tuple[str, str]]
) -> _Part:
    closed = choice.first, choice.last
    with on_tenant(connection, tenant.schema).begin():
        query = choice.of(_stats, _stats.c.action_type_id)
        rows = [dict(row) for row in connection.execute(query).mappings()]
        with_rows = set(connection.scalars(sa.select(_stats.c.date).where(_stats.c.date.between(*closed)).distinct()))
        first = connection.scalar(sa.select(sa.func.min(_ledger.c.date)))
        entries = {
            entry.date: entry
            for entry in connection.execute(
                sa.select(_ledger.c.date, _ledger.c.outcome, _ledger.c.definition).where(
                    _ledger.c.date.between(*closed)
                )
            )
        }
        reasons = _reasons(connection, closed)
    for row in rows:
        row["action_code"], row["action_name"] = types.get(row["action_type_id"], (UNKNOWN, UNKNOWN))
        row["success_rate"] = row["success_count"] / row["total_jobs"] if row["total_jobs"] else None
        row["reasons"] = reasons.get((row["date"], row["marketplace"], row["action_type_id"]), {})
        row["top_reasons"] = _top(row["reasons"], dict.fromkeys(row["reasons"], 1))
        entry = entries.get(row["date"])
        is_current = entry is not None and entry.outcome != "held_back" and entry.definition >= DEFINITION
        ended = row["total_jobs"] + (row["cancelled_count"] or 0) + (row["expired_count"] or 0)
        row["tenants_older_definition"] = int(ended > 0 and not is_current)
    records: dict[date, Record] = {}
    for day in choice.days:
        outcome = entries[day].outcome if day in entries else "counter_only" if day in with_rows else "missing"
        is_expected = outcome != "missing" or (first is not None and first < day and not tenant.skipped)
        records[day] = _record(tenant.schema, outcome, is_expected=is_expected)
    if choice.action is not None:
        rows = [row for row in rows if row["action_code"] == choice.action]
    return _Part(tenant.schema, rows, records)


def _reasons(connection: sa.Connection, closed: tuple[date, date]) -> dict[Any, dict[str, int]]:
    """How many of the tenant's jobs failed for each reason, by date, marketplace and action type."""
    key = (_facts.c.date, _facts.c.marketplace, _facts.c.action_type_id)
    query = (
        sa.select(*key, _facts.c.failure_reason, sa.func.count())
        .where(_facts.c.date.between(*closed), _facts.c.status == "failed", _facts.c.failure_reason.is_not(None))
        .group_by(*key, _facts.c.failure_reason)
    )
    found: dict[Any, dict[str, int]] = {}
    for *of_row, reason, jobs in connection.execute(query):
        found.setdefault(tuple(of_row), {})[reason] = jobs
    return found


def _top(jobs: Mapping[str, int], tenants: Mapping[str, int]) -> list[dict[str, Any]]:
    """The most frequent reasons, as `top_reasons` of the summary."""
    most = sorted(jobs, key=lambda reason: (-jobs[reason], reason))[:MOST_NAMED]
    return [{"reason": reason, "jobs": jobs[reason], "tenants": tenants[reason]} for reason in most]


class _Group:
    """Rows that are added up. Percentiles come from the merged sketches, means and rates from the sums."""

    def __init__(self) -> None:
        self.sums: dict[str, int | None] = dict.fromkeys(_SUMS)
        self.sketches: dict[str, Counter[int]] = {measure.name: Counter() for measure in MEASURES}
        self.names: set[str] = set()
        self.older = 0
        self.reasons: Counter[str] = Counter()
        self.tenants: Counter[str] = Counter()
        self.top_reasons: list[dict[str, Any]] | None = None

    def add(self, rows: Sequence[Mapping[str, Any]], *, of_tenant: bool) -> None:
        """All rows of one tenant, or of the summary."""
        for row in rows:
            for name in _SUMS:
                if row[name] is not None:
                    self.sums[name] = (self.sums[name] or 0) + row[name]
            for measure in MEASURES:
                if row[measure.version] not in (None, VERSION):
                    raise UsageError(
                        f"The stats of {row['date']} have sketches of version {row[measure.version]}, which do not "
                        f"merge with version {VERSION}: compute the day again, or use the newest code."
                    )
                sketch = self.sketches[measure.name]
                for key, number in zip(row[measure.keys] or (), row[measure.counts] or (), strict=True):
                    sketch[key] += number
            self.names.add(row["action_name"])
            self.reasons.update(row.get("reasons", {}))
        self.older += max(row["tenants_older_definition"] for row in rows)
        self.tenants.update({reason for row in rows for reason in row.get("reasons", {})})
        # The five most frequent reasons of several rows are not known from five of each.
        self.top_reasons = (
            _top(self.reasons, self.tenants) if of_tenant else rows[0]["top_reasons"] if len(rows) == 1 else None
        )

    def row(self) -> dict[str, Any]:
        """Its numbers, by column."""
        sums = self.sums
        statistics: dict[str, Any] = {}
        for measure in MEASURES:
            count, total = sums[measure.count] or 0, sums[measure.sum] or 0
            # Halves away from zero, in whole numbers.
            statistics[measure.mean] = (2 * total + count) // (2 * count) if count else None
            merged = dict(sorted(self.sketches[measure.name].items()))
            statistics |= {name: percentile(merged, *share) for name, share in measure.percentiles.items()}
        return {
            **sums,
            **statistics,
            "action_name": min(self.names),
            "success_rate": (sums["success_count"] or 0) / sums["total_jobs"] if sums["total_jobs"] else None,
            "top_reasons": self.top_reasons,
            "tenants_older_definition": self.older,
        }


def _arranged(
    parts: Iterable[_Part], choice: _Choice, by: Sequence[str]
) -> tuple[list[dict[str, Any]], dict[date, Record], list[str]]:
    """The rows in order, how complete each day is over all parts, and the tenants that have no row."""
    names = tuple(BY[name] for name in by) or _KEY
    rows: list[dict[str, Any]] = []
    records: dict[date, Record] = {}
    absent: list[str] = []
    groups: dict[tuple[Any, ...], _Group] = {}

    def finish(records: Mapping[date, Record]) -> None:
        """Makes rows of the groups."""
        for key, group in groups.items():
            of_key = dict(zip(names, key, strict=True))
            days = [of_key["date"]] if "date" in of_key else choice.days
            rows.append({**group.row(), **of_key, **_counts(records, days)})
        groups.clear()

    for part in parts:
        for day, record in part.records.items():
            records[day] = _both(records[day], record) if day in records else record
        if part.tenant is not None and not part.rows:
            absent.append(part.tenant)
        if not choice.is_added_up:
            rows += [{**row, **_counts(part.records, [row["date"]])} for row in part.rows]
            continue
        found: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
        for row in part.rows:
            row["tenant"] = part.tenant
            found.setdefault(tuple(row[name] for name in names), []).append(row)
        for key, of_key in found.items():
            groups.setdefault(key, _Group()).add(of_key, of_tenant=part.tenant is not None)
        if "tenant" in by:  # At once, so that the sketches of ten thousand are never held together.
            finish(part.records)
    finish(records)
    # Tenants stay in the order of their numbers.
    places = {name: place for place, name in enumerate(dict.fromkeys(row["tenant"] for row in rows if "tenant" in by))}
    rows.sort(key=lambda row: [places[row[name]] if name == "tenant" else row[name] for name in names])
    return rows, records, absent


def _both(one: Record, other: Record) -> Record:
    """How complete a day is for the tenants of both records."""
    missing = [*one["missing_tenants"], *other["missing_tenants"]]
    return {**{name: one[name] + other[name] for name in COUNTS}, "missing_tenants": missing}


def _counts(records: Mapping[date, Record], days: Sequence[date]) -> dict[str, int | None]:
    """The tenants behind these days, added up; null if one of the days was not summarized."""
    known = [records[day] for day in days if day in records]
    is_known = len(known) == len(days)
    return {name: sum(record[name] for record in known) if is_known else None for name in COUNTS}


@click.command(
    help="Prints the stats of closed days, of all tenants together or of those that are named; nothing is written to "
    "the database. Which database is read, and which days are not complete, stands on stderr.",
    epilog="""\b
Examples:
  python -m pipelines.stats --days 1 --marketplace ebay
  python -m pipelines.stats --from 2026-01-01 --to 2026-01-31 --by date --format csv --output january.csv
  python -m pipelines.stats --days 28 --action publish --by tenant --by marketplace
  python -m pipelines.stats --tenant user_7 --tenant user_42 --by tenant
  python -m pipelines.stats --days 365 --format parquet --output year.parquet""",
)
@click.option("--days", type=int, help="How many closed days; default 7.")
@click.option("--from", "start", metavar="DATE", help="Instead of --days: the first day, as YYYY-MM-DD.")
@click.option("--to", "end", metavar="DATE", help="With --from: the last day, included; default the last closed one.")
@click.option("--marketplace", help=f"One of {', '.join(MARKETPLACES)}; default all.")
@click.option("--action", help="The code of an action, for instance publish; default all.")
@click.option(
    "--tenant",
    "tenants",
    multiple=True,
    help="A schema, for instance user_7; several times for the sums over several. Default the sums over all.",
)
@click.option("--all-databases", is_flag=True, help="The sums over all databases, from the global summary.")
@click.option("--today", is_flag=True, help="Also today so far.")
@click.option(
    "--by",
    type=click.Choice(list(BY)),
    multiple=True,
    help="One row for each; several times for each combination. Default date, marketplace and action. With tenant, "
    "and no --tenant, every tenant's own table is read.",
)
@click.option(
    "--format",
    "kind",
    type=click.Choice(["table", "csv", "json", "parquet"]),
    default="table",
    show_default=True,
    help="In the table percentiles have three significant digits, else they are whole milliseconds.",
)
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    help="A file instead of stdout; replaced in one step.",
)
def main(
    days: int | None,
    start: str | None,
    end: str | None,
    marketplace: str | None,
    action: str | None,
    tenants: tuple[str, ...],
    all_databases: bool,
    today: bool,
    by: tuple[str, ...],
    kind: str,
    output: Path | None,
) -> None:
    if output is not None and not output.absolute().parent.is_dir():
        raise UsageError(f"--output {output} cannot be written: there is no folder {output.absolute().parent}.")
    if kind == "parquet" and output is None:
        raise UsageError("--format parquet is not for a terminal: give --output FILE.")
    found = _read_stats(
        days,
        start,
        end,
        marketplace,
        action,
        tenants,
        all_databases,
        by,
        today,
        lambda text: click.echo(text, err=True),
    )
    if output is None:
        print_rows(found, kind, sys.stdout)
    else:
        write_rows(found, kind, output)
    for note in found.notes:  # Beside the rows, which a program may be reading.
        click.echo(note, err=True)


if __name__ == "__main__":
    main()
