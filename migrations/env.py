"""Alembic's entry: our own schema, then the template, then every tenant, each in a transaction of its own.

Each schema has its own version table, `marketplace_job_stats_version`; the application's `alembic_version` is never
touched.

Exit status: 0 all done, 3 some schemas failed or it was interrupted, 1 nothing done.
"""

import os
import re
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import psycopg
import sqlalchemy as sa
from alembic import context
from alembic.util import CommandError

from migrations import summary
from migrations.grants import missing_shared_grants, run_role
from migrations.plan import Command
from migrations.runner import Migration, connect, read_record, read_records, repeated
from migrations.shape import read_shape
from migrations.states import has_legacy_view
from migrations.tenant import Outcome
from models import SHARED
from pipelines.database import (
    connected,
    connection_reason,
    connection_remedy,
    conninfo,
    make_durable,
    server_and_database,
)
from pipelines.settings import UsageError
from pipelines.tenants import TEMPLATE_SCHEMA, find_schemas, superuser_warning

OPTIONS = {"tenant", "dry_run", "legacy_view", "archive", "report"}


def main() -> int:
    """Runs the Alembic command over the schemas; returns the exit status. Raises UsageError."""
    if context.is_offline_mode():
        raise UsageError("There is no offline mode here: use -x dry_run=yes to see the statements.")
    options, tenants = _options()
    report = _report(options.get("report"))
    name = _command_name()
    command = Command(
        name=name,
        head=str(context.get_head_revision()),
        revisions=frozenset(script.revision for script in context.script.walk_revisions()),
        role="",
        legacy_view=_yes_or_no(options, "legacy_view"),
        archive=bool(_yes_or_no(options, "archive")),
        dry_run=bool(_yes_or_no(options, "dry_run")),
        run_role=run_role(),
    )
    where = conninfo("MIGRATION_DATABASE_URL")
    engine = connect(where)
    with connected(engine, where) as connection:
        database = server_and_database(connection)
        print(f"{name.capitalize()} of {database}", flush=True)
        with connection.begin():
            schemas = _schemas(connection, tenants, database)
            if warning := superuser_warning(connection):
                print(f"Warning: {warning}.", file=sys.stderr)
        if name == "current":
            summary.print_versions(read_records(engine, schemas), command.head)
            return 0
        shared: list[Outcome] = []
        results: dict[str, Outcome] = {}
        interruption = None
        try:
            command = _of_database(command, engine, connection, schemas)
            migration = Migration(engine, command)
            with migration.signals_stop_it():
                if not tenants:
                    shared += [outcome for outcomes in migration.run([SHARED]) for outcome in outcomes]
                # The template comes first, for whoever is cloned meanwhile, but is taken back last: clones take their
                # ids from its sequences.
                first = [TEMPLATE_SCHEMA] if TEMPLATE_SCHEMA in schemas and name == "upgrade" else []
                for [outcome] in migration.run(first):
                    results[outcome.schema] = outcome
                migration.follow(_template_has_view(engine))
                # New customers are taken along; after a few rounds the rest is left to the next run.
                for _ in range(3):
                    todo = [schema for schema in schemas if schema not in (TEMPLATE_SCHEMA, *results)]
                    if not todo or migration.is_interrupted():
                        break
                    for outcome in summary.progress(migration.run(todo), len(todo)):
                        results[outcome.schema] = outcome
                    with connection.begin():
                        schemas = _schemas(connection, tenants, database)
                last = [TEMPLATE_SCHEMA] if TEMPLATE_SCHEMA in set(schemas) - set(results) else []
                for [outcome] in migration.run(last):
                    results[outcome.schema] = outcome
            if migration.is_interrupted():
                interruption = "by a signal"
            elif name == "upgrade" and command.run_role:
                repeated(partial(_grant_shared, connection, command))
            if any(outcome.status == "done" for outcome in (*shared, *results.values())) and not command.dry_run:
                make_durable(connection, name)
        except (sa.exc.DBAPIError, psycopg.Error) as error:
            remedy = connection_remedy(error)
            interruption = f"{connection_reason(error)}{f' ({remedy})' if remedy else ''}"

    outcomes = list(results.values())
    if command.dry_run:
        summary.print_dry_run([*shared, *outcomes])
    summary.print_summary(shared, outcomes, command.dry_run)
    if report:
        summary.write_report(report, database, shared, outcomes)
    if interruption:
        left = len(set(schemas) - set(results))
        print(f"Interrupted, {interruption}: {left} schemas were not reached. Repeat it to resume.", file=sys.stderr)
    failed = sum(outcome.status == "failed" for outcome in outcomes)
    if failed == len(outcomes) and not interruption:
        return 1
    return 3 if failed or interruption or any(outcome.status == "failed" for outcome in shared) else 0


def _of_database(command: Command, engine: sa.Engine, connection: sa.Connection, schemas: list[str]) -> Command:
    """The command with what only the database tells."""
    with connection.begin():
        role = connection.exec_driver_sql(
            "SELECT quote_ident(current_user), rolsuper FROM pg_roles WHERE rolname = current_user"
        ).one()
        owner = None
        if role.rolsuper:
            owner = connection.execute(
                sa.text("SELECT quote_ident(pg_get_userbyid(nspowner)) FROM pg_namespace WHERE nspname = :schema"),
                {"schema": schemas[0]},
            ).scalar()
    records = [*read_record(engine, TEMPLATE_SCHEMA), *read_record(engine, SHARED)]
    newer = next((revision for revision in records if revision not in command.revisions), None)
    return replace(command, role=role.quote_ident, shared_owner=owner, newer=newer)


def _template_has_view(engine: sa.Engine) -> bool:
    """Whether the template, migrated, has the view under the old name. One that is not migrated says nothing."""
    if not read_record(engine, TEMPLATE_SCHEMA):
        return True

    def read() -> bool:
        with engine.begin() as connection:
            return has_legacy_view(read_shape(connection, TEMPLATE_SCHEMA)[1]) is not False

    return repeated(read)


def _grant_shared(connection: sa.Connection, command: Command) -> None:
    with connection.begin():
        for statement in missing_shared_grants(connection, str(command.run_role)):
            print(f"{statement};")
            if not command.dry_run:
                connection.exec_driver_sql("SET LOCAL synchronous_commit = on")
                connection.exec_driver_sql(statement)


def _schemas(connection: sa.Connection, only: list[str], database: str) -> list[str]:
    """The template, if there is one, and the tenants; or those that were asked for. Raises UsageError if none."""
    schemas = find_schemas(connection)
    if unknown := [schema for schema in only if schema not in schemas]:
        raise UsageError(f"There is no tenant {', '.join(unknown)} in {database}.")
    if schemas in ([], [TEMPLATE_SCHEMA]):
        raise UsageError(f"No schema named user_<number> in {database}: is DATABASE_URL the right one?")
    return [schema for schema in schemas if schema in only] if only else schemas


def _command_name() -> str:
    """Alembic's command. Raises UsageError if it is none that makes sense here, or if it names no revision."""
    command = getattr(context.config.cmd_opts, "cmd", None)
    name = str(command[0].__name__) if command else "this"
    if name not in ("upgrade", "downgrade", "current"):
        raise UsageError(f"{name} is not for many schemas: use upgrade, downgrade, current, history or heads.")
    # Schemas that are at the head already would not ask for it.
    revision = getattr(context.config.cmd_opts, "revision", None)
    if revision and revision != "base" and not re.search(r"[+-]\d+$", revision):
        try:
            context.script.get_revisions(revision)
        except CommandError as error:
            raise UsageError(f"{error}: use head, base, +1, -1 or one that `alembic history` shows.") from None
    return name


def _options() -> tuple[dict[str, str], list[str]]:
    """What -x gives: the options, and the tenants, which may be several. Raises UsageError."""
    options: dict[str, str] = {}
    tenants: list[str] = []
    for given in context.get_x_argument():
        name, _, value = given.partition("=")
        if name not in OPTIONS:
            raise UsageError(f"-x {name} is not known: use one of {', '.join(sorted(OPTIONS))}.")
        if name == "tenant":
            tenants.append(value)
        elif name in options:
            raise UsageError(f"-x {name} is given twice: {options[name]} and {value}.")
        else:
            options[name] = value
    return options, tenants


def _yes_or_no(options: dict[str, str], name: str) -> bool | None:
    if name not in options:
        return None
    if options[name] not in ("yes", "no"):
        raise UsageError(f"-x {name}={options[name]} is not allowed: say yes or no.")
    return options[name] == "yes"


def _report(given: str | None) -> Path | None:
    """The file of the report. Raises UsageError if it cannot be written, which is better known before the work."""
    if not given:
        return None
    path = Path(given)
    if not path.absolute().parent.is_dir():
        raise UsageError(f"-x report={path}: there is no folder {path.parent}.")
    if path.is_dir() or not os.access(path if path.exists() else path.absolute().parent, os.W_OK):
        raise UsageError(f"-x report={path}: it is a folder, or may not be written: name a file.")
    return path


try:
    status = main()
except UsageError as error:
    print(f"Error: {error.message}", file=sys.stderr)
    status = 1
if status:
    sys.exit(status)
