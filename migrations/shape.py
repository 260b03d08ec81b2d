"""What a tenant has: the tables that a migration touches, as they really are in the catalog.

Read for all schemas in one query. Constraints and indexes are known by what they are; their names are only data.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa

OLD = "vinted_job_stats"
NEW = "marketplace_job_stats"
LEDGER = "marketplace_job_stats_days"
VERSION = "marketplace_job_stats_version"


@dataclass(frozen=True)
class Column:
    type: str
    not_null: bool
    default: str | None


@dataclass(frozen=True)
class Constraint:
    """A constraint, or a unique index that belongs to none (`kind` i)."""

    name: str
    kind: str  # p primary key, u unique, f foreign key, c check, i unique index
    columns: tuple[str, ...]
    definition: str


@dataclass(frozen=True)
class Relation:
    """A table or view. `indexes` are those that no constraint stands for and that are not unique."""

    name: str
    kind: str  # As pg_class.relkind: r table, p partitioned table, v view ...
    columns: dict[str, Column]
    constraints: tuple[Constraint, ...]
    indexes: dict[str, tuple[str, ...]]

    def unique_on(self, *columns: str) -> tuple[Constraint, ...]:
        """The unique constraints and indexes on exactly these columns, in any order."""
        return tuple(c for c in self.constraints if c.kind in "ui" and sorted(c.columns) == sorted(columns))

    def of_kind(self, kind: str) -> tuple[Constraint, ...]:
        return tuple(c for c in self.constraints if c.kind == kind)


@dataclass(frozen=True)
class Shape:
    """One schema."""

    schema: str
    relations: dict[str, Relation] = field(default_factory=dict)


# One row per relation. A unique index with a predicate or an expression is no key, so it is left out.
_CATALOG = sa.text("""
    SELECT n.nspname AS schema, c.relname AS name, c.relkind::text AS kind,
           (SELECT json_agg(json_build_array(a.attname, format_type(a.atttypid, a.atttypmod), a.attnotnull,
                                             pg_get_expr(d.adbin, d.adrelid)) ORDER BY a.attnum)
              FROM pg_attribute a
              LEFT JOIN pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
             WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped) AS columns,
           (SELECT json_agg(json_build_array(k.conname, k.contype, pg_get_constraintdef(k.oid),
                        ARRAY (SELECT attname FROM unnest(k.conkey) WITH ORDINALITY AS u (num, place)
                                 JOIN pg_attribute ON attrelid = c.oid AND attnum = u.num ORDER BY place))
                            ORDER BY k.conname)
              FROM pg_constraint k WHERE k.conrelid = c.oid AND k.contype IN ('p', 'u', 'f', 'c')) AS constraints,
           (SELECT json_agg(json_build_array(x.relname, i.indisunique,
                        ARRAY (SELECT attname
                                 FROM unnest(i.indkey[0:i.indnkeyatts - 1]) WITH ORDINALITY AS u (num, place)
                                 JOIN pg_attribute ON attrelid = c.oid AND attnum = u.num ORDER BY place))
                            ORDER BY x.relname)
              FROM pg_index i JOIN pg_class x ON x.oid = i.indexrelid
             WHERE i.indrelid = c.oid AND i.indpred IS NULL AND i.indexprs IS NULL AND i.indisvalid
               AND NOT EXISTS (SELECT FROM pg_constraint k
                                WHERE k.conindid = i.indexrelid AND k.contype IN ('p', 'u'))) AS indexes
      FROM pg_namespace n
      JOIN pg_class c ON c.relnamespace = n.oid AND c.relname = ANY (:names)
     WHERE n.nspname = ANY (:schemas) AND c.relkind NOT IN ('i', 'I', 'S')
""").bindparams(
    sa.bindparam("names", [OLD, NEW, LEDGER, VERSION], type_=sa.ARRAY(sa.Text)),
    sa.bindparam("schemas", type_=sa.ARRAY(sa.Text)),
)


def read_shapes(connection: sa.Connection, schemas: Sequence[str]) -> dict[str, Shape]:
    """The shapes of these schemas, by name; an empty one for a schema that has none of the tables."""
    shapes = {schema: Shape(schema) for schema in schemas}
    for row in connection.execute(_CATALOG, {"schemas": list(schemas)}):
        shapes[row.schema].relations[row.name] = _relation(row)
    return shapes


def _relation(row: sa.Row[Any]) -> Relation:
    indexes = row.indexes or []
    return Relation(
        name=row.name,
        kind=row.kind,
        columns={name: Column(type_, not_null, default) for name, type_, not_null, default in row.columns or []},
        constraints=(
            *(Constraint(name, kind, tuple(columns), text) for name, kind, text, columns in row.constraints or []),
            *(Constraint(name, "i", tuple(columns), "") for name, is_unique, columns in indexes if is_unique),
        ),
        indexes={name: tuple(columns) for name, is_unique, columns in indexes if not is_unique},
    )
