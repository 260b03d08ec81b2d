"""Connections to the tenants' database: its URL, and what every connection is told.

The URL comes from the environment when a connection is made, and is held by no object that Dagster shows or stores.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
import sqlalchemy as sa
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from pipelines import local
from pipelines.settings import UsageError

APPLICATION_NAME = "marketplace_job_stats"


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


def make_durable(engine: sa.Engine, message: str) -> None:
    """Returns when everything that was committed before is on disk, also by connections that did not wait for it.

    The log is written in order, so one synchronous commit does it. It must write to the log itself: a SELECT or an
    update of nothing flushes nothing.
    """
    with engine.connect() as connection, connection.begin():
        connection.execute(sa.text("SET LOCAL synchronous_commit = on"))
        connection.execute(
            sa.text("SELECT pg_logical_emit_message(true, :prefix, :message)"),
            {"prefix": APPLICATION_NAME, "message": message},
        )
