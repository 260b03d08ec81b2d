"""The states that a tenant is met in, as the operator's page names them."""

from collections.abc import Iterator

from migrations.converge import Refusal
from migrations.first import FIRST
from migrations.shape import ARCHIVE, LEDGER, NEW, OLD, Relation, Shape, plain
from migrations.target import HEAD, Table, Target

_KINDS = {
    "p": "a partitioned table",
    "h": "a table that others inherit from",
    "m": "a materialized view",
    "f": "a foreign table",
}


def state_of(shape: Shape) -> str:
    """Which state it is: old, unkeyed, renamed, both or missing. Raises Refusal for one that is not certain."""
    for name in (OLD, ARCHIVE, *HEAD):
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
    if shape.view(NEW) and not old:
        raise Refusal(f"{NEW} is a view, and there is no table {OLD} behind it: drop it, or rename its table to {NEW}")
    if shape.view(OLD) and not new:
        raise Refusal(f"{OLD} is a view, and there is no table {NEW} behind it: drop it, or rename its table to {OLD}")
    if old and new:
        if lost := sorted(set(old.publications) - set(new.publications)):
            raise Refusal(f"{OLD} has to go, and is in publication {lost[0]}: add {NEW} to it, or drop {OLD} from it")
        return "both"
    if new:
        return "renamed"
    if old:
        return "old" if old.of_kind("p") else "unkeyed"
    return "missing"


def has_legacy_view(shape: Shape) -> bool | None:
    """Whether a tenant is meant to have the view under the old name: it goes together with the default of
    `marketplace`. None: nothing tells."""
    new = shape.table(NEW)
    if shape.view(OLD):
        return True
    marketplace = new.columns.get("marketplace") if new else None
    return None if marketplace is None else marketplace.default is not None


def is_ours(shape: Shape, is_recorded: bool) -> bool:
    """Whether the columns of the new table that have the names of ours are ours, and not somebody else's.

    They are if the tenant is recorded, has the ledger, or has all of them: a clone.
    """
    new = shape.table(NEW)
    return (
        is_recorded or shape.table(LEDGER) is not None or bool(new and FIRST[NEW].columns.keys() <= new.columns.keys())
    )


def later_parts(shape: Shape, head: Target, first: Target) -> list[bool]:
    """For each table, column and key that only later revisions make: whether the schema has it, as it should be.

    A clone of a later template has them. Then those revisions must not run: they would find their tables and columns.
    """
    return [
        is_there for name, want in head.items() for is_there in _later_parts(shape.table(name), want, first.get(name))
    ]


def _later_parts(have: Relation | None, want: Table, first: Table | None) -> Iterator[bool]:
    columns = have.columns if have else {}
    for name, column in want.columns.items():
        before, now = first.columns.get(name) if first else None, columns.get(name)
        if before is None or before.type != column.type:
            yield now is not None and now.type == column.type
    texts = {plain(key.definition) for key in have.constraints} if have else set()
    texts |= {plain(text) for text in have.indexes.values()} if have else set()
    of_first = {plain(key.definition) for key in first.keys} if first else set()
    for key in want.keys:
        if plain(key.definition) not in of_first:
            yield plain(key.definition) in texts
