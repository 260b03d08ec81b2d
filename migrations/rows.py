"""The statements that move rows: from the old table to the new one, to the archive, and back from it.

None of them loses a row. They name all columns of the canonical table, so they come after the statements that make it.
"""

from collections.abc import Iterator

from migrations.canonical import COLUMNS, FILLED, NEW_KEY
from migrations.shape import ARCHIVE, NEW, OLD, Relation


def merge(schema: str, old: Relation) -> Iterator[str]:
    """The rows of the old table go into the new one, under new ids; then the old one goes."""
    for sequence in old.owned_sequences:
        # Clones take their ids from it, and it would go with the table.
        yield f"ALTER SEQUENCE {sequence} OWNED BY {schema}.{NEW}.id"
    columns = [name for name in COLUMNS if name in old.columns]
    values = [f"coalesce({name}, {FILLED[name]})" if name in FILLED else name for name in columns]
    yield f"INSERT INTO {schema}.{NEW} ({', '.join(columns)}) SELECT {', '.join(values)} FROM {schema}.{OLD}"
    yield f"DROP TABLE {schema}.{OLD}"


def archive_losers(schema: str) -> Iterator[str]:
    """Of the rows with one key, the one with the most jobs stays; the others go to the archive."""
    columns = ", ".join(COLUMNS)
    yield _archive_sql(schema)
    yield f"""
        WITH ranked AS (
            SELECT ctid AS place, row_number() OVER (PARTITION BY {", ".join(NEW_KEY)}
                       ORDER BY total_jobs DESC, computed_at DESC NULLS LAST, created_at DESC, id DESC) AS rank
              FROM {schema}.{NEW}
        ), losers AS (
            DELETE FROM {schema}.{NEW} AS stats USING ranked WHERE stats.ctid = ranked.place AND rank > 1
            RETURNING stats.*
        )
        INSERT INTO {schema}.{ARCHIVE} ({columns}, reason) SELECT {columns}, 'duplicate' FROM losers"""


def put_away(schema: str) -> Iterator[str]:
    """The rows that have no place in the old table go to the archive."""
    columns = ", ".join(COLUMNS)
    yield _archive_sql(schema)
    yield f"""
        WITH moved AS (DELETE FROM {schema}.{NEW} WHERE marketplace <> 'vinted' RETURNING *)
        INSERT INTO {schema}.{ARCHIVE} ({columns}, reason) SELECT {columns}, 'downgrade' FROM moved"""


def take_back(schema: str) -> str:
    """The rows that a downgrade put away come back, unless their key is taken by now."""
    columns = ", ".join(COLUMNS)
    same_key = " AND ".join(f"stats.{name} = archive.{name}" for name in NEW_KEY)
    return f"""
        WITH chosen AS (
            SELECT DISTINCT ON ({", ".join(NEW_KEY)}) ctid AS place
              FROM {schema}.{ARCHIVE} AS archive
             WHERE reason = 'downgrade' AND NOT EXISTS (SELECT FROM {schema}.{NEW} AS stats WHERE {same_key})
             ORDER BY {", ".join(NEW_KEY)}, total_jobs DESC, archived_at DESC
        ), back AS (
            DELETE FROM {schema}.{ARCHIVE} AS archive USING chosen WHERE archive.ctid = chosen.place RETURNING archive.*
        )
        INSERT INTO {schema}.{NEW} ({columns}) SELECT {columns} FROM back"""


def _archive_sql(schema: str) -> str:
    columns = ", ".join(f"{name} {column.type}" for name, column in COLUMNS.items())
    return (
        f"CREATE TABLE IF NOT EXISTS {schema}.{ARCHIVE} ({columns}, reason text NOT NULL, "
        "archived_at timestamp with time zone NOT NULL DEFAULT now())"
    )
