"""Which schemas are tenants, and what each of them has.

The one place where a schema name becomes SQL (`quoted`, `on_tenant`). Everything is read from the
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

from models import TENANT
from models.sources import MarketplaceJob, MarketplaceTask
from models.stats import (
    KEY,
    MarketplaceJobFact,
    MarketplaceJobStats,
    MarketplaceJobStatsChange,
    MarketplaceJobStatsDay,
)
from pipelines.database import server_and_database
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
    cannot be read, whatever has become of the source; says the remedy, too.
    """

    schema: str
    skipped: str | None = None
    failed: str | None = None
    has_tasks: bool = True
    unreadable: str | None = None


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
    sa.bindparam("sources", [_JOBS, _TASKS, _OLD_JOBS], type_=sa.ARRAY(sa.Text)),
    sa.bindparam("targets", [*_TARGETS], type_=sa.ARRAY(sa.Text)),
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
    remedy = f"run `alembic -x tenant={schema} upgrade head`"
    faults = {
        name: f"{name} {fault}: {remedy}"
        for name, target in _TARGETS.items()
        if (fault := _fault(target, relations.get(name)))
    }
    unreadable = next((faults[name] for name in _READ if name in faults), None)
    if _JOBS not in relations:
        reason = f"still has {_OLD_JOBS}, its name before the rename" if _OLD_JOBS in relations else "is missing"
        return Tenant(schema, skipped=f"{_JOBS} {reason}", unreadable=unreadable)
    failed = next(iter(faults.values()), None)
    return Tenant(schema, failed=failed, has_tasks=_TASKS in relations, unreadable=unreadable)


def _fault(target: sa.Table, found: sa.Row[Any] | None) -> str | None:
    """What is wrong with a table of ours, if anything is."""
    if found is None:
        return "is missing"
    if missing := sorted({column.name for column in target.columns} - set(found.columns)):
        return f"lacks the columns {', '.join(missing)}"
    return None if found.has_key else f"has no unique key on {', '.join(_KEYS[target.name])}"
