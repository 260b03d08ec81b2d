"""What a schema has: the relations that a migration touches, as they really are in the catalog.

Read for many schemas in one query, as a text without the schema's own name: schemas of one text are of one kind, and
what is right for one of them is right for all. Constraints and indexes are known by what they are; their names are only
data.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import sqlalchemy as sa
from psycopg import sql

from models.summary import MarketplaceDailySummary  # Whose import brings all our tables.
from pipelines.tenants import quoted

OLD = "vinted_job_stats"
NEW = "marketplace_job_stats"
LEDGER = "marketplace_job_stats_days"
VERSION = "marketplace_job_stats_version"
FACTS = "marketplace_job_facts"
CHANGES = "marketplace_job_stats_changes"
SUMMARY = "marketplace_daily_summary"

FACTS_ARE_LOST = "ck_marketplace_job_facts_lossless_downgrade"
"""The name by which an error says that a downgrade would lose facts."""


def archived(table: str) -> str:
    """What a table is called while a downgrade has put it away."""
    return f"{table}_archive"


ARCHIVE = archived(NEW)

SESSION: dict[str, Any] = {
    "search_path": "pg_catalog",  # So that all names that are read are qualified.
    "quote_all_identifiers": "off",  # So that they are all written alike.
    "plan_cache_mode": "force_generic_plan",  # The one prepared statement, of the catalog, takes long to plan.
}
"""The settings that a session needs which reads shapes."""

MET = "met before 0001"
"""How a comment begins that remembers what a downgrade has to bring back; after a colon comes what it was."""


@dataclass(frozen=True)
class Column:
    type: str
    not_null: bool
    default: str | None  # As SQL; 'serial' for ids of any sequence; 'generated ...' for a generated column.


@dataclass(frozen=True)
class Constraint:
    """A constraint, or a unique index that belongs to none."""

    name: str
    kind: str  # p primary key, u unique, x exclusion, f foreign key, c check, i unique index, w a partial one
    columns: tuple[str, ...]
    definition: str
    met: str | None = None  # What the comment remembers.


@dataclass(frozen=True)
class Relation:
    """A table or view. `indexes` are those that no constraint stands for and that are not unique: name and columns."""

    name: str
    kind: str  # As pg_class.relkind: r table, p partitioned table, v view ...; h a table that has heirs; locked.
    owner: str  # Quoted.
    is_logged: bool
    replica_identity: str  # d default, n nothing, f full, i an index, - an index that is gone
    identity_index: str | None
    columns: dict[str, Column]
    comments: dict[str, str]  # Of its columns.
    constraints: tuple[Constraint, ...]
    indexes: dict[str, str]
    grants: tuple[tuple[str, str], ...]  # Role, quoted, and privilege; those of the owner left out.
    owned_sequences: tuple[str, ...]  # Quoted; without the schema if it is the table's.
    publications: tuple[str, ...]  # Those that name this table.
    view: str | None  # What a view selects.
    options: tuple[str, ...]  # Of a view, as security_invoker=true.

    @property
    def met_columns(self) -> tuple[str, ...]:
        """Those that were there before the first migration, under the name of one of ours."""
        return tuple(name for name, comment in self.comments.items() if comment.startswith(MET))

    def unique_on(self, *columns: str) -> tuple[Constraint, ...]:
        """The unique constraints and indexes on exactly these columns, in any order."""
        return tuple(c for c in self.constraints if c.kind in "ui" and sorted(c.columns) == sorted(columns))

    def of_kind(self, kind: str) -> tuple[Constraint, ...]:
        return tuple(c for c in self.constraints if c.kind == kind)


@dataclass(frozen=True)
class Shape:
    """One schema: its owner, quoted, and its relations by name. There is no owner if there is no such schema."""

    owner: str | None = None
    relations: dict[str, Relation] = field(default_factory=dict)

    def table(self, name: str) -> Relation | None:
        """The relation of this name, unless it is a view."""
        relation = self.relations.get(name)
        return relation if relation and relation.kind != "v" else None

    def view(self, name: str) -> Relation | None:
        relation = self.relations.get(name)
        return relation if relation and relation.kind == "v" else None

    @property
    def is_locked(self) -> bool:
        """Whether another session keeps one of the relations locked; then nothing else is known of that one."""
        return any(relation.kind == "locked" for relation in self.relations.values())


@dataclass(frozen=True)
class Found:
    """What was found in one schema. Schemas with the same `kind` are alike in all that a plan looks at."""

    record: tuple[str, ...] | None  # None: there is no version table, or it cannot be read.
    fingerprint: str
    stamp: str = ""  # Changes with anything in the catalog that the fingerprint is of.
    lagging_sequence: str | None = None  # Qualified and quoted: it would give out ids that are taken.
    is_foreign: bool = False  # There is a version table, and this role may not read it.
    is_locked: bool = False  # There is one, and another session keeps it locked.

    @property
    def kind(self) -> tuple[tuple[str, ...] | None, str]:
        return self.record, self.fingerprint


def plain(expression: str | None) -> str | None:
    """An expression without casts, parentheses and quotes around numbers, and with lists in order.

    The catalog writes the same expression in several ways: as it was given, and after a dump and restore.
    """
    if expression is None:
        return None
    text = re.sub(
        r"::\"?[a-z_]\w*\"?( varying| precision| with(out)? time zone)?(\(\d+(, ?\d+)?\))?(\[\])*", "", expression
    )
    text = re.sub(r"\s+in\s*\(([^)]*)\)", r" = ANY ARRAY[\1]", text, flags=re.IGNORECASE)
    text = re.sub(r"'(-?\d+(\.\d+)?)'", r"\1", re.sub(r"[()]", " ", text))
    text = re.sub(
        r"ARRAY\[([^]]*)\]", lambda m: f"[{', '.join(sorted(item.strip() for item in m[1].split(',')))}]", text
    )
    return re.sub(r"\s+", " ", text).replace(" ,", ",").strip()


def _bare(expression: str) -> str:
    """A text of the catalog without the schema's own name, which stays in a literal and in a quoted name; but not in
    the name of a sequence, which is written as a literal."""
    literal, name, sequence = "''(?:[^'']|%)*''(?!::regclass)", '"(?:[^"]|"")*"', "(?:[^'']|%)*''::regclass"
    pattern = f"'({literal}|{name})|('')' || nspname || '\\.({sequence})|\\y' || nspname || '\\.'".replace("%", "'" * 4)
    return (
        f"(SELECT CASE WHEN strpos(text, nspname || '.') = 0 THEN text ELSE "
        f"regexp_replace(text, {pattern}, '\\1\\2\\3', 'g') END FROM (SELECT {expression} AS text OFFSET 0) AS t)"
    )


# One row per relation. An index is partial here if it is for some of the rows only, or on expressions, or was left
# invalid by an interrupted build. What is in a table that another session keeps locked, or a view over it, could not be
# read without waiting, and all the other schemas of the query with it: so only that it is locked is read.
_CATALOG = """
    WITH locked AS MATERIALIZED (
        SELECT relation FROM pg_locks
         WHERE locktype = 'relation' AND mode = 'AccessExclusiveLock'
           AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
         GROUP BY relation HAVING NOT bool_or(pid = pg_backend_pid() AND granted)
    ),
    -- Each relation is looked up by schema and name. A join would be turned round: the names are those of all tenants.
    wanted AS MATERIALIZED (
        SELECT n.nspname,
               (SELECT c.oid FROM pg_class c
                 WHERE c.relnamespace = n.oid AND c.relname = name AND c.relkind NOT IN ('i', 'I', 'S')) AS oid
          FROM pg_namespace n CROSS JOIN unnest(CAST(:names AS text[])) AS name
         WHERE n.nspname = ANY (CAST(:schemas AS text[]))
    ),
    relations AS (
    SELECT wanted.nspname AS schema, c.relname AS name, c.oid, c.relkind,
           CASE WHEN EXISTS (SELECT FROM locked WHERE relation = c.oid)
                  OR c.relkind = 'v' AND EXISTS (
                        SELECT FROM pg_rewrite w
                          JOIN pg_depend o ON o.objid = w.oid AND o.classid = 'pg_rewrite'::regclass
                          JOIN locked ON locked.relation = o.refobjid
                         WHERE w.ev_class = c.oid AND o.refclassid = 'pg_class'::regclass)
           THEN json_build_array(c.relname, 'locked')
           ELSE json_build_array(c.relname,
           CASE WHEN c.relkind = 'r' AND EXISTS (SELECT FROM pg_inherits WHERE inhparent = c.oid) THEN 'h'
                ELSE c.relkind::text END,
           (SELECT quote_ident(rolname) FROM pg_roles WHERE oid = c.relowner),
           c.relpersistence = 'p',
           CASE WHEN c.relreplident = 'i'
                 AND NOT EXISTS (SELECT FROM pg_index WHERE indrelid = c.oid AND indisreplident)
                THEN '-' ELSE c.relreplident::text END,
           (SELECT x.relname FROM pg_index i JOIN pg_class x ON x.oid = i.indexrelid
             WHERE i.indrelid = c.oid AND i.indisreplident),
           (SELECT json_agg(json_build_array(a.attname,
                        CASE WHEN a.atttypid < 16384 THEN format_type(a.atttypid, a.atttypmod) ELSE {type} END,
                        a.attnotnull AND NOT EXISTS (
                            SELECT FROM pg_constraint k
                             WHERE k.conrelid = c.oid AND k.contype = 'n' AND NOT k.convalidated
                               AND k.conkey = ARRAY[a.attnum]),
                        CASE WHEN a.attidentity <> '' THEN 'identity'
                             WHEN a.attgenerated <> '' THEN 'generated ' || pg_get_expr(d.adbin, d.adrelid)
                             WHEN a.atthasdef THEN {default} END,
                        (SELECT description FROM pg_description m WHERE m.objoid = c.oid AND m.objsubid = a.attnum
                            AND m.classoid = 'pg_class'::regclass))
                            ORDER BY a.attnum)
              FROM pg_attribute a
              LEFT JOIN pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
             WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped),
           (SELECT json_agg(json_build_array(k.conname, k.contype,
                        ARRAY (SELECT attname FROM unnest(k.conkey) WITH ORDINALITY AS u (num, place)
                                 JOIN pg_attribute ON attrelid = c.oid AND attnum = u.num ORDER BY place),
                        {constraint},
                        (SELECT description FROM pg_description m WHERE m.objoid = k.oid AND m.objsubid = 0
                            AND m.classoid = 'pg_constraint'::regclass AND m.description ^@ '{met}'))
                            ORDER BY k.conname)
              FROM pg_constraint k WHERE k.conrelid = c.oid AND k.contype IN ('p', 'u', 'x', 'f', 'c')),
           (SELECT json_agg(json_build_array(x.relname, i.indisunique,
                        i.indpred IS NOT NULL OR i.indexprs IS NOT NULL OR NOT i.indisvalid,
                        ARRAY (SELECT attname
                                 FROM unnest(i.indkey[0:i.indnkeyatts - 1]) WITH ORDINALITY AS u (num, place)
                                 JOIN pg_attribute ON attrelid = c.oid AND attnum = u.num ORDER BY place),
                        substring({index} FROM 'USING (.*)$')
                            || CASE WHEN i.indisvalid THEN '' ELSE ' INVALID' END)
                            ORDER BY x.relname)
              FROM pg_index i JOIN pg_class x ON x.oid = i.indexrelid
             WHERE i.indrelid = c.oid
               AND NOT EXISTS (SELECT FROM pg_constraint k
                                WHERE k.conrelid = c.oid AND k.conindid = i.indexrelid
                                  AND k.contype IN ('p', 'u', 'x'))),
           (SELECT json_agg(json_build_array(
                        CASE g.grantee WHEN 0 THEN 'PUBLIC' ELSE quote_ident(pg_get_userbyid(g.grantee)) END,
                        g.privilege_type) ORDER BY g.grantee, g.privilege_type)
              FROM aclexplode(c.relacl) g WHERE g.grantee <> c.relowner),
           (SELECT json_agg({sequence} ORDER BY s.oid)
              FROM pg_depend o JOIN pg_class s ON s.oid = o.objid AND s.relkind = 'S'
             WHERE o.refobjid = c.oid AND o.refclassid = 'pg_class'::regclass AND o.classid = 'pg_class'::regclass
               AND o.deptype IN ('a', 'i')),
           (SELECT json_agg(p.pubname ORDER BY p.pubname)
              FROM pg_publication_rel r JOIN pg_publication p ON p.oid = r.prpubid WHERE r.prrelid = c.oid),
           CASE WHEN c.relkind = 'v' THEN {view} END, c.reloptions) END AS text
      FROM wanted CROSS JOIN LATERAL (SELECT * FROM pg_class WHERE oid = wanted.oid OFFSET 0) AS c
    ),
    kinds AS (
        SELECT n.nspname AS schema, quote_ident(r.rolname) AS owner,
               coalesce(json_agg(text ORDER BY name) FILTER (WHERE name IS NOT NULL), '[]')::text AS text,
               has_schema_privilege(n.oid, 'USAGE') AS is_usable,
               max(relations.oid) FILTER (WHERE name = CAST(:version AS text)) AS version,
               max(relations.oid) FILTER (WHERE name = CAST(:stats AS text) AND relkind = 'r') AS stats
          FROM pg_namespace n
          JOIN pg_roles r ON r.oid = n.nspowner
          LEFT JOIN relations ON relations.schema = n.nspname
         WHERE n.nspname = ANY (CAST(:schemas AS text[]))
         GROUP BY n.oid, n.nspname, r.rolname
    )
    SELECT schema, {columns} FROM kinds
"""
_NAMES = sorted(
    {
        OLD,
        VERSION,
        *map(archived, (NEW, FACTS, CHANGES)),
        *(table.name for table in MarketplaceDailySummary.metadata.sorted_tables),
    }
)
_PARTS = {
    "met": MET,
    "type": _bare("format_type(a.atttypid, a.atttypmod)"),
    "default": _bare("pg_get_expr(d.adbin, d.adrelid)"),
    "constraint": _bare("pg_get_constraintdef(k.oid)"),
    "index": _bare("pg_get_indexdef(x.oid)"),
    "sequence": _bare("s.oid::regclass::text"),
    "view": _bare("pg_get_viewdef(c.oid)"),
}
_SHAPES = sa.text(_CATALOG.format(columns="owner, text", **_PARTS))
# Beside the fingerprint, what is needed to ask for the rest: whether the version table is there and may be read, and
# the sequence that the ids of the stats come from, by a default or as an identity.
_FOUND_TEXT = re.sub(
    r":(names|schemas|version|stats)\b",
    r"%(\1)s",
    _CATALOG.format(
        columns="""encode(sha256(convert_to(owner || text, 'UTF8')), 'hex'),
           version IS NOT NULL,
           version IS NOT NULL AND NOT (is_usable AND has_table_privilege(version, 'SELECT')),
           EXISTS (SELECT FROM locked WHERE relation = version),
           CASE WHEN NOT EXISTS (SELECT FROM locked WHERE relation = stats) THEN coalesce(
               (SELECT p.refobjid FROM pg_attribute a
                  JOIN pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
                  JOIN pg_depend p ON p.classid = 'pg_attrdef'::regclass AND p.objid = d.oid
                                  AND p.refclassid = 'pg_class'::regclass AND p.refobjid <> stats
                 WHERE a.attrelid = stats AND a.attname = 'id' LIMIT 1),
               (SELECT p.objid FROM pg_attribute a
                  JOIN pg_depend p ON p.refclassid = 'pg_class'::regclass AND p.refobjid = stats
                                  AND p.refobjsubid = a.attnum AND p.classid = 'pg_class'::regclass AND p.deptype = 'i'
                 WHERE a.attrelid = stats AND a.attname = 'id' AND a.attidentity <> '' LIMIT 1)) END""",
        **_PARTS,
    ),
)
# Of each catalog that a shape is read from, how many rows there are and the sum of the transactions that wrote them: a
# row that comes or changes has a younger one than any that goes. To plan this takes a fifth of the time.
_STAMPED = {
    "pg_class c": "c.oid = ANY (oids)",
    "pg_attribute c": "c.attrelid = ANY (oids)",
    "pg_attrdef c": "c.adrelid = ANY (oids)",
    "pg_constraint c": "c.conrelid = ANY (oids)",
    "pg_index i JOIN pg_class c ON c.oid = i.indexrelid": "i.indrelid = ANY (oids)",
    "pg_description c": "c.classoid = 'pg_class'::regclass AND c.objoid = ANY (oids)",
    "pg_depend c": "c.refclassid = 'pg_class'::regclass AND c.refobjid = ANY (oids)",
    "pg_publication_rel c": "c.prrelid = ANY (oids)",
}
_COUNTS = ", ".join(
    f"(SELECT count(*) || ' ' || coalesce(sum(c.xmin::text::bigint), 0) FROM {catalog} WHERE {condition})"
    for catalog, condition in _STAMPED.items()
)
_STAMPS = f"""
    SELECT nspname, concat_ws(', ', xmin, {_COUNTS})
      FROM (SELECT nspname, xmin,
                   ARRAY (SELECT (SELECT c.oid FROM pg_class c WHERE c.relnamespace = n.oid AND c.relname = name
                                     AND c.relkind NOT IN ('i', 'I', 'S'))
                            FROM unnest(CAST(%(names)s AS text[])) AS name) AS oids
              FROM pg_namespace n WHERE nspname = ANY (CAST(%(schemas)s AS text[])) OFFSET 0) AS n"""


def read_shapes(connection: sa.Connection, schemas: Sequence[str]) -> dict[str, Shape]:
    """The shapes of these schemas, by name; an empty one for a schema that is not there."""
    shapes = dict.fromkeys(schemas, Shape())
    for schema, owner, text in connection.execute(_SHAPES, _parameters(schemas)):
        shapes[schema] = _shape(owner, text)
    return shapes


def read_shape(connection: sa.Connection, schema: str) -> tuple[str, Shape]:
    """The shape of one schema, with its fingerprint; empty both if it is not there."""
    row = connection.execute(_SHAPES, _parameters([schema])).one_or_none()
    if row is None:
        return "", Shape()
    return hashlib.sha256((row.owner + row.text).encode()).hexdigest(), _shape(row.owner, row.text)


def read_found(connection: sa.Connection, schemas: Sequence[str], sequences: bool = True) -> dict[str, Found]:
    """Fingerprint, version record and, if asked for, sequence of each of these schemas; nothing for one that is not
    there."""
    found: dict[str, Found] = {}
    selects = []
    driver: Any = connection.connection.driver_connection
    # Before the rest, so that what changes between the two statements is noticed.
    stamps = dict(driver.execute(*stamps_of(schemas), prepare=True).fetchall())
    # Planned once per connection, since to plan it takes ten times as long as to run it for one schema.
    rows = driver.execute(_FOUND_TEXT, _parameters(schemas), prepare=True).fetchall()
    for schema, fingerprint, has_version, is_foreign, is_locked, sequence in rows:
        stamp = stamps.get(schema, "")
        found[schema] = Found(None, fingerprint, stamp, is_foreign=is_foreign, is_locked=is_locked)
        record = lagging = "NULL"
        if has_version and not is_foreign and not is_locked:
            record = f"({record_of(schema)})"
        if sequence and sequences:
            lagging = (
                f"CASE WHEN has_sequence_privilege({sequence}::oid, 'USAGE') AND "
                f"(SELECT max(id) FROM {quoted(schema)}.{NEW}) > {last_id(sequence)} "
                f"THEN {sequence}::regclass::text END"
            )
        if (record, lagging) != ("NULL", "NULL"):
            selects.append(f"SELECT {sql.Literal(schema).as_string()}, {record}, {lagging}::text")
    if selects:
        for schema, record, lagging in driver.execute(" UNION ALL ".join(selects), prepare=False):
            versions = None if record is None else tuple(record)
            found[schema] = replace(found[schema], record=versions, lagging_sequence=lagging)
    return found


def record_of(schema: str) -> str:
    """The statement that reads a version record: an array of what its table names."""
    versions = "pg_catalog.array_agg(version_num::text ORDER BY version_num::text)"
    return f"SELECT coalesce({versions}, '{{}}')::text[] FROM {quoted(schema)}.{VERSION}"


def stamps_of(schemas: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """The statement that reads the stamps of these schemas, and its parameters: a row of schema and stamp for each."""
    return _STAMPS, {"names": _NAMES, "schemas": list(schemas)}


def last_id(sequence: int | str) -> str:
    """The id that a sequence, by its oid or by its name in quotes, gave out last; as SQL."""
    return (
        f"coalesce(pg_catalog.pg_sequence_last_value({sequence}::pg_catalog.regclass), (SELECT seqstart - seqincrement "
        f"FROM pg_catalog.pg_sequence WHERE seqrelid OPERATOR(pg_catalog.=) {sequence}::pg_catalog.regclass))"
    )


def _parameters(schemas: Sequence[str]) -> dict[str, Any]:
    return {"names": _NAMES, "schemas": list(schemas), "version": VERSION, "stats": NEW}


def _shape(owner: str, text: str) -> Shape:
    relations = map(_relation, json.loads(text))
    return Shape(owner, {relation.name: relation for relation in relations})


def _relation(row: Sequence[Any]) -> Relation:
    if row[1] == "locked":
        row = [*row, "", True, "d", *[None] * 9]
    (name, kind, owner, is_logged, identity, identity_index, columns, constraints, indexes, *others) = row
    grants, sequences, publications, view, options = others
    return Relation(
        name=name,
        kind=kind,
        owner=owner,
        is_logged=is_logged,
        replica_identity=identity,
        identity_index=identity_index,
        columns={column: Column(type_, not_null, default) for column, type_, not_null, default, _ in columns or ()},
        comments={column: comment for column, *_, comment in columns or () if comment},
        constraints=(
            *(Constraint(key, kind, tuple(of), text, met) for key, kind, of, text, met in constraints or ()),
            *(
                Constraint(index, "w" if is_partial else "i", tuple(of), "")
                for index, is_unique, is_partial, of, _ in indexes or ()
                if is_unique
            ),
        ),
        indexes={index: text for index, is_unique, _, _, text in indexes or () if not is_unique},
        grants=tuple((role, privilege) for role, privilege in grants or ()),
        owned_sequences=tuple(sequences or ()),
        publications=tuple(publications or ()),
        view=view,
        options=tuple(options or ()) if kind == "v" else (),
    )
