"""The reference itself, pinned by examples that were computed by hand: no database, no SQL."""

import datetime as dt
from collections import Counter
from typing import Any
from zoneinfo import ZoneInfo

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import strategies
from tests.reference import (
    DAY_COLUMNS,
    FINISHED_JOB_STATUSES,
    FINISHED_TASK_STATUSES,
    JOB_COLUMNS,
    ROW_COLUMNS,
    TASK_COLUMNS,
    Day,
    expected_after_run,
    frame,
    reference_days,
    reference_rows,
)

DATE = dt.date(2025, 6, 1)
START = dt.datetime(2025, 6, 1, tzinfo=dt.UTC)
HOUR = dt.timedelta(hours=1)
DAY = Day(DATE, START, START + 24 * HOUR)
NOON = START + 12 * HOUR
PAST = START - HOUR
LIMIT_MS = 2**31


def jobs_of(*rows: dict[str, Any]) -> pd.DataFrame:
    """Jobs, by default completed on Vinted at noon without a start."""
    default = {"marketplace": "vinted", "action_type_id": 1, "status": "completed", "retry_count": 0}
    default |= {"started_at": None, "completed_at": NOON}
    return frame([{"id": number, **default, **row} for number, row in enumerate(rows, 1)], JOB_COLUMNS)


def tasks_of(*rows: dict[str, Any]) -> pd.DataFrame:
    """Tasks, by default of job 1, successful at noon."""
    default = {"job_id": 1, "status": "success", "retry_count": 0, "completed_at": NOON}
    return frame([{"id": number, **default, **row} for number, row in enumerate(rows, 1)], TASK_COLUMNS)


def stored_of(**numbers: Any) -> pd.DataFrame:
    """One stored row of action type 1 on Vinted: the numbers that are not given are null."""
    row: dict[str, Any] = dict.fromkeys(ROW_COLUMNS)
    return frame([{**row, "action_type_id": 1, "marketplace": "vinted", "date": DATE, **numbers}], ROW_COLUMNS)


def lasting(microseconds: int) -> dict[str, Any]:
    return {"started_at": NOON - dt.timedelta(microseconds=microseconds)}


def rows_of(jobs: pd.DataFrame, tasks: pd.DataFrame | None = None, *days: Day) -> list[dict[Any, Any]]:
    return reference_rows(jobs, tasks_of() if tasks is None else tasks, days or [DAY]).to_dict("records")


def test_without_rows() -> None:
    """An empty source has no rows, but each day still has its line of zeros."""
    assert list(reference_rows(jobs_of(), tasks_of(), [DAY]).columns) == list(ROW_COLUMNS)
    assert rows_of(jobs_of()) == []
    days = reference_days(jobs_of(), tasks_of(), [DAY])
    assert days.to_dict("records") == [{**dict.fromkeys(DAY_COLUMNS, 0), "date": DATE}]
    after, held_back = expected_after_run(frame([], ROW_COLUMNS), jobs_of(), tasks_of(), [DAY])
    assert (len(after), held_back) == (0, set())


def test_one_row_with_all_its_numbers() -> None:
    """Each status counts where it must, retries only with jobs that ran, and the values are plain integers."""
    jobs = jobs_of(
        {"retry_count": 1, **lasting(1_000_000)},
        {"status": "failed", "retry_count": 2, **lasting(2_001_000)},
        {"status": "failed"},
        {"status": "cancelled", "retry_count": 50, **lasting(1_000_000)},
        {"status": "expired", "retry_count": 50},
        {"status": "running"},
        {"completed_at": "infinity"},
        {"completed_at": None},
    )
    tasks = tasks_of(
        {"retry_count": 1},
        {"status": "failed", "retry_count": 2},
        {"status": "timeout", "retry_count": 3, "job_id": 2},
        *({"status": status, "retry_count": 50} for status in ("pending", "processing", "cancelled")),
        *({"job_id": job_id, "retry_count": 50} for job_id in (4, 5, 6, 7, 99, None)),
    )
    (row,) = rows_of(jobs, tasks)
    assert row == {
        "action_type_id": 1,
        "marketplace": "vinted",
        "date": DATE,
        "total_jobs": 3,
        "success_count": 1,
        "failure_count": 2,
        "avg_duration_ms": 1501,
        "cancelled_count": 1,
        "expired_count": 1,
        "retry_count": 3,
        "duration_count": 2,
        "duration_sum_ms": 3001,
        "total_tasks": 3,
        "task_success_count": 1,
        "task_failure_count": 2,
        "task_retry_count": 6,
    }
    assert {type(row[name]) for name in ROW_COLUMNS[3:]} == {int}
    (day,) = reference_days(jobs, tasks, [DAY]).to_dict("records")
    assert day == {
        "date": DATE, "job_count": 5, "task_count": 3, "unknown_marketplace_count": 0, "bad_duration_count": 1
    }  # fmt: skip


def test_a_row_of_cancelled_jobs_only() -> None:
    """A row exists where any count is above zero, and its mean is null; its jobs' tasks do not count."""
    (row,) = rows_of(jobs_of({"status": "cancelled", **lasting(1000)}), tasks_of({}))
    assert (row["total_jobs"], row["cancelled_count"], row["total_tasks"], row["avg_duration_ms"]) == (0, 1, 0, None)


def test_rows_are_sorted_by_key() -> None:
    """A row is one action type, marketplace and day, and the rows come in the order of that key."""
    found = rows_of(
        jobs_of({"action_type_id": 10}, {"action_type_id": 9}, {"action_type_id": 9, "marketplace": "ebay"})
    )
    assert [(row["action_type_id"], row["marketplace"]) for row in found] == [
        (9, "ebay"),
        (9, "vinted"),
        (10, "vinted"),
    ]


def test_a_day_of_23_hours() -> None:
    """Where the clocks go forward the day is the instants between its limits, and durations are real time."""
    zone = ZoneInfo("Europe/Paris")
    dates = [dt.date(2025, 3, 29), dt.date(2025, 3, 30), dt.date(2025, 3, 31)]
    days = [strategies.day_of("Europe/Paris", date) for date in dates]
    assert [(day.end.astimezone(dt.UTC) - day.start.astimezone(dt.UTC)) / HOUR for day in days] == [24, 23, 24]
    first, last = dt.datetime(2025, 3, 29, 23, tzinfo=dt.UTC), dt.datetime(2025, 3, 30, 22, tzinfo=dt.UTC)
    ends = [first - strategies.US, first, last - strategies.US, last]
    # By the wall clock of Paris from 01:30 to 03:30, which took one hour.
    jump = {
        "action_type_id": 2,
        "started_at": dt.datetime(2025, 3, 30, 1, 30, tzinfo=zone),
        "completed_at": dt.datetime(2025, 3, 30, 3, 30, tzinfo=zone),
    }
    found = rows_of(jobs_of(*({"completed_at": end} for end in ends), jump), None, *days)
    assert [(row["action_type_id"], row["date"], row["total_jobs"]) for row in found] == [
        (1, dates[0], 1),
        (1, dates[1], 2),
        (1, dates[2], 1),
        (2, dates[1], 1),
    ]
    assert found[3]["duration_sum_ms"] == 3_600_000


def test_a_midnight_that_comes_twice() -> None:
    """In Havana on 2025-11-02 midnight comes twice: the day begins at the first and lasts 25 hours."""
    days = [strategies.day_of("America/Havana", dt.date(2025, 11, number)) for number in (1, 2)]
    ends = [dt.datetime(2025, 11, 2, 4, tzinfo=dt.UTC) + shift for shift in (-strategies.US, 0 * HOUR, HOUR)]
    found = rows_of(jobs_of(*({"completed_at": end} for end in ends)), None, *days)
    assert [(row["date"].day, row["total_jobs"]) for row in found] == [(1, 1), (2, 2)]


@pytest.mark.parametrize(
    ("microseconds", "sum_ms", "mean_ms"),
    [
        ([499], 0, 0),
        ([500], 1, 1),
        ([2500], 3, 3),
        # Each job is rounded before the sum: 1.5 + 1.5 ms are 2 + 2.
        ([1500, 1500], 4, 2),
        # The mean of 1 and 2 is a half; the mean of 1, 1 and 2 is not.
        ([1000, 2000], 3, 2),
        ([1000, 1000, 2000], 4, 1),
    ],
)
def test_halves(microseconds: list[int], sum_ms: int, mean_ms: int) -> None:
    """Durations are rounded one by one, then the mean is; halves go away from zero both times."""
    (row,) = rows_of(jobs_of(*map(lasting, microseconds)))
    assert (row["duration_sum_ms"], row["avg_duration_ms"]) == (sum_ms, mean_ms)


@pytest.mark.parametrize(
    ("start", "duration_ms"),
    [
        (lasting(LIMIT_MS * 1000 - 501), LIMIT_MS - 1),
        (lasting(LIMIT_MS * 1000 - 500), None),
        (lasting(LIMIT_MS * 1000), None),
        (lasting(0), 0),
        (lasting(-1), None),
        ({"started_at": None}, None),
        ({"started_at": "infinity"}, None),
        ({"started_at": "-infinity"}, None),
    ],
)
def test_bad_durations(start: dict[str, Any], duration_ms: int | None) -> None:
    """A duration that is missing, negative, infinite or rounds up to 2^31 ms is left out; its job still counts."""
    jobs = jobs_of(start)
    (row,) = rows_of(jobs)
    assert (row["total_jobs"], row["avg_duration_ms"]) == (1, duration_ms)
    assert (row["duration_count"], row["duration_sum_ms"]) == (int(duration_ms is not None), duration_ms or 0)
    (day,) = reference_days(jobs, tasks_of(), [DAY]).to_dict("records")
    assert day["bad_duration_count"] == int(duration_ms is None)


def test_the_first_reason_wins() -> None:
    """A job of an unknown marketplace is reported for that alone, and neither it nor its tasks are counted."""
    jobs = jobs_of({"marketplace": "Vinted"}, {"marketplace": "vinted "}, {"marketplace": "", "status": "expired"}, {})
    tasks = tasks_of({"job_id": 1}, {"job_id": 4})
    (row,) = rows_of(jobs, tasks)
    assert (row["total_jobs"], row["total_tasks"]) == (1, 1)
    (day,) = reference_days(jobs, tasks, [DAY]).to_dict("records")
    assert day == {
        "date": DATE, "job_count": 1, "task_count": 1, "unknown_marketplace_count": 3, "bad_duration_count": 1
    }  # fmt: skip


def test_tasks_on_another_day() -> None:
    """A task belongs to the day of its job, even if it ended on another day or never."""
    found = rows_of(
        jobs_of({}), tasks_of(*({"completed_at": end} for end in (PAST, NOON + 90 * HOUR, None, "infinity")))
    )
    assert [(row["date"], row["total_tasks"]) for row in found] == [(DATE, 4)]


def test_a_covered_day_is_recomputed() -> None:
    """Where older finished rows are left, a stored number may fall and a row may vanish; other days stay out of it."""
    stored = stored_of(total_jobs=9, success_count=9, failure_count=0, total_tasks=9)
    other = stored_of(date=DATE + 24 * HOUR, total_jobs=9)
    jobs = jobs_of({}, {"completed_at": PAST, "status": "expired", "marketplace": "depop"})
    tasks = tasks_of({"job_id": None, "completed_at": PAST, "status": "cancelled"})
    after, held_back = expected_after_run(pd.concat([stored, other]), jobs, tasks, [DAY])
    assert held_back == set()
    pd.testing.assert_frame_equal(after, reference_rows(jobs, tasks, [DAY]))
    after, held_back = expected_after_run(stored, jobs.tail(1), tasks, [DAY])
    assert (len(after), held_back) == (0, set())


@pytest.mark.parametrize(
    ("older", "covered"),
    [
        ({"completed_at": PAST}, True),
        ({"completed_at": START - strategies.US, "status": "cancelled"}, True),
        ({"completed_at": START}, False),
        ({"completed_at": "-infinity"}, False),
        ({"completed_at": None}, False),
        ({"completed_at": PAST, "status": "running"}, False),
    ],
)
def test_what_covers_a_day(older: dict[str, Any], covered: bool) -> None:
    """Only a finished job with a finite end before the day began shows that age took none of the day's jobs."""
    _, held_back = expected_after_run(stored_of(total_jobs=9), jobs_of({}, older), tasks_of(), [DAY])
    assert held_back == (set() if covered else {DATE})


def test_an_uncovered_day_is_held_back_whole() -> None:
    """One falling number keeps all rows of its day as stored, the new ones out, until someone allows the loss."""
    stored = stored_of(total_jobs=2, success_count=2, failure_count=0, avg_duration_ms=7)
    jobs = jobs_of({}, {"action_type_id": 2}, {"completed_at": NOON + 24 * HOUR})
    tomorrow = Day(DATE + dt.timedelta(days=1), DAY.end, DAY.end + 24 * HOUR)
    after, held_back = expected_after_run(stored, jobs, tasks_of(), [DAY, tomorrow])
    assert held_back == {DATE}
    # The next day is covered by the jobs of this one, and is computed.
    assert [(row["date"], row["total_jobs"]) for row in after.to_dict("records")] == [(DATE, 2), (tomorrow.date, 1)]
    pd.testing.assert_frame_equal(after.head(1), stored)
    after, held_back = expected_after_run(stored, jobs, tasks_of(), [DAY, tomorrow], allow_shrink=True)
    assert held_back == set()
    pd.testing.assert_frame_equal(after, reference_rows(jobs, tasks_of(), [DAY, tomorrow]))


def test_an_uncovered_day_may_grow() -> None:
    """Where no stored number falls, an uncovered day is written, its new rows included; the mean may fall."""
    stored = stored_of(total_jobs=1, success_count=1, failure_count=0, avg_duration_ms=2000, duration_sum_ms=2000)
    jobs = jobs_of(lasting(2_000_000), lasting(0), {"action_type_id": 2})
    after, held_back = expected_after_run(stored, jobs, tasks_of(), [DAY])
    assert held_back == set()
    assert [(row["total_jobs"], row["avg_duration_ms"]) for row in after.to_dict("records")] == [(2, 1000), (1, None)]


def test_jobs_and_tasks_are_judged_apart() -> None:
    """Tasks that were purged sooner hold a day back although its jobs are covered, and the other way round."""
    old_job, old_task = {"completed_at": PAST}, {"job_id": None, "completed_at": PAST}
    stored = stored_of(total_jobs=1, success_count=1, failure_count=0, total_tasks=2, task_success_count=2)
    assert expected_after_run(stored, jobs_of({}, old_job), tasks_of({}), [DAY])[1] == {DATE}
    assert expected_after_run(stored, jobs_of({}, old_job), tasks_of({}, old_task), [DAY])[1] == set()
    stored = stored_of(total_jobs=2, success_count=2, failure_count=0, total_tasks=1, task_success_count=1)
    assert expected_after_run(stored, jobs_of({}), tasks_of({}, old_task), [DAY])[1] == {DATE}
    assert expected_after_run(stored, jobs_of({}, old_job), tasks_of({}), [DAY])[1] == set()


def test_a_vanished_row() -> None:
    """A row that vanishes from an uncovered day is a fall of its numbers above zero; zeros and nulls do not fall."""
    zeros = stored_of(total_jobs=0, success_count=0, failure_count=0)
    after, held_back = expected_after_run(zeros, jobs_of(), tasks_of(), [DAY])
    assert (len(after), held_back) == (0, set())
    assert expected_after_run(stored_of(cancelled_count=1), jobs_of(), tasks_of(), [DAY])[1] == {DATE}


def test_legacy_nulls() -> None:
    """What the old counter never knew cannot fall: such a row is filled, and held back for its own numbers only."""
    jobs = jobs_of(lasting(1_000_000))
    same = stored_of(total_jobs=1, success_count=1, failure_count=0, avg_duration_ms=9999)
    after, held_back = expected_after_run(same, jobs, tasks_of({}), [DAY])
    assert held_back == set()
    pd.testing.assert_frame_equal(after, reference_rows(jobs, tasks_of({}), [DAY]))
    twice = stored_of(total_jobs=2, success_count=2, failure_count=0)
    after, held_back = expected_after_run(twice, jobs, tasks_of({}), [DAY])
    assert held_back == {DATE}
    pd.testing.assert_frame_equal(after, twice)


@given(st.data())
@settings(deadline=None)
def test_every_job_is_somewhere_once(data: st.DataObject) -> None:
    """On generated sources, rows and days agree with each other, and a run never changes what it has just written."""
    _, days = data.draw(strategies.windows())
    job_rows = data.draw(strategies.jobs(days))
    jobs = frame(job_rows, JOB_COLUMNS)
    tasks = frame(data.draw(strategies.tasks([row["id"] for row in job_rows], days)), TASK_COLUMNS)
    rows, per_day = reference_rows(jobs, tasks, days), reference_days(jobs, tasks, days)
    counted: Counter[dt.date] = Counter()
    for row in rows.to_dict("records"):
        counted[row["date"]] += row["total_jobs"] + row["cancelled_count"] + row["expired_count"]
        assert row["total_jobs"] == row["success_count"] + row["failure_count"] >= row["duration_count"]
        assert row["total_tasks"] == row["task_success_count"] + row["task_failure_count"]
    in_window = [
        row
        for row in job_rows
        if row["status"] in FINISHED_JOB_STATUSES
        and isinstance(row["completed_at"], dt.datetime)
        and days[0].start.astimezone(dt.UTC) <= row["completed_at"] < days[-1].end.astimezone(dt.UTC)
    ]
    assert {day["date"]: day["job_count"] for day in per_day.to_dict("records")} == {
        day.date: counted[day.date] for day in days
    }
    assert sum(per_day["job_count"]) + sum(per_day["unknown_marketplace_count"]) == len(in_window)
    after, held_back = expected_after_run(rows, jobs, tasks, days)
    assert held_back == set()
    pd.testing.assert_frame_equal(after, rows)


@given(st.data())
@settings(deadline=None)
def test_a_run_gives_each_day_whole(data: st.DataObject) -> None:
    """On generated stored rows, each day after a run is either wholly the stored one or wholly the computed one."""
    _, days = data.draw(strategies.windows())
    jobs = frame(data.draw(strategies.jobs(days)), JOB_COLUMNS)
    tasks = frame(data.draw(strategies.tasks(range(1, 6), days)), TASK_COLUMNS)
    stored = frame(data.draw(strategies.stored_rows(days)), ROW_COLUMNS)
    computed = reference_rows(jobs, tasks, days)
    after, held_back = expected_after_run(stored, jobs, tasks, days)
    for day in days:
        source = stored if day.date in held_back else computed
        expected = source[source["date"] == day.date].sort_values(["action_type_id", "marketplace"])
        found = after[after["date"] == day.date]
        pd.testing.assert_frame_equal(found.reset_index(drop=True), expected.reset_index(drop=True))


def test_the_strategies_reach_every_status() -> None:
    """A finished status that is never generated would leave the comparison with the SQL silent about it."""
    assert set(FINISHED_JOB_STATUSES) < set(strategies.JOB_STATUSES)
    assert set(FINISHED_TASK_STATUSES) < set(strategies.TASK_STATUSES)
