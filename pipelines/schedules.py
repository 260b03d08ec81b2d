"""When the stats are computed."""

import dagster as dg

from pipelines.settings import Settings

RANGE_START, RANGE_END = "dagster/asset_partition_range_start", "dagster/asset_partition_range_end"


def build_schedule(
    settings: Settings, partitions: dg.DailyPartitionsDefinition, job_name: str
) -> dg.ScheduleDefinition:
    """Every night at 00:30 in the reporting time zone: the day that just closed, and the look-back before it."""

    @dg.schedule(
        name="marketplace_job_stats_schedule",
        job_name=job_name,
        cron_schedule="30 0 * * *",
        execution_timezone=settings.time_zone,
        description=f"At 00:30 in {settings.time_zone}: the last {settings.lookback_days} closed days, in one run. "
        "Rows that came or changed late are picked up; what did not change is not written.",
    )
    def marketplace_job_stats_schedule(
        context: dg.ScheduleEvaluationContext,
    ) -> dg.RunRequest | dg.SkipReason:
        tick = context.scheduled_execution_time
        keys = partitions.get_partition_keys(current_time=tick)[-settings.lookback_days :]
        if not keys:
            return dg.SkipReason(f"No day has closed since STATS_START_DATE, {settings.start_date}.")
        return dg.RunRequest(run_key=tick.isoformat(), tags={RANGE_START: keys[0], RANGE_END: keys[-1]})

    return marketplace_job_stats_schedule
