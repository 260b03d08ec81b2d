"""What starts the summary, the report, and the check of the summary: what they are made from has changed."""

from collections.abc import Iterator
from datetime import UTC, datetime

import dagster as dg

from pipelines.schedules import RANGE_END, RANGE_START

SUMMARY_DESCRIPTION = """
Requests the summary of every day whose stats were materialized later than the summary itself, as one run for each
unbroken chain of days: after each nightly and weekly run and each backfill, also if single tenants have failed in it.

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
    partitions: dg.DailyPartitionsDefinition, stats: dg.AssetKey, summary: dg.AssetKey, job_name: str
) -> dg.SensorDefinition:
    """Compares what was materialized when, so that nothing is forgotten while the daemon is down."""

    @dg.sensor(
        name="marketplace_daily_summary_sensor",
        job_name=job_name,
        minimum_interval_seconds=30,
        description=SUMMARY_DESCRIPTION,
    )
    def marketplace_daily_summary_sensor(context: dg.SensorEvaluationContext) -> Iterator[dg.RunRequest]:
        kind = dg.DagsterEventType.ASSET_MATERIALIZATION
        done = context.instance.get_latest_storage_id_by_partition(summary, kind)
        new = context.instance.get_latest_storage_id_by_partition(stats, kind)
        chain: list[str] = []
        for day in [*partitions.get_partition_keys(), None]:
            if day is not None and new.get(day, 0) > done.get(day, 0):
                chain.append(day)
            elif chain:
                # The same stats are asked for once a day, however often the sensor looks before the summary is there:
                # a run that has failed is not forgotten, and not begun again all the time.
                run_key = f"{chain[0]} to {chain[-1]}, {max(new[key] for key in chain)}, on {datetime.now(UTC):%F}"
                yield dg.RunRequest(run_key, tags={RANGE_START: chain[0], RANGE_END: chain[-1]})
                chain = []

    return marketplace_daily_summary_sensor


def build_report_sensor(summary: dg.AssetKey, job_name: str) -> dg.SensorDefinition:
    """Looks at the last materialization of the summary, so that a run over many days makes one report."""

    @dg.asset_sensor(
        summary,
        name="marketplace_report_sensor",
        job_name=job_name,
        minimum_interval_seconds=30,
        description=REPORT_DESCRIPTION,
    )
    def marketplace_report_sensor(_: dg.SensorEvaluationContext, event: dg.EventLogEntry) -> dg.RunRequest:
        return dg.RunRequest(run_key=event.run_id)

    return marketplace_report_sensor


def build_unusual_sensor(summary: dg.AssetKey, job_name: str) -> dg.SensorDefinition:
    """Also after a run in which single tenants have failed, and after one of earlier days, which may be baselines."""

    @dg.asset_sensor(
        summary,
        name="unusual_numbers_sensor",
        job_name=job_name,
        minimum_interval_seconds=30,
        description=UNUSUAL_DESCRIPTION,
    )
    def unusual_numbers_sensor(_: dg.SensorEvaluationContext, event: dg.EventLogEntry) -> dg.RunRequest:
        return dg.RunRequest(run_key=event.run_id)

    return unusual_numbers_sensor
