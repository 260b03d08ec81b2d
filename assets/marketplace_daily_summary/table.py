"""The tables of the summary: its rows and its days are read and written here, and only what differs is written."""

from collections.abc import Collection, Mapping, Sequence
from datetime import date
from typing import TYPE_CHECKING, Any, NamedTuple

import dagster as dg
import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import insert

from models.summary import MarketplaceDailySummary, MarketplaceDailySummaryDay
from pipelines.database import require_table
from pipelines.partitions import Window
from pipelines.resources import TenantDatabase
from pipelines.tenants import require_writable

if TYPE_CHECKING:
    import pandas as pd

KEY = ("date", "marketplace", "action_code")
COLUMNS = tuple(column.name for column in MarketplaceDailySummary.__table__.columns if column.name != "computed_at")
"""The columns of a summary frame: those of the table, without the time of writing."""

summary, summary_days = MarketplaceDailySummary.__table__, MarketplaceDailySummaryDay.__table__
_ended = summary.c.total_jobs + summary.c.cancelled_count + summary.c.expired_count


class SummaryTable(dg.IOManager):
    """Loads the summary of some days as a frame. The asset itself writes its tables, both in one transaction."""

    def __init__(self, tenant_database: TenantDatabase) -> None:
        self.tenant_database = tenant_database

    def handle_output(self, context: dg.OutputContext, obj: Any) -> None:
        """Nothing: the asset has no value."""

    def load_input(self, context: dg.InputContext) -> "pd.DataFrame":
        partitions = context.asset_partitions_def
        assert isinstance(partitions, dg.DailyPartitionsDefinition)  # noqa: S101 The summary has no others.
        with self.tenant_database.connect() as (_, connection):
            return read(connection, Window.of(partitions, context.asset_partition_keys))


class Written(NamedTuple):
    """How many rows of the summary a run changed, and the days that it left as they were."""

    changes: dict[str, int]
    kept: set[date]


def write(
    connection: sa.Connection,
    records: Sequence[Mapping[Any, Any]],
    days: Mapping[date, Mapping[str, Any]],
    unread: Collection[str] = (),
    keep_reasons: bool = False,
) -> Written:
    """Makes the tables hold these rows and days, in one durable transaction.

    A day in which one of the tenants `unread` may have a part is left as it is: it would become less than it was. With
    `keep_reasons` the rows that are there keep their reasons. The lock comes first, so that two runs follow each
    other, and readers are not disturbed.
    """
    with connection.begin():
        require_writable(connection, summary)
        require_writable(connection, summary_days)
        connection.execute(sa.text("SET LOCAL synchronous_commit = on"))
        connection.execute(sa.text(f"LOCK TABLE {summary.fullname} IN SHARE ROW EXCLUSIVE MODE"))
        recorded = _recorded(connection, min(days), max(days))
        kept = {
            day for day, known in recorded.items() if day in days and not set(unread).issubset(known["missing_tenants"])
        }
        changes = write_rows(connection, summary, records, days.keys() - kept, keep_reasons)
        write_days(connection, summary_days, {day: record for day, record in days.items() if day not in kept})
    return Written(changes, kept)


def write_rows(
    connection: sa.Connection,
    table: sa.Table,
    records: Sequence[Mapping[Any, Any]],
    days: Collection[date],
    keep_reasons: bool = False,
) -> dict[str, int]:
    """Makes a summary's table hold these rows on these days, and no others; how many it changed.

    Within a transaction of the caller, which keeps the table locked.
    """
    rows = _rows(connection, table, days)
    stored = {tuple(row[name] for name in KEY): row for row in rows}
    wanted = {tuple(row[name] for name in KEY): dict(row) for row in records if row["date"] in days}
    if keep_reasons:
        for key in wanted.keys() & stored.keys():
            wanted[key] |= {name: stored[key][name] for name in ("top_reasons", "failure_reasons")}
    gone = stored.keys() - wanted.keys()
    changed = [row for key, row in wanted.items() if row != stored.get(key)]
    if gone:
        connection.execute(sa.delete(table).where(sa.tuple_(*(table.c[name] for name in KEY)).in_(list(gone))))
    upsert(connection, table, KEY, changed)
    inserted = sum(key not in stored for key in wanted)
    return {"rows_inserted": inserted, "rows_updated": len(changed) - inserted, "rows_deleted": len(gone)}


def write_days(connection: sa.Connection, table: sa.Table, days: Mapping[date, Mapping[str, Any]]) -> None:
    """Makes a summary's table of days hold these; the same way."""
    stored = connection.execute(sa.select(table).where(table.c.date.in_(list(days)))).mappings()
    known: dict[date, Mapping[Any, Any]] = {row["date"]: row for row in stored}
    changed = [
        {"date": day, **record}
        for day, record in days.items()
        if {name: known.get(day, {}).get(name) for name in record} != record
    ]
    upsert(connection, table, ("date",), changed)


def upsert(connection: sa.Connection, table: sa.Table, key: Sequence[str], rows: Sequence[dict[Any, Any]]) -> None:
    if rows:
        new = insert(table).values(computed_at=sa.func.now())
        others = {column.name: new.excluded[column.name] for column in table.columns if column.name not in key}
        connection.execute(new.on_conflict_do_update(index_elements=list(key), set_=others), rows)


def read(connection: sa.Connection, window: Window) -> "pd.DataFrame":
    """The summary of these days, with the columns COLUMNS, sorted by day, marketplace and action."""
    import pandas as pd  # It takes a second: not for every import.

    with connection.begin():
        require_table(connection, summary)
        return pd.DataFrame(_rows(connection, summary, window.dates), columns=list(COLUMNS), dtype=object)


def read_days(connection: sa.Connection, window: Window | None = None) -> dict[date, dict[str, Any]]:
    """The days of this window, or all there are, that have rows or were summarized: the columns of the days' table,
    null where the day was not, and `stored_job_count`, the jobs in the day's rows."""
    first, last = (window.dates[0], window.dates[-1]) if window else (date.min, date.max)
    with connection.begin():
        require_table(connection, summary_days)
        return _recorded(connection, first, last)


def _recorded(connection: sa.Connection, first: date, last: date) -> dict[date, dict[str, Any]]:
    rows = (
        sa.select(summary.c.date, sa.cast(sa.func.sum(_ended), sa.BigInteger).label("stored_job_count"))
        .group_by(summary.c.date)
        .subquery("rows")
    )
    day = sa.func.coalesce(summary_days.c.date, rows.c.date)
    query = (
        sa.select(
            day.label("day"),
            *(column for column in summary_days.columns if column.name != "date"),
            sa.func.coalesce(rows.c.stored_job_count, 0).label("stored_job_count"),
        )
        .select_from(summary_days.join(rows, rows.c.date == summary_days.c.date, full=True))
        .where(day.between(first, last))
    )
    found = (dict(row) for row in connection.execute(query).mappings())
    return {row.pop("day"): row | {"missing_tenants": row["missing_tenants"] or []} for row in found}


def _rows(connection: sa.Connection, table: sa.Table, days: Collection[date]) -> list[dict[str, Any]]:
    query = (
        sa.select(*(table.c[name] for name in COLUMNS))
        .where(table.c.date == sa.func.any(sa.bindparam("days", list(days), type_=sa.ARRAY(sa.Date))))
        .order_by(*(table.c[name] for name in KEY))
    )
    return [dict(row) for row in connection.execute(query).mappings()]
