"""TenantDatabase: the pool of workers that a run has, each on a connection of its own."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import dagster as dg
import psycopg
import sqlalchemy as sa

from pipelines.database import connected, conninfo, create_engine
from pipelines.tenants import Tenant

# A backend keeps about 24 kB of catalog for every tenant that it has touched.
_TENANTS_PER_CONNECTION = 1_000

T = TypeVar("T")


class TenantDatabase(dg.ConfigurableResource):  # type: ignore[type-arg]
    """The database that holds the tenants' schemas, at `DATABASE_URL`."""

    workers: int
    lock_timeout_ms: int
    statement_timeout_ms: int

    @contextmanager
    def connect(self) -> Iterator[tuple[sa.Engine, sa.Connection]]:
        """An engine for the workers, and one connection of it. Raises UsageError if the server cannot be reached."""
        where = conninfo()
        engine = create_engine(
            where,
            pool_size=self.workers + 1,
            lock_timeout=self.lock_timeout_ms,
            statement_timeout=self.statement_timeout_ms,
            row_security="off",  # A policy that hides rows is an error: they would be missing in the numbers.
            jit="off",  # Compiling costs more than it saves on statements of this size.
            synchronous_commit="off",  # See make_durable.
        )
        with connected(engine, where) as connection:
            yield engine, connection

    def for_each(
        self, engine: sa.Engine, tenants: Iterable[Tenant], work: Callable[[sa.Connection, Tenant], T]
    ) -> Iterator[tuple[Tenant, T | Exception]]:
        """Calls `work` for every tenant on one of several connections at once; yields what it returned or raised."""
        working: set[psycopg.Connection[Any]] = set()

        def call(tenant: Tenant) -> tuple[Tenant, T | Exception]:
            try:
                with engine.connect() as connection:
                    driver: Any = connection.connection.driver_connection
                    working.add(driver)
                    try:
                        result = work(connection, tenant)
                    finally:
                        working.discard(driver)
                    connection.info["tenants"] = connection.info.get("tenants", 0) + 1
                    if connection.info["tenants"] >= _TENANTS_PER_CONNECTION:
                        connection.invalidate()
                    return tenant, result
            except Exception as error:
                return tenant, error

        executor = ThreadPoolExecutor(self._reachable(engine), thread_name_prefix="tenant")
        try:
            for future in as_completed([executor.submit(call, tenant) for tenant in tenants]):
                yield future.result()
        finally:  # Also when the run is interrupted: what has not begun is not begun, what has is cancelled.
            executor.shutdown(wait=False, cancel_futures=True)
            for driver in list(working):
                driver.cancel_safe(timeout=5)
            executor.shutdown()

    def _reachable(self, engine: sa.Engine) -> int:
        """How many workers the server has connections for, at least one; they wait in the pool."""
        connections: list[sa.Connection] = []
        with ExitStack() as stack:
            for _ in range(self.workers):
                try:
                    connections.append(stack.enter_context(engine.connect()))
                except sa.exc.OperationalError:
                    break
        return max(1, len(connections))
