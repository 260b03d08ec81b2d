"""Hypothesis strategies: source rows, stored rows and days that sit on the edges of the definitions.

What is generated belongs here; what must come out of it does not (see `tests.reference`). Values are sampled from
short lists of edges instead of drawn from wide ranges: a case where two jobs share a row, or a task meets its job, must
be common, and an edge that is one microsecond wide must be hit in a hundred examples.
"""

import datetime as dt
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import dagster as dg
from hypothesis import strategies as st

from tests.reference import KNOWN_MARKETPLACES, ROW_COLUMNS, Day

Row = dict[str, Any]

ZONES = (
    # The plain case comes first, because Hypothesis shrinks towards it.
    ("UTC", dt.date(2025, 6, 1)),
    ("Europe/Paris", dt.date(2025, 3, 30)),
    ("Europe/Paris", dt.date(2025, 10, 26)),
    ("America/New_York", dt.date(2025, 3, 9)),
    ("America/New_York", dt.date(2025, 11, 2)),
    # Here midnight happens twice, or never, and PostgreSQL and Python choose differently.
    ("America/Havana", dt.date(2025, 3, 9)),
    ("America/Havana", dt.date(2025, 11, 2)),
    ("Atlantic/Azores", dt.date(2025, 3, 30)),
    ("Atlantic/Azores", dt.date(2025, 10, 26)),
    ("Asia/Beirut", dt.date(2025, 3, 30)),
    ("Africa/Cairo", dt.date(2025, 10, 30)),
    ("America/Santiago", dt.date(2025, 9, 7)),
    # Odd offsets: three quarters of an hour, and clocks that change by half an hour.
    ("Asia/Kathmandu", dt.date(2025, 12, 31)),
    ("Australia/Lord_Howe", dt.date(2025, 4, 6)),
    ("Australia/Lord_Howe", dt.date(2025, 10, 5)),
)
# What comes several times in these lists is drawn more often, so that most jobs count and several share a row.
MARKETPLACES = (*("vinted",) * 6, *("ebay",) * 4, "etsy", "Vinted", "vinted ", "depop", "")
JOB_STATUSES = (*("completed", "failed") * 4, *("cancelled", "expired") * 2, "pending", "running", "paused")
TASK_STATUSES = (*("success", "failed", "timeout") * 3, "cancelled", "pending", "processing")
ACTION_TYPE_IDS = (1, 1, 1, 1, 2, 2**31 - 1)
RETRY_COUNTS = (0, 0, 1, 3, -2, 2**31 - 1)
INFINITIES = ("infinity", "-infinity")
US = dt.timedelta(microseconds=1)
LIMIT_US = 2**31 * 1000
DURATIONS_US = (
    # Whole milliseconds, and the two sides of each half.
    *(0, 1, 499, 500, 501, 999, 1000, 1499, 1500, 2500, 90_000_000, 90_000_500) * 2,
    # From half a millisecond below the limit on, a duration rounds up to the limit and is bad.
    *(LIMIT_US - 1500, LIMIT_US - 501, LIMIT_US - 500, LIMIT_US - 499),
    *(LIMIT_US - 1, LIMIT_US, LIMIT_US + 1, 2 * LIMIT_US),
    # A start after the end.
    *(-1, -500, -1000, -3_600_000_000),
)
WAITS_US = (0, 500, 1499, 1500, 60_000_000, LIMIT_US - 501, LIMIT_US - 500, LIMIT_US, -1, -500)
MESSAGES = (
    None,
    "",
    "HTTP 503",
    "status 503\nat 12:30",
    "Item 12 not found",
    "Item 13 not found",
    "'a' is sold",
    "x" * 150,
)


def zones() -> st.SearchStrategy[tuple[str, dt.date]]:
    """A reporting zone and a day of it that is worth a look, mostly because its clocks change."""
    return st.sampled_from(ZONES)


@lru_cache
def day_of(zone: str, date: dt.date) -> Day:
    """The day as Dagster cuts it: the partitions' own instants are the definition."""
    partitions = dg.DailyPartitionsDefinition(start_date="2025-01-01", timezone=zone)
    window = partitions.time_window_for_partition_key(date.isoformat())
    return Day(date, window.start, window.end)


@st.composite
def windows(draw: st.DrawFn) -> tuple[str, list[Day]]:
    """A zone and one to four days in a row, at or around the interesting one."""
    zone, interesting = draw(zones())
    first = interesting - dt.timedelta(days=draw(st.integers(0, 2)))
    count = draw(st.integers(1, 4))
    return zone, [day_of(zone, first + dt.timedelta(days=offset)) for offset in range(count)]


@st.composite
def jobs(draw: st.DrawFn, days: Sequence[Day], max_size: int = 12) -> list[Row]:
    """Jobs at the edges of the days, with the columns `JOB_COLUMNS`; the ids are 1, 2, 3 ..."""
    drawn = draw(
        st.lists(
            st.tuples(
                st.sampled_from(MARKETPLACES),
                st.sampled_from(ACTION_TYPE_IDS),
                st.sampled_from(JOB_STATUSES),
                st.sampled_from(RETRY_COUNTS),
                st.sampled_from(_ends(days, with_past=draw(st.booleans()))),
                st.sampled_from((*DURATIONS_US, None, *INFINITIES)),
                st.sampled_from((*WAITS_US, *WAITS_US, *INFINITIES)),
                st.sampled_from(MESSAGES),
            ),
            min_size=draw(st.sampled_from((0, max_size // 2))),
            max_size=max_size,
        )
    )
    return [
        {
            "id": number,
            "marketplace": marketplace,
            "action_type_id": action_type_id,
            "status": status,
            "retry_count": retry_count,
            "error_message": message,
            "started_at": (started_at := _start(completed_at, duration, days)),
            "completed_at": completed_at,
            "created_at": _start(started_at, wait, days),
        }
        for number, (marketplace, action_type_id, status, retry_count, completed_at, duration, wait, message) in (
            enumerate(drawn, 1)
        )
    ]


@st.composite
def tasks(draw: st.DrawFn, job_ids: Sequence[int], days: Sequence[Day], max_size: int = 12) -> list[Row]:
    """Tasks of these jobs, of none and of unknown ones, with the columns `TASK_COLUMNS`; the ids are 1, 2, 3 ..."""
    drawn = draw(
        st.lists(
            st.tuples(
                st.sampled_from((*job_ids, None, 2**31 - 1)),
                st.sampled_from(TASK_STATUSES),
                st.sampled_from(RETRY_COUNTS),
                st.sampled_from(_ends(days, with_past=draw(st.booleans()))),
            ),
            min_size=draw(st.sampled_from((0, max_size // 2))),
            max_size=max_size,
        )
    )
    return [
        {"id": number, "job_id": job_id, "status": status, "retry_count": retry_count, "completed_at": completed_at}
        for number, (job_id, status, retry_count, completed_at) in enumerate(drawn, 1)
    ]


@st.composite
def stored_rows(draw: st.DrawFn, days: Sequence[Day], max_size: int = 6) -> list[Row]:
    """Rows of the stats table before a run, with the columns `ROW_COLUMNS` and `computed_at`; no key comes twice.

    A row is either one of the batch or one of the old live counter, which knew no marketplace but Vinted, kept only
    four numbers and did not always keep them consistent.
    """
    small = st.integers(0, 2)
    keys = st.tuples(
        st.sampled_from(sorted(set(ACTION_TYPE_IDS))),
        st.sampled_from(KNOWN_MARKETPLACES),
        st.sampled_from([day.date for day in days]),
    )
    rows: list[Row] = []
    for action_type_id, marketplace, date in draw(st.lists(keys, max_size=max_size, unique=True)):
        row: Row = dict.fromkeys((*ROW_COLUMNS, "computed_at"))
        row |= {"action_type_id": action_type_id, "marketplace": marketplace, "date": date}
        row |= {"success_count": draw(small), "failure_count": draw(small)}
        row["total_jobs"] = row["success_count"] + row["failure_count"]
        if marketplace == "vinted" and draw(st.booleans()):
            row["total_jobs"] = draw(small)
            row["avg_duration_ms"] = draw(st.sampled_from((None, 0, 1500)))
        else:
            row |= {"cancelled_count": draw(small), "expired_count": draw(small), "retry_count": draw(small)}
            row["duration_count"] = draw(st.integers(0, row["total_jobs"]))
            row["avg_duration_ms"] = draw(st.sampled_from((0, 1, 1500))) if row["duration_count"] else None
            row["duration_sum_ms"] = row["duration_count"] * (row["avg_duration_ms"] or 0)
            row |= {"task_success_count": draw(small), "task_failure_count": draw(small)}
            row["total_tasks"] = row["task_success_count"] + row["task_failure_count"]
            row["task_retry_count"] = draw(small)
            row["computed_at"] = days[-1].end.astimezone(dt.UTC)
        rows.append(row)
    return rows


def _ends(days: Sequence[Day], with_past: bool) -> list[dt.datetime | str | None]:
    """Ends at the edges of the days, in UTC. Without a past, the first day is not covered."""
    first, last = days[0].start.astimezone(dt.UTC), days[-1].end.astimezone(dt.UTC)
    inside: list[dt.datetime | str | None] = []
    for day in days:
        start, end = day.start.astimezone(dt.UTC), day.end.astimezone(dt.UTC)
        inside += [start, end - US, start + US, start + (end - start) / 2]
        # The wall clock's own midnights, which are not all of them limits of a day where the clocks change.
        inside += [start + dt.timedelta(hours=1), end - dt.timedelta(hours=1)]
    ends = [*inside, *inside, last, last + dt.timedelta(days=40), None, *INFINITIES]
    if with_past:
        ends += [first - US, first - dt.timedelta(hours=1), first - dt.timedelta(days=400)]
    return ends


def _start(end: dt.datetime | str | None, duration: int | str | None, days: Sequence[Day]) -> dt.datetime | str | None:
    """The time that lies so many microseconds before the other; a null or infinite one stays what it is."""
    if not isinstance(duration, int):
        return duration
    if isinstance(end, dt.datetime):
        return end - duration * US
    return days[0].start.astimezone(dt.UTC)
