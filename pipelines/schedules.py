"""When the stats are computed, and when somebody looks whether they were."""

from collections.abc import Mapping, Sequence

import dagster as dg

from assets.marketplace_job_stats.asset import NIGHTLY, SCHEDULE_TAG, TODAY, WEEKLY
from assets.marketplace_job_stats.today import running_day
from pipelines.settings import Settings

RANGE_START, RANGE_END = "dagster/asset_partition_range_start", "dagster/asset_partition_range_end"

_NIGHTLY = """
At 00:30 in {time_zone}: the last {lookback_days} closed days, and every day since the first one, of the last {bound},
that was never run, in one run. Rows that came or changed late are picked up; what did not change is not written. What
a single tenant lacks is taken along.

When a tick was missed, nothing needs to be done: the next one takes its days along.
"""
_WEEKLY = """
Sundays at 02:30 in {time_zone}: the last {sweep_days} closed days again, for what came or changed later than the
nightly runs look back. `run_days_changed` and `run_tenants_changed` say how many came out different,
`run_jobs_without_day` how many jobs ended at no known time.

When days have changed, `run_changes` has the largest of them from the journals, with both numbers and the cause.
"""
_TODAY = """
Every {minutes} minutes, by the clock in {time_zone}: today so far. A tick is skipped while the run before it is queued
or at work.

When a tick was missed, nothing needs to be done: each computes the whole of today.
"""
_UNFINISHED = [
    dg.DagsterRunStatus[name] for name in ("NOT_STARTED", "QUEUED", "STARTING", "STARTED", "CANCELING", "MANAGED")
]
_CHECK = """
At 06:00 in {time_zone}: is yesterday in the ledger of every tenant? It warns also if no run has been started at all.

When a tick was missed, nobody was warned: start `yesterday_is_there_job` by hand.
"""


def build_schedules(
    settings: Settings, partitions: dg.DailyPartitionsDefinition, key: dg.AssetKey, job_name: str, check_job_name: str
) -> list[dg.ScheduleDefinition]:
    """Nightly and weekly runs of the asset `key`, and its morning check; all in the reporting time zone."""
    bound = max(settings.lookback_days, settings.sweep_days)
    words = {
        "time_zone": settings.time_zone,
        "lookback_days": settings.lookback_days,
        "sweep_days": settings.sweep_days,
        "bound": bound,
    }

    def request(
        context: dg.ScheduleEvaluationContext, keys: Sequence[str], schedule: str
    ) -> dg.RunRequest | dg.SkipReason:
        if not keys:
            return dg.SkipReason(f"No day has closed since STATS_START_DATE, {settings.start_date}.")
        tags = {RANGE_START: keys[0], RANGE_END: keys[-1], SCHEDULE_TAG: schedule}
        return dg.RunRequest(run_key=context.scheduled_execution_time.isoformat(), tags=tags)

    @dg.schedule(
        name="marketplace_job_stats_schedule",
        job_name=job_name,
        cron_schedule="30 0 * * *",
        execution_timezone=settings.time_zone,
        description=_NIGHTLY.format(**words),
    )
    def nightly(context: dg.ScheduleEvaluationContext) -> dg.RunRequest | dg.SkipReason:
        # Dagster starts no run for a missed tick of a partitioned job, so what is due is found in what was done.
        keys = partitions.get_partition_keys(current_time=context.scheduled_execution_time)[-bound:]
        done = context.instance.get_materialized_partitions(key)
        never_run = (number for number, day in enumerate(keys) if day not in done)
        first = min(next(never_run, len(keys)), max(0, len(keys) - settings.lookback_days))
        return request(context, keys[first:], NIGHTLY)

    @dg.schedule(
        name="marketplace_job_stats_weekly_schedule",
        job_name=job_name,
        cron_schedule="30 2 * * 0",
        execution_timezone=settings.time_zone,
        description=_WEEKLY.format(**words),
    )
    def weekly(context: dg.ScheduleEvaluationContext) -> dg.RunRequest | dg.SkipReason:
        keys = partitions.get_partition_keys(current_time=context.scheduled_execution_time)
        return request(context, keys[-settings.sweep_days :], WEEKLY)

    check = dg.ScheduleDefinition(
        name="yesterday_is_there_schedule",
        job_name=check_job_name,
        cron_schedule="0 6 * * *",
        execution_timezone=settings.time_zone,
        description=_CHECK.format(**words),
    )
    return [nightly, weekly, check]


def build_today_schedule(
    settings: Settings, partitions: dg.DailyPartitionsDefinition, job_name: str, tags: Mapping[str, str]
) -> dg.ScheduleDefinition:
    """Runs of today so far; `tags` are those of this database's runs."""
    minutes = settings.today_minutes

    @dg.schedule(
        name="marketplace_job_stats_today_schedule",
        job_name=job_name,
        cron_schedule=f"*/{minutes} * * * *" if minutes < 60 else "0 * * * *",
        execution_timezone=settings.time_zone,
        description=_TODAY.format(minutes=minutes, time_zone=settings.time_zone),
    )
    def today(context: dg.ScheduleEvaluationContext) -> dg.RunRequest | dg.SkipReason:
        at = context.scheduled_execution_time
        if running_day(partitions, at) is None:
            return dg.SkipReason(f"The first day, {settings.start_date} (STATS_START_DATE), has not begun.")
        unfinished = dg.RunsFilter(job_name=job_name, statuses=_UNFINISHED, tags=tags)
        if runs := context.instance.get_runs(unfinished, limit=1):
            return dg.SkipReason(f"The run before, {runs[0].run_id}, is not finished.")
        return dg.RunRequest(run_key=at.isoformat(), tags={SCHEDULE_TAG: TODAY})

    return today
