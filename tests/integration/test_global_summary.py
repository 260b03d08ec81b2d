"""The summary over several databases: what is missing or old is said, nobody is counted twice, and it heals by itself.

That its numbers are those of one database with all customers is the campaign's: see `tests.faults.places`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import dagster as dg
import psycopg
import pytest

from pipelines.databases import NAMES, database_names
from pipelines.definitions import build_defs
from pipelines.global_definitions import build_global_defs
from pipelines.schedules import RANGE_END, RANGE_START
from pipelines.settings import Settings, UsageError
from tests import application
from tests.conftest import create_database, create_run_role, run, run_url, url_of
from tests.integration.common import DAY, NOON, failure, job, materialize, metadata
from tests.server import Server, server_to_control

NEXT = "2026-01-16"
BOTH = (DAY, NEXT)
TABLE = "marketplace_stats.marketplace_global_summary"
READER = "reader"


@pytest.fixture(scope="module")
def other() -> Iterator[Server]:
    """A second server, with the roles of the runs and of those who only read, and a migrated database."""
    with server_to_control() as server:
        create_run_role(server.conninfo)
        conninfo = create_database(server.conninfo, "us")
        with psycopg.connect(conninfo) as connection:
            application.create_action_types(connection)
            application.create_tenant(connection, application.TEMPLATE)
            for tenant in ("user_1", "user_4"):
                application.clone_tenant(connection, tenant)
            connection.execute(f"CREATE ROLE {READER} LOGIN")
        run("alembic", "upgrade", "head", environment=variables(conninfo))
        with psycopg.connect(conninfo) as connection:  # As the guide has it.
            connection.execute(f"""
                GRANT USAGE ON SCHEMA marketplace_stats TO {READER};
                GRANT SELECT ON ALL TABLES IN SCHEMA marketplace_stats TO {READER}""")
        yield server


def variables(conninfo: str) -> dict[str, str]:
    return {"DATABASE_URL": run_url(conninfo), "MIGRATION_DATABASE_URL": url_of(conninfo)}


@dataclass
class Two:
    """The databases eu, which is the home, and us, on a server that can be stopped."""

    conninfos: dict[str, str]
    server: Server
    monkeypatch: pytest.MonkeyPatch

    def connect(self, place: str) -> psycopg.Connection[Any]:
        return psycopg.connect(self.conninfos[place], autocommit=True)

    def end_jobs(self, place: str, tenant: str, day: int, count: int = 1) -> None:
        """Jobs of a tenant on the 15th, or so many days later."""
        rows = [job(completed_at=NOON + timedelta(days=day)) for _ in range(count)]
        with self.connect(place) as connection:
            application.insert(connection, tenant, "marketplace_jobs", rows)

    def compute(self, place: str, first: str = DAY, last: str = NEXT) -> None:
        """A night of one database."""
        self.monkeypatch.setenv("DATABASE_URL", run_url(self.conninfos[place]))
        assert materialize(first, last).success
        self.summarize(place, first, last)

    def summarize(self, place: str, first: str = DAY, last: str = NEXT) -> None:
        self.monkeypatch.setenv("DATABASE_URL", run_url(self.conninfos[place]))
        summary = build_defs(Settings.from_env({})).resolve_job_def("marketplace_daily_summary_job")
        assert summary.execute_in_process(tags={RANGE_START: first, RANGE_END: last}).success

    def add_up(self, *days: str, time_zone: str = "UTC") -> dg.ExecuteInProcessResult:
        """A run of the global summary, over both days if none is said."""
        self.monkeypatch.setenv("DATABASE_URL", run_url(self.conninfos["eu"]))
        names = ["eu", "us"]
        summary = build_global_defs(Settings.from_env({"STATS_TIMEZONE": time_zone}), names).resolve_job_def(
            "marketplace_global_summary_job"
        )
        first, *_, last = days * 2 or BOTH
        return summary.execute_in_process(tags={RANGE_START: first, RANGE_END: last}, raise_on_error=False)

    def jobs(self, *, with_versions: bool = False) -> dict[str, Any]:
        """The jobs of each day."""
        with self.connect("eu") as connection:
            rows = connection.execute(f"SELECT date::text, total_jobs, xmin::text FROM {TABLE} ORDER BY 1").fetchall()
        return {day: (jobs, version) if with_versions else jobs for day, jobs, version in rows}

    def days(self, *columns: str) -> dict[str, Any]:
        with self.connect("eu") as connection:
            rows = connection.execute(f"SELECT date::text, {', '.join(columns)} FROM {TABLE}_days").fetchall()
        return {day: values[0] if len(values) == 1 else tuple(values) for day, *values in rows}


@pytest.fixture
def two(database: str, other: Server, monkeypatch: pytest.MonkeyPatch) -> Two:
    """One job a day of user_2 in eu and of user_4 in us, computed, summarized and added up."""
    us = create_database(other.conninfo, f"us_{database.rpartition('_')[2]}", "us")
    two = Two({"eu": database, "us": us}, other, monkeypatch)
    monkeypatch.setenv(NAMES, "eu us")
    monkeypatch.setenv("STATS_DATABASE_URL_eu", run_url(database))
    monkeypatch.setenv("STATS_DATABASE_URL_us", url_of(us, READER))
    for place, tenant in (("eu", "user_2"), ("us", "user_4")):
        for day in (0, 1):
            two.end_jobs(place, tenant, day)
        two.compute(place)
    assert two.add_up().success
    return two


def test_both_are_in_it(two: Two) -> None:
    """Each day counts the tenants of both; a second run writes nothing, and one of a day takes other changes along."""
    before = two.jobs(with_versions=True)
    assert {day: jobs for day, (jobs, _) in before.items()} == {DAY: 2, NEXT: 2}
    numbers = (
        "tenants_expected",
        "tenants_computed",
        "job_count",
        "missing_databases",
        "old_databases",
        "tenants_twice",
    )
    assert two.days(*numbers) == dict.fromkeys(BOTH, (5, 5, 2, [], [], []))
    result = two.add_up()
    assert result.success and two.jobs(with_versions=True) == before
    assert metadata(result)[NEXT]["jobs"] == 2 and metadata(result)[NEXT]["complete"] == "5 of 5 tenants computed"
    two.end_jobs("us", "user_4", 0)
    two.compute("us")
    assert set(metadata(two.add_up(NEXT))) == set(BOTH)
    assert two.jobs() == {DAY: 3, NEXT: 2}


def test_a_dead_server(two: Two) -> None:
    """The others' night is green; its own part stays as it was, and is said to be old; the first run after heals it."""
    two.end_jobs("us", "user_4", 0)
    two.compute("us")
    two.server.control("-m", "immediate", "stop")
    try:
        two.end_jobs("eu", "user_2", 1)
        two.compute("eu")
        result = two.add_up(NEXT)
        assert failure(result).startswith("1 database not read. us: Cannot connect to database us_")
        assert two.jobs() == {DAY: 2, NEXT: 3}
        assert two.days("old_databases") == {DAY: [], NEXT: ["us"]}
        assert metadata(result)[NEXT]["complete"].endswith("as last seen, since they could not be read: us")
        assert NEXT in metadata(result, observed=True)
    finally:
        two.server.control("start")
    assert two.add_up(NEXT).success
    assert two.jobs() == {DAY: 3, NEXT: 3}
    assert two.days("old_databases") == {day: [] for day in BOTH}


def test_a_day_that_one_has_not_summarized(two: Two) -> None:
    """It is missing, as many tenants as it had the day before; the run is green, since nothing is wrong yet."""
    later = "2026-01-17"
    two.end_jobs("eu", "user_2", 2)
    two.compute("eu", later, later)
    assert two.add_up(later).success
    columns = ("tenants_expected", "tenants_missing", "missing_tenants", "missing_databases")
    assert two.days(*columns)[later] == (5, 2, ["all of us"], ["us"])
    two.compute("us", later, later)
    assert two.add_up(DAY).success  # Whatever day is asked for.
    assert two.days(*columns)[later] == (5, 0, [], [])


def test_a_customer_in_two_databases(two: Two) -> None:
    """A copy that was left behind is named, with the days; their rows stay, until it is in one database only.

    That two databases have a customer of the same number says nothing.
    """
    two.end_jobs("eu", "user_1", 0)
    two.end_jobs("us", "user_1", 0)
    for place in ("eu", "us"):
        two.compute(place)
    assert two.add_up().success
    before = two.jobs(with_versions=True)
    assert before[DAY][0] == 4
    with two.connect("eu") as eu, two.connect("us") as us:
        us.execute("CREATE SCHEMA user_2")
        for table in ("marketplace_jobs", "marketplace_tasks"):
            us.execute(f"CREATE TABLE user_2.{table} (LIKE template_tenant.{table} INCLUDING ALL)")
        run("alembic", "-x", "tenant=user_2", "upgrade", "head", environment=variables(two.conninfos["us"]))
        for table in ("jobs", "job_facts", "job_stats", "job_stats_days"):
            with (
                eu.cursor().copy(f"COPY user_2.marketplace_{table} TO STDOUT") as source,
                us.cursor().copy(f"COPY user_2.marketplace_{table} FROM STDIN") as target,
            ):
                for data in source:
                    target.write(data)
        two.end_jobs("us", "user_4", 0)
        two.compute("us")
        result = two.add_up()
        assert failure(result) == (
            f"user_2 is counted in eu and in us on 2 days, {DAY} to {NEXT}, which stay as they were: drop or "
            "rename the copy in the place that it has left, and materialize the summary of these days there."
        )
        assert two.jobs(with_versions=True) == before
        assert two.days("tenants_twice") == {day: ["user_2"] for day in BOTH}
        eu.execute("DROP SCHEMA user_2 CASCADE")
        two.summarize("eu")
    assert two.add_up().success
    assert two.jobs() == {DAY: 5, NEXT: 2}


def test_days_of_another_zone_are_not_added_up(two: Two) -> None:
    """Both are refused by name, and nothing is written."""
    before = two.jobs(with_versions=True)
    result = two.add_up(time_zone="Asia/Tokyo")
    assert "eu: its days are in UTC, not in Asia/Tokyo, and days of two zones overlap" in failure(result)
    assert two.jobs(with_versions=True) == before


def test_the_command_line_reads_it(two: Two) -> None:
    """`--all-databases` prints the sums over all of them, with the tenants that stand behind a day."""
    environment = variables(two.conninfos["eu"]) | {"STATS_START_DATE": DAY}
    command = ("python", "-m", "pipelines.stats", "--days", "366", "--format", "csv", "--all-databases")
    found = run(*command, environment=environment)
    assert [line.split(",")[:5] for line in found.stdout.splitlines()[1:]] == [
        [day, "vinted", "publish", "Vinted Publish", "2"] for day in BOTH
    ]
    refused = run(*command, "--tenant", "user_2", environment=environment, check=False)
    assert refused.returncode == 1 and "A tenant is in one database" in refused.stderr


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({}, "STATS_DATABASES has to name the databases"),
        ({NAMES: "eu eu"}, "each once"),
        ({NAMES: "eu us", "STATS_DATABASE_URL_eu": "postgresql://a:secret@b/c"}, "STATS_DATABASE_URL_us is not set"),
    ],
)
def test_what_is_not_allowed(environment: dict[str, str], words: str) -> None:
    """Refused in one sentence, without a URL."""
    with pytest.raises(UsageError, match=words) as error:
        database_names(environment)
    assert "secret" not in error.value.message


def test_its_sensor_looks_at_the_databases(two: Two) -> None:
    """It requests a day whose summary was made in one of them; and one that could not be made wholly."""
    definitions = build_global_defs(Settings.from_env({"STATS_START_DATE": DAY}), ["eu", "us"])
    sensor = next(one for one in definitions.sensors or () if one.name == "marketplace_global_summary_sensor")
    assert {key.to_user_string() for key in definitions.resolve_asset_graph().get_all_asset_keys()} == {
        "marketplace_global_summary",
        "eu/marketplace_daily_summary",
        "us/marketplace_daily_summary",
    }
    with dg.instance_for_test() as instance:

        def requested(cursor: str | None = None) -> list[str]:
            context = dg.build_sensor_context(instance=instance, cursor=cursor, definitions=definitions)
            return [request.tags[RANGE_START] for request in sensor(context) or ()]  # type: ignore[union-attr]

        assert requested() == []
        instance.report_runless_asset_event(
            dg.AssetMaterialization(["us", "marketplace_daily_summary"], partition=NEXT)
        )
        assert requested("0") == [NEXT]
        instance.report_runless_asset_event(dg.AssetMaterialization("marketplace_global_summary", partition=NEXT))
        assert requested("99") == []
        instance.report_runless_asset_event(dg.AssetObservation("marketplace_global_summary", partition=DAY))
        assert requested("99") == [DAY]


def test_a_customer_who_is_gone(two: Two) -> None:
    """Its jobs leave the sums of all its days, as they leave the summary of its database; that is said by name."""
    with two.connect("us") as us:
        us.execute("DROP SCHEMA user_4 CASCADE")
    two.summarize("us")
    result = two.add_up(NEXT)
    assert result.success and two.jobs() == dict.fromkeys(BOTH, 1)
    assert metadata(result)[NEXT]["run_customers_gone"] == 1
