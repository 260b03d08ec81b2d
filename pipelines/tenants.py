"""Which schemas are tenants, and what each of them has.

The one place where a schema name becomes SQL (`quoted`, `on_tenant`, `enter_tenant`). Everything is read from the
catalog in one query for all tenants, so it costs the same round trip for one tenant as for ten thousand, and needs no
privilege on them.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import sqlalchemy as sa
from psycopg import sql
from sqlalchemy.dialects.postgresql.psycopg import PGCompiler_psycopg, PGDialect_psycopg

from models import TENANT
from models.sources import MarketplaceJob, MarketplaceTask
from models.stats import KEY, MarketplaceJobStats, MarketplaceJobStatsDay
from pipelines.database import server_and_database
from pipelines.settings import UsageError

TENANT_PATTERN = "^user_[0-9]+$"
"""What a tenant's schema is called, as a regular expression of PostgreSQL; nothing else is a tenant."""

TEMPLATE_SCHEMA = "template_tenant"
"""What the application clones for a new customer: migrated like a tenant, never aggregated."""

_STATS, _LEDGER = MarketplaceJobStats.__table__, MarketplaceJobStatsDay.__table__
_SOURCES = {MarketplaceJob.__tablename__: "vinted_jobs", MarketplaceTask.__tablename__: "plugin_tasks"}
_KEYS = {_STATS.name: KEY, _LEDGER.name: ("date",)}


def quoted(name: str) -> str:
    """The name of a schema, or of what is in it, as SQL."""
    return sql.Identifier(name).as_string()


def on_tenant(connection: sa.Connection, schema: str) -> sa.Connection:
    """The connection, with the placeholder schema of the models standing for this tenant from now on."""
    return connection.execution_options(schema_translate_map={TENANT: schema})


class _Compiler(PGCompiler_psycopg):
    """Writes constants into the text; only what the caller binds stays a parameter."""

    def visit_bindparam(self, bindparam: Any, *_: Any, **options: Any) -> Any:
        options["literal_binds"] = not bindparam.required
        return super().visit_bindparam(bindparam, **options)  # type: ignore[no-untyped-call]


def sql_in_tenant(statement: sa.Executable) -> str:
    """The text of a statement over the tables of the tenant that is entered; for `exec_driver_sql`.

    For statements that are long and run for each tenant: to make their text, even from SQLAlchemy's cache, takes longer
    than the server needs for a small tenant, and as it is the same for all, the driver, too, takes it apart only once.
    """
    dialect: Any = PGDialect_psycopg()  # type: ignore[no-untyped-call]
    dialect.statement_compiler = _Compiler
    return str(statement.compile(dialect=dialect)).replace(f"{TENANT}.", "")  # type: ignore[attr-defined]


def enter_tenant(connection: sa.Connection, schema: str, lock: sa.Table) -> None:
    """Locks this table of the tenant against other writers, and makes the tenant's schema the only one in which names
    are looked up, both to the end of the transaction: a table that is missing cannot be found elsewhere.
    """
    table = f"{quoted(schema)}.{quoted(lock.name)}"  # By its full name, so that an error tells the schema.
    connection.exec_driver_sql(
        f"SET LOCAL search_path = {quoted(schema)}; LOCK TABLE {table} IN SHARE ROW EXCLUSIVE MODE"
    )


@dataclass(frozen=True)
class Tenant:
    """A tenant's schema, and the reason why it cannot be computed, if there is one.

    `skipped`: there is nothing to compute from. `failed`: there is, but the target is not usable; says the remedy.
    """

    schema: str
    skipped: str | None = None
    failed: str | None = None


# One row per tenant and table that matters here, with its columns, and whether it has the unique key that rows are
# found by. Names of constraints and indexes differ between tenants, so only what they are is looked at. A tenant with
# none of these tables has one row, of nulls.
_CATALOG = sa.text("""
    SELECT n.nspname AS schema,
           c.relname AS relation,
           ARRAY (SELECT attname::text FROM pg_attribute
                   WHERE attrelid = c.oid AND attnum > 0 AND NOT attisdropped) AS columns,
           EXISTS (SELECT FROM pg_index i
                    WHERE i.indrelid = c.oid AND i.indisunique AND i.indisvalid
                      AND i.indpred IS NULL AND i.indexprs IS NULL
                      AND string_to_array(CAST(:keys AS json) ->> c.relname, ',') =
                          ARRAY (SELECT attname::text FROM pg_attribute
                                  WHERE attrelid = c.oid AND attnum = ANY (i.indkey[0:i.indnkeyatts - 1])
                                  ORDER BY attname)) AS has_key
      FROM pg_namespace n
      LEFT JOIN pg_class c ON c.relnamespace = n.oid
                          AND (c.relname = ANY (:sources) AND c.relkind IN ('r', 'p', 'v', 'f')
                               OR c.relname = ANY (:targets) AND c.relkind IN ('r', 'p'))
     WHERE n.nspname ~ :pattern AND (:only = '{}' OR n.nspname = ANY (:only))
     ORDER BY substring(n.nspname FROM 6)::numeric, n.nspname
""").bindparams(
    sa.bindparam("sources", [*_SOURCES, *_SOURCES.values()], type_=sa.ARRAY(sa.Text)),
    sa.bindparam("targets", [_STATS.name, _LEDGER.name], type_=sa.ARRAY(sa.Text)),
    sa.bindparam("keys", json.dumps({table: ",".join(sorted(key)) for table, key in _KEYS.items()})),
    sa.bindparam("pattern", TENANT_PATTERN),
    sa.bindparam("only", type_=sa.ARRAY(sa.Text)),
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
    for table, old_name in _SOURCES.items():
        if table not in relations:
            reason = f"still has {old_name}, its name before the rename" if old_name in relations else "is missing"
            return Tenant(schema, skipped=f"{table} {reason}")
    remedy = f"run `alembic -x tenant={schema} upgrade head`"
    for target in (_STATS, _LEDGER):
        if target.name not in relations:
            return Tenant(schema, failed=f"{target.name} is missing: {remedy}")
        if missing := sorted({column.name for column in target.columns} - set(relations[target.name].columns)):
            return Tenant(schema, failed=f"{target.name} lacks the columns {', '.join(missing)}: {remedy}")
        if not relations[target.name].has_key:
            key = ", ".join(_KEYS[target.name])
            return Tenant(schema, failed=f"{target.name} has no unique key on {key}: {remedy}")
    return Tenant(schema)
