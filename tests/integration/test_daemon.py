"""The real daemon: what it mends after a week without it, and what it tells. The past is arranged in its storage."""

import os
import signal
import sqlite3
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, suppress
from datetime import date, datetime, timedelta
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple

import dagster as dg
import psycopg
import pytest
from dagster._core.scheduler.instigation import InstigatorState, ScheduleInstigatorData, TickStatus

from pipelines.schedules import RANGE_END, RANGE_START
from tests.conftest import ROOT, create_database, run, run_url
from tests.integration.common import TENANTS, calm_time
from tests.integration.test_alerts import Handler, Received, Receiver
from tests.integration.test_command_line import MATERIALIZE

pytestmark = pytest.mark.deployment

NIGHTLY, WEEKLY = "marketplace_job_stats_schedule", "marketplace_job_stats_weekly_schedule"
SECRETS = PASSWORD, PATH = "s3cret-in-url", "s3cret-in-path"
JOB_DAYS, MISSED_DAYS = 45, 7
FORGOTTEN = (18, 19, 20)  # Days ago: before what the nightly run is asked for, but within STATS_SWEEP_DAYS.
Days = dict[date, tuple[int, str]]  # A tenant's ledger: each day with the jobs in its stats, and the run that wrote it.


class Outcome(NamedTuple):
    """The tenants' days before and after the daemon's first life, and all else after its second."""

    now: datetime
    home: Path
    output: str
    received: Received
    instance: dg.DagsterInstance
    before: dict[str, Days]
    after: dict[str, Days]

    def ago(self, *days: int) -> list[date]:
        return [self.now.date() - timedelta(number) for number in days]


def look(connection: psycopg.Connection[Any], schema: str) -> Days:
    rows = connection.execute(f"""
        SELECT date, sum(total_jobs)::int, run_id FROM {schema}.marketplace_job_stats_days
          LEFT JOIN {schema}.marketplace_job_stats USING (date) GROUP BY date""")
    return {day: (jobs, run_id) for day, jobs, run_id in rows}


def live(environment: Mapping[str, str], output: Path, *until: Callable[[], object]) -> None:
    """Starts the daemon, waits until all of this is so, and stops it with its children; else fails with its output."""
    binaries = Path(sys.executable).parent
    with output.open("ab") as stream:
        daemon = subprocess.Popen(
            [binaries / "dagster-daemon", "run", "-w", "workspace.yaml"],
            cwd=ROOT,
            env={"PATH": f"{binaries}:/usr/bin:/bin", "HOME": "/tmp", **environment},
            stdout=stream,
            stderr=stream,
            start_new_session=True,
            # Where the shell ignores the signal, its children would.
            preexec_fn=lambda: signal.signal(signal.SIGTERM, signal.SIG_DFL),
        )
    try:
        deadline = time.monotonic() + 120
        while not all(is_so() for is_so in until):
            if daemon.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"The daemon did not come so far, status {daemon.poll()}:\n{output.read_text()[-9000:]}")
            time.sleep(0.2)
    finally:
        daemon.terminate()
        try:
            daemon.wait(timeout=60)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(daemon.pid, signal.SIGKILL)
            daemon.wait()


def state_of(instance: dg.DagsterInstance, schedule: str) -> InstigatorState:
    return next(state for state in instance.all_instigator_state() if state.name == schedule)


def down_since(instance: dg.DagsterInstance, schedule: str, cron: str, moment: datetime) -> None:
    """As if the schedule had been on for a month, and then looked at no more since this moment."""
    data = ScheduleInstigatorData(cron, (moment - timedelta(30)).timestamp(), moment.timestamp())
    instance.update_instigator_state(state_of(instance, schedule).with_data(data))


def runs_of(instance: dg.DagsterInstance, schedule: str) -> list[dg.DagsterRun]:
    return list(instance.get_runs(dg.RunsFilter(tags={"dagster/schedule_name": schedule})))


def asked_for(run: dg.DagsterRun) -> list[date]:
    return [date.fromisoformat(run.tags[end]) for end in (RANGE_START, RANGE_END)]


@pytest.fixture(scope="module")
def outcome(server: str, migrated_template: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Outcome]:
    """Nights that were run, a week without a daemon, its first life, a tenant that breaks, and its second life."""
    database = create_database(server, "daemon", migrated_template)
    home, output = tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("daemon") / "output"
    (home / "dagster.yaml").write_text("telemetry: {enabled: false}\nnux: {enabled: false}\n")
    now = calm_time()
    today, last_looked = now.date(), now.replace(hour=1) - timedelta(MISSED_DAYS)
    first, last_run = (today - timedelta(days) for days in (JOB_DAYS, MISSED_DAYS + 1))
    with (
        Receiver(("127.0.0.1", 0), Handler) as receiver,
        psycopg.connect(database, autocommit=True) as connection,
        dg.DagsterInstance.from_config(str(home)) as instance,
        ExitStack() as stack,
    ):
        receiver.received = []
        stack.callback(receiver.shutdown)
        Thread(target=receiver.serve_forever).start()
        environment = {
            "DAGSTER_HOME": str(home),
            "DATABASE_URL": run_url(database).replace("stats@", f"stats:{PASSWORD}@"),
            "ALERT_WEBHOOK_URL": f"http://127.0.0.1:{receiver.server_port}/hooks/{PATH}",
            "STATS_TIMEZONE": str(now.tzinfo),
        }
        for schema in TENANTS:  # Two jobs a day: one ends with its first instant, one with its last.
            connection.execute(
                f"""INSERT INTO {schema}.marketplace_jobs (marketplace, action_type_id, status, completed_at)
                    SELECT 'vinted', 1, 'completed', timezone(%s, unnest(ARRAY[day, day + interval '23:59:59.999999']))
                      FROM generate_series(%s::timestamp, %s::timestamp, '1 day') AS day""",
                [str(now.tzinfo), first, today - timedelta(1)],
            )
        run(*MATERIALIZE, "--partition-range", f"{first}...{last_run}", environment=environment)
        for table in ("marketplace_job_stats", "marketplace_job_stats_days"):
            connection.execute(f"DELETE FROM user_2.{table} WHERE %s - date = ANY (%s)", [today, list(FORGOTTEN)])
        before = {schema: look(connection, schema) for schema in TENANTS}
        run("dagster", "schedule", "start", "--start-all", "-w", "workspace.yaml", environment=environment)

        down_since(instance, NIGHTLY, "30 0 * * *", last_looked)
        live(
            environment,
            output,
            lambda: any(run.is_finished for run in runs_of(instance, NIGHTLY)),
            # The sensor's first tick only notes where the log ends: what failed before is never told.
            lambda: any(getattr(state.instigator_data, "cursor", None) for state in instance.all_instigator_state()),
        )
        after = {schema: look(connection, schema) for schema in TENANTS}
        connection.execute("DROP TABLE user_10.marketplace_job_stats CASCADE")
        down_since(instance, WEEKLY, "30 2 * * 0", last_looked)
        live(environment, output, lambda: receiver.received)
        yield Outcome(now, home, output.read_text(), receiver.received, instance, before, after)


def test_one_run_repairs_the_missed_week(outcome: Outcome) -> None:
    """For seven missed ticks one run is requested, and computes each day that was never run, for every tenant."""
    missed = outcome.ago(*range(1, MISSED_DAYS + 1))
    [run] = runs_of(outcome.instance, NIGHTLY)
    assert run.status == dg.DagsterRunStatus.SUCCESS, outcome.output
    assert asked_for(run) == outcome.ago(MISSED_DAYS, 1)
    for schema in TENANTS:
        assert not outcome.before[schema].keys() & missed
        assert outcome.after[schema].items() >= dict.fromkeys(missed, (2, run.run_id)).items()
        assert outcome.after[schema].keys() == set(outcome.ago(*range(1, JOB_DAYS + 1)))


def test_what_one_tenant_lacks_is_taken_along(outcome: Outcome) -> None:
    """Earlier days that one tenant lost are there again; what was there is not written again."""
    [run] = runs_of(outcome.instance, NIGHTLY)
    for day in outcome.ago(*FORGOTTEN):
        assert (outcome.before["user_2"].get(day), outcome.after["user_2"].get(day)) == (None, (2, run.run_id))
    for schema in TENANTS:
        assert outcome.after[schema].items() >= outcome.before[schema].items()


def test_a_tick_is_not_run_again(outcome: Outcome) -> None:
    """In its second life the daemon does what is due, the weekly run; the night's one tick was done before."""
    assert [len(runs_of(outcome.instance, schedule)) for schedule in (NIGHTLY, WEEKLY)] == [1, 1]
    state = state_of(outcome.instance, NIGHTLY)
    [tick] = outcome.instance.get_ticks(state.instigator_origin_id, state.selector_id)
    at = datetime.fromtimestamp(tick.timestamp, outcome.now.tzinfo)
    assert (tick.status, f"{at:%F %R}") == (TickStatus.SUCCESS, f"{outcome.now:%F} 00:30")


def test_a_failed_run_is_posted_once(outcome: Outcome) -> None:
    """The sensor posts which job and run failed, for which tenant, and the remedy."""
    [run] = runs_of(outcome.instance, WEEKLY)
    sunday = outcome.now.isoweekday() % 7
    assert run.status == dg.DagsterRunStatus.FAILURE
    assert asked_for(run) == outcome.ago(sunday + 35, sunday + 1)
    text = (
        f"marketplace_job_stats_job failed, run {run.run_id}: 2 tenants done, 0 skipped, 1 failed; "
        "0 rows changed, 0 days held back. Failed: user_10: marketplace_job_stats is missing: "
        "run `alembic -x tenant=user_10 upgrade head`."
    )
    assert outcome.received == [(f"/hooks/{PATH}", {"text": text})]


def stored(home: Path) -> Iterator[bytes]:
    """All that Dagster keeps: its files, and the values in its databases, unpacked where it packs them."""
    for path in (path for path in home.rglob("*") if path.is_file()):
        yield path.read_bytes()
        if path.suffix == ".db":
            with closing(sqlite3.connect(path)) as connection:
                tables = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
                rows = (row for [table] in tables for row in connection.execute(f"SELECT * FROM {table}"))
                for value in (value for row in rows for value in row):
                    with suppress(zlib.error):
                        yield zlib.decompress(value) if isinstance(value, bytes) else str(value).encode()


def test_no_secret_is_kept_or_shown(outcome: Outcome) -> None:
    """The password and the address of the alerts are in nothing that Dagster keeps, in no output and in no alert."""
    kept = b"\n".join(stored(outcome.home)).decode(errors="replace")
    # One stands in an event, the other in what is packed.
    assert "marketplace_job_stats is missing" in kept and "statement_timeout_ms" in kept
    for secret in SECRETS:
        assert secret not in kept + outcome.output + str([message for _, message in outcome.received])
