"""The view under the old name, for those who read and wrote the old table: which columns, in which order, and whether
the one that is there is right.
"""

import re
from collections.abc import Iterator

from migrations.first import OLD_COLUMNS
from migrations.shape import NEW, OLD, Relation
from migrations.target import Table, same_default
from pipelines.tenants import quoted

ASIDE = "legacy_"
"""What is put before the name of a column of theirs that has the name of one of ours."""

ID_SEQUENCE = f"{NEW}_id_seq"
_VIEW = re.compile(rf"SELECT (.+) FROM {NEW} WHERE \(\(marketplace\)::text = 'vinted'::text\)")


def view_columns(
    old: Relation | None, new: Relation | None, view: Relation | None, ours: set[str]
) -> list[tuple[str, str]]:
    """What the view shows: column and name, in the order of the old table, so that positional writers meet theirs."""
    if old:
        return [(ASIDE + name if name in ours else name, name) for name in old.columns]
    if view and (parsed := _parse(view)):
        return [(column, name) for column, name in parsed if new and column in new.columns]
    if new:
        return [
            (name, name.removeprefix(ASIDE) if name.removeprefix(ASIDE) in ours else name)
            for name in new.columns
            if name not in ours or name in new.met_columns
        ]
    return [(name, name) for name in OLD_COLUMNS]


def _parse(view: Relation) -> list[tuple[str, str]] | None:
    """Column and name of each column of the view, if it is one of ours."""
    match = _VIEW.fullmatch(view.view or "")
    if match is None:
        return None
    items = re.findall(r'("(?:[^"]|"")*"|\w+)(?: AS ("(?:[^"]|"")*"|\w+))?(?:, |$)', match[1])
    pairs = [(_unquoted(column), _unquoted(name or column)) for column, name in items]
    return pairs if [name for _, name in pairs] == list(view.columns) else None


def _unquoted(name: str) -> str:
    return name[1:-1].replace('""', '"') if name.startswith('"') else name


def is_good_view(view: Relation, table: Relation | None) -> bool:
    """Whether a view shows the vinted rows of the table, with all that the old table had and the table's defaults."""
    pairs = _parse(view)
    if pairs is None or table is None or not {(name, name) for name in OLD_COLUMNS} <= set(pairs):
        return False
    defaults = _defaults(table)
    return all(same_default(view.columns[name].default, defaults.get(column)) for column, name in pairs)


def _defaults(table: Relation | None) -> dict[str, str]:
    """The defaults of a view's columns over the table: an identity has none that could be taken over as it is."""
    columns = dict(table.columns) if table else {}
    defaults = {
        name: column.default
        for name, column in columns.items()
        if column.default and column.default != "identity" and not column.default.startswith("generated ")
    }
    if table and (id_ := columns.get("id")) and id_.default == "identity":
        return defaults | {"id": f"nextval('{table.owned_sequences[0]}'::regclass)"}
    return {"id": f"nextval('{ID_SEQUENCE}'::regclass)"} | defaults


def create_view(
    columns: list[tuple[str, str]], table: Relation | None, want: Table, grants: tuple[tuple[str, str], ...]
) -> Iterator[str]:
    """The view, with the table's defaults: the application clones it for a new customer as if it were a table."""
    columns = columns + [(name, name) for name in OLD_COLUMNS if (name, name) not in columns]
    selected = ", ".join(
        quoted(column) if column == name else f"{quoted(column)} AS {quoted(name)}" for column, name in columns
    )
    yield f"CREATE VIEW {OLD} AS SELECT {selected} FROM {NEW} WHERE marketplace = 'vinted'"
    defaults = _defaults(table) | {
        name: column.default for name, column in want.columns.items() if column.default and column.default != "serial"
    }
    changes = [f"ALTER {quoted(name)} SET DEFAULT {defaults[column]}" for column, name in columns if column in defaults]
    yield f"ALTER TABLE {OLD} {', '.join(changes)}"
    for role, privilege in grants:
        if privilege in ("SELECT", "INSERT", "UPDATE", "DELETE"):
            yield f"GRANT {privilege} ON {OLD} TO {role}"
