"""The read side: the stats of the last days as a frame, and `python -m pipelines.stats` for the command line.

All tenants together come from the summary, one tenant from its own table. Nothing is written.

The command takes half a second, and would take two with Dagster and pandas, so neither is imported for it.
"""

import csv
import json
import sys
from datetime import UTC, date, datetime, timedelta
from typing import TYPE_CHECKING, Any
from zoneinfo import ZoneInfo

import click
import sqlalchemy as sa

from models import MARKETPLACES
from models.stats import MarketplaceJobStats
from models.summary import MarketplaceDailySummary
from pipelines.action_types import UNKNOWN, action_types
from pipelines.database import connected, conninfo, create_engine, require_table
from pipelines.settings import Settings, UsageError
from pipelines.tenants import choose_tenants, on_tenant

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
)
"""The columns of the frame; what each means stands in `models.summary`."""

WIDTH = 150
"""How many characters a line of the table needs."""

_stats, _summary = MarketplaceJobStats.__table__, MarketplaceDailySummary.__table__


def get_stats(days: int = 7, marketplace: str | None = None, tenant: str | None = None) -> "pd.DataFrame":
    """The stats of the last `days` closed days: one row per day, marketplace and action, with the columns COLUMNS.

    Of all marketplaces unless one is named; of one tenant if it is named, else the sums over all tenants, from the
    summary. Durations and waits are in milliseconds, `success_rate` goes from 0 to 1; all are null where there is
    nothing to divide by. Raises UsageError for a marketplace or tenant that is not there.
    """
    import pandas as pd  # Not at the top: the command line makes no frame.

    return pd.DataFrame(_records(days, marketplace, tenant), columns=list(COLUMNS), dtype=object).convert_dtypes()


def _records(days: int, marketplace: str | None, tenant: str | None) -> list[dict[str, Any]]:
    """The rows of `get_stats`, in order, each by column."""
    if days < 1:
        raise UsageError(f"--days {days} is not allowed: give 1 or more.")
    if marketplace is not None and marketplace not in MARKETPLACES:
        raise UsageError(f"There is no marketplace {marketplace!r}: use one of {', '.join(MARKETPLACES)}.")
    settings = Settings.from_env()
    closed = closed_days(settings, days, datetime.now(UTC))
    where = conninfo()
    engine = create_engine(
        where,
        is_reader=True,
        row_security="off",  # Rows that a policy hides would be missing in the numbers: it is an error.
        statement_timeout=settings.statement_timeout_ms,
    )
    with connected(engine, where) as connection:
        rows = (
            _of_all(connection, closed, marketplace)
            if tenant is None
            else _of_tenant(connection, tenant, closed, marketplace)
        )
    rows.sort(key=lambda row: (row["date"], row["marketplace"], row["action_code"]))
    return [{name: row[name] for name in COLUMNS} for row in rows]


def closed_days(settings: Settings, days: int, now: datetime) -> tuple[date, date]:
    """The first and the last of the last `days` days that have closed by now; the first is later if there is none.

    They are those of `pipelines.partitions`, which needs Dagster. Only days are chosen here, no instants of a day.
    """
    last = now.astimezone(ZoneInfo(settings.time_zone)).date() - timedelta(days=1)
    return last - timedelta(days=min(days, (last - settings.start_date).days + 1) - 1), last


def _of_all(connection: sa.Connection, closed: tuple[date, date], marketplace: str | None) -> list[dict[str, Any]]:
    with connection.begin():
        require_table(connection, _summary)
        query = sa.select(*(_summary.c[name] for name in COLUMNS))
        return _read(connection, query, _summary, closed, marketplace)


def _of_tenant(
    connection: sa.Connection, schema: str, closed: tuple[date, date], marketplace: str | None
) -> list[dict[str, Any]]:
    with connection.begin():
        [tenant] = choose_tenants(connection, [schema])
    if tenant.unreadable:
        raise UsageError(f"{schema} has no stats: {tenant.unreadable}.")
    types = {row.id: row for row in action_types(connection)}
    names = [name for name in COLUMNS if name in _stats.c]
    with on_tenant(connection, schema).begin():
        query = sa.select(_stats.c.action_type_id, *(_stats.c[name] for name in names))
        rows = _read(connection, query, _stats, closed, marketplace)
    for row in rows:
        action = types.get(row["action_type_id"])
        row["action_code"], row["action_name"] = (action.code, action.name) if action else (UNKNOWN, UNKNOWN)
        row["success_rate"] = row["success_count"] / row["total_jobs"] if row["total_jobs"] else None
    return rows


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
@click.option("--format", "kind", type=click.Choice(["table", "csv", "json"]), default="table", show_default=True)
def main(days: int, marketplace: str | None, tenant: str | None, kind: str) -> None:
    rows = _records(days, marketplace, tenant)
    if kind == "csv":
        writer = csv.DictWriter(sys.stdout, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    elif kind == "json":
        click.echo(json.dumps(rows, default=str, indent=1))
    else:
        _print_table(rows)


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
            row["marketplace"],
            row["action_code"],
            _number(row["total_jobs"]),
            _number(row["failure_count"]),
            "-" if row["success_rate"] is None else f"{row['success_rate']:.1%}",
            *(_number(row[name]) for name in _TIMES.values()),
            _number(row["total_tasks"]),
            _number(row["retry_count"]),
        )
    console = Console()
    console.width = max(console.width, WIDTH)  # Rather wrapped by a narrow terminal than cut.
    console.print(table if rows else "no rows")


def _number(value: Any) -> str:
    return "-" if value is None else f"{value:,.0f}"


if __name__ == "__main__":
    main()
