"""One schema: its transaction, and how it ended.

The lock comes first, under a short time-out; what is planned was planned for the shape that is read under it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import psycopg
import sqlalchemy as sa
from psycopg import sql

from migrations import first
from migrations.converge import Refusal
from migrations.grants import missing_grants
from migrations.plan import Command, Plan, Plans
from migrations.rows import catch_up
from migrations.shape import FACTS_ARE_LOST, NEW, OLD, Found, Shape, read_found, read_shape, record_of, stamps_of
from models import SHARED
from pipelines.database import SERVER_REMEDIES, connection_reason, may_pass
from pipelines.tenants import quoted

_LOST = "something is missing that a revision before has made: repair it with the release whose newest one that is"

REMEDIES = {
    "0A000": "something of yours depends on it: drop that, and make it again afterwards, then run this tenant again",
    "22003": "a number does not fit: correct the row that the message names",
    "2200H": "the ids have used up their sequence: make the column id a bigint, and give the sequence NO MAXVALUE",
    "23502": "a row has no action or no date: complete or delete it",
    "23505": "two rows have the same id: give one of them another",
    "2BP01": "something of yours depends on it: drop that, or move it to the new table, then run this tenant again",
    "42501": "run the migration as the owner of the tables: set MIGRATION_DATABASE_URL",
    "42701": "a revision adds it, and it is there already: if it is yours, rename it, then run this tenant again",
    "42703": _LOST,
    "42704": _LOST,
    "42P01": _LOST,
    "42P07": "a revision makes it, and it is there already: if it is yours, rename it, then run this tenant again",
    "55P03": "another session keeps a lock: end it, or wait, then run this tenant again",
    "57014": "it took longer than STATS_STATEMENT_TIMEOUT_MS: raise it, then run this tenant again",
    "P0004": "look for a trigger or a rule on these tables that changes what is written, disable it, and run it again",
}
CONSTRAINT_REMEDIES = {
    first.CHECK: "rows have a marketplace that is not known: correct or delete them, then run this tenant again",
    FACTS_ARE_LOST: "they cannot be computed again: repeat with -x archive=yes to put them away",
    first.LOSSLESS: "eBay or Etsy rows would be lost: repeat with -x archive=yes to put them away",
}


@dataclass(frozen=True)
class Outcome:
    """How it ended for one schema."""

    schema: str
    status: str  # done, repaired (the way back follows), already there, skipped or failed
    state: str = ""
    error: str | None = None
    sqlstate: str | None = None
    remedy: str | None = None
    statements: tuple[str, ...] = ()  # Of a dry run.
    may_pass: bool = False  # It failed for a reason that may be gone in a moment.


@dataclass(frozen=True)
class Limits:
    """How long the locks of a schema are waited for, and each statement under them."""

    lock_ms: int
    statement_ms: int


class _Changed(Exception):
    """The schema has changed since it was looked at."""


class _Locked(Exception):
    """Another session keeps one of its tables locked."""


def look(
    connection: sa.Connection, schemas: Sequence[str], run_role: str | None
) -> dict[str, tuple[Found, Sequence[str]]]:
    """What is found in each schema, and the grants that the run's role lacks; nothing for one that is not there."""
    with connection.begin():
        found = read_found(connection, schemas)
        missing = missing_grants(connection, schemas, run_role)
    return {schema: (each, missing.get(schema, ())) for schema, each in found.items()}


def migrate(
    connection: sa.Connection,
    schema: str,
    command: Command,
    plans: Plans,
    limits: Limits,
    looked: tuple[Found, Sequence[str]] | None,
    is_done: bool,
) -> Outcome:
    """Runs the command on one schema, once; `is_done`: only what is missing after it. Every error becomes its outcome.

    `looked`: what `look` found, if it was possible to look.
    """
    shape: Shape | None = None
    try:
        if looked is None:
            looked = look(connection, [schema], command.run_role).get(schema)
        if looked is None and schema != SHARED:
            return Outcome(schema, "skipped", "gone", "the schema was dropped while the migration went on")
        found, missing = looked or (Found(None, ""), ())
        if found.is_locked:
            raise _Locked
        plan = plans.known(found.kind, schema == SHARED, is_done)
        if plan is None:
            with connection.begin():
                fingerprint, shape = read_shape(connection, schema)
            if found.is_foreign:
                raise Refusal(": ".join(_foreign(shape, command.role)))
            if shape.is_locked:
                raise _Locked
            if fingerprint != found.fingerprint:
                raise _Changed
            plan = plans.make(found.kind, found.record or (), shape, schema == SHARED, is_done)
        if not plan.statements and not missing and not found.lagging_sequence:
            return Outcome(schema, "already there", plan.state)
        if command.dry_run:
            statements = (*_lock(schema, plan), *_work(schema, plan, found, missing))
            if plan.is_repair:
                statements += ("-- Then the way back, which is planned for what is there after this",)
            return Outcome(schema, "done", plan.state, statements=statements)
        plan = _apply(connection, schema, plan, found, missing, plans, limits, is_done)
        return Outcome(schema, "repaired" if plan.is_repair else "done", plan.state)
    except Refusal as refusal:
        error, _, remedy = str(refusal).partition(": ")
        return Outcome(schema, "failed", _state(schema, shape), error, remedy=remedy)
    except _Changed:
        return Outcome(schema, "failed", error="it changed all the while", remedy="run it again", may_pass=True)
    except _Locked:
        return Outcome(schema, "failed", "not reached", "a table is locked", "55P03", REMEDIES["55P03"], may_pass=True)
    except (sa.exc.DBAPIError, psycopg.Error) as error:
        if shape is None:
            shape = _shape(connection, schema)
        outcome = _failed(schema, shape, error, command.role)
        return replace(outcome, may_pass=may_pass(error) or is_race(error))
    except Exception as error:  # Of a revision, for instance: it must not cost the others.
        return Outcome(schema, "failed", _state(schema, shape), str(error), remedy="correct the revision, if it is one")


def _apply(
    connection: sa.Connection,
    schema: str,
    plan: Plan,
    found: Found,
    missing: Sequence[str],
    plans: Plans,
    limits: Limits,
    is_done: bool,
) -> Plan:
    """The transaction; returns the plan that was carried out. Raises Refusal, _Changed and errors of the driver."""
    driver: Any = connection.connection.driver_connection
    with connection.begin():
        # Each lock has its own time-out, and the first ones are held meanwhile: the statement as a whole has one, too.
        times = f"SET LOCAL lock_timeout = {limits.lock_ms}; SET LOCAL statement_timeout = {limits.lock_ms}"
        then = f"SET LOCAL statement_timeout = {limits.statement_ms}"
        try:
            driver.execute("; ".join((times, *_lock(schema, plan), then)), prepare=False)
        except psycopg.errors.QueryCanceled:
            raise _Locked from None
        except psycopg.errors.UndefinedTable:
            raise _Changed from None
        if not _is_as_found(driver, schema, found):  # It has changed while the lock was waited for.
            now = read_found(connection, [schema], sequences=False).get(schema, Found(None, ""))
            fingerprint, shape = read_shape(connection, schema)
            if fingerprint != now.fingerprint:
                raise _Changed
            again = plans.make(now.kind, now.record or (), shape, schema == SHARED, is_done)
            if again.locks != plan.locks:
                raise _Changed
            plan = again
        driver.execute(";\n".join(_work(schema, plan, found, missing)), prepare=False)
    return plan


def _is_as_found(driver: Any, schema: str, found: Found) -> bool:
    """Whether the shape and the record are what they were when they were read."""
    stamp = driver.execute(*stamps_of([schema]), prepare=True).fetchone()
    if (stamp[1] if stamp else "") != found.stamp:
        return False
    return found.record is None or driver.execute(record_of(schema)).fetchone()[0] == [*found.record]


def is_race(error: sa.exc.DBAPIError | psycopg.Error) -> bool:
    """Whether another session has made or dropped the same thing meanwhile."""
    original = getattr(error, "orig", error)
    sqlstate = getattr(original, "sqlstate", None)
    is_catalog = getattr(getattr(original, "diag", None), "schema_name", None) == "pg_catalog"
    return sqlstate in ("42P06", "3F000") or (sqlstate == "23505" and is_catalog)


def _lock(schema: str, plan: Plan) -> tuple[str, ...]:
    tables = ", ".join(f"{quoted(schema)}.{quoted(name)}" for name in plan.locks)
    return (f"LOCK TABLE {tables} IN ACCESS EXCLUSIVE MODE",) if tables else ()


def _work(schema: str, plan: Plan, found: Found, missing: Sequence[str]) -> Sequence[str]:
    """The statements under the lock. Only this schema and pg_catalog are looked in for names."""
    statements: list[str] = []
    if found.lagging_sequence:
        sequence = sql.Literal(found.lagging_sequence).as_string()
        statements += catch_up(sequence, f"{quoted(schema)}.{NEW}")
    return [*statements, f"SET LOCAL search_path = {quoted(schema)}", *plan.statements, *missing]


def _shape(connection: sa.Connection, schema: str) -> Shape | None:
    """For the message; none if it cannot be had."""
    try:
        with connection.begin():
            return read_shape(connection, schema)[1]
    except (sa.exc.DBAPIError, psycopg.Error):
        return None


def _state(schema: str, shape: Shape | None) -> str:
    """The state of a schema that failed."""
    if schema == SHARED:
        return "our own schema"
    if shape is None:
        return "could not be read"
    tables = [name for name in (OLD, NEW) if shape.table(name)]
    return f"with {' and '.join(tables)}" if tables else "with neither table"


def _foreign(shape: Shape, role: str) -> tuple[str, str]:
    """What is wrong and what to do where tables of ours belong to another role than the one that migrates."""
    table = shape.table(NEW) or shape.table(OLD)
    if not shape.owner:
        return "our own schema is not there", f"GRANT CREATE ON DATABASE ... TO {role}, or run it once as a superuser"
    others = {name: relation.owner for name, relation in shape.relations.items() if relation.owner != role}
    if not others and shape.owner != role:
        return f"the schema belongs to {shape.owner}", f"GRANT ALL ON SCHEMA ... TO {role}"
    names = ", ".join(f"{name} belongs to {owner}" for name, owner in others.items()) or "a privilege is missing"
    if not others or (table and table.owner != role):
        owner = table.owner if table else "the owner of the schema"
        return f"{names}, and not to {role}", f"run the migration as {owner}, in MIGRATION_DATABASE_URL"
    return (
        f"{names}, and not to {role}",
        f"run the migration once as that role or as a superuser, which gives all to {role}, or say "
        f"ALTER TABLE ... OWNER TO {role}",
    )


def _failed(schema: str, shape: Shape | None, error: sa.exc.DBAPIError | psycopg.Error, role: str) -> Outcome:
    """The outcome of an error of the database: its first line, the detail, the SQLSTATE, and what to do."""
    original = getattr(error, "orig", error)
    sqlstate = getattr(original, "sqlstate", None)
    diagnosis = getattr(original, "diag", None)
    constraint = getattr(diagnosis, "constraint_name", None) or ""
    message = connection_reason(error)
    if detail := getattr(diagnosis, "message_detail", None):  # For instance what depends on it.
        message += f" ({'; '.join(detail.splitlines()[:3])})"
    remedy = CONSTRAINT_REMEDIES.get(constraint) or (SERVER_REMEDIES | REMEDIES).get(sqlstate or "")
    if sqlstate == "42501" and "tablespace" in message.lower():
        remedy = "default_tablespace is one that this role must not use: ALTER ROLE ... RESET default_tablespace"
    elif sqlstate == "42501" and shape:
        whose, remedy = _foreign(shape, role)
        message += f"; {whose}"
    remedy = remedy or "correct what the message says, then run it again"
    return Outcome(schema, "failed", _state(schema, shape), message, sqlstate, remedy)
