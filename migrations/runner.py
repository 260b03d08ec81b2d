"""All schemas: which have nothing to do, and the others in a few processes at once.

Schemas that are canonical and recorded as such are found in a few catalog queries, without a transaction of their own.
"""

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import TypeVar

import sqlalchemy as sa
from alembic import context

from migrations.converge import Plan, Refusal, has_legacy_view
from migrations.grants import missing_grants
from migrations.shape import VERSION, read_fingerprints, read_shapes, read_versions
from migrations.tenant import Command, Found, Outcome, failed, look, migrate
from models import SHARED
from pipelines.database import create_engine
from pipelines.settings import Settings
from pipelines.tenants import TEMPLATE_SCHEMA

T = TypeVar("T")

BATCH = 25
"""How many schemas are looked at in one query, and given to a worker at once."""


def connect(where: str) -> sa.Engine:
    """An engine for the migration: its statements are short, or fail."""
    settings = Settings.from_env()
    return create_engine(
        where,
        pool_size=settings.workers + 1,
        lock_timeout=settings.lock_timeout_ms,
        statement_timeout=settings.statement_timeout_ms,
        jit="off",
        row_security="off",  # A policy that hides rows is an error here: a row that is not seen would be lost.
        idle_session_timeout=0,  # The first connection waits for the others: see make_durable.
        synchronous_commit="off",  # One commit at the end waits for the disk: see make_durable.
    )


def migrate_all(engine: sa.Engine, schemas: Sequence[str], command: Command, where: str) -> Iterator[Sequence[Outcome]]:
    """The outcomes in batches: the template's, then those of the schemas with nothing to do, then the others'."""
    if schemas[0] == TEMPLATE_SCHEMA:
        yield _migrate_batch(engine, [TEMPLATE_SCHEMA], command)
        schemas = schemas[1:]
    template, version = _read(engine, look, [TEMPLATE_SCHEMA]).get(TEMPLATE_SCHEMA, (None, None))
    if template and version:  # An unmigrated template says nothing.
        command = replace(command, template_has_view=has_legacy_view(template))

    settled = _settled(engine, schemas, command) if command.name == "upgrade" else []
    yield settled
    names = {outcome.schema for outcome in settled}
    batches = _batches([schema for schema in schemas if schema not in names], BATCH)
    if len(batches) <= 1:
        yield from (_migrate_batch(engine, batch, command) for batch in batches)
        return
    # Forked, because Alembic's context is one per process, and the child needs this one, just as it is. The parent's
    # connections stay the parent's.
    fork = multiprocessing.get_context("fork")
    workers = min(_workers(), len(batches))
    with ProcessPoolExecutor(workers, fork, initializer=_start_worker, initargs=(command, where)) as pool:
        yield from pool.map(_work, batches)


def migrate_shared(engine: sa.Engine, command: Command) -> Outcome:
    """The outcome of our own schema, which is about all tenants."""
    [outcome] = _migrate_batch(engine, [SHARED], command)
    return outcome


def read_all_versions(engine: sa.Engine, schemas: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """The version record of each schema; an empty one if there is none."""
    found: dict[str, tuple[str, ...]] = dict.fromkeys(schemas, ())
    for batch in _batches(schemas, 100):
        with engine.connect() as connection:
            found |= {schema: version or () for schema, (_, version) in look(connection, batch).items()}
    return found


def _settled(engine: sa.Engine, schemas: Sequence[str], command: Command) -> list[Outcome]:
    """The schemas with nothing to do: of canonical shape, which one of each kind tells, and recorded at the head."""
    with ThreadPoolExecutor(_workers()) as pool:

        def read(query: Callable[[sa.Connection, Sequence[str]], dict[str, T]], schemas: Sequence[str]) -> dict[str, T]:
            found = pool.map(partial(_read, engine, query), _batches(schemas, 100))
            return {schema: value for batch in found for schema, value in batch.items()}

        kinds: dict[str, list[str]] = {}
        for schema, fingerprint in read(read_fingerprints, schemas).items():
            kinds.setdefault(fingerprint, []).append(schema)
        good = [members for members in kinds.values() if _is_canonical(engine, members[0], command)]
        versions = read(read_versions, [schema for members in good for schema in members])
        at_head = [schema for schema, version in versions.items() if command.is_at_head(version)]
        lacking = read(partial(missing_grants, role=command.run_role), at_head) if command.run_role else {}
    return [Outcome(schema, "already there", "canonical") for schema in at_head if schema not in lacking]


def _is_canonical(engine: sa.Engine, schema: str, command: Command) -> bool:
    shape = _read(engine, read_shapes, [schema]).get(schema)
    try:
        return (
            shape is not None
            and shape.table(VERSION) is not None
            and not command.plan(shape, (command.head,)).statements
        )
    except Refusal:
        return False


def _read(
    engine: sa.Engine, query: Callable[[sa.Connection, Sequence[str]], dict[str, T]], schemas: Sequence[str]
) -> dict[str, T]:
    """What the query finds, in a transaction of its own; nothing if it fails: then each schema is looked at by itself.

    Reading the catalog waits for the locks of other sessions, and a view's definition keeps a lock to the end of the
    transaction; so it may fail, and it may not be asked for too many schemas at once.
    """
    try:
        with engine.connect() as connection:
            return query(connection, schemas)
    except sa.exc.DBAPIError:
        return {}


def _batches(schemas: Sequence[str], size: int) -> list[Sequence[str]]:
    return [schemas[start : start + size] for start in range(0, len(schemas), size)]


def _migrate_batch(engine: sa.Engine, schemas: Sequence[str], command: Command) -> list[Outcome]:
    try:
        connection = engine.connect()
    except sa.exc.OperationalError as error:
        return [failed(schema, None, error) for schema in schemas]
    with connection:
        try:
            found: dict[str, Found] = look(connection, schemas)
        except sa.exc.DBAPIError:
            found = {}
        return [migrate(connection, schema, found.get(schema), command, _run_alembic) for schema in schemas]


def _run_alembic(connection: sa.Connection, plan: Plan) -> None:
    """The Alembic command on one schema, in the transaction that the connection is in."""
    context.configure(
        connection=connection, version_table=VERSION, version_table_schema=plan.schema, transactional_ddl=True
    )
    context.run_migrations(plan=plan)


# What a worker process works with.
_worker: tuple[sa.Engine, Command]


def _start_worker(command: Command, where: str) -> None:
    global _worker
    _worker = (connect(where), command)


def _work(schemas: Sequence[str]) -> list[Outcome]:
    return _migrate_batch(_worker[0], schemas, _worker[1])


def _workers() -> int:
    return Settings.from_env().workers
