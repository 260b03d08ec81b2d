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
from migrations.shape import VERSION, read_fingerprints, read_shapes, read_versions
from migrations.tenant import Command, Outcome, look, migrate
from pipelines.resources import create_engine
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
    )


def migrate_all(engine: sa.Engine, schemas: Sequence[str], command: Command, where: str) -> Iterator[Sequence[Outcome]]:
    """The outcomes in batches: the template's, then those of the schemas with nothing to do, then the others'."""
    if schemas[0] == TEMPLATE_SCHEMA:
        yield _migrate_batch(engine, [TEMPLATE_SCHEMA], command)
        schemas = schemas[1:]
    template = _read(engine, read_shapes, [TEMPLATE_SCHEMA])[TEMPLATE_SCHEMA]
    if template.table(VERSION):
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


def _settled(engine: sa.Engine, schemas: Sequence[str], command: Command) -> list[Outcome]:
    """The schemas with nothing to do: of canonical shape, which one of each kind tells, and recorded at the head."""
    with ThreadPoolExecutor(_workers()) as pool:
        kinds: dict[str, list[str]] = {}
        for found in pool.map(partial(_read, engine, read_fingerprints), _batches(schemas, 500)):
            for schema, fingerprint in found.items():
                kinds.setdefault(fingerprint, []).append(schema)
        canonical = [
            schema for members in kinds.values() if _is_canonical(engine, members[0], command) for schema in members
        ]
        # No more than a hundred at once, so that the locks of one transaction stay few.
        versions = pool.map(partial(_read, engine, read_versions), _batches(canonical, 100))
        return [
            Outcome(schema, "already there", "canonical")
            for found in versions
            for schema, version in found.items()
            if command.is_at_head(version)
        ]


def _is_canonical(engine: sa.Engine, schema: str, command: Command) -> bool:
    shape = _read(engine, read_shapes, [schema])[schema]
    try:
        return shape.table(VERSION) is not None and not command.plan(shape, (command.head,)).statements
    except Refusal:
        return False


def _read(engine: sa.Engine, query: Callable[[sa.Connection, Sequence[str]], T], schemas: Sequence[str]) -> T:
    with engine.connect() as connection, connection.begin():
        return query(connection, schemas)


def _batches(schemas: Sequence[str], size: int) -> list[Sequence[str]]:
    return [schemas[start : start + size] for start in range(0, len(schemas), size)]


def _migrate_batch(engine: sa.Engine, schemas: Sequence[str], command: Command) -> list[Outcome]:
    with engine.connect() as connection:
        found = look(connection, schemas)
        return [migrate(connection, schema, found[schema], command, _run_alembic) for schema in schemas]


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
