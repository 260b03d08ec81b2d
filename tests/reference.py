"""The reference: what the numbers must be, computed a second time in plain Python: every job as last seen.

It is written from the domain page alone and shares neither code nor constants with the SQL, on purpose: two
implementations that agree on every generated case are unlikely to be wrong in the same way. Nothing may be imported
here from `assets`, `pipelines` or `models`, and no query may be consulted to decide what a number means.

`Memory` is what the batch remembers of one tenant: facts, ledger, stats rows, journal. `Memory.observe` is one run.
Everything else is a definition that a run uses. All is exact (integers and fractions, never floats) and slow: it is for
tests, on a few thousand rows at most. pandas stands at the edge only, for callers that hold their rows in frames.
"""

import datetime as dt
import math
import re
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any, Literal
from zoneinfo import ZoneInfo

import pandas as pd

JOB_COLUMNS = (
    "id",
    "marketplace",
    "action_type_id",
    "status",
    "retry_count",
    "error_message",
    "started_at",
    "completed_at",
    "created_at",
)
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
    "wait_count",
    "wait_sum_ms",
)
TASK_NUMBERS = ("total_tasks", "task_success_count", "task_failure_count", "task_retry_count")
MEANS = ("avg_duration_ms", "avg_wait_ms")
NUMBERS = (*JOB_NUMBERS, *TASK_NUMBERS, *MEANS)
ROW_COLUMNS = (*KEY, *NUMBERS)
PERCENTILES = {"p50": Fraction(1, 2), "p95": Fraction(19, 20), "p99": Fraction(99, 100)}

KNOWN_MARKETPLACES = ("vinted", "ebay", "etsy")
RUN_JOB_STATUSES = ("completed", "failed")
FINISHED_JOB_STATUSES = (*RUN_JOB_STATUSES, "cancelled", "expired")
LIMIT_MS = 2**31

Instant = dt.datetime | str | None
"""An aware time in UTC, or, where no finite one is known, PostgreSQL's text of an infinite one, or nothing."""
JobKey = tuple[int, Instant]
"""The id of a job and its `created_at`: together they are the job, because ids are given out again."""
RowKey = tuple[int, str, dt.date]
Numbers = Mapping[str, int | None]
Reason = Literal["unknown_marketplace", "no_start", "bad_duration", "no_end"]
Cause = Literal["jobs", "forgotten", "definition", "overwritten"]
Outcome = Literal["computed", "held_back"]


# What goes in, and what is remembered.


@dataclass(frozen=True)
class Day:
    """One day partition: the instants from `start` up to, and without, `end`; both are aware."""

    date: dt.date
    start: dt.datetime
    end: dt.datetime


@dataclass(frozen=True)
class Source:
    """The application's rows at one moment, with at least `JOB_COLUMNS` and `TASK_COLUMNS`.

    `tasks` is None where the tenant has no tasks table, which is something else than an empty one.
    """

    jobs: Sequence[Mapping[Any, Any]]
    tasks: Sequence[Mapping[Any, Any]] | None = ()


@dataclass(frozen=True)
class Fact:
    """One finished job as last seen. Task numbers are None if unknown, all four of them together."""

    job_id: int
    created_at: Instant
    date: dt.date
    completed_at: dt.datetime
    marketplace: str
    action_type_id: int
    status: str
    retry_count: int
    duration_ms: int | None = None
    wait_ms: int | None = None
    task_count: int | None = None
    task_success_count: int | None = None
    task_failure_count: int | None = None
    task_retry_count: int | None = None
    failure_reason: str | None = None
    deleted_at: dt.datetime | None = None

    @property
    def row_key(self) -> RowKey:
        return self.action_type_id, self.marketplace, self.date

    @property
    def has_run(self) -> bool:
        """Whether the job came to an end of its own, instead of being cancelled or left to expire."""
        return self.status in RUN_JOB_STATUSES


@dataclass(frozen=True)
class StatsRow:
    """What is stored under a key. `computed_at` is None in a row of the old counter, and so is what it never knew."""

    numbers: Numbers
    computed_at: dt.datetime | None


@dataclass(frozen=True)
class LedgerDay:
    """What the ledger says of a day that was computed, or that a run has held back.

    `is_closed` says that a run looked at the day after its end, and `is_settled` that it was computed then; a day
    stays settled. `rows` are those that the batch left behind, which tells what others have written since.
    `jobs` are those whose facts it was aggregated from: None if facts do not account for it, as for days that were
    computed before there were facts, for days that are held back, and for those of which only the facts changed.
    `uncounted`: how many jobs are not counted, or not wholly, by reason.
    """

    outcome: Outcome
    definition: int
    is_closed: bool
    is_settled: bool
    jobs: frozenset[JobKey] | None
    rows: Mapping[RowKey, Numbers]
    uncounted: Mapping[str, int] = field(default_factory=Counter)


@dataclass(frozen=True)
class JournalLine:
    """A stats row of a settled day that changed. A row that is not there counts as zero.

    `is_certain` is false if nothing but the spread of durations or waits has changed: whether a sketch changes then
    depends on its buckets, about which the definitions say nothing.
    """

    key: RowKey
    run_id: str
    changed_at: dt.datetime
    total_jobs_before: int
    total_jobs_after: int
    failure_count_before: int
    failure_count_after: int
    late: int
    corrected: int
    moved_in: int
    moved_out: int
    forgotten: int
    cause: Cause
    is_certain: bool = True


@dataclass(frozen=True)
class Run:
    """What a run did: the outcome of each day that was asked for, the other days that changed, the new lines."""

    outcomes: Mapping[dt.date, Outcome]
    other_days: frozenset[dt.date]
    lines: tuple[JournalLine, ...]


@dataclass
class Memory:
    """What the batch remembers of one tenant.

    `calendar` are the days that exist, also those of no run, because a job can move to any of them; an instant in
    none of them has the date of the wall clock in `zone`.
    """

    calendar: Sequence[Day] = ()
    zone: str = "UTC"
    facts: dict[JobKey, Fact] = field(default_factory=dict)
    ledger: dict[dt.date, LedgerDay] = field(default_factory=dict)
    rows: dict[RowKey, StatsRow] = field(default_factory=dict)
    journal: list[JournalLine] = field(default_factory=list)

    def observe(
        self,
        source: Source,
        days: Sequence[Day],
        now: dt.datetime,
        *,
        run_id: str = "",
        allow_shrink: bool = False,
        definition: int = 1,
        failure_reasons: bool = True,
    ) -> Run:
        """One run over the days.

        A run looks at the finished jobs of the source, of any marketplace, whose `completed_at` lies in one of its
        days, and at the facts that are dated in one of them, wherever their jobs are now: moved to another day, not
        finished any more, gone. So a job that moved into a day of the run takes itself out of its old day, and one
        that moved out of a day of the run goes to its new day, though nobody asked for those. What moved from one day
        that was not asked for to another is not seen, and nothing else of other days is looked at: not who is gone
        there, nor who has written there.

        The days of the run are aggregated from the facts. So are other days whose facts have changed, if the ledger
        has them and facts account for them; where facts do not, such a day is left alone, because this run has not
        read its jobs. `allow_shrink` forgets, of the jobs that the run looks at, what the source does not hold.
        """
        calendar = _Calendar((*self.calendar, *days), self.zone)
        closed = {day.date: _utc(now) >= _utc(day.end) for day in days}
        facts_before, rows_before = dict(self.facts), dict(self.rows)
        left_out = {day.date: _by_reason(uncounted(source, [day])) for day in days}
        tally, forgetful = self._see(source, calendar, closed, now, allow_shrink, failure_reasons)
        outcomes: dict[dt.date, Outcome] = {}
        other_days: set[dt.date] = set()
        lines: list[JournalLine] = []
        for date in sorted(closed.keys() | {date for _, _, date in tally}):
            ledger = self.ledger.get(date)
            old = {key: fact for key, fact in facts_before.items() if fact.date == date}
            new = {key: fact for key, fact in self.facts.items() if fact.date == date}
            stored = {key: row for key, row in rows_before.items() if key[2] == date}
            computed = aggregate(new.values())
            # The sketches are compared by what they are made of.
            respread = {key for key in computed if _spread(old, key) != _spread(new, key)}
            is_asked, is_closed, is_settled = date in closed, closed.get(date, False), False
            if ledger:
                is_closed, is_settled = is_closed or ledger.is_closed, ledger.is_settled
            if ledger and ledger.outcome == "computed" and ledger.jobs == old.keys():
                # Facts stand behind all that the batch has stored, so whatever differs is made right. A day that was
                # only aggregated again, without a look at its jobs, stays due for a new definition.
                fell = False
                definition_of_day = definition if is_asked else ledger.definition
            elif is_asked and ledger and self._is_as_left(date, tally, definition, left_out[date]):
                # Somebody has pruned facts of the day. That alone is no reason to judge the numbers which they made.
                outcomes[date] = "computed"
                continue
            elif is_asked:
                fell, definition_of_day = any(_falls(row, computed.get(key)) for key, row in stored.items()), definition
                if fell and not allow_shrink and _is_held_back(stored, computed, rows_before, source, calendar):
                    # The facts stay as the source has them; only the rows wait for somebody's decision.
                    outcomes[date] = "held_back"
                    rows_left = ledger.rows if ledger else {}
                    self.ledger[date] = LedgerDay(
                        "held_back", definition, is_closed, is_settled, None, rows_left, left_out[date]
                    )
                    continue
            else:
                if ledger:
                    # The facts may account for the day by chance from now on, so whoever asks for it next judges it.
                    self.ledger[date] = replace(ledger, jobs=None)
                continue
            for key in sorted(stored.keys() | computed.keys()):
                before, after = stored.get(key), computed.get(key)
                is_certain = _numbers_of(before) != after
                if after is None:
                    del self.rows[key]
                elif is_certain:
                    self.rows[key] = StatsRow(after, _utc(now))
                if ledger and is_settled and (is_certain or key in respread):
                    cause: Cause = "jobs"
                    if _numbers_of(before) != ledger.rows.get(key):
                        cause = "overwritten"
                    elif key in forgetful or (allow_shrink and fell and _falls(before, after)):
                        cause = "forgotten"
                    elif ledger.definition < definition_of_day:
                        cause = "definition"
                    lines.append(_line(key, run_id, _utc(now), before, after, tally[key], cause, is_certain))
            if is_asked:
                outcomes[date] = "computed"
            else:
                other_days.add(date)
            self.ledger[date] = LedgerDay(
                "computed",
                definition_of_day,
                is_closed,
                is_closed,
                frozenset(new),
                computed,
                left_out[date] if is_asked or ledger is None else ledger.uncounted,
            )
        self.journal.extend(lines)
        return Run(outcomes, frozenset(other_days), tuple(lines))

    def _see(
        self,
        source: Source,
        calendar: "_Calendar",
        asked: Collection[dt.date],
        now: dt.datetime,
        allow_shrink: bool,
        failure_reasons: bool,
    ) -> tuple[defaultdict[RowKey, Counter[str]], set[RowKey]]:
        """Brings the facts in line with the source.

        Returns how many jobs of each row are late, corrected, moved and forgotten, and the rows of which jobs or tasks
        were forgotten.
        """
        jobs = {_job_key(job): job for job in source.jobs}
        tasks = None if source.tasks is None else _by_job(source.tasks)
        looked_at = {key for key, fact in self.facts.items() if fact.date in asked}
        looked_at |= {
            key
            for key, job in jobs.items()
            if job["status"] in FINISHED_JOB_STATUSES and calendar.date_of(job["completed_at"]) in asked
        }
        tally: defaultdict[RowKey, Counter[str]] = defaultdict(Counter)
        forgetful: set[RowKey] = set()
        for key in sorted(looked_at, key=str):
            old, job = self.facts.get(key), jobs.get(key)
            new: Fact | None = None
            if job is not None:
                new = _fact(job, calendar, failure_reasons)
            elif old is not None and not allow_shrink:
                new = replace(old, deleted_at=old.deleted_at or _utc(now))
            if job is not None and new is not None:
                remembered = _with_tasks(new, old, tasks)
                new = _with_tasks(new, None, tasks) if allow_shrink else remembered
                if new != remembered:
                    forgetful.add(new.row_key)
            if new is None:
                self.facts.pop(key, None)
            else:
                self.facts[key] = new
            # What has become of the job, in the words of the journal.
            if old is None and new is not None:
                tally[new.row_key]["late"] += 1
            elif old is not None and new is None:
                tally[old.row_key]["forgotten" if job is None else "corrected"] += 1
                forgetful |= {old.row_key} if job is None else set()
            elif old is not None and new is not None and old.row_key != new.row_key:
                tally[old.row_key]["moved_out"] += 1
                tally[new.row_key]["moved_in"] += 1
            elif old is not None and new is not None and replace(old, deleted_at=new.deleted_at) != new:
                tally[new.row_key]["corrected"] += 1
        return tally, forgetful

    def _is_as_left(self, date: dt.date, tally: Iterable[RowKey], definition: int, left_out: Mapping[str, int]) -> bool:
        """Whether a run has seen nothing of a computed day that the ledger does not know."""
        ledger = self.ledger[date]
        stored = {key: _numbers_of(row) for key, row in self.rows.items() if key[2] == date}
        return (
            ledger.outcome == "computed"
            and ledger.jobs is not None
            and ledger.definition >= definition
            and ledger.rows == stored
            and ledger.uncounted == left_out
            and all(of_day != date for _, _, of_day in tally)
        )

    def missing(self, days: Sequence[Day], definition: int = 1) -> list[Day]:
        """The days that the ledger lacks, has open, or has by an older definition: those of `only_missing`."""
        known = self.ledger
        return [
            day
            for day in days
            if day.date not in known or not known[day.date].is_closed or known[day.date].definition < definition
        ]

    def prune(self, before: dt.date) -> None:
        """Somebody deletes the facts of all days before this one, as the documentation says how to."""
        self.facts = {key: fact for key, fact in self.facts.items() if fact.date >= before}

    def table(self) -> list[dict[str, Any]]:
        """The stats rows in the order of their keys, with the columns `ROW_COLUMNS`."""
        return [
            dict(zip(KEY, key, strict=True)) | {name: row.numbers.get(name) for name in NUMBERS}
            for key, row in sorted(self.rows.items(), key=lambda item: item[0])
        ]


# The definitions.


def aggregate(facts: Iterable[Fact]) -> dict[RowKey, Numbers]:
    """The stats of these facts, by row: the names are `NUMBERS`."""
    by_row: defaultdict[RowKey, list[Fact]] = defaultdict(list)
    for fact in facts:
        by_row[fact.row_key].append(fact)
    return {key: _numbers(of_row) for key, of_row in by_row.items()}


def percentiles(facts: Iterable[Fact]) -> dict[str, int | None]:
    """The exact percentiles of the jobs that have run: `p50_duration_ms`, `p95_wait_ms` and so on; None without any."""
    has_run = [fact for fact in facts if fact.has_run]
    values = {"duration_ms": _known(fact.duration_ms for fact in has_run)}
    values["wait_ms"] = _known(fact.wait_ms for fact in has_run)
    return {
        f"{name}_{what}": exact_percentile(of_what, q) if of_what else None
        for what, of_what in values.items()
        for name, q in PERCENTILES.items()
    }


def exact_percentile(values: Sequence[int], q: Fraction) -> int:
    """The value of rank ceil(q n) in ascending order."""
    return sorted(values)[math.ceil(q * len(values)) - 1]


def uncounted(source: Source, days: Sequence[Day]) -> Counter[tuple[Reason, str, int]]:
    """The jobs of the days that are not counted, or not wholly, by the first reason, marketplace and action type."""
    calendar, asked = _Calendar(days), {day.date for day in days}
    found: Counter[tuple[Reason, str, int]] = Counter()
    for job in source.jobs:
        if job["status"] in FINISHED_JOB_STATUSES and calendar.date_of(job["completed_at"]) in asked:
            reason: Reason | None = None
            has_run = job["status"] in RUN_JOB_STATUSES
            if job["marketplace"] not in KNOWN_MARKETPLACES:
                reason = "unknown_marketplace"
            elif has_run and _instant(job["started_at"]) is None:
                reason = "no_start"
            elif has_run and _milliseconds(job["started_at"], job["completed_at"]) is None:
                reason = "bad_duration"
            if reason:
                found[reason, job["marketplace"], _action(job)] += 1
    return found


def _by_reason(counts: Mapping[tuple[Reason, str, int], int]) -> Counter[str]:
    found: Counter[str] = Counter()
    for (reason, _, _), count in counts.items():
        found[reason] += count
    return found


def without_end(source: Source) -> Counter[tuple[Reason, str, int]]:
    """The finished jobs of a tenant that have no finite end, and so no day: the reason is always `no_end`."""
    return Counter(
        ("no_end", job["marketplace"], _action(job))
        for job in source.jobs
        if job["status"] in FINISHED_JOB_STATUSES and _finite(job["completed_at"]) is None
    )


def _numbers(facts: Sequence[Fact]) -> Numbers:
    """The numbers of one row."""
    has_run = [fact for fact in facts if fact.has_run]
    statuses = Counter(fact.status for fact in facts)
    durations, waits = _known(fact.duration_ms for fact in has_run), _known(fact.wait_ms for fact in has_run)
    tasks = {
        # The tasks of a job that has not run count as none, but they are known. A sum of unknown numbers is unknown.
        name: sum(known) if (known := _known(_times(getattr(fact, name), fact.has_run) for fact in facts)) else None
        for name in ("task_success_count", "task_failure_count", "task_retry_count")
    }
    ends = _known((tasks["task_success_count"], tasks["task_failure_count"]))
    return {
        "total_jobs": len(has_run),
        "success_count": statuses["completed"],
        "failure_count": statuses["failed"],
        "cancelled_count": statuses["cancelled"],
        "expired_count": statuses["expired"],
        "retry_count": sum(fact.retry_count for fact in has_run),
        "duration_count": len(durations),
        "duration_sum_ms": sum(durations),
        "wait_count": len(waits),
        "wait_sum_ms": sum(waits),
        "total_tasks": sum(ends) if ends else None,
        **tasks,
        "avg_duration_ms": _mean(durations),
        "avg_wait_ms": _mean(waits),
    }


def _fact(job: Mapping[Any, Any], calendar: "_Calendar", failure_reasons: bool) -> Fact | None:
    """The fact of a job as it is now, its tasks left out; None if it is not finished, of no day or no marketplace."""
    completed_at, date = _finite(job["completed_at"]), calendar.date_of(job["completed_at"])
    is_finished = job["status"] in FINISHED_JOB_STATUSES
    if completed_at is None or date is None or not is_finished or job["marketplace"] not in KNOWN_MARKETPLACES:
        return None
    job_id, created_at = _job_key(job)
    has_run, has_failed = job["status"] in RUN_JOB_STATUSES, job["status"] == "failed"
    return Fact(
        job_id=job_id,
        created_at=created_at,
        date=date,
        completed_at=completed_at,
        marketplace=job["marketplace"],
        action_type_id=_action(job),
        status=job["status"],
        retry_count=int(job["retry_count"] or 0),
        duration_ms=_milliseconds(job["started_at"], completed_at) if has_run else None,
        wait_ms=_milliseconds(created_at, job["started_at"]),
        failure_reason=failure_reason(job["error_message"]) if has_failed and failure_reasons else None,
    )


def _with_tasks(fact: Fact, old: Fact | None, tasks: Mapping[int, Sequence[Mapping[Any, Any]]] | None) -> Fact:
    """The fact with the numbers of its tasks: those of now, or those that it had if task rows are gone."""
    if tasks is not None:
        of_job = tasks.get(fact.job_id, ()) if fact.has_run else ()
        are_gone = old is not None and old.task_count is not None and len(of_job) < old.task_count
        if not (fact.has_run and are_gone):
            ended = [task for task in of_job if task["status"] in ("success", "failed", "timeout")]
            success_count = sum(task["status"] == "success" for task in ended)
            return replace(
                fact,
                task_count=len(of_job),
                task_success_count=success_count,
                task_failure_count=len(ended) - success_count,
                task_retry_count=sum(int(task["retry_count"] or 0) for task in ended),
            )
    if old is None:
        return fact
    return replace(
        fact,
        task_count=old.task_count,
        task_success_count=old.task_success_count,
        task_failure_count=old.task_failure_count,
        task_retry_count=old.task_retry_count,
    )


def _is_held_back(
    stored: Mapping[RowKey, StatsRow],
    computed: Mapping[RowKey, Numbers],
    all_stored: Mapping[RowKey, StatsRow],
    source: Source,
    calendar: "_Calendar",
) -> bool:
    """Whether a day of which a number would fall, and behind which no facts stand, keeps what is stored."""
    if any(row.computed_at is not None and _falls(row, computed.get(key)) for key, row in stored.items()):
        return True
    [date] = {date for _, _, date in stored}
    dated = [
        (calendar.date_of(job["completed_at"]), job) for job in source.jobs if job["status"] in FINISHED_JOB_STATUSES
    ]
    has_older_job = any(of_job is not None and of_job < date for of_job, _ in dated)
    # A row of nothing but zeros is no evidence of an earlier day: it may go at any time, and the verdict with it.
    has_older_row = any(key[2] < date and (row.numbers.get("total_jobs") or 0) > 0 for key, row in all_stored.items())
    counted = sum(
        of_job == date and job["status"] in RUN_JOB_STATUSES and job["marketplace"] in KNOWN_MARKETPLACES
        for of_job, job in dated
    )
    is_most = 2 * counted >= sum(row.numbers.get("total_jobs") or 0 for row in stored.values())
    return not ((has_older_job or not has_older_row) and is_most)


def _falls(before: StatsRow | None, after: Numbers | None) -> bool:
    """Whether a count or a sum falls. Nothing is left of the numbers of a row that vanishes; means may fall."""
    return before is not None and any(
        number is not None and ((after or {}).get(name) or 0) < number
        for name, number in before.numbers.items()
        if name in (*JOB_NUMBERS, *TASK_NUMBERS)
    )


def _numbers_of(row: StatsRow | None) -> Numbers | None:
    """All numbers of a stored row, None for those that whoever wrote it did not know."""
    return None if row is None else {name: row.numbers.get(name) for name in NUMBERS}


def _line(
    key: RowKey,
    run_id: str,
    now: dt.datetime,
    before: StatsRow | None,
    after: Numbers | None,
    tally: Counter[str],
    cause: Cause,
    is_certain: bool,
) -> JournalLine:
    numbers_before, numbers_after = before.numbers if before else {}, after or {}
    return JournalLine(
        key=key,
        run_id=run_id,
        changed_at=now,
        total_jobs_before=numbers_before.get("total_jobs") or 0,
        total_jobs_after=numbers_after.get("total_jobs") or 0,
        failure_count_before=numbers_before.get("failure_count") or 0,
        failure_count_after=numbers_after.get("failure_count") or 0,
        late=tally["late"],
        corrected=tally["corrected"],
        moved_in=tally["moved_in"],
        moved_out=tally["moved_out"],
        forgotten=tally["forgotten"],
        cause=cause,
        is_certain=is_certain,
    )


def _spread(facts: Mapping[JobKey, Fact], key: RowKey) -> tuple[list[int], list[int]]:
    """All durations and all waits of a row, in ascending order."""
    has_run = [fact for fact in facts.values() if fact.row_key == key and fact.has_run]
    return sorted(_known(fact.duration_ms for fact in has_run)), sorted(_known(fact.wait_ms for fact in has_run))


# The failure reason.


def _any_case(word: str) -> str:
    """A pattern of the word in any case, without a flag: what a flag ignores depends on the locale in PostgreSQL."""
    return "".join(f"[{letter.upper()}{letter.lower()}]" for letter in word)


_HTTP, _STATUS, _CODE = _any_case("http"), _any_case("status"), _any_case("code")
_LINKS = "|".join(map(_any_case, ("status", "code", "error", "response", "is", "was")))

FAILURE_REASON_RULES = (
    # Only the first line, and no control characters, so that the mark below is free.
    (r"^[\u0001-\u0020]+", ""),
    (r"(?s)[\r\n].*", ""),
    (r"[\u0001-\u001f][\u0001-\u0020]*| [\u0001-\u0020]+", " "),
    # An HTTP status gets a mark before it, which saves it from the rule of the digits.
    (
        rf"((?:^|[^A-Za-z])(?:{_HTTP}(?:/[0-9](?:\.[0-9])?)?|{_STATUS}|{_CODE})(?:[ \"':=_/#.([-]|{_LINKS})*)"
        r"([1-5][0-9][0-9])(?![0-9A-Za-z]|[.,][0-9])",
        "\\1\u0001\\2",
    ),
    # Quoted texts, up to the end of the line if nothing closes them. An apostrophe inside of a word is no quote.
    (
        r"\"(?:[^\"\\]|\\.)*(?:\"|\\?$)|`[^`]*(?:`|$)"
        r"|[\u00ab\u00bb\u201c\u201d\u201e][^\u00ab\u00bb\u201c\u201d\u201e]*(?:[\u00ab\u00bb\u201c\u201d\u201e]|$)"
        r"|\u2018(?:[^\u2019]|\u2019(?=[0-9A-Za-z]))*(?:\u2019(?![0-9A-Za-z])|$)",
        "#",
    ),
    (r"(^|[^'0-9A-Za-z])'(?:[^']|'(?=['0-9A-Za-z]))*(?:'(?!['0-9A-Za-z])|$)", r"\1#"),
    # URLs; e-mail addresses and handles; paths; hosts with a port; hexadecimal groups between colons.
    (r"(?:[A-Za-z][0-9A-Za-z+.-]*://|[Ww][Ww][Ww]\.)[^ ]*", "#"),
    (r"[^ @<>(),;:=]*@[^ @<>(),;:=]+", "#"),
    (r"(^|[ (=:,<[])(?:[A-Za-z]:\\|/)[^ ),;:<>]+", r"\1#"),
    (r"(^|[^0-9A-Za-z._-])[0-9A-Za-z_-]+(?:\.[0-9A-Za-z_-]+)+:[0-9]+(?![0-9A-Za-z])", r"\1#"),
    (r"(^|[^0-9A-Za-z:])[0-9A-Fa-f]{0,4}(?::[0-9A-Fa-f]{0,4}){2,7}(?![0-9A-Za-z:])", r"\1#"),
    # Base64, which is long from its first digit on, or padded; then words with a letter after a digit, and long
    # hexadecimals.
    (r"(^|[^0-9A-Za-z+/_-])[A-Za-z+/_-]*[0-9][0-9A-Za-z+/_-]{15,}=*", r"\1#"),
    (r"(^|[^0-9A-Za-z+/_-])[0-9A-Za-z+/]{16,}==?(?![0-9A-Za-z+/=_-])", r"\1#"),
    (r"(^|[^0-9A-Za-z])(?:[A-Za-z]*[0-9]+[A-Za-z][0-9A-Za-z]*|[0-9A-Fa-f]{8,}(?![0-9A-Za-z]))", r"\1#"),
    # All other digits but those behind a mark; then the marks, and what has become a list of nothing.
    (r"(^|[^0-9\u0001])[0-9]+", r"\1#"),
    (r"\u0001", ""),
    (r"#(?:[ .,:;/_+-]*#)+", "#"),
)
"""What `failure_reason` does in turn: a pattern, and what comes in the place of each of its matches.

A pattern means the same to Python's `re` and to PostgreSQL's `regexp_replace(text, pattern, replacement, 'g')`: all
classes are spelled in ASCII, nothing looks behind, and no match can begin at one place and end, or be divided, in two
ways, since Python takes the first alternative and PostgreSQL the longest match.
"""
REASON_LENGTH = 120
REASON_SOURCE_LENGTH = 1000


def failure_reason(text: str | None) -> str | None:
    """The first line of a message without what is about one case; None if nothing is left.

    Of the first 1,000 characters, white space before the first line is skipped and the other lines are dropped. Then
    `FAILURE_REASON_RULES` apply in their order, a `#` standing for what was taken out: quoted texts; URLs, e-mail
    addresses, `@names`, paths, hosts with a port, IP addresses; long base64 and hexadecimal strings; and every digit
    but an HTTP status (100 to 599) after `HTTP`, `status` or `code`. Neighbouring `#` become one. The first 120
    characters are kept.
    """
    if text is None or pd.isna(text):
        return None
    text = text[:REASON_SOURCE_LENGTH]
    for pattern, replacement in FAILURE_REASON_RULES:
        text = re.sub(pattern, replacement, text)
    return text.strip(" ")[:REASON_LENGTH].rstrip(" ") or None


# For callers that hold frames and look at a source for the first time.


def frame(rows: Sequence[Mapping[Any, Any]], columns: Sequence[str]) -> pd.DataFrame:
    """The rows as a frame of plain Python objects: pandas would turn nulls to NaN and integers to floats."""
    return pd.DataFrame([[row[name] for name in columns] for row in rows], columns=list(columns), dtype=object)


def source_of(jobs: pd.DataFrame, tasks: pd.DataFrame | None) -> Source:
    return Source(jobs.to_dict("records"), None if tasks is None else tasks.to_dict("records"))


def first_facts(source: Source, days: Sequence[Day]) -> list[Fact]:
    """The facts of a first run over these days."""
    memory = Memory()
    memory.observe(source, days, max(day.end for day in days))
    return list(memory.facts.values())


def reference_rows(jobs: pd.DataFrame, tasks: pd.DataFrame | None, days: Sequence[Day]) -> pd.DataFrame:
    """The stats rows after a first run over these days, sorted by key: the columns are `ROW_COLUMNS`."""
    memory = Memory()
    memory.observe(source_of(jobs, tasks), days, max(day.end for day in days))
    return frame(memory.table(), ROW_COLUMNS)


def reference_durations(jobs: pd.DataFrame, days: Sequence[Day]) -> pd.DataFrame:
    """The usable duration of each job that has one, in whole milliseconds: the columns are `KEY` and `duration_ms`."""
    return _each(jobs, days, "duration_ms")


def reference_waits(jobs: pd.DataFrame, days: Sequence[Day]) -> pd.DataFrame:
    """The usable wait of each completed or failed job that has one: the columns are `KEY` and `wait_ms`."""
    return _each(jobs, days, "wait_ms")


def _each(jobs: pd.DataFrame, days: Sequence[Day], name: str) -> pd.DataFrame:
    facts = [fact for fact in first_facts(source_of(jobs, None), days) if fact.has_run]
    columns = (*KEY, name)
    rows = [{column: getattr(fact, column) for column in columns} for fact in facts]
    return frame([row for row in rows if row[name] is not None], columns)


# Arithmetic, and time.


class _Calendar:
    """The date of an instant: that of the day which holds it, or else that of the wall clock in the zone."""

    def __init__(self, days: Iterable[Day], zone: str = "UTC") -> None:
        self.days = sorted({(_utc(day.start), _utc(day.end), day.date) for day in days})
        self.zone = ZoneInfo(zone)

    def date_of(self, value: Any) -> dt.date | None:
        """None for what is null or infinite, and lies in no day."""
        instant = _finite(value)
        if instant is None:
            return None
        position = bisect_right(self.days, instant, key=lambda day: day[0]) - 1
        if position >= 0 and instant < self.days[position][1]:
            return self.days[position][2]
        date = instant.astimezone(self.zone).date()
        # Where the wall clock and the days disagree about midnight, the days are right: the date is beside theirs.
        start = next((start for start, _, taken in self.days if taken == date), None)
        return date if start is None else date + dt.timedelta(days=-1 if instant < start else 1)


def _action(job: Mapping[str, Any]) -> int:
    """Its action. None, or an id that no integer holds, is no action's, and counts as one that nobody knows."""
    return max(-(2**31), min(2**31 - 1, int(-(2**31) if job["action_type_id"] is None else job["action_type_id"])))


def _job_key(job: Mapping[Any, Any]) -> JobKey:
    return int(job["id"]), _instant(job["created_at"])


def _by_job(tasks: Iterable[Mapping[Any, Any]]) -> dict[int, list[Mapping[Any, Any]]]:
    """The tasks by the id of their job; an orphan is nobody's."""
    found: defaultdict[int, list[Mapping[Any, Any]]] = defaultdict(list)
    for task in tasks:
        if not pd.isna(task["job_id"]):
            found[int(task["job_id"])].append(task)
    return found


def _milliseconds(start: Any, end: Any) -> int | None:
    """The whole milliseconds from one to the other; None without both, if they are in the wrong order, or too many."""
    first, last = _finite(start), _finite(end)
    if first is None or last is None or first > last:
        return None
    milliseconds = _rounded(Fraction((last - first) // dt.timedelta(microseconds=1), 1000))
    # The limit holds for the rounded value, because that is the one which has to fit into an integer.
    return milliseconds if milliseconds < LIMIT_MS else None


def _mean(values: Sequence[int]) -> int | None:
    return _rounded(Fraction(sum(values), len(values))) if values else None


def _rounded(value: Fraction) -> int:
    """The nearest whole number, halves away from zero; nothing here is negative, so away is up."""
    return math.floor(value + Fraction(1, 2))


def _known(values: Iterable[int | None]) -> list[int]:
    return [value for value in values if value is not None]


def _times(value: int | None, factor: int) -> int | None:
    return None if value is None else value * factor


def _finite(value: Any) -> dt.datetime | None:
    """The instant in UTC; None for null and for the infinities, which lie in no day and bound no duration."""
    instant = _instant(value)
    return instant if isinstance(instant, dt.datetime) else None


def _instant(value: Any) -> Instant:
    if isinstance(value, str):
        return value
    return None if pd.isna(value) else _utc(value)


def _utc(value: dt.datetime) -> dt.datetime:
    """The same instant in UTC: Python compares and subtracts two times of one zone by the wall clock."""
    plain = value.to_pydatetime() if isinstance(value, pd.Timestamp) else value
    if plain.tzinfo is None:
        raise ValueError(f"{plain} has no time zone, so it is no instant")
    return plain.astimezone(dt.UTC)
