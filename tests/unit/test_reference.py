"""The reference itself, pinned by examples that were computed by hand: no database, no SQL.

The sections follow the domain page: definitions, facts, numbers without facts, settled days that change.
"""

import copy
import datetime as dt
import re
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import strategies
from tests.reference import (
    FINISHED_JOB_STATUSES,
    JOB_COLUMNS,
    ROW_COLUMNS,
    TASK_COLUMNS,
    Day,
    Fact,
    LedgerDay,
    Memory,
    Numbers,
    Run,
    Source,
    StatsRow,
    exact_percentile,
    failure_reason,
    frame,
    percentiles,
    reference_durations,
    reference_rows,
    reference_waits,
    uncounted,
    without_end,
)

Row = dict[str, Any]
UTC, HOUR = dt.UTC, dt.timedelta(hours=1)
DAYS = [
    Day((start := dt.datetime(2025, 6, n, tzinfo=UTC)).date(), start, start + 24 * HOUR) for n in range(1, 5)
]  # fmt: skip
ONE, TWO, THREE, FOUR = DAYS
DATE = ONE.date
NOON, NEXT_NOON, THIRD_NOON = (day.start + 12 * HOUR for day in DAYS[:3])
CREATED = ONE.start - 5 * HOUR
NOW = FOUR.end + HOUR
LATER = NOW + HOUR
LIMIT_MS = 2**31


def job(number: int = 1, **values: Any) -> Row:
    """A job, by default completed on Vinted at noon of the first day without a start."""
    default: Row = {"marketplace": "vinted", "action_type_id": 1, "status": "completed", "retry_count": 0}
    default |= {"error_message": None, "started_at": None, "completed_at": NOON, "created_at": CREATED}
    return {"id": number, **default, **values}


def task(job_id: int | None = 1, **values: Any) -> Row:
    return {"job_id": job_id, "status": "success", "retry_count": 0, "completed_at": None, **values}


def lasting(microseconds: int) -> Row:
    return {"started_at": NOON - dt.timedelta(microseconds=microseconds)}


def run(memory: Memory, jobs: list[Row], tasks: list[Row] | None = (), *days: Day, **options: Any) -> Run:  # type: ignore[assignment]
    """A run over these days, or over the first one."""
    return memory.observe(Source(jobs, tasks), days or [ONE], options.pop("now", NOW), **options)


def after(*jobs: Row, tasks: list[Row] | None = (), days: list[Day] | None = None) -> Memory:  # type: ignore[assignment]
    """What is remembered after a first run."""
    memory = Memory()
    run(memory, [*jobs], tasks, *(days or [ONE]))
    return memory


def the_fact(memory: Memory) -> Fact:
    [fact] = memory.facts.values()
    return fact


def the_numbers(memory: Memory) -> Numbers:
    [row] = memory.rows.values()
    return row.numbers


def totals(memory: Memory) -> dict[int, int]:
    """The jobs counted of each day of the month."""
    found: Counter[int] = Counter()
    for (_, _, date), row in memory.rows.items():
        found[date.day] += sum(row.numbers.get(name) or 0 for name in ("total_jobs", "cancelled_count"))
    return dict(found)


def task_numbers(memory: Memory) -> tuple[int | None, ...]:
    fact = the_fact(memory)
    return fact.task_count, fact.task_success_count, fact.task_failure_count, fact.task_retry_count


def counter_row(total: int, success: int | None = None, date: dt.date = DATE) -> dict[Any, StatsRow]:
    """A row of the old counter: of action type 1, on Vinted, as it is for all that it ever stored."""
    numbers = {"total_jobs": total, "success_count": total if success is None else success, "failure_count": 0}
    return {(1, "vinted", date): StatsRow(numbers, None)}


def batch_row(date: dt.date = DATE, **numbers: int) -> dict[Any, StatsRow]:
    return {(1, "vinted", date): StatsRow(numbers, NOW)}


# Definitions.


def test_without_rows() -> None:
    """An empty source has no rows; its days are computed, and nothing is reported of it."""
    memory = Memory()
    done = run(memory, [], [], ONE, TWO)
    assert (memory.table(), memory.facts, memory.journal) == ([], {}, [])
    assert done.outcomes == {ONE.date: "computed", TWO.date: "computed"}
    assert not uncounted(Source([]), DAYS)


def test_one_row_with_all_its_numbers() -> None:
    """Each status counts where it must, retries only with jobs that ran, and the values are plain integers."""
    jobs = [
        job(1, retry_count=1, **lasting(1_000_000), created_at=NOON - dt.timedelta(seconds=1, milliseconds=20)),
        job(2, status="failed", retry_count=2, **lasting(2_001_000), created_at=NOON - dt.timedelta(seconds=3)),
        job(3, status="failed"),
        job(4, status="cancelled", retry_count=50, **lasting(1_000_000)),
        job(5, status="expired", retry_count=50),
        job(6, status="running"),
        job(7, completed_at="infinity"),
        job(8, completed_at=None),
    ]
    tasks = [
        task(1, retry_count=1),
        task(1, status="failed", retry_count=2),
        task(2, status="timeout", retry_count=3),
        *(task(1, status=status, retry_count=50) for status in ("pending", "processing", "cancelled")),
        *(task(job_id, retry_count=50) for job_id in (4, 5, 6, 7, 99, None)),
    ]
    [row] = after(*jobs, tasks=tasks).table()
    assert row == {
        "action_type_id": 1,
        "marketplace": "vinted",
        "date": DATE,
        "total_jobs": 3,
        "success_count": 1,
        "failure_count": 2,
        "cancelled_count": 1,
        "expired_count": 1,
        "retry_count": 3,
        "duration_count": 2,
        "duration_sum_ms": 3001,
        "avg_duration_ms": 1501,
        "wait_count": 2,
        "wait_sum_ms": 20 + 999,
        "avg_wait_ms": 510,
        "total_tasks": 3,
        "task_success_count": 1,
        "task_failure_count": 2,
        "task_retry_count": 6,
    }
    assert {type(row[name]) for name in ROW_COLUMNS[3:]} == {int}


def test_a_row_of_cancelled_jobs_only() -> None:
    """A row exists where any count is above zero, and its means are null; its jobs' tasks do not count."""
    numbers = the_numbers(after(job(status="cancelled", **lasting(1000)), tasks=[task()]))
    names = ("total_jobs", "cancelled_count", "total_tasks", "avg_duration_ms", "wait_count", "avg_wait_ms")
    assert [numbers[name] for name in names] == [0, 1, 0, None, 0, None]


def test_rows_are_sorted_by_key() -> None:
    """A row is one action type, marketplace and day, and the rows come in the order of that key."""
    memory = after(job(1, action_type_id=10), job(2, action_type_id=9), job(3, action_type_id=9, marketplace="ebay"))
    assert [(row["action_type_id"], row["marketplace"]) for row in memory.table()] == [
        (9, "ebay"),
        (9, "vinted"),
        (10, "vinted"),
    ]


def test_a_day_of_23_hours() -> None:
    """Where the clocks go forward the day is the instants between its limits, and durations are real time."""
    zone = ZoneInfo("Europe/Paris")
    days = [strategies.day_of("Europe/Paris", dt.date(2025, 3, number)) for number in (29, 30, 31)]
    assert [(day.end.astimezone(UTC) - day.start.astimezone(UTC)) / HOUR for day in days] == [24, 23, 24]
    first, last = dt.datetime(2025, 3, 29, 23, tzinfo=UTC), dt.datetime(2025, 3, 30, 22, tzinfo=UTC)
    ends = [first - strategies.US, first, last - strategies.US, last]
    # By the wall clock of Paris from 01:30 to 03:30, which took one hour.
    jump = job(
        action_type_id=2,
        started_at=dt.datetime(2025, 3, 30, 1, 30, tzinfo=zone),
        completed_at=dt.datetime(2025, 3, 30, 3, 30, tzinfo=zone),
    )
    found = after(jump, *(job(2 + n, completed_at=end) for n, end in enumerate(ends)), days=days).table()
    assert [(row["action_type_id"], row["date"].day, row["total_jobs"]) for row in found] == [
        (1, 29, 1),
        (1, 30, 2),
        (1, 31, 1),
        (2, 30, 1),
    ]
    assert found[3]["duration_sum_ms"] == 3_600_000


def test_a_midnight_that_comes_twice() -> None:
    """In Havana on 2025-11-02 midnight comes twice: the day begins at the first and lasts 25 hours."""
    days = [strategies.day_of("America/Havana", dt.date(2025, 11, number)) for number in (1, 2)]
    ends = [dt.datetime(2025, 11, 2, 4, tzinfo=UTC) + shift for shift in (-strategies.US, 0 * HOUR, HOUR)]
    assert totals(after(*(job(n, completed_at=end) for n, end in enumerate(ends)), days=days)) == {1: 1, 2: 2}


def test_what_lies_outside_of_the_days() -> None:
    """An instant beside the windows belongs to none of them, whatever a wall clock calls its date."""
    day = strategies.day_of("America/Havana", dt.date(2025, 6, 1))
    assert day.start.astimezone(UTC).hour == 4
    ends = (dt.datetime(2025, 6, 1, 3, 59, tzinfo=UTC), dt.datetime(2025, 6, 2, 4, tzinfo=UTC))
    jobs = [job(n, completed_at=end, marketplace=name) for n, end in enumerate(ends) for name in ("vinted", "x")]
    assert after(*jobs, days=[day]).facts == {}
    assert not uncounted(Source(jobs), [day])


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
    """Durations and waits are rounded one by one, then the mean is; halves go away from zero both times."""
    numbers = the_numbers(after(*(job(n, **lasting(us)) for n, us in enumerate(microseconds))))
    assert (numbers["duration_sum_ms"], numbers["avg_duration_ms"]) == (sum_ms, mean_ms)
    waiting = [
        {"created_at": NOON - dt.timedelta(microseconds=us), "started_at": NOON} for us in microseconds
    ]  # fmt: skip
    numbers = the_numbers(after(*(job(n, **times) for n, times in enumerate(waiting))))
    assert (numbers["wait_sum_ms"], numbers["avg_wait_ms"]) == (sum_ms, mean_ms)


@pytest.mark.parametrize(
    ("start", "duration_ms", "reason"),
    [
        (lasting(LIMIT_MS * 1000 - 501), LIMIT_MS - 1, None),
        (lasting(LIMIT_MS * 1000 - 500), None, "bad_duration"),
        (lasting(LIMIT_MS * 1000), None, "bad_duration"),
        (lasting(0), 0, None),
        (lasting(-1), None, "bad_duration"),
        ({"started_at": None}, None, "no_start"),
        ({"started_at": "infinity"}, None, "bad_duration"),
        ({"started_at": "-infinity"}, None, "bad_duration"),
    ],
)
def test_bad_durations(start: Row, duration_ms: int | None, reason: str | None) -> None:
    """A duration that is missing, negative, infinite or rounds up to 2^31 ms is left out; its job still counts."""
    memory = after(job(**start))
    numbers = the_numbers(memory)
    assert (the_fact(memory).duration_ms, numbers["total_jobs"], numbers["avg_duration_ms"]) == (
        duration_ms,
        1,
        duration_ms,
    )
    assert (numbers["duration_count"], numbers["duration_sum_ms"]) == (int(duration_ms is not None), duration_ms or 0)
    expected = {(reason, "vinted", 1): 1} if reason else {}
    assert uncounted(Source([job(**start)]), DAYS) == expected


def test_reasons() -> None:
    """A job is reported once, by the first reason; cancelled and expired ones need no start; no end means no day."""
    jobs = [
        job(1, marketplace="Vinted"),
        job(2, marketplace="", status="expired", action_type_id=2),
        job(3, status="failed"),
        job(4, status="cancelled"),
        job(5, marketplace="ebay", **lasting(-1)),
        job(6, status="cancelled", **lasting(-1)),
        job(7, status="running", marketplace="depop"),
        job(8, completed_at=NEXT_NOON),
        job(9, completed_at=None),
        job(10, completed_at="infinity", status="expired", marketplace="depop"),
        job(11, completed_at=None, status="pending"),
    ]
    assert uncounted(Source(jobs), [ONE]) == {
        ("unknown_marketplace", "Vinted", 1): 1,
        ("unknown_marketplace", "", 2): 1,
        ("no_start", "vinted", 1): 1,
        ("bad_duration", "ebay", 1): 1,
    }
    assert without_end(Source(jobs)) == {("no_end", "vinted", 1): 1, ("no_end", "depop", 1): 1}


def test_tasks_on_another_day() -> None:
    """A task belongs to the day of its job, even if it ended on another day or never."""
    tasks = [task(completed_at=end) for end in (CREATED, NOON + 90 * HOUR, None, "infinity")]
    assert the_numbers(after(job(), tasks=tasks))["total_tasks"] == 4


def test_percentiles() -> None:
    """The percentile is the value of rank ceil(q n), of the jobs that ran and have one; None where none has."""
    assert [exact_percentile([30, 10, 20, 40], Fraction(q, 100)) for q in (25, 26, 50, 95)] == [10, 20, 20, 40]
    memory = after(*(job(n, **lasting(n * 1000)) for n in range(1, 101)), job(101), job(102, status="cancelled"))
    found = percentiles(memory.facts.values())
    assert [found[f"{name}_duration_ms"] for name in ("p50", "p95", "p99")] == [50, 95, 99]
    assert set(percentiles([]).values()) == {None}


# Facts.


def test_a_fact_of_each_finished_job() -> None:
    """Only finished jobs of a known marketplace with a finite end have a fact."""
    others: list[Row] = [{"status": status} for status in ("pending", "running", "paused")]
    others += [{"marketplace": "depop"}, {"completed_at": None}, {"completed_at": "infinity"}]
    finished: list[Row] = [{"status": status} for status in FINISHED_JOB_STATUSES]
    memory = after(*(job(n, **values) for n, values in enumerate([*finished, *others])))
    assert sorted(fact.job_id for fact in memory.facts.values()) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("times", "wait_ms"),
    [
        ({"created_at": NOON - HOUR, "started_at": NOON}, 3_600_000),
        ({"created_at": NOON, "started_at": NOON}, 0),
        ({"created_at": NOON, "started_at": NOON - strategies.US}, None),
        ({"created_at": NOON, "started_at": None}, None),
        ({"created_at": NOON, "started_at": "infinity"}, None),
        ({"created_at": "-infinity", "started_at": NOON}, None),
        ({"created_at": NOON - LIMIT_MS * dt.timedelta(milliseconds=1), "started_at": NOON}, None),
        ({"created_at": NOON - (LIMIT_MS - 1) * dt.timedelta(milliseconds=1), "started_at": NOON}, LIMIT_MS - 1),
    ],
)
def test_waits(times: Row, wait_ms: int | None) -> None:
    """The wait is from creation to start; null where one is missing or infinite, disordered, or 2^31 ms away."""
    memory = after(job(**times))
    numbers = the_numbers(memory)
    assert (the_fact(memory).wait_ms, numbers["avg_wait_ms"]) == (wait_ms, wait_ms)
    assert (numbers["wait_count"], numbers["wait_sum_ms"]) == (int(wait_ms is not None), wait_ms or 0)


def test_times_of_a_cancelled_job() -> None:
    """Durations are of completed and failed jobs; a wait is what it is for every job, and its row leaves it out."""
    memory = after(job(status="cancelled", **lasting(1000), created_at=NOON - HOUR))
    assert (the_fact(memory).duration_ms, the_fact(memory).wait_ms) == (None, 3_599_999)
    assert (the_numbers(memory)["duration_count"], the_numbers(memory)["wait_count"]) == (0, 0)


def test_an_id_that_is_given_out_again() -> None:
    """A job is its id and its `created_at`: the same id created at another time is another job, and both count."""
    memory = after(job())
    run(memory, [job(created_at=CREATED + HOUR)])
    assert [fact.deleted_at for fact in memory.facts.values()] == [NOW, None]
    assert totals(memory) == {1: 2}


def test_a_job_as_it_is_now() -> None:
    """A job that the source holds counts as it is now."""
    memory = after(job(status="failed", retry_count=1, **lasting(1000)))
    run(memory, [job(action_type_id=2, **lasting(9000))])
    [(key, row)] = memory.rows.items()
    assert key == (2, "vinted", DATE)
    assert (row.numbers["success_count"], row.numbers["failure_count"], row.numbers["duration_sum_ms"]) == (1, 0, 9)


@pytest.mark.parametrize(
    "now", [{"status": "running"}, {"marketplace": "depop"}, {"completed_at": None}, {"completed_at": "infinity"}]
)
def test_a_job_that_has_no_fact_any_more(now: Row) -> None:
    """A job that is no longer finished, of no known marketplace, or without a finite end has no fact and no number."""
    memory = after(job())
    run(memory, [job(**now)])
    assert (memory.facts, memory.rows) == ({}, {})


def test_a_job_that_moved_into_a_day_of_the_run() -> None:
    """A job has one day: if it moved, its old day changes too, though nobody asked for that day."""
    memory = after(job(1), job(2), days=DAYS)
    done = run(memory, [job(1), job(2, completed_at=NEXT_NOON)], [], TWO)
    assert totals(memory) == {1: 1, 2: 1}
    assert done.other_days == {ONE.date}


def test_a_job_that_moved_out_of_a_day_of_the_run() -> None:
    """A job that left a day of the run goes to its new day at once, if that day was ever computed."""
    memory = after(job(1), job(2), days=DAYS)
    done = run(memory, [job(1), job(2, completed_at=NEXT_NOON)])
    assert totals(memory) == {1: 1, 2: 1}
    assert done.other_days == {TWO.date}


def test_a_job_that_moved_to_a_day_that_nobody_has_computed() -> None:
    """Such a job waits: its new day is not aggregated for it alone, and counts it once it is computed."""
    memory = after(job())
    moved = [job(completed_at=NEXT_NOON)]
    assert run(memory, moved).other_days == frozenset()
    assert (memory.rows, the_fact(memory).date, TWO.date in memory.ledger) == ({}, TWO.date, False)
    run(memory, moved, [], TWO)
    assert totals(memory) == {2: 1}


def test_a_job_that_waits_may_be_deleted() -> None:
    """A job that waits for its day counts there although the source has lost it meanwhile."""
    memory = after(job())
    run(memory, [job(completed_at=NEXT_NOON)])
    run(memory, [], [], TWO)
    assert totals(memory) == {2: 1}


def test_a_move_that_no_run_sees() -> None:
    """A job that moved from one day that was not asked for to another stays where it was seen, until one is run."""
    memory = after(job(), days=DAYS)
    moved = [job(completed_at=NEXT_NOON)]
    run(memory, moved, [], THREE)
    assert totals(memory) == {1: 1}
    run(memory, moved, [], TWO)
    assert totals(memory) == {2: 1}


def test_an_unfinished_job_with_its_fact_elsewhere() -> None:
    """A run looks at the finished jobs of its days: one that is not is seen where its fact is dated."""
    memory = after(job(), days=DAYS)
    running = [job(status="running", completed_at=NEXT_NOON)]
    run(memory, running, [], TWO)
    assert totals(memory) == {1: 1}
    run(memory, running, [], ONE)
    assert totals(memory) == {}
    memory = after(job(), days=DAYS)
    run(memory, [job(marketplace="depop", completed_at=NEXT_NOON)], [], TWO)
    assert totals(memory) == {}


def test_a_job_that_moved_far_away() -> None:
    """A job can move to an instant of no partition; it has the date of the zone, and waits."""
    memory = Memory(zone="America/Havana")
    run(memory, [job()])
    run(memory, [job(completed_at=dt.datetime(1970, 1, 1, tzinfo=UTC))])
    assert (the_fact(memory).date, memory.rows) == (dt.date(1969, 12, 31), {})


def test_a_deleted_job_keeps_its_fact() -> None:
    """A job that was counted and is gone keeps its fact; `deleted_at` is when that was first seen, and no number."""
    memory = after(job(), tasks=[task()])
    before = copy.deepcopy(memory)
    run(memory, [], now=LATER)
    run(memory, [], now=LATER + HOUR)
    assert the_fact(memory).deleted_at == LATER
    # That it has no start is a statement about the source, which no longer holds it.
    assert (before.ledger[ONE.date].uncounted, memory.ledger[ONE.date].uncounted) == ({"no_start": 1}, {})
    ledgers = [{day: replace(entry, uncounted={}) for day, entry in of.ledger.items()} for of in (memory, before)]
    assert (memory.rows, ledgers[0], memory.journal) == (before.rows, ledgers[1], before.journal)


def test_a_job_that_was_never_counted() -> None:
    """What was deleted before a run has seen it counts nowhere."""
    memory = after(job(1))
    run(memory, [])
    assert totals(memory) == {1: 1}


def test_a_job_that_comes_back() -> None:
    """If the row comes back, it is as if it had never gone."""
    memory = after(job(), tasks=[task()])
    before = copy.deepcopy(memory)
    run(memory, [], [], now=LATER)
    run(memory, [job()], [task()], now=LATER)
    assert memory == before


def test_who_is_gone_elsewhere() -> None:
    """A run marks only what is gone from its own days."""
    memory = after(job(1), job(2, completed_at=NEXT_NOON), days=DAYS)
    run(memory, [], [], TWO, now=LATER)
    assert [fact.deleted_at for fact in memory.facts.values()] == [None, LATER]


def test_task_numbers_of_now() -> None:
    """While no task row is gone, a job's task numbers are those of its tasks now; `task_count` is of any status."""
    memory = after(job(), tasks=[task(status="failed", retry_count=1), task(status="pending", retry_count=7)])
    assert task_numbers(memory) == (2, 0, 1, 1)
    run(memory, [job()], [task(status="success", retry_count=3), task(status="timeout")])
    assert task_numbers(memory) == (2, 1, 1, 3)


def test_tasks_that_are_gone() -> None:
    """A job with fewer task rows than its `task_count` keeps all its task numbers, and its other numbers go on."""
    memory = after(job(), tasks=[task(), task(status="failed")])
    run(memory, [job(retry_count=5)], [task(status="failed", retry_count=9)])
    assert (task_numbers(memory), the_numbers(memory)["retry_count"]) == ((2, 1, 1, 0), 5)
    # Enough rows again: the numbers are those of now.
    run(memory, [job()], [task(), task(), task(status="failed", retry_count=9)])
    assert task_numbers(memory) == (3, 2, 1, 9)


def test_an_empty_tasks_table() -> None:
    """A table that was made again, or truncated, takes no number away."""
    memory = after(job(), tasks=[task()])
    run(memory, [job()], [])
    assert task_numbers(memory) == (1, 1, 0, 0)


def test_without_a_tasks_table() -> None:
    """Without the table a job keeps what it had; one that is first seen then has null, until the table is there."""
    memory = after(job(1), tasks=[task(1)])
    run(memory, [job(1), job(2, action_type_id=2)], None)
    rows = {key[0]: row.numbers["total_tasks"] for key, row in memory.rows.items()}
    assert rows == {1: 1, 2: None}
    run(memory, [job(1), job(2, action_type_id=2)], [task(2)])
    rows = {key[0]: row.numbers["total_tasks"] for key, row in memory.rows.items()}
    assert rows == {1: 1, 2: 1}


def test_sums_over_unknown_numbers() -> None:
    """Sums over only nulls are null; a known number makes the sum, and unknown ones are left out of it."""
    memory = after(job(1), tasks=[task(1, retry_count=2)])
    run(memory, [job(1), job(2)], None)
    numbers = the_numbers(memory)
    assert (numbers["total_jobs"], numbers["total_tasks"], numbers["task_retry_count"]) == (2, 1, 2)
    assert the_numbers(after(job(), tasks=None))["task_retry_count"] is None


@pytest.mark.parametrize("status", ["cancelled", "expired"])
def test_tasks_of_jobs_that_have_not_run(status: str) -> None:
    """With a tasks table, cancelled and expired jobs have 0, also if they had more; without one, null if first seen."""
    zeros = (0, 0, 0, 0)
    assert task_numbers(after(job(status=status), tasks=[task()])) == zeros
    memory = after(job(), tasks=[task(), task()])
    run(memory, [job(status=status)], [task()])
    assert task_numbers(memory) == zeros
    memory = after(job(status=status), tasks=None)
    assert task_numbers(memory) == (None,) * 4
    assert the_numbers(memory)["total_tasks"] is None


def test_a_job_that_is_cancelled_while_there_is_no_table() -> None:
    """It keeps the numbers that it had, but tasks of a cancelled job count as none."""
    memory = after(job(), tasks=[task()])
    run(memory, [job(status="cancelled")], None)
    assert (task_numbers(memory), the_numbers(memory)["total_tasks"]) == ((1, 1, 0, 0), 0)


def test_what_a_fact_never_knew() -> None:
    """A column of a later definition stays null for a job that is gone by then, and its sums leave it out."""
    memory = after(job(1, **lasting(0)), job(2, **lasting(0)))
    memory.facts = {key: Fact(**{**vars(fact), "wait_ms": None}) for key, fact in memory.facts.items()}
    run(memory, [job(2, **lasting(0))], definition=2)
    numbers = the_numbers(memory)
    assert (numbers["wait_count"], numbers["wait_sum_ms"]) == (1, 17 * 3_600_000)


def test_forgetting() -> None:
    """`allow_shrink` forgets, for the days of the run, the jobs and tasks that the source no longer holds."""
    memory = after(job(1), job(2), job(3, completed_at=NEXT_NOON), tasks=[task(1), task(1)], days=DAYS)
    run(memory, [job(1)], [task(1)], allow_shrink=True)
    assert {row["date"].day: (row["total_jobs"], row["total_tasks"]) for row in memory.table()} == {
        1: (1, 1),
        2: (1, 0),
    }
    run(memory, [job(1)], None, allow_shrink=True)
    assert memory.table()[0]["total_tasks"] is None


def test_forgetting_equals_a_first_run() -> None:
    """After `allow_shrink` the days are what they would be if they had never been computed."""
    memory = after(job(1), job(2), tasks=[task(1), task(2)])
    run(memory, [job(2)], [], allow_shrink=True)
    first = after(job(2), tasks=[])
    assert (memory.facts, memory.rows, memory.ledger) == (first.facts, first.rows, first.ledger)


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (None, None),
        ("", None),
        (" \n\t ", None),
        ("\n Second line 7\r\nthird", "Second line #"),
        ("HTTP/1.1 503 Service Unavailable", "HTTP/# 503 Service Unavailable"),
        ("HTTPError: 429 for url: https://api.example/items/7?token=ab", "HTTPError: 429 for url: #"),
        ("Response code was 401 for item 404", "Response code was 401 for item #"),
        ('{"status":422,"message":"Brand is missing"}', "{#:422,#}"),
        ("zipcode 404, error code 10054, status 4040", "zipcode #, error code #, status #"),
        ("can't open '/tmp/upload_99.jpg': it isn't there", "can't open #: it isn't there"),
        ('Invalid value "abc\ndef" for field', "Invalid value #"),
        ("Seller \u201cAnna\u201d has blocked \u2018it\u2019s me\u2019", "Seller # has blocked #"),
        ("Mail to anna.smith+shop@example.co.uk bounced", "Mail to # bounced"),
        ("connect to 10.0.0.12:5432 failed", "connect to # failed"),
        ("device 00:1a:2b:3c:4d:5e, object at 0x7f3c2a1b9d30", "device #, object at #"),
        ("job 550e8400-e29b-41d4-a716-446655440000 was killed", "job # was killed"),
        ("cursor dGhpcyBpcyBhIGN1cnNvcg== is not deadbeef", "cursor # is not #"),
        ("retry at 2025-01-02T10:11:12.123Z (3/5)", "retry at # (#)"),
        ("word " * 60, ("word " * 24).strip()),
    ],
)
def test_failure_reasons(message: str | None, reason: str | None) -> None:
    """The reason is the first line without what is about one case, of failed jobs only, and of none if so wished."""
    assert failure_reason(message) == reason
    failed = job(status="failed", error_message=message)
    assert the_fact(after(failed)).failure_reason == reason
    assert the_fact(after({**failed, "status": "cancelled"})).failure_reason is None
    memory = Memory()
    run(memory, [failed], failure_reasons=False)
    assert the_fact(memory).failure_reason is None


@given(st.text(st.sampled_from("0159aFz '\"@:/._-=+\n") | st.characters(codec="utf-8"), max_size=60))
def test_no_reason_has_a_number(message: str) -> None:
    """No digit is left but in an HTTP status, no URL and no e-mail address."""
    reason = failure_reason(message) or ""
    assert not re.search(r"[0-9]", re.sub(r"(?i)(http|status|code).*?[1-5][0-9][0-9]", "", reason))
    assert "\n" not in reason
    assert "://" not in reason
    assert len(reason) <= 120
    assert not re.search(r"@[^ @<>(),;:=]", reason)


# Numbers without facts.


def test_a_day_without_facts_that_would_not_fall() -> None:
    """A row of the counter is filled if no stored number falls; its mean may."""
    memory = Memory(rows=counter_row(1))
    memory.rows[1, "vinted", DATE] = StatsRow({**memory.rows[1, "vinted", DATE].numbers, "avg_duration_ms": 9}, None)
    assert run(memory, [job(**lasting(0))]).outcomes == {DATE: "computed"}
    assert memory.rows == {**after(job(**lasting(0))).rows}


@pytest.mark.parametrize(
    ("older", "is_older"),
    [
        ({"completed_at": ONE.start - strategies.US}, True),
        ({"completed_at": CREATED, "status": "cancelled", "marketplace": "depop"}, True),
        ({"completed_at": ONE.start}, False),
        ({"completed_at": "-infinity"}, False),
        ({"completed_at": CREATED, "status": "running"}, False),
        (None, False),
    ],
)
def test_evidence_by_an_older_job(older: Row | None, is_older: bool) -> None:
    """A counter's row may fall if the source holds a finished job from before the day began."""
    memory = Memory(rows={**counter_row(4), **counter_row(5, date=DATE - dt.timedelta(days=9))})
    jobs = [job(1), job(2)] + ([job(3, **older)] if older else [])
    assert run(memory, jobs).outcomes == {DATE: "computed" if is_older else "held_back"}
    assert totals(memory)[DATE.day] == (2 if is_older else 4)


def test_evidence_by_the_first_day() -> None:
    """A counter's row may fall if nothing is stored for any earlier day; a row of zeros is nothing."""
    for earlier, outcome in ((0, "computed"), (1, "held_back")):
        memory = Memory(rows={**counter_row(2), **counter_row(earlier, date=DATE - dt.timedelta(days=9))})
        assert run(memory, [job()]).outcomes == {DATE: outcome}


@pytest.mark.parametrize(("stored", "outcome"), [(3, "computed"), (4, "computed"), (5, "held_back")])
def test_evidence_by_half_of_the_jobs(stored: int, outcome: str) -> None:
    """A counter's row may fall if the day's jobs are at least half of the stored ones, over all rows of the day."""
    memory = Memory(rows=counter_row(stored))
    assert run(memory, [job(1), job(2, marketplace="ebay")]).outcomes == {DATE: outcome}
    assert totals(memory) == {1: 2 if outcome == "computed" else stored}


def test_what_counts_as_a_job_of_the_day() -> None:
    """The counter counted jobs that ran: cancelled ones and those of an unknown marketplace are no evidence."""
    memory = Memory(rows=counter_row(4))
    jobs = [job(1), job(2, status="cancelled"), job(3, marketplace="depop")]
    assert run(memory, jobs).outcomes == {DATE: "held_back"}


@pytest.mark.parametrize("name", ["total_jobs", "failure_count", "cancelled_count", "wait_sum_ms", "total_tasks"])
def test_a_row_of_the_batch_never_falls(name: str) -> None:
    """A row that the batch once computed was exact: without facts none of its numbers falls, whatever the evidence."""
    memory = Memory(rows=batch_row(DATE, **{name: 1}))
    jobs = [job(1, completed_at=CREATED), job(2, action_type_id=2)]
    assert run(memory, jobs).outcomes == {DATE: "held_back"}
    memory = Memory(rows=batch_row(DATE, **{name: 0}))
    assert run(memory, jobs).outcomes == {DATE: "computed"}


def test_a_day_is_held_back_whole() -> None:
    """One falling number keeps all rows of its day, the new ones out, and no other day; the facts are written."""
    memory = Memory(rows=batch_row(total_jobs=2))
    done = run(memory, [job(1), job(2, action_type_id=2), job(3, completed_at=NEXT_NOON)], [], ONE, TWO)
    assert done.outcomes == {ONE.date: "held_back", TWO.date: "computed"}
    assert (totals(memory), len(memory.facts)) == ({1: 2, 2: 1}, 3)
    assert memory.ledger[DATE].outcome == "held_back"


def test_a_held_back_day_waits() -> None:
    """It is judged again by each run over it, writes nothing, and is not due for its definition's sake."""
    memory = Memory(rows=batch_row(total_jobs=2))
    run(memory, [job()], definition=2)
    before = copy.deepcopy(memory)
    run(memory, [job()], definition=2, now=LATER)
    assert memory == before
    assert memory.missing([ONE, TWO], definition=2) == [TWO]
    run(memory, [job(1), job(2)], definition=2)
    assert (memory.ledger[DATE].outcome, totals(memory)) == ("computed", {1: 2})


def test_allow_shrink_ends_the_wait() -> None:
    """`allow_shrink` writes what the source holds, on the days of the run and on no other."""
    memory = Memory(rows={**batch_row(total_jobs=2), **batch_row(TWO.date, total_jobs=2)})
    run(memory, [job()], [], ONE, TWO)
    assert run(memory, [job()], allow_shrink=True).outcomes == {DATE: "computed"}
    assert totals(memory) == {1: 1, 2: 2}


def test_facts_that_somebody_has_pruned() -> None:
    """After a prune the day is one without facts: its numbers stay, and a correction that lowers one is held back."""
    memory = after(job(1), job(2, completed_at=NEXT_NOON), days=DAYS)
    memory.prune(before=TWO.date)
    assert run(memory, [], [], ONE, TWO).outcomes == {ONE.date: "held_back", TWO.date: "computed"}
    assert totals(memory) == {1: 1, 2: 1}
    # Where the source still has the jobs the facts come back, and the day is one with facts.
    run(memory, [job(1)])
    run(memory, [job(1, status="running")])
    assert totals(memory) == {2: 1}


def test_a_move_into_a_day_whose_facts_are_gone() -> None:
    """A run over another day has not read the jobs of such a day, so it leaves the day's rows alone."""
    memory = after(job(1), job(2, completed_at=NEXT_NOON), days=DAYS)
    memory.prune(before=TWO.date)
    before = copy.deepcopy(memory.rows[1, "vinted", DATE])
    assert run(memory, [job(2)], [], TWO).other_days == frozenset()
    assert memory.rows == {(1, "vinted", DATE): before}


def test_with_facts_numbers_fall() -> None:
    """Where facts stand behind the numbers a correction goes through, whatever is left in the source."""
    memory = after(job(1), job(2, status="failed"))
    run(memory, [job(2, status="running")])
    assert totals(memory) == {1: 1}


# Settled days that change.


def test_a_run_that_changes_nothing() -> None:
    """A second run writes nothing: facts, ledger, rows and journal are as they were, `computed_at` too."""
    memory = after(job(), tasks=[task()], days=DAYS)
    before = copy.deepcopy(memory)
    for days in (DAYS, [ONE], [TWO, ONE]):
        assert run(memory, [job()], [task()], *days, now=LATER).lines == ()
    assert memory == before


def test_a_line_of_the_journal() -> None:
    """Each row of a settled day that changes has a line: both numbers, late, corrected and moved jobs, the cause."""
    memory = after(job(1, status="failed"), job(2), job(3, completed_at=NEXT_NOON), days=DAYS)
    jobs = [
        job(1),
        job(2, completed_at=NEXT_NOON),
        job(3),
        job(4, status="failed"),
        job(5, status="failed"),
        job(6, action_type_id=2),
    ]
    lines = run(memory, jobs, run_id="r2", now=LATER).lines
    assert memory.journal == [*lines]
    found = {line.key: line for line in lines}
    # The next day has lost one job and won another, both completed, and no number of it has changed.
    assert list(found) == [(1, "vinted", ONE.date), (2, "vinted", ONE.date)]
    line = found[1, "vinted", ONE.date]
    assert (line.run_id, line.changed_at, line.cause) == ("r2", LATER, "jobs")
    assert (line.total_jobs_before, line.total_jobs_after) == (2, 4)
    assert (line.failure_count_before, line.failure_count_after) == (1, 2)
    assert (line.late, line.corrected, line.moved_in, line.moved_out, line.forgotten) == (2, 1, 1, 1, 0)
    line = found[2, "vinted", ONE.date]
    assert (line.total_jobs_before, line.total_jobs_after, line.late) == (0, 1, 1)


def test_a_line_for_another_day() -> None:
    """A settled day that changes because a job has left it has its line too."""
    memory = after(job(1), job(2), days=DAYS)
    [old, new] = run(memory, [job(1), job(2, completed_at=NEXT_NOON)], [], TWO).lines
    assert (old.key[2], old.total_jobs_before, old.total_jobs_after, old.moved_out) == (ONE.date, 2, 1, 1)
    assert (new.key[2], new.total_jobs_before, new.total_jobs_after, new.moved_in) == (TWO.date, 0, 1, 1)


def test_a_day_that_is_not_settled() -> None:
    """A day that was computed before it had closed is open: what changes until then is in no journal."""
    memory = Memory()
    run(memory, [], now=ONE.end - strategies.US)
    assert memory.missing([ONE]) == [ONE]
    assert run(memory, [job(1)], now=ONE.end).lines == ()
    assert memory.missing([ONE]) == []
    assert len(run(memory, [job(1), job(2)], now=NOW).lines) == 1


def test_a_counter_that_the_first_run_replaces() -> None:
    """The first run over a day writes no journal: the day was not settled."""
    memory = Memory(rows=counter_row(2))
    assert run(memory, [job()]).lines == ()
    memory = Memory(rows=counter_row(9))
    run(memory, [job()])
    assert run(memory, [job()], allow_shrink=True).lines == ()


def test_jobs_that_are_forgotten() -> None:
    """What `allow_shrink` forgets, jobs or tasks, is the cause, and forgotten jobs are counted."""
    memory = after(job(1), job(2), tasks=[task(1)])
    [line] = run(memory, [job(1)], [task(1)], allow_shrink=True).lines
    assert (line.cause, line.forgotten, line.total_jobs_after) == ("forgotten", 1, 1)
    [line] = run(memory, [job(1)], [], allow_shrink=True).lines
    assert (line.cause, line.forgotten, line.corrected) == ("forgotten", 0, 1)
    assert run(memory, [job(1)], [], allow_shrink=True).lines == ()


def test_numbers_that_are_forgotten_without_facts() -> None:
    """Where facts were pruned `allow_shrink` is the cause of what falls, though no fact is left to be counted."""
    memory = after(job(1), job(2))
    memory.prune(before=TWO.date)
    [line] = run(memory, [job(1)], allow_shrink=True).lines
    assert (line.cause, line.forgotten, line.late, line.total_jobs_before, line.total_jobs_after) == (
        *("forgotten", 0, 1),
        *(2, 1),
    )


def test_a_job_that_comes_back_is_not_corrected() -> None:
    """`deleted_at` alone is no change, so the journal does not count such a job."""
    memory = after(job(1))
    run(memory, [])
    [line] = run(memory, [job(1), job(2)]).lines
    assert (line.late, line.corrected) == (1, 0)


def test_what_somebody_has_overwritten() -> None:
    """A stored row that is not what the batch left is made right, down too, and the cause is said; no fact changes."""
    memory = after(job())
    key = (1, "vinted", DATE)
    expected = memory.rows[key].numbers
    memory.rows[key] = StatsRow({**expected, "total_jobs": 5, "success_count": 5}, NOW)
    memory.rows[7, "ebay", DATE] = StatsRow({"total_jobs": 1}, None)
    lines = run(memory, []).lines
    assert [(line.total_jobs_before, line.total_jobs_after, line.cause) for line in lines] == [
        (5, 1, "overwritten"),
        (1, 0, "overwritten"),
    ]
    assert {key: row.numbers for key, row in memory.rows.items()} == {key: expected}
    del memory.rows[key]
    [line] = run(memory, []).lines
    assert (line.total_jobs_before, line.total_jobs_after, line.cause) == (0, 1, "overwritten")


def test_a_new_definition() -> None:
    """A day of an older definition is due again; rows that change by it say so, with all that facts never knew."""
    row: Numbers = {"total_jobs": 1, "success_count": 1, "failure_count": 0}
    key = (1, "vinted", DATE)
    left = {name: row.get(name) for name in ROW_COLUMNS[3:]}
    settled = LedgerDay("computed", 1, is_closed=True, is_settled=True, jobs=None, rows={key: left})
    memory = Memory(ledger={DATE: settled}, rows={key: StatsRow(row, NOW)})
    assert memory.missing([ONE], definition=2) == [ONE]
    [line] = run(memory, [job()], definition=2).lines
    assert (line.cause, line.total_jobs_before, line.total_jobs_after) == ("definition", 1, 1)
    assert memory.missing([ONE], definition=2) == []
    assert run(memory, [job()], definition=3).lines == ()


def test_a_new_definition_elsewhere() -> None:
    """A day that changes because a job has moved was not looked at as a whole, and stays due for a new definition."""
    memory = after(job(1), job(2), days=DAYS)
    lines = run(memory, [job(1), job(2, completed_at=NEXT_NOON)], [], TWO, definition=2).lines
    assert [line.cause for line in lines] == ["jobs", "definition"]
    assert memory.missing([ONE, TWO], definition=2) == [ONE]


def test_a_change_of_the_spread_only() -> None:
    """Where sums stay and durations do not, a sketch may or may not change: the line is not certain."""
    memory = after(job(1, **lasting(1000)), job(2, **lasting(9000)))
    waits = [job(1, **lasting(4000)), job(2, **lasting(6000))]
    [line] = run(memory, waits).lines
    assert (line.is_certain, line.corrected, line.total_jobs_before, line.total_jobs_after) == (False, 2, 2, 2)


# All of it, on generated rows.


@st.composite
def histories(draw: st.DrawFn) -> tuple[list[Day], list[Source]]:
    """Days, and what the source held at three moments: rows arrive, change, and are deleted."""
    _, days = draw(strategies.windows())
    sources = []
    for _ in range(3):
        jobs = draw(strategies.jobs(days))
        tasks = draw(strategies.tasks([row["id"] for row in jobs], days))
        sources.append(Source(jobs, draw(st.sampled_from((tasks, tasks, None)))))
    return days, sources


@given(histories())
@settings(deadline=None)
def test_every_job_is_somewhere_once(history: tuple[list[Day], list[Source]]) -> None:
    """Rows, facts and reasons of a first run agree with each other and with the source."""
    days, [source, *_] = history
    memory = Memory()
    memory.observe(source, days, NOW)
    counted = sum(row["total_jobs"] + row["cancelled_count"] + row["expired_count"] for row in memory.table())
    in_window = [
        row
        for row in source.jobs
        if row["status"] in FINISHED_JOB_STATUSES
        and isinstance(row["completed_at"], dt.datetime)
        and days[0].start.astimezone(UTC) <= row["completed_at"] < days[-1].end.astimezone(UTC)
    ]
    reasons = Counter[str]()
    for (reason, *_), count in uncounted(source, days).items():
        reasons[reason] += count
    assert counted == len(memory.facts) == len(in_window) - reasons["unknown_marketplace"]
    rows = memory.table()
    assert sum(row["total_jobs"] - row["duration_count"] for row in rows) == (
        reasons["no_start"] + reasons["bad_duration"]
    )
    assert all(row["total_jobs"] == row["success_count"] + row["failure_count"] for row in rows)


@given(histories(), st.data())
@settings(deadline=None)
def test_the_order_of_days_does_not_matter(history: tuple[list[Day], list[Source]], data: st.DataObject) -> None:
    """Promise 13: days together, or one by one in any order, give the same facts and rows; a replay changes nothing."""
    days, sources = history
    stored = {
        (row["action_type_id"], row["marketplace"], row["date"]): StatsRow(
            {name: row[name] for name in ROW_COLUMNS[3:]}, row["computed_at"]
        )
        for row in data.draw(strategies.stored_rows(days))
    }
    together, apart = Memory(calendar=days, rows=dict(stored)), Memory(calendar=days, rows=dict(stored))
    # A first run over all days, so that moves go to days that were computed in both cases.
    for memory in (together, apart):
        memory.observe(sources[0], days, NOW)
    for source in sources[1:]:
        together.observe(source, days, NOW)
        for day in data.draw(st.permutations(days)):
            apart.observe(source, [day], NOW)
    assert (apart.facts, apart.table()) == (together.facts, together.table())
    before = copy.deepcopy(together)
    together.observe(sources[-1], days, LATER)
    for day in reversed(days):
        together.observe(sources[-1], [day], LATER)
    assert together == before


@given(histories())
@settings(deadline=None)
def test_nothing_that_is_gone_ceases_to_count(history: tuple[list[Day], list[Source]]) -> None:
    """Promise 15: whatever rows go, whole tables too, not one number changes."""
    days, [source, *_] = history
    # Without a tasks table the numbers of tasks would become known later.
    source = Source(source.jobs, source.tasks or [])
    memory = Memory()
    memory.observe(source, days, NOW)
    rows = memory.table()
    for left in (Source(source.jobs, None), Source(source.jobs[::2], []), Source([], []), Source([], None), source):
        memory.observe(left, days, LATER)
        assert (memory.table(), memory.journal) == (rows, [])


@given(histories())
@settings(deadline=None)
def test_forgetting_on_generated_rows(history: tuple[list[Day], list[Source]]) -> None:
    """After `allow_shrink` over all days the numbers equal those of a first run over the source."""
    days, sources = history
    memory, first = Memory(), Memory()
    for source in sources[:-1]:
        memory.observe(source, days, NOW)
    memory.observe(sources[-1], days, NOW, allow_shrink=True)
    first.observe(sources[-1], days, NOW)
    dates = {day.date for day in days}
    assert memory.table() == first.table()
    assert {key: fact for key, fact in memory.facts.items() if fact.date in dates} == first.facts


def test_frames() -> None:
    """Callers that hold frames get frames, of plain Python objects."""
    jobs = frame([job(1, **lasting(1500)), job(2, status="cancelled", **lasting(1500))], JOB_COLUMNS)
    tasks = frame([task() | {"id": 1}], TASK_COLUMNS)
    [row] = reference_rows(jobs, tasks, [ONE]).to_dict("records")
    assert (row["total_jobs"], row["cancelled_count"], row["total_tasks"], row["avg_duration_ms"]) == (1, 1, 1, 2)
    assert reference_durations(jobs, [ONE]).to_numpy().tolist() == [[1, "vinted", DATE, 2]]
    assert reference_waits(jobs, [ONE])["wait_ms"].tolist() == [17 * 3_600_000 - 2 + 1]


def test_the_strategies_reach_every_status() -> None:
    """A finished status that is never generated would leave the comparison with the SQL silent about it."""
    assert set(FINISHED_JOB_STATUSES) < set(strategies.JOB_STATUSES)
