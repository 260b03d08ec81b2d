"""The index of one schema: what it is, how it is recognised, built and dropped. Nothing here knows of other schemas."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import sqlalchemy as sa

from models.sources import MarketplaceJob
from pipelines.tenants import quoted

TABLE = MarketplaceJob.__tablename__
NAME = "ix_marketplace_jobs_completed_at_covering"
KEY = "completed_at"
# All that the aggregate reads of a job, in the order that leaves no gaps between the values: 8 bytes, 4 bytes, text.
INCLUDED = ("started_at", "id", "action_type_id", "retry_count", "status", "marketplace")
# Any comparison of the key implies this condition, whatever type the status has; one on the status would not be proven.
CONDITION = f"{KEY} IS NOT NULL"


@dataclass(frozen=True)
class Found:
    """What a schema has: the names of the indexes that are this one, whole or left by a build that did not end.

    `size_bytes` is that of all of them; `estimate_bytes` that of a new one, None if nobody has analyzed the table.
    """

    has_table: bool = True
    whole: tuple[str, ...] = ()
    left_over: tuple[str, ...] = ()
    size_bytes: int = 0
    estimate_bytes: int | None = None


# The table, if it is one, and how large the index on it would be: entries of 8 bytes and their values, in steps of 8,
# with a pointer of 4; pages less 40 bytes of their own, filled to nine tenths; and a first page. The rows are those
# that the planner would expect: as many on each page as when it was analyzed last.
_TABLE = sa.text("""
    SELECT c.oid,
           CASE WHEN size.pages = 0 THEN size.page
                WHEN stats.known = :count AND c.reltuples >= 0 AND c.relpages > 0
                THEN size.page * (1 + ceil(c.reltuples / c.relpages * size.pages * stats.filled
                                           * (4 + 8 * ceil((8 + stats.width) / 8.0)) / ((size.page - 40) * 0.9)))
           END::bigint AS estimate_bytes
      FROM pg_class c
      JOIN pg_namespace n ON n.oid = c.relnamespace
     CROSS JOIN LATERAL (SELECT page, pg_relation_size(c.oid) / page AS pages
                           FROM (SELECT current_setting('block_size')::bigint) AS setting (page)) AS size
     CROSS JOIN LATERAL (SELECT count(*) AS known, sum(avg_width) AS width,
                                min(1 - null_frac) FILTER (WHERE attname = :key) AS filled
                           FROM pg_stats
                          WHERE schemaname = n.nspname AND tablename = c.relname AND NOT inherited
                            AND attname = ANY (:columns)) AS stats
     WHERE n.nspname = :schema AND c.relname = :table AND c.relkind IN ('r', 'p')
""").bindparams(table=TABLE, key=KEY, columns=[KEY, *INCLUDED], count=1 + len(INCLUDED))

# Its indexes that are this one. A clone's has a name of PostgreSQL's choice, so only what they are is looked at.
_INDEXES = sa.text("""
    SELECT c.relname AS name, i.indisvalid AS is_whole, pg_relation_size(c.oid) AS size_bytes
      FROM pg_index i
      JOIN pg_class c ON c.oid = i.indexrelid
      JOIN pg_am am ON am.oid = c.relam AND am.amname = 'btree'
     WHERE i.indrelid = :oid AND NOT i.indisunique AND i.indnkeyatts = 1
       AND pg_get_expr(i.indpred, i.indrelid) = :condition
       AND (SELECT array_agg(a.attname::text ORDER BY a.attnum <> i.indkey[0], a.attname) FROM pg_attribute a
             WHERE a.attrelid = i.indrelid AND a.attnum = ANY (i.indkey)) = :columns
     ORDER BY c.relname
""").bindparams(condition=f"({CONDITION})", columns=[KEY, *sorted(INCLUDED)])


def look(connection: sa.Connection, schema: str) -> Found:
    """What a schema has. One at a time, because PostgreSQL waits for whoever keeps the table locked."""
    table = connection.execute(_TABLE, {"schema": schema}).one_or_none()
    if table is None:
        return Found(has_table=False)
    indexes = connection.execute(_INDEXES, {"oid": table.oid}).all()
    return Found(
        has_table=True,
        whole=tuple(index.name for index in indexes if index.is_whole),
        left_over=tuple(index.name for index in indexes if not index.is_whole),
        size_bytes=sum(index.size_bytes for index in indexes),
        estimate_bytes=table.estimate_bytes,
    )


def build(connection: sa.Connection, schema: str) -> bool:
    """Builds it where it is missing, after what an interrupted build has left is gone; whether there was a need to."""
    found = look(connection, schema)
    _drop(connection, schema, found.left_over)
    if not found.has_table or found.whole:
        return bool(found.left_over)
    try:
        connection.exec_driver_sql(
            f"CREATE INDEX CONCURRENTLY {NAME} ON {quoted(schema)}.{TABLE} ({KEY}) "
            f"INCLUDE ({', '.join(INCLUDED)}) WHERE {CONDITION}"
        )
    except sa.exc.DBAPIError:
        # What failed halfway may cost every write something. If it cannot be dropped now, the next build does it.
        with suppress(sa.exc.SQLAlchemyError):
            _drop(connection, schema, look(connection, schema).left_over)
        raise
    return True


def drop(connection: sa.Connection, schema: str) -> bool:
    """Drops it, under whatever name and whether whole or not; whether there was one."""
    found = look(connection, schema)
    _drop(connection, schema, (*found.whole, *found.left_over))
    return bool(found.whole or found.left_over)


def _drop(connection: sa.Connection, schema: str, names: Sequence[str]) -> None:
    for name in names:
        connection.exec_driver_sql(f"DROP INDEX CONCURRENTLY IF EXISTS {quoted(schema)}.{quoted(name)}")
