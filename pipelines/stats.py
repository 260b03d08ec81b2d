"""The read side: the stats of the last days as a frame, and `python -m pipelines.stats` for the command line.

All tenants together come from the summary, one tenant from its own table. Nothing is written.
"""

import json
from collections.abc import Sequence
from typing import Any

import click
import pandas as pd
import sqlalchemy as sa

from models import MARKETPLACES
from models.stats import MarketplaceJobStats
from models.summary import MarketplaceDailySummary
from pipelines.action_types import UNKNOWN, action_types
from pipelines.database import connected, conninfo, create_engine, require_table
from pipelines.partitions import day_partitions
from pipelines.settings import Settings, UsageError
from pipelines.tenants import choose_tenants, on_tenant

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
    "total_tasks",
    "task_success_count",
    "task_failure_count",
    "task_retry_count",
)
"""The columns of the frame; what each means stands in `models.summary`."""

WIDTH = 130
"""How many characters a line of the table needs."""

_stats, _summary = MarketplaceJobStats.__table__, MarketplaceDailySummary.__table__


def get_stats(days: int = 7, marketplace: str | None = None, tenant: str | None = None) -> pd.DataFrame:
    """The stats of the last `days` closed days: one row per day, marketplace and action, with the columns COLUMNS.

    Of all marketplaces unless one is named; of one tenant if it is named, else the sums over all tenants, from the
    summary. Durations are in milliseconds, `success_rate` goes from 0 to 1; both are null where there is nothing to
    divide by. Raises UsageError for a marketplace or tenant that is not there.
    """
    if days < 1:
        raise UsageError(f"--days {days} is not allowed: give 1 or more.")
    if marketplace is not None and marketplace not in MARKETPLACES:
        raise UsageError(f"There is no marketplace {marketplace!r}: use one of {', '.join(MARKETPLACES)}.")
    keys = day_partitions(Settings.from_env()).get_partition_keys()[-days:]
    where = conninfo()
    with connected(create_engine(where), where) as connection:
        if not keys:
            rows: list[dict[str, Any]] = []
        elif tenant is None:
            rows = _of_all(connection, keys, marketplace)
        else:
            rows = _of_tenant(connection, tenant, keys, marketplace)
    frame = pd.DataFrame(rows, columns=list(COLUMNS), dtype=object)
    return frame.sort_values(["date", "marketplace", "action_code"], ignore_index=True).convert_dtypes()


def _of_all(connection: sa.Connection, keys: Sequence[str], marketplace: str | None) -> list[dict[str, Any]]:
    with connection.begin():
        require_table(connection, _summary)
        query = sa.select(*(_summary.c[name] for name in COLUMNS))
        return _read(connection, query, _summary, keys, marketplace)


def _of_tenant(
    connection: sa.Connection, schema: str, keys: Sequence[str], marketplace: str | None
) -> list[dict[str, Any]]:
    with connection.begin():
        [tenant] = choose_tenants(connection, [schema])
    if reason := tenant.skipped or tenant.failed:
        raise UsageError(f"{schema} has no stats: {reason}.")
    types = {row.id: row for row in action_types(connection)}
    names = [name for name in COLUMNS if name in _stats.c]
    with on_tenant(connection, schema).begin():
        query = sa.select(_stats.c.action_type_id, *(_stats.c[name] for name in names))
        rows = _read(connection, query, _stats, keys, marketplace)
    for row in rows:
        action = types.get(row["action_type_id"])
        row["action_code"], row["action_name"] = (action.code, action.name) if action else (UNKNOWN, UNKNOWN)
        row["success_rate"] = row["success_count"] / row["total_jobs"] if row["total_jobs"] else None
    return rows


def _read(
    connection: sa.Connection, query: sa.Select[Any], table: sa.Table, keys: Sequence[str], marketplace: str | None
) -> list[dict[str, Any]]:
    query = query.where(table.c.date.between(sa.cast(keys[0], sa.Date), sa.cast(keys[-1], sa.Date)))
    if marketplace is not None:
        query = query.where(table.c.marketplace == marketplace)
    return [dict(row) for row in connection.execute(query).mappings()]


@click.command(help="Prints the stats of the last closed days, of all tenants together or of one.")
@click.option("--days", default=7, show_default=True, help="How many closed days.")
@click.option("--marketplace", help=f"One of {', '.join(MARKETPLACES)}; default all.")
@click.option("--tenant", help="A schema, for instance user_7; default the sums over all tenants.")
@click.option("--format", "kind", type=click.Choice(["table", "csv", "json"]), default="table", show_default=True)
def main(days: int, marketplace: str | None, tenant: str | None, kind: str) -> None:
    frame = get_stats(days, marketplace, tenant)
    if kind == "csv":
        click.echo(frame.to_csv(index=False), nl=False)
    elif kind == "json":
        records = frame.astype(object).where(frame.notna(), None).to_dict("records")
        click.echo(json.dumps(records, default=str, indent=1))
    else:
        _print_table(frame)


def _print_table(frame: pd.DataFrame) -> None:
    """The columns that fit on a line, for people."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for header in ("date", "marketplace", "action"):
        table.add_column(header, no_wrap=True)
    for header in ("jobs", "failed", "success", "mean ms", "p50 ms", "p95 ms", "tasks", "retries"):
        table.add_column(header, justify="right", no_wrap=True)
    for row in frame.to_dict("records"):
        durations = (row["avg_duration_ms"], row["p50_duration_ms"], row["p95_duration_ms"])
        table.add_row(
            str(row["date"]),
            row["marketplace"],
            row["action_code"],
            _number(row["total_jobs"]),
            _number(row["failure_count"]),
            "-" if pd.isna(row["success_rate"]) else f"{row['success_rate']:.1%}",
            *map(_number, durations),
            _number(row["total_tasks"]),
            _number(row["retry_count"]),
        )
    console = Console()
    console.width = max(console.width, WIDTH)  # Rather wrapped by a narrow terminal than cut.
    console.print(table if len(frame) else "no rows")


def _number(value: Any) -> str:
    return "-" if pd.isna(value) else f"{value:,.0f}"


if __name__ == "__main__":
    main()
