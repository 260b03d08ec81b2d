"""Connections to the tenants' database: its URL, and what every connection is told.

The URL comes from the environment when a connection is made, and is held by no object that Dagster shows or stores.
"""

import os
import random
import re
import socket
import sys
import time
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from threading import Event
from typing import Any

import psycopg
import sqlalchemy as sa
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from pipelines import local
from pipelines.settings import UsageError, database_url

APPLICATION_NAME = "marketplace_job_stats"

# How soon a server or a network that has gone silent is noticed; the kernel's own limits are hours. The URL may differ.
_TIMEOUTS = {
    "connect_timeout": "10",
    "keepalives_idle": "30",
    "keepalives_interval": "10",
    "keepalives_count": "3",
    "tcp_user_timeout": "60000",
}


def conninfo(*variables: str) -> str:
    """What libpq connects to: the first of these variables and `DATABASE_URL` that is set, else the embedded server.

    Raises UsageError if it is empty, or not a URL of PostgreSQL. The message never repeats it: it may hold a password.
    """
    variable, url = database_url(*variables) or ("", local.start())
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
        return make_conninfo("", **{**_TIMEOUTS, **given})
    except psycopg.ProgrammingError:
        raise UsageError(
            f"{variable} is not a URL of PostgreSQL: write it as postgresql://user:password@host:5432/database, "
            "with special characters percent-encoded."
        ) from None


ANSWER_S = 30.0
"""How long an answer is waited for beyond the statement's own time-out, or where there is none to speak of."""


class NoAnswer(psycopg.OperationalError):
    """The server has not answered in time, though its own time-outs should have ended the statement. Nothing is known
    of it, and the connection is given up."""


class _Connection(psycopg.Connection[Any]):
    """A connection that gives up by itself: a backend that is stopped honours no time-out of its own."""

    patience_s: float | None = ANSWER_S

    def wait(self, gen: Any, interval: float = 0.1, timeout: float | None = None) -> Any:
        try:
            return super().wait(gen, interval, self.patience_s if timeout is None else timeout)
        except psycopg.OperationalError as error:
            if type(error).__name__ != "_WaitTimeout" or timeout is not None:
                raise
            self.pgconn.finish()
            raise NoAnswer(
                f"the server has not answered for {self.patience_s:.0f} s, so it was given up: see whether the server, "
                "its disk or the network is stuck, and end the session there if it is still open"
            ) from None


def create_engine(conninfo: str, *, pool_size: int = 1, is_reader: bool = False, **parameters: int | str) -> sa.Engine:
    """An engine of at most `pool_size` connections, REPEATABLE READ; `parameters` are server settings for each.

    Nothing but pg_catalog is searched unless they say so: what a tenant's owner has made is found by no name of ours.

    No statement is prepared that does not ask for it: each tenant has its own, and the server would keep them all.

    libpq parses the URL itself, so that all its options work, and the engine does not know the password. A connection
    on which the parameters do not last, or, unless `is_reader`, to a server that cannot be written to durably, raises
    UsageError. A statement that is not answered soon after `statement_timeout` raises NoAnswer.
    """
    given = conninfo_to_dict(conninfo)
    settings = {
        **given,
        "application_name": given.get("application_name") or APPLICATION_NAME,
        "client_encoding": "UTF8",
    }
    wanted = {
        "search_path": "pg_catalog",
        "client_encoding": "UTF8",  # Also where a pooler has another opinion.
        "standard_conforming_strings": "on",  # Patterns have backslashes.
        "DateStyle": "ISO",  # Dates come as texts, too, within JSON for instance.
        **{name: str(value) for name, value in parameters.items()},
    }
    timeout_ms = int(parameters.get("statement_timeout", 0))
    is_known = Event()

    def connect() -> psycopg.Connection[Any]:
        connection = _connect(settings)
        try:
            _set_parameters(connection, wanted)
            if not is_known.is_set():
                _require_utf8(connection)
                _require_own_session(connection, settings)
                if not is_reader:
                    _require_primary(connection)
                is_known.set()
        except BaseException:
            connection.close()
            raise
        connection.patience_s = timeout_ms / 1000 + ANSWER_S if timeout_ms else None
        return connection

    return sa.create_engine(
        "postgresql+psycopg://",
        creator=connect,
        pool_size=pool_size,
        max_overflow=0,
        pool_use_lifo=True,  # What a connection has prepared is of use again.
        isolation_level="REPEATABLE READ",
        use_native_hstore=False,  # Spares a catalog query per connection.
    )


def _connect(settings: Mapping[str, Any]) -> _Connection:
    connection = _Connection.connect(prepare_threshold=sys.maxsize, **settings)
    connection.patience_s = ANSWER_S
    return connection


_NO_SESSION = (
    "The settings of a session do not last: is there a pooler in transaction mode? Connect to the server itself, or "
    "use a pooler in session mode."
)


def _set_parameters(connection: psycopg.Connection[Any], parameters: Mapping[str, str]) -> None:
    """Sets them for the session, and reads them back in another transaction. Raises UsageError if they are gone.

    As options of the connection's start, a pooler would drop them in silence: locks would be waited for without end,
    and rows that a policy hides would be missing.
    """
    connection.autocommit = True
    # By their full names: until a search path is set, it may be one on which a tenant's schema comes before pg_catalog.
    calls = sql.SQL(", ").join([sql.SQL("pg_catalog.set_config(%s, %s, false)")] * len(parameters))
    given = [text for item in parameters.items() for text in item]
    wanted = connection.execute(sql.SQL("SELECT {}").format(calls), given).fetchone()
    calls = sql.SQL(", ").join([sql.SQL("pg_catalog.current_setting(%s)")] * len(parameters))
    found = connection.execute(sql.SQL("SELECT {}").format(calls), list(parameters)).fetchone()
    connection.autocommit = False
    if found != wanted:
        raise UsageError(_NO_SESSION)


def _require_own_session(connection: _Connection, settings: Mapping[str, Any]) -> None:
    """Raises UsageError if this connection has no backend of its own.

    A pooler in transaction mode lends the same backend to whoever comes next, and as long as nobody else comes, it
    looks like a session. So somebody else comes: one more connection, which in session mode has another backend, or
    waits for one. That is only asked for if there is a pooler, which gives a number of its own for the backend.
    """
    connection.autocommit = True
    if _backend(connection) != connection.info.backend_pid:
        with _connect(settings) as other:
            other.autocommit = True
            other.patience_s = 3
            try:
                # Not in turn: two backends that a pooler lends in turn would look like one for each.
                seen = [(each, _backend(each)) for each in (connection, other, other, connection, other, other)]
            except NoAnswer:
                seen = [(connection, _backend(connection))]
            ours, others = ({pid for each, pid in seen if (each is connection) == mine} for mine in (True, False))
        if len(ours) > 1 or len(others) > 1 or ours & others:
            raise UsageError(_NO_SESSION)
    connection.autocommit = False


def _backend(connection: psycopg.Connection[Any]) -> int:
    row = connection.execute("SELECT pg_catalog.pg_backend_pid()").fetchone()
    return int(row[0]) if row else 0


def _require_utf8(connection: psycopg.Connection[Any]) -> None:
    """Raises UsageError for a database of another encoding, from the one that knows no characters, SQL_ASCII, to those
    which lack some that our statements need."""
    encoding = connection.info.parameter_status("server_encoding")
    if encoding != "UTF8":
        raise UsageError(
            f"{_database(connection)} has the encoding {encoding}, in which names, codes and reasons would be read "
            "wrongly, or not at all: dump it, and restore it into a database of the encoding UTF8."
        )


def _database(connection: psycopg.Connection[Any]) -> str:
    info = connection.info
    return f"Database {info.dbname} on {info.host}:{info.port}"


def _require_primary(connection: psycopg.Connection[Any]) -> None:
    """Raises UsageError for a server on which nothing can be written, or nothing durably by our own means."""
    connection.autocommit = True
    row = connection.execute("""
        SELECT pg_catalog.pg_is_in_recovery(), pg_catalog.current_setting('transaction_read_only') = 'on',
               EXISTS (SELECT FROM pg_catalog.pg_extension WHERE extname = 'citus')""").fetchone()
    connection.autocommit = False
    where = _database(connection)
    is_standby, is_read_only, is_sharded = row or (False, False, False)
    if is_standby:
        raise UsageError(f"{where} is on a standby, which takes no writes: connect to the primary server.")
    if is_read_only:
        raise UsageError(
            f"{where} is read-only for this role: see to default_transaction_read_only of the role, the database or "
            "the server, or connect as another role."
        )
    if is_sharded:
        raise UsageError(
            f"{where} belongs to a cluster of Citus, whose workers have logs of their own, so that nothing here "
            "could be known to be on disk: use a server of its own for the tenants."
        )


def require_answer(connection: sa.Connection) -> None:
    """Raises a DBAPIError if the server was lost, or does not answer soon, whatever statements may take."""
    driver: Any = connection.connection.driver_connection
    usual, driver.patience_s = driver.patience_s, ANSWER_S
    try:
        with connection.begin():
            connection.execute(sa.text("SELECT"))
    finally:
        driver.patience_s = usual


@contextmanager
def connected(engine: sa.Engine, conninfo: str, patience_s: float = 0) -> Iterator[sa.Connection]:
    """A first connection, which is tried to be had for so many seconds; the engine is disposed of afterwards.

    Raises UsageError, one sentence that says which server, if there is no connection to be had.
    """
    deadline = time.monotonic() + patience_s
    try:
        while True:
            try:
                connection = engine.connect()
                break
            except sa.exc.DBAPIError as error:
                if time.monotonic() < deadline:
                    time.sleep(1)
                    continue
                raise UsageError(cannot_connect(conninfo, error)) from None
        with connection:
            yield connection
    finally:
        engine.dispose()


def cannot_connect(conninfo: str, error: sa.exc.DBAPIError | psycopg.Error) -> str:
    """One sentence: which server, why, what to do. A host that is none may be a password that was put in its place."""
    reason = connection_reason(error)
    if re.search("resolve host|translate host name|unknown host", reason):
        return (
            "Cannot connect: the host in the URL of the database is not known. It is not shown, since it may be a part "
            "of a password: write the URL as postgresql://user:password@host:5432/database, with special characters "
            "percent-encoded."
        )
    given = conninfo_to_dict(conninfo)
    server = f"{given.get('host', 'the default host')}:{given.get('port', 5432)}"
    remedy = connection_remedy(error) or "Check DATABASE_URL, and that the server is up"
    return f"Cannot connect to database {given.get('dbname', '(default)')} on {server}: {reason}. {remedy}."


def connection_remedy(error: sa.exc.DBAPIError | psycopg.Error) -> str | None:
    """What to do, as a sentence without its end, where there is no connection, or none any more; None if unknown."""
    sqlstate = getattr(getattr(error, "orig", error), "sqlstate", None) or ""
    if setting := _ENDED_BY.get(sqlstate):
        return (
            f"{setting} of the role, the database or the server leaves no time to set up a session: raise it, with "
            f"ALTER ROLE ... SET {setting}"
        )
    patterns = _CONNECTING if sqlstate[:2] in ("", "08") else {}
    reason = connection_reason(error)
    return next((remedy for pattern, remedy in patterns.items() if re.search(pattern, reason)), None)


_ENDED_BY = {
    "25P03": "idle_in_transaction_session_timeout",
    "25P04": "transaction_timeout",
    "57014": "statement_timeout",
    "57P05": "idle_session_timeout",
}


# libpq gives no SQLSTATE for these. Servers speak other languages too; then the reason has to do.
_CONNECTING = {
    "password authentication failed": "Check user and password in DATABASE_URL, percent-encoded, and pg_hba.conf",
    "no pg_hba.conf entry": "Let this role in from this host, in pg_hba.conf of the server",
    "too many|remaining connection slots": "Lower STATS_WORKERS, or raise max_connections of the server, or the limit "
    "of the role or the database",
    "database .* does not exist": "Check the name of the database in DATABASE_URL",
    "role .* does not exist": "Check the user in DATABASE_URL, or create the role",
    "starting up|shutting down|recovery": "Wait until the server is up",
    "closed the connection unexpectedly": "See the server's log, and whether idle_session_timeout or "
    "idle_in_transaction_session_timeout of the role or the database is too short",
    "query_wait_timeout": "The pooler has no connection left, and one more is taken than STATS_WORKERS: raise the size "
    "of its pool, or lower STATS_WORKERS",
    "options": "A pooler refuses the start-up options of DATABASE_URL: leave them out, or set them with ALTER ROLE",
}


class Working:
    """The connections that are at work just now in other threads, so that they can be stopped."""

    def __init__(self) -> None:
        self.stopped = Event()
        self._drivers: set[psycopg.Connection[Any]] = set()

    def __bool__(self) -> bool:
        return bool(self._drivers)

    @contextmanager
    def on(self, connection: sa.Connection) -> Iterator[None]:
        """While this connection is at work."""
        driver: Any = connection.connection.driver_connection
        self._drivers.add(driver)
        try:
            yield
        finally:
            self._drivers.discard(driver)

    def stop(self, futures: Collection[Future[Any]]) -> None:
        """Cancels what they do, and returns when the futures have ended, or can no longer wait for the server."""
        self.stopped.set()
        for future in futures:
            future.cancel()
        deadline = time.monotonic() + 10
        # Again and again, since what comes between two statements cancels none.
        while wait(futures, timeout=0.2).not_done and time.monotonic() < deadline:
            for driver in list(self._drivers):
                with suppress(psycopg.Error):  # It may be gone already.
                    driver.cancel_safe(timeout=max(0.1, (deadline - time.monotonic()) / 2))
        for driver in list(self._drivers):  # The server does not answer.
            with suppress(psycopg.Error, OSError), socket.socket(fileno=os.dup(driver.fileno())) as connection:
                connection.shutdown(socket.SHUT_RDWR)


ATTEMPTS = 4
"""How often a tenant is tried before it counts as failed."""


def require_table(connection: sa.Connection, table: sa.Table) -> None:
    """Raises UsageError if this table, with its schema, is not there. Within a transaction of the caller."""
    if not connection.scalar(sa.text("SELECT to_regclass(:name)"), {"name": table.fullname}):
        raise UsageError(
            f"{table.fullname} is missing in {server_and_database(connection)}: run `alembic upgrade head`."
        )


def may_pass(error: Exception) -> bool:
    """Whether the same statements may succeed a moment later: locks, deadlocks, and a server that restarts."""
    if not isinstance(error, sa.exc.DBAPIError | psycopg.Error):
        return False
    original = getattr(error, "orig", error)
    sqlstate = getattr(original, "sqlstate", None)
    if sqlstate == "57014" or isinstance(original, NoAnswer):  # It has had its time.
        return False
    if sqlstate is None:  # The connection was lost, if it is not something that the client has refused.
        lost = (sa.exc.OperationalError, sa.exc.InterfaceError, psycopg.OperationalError, psycopg.InterfaceError)
        return isinstance(error, lost)
    # XX000 is what reading the catalog gives while another session changes it.
    return sqlstate[:2] in ("08", "40", "53", "57") or sqlstate in ("55P03", "XX000")


def pause_s(attempt: int) -> float:
    """How many seconds to wait after the attempt of this number, from 1: longer each time, and never in step."""
    return random.uniform(0.1, 0.3) * 2.0**attempt  # noqa: S311 Only to keep sessions apart.


SERVER_REMEDIES = {
    "22021": "a text is not in the encoding of the database: correct the row that holds it",
    "22P05": "a text does not exist in the encoding of the database, which UTF8 would hold: correct the row",
    "25006": "the server, the database or the role is read-only: connect to the primary server, or see to "
    "default_transaction_read_only",
    "25P03": "idle_in_transaction_session_timeout of the server or the role has ended it: raise it for this role",
    "25P04": "transaction_timeout of the server or the role has ended it: raise it for this role, with ALTER ROLE",
    "53100": "the server's disk is full: make room, then repeat it",
    "53200": "the server has no memory left: lower STATS_WORKERS, or raise max_locks_per_transaction if it says so",
    "53300": "the server has no connection left: lower STATS_WORKERS, or raise max_connections or the role's limit",
    "57P01": "the server was stopped, or an administrator has ended the session: repeat it",
    "57P02": "the server has crashed: see its log, then repeat it",
    "57P03": "the server is starting, stopping or recovering: wait for it, then repeat it",
    "57P05": "idle_session_timeout of a pooler or the server has ended it: raise it for this role",
    "58030": "the server's disk fails: see its log",
    "XX001": "data on the server's disk are damaged: see its log, and restore what the message names",
    "XX002": "an index is damaged: REINDEX what the message names",
}
"""What to do, by SQLSTATE, when it is the server and not the statement."""


def error_text(error: sa.exc.DBAPIError | psycopg.Error) -> str:
    """The server's message with its detail, for instance what depends on something, and the SQLSTATE, on one line."""
    original = getattr(error, "orig", error)
    sqlstate = getattr(original, "sqlstate", None)
    detail = getattr(getattr(original, "diag", None), "message_detail", None) or ""
    text = connection_reason(error)
    if detail and not detail.startswith("Failing row"):  # Rows are the customers' own.
        text += f" ({'; '.join(detail.rstrip('.').splitlines()[:3])})"
    return text + (f" (SQLSTATE {sqlstate})" if sqlstate else "")


def connection_reason(error: sa.exc.DBAPIError | psycopg.Error) -> str:
    """The server's or libpq's own words, without the advice that follows them."""
    original = getattr(error, "orig", error)
    lines = str(original).strip().splitlines() or [type(original).__name__]
    return lines[0].removeprefix("connection failed: ").rstrip(".")


def server_and_database(connection: sa.Connection) -> str:
    """Which server and database a connection works on, for people; without user and password."""
    info = connection.connection.driver_connection.info  # type: ignore[union-attr]
    return f"database {info.dbname} on {info.host}:{info.port}, PostgreSQL {info.server_version // 10_000}"


def make_durable(sentinel: sa.Connection, message: str) -> None:
    """Returns when everything that was committed since the sentinel connected is on disk, by whatever connection.

    The log is written in order, so one synchronous commit does it. It must write to the log itself: a SELECT or an
    update of nothing flushes nothing. And it must come from a connection that is older than the commits: a server that
    crashes forgets those that nobody waited for, but it ends every connection with them, so if the sentinel still
    answers, nothing was forgotten.
    """
    with sentinel.begin():
        sentinel.execute(sa.text("SET LOCAL synchronous_commit = on"))
        sentinel.execute(
            sa.text("SELECT pg_logical_emit_message(true, :prefix, :message)"),
            {"prefix": APPLICATION_NAME, "message": message},
        )
