"""From the shape that a tenant has to the statements that make it canonical, and back. Nothing is read here.

`upgrade` and `downgrade` name the state that a tenant is in and give the statements, in order, to be run in one
transaction. The statements are right for any rows; rows that cannot be brought over with certainty make one of them
fail, by a constraint, and the tenant stays as it was. No row is lost: what must give way goes to the archive table.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

import sqlalchemy as sa

from migrations.canonical import (
    ADDED_COLUMNS,
    BIGINT,
    CHECK,
    CHECK_SQL,
    COLUMNS,
    FILLED,
    INDEX,
    INTEGER,
    LEDGER_COLUMNS,
    LEDGER_SQL,
    LOSSLESS,
    MARKETPLACE,
    MARKETPLACES,
    NEW_KEY,
    NEW_TABLE_SQL,
    OLD_KEY,
    OLD_UNIQUE,
    SUMMARY_COLUMNS,
    SUMMARY_SQL,
    TIMESTAMP,
    UNIQUE,
    VIEW_READ_BACK,
    VIEW_SQL,
    definition,
)
from migrations.rows import archive_losers, merge, put_away, take_back
from migrations.shape import ARCHIVE, LEDGER, NEW, OLD, SUMMARY, Column, Constraint, Relation, Shape
from pipelines.tenants import quoted

_KINDS = {
    "p": "a partitioned table",
    "h": "a table that others inherit from",
    "m": "a materialized view",
    "f": "a foreign table",
}
INDEXED = ("marketplace", "created_at")
_NUMBERS = ("smallint", INTEGER, BIGINT, "real", "double precision")


class Refusal(Exception):
    """The tenant is in a state that must not be changed without a person; says why, and what to do."""


@dataclass(frozen=True)
class Plan:
    """The state that a tenant was met in, and what is to be done; nothing if it is canonical."""

    schema: str
    state: str
    statements: tuple[str, ...]

    @property
    def creates_sequence(self) -> bool:
        """Whether the ids will come from a sequence that is not there yet, `marketplace_job_stats_id_seq`."""
        return any("id serial" in text or text.startswith("CREATE SEQUENCE") for text in self.statements)

    def execute(self, connection: sa.Connection) -> None:
        """Runs the statements in one round trip, in the transaction that the connection is in."""
        if self.statements:
            # Without parameters several statements may go in one message.
            connection.exec_driver_sql(";\n".join(self.statements), execution_options={"no_parameters": True})


def has_legacy_view(shape: Shape) -> bool:
    """Whether a migrated tenant is meant to have the view under the old name: it goes together with the default."""
    new = shape.table(NEW)
    marketplace = new.columns.get("marketplace") if new else None
    return shape.view(OLD) is not None or bool(marketplace and marketplace.default)


def upgrade(shape: Shape, legacy_view: bool) -> Plan:
    """The way to the canonical new shape, with or without the view under the old name. Raises Refusal."""
    state = _state(shape)
    statements = tuple(_upgrade(shape, legacy_view))
    if statements and shape.table(ARCHIVE):
        statements += (take_back(quoted(shape.schema)),)
    if state == "renamed" and not statements:
        state = "canonical"
    return Plan(shape.schema, state, statements)


def upgrade_shared(shape: Shape) -> Plan:
    """The way to the tables of our own schema. Raises Refusal where something else has their name."""
    summary = shape.relations.get(SUMMARY)
    if summary is None:
        return Plan(shape.schema, "missing", (f"CREATE TABLE {quoted(shape.schema)}.{SUMMARY} {SUMMARY_SQL}",))
    if summary.kind != "r" or summary.columns != SUMMARY_COLUMNS:
        raise Refusal(f"{SUMMARY} has another shape: drop it, it is computed again, or rename it")
    return Plan(shape.schema, "canonical", ())


def downgrade_shared(shape: Shape) -> Plan:
    """The way back to a schema without tables of ours."""
    drop = (f"DROP TABLE {quoted(shape.schema)}.{SUMMARY}",) if shape.table(SUMMARY) else ()
    return Plan(shape.schema, "canonical", drop)


def _state(shape: Shape) -> str:
    """Which of the states a tenant is in, as the operator's page names them. Raises Refusal."""
    for name in (OLD, NEW, LEDGER, ARCHIVE):
        relation = shape.relations.get(name)
        if relation and relation.kind not in "rv":
            kind = _KINDS.get(relation.kind, "not a table")
            raise Refusal(f"{name} is {kind}: replace it by a plain table with the same rows")
    old, new = shape.table(OLD), shape.table(NEW)
    for table in (old, new):
        if table and (missing := {"action_type_id", "date", "total_jobs"} - set(table.columns)):
            raise Refusal(
                f"{table.name} has no column {', '.join(sorted(missing))}: rename it, if it is something else"
            )
    if old and new and (more := sorted(set(old.columns) - set(COLUMNS) - {"id"})):
        raise Refusal(f"{OLD} and {NEW} both exist, and {OLD} has a column {more[0]} of its own: move it, or drop it")
    if shape.view(NEW) and not old:
        raise Refusal(f"{NEW} is a view, and there is no table {OLD} behind it: drop it, or rename its table to {NEW}")
    if shape.view(OLD) and not new:
        raise Refusal(f"{OLD} is a view, and there is no table {NEW} behind it: drop it, or rename its table to {OLD}")
    if old and new:
        return "both"
    if new:
        return "renamed"
    if old:
        return "old" if old.of_kind("p") else "unkeyed"
    return "missing"


def _upgrade(shape: Shape, legacy_view: bool) -> Iterator[str]:
    schema = quoted(shape.schema)
    old, new, view = shape.table(OLD), shape.table(NEW), shape.view(OLD)
    if shape.view(NEW):
        yield f"DROP VIEW {schema}.{NEW}"

    table = new or old
    changes = [] if table is None else list(_converge(schema, table, legacy_view, merged=old if new else None))
    keep_view = view is not None and legacy_view and view.view == VIEW_READ_BACK and not changes
    if view and not keep_view:
        # Types cannot be changed under a view.
        yield f"DROP VIEW {schema}.{OLD}"
    if old and not new:
        yield f"ALTER TABLE {schema}.{OLD} RENAME TO {NEW}"
    if table is None:
        yield f"CREATE TABLE {schema}.{NEW} {NEW_TABLE_SQL}"
        if not legacy_view:
            yield f"ALTER TABLE {schema}.{NEW} ALTER marketplace DROP DEFAULT"
    yield from changes
    if table and table.indexes.get(INDEX, INDEXED) != INDEXED:
        yield f"DROP INDEX {schema}.{INDEX}"
    if table is None or INDEXED not in table.indexes.values():
        yield f"CREATE INDEX {INDEX} ON {schema}.{NEW} (marketplace, created_at)"
    yield from _ledger(schema, shape.table(LEDGER), table.owner if table else None)
    if legacy_view and not keep_view:
        # The rights of whatever had the old name before.
        former = old or view or table
        yield from _create_view(schema, table.owner if table else None, former.grants if former else ())


def _converge(schema: str, table: Relation, legacy_view: bool, merged: Relation | None) -> Iterator[str]:
    """Columns, rows, keys and names of a table that is there already, and has its new name by now."""
    name = f"{schema}.{NEW}"
    wanted = COLUMNS | ({} if legacy_view else {"marketplace": Column(MARKETPLACE, True, None)})
    foreign = [key for key in table.of_kind("f") if key.columns == ("action_type_id",)]
    checks = [check for check in table.of_kind("c") if "marketplace" in check.columns]
    good_check = next((check for check in checks if _is_our_check(check.definition)), None)
    # Deferrable keys, and those that take nulls for equal or carry more columns, are something else.
    keys = [key for key in table.unique_on(*NEW_KEY) if key.kind == "i" or key.definition.endswith(")")]
    keys = [key for key in keys if "NULLS" not in key.definition and "INCLUDE" not in key.definition]
    marketplace = table.columns.get("marketplace")
    is_certain = (
        good_check is not None and marketplace and (marketplace.type, marketplace.not_null) == (MARKETPLACE, True)
    )
    # Without a unique key two rows may have met, and a corrected marketplace may let two rows meet.
    has_old_key = any(sorted(key.columns) == sorted(OLD_KEY) for key in table.constraints if key.kind in "pui")
    has_key = has_old_key or bool(keys and is_certain)
    must_dedupe = merged is not None or not has_key

    changes = [f"DROP CONSTRAINT {quoted(key.name)}" for key in foreign]
    changes += [f"DROP CONSTRAINT {quoted(check.name)}" for check in checks if check is not good_check]
    stale_keys = [*table.unique_on(*OLD_KEY), *table.unique_on(*NEW_KEY)]
    right = (key for key in keys if key.columns == NEW_KEY and key.kind == "u")
    good_key = next(right, None) if not must_dedupe else None
    stale_keys = [key for key in stale_keys if key is not good_key]
    # Over some of the rows only, or left by an interrupted build, a key would still refuse rows.
    stale_keys += [key for key in table.of_kind("w") if sorted(key.columns) in (sorted(OLD_KEY), sorted(NEW_KEY))]
    changes += [f"DROP CONSTRAINT {quoted(key.name)}" for key in stale_keys if key.kind == "u"]
    changes += [f"DROP CONSTRAINT {quoted(key.name)}" for key in table.of_kind("p") if key.columns != ("id",)]
    changes += _added_columns(table)
    if changes:
        yield f"ALTER TABLE {name} {', '.join(changes)}"
    if marketplace is None and not legacy_view:
        yield f"ALTER TABLE {name} ALTER marketplace DROP DEFAULT"
    for index in stale_keys:
        if index.kind in "iw":
            yield f"DROP INDEX {schema}.{quoted(index.name)}"

    yield from _normalise(name, table, wanted, bool(is_certain))
    yield from _ids(schema, table)
    if merged:
        yield from merge(schema, merged)
    if must_dedupe:
        yield from archive_losers(schema)

    changes = [] if good_check else [f"ADD CONSTRAINT {CHECK} {CHECK_SQL}"]
    if good_key is None:
        changes.append(f"ADD CONSTRAINT {UNIQUE} UNIQUE ({', '.join(NEW_KEY)})")
    if not any(key.columns == ("id",) for key in table.of_kind("p")):
        changes.append(f"ADD CONSTRAINT {NEW}_pkey PRIMARY KEY (id)")
    if changes:
        yield f"ALTER TABLE {name} {', '.join(changes)}"
    yield from _names(schema, table, good_key, good_check)


def _is_our_check(definition: str) -> bool:
    """Whether a check constraint allows exactly the known marketplaces, in any order, and holds for every row."""
    plain = re.sub(r"::[a-z ]+(\[\])?|[()]", "", definition)
    found = re.fullmatch(r"CHECK marketplace\s*=\s*ANY\s*ARRAY\[(.*)\]\s*", plain)
    return found is not None and sorted(re.findall(r"'([^']*)'", found[1])) == sorted(MARKETPLACES)


def _added_columns(table: Relation) -> Iterator[str]:
    # A constant default rewrites nothing; it is what makes the rows from before the rename 'vinted'.
    for name in COLUMNS:
        if name not in table.columns:
            yield f"ADD COLUMN {name} {definition(COLUMNS[name])}"


def _normalise(name: str, table: Relation, wanted: dict[str, Column], is_certain: bool) -> Iterator[str]:
    """Types, nulls and defaults of the columns that are there."""
    changes = []
    for column, want in wanted.items():
        have = table.columns.get(column)
        if have is None or have == want:
            continue
        if have.type != want.type:
            changes.append(f"ALTER {column} TYPE {want.type}{_using(table.name, column, have.type, want.type)}")
        if want.not_null and not have.not_null:
            if column in FILLED:
                yield f"UPDATE {name} SET {column} = {FILLED[column]} WHERE {column} IS NULL"
            changes.append(f"ALTER {column} SET NOT NULL")
        if have.not_null and not want.not_null:
            changes.append(f"ALTER {column} DROP NOT NULL")
        if want.default is None and have.default is not None:
            changes.append(f"ALTER {column} DROP DEFAULT")
        elif have.default != want.default:
            changes.append(f"ALTER {column} SET DEFAULT {want.default}")
    if "marketplace" in table.columns and not is_certain:
        # Only the spelling; what is no marketplace then is refused by the check constraint.
        spelling = "lower(btrim(marketplace))"
        yield f"UPDATE {name} SET marketplace = {spelling} WHERE marketplace <> {spelling}"
    if changes:
        yield f"ALTER TABLE {name} {', '.join(changes)}"


def _using(table: str, column: str, have: str, want: str) -> str:
    """How a column of another type is converted; a value that does not fit makes the statement fail. Raises Refusal."""
    if want in (INTEGER, BIGINT) and (have in _NUMBERS or have.startswith("numeric")):
        return f" USING round({column}::numeric)::{want}"
    if want == TIMESTAMP and have == "timestamp without time zone":
        return f" USING {column} AT TIME ZONE 'UTC'"
    if want == MARKETPLACE and (have == "text" or have.startswith("character")):
        return ""  # Without USING a value that is too long is refused, with it, it would be cut off.
    raise Refusal(f"column {column} of {table} is of type {have}: change it to {want}")


def _ids(schema: str, table: Relation) -> Iterator[str]:
    """A default for the ids, and ids for rows that have none; the sequence that is there stays."""
    name, sequence = f"{schema}.{NEW}", f"{schema}.{NEW}_id_seq"
    column = table.columns.get("id")
    if column is None:
        yield f"ALTER TABLE {name} ADD COLUMN id serial"
        return
    if column.default is None:
        yield f"CREATE SEQUENCE {sequence}"
        yield f"ALTER SEQUENCE {sequence} OWNER TO {table.owner}"
        yield f"ALTER SEQUENCE {sequence} OWNED BY {name}.id"
        yield f"SELECT setval('{sequence}', coalesce(max(id), 0) + 1, false) FROM {name}"
        yield f"ALTER TABLE {name} ALTER id SET DEFAULT nextval('{sequence}')"
    if not any(key.columns == ("id",) for key in table.of_kind("p")):
        # Without a key, ids may be null or twice there; nothing refers to them.
        yield f"UPDATE {name} SET id = DEFAULT"


def _names(schema: str, table: Relation, key: Constraint | None, check: Constraint | None) -> Iterator[str]:
    """The canonical names for what is right but is called something else."""
    primary = next((key for key in table.of_kind("p") if key.columns == ("id",)), None)
    for constraint, name in ((primary, f"{NEW}_pkey"), (check, CHECK), (key, UNIQUE)):
        if constraint and constraint.name != name:
            yield f"ALTER TABLE {schema}.{NEW} RENAME CONSTRAINT {quoted(constraint.name)} TO {name}"
    found = [name for name, columns in table.indexes.items() if columns == INDEXED]
    if found and INDEX not in found:
        yield f"ALTER INDEX {schema}.{quoted(found[0])} RENAME TO {INDEX}"


def _ledger(schema: str, table: Relation | None, owner: str | None) -> Iterator[str]:
    """The ledger holds nothing that the next run cannot compute again, so a wrong one is replaced."""
    primary = next(iter(table.of_kind("p")), None) if table else None
    right = (
        table and table.columns == LEDGER_COLUMNS and primary and primary.columns == ("date",) and table.of_kind("c")
    )
    if table and right and primary:
        if primary.name != f"{LEDGER}_pkey":
            yield f"ALTER TABLE {schema}.{LEDGER} RENAME CONSTRAINT {quoted(primary.name)} TO {LEDGER}_pkey"
        return
    if table:
        yield f"DROP TABLE {schema}.{LEDGER}"
    yield f"CREATE TABLE {schema}.{LEDGER} {LEDGER_SQL}"
    if owner:
        yield f"ALTER TABLE {schema}.{LEDGER} OWNER TO {owner}"


def _create_view(schema: str, owner: str | None, grants: tuple[tuple[str, str], ...]) -> Iterator[str]:
    """The view under the old name, for those who read and wrote the old table: with its owner and its grants."""
    yield f"CREATE VIEW {schema}.{OLD} AS {VIEW_SQL.format(table=f'{schema}.{NEW}')}"
    if owner:
        yield f"ALTER VIEW {schema}.{OLD} OWNER TO {owner}"
    for role, privilege in grants:
        if privilege in ("SELECT", "INSERT", "UPDATE", "DELETE"):
            yield f"GRANT {privilege} ON {schema}.{OLD} TO {role}"


def downgrade(shape: Shape, archive: bool) -> Plan:
    """The way back to the canonical old shape, with every vinted row. Raises Refusal.

    Rows of eBay and Etsy have no place there: with `archive` they go to the archive, from which the next upgrade takes
    them back; without, their presence makes a constraint fail.
    """
    if shape.table(NEW) is None or shape.table(OLD):
        raise Refusal(f"there is no table {NEW} to take back, or {OLD} is a table already")
    legacy_view = has_legacy_view(shape)
    # What was changed by hand is mended first, so that the way back starts from the canonical names.
    mended = _upgrade(shape, legacy_view)
    return Plan(shape.schema, "renamed", (*mended, *_downgrade(quoted(shape.schema), legacy_view, archive)))


def _downgrade(schema: str, legacy_view: bool, archive: bool) -> Iterator[str]:
    """From the canonical new shape to the canonical old one."""
    if legacy_view:
        yield f"DROP VIEW {schema}.{OLD}"
    if archive:
        yield from put_away(schema)
    yield f"ALTER TABLE {schema}.{NEW} ADD CONSTRAINT {LOSSLESS} CHECK (marketplace = 'vinted')"
    # With the column go the constraints and the index that it is part of.
    drops = ", ".join(f"DROP COLUMN {name}" for name in ADDED_COLUMNS)
    yield f"ALTER TABLE {schema}.{NEW} {drops}, ADD CONSTRAINT {OLD_UNIQUE} UNIQUE ({', '.join(OLD_KEY)})"
    yield f"ALTER TABLE {schema}.{NEW} RENAME CONSTRAINT {NEW}_pkey TO {OLD}_pkey"
    yield f"ALTER TABLE {schema}.{NEW} RENAME TO {OLD}"
    yield f"DROP TABLE {schema}.{LEDGER}"
