"""What cannot be read keeps what was known: the summary's completeness, its freshness, and how it is made right."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import dagster as dg
import psycopg
import pytest

from assets.marketplace_daily_summary import asset, table
from pipelines import resources
from pipelines.definitions import build_defs
from pipelines.schedules import RANGE_END, RANGE_START
from pipelines.settings import Settings
from tests import application
from tests.integration.common import DAY, NOON, TENANTS, checks, failure, job, materialize, metadata, plain
from tests.integration.test_summary import SUMMARY, rows, summarize

DAYS = f"{SUMMARY}_days"
STATS_KEY, SUMMARY_KEY = dg.AssetKey("marketplace_job_stats"), dg.AssetKey("marketplace_daily_summary")
NEXT = "2026-01-16"


@pytest.fixture
def summarized(connection: psycopg.Connection[Any], url: str) -> None:
    """In each of the three tenants a job on the 15th and one on the 16th; computed and summarized."""
    for tenant in TENANTS:
        failed = job(id=1, status="failed", error_message="HTTP 429")
        jobs = [failed, job(id=2, completed_at=NOON + timedelta(days=1))]
        application.insert(connection, tenant, "marketplace_jobs", jobs)
    materialize(DAY, NEXT)
    assert summarize(DAY, NEXT).success


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is locked stays locked, so nothing is gained by waiting."""
    monkeypatch.setattr(resources, "pause_s", lambda attempt: 0.01)


def state(connection: psycopg.Connection[Any]) -> list[Any]:
    """Everything that the summary holds."""
    return [connection.execute(f"SELECT xmin, * FROM {table} ORDER BY date").fetchall() for table in (SUMMARY, DAYS)]


def days(connection: psycopg.Connection[Any]) -> dict[str, list[Any]]:
    """Expected, computed, held back, counter only, missing and who is missing, by day."""
    found = connection.execute(f"""
        SELECT date::text, tenants_expected, tenants_computed, tenants_held_back, tenants_counter_only, tenants_missing,
               missing_tenants FROM {DAYS}""").fetchall()
    return {day: numbers for day, *numbers in found}


def observed(result: dg.ExecuteInProcessResult) -> dict[str, str]:
    """The days that a run of the summary wants to be summarized again, with the reason."""
    return {day: values["again_because"] for day, values in metadata(result, observed=True).items()}


@contextmanager
def locked(database: str, table: str) -> Iterator[None]:
    """While another session keeps everybody out of this table."""
    with psycopg.connect(database) as other:
        other.execute(f"LOCK TABLE {table} IN ACCESS EXCLUSIVE MODE".encode())
        yield


@pytest.mark.usefixtures("summarized")
@pytest.mark.parametrize("table", ["marketplace_job_stats", "marketplace_job_stats_days"])
def test_a_locked_tenant_keeps_its_part(connection: psycopg.Connection[Any], database: str, table: str) -> None:
    """Days in which it has one stay as they were, although others have changed; the run fails, and wants them again."""
    before = state(connection)
    application.insert(connection, "user_1", "marketplace_jobs", [job(id=3)])
    materialize()
    with locked(database, f"user_2.{table}"):
        result = summarize(DAY, NEXT)
    assert "1 tenant could not be read. user_2: canceling statement due to lock timeout (SQLSTATE" in failure(result)
    assert failure(result).endswith(
        "2 days, 2026-01-15 to 2026-01-16, left as summarized before, so that nothing of them is lost."
    )
    assert state(connection) == before
    assert metadata(result) == {}, "what was not summarized is not materialized"
    assert set(observed(result)) == {DAY, NEXT}
    assert summarize(DAY, NEXT).success
    assert sum(row["total_jobs"] for row in rows(connection).values()) == 7


@pytest.mark.usefixtures("summarized")
def test_a_day_that_was_never_summarized_is_there_without_who_cannot_be_read(
    connection: psycopg.Connection[Any], database: str
) -> None:
    """It says so; and it can become more complete, but not less."""
    materialize("2026-01-17")
    with locked(database, "user_2.marketplace_job_stats"):
        result = summarize(DAY, "2026-01-17")
    assert days(connection)["2026-01-17"] == [3, 2, 0, 0, 1, ["user_2"]]
    assert list(metadata(result)) == ["2026-01-17"]
    shown = metadata(result)["2026-01-17"]
    assert (shown["tenants_missing"], shown["missing_tenants"]) == (1, "user_2")
    with locked(database, "user_10.marketplace_job_stats"):
        summarize("2026-01-17", "2026-01-17")
    assert days(connection)["2026-01-17"] == [3, 2, 0, 0, 1, ["user_2"]]
    assert summarize("2026-01-17", "2026-01-17").success
    assert days(connection)["2026-01-17"] == [3, 3, 0, 0, 0, []]


@pytest.mark.usefixtures("summarized")
def test_a_lock_on_the_facts_leaves_the_reasons(connection: psycopg.Connection[Any], database: str) -> None:
    """The numbers are brought up to date, the reasons stay as they were known."""
    application.insert(connection, "user_1", "marketplace_jobs", [job(id=3)])
    materialize()
    with locked(database, "user_2.marketplace_job_facts"):
        result = summarize(DAY, DAY)
    assert "1 tenant could not be read for the failure reasons. user_2: " in failure(result)
    [row] = [row for key, row in rows(connection).items() if str(key[0]) == DAY]
    assert (row["total_jobs"], row["top_reasons"]) == (4, [{"reason": "HTTP 429", "jobs": 3, "tenants": 3}])


@pytest.mark.usefixtures("summarized")
@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("LOCK TABLE {t} IN ACCESS EXCLUSIVE MODE", "lock timeout (SQLSTATE 55P03)"),
        ("DROP TABLE {t}", "has names from"),
    ],
)
def test_names_that_cannot_be_read_do_not_become_unknown(
    connection: psycopg.Connection[Any], database: str, change: str, sentence: str
) -> None:
    """The summary stays and its run fails; a run of the stats shows ids, and is right."""
    before = state(connection)
    with psycopg.connect(database) as other:
        other.execute(change.format(t="public.marketplace_action_types").encode())
        if "LOCK" not in change:
            other.commit()
        result, of_stats = summarize(DAY, NEXT), materialize()
    assert sentence in failure(result)
    assert state(connection) == before
    assert of_stats.success
    shown = {row["action"] for row in metadata(of_stats)[DAY]["run_preview"]}
    assert shown == ({"action 1"} if "LOCK" in change else {"unknown"})


@pytest.mark.usefixtures("summarized")
def test_who_is_expected_on_a_day(connection: psycopg.Connection[Any]) -> None:
    """Who has an earlier day, or a job by then, and a source; a new or an empty customer is not missing before."""
    application.clone_tenant(connection, "user_3", ("marketplace_jobs", "marketplace_tasks"))  # Not migrated.
    connection.execute("""
        GRANT USAGE ON SCHEMA user_3 TO stats; GRANT SELECT ON user_3.marketplace_jobs TO stats; CREATE SCHEMA user_4;
        UPDATE user_10.marketplace_job_stats_days SET outcome = 'held_back' WHERE date = '2026-01-16';
        DROP TABLE user_1.marketplace_jobs;""")
    application.insert(connection, "user_3", "marketplace_jobs", [job(id=1, completed_at=NOON + timedelta(days=2))])
    left = {"action_type_id": 1, "marketplace": "vinted", "date": "2026-01-14", "total_jobs": 2, "success_count": 2}
    application.insert(connection, "user_10", "marketplace_job_stats", [left])
    materialize("2026-01-18", tenants=["user_10"])
    assert summarize("2026-01-14", "2026-01-18").success
    assert days(connection) == {
        "2026-01-14": [1, 0, 0, 1, 0, []],
        DAY: [3, 3, 0, 0, 0, []],
        NEXT: [3, 2, 1, 0, 0, []],
        "2026-01-17": [3, 0, 0, 0, 3, ["user_2", "user_3", "user_10"]],
        "2026-01-18": [3, 1, 0, 0, 2, ["user_2", "user_3"]],
    }


@pytest.mark.usefixtures("summarized")
def test_a_day_whose_ledgers_have_changed_is_wanted_again(connection: psycopg.Connection[Any]) -> None:
    """Whoever changed them, by a run of another day too; the check says so, and is green once it was summarized."""
    # A job has moved from the 16th to the 15th, a run of one tenant was over the 16th, and a day was caught up.
    connection.execute("UPDATE user_2.marketplace_jobs SET completed_at = completed_at - interval '1 day' WHERE id = 2")
    materialize(tenants=["user_2"])
    materialize("2026-01-13", tenants=["user_10"])
    result = summarize("2026-01-12", "2026-01-12")
    assert result.success
    assert observed(result) == {
        "2026-01-13": "it was not summarized yet",
        DAY: "the ledgers have changed since it was read",
        NEXT: "the ledgers have changed since it was read",
    }
    check = checks(result)["sums_are_the_ledgers"]
    assert (check.passed, check.severity) == (False, dg.AssetCheckSeverity.WARN)
    assert [row["date"] for row in plain(check.metadata["differences"])] == ["2026-01-13", DAY, NEXT]
    healed = summarize("2026-01-13", NEXT)
    assert checks(healed)["sums_are_the_ledgers"].passed
    assert observed(healed) == {}
    assert {str(key[0]): row["total_jobs"] for key, row in rows(connection).items()} == {DAY: 4, NEXT: 2}


@pytest.mark.usefixtures("summarized")
@pytest.mark.parametrize(
    ("change", "reason", "left"),
    [
        ("DROP SCHEMA user_2 CASCADE", "the ledgers have changed since it was read", {"publish": 4}),
        (
            "UPDATE public.marketplace_action_types SET code = 'create' WHERE id = 1",
            "an action has another name since",
            {"create": 6},
        ),
        (f"UPDATE {SUMMARY} SET total_jobs = 0", "somebody else has changed its rows", {"publish": 6}),
        (f"DELETE FROM {SUMMARY}", "somebody else has changed its rows", {"publish": 6}),
    ],
)
def test_old_days_follow_as_new_ones_do(
    connection: psycopg.Connection[Any], change: str, reason: str, left: dict[str, int]
) -> None:
    """A dropped tenant leaves all days, a renamed action is renamed on all, and what somebody else wrote is undone."""
    connection.execute(change.encode())
    assert observed(summarize("2026-01-12", "2026-01-12")) == dict.fromkeys((DAY, NEXT), reason)
    assert summarize(DAY, NEXT).success
    sums: dict[str, int] = {}
    for (_, _, code), row in rows(connection).items():
        sums[code] = sums.get(code, 0) + row["total_jobs"]
    assert sums == left
    assert observed(summarize("2026-01-12", "2026-01-12")) == {}


@pytest.mark.usefixtures("summarized")
def test_rows_that_are_not_what_the_ledger_says_are_named(connection: psycopg.Connection[Any]) -> None:
    """The sums are compared with the ledgers' in the snapshot that they come from."""
    connection.execute("UPDATE user_2.marketplace_job_stats SET total_jobs = 7 WHERE date = %s", [DAY])
    check = checks(summarize(DAY, NEXT))["sums_are_the_ledgers"]
    assert not check.passed
    assert plain(check.metadata["differences"]) == [{"date": DAY, "what": "user_2: rows differ from its ledger"}]


@pytest.mark.usefixtures("url")
def test_a_run_that_ends_while_the_summary_reads_is_not_forgotten(
    connection: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stats change between the summary's reading and its writing, and are materialized before it: the sensor asks
    for the day once more, and no more than that.
    """
    definitions = build_defs(Settings.from_env({}))
    sensor = definitions.resolve_sensor_def("marketplace_daily_summary_sensor")
    tags = {RANGE_START: DAY, RANGE_END: DAY}

    with dg.DagsterInstance.ephemeral() as instance:
        cursor: list[str | None] = [None]

        def ask() -> list[str]:
            repository = definitions.get_repository_def()
            context = dg.build_sensor_context(
                instance, sensor_name=sensor.name, repository_def=repository, cursor=cursor[0]
            )
            data = sensor.evaluate_tick(context)
            cursor[0] = data.cursor
            return [request.tags[RANGE_START] for request in data.run_requests or ()]

        def compute(number: int) -> None:
            application.insert(connection, "user_1", "marketplace_jobs", [job(id=number)])
            run = definitions.resolve_job_def("marketplace_job_stats_job")
            assert run.execute_in_process(tags=tags, instance=instance).success

        def summarize() -> None:
            run = definitions.resolve_job_def("marketplace_daily_summary_job")
            assert run.execute_in_process(tags=tags, instance=instance).success

        def late(*arguments: Any) -> Any:
            monkeypatch.setattr(asset, "write", table.write)
            compute(2)
            return table.write(*arguments)

        compute(1)
        assert ask() == [DAY]
        monkeypatch.setattr(asset, "write", late)
        summarize()
        assert [row["total_jobs"] for row in rows(connection).values()] == [1]
        assert ask() == [DAY]
        summarize()
        assert [row["total_jobs"] for row in rows(connection).values()] == [2]
        assert ask() == []
        # A run of some tenants only observes its day.
        instance.report_runless_asset_event(dg.AssetObservation(STATS_KEY, partition=DAY))
        assert ask() == [DAY]
        summarize()
        # What the summary wants again is asked for until it is materialized.
        instance.report_runless_asset_event(dg.AssetObservation(SUMMARY_KEY, partition=DAY))
        assert (ask(), ask()) == ([DAY], [DAY])
        summarize()
        assert ask() == []
