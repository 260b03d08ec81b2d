"""What each tick asks for: the days that are due, found in what was done, not in what was scheduled."""

from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, date, datetime, timedelta
from zoneinfo import ZoneInfo

import dagster as dg
import pytest

from pipelines.definitions import build_defs
from pipelines.settings import Settings

KEY = dg.AssetKey(["marketplace_job_stats"])
NIGHTLY, WEEKLY = "marketplace_job_stats_schedule", "marketplace_job_stats_weekly_schedule"
TODAY = "marketplace_job_stats_today_schedule"
Tick = Callable[..., dg.RunRequest | dg.SkipReason]


@pytest.fixture(scope="module")
def empty_instance() -> Iterator[dg.DagsterInstance]:
    with dg.instance_for_test() as instance:
        yield instance


@pytest.fixture
def instance(empty_instance: dg.DagsterInstance) -> dg.DagsterInstance:
    """An instance in which nothing was ever run."""
    empty_instance.wipe_assets([KEY])
    return empty_instance


def materialized(instance: dg.DagsterInstance, days: Iterable[date]) -> None:
    """As if these days had been run."""
    for day in days:
        instance.report_runless_asset_event(dg.AssetMaterialization(KEY, partition=day.isoformat()))


def days(first: date, last: date) -> list[date]:
    return [first + timedelta(n) for n in range((last - first).days + 1)]


def tick(
    instance: dg.DagsterInstance, name: str, at: datetime, zone: str = "UTC", **variables: str
) -> dg.RunRequest | dg.SkipReason:
    """What the schedule asks for at this moment."""
    settings = Settings.from_env({"STATS_TIMEZONE": zone, **variables})
    schedule = build_defs(settings).resolve_schedule_def(name)
    result = schedule(dg.build_schedule_context(instance=instance, scheduled_execution_time=at))
    assert isinstance(result, dg.RunRequest | dg.SkipReason)
    return result


def asked_for(request: dg.RunRequest | dg.SkipReason) -> tuple[date, date]:
    """The first and the last day of the run."""
    assert isinstance(request, dg.RunRequest)
    first, last = (request.tags[f"dagster/asset_partition_range_{end}"] for end in ("start", "end"))
    return date.fromisoformat(first), date.fromisoformat(last)


@pytest.mark.parametrize("zone", ["UTC", "Europe/Paris", "America/New_York", "America/Havana", "Asia/Kathmandu"])
@pytest.mark.parametrize("month_and_day", [(1, 15), (3, 9), (3, 30), (10, 26), (11, 2), (11, 3)])
def test_the_nightly_tick_asks_for_the_look_back(
    instance: dg.DagsterInstance, zone: str, month_and_day: tuple[int, int]
) -> None:
    """At 00:30 local time, where all was run, the range is the last three closed days, also when the clocks change."""
    at = datetime(2025, *month_and_day, 0, 30, tzinfo=ZoneInfo(zone))
    yesterday = at.date() - timedelta(days=1)
    start = yesterday - timedelta(days=60)
    materialized(instance, days(start, yesterday - timedelta(days=1)))
    request = tick(instance, NIGHTLY, at, zone, STATS_START_DATE=max(start, date(2025, 1, 1)).isoformat())
    assert asked_for(request) == (yesterday - timedelta(days=2), yesterday)
    assert isinstance(request, dg.RunRequest)
    assert request.run_key == at.isoformat()
    assert request.tags["marketplace_job_stats/schedule"] == "nightly"


@pytest.mark.parametrize("zone", ["UTC", "Europe/Paris", "America/New_York", "America/Havana", "Asia/Kathmandu"])
@pytest.mark.parametrize(("month", "day"), [(3, 12), (4, 2), (10, 29), (11, 5)])
def test_one_tick_repairs_a_week(instance: dg.DagsterInstance, zone: str, month: int, day: int) -> None:
    """After a week without ticks, with a change of the clocks in it, one range holds every day that was never run."""
    at = datetime(2025, month, day, 0, 30, tzinfo=ZoneInfo(zone))
    last_run, yesterday = at.date() - timedelta(days=8), at.date() - timedelta(days=1)
    materialized(instance, days(last_run - timedelta(days=40), last_run))
    assert asked_for(tick(instance, NIGHTLY, at, zone)) == (last_run + timedelta(days=1), yesterday)


def test_a_hole_is_filled_and_older_ones_are_left(instance: dg.DagsterInstance) -> None:
    """A day that was never run makes the range begin there, if it is one of the last STATS_SWEEP_DAYS."""
    at = datetime(2026, 3, 31, 0, 30, tzinfo=UTC)
    run = [day for day in days(date(2026, 1, 1), date(2026, 3, 29)) if day not in (date(2026, 3, 5), date(2026, 1, 9))]
    materialized(instance, run)
    assert asked_for(tick(instance, NIGHTLY, at)) == (date(2026, 3, 5), date(2026, 3, 30))
    assert asked_for(tick(instance, NIGHTLY, at, STATS_SWEEP_DAYS="20")) == (date(2026, 3, 28), date(2026, 3, 30))


def test_the_first_tick_ever_takes_the_bound(instance: dg.DagsterInstance) -> None:
    """Where nothing was ever run, the first night computes STATS_SWEEP_DAYS days, not all since STATS_START_DATE."""
    at = datetime(2026, 3, 31, 0, 30, tzinfo=UTC)
    assert asked_for(tick(instance, NIGHTLY, at)) == (date(2026, 2, 24), date(2026, 3, 30))
    assert asked_for(tick(instance, NIGHTLY, at, STATS_LOOKBACK_DAYS="40")) == (date(2026, 2, 19), date(2026, 3, 30))


@pytest.mark.parametrize("name", [NIGHTLY, WEEKLY])
def test_the_range_ends_at_the_first_day(instance: dg.DagsterInstance, name: str) -> None:
    """A database that begins today has nothing to do; one that began yesterday has one day."""
    at = datetime(2026, 3, 2, 0, 30, tzinfo=UTC)
    assert isinstance(tick(instance, name, at, STATS_START_DATE="2026-03-02"), dg.SkipReason)
    assert asked_for(tick(instance, name, at, STATS_START_DATE="2026-03-01")) == (date(2026, 3, 1), date(2026, 3, 1))


@pytest.mark.parametrize("zone", ["UTC", "Europe/Paris", "America/Havana", "Australia/Lord_Howe"])
@pytest.mark.parametrize("month_and_day", [(3, 9), (3, 30), (4, 6), (10, 26), (11, 2)])
def test_the_weekly_tick_asks_for_the_sweep(
    instance: dg.DagsterInstance, zone: str, month_and_day: tuple[int, int]
) -> None:
    """On Sundays all of the last STATS_SWEEP_DAYS days, whatever was run before."""
    at = datetime(2025, *month_and_day, 2, 30, tzinfo=ZoneInfo(zone))
    yesterday = at.date() - timedelta(days=1)
    materialized(instance, days(yesterday - timedelta(days=40), yesterday))
    request = tick(instance, WEEKLY, at, zone)
    assert asked_for(request) == (yesterday - timedelta(days=34), yesterday)
    assert isinstance(request, dg.RunRequest)
    assert request.tags["marketplace_job_stats/schedule"] == "weekly"


@pytest.mark.parametrize(("minutes", "cron"), [("5", "*/5 * * * *"), ("15", "*/15 * * * *"), ("60", "0 * * * *")])
def test_today_ticks_every_few_minutes(minutes: str, cron: str) -> None:
    """As often as STATS_TODAY_MINUTES says, and only if somebody has turned it on."""
    definitions = build_defs(Settings.from_env({"STATS_TODAY_MINUTES": minutes}))
    schedule = definitions.resolve_schedule_def(TODAY)
    assert isinstance(schedule, dg.ScheduleDefinition)
    assert (schedule.cron_schedule, schedule.default_status) == (cron, dg.DefaultScheduleStatus.STOPPED)


def test_a_tick_of_today_waits_for_the_run_before(instance: dg.DagsterInstance) -> None:
    """It is skipped while a run of this database's is not finished; another database's is not in its way."""
    at = datetime(2026, 3, 31, 10, 15, tzinfo=UTC)

    def ask(**variables: str) -> dg.RunRequest | dg.SkipReason:
        return tick(instance, TODAY, at, **variables)

    request = ask()
    assert isinstance(request, dg.RunRequest)
    assert (request.run_key, request.tags["marketplace_job_stats/schedule"]) == (at.isoformat(), "today")
    assert "dagster/asset_partition_range_start" not in request.tags
    job = build_defs(Settings.from_env({"STATS_KEY_PREFIX": "eu"})).resolve_job_def("marketplace_job_stats_today_job")
    run = instance.create_run_for_job(job, status=dg.DagsterRunStatus.STARTED, tags=job.run_tags)
    skipped = ask(STATS_KEY_PREFIX="eu")
    assert isinstance(skipped, dg.SkipReason)
    assert run.run_id in str(skipped.skip_message)
    assert isinstance(ask(STATS_KEY_PREFIX="us"), dg.RunRequest)
    instance.report_run_canceled(run)
    assert isinstance(ask(STATS_KEY_PREFIX="eu"), dg.RunRequest)


@pytest.mark.parametrize(("hour", "is_there"), [(22, False), (23, True)])
def test_today_begins_with_the_first_day(instance: dg.DagsterInstance, hour: int, is_there: bool) -> None:
    """In the reporting zone, to the instant: there midnight is at 23:00 UTC."""
    at = datetime(2026, 1, 31, hour, 0, tzinfo=UTC)
    asked = tick(instance, TODAY, at, "Europe/Paris", STATS_START_DATE="2026-02-01")
    assert isinstance(asked, dg.RunRequest) == is_there
