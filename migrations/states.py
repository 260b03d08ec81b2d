"""The states that a tenant is met in, as the operator's page names them."""

from collections.abc import Iterator

from migrations.converge import Refusal
from migrations.first import FIRST
from migrations.shape import ARCHIVE, LEDGER, NEW, OLD, Relation, Shape, plain
from migrations.target import HEAD, Table, Target
from migrations.view import is_of_old

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
    if (forerunner := shape.view(NEW)) and old and not is_of_old(forerunner):
        raise Refusal(f"{NEW} is a view, and not plainly one of {OLD}: drop it, then run it again")
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
    ours = FIRST[NEW].columns.keys() & HEAD[NEW].columns.keys()
    return is_recorded or shape.table(LEDGER) is not None or bool(new and ours <= new.columns.keys())


def is_later_clone(shape: Shape, head: Target, first: Target) -> bool:
    """Whether a schema without a record was cloned from a later template: it has all of 0001, and a column that a later
    revision adds to one of its tables, or one of the tables that a later one makes.

    Then those revisions must not run: they would find their tables and columns. An index alone says nothing, nor does
    a table of that name with other columns.
    """
    if NEW in head and not is_ours(shape, False):
        return False
    for name, want in head.items():
        have = shape.table(name)
        if have and name in first:
            if any(is_there for kind, is_there in _later_parts(have, want, first[name]) if kind == "column"):
                return True
        elif have and all(
            name in have.columns and have.columns[name].type == column.type for name, column in want.columns.items()
        ):
            return True
    return False


def has_all_later_parts(shape: Shape, head: Target, first: Target) -> bool:
    """Whether there is all that only later revisions make, and there is such: then a record of 0001 is an older one."""
    parts = [
        is_there
        for name, want in head.items()
        for _, is_there in _later_parts(shape.table(name), want, first.get(name))
    ]
    return bool(parts) and all(parts)


def _later_parts(have: Relation | None, want: Table, first: Table | None) -> Iterator[tuple[str, bool]]:
    """For each column and key that only later revisions make, which of both it is, and whether it is as it should."""
    columns = have.columns if have else {}
    for name, column in want.columns.items():
        before, now = first.columns.get(name) if first else None, columns.get(name)
        if before is None or before.type != column.type:
            yield "column", now is not None and now.type == column.type
    texts = {plain(key.definition) for key in have.constraints} if have else set()
    texts |= {plain(text) for text in have.indexes.values()} if have else set()
    of_first = {plain(key.definition) for key in first.keys} if first else set()
    for key in want.keys:
        if plain(key.definition) not in of_first:
            yield "key", plain(key.definition) in texts
