"""Alerts: a failed run of any job is told to `ALERT_WEBHOOK_URL`, in the words that the run itself failed with.

The address may hold a secret: it is read when it is needed, and never shown.
"""

import http.client
import json
import time
import urllib.error
import urllib.request
from typing import Any
from urllib.parse import urlsplit

import dagster as dg

from pipelines.settings import Settings, UsageError, alert_webhook_url

ATTEMPTS, PAUSE_S, TIMEOUT_S = 3, 2, 10
MOST_CHARACTERS = 2_000

DESCRIPTION = """
Posts `{"text": ...}` to `ALERT_WEBHOOK_URL` for every run that fails, whatever its job, if a schedule, a sensor or
Dagit has started it: which job and run, and why. Chat services take that form as it is. Off if the variable is not set.

When its tick has failed, the message could not be delivered, and is not sent again; the run's own page has it.
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
        reasons = [_reason(error) for error in errors if error] or [context.failure_event.message or "no reason"]
        run = context.dagster_run
        job = "/".join([*settings.key_prefix, run.job_name])
        post(url, f"{job} failed, run {run.run_id}: {' '.join(reasons)}"[:MOST_CHARACTERS])

    return alert_on_failure


def _reason(error: Any) -> str:
    """What went wrong at the bottom of it: Dagster wraps what it does not know."""
    while error.cause:
        error = error.cause
    return str(error.message.strip())


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """To follow one would be to get another page instead of posting."""

    def redirect_request(self, *_: Any) -> None:
        return None


def post(url: str, text: str) -> None:
    """Posts the text, a few times if need be. Raises UsageError, which says no more of the address than the host."""
    opener = urllib.request.build_opener(_NoRedirect)
    request = urllib.request.Request(  # noqa: S310 Settings have seen to it that it is http or https.
        url, json.dumps({"text": text}).encode(), {"Content-Type": "application/json"}
    )
    for attempt in range(ATTEMPTS):
        time.sleep(PAUSE_S * attempt)
        try:
            with opener.open(request, timeout=TIMEOUT_S):
                return
        except urllib.error.HTTPError as error:
            with error:
                reason = f"HTTP status {error.code}"
        except (OSError, ValueError, http.client.HTTPException) as error:
            reason = type(getattr(error, "reason", error)).__name__
    raise UsageError(f"ALERT_WEBHOOK_URL: {urlsplit(url).hostname} did not take the alert ({reason}).")
