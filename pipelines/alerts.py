"""Alerts: a failed run of any job is told to `ALERT_WEBHOOK_URL`, in the words that the run itself failed with.

The address may hold a secret: it is read when it is needed, and never shown.
"""

import json
import urllib.error
import urllib.request
from urllib.parse import urlsplit

import dagster as dg

from pipelines.settings import Settings, UsageError, alert_webhook_url

TIMEOUT_S = 10
MOST_CHARACTERS = 2_000

DESCRIPTION = """
Posts `{"text": ...}` to `ALERT_WEBHOOK_URL` for every run that fails, whatever its job: which job and run, and why.
Chat services take that form as it is. Off if the variable is not set.

*When its tick has failed*, the message could not be delivered; the run's own page says what it would have said.
"""


def build_alert_sensor(settings: Settings) -> dg.SensorDefinition:
    """The sensor; it runs if there is somewhere to post to."""

    @dg.run_failure_sensor(
        name="alert_on_failure",
        description=DESCRIPTION,
        default_status=dg.DefaultSensorStatus.RUNNING if settings.has_alerts else dg.DefaultSensorStatus.STOPPED,
    )
    def alert_on_failure(context: dg.RunFailureSensorContext) -> None:
        url = alert_webhook_url()
        if url is None:
            raise UsageError("ALERT_WEBHOOK_URL is not set: set it, or turn this sensor off.")
        # The run's own words are those of its step; the run itself only says which step it was.
        errors = [event.step_failure_data.error for event in context.get_step_failure_events()]
        reasons = [error.message.strip() for error in errors if error] or [context.failure_event.message or "no reason"]
        run = context.dagster_run
        text = f"{run.job_name} failed, run {run.run_id}: {' '.join(reasons)}"
        post(url, text[:MOST_CHARACTERS])

    return alert_on_failure


def post(url: str, text: str) -> None:
    """Posts the text. Raises UsageError, which names the host only."""
    request = urllib.request.Request(  # noqa: S310 Settings have seen to it that it is http or https.
        url, json.dumps({"text": text}).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S):  # noqa: S310 See above.
            return
    except urllib.error.HTTPError as error:
        with error:
            reason = f"HTTP status {error.code}"
    except (OSError, ValueError) as error:
        reason = type(getattr(error, "reason", error)).__name__
    raise UsageError(f"ALERT_WEBHOOK_URL: {urlsplit(url).hostname} did not take the alert ({reason}).")
