"""Alembic's entry: the template first, then every tenant, each in a transaction of its own, several at once.

Each schema has its own version table, `marketplace_job_stats_version`; the application's `alembic_version` is never
touched.

Exit status: 0 all done, 3 some schemas failed, 1 nothing done.
"""

import sys
from concurrent.futures import BrokenExecutor
from pathlib import Path

import sqlalchemy as sa
from alembic import context

from migrations import summary
from migrations.grants import missing_shared_grants, run_role
from migrations.runner import connect, migrate_all, migrate_shared, read_all_versions
from migrations.tenant import Command, Outcome
from pipelines.database import connected, conninfo, make_durable, server_and_database
from pipelines.settings import UsageError
from pipelines.tenants import TEMPLATE_SCHEMA, find_schemas

OPTIONS = {"tenant", "dry_run", "legacy_view", "archive", "report"}


def main() -> int:
    """Runs the Alembic command over the schemas; returns the exit status. Raises UsageError."""
    if context.is_offline_mode():
        raise UsageError("There is no offline mode here: use -x dry_run=yes to see the statements.")
    options = {str(name): str(value) for name, value in context.get_x_argument(as_dictionary=True).items()}
    if unknown := sorted(options.keys() - OPTIONS):
        raise UsageError(f"-x {unknown[0]} is not known: use one of {', '.join(sorted(OPTIONS))}.")
    report = Path(options["report"]) if options.get("report") else None
    if report and not report.absolute().parent.is_dir():
        raise UsageError(f"-x report={report}: there is no folder {report.parent}.")
    name = _command_name()
    command = Command(
        name=name,
        head=str(context.get_head_revision()),
        revisions=frozenset(script.revision for script in context.script.walk_revisions()),
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
        if name == "current":
            with connection.begin():
                schemas = _schemas(connection, options.get("tenant"), database)
            summary.print_versions(read_all_versions(engine, schemas), command.head)
            return 0
        outcomes: dict[str, Outcome] = {}
        shared: list[Outcome] = []
        interrupted = False
        try:
            with connection.begin():
                schemas = _schemas(connection, options.get("tenant"), database)
            if "tenant" not in options:
                shared.append(migrate_shared(engine, command))
            # New customers are taken along; after a few rounds the rest is left to the next run.
            for _ in range(3):
                for outcome in summary.progress(migrate_all(engine, schemas, command, where), len(schemas)):
                    outcomes[outcome.schema] = outcome
                with connection.begin():
                    found = _schemas(connection, options.get("tenant"), database)
                if not (schemas := [schema for schema in found if schema not in outcomes]):
                    break
            if name == "upgrade" and command.run_role:
                with connection.begin():
                    for statement in missing_shared_grants(connection, command.run_role):
                        print(f"{statement};")
                        if not command.dry_run:
                            connection.exec_driver_sql("SET LOCAL synchronous_commit = on")
                            connection.exec_driver_sql(statement)
            if any(outcome.status == "done" for outcome in (*shared, *outcomes.values())) and not command.dry_run:
                make_durable(connection, name)
        except (sa.exc.DBAPIError, BrokenExecutor) as error:
            interrupted = True
            reason = str(getattr(error, "orig", error)).splitlines()[0]
            print(f"Interrupted: {reason}. Give the same command again to resume.", file=sys.stderr)

    results = list(outcomes.values())
    if command.dry_run:
        summary.print_dry_run([*shared, *results])
    summary.print_summary(shared, results, command.dry_run)
    if report:
        summary.write_report(report, database, shared, results)
    failed = sum(outcome.status == "failed" for outcome in results)
    if failed == len(results):
        return 1
    return 3 if failed or interrupted or any(outcome.status == "failed" for outcome in shared) else 0


def _schemas(connection: sa.Connection, only: str | None, database: str) -> list[str]:
    """The template, if there is one, and the tenants; or the one that was asked for. Raises UsageError if none."""
    schemas = find_schemas(connection)
    if only is not None:
        if only not in schemas:
            raise UsageError(f"There is no tenant {only} in {database}.")
        return [only]
    if schemas in ([], [TEMPLATE_SCHEMA]):
        raise UsageError(f"No schema named user_<number> in {database}: is DATABASE_URL the right one?")
    return schemas


def _command_name() -> str:
    """Alembic's command. Raises UsageError if it is none that makes sense here."""
    command = getattr(context.config.cmd_opts, "cmd", None)
    name = str(command[0].__name__) if command else "this"
    revision = getattr(context.config.cmd_opts, "revision", None)
    if (name, revision) not in (("upgrade", "head"), ("downgrade", "base"), ("current", None)):
        raise UsageError(f"{name} is not for many schemas: use upgrade head, downgrade base, or current.")
    return name


def _yes_or_no(options: dict[str, str], name: str) -> bool | None:
    if name not in options:
        return None
    if options[name] not in ("yes", "no"):
        raise UsageError(f"-x {name}={options[name]} is not allowed: say yes or no.")
    return options[name] == "yes"


try:
    status = main()
except UsageError as error:
    print(f"Error: {error.message}", file=sys.stderr)
    status = 1
if status:
    sys.exit(status)
