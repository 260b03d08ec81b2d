"""Promises 13 to 17, 19 and 22 while things break: real processes are killed, real servers crash.

Whatever happens, each tenant is wholly old or wholly new, a run that says success has its data on disk, and one clean
run afterwards makes everything right. The figures are printed at the end.
"""

import copy
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import psycopg
import pytest

from migrations.target import HEAD
from tests.conftest import RUN_ROLE, hide_triggers
from tests.faults.harness import DAYS, FIGURES, FIRST, LAST, TENANTS, Run, World

WAITING = "SELECT FROM pg_stat_activity WHERE usename = 'stats' AND wait_event_type = 'Lock' AND wait_event = '{}'"
PAUSES = {
    "lock": ("LOCK TABLE user_4.marketplace_job_stats IN SHARE MODE", "relation"),
    "write": ("CREATE TRIGGER pause AFTER UPDATE ON user_4.marketplace_job_stats EXECUTE FUNCTION pause()", "advisory"),
    "ledger": (
        "CREATE TRIGGER pause AFTER INSERT OR UPDATE ON user_4.marketplace_job_stats_days EXECUTE FUNCTION pause()",
        "advisory",
    ),
    "commit": (
        "CREATE CONSTRAINT TRIGGER pause AFTER INSERT OR UPDATE ON user_4.marketplace_job_stats_days "
        "DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION pause()",
        "advisory",
    ),
}


@contextmanager
def paused(world: World, point: str) -> Iterator[psycopg.Connection[tuple[object, ...]]]:
    """While it is open, a run waits in the transaction of user_4 at this point."""
    statement, event = PAUSES[point]
    with world.connect() as connection, psycopg.connect(world.conninfo) as holder:
        if event == "relation":
            holder.execute(statement)
        else:
            connection.execute(statement)
            hide_triggers(connection)
            holder.execute("SELECT pg_advisory_lock(1)")
        try:
            yield connection
        finally:
            holder.execute("SELECT pg_advisory_unlock_all()")
            holder.rollback()
            world.quiet()
            if event == "advisory":
                connection.execute(f"DROP TRIGGER pause ON {statement.split(' ON ')[1].split()[0]}")


@pytest.mark.parametrize("point", PAUSES)
@pytest.mark.parametrize("repetition", range(2))
def test_killed_at_a_statement(world: World, point: str, repetition: int) -> None:
    """SIGKILL while a tenant's transaction waits for its lock, writes the stats or the ledger, or commits."""
    world.change()
    with paused(world, point) as connection:
        run = Run(world.url)
        world.wait_for(connection, WAITING.format(PAUSES[point][1]))
        run.process.kill()
        FIGURES["faults: process killed"] += 1
        assert run.wait() is None
    world.judge(None)
    world.rerun()


@pytest.mark.parametrize("attempt", range(16))
def test_killed_at_any_time(world: World, attempt: int) -> None:
    """SIGKILL somewhere between a run's first connection and its end, mostly in the middle of transactions."""
    world.change()
    run = Run(world.url)
    with world.connect() as connection:
        world.wait_for(connection, f"SELECT FROM pg_stat_activity WHERE usename = '{RUN_ROLE}'")
        time.sleep(world.random.uniform(0, 0.5))
        hit = connection.execute(
            f"SELECT FROM pg_stat_activity WHERE usename = '{RUN_ROLE}' AND state <> 'idle' AND xact_start IS NOT NULL"
        ).fetchall()
        run.process.kill()
    FIGURES["faults: process killed"] += 1
    FIGURES["faults: process killed in a transaction"] += bool(hit)
    world.judge(run.wait())
    if attempt % 4 == 3:
        world.rerun()


@pytest.mark.parametrize("count", [1, 2, 4, 8, 16])
def test_backends_terminated(world: World, count: int) -> None:
    """Connections of the run are ended at random, that of the sentinel connection among them."""
    world.change()
    run = Run(world.url)
    hit = 0
    with world.connect() as connection:
        while run.process.is_alive() and hit < count:
            time.sleep(world.random.uniform(0.01, 0.15))
            hit += len(
                connection.execute(f"""
                SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = '{RUN_ROLE}'
                 ORDER BY random() LIMIT 1""").fetchall()
            )
    FIGURES["faults: backend terminated"] += hit
    assert hit
    world.judge(run.wait())
    world.rerun()


@pytest.mark.parametrize("attempt", range(8))
def test_the_server_crashes(world: World, attempt: int) -> None:
    """The server forgets what was not on disk in the middle of a run, which begins again by itself and succeeds."""
    world.change()
    run = Run(world.url)
    with world.connect() as connection:
        # The run has connected, and a worker of it, too: before that a crash is one sentence.
        world.wait_for(connection, f"SELECT FROM pg_stat_activity WHERE usename = '{RUN_ROLE}' OFFSET 1")
        time.sleep(world.random.uniform(0, 0.6))
        victims = connection.execute(
            f"SELECT pid FROM pg_stat_activity WHERE usename = '{RUN_ROLE}' ORDER BY random() LIMIT 1"
        ).fetchall()
    if attempt % 4 == 3 and victims:
        os.kill(victims[0][0], signal.SIGKILL)  # The postmaster then ends all others, and recovers.
    else:
        world.server.restart()
    FIGURES["faults: server crashed"] += 1
    answer = run.wait()
    assert answer and answer["success"], answer
    world.judge(answer)
    if attempt % 4 == 3:
        world.rerun()


def test_what_is_done_is_forgotten_by_a_crash(world: World) -> None:
    """The test's own proof: without waiting for the disk, a crash really loses what was committed."""
    with world.connect() as connection:
        connection.execute("CREATE TABLE IF NOT EXISTS public.trace (n int)")
        connection.execute("SET synchronous_commit = off")
        connection.execute("INSERT INTO public.trace VALUES (1)")
    world.server.restart()
    with world.connect() as connection:
        assert connection.execute("SELECT count(*) FROM public.trace").fetchone() == (0,)


@pytest.mark.parametrize("limit", [1, 2, 3, 0])
def test_connections_run_out(world: World, limit: int) -> None:
    """With fewer connections than workers a run does with those that it gets; with none it says so at once."""
    world.change()
    with world.connect() as connection:
        connection.execute(f"ALTER ROLE {RUN_ROLE} CONNECTION LIMIT {limit}")
        started = time.monotonic()
        answer = Run(world.url).wait()
        took = time.monotonic() - started
        connection.execute(f"ALTER ROLE {RUN_ROLE} CONNECTION LIMIT -1")
    FIGURES["faults: connections exhausted"] += 1
    assert answer
    assert answer["success"] == (limit > 1)
    if limit <= 1:
        assert "too many connections for role" in answer["message"]
        assert took < 20
    world.judge(answer)
    world.rerun()


def test_a_locked_tenant(world: World) -> None:
    """Who keeps a tenant's table costs that tenant its run, and no other; who keeps it briefly costs nothing."""
    world.change()
    with psycopg.connect(world.conninfo) as holder:
        holder.execute("LOCK TABLE user_6.marketplace_job_stats")
        answer = Run(world.url).wait()
    FIGURES["faults: lock held"] += 2
    assert answer and not answer["success"]
    assert "user_6: canceling statement due to lock timeout (SQLSTATE 55P03)" in answer["message"]
    assert world.judge(answer) == {schema: "old" if schema == "user_6" else "new" for schema in TENANTS}
    world.change()
    with psycopg.connect(world.conninfo) as holder:
        holder.execute("LOCK TABLE user_6.marketplace_job_stats")
        run = Run(world.url)
        with world.connect() as connection:
            world.wait_for(connection, WAITING.format("relation"))
        time.sleep(1.5)  # Longer than one try may wait.
        holder.rollback()
        answer = run.wait()
    assert answer == {"success": True, "message": ""}
    world.judge(answer)


@pytest.mark.parametrize("count", [2, 4])
def test_runs_overlap(world: World, count: int) -> None:
    """Nightly, backfill and weekly at once, with live writers of stats and sources: no error, no deadlock."""
    stop = threading.Event()
    errors: list[BaseException] = []
    waits: list[float] = []

    def write(seed: int) -> None:
        """The old live counter: several bumps of a tenant in one transaction, through the old name."""
        try:
            with psycopg.connect(world.conninfo) as connection:
                while not stop.is_set():
                    schema = TENANTS[(len(waits) * 5 + seed) % len(TENANTS)]
                    started = time.monotonic()
                    for day in DAYS[::2]:
                        bump = f"UPDATE {schema}.vinted_job_stats SET total_jobs = total_jobs + 1 WHERE date = %s"
                        connection.execute(bump, [day.date])
                        retry = f"UPDATE {schema}.marketplace_jobs SET retry_count = retry_count + 1"
                        connection.execute(f"{retry} WHERE completed_at >= %s", [day.start])
                    connection.commit()
                    waits.append(time.monotonic() - started)
        except BaseException as error:
            errors.append(error)

    deadlocks = "SELECT deadlocks FROM pg_stat_database WHERE datname = 'world'"
    with world.connect() as connection:
        before = connection.execute(deadlocks).fetchone()
        for schema in TENANTS[::2]:  # Where rows are missing, two runs would insert the same ones.
            connection.execute(f"DELETE FROM {schema}.marketplace_job_stats")
        writers = [threading.Thread(target=write, args=(seed,)) for seed in range(2)]
        for writer in writers:
            writer.start()
        narrow = DAYS[-3].date.isoformat()
        kinds = ((narrow, LAST, "nightly"), (FIRST, LAST), (FIRST, LAST, "weekly"), (FIRST, LAST))[:count]
        answers: list[object] = []
        while len(waits) <= 20 and not errors:  # On a quick machine once is not enough for the writers.
            runs = [Run(world.url, *kind) for kind in kinds]
            answers += [run.wait() for run in runs]
            FIGURES["faults: runs overlapped"] += count
        stop.set()
        for writer in writers:
            writer.join()
        assert errors == []
        assert [answer for answer in answers if answer != {"success": True, "message": ""}] == []
        assert len(waits) > 20
        assert max(waits) < 5
        assert connection.execute(deadlocks).fetchone() == before
        world.new = {schema: world.expected(connection, schema) for schema in TENANTS}
        world.rerun()


@pytest.mark.parametrize("statement", ["ALTER SCHEMA user_4 RENAME TO user_404", "DROP SCHEMA user_4 CASCADE"])
def test_a_tenant_leaves(world: World, statement: str) -> None:
    """A tenant renamed or dropped in the middle of a run is gone, not failed; under its new name it is computed."""
    world.change()
    world.next["user_404"] = copy.deepcopy(world.memory["user_4"])
    with psycopg.connect(world.conninfo) as holder:
        holder.execute("CREATE SCHEMA spare")
        for table in ("marketplace_jobs", "marketplace_tasks", *HEAD):
            holder.execute(f"CREATE TABLE spare.{table} (LIKE user_4.{table} INCLUDING ALL)")
            holder.execute(f"INSERT INTO spare.{table} SELECT * FROM user_4.{table}")
            holder.execute(f"GRANT ALL ON spare.{table} TO {RUN_ROLE}; GRANT USAGE ON SCHEMA spare TO {RUN_ROLE}")
        holder.commit()
        holder.execute("LOCK TABLE user_4.marketplace_job_stats")
        run = Run(world.url)
        with world.connect() as connection:
            world.wait_for(connection, WAITING.format("relation"))
        holder.execute(statement.encode())
        holder.commit()
        answer = run.wait()
        FIGURES["faults: tenant gone"] += 1
        assert answer == {"success": True, "message": ""}
        holder.execute("DROP SCHEMA IF EXISTS user_4 CASCADE; ALTER SCHEMA spare RENAME TO user_4")
        holder.commit()
    world.judge(answer, spared="user_4")
    world.rerun()
    with world.connect() as connection:
        if "RENAME" in statement:
            assert world.stored(connection, "user_404") == world.expected(connection, "user_404")
        connection.execute("DROP SCHEMA IF EXISTS user_404 CASCADE")
    del world.next["user_404"]


def test_the_suite_has_injected_what_it_says() -> None:
    """A suite that breaks nothing proves nothing. It is the last test of this file."""
    assert FIGURES["faults: process killed"] >= 24
    assert FIGURES["faults: process killed in a transaction"] >= 5
    assert FIGURES["faults: backend terminated"] >= 10
    assert FIGURES["faults: server crashed"] >= 8
    assert FIGURES["tenants old"] >= 50 and FIGURES["tenants new"] >= 50
    assert FIGURES["runs killed"] >= 12
    assert FIGURES["wrong rows"] == FIGURES["tenants mixed"] == FIGURES["lies"] == 0
