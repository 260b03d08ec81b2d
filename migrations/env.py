"""Alembic's entry: the template first, then every tenant, each in a transaction of its own.

Each schema has its own version table, `marketplace_job_stats_version`; the application's `alembic_version` is never
touched. One tenant's failure is reported and stops no other.

Exit status: 0 all done, 3 some tenants failed, 1 nothing done.
"""

import sys

import sqlalchemy as sa
from alembic import context

from migrations.converge import Refusal
from migrations.shape import VERSION, Shape, read_shapes
from pipelines.resources import connected, conninfo, create_engine, server_and_database
from pipelines.settings import UsageError
from pipelines.tenants import TEMPLATE_SCHEMA, find_schemas


def main() -> int:
    """Runs the Alembic command over the schemas; returns the exit status."""
    where = conninfo("MIGRATION_DATABASE_URL")
    engine = create_engine(where, lock_timeout=10_000, statement_timeout=600_000)
    only = context.get_x_argument(as_dictionary=True).get("tenant")
    try:
        with connected(engine, where) as connection:
            print(f"Migrating {server_and_database(connection)}")
            with connection.begin():
                schemas = _schemas(connection, str(only) if only else None)
                shapes = read_shapes(connection, schemas)
            failures = [error for shape in shapes.values() if (error := _migrate(connection, shape))]
    finally:
        engine.dispose()
    for failure in failures:
        print(failure, file=sys.stderr)
    print(f"{len(schemas) - len(failures)} of {len(schemas)} schemas done, {len(failures)} failed")
    return 0 if not failures else 1 if len(failures) == len(schemas) else 3


def _schemas(connection: sa.Connection, only: str | None) -> list[str]:
    """The template, if there is one, and the tenants; or the one that was asked for. Raises UsageError if none."""
    schemas = find_schemas(connection)
    if only:
        if only not in schemas:
            raise UsageError(f"There is no tenant {only} in {server_and_database(connection)}.")
        return [only]
    if schemas in ([], [TEMPLATE_SCHEMA]):
        raise UsageError(
            f"No schema named user_<number> in {server_and_database(connection)}: is DATABASE_URL the right one?"
        )
    return schemas


def _migrate(connection: sa.Connection, shape: Shape) -> str | None:
    """Runs the command on one schema, in one transaction; returns what went wrong."""
    try:
        with connection.begin():
            context.configure(
                connection=connection,
                version_table=VERSION,
                version_table_schema=shape.schema,
                transactional_ddl=True,
            )
            context.run_migrations(shape=shape)
    except Refusal as refusal:
        return f"{shape.schema}: {refusal}"
    except sa.exc.DBAPIError as error:
        sqlstate = getattr(error.orig, "sqlstate", None)
        return f"{shape.schema}: {str(error.orig).splitlines()[0]} (SQLSTATE {sqlstate})"
    return None


try:
    status = main()
except UsageError as error:
    print(f"Error: {error.message}", file=sys.stderr)
    status = 1
if status:
    sys.exit(status)
