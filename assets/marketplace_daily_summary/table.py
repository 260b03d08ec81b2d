"""The table of the summary: writing a frame into it, only what differs."""

from typing import Any

import pandas as pd
import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import insert

from assets.marketplace_daily_summary.aggregate import COLUMNS, KEY
from models.summary import MarketplaceDailySummary
from pipelines.partitions import Window

summary = MarketplaceDailySummary.__table__


def write(connection: sa.Connection, frame: pd.DataFrame, window: Window) -> dict[str, int]:
    """Makes the table hold this frame for these days, in one durable transaction; how many rows it changed.

    The lock comes first, so that two runs follow each other, and readers are not disturbed.
    """
    records: list[dict[Any, Any]] = frame.to_dict("records")
    wanted = {tuple(row[name] for name in KEY): row for row in records}
    with connection.begin():
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


def _rows(connection: sa.Connection, window: Window) -> list[dict[str, Any]]:
    query = (
        sa.select(*(summary.c[name] for name in COLUMNS))
        .where(summary.c.date.between(window.dates[0], window.dates[-1]))
        .order_by(*(summary.c[name] for name in KEY))
    )
    return [dict(row) for row in connection.execute(query).mappings()]
