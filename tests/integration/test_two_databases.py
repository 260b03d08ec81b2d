"""Two databases under one Dagit: two servers, two code servers, the real daemon. A slow or dead one holds back nobody.

The processes are those of the units in `deploy/`, with its instance and its limits.
"""

import os
import re
import signal
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from threading import Thread
from typing import Any

import psycopg
import pytest

from pipelines.definitions import build_defs
from pipelines.settings import Settings
from tests import application
from tests.conftest import create_database, create_run_role, run, run_url, url_of
from tests.integration.test_alerts import Handler, Receiver
from tests.integration.test_deploy import CODE, DAEMON, WEB, Deployment, dagster_url, example, free_port
from tests.server import Server, server_to_control

pytestmark = pytest.mark.deployment

JOBS = {"eu": 2, "us": 3}  # How many jobs a day each database has.
YESTERDAY = datetime.now(UTC).date() - timedelta(1)
LIMIT = 4  # Of one database's runs at once, in deploy/dagster.yaml.
GLOBAL, GLOBAL_SUMMARY = "global", "marketplace_global_summary_job"
STATS, SUMMARY = "marketplace_job_stats_job", "marketplace_daily_summary_job"
ALERTS = "alert_on_failure"
SHORTER = (  # What is waited for on purpose: for a code server, and for a server.
    ("deploy/dagster.yaml", "user_code_failure_retry_delay: 30", "user_code_failure_retry_delay: 5"),
    ("assets/marketplace_job_stats/asset.py", "PATIENCE_S = 60", "PATIENCE_S = 30"),
)

DEFINED = """{ workspaceOrError { ... on Workspace { locationEntries { name locationOrLoadError {
  ... on RepositoryLocation { repositories {
    jobs { name }
    schedules { name }
    sensors { name sensorState { status typeSpecificData { ... on SensorData { lastCursor } } } }
    assetNodes { assetKey { path } }
  } } } } } } }"""
LAUNCH = """mutation($location: String!, $job: String!, $day: String!) {
  launchRun(executionParams: {
    selector: {repositoryLocationName: $location, repositoryName: "__repository__", jobName: $job}
    executionMetadata: {tags: [{key: "dagster/partition", value: $day}]}
  }) { __typename ... on LaunchRunSuccess { run { runId } } }
}"""
POOL = "mutation($pool: String!) { setConcurrencyLimit(concurrencyKey: $pool, limit: 1) }"
TERMINATE = "mutation($runs: [String!]!) { terminateRuns(runIds: $runs) { __typename } }"
RUN = """query($run: ID!) { runOrError(runId: $run) { ... on Run { status
    eventConnection { events { __typename ... on MessageEvent { message }
        ... on ExecutionStepFailureEvent { error { message } } } } } } }"""


@dataclass
class Two:
    """The deployment of both databases, their servers, and what was told at /eu and /us."""

    deployment: Deployment
    servers: dict[str, Server]
    receiver: Receiver

    def defined(self) -> dict[str, dict[str, Any]]:
        """What each location defines, as Dagit knows it; nothing of those that are not loaded."""
        entries = (self.deployment.ask(DEFINED) or {"locationEntries": []})["locationEntries"]
        loaded = {entry["name"]: entry["locationOrLoadError"] for entry in entries}
        return {name: location["repositories"][0] for name, location in loaded.items() if location}

    def states(self, sensor: str) -> dict[str, dict[str, Any]]:
        """The state of this sensor in each of the locations that are loaded."""
        return {
            name: found["sensorState"]
            for name, location in self.defined().items()
            for found in location["sensors"]
            if found["name"] == sensor and name in JOBS
        }

    def read_on(self, since: dict[str, str]) -> dict[str, str]:
        """How far both sensors of alerts have read the log, as soon as they have read on; until then nothing."""
        cursors = {name: state["typeSpecificData"]["lastCursor"] for name, state in self.states(ALERTS).items()}
        done = cursors.keys() == JOBS.keys() and all(at and at != since.get(name) for name, at in cursors.items())
        return cursors if done else {}

    def connect(self, location: str) -> psycopg.Connection[Any]:
        return psycopg.connect(f"{self.servers[location].conninfo} dbname=shop", autocommit=True)

    def launch(self, location: str, job: str = STATS, days_ago: int = 1) -> str:
        """Puts a run of a day into the queue, as Dagit's launchpad does; returns its id."""
        day = datetime.now(UTC).date() - timedelta(days_ago)
        answer = self.deployment.ask(LAUNCH, location=location, job=job, day=day.isoformat())
        assert answer["__typename"] == "LaunchRunSuccess"
        return str(answer["run"]["runId"])

    def status(self, run_id: str) -> str:
        return str((self.deployment.ask(RUN, run=run_id) or {"status": ""})["status"])

    def reaches(self, run_id: str, *statuses: str) -> str:
        """Waits until a run has one of these statuses, or has ended."""
        ended = {"SUCCESS", "FAILURE", "CANCELED"}
        self.deployment.until(lambda: self.status(run_id) in {*statuses, *ended}, 150)
        return self.status(run_id)

    def events(self, run_id: str, kind: str) -> list[str]:
        """The messages of a run's events of this kind; of a failure, the error's."""
        events = self.deployment.ask(RUN, run=run_id)["eventConnection"]["events"]
        return [event.get("error", event)["message"] for event in events if event["__typename"] == kind]

    def ledger(self, location: str) -> dict[date, tuple[str, int]]:
        """Each day with the run that wrote it, and its jobs."""
        with self.connect(location) as connection:
            rows = connection.execute(
                "SELECT date, run_id, job_count FROM user_1.marketplace_job_stats_days ORDER BY date"
            )
            return {day: (run_id, jobs) for day, run_id, jobs in rows}

    @contextmanager
    def locked(self, location: str) -> Iterator[psycopg.Connection[Any]]:
        """A session of somebody else's, by which a tenant's stats can neither be written nor read."""
        with closing(self.connect(location)) as connection:  # Closed without a word: its server may be dead by then.
            connection.execute("BEGIN; LOCK TABLE user_1.marketplace_job_stats IN ACCESS EXCLUSIVE MODE")
            yield connection

    def waiting(self, location: str) -> int:
        """How many sessions wait for such a lock."""
        with self.connect(location) as connection:
            row = connection.execute("SELECT count(DISTINCT pid) FROM pg_locks WHERE NOT granted").fetchone()
        return int(row[0]) if row else 0

    def alerts(self, *run_ids: str) -> list[str]:
        """At which paths these runs were told, once for each time."""
        return [path for path, alert in self.receiver.received for run_id in run_ids if run_id in alert["text"]]


def database(server: Server, jobs: int) -> dict[str, str]:
    """Makes a tenant with so many jobs on each of the last seven days; returns the variables of its environment."""
    conninfo = create_database(server.conninfo, "shop")
    create_run_role(server.conninfo)
    with psycopg.connect(conninfo) as connection:
        application.create_action_types(connection)
        application.create_tenant(connection, application.TEMPLATE)
        application.create_tenant(connection, "user_1")
        connection.execute(
            """INSERT INTO user_1.marketplace_jobs (marketplace, action_type_id, status, completed_at)
               SELECT 'vinted', 1, 'completed', %s - day * interval '1 day'
                 FROM generate_series(0, 6) AS day, generate_series(1, %s)""",
            [datetime(*YESTERDAY.timetuple()[:3], 12, tzinfo=UTC), jobs],
        )
    variables = {"DATABASE_URL": run_url(conninfo), "MIGRATION_DATABASE_URL": url_of(conninfo)}
    run("alembic", "upgrade", "head", environment=variables)
    return variables


@pytest.fixture(scope="module")
def two(server: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Two]:
    """Everything up: both locations are loaded, and the sensors of the alerts have begun to look."""
    with ExitStack() as stack:
        servers = {location: stack.enter_context(server_to_control()) for location in JOBS}
        receiver = stack.enter_context(Receiver(("127.0.0.1", 0), Handler))
        receiver.received = []
        stack.callback(receiver.shutdown)
        Thread(target=receiver.serve_forever).start()
        deployment = Deployment(
            tmp_path_factory.mktemp("two") / "deployment",
            {"DAGSTER_POSTGRES_URL": dagster_url(server, "dagster_two")},
            ports={port: free_port() for port in ("3000", "4001", "4002", "4003")},
        )
        stack.callback(deployment.stop_all)
        deployment.variables["MARKETPLACE_STATS_WORKSPACE"] = "deploy/workspace-several.yaml"
        for path, text, shorter in SHORTER:
            file = deployment.checkout / path
            assert file.read_text().count(text) == 1
            file.write_text(file.read_text().replace(text, shorter))
        for location, port in zip(JOBS, ("4001", "4002"), strict=True):
            deployment.databases[location] = {
                **example("eu.environment.example"),
                **database(servers[location], JOBS[location]),
                "STATS_KEY_PREFIX": location,
                "STATS_CODE_PORT": deployment.ports[port],
                "STATS_LOCK_TIMEOUT_MS": "600000",
                "ALERT_WEBHOOK_URL": f"http://127.0.0.1:{receiver.server_port}/{location}",
            }
            deployment.start(f"{CODE}@{location}")
        # The summary over both, at home in eu, reads as the run's role: a role that only reads has its own test.
        deployment.databases[GLOBAL] = {
            **example("global.environment.example"),
            "DATABASE_URL": deployment.databases["eu"]["DATABASE_URL"],
            **{f"STATS_DATABASE_URL_{name}": deployment.databases[name]["DATABASE_URL"] for name in JOBS},
            "STATS_CODE_PORT": deployment.ports["4003"],
        }
        deployment.start(f"{CODE}@{GLOBAL}")
        two = Two(deployment, servers, receiver)
        deployment.start(DAEMON)
        deployment.start(WEB)
        # The first tick of such a sensor only notes where the log ends: what failed before is never told.
        deployment.until(lambda: two.read_on({}), 150)
        for location in JOBS:  # As the guide does it, by `dagster instance concurrency set`.
            assert deployment.ask(POOL, pool=f"{location}__marketplace_job_stats") is True
        yield two


def test_both_are_under_one_dagit(two: Two) -> None:
    """Every asset has its own key, and both have all jobs, schedules and sensors, under the same names."""
    defined = two.defined()
    over_all = defined.pop(GLOBAL)
    summaries = {(location, "marketplace_daily_summary") for location in JOBS}
    found = {tuple(node["assetKey"]["path"]) for node in over_all["assetNodes"]}
    assert found == {("marketplace_global_summary",), *summaries}
    keys = {name: {tuple(node["assetKey"]["path"]) for node in one["assetNodes"]} for name, one in defined.items()}
    expected = {spec.key.path[-1] for spec in build_defs(Settings.from_env({})).resolve_all_asset_specs()}
    assert keys == {location: {(location, name) for name in expected} for location in JOBS}
    for kind in ("jobs", "schedules", "sensors"):
        eu, us = ({found["name"] for found in defined[location][kind]} for location in JOBS)
        assert eu == us
        assert len(eu) > 2
    assert {name: state["status"] for name, state in two.states(ALERTS).items()} == dict.fromkeys(JOBS, "RUNNING")


def test_a_slow_database_holds_back_only_itself(two: Two) -> None:
    """With as many of its runs at work as it may have, and more in the queue, a run of the other one is done.

    One of its own runs of the stats is at work, and those behind it hold back no run that waits for no pool.
    """
    with two.locked("eu") as holder:
        stats = [two.launch("eu", STATS, days_ago) for days_ago in range(1, LIMIT + 1)]
        two.deployment.until(lambda: two.waiting("eu") == 1)
        summaries = [two.launch("eu", SUMMARY, days_ago) for days_ago in range(1, LIMIT + 1)]
        two.deployment.until(lambda: two.waiting("eu") == LIMIT, 150)
        other = two.launch("us")
        assert two.reaches(other) == "SUCCESS"
        assert [two.status(run_id) for run_id in stats] == ["STARTED", *["QUEUED"] * (LIMIT - 1)]
        assert [two.status(run_id) for run_id in summaries] == [*["STARTED"] * (LIMIT - 1), "QUEUED"]
        assert two.ledger("us") == {YESTERDAY: (other, JOBS["us"])}
        two.deployment.ask(TERMINATE, runs=stats[1:])
        holder.rollback()
    assert {two.reaches(run_id) for run_id in (stats[0], *summaries)} == {"SUCCESS"}
    assert two.ledger("eu") == {YESTERDAY: (stats[0], JOBS["eu"])}
    assert two.receiver.received == []


def test_a_database_killed_in_mid_run_fails_alone(two: Two) -> None:
    """The other one's runs succeed meanwhile; the failed run says why, is told once, and is mended by another."""
    server = two.servers["eu"]
    before = two.read_on({})
    with two.locked("eu"):
        killed = two.launch("eu", days_ago=2)
        two.deployment.until(lambda: two.waiting("eu") == 1)
        server.control("-m", "immediate", "stop")
    try:
        other = two.launch("us", days_ago=2)
        assert two.reaches(other) == "SUCCESS"
        assert two.status(killed) == "STARTED"  # It still looks for its server.
        assert two.reaches(killed) == "FAILURE"
        [reason] = two.events(killed, "ExecutionStepFailureEvent")
        assert re.fullmatch(
            r"Cannot connect to database shop on \S+: [^\n]+\. Check DATABASE_URL, and that the server is up\.\s*",
            reason,
        )
    finally:
        server.control("start")
    mended = two.launch("eu", days_ago=2)
    assert two.reaches(mended) == "SUCCESS"
    assert two.ledger("eu")[YESTERDAY - timedelta(1)] == (mended, JOBS["eu"])
    # Also the other one's sensor has seen the failure, which is not its own.
    two.deployment.until(lambda: two.read_on(before))
    assert [path for path, _ in two.receiver.received] == ["/eu"]


def test_a_code_server_killed_in_mid_run_holds_back_only_its_own(two: Two) -> None:
    """The other one's runs succeed; what is due waits in the queue for the server, and is done when it is back."""
    code = f"{CODE}@eu"
    with two.locked("eu") as holder:
        at_work = two.launch("eu", days_ago=3)
        two.deployment.until(lambda: two.waiting("eu") == 1)
        due = two.launch("eu", days_ago=4)
        os.kill(two.deployment.processes[code].pid, signal.SIGKILL)
        holder.rollback()
    # Its process has only lost the server that began it.
    assert two.reaches(at_work) == "SUCCESS"
    waits = "failed to reach the user code server, re-submitting the run into the queue"
    two.deployment.until(lambda: any(waits in reason for reason in two.events(due, "EngineEvent")))
    other = two.launch("us", days_ago=3)
    assert two.reaches(other) == "SUCCESS"
    assert two.status(due) == "QUEUED"
    two.deployment.stop(code)
    two.deployment.start(code)
    assert two.reaches(due) == "SUCCESS"
    assert two.alerts(at_work, due) == []


def test_the_summary_over_both(two: Two) -> None:
    """The third location adds up what the other two have summarized, from the environment of its own unit."""
    for location in JOBS:
        for job in (STATS, SUMMARY):
            assert two.reaches(two.launch(location, job, days_ago=5)) == "SUCCESS"
    assert two.reaches(two.launch(GLOBAL, GLOBAL_SUMMARY, days_ago=5)) == "SUCCESS"
    with two.connect("eu") as connection:
        [(jobs,)] = connection.execute("SELECT total_jobs FROM marketplace_stats.marketplace_global_summary").fetchall()
    assert jobs == sum(JOBS.values())
