"""Alerts: what is posted to `ALERT_WEBHOOK_URL`: a failed run of any job, in the words that the run itself failed with,
and what the check of the summary finds unusual.

The address may hold a secret: it is read when it is needed, and never shown.
"""

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

import dagster as dg

from assets.marketplace_job_stats.asset import SCHEDULE_TAG, TODAY
from assets.unusual_numbers.check import FINDINGS
from pipelines.settings import Settings, UsageError, alert_webhook_url

ATTEMPTS, PAUSE_S, TIMEOUT_S = 3, 2, 10
MOST_CHARACTERS = 2_000

DESCRIPTION = """
Posts `{"text": ...}` to `ALERT_WEBHOOK_URL` for every run that fails, whatever its job, if a schedule, a sensor or
Dagit has started it: which job and run, and why. Of today's runs, which begin every few minutes, only for the first of
several that fail one after the other. Chat services take that form as it is. Off if the variable is not set.

When its tick has failed, the message could not be delivered, and is not sent again; the run's own page has it.
"""


def build_alert_sensor(settings: Settings, tags: Mapping[str, str] | None = None) -> dg.SensorDefinition:
    """The sensor; it runs if there is somewhere to post to. `tags` are those of this database's runs."""

    @dg.run_failure_sensor(
        name="alert_on_failure",
        description=DESCRIPTION,
        default_status=dg.DefaultSensorStatus.RUNNING if settings.has_alerts else dg.DefaultSensorStatus.STOPPED,
    )
    def alert_on_failure(context: dg.RunFailureSensorContext) -> None:
        url = alert_webhook_url()
        if url is None:
            raise UsageError("ALERT_WEBHOOK_URL is not set: set it, or turn this sensor off.")
        run = context.dagster_run
        if run.tags.get(SCHEDULE_TAG) == TODAY and _was_told(context.instance, run, tags or {}):
            return
        # The run's own words are those of its step; the run itself only says which step it was.
        errors = [event.step_failure_data.error for event in context.get_step_failure_events()]
        reasons = [_reason(error) for error in errors if error] or [context.failure_event.message or "no reason"]
        job = "/".join([*settings.key_prefix, run.job_name])
        post(url, f"{job} failed, run {run.run_id}: {' '.join(reasons)}"[:MOST_CHARACTERS])

    return alert_on_failure


UNUSUAL_DESCRIPTION = """
Posts what the check `nothing_is_unusual` finds to `ALERT_WEBHOOK_URL`, each finding once, with a link to the check if
`STATS_DAGSTER_URL` is set. Off if the variable is not set.

When its tick has failed, the message could not be delivered, and is sent again with the next one.
"""


def build_unusual_alert_sensor(settings: Settings, check: dg.AssetCheckKey) -> dg.SensorDefinition:
    """The sensor. Its cursor holds which evaluation it has seen, and what it has posted of that day."""

    @dg.sensor(
        name="alert_on_unusual",
        description=UNUSUAL_DESCRIPTION,
        minimum_interval_seconds=30,
        default_status=dg.DefaultSensorStatus.RUNNING if settings.has_alerts else dg.DefaultSensorStatus.STOPPED,
    )
    def alert_on_unusual(context: dg.SensorEvaluationContext) -> dg.SkipReason:
        url = alert_webhook_url()
        if url is None:
            raise UsageError("ALERT_WEBHOOK_URL is not set: set it, or turn this sensor off.")
        record = context.instance.event_log_storage.get_latest_asset_check_execution_by_key([check]).get(check)
        evaluation = record.event.asset_check_evaluation if record and record.event else None
        cursor = json.loads(context.cursor or "{}")
        if record is None or evaluation is None or record.run_id == cursor.get("run"):
            return dg.SkipReason("There is no new evaluation.")
        day = str(evaluation.metadata["day"].value) if "day" in evaluation.metadata else ""
        posted = cursor["posted"] if cursor.get("day") == day else []
        found = evaluation.metadata.get(FINDINGS)
        rows = [dict(one.data) for one in found.records] if isinstance(found, dg.TableMetadataValue) else []
        new = [row for row in rows if _name(row) not in posted]
        if new:
            more = int(str(evaluation.metadata["findings_count"].value)) - len(rows)
            post(url, _message(settings, check, day, new, more))
        context.update_cursor(
            json.dumps({"run": record.run_id, "day": day, "posted": posted + [_name(row) for row in new]})
        )
        return dg.SkipReason(f"{len(new)} findings posted.")

    return alert_on_unusual


def _name(row: Mapping[str, Any]) -> str:
    """Which finding of a day it is."""
    return " ".join(str(row[name]) for name in ("who", "marketplace", "action", "what"))


def _message(
    settings: Settings, check: dg.AssetCheckKey, day: str, rows: Sequence[Mapping[str, Any]], more: int
) -> str:
    """The link comes first, so that it is there however long the rest is."""
    lines = [f"Unusual on {day}" + (f" ({'/'.join(settings.key_prefix)})" if settings.key_prefix else "") + ":"]
    if settings.dagster_url:
        path = "/".join(check.asset_key.path)
        lines[0] += f" {settings.dagster_url}/assets/{path}?view=checks&checkDetail={check.name}"
    for row in rows:
        where = row["marketplace"] if row["action"] == "all" else f"{row['marketplace']} {row['action']}"
        lines.append(
            f"- {row['who']}, {where}: {row['what']} {row['seen']}, expected {row['expected']} ({row['jobs']} jobs)"
            + ("" if row["reasons that grew most"] == "none" else f"; {row['reasons that grew most']}")
        )
    if more > 0:
        lines.append(f"and {more} more")
    return "\n".join(lines)[:MOST_CHARACTERS]


def _was_told(instance: dg.DagsterInstance, run: dg.DagsterRun, tags: Mapping[str, str]) -> bool:
    """Whether the scheduled run of the same job and database before this one has failed as well."""
    ended = [dg.DagsterRunStatus.SUCCESS, dg.DagsterRunStatus.FAILURE]
    of_job = dg.RunsFilter(job_name=run.job_name, statuses=ended, tags={**tags, SCHEDULE_TAG: TODAY})
    before = instance.get_runs(of_job, cursor=run.run_id, limit=1)
    return bool(before) and before[0].status == dg.DagsterRunStatus.FAILURE


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
