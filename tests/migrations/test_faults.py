"""Promises 1, 2, 4, 5, 6, 12: killed at any statement, locked out, run twice at once; with real processes."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest

from migrations.shape import NEW, OLD, VERSION
from tests import application
from tests.conftest import ROOT, create_database, run, url_of, wait_until
from tests.migrations.common import alembic, differences, shapes
from tests.migrations.conftest import OLD_ROW
from tests.migrations.test_states import NEW_TABLE, S

# The state that takes the most statements: both tables, whose rows meet.
BOTH = f"{NEW_TABLE}; INSERT INTO {S}.{NEW} (action_type_id, date, total_jobs) VALUES (1, '2025-06-01', 2)"

# Acts at the end of the n-th DDL command of a session, before anything is committed.
FAULT = """
    CREATE FUNCTION public.fault() RETURNS event_trigger LANGUAGE plpgsql AS $$
    DECLARE n integer := coalesce(nullif(current_setting('fault.count', true), ''), '0')::integer + 1;
    BEGIN
        PERFORM set_config('fault.count', n::text, false);
        IF n = {n} THEN PERFORM {act}; END IF;
    END $$;
    CREATE EVENT TRIGGER fault ON ddl_command_end EXECUTE FUNCTION public.fault()"""


@contextmanager
def process(conninfo: str, *arguments: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """The command line in a process of its own, in the background."""
    with subprocess.Popen(
        [Path(sys.executable).parent / "alembic", *arguments],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"], "DATABASE_URL": url_of(conninfo), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as running:
        yield running


def test_a_backend_terminated_after_any_statement_leaves_no_third_state(
    server: str, old_database: str, old_connection: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After each DDL statement in turn: the tenant is as it was, and a rerun makes it canonical."""
    monkeypatch.setenv("STATS_LOCK_TIMEOUT_MS", "50")
    old_connection.execute(BOTH)
    before = shapes(old_database)[S]
    old_connection.close()
    reached = 0
    for n in range(1, 50):
        name = psycopg.conninfo.conninfo_to_dict(old_database)["dbname"]
        copy = create_database(server, f"{name}_{n}", str(name))
        with psycopg.connect(copy, autocommit=True) as connection:
            connection.execute(FAULT.format(n=n, act="pg_terminate_backend(pg_backend_pid())").encode())
            try:
                output = alembic(copy, "-x", f"tenant={S}", "upgrade", "head", status=1)
            except AssertionError:
                break  # Nothing was killed: there are fewer statements.
            assert "failed" in output
            assert shapes(copy)[S] == before
            connection.execute("DROP EVENT TRIGGER fault")
            alembic(copy, "-x", f"tenant={S}", "upgrade", "head")
            assert differences(copy, S) == []
            reached = n
    assert reached >= 9


@pytest.mark.parametrize("n", range(1, 10, 3))
def test_a_killed_process_leaves_no_third_state(
    old_database: str, old_connection: psycopg.Connection[Any], n: int
) -> None:
    """`kill -9` after each DDL statement in turn: the tenant is as it was, and a rerun brings it over."""
    old_connection.execute(BOTH)
    before = shapes(old_database)[S]
    old_connection.execute(FAULT.format(n=n, act="pg_sleep(60)").encode())
    sleeping = "FROM pg_stat_activity WHERE datname = current_database() AND wait_event = 'PgSleep'"
    with process(old_database, "-x", f"tenant={S}", "upgrade", "head") as running:
        wait_until(old_connection, f"SELECT {sleeping}")
        running.send_signal(signal.SIGKILL)
        running.wait()
    old_connection.execute(f"SELECT pg_terminate_backend(pid) {sleeping}")
    wait_until(old_connection, f"SELECT WHERE NOT EXISTS (SELECT {sleeping})")
    assert shapes(old_database)[S] == before
    old_connection.execute("DROP EVENT TRIGGER fault")
    alembic(old_database, "upgrade", "head")
    assert differences(old_database, S) == []


def test_a_terminated_backend_is_replaced_within_the_run(
    old_database: str, old_connection: psycopg.Connection[Any]
) -> None:
    """What may pass is tried again: a connection lost once costs nothing but a moment."""
    old_connection.execute("CREATE SEQUENCE public.faults; GRANT USAGE ON SEQUENCE public.faults TO PUBLIC")
    act = "CASE nextval('public.faults') WHEN 1 THEN pg_terminate_backend(pg_backend_pid()) END"
    old_connection.execute(FAULT.format(n=3, act=act).encode())
    assert "4 schemas: 4 done" in alembic(old_database, "upgrade", "head")
    old_connection.execute("DROP EVENT TRIGGER fault")
    for schema in ("template_tenant", S):
        assert differences(old_database, schema) == []


def test_a_held_lock_costs_that_tenant_and_no_other(
    old_database: str, old_connection: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Promise 5: nobody waits longer than the time-out, the tries are bounded, and the remedy is told."""
    monkeypatch.setenv("STATS_LOCK_TIMEOUT_MS", "100")
    with psycopg.connect(old_database) as other:
        other.execute(f"LOCK TABLE {S}.{OLD}")
        output = alembic(old_database, "upgrade", "head", status=3)
        waited = old_connection.execute("SELECT FROM pg_locks WHERE NOT granted").fetchall()
    assert f"{S}: failed, " in output
    assert "a table is locked (SQLSTATE 55P03); another session keeps a lock" in output
    assert waited == []
    assert "4 schemas: 1 done, 3 already there" in alembic(old_database, "upgrade", "head")


def test_two_migrators_at_once_converge(old_database: str, old_connection: psycopg.Connection[Any]) -> None:
    """Both end well, and every tenant is migrated once."""
    for number in range(100, 160):
        application.clone_tenant(old_connection, f"user_{number}")
    with process(old_database, "upgrade", "head") as one, process(old_database, "upgrade", "head") as two:
        outputs = [running.communicate(timeout=120)[0] for running in (one, two)]
    assert [one.returncode, two.returncode] == [0, 0], outputs
    for number in range(100, 160, 7):
        assert differences(old_database, f"user_{number}") == []
        assert old_connection.execute(f"SELECT version_num FROM user_{number}.{VERSION}").fetchall() == [("0002",)]


def test_what_is_read_between_schemas_is_read_again_if_another_session_changes_it(
    old_database: str, old_connection: psycopg.Connection[Any]
) -> None:
    """A version table that another session makes and drops all the while costs a command nothing, `current` neither."""
    alembic(old_database, "upgrade", "head")
    table = f"template_tenant.{VERSION}"
    stopped = threading.Event()

    def change() -> None:
        with psycopg.connect(old_database, autocommit=True) as other:
            while not stopped.is_set():
                other.execute(f"ALTER TABLE {table} RENAME TO away")
                other.execute(f"ALTER TABLE template_tenant.away RENAME TO {VERSION}")

    with ThreadPoolExecutor(1) as pool:
        changing = pool.submit(change)
        try:
            for _ in range(5):
                alembic(old_database, "current")
        finally:
            stopped.set()
        changing.result()


def test_a_tenant_created_meanwhile_is_migrated_too(old_database: str, old_connection: psycopg.Connection[Any]) -> None:
    """Promise 12: a last look finds the customer who came while the migration ran, cloned before or after it."""
    with psycopg.connect(old_database) as other:
        other.execute(f"LOCK TABLE user_10.{OLD}")
        with process(old_database, "upgrade", "head") as running:
            wait_until(old_connection, f"SELECT WHERE to_regclass('user_1.{NEW}') IS NOT NULL")
            application.clone_tenant(old_connection, "user_77")
            old_connection.execute("CREATE SCHEMA user_78")
            other.rollback()
            output = running.communicate(timeout=60)[0]
    assert "6 schemas: 6 done" in output
    for schema in ("user_10", "user_77", "user_78"):
        assert differences(old_database, schema) == []


def test_a_tenant_dropped_meanwhile_is_skipped(old_database: str, old_connection: psycopg.Connection[Any]) -> None:
    """A customer who leaves is no failure."""
    with psycopg.connect(old_database) as other:
        other.execute(f"LOCK TABLE user_10.{OLD}")
        with process(old_database, "upgrade", "head") as running:
            wait_until(old_connection, f"SELECT WHERE to_regclass('user_1.{NEW}') IS NOT NULL")
            other.execute("DROP SCHEMA user_10 CASCADE")
            other.commit()
            output = running.communicate(timeout=60)[0]
    assert running.returncode == 0
    assert "user_10: skipped, the schema was dropped while the migration went on" in output
    assert "4 schemas: 3 done, 0 already there, 1 skipped, 0 failed" in output


def test_a_role_without_privileges_on_one_tenant(
    old_database: str, old_connection: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Promise 4, as the role of MIGRATION_DATABASE_URL: the others are migrated, the remedy is told."""
    role = f"migrator_{psycopg.conninfo.conninfo_to_dict(old_database)['dbname']}"
    old_connection.execute(f"CREATE ROLE {role} LOGIN")
    for schema in ("template_tenant", "user_1", "user_10"):
        old_connection.execute(f"ALTER SCHEMA {schema} OWNER TO {role}; ALTER TABLE {schema}.{OLD} OWNER TO {role}")
    monkeypatch.setenv("MIGRATION_DATABASE_URL", url_of(old_database).replace("postgres@", f"{role}@"))
    output = alembic(old_database, "upgrade", "head", status=3)
    assert "user_2: failed" in output
    assert f"{OLD} belongs to postgres, and not to {role} (SQLSTATE 42501); run the migration as postgres" in output
    assert "4 schemas: 3 done" in output


def test_readers_and_writers_of_the_old_name_notice_nothing(
    old_database: str, old_connection: psycopg.Connection[Any]
) -> None:
    """Promise 6: plain statements on the old name, all through the migration and back: no error, no wrong sum."""
    stop = threading.Event()
    errors: list[Exception] = []
    bumps = dict.fromkeys(("user_1", S, "user_10"), 0)

    def work(schema: str) -> None:
        try:
            with psycopg.connect(old_database, autocommit=True) as connection:
                while not stop.is_set():
                    cursor = connection.execute(f"UPDATE {schema}.{OLD} SET total_jobs = total_jobs + 1")
                    assert cursor.rowcount == 1
                    bumps[schema] += 1
                    connection.execute(f"INSERT INTO {schema}.{OLD} (action_type_id, date) VALUES (9, '2025-01-01')")
                    connection.execute(f"DELETE FROM {schema}.{OLD} WHERE action_type_id = 9")
                    found = connection.execute(f"SELECT sum(total_jobs) FROM {schema}.{OLD}").fetchone()
                    assert found == (OLD_ROW["total_jobs"] + bumps[schema],)  # type: ignore[operator]
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(schema,)) for schema in bumps]
    for thread in threads:
        thread.start()
    try:
        for arguments in (("upgrade", "head"), ("downgrade", "base"), ("upgrade", "head")):
            run("alembic", *arguments, environment={"DATABASE_URL": url_of(old_database)})
            time.sleep(0.2)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert errors == []
    assert min(bumps.values()) > 20
