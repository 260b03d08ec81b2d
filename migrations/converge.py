"""From a table as it was met to the table as it should be: columns, keys, names, owner. Nothing is read here.

The statements are right for any rows; rows that cannot be brought over with certainty make one of them fail, by a
constraint, and the schema stays as it was. They name no schema: see `migrations.tenant`.
"""

import re
from collections.abc import Iterator, Mapping, Sequence

from migrations.first import BIGINT, INTEGER, MARKETPLACE, TIMESTAMP
from migrations.shape import LEDGER, NEW, OLD, Column, Constraint, Relation, Shape, plain
from migrations.target import Key, Table, definition, same_default
from pipelines.tenants import quoted

_NUMBERS = ("smallint", INTEGER, BIGINT, "real", "double precision")
# What stands in for a null where there must be none.
FILLED = {
    "total_jobs": "0",
    "success_count": "0",
    "failure_count": "0",
    "created_at": "date::timestamp AT TIME ZONE 'UTC'",
    "marketplace": "'vinted'",
}


class Refusal(Exception):
    """The schema is in a state that must not be changed without a person; says why, and what to do."""


def logged(table: Relation, name: str | None = None) -> Iterator[str]:
    """What is not in the log would be gone after a crash."""
    if not table.is_logged:
        yield f"ALTER TABLE {name or table.name} SET LOGGED"


def added_columns(table: Relation, wanted: Mapping[str, Column]) -> Iterator[str]:
    """The clauses for the columns that are missing. A constant default rewrites nothing."""
    for name, column in wanted.items():
        if name not in table.columns:
            yield f"ADD COLUMN {name} {definition(column)}"


def changed_columns(table: Relation, wanted: Mapping[str, Column], name: str, is_spelled: bool = True) -> Iterator[str]:
    """Types, nulls and defaults of the columns that are there. Raises Refusal for a type that is too far away.

    Values change with the type of their column, even if it stays the same: no trigger sees that, and no rule.
    """
    changes = []
    for column, want in wanted.items():
        have = table.columns.get(column)
        if have is None:
            continue
        value = converted(table, column, want, is_spelled)
        if want.default == "serial":
            continue
        default = have.default
        if default and default.startswith("generated "):
            yield f"ALTER TABLE {name} ALTER {column} DROP EXPRESSION"
            default = None
        if have.type != want.type and default:  # It may not be of a type that follows.
            yield f"ALTER TABLE {name} ALTER {column} DROP DEFAULT"
            default = None
        if have.type != want.type or value != column:
            changes.append(f"ALTER {column} TYPE {want.type} USING {value}")
        if want.not_null and not have.not_null:
            changes.append(f"ALTER {column} SET NOT NULL")
        if have.not_null and not want.not_null:
            changes.append(f"ALTER {column} DROP NOT NULL")
        if default == "identity":
            changes.append(f"ALTER {column} DROP IDENTITY")
            default = None
        if not same_default(default, want.default):
            changes.append(f"ALTER {column} {f'SET DEFAULT {want.default}' if want.default else 'DROP DEFAULT'}")
    if changes:
        yield f"ALTER TABLE {name} {', '.join(changes)}"


def converted(table: Relation, column: str, want: Column, is_spelled: bool = True) -> str:
    """The value of one of our columns that is there, as it should be; one that does not fit makes its statement fail.

    `is_spelled`: marketplaces are spelled right; what is none then is refused by the check constraint. Raises Refusal.
    """
    have = table.columns[column]
    value = column
    is_number = have.type in _NUMBERS or have.type.startswith("numeric")
    if want.default == "serial":
        if have.type not in ("smallint", INTEGER, BIGINT):
            raise Refusal(f"column {column} of {table.name} is of type {have.type}: change it to {want.type}")
    elif have.type == want.type:
        pass
    elif want.type in (INTEGER, BIGINT) and is_number:
        value = f"round({column}::numeric)::{want.type}"
    elif want.type == "double precision" and is_number:
        value = f"{column}::{want.type}"
    elif want.type == TIMESTAMP and have.type == "timestamp without time zone":
        value = f"{column} AT TIME ZONE 'UTC'"
    elif not (want.type in (MARKETPLACE, "text") and (have.type == "text" or have.type.startswith("character"))):
        raise Refusal(f"column {column} of {table.name} is of type {have.type}: change it to {want.type}")
    if column == "marketplace" and not is_spelled:
        value = f"lower(btrim({column}::text))"
    if want.not_null and not have.not_null and column in FILLED:
        value = f"coalesce({value}, {FILLED[column]})"
    return value


def is_key(have: Constraint, want: Key) -> bool:
    """Whether a constraint is the one that is wanted, whatever its name.

    Deferrable ones, and those that are not valid, take nulls for equal or carry more columns, are something else.
    """
    if want.kind == "c":
        return have.kind == "c" and plain(have.definition) == plain(want.definition)
    return have.kind == want.kind and have.columns == want.columns and have.definition == want.definition


def found_key(table: Relation, want: Key) -> Constraint | None:
    """The constraint that is wanted, preferably under its name."""
    found = [have for have in table.constraints if is_key(have, want)]
    return min(found, key=lambda have: have.name != want.name, default=None)


def rename_constraint(table: str, have: Constraint | None, want: Key) -> Iterator[str]:
    """The canonical name for what is right but is called something else."""
    if have and have.name != want.name:
        yield f"ALTER TABLE {table} RENAME CONSTRAINT {quoted(have.name)} TO {want.name}"


def indexes(table: Relation, want: Table) -> Iterator[str]:
    """The plain indexes that are wanted, under their names."""
    for key in want.keys:
        if key.kind != "x":
            continue
        found = [name for name, text in table.indexes.items() if plain(text) == plain(key.definition)]
        if key.name in found:
            continue
        if key.name in table.indexes:
            yield f"DROP INDEX {key.name}"
        yield f"ALTER INDEX {quoted(found[0])} RENAME TO {key.name}" if found else want.create_index(key)


def is_readable(table: Relation, want: Table) -> bool:
    """Whether it has, in their types, all columns that must not be null, and so can be completed whatever its rows."""
    return table.kind == "r" and all(
        name in table.columns and table.columns[name].type == column.type
        for name, column in want.columns.items()
        if column.not_null and not column.default
    )


def plain_table(shape: Shape, want: Table) -> Iterator[str]:
    """A table of ours that has no history of its own: made if it is missing, else completed. Raises Refusal."""
    have = shape.table(want.name)
    if have is None:
        if shape.view(want.name):
            raise Refusal(f"{want.name} is a view: drop it, or rename it")
        yield from want.create()
        return
    if not is_readable(have, want):
        if want.name != LEDGER:
            raise Refusal(f"{want.name} has another shape: drop it, if it can be computed again, or rename it")
        # The ledger holds nothing that the next run cannot compute again.
        yield f"DROP TABLE {want.name}"
        yield from want.create()
        return
    yield from logged(have)
    wrong = [
        key
        for key in have.constraints
        if (key.kind == "p" and not is_key(key, want.primary_key))
        or (key.kind == "c" and any(key.name == other.name and not is_key(key, other) for other in want.keys))
    ]
    changes = [f"DROP CONSTRAINT {quoted(key.name)}" for key in wrong]
    changes += added_columns(have, want.columns)
    if changes:
        yield f"ALTER TABLE {want.name} {', '.join(changes)}"
    yield from changed_columns(have, want.columns, want.name)
    for key in want.keys:
        if key.kind == "x":
            continue
        found = found_key(have, key)
        yield from rename_constraint(want.name, found, key)
        if found is None:
            yield f"ALTER TABLE {want.name} ADD CONSTRAINT {key.name} {key.definition}"
    yield from indexes(have, want)


def identity_before(table: Relation, dropped: tuple[str, ...], key: tuple[str, ...]) -> bool:
    """Whether a published table would refuse changes of its rows meanwhile: its identity is not there, or goes."""
    if table.replica_identity == "-":
        return True
    if table.replica_identity == "i":
        return table.identity_index in dropped
    return table.replica_identity == "d" and not any(k.columns == key for k in table.of_kind("p"))


def owners(shape: Shape, owner: str, role: str, statements: Sequence[str]) -> Iterator[str]:
    """Everything of ours belongs to whom the stats belong to, so that the owner can run the next migration."""
    text = "\n".join(statements)
    made = re.findall(r"^\s*CREATE (?:TABLE|VIEW) (\w+)", text, re.MULTILINE)
    gone = re.findall(r"^\s*DROP (?:TABLE|VIEW) (?:IF EXISTS )?(\w+)", text, re.MULTILINE)
    gone += [name for name in (OLD, NEW) if shape.table(name)]  # It is the one that is looked at, or goes.
    for name, relation in shape.relations.items():
        if name not in (*made, *gone) and relation.owner != owner:
            yield f"ALTER TABLE {name} OWNER TO {owner}"
    if owner != role:
        for name in made:
            yield f"ALTER TABLE {name} OWNER TO {owner}"
