"""What a tenant has: the relations that a migration touches, as they really are in the catalog.

Read for many schemas in one query. Constraints and indexes are known by what they are; their names are only data.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa
from psycopg import sql

from pipelines.tenants import quoted

OLD = "vinted_job_stats"
NEW = "marketplace_job_stats"
LEDGER = "marketplace_job_stats_days"
ARCHIVE = "marketplace_job_stats_archive"
VERSION = "marketplace_job_stats_version"
SUMMARY = "marketplace_daily_summary"


@dataclass(frozen=True)
class Column:
    type: str
    not_null: bool
    default: str | None  # As SQL; 'identity' for an identity column.


@dataclass(frozen=True)
class Constraint:
    """A constraint, or a unique index that belongs to none."""

    name: str
    kind: str  # p primary key, u unique, f foreign key, c check, i unique index, w a partial one
    columns: tuple[str, ...]
    definition: str


@dataclass(frozen=True)
class Relation:
    """A table or view. `indexes` are those that no constraint stands for and that are not unique."""

    name: str
    kind: str  # As pg_class.relkind: r table, p partitioned table, v view ...; h a table that has heirs.
    owner: str  # Quoted.
    columns: dict[str, Column]
    constraints: tuple[Constraint, ...]
    indexes: dict[str, tuple[str, ...]]
    grants: tuple[tuple[str, str], ...]  # Role, quoted, and privilege; those of the owner left out.
    owned_sequences: tuple[str, ...]  # Qualified and quoted.
    view: str | None  # What a view selects, without the name of its own schema, on one line.

    def unique_on(self, *columns: str) -> tuple[Constraint, ...]:
        """The unique constraints and indexes on exactly these columns, in any order."""
        return tuple(c for c in self.constraints if c.kind in "ui" and sorted(c.columns) == sorted(columns))

    def of_kind(self, kind: str) -> tuple[Constraint, ...]:
        return tuple(c for c in self.constraints if c.kind == kind)


@dataclass(frozen=True)
class Shape:
    """One schema: its relations by name."""

    schema: str
    relations: dict[str, Relation] = field(default_factory=dict)

    def table(self, name: str) -> Relation | None:
        """The relation of this name, unless it is a view."""
        relation = self.relations.get(name)
        return relation if relation and relation.kind != "v" else None

    def view(self, name: str) -> Relation | None:
        relation = self.relations.get(name)
        return relation if relation and relation.kind == "v" else None


# One row per relation. An index is partial here if it is for some of the rows only, or on expressions, or was left
# invalid by an interrupted build. Of views and of the version table nothing but their being there matters.
_CATALOG = """
    SELECT n.nspname AS schema, c.relname AS name, quote_ident(r.rolname) AS owner,
           CASE WHEN c.relhassubclass AND c.relkind = 'r' THEN 'h' ELSE c.relkind::text END AS kind,
           CASE WHEN {detailed} THEN (
            SELECT json_agg(json_build_array(a.attname, format_type(a.atttypid, a.atttypmod), a.attnotnull,
                        CASE WHEN a.attidentity <> '' THEN 'identity' ELSE pg_get_expr(d.adbin, d.adrelid) END)
                            ORDER BY a.attnum)
              FROM pg_attribute a
              LEFT JOIN pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
             WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped) END AS columns,
           CASE WHEN {detailed} THEN (
            SELECT json_agg(json_build_array(k.conname, k.contype, pg_get_constraintdef(k.oid),
                        ARRAY (SELECT attname FROM unnest(k.conkey) WITH ORDINALITY AS u (num, place)
                                 JOIN pg_attribute ON attrelid = c.oid AND attnum = u.num ORDER BY place))
                            ORDER BY k.conname)
              FROM pg_constraint k WHERE k.conrelid = c.oid AND k.contype IN ('p', 'u', 'f', 'c')) END AS constraints,
           CASE WHEN {detailed} THEN (
            SELECT json_agg(json_build_array(x.relname, i.indisunique,
                        i.indpred IS NOT NULL OR i.indexprs IS NOT NULL OR NOT i.indisvalid,
                        ARRAY (SELECT attname
                                 FROM unnest(i.indkey[0:i.indnkeyatts - 1]) WITH ORDINALITY AS u (num, place)
                                 JOIN pg_attribute ON attrelid = c.oid AND attnum = u.num ORDER BY place))
                            ORDER BY x.relname)
              FROM pg_index i JOIN pg_class x ON x.oid = i.indexrelid
             WHERE i.indrelid = c.oid
               AND NOT EXISTS (SELECT FROM pg_constraint k
                                WHERE k.conrelid = c.oid AND k.conindid = i.indexrelid AND k.contype IN ('p', 'u'))
           ) END AS indexes,
           (SELECT json_agg(json_build_array(
                        CASE g.grantee WHEN 0 THEN 'PUBLIC' ELSE quote_ident(pg_get_userbyid(g.grantee)) END,
                        g.privilege_type) ORDER BY g.grantee, g.privilege_type)
              FROM aclexplode(c.relacl) g WHERE g.grantee <> c.relowner) AS grants,
           CASE WHEN {detailed} THEN (
            SELECT json_agg(s.oid::regclass::text ORDER BY s.oid)
              FROM pg_depend o JOIN pg_class s ON s.oid = o.objid AND s.relkind = 'S'
             WHERE o.refobjid = c.oid AND o.refclassid = 'pg_class'::regclass AND o.classid = 'pg_class'::regclass
               AND o.deptype = 'a') END AS owned_sequences,
           CASE c.relkind WHEN 'v' THEN pg_get_viewdef(c.oid) END AS view
      FROM pg_namespace n
      JOIN pg_class c ON c.relnamespace = n.oid AND c.relname = ANY (:names)
      JOIN pg_roles r ON r.oid = c.relowner
     WHERE n.nspname = ANY (:schemas) AND c.relkind NOT IN ('i', 'I', 'S')
""".format(detailed=f"c.relkind <> 'v' AND c.relname <> '{VERSION}'")
_PARAMETERS = (
    sa.bindparam("names", [OLD, NEW, LEDGER, ARCHIVE, VERSION, SUMMARY], type_=sa.ARRAY(sa.Text)),
    sa.bindparam("schemas", type_=sa.ARRAY(sa.Text)),
)
_SHAPES = sa.text(_CATALOG).bindparams(*_PARAMETERS)
# The same as one value per schema, with the schema's own name taken out. Sequences differ from tenant to tenant.
_FINGERPRINTS = sa.text(f"""
    WITH relations AS ({_CATALOG}),
    texts AS (
        SELECT schema, name, replace(concat_ws(' ', name, kind, owner, columns, constraints, indexes, grants,
                                               owned_sequences, view), quote_ident(schema) || '.', '') AS text
          FROM relations
    )
    SELECT schema, md5(string_agg(regexp_replace(text, 'nextval\\([^)]*\\)', 'nextval'), ' ' ORDER BY name))
           AS fingerprint
      FROM texts GROUP BY schema
""").bindparams(*_PARAMETERS)


def read_shapes(connection: sa.Connection, schemas: Sequence[str]) -> dict[str, Shape]:
    """The shapes of these schemas, by name; an empty one for a schema that has none of the relations."""
    shapes = {schema: Shape(schema) for schema in schemas}
    for row in connection.execute(_SHAPES, {"schemas": list(schemas)}):
        shapes[row.schema].relations[row.name] = _relation(row)
    return shapes


def read_fingerprints(connection: sa.Connection, schemas: Sequence[str]) -> dict[str, str]:
    """A value per schema that is the same for schemas of the same shape; none for a schema without the relations."""
    rows = connection.execute(_FINGERPRINTS, {"schemas": list(schemas)})
    return {row.schema: row.fingerprint for row in rows}


def read_versions(connection: sa.Connection, schemas: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """What our version tables record in these schemas, all of which must have one; usually one revision, or none."""
    if not schemas:
        return {}
    selects = (
        f"SELECT {sql.Literal(schema).as_string()} AS schema, version_num FROM {quoted(schema)}.{VERSION}"
        for schema in schemas
    )
    versions: dict[str, tuple[str, ...]] = dict.fromkeys(schemas, ())
    for schema, version in connection.exec_driver_sql(" UNION ALL ".join(selects)):
        versions[schema] += (version,)
    return versions


def _relation(row: sa.Row[Any]) -> Relation:
    indexes = row.indexes or []
    return Relation(
        name=row.name,
        kind=row.kind,
        owner=row.owner,
        columns={name: Column(type_, not_null, default) for name, type_, not_null, default in row.columns or []},
        constraints=(
            *(Constraint(name, kind, tuple(columns), text) for name, kind, text, columns in row.constraints or []),
            *(
                Constraint(name, "w" if is_partial else "i", tuple(columns), "")
                for name, is_unique, is_partial, columns in indexes
                if is_unique
            ),
        ),
        indexes={
            name: () if is_partial else tuple(columns)
            for name, is_unique, is_partial, columns in indexes
            if not is_unique
        },
        grants=tuple((role, privilege) for role, privilege in row.grants or []),
        owned_sequences=tuple(row.owned_sequences or []),
        view=_select(row.view, row.schema) if row.view else None,
    )


def _select(definition: str, schema: str) -> str:
    """A view's query in one spelling, without its own schema; PostgreSQL 15 names the table at each column."""
    query = " ".join(definition.split()).rstrip(";")
    return query.replace(f" FROM {schema}.", " FROM ").replace(f"{NEW}.", "")
