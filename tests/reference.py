"""The reference: what the numbers must be, computed a second time in pandas and plain Python.

It is written from the definitions alone and shares neither code nor constants with the SQL, on purpose: two
implementations that agree on every generated case are unlikely to be wrong in the same way. Nothing may be imported
here from `assets` or `pipelines`, and no query may be consulted to decide what a number means.

It is exact (integers and fractions, never floats) and slow: it is for tests, on a few thousand rows at most.
"""

import datetime as dt
import math
from bisect import bisect_right
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import pandas as pd

JOB_COLUMNS = ("id", "marketplace", "action_type_id", "status", "retry_count", "started_at", "completed_at")
TASK_COLUMNS = ("id", "job_id", "status", "retry_count", "completed_at")

KEY = ("action_type_id", "marketplace", "date")
JOB_NUMBERS = (
    "total_jobs",
    "success_count",
    "failure_count",
    "cancelled_count",
    "expired_count",
    "retry_count",
    "duration_count",
    "duration_sum_ms",
)
TASK_NUMBERS = ("total_tasks", "task_success_count", "task_failure_count", "task_retry_count")
ROW_COLUMNS = (
    *KEY,
    "total_jobs",
    "success_count",
    "failure_count",
    "avg_duration_ms",
    "cancelled_count",
    "expired_count",
    "retry_count",
    "duration_count",
    "duration_sum_ms",
    *TASK_NUMBERS,
)
DAY_COLUMNS = ("date", "job_count", "task_count", "unknown_marketplace_count", "bad_duration_count")

KNOWN_MARKETPLACES = ("vinted", "ebay", "etsy")
RUN_JOB_STATUSES = ("completed", "failed")
FINISHED_JOB_STATUSES = (*RUN_JOB_STATUSES, "cancelled", "expired")
COUNTED_TASK_STATUSES = ("success", "failed", "timeout")
FINISHED_TASK_STATUSES = (*COUNTED_TASK_STATUSES, "cancelled")
DURATION_LIMIT_MS = 2**31


@dataclass(frozen=True)
class Day:
    """One day partition: the instants from `start` up to, and without, `end`; both are aware."""

    date: dt.date
    start: dt.datetime
    end: dt.datetime


def frame(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> pd.DataFrame:
    """The rows as a frame of plain Python objects: pandas would turn nulls to NaN and integers to floats."""
    return pd.DataFrame([[row[name] for name in columns] for row in rows], columns=list(columns), dtype=object)


def reference_rows(jobs: pd.DataFrame, tasks: pd.DataFrame, days: Sequence[Day]) -> pd.DataFrame:
    """The stats rows of the days, sorted by key: the columns are `ROW_COLUMNS`, the numbers int or None."""
    ended = _ended_jobs(jobs, days)
    known = ended[ended["marketplace"].isin(KNOWN_MARKETPLACES)]
    # A task brings the key of its job. The numbers of jobs and of tasks are stacked and summed, not joined: a join
    # would repeat each job for each of its tasks.
    of_tasks = _counted_tasks(tasks).merge(known.loc[known["total_jobs"] == 1, ["job_id", *KEY]], on="job_id")
    summed = [*JOB_NUMBERS, *TASK_NUMBERS]
    stacked = pd.concat([part.reindex(columns=[*KEY, *summed], fill_value=0) for part in (known, of_tasks)])
    stacked = stacked.astype(dict.fromkeys(summed, "int64"))
    sums = stacked.groupby(list(KEY), as_index=False)[summed].sum().astype(object)
    return _rows(
        [
            {**row, "avg_duration_ms": _mean(row["duration_sum_ms"], row["duration_count"])}
            for row in sums.to_dict("records")
        ]
    )


def reference_days(jobs: pd.DataFrame, tasks: pd.DataFrame, days: Sequence[Day]) -> pd.DataFrame:
    """What the source holds of each day, and what of it is left out: the columns are `DAY_COLUMNS`, one row per day."""
    rows = reference_rows(jobs, tasks, days)
    ended = _ended_jobs(jobs, days)
    known = ended["marketplace"].isin(KNOWN_MARKETPLACES)
    # A job is reported under the first reason that applies, so the second looks at known marketplaces only.
    bad_duration = known & (ended["total_jobs"] == 1) & (ended["duration_count"] == 0)
    result = [
        {
            "date": day.date,
            "job_count": int((known & (ended["date"] == day.date)).sum()),
            "task_count": sum(rows.loc[rows["date"] == day.date, "total_tasks"]),
            "unknown_marketplace_count": int((~known & (ended["date"] == day.date)).sum()),
            "bad_duration_count": int((bad_duration & (ended["date"] == day.date)).sum()),
        }
        for day in days
    ]
    return frame(sorted(result, key=lambda row: row["date"]), DAY_COLUMNS)


def reference_durations(jobs: pd.DataFrame, days: Sequence[Day]) -> pd.DataFrame:
    """The usable duration of each job that has one, in whole milliseconds: the columns are `KEY` and `duration_ms`."""
    ended = _ended_jobs(jobs, days)
    usable = ended[ended["marketplace"].isin(KNOWN_MARKETPLACES) & (ended["duration_count"] == 1)]
    return usable[[*KEY, "duration_sum_ms"]].rename(columns={"duration_sum_ms": "duration_ms"})


def exact_percentile(values: Sequence[int], q: Fraction) -> int:
    """The value of rank ceil(q n) in ascending order."""
    return sorted(values)[math.ceil(q * len(values)) - 1]


def expected_after_run(
    stored: pd.DataFrame, jobs: pd.DataFrame, tasks: pd.DataFrame, days: Sequence[Day], allow_shrink: bool = False
) -> tuple[pd.DataFrame, set[dt.date]]:
    """What the stats table must hold for the days after a run, and the dates that the run must hold back.

    `stored` is what it held before, with the columns `ROW_COLUMNS`; its rows of other days are ignored.
    """
    old = _by_key(stored)
    new = _by_key(reference_rows(jobs, tasks, days))
    held_back: set[dt.date] = set()
    for day in days:
        watched: list[str] = []
        if not _covered(jobs, FINISHED_JOB_STATUSES, day):
            watched += JOB_NUMBERS
        if not _covered(tasks, FINISHED_TASK_STATUSES, day):
            watched += TASK_NUMBERS
        falls = any(
            # Null is no number, so it cannot fall; a row that vanishes falls to zero in all its numbers.
            row[name] is not None and new.get(key, {}).get(name, 0) < row[name]
            for key, row in old.items()
            if row["date"] == day.date
            for name in watched
        )
        if falls and not allow_shrink:
            held_back.add(day.date)
    dates = {day.date for day in days}
    kept = [row for row in old.values() if row["date"] in held_back]
    computed = [row for row in new.values() if row["date"] in dates - held_back]
    return _rows(kept + computed), held_back


def _ended_jobs(jobs: pd.DataFrame, days: Sequence[Day]) -> pd.DataFrame:
    """One row per finished job that ended in one of the days, on any marketplace: its key and its own numbers."""
    windows = sorted((_utc(day.start), _utc(day.end), day.date) for day in days)
    starts = [start for start, _, _ in windows]
    rows: list[dict[str, Any]] = []
    for job in jobs.to_dict("records"):
        end = _instant(job["completed_at"])
        if end is None or job["status"] not in FINISHED_JOB_STATUSES:
            continue
        position = bisect_right(starts, end) - 1
        if position < 0 or end >= windows[position][1]:
            continue
        ran = job["status"] in RUN_JOB_STATUSES
        duration_ms = _duration_ms(_instant(job["started_at"]), end) if ran else None
        rows.append(
            {
                "job_id": int(job["id"]),
                "action_type_id": int(job["action_type_id"]),
                "marketplace": job["marketplace"],
                "date": windows[position][2],
                "total_jobs": int(ran),
                "success_count": int(job["status"] == "completed"),
                "failure_count": int(job["status"] == "failed"),
                "cancelled_count": int(job["status"] == "cancelled"),
                "expired_count": int(job["status"] == "expired"),
                "retry_count": int(job["retry_count"]) if ran else 0,
                "duration_count": int(duration_ms is not None),
                "duration_sum_ms": duration_ms or 0,
            }
        )
    # Sums of 64-bit integers are exact here; without rows pandas could not know the types.
    result = frame(rows, ["job_id", *KEY, *JOB_NUMBERS])
    return result.astype(dict.fromkeys(["job_id", "action_type_id", *JOB_NUMBERS], "int64"))


def _counted_tasks(tasks: pd.DataFrame) -> pd.DataFrame:
    """One row per task that names a job and counts: its job and its own numbers, whenever it ended."""
    rows = [
        {
            "job_id": int(task["job_id"]),
            "total_tasks": 1,
            "task_success_count": int(task["status"] == "success"),
            "task_failure_count": int(task["status"] in ("failed", "timeout")),
            "task_retry_count": int(task["retry_count"]),
        }
        for task in tasks.to_dict("records")
        if task["status"] in COUNTED_TASK_STATUSES and not pd.isna(task["job_id"])
    ]
    return frame(rows, ["job_id", *TASK_NUMBERS]).astype("int64")


def _covered(source: pd.DataFrame, finished: Collection[str], day: Day) -> bool:
    """Whether the source still holds a finished row from before the day began: then age took none of the day's."""
    start = _utc(day.start)
    return any(
        row["status"] in finished and (end := _instant(row["completed_at"])) is not None and end < start
        for row in source.to_dict("records")
    )


def _duration_ms(start: dt.datetime | None, end: dt.datetime) -> int | None:
    """The duration in whole milliseconds; None if it is bad: without a finite start, negative, or too long."""
    if start is None or start > end:
        return None
    duration_ms = _rounded(Fraction((end - start) // dt.timedelta(microseconds=1), 1000))
    # The limit holds for the rounded value, because that is the one which has to fit into an integer.
    return duration_ms if duration_ms < DURATION_LIMIT_MS else None


def _mean(total: int, count: int) -> int | None:
    return _rounded(Fraction(total, count)) if count else None


def _rounded(value: Fraction) -> int:
    """The nearest whole number, halves away from zero; no duration here is negative, so away is up."""
    return math.floor(value + Fraction(1, 2))


def _instant(value: Any) -> dt.datetime | None:
    """The instant in UTC; None for null and for the infinities, which lie in no day and bound no duration."""
    return None if isinstance(value, str) or pd.isna(value) else _utc(value)


def _utc(value: dt.datetime) -> dt.datetime:
    """The same instant in UTC: Python compares and subtracts two times of one zone by the wall clock."""
    plain = value.to_pydatetime() if isinstance(value, pd.Timestamp) else value
    if plain.tzinfo is None:
        raise ValueError(f"{plain} has no time zone, so it is no instant")
    return plain.astimezone(dt.UTC)


def _by_key(rows: pd.DataFrame) -> dict[tuple[int, str, dt.date], dict[str, Any]]:
    """The rows by key, their numbers as int or None, whatever pandas made of them on the way."""
    result: dict[tuple[int, str, dt.date], dict[str, Any]] = {}
    for record in rows.to_dict("records"):
        row = {str(name): _plain(value) for name, value in record.items()}
        result[row["action_type_id"], row["marketplace"], row["date"]] = row
    return result


def _plain(value: Any) -> Any:
    if isinstance(value, (str, dt.date)):
        return value
    return None if pd.isna(value) else int(value)


def _rows(rows: Sequence[Mapping[Any, Any]]) -> pd.DataFrame:
    return frame(sorted(rows, key=lambda row: tuple(row[name] for name in KEY)), ROW_COLUMNS)
