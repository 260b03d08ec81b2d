"""All schemas: several at once, those that are locked at the end, and what to do when a signal comes."""

import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TypeVar

import psycopg
import sqlalchemy as sa

from migrations.plan import Command, Plans
from migrations.shape import SESSION, VERSION, Found, read_found
from migrations.tenant import Limits, Outcome, is_race, look, migrate
from pipelines.database import Working, create_engine, may_pass
from pipelines.settings import Settings, UsageError

T = TypeVar("T")

BATCH = 50
"""How many schemas are looked at in one query, and given to a worker at once."""

TRIES_MS = (50, 100, 200, 400, 500)
"""How long a lock is waited for, in each round; whoever comes after it waits as well."""

_MOST_STEPS = 4
"""How often a schema is changed at most until it is as it should be: repaired, by revisions, and by what is still
missing; and looked at."""


def connect(where: str) -> sa.Engine:
    """An engine for the migration: its statements are short, or fail."""
    settings = Settings.from_env()
    return create_engine(
        where,
        pool_size=settings.workers + 1,
        lock_timeout=min(TRIES_MS[-1], settings.lock_timeout_ms),
        statement_timeout=settings.statement_timeout_ms,
        jit="off",
        row_security="off",  # A policy that hides rows is an error here: a row that is not seen would be lost.
        idle_session_timeout=0,  # The first connection waits for the others: see make_durable.
        synchronous_commit="off",  # One commit at the end waits for the disk: see make_durable.
        **SESSION,
    )


class Migration:
    """A command over all schemas of a database."""

    def __init__(self, engine: sa.Engine, command: Command) -> None:
        self._engine, self._command = engine, command
        self._settings = Settings.from_env()
        self._plans = Plans(command)
        self._working = Working()

    def follow(self, template_has_view: bool) -> None:
        """Tenants get the view under the old name if the template has it."""
        self._command = replace(self._command, template_has_view=template_has_view)
        self._plans = Plans(self._command)

    def is_interrupted(self) -> bool:
        return self._working.stopped.is_set()

    @contextmanager
    def signals_stop_it(self) -> Iterator[None]:
        """SIGTERM and Ctrl-C let nothing begin any more and cancel what is under way; a second one is as usual."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        usual = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

        def stop(number: int, _: object) -> None:
            self._working.stopped.set()
            signal.signal(number, usual[signal.Signals(number)])

        for number in usual:
            signal.signal(number, stop)
        try:
            yield
        finally:
            for number, handler in usual.items():
                signal.signal(number, handler)

    def run(self, schemas: Sequence[str]) -> Iterator[Sequence[Outcome]]:
        """The outcomes in batches. A schema that is locked comes again at the end, until nothing moves any more."""
        patience_s = self._settings.lock_timeout_ms / 1000
        started = moved = time.monotonic()
        batches = [schemas[start : start + BATCH] for start in range(0, len(schemas), BATCH)]
        tries = 0
        while batches and not self.is_interrupted():
            timeout_ms = min(TRIES_MS[min(tries, len(TRIES_MS) - 1)], self._settings.lock_timeout_ms)
            waiting: list[Outcome] = []
            for outcomes in self._run_once(batches, Limits(timeout_ms, self._settings.statement_timeout_ms)):
                final = [outcome for outcome in outcomes if not outcome.may_pass]
                waiting += [outcome for outcome in outcomes if outcome.may_pass]
                if final:
                    moved = time.monotonic()
                    yield final
            tries += 1
            if waiting and time.monotonic() - max(moved, started) >= patience_s and tries > 1:
                yield waiting
                return
            if waiting:
                self._working.stopped.wait(min(0.1 * 2**tries, patience_s / 4, 2))
            # By one, since they may be held by one session each.
            batches = [[outcome.schema] for outcome in waiting]

    def _run_once(self, batches: Sequence[Sequence[str]], limits: Limits) -> Iterator[list[Outcome]]:
        workers = min(self._settings.workers, len(batches))
        with ThreadPoolExecutor(workers, thread_name_prefix="schema") as pool:
            pending = {pool.submit(self._batch, batch, limits) for batch in batches}
            try:
                while pending:
                    # Not for longer, so that a signal is heard.
                    done, pending = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
                    for future in done:
                        yield future.result()
                    if self.is_interrupted():
                        self._working.stop(pending)
                        done = {future for future in pending if not future.cancelled()}
                        pending = set()
                        for future in done:
                            yield future.result()
            finally:
                if pending:
                    self._working.stop(pending)

    def _batch(self, schemas: Sequence[str], limits: Limits) -> list[Outcome]:
        """Each schema of the batch, until it is as it should be, or has failed."""
        ended: dict[str, Outcome] = {}
        done: dict[str, Outcome] = {}
        repaired: dict[str, Outcome] = {}
        todo = list(schemas)
        try:
            with self._engine.connect() as connection, self._working.on(connection):
                for _ in range(_MOST_STEPS):
                    for outcome in self._step(connection, todo, limits, set(done)):
                        if outcome.status == "done" and not outcome.statements:
                            done.setdefault(outcome.schema, outcome)
                        elif outcome.status == "repaired":
                            repaired[outcome.schema] = outcome
                        else:
                            before = done.get(outcome.schema) if outcome.status == "already there" else None
                            ended[outcome.schema] = before or outcome
                    todo = [schema for schema in todo if schema in done | repaired and schema not in ended]
        except sa.exc.OperationalError as error:
            reason = str(error.orig).strip().splitlines()[0]
            ended |= {
                schema: Outcome(schema, "failed", "not reached", reason, remedy="run it again", may_pass=True)
                for schema in schemas
                if schema not in ended
            }
            return list(ended.values())
        remedy = "compare it with `python -m migrations.drift`"
        for schema in [] if self.is_interrupted() else todo:
            error_ = "it is not what the models say, whatever is done"
            ended[schema] = Outcome(schema, "failed", (done | repaired)[schema].state, error_, remedy=remedy)
        return [*ended.values(), *(outcome for schema, outcome in done.items() if schema not in ended)]

    def _step(
        self, connection: sa.Connection, schemas: Sequence[str], limits: Limits, done: set[str]
    ) -> Iterator[Outcome]:
        if not schemas:
            return
        try:
            looked = look(connection, schemas, self._command.run_role)
        except (sa.exc.DBAPIError, psycopg.Error):
            looked = {}  # Each is looked at by itself.
        for schema in schemas:
            if self.is_interrupted():
                return
            found, is_done = looked.get(schema), schema in done
            outcome = migrate(connection, schema, self._command, self._plans, limits, found, is_done)
            if connection.closed or connection.invalidated:
                raise sa.exc.OperationalError("", None, psycopg.OperationalError("the connection was lost"))
            if not (self.is_interrupted() and outcome.status == "failed"):
                yield outcome


def repeated(step: Callable[[], T]) -> T:
    """What `step` returns. It is repeated while another session, a second migrator for instance, changes or locks what
    it needs, for as long as a lock is waited for; then its error is raised."""
    patience_s = Settings.from_env().lock_timeout_ms / 1000
    started = time.monotonic()
    while True:
        try:
            return step()
        except (sa.exc.DBAPIError, psycopg.Error) as error:
            is_gone = getattr(getattr(error, "orig", error), "sqlstate", None) == "42P01"
            is_transient = may_pass(error) or is_race(error) or is_gone
            if not is_transient or time.monotonic() - started > patience_s:
                raise
        time.sleep(0.1)


def read_records(engine: sa.Engine, schemas: Sequence[str]) -> dict[str, tuple[str, ...] | None]:
    """The version record of each schema; an empty one if there is none, None if another session keeps it locked."""

    def read(batch: Sequence[str]) -> dict[str, Found]:
        with engine.begin() as connection:
            return read_found(connection, batch, sequences=False)

    records: dict[str, tuple[str, ...] | None] = dict.fromkeys(schemas, ())
    for start in range(0, len(schemas), 100):
        found = repeated(partial(read, schemas[start : start + 100]))
        records |= {schema: None if each.is_locked else each.record or () for schema, each in found.items()}
    return records


def read_record(engine: sa.Engine, schema: str) -> tuple[str, ...]:
    """The version record of one schema, whose lock is waited for. Raises UsageError if it cannot be had."""
    patience_s = Settings.from_env().lock_timeout_ms / 1000
    started = time.monotonic()
    while (record := read_records(engine, [schema])[schema]) is None:
        if time.monotonic() - started > patience_s:
            raise UsageError(f"{schema}.{VERSION} is locked by another session: end it, or wait, then repeat.")
        time.sleep(0.1)
    return record
