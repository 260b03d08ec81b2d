"""What starts the summary, the report, and the check of the summary: what they are made from has changed."""

from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime

import dagster as dg

from pipelines.schedules import RANGE_END, RANGE_START

RETRY_HOURS = 4
"""How long to wait before the same days are requested again: a run of the summary that fails is alerted on."""

SUMMARY_DESCRIPTION = f"""
Requests the summary of every day whose stats were run, for all tenants or for some, since it was last requested, as one
run for each unbroken chain of days: after each nightly and weekly run and each backfill, also if single tenants have
failed in it. And of every day of which a run of the summary has found that its ledgers have changed since, or that it
could not be read wholly; the same days at most every {RETRY_HOURS} hours.

When it is off, materialize the summary by hand.
"""


REPORT_DESCRIPTION = """
Requests the report after each run of the summary.

When it is off, materialize the report by hand.
"""

UNUSUAL_DESCRIPTION = """
Requests the check of the last closed day for what is unusual, after each run of the summary.

When it is off, nobody looks: start `unusual_numbers_job` by hand.
"""


def build_summary_sensor(
    partitions: dg.DailyPartitionsDefinition,
    upstream: Sequence[dg.AssetKey],
    summary: dg.AssetKey,
    job_name: str,
    name: str = "marketplace_daily_summary_sensor",
    description: str = SUMMARY_DESCRIPTION,
) -> dg.SensorDefinition:
    """A run that is requested reads after all that its tick has seen. So every new event upstream is a reason for
    one, whatever of the summary was materialized meanwhile: that may have been read before.
    """

    @dg.sensor(
        name=name,
        job_name=job_name,
        minimum_interval_seconds=30,
        description=description,
    )
    def summary_sensor(context: dg.SensorEvaluationContext) -> Iterator[dg.RunRequest]:
        def latest(key: dg.AssetKey, kind: dg.DagsterEventType) -> Mapping[str, int]:
            return context.instance.get_latest_storage_id_by_partition(key, kind)

        run, observed = dg.DagsterEventType.ASSET_MATERIALIZATION, dg.DagsterEventType.ASSET_OBSERVATION
        done, incomplete = latest(summary, run), latest(summary, observed)
        # A run of some tenants only observes its days.
        new: dict[str, int] = {}
        for key in upstream:
            for events in (latest(key, run), latest(key, observed)):
                new |= {day: max(number, new.get(day, 0)) for day, number in events.items()}
        newest = max(new.values(), default=0)
        seen = int(context.cursor or newest)
        now = datetime.now(UTC)
        slot = f"{now:%F}, {now.hour // RETRY_HOURS * RETRY_HOURS} h"
        chain: list[str] = []
        for day in [*partitions.get_partition_keys(), None]:
            is_due = day is not None and (
                max(new.get(day, 0), incomplete.get(day, 0)) > done.get(day, 0) or new.get(day, 0) > seen
            )
            if day is not None and is_due:
                chain.append(day)
            elif chain:
                # However often the sensor looks before the summary is there, and whether its run fails or not.
                run_key = f"{chain[0]} to {chain[-1]}, {max(new.get(key, 0) for key in chain)}, {slot}"
                yield dg.RunRequest(run_key, tags={RANGE_START: chain[0], RANGE_END: chain[-1]})
                chain = []
        context.update_cursor(str(newest))

    return summary_sensor


def build_report_sensor(summary: dg.AssetKey, job_name: str) -> dg.SensorDefinition:
    """Looks at the last materialization of the summary, so that a run over many days makes one report."""
    return _after(summary, "marketplace_report_sensor", job_name, REPORT_DESCRIPTION)


def build_unusual_sensor(summary: dg.AssetKey, job_name: str) -> dg.SensorDefinition:
    """Also after a run in which single tenants have failed, and after one of earlier days, which may be baselines."""
    return _after(summary, "unusual_numbers_sensor", job_name, UNUSUAL_DESCRIPTION)


def _after(asset: dg.AssetKey, name: str, job_name: str, description: str) -> dg.SensorDefinition:
    """Starts the job once after each run that has materialized the asset."""

    @dg.asset_sensor(asset, name=name, job_name=job_name, minimum_interval_seconds=30, description=description)
    def sensor(_: dg.SensorEvaluationContext, event: dg.EventLogEntry) -> dg.RunRequest:
        return dg.RunRequest(run_key=event.run_id)

    return sensor
