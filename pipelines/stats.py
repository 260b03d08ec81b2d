"""The read side: the stats of the last days as a frame, and `python -m pipelines.stats` for the command line.

All tenants together come from the summary, one tenant from its own table. Nothing is written.

The command takes half a second, and would take two with Dagster and pandas, so neither is imported for it.
"""

import csv
import json
import sys
from datetime import UTC, date, datetime, timedelta
from typing import TYPE_CHECKING, Any, NamedTuple
from zoneinfo import ZoneInfo

import click
import sqlalchemy as sa

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
from pipelines.completeness import COUNTS, OUTCOMES, Record, notes
from pipelines.database import connected, connection_reason, conninfo, create_engine, require_table
from pipelines.settings import Settings, UsageError
from pipelines.tenants import choose_tenants, on_tenant

if TYPE_CHECKING:
    import pandas as pd
    from rich.text import Text

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
    days: int = 7,
    marketplace: str | None = None,
    tenant: str | None = None,
    all_databases: bool = False,
    *,
    today: bool = False,
) -> "pd.DataFrame":
    """The stats of the last `days` closed days: one row per day, marketplace and action, with the columns COLUMNS.

    With `today` also those of the day that is not over, as far as they were computed: its `tenants_open` is not 0.

    Of all marketplaces unless one is named; of one tenant if it is named, else the sums over all tenants, from the
    summary; with `all_databases` those of all databases, from the global one, where it is at home. Durations and waits
    are in milliseconds, `success_rate` goes from 0 to 1; all are null where there is nothing to divide by. How many
    tenants stand behind the day is in each row. `frame.attrs["notes"]` has a sentence for each day that is not
    complete, with the names of those that are missing: a day without rows may be one on which nothing ran, or one that
    nobody has computed. Raises UsageError for a marketplace or tenant that is not there, and for what cannot be read.
    """
    import pandas as pd  # Not at the top: the command line makes no frame.

    found = _read_stats(days, marketplace, tenant, all_databases, today)
    frame = pd.DataFrame(found.rows, columns=list(COLUMNS), dtype=object).convert_dtypes()
    frame.attrs["notes"] = found.notes
    return frame


class _Found(NamedTuple):
    """The rows, in order, each by column, and a sentence for each day that is not complete."""

    rows: list[dict[str, Any]]
    notes: list[str]


def _read_stats(days: int, marketplace: str | None, tenant: str | None, all_databases: bool, today: bool) -> _Found:
    if tenant is not None and all_databases:
        raise UsageError("A tenant is in one database: give --tenant there, without --all-databases.")
    if today and all_databases:
        raise UsageError("Today so far is in each database's own summary: leave out --all-databases, or --today.")
    if days < 1:
        raise UsageError(f"--days {days} is not allowed: give 1 or more.")
    if marketplace is not None and marketplace not in MARKETPLACES:
        raise UsageError(f"There is no marketplace {marketplace!r}: use one of {', '.join(MARKETPLACES)}.")
    settings = Settings.from_env()
    first, last = closed_days(settings, days, datetime.now(UTC))
    closed = first, last + timedelta(days=today)
    where = conninfo()
    engine = create_engine(
        where,
        is_reader=True,
        row_security="off",  # Rows that a policy hides would be missing in the numbers: it is an error.
        lock_timeout=settings.lock_timeout_ms,  # A table that somebody keeps locked is an error, too.
        statement_timeout=settings.statement_timeout_ms,
    )
    with connected(engine, where) as connection:
        try:
            rows, records = (
                _of_all(
                    connection, closed, marketplace, *((_global, _global_days) if all_databases else (_summary, _days))
                )
                if tenant is None
                else _of_tenant(connection, tenant, closed, marketplace)
            )
        except sa.exc.DBAPIError as error:
            raise UsageError(f"The stats could not be read: {connection_reason(error)}.") from None
    rows.sort(key=lambda row: (row["date"], row["marketplace"], row["action_code"]))
    for row in rows:
        row |= {name: records.get(row["date"], {}).get(name) for name in COUNTS}
    every_day = [closed[0] + timedelta(days=number) for number in range((closed[1] - closed[0]).days + 1)]
    return _Found([{name: row[name] for name in COLUMNS} for row in rows], notes(every_day, records))


def closed_days(settings: Settings, days: int, now: datetime) -> tuple[date, date]:
    """The first and the last of the last `days` days that have closed by now; the first is later if there is none.

    They are those of `pipelines.partitions`, which needs Dagster. Only days are chosen here, no instants of a day.
    """
    last = now.astimezone(ZoneInfo(settings.time_zone)).date() - timedelta(days=1)
    return last - timedelta(days=min(days, (last - settings.start_date).days + 1) - 1), last


def _of_all(
    connection: sa.Connection, closed: tuple[date, date], marketplace: str | None, table: sa.Table, days: sa.Table
) -> tuple[list[dict[str, Any]], dict[date, Record]]:
    with connection.begin():
        require_table(connection, table)
        require_table(connection, days)
        query = sa.select(*(table.c[name] for name in COLUMNS if name in table.c))
        rows = _read(connection, query, table, closed, marketplace)
        records = connection.execute(sa.select(days).where(days.c.date.between(*closed))).mappings()
        return rows, {record["date"]: dict(record) for record in records}


def _of_tenant(
    connection: sa.Connection, schema: str, closed: tuple[date, date], marketplace: str | None
) -> tuple[list[dict[str, Any]], dict[date, Record]]:
    with connection.begin():
        [tenant] = choose_tenants(connection, [schema])
    if tenant.unreadable:
        raise UsageError(f"{schema} has no stats: {tenant.unreadable}.")
    types = action_types(connection) or {}
    names = [name for name in COLUMNS if name in _stats.c]
    with on_tenant(connection, schema).begin():
        query = sa.select(_stats.c.action_type_id, *(_stats.c[name] for name in names))
        rows = _read(connection, query, _stats, closed, marketplace)
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
        row["top_reasons"] = reasons.get((row["date"], row["marketplace"], row["action_type_id"]), [])
        entry = entries.get(row["date"])
        is_current = entry is not None and entry.outcome != "held_back" and entry.definition >= DEFINITION
        ended = row["total_jobs"] + (row["cancelled_count"] or 0) + (row["expired_count"] or 0)
        row["tenants_older_definition"] = int(ended > 0 and not is_current)
    records: dict[date, Record] = {}
    for number in range((closed[1] - closed[0]).days + 1):
        day = closed[0] + timedelta(days=number)
        outcome = entries[day].outcome if day in entries else "counter_only" if day in with_rows else "missing"
        is_expected = outcome != "missing" or (first is not None and first < day and not tenant.skipped)
        records[day] = {f"tenants_{name}": int(name == outcome and is_expected) for name in OUTCOMES} | {
            "tenants_expected": int(is_expected),
            "missing_tenants": [schema] if outcome == "missing" and is_expected else [],
        }
    return rows, records


def _reasons(connection: sa.Connection, closed: tuple[date, date]) -> dict[Any, list[dict[str, Any]]]:
    """Why the tenant's jobs failed, by date, marketplace and action type: as `top_reasons` of the summary."""
    key = (_facts.c.date, _facts.c.marketplace, _facts.c.action_type_id)
    count = sa.func.count()
    query = (
        sa.select(*key, _facts.c.failure_reason, count)
        .where(_facts.c.date.between(*closed), _facts.c.status == "failed", _facts.c.failure_reason.is_not(None))
        .group_by(*key, _facts.c.failure_reason)
    )
    found: dict[Any, list[dict[str, Any]]] = {}
    for *of_row, reason, jobs in sorted(connection.execute(query), key=lambda row: (-row[4], row[3])):
        named = found.setdefault(tuple(of_row), [])
        if len(named) < MOST_NAMED:
            named.append({"reason": reason, "jobs": jobs, "tenants": 1})
    return found


def _read(
    connection: sa.Connection,
    query: sa.Select[Any],
    table: sa.Table,
    closed: tuple[date, date],
    marketplace: str | None,
) -> list[dict[str, Any]]:
    query = query.where(table.c.date.between(*closed))
    if marketplace is not None:
        query = query.where(table.c.marketplace == marketplace)
    return [dict(row) for row in connection.execute(query).mappings()]


@click.command(help="Prints the stats of the last closed days, of all tenants together or of one.")
@click.option("--days", default=7, show_default=True, help="How many closed days.")
@click.option("--marketplace", help=f"One of {', '.join(MARKETPLACES)}; default all.")
@click.option("--tenant", help="A schema, for instance user_7; default the sums over all tenants.")
@click.option("--all-databases", is_flag=True, help="The sums over all databases, from the global summary.")
@click.option("--today", is_flag=True, help="Also today so far.")
@click.option("--format", "kind", type=click.Choice(["table", "csv", "json"]), default="table", show_default=True)
def main(days: int, marketplace: str | None, tenant: str | None, all_databases: bool, today: bool, kind: str) -> None:
    found = _read_stats(days, marketplace, tenant, all_databases, today)
    if kind == "csv":
        writer = csv.DictWriter(sys.stdout, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: _cell(value) for name, value in row.items()} for row in found.rows)
    elif kind == "json":
        click.echo(json.dumps(found.rows, default=str, indent=1))
    else:
        _print_table(found.rows)
    for note in found.notes:  # Beside the rows, which a program may be reading.
        click.echo(note, err=True)


def _cell(value: Any) -> Any:
    """A value as a cell of CSV. A spreadsheet takes a text for a formula by its first character, so it gets another."""
    if isinstance(value, list):
        return json.dumps(value)
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")) else value


def _text(value: str) -> "Text":
    """A text on a terminal as it is: neither markup, nor characters that a terminal obeys."""
    from rich.text import Text

    return Text("".join(one if one.isprintable() else "\N{REPLACEMENT CHARACTER}" for one in value))


_TIMES = {
    "mean ms": "avg_duration_ms",
    "p50 ms": "p50_duration_ms",
    "p95 ms": "p95_duration_ms",
    "p99 ms": "p99_duration_ms",
    "p95 wait ms": "p95_wait_ms",
}


def _print_table(rows: list[dict[str, Any]]) -> None:
    """The columns that fit on a line, for people."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for header in ("date", "marketplace", "action"):
        table.add_column(header, no_wrap=True)
    for header in ("jobs", "failed", "success", *_TIMES, "tasks", "retries"):
        table.add_column(header, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            str(row["date"]),
            _text(row["marketplace"]),
            _text(row["action_code"]),
            _number(row["total_jobs"]),
            _number(row["failure_count"]),
            "-" if row["success_rate"] is None else f"{row['success_rate']:.1%}",
            *(_number(row[name]) for name in _TIMES.values()),
            _number(row["total_tasks"]),
            _number(row["retry_count"]),
        )
    console = Console()
    console.width = 10_000  # As wide as it needs: rather wrapped by a narrow terminal than cut.
    console.print(table if rows else "no rows")


def _number(value: Any) -> str:
    return "-" if value is None else f"{value:,.0f}"


if __name__ == "__main__":
    main()
