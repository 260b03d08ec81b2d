"""The metrics: what they say of runs and tenants, also where there is nothing to say it from, and the file."""

import os
import stat
import time
from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import dagster as dg
import psycopg
import pytest
from click.testing import CliRunner
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse

from pipelines import ledgers
from pipelines.definitions import build_defs
from pipelines.ledgers import OUTCOMES
from pipelines.metrics import FRESH_S, GAUGES, KEY_PREFIX_TAG, Metrics, collect, main, write
from pipelines.settings import Settings, UsageError
from tests import application
from tests.conftest import run, run_url, url_of
from tests.integration.common import NOON, TENANTS, job

STATS_JOB = "marketplace_job_stats_job"
DAYS = [datetime.now(UTC).date() - timedelta(days=number) for number in range(5, 0, -1)]
ENVIRONMENT = {"STATS_START_DATE": DAYS[0].isoformat(), "STATS_LOCK_TIMEOUT_MS": "300"}
Values = dict[str, dict[tuple[str, ...], float]]


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    with dg.instance_for_test() as instance:
        yield instance


@pytest.fixture
def jobs(connection: psycopg.Connection[Any], url: str) -> None:
    """In each of the three tenants, a job that ended on each of the five days."""
    for schema in TENANTS:
        ends = [datetime(day.year, day.month, day.day, 12, tzinfo=UTC) for day in DAYS]
        rows = [job(completed_at=end, started_at=end - timedelta(seconds=2)) for end in ends]
        application.insert(connection, schema, "marketplace_jobs", rows)


def compute(instance: dg.DagsterInstance, first: date = DAYS[0], prefix: str = "") -> dg.ExecuteInProcessResult:
    """A run from this day to yesterday."""
    definitions = build_defs(Settings.from_env(ENVIRONMENT | {"STATS_KEY_PREFIX": prefix}))
    return definitions.resolve_job_def(STATS_JOB).execute_in_process(
        instance=instance,
        tags={
            "dagster/asset_partition_range_start": first.isoformat(),
            "dagster/asset_partition_range_end": DAYS[-1].isoformat(),
        },
        raise_on_error=False,
    )


def values(families: Any) -> Values:
    """The samples by metric and the values of their labels, without the names' prefix."""
    found: Values = {}
    for family in families:
        assert family.type == "gauge" and family.documentation
        for sample in family.samples:
            labels = tuple(sample.labels.values())
            assert labels not in found.setdefault(sample.name.removeprefix("marketplace_stats_"), {})
            found[sample.name.removeprefix("marketplace_stats_")][labels] = sample.value
    assert found.keys() <= GAUGES.keys()
    return found


def metrics(instance: dg.DagsterInstance, warnings: list[str] | None = None, prefix: str = "") -> Values:
    """The metrics of now."""
    settings = Settings.from_env(ENVIRONMENT | {"STATS_KEY_PREFIX": prefix})
    repository = build_defs(settings).get_repository_def()
    said: list[str] = []
    found = values(collect(settings, repository, instance, said.append).collect())
    assert said == [] or warnings is not None
    if warnings is not None:
        warnings.extend(said)
    return found


def outcomes(found: Values) -> dict[str, float]:
    """How many tenants have each outcome, without those that none has."""
    assert {label for (label,) in found["tenants"]} == set(OUTCOMES)
    return {label: count for (label,), count in found["tenants"].items() if count}


def start(day: date) -> float:
    return datetime(day.year, day.month, day.day, tzinfo=UTC).timestamp()


def test_before_the_first_run(jobs: None, instance: dg.DagsterInstance) -> None:
    """Every scheduled job has succeeded at no time, which is long ago, and all days are due for all tenants."""
    found = metrics(instance)
    assert found["up"] == found["dagster_up"] == {(): 1}
    assert set(found["last_success_timestamp_seconds"].values()) == {0}
    assert {name for (name,) in found["last_success_timestamp_seconds"]} >= {
        STATS_JOB,
        "marketplace_daily_summary_job",
        "marketplace_report_job",
        "migrate_tenants_job",
        "yesterday_is_there_job",
    }
    assert not found.keys() & {"last_run_succeeded", "last_run_duration_seconds", "check_failing"}
    assert outcomes(found) == {"missing": 3}
    assert found["days_due"] == {(): 5}
    assert found["newest_due_day_timestamp_seconds"] == {(): start(DAYS[-1])}
    assert found["complete_until_timestamp_seconds"] == {(): start(DAYS[0])}


def test_after_a_good_and_a_bad_night(
    jobs: None, instance: dg.DagsterInstance, connection: psycopg.Connection[Any]
) -> None:
    """A good night leaves nothing due. After a bad one the last success is that of the good one, and the tenant that
    failed, its days and the failed check are there.
    """
    assert compute(instance).success
    now = time.time()
    good = metrics(instance)
    assert outcomes(good) == {"computed": 3}
    assert good["days_due"] == good["newest_due_day_timestamp_seconds"] == {(): 0}
    assert good["complete_until_timestamp_seconds"] == {(): start(DAYS[-1] + timedelta(days=1))}
    assert now - 30 < good["last_success_timestamp_seconds"][STATS_JOB,] <= now
    assert good["last_run_succeeded"] == {(STATS_JOB,): 1}
    assert 0 < good["last_run_duration_seconds"][STATS_JOB,] < 30
    assert good["last_run_rows_written"] == {(STATS_JOB,): 15}
    checks = {check: failing for (_, check, _), failing in good["check_failing"].items()}
    assert checks == dict.fromkeys(checks, 0) and len(checks) == 4

    connection.execute("DELETE FROM user_2.marketplace_job_stats_days WHERE date = %s", [DAYS[1]])
    connection.execute("DELETE FROM user_2.marketplace_job_stats_days WHERE date = %s", [DAYS[-1]])
    connection.execute("ALTER TABLE user_2.marketplace_jobs RENAME COLUMN status TO state")
    assert not compute(instance, DAYS[-1]).success
    bad = metrics(instance)
    assert bad["last_success_timestamp_seconds"] == good["last_success_timestamp_seconds"]
    assert bad["last_run_succeeded"] == {(STATS_JOB,): 0}
    assert outcomes(bad) == {"computed": 2, "missing": 1}
    assert bad["days_due"] == {(): 2}
    assert bad["newest_due_day_timestamp_seconds"] == {(): start(DAYS[-1])}
    assert bad["complete_until_timestamp_seconds"] == {(): start(DAYS[1])}
    assert [key for key, failing in bad["check_failing"].items() if failing] == [
        ("marketplace_job_stats", "every_tenant_is_computed", "warn")
    ]


def test_every_outcome(
    jobs: None,
    instance: dg.DagsterInstance,
    database: str,
    connection: psycopg.Connection[Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each tenant is counted once, by what the last closed day is for it; one that cannot be read hides no other."""
    for number in range(20, 28):
        application.clone_tenant(connection, f"user_{number}")
    run(
        "alembic",
        "upgrade",
        "head",
        environment={"MIGRATION_DATABASE_URL": url_of(database), "DATABASE_URL": os.environ["DATABASE_URL"]},
    )
    assert compute(instance).success
    last = f"date = '{DAYS[-1]}'"
    days, rows = "marketplace_job_stats_days", "marketplace_job_stats"
    connection.execute(f"UPDATE user_1.{days} SET definition = 1 WHERE {last}")
    connection.execute(f"UPDATE user_2.{days} SET outcome = 'held_back' WHERE {last}")
    connection.execute(f"UPDATE user_10.{days} SET time_zone = 'Europe/Paris' WHERE {last}")
    connection.execute(f"DELETE FROM user_20.{days}")  # New: nothing has ended before today.
    connection.execute(f"DELETE FROM user_21.{days}")
    connection.execute(f"DROP TABLE user_22.marketplace_tasks, user_22.marketplace_jobs; DELETE FROM user_22.{days}")
    connection.execute(f"REVOKE ALL ON user_23.{days} FROM stats")
    connection.execute(f"ALTER TABLE user_24.{days} DROP CONSTRAINT ck_{days}_outcome")
    connection.execute(f"UPDATE user_24.{days} SET outcome = 'open' WHERE {last}")
    connection.execute(f"DROP TABLE user_25.{days}")
    connection.execute(f"DELETE FROM user_26.{days} WHERE {last}")
    connection.execute(f"INSERT INTO user_26.{rows} (action_type_id, date, total_jobs) VALUES (1, '{DAYS[-1]}', 1)")
    for schema in ("user_21", "user_23", "user_25"):
        application.insert(connection, schema, "marketplace_jobs", [job(completed_at=NOON)])
    expected = {"computed": 1, "outdated": 2, "held_back": 1, "open": 1, "counter_only": 1, "missing": 1}
    expected |= {"new": 1, "skipped": 1, "unreadable": 2}
    for batch in (50, 2):
        monkeypatch.setattr(ledgers, "BATCH", batch)
        found = metrics(instance)
        assert outcomes(found) == expected
        assert found["days_due"] == {(): 5}  # user_21 lacks all.


def test_what_is_due(jobs: None, instance: dg.DagsterInstance, connection: psycopg.Connection[Any]) -> None:
    """A day is due that a run would compute again: not one that is held back, nor of a tenant without jobs to count."""
    assert compute(instance).success
    days, day = "user_2.marketplace_job_stats_days", f"date = '{DAYS[2]}'"
    connection.execute(f"ALTER TABLE {days} DROP CONSTRAINT ck_marketplace_job_stats_days_outcome")
    for change, is_due in (
        ("definition = 1", True),
        ("outcome = 'open'", True),
        ("time_zone = 'Europe/Paris'", True),
        ("outcome = 'held_back'", False),
    ):
        connection.execute(f"CREATE TABLE kept AS SELECT * FROM {days}")
        connection.execute(f"UPDATE {days} SET {change} WHERE {day}")
        found = metrics(instance)
        assert found["days_due"] == {(): is_due}, change
        assert found["newest_due_day_timestamp_seconds"] == {(): start(DAYS[2]) if is_due else 0}
        assert outcomes(found) == {"computed": 3}
        connection.execute(f"TRUNCATE {days}; INSERT INTO {days} SELECT * FROM kept; DROP TABLE kept")
    connection.execute(f"DELETE FROM {days}; DELETE FROM user_2.marketplace_jobs")
    found = metrics(instance)
    assert (outcomes(found), found["days_due"]) == ({"computed": 2, "new": 1}, {(): 0})
    connection.execute("DROP TABLE user_2.marketplace_tasks, user_2.marketplace_jobs")
    found = metrics(instance)
    assert (outcomes(found), found["days_due"]) == ({"computed": 2, "skipped": 1}, {(): 0})


def test_a_database_that_is_down(instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dagster's part is there, the ledgers' part is not, and `up` says so, without the password."""
    monkeypatch.setenv("DATABASE_URL", "postgresql://stats:s3cret@127.0.0.1:1/shop")
    assert not compute(instance, DAYS[-1]).success
    warnings: list[str] = []
    found = metrics(instance, warnings)
    assert (found["up"], found["dagster_up"]) == ({(): 0}, {(): 1})
    assert not found.keys() & {"tenants", "days_due", "newest_due_day_timestamp_seconds"}
    assert found["last_run_succeeded"] == {(STATS_JOB,): 0}
    [warning] = warnings
    assert warning.startswith("The ledgers could not be read: Cannot connect to database shop on 127.0.0.1:1: ")
    assert "s3cret" not in warning


def test_ledgers_that_take_too_long(
    jobs: None, instance: dg.DagsterInstance, connection: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sensor has a minute: the ledgers are given up before, whatever holds them."""
    monkeypatch.setattr("pipelines.metrics.TIMEOUT_S", 0.2)
    warnings: list[str] = []
    with connection.transaction():
        connection.execute("LOCK TABLE user_2.marketplace_job_stats_days")
        found = metrics(instance, warnings)
    assert found["up"] == {(): 0} and "tenants" not in found
    assert warnings == ["The ledgers could not be read: the database has not answered within 0.2 seconds."]


def test_a_prefix_is_a_label_and_keeps_databases_apart(jobs: None, instance: dg.DagsterInstance) -> None:
    """Of several databases that share Dagster's records, each has its own runs, checks and file."""
    assert compute(instance, prefix="eu").success
    eu, us = metrics(instance, prefix="eu"), metrics(instance, prefix="us")
    assert eu["last_run_succeeded"] == {(STATS_JOB, "eu"): 1}
    assert len(eu["check_failing"]) == 4 and {labels[-1] for labels in eu["check_failing"]} == {"eu"}
    assert eu["up"] == {("eu",): 1}
    assert us["last_success_timestamp_seconds"][STATS_JOB, "us"] == 0
    assert not us.keys() & {"last_run_succeeded", "check_failing"}
    settings = Settings.from_env({"STATS_KEY_PREFIX": "eu", "STATS_METRICS_FILE": "/var/lib/x/stats.prom"})
    assert settings.metrics_file == Path("/var/lib/x/stats.eu.prom")


def test_every_job_that_starts_by_itself_says_whose_it_is() -> None:
    """With a prefix, the runs of each such job have the tag by which they are found."""
    repository = build_defs(Settings.from_env({"STATS_KEY_PREFIX": "eu"})).get_repository_def()
    names = {schedule.job_name for schedule in repository.schedule_defs}
    names |= {target.job_name for sensor in repository.sensor_defs for target in sensor.targets}
    assert {name: repository.get_job(name).tags.get(KEY_PREFIX_TAG) for name in names} == dict.fromkeys(names, "eu")


def test_the_command(
    jobs: None, database: str, instance: dg.DagsterInstance, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It prints OpenMetrics text, and nothing else on standard output; without Dagster's records it says why."""
    assert compute(instance).success
    environment = {"DATABASE_URL": run_url(database), **ENVIRONMENT, "DAGSTER_HOME": instance.root_directory}
    printed = run("python", "-m", "pipelines.metrics", environment=environment)
    found = values(parse_openmetrics(printed.stdout))  # type: ignore[no-untyped-call]
    assert (found["up"], found["dagster_up"]) == ({(): 1}, {(): 1})
    assert outcomes(found) == {"computed": 3}
    assert found["last_run_succeeded"] == {(STATS_JOB,): 1}
    assert printed.stderr == ""

    monkeypatch.setenv("STATS_START_DATE", ENVIRONMENT["STATS_START_DATE"])
    for home, sentence in (
        (None, "DAGSTER_HOME is not set, so Dagster's records are not read: set it as the services have it.\n"),
        (str(tmp_path / "none"), "Dagster's records could not be read: "),
    ):
        result = CliRunner().invoke(main, env={"DAGSTER_HOME": home})
        assert result.exit_code == 0
        found = values(parse_openmetrics(result.stdout))  # type: ignore[no-untyped-call]
        assert (found["up"], found["dagster_up"]) == ({(): 1}, {(): 0})
        assert "last_success_timestamp_seconds" not in found
        assert result.stderr.startswith(sentence) and result.stderr.count("\n") == 1


def test_the_file_is_written_when_a_run_has_ended(
    jobs: None, instance: dg.DagsterInstance, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sensor writes it after each run, also one that was killed, and every hour; in one step, for all to read."""
    path = tmp_path / "stats.prom"
    definitions = build_defs(Settings.from_env({**ENVIRONMENT, "STATS_METRICS_FILE": str(path)}))
    sensor = definitions.resolve_sensor_def("metrics_file_sensor")
    assert sensor.default_status == dg.DefaultSensorStatus.RUNNING
    cursor: str | None = None

    def tick() -> bool:
        """Whether the sensor has written the file."""
        nonlocal cursor
        before = path.stat() if path.exists() else None
        context = dg.build_sensor_context(instance, cursor, definitions=definitions)
        assert isinstance(sensor(context), dg.SkipReason)
        cursor = context.cursor
        return path.stat() != before

    def read() -> Values:
        return values(parse(path.read_text()))

    old_umask = os.umask(0o027)  # As the units have it.
    try:
        assert tick() and not tick()
    finally:
        os.umask(old_umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert read()["last_success_timestamp_seconds"][STATS_JOB,] == 0
    assert compute(instance).success
    assert tick() and not tick()
    assert outcomes(read()) == {"computed": 3}
    assert read()["last_run_succeeded"][STATS_JOB,] == 1

    checks = read()["check_failing"]
    killed = instance.create_run_for_job(definitions.resolve_job_def(STATS_JOB), status=dg.DagsterRunStatus.STARTED)
    assert not tick()
    instance.report_run_failed(killed, "The process was killed.")
    assert tick() and not tick()
    assert read()["last_run_succeeded"][STATS_JOB,] == 0
    assert 0 < read()["last_success_timestamp_seconds"][STATS_JOB,] <= time.time()
    assert len(checks) == 4 and read()["check_failing"] == checks  # Its own were planned, and never evaluated.

    hour_ago = time.time() - FRESH_S - 1
    os.utime(path, (hour_ago, hour_ago))
    assert tick() and not tick()

    os.utime(path, (hour_ago, hour_ago))
    with monkeypatch.context() as patch:
        patch.setenv("DATABASE_URL", "postgresql://127.0.0.1:1/shop")
        assert tick() and tick()  # And so every minute.
        assert read()["up"] == {(): 0}
    assert tick() and not tick()
    assert read()["up"] == {(): 1}
    assert [one.name for one in tmp_path.iterdir()] == ["stats.prom"]


def test_a_file_that_cannot_be_written(tmp_path: Path, instance: dg.DagsterInstance) -> None:
    """The tick fails with one sentence, nothing is left behind; without the setting nothing is written."""
    (tmp_path / "stats.prom").mkdir()
    for path in (tmp_path / "none" / "stats.prom", tmp_path / "stats.prom"):
        with pytest.raises(UsageError, match=r"STATS_METRICS_FILE='.*' cannot be written: "):
            write(path, Metrics(()))
    assert [one.name for one in tmp_path.iterdir()] == ["stats.prom"]
    sensor = build_defs(Settings.from_env({})).resolve_sensor_def("metrics_file_sensor")
    assert sensor.default_status == dg.DefaultSensorStatus.STOPPED
    skipped = sensor(dg.build_sensor_context(instance))
    assert isinstance(skipped, dg.SkipReason) and skipped.skip_message
    assert skipped.skip_message.startswith("STATS_METRICS_FILE is not set")
