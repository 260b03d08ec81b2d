"""TenantDatabase: the connections to the tenants' database, their time-outs, and the pool of workers.

The URL comes from the environment when a connection is made, and is held by no object that Dagster shows or stores.
"""

import os
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import dagster as dg
import psycopg
import sqlalchemy as sa
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from pipelines import local
from pipelines.settings import UsageError
from pipelines.tenants import Tenant

APPLICATION_NAME = "marketplace_job_stats"

# A backend keeps about 24 kB of catalog for every tenant that it has touched.
_TENANTS_PER_CONNECTION = 1_000

T = TypeVar("T")


def conninfo(*variables: str) -> str:
    """What libpq connects to: the first of these variables and `DATABASE_URL` that is set, else the embedded server.

    Raises UsageError if it is not a URL of PostgreSQL. The message never repeats the value: it may hold a password.
    """
    for variable in (*variables, "DATABASE_URL"):
        if url := os.environ.get(variable, "").strip():
            break
    else:
        url = local.start()
    try:
        match = re.fullmatch(r"postgres(?:ql)?(?:\+psycopg)?(://.*)", url)
        given = conninfo_to_dict("postgresql" + match[1]) if match else {}
        # An unencoded password would be taken apart into other fields, which messages show: an @ ends the password, and
        # there is no / before it.
        address, _, query = url.partition("://")[2].partition("?")
        user, *others = address.split("@")
        is_taken_apart = len(others) > 1 or (others and "/" in user) or (query and "=" not in query.partition("&")[0])
        if not match or is_taken_apart or not re.fullmatch(r"[0-9,]*", str(given.get("port", ""))):
            raise psycopg.ProgrammingError
        return make_conninfo("", **{"connect_timeout": "10", **given})
    except psycopg.ProgrammingError:
        raise UsageError(
            f"{variable} is not a URL of PostgreSQL: write it as postgresql://user:password@host:5432/database, "
            "with special characters percent-encoded."
        ) from None


def create_engine(conninfo: str, *, pool_size: int = 1, **parameters: int | str) -> sa.Engine:
    """An engine of at most `pool_size` connections, REPEATABLE READ; `parameters` are server settings for each.

    libpq parses the URL itself, so that all its options work, and the engine does not know the password.
    """
    given = conninfo_to_dict(conninfo)
    options = [str(given.get("options") or ""), *(f"-c {name}={value}" for name, value in parameters.items())]
    settings = {
        **given,
        "application_name": given.get("application_name") or APPLICATION_NAME,
        "options": " ".join(options).strip(),
        "client_encoding": "UTF8",
    }

    def connect() -> psycopg.Connection[Any]:
        # No prepared statements: each tenant has its own, and the server would keep them all.
        return psycopg.connect(prepare_threshold=None, **settings)  # type: ignore[arg-type]

    return sa.create_engine(
        "postgresql+psycopg://",
        creator=connect,
        pool_size=pool_size,
        max_overflow=0,
        isolation_level="REPEATABLE READ",
        use_native_hstore=False,  # Spares a catalog query per connection.
    )


@contextmanager
def connected(engine: sa.Engine, conninfo: str) -> Iterator[sa.Connection]:
    """A first connection; the engine is disposed of afterwards.

    Raises UsageError, one sentence that says which server, if there is no connection to be had.
    """
    try:
        try:
            connection = engine.connect()
        except sa.exc.DBAPIError as error:
            given = conninfo_to_dict(conninfo)
            server = f"{given.get('host', 'the default host')}:{given.get('port', 5432)}"
            raise UsageError(
                f"Cannot connect to database {given.get('dbname', '(default)')} on {server}: {_reason(error)}. "
                "Check DATABASE_URL, and that the server is up."
            ) from None
        with connection:
            yield connection
    finally:
        engine.dispose()


def _reason(error: sa.exc.DBAPIError) -> str:
    """The server's or libpq's own words, without the advice that follows them."""
    lines = str(error.orig).strip().splitlines()
    return lines[0].removeprefix("connection failed: ").rstrip(".")


def server_and_database(connection: sa.Connection) -> str:
    """Which server and database a connection works on, for people; without user and password."""
    info = connection.connection.driver_connection.info  # type: ignore[union-attr]
    return f"database {info.dbname} on {info.host}:{info.port}, PostgreSQL {info.server_version // 10_000}"


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
            jit="off",  # Compiling costs more than it saves on statements of this size.
            # The log is written in order, so one synchronous commit at the end of a run makes all before it durable.
            synchronous_commit="off",
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

    def make_durable(self, engine: sa.Engine, message: str) -> None:
        """Returns when everything that was committed before is on disk.

        The commit must write to the log itself: a SELECT or an update of nothing flushes nothing.
        """
        with engine.connect() as connection, connection.begin():
            connection.execute(sa.text("SET LOCAL synchronous_commit = on"))
            connection.execute(
                sa.text("SELECT pg_logical_emit_message(true, :prefix, :message)"),
                {"prefix": APPLICATION_NAME, "message": message},
            )
