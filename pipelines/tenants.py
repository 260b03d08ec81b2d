"""Which schemas are tenants, and what each of them has.

The one place where a schema name becomes SQL (`quoted`, `on_tenant`). Everything is read from the
catalog in one query for all tenants, so it costs the same round trip for one tenant as for ten thousand, and needs no
privilege on them.
"""

import itertools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import psycopg
import sqlalchemy as sa
from psycopg import sql
from sqlalchemy.dialects import postgresql

from models import TENANT
from models.sources import MarketplaceJob, MarketplaceTask
from models.stats import (
    KEY,
    MarketplaceJobFact,
    MarketplaceJobStats,
    MarketplaceJobStatsChange,
    MarketplaceJobStatsDay,
)
from models.summary import MarketplaceDailySummary  # Whose import brings all our tables.
from pipelines.database import require_table, server_and_database
from pipelines.settings import UsageError

TENANT_PATTERN = "^user_[0-9]+$"
"""What a tenant's schema is called, as a regular expression of PostgreSQL; nothing else is a tenant."""

TEMPLATE_SCHEMA = "template_tenant"
"""What the application clones for a new customer: migrated like a tenant, never aggregated."""

_JOBS, _TASKS, _OLD_JOBS = MarketplaceJob.__tablename__, MarketplaceTask.__tablename__, "vinted_jobs"
_TARGETS = {
    model.__tablename__: model.__table__
    for model in (MarketplaceJobStats, MarketplaceJobStatsDay, MarketplaceJobFact, MarketplaceJobStatsChange)
}
_READ = (MarketplaceJobStats.__tablename__, MarketplaceJobStatsDay.__tablename__)
"""What readers need; the facts say only why jobs failed."""
_KEYS = {name: tuple(key.name for key in table.primary_key) for name, table in _TARGETS.items()}
_KEYS[MarketplaceJobStats.__tablename__] = KEY  # By which its rows are found; the primary key says nothing.
_DIALECT: Any = postgresql.dialect()  # type: ignore[no-untyped-call]
_SOURCES = {  # Without `error_message`, which need not be there where no reasons are kept.
    _JOBS: [column for column in MarketplaceJob.__table__.columns if column.name != "error_message"],
    _TASKS: [MarketplaceTask.__table__.c[name] for name in ("job_id", "status", "retry_count")],
}
_READ_COLUMNS = {column.name for model in (MarketplaceJob, MarketplaceTask) for column in model.__table__.columns}
_INTEGERS = ["smallint", "integer", "bigint"]
_TEXTS = ["text", "varchar", "character", "name"]


def _type(column: sa.Column[Any]) -> str:
    """The type that a column should have."""
    return str(column.type.compile(dialect=_DIALECT)).lower()


def _fitting(column: sa.Column[Any]) -> list[str]:
    """The types that hold all that the type of a column does, and mean the same."""
    type_ = _type(column).partition("(")[0]
    if type_ in _INTEGERS:
        is_ours = column.table.metadata is MarketplaceDailySummary.metadata
        is_id = column is column.table.autoincrement_column
        return _INTEGERS[_INTEGERS.index(type_) :] if is_ours and not is_id else _INTEGERS
    return _TEXTS if type_ in _TEXTS else [type_]


def _fits(table: str, columns: Iterable[sa.Column[Any]]) -> Iterator[str]:
    """Each column with each type that fits, as `_COLUMNS` writes them."""
    for column in columns:
        for type_ in _fitting(column):
            yield f"{table}.{column.name} {psycopg.adapters.types.get_oid(type_)}"


_OUR_COLUMNS = {table.name: [*table.columns] for table in MarketplaceDailySummary.metadata.sorted_tables}
_SHAPES = {
    "sources": [_JOBS, _TASKS, _OLD_JOBS],
    "checked": [f"{table}.{it.name}" for table, columns in (_SOURCES | _OUR_COLUMNS).items() for it in columns],
    "fits": [fit for table, columns in (_SOURCES | _OUR_COLUMNS).items() for fit in _fits(table, columns)],
}
"""Parameters of `_COLUMNS`: tables of the application, the columns that matter, and their types."""


_ZONELESS = r"timestamp(\(\d\))? without time zone"


def quoted(name: str) -> str:
    """The name of a schema, or of what is in it, as SQL."""
    return sql.Identifier(name).as_string()


def on_tenant(connection: sa.Connection, schema: str) -> sa.Connection:
    """The connection, with the placeholder schema of the models standing for this tenant from now on."""
    return connection.execution_options(schema_translate_map={TENANT: schema})


@dataclass(frozen=True)
class Tenant:
    """A tenant's schema, and the reason why it cannot be computed, if there is one.

    `skipped`: there is nothing to compute from. `failed`: there is, but the target is not usable; says the remedy.
    `has_tasks`: there is a table of tasks; without it their numbers are unknown. `unreadable`: why what is stored
    cannot be read, whatever has become of the source; says the remedy, too. `has_stored`: there is a table that
    something may be stored in.
    """

    schema: str
    skipped: str | None = None
    failed: str | None = None
    has_tasks: bool = True
    unreadable: str | None = None
    has_stored: bool = True


# What runs code that is neither PostgreSQL's nor an extension's whenever it is written, or, if it is a view, read.
# It begins with the functions, of which there are few, and goes on with views of views.
_CODE = """
    WITH RECURSIVE used AS MATERIALIZED (
        SELECT classid, objid FROM pg_depend AS use
         WHERE refclassid IN ('pg_proc'::regclass, 'pg_operator'::regclass) AND refobjid >= 16384
           AND NOT EXISTS (SELECT FROM pg_depend AS member
                            WHERE member.classid = use.refclassid AND member.objid = use.refobjid
                              AND member.deptype = 'e')
    ), code (relid) AS (
        SELECT adrelid FROM used JOIN pg_attrdef AS d ON d.oid = objid WHERE classid = 'pg_attrdef'::regclass
         UNION
        SELECT conrelid FROM used JOIN pg_constraint AS c ON c.oid = objid WHERE classid = 'pg_constraint'::regclass
         UNION
        SELECT indrelid FROM used JOIN pg_index ON indexrelid = objid WHERE classid = 'pg_class'::regclass
         UNION
        SELECT relid FROM showing
    ), showing (relid) AS (
        SELECT ev_class FROM used JOIN pg_rewrite AS r ON r.oid = objid WHERE classid = 'pg_rewrite'::regclass
         UNION
        SELECT ev_class FROM showing
          JOIN pg_depend ON refclassid = 'pg_class'::regclass AND refobjid = relid AND classid = 'pg_rewrite'::regclass
          JOIN pg_rewrite AS r ON r.oid = objid
    )"""

# What of a relation `c` decides whether it can be worked with; named by what it is, since names of constraints and
# indexes differ between tenants. Triggers of foreign keys are PostgreSQL's own, and what is disabled does not count.
_FOUND = """
           c.relkind, columns.*,
           EXISTS (SELECT FROM pg_index i
                    WHERE i.indrelid = c.oid AND i.indisunique AND i.indisvalid
                      AND i.indpred IS NULL AND i.indexprs IS NULL
                      AND string_to_array(CAST(:keys AS json) ->> c.relname, ',') =
                          ARRAY (SELECT attname::text FROM pg_attribute
                                  WHERE attrelid = c.oid AND attnum = ANY (i.indkey[0:i.indnkeyatts - 1])
                                  ORDER BY attname)) AS has_key,
           c.relpersistence = 'u' AS is_unlogged,
           c.relrowsecurity AND row_security_active(c.oid) AS hides_rows,
           c.oid IN (SELECT relid FROM code) AS runs_code,
           CASE WHEN c.relhastriggers
                THEN ARRAY (SELECT tgname::text FROM pg_trigger
                             WHERE tgrelid = c.oid AND NOT tgisinternal AND tgenabled IN ('O', 'A') ORDER BY tgname)
           END AS triggers,
           CASE WHEN c.relhasrules
                THEN ARRAY (SELECT rulename::text FROM pg_rewrite
                             WHERE ev_class = c.oid AND ev_type <> '1' AND ev_enabled IN ('O', 'A') ORDER BY rulename)
           END AS rules,
           CASE WHEN c.relhassubclass AND c.relkind = 'r'
                THEN ARRAY (SELECT inhrelid::regclass::text FROM pg_inherits WHERE inhparent = c.oid ORDER BY inhrelid)
           END AS heirs"""
# Types of somebody: an enum is as good as a text, but a domain checks, and a cast converts, by functions of theirs.
# `misfits`: of the columns that matter, those of a type that is none of the fitting ones, with that type. In a table of
# ours a timestamp that is rounded is not the one that was counted.
_COLUMNS = """
     CROSS JOIN LATERAL (
           SELECT array_agg(attname::text) AS columns,
                  json_object_agg(attname, format_type(atttypid, atttypmod)) FILTER (WHERE
                      c.relname || '.' || attname || ' ' ||
                      CASE WHEN atttypid < 16384 THEN atttypid
                           ELSE (SELECT CASE WHEN typtype = 'd' THEN typbasetype
                                             WHEN typcategory IN ('E', 'S') THEN 'text'::regtype ELSE oid END
                                   FROM pg_type WHERE oid = atttypid)
                      END <> ALL (:fits) AND c.relname || '.' || attname = ANY (:checked)
                      OR atttypid = 'timestamptz'::regtype AND atttypmod >= 0 AND c.relname <> ALL (:sources)
                  ) AS misfits,
                  array_agg(attname::text) FILTER (WHERE atttypid >= 16384) AS foreign_typed,
                  array_agg(attname::text) FILTER (WHERE atttypid >= 16384 AND EXISTS (
                      SELECT FROM pg_type WHERE oid = atttypid AND typtype = 'd')) AS domains,
                  array_agg(attname::text) FILTER (WHERE atttypid >= 16384 AND EXISTS (
                      SELECT FROM pg_cast WHERE castsource = atttypid AND castfunc >= 16384)) AS converted
             FROM pg_attribute WHERE attrelid = c.oid AND attnum > 0 AND NOT attisdropped) AS columns"""

# One row per tenant and table that matters here. A tenant with none of these tables has one row, of nulls.
_CATALOG = sa.text(f"""{_CODE}
    SELECT n.nspname AS schema, c.relname AS relation, {_FOUND}
      FROM pg_namespace n
      LEFT JOIN pg_class c ON c.relnamespace = n.oid
                          AND (c.relname = ANY (:sources) AND c.relkind IN ('r', 'p', 'v', 'm', 'f')
                               OR c.relname = ANY (:targets) AND c.relkind IN ('r', 'p'))
     {_COLUMNS}
     WHERE n.nspname ~ :pattern AND (:only = '{{}}' OR n.nspname = ANY (:only))
     ORDER BY substring(n.nspname FROM 6)::numeric, n.nspname
""").bindparams(
    sa.bindparam("targets", [*_TARGETS], type_=sa.ARRAY(sa.Text)),
    sa.bindparam("keys", json.dumps({table: ",".join(sorted(key)) for table, key in _KEYS.items()})),
    sa.bindparam("pattern", TENANT_PATTERN),
    sa.bindparam("only", type_=sa.ARRAY(sa.Text)),
    *(sa.bindparam(name, value, type_=sa.ARRAY(sa.Text)) for name, value in _SHAPES.items()),
)


def find_schemas(connection: sa.Connection) -> list[str]:
    """The template, if it is there, and all tenants in numeric order, whatever they have: what is to be migrated."""
    query = sa.text("""
        SELECT nspname FROM pg_namespace WHERE nspname = :template OR nspname ~ :pattern
         ORDER BY nspname <> :template, nullif(substring(nspname FROM '[0-9]*$'), '')::numeric, nspname
    """)
    return list(connection.scalars(query, {"template": TEMPLATE_SCHEMA, "pattern": TENANT_PATTERN}))


def find_tenants(connection: sa.Connection, only: Sequence[str] = ()) -> list[Tenant]:
    """The tenants of the database, in numeric order; with `only`, those of them that are named."""
    rows = connection.execute(_CATALOG, {"only": list(only)})
    return [
        _judge(schema, {row.relation: row for row in relations})
        for schema, relations in groupby(rows, key=lambda row: row.schema)
    ]


def choose_tenants(connection: sa.Connection, names: Sequence[str] = ()) -> list[Tenant]:
    """The tenants to work on. Raises UsageError if there are none, or not all of those that are named."""
    tenants = find_tenants(connection, names)
    database = server_and_database(connection)
    if missing := sorted(set(names) - {tenant.schema for tenant in tenants}):
        raise UsageError(f"There is no tenant {', '.join(missing)} in {database}: check the run's `tenants`.")
    if not tenants:
        raise UsageError(f"No schema named user_<number> in {database}: is DATABASE_URL the right one?")
    return tenants


def _judge(schema: str, relations: dict[str, sa.Row[Any]]) -> Tenant:
    """The state of a tenant from its relations by name."""
    remedy = f"run `alembic -x tenant={schema} upgrade head`"
    faults = {
        name: f"{name} {fault}: {remedy}"
        for name, target in _TARGETS.items()
        if (fault := _unreadable(target, relations.get(name)) or _unfit(target, relations[name]))
    }
    hidden = {name: fault for name in _READ if name in relations and (fault := _hides_rows(schema, relations[name]))}
    unread = (
        f"{name} {fault}: {remedy}" if (fault := _unreadable(_TARGETS[name], relations.get(name))) else hidden.get(name)
        for name in _READ
    )
    unreadable = next(filter(None, unread), None)
    has_stored = any(name in relations for name in _READ)
    if _JOBS not in relations:
        reason = f"still has {_OLD_JOBS}, its name before the rename" if _OLD_JOBS in relations else "is missing"
        return Tenant(schema, skipped=f"{_JOBS} {reason}", unreadable=unreadable, has_stored=has_stored)
    sources = [relations[name] for name in (_JOBS, _TASKS) if name in relations]
    reasons = itertools.chain(
        faults.values(),
        (obstacle(schema, _TARGETS[name], relations[name]) for name in _TARGETS if name in relations),
        (_unfit_source(schema, source) for source in sources),
    )
    failed = next(filter(None, reasons), None)
    return Tenant(schema, failed=failed, has_tasks=_TASKS in relations, unreadable=unreadable, has_stored=has_stored)


def _unreadable(target: sa.Table, found: sa.Row[Any] | None) -> str | None:
    """Why the shape of a table of ours cannot be read, if it cannot."""
    if found is None:
        return "is missing"
    if missing := sorted({column.name for column in target.columns} - set(found.columns)):
        return f"lacks the columns {', '.join(missing)}"
    return _misfits([column for column in target.columns if not isinstance(column.type, sa.DateTime)], found)


def _unfit(target: sa.Table, found: sa.Row[Any]) -> str | None:
    """Why it cannot be written, if it cannot."""
    return _misfits(target.columns, found) or (
        None if found.has_key else f"has no unique key on {', '.join(_KEYS[target.name])}"
    )


def _misfits(columns: Iterable[sa.Column[Any]], found: sa.Row[Any]) -> str | None:
    """Which of these columns have a type that does not fit, and which one would."""
    misfits = found.misfits or {}
    wrong = [f"{it.name} as {misfits[it.name]}, not {_type(it)}" for it in columns if it.name in misfits]
    return f"has {'; '.join(wrong)}" if wrong else None


def _hides_rows(schema: str, found: sa.Row[Any]) -> str | None:
    if not found.hides_rows:
        return None
    return (
        f"{found.relation} has row-level security, which hides rows: ALTER TABLE {schema}.{found.relation} DISABLE ROW "
        "LEVEL SECURITY, or give the role BYPASSRLS"
    )


def obstacle(schema: str, target: sa.Table, found: sa.Row[Any]) -> str | None:
    """Why a table of ours must not be written, with the remedy; None if nothing is in the way.

    Whatever else runs when it is written would run with our rights, and may write something else than was counted.
    """
    table = f"{schema}.{target.name}"
    own = {column.name for column in target.columns}
    if found.is_unlogged:
        return f"{target.name} is unlogged, so a crash empties it: ALTER TABLE {table} SET LOGGED"
    if reason := _hides_rows(schema, found):
        return reason
    if found.triggers:
        return (
            f"{target.name} has a trigger of somebody else's, which would run with the rights of this role: "
            f"DROP TRIGGER {quoted(found.triggers[0])} ON {table}, or disable it"
        )
    if found.rules:
        return (
            f"{target.name} has a rule of somebody else's, which changes what is written: "
            f"DROP RULE {quoted(found.rules[0])} ON {table}, or disable it"
        )
    if found.heirs:
        return (
            f"{target.name} has a table that inherits from it, whose rows would count, too: "
            f"ALTER TABLE {found.heirs[0]} NO INHERIT {table}"
        )
    if types := sorted({*(found.domains or ()), *own.intersection(found.foreign_typed or ())}):
        return (
            f"{target.name} has columns of somebody else's types, which may run code with the rights of this role: "
            f"change the type of {', '.join(map(quoted, types))} to one of PostgreSQL's"
        )
    if found.runs_code:
        return (
            f"{target.name} has a default, a check or an index with a function or operator of somebody else's, which "
            f"would run with the rights of this role: drop what `\\d {table}` shows of it"
        )
    return None


def _unfit_source(schema: str, found: sa.Row[Any]) -> str | None:
    """Why a table of the application cannot be read, with the remedy; None if it can."""
    table = f"{schema}.{found.relation}"
    if found.relkind == "m":
        return (
            f"{found.relation} is a materialized view, which shows rows as they were at its last refresh: make it a "
            "view, or a table"
        )
    columns = _SOURCES[found.relation]
    if missing := [column.name for column in columns if column.name not in found.columns]:
        return (
            f"{found.relation} lacks the columns {', '.join(missing)}, which are read: give {table} the columns that "
            "it has in the other tenants"
        )
    misfits = found.misfits or {}
    if zoneless := sorted(name for name, type_ in misfits.items() if re.fullmatch(_ZONELESS, type_)):
        change = ", ".join(f"ALTER {name} TYPE timestamptz USING {name} AT TIME ZONE '<zone>'" for name in zoneless)
        return (
            f"{found.relation} has timestamps without time zone, so nobody knows what instants they mean: "
            f"ALTER TABLE {table} {change}, with the zone that the application writes"
        )
    if misfit := _misfits(columns, found):
        return f"{found.relation} {misfit}, so its values would not be what they say: change the type in {table}"
    if found.relkind == "v" and found.runs_code:
        return (
            f"{found.relation} is a view with a function or operator of somebody else's, which would run with the "
            "rights of this role: make it a view without, or a table"
        )
    if converted := sorted(_READ_COLUMNS.intersection(found.converted or ())):
        return (
            f"{found.relation} has columns of a type with a cast of somebody else's, which would run with the rights "
            f"of this role: drop the cast of the type of {', '.join(converted)}"
        )
    return None


def require_writable(connection: sa.Connection, table: sa.Table) -> None:
    """Raises UsageError if this table of ours, outside of the tenants, is missing or must not be written."""
    require_table(connection, table)
    query = sa.text(f"{_CODE} SELECT {_FOUND} FROM pg_class c {_COLUMNS} WHERE c.oid = to_regclass(:name)")
    found = connection.execute(query, {"name": table.fullname, "keys": "{}", **_SHAPES}).one()
    if reason := _misfits(table.columns, found):
        raise UsageError(f"{table.fullname} {reason}: run `alembic upgrade head`.")
    if reason := obstacle(str(table.schema), table, found):
        raise UsageError(f"{table.schema}.{reason}.")


def superuser_warning(connection: sa.Connection) -> str | None:
    """What to say where a superuser works on schemas of others; None if the role is none, or they are all its like."""
    query = sa.text("""
        SELECT current_user AS role, count(*) AS number, min(n.nspname) AS first
          FROM pg_namespace n JOIN pg_roles owner ON owner.oid = n.nspowner
         WHERE (n.nspname = :template OR n.nspname ~ :pattern) AND NOT owner.rolsuper
           AND (SELECT rolsuper FROM pg_roles WHERE rolname = current_user)""")
    found = connection.execute(query, {"template": TEMPLATE_SCHEMA, "pattern": TENANT_PATTERN}).one()
    if not found.number:
        return None
    return (
        f"{found.role} is a superuser, and {found.number} schemas, {found.first} for instance, belong to roles that "
        "are none: what their owners make may run with its rights. Use a role as `Roles` in the README has it"
    )
