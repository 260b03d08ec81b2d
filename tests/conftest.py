"""Real databases: a server per session, a migrated template database, and a copy of it for each test."""

import itertools
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa

from pipelines.database import create_engine
from tests import application
from tests.server import running_server

ROOT = Path(__file__).parent.parent
_numbers = itertools.count(1)

# None of the developer's own settings may reach a test.
FOREIGN = ("DATABASE_URL", "MIGRATION_DATABASE_URL", "DAGSTER_HOME")


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test begins without the variables that configure the project."""
    for name in os.environ:
        if name in FOREIGN or name.startswith(("STATS_", "PG", "ALERT_")):
            monkeypatch.delenv(name)


RUN_ROLE = "stats"
"""The role of a run in all tests: it has nothing but what the migration grants to it."""


@pytest.fixture(scope="session")
def server() -> Iterator[str]:
    """The conninfo of a real server, without a database name; as the owner of everything."""
    with running_server() as conninfo:
        create_run_role(conninfo)
        yield conninfo


def create_run_role(server: str) -> None:
    """The role as the README has it made."""
    with psycopg.connect(f"{server} dbname=postgres", autocommit=True) as connection:
        connection.execute(f"CREATE ROLE {RUN_ROLE} LOGIN")


def url_of(conninfo: str, user: str | None = None) -> str:
    """The URL that `DATABASE_URL` takes, of a server on a socket."""
    given = psycopg.conninfo.conninfo_to_dict(conninfo)
    port = f"&port={given['port']}" if "port" in given else ""
    return f"postgresql://{user or given['user']}@/{given['dbname']}?host={given['host']}{port}"


def run_url(conninfo: str) -> str:
    """The same for the role of a run."""
    return url_of(conninfo, RUN_ROLE)


def create_database(server: str, name: str, template: str | None = None) -> str:
    """The conninfo of a new database, empty or a copy of another."""
    copy = psycopg.sql.SQL(" TEMPLATE {}").format(psycopg.sql.Identifier(template or "template1"))
    with psycopg.connect(f"{server} dbname=postgres", autocommit=True) as connection:
        connection.execute(psycopg.sql.SQL("CREATE DATABASE {}").format(psycopg.sql.Identifier(name)) + copy)
    return f"{server} dbname={name}"


def run(*command: str, environment: Mapping[str, str], check: bool = True) -> subprocess.CompletedProcess[str]:
    """A command of the project in a process of its own, from the project's root, with nothing else set but PATH."""
    binaries = Path(sys.executable).parent
    result = subprocess.run(
        [binaries / command[0], *command[1:]],
        cwd=ROOT,
        env={"PATH": f"{binaries}:/usr/bin:/bin", "HOME": "/tmp", "COLUMNS": "120", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    if check and result.returncode:
        raise AssertionError(f"{command} ended with {result.returncode}:\n{result.stdout}\n{result.stderr}")
    return result


@pytest.fixture(scope="session")
def old_template(server: str) -> str:
    """The name of a database before the migration: the template, an older tenant with enums, and two clones."""
    with psycopg.connect(create_database(server, "old_template")) as connection:
        application.create_action_types(connection)
        application.create_tenant(connection, application.TEMPLATE)
        application.create_tenant(connection, "user_1", enums=True)
        application.clone_tenant(connection, "user_2")
        application.clone_tenant(connection, "user_10")
    return "old_template"


@pytest.fixture(scope="session")
def migrated_template(server: str, old_template: str) -> str:
    """The name of the same database after `alembic upgrade head`."""
    conninfo = create_database(server, "migrated_template", old_template)
    environment = {"MIGRATION_DATABASE_URL": url_of(conninfo), "DATABASE_URL": run_url(conninfo)}
    run("alembic", "upgrade", "head", environment=environment)
    return "migrated_template"


@pytest.fixture
def old_database(server: str, old_template: str) -> str:
    """The conninfo of a database of this test's own, before the migration."""
    return create_database(server, f"test_{next(_numbers)}", old_template)


@pytest.fixture
def database(server: str, migrated_template: str) -> str:
    """The conninfo of a database of this test's own: user_1, user_2 and user_10, migrated and empty."""
    return create_database(server, f"test_{next(_numbers)}", migrated_template)


@pytest.fixture
def connection(database: str) -> Iterator[psycopg.Connection[Any]]:
    """A connection to `database`, in autocommit, as the application would have it."""
    with psycopg.connect(database, autocommit=True) as connection:
        yield connection


@pytest.fixture
def engine(database: str) -> Iterator[sa.Engine]:
    """An engine as a run has it."""
    engine = create_engine(run_url(database))
    yield engine
    engine.dispose()


def hide_triggers(connection: psycopg.Connection[Any]) -> None:
    """Makes all triggers look like PostgreSQL's own: a run refuses those of others, and a test needs one at work."""
    connection.execute("UPDATE pg_catalog.pg_trigger SET tgisinternal = true")


def wait_until(connection: psycopg.Connection[Any], query: str, seconds: float = 20) -> None:
    """Returns when the query finds a row; fails after so many seconds."""
    deadline = time.monotonic() + seconds
    while not connection.execute(query).fetchall():
        assert time.monotonic() < deadline, f"nothing found in {seconds} s: {query}"
        time.sleep(0.01)
