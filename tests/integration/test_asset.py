"""The asset as Dagster runs it: isolation of tenants, what is reported, and replay; on a real server."""

import threading
from datetime import timedelta
from typing import Any

import dagster as dg
import psycopg
import pytest
import sqlalchemy as sa

from assets.marketplace_job_stats import asset
from tests import application
from tests.conftest import hide_triggers, url_of, wait_until
from tests.integration.common import DAY, NOON, TENANTS, failure, job, materialize, metadata, total_jobs

pytestmark = pytest.mark.usefixtures("source_rows")


def test_every_day_of_a_range_is_materialized_with_its_numbers(connection: psycopg.Connection[Any], url: str) -> None:
    """A range is one run; each day has one event with its own numbers, a day without rows too, with row count 0."""
    result = materialize("2026-01-14", "2026-01-17")
    assert result.success
    days = metadata(result)
    assert list(days) == ["2026-01-14", "2026-01-15", "2026-01-16", "2026-01-17"]
    assert {day: values["dagster/row_count"] for day, values in days.items()} == {
        "2026-01-14": 0,
        "2026-01-15": 3,
        "2026-01-16": 0,
        "2026-01-17": 3,
    }
    of_the_15th = days["2026-01-15"]
    assert of_the_15th["jobs"] == 6
    assert of_the_15th["failed_jobs"] == 3
    assert of_the_15th["tasks"] == 3
    assert of_the_15th["run_rows_inserted"] == 3
    assert (of_the_15th["run_tenants_done"], of_the_15th["run_tenants_skipped"], of_the_15th["run_tenants_failed"]) == (
        3,
        0,
        0,
    )
    # What belongs to the whole run stands once, with the last day.
    assert "run_window" not in of_the_15th
    preview = days["2026-01-17"]["run_preview"]
    assert preview == [
        {
            "marketplace": "vinted",
            "action": "publish",
            "jobs": 6,
            "failed": 3,
            "success %": 50.0,
            "mean ms": 1500,
            "tasks": 3,
            "retries": 6,
        },
        {
            "marketplace": "ebay",
            "action": "update",
            "jobs": 3,
            "failed": 0,
            "success %": 100.0,
            "mean ms": 172801500,
            "tasks": 0,
            "retries": 0,
        },
    ]
    assert total_jobs(connection, "user_10") == 3


def test_the_second_run_changes_nothing(connection: psycopg.Connection[Any], url: str) -> None:
    """Promise 13: the same row versions and the same sequence afterwards, in every table of ours, and it says so."""

    def state() -> list[Any]:
        names = ("stats", "stats_days", "stats_changes", "facts")
        tables = [f"{schema}.marketplace_job_{name}" for schema in TENANTS for name in names]
        rows = [connection.execute(f"SELECT ctid, xmin, * FROM {table} ORDER BY ctid").fetchall() for table in tables]
        sequences = connection.execute("SELECT schemaname, sequencename, last_value FROM pg_sequences ORDER BY 1, 2")
        return [*rows, sequences.fetchall()]

    materialize("2026-01-14", "2026-01-17")
    before = state()
    days = metadata(materialize("2026-01-14", "2026-01-17"))
    assert state() == before
    assert [days["2026-01-15"][f"run_rows_{what}"] for what in ("inserted", "updated", "deleted", "unchanged")] == [
        0,
        0,
        0,
        3,
    ]


def test_late_corrected_and_deleted_rows_come_right(connection: psycopg.Connection[Any], url: str) -> None:
    """Promise 14: what changed is inserted, updated or deleted, and reported as that; older rows cover the day."""
    old = job(id=90, completed_at=NOON - timedelta(days=30))
    application.insert(connection, "user_2", "marketplace_jobs", [old])
    old_task = {"job_id": 90, "status": "success", "completed_at": NOON - timedelta(days=30)}
    application.insert(connection, "user_2", "marketplace_tasks", [old_task])
    materialize(DAY, "2026-01-17")
    connection.execute("UPDATE user_2.marketplace_jobs SET status = 'completed' WHERE id = 2")
    connection.execute("UPDATE user_2.marketplace_jobs SET marketplace = 'etsy', action_type_id = 9 WHERE id = 3")

    result = materialize(DAY, "2026-01-17", tenants=["user_2"])

    days = metadata(result, observed=True)
    assert [days[DAY][f"run_rows_{what}"] for what in ("inserted", "updated", "deleted")] == [0, 1, 0]
    assert [days["2026-01-17"][f"run_rows_{what}"] for what in ("inserted", "updated", "deleted")] == [1, 0, 1]


def test_one_bad_tenant_stops_no_other(connection: psycopg.Connection[Any], url: str) -> None:
    """Each kind of bad tenant is named with its reason; the days are there; the run has failed."""
    connection.execute("""
        CREATE SCHEMA user_3;
        CREATE SCHEMA user_4; CREATE TABLE user_4.vinted_jobs (id int); CREATE TABLE user_4.plugin_tasks (id int);
        ALTER TABLE user_2.marketplace_job_stats DROP CONSTRAINT uq_marketplace_job_stats_action_marketplace_date;
        ALTER TABLE user_10.marketplace_jobs ALTER completed_at TYPE text;
        CREATE SCHEMA user_5;
        CREATE TABLE user_5.marketplace_jobs (id int);
        CREATE TABLE user_5.marketplace_tasks (id int);
        CREATE SCHEMA user_settings; CREATE SCHEMA user_1_old; CREATE SCHEMA "User_1"; CREATE SCHEMA user_;
        CREATE SCHEMA "user_6""; drop schema user_2 cascade; --"
    """)
    result = materialize()

    assert not result.success
    assert total_jobs(connection, "user_1") == 2
    day = metadata(result)[DAY]
    assert (day["run_tenants_done"], day["run_tenants_skipped"], day["run_tenants_failed"]) == (1, 2, 3)
    skipped = {record["tenant"]: record["reason"] for record in day["run_skipped_tenants"]}
    assert skipped == {
        "user_3": "marketplace_jobs is missing",
        "user_4": "marketplace_jobs still has vinted_jobs, its name before the rename",
    }
    failed = {record["tenant"]: record["reason"] for record in day["run_failed_tenants"]}
    assert failed["user_2"] == (
        "marketplace_job_stats has no unique key on action_type_id, marketplace, date: "
        "run `alembic -x tenant=user_2 upgrade head`"
    )
    assert failed["user_5"].startswith("marketplace_job_stats is missing: run `alembic")
    assert failed["user_10"] == (
        "marketplace_jobs has completed_at as text, not timestamp with time zone, so its values would not be what they "
        "say: change the type in user_10.marketplace_jobs"
    )
    assert all(schema in failure(result) for schema in failed)


def test_a_unique_key_of_any_name_will_do(connection: psycopg.Connection[Any], url: str) -> None:
    """Clones have names that PostgreSQL chose, and columns in another order: the key is found by what it is."""
    connection.execute("""
        ALTER TABLE user_2.marketplace_job_stats DROP CONSTRAINT uq_marketplace_job_stats_action_marketplace_date;
        CREATE UNIQUE INDEX some_name ON user_2.marketplace_job_stats (date, marketplace, action_type_id)""")
    assert materialize().success
    assert total_jobs(connection, "user_2") == 2


def test_a_tenant_dropped_meanwhile_is_gone_not_failed(
    connection: psycopg.Connection[Any], database: str, url: str
) -> None:
    """A customer who leaves while the run is about to compute it is skipped, with that reason."""
    with psycopg.connect(database) as leaving:
        leaving.execute("LOCK TABLE user_2.marketplace_job_stats")
        results: list[dg.ExecuteInProcessResult] = []
        run = threading.Thread(target=lambda: results.append(materialize()))
        run.start()
        wait_until(
            connection, "SELECT FROM pg_stat_activity WHERE datname = current_database() AND wait_event = 'relation'"
        )
        leaving.execute("DROP SCHEMA user_2 CASCADE")
    run.join()
    assert results[0].success
    [record] = metadata(results[0])[DAY]["run_skipped_tenants"]
    assert record == {"tenant": "user_2", "reason": "gone: dropped while the run went on"}


def test_a_locked_tenant_fails_after_the_time_out(database: str, url: str) -> None:
    """A lock that another session keeps costs that tenant its run, with SQLSTATE and remedy, and no other."""
    with psycopg.connect(database) as other:
        other.execute("LOCK TABLE user_2.marketplace_job_stats IN SHARE MODE")
        result = materialize()
    assert "user_2: canceling statement due to lock timeout (SQLSTATE 55P03)" in failure(result)
    assert metadata(result)[DAY]["run_tenants_done"] == 2


def test_the_days_numbers_are_what_is_stored_whatever_a_run_has_computed(
    connection: psycopg.Connection[Any], database: str, url: str
) -> None:
    """Of tenants that failed, that have lost their source, or that were not due, too; a run of some shows its own."""
    whole = metadata(materialize())[DAY]
    names = ("dagster/row_count", "jobs", "failed_jobs", "tasks", "tenants_computed")
    assert [whole[name] for name in names] == [3, 6, 3, 3, 3]
    connection.execute("DROP TABLE user_1.marketplace_jobs")
    with psycopg.connect(database) as other:
        other.execute("LOCK TABLE user_2.marketplace_job_stats IN SHARE MODE")
        partly = metadata(materialize())[DAY]
    assert [partly[name] for name in names] == [whole[name] for name in names]
    run = [partly[f"run_tenants_{what}"] for what in ("done", "skipped", "failed")]
    assert (run, partly["run_rows_unchanged"]) == ([1, 1, 1], 1)
    not_due = metadata(materialize(only_missing=True))[DAY]
    assert [not_due[name] for name in names] == [whole[name] for name in names]
    assert not_due["run_tenants_done"] == 0
    some = metadata(materialize(tenants=["user_10"]), observed=True)[DAY]
    assert (some["run_jobs"], set(names).intersection(some)) == (2, set())

    # What cannot be read is not shown as less.
    with psycopg.connect(database) as other:
        other.execute("LOCK TABLE user_2.marketplace_job_stats")
        unread = metadata(materialize())[DAY]
    assert set(names).intersection(unread) == set()
    assert [row["tenant"] for row in unread["run_unread_tenants"]] == ["user_2"]


def test_stored_counts_that_differ_fail_the_tenant(connection: psycopg.Connection[Any], url: str) -> None:
    """Promise 19: if a trigger writes something else than what was counted, nothing of the tenant is kept."""
    connection.execute("""
        CREATE FUNCTION user_2.meddle() RETURNS trigger LANGUAGE plpgsql AS
        $$ BEGIN NEW.success_count := NEW.success_count + 1; RETURN NEW; END $$;
        CREATE TRIGGER meddle BEFORE INSERT ON user_2.marketplace_job_stats
        FOR EACH ROW EXECUTE FUNCTION user_2.meddle()""")
    hide_triggers(connection)
    result = materialize()
    assert "marketplace_job_stats holds success_count = 2 for 2026-01-15, but 1 were counted" in failure(result)
    assert total_jobs(connection, "user_2") == 0
    assert connection.execute("SELECT FROM user_2.marketplace_job_stats_days").fetchall() == []
    assert total_jobs(connection, "user_10") == 2


def test_days_without_facts_are_held_back_and_reported(connection: psycopg.Connection[Any], url: str) -> None:
    """Promise 15: where no facts stand behind them, stored numbers do not fall; both are reported."""
    materialize(DAY, "2026-01-17")
    connection.execute("DELETE FROM user_2.marketplace_jobs WHERE id = 1")
    assert metadata(materialize())[DAY]["tenants_held_back"] == 0
    connection.execute("DELETE FROM user_2.marketplace_job_facts")

    day = metadata(materialize())[DAY]
    assert (day["tenants_held_back"], day["run_days_held_back"], day["jobs"]) == (1, 1, 6)
    [record] = day["run_held_back"]
    assert (record["tenant"], record["stored jobs"], record["jobs in the facts"]) == ("user_2", 2, 1)
    assert total_jobs(connection, "user_2") == 3


def test_forgetting_needs_the_names_of_tenants(connection: psycopg.Connection[Any], url: str) -> None:
    """Promise 15: `allow_shrink` for everybody is refused; with `tenants`, the run's page says what was forgotten."""
    materialize(DAY, "2026-01-17")
    connection.execute("DELETE FROM user_2.marketplace_jobs WHERE id = 1; DELETE FROM user_1.marketplace_jobs")
    assert "name the `tenants`" in failure(materialize(allow_shrink=True))
    assert total_jobs(connection, "user_2") == 3
    result = materialize(allow_shrink=True, tenants=["user_2"])
    assert result.success
    assert (total_jobs(connection, "user_2"), total_jobs(connection, "user_1")) == (2, 3)
    day = metadata(result, observed=True)[DAY]
    assert day["run_settled_rows_changed"] == 1
    [change] = day["run_changes"]
    assert (change["tenant"], change["cause"], change["jobs before"], change["jobs after"], change["forgotten"]) == (
        "user_2", "forgotten", 2, 1, 1,
    )  # fmt: skip


def test_a_run_of_some_tenants_only_observes(connection: psycopg.Connection[Any], url: str) -> None:
    """A day is materialized only when it was run for all; the named tenants are computed all the same."""
    result = materialize(tenants=["user_10"])
    assert result.success
    assert metadata(result) == {}
    assert metadata(result, observed=True)[DAY]["run_tenants_done"] == 1
    assert (total_jobs(connection, "user_10"), total_jobs(connection, "user_2")) == (2, 0)


def test_a_tenant_that_is_not_there_is_a_usage_error(url: str) -> None:
    """A misspelt name in the run config is refused before anything is computed."""
    result = materialize(tenants=["user_1", "user_99", "public"])
    assert failure(result).startswith("There is no tenant public, user_99 in database test_")


def test_a_database_without_tenants_is_refused(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A forgotten DATABASE_URL is noticed: nothing is materialized, and the sentence says where it looked."""
    monkeypatch.setenv("DATABASE_URL", url_of(f"{server} dbname=postgres"))
    result = materialize()
    assert failure(result).startswith("No schema named user_<number> in database postgres on /tmp/")
    assert metadata(result) == {}


def test_without_action_types_the_numbers_are_right_and_the_code_unknown(
    connection: psycopg.Connection[Any], url: str
) -> None:
    """The table of action types is decoration: a run without it differs in the code only."""
    connection.execute("DROP TABLE public.marketplace_action_types")
    result = materialize()
    assert result.success
    [record] = metadata(result)[DAY]["run_preview"]
    assert (record["action"], record["jobs"]) == ("unknown", 6)


def test_if_every_tenant_fails_no_day_is_materialized(connection: psycopg.Connection[Any], url: str) -> None:
    """A day in Dagit says that the day was run; here it was for nobody."""
    for schema in TENANTS:
        connection.execute(f"DROP TABLE {schema}.marketplace_job_stats_days")
    result = materialize()
    assert failure(result).startswith("0 tenants done, 0 skipped, 3 failed")
    assert metadata(result) == {}


def test_if_every_tenant_is_skipped_the_run_fails(connection: psycopg.Connection[Any], url: str) -> None:
    """A database before the application's own rename is a mistake, not a success without rows."""
    for schema in TENANTS:
        connection.execute(f"ALTER TABLE {schema}.marketplace_jobs RENAME TO vinted_jobs")
    result = materialize()
    assert "user_1: marketplace_jobs still has vinted_jobs, its name before the rename" in failure(result)
    assert metadata(result) == {}


def test_every_number_of_a_day_is_reported(connection: psycopg.Connection[Any], url: str) -> None:
    """Each reason and outcome has its own number; rows of the old live counter have nulls, which count as nothing."""
    rows = [
        job(id=11, marketplace="depop"),
        job(id=12, marketplace="Vinted", status="expired"),
        job(id=13, started_at=None),
        job(id=14, status="cancelled"),
        job(id=15, status="expired", action_type_id=2),
        job(id=16, status="expired", action_type_id=2),
    ]
    application.insert(connection, "user_2", "marketplace_jobs", rows)
    legacy = {"action_type_id": 1, "date": "2026-01-14", "total_jobs": 4, "success_count": 4}
    application.insert(connection, "user_2", "marketplace_job_stats", [legacy])
    materialize(DAY)
    connection.execute("UPDATE user_2.marketplace_jobs SET retry_count = 5 WHERE id = 13")
    connection.execute("UPDATE user_2.marketplace_jobs SET completed_at = '2001-01-01' WHERE id = 3")

    day = metadata(materialize("2026-01-14", DAY))[DAY]

    expected = {
        "jobs": 7,
        "failed_jobs": 3,
        "cancelled_or_expired_jobs": 3,
        "unknown_marketplace_jobs": 2,
        "no_start_jobs": 1,
        "bad_duration_jobs": 0,
        "run_rows_inserted": 0,
        "run_rows_updated": 1,
        "run_rows_deleted": 0,
        "run_rows_unchanged": 3,
        "run_action_count": 2,
    }
    assert {name: day[name] for name in expected} == expected
    assert day["run_preview"][1] == {
        "marketplace": "vinted",
        "action": "update",
        "jobs": 0,
        "failed": 0,
        "success %": None,
        "mean ms": None,
        "tasks": 0,
        "retries": 0,
    }


def test_the_report_survives_a_lost_connection(
    connection: psycopg.Connection[Any], url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the last word cannot be had from the server, the run fails with what it did, in one sentence."""

    def lost(*_: Any) -> None:
        raise sa.exc.OperationalError("SELECT", {}, psycopg.OperationalError("the server is gone"))

    monkeypatch.setattr(asset, "make_durable", lost)
    result = materialize()
    assert failure(result).startswith("3 tenants done, 0 skipped, 0 failed; 3 rows changed, 0 days held back. But that")
    assert metadata(result) == {}


def test_a_run_is_durable_when_it_says_so(connection: psycopg.Connection[Any], url: str) -> None:
    """Promise 22: when a run is over, the log is on disk beyond every commit, also if the last tenant wrote nothing."""
    for _ in range(2):
        assert materialize().success
        flushed = connection.execute("SELECT pg_current_wal_flush_lsn() >= pg_current_wal_insert_lsn()").fetchone()
        assert flushed == (True,)
