"""A server that does not answer, and does not go away either: a stopped process, a network that swallows everything."""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa

from assets.marketplace_job_stats import asset
from pipelines import database
from pipelines.database import NoAnswer, make_durable
from pipelines.resources import TenantDatabase
from pipelines.settings import UsageError
from tests import application
from tests.conftest import hide_triggers, run_url, url_of, wait_until
from tests.integration.common import DAY, TENANTS, failure, job, materialize, metadata
from tests.pooler import needs_pgbouncer, running_pooler
from tests.server import running_server

BACKENDS = "SELECT pid FROM pg_stat_activity WHERE application_name = 'marketplace_job_stats' AND {}"


def processes(server: str) -> list[int]:
    """The numbers of the postmaster and of all its children."""
    folder = Path(str(psycopg.conninfo.conninfo_to_dict(server)["host"]))
    postmaster = int((folder / "data" / "postmaster.pid").read_text().split()[0])
    return [postmaster, *children(postmaster)]


def children(pid: int, name: str = "") -> list[int]:
    """The numbers of a process' children, with this name."""
    found = subprocess.run(["pgrep", "-P", str(pid), name], capture_output=True, text=True, check=True)  # noqa: S607
    return [*map(int, found.stdout.split())]


@contextmanager
def stopped(*pids: int) -> Iterator[None]:
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No answer is waited for longer than a second beyond the statement's own time-out."""
    monkeypatch.setattr(database, "ANSWER_S", 1.0)
    monkeypatch.setattr(asset, "PATIENCE_S", 1)


def test_an_interrupted_run_does_not_wait_for_a_silent_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is under way is given up after some seconds: neither the statement nor its cancellation is answered."""
    with running_server() as server:
        monkeypatch.setenv("DATABASE_URL", url_of(f"{server} dbname=postgres"))
        database = TenantDatabase(workers=4, lock_timeout_ms=1000, statement_timeout_ms=90_000)
        sleep = sa.text("SELECT :seconds FROM pg_sleep(:seconds)")
        with database.connect() as (engine, _):
            waiting = database.for_each(engine, [0, 60, 60, 60, 60], lambda c, n: c.scalar(sleep, {"seconds": n}))
            assert next(waiting) == (0, 0)
            with stopped(*processes(server)):
                started = time.monotonic()
                waiting.close()
                assert time.monotonic() - started < 30


@pytest.fixture
def rows(database: str, connection: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A job in each of the three tenants, and the run's URL."""
    monkeypatch.setenv("DATABASE_URL", run_url(database))
    for schema in TENANTS:
        application.insert(connection, schema, "marketplace_jobs", [job(id=1)])


@contextmanager
def running(connection: psycopg.Connection[Any], found: list[Any]) -> Iterator[int]:
    """A run whose transaction of user_2 waits for a lock: the number of its backend. At the end it has ended."""
    environment = {"STATS_LOCK_TIMEOUT_MS": "60000", "STATS_STATEMENT_TIMEOUT_MS": "3000"}
    run = threading.Thread(target=lambda: found.append(materialize(environment=environment)))
    run.start()
    waiting = BACKENDS.format("wait_event_type = 'Lock'")
    wait_until(connection, waiting)
    [(pid,)] = connection.execute(waiting).fetchall()
    started = time.monotonic()
    yield pid
    run.join(timeout=60)
    assert not run.is_alive()
    assert time.monotonic() - started < 20
    connection.execute("SELECT pg_terminate_backend(%s)", [pid])


@pytest.mark.usefixtures("quick", "rows")
@pytest.mark.parametrize("at", ["lock", "commit"])
def test_a_stopped_backend_costs_its_tenant_alone(connection: psycopg.Connection[Any], at: str) -> None:
    """It is named soon after the statement's time-out, which that backend does not honour; the others are done."""
    if at == "commit":
        connection.execute("""
            CREATE FUNCTION public.pause() RETURNS trigger LANGUAGE plpgsql AS
            $$ BEGIN PERFORM pg_advisory_lock(1); PERFORM pg_advisory_unlock(1); RETURN NULL; END $$;
            CREATE CONSTRAINT TRIGGER pause AFTER INSERT ON user_2.marketplace_job_stats_days
            DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION pause()""")
        hide_triggers(connection)
    found: list[Any] = []
    with psycopg.connect(connection.info.dsn) as holder:
        if at == "lock":
            holder.execute("LOCK TABLE user_2.marketplace_job_stats IN SHARE MODE")
        else:
            holder.execute("SELECT pg_advisory_lock(1)")
        with ExitStack() as stack, running(connection, found) as pid:
            stack.enter_context(stopped(pid))
            while not found:
                time.sleep(0.1)
    assert "user_2: the server has not answered for 4 s, so it was given up" in failure(found[0])
    assert metadata(found[0])[DAY]["run_tenants_done"] == 2


@needs_pgbouncer
@pytest.mark.usefixtures("quick", "rows")
def test_a_black_hole_ends_the_run(
    database: str, connection: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What stands between stops, for new connections, too: the run ends, and names the tenant that it noticed it by."""
    found: list[Any] = []
    with running_pooler(database, "session") as where, psycopg.connect(database) as holder:
        monkeypatch.setenv("DATABASE_URL", run_url(where) + "&connect_timeout=2")
        holder.execute("LOCK TABLE user_2.marketplace_job_stats IN SHARE MODE")
        pids = children(os.getpid(), "pgbouncer")
        with ExitStack() as stack, running(connection, found):
            stack.enter_context(stopped(*pids))
            while not found:
                time.sleep(0.1)
        assert failure(found[0]).startswith("Cannot connect to database")
        assert "Before that, user_2: the server has not answered for 4 s" in failure(found[0])


@pytest.mark.usefixtures("quick")
def test_what_makes_durable_is_not_waited_for_without_end(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is any first answer of a new connection."""
    monkeypatch.setenv("DATABASE_URL", url_of(database))
    resource = TenantDatabase(workers=1, lock_timeout_ms=1000, statement_timeout_ms=1000)
    with resource.connect() as (_, sentinel):
        pid = sentinel.scalar(sa.text("SELECT pg_backend_pid()"))
        sentinel.rollback()
        with stopped(int(pid or 0)), pytest.raises(sa.exc.OperationalError) as error:
            make_durable(sentinel, "a run")
    assert isinstance(error.value.orig, NoAnswer)
    with running_server() as server, stopped(*processes(server)):
        monkeypatch.setenv("DATABASE_URL", url_of(f"{server} dbname=postgres") + "&connect_timeout=2")
        with pytest.raises(UsageError, match="timeout expired"), resource.connect():
            pass
