"""Promises 13 to 16, 19, 20, 23, 24: what a tenant's transaction locks, proves and records; on a real server."""

import threading
from datetime import UTC, datetime, timedelta
from typing import Any

import dagster as dg
import psycopg
import pytest
import sqlalchemy as sa

from assets.marketplace_job_stats import transaction
from assets.marketplace_job_stats.stats import COUNTS
from assets.marketplace_job_stats.transaction import (
    ComputeSpec,
    DefinitionError,
    ProofError,
    TenantResult,
    write_tenant,
)
from pipelines.partitions import Days, Window
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


def write(engine: sa.Engine, window: Window = WINDOW, run_id: str = "test", **options: Any) -> TenantResult:
    spec = ComputeSpec(window, run_id, Days(PARTITIONS), **options)
    with engine.connect() as connection:
        return write_tenant(connection, "user_2", spec, has_tasks=True)


def total_jobs(result: TenantResult) -> list[int]:
    """Of each day."""
    return [day.sums[COUNTS.index("total_jobs")] for _, day in sorted(result.days.items())]


def day(number: int) -> Window:
    return Window.of(PARTITIONS, [f"2026-01-{number:02}"])


def journal(connection: psycopg.Connection[Any]) -> list[Any]:
    """Its lines, without the times."""
    return connection.execute("""
        SELECT date::text, marketplace, run_id, cause, total_jobs_before, total_jobs_after, failure_count_before,
               failure_count_after, late_count, corrected_count, moved_in_count, moved_out_count, forgotten_count
          FROM user_2.marketplace_job_stats_changes ORDER BY changed_at, date, marketplace""").fetchall()


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
    assert total_jobs(result[0]) == [3, 1]
    assert [written for _, written in sorted(result[0].written.items())] == [(0, 1, 0), (1, 0, 0)]


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


def test_a_counted_job_stays_counted(connection: psycopg.Connection[Any], engine: sa.Engine) -> None:
    """Promise 15: whatever is deleted; corrections on the same day go through, and the row tells its jobs."""
    application.insert(connection, "user_2", "marketplace_tasks", [{"job_id": 1, "status": "success"}] * 2)
    write(engine)
    connection.execute("DELETE FROM user_2.marketplace_jobs WHERE id = 1; DELETE FROM user_2.marketplace_tasks")
    connection.execute("UPDATE user_2.marketplace_jobs SET status = 'completed' WHERE id = 2")
    assert total_jobs(write(engine)) == [2, 1]
    query = "SELECT success_count, failure_count, total_tasks FROM user_2.marketplace_job_stats ORDER BY date"
    assert connection.execute(query).fetchall() == [(2, 0, 2), (1, 0, 0)]
    facts = "SELECT job_id, deleted_at IS NOT NULL, task_count FROM user_2.marketplace_job_facts ORDER BY job_id"
    assert connection.execute(facts).fetchall() == [(1, True, 2), (2, False, 0), (3, False, 0)]
    assert sum(map(sum, write(engine).written.values())) == 0


def test_forgetting_takes_what_is_gone_and_nothing_else(connection: psycopg.Connection[Any], engine: sa.Engine) -> None:
    """Promise 15: with `allow_shrink` the days of the run equal the source; the journal says so."""
    application.insert(connection, "user_2", "marketplace_tasks", [{"job_id": 2, "status": "success"}])
    write(engine)
    connection.execute("DELETE FROM user_2.marketplace_jobs WHERE id IN (1, 3); DELETE FROM user_2.marketplace_tasks")
    write(engine)
    assert total_jobs(write(engine, day(15), "forget", allow_shrink=True)) == [1]
    query = "SELECT date::text, total_jobs, total_tasks FROM user_2.marketplace_job_stats ORDER BY date"
    assert connection.execute(query).fetchall() == [("2026-01-15", 1, 0), ("2026-01-16", 1, 0)]
    assert journal(connection) == [("2026-01-15", "ebay", "forget", "forgotten", 2, 1, 1, 1, 0, 1, 0, 0, 1)]


def test_a_move_changes_both_days(connection: psycopg.Connection[Any], engine: sa.Engine) -> None:
    """Also the one that nobody asked for; a day that nobody has computed waits for its job."""
    write(engine)
    connection.execute("UPDATE user_2.marketplace_jobs SET completed_at = completed_at + interval '1 day' WHERE id = 1")
    result = write(engine, day(15), "moved")
    assert sorted(map(str, result.written)) == ["2026-01-15", "2026-01-16"]
    assert journal(connection) == [
        ("2026-01-15", "ebay", "moved", "jobs", 2, 1, 1, 1, 0, 0, 0, 1, 0),
        ("2026-01-16", "ebay", "moved", "jobs", 1, 2, 0, 0, 0, 0, 1, 0, 0),
    ]
    connection.execute(
        "UPDATE user_2.marketplace_jobs SET completed_at = completed_at + interval '9 days' WHERE id = 1"
    )
    write(engine, day(16))
    dates = "SELECT date::text FROM user_2.{} WHERE date > '2026-01-16'"
    assert connection.execute(dates.format("marketplace_job_facts")).fetchall() == [("2026-01-25",)]
    assert connection.execute(dates.format("marketplace_job_stats")).fetchall() == []
    assert total_jobs(write(engine, day(25))) == [1]


def test_a_move_is_found_from_its_new_day(connection: psycopg.Connection[Any], engine: sa.Engine) -> None:
    """Whoever asks for the day that a job came to changes the day that it left."""
    write(engine)
    connection.execute("UPDATE user_2.marketplace_jobs SET completed_at = completed_at + interval '1 day' WHERE id = 1")
    result = write(engine, day(16))
    assert sorted(map(str, result.written)) == ["2026-01-15", "2026-01-16"]
    assert connection.execute("SELECT total_jobs FROM user_2.marketplace_job_stats ORDER BY date").fetchall() == [
        (1,),
        (2,),
    ]


def test_a_job_that_comes_back_is_as_if_it_had_never_gone(
    connection: psycopg.Connection[Any], engine: sa.Engine
) -> None:
    """A backup is restored: the mark goes, no number changes; the same id with another creation is another job."""
    write(engine)
    connection.execute("""
        CREATE TABLE user_2.backup AS SELECT * FROM user_2.marketplace_jobs;
        DELETE FROM user_2.marketplace_jobs WHERE id <= 2""")
    write(engine)
    gone = "SELECT job_id, deleted_at IS NOT NULL FROM user_2.marketplace_job_facts ORDER BY 1, created_at"
    assert connection.execute(gone).fetchall() == [(1, True), (2, True), (3, False)]
    connection.execute("INSERT INTO user_2.marketplace_jobs SELECT * FROM user_2.backup WHERE id = 1")
    application.insert(connection, "user_2", "marketplace_jobs", [JOB | {"id": 2, "created_at": NOON}])
    assert total_jobs(write(engine)) == [3, 1]
    assert sorted(connection.execute(gone).fetchall()) == [(1, False), (2, False), (2, True), (3, False)]
    assert [line[4:6] for line in journal(connection)] == [(2, 3)]


def test_what_somebody_else_has_written_is_made_right(connection: psycopg.Connection[Any], engine: sa.Engine) -> None:
    """A live counter through the view, a person: found in every run over the day, also where no job has changed."""
    connection.execute("UPDATE user_2.marketplace_jobs SET marketplace = 'vinted'")
    write(engine)
    connection.execute("UPDATE user_2.vinted_job_stats SET total_jobs = total_jobs + 1 WHERE date = '2026-01-15'")
    connection.execute("DELETE FROM user_2.marketplace_job_stats WHERE date = '2026-01-16'")
    assert total_jobs(write(engine, run_id="again")) == [2, 1]
    assert journal(connection) == [
        ("2026-01-15", "vinted", "again", "overwritten", 3, 2, 1, 1, 0, 0, 0, 0, 0),
        ("2026-01-16", "vinted", "again", "overwritten", None, 1, None, 0, 0, 0, 0, 0, 0),
    ]


def test_numbers_without_facts_fall_only_where_the_source_is_complete(
    connection: psycopg.Connection[Any], engine: sa.Engine
) -> None:
    """A counter's row may fall, an exact one may not; pruned facts make a day one of these."""
    connection.execute("""
        INSERT INTO user_2.marketplace_job_stats (action_type_id, marketplace, date, total_jobs)
        VALUES (4, 'ebay', '2026-01-15', 4), (4, 'ebay', '2026-01-16', 3)""")
    # The 15th is the first day, and has half of what is stored; the 16th has a third.
    result = write(engine)
    assert total_jobs(result) == [2, 3]
    assert sorted(map(str, result.held_back)) == ["2026-01-16"]
    assert journal(connection) == []
    assert total_jobs(write(engine, allow_shrink=True)) == [2, 1]
    connection.execute("DELETE FROM user_2.marketplace_job_facts; DELETE FROM user_2.marketplace_jobs WHERE id = 1")
    result = write(engine, run_id="pruned")
    assert total_jobs(result) == [2, 1]
    assert sorted(map(str, result.held_back)) == ["2026-01-15"]
    # What stays held back is not looked at for its definition's sake.
    assert write(engine, only_missing=True).days == {}


def test_days_of_an_older_definition_get_facts(connection: psycopg.Connection[Any], engine: sa.Engine) -> None:
    """Promise 23: as the release before left them. Exact numbers never fall; what was unknown before is no change."""
    write(engine)
    connection.execute("""
        DELETE FROM user_2.marketplace_job_facts;
        UPDATE user_2.marketplace_job_stats SET wait_count = NULL, wait_sum_ms = NULL, p99_duration_ms = NULL;
        UPDATE user_2.marketplace_job_stats_days SET definition = 1, row_count = NULL, row_versions = NULL;
        DELETE FROM user_2.marketplace_jobs WHERE id = 1;
        UPDATE user_2.marketplace_jobs SET status = 'failed' WHERE id = 3""")
    result = write(engine, only_missing=True, run_id="new")
    assert sorted(map(str, result.held_back)) == ["2026-01-15", "2026-01-16"]
    connection.execute("UPDATE user_2.marketplace_jobs SET status = 'completed' WHERE id = 3")
    assert sorted(map(str, write(engine).held_back)) == ["2026-01-15"]
    query = "SELECT date::text, wait_count FROM user_2.marketplace_job_stats ORDER BY date"
    assert connection.execute(query).fetchall() == [("2026-01-15", None), ("2026-01-16", 0)]
    assert journal(connection) == []


def test_a_newer_definition_is_never_computed_over(
    connection: psycopg.Connection[Any], engine: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Promise 10: older code refuses a tenant that a newer release has computed."""
    with monkeypatch.context() as newer:
        newer.setattr(transaction, "DEFINITION", 3)
        write(engine)
    with pytest.raises(DefinitionError, match="computed by definition 3, and this release knows no newer one than 2"):
        write(engine)


def test_rows_and_ledger_say_when_and_by_whom(connection: psycopg.Connection[Any], engine: sa.Engine) -> None:
    """Stamps and ledger tell of the run that last changed them."""
    stamps = (
        "SELECT created_at > now() - interval '1 minute', computed_at = created_at FROM user_2.marketplace_job_stats"
    )
    ledger = """SELECT date::text, outcome, definition, time_zone, job_count, task_count, stored_job_count,
                       stored_task_count, no_start_count, run_id, changed_at > now() - interval '1 minute'
                  FROM user_2.marketplace_job_stats_days ORDER BY date"""
    application.insert(connection, "user_2", "marketplace_tasks", [{"job_id": 1, "status": "success"}] * 2)
    write(engine, run_id="first")
    assert connection.execute(stamps).fetchall() == [(True, True)] * 2
    assert connection.execute(ledger).fetchall() == [
        ("2026-01-15", "computed", 2, "Europe/Paris", 2, 2, 2, 2, 2, "first", True),
        ("2026-01-16", "computed", 2, "Europe/Paris", 1, 0, 1, 0, 1, "first", True),
    ]
    application.insert(connection, "user_2", "marketplace_jobs", [JOB | {"id": 9, "completed_at": NOON + timedelta(1)}])
    write(engine, run_id="second")
    assert [row[-2] for row in connection.execute(ledger)] == ["first", "second"]
    changed = connection.execute("SELECT computed_at > created_at FROM user_2.marketplace_job_stats ORDER BY date")
    assert changed.fetchall() == [(False,), (True,)]


def test_a_job_of_an_unknown_marketplace_changes_the_ledger_alone(
    connection: psycopg.Connection[Any], engine: sa.Engine
) -> None:
    """It is reported with its action, and the day's rows stay as they are."""
    write(engine)
    application.insert(connection, "user_2", "marketplace_jobs", [JOB | {"id": 9, "marketplace": "depop"}])
    result = write(engine)
    assert result.uncounted["unknown_marketplace", "depop", 4] == 1
    query = "SELECT unknown_marketplace_count FROM user_2.marketplace_job_stats_days ORDER BY date"
    assert connection.execute(query).fetchall() == [(1,), (0,)]
    assert sum(map(sum, result.written.values())) == 0


def test_without_a_tasks_table_task_numbers_are_unknown(connection: psycopg.Connection[Any], engine: sa.Engine) -> None:
    """A job keeps what it had; one that was first seen without the table has null, until the table is there."""
    application.insert(connection, "user_2", "marketplace_tasks", [{"job_id": 1, "status": "success"}])
    write(engine, day(15))
    connection.execute("ALTER TABLE user_2.marketplace_tasks RENAME TO elsewhere")
    with engine.connect() as worker:
        write_tenant(worker, "user_2", ComputeSpec(WINDOW, "test", Days(PARTITIONS)), has_tasks=False)
    query = "SELECT total_tasks FROM user_2.marketplace_job_stats ORDER BY date"
    assert connection.execute(query).fetchall() == [(1,), (None,)]
    connection.execute("ALTER TABLE user_2.elsewhere RENAME TO marketplace_tasks")
    write(engine)
    assert connection.execute(query).fetchall() == [(1,), (0,)]


def test_nothing_of_an_owner_is_found_by_name(connection: psycopg.Connection[Any], engine: sa.Engine) -> None:
    """Promise 27: functions and operators in a tenant's schema that fit better than PostgreSQL's own are not called."""
    connection.execute("""
        CREATE TABLE user_2.calls (what text);
        CREATE FUNCTION user_2.width_bucket(timestamptz, timestamptz[]) RETURNS integer LANGUAGE plpgsql AS
            $$ BEGIN INSERT INTO user_2.calls VALUES ('width_bucket'); RETURN 1; END $$;
        CREATE FUNCTION user_2.eq(varchar, varchar) RETURNS boolean LANGUAGE plpgsql AS
            $$ BEGIN INSERT INTO user_2.calls VALUES ('eq'); RETURN true; END $$;
        CREATE OPERATOR user_2.= (FUNCTION = user_2.eq, LEFTARG = varchar, RIGHTARG = varchar)""")
    write(engine)
    assert connection.execute("SELECT * FROM user_2.calls").fetchall() == []
