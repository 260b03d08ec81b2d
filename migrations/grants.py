"""What the role of a run may not do yet in a tenant, as GRANT statements.

Only where the migration has a role of its own (`MIGRATION_DATABASE_URL`): the run's role then reads the sources and
writes our tables, and nothing else. Clones copy no grants, so every tenant is looked at.
"""

import os
from collections.abc import Sequence

import sqlalchemy as sa
from psycopg.conninfo import conninfo_to_dict

from migrations.shape import NEW, OLD
from migrations.target import HEAD, SHARED_HEAD
from models import SHARED
from models.sources import MarketplaceActionType, MarketplaceJob, MarketplaceTask
from pipelines.database import connected, conninfo, create_engine
from pipelines.tenants import quoted

# What is missing: the schema, the tables, and the sequence that the ids of our table come from, which may be in the
# template's schema.
_MISSING = sa.text("""
    WITH names (name, privileges) AS (
        SELECT unnest(:sources), ARRAY['SELECT']
         UNION ALL SELECT unnest(:tables), ARRAY['SELECT', 'INSERT', 'UPDATE', 'DELETE']
         UNION ALL SELECT :old, '{}'
    ),
    -- Each relation is looked up by schema and name. A join would be turned round: the names are those of all tenants.
    wanted AS MATERIALIZED (
        SELECT n.oid AS tenant, n.nspname, name, privileges,
               (SELECT c.oid FROM pg_class c
                 WHERE c.relnamespace = n.oid AND c.relname = name AND c.relkind IN ('r', 'p', 'v', 'f')) AS oid
          FROM pg_namespace n CROSS JOIN names
         WHERE n.nspname = ANY (:schemas)
    ),
    sequences AS MATERIALIZED (
        SELECT wanted.nspname, s.oid, s.relnamespace
          FROM wanted
         CROSS JOIN LATERAL (SELECT oid FROM pg_attrdef WHERE adrelid = wanted.oid OFFSET 0) AS d
          JOIN pg_depend p ON p.classid = 'pg_attrdef'::regclass AND p.objid = d.oid
                          AND p.refclassid = 'pg_class'::regclass
          JOIN pg_class s ON s.oid = p.refobjid AND s.relkind = 'S'
         WHERE name IN (:old, :stats)
    )
    SELECT n.nspname AS schema, format('GRANT USAGE ON SCHEMA %I TO %I', n.nspname, CAST(:role AS text)) AS statement
      FROM pg_namespace n
     WHERE n.nspname = ANY (:schemas) AND NOT has_schema_privilege(:role, n.oid, 'USAGE')
    UNION ALL
    SELECT nspname, format('GRANT %s ON %I.%I TO %I', privilege, nspname, name, :role)
      FROM wanted CROSS JOIN unnest(privileges) AS privilege
     WHERE oid IS NOT NULL AND NOT has_table_privilege(:role, oid, privilege)
    UNION ALL
    SELECT nspname, format('GRANT USAGE ON SCHEMA %s TO %I', relnamespace::regnamespace, :role)
      FROM sequences WHERE NOT has_schema_privilege(:role, relnamespace, 'USAGE')
    UNION ALL
    SELECT nspname, format('GRANT USAGE ON SEQUENCE %s TO %I', oid::regclass, :role)
      FROM sequences WHERE NOT has_sequence_privilege(:role, oid, 'USAGE')
""").bindparams(
    sa.bindparam("sources", [MarketplaceJob.__tablename__, MarketplaceTask.__tablename__], type_=sa.ARRAY(sa.Text)),
    sa.bindparam("tables", [*HEAD, *SHARED_HEAD], type_=sa.ARRAY(sa.Text)),
    sa.bindparam("stats", NEW, type_=sa.Text),
    sa.bindparam("old", OLD, type_=sa.Text),
    sa.bindparam("role", type_=sa.Text),
    sa.bindparam("schemas", type_=sa.ARRAY(sa.Text)),
)

# The names of the actions, for the whole database; where somebody else owns them, they have to grant it.
_ACTION_TYPES = sa.text("""
    SELECT format('GRANT SELECT ON %s TO %I', oid::regclass, CAST(:role AS text))
      FROM pg_class
     WHERE oid = to_regclass(:action_types) AND NOT has_table_privilege(:role, oid, 'SELECT')
       AND has_table_privilege(oid, 'SELECT WITH GRANT OPTION')
""").bindparams(
    sa.bindparam("action_types", MarketplaceActionType.__table__.fullname), sa.bindparam("role", type_=sa.Text)
)


def run_role() -> str | None:
    """The user of `DATABASE_URL`, if the migration has a role of its own; else None. Raises UsageError.

    Where the URL does not name it (it may come from `PGUSER`, or from a service file), the server is asked.
    """
    if not os.environ.get("MIGRATION_DATABASE_URL", "").strip() or not os.environ.get("DATABASE_URL", "").strip():
        return None
    where = conninfo()
    if role := conninfo_to_dict(where).get("user"):
        return str(role)
    with connected(create_engine(where), where) as connection:
        return str(connection.exec_driver_sql("SELECT session_user").scalar_one())


def new_grants(tables: Sequence[str], statements: Sequence[str], role: str) -> tuple[str, ...]:
    """The statements for what these statements make; what is there already is looked for: see `missing_grants`."""
    grantee = quoted(role)
    write = f"GRANT SELECT, INSERT, UPDATE, DELETE ON {', '.join(tables)} TO {grantee}"
    if any("id serial" in text or text.startswith("CREATE SEQUENCE") for text in statements):
        return (write, f"GRANT USAGE ON SEQUENCE {NEW}_id_seq TO {grantee}")
    if any(text.startswith("CREATE SCHEMA") for text in statements):
        return (f"GRANT USAGE ON SCHEMA {SHARED} TO {grantee}", write)
    return (write,)


def missing_shared_grants(connection: sa.Connection, role: str) -> list[str]:
    """The statements for what is not a tenant's."""
    return list(connection.scalars(_ACTION_TYPES, {"role": role}))


def missing_grants(connection: sa.Connection, schemas: Sequence[str], role: str | None) -> dict[str, tuple[str, ...]]:
    """The statements for what is there already; a schema that needs none is left out."""
    found: dict[str, tuple[str, ...]] = {}
    if role is not None:
        for row in connection.execute(_MISSING, {"schemas": list(schemas), "role": role}):
            found[row.schema] = (*found.get(row.schema, ()), row.statement)
    return found
