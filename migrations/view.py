"""The view under the old name, for those who read and wrote the old table: which columns, in which order, and whether
the one that is there is right.
"""

import re
from collections.abc import Iterator, Mapping, Sequence

from migrations.first import OLD_COLUMNS
from migrations.shape import NEW, OLD, Column, Relation
from migrations.target import same_default
from pipelines.tenants import quoted

ASIDE = "legacy_"
"""What is put before the name of a column of theirs that has the name of one of ours."""

ID_SEQUENCE = f"{NEW}_id_seq"

_NAME = r'("(?:[^"]|"")*"|\w+)'
_COLUMN = rf"(?:\w+\.)?{_NAME}(?:\s+AS\s+{_NAME})?"
_VIEW = re.compile(
    rf"\s*SELECT\s+({_COLUMN}(?:,\s+{_COLUMN})*)\s+FROM\s+{NEW}\s+"
    rf"WHERE\s+\(\((?:{NEW}\.)?marketplace\)::text = 'vinted'::text\);?\s*"
)
_OF_OLD = re.compile(
    rf"\s*SELECT\s+(?:{_COLUMN}|'vinted'::[\w ()]+ AS marketplace)"
    rf"(?:,\s+(?:{_COLUMN}|'vinted'::[\w ()]+ AS marketplace))*\s+FROM\s+{OLD};?\s*"
)
# What PostgreSQL refuses to do to a column that a view shows, or does to the view as well.
_DISTURBING = re.compile(r"^(?!CREATE).*\b(TYPE|RENAME COLUMN|RENAME \S+ TO|DROP COLUMN|DROP EXPRESSION)\b", re.DOTALL)


def shows(view: Relation) -> list[tuple[str, str]] | None:
    """Column and name of each column of the view, if it is one of ours."""
    match = _VIEW.fullmatch(view.view or "")
    if match is None:
        return None
    items = re.findall(rf"{_COLUMN}(?:,\s+|$)", match[1])
    pairs = [(_unquoted(column), _unquoted(name or column)) for column, name in items]
    return pairs if [name for _, name in pairs] == list(view.columns) else None


def is_of_old(view: Relation) -> bool:
    """Whether a view under the new name plainly shows the old table, so that nothing is lost with it."""
    return _OF_OLD.fullmatch(view.view or "") is not None


def _unquoted(name: str) -> str:
    return name[1:-1].replace('""', '"') if name.startswith('"') else name


def view_columns(
    old: Relation | None, new: Relation | None, view: Relation | None, ours: set[str], aside: set[str]
) -> list[tuple[str, str]]:
    """What the view is to show: column and name, in the order of the old table, so that positional writers meet theirs.

    `new`: with the columns that are set aside now under their other names. `ours`: the names that theirs cannot have.
    `aside`: those of them that are set aside.
    """
    plain_columns = [(name, name) for name in OLD_COLUMNS]
    if old:
        columns = [(ASIDE + name if name in aside else name, name) for name in old.columns]
    elif view and (shown := shows(view)):
        columns = [(ASIDE + column if column in aside else column, name) for column, name in shown]
        columns = [(column, name) for column, name in columns if new and column in new.columns]
    elif new:
        columns = [
            (name, name.removeprefix(ASIDE) if name in new.met_columns else name)
            for name in new.columns
            if name not in ours or name in new.met_columns
        ]
    else:
        columns = []
    return columns + [pair for pair in plain_columns if pair not in columns]


def defaults(table: Relation | None, want: Mapping[str, Column], view: Relation | None) -> dict[str, str]:
    """The defaults that the view's columns should have, by the table's columns: those of the converged table; for a
    column of the old table, where that has none, the one that was met. An identity has none that could be taken over.
    """
    columns = dict(table.columns) if table else {}
    found = {
        name: column.default
        for name, column in columns.items()
        if column.default and column.default != "identity" and not column.default.startswith("generated ")
    }
    if table and (id_ := columns.get("id")) and id_.default == "identity":
        found["id"] = f"nextval('{table.owned_sequences[0]}'::regclass)"
    found.setdefault("id", f"nextval('{ID_SEQUENCE}'::regclass)")
    for column, name in (view and shows(view)) or ():
        if view and (default := view.columns[name].default):
            found.setdefault(column, default)
    return found | {name: each.default for name, each in want.items() if each.default and each.default != "serial"}


def is_good_view(view: Relation, columns: Sequence[tuple[str, str]], wanted: Mapping[str, str]) -> bool:
    """Whether a view shows the vinted rows of the table, with all that the old table had and these defaults."""
    return shows(view) == list(columns) and all(
        same_default(view.columns[name].default, wanted.get(column)) for column, name in columns
    )


def is_disturbed_by(statements: Sequence[str]) -> bool:
    """Whether the view has to go before one of these statements."""
    return any(map(_DISTURBING.match, statements))


def create_view(
    columns: Sequence[tuple[str, str]], wanted: Mapping[str, str], before: Relation | None
) -> Iterator[str]:
    """The view, with the table's defaults: the application clones it for a new customer as if it were a table.

    `before`: what had the old name, and whose options and rights it gets.
    """
    selected = ", ".join(
        quoted(column) if column == name else f"{quoted(column)} AS {quoted(name)}" for column, name in columns
    )
    options = f" WITH ({', '.join(before.options)})" if before and before.options else ""
    yield f"CREATE VIEW {OLD}{options} AS SELECT {selected} FROM {NEW} WHERE marketplace::text = 'vinted'"
    changes = [f"ALTER {quoted(name)} SET DEFAULT {wanted[column]}" for column, name in columns if column in wanted]
    yield f"ALTER TABLE {OLD} {', '.join(changes)}"
    yield from granted(before, OLD)


def granted(before: Relation | None, name: str) -> Iterator[str]:
    """The rights that were given on what had this place before."""
    for role, privilege in before.grants if before else ():
        if privilege in ("SELECT", "INSERT", "UPDATE", "DELETE"):
            yield f"GRANT {privilege} ON {name} TO {role}"


def made_last(statements: Sequence[str], view: Relation | None) -> list[str]:
    """The statements, with the view out of the way of those that change its columns.

    `view`: the one that is there before them.
    """
    start = _first(statements, "CREATE VIEW")
    if start is not None:
        end = start + 1
        while end < len(statements) and statements[end].startswith(("ALTER TABLE", "GRANT")) and OLD in statements[end]:
            end += 1
        made, others = statements[start:end], statements[end:]
        return [*statements[:start], *others, *made] if is_disturbed_by(others) else list(statements)
    shown = shows(view) if view else None
    drop = _first(statements, "DROP VIEW")
    if not view or not shown or not is_disturbed_by(statements[:drop]):
        return list(statements)
    if drop is not None:
        return [f"DROP VIEW {OLD}", *statements]
    wanted = {column: default for column, name in shown if (default := view.columns[name].default)}
    return [f"DROP VIEW {OLD}", *statements, *create_view(shown, wanted, view)]


def _first(statements: Sequence[str], beginning: str) -> int | None:
    """Where the first statement is that begins like this; Alembic's comments come before some."""
    found = re.compile(rf"(--.*\n)*{beginning}\b")
    return next((i for i, text in enumerate(statements) if found.match(text)), None)
