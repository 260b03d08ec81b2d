"""The alert of a failed run: what is posted, to whom, and what is never shown."""

import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread
from typing import Any

import dagster as dg
import pytest

from assets.marketplace_job_stats import asset
from assets.marketplace_job_stats.asset import SCHEDULE_TAG, TODAY
from pipelines import alerts
from pipelines.definitions import build_defs
from pipelines.settings import Settings, UsageError

Received = list[tuple[str, dict[str, Any]]]


class Receiver(HTTPServer):
    """A chat service of the test's own, on loopback."""

    received: Received
    status = 200


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        assert isinstance(self.server, Receiver)
        body = self.rfile.read(int(self.headers["Content-Length"]))
        assert self.headers["Content-Type"] == "application/json"
        self.server.received.append((self.path, json.loads(body)))
        self.send_response(self.server.status)
        self.send_header("Location", "/login")
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        """Says nothing."""


@pytest.fixture
def receiver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Receiver]:
    server = Receiver(("127.0.0.1", 0), Handler)
    server.received = []
    monkeypatch.setattr(alerts, "PAUSE_S", 0)
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setenv("ALERT_WEBHOOK_URL", f"http://127.0.0.1:{server.server_port}/hooks/s3cret")
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def failed_run(instance: dg.DagsterInstance, of_today: bool = False) -> dg.RunFailureSensorContext:
    """What the sensor gets to see of a run that failed: here because the server is down."""
    name = "marketplace_job_stats_today_job" if of_today else "marketplace_job_stats_job"
    job = build_defs(Settings.from_env({})).resolve_job_def(name)
    of = {"tags": {SCHEDULE_TAG: TODAY}} if of_today else {"partition_key": "2026-01-15"}
    result = job.execute_in_process(instance=instance, raise_on_error=False, **of)
    failure = next(event for event in result.all_events if event.is_run_failure)
    return dg.build_run_status_sensor_context(
        "alert_on_failure", failure, instance, result.dagster_run
    ).for_run_failure()


def test_a_failed_run_is_posted(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message names job and run, gives the run's own sentence, and holds no secret."""
    monkeypatch.setenv("DATABASE_URL", "postgresql://stats:s3cret@127.0.0.1:1/shop")
    with dg.DagsterInstance.ephemeral() as instance:
        context = failed_run(instance)
        build_defs(Settings.from_env()).resolve_sensor_def("alert_on_failure")(context)
    [(path, message)] = receiver.received
    assert path == "/hooks/s3cret"
    assert message["text"].startswith(
        f"marketplace_job_stats_job failed, run {context.dagster_run.run_id}: "
        "Cannot connect to database shop on 127.0.0.1:1: "
    )
    assert "s3cret" not in message["text"]
    assert "\n" not in message["text"]


def test_todays_runs_are_told_once(receiver: Receiver, monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """As long as each fails; after one that went well, and for each other job, the next failure is news again."""
    monkeypatch.setattr(asset, "PATIENCE_S", 0)
    down = "postgresql://stats@127.0.0.1:1/shop"
    job = build_defs(Settings.from_env()).resolve_job_def("marketplace_job_stats_today_job")
    with dg.DagsterInstance.ephemeral() as instance:
        for is_down, is_posted in ((True, True), (True, False), (True, False), (False, False), (True, True)):
            monkeypatch.setenv("DATABASE_URL", down if is_down else url)
            if is_down:
                context = failed_run(instance, of_today=True)
                failed_run(instance)  # Another job's are not looked at.
                build_defs(Settings.from_env()).resolve_sensor_def("alert_on_failure")(context)
                posted = [message["text"] for _, message in receiver.received]
                assert [context.dagster_run.run_id in text for text in posted[-1:]] == [is_posted]
            else:
                assert job.execute_in_process(instance=instance, tags={SCHEDULE_TAG: TODAY}).success
    assert len(receiver.received) == 2


def test_a_receiver_that_refuses_is_named_without_its_secret(receiver: Receiver) -> None:
    """The tick says which host did not take the alert."""
    receiver.status = 500
    with pytest.raises(UsageError, match=r"127\.0\.0\.1 did not take the alert \(HTTP status 500\)") as refusal:
        alerts.post(f"http://127.0.0.1:{receiver.server_port}/hooks/s3cret", "text")
    assert "s3cret" not in str(refusal.value) and refusal.value.__cause__ is None
    with pytest.raises(UsageError, match=r"did not take the alert \(ConnectionRefusedError\)"):
        alerts.post("http://127.0.0.1:1/hooks/s3cret", "text")
    assert len(receiver.received) == alerts.ATTEMPTS


def test_a_redirect_is_no_delivery(receiver: Receiver) -> None:
    """To follow it would be to get a page, and to lose the alert."""
    receiver.status = 302
    with pytest.raises(UsageError, match="HTTP status 302"):
        alerts.post(f"http://127.0.0.1:{receiver.server_port}/hooks/s3cret", "text")


def test_an_error_that_nobody_expected_is_posted_with_its_cause(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dagster wraps it in a sentence that says nothing."""

    def fail(*_: Any, **__: Any) -> None:
        raise MemoryError("the real reason")

    monkeypatch.setattr("pipelines.resources.conninfo", fail)
    with dg.DagsterInstance.ephemeral() as instance:
        build_defs(Settings.from_env()).resolve_sensor_def("alert_on_failure")(failed_run(instance))
    assert receiver.received[0][1]["text"].endswith("MemoryError: the real reason")


@pytest.mark.parametrize(
    "url",
    [
        "ftp://h/s3cret",
        "s3cret",
        "https:///s3cret",
        "https://h/s3 cret",
        "https://user:s3cret@h/x",
        "https://h:s3cret/x",
        "http://[::1/s3cret",
        "https://h/s3\x01cret",
    ],
)
def test_a_wrong_address_is_refused_without_repeating_it(url: str) -> None:
    """It is noticed when the definitions are loaded."""
    with pytest.raises(UsageError, match="ALERT_WEBHOOK_URL is not an address to post to") as refusal:
        Settings.from_env({"ALERT_WEBHOOK_URL": url})
    assert "cret" not in refusal.value.message


def test_it_is_off_if_there_is_nowhere_to_post() -> None:
    """Without ALERT_WEBHOOK_URL the sensor does not run; with it, it does without being turned on."""
    on = build_defs(Settings.from_env({"ALERT_WEBHOOK_URL": "https://h/x"})).resolve_sensor_def("alert_on_failure")
    off = build_defs(Settings.from_env({})).resolve_sensor_def("alert_on_failure")
    assert (on.default_status, off.default_status) == (
        dg.DefaultSensorStatus.RUNNING,
        dg.DefaultSensorStatus.STOPPED,
    )
