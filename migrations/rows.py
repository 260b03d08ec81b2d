"""The statements that move rows: into the stats, to the archive, and back from it; counted, so that none is lost.

What is written may be changed or left out by a trigger or a rule of somebody else's. So the rows of all tables that
take part are counted and hashed before the move and after it, under the lock, and a difference fails the schema.
"""

from collections.abc import Iterator, Mapping, Sequence

from psycopg import sql

from migrations.converge import FILLED, Refusal, converted, logged
from migrations.first import NEW_KEY
from migrations.shape import ARCHIVE, NEW, OLD, Column, Relation, last_id
from pipelines.tenants import quoted

_ARCHIVE_COLUMNS = {"reason": "text NOT NULL", "archived_at": "timestamp with time zone NOT NULL DEFAULT now()"}
_SETTING = "marketplace_stats.rows"


def counted(
    columns: Sequence[str], before: Mapping[str, str], moves: Sequence[str], after: Sequence[str]
) -> Iterator[str]:
    """The moves, between a count of the rows of the tables `before`, by what is selected of each, and `after` them."""
    selects = [f"SELECT {selected} FROM {table}" for table, selected in before.items()]
    yield "SET CONSTRAINTS ALL IMMEDIATE"  # A trigger that waits for the end would be in the way of ALTER TABLE.
    yield f"SELECT pg_catalog.set_config('{_SETTING}', ({_count(selects)}), true)"
    yield from moves
    count = _count([f"SELECT {', '.join(filled(columns))} FROM {table}" for table in after])
    proof = (
        f"BEGIN IF pg_catalog.current_setting('{_SETTING}') IS DISTINCT FROM ({count}) THEN "
        f"RAISE EXCEPTION 'rows would be lost or changed on their way to {' and '.join(after)}' "
        "USING ERRCODE = 'P0004'; END IF; END"
    )
    yield f"DO {sql.Literal(proof).as_string()}"


def _count(selects: Sequence[str]) -> str:
    rows = " UNION ALL ".join(selects)
    total = "sum(pg_catalog.hashtextextended(moved::text, 0::bigint))"
    return f"SELECT pg_catalog.concat(count(*), ' ', {total}) FROM ({rows}) AS moved"


def filled(columns: Sequence[str]) -> list[str]:
    """The columns, quoted ones, with what must not be null in the stats filled."""
    names = {quoted(name): f"coalesce({name}, {value})" for name, value in FILLED.items()}
    return [names.get(column, column) for column in columns]


def catch_up(sequence: str, table: str) -> Iterator[str]:
    """A sequence, by its name as a literal, that is behind the ids of a table is set to the largest.

    One at a time, as most tenants share the template's: it must not be set back by who has looked before.
    """
    yield f"SELECT pg_catalog.pg_advisory_xact_lock({sequence}::pg_catalog.regclass::oid::bigint)"
    yield (
        f"SELECT pg_catalog.setval({sequence}::pg_catalog.regclass, max(id)::bigint) FROM {table} "
        f"HAVING max(id)::bigint OPERATOR(pg_catalog.>) {last_id(sequence)}"
    )


def merge(old: Relation, target: Mapping[str, Column], columns: Mapping[str, str]) -> tuple[str, list[str]]:
    """What is selected of the old table for the columns, by name and type, of the new one; and the statements.

    The ids are new ones. Raises Refusal for a type that is too far away.
    """
    selected = ", ".join(
        f"CAST({FILLED.get(name, 'NULL')} AS {type_})"
        if name not in old.columns
        else converted(old, name, target[name], is_spelled=False)
        if name in target
        else quoted(name)
        for name, type_ in columns.items()
    )
    names = ", ".join(map(quoted, columns))
    statements = [f"INSERT INTO {NEW} ({names}) SELECT {selected} FROM {OLD}"]
    if not (identity := old.columns.get("id")) or identity.default != "identity":
        # Clones take their ids from it, and it would go with the table.
        statements = [f"ALTER SEQUENCE {name} OWNED BY {NEW}.id" for name in old.owned_sequences] + statements
    return selected, statements


def archive(there: Relation | None, columns: Mapping[str, str]) -> Iterator[str]:
    """The archive, with a place for each column. Raises Refusal where it cannot keep one of theirs.

    It has no key, so where tables are published its rows could not be taken back without a replica identity.
    """
    if clash := sorted(columns.keys() & _ARCHIVE_COLUMNS.keys()):
        raise Refusal(f"rows have to go to {ARCHIVE}, and {NEW} has a column {clash[0]} of its own: rename it")
    types = {quoted(name): type_ for name, type_ in columns.items()} | _ARCHIVE_COLUMNS
    if there is None:
        yield f"CREATE TABLE {ARCHIVE} ({', '.join(f'{name} {type_}' for name, type_ in types.items())})"
    else:
        yield from logged(there)
        if missing := [
            f"ADD COLUMN {quoted(name)} {type_}" for name, type_ in columns.items() if name not in there.columns
        ]:
            yield f"ALTER TABLE {ARCHIVE} {', '.join(missing)}"
    if there is None or there.replica_identity != "f":
        yield f"ALTER TABLE {ARCHIVE} REPLICA IDENTITY FULL"


def archive_losers(columns: Sequence[str]) -> str:
    """Of the rows with one key one stays; the others go to the archive. A row that the batch computed is exact, and so
    beats a counter's; of counters' rows the one with the most jobs stays."""
    names = ", ".join(columns)
    return f"""
        WITH ranked AS (
            SELECT ctid AS place, row_number() OVER (PARTITION BY {", ".join(NEW_KEY)}
                       ORDER BY computed_at IS NULL, CASE WHEN computed_at IS NULL THEN total_jobs END DESC,
                                computed_at DESC, created_at DESC, id DESC) AS rank
              FROM {NEW}
        ), losers AS (
            DELETE FROM {NEW} AS stats USING ranked WHERE stats.ctid = ranked.place AND rank > 1 RETURNING stats.*
        )
        INSERT INTO {ARCHIVE} ({names}, reason) SELECT {names}, 'duplicate' FROM losers"""


def put_away(columns: Sequence[str]) -> str:
    """The rows that have no place in the old table go to the archive."""
    names = ", ".join(columns)
    return f"""
        WITH moved AS (DELETE FROM {NEW} WHERE marketplace::text <> 'vinted' RETURNING *)
        INSERT INTO {ARCHIVE} ({names}, reason) SELECT {names}, 'downgrade' FROM moved"""


def take_back(columns: Sequence[str]) -> str:
    """The rows that a downgrade put away come back. There is no unique key then: see `archive_losers`."""
    return f"""
        WITH back AS (DELETE FROM {ARCHIVE} WHERE reason = 'downgrade' RETURNING *)
        INSERT INTO {NEW} ({", ".join(columns)}) SELECT {", ".join(filled(columns))} FROM back"""
