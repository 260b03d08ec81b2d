"""The table of the summary as Dagster's storage of its frames: only what differs is written."""

from typing import TYPE_CHECKING, Any

import dagster as dg
import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import insert

from assets.reporting import explain
from models.summary import MarketplaceDailySummary
from pipelines.database import require_table
from pipelines.failure import RunFailure
from pipelines.partitions import Window
from pipelines.resources import TenantDatabase
from pipelines.settings import UsageError
from pipelines.tenants import require_writable

if TYPE_CHECKING:
    import pandas as pd

KEY = ("date", "marketplace", "action_code")
COLUMNS = tuple(column.name for column in MarketplaceDailySummary.__table__.columns if column.name != "computed_at")
"""The columns of a summary frame: those of the table, without the time of writing."""

summary = MarketplaceDailySummary.__table__


class SummaryTable(dg.IOManager):
    """A summary frame of some days goes into `marketplace_stats.marketplace_daily_summary`, and comes from there."""

    def __init__(self, tenant_database: TenantDatabase) -> None:
        self.tenant_database = tenant_database

    def handle_output(self, context: dg.OutputContext, obj: "pd.DataFrame") -> None:
        window = _window(context)
        try:
            with self.tenant_database.connect() as (_, connection):
                changes = write(connection, obj, window)
        except UsageError as error:
            raise RunFailure(error.message) from None
        except sa.exc.DBAPIError as error:
            raise RunFailure(f"The summary could not be written: {explain(error)}.") from None
        context.add_output_metadata({f"run_{name}": number for name, number in changes.items()})

    def load_input(self, context: dg.InputContext) -> "pd.DataFrame":
        with self.tenant_database.connect() as (_, connection):
            return read(connection, _window(context))


def _window(context: dg.OutputContext | dg.InputContext) -> Window:
    partitions = context.asset_partitions_def
    assert isinstance(partitions, dg.DailyPartitionsDefinition)  # noqa: S101 The summary has no others.
    return Window.of(partitions, context.asset_partition_keys)


def write(connection: sa.Connection, frame: "pd.DataFrame", window: Window) -> dict[str, int]:
    """Makes the table hold this frame for these days, in one durable transaction; how many rows it changed.

    The lock comes first, so that two runs follow each other, and readers are not disturbed.
    """
    records: list[dict[Any, Any]] = frame.to_dict("records")
    wanted = {tuple(row[name] for name in KEY): row for row in records}
    with connection.begin():
        require_writable(connection, summary)
        connection.execute(sa.text("SET LOCAL synchronous_commit = on"))
        connection.execute(sa.text(f"LOCK TABLE {summary.fullname} IN SHARE ROW EXCLUSIVE MODE"))
        stored = {tuple(row[name] for name in KEY): row for row in _rows(connection, window)}
        gone = stored.keys() - wanted.keys()
        changed = [row for key, row in wanted.items() if row != stored.get(key)]
        if gone:
            connection.execute(sa.delete(summary).where(sa.tuple_(*(summary.c[name] for name in KEY)).in_(list(gone))))
        if changed:
            new = insert(summary).values(computed_at=sa.func.now())
            others = {name: new.excluded[name] for name in (*COLUMNS, "computed_at") if name not in KEY}
            connection.execute(new.on_conflict_do_update(index_elements=list(KEY), set_=others), changed)
    return {
        "rows_inserted": sum(key not in stored for key in wanted),
        "rows_updated": len(changed) - sum(key not in stored for key in wanted),
        "rows_deleted": len(gone),
    }


def read(connection: sa.Connection, window: Window) -> "pd.DataFrame":
    """The summary of these days, with the columns COLUMNS, sorted by day, marketplace and action."""
    import pandas as pd  # It takes a second: not for every import.

    with connection.begin():
        require_table(connection, summary)
        return pd.DataFrame(_rows(connection, window), columns=list(COLUMNS), dtype=object)


def _rows(connection: sa.Connection, window: Window) -> list[dict[str, Any]]:
    query = (
        sa.select(*(summary.c[name] for name in COLUMNS))
        .where(summary.c.date.between(window.dates[0], window.dates[-1]))
        .order_by(*(summary.c[name] for name in KEY))
    )
    return [dict(row) for row in connection.execute(query).mappings()]
