"""The index of one schema: what it is, how it is recognised, built and dropped. Nothing here knows of other schemas."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from models.sources import MarketplaceJob
from pipelines.tenants import quoted

TABLE = MarketplaceJob.__tablename__
# Not the name that earlier releases gave: the two stand side by side while the one replaces the other.
NAME = "ix_marketplace_jobs_completed_at_facts"
KEY = "completed_at"
# All that a run reads of each job, in the order that leaves no gaps between the values: 8 bytes, 4 bytes, text. Never
# free text: a run looks that up by the primary key, for the failed jobs only.
INCLUDED = ("started_at", "created_at", "id", "action_type_id", "retry_count", "status", "marketplace")
# What an index lacks that an earlier release built.
LACKING = "created_at"
# Any comparison of the key implies this condition, whatever type the status has; one on the status would not be proven.
CONDITION = f"{KEY} IS NOT NULL"

SESSION: dict[str, Any] = {
    "search_path": "pg_catalog",  # So that nothing that a tenant's owner has made is found by a name or an operator.
    "quote_all_identifiers": "off",  # So that conditions are written alike.
}
"""The settings that a session needs which works on the index."""


@dataclass(frozen=True)
class Found:
    """What a schema has: the names of the indexes that are this one, of its older shape, or left by an interruption.

    `size_bytes` is that of all of them; `estimate_bytes` that of a new one, None if nobody has analyzed the table.
    """

    has_table: bool = True
    current: tuple[str, ...] = ()
    older: tuple[str, ...] = ()
    left_over: tuple[str, ...] = ()
    size_bytes: int = 0
    estimate_bytes: int | None = None

    @property
    def is_missing(self) -> bool:
        """Whether there is a table without a valid index of the current shape."""
        return self.has_table and not self.current

    @property
    def obsolete(self) -> tuple[str, ...]:
        """What a build drops."""
        return (*self.left_over, *self.older)


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
                                min(1 - null_frac) FILTER (WHERE attname = CAST(:key AS text)) AS filled
                           FROM pg_stats
                          WHERE schemaname = n.nspname AND tablename = c.relname AND NOT inherited
                            AND attname = ANY (CAST(:columns AS text[]))) AS stats
     WHERE n.nspname = CAST(:schema AS text) AND c.relname = CAST(:table AS text) AND c.relkind IN ('r', 'p')
""").bindparams(table=TABLE, key=KEY, columns=[KEY, *INCLUDED], count=1 + len(INCLUDED))

# Its indexes that are this one, of either shape. A clone's has a name of PostgreSQL's choice, so only what they are is
# looked at: the key comes first among the columns, then the others by their names.
_INDEXES = sa.text("""
    SELECT c.relname::text AS name, i.indisvalid AS is_valid, pg_relation_size(c.oid) AS size_bytes,
           columns.names = CAST(:columns AS text[]) AS is_current
      FROM pg_index i
      JOIN pg_class c ON c.oid = i.indexrelid
      JOIN pg_am am ON am.oid = c.relam AND am.amname = 'btree'
     CROSS JOIN LATERAL (SELECT array_agg(a.attname::text ORDER BY a.attnum <> i.indkey[0], a.attname) AS names
                           FROM pg_attribute a
                          WHERE a.attrelid = i.indrelid AND a.attnum = ANY (i.indkey)) AS columns
     WHERE i.indrelid = :oid AND NOT i.indisunique AND i.indnkeyatts = 1
       AND pg_get_expr(i.indpred, i.indrelid) = CAST(:condition AS text)
       AND columns.names IN (CAST(:columns AS text[]), array_remove(CAST(:columns AS text[]), CAST(:lacking AS text)))
     ORDER BY c.relname
""").bindparams(condition=f"({CONDITION})", columns=[KEY, *sorted(INCLUDED)], lacking=LACKING)


def look(connection: sa.Connection, schema: str) -> Found:
    """What a schema has. One at a time, because PostgreSQL waits for whoever keeps the table locked."""
    table = connection.execute(_TABLE, {"schema": schema}).one_or_none()
    if table is None:
        return Found(has_table=False)
    indexes = connection.execute(_INDEXES, {"oid": table.oid}).all()
    return Found(
        current=tuple(index.name for index in indexes if index.is_valid and index.is_current),
        older=tuple(index.name for index in indexes if index.is_valid and not index.is_current),
        left_over=tuple(index.name for index in indexes if not index.is_valid),
        size_bytes=sum(index.size_bytes for index in indexes),
        estimate_bytes=table.estimate_bytes,
    )


def build(connection: sa.Connection, schema: str) -> None:
    """Builds it where it is missing, and drops what is of the older shape or left over."""
    found = look(connection, schema)
    _drop(connection, schema, found.left_over)
    if found.is_missing:
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
    # Last, so that at no time there is none to find a day by.
    _drop(connection, schema, found.older)


def drop(connection: sa.Connection, schema: str) -> None:
    """Drops it, of whatever name and shape, and whether valid or not."""
    found = look(connection, schema)
    _drop(connection, schema, (*found.obsolete, *found.current))


def _drop(connection: sa.Connection, schema: str, names: Sequence[str]) -> None:
    for name in names:
        # The driver would take a percent sign in the name for a parameter, if there were parameters.
        connection.exec_driver_sql(
            f"DROP INDEX CONCURRENTLY IF EXISTS {quoted(schema)}.{quoted(name)}",
            execution_options={"no_parameters": True},
        )
