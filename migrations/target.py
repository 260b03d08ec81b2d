"""What a schema should have, and the head: what it should have at the newest revision, derived from the models.

Repair, adoption, drift and the check whether there is anything to do all compare with the head. Nothing is read here.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql
from sqlalchemy.schema import CreateIndex

from migrations.shape import Column, plain
from models import SHARED, TENANT
from models.summary import MarketplaceDailySummary  # Whose import brings all our tables.

_DIALECT: Any = postgresql.dialect()  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class Key:
    """A constraint or an index as it should be."""

    kind: str  # p primary key, u unique, c check, x index
    name: str
    columns: tuple[str, ...]
    definition: str  # Of a constraint, what follows its name; of an index, what follows USING.


@dataclass(frozen=True)
class Table:
    """A table as it should be: columns in the order of a new one."""

    name: str
    columns: dict[str, Column]
    keys: tuple[Key, ...]

    @property
    def primary_key(self) -> Key:
        return next(key for key in self.keys if key.kind == "p")

    def create(self) -> Iterator[str]:
        """The statements that make it."""
        lines = [f"{name} {definition(column)}" for name, column in self.columns.items()]
        lines += [f"CONSTRAINT {key.name} {key.definition}" for key in self.keys if key.kind != "x"]
        yield f"CREATE TABLE {self.name} ({', '.join(lines)})"
        for key in self.keys:
            if key.kind == "x":
                yield self.create_index(key)

    def create_index(self, key: Key) -> str:
        return f"CREATE INDEX {key.name} ON {self.name} USING {key.definition}"


Target = Mapping[str, Table]
"""The tables of a schema by name."""


def common(one: Target, other: Target) -> Target:
    """What two targets have in common: tables, and of these the columns and keys."""

    def is_same(have: Column, want: Column | None) -> bool:
        return (
            want is not None
            and (have.type, have.not_null) == (want.type, want.not_null)
            and plain(have.default) == plain(want.default)
        )

    tables = {}
    for name in one.keys() & other.keys():
        columns = {key: each for key, each in one[name].columns.items() if is_same(each, other[name].columns.get(key))}
        texts = {plain(key.definition) for key in other[name].keys}
        tables[name] = Table(name, columns, tuple(key for key in one[name].keys if plain(key.definition) in texts))
    return tables


def definition(column: Column) -> str:
    """A column's type, null and default as SQL."""
    if column.default == "serial":
        return {"bigint": "bigserial", "smallint": "smallserial"}.get(column.type, "serial")
    null = " NOT NULL" if column.not_null else ""
    return f"{column.type}{null}" + (f" DEFAULT {column.default}" if column.default else "")


def same_default(have: str | None, want: str | None) -> bool:
    """Whether a default is the one that is wanted; ids may come from any sequence."""
    if want == "serial":
        return have is not None and (have == "identity" or have.startswith("nextval("))
    return plain(have) == plain(want)


def _table(table: sa.Table) -> Table:
    columns = {column.name: _column(table, column) for column in table.columns}
    preparer = _DIALECT.identifier_preparer
    keys = []
    for constraint in table.constraints:
        names = tuple(column.name for column in getattr(constraint, "columns", ()))
        name = preparer.format_constraint(constraint)
        if isinstance(constraint, sa.PrimaryKeyConstraint):
            keys.append(Key("p", name, names, f"PRIMARY KEY ({', '.join(names)})"))
        elif isinstance(constraint, sa.UniqueConstraint):
            keys.append(Key("u", name, names, f"UNIQUE ({', '.join(names)})"))
        elif isinstance(constraint, sa.CheckConstraint):
            keys.append(Key("c", name, names, f"CHECK ({constraint.sqltext})"))
    for index in table.indexes:
        text = str(CreateIndex(index).compile(dialect=_DIALECT))
        columns_text = text.partition(f"{table.name} ")[2]
        definition = columns_text.removeprefix("USING ") if "USING" in columns_text else f"btree {columns_text}"
        keys.append(Key("x", str(index.name), tuple(column.name for column in index.columns), definition))
    return Table(table.name, columns, tuple(sorted(keys, key=lambda key: ("pcux".index(key.kind), key.name))))


def _column(table: sa.Table, column: sa.Column[Any]) -> Column:
    type_ = column.type.compile(dialect=_DIALECT).lower()
    type_ = re.sub(r"^varchar", "character varying", type_)
    if column is table.autoincrement_column:
        return Column(type_, True, "serial")
    given = getattr(column.server_default, "arg", None)
    if isinstance(given, str):
        given = sa.literal(given)
    default = None if given is None else str(given.compile(dialect=_DIALECT, compile_kwargs={"literal_binds": True}))
    return Column(type_, not column.nullable, default)


def _tables(schema: str) -> Target:
    return {
        table.name: _table(table) for table in MarketplaceDailySummary.metadata.sorted_tables if table.schema == schema
    }


HEAD: Target = _tables(TENANT)
"""What every tenant, and the template, has at the newest revision."""

SHARED_HEAD: Target = _tables(SHARED)
"""What our own schema has."""
