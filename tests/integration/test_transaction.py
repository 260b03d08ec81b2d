"""Promises 13, 16, 19, 20: what a tenant's transaction locks, proves and records; on a real server."""

import threading
from datetime import UTC, datetime, timedelta
from typing import Any

import dagster as dg
import psycopg
import pytest
import sqlalchemy as sa

from assets.marketplace_job_stats.upsert import Order, ProofError, write_tenant
from pipelines.partitions import Window
from tests import application
from tests.conftest import wait_until

PARTITIONS = dg.DailyPartitionsDefinition("2026-01-01", timezone="Europe/Paris")
WINDOW = Window.of(PARTITIONS, ["2026-01-15", "2026-01-16"])
NOON = datetime(2026, 1, 15, 12, tzinfo=UTC)
JOB = {"marketplace": "ebay", "action_type_id": 4, "status": "completed", "completed_at": NOON}


@pytest.fixture(autouse=True)
def source_rows(connection: psycopg.Connection[Any]) -> None:
    """Two jobs on the 15th and one on the 16th."""
    jobs = [JOB | {"id": 1}, JOB | {"id": 2, "status": "failed"}, JOB | {"id": 3, "completed_at": NOON + timedelta(1)}]
    application.insert(connection, "user_2", "marketplace_jobs", jobs)


def write(engine: sa.Engine, window: Window = WINDOW, run_id: str = "test") -> list[dict[str, Any]]:
    with engine.connect() as connection:
        return [day._asdict() for day in write_tenant(connection, "user_2", Order(window, run_id)).days]


def test_runs_and_a_live_writer_follow_each_other(connection: psycopg.Connection[Any], engine: sa.Engine) -> None:
    """Promise 16: a run waits for whoever writes the tenant's stats, and then sees what they wrote."""
    with psycopg.connect(connection.info.dsn) as other:
        # As a live counter, or another run, would: a row of the window, not committed yet.
        other.execute("LOCK TABLE user_2.marketplace_job_stats IN ROW EXCLUSIVE MODE")
        result: list[Any] = []
        run = threading.Thread(target=lambda: result.append(write(engine)))
        run.start()
        wait_until(connection, "SELECT FROM pg_locks WHERE NOT granted AND mode = 'ShareRowExclusiveLock'")
        other.execute("""
            INSERT INTO user_2.marketplace_job_stats (action_type_id, marketplace, date, total_jobs, success_count)
            VALUES (4, 'ebay', '2026-01-15', 1, 1)""")
        # What arrives while the run waits is in its snapshot, for that is taken after the lock.
        application.insert(connection, "user_2", "marketplace_jobs", [JOB | {"id": 4}])
        other.commit()
        run.join()
    assert [(day["total_jobs"], day["inserted"], day["updated"]) for day in result[0]] == [(3, 0, 1), (1, 1, 0)]


def test_readers_and_the_application_are_not_disturbed(connection: psycopg.Connection[Any], engine: sa.Engine) -> None:
    """Promise 20: while a run is in its transaction, stats can be read, and no source row is locked."""
    connection.execute("""
        CREATE FUNCTION public.pause() RETURNS trigger LANGUAGE plpgsql AS
        $$ BEGIN PERFORM pg_advisory_lock(1); PERFORM pg_advisory_unlock(1); RETURN NEW; END $$;
        CREATE TRIGGER pause AFTER INSERT ON user_2.marketplace_job_stats EXECUTE FUNCTION public.pause()""")
    connection.execute("SELECT pg_advisory_lock(1)")
    run = threading.Thread(target=write, args=(engine,))
    run.start()
    wait_until(connection, "SELECT FROM pg_locks WHERE NOT granted AND locktype = 'advisory'")
    connection.execute("SET lock_timeout = '1s'")
    assert connection.execute("SELECT FROM user_2.marketplace_job_stats").fetchall() == []
    connection.execute(
        "UPDATE user_2.marketplace_jobs SET priority = 9; UPDATE user_2.marketplace_tasks SET status = ''"
    )
    connection.execute("ALTER TABLE user_1.marketplace_job_stats ADD note text")
    connection.execute("SELECT pg_advisory_unlock(1)")
    run.join()
    assert connection.execute("SELECT count(*) FROM user_2.marketplace_job_stats").fetchone() == (2,)


@pytest.mark.parametrize(
    "column",
    ["total_jobs", "success_count", "failure_count", "cancelled_count", "retry_count", "duration_count", "total_tasks"],
)
@pytest.mark.parametrize("is_first", [True, False])
def test_the_proof_looks_at_every_count_of_every_day(
    connection: psycopg.Connection[Any], engine: sa.Engine, column: str, is_first: bool
) -> None:
    """Promise 19: whichever count of whichever day differs, the tenant's transaction ends without a trace."""
    connection.execute(f"""
        CREATE FUNCTION public.meddle() RETURNS trigger LANGUAGE plpgsql AS
        $$ BEGIN IF NEW.date = '2026-01-16' THEN NEW.{column} := NEW.{column} + 1; END IF; RETURN NEW; END $$;
        CREATE TRIGGER meddle BEFORE INSERT OR UPDATE ON user_2.marketplace_job_stats
        FOR EACH ROW EXECUTE FUNCTION public.meddle()""")
    if not is_first:  # A day that is held back is no excuse for the others.
        connection.execute("""
            INSERT INTO user_2.marketplace_job_stats (action_type_id, marketplace, date, total_jobs)
            VALUES (4, 'ebay', '2026-01-15', 99)""")
    with pytest.raises(ProofError, match=f"holds {column} = 1 for 2026-01-16, but 0|holds {column} = 2 for 2026-01-16"):
        write(engine)
    stored = connection.execute("SELECT total_jobs FROM user_2.marketplace_job_stats").fetchall()
    assert stored == ([] if is_first else [(99,)])
    assert connection.execute("SELECT FROM user_2.marketplace_job_stats_days").fetchall() == []


def test_days_in_doubt_take_one_statement_more(connection: psycopg.Connection[Any], engine: sa.Engine) -> None:
    """However many they are, and whatever lies between them; the source is read twice then, not once for each. All
    days but the first are covered by the job of the 16th, which is still there.
    """
    statements: list[str] = []
    sa.event.listen(engine, "before_cursor_execute", lambda *arguments: statements.append(arguments[2]))
    week = Window.of(PARTITIONS, [f"2026-01-{day}" for day in range(15, 22)])
    jobs = [JOB | {"id": 10 + day, "completed_at": NOON + timedelta(day)} for day in range(7)]
    application.insert(connection, "user_2", "marketplace_jobs", jobs)
    assert [day["is_held_back"] for day in write(engine, week)] == [False] * 7
    assert len(statements) == 4  # The lock, the ledger, the days, the proof.

    connection.execute("DELETE FROM user_2.marketplace_jobs WHERE extract(day FROM completed_at)::int % 2 = 1")
    statements.clear()
    assert [day["is_held_back"] for day in write(engine, week)] == [True] + [False] * 6
    assert len(statements) == 5


def test_rows_and_ledger_say_when_and_by_whom(connection: psycopg.Connection[Any], engine: sa.Engine) -> None:
    """Stamps and ledger tell of the run that last changed them; a held-back day tells both numbers."""
    stamps = (
        "SELECT created_at > now() - interval '1 minute', computed_at = created_at FROM user_2.marketplace_job_stats"
    )
    ledger = """SELECT date::text, outcome, time_zone, job_count, task_count, stored_job_count, stored_task_count,
                       run_id, changed_at > now() - interval '1 minute'
                  FROM user_2.marketplace_job_stats_days ORDER BY date"""
    application.insert(connection, "user_2", "marketplace_tasks", [{"job_id": 1, "status": "success"}] * 2)
    write(engine, run_id="first")
    assert connection.execute(stamps).fetchall() == [(True, True)] * 2
    entry = ("Europe/Paris", 2, 2, 2, 2, "first", True)
    assert connection.execute(ledger).fetchall() == [
        ("2026-01-15", "computed", *entry),
        ("2026-01-16", "computed", "Europe/Paris", 1, 0, 1, 0, "first", True),
    ]

    connection.execute("DELETE FROM user_2.marketplace_jobs WHERE id = 1")
    application.insert(connection, "user_2", "marketplace_jobs", [JOB | {"id": 9, "completed_at": NOON + timedelta(1)}])
    write(engine, run_id="second")
    assert connection.execute(ledger).fetchall() == [
        ("2026-01-15", "held_back", "Europe/Paris", 1, 0, 2, 2, "second", True),
        ("2026-01-16", "computed", "Europe/Paris", 2, 0, 2, 0, "second", True),
    ]
    changed = connection.execute("SELECT computed_at > created_at FROM user_2.marketplace_job_stats ORDER BY date")
    assert changed.fetchall() == [(False,), (True,)]


@pytest.mark.parametrize(("status", "outcome"), [("cancelled", "computed"), ("pending", "held_back")])
def test_any_finished_task_from_before_covers_a_day(
    connection: psycopg.Connection[Any], engine: sa.Engine, status: str, outcome: str
) -> None:
    """A cancelled task is finished, a pending one is not; where tasks are not covered, their numbers may not fall."""
    long_ago = NOON - timedelta(days=9)
    application.insert(connection, "user_2", "marketplace_jobs", [JOB | {"id": 90, "completed_at": long_ago}])
    application.insert(connection, "user_2", "marketplace_tasks", [{"id": 1, "job_id": 1, "status": "success"}])
    write(engine)
    connection.execute("DELETE FROM user_2.marketplace_tasks")
    application.insert(connection, "user_2", "marketplace_tasks", [{"status": status, "completed_at": long_ago}])
    write(engine)
    found = connection.execute("SELECT outcome FROM user_2.marketplace_job_stats_days ORDER BY date").fetchall()
    assert found == [(outcome,), ("computed",)]
