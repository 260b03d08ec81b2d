"""The asset checks: each is green, and turns red for its own reason, without stopping anything but the one that may."""

from datetime import UTC, datetime, timedelta
from typing import Any

import dagster as dg
import psycopg
import pytest

from pipelines.definitions import build_defs
from pipelines.settings import Settings
from tests import application
from tests.conftest import hide_triggers, url_of
from tests.integration.common import DAY, TENANTS, checks, job, materialize, plain

pytestmark = pytest.mark.usefixtures("source_rows")

OF_A_RUN = {
    "stored_counts_are_the_counted",
    "every_tenant_is_computed",
    "no_day_is_held_back",
    "few_jobs_are_uncounted",
}


def red(result: dg.ExecuteInProcessResult) -> dict[str, str]:
    """The checks that did not pass, with their severity."""
    return {name: check.severity.value for name, check in checks(result).items() if not check.passed}


@pytest.mark.usefixtures("url")
def test_every_check_says_what_to_do() -> None:
    """Each has its reason and remedy in Dagit, and only the proof blocks."""
    graph = build_defs(Settings.from_env({})).resolve_asset_graph()
    specs = {key.name: graph.get_check_spec(key) for key in graph.asset_check_keys}
    assert set(specs) == OF_A_RUN | {"yesterday_is_there", "sums_are_the_ledgers", "nothing_is_unusual"}
    assert {name for name, spec in specs.items() if spec.blocking} == {"stored_counts_are_the_counted"}
    assert all("*When it is red:*" in str(spec.description) for spec in specs.values())


@pytest.mark.usefixtures("url")
def test_a_good_run_is_green() -> None:
    """All checks of a run are evaluated, and pass."""
    result = materialize()
    assert set(checks(result)) == OF_A_RUN
    assert red(result) == {}


@pytest.mark.usefixtures("url")
def test_a_run_of_some_tenants_evaluates_none(connection: psycopg.Connection[Any]) -> None:
    """What is true of one tenant must not turn the check of all of them green."""
    assert checks(materialize(tenants=["user_2"])) == {}


@pytest.mark.usefixtures("url")
def test_a_failed_tenant_warns(connection: psycopg.Connection[Any]) -> None:
    """The tenant is named with what to do, although the run's step has failed."""
    connection.execute("DROP TABLE user_2.marketplace_job_stats_days")
    result = materialize()
    assert red(result) == {"every_tenant_is_computed": "WARN"}
    assert set(checks(result)) == OF_A_RUN
    [row] = plain(checks(result)["every_tenant_is_computed"].metadata["tenants"])
    assert row["tenant"] == "user_2"
    assert "alembic -x tenant=user_2 upgrade head" in row["reason"]


@pytest.mark.usefixtures("url")
def test_where_nobody_is_computed_nothing_else_is_said(connection: psycopg.Connection[Any]) -> None:
    """A night in which all tenants failed proves nothing, and holds nothing back."""
    for schema in TENANTS:
        connection.execute(f"DROP TABLE {schema}.marketplace_job_stats_days")
    result = materialize()
    assert set(checks(result)) == {"every_tenant_is_computed"}


@pytest.mark.usefixtures("url")
def test_a_broken_proof_is_an_error(connection: psycopg.Connection[Any]) -> None:
    """If the stored counts are not the counted ones, the check that blocks is red."""
    connection.execute("""
        CREATE FUNCTION user_2.meddle() RETURNS trigger LANGUAGE plpgsql AS
        $$ BEGIN NEW.success_count := NEW.success_count + 1; RETURN NEW; END $$;
        CREATE TRIGGER meddle BEFORE INSERT ON user_2.marketplace_job_stats
        FOR EACH ROW EXECUTE FUNCTION user_2.meddle()""")
    hide_triggers(connection)
    result = materialize()
    assert red(result) == {"stored_counts_are_the_counted": "ERROR", "every_tenant_is_computed": "WARN"}
    assert checks(result)["stored_counts_are_the_counted"].blocking


@pytest.mark.usefixtures("url")
def test_held_back_days_warn(connection: psycopg.Connection[Any]) -> None:
    """The run is a success, and somebody should look."""
    materialize()
    connection.execute("DELETE FROM user_2.marketplace_jobs WHERE id = 1; DELETE FROM user_2.marketplace_job_facts")
    result = materialize()
    assert result.success
    assert red(result) == {"no_day_is_held_back": "WARN"}


@pytest.mark.usefixtures("url")
@pytest.mark.parametrize(("count", "expected"), [(1, {}), (2, {"few_jobs_are_uncounted": "WARN"})])
def test_more_than_one_percent_uncounted_warns(
    connection: psycopg.Connection[Any], count: int, expected: dict[str, str]
) -> None:
    """Up to one job of a hundred may be left out."""
    application.insert(connection, "user_2", "marketplace_jobs", [job(id=100 + number) for number in range(94 - count)])
    application.insert(connection, "user_2", "marketplace_jobs", [job(id=9, marketplace="depop")])
    bad = [job(id=10 + number, started_at=None) for number in range(count - 1)]
    application.insert(connection, "user_2", "marketplace_jobs", bad)
    result = materialize()
    assert checks(result)["few_jobs_are_uncounted"].description == (
        f"{count} of 100 finished jobs left out ({count}.0%); 1 day in UTC, {DAY} to {DAY}: "
        "from 2026-01-15T00:00:00+00:00 to before 2026-01-16T00:00:00+00:00"
    )
    assert red(result) == expected


def look_at_yesterday() -> dg.ExecuteInProcessResult:
    """What the schedule of the morning runs."""
    job = build_defs(Settings.from_env({})).resolve_job_def("yesterday_is_there_job")
    return job.execute_in_process(raise_on_error=False)


@pytest.mark.usefixtures("url")
def test_yesterday_is_looked_for_in_the_ledgers(connection: psycopg.Connection[Any], database: str) -> None:
    """It is red until yesterday is there for all, whatever days were run, and does not mind tenants that are new."""
    yesterday = (datetime.now(UTC) - timedelta(days=1)).date().isoformat()
    connection.execute("CREATE SCHEMA user_3")  # Without sources: skipped.
    application.clone_tenant(connection, "user_4", ("marketplace_jobs", "marketplace_tasks"))  # Not migrated.
    connection.execute("UPDATE user_10.marketplace_jobs SET completed_at = now()")  # Began today.
    connection.execute("UPDATE user_2.marketplace_jobs SET completed_at = %s", [f"{yesterday} 12:00+00"])
    materialize()

    result = look_at_yesterday()

    assert result.success
    check = checks(result)["yesterday_is_there"]
    assert (check.passed, check.severity) == (False, dg.AssetCheckSeverity.WARN)
    assert check.description == f"{yesterday} is there for 2 of 5 tenants"
    missing = {row["tenant"]: row["reason"] for row in plain(check.metadata["tenants"])}
    assert missing.pop("user_4").startswith("marketplace_job_stats is missing: run `alembic -x tenant=user_4")
    assert missing == dict.fromkeys(("user_1", "user_2"), "is not in the ledger, or still open")

    connection.execute("DROP SCHEMA user_4 CASCADE")
    materialize(yesterday)
    with psycopg.connect(database) as other:
        other.execute("LOCK TABLE user_2.marketplace_jobs")  # What is in the ledger is there, whatever the source is.
        assert checks(look_at_yesterday())["yesterday_is_there"].passed


def test_yesterday_in_a_database_that_is_not_there(monkeypatch: pytest.MonkeyPatch, server: str) -> None:
    """The wrong database is no green check."""
    monkeypatch.setenv("DATABASE_URL", url_of(f"{server} dbname=postgres"))
    assert not look_at_yesterday().success


@pytest.mark.usefixtures("url")
def test_the_checks_of_a_run_are_not_run_alone() -> None:
    """Dagit offers to execute a check by itself; these say where they belong instead."""
    definitions = build_defs(Settings.from_env({}))
    key = dg.AssetCheckKey(dg.AssetKey(["marketplace_job_stats"]), "no_day_is_held_back")
    alone = definitions.resolve_implicit_global_asset_job_def().get_subset(
        asset_selection=set(), asset_check_selection={key}
    )
    result = alone.execute_in_process(raise_on_error=False)
    [event] = [event for event in result.all_events if event.is_step_failure]
    assert event.step_failure_data.error
    assert event.step_failure_data.error.message.startswith("These checks are evaluated when days are computed")
