"""One schema: what the Alembic command means for it, its transaction, retries where they help, and how it ended."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import sqlalchemy as sa
from alembic.util import CommandError

from migrations import canonical, converge
from migrations.converge import Plan, Refusal
from migrations.grants import missing_grants, new_grants
from migrations.shape import NEW, OLD, VERSION, Shape, read_shapes, read_versions
from models import SHARED
from pipelines.database import ATTEMPTS, may_pass, pause_s
from pipelines.tenants import quoted

REMEDIES = {
    "22003": "a number does not fit: correct the row that the message names",
    "23502": "a row has no action or no date: complete or delete it",
    "23505": "two rows have the same id: give one of them another",
    "2BP01": "something of yours depends on it: drop that, or move it to the new table, then run this tenant again",
    "42501": "run the migration as the owner of the tables: set MIGRATION_DATABASE_URL",
    "55P03": "another session keeps a lock: end it, or wait, then run this tenant again",
    "57014": "it took longer than STATS_STATEMENT_TIMEOUT_MS: raise it, then run this tenant again",
}
CONSTRAINT_REMEDIES = {
    canonical.CHECK: "rows have a marketplace that is not known: correct or delete them, then run this tenant again",
    canonical.LOSSLESS: "eBay or Etsy rows would be lost: repeat with -x archive=yes to put them away",
}


Found = tuple[Shape, tuple[str, ...] | None]
RunAlembic = Callable[[sa.Connection, Plan], None]


@dataclass(frozen=True)
class Outcome:
    """How it ended for one schema."""

    schema: str
    status: str  # done, already there, skipped or failed
    state: str = ""
    error: str | None = None
    sqlstate: str | None = None
    remedy: str | None = None
    unknown_revision: str | None = None
    statements: tuple[str, ...] = ()  # Of a dry run.


@dataclass(frozen=True)
class Command:
    """What is to be done to every schema."""

    name: str  # Alembic's: upgrade or downgrade.
    head: str
    revisions: frozenset[str]
    # As the operator said; None: a migrated tenant keeps what it has, and a new one gets what the template has.
    legacy_view: bool | None
    archive: bool
    dry_run: bool
    run_role: str | None = None  # What is granted to, if the migration has a role of its own.
    template_has_view: bool = True

    def is_at_head(self, version: Sequence[str] | None) -> bool:
        return version is not None and tuple(version) == (self.head,)

    def plan(self, shape: Shape, version: Sequence[str] | None) -> Plan:
        """What this command means for a tenant of this shape and record. Raises Refusal."""
        if shape.schema == SHARED:
            return converge.upgrade_shared(shape) if self.name == "upgrade" else converge.downgrade_shared(shape)
        if self.name == "downgrade":
            return converge.downgrade(shape, self.archive) if version else Plan(shape.schema, "not migrated", ())
        if self.legacy_view is not None:
            legacy_view = self.legacy_view
        elif self.is_at_head(version):
            legacy_view = converge.has_legacy_view(shape)
        else:
            legacy_view = self.template_has_view
        return converge.upgrade(shape, legacy_view)


def look(connection: sa.Connection, schemas: Sequence[str]) -> dict[str, Found]:
    """The shape of each schema, and its version record: None if there is no table for it."""
    with connection.begin():
        shapes = read_shapes(connection, schemas)
        versions = read_versions(connection, [schema for schema in schemas if shapes[schema].table(VERSION)])
    return {schema: (shapes[schema], versions.get(schema)) for schema in schemas}


def migrate(
    connection: sa.Connection, schema: str, found: Found | None, command: Command, run_alembic: RunAlembic
) -> Outcome:
    """Runs the command on one schema, as it was `found`, if it could be looked at. Every error becomes its outcome.

    What may pass is tried again; any other error only if the schema has changed since it was looked at.
    """
    before, is_passing, outcome = None, True, Outcome(schema, "failed")
    for attempt in range(ATTEMPTS):
        try:
            if attempt > 0:
                time.sleep(pause_s(attempt))
            if found is None:
                if not _exists(connection, schema):
                    return Outcome(schema, "skipped", "gone", "the schema was dropped while the migration went on")
                found = look(connection, [schema])[schema]
                if found == before and not is_passing:
                    break
            return _migrate(connection, *found, command, run_alembic)
        except Refusal as refusal:
            error, _, remedy = str(refusal).partition(": ")
            return Outcome(schema, "failed", _state(found), error, remedy=remedy)
        except CommandError as error:
            # Another migrator has written the version record first.
            is_passing, outcome = True, Outcome(schema, "failed", _state(found), str(error), remedy="run it again")
        except sa.exc.DBAPIError as error:
            is_passing, outcome = may_pass(error), failed(schema, found, error)
        before, found = found, None
    return outcome


def _exists(connection: sa.Connection, schema: str) -> bool:
    with connection.begin():
        query = sa.text("SELECT 1 FROM pg_namespace WHERE nspname = :schema")
        return connection.scalar(query, {"schema": schema}) is not None


def _migrate(
    connection: sa.Connection,
    shape: Shape,
    version: tuple[str, ...] | None,
    command: Command,
    run_alembic: RunAlembic,
) -> Outcome:
    plan = command.plan(shape, version)
    unknown = ", ".join(sorted(set(version or ()) - command.revisions)) or None
    if unknown and (command.name == "downgrade" or plan.statements):
        raise Refusal(
            f"the version record names revision {unknown}, which nobody has, and the tables are not those of "
            f"{command.head}: bring back the migration that knows it, or delete the record to converge what is there"
        )
    is_repair = command.name == "upgrade" and command.is_at_head(version)
    if command.name == "upgrade" and command.run_role:
        with connection.begin():
            missing = missing_grants(connection, [shape.schema], command.run_role).get(shape.schema, ())
        plan = replace(plan, statements=(*plan.statements, *new_grants(plan, command.run_role), *missing))
    if (is_repair or command.name == "downgrade") and not plan.statements:
        return Outcome(shape.schema, "already there", plan.state)
    # The old name first: it may be the view, which its readers lock before the table behind it.
    tables = [f"{quoted(shape.schema)}.{name}" for name in (OLD, NEW) if name in shape.relations]
    first = (f"LOCK TABLE {', '.join(tables)} IN ACCESS EXCLUSIVE MODE",) if tables else ()
    if plan.schema == SHARED and not _exists(connection, SHARED):
        first = (f"CREATE SCHEMA {SHARED}",)
    if command.dry_run:
        statements = (*first, *plan.statements)
        return Outcome(shape.schema, "done", plan.state, unknown_revision=unknown, statements=statements)
    with connection.begin():
        for statement in first:
            connection.exec_driver_sql(statement)
        if unknown:
            connection.exec_driver_sql(f"DELETE FROM {quoted(shape.schema)}.{VERSION}")
        if is_repair:
            plan.execute(connection)
        else:
            run_alembic(connection, plan)
    return Outcome(shape.schema, "done", plan.state, unknown_revision=unknown)


def _state(found: Found | None) -> str:
    """The state of a tenant that failed."""
    if found is None:
        return "could not be read"
    if found[0].schema == SHARED:
        return "our own schema"
    tables = [name for name in (OLD, NEW) if found[0].table(name)]
    return f"with {' and '.join(tables)}" if tables else "with neither table"


def failed(schema: str, found: Found | None, error: sa.exc.DBAPIError) -> Outcome:
    """The outcome of an error of the database: its first line, the SQLSTATE, and what to do."""
    sqlstate = getattr(error.orig, "sqlstate", None)
    diagnosis = getattr(error.orig, "diag", None)
    constraint = getattr(diagnosis, "constraint_name", None) or ""
    message = (str(error.orig).splitlines() or ["the connection was lost"])[0]
    remedy = CONSTRAINT_REMEDIES.get(constraint) or REMEDIES.get(sqlstate or "")
    remedy = remedy or "mend what the message says, then run this tenant again"
    return Outcome(schema, "failed", _state(found), message, sqlstate, remedy)
