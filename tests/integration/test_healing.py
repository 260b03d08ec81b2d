"""What a run does beyond the days that it was asked for, and when it refuses: read from each tenant's ledger."""

from datetime import timedelta
from typing import Any

import psycopg
import pytest

from pipelines.resources import TenantDatabase
from pipelines.settings import UsageError
from tests import application
from tests.integration.common import (
    DAY,
    NOON,
    TENANTS,
    checks,
    failure,
    job,
    materialize,
    metadata,
    plain,
    total_jobs,
)

pytestmark = pytest.mark.usefixtures("source_rows", "url")


def computed_days(connection: psycopg.Connection[Any], schema: str) -> list[str]:
    """The days in the tenant's ledger, as day of January 2026."""
    rows = connection.execute(f"SELECT date::text FROM {schema}.marketplace_job_stats_days ORDER BY 1").fetchall()
    return [str(date).removeprefix("2026-01-") for (date,) in rows]


def forget(connection: psycopg.Connection[Any], schema: str, *days: int) -> None:
    """As if these days of January had never been computed for the tenant."""
    for table in ("marketplace_job_stats", "marketplace_job_stats_days"):
        connection.execute(
            f"DELETE FROM {schema}.{table} WHERE date = ANY (%s::date[])", [[f"2026-01-{day:02}" for day in days]]
        )


def versions(connection: psycopg.Connection[Any], schema: str) -> dict[str, Any]:
    """The version of each row of the ledger, by day."""
    rows = connection.execute(f"SELECT date::text, xmin, run_id FROM {schema}.marketplace_job_stats_days").fetchall()
    return {row[0]: row[1:] for row in rows}


def test_only_missing_computes_just_those(connection: psycopg.Connection[Any]) -> None:
    """Of the days asked for, each tenant gets those that its ledger lacks, in pieces; all others are not looked at."""
    materialize("2026-01-10", "2026-01-20")
    forget(connection, "user_2", 12, 15, 16, 20)
    connection.execute("DELETE FROM user_10.marketplace_job_stats WHERE date = '2026-01-15'")
    before = {schema: versions(connection, schema) for schema in TENANTS}

    result = materialize("2026-01-10", "2026-01-20", only_missing=True)

    assert result.success
    after = {schema: versions(connection, schema) for schema in TENANTS}
    assert (after["user_1"], after["user_10"]) == (before["user_1"], before["user_10"])
    assert {day: after["user_2"][day] for day in before["user_2"]} == before["user_2"]
    assert computed_days(connection, "user_2") == [f"{day:02}" for day in range(10, 21)]
    # What the ledger has is there, so the rows that somebody took away are for a run of the day itself.
    assert (total_jobs(connection, "user_2"), total_jobs(connection, "user_10")) == (3, 1)
    assert checks(result) == {}, "what was not looked at is not right"
    days = metadata(result)
    assert [days[f"2026-01-{day}"]["run_tenants_done"] for day in (11, 12, 15)] == [0, 1, 1]
    assert len(days) == 11


def test_only_missing_where_nothing_is_missing_writes_nothing(connection: psycopg.Connection[Any]) -> None:
    """It is a success: everything is there."""
    materialize("2026-01-14", "2026-01-17")
    before = [versions(connection, schema) for schema in TENANTS]
    assert materialize("2026-01-14", "2026-01-17", only_missing=True).success
    assert [versions(connection, schema) for schema in TENANTS] == before


def test_the_nightly_run_takes_missing_days_along(connection: psycopg.Connection[Any]) -> None:
    """What a tenant lacks among the last STATS_SWEEP_DAYS is computed, and reported; another run does not look."""
    materialize("2026-01-01", "2026-01-17")
    forget(connection, "user_2", 7, 8, 9, 15, 16)
    materialize("2026-01-16", "2026-01-17")
    assert "15" not in computed_days(connection, "user_2")

    result = materialize("2026-01-16", "2026-01-17", schedule="nightly", environment={"STATS_SWEEP_DAYS": "10"})

    assert computed_days(connection, "user_2") == [f"{day:02}" for day in range(1, 18) if day != 7]
    assert total_jobs(connection, "user_2") == 3
    days = metadata(result)
    assert list(days) == ["2026-01-16", "2026-01-17"]
    assert (days["2026-01-17"]["run_days_caught_up"], days["2026-01-17"]["run_days_changed"]) == (3, 1)
    assert days["2026-01-17"]["run_caught_up"] == [
        {"tenant": "user_2", "days": 3, "first": "2026-01-08", "last": "2026-01-15"}
    ]


def test_catching_up_ends_at_the_first_partition(connection: psycopg.Connection[Any]) -> None:
    """Days from before STATS_START_DATE are nobody's."""
    result = materialize(DAY, schedule="nightly", environment={"STATS_START_DATE": "2026-01-14"})
    assert result.success
    assert computed_days(connection, "user_2") == ["14", "15"]


def test_the_weekly_run_tells_what_came_late(connection: psycopg.Connection[Any]) -> None:
    """It says how many days and tenants came out different, and counts the jobs that have no day."""
    without_day = [
        job(id=20, completed_at=None),
        job(id=21, status="failed", completed_at="infinity"),
        job(id=22, completed_at="-infinity"),
        job(id=23, status="cancelled", completed_at=None),
        job(id=24, status="pending", completed_at=None),
    ]
    application.insert(connection, "user_10", "marketplace_jobs", without_day)
    materialize("2026-01-14", "2026-01-17")
    application.insert(
        connection, "user_2", "marketplace_jobs", [job(id=30), job(id=31, completed_at=NOON + timedelta(1))]
    )

    result = materialize("2026-01-14", "2026-01-17", schedule="weekly")

    day = metadata(result)["2026-01-17"]
    assert (day["run_days_changed"], day["run_tenants_changed"], day["run_jobs_without_day"]) == (2, 1, 4)
    assert day["run_uncounted"] == [
        {"tenant": "user_10", "reason": "no_end", "marketplace": "vinted", "action": "publish", "jobs": 4}
    ]
    # They are of all times, so they have no share in these days.
    counted = checks(result)["few_jobs_are_uncounted"]
    assert counted.passed
    assert str(counted.description).startswith("0 of 11 finished jobs left out (0.0%)")
    assert "run_jobs_without_day" not in metadata(materialize("2026-01-14", "2026-01-17"))["2026-01-17"]


def test_a_changed_time_zone_is_refused_until_all_days_are_recomputed(connection: psycopg.Connection[Any]) -> None:
    """Promise 17: days of two zones would overlap, so a run that would leave some of the old ones writes nothing."""
    late = job(id=40, completed_at="2026-01-16 23:30Z", started_at="2026-01-16 23:29Z")
    application.insert(connection, "user_2", "marketplace_jobs", [late])
    materialize("2026-01-14", "2026-01-17")
    before = {schema: versions(connection, schema) for schema in TENANTS}
    paris = {"STATS_TIMEZONE": "Europe/Paris"}
    for run in (
        materialize("2026-01-17", "2026-01-18", environment=paris),
        materialize("2026-01-17", "2026-01-18", environment=paris, schedule="nightly"),
        materialize("2026-01-14", "2026-01-17", environment=paris, only_missing=True),
    ):
        assert metadata(run) == {}
        assert (
            "user_1: its days were computed in UTC, not in Europe/Paris, and days of two zones overlap: set "
            "STATS_TIMEZONE back, or recompute them all in one run, with --partition-range 2026-01-14...2026-01-1"
        ) in failure(run)
    assert {schema: versions(connection, schema) for schema in TENANTS} == before

    # A job that is gone meanwhile has another day in the new zone, too.
    connection.execute("DELETE FROM user_2.marketplace_jobs WHERE id = 40")
    materialize("2026-01-16", tenants=["user_2"])
    assert materialize("2026-01-14", "2026-01-18", environment=paris).success
    found = connection.execute(
        "SELECT date::text, deleted_at IS NULL FROM user_2.marketplace_job_facts WHERE job_id = 40"
    )
    assert found.fetchall() == [("2026-01-17", False)]
    query = "SELECT sum(total_jobs)::int FROM user_2.marketplace_job_stats WHERE date = '2026-01-17'"
    assert connection.execute(query).fetchall() == [(2,)]
    zones = connection.execute("SELECT DISTINCT time_zone FROM user_2.marketplace_job_stats_days").fetchall()
    assert zones == [("Europe/Paris",)]
    assert materialize("2026-01-18", environment=paris, schedule="nightly").success


@pytest.mark.parametrize(("schedule", "patience_s"), [(None, 0), ("nightly", 60), ("weekly", 60)])
def test_a_scheduled_run_waits_for_the_server(
    monkeypatch: pytest.MonkeyPatch, schedule: str | None, patience_s: float
) -> None:
    """A server that restarts at night costs no night; who gives a command rather knows at once."""
    asked: list[float] = []

    def connect(_: TenantDatabase, patience_s: float = 0) -> None:
        asked.append(patience_s)
        raise UsageError("down")

    monkeypatch.setattr(TenantDatabase, "connect", connect)
    assert failure(materialize(schedule=schedule)) == "down"
    assert asked == [patience_s]


def test_history_of_the_old_counter_survives_a_backfill(connection: psycopg.Connection[Any]) -> None:
    """Promise 15: its numbers fall only where the source is evidently complete; else the day is held back."""
    stored = [
        {"action_type_id": 1, "date": "2026-01-02", "total_jobs": 40, "success_count": 30, "failure_count": 10},
        # On the 15th the counter booked two jobs twice; nothing tells where those of the 16th and the 17th are.
        {"action_type_id": 1, "date": "2026-01-15", "total_jobs": 4, "success_count": 2, "failure_count": 2},
        {"action_type_id": 1, "date": "2026-01-16", "total_jobs": 2, "success_count": 2, "failure_count": 0},
        {"action_type_id": 7, "date": "2026-01-17", "total_jobs": 9, "success_count": 9, "failure_count": 0},
    ]
    application.insert(connection, "user_2", "marketplace_job_stats", stored)
    application.insert(connection, "user_2", "marketplace_jobs", [job(id=90, completed_at="2025-12-20")])

    result = materialize("2026-01-01", "2026-01-31")

    rows = connection.execute("""
        SELECT date::text, action_type_id, marketplace, total_jobs FROM user_2.marketplace_job_stats ORDER BY 1, 2""")
    assert rows.fetchall() == [
        ("2026-01-02", 1, "vinted", 40),
        ("2026-01-15", 1, "vinted", 2),
        ("2026-01-16", 1, "vinted", 2),
        ("2026-01-17", 7, "vinted", 9),
    ]
    held_back = checks(result)["no_day_is_held_back"]
    assert not held_back.passed
    assert plain(held_back.metadata["tenants"]) == [
        {"tenant": "user_2", "date": f"2026-01-{day}", "stored jobs": stored, "jobs in the facts": found}
        for day, stored, found in (("02", 40, 0), ("16", 2, 0), ("17", 9, 1))
    ]

    materialize("2026-01-01", "2026-01-31", tenants=["user_2"], allow_shrink=True)
    assert total_jobs(connection, "user_2") == 3
