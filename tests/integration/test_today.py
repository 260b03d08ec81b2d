"""The day that is not over: computed as open, settled by the run of the night; on real databases."""

import threading
from datetime import UTC, datetime, timedelta
from typing import Any

import dagster as dg
import psycopg
import pytest
import sqlalchemy as sa
from click.testing import CliRunner

from assets.marketplace_job_stats.asset import SCHEDULE_TAG, TODAY
from assets.marketplace_job_stats.transaction import ComputeSpec, TenantResult, TimeZoneError, write_tenant
from pipelines.database import create_engine
from pipelines.definitions import build_defs
from pipelines.partitions import Days, Window
from pipelines.settings import Settings
from pipelines.stats import get_stats, main
from tests import application
from tests.conftest import run_url, wait_until
from tests.integration.common import TENANTS, calm_time, checks, failure, job, materialize, plain

PARIS = dg.DailyPartitionsDefinition("2026-01-01", timezone="Europe/Paris")
NOON = datetime(2026, 1, 15, 12, tzinfo=UTC)
TABLES = (
    "marketplace_job_stats",
    "marketplace_job_stats_days",
    "marketplace_job_facts",
    "marketplace_job_stats_changes",
)


def write(
    engine: sa.Engine, *dates: str, is_open: bool = False, schema: str = "user_2", zone: Any = PARIS, **options: Any
) -> TenantResult:
    """A run over these days of January 2026; over an open day if that is said."""
    window = Window.of(zone, [f"2026-01-{date}" for date in dates])
    spec = ComputeSpec(window, f"{'today' if is_open else 'night'}", Days(zone), is_open=is_open, **options)
    with engine.connect() as connection:
        return write_tenant(connection, schema, spec, has_tasks=True)


def add(connection: psycopg.Connection[Any], *ids: int, schema: str = "user_2", **columns: Any) -> None:
    application.insert(connection, schema, "marketplace_jobs", [job(id=id_, **columns) for id_ in ids])


def rows(connection: psycopg.Connection[Any], schema: str = "user_2") -> list[tuple[str, int]]:
    query = f"SELECT date::text, sum(total_jobs)::int FROM {schema}.marketplace_job_stats GROUP BY 1 ORDER BY 1"
    return connection.execute(query).fetchall()


def ledger(connection: psycopg.Connection[Any], schema: str = "user_2") -> list[tuple[str, str, int]]:
    query = f"SELECT date::text, outcome, job_count FROM {schema}.marketplace_job_stats_days ORDER BY 1"
    return connection.execute(query).fetchall()


def journal(connection: psycopg.Connection[Any], schema: str = "user_2") -> list[tuple[Any, ...]]:
    query = f"SELECT date::text, cause, total_jobs_before, total_jobs_after FROM {schema}.marketplace_job_stats_changes"
    return connection.execute(query).fetchall()


def versions(connection: psycopg.Connection[Any], schema: str = "user_2") -> list[Any]:
    """Where each row of ours is, and who wrote it: a tuple that is written again has another place or writer."""
    return [
        connection.execute(f"SELECT ctid::text, xmin::text FROM {schema}.{table} ORDER BY 1").fetchall()
        for table in TABLES
    ]


def test_an_open_day_grows_and_is_settled_in_silence(connection: psycopg.Connection[Any], engine: sa.Engine) -> None:
    """What came between two runs is added; the night settles it, and only what changes later is in the journal."""
    add(connection, 1)
    write(engine, "15", is_open=True)
    assert (rows(connection), ledger(connection)) == ([("2026-01-15", 1)], [("2026-01-15", "open", 1)])
    add(connection, 2, 3)
    connection.execute("UPDATE user_2.marketplace_jobs SET status = 'failed' WHERE id = 1")
    write(engine, "15", is_open=True)
    assert (rows(connection), ledger(connection)) == ([("2026-01-15", 3)], [("2026-01-15", "open", 3)])
    add(connection, 4, completed_at=NOON + timedelta(hours=10, minutes=59))
    result = write(engine, "14", "15")
    assert result.change_count == 0
    assert ledger(connection) == [("2026-01-14", "computed", 0), ("2026-01-15", "computed", 4)]
    assert (rows(connection), journal(connection)) == ([("2026-01-15", 4)], [])
    add(connection, 5)
    write(engine, "15")
    assert journal(connection) == [("2026-01-15", "jobs", 4, 5)]


def test_with_nothing_new_nothing_is_written(connection: psycopg.Connection[Any], engine: sa.Engine) -> None:
    """Promise 13: for a tenant with jobs, and for one without any; the night writes the ledger alone, and once."""
    add(connection, 1)
    for schema in ("user_1", "user_2"):
        first = write(engine, "15", is_open=True, schema=schema)
        assert [day.entry for day in first.days.values()] == ["open"]
        before = versions(connection, schema)
        assert write(engine, "15", is_open=True, schema=schema).written == {}
        assert versions(connection, schema) == before
        write(engine, "15", schema=schema)
        settled = versions(connection, schema)
        changed = [table for table, was, is_ in zip(TABLES, before, settled, strict=True) if was != is_]
        assert changed == ["marketplace_job_stats_days"]
        write(engine, "15", schema=schema)
        assert versions(connection, schema) == settled
    assert ledger(connection, "user_1") == [("2026-01-15", "computed", 0)]


@pytest.mark.parametrize(
    "options", [{"only_missing": True}, {"catch_up": Window.of(PARIS, ["2026-01-15", "2026-01-16"])}]
)
def test_an_open_day_is_not_taken_for_computed(
    connection: psycopg.Connection[Any], engine: sa.Engine, options: dict[str, Any]
) -> None:
    """A night that failed for a tenant leaves the day open: whoever looks for missing days takes it along."""
    add(connection, 1)
    write(engine, "15", is_open=True)
    add(connection, 2)
    write(engine, *(["15"] if "only_missing" in options else ["16"]), **options)
    assert ("2026-01-15", "computed", 2) in ledger(connection)
    before = versions(connection)
    add(connection, 3)
    write(engine, *(["15"] if "only_missing" in options else ["16"]), **options)
    assert versions(connection) == before


def test_a_run_that_began_before_midnight_opens_no_settled_day(
    connection: psycopg.Connection[Any], engine: sa.Engine
) -> None:
    """Its turn may come after that of the night; what it finds late is a change of a settled day."""
    add(connection, 1)
    write(engine, "15")
    add(connection, 2)
    write(engine, "15", is_open=True)
    assert ledger(connection) == [("2026-01-15", "computed", 2)]
    assert journal(connection) == [("2026-01-15", "jobs", 1, 2)]


def test_jobs_that_move_into_an_open_day_and_out_of_it(connection: psycopg.Connection[Any], engine: sa.Engine) -> None:
    """Whichever run sees it: the open day stays open and silent, the settled one has a line in the journal."""
    add(connection, 1, completed_at=NOON - timedelta(days=1))
    add(connection, 2)
    write(engine, "14")
    write(engine, "15", is_open=True)
    connection.execute("UPDATE user_2.marketplace_jobs SET completed_at = %s WHERE id = 1", [NOON])
    write(engine, "14")
    assert ledger(connection) == [("2026-01-14", "computed", 0), ("2026-01-15", "open", 2)]
    connection.execute("UPDATE user_2.marketplace_jobs SET completed_at = %s WHERE id = 2", [NOON - timedelta(days=1)])
    write(engine, "15", is_open=True)
    assert rows(connection) == [("2026-01-14", 1), ("2026-01-15", 1)]
    assert ledger(connection) == [("2026-01-14", "computed", 1), ("2026-01-15", "open", 1)]
    assert journal(connection) == [("2026-01-14", "jobs", 1, None), ("2026-01-14", "jobs", None, 1)]
    # A job that a run of the night has moved into a day that nobody has opened yet is there when it is opened.
    connection.execute("UPDATE user_2.marketplace_jobs SET completed_at = %s WHERE id = 2", [NOON + timedelta(days=1)])
    write(engine, "14")
    assert [day for day, *_ in ledger(connection)] == ["2026-01-14", "2026-01-15"]
    write(engine, "16", is_open=True)
    assert ledger(connection)[-1] == ("2026-01-16", "open", 1)
    assert rows(connection) == [("2026-01-15", 1), ("2026-01-16", 1)]


def test_a_job_that_is_deleted_on_its_day_stays_counted(connection: psycopg.Connection[Any], engine: sa.Engine) -> None:
    """Promise 15: today's facts remember it, and the night settles with it."""
    add(connection, 1, 2)
    write(engine, "15", is_open=True)
    connection.execute("DELETE FROM user_2.marketplace_jobs WHERE id = 1")
    write(engine, "15", is_open=True)
    write(engine, "15")
    assert (rows(connection), ledger(connection)) == ([("2026-01-15", 2)], [("2026-01-15", "computed", 2)])
    assert journal(connection) == []


def test_rows_that_somebody_else_writes_today_are_made_right(
    connection: psycopg.Connection[Any], engine: sa.Engine
) -> None:
    """A live counter goes on all day. Its numbers are replaced without a line in the journal; those that nothing in the
    source stands behind are kept, and judged again by every run until the night, which holds the day back."""
    counter = {"action_type_id": 1, "marketplace": "vinted", "date": "2026-01-15", "total_jobs": 2, "success_count": 2}
    application.insert(connection, "user_2", "marketplace_job_stats", [counter])
    add(connection, 1)
    add(connection, 9, completed_at=NOON - timedelta(days=5))
    write(engine, "15", is_open=True)
    assert rows(connection) == [("2026-01-15", 1)]
    connection.execute("UPDATE user_2.marketplace_job_stats SET total_jobs = 7, success_count = 7")
    write(engine, "15", is_open=True)
    assert (rows(connection), journal(connection)) == ([("2026-01-15", 1)], [])

    # Here the source is not evidently complete.
    application.insert(connection, "user_1", "marketplace_job_stats", [counter | {"total_jobs": 9, "success_count": 9}])
    add(connection, 1, schema="user_1")
    add(connection, 9, schema="user_1", completed_at=NOON - timedelta(days=5))
    result = write(engine, "15", is_open=True, schema="user_1")
    assert (rows(connection, "user_1"), result.held_back) == ([("2026-01-15", 9)], set())
    before = versions(connection, "user_1")
    write(engine, "15", is_open=True, schema="user_1")
    assert versions(connection, "user_1") == before
    assert {day.isoformat() for day in write(engine, "15", schema="user_1").held_back} == {"2026-01-15"}
    assert ledger(connection, "user_1") == [("2026-01-15", "held_back", 1)]


@pytest.mark.parametrize(
    ("zone", "day", "hours"),
    [
        ("Europe/Paris", "2026-03-29", 23),
        ("Europe/Paris", "2026-10-25", 25),
        ("America/Havana", "2025-11-02", 25),
        ("Atlantic/Azores", "2025-10-26", 25),
    ],
)
def test_midnight_where_the_clocks_change(
    connection: psycopg.Connection[Any], engine: sa.Engine, zone: str, day: str, hours: int
) -> None:
    """Promise 17: today is the partition to come, to the instant; and the instant after it is another day."""
    partitions = dg.DailyPartitionsDefinition("2025-01-01", timezone=zone)
    wanted = Window.of(partitions, [day])
    days = Days(partitions)
    us = timedelta(microseconds=1)
    assert wanted.end - wanted.starts[0] == timedelta(hours=hours)
    for instant in (wanted.starts[0], wanted.end - us):
        assert days.window_at(instant) == wanted
    assert days.window_at(wanted.end).starts == (wanted.end,)
    assert days.window_at(wanted.starts[0] - us).end == wanted.starts[0]
    for id_, instant in enumerate((wanted.starts[0] - us, wanted.starts[0], wanted.end - us, wanted.end), start=1):
        add(connection, id_, completed_at=instant, started_at=instant)
    spec = ComputeSpec(days.window_at(wanted.end - us), "today", days, is_open=True)
    with engine.connect() as one:
        write_tenant(one, "user_2", spec, has_tasks=True)
    assert ledger(connection) == [(day, "open", 2)]


def test_an_open_day_is_in_the_way_of_no_new_time_zone(connection: psycopg.Connection[Any], engine: sa.Engine) -> None:
    """Promise 17: no run of the night can reach it yet, so it goes, and is made again in the new zone."""
    tokyo = dg.DailyPartitionsDefinition("2026-01-01", timezone="Asia/Tokyo")
    add(connection, 1, completed_at=NOON - timedelta(days=1))
    add(connection, 2, 3)
    connection.execute("UPDATE user_2.marketplace_jobs SET completed_at = completed_at + interval '4 h' WHERE id = 3")
    write(engine, "14")
    write(engine, "15", is_open=True)
    before = versions(connection)
    for day in ("15", "13"):
        with pytest.raises(TimeZoneError, match=r"in one run, with --partition-range 2026-01-14...2026-01-14$"):
            write(engine, day, zone=tokyo, is_open=day == "15")
        assert versions(connection) == before
    write(engine, "14", zone=tokyo)
    assert (rows(connection), ledger(connection)) == ([("2026-01-14", 1)], [("2026-01-14", "computed", 1)])
    write(engine, "15", zone=tokyo, is_open=True)
    assert rows(connection) == [("2026-01-14", 1), ("2026-01-15", 1)]
    assert ledger(connection)[-1] == ("2026-01-15", "open", 1)


def test_with_a_run_of_the_night_at_once(connection: psycopg.Connection[Any], database: str) -> None:
    """Promise 16: they follow each other, whoever is first; the end is the same."""
    add(connection, 1)
    both = create_engine(run_url(database), pool_size=2)
    with psycopg.connect(connection.info.dsn) as other:
        other.execute("LOCK TABLE user_2.marketplace_job_stats IN ROW EXCLUSIVE MODE")
        runs = [threading.Thread(target=write, args=(both, "15"), kwargs={"is_open": is_open}) for is_open in (0, 1)]
        for run in runs:
            run.start()
        wait_until(connection, "SELECT FROM pg_locks WHERE NOT granted HAVING count(*) = 2")
        other.commit()
        for run in runs:
            run.join()
    both.dispose()
    assert (ledger(connection), journal(connection)) == ([("2026-01-15", "computed", 1)], [])


# The asset, by the clock.


def run_today(zone: str = "UTC", **environment: str) -> dg.ExecuteInProcessResult:
    variables = {"STATS_LOCK_TIMEOUT_MS": "300", "STATS_TIMEZONE": zone, **environment}
    definitions = build_defs(Settings.from_env(variables))
    return definitions.resolve_job_def("marketplace_job_stats_today_job").execute_in_process(
        tags={SCHEDULE_TAG: TODAY}, raise_on_error=False
    )


def today_metadata(result: dg.ExecuteInProcessResult) -> dict[str, Any]:
    [event] = result.asset_materializations_for_node("marketplace_job_stats_today")
    return {name: plain(value) for name, value in event.metadata.items()}


@pytest.fixture
def clock(url: str, connection: psycopg.Connection[Any]) -> datetime:
    """Now, far from midnight; every tenant has a job that has just ended."""
    clock = calm_time()
    for schema in TENANTS:
        add(connection, 1, schema=schema, completed_at=clock, started_at=clock - timedelta(seconds=1))
    return clock


def test_the_asset_computes_today_for_all_tenants(connection: psycopg.Connection[Any], clock: datetime) -> None:
    """In the reporting zone; what it did is in its metadata; the night after settles what the morning check misses."""
    zone, today = str(clock.tzinfo), clock.date().isoformat()
    result = run_today(zone)
    assert result.success
    shown = today_metadata(result)
    assert (shown["date"], shown["jobs"]) == (today, 3)
    assert [ledger(connection, schema) for schema in TENANTS] == [[(today, "open", 1)]] * 3
    assert checks(result)["every_tenant_is_computed"].passed


def test_a_locked_tenant_is_named_and_comes_with_the_next_run(
    connection: psycopg.Connection[Any], clock: datetime
) -> None:
    """The run is green, for it comes again before long; its check is not. Where nobody could be computed it is red."""
    zone = str(clock.tzinfo)
    with psycopg.connect(connection.info.dsn) as other:
        other.execute("LOCK TABLE user_2.marketplace_job_stats IN ROW EXCLUSIVE MODE")
        result = run_today(zone)
    assert result.success
    check = checks(result)["every_tenant_is_computed"]
    assert not check.passed
    assert check.severity == dg.AssetCheckSeverity.WARN
    [row] = plain(check.metadata["tenants"])
    assert row["tenant"] == "user_2"
    assert "55P03" in row["reason"]
    assert [len(ledger(connection, schema)) for schema in TENANTS] == [1, 0, 1]
    assert checks(run_today(zone))["every_tenant_is_computed"].passed
    assert len(ledger(connection)) == 1

    for schema in TENANTS:
        connection.execute(f"ALTER TABLE {schema}.marketplace_jobs RENAME completed_at TO ended_at")
    result = run_today(zone)
    assert not result.success
    assert "0 tenants done" in failure(result)


def test_before_the_first_day(url: str) -> None:
    """There is no today before STATS_START_DATE."""
    assert "has not begun" in failure(run_today(STATS_START_DATE="2099-01-01"))


def test_the_morning_check_does_not_take_an_open_day_for_yesterday(
    connection: psycopg.Connection[Any], url: str
) -> None:
    """A night that did not happen is noticed though today's runs went on until midnight."""
    yesterday = (datetime.now(UTC) - timedelta(days=1)).date().isoformat()
    for schema in TENANTS:
        add(connection, 1, schema=schema)
    materialize(yesterday)

    def missing() -> list[str]:
        definitions = build_defs(Settings.from_env({}))
        result = definitions.resolve_job_def("yesterday_is_there_job").execute_in_process()
        table = checks(result)["yesterday_is_there"].metadata.get("tenants")
        return [row["tenant"] for row in plain(table)] if table else []

    assert missing() == []
    connection.execute("UPDATE user_2.marketplace_job_stats_days SET outcome = 'open'")
    assert missing() == ["user_2"]


# What people see of it.


def summary_day(connection: psycopg.Connection[Any], date: str) -> Any:
    """Expected, computed, open and missing, and who is missing."""
    query = """
        SELECT tenants_expected, tenants_computed, tenants_open, tenants_missing, missing_tenants
          FROM marketplace_stats.marketplace_daily_summary_days WHERE date = %s"""
    return connection.execute(query, [date]).fetchone()


def test_the_summary_has_today_marked_as_open(connection: psycopg.Connection[Any], clock: datetime) -> None:
    """It follows each run, says who is missing, and goes on without who cannot be read; a replay writes nothing."""
    zone, today = str(clock.tzinfo), clock.date().isoformat()
    result = run_today(zone)
    assert summary_day(connection, today) == (3, 0, 3, 0, [])
    query = "SELECT date::text, total_jobs, tenants_active, tenants_older_definition, xmin::text FROM {}"
    [row] = connection.execute(query.format("marketplace_stats.marketplace_daily_summary")).fetchall()
    assert row[:4] == (today, 3, 3, 0)
    [event] = result.asset_materializations_for_node("marketplace_daily_summary_today")
    shown = {name: plain(value) for name, value in event.metadata.items()}
    assert (shown["date"], shown["jobs"], shown["tenants_open"], shown["run_rows_inserted"]) == (today, 3, 3, 1)
    assert run_today(zone).success
    assert connection.execute(query.format("marketplace_stats.marketplace_daily_summary")).fetchall() == [row]

    connection.execute("DELETE FROM user_1.marketplace_job_stats_days; DELETE FROM user_1.marketplace_job_stats")
    connection.execute("REVOKE SELECT ON user_1.marketplace_jobs FROM stats")
    connection.execute("REVOKE SELECT ON user_2.marketplace_job_stats FROM stats")
    assert run_today(zone).success
    assert summary_day(connection, today) == (3, 0, 1, 2, ["user_1", "user_2"])
    assert connection.execute("SELECT total_jobs FROM marketplace_stats.marketplace_daily_summary").fetchall() == [(1,)]


def test_readers_leave_today_out_unless_asked(
    connection: psycopg.Connection[Any], clock: datetime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of all tenants and of one; and they say that the day is not whole."""
    monkeypatch.setenv("STATS_TIMEZONE", str(clock.tzinfo))
    run_today(str(clock.tzinfo))
    for tenant, jobs in ((None, 3), ("user_2", 1)):
        assert get_stats(tenant=tenant).empty
        frame = get_stats(tenant=tenant, today=True)
        [found] = frame.to_dict("records")
        assert (found["date"].date(), found["total_jobs"], found["tenants_open"]) == (clock.date(), jobs, jobs)
        assert found["tenants_older_definition"] == 0
        assert frame.attrs["notes"][-1].startswith(f"{clock.date()}: 0 of {jobs} tenants computed; {jobs} not yet")
    outputs = [
        CliRunner().invoke(main, ["--format", "csv", *option]).stdout.splitlines() for option in ([], ["--today"])
    ]
    assert [len(lines) for lines in outputs] == [1, 2]
