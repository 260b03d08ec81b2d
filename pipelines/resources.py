"""TenantDatabase: the pool of workers that a run has, each on a connection of its own."""

import gc
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager
from typing import TypeVar

import dagster as dg
import sqlalchemy as sa

from pipelines.database import (
    ATTEMPTS,
    Working,
    connected,
    connection_reason,
    connection_remedy,
    conninfo,
    create_engine,
    may_pass,
    pause_s,
)
from pipelines.settings import UsageError

# A backend keeps about 100 kB of catalog for every tenant that it has touched.
_TENANTS_PER_CONNECTION = 1_000

Item = TypeVar("Item")
T = TypeVar("T")


class NoConnection(UsageError):
    """The workers have no connection, and get none."""

    @classmethod
    def because(cls, error: sa.exc.DBAPIError) -> "NoConnection":
        reason = connection_reason(error)
        remedy = connection_remedy(error) or "See to it, or lower STATS_WORKERS"
        return cls(f"There is no connection for the workers: {reason}. {remedy}.")


class TenantDatabase(dg.ConfigurableResource):  # type: ignore[type-arg]
    """The database that holds the tenants' schemas, at `DATABASE_URL`."""

    workers: int
    lock_timeout_ms: int
    statement_timeout_ms: int

    @contextmanager
    def connect(self, patience_s: float = 0) -> Iterator[tuple[sa.Engine, sa.Connection]]:
        """An engine for the workers, and one connection of it, the sentinel connection (see make_durable).

        Raises UsageError if the server cannot be reached within so many seconds.
        """
        where = conninfo()
        engine = create_engine(
            where,
            pool_size=self.workers + 1,
            lock_timeout=self.lock_timeout_ms,
            statement_timeout=self.statement_timeout_ms,
            row_security="off",  # A policy that hides rows is an error: they would be missing in the numbers.
            jit="off",  # Compiling costs more than it saves on statements of this size.
            idle_session_timeout=0,  # The sentinel waits for the others.
            synchronous_commit="off",  # See make_durable.
        )
        with connected(engine, where, patience_s) as connection:
            yield engine, connection

    def for_each(
        self,
        engine: sa.Engine,
        items: Iterable[Item],
        work: Callable[[sa.Connection, Item], T],
        timeout_s: float | None = None,
    ) -> Generator[tuple[Item, T | Exception], None, None]:
        """Calls `work` for every tenant, or batch, on one of several connections; yields what it returned or raised.

        What may pass (a lock, a deadlock, a lost connection) is tried again a few times, with growing pauses. Raises
        NoConnection if there is none to be had: at once, or in the middle, when no other worker has one either; and
        TimeoutError if not all is done after so many seconds.
        """
        working = Working()
        items = list(items)
        workers = self._reachable(engine, min(self.workers, len(items)))

        def call(item: Item) -> tuple[Item, T | Exception]:
            attempt = 1
            while True:
                try:
                    return item, once(item)
                except Exception as error:
                    if attempt == ATTEMPTS or not may_pass(error) or working.stopped.wait(pause_s(attempt)):
                        return item, error
                attempt += 1

        def connect() -> sa.Connection:
            attempt = 1
            while True:
                try:
                    return engine.connect()
                except sa.exc.DBAPIError as error:
                    # While others work, one of theirs will be free before long.
                    if (not working and attempt >= ATTEMPTS) or working.stopped.wait(pause_s(min(attempt, ATTEMPTS))):
                        raise NoConnection.because(error) from None
                attempt += 1

        def once(item: Item) -> T:
            with connect() as connection:
                with working.on(connection):
                    result = work(connection, item)
                connection.info["tenants"] = connection.info.get("tenants", 0) + 1
                if connection.info["tenants"] >= _TENANTS_PER_CONNECTION:
                    connection.invalidate()
                return result

        # Of what is loaded by now, Dagster above all, nothing becomes garbage. Else the collector would look through it
        # all again and again while results come in, and every worker would wait.
        gc.freeze()
        executor = ThreadPoolExecutor(max(1, workers), thread_name_prefix="tenant")
        futures = [executor.submit(call, item) for item in items]
        try:
            for future in as_completed(futures, timeout_s):
                item, outcome = future.result()
                if isinstance(outcome, NoConnection):
                    raise outcome
                yield item, outcome
        finally:  # Also when the run is interrupted: what has not begun is not begun, what has is cancelled.
            gc.unfreeze()
            working.stop(futures)
            executor.shutdown()

    def _reachable(self, engine: sa.Engine, wanted: int) -> int:
        """For how many of so many workers the server has connections; they wait in the pool. Raises NoConnection."""
        with ExitStack() as stack:
            for count in range(wanted):
                try:
                    stack.enter_context(engine.connect())
                except sa.exc.DBAPIError as error:
                    if count == 0:
                        raise NoConnection.because(error) from None
                    return count
        return wanted
