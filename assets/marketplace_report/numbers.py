"""From rows of the summary to the numbers of the report. No I/O and no clock.

All take a summary frame (`marketplace_daily_summary.table.COLUMNS`), and put rows together by adding up their sums and
merging their sketches: a mean of means or of percentiles would be no mean and no percentile.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import date, timedelta
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from assets.sketch import DURATION, MEASURES, percentile
from models import MARKETPLACES
from pipelines.completeness import Record, is_complete, notes

SUMS = (
    "total_jobs",
    "success_count",
    "failure_count",
    "cancelled_count",
    "expired_count",
    "retry_count",
    "total_tasks",
    "task_failure_count",
)
NUMBERS = (*SUMS, "success_rate", *(name for one in MEASURES for name in (one.count, one.sum, *one.statistics)))
"""What is known of any set of rows: sums; `success_rate` from 0 to 1, mean and percentiles in milliseconds, or None."""

WEEK = 7
MOST_ACTIONS = 10
"""How many actions have a bar of their own; the others share one."""
OTHERS = "others"

# What stands out: a change that is larger than chance would make it, by so many standard errors, and that matters.
STANDARD_ERRORS = 3
LEAST_JOBS = 30
LEAST_POINTS = 0.01
LEAST_RATIO = 1.25
MOST_REMARKS = 10


def totals(rows: pd.DataFrame) -> dict[str, Any]:
    """The NUMBERS of these rows together."""
    sums = {name: int(rows[name].sum()) for name in SUMS}
    success_rate = sums["success_count"] / sums["total_jobs"] if sums["total_jobs"] else None
    times = {name: value for measure in MEASURES for name, value in measure.add_up(rows).items()}
    return {name: value for name, value in (sums | {"success_rate": success_rate} | times).items() if name in NUMBERS}


def last_days(last: date, count: int) -> list[date]:
    """So many days up to this one, in order."""
    return [last - timedelta(days=ago) for ago in reversed(range(count))]


def incomplete_days(last: date, count: int, records: Mapping[date, Record]) -> list[str]:
    """A sentence for each chain of the last days that are not complete, the last ones first."""
    return notes(last_days(last, count), records)[::-1]


def of_days(frame: pd.DataFrame, days: Sequence[date]) -> pd.DataFrame:
    """The rows of these days."""
    return frame[frame["date"].isin(list(days))]


def daily(frame: pd.DataFrame, days: Sequence[date]) -> pd.DataFrame:
    """One row for each day and marketplace, also where nothing ran: `date`, `marketplace`, and the NUMBERS."""
    groups = dict(list(of_days(frame, days).groupby(["date", "marketplace"])))
    nothing = frame.iloc[:0]
    rows = [
        {"date": day, "marketplace": marketplace, **totals(groups.get((day, marketplace), nothing))}
        for day in days
        for marketplace in MARKETPLACES
    ]
    return pd.DataFrame(rows, columns=["date", "marketplace", *NUMBERS], dtype=object)


def failures_by_action(frame: pd.DataFrame, days: Sequence[date]) -> pd.DataFrame:
    """Failed jobs: one row for each action that failed, the most first, and a column for each marketplace.

    After MOST_ACTIONS rows the rest is added up as OTHERS.
    """
    failed = of_days(frame, days)
    sums = failed.groupby(["action_code", "marketplace"])["failure_count"].sum().unstack(fill_value=0)
    sums = sums.reindex(columns=list(MARKETPLACES), fill_value=0).astype(int)
    sums = sums.loc[sums.sum(axis=1).sort_values(ascending=False, kind="stable").index]
    sums = sums[sums.sum(axis=1) > 0]
    if len(sums) > MOST_ACTIONS:
        others = sums.iloc[MOST_ACTIONS:].sum().to_frame(OTHERS).T
        sums = pd.concat([sums.iloc[:MOST_ACTIONS], others])
    return sums.rename_axis(index="action", columns=None)


class Weeks(NamedTuple):
    """The NUMBERS of the compared days of this week and of the week before, for one marketplace and action."""

    marketplace: str  # Or "all".
    action: str  # Or "all".
    now: Mapping[str, Any]
    before: Mapping[str, Any]
    # The buckets of the durations, from which the uncertainty of a percentile is known.
    durations_now: Mapping[int, int]
    durations_before: Mapping[int, int]


class Compared(NamedTuple):
    """The days of this week that are compared with those of the week before, and those of both that are not complete.

    A day that is not complete is left out together with its weekday in the other week: a week that lacks a Sunday is
    compared with one that lacks it, too.
    """

    now: list[date]
    before: list[date]
    incomplete: list[date]


def compared_days(last: date, records: Mapping[date, Record]) -> Compared:
    """`records`: the summary's days, as of `marketplace_daily_summary.table.read_days`."""
    days = last_days(last, 2 * WEEK)
    incomplete = [day for day in days if not is_complete(records.get(day))]
    pairs = [pair for pair in zip(days[WEEK:], days[:WEEK], strict=True) if not set(pair).intersection(incomplete)]
    return Compared([now for now, _ in pairs], [before for _, before in pairs], incomplete)


def compare_weeks(frame: pd.DataFrame, compared_days: Compared) -> list[Weeks]:
    """This week against the one before: over all, for each marketplace, and for each of its actions."""
    frame = of_days(frame, [*compared_days.now, *compared_days.before])
    is_now = frame["date"].isin(compared_days.now)

    def weeks(marketplace: str, action: str, chosen: pd.Series) -> Weeks:
        now, before = frame[chosen & is_now], frame[chosen & ~is_now]
        return Weeks(marketplace, action, totals(now), totals(before), DURATION.merge(now), DURATION.merge(before))

    compared = [weeks("all", "all", frame["date"].notna())]
    for marketplace in MARKETPLACES:
        of_marketplace = frame["marketplace"] == marketplace
        compared.append(weeks(marketplace, "all", of_marketplace))
        compared += [
            weeks(marketplace, action, of_marketplace & (frame["action_code"] == action))
            for action in sorted(set(frame.loc[of_marketplace, "action_code"]))
        ]
    return compared


class Remark(NamedTuple):
    """A change that stands out."""

    marketplace: str
    action: str
    is_volume: bool
    is_bad: bool
    jobs: int
    sentence: str


def remarks(
    frame: pd.DataFrame, last: date, records: Mapping[date, Record], write: Callable[[str], str] = str
) -> list[str]:
    """What stands out in this week against the one before, each as a sentence with its numbers; bad news first.

    `write`: how the code of an action is written where the sentences go.
    """
    days = compared_days(last, records)
    week = last_days(last, WEEK)
    ended = frame["total_jobs"] + frame["cancelled_count"] + frame["expired_count"]
    with_jobs = set(frame.loc[ended > 0, "date"])
    sentences = []
    # Of a day that is not complete it is not known.
    idle = [str(day) for day in week if day not in with_jobs and day not in days.incomplete]
    if len(idle) == WEEK:
        sentences.append("No job ended in the last seven days.")
    elif idle:
        sentences.append(f"No job ended on {' and '.join(filter(None, [', '.join(idle[:-1]), idle[-1]]))}.")
    if not days.now:
        return [*sentences, "No day of this week can be compared with its weekday in the week before."]
    if len(days.now) < WEEK:
        names = ", ".join(f"{day:%a}" for day in days.now)
        sentences.append(f"Only {names} are compared: the other days are not complete in both weeks.")
    if not with_jobs.intersection(days.before):
        return [*sentences, "There are no jobs in the week before to compare with."]
    found: list[Remark] = []
    for weeks in compare_weeks(frame, days)[1:]:
        # That a whole marketplace has more jobs, or fewer, is not said again of its actions.
        whole = [(remark.marketplace, remark.is_bad) for remark in found if remark.is_volume and remark.action == "all"]
        found += [
            remark
            for remark in _remarks(weeks, write)
            if not (remark.is_volume and (remark.marketplace, remark.is_bad) in whole)
        ]
    found.sort(key=lambda remark: (not remark.is_bad, -remark.jobs))
    sentences += [remark.sentence for remark in found[:MOST_REMARKS]]
    if len(found) > MOST_REMARKS:
        sentences.append(f"And {len(found) - MOST_REMARKS} more: see the table.")
    return sentences or ["Nothing stands out: what has changed is small, or may be chance."]


def _remarks(weeks: Weeks, write: Callable[[str], str]) -> Iterator[Remark]:
    now, before = weeks.now, weeks.before
    jobs, jobs_before = now["total_jobs"], before["total_jobs"]
    if max(jobs, jobs_before) < LEAST_JOBS:
        return
    of = (weeks.marketplace, weeks.action)
    who = weeks.marketplace if weeks.action == "all" else f"{weeks.marketplace}, {write(weeks.action)}"

    # Jobs come by chance, as in a Poisson process: their number has its own square root as standard error.
    is_large = not 1 / LEAST_RATIO < jobs / max(jobs_before, 0.5) < LEAST_RATIO
    if is_large and abs(jobs - jobs_before) > STANDARD_ERRORS * math.sqrt(jobs + jobs_before):
        sentence = f"{who}: {jobs:,} jobs, {jobs_before:,} the week before{_change(jobs, jobs_before)}."
        yield Remark(*of, True, jobs < jobs_before, jobs, sentence)
    if min(jobs, jobs_before) < LEAST_JOBS:
        return

    # The test of two proportions.
    points = now["success_rate"] - before["success_rate"]
    pooled = (now["success_count"] + before["success_count"]) / (jobs + jobs_before)
    error = math.sqrt(pooled * (1 - pooled) * (1 / jobs + 1 / jobs_before))
    if abs(points) >= LEAST_POINTS and abs(points) > STANDARD_ERRORS * error:
        sentence = (
            f"{who}: {now['success_rate']:.1%} of the jobs succeeded ({now['failure_count']:,} of {jobs:,} failed), "
            f"{before['success_rate']:.1%} the week before ({before['failure_count']:,} of {jobs_before:,})."
        )
        yield Remark(*of, False, points < 0, jobs, sentence)

    slow, slow_before = now["p95_duration_ms"], before["p95_duration_ms"]
    low, high = _bounds(weeks.durations_now)
    low_before, high_before = _bounds(weeks.durations_before)
    is_apart = low > high_before or high < low_before
    if is_apart and slow_before and not 1 / LEAST_RATIO < slow / slow_before < LEAST_RATIO:
        sentence = (
            f"{who}: one job in twenty took longer than {duration(slow)}, {duration(slow_before)} the week before"
            f"{_change(slow, slow_before)}."
        )
        yield Remark(*of, False, slow > slow_before, jobs, sentence)


def _bounds(durations: Mapping[int, int]) -> tuple[float, float]:
    """Between which values the 95th percentile lies but for chance: those whose ranks are so many errors away from it.

    A percentile's rank is distributed as a binomial one, whatever the durations are. Infinite where it is not known.
    """
    count = sum(durations.values())
    numerator, denominator = DURATION.percentiles["p95_duration_ms"]
    rank = count * numerator / denominator
    error = STANDARD_ERRORS * math.sqrt(count * numerator * (denominator - numerator)) / denominator
    bounds = [
        percentile(durations, math.ceil(bound), count) if 0 < bound <= count else None
        for bound in (rank - error, rank + error)
    ]
    return (-math.inf if bounds[0] is None else bounds[0], math.inf if bounds[1] is None else bounds[1])


def _change(now: float, before: float) -> str:
    return f" ({now / before - 1:+.0%})" if before else ""


def duration(ms: float) -> str:
    """A duration for people: `850 ms`, `12.4 s`, `3.5 min`, `2.0 h`."""
    for unit, size in (("h", 3_600_000), ("min", 60_000), ("s", 1000)):
        if ms >= size:
            return f"{ms / size:.1f} {unit}"
    return f"{ms:.0f} ms"


# What the page shows: every marketplace and action, and all of them together ----------------------------------------

ALL = -1
"""The index of all marketplaces, or of all actions, together."""
PERIODS = (7, 28, 90, 365)
"""The periods that the page offers, in days; the last one is as much as it shows day by day."""
USUAL_DAYS = 28
BAD_POINTS = 0.05
LEAST_FAILURES = 5


def action_codes(frame: pd.DataFrame) -> list[str]:
    """The actions of these rows in order; their place is their index."""
    return sorted(set(frame["action_code"]))


class Cell(NamedTuple):
    """What is known of one marketplace and action, or of all: for each day the sums and the buckets, which add up."""

    sums: np.ndarray
    histograms: tuple[np.ndarray, ...]

    def numbers(self, groups: np.ndarray | None = None) -> list[dict[str, Any]]:
        """The NUMBERS of each day, or of each group of days: a line of `groups` has 1 for its days, else 0."""
        sums, histograms = self if groups is None else (groups @ self.sums, tuple(groups @ h for h in self.histograms))
        rows = [dict(zip(_CELL_SUMS, line, strict=True)) for line in sums.tolist()]
        for measure, of_measure in zip(MEASURES, histograms, strict=True):
            for name, values in measure.percentiles_of(of_measure).items():
                for row, value in zip(rows, values, strict=True):
                    row[name] = value
            for row in rows:
                # Halves away from zero, in whole numbers.
                count, total = row[measure.count], row[measure.sum]
                row[measure.mean] = (2 * total + count) // (2 * count) if count else None
        for row in rows:
            row["success_rate"] = row["success_count"] / row["total_jobs"] if row["total_jobs"] else None
        return [{name: row[name] for name in NUMBERS} for row in rows]


_CELL_SUMS = (*SUMS, *(name for one in MEASURES for name in (one.count, one.sum)))


def cells(frame: pd.DataFrame, days: Sequence[date], actions: Sequence[str]) -> Iterator[tuple[tuple[int, int], Cell]]:
    """Each marketplace and action that has rows, and ALL of them: their indexes, and what is known of each day.

    It says what `totals` says of the same rows, for all of them at once. `days` follow each other.
    """
    frame = of_days(frame, days)
    place = np.array([(day - days[0]).days for day in frame["date"]], np.int64)
    marketplace = frame["marketplace"].map({name: at for at, name in enumerate(MARKETPLACES)}).to_numpy(np.int64)
    action = frame["action_code"].map({code: at for at, code in enumerate(actions)}).to_numpy(np.int64)
    for chosen in product((ALL, *range(len(MARKETPLACES))), (ALL, *range(len(actions)))):
        is_chosen = ((chosen[0] == ALL) | (marketplace == chosen[0])) & ((chosen[1] == ALL) | (action == chosen[1]))
        if is_chosen.any() or chosen == (ALL, ALL):
            rows, groups = frame[is_chosen], place[is_chosen]
            sums = np.zeros((len(days), len(_CELL_SUMS)), np.int64)
            np.add.at(sums, groups, rows[list(_CELL_SUMS)].to_numpy(np.int64))
            yield chosen, Cell(sums, tuple(one.histograms(rows, groups, len(days)) for one in MEASURES))


class Period(NamedTuple):
    """Some days up to the last one: which days are in it, which in the period before, and which `left_out` of both.

    Incomplete days are left out, with the days as long before or after them, so that equal weekdays are compared.
    `before` is empty if the data do not go back so far.
    """

    days: int
    now: Sequence[date]
    before: Sequence[date]
    left_out: Sequence[date]


def periods(first: date, last: date, incomplete: Sequence[date] = ()) -> list[Period]:
    """The PERIODS that there are data for from the first day on, and the shortest one in any case."""
    known = (last - first).days + 1
    found = []
    for count in PERIODS:
        if count > known and count != PERIODS[0]:
            continue
        days = last_days(last, 2 * count)
        if 2 * count > known:
            found.append(Period(count, days[count:], (), ()))
            continue
        shift = timedelta(days=count)
        gaps = {one for day in days if day in incomplete for one in (day - shift, day, day + shift)}.intersection(days)
        now, before = ([day for day in part if day not in gaps] for part in (days[count:], days[:count]))
        found.append(Period(count, now, before, sorted(gaps)))
    return found


class BadDay(NamedTuple):
    """A day on which a marketplace failed more often than in the USUAL_DAYS before."""

    day: date
    marketplace: int
    jobs: int
    failures: int
    success_rate: float
    usual: float


def bad_days(by_day: Mapping[tuple[date, int], Mapping[str, Any]], days: Sequence[date]) -> list[BadDay]:
    """Those of these days, the newest first, from the NUMBERS by day and marketplace; incomplete days are not in them.

    Named are changes that chance would hardly make (the test of two proportions) and that are large enough to matter.
    """
    found = []
    for day in reversed(days):
        for marketplace in range(len(MARKETPLACES)):
            today = by_day.get((day, marketplace))
            before = [by_day.get((one, marketplace)) for one in last_days(day - timedelta(days=1), USUAL_DAYS)]
            jobs_before = sum(row["total_jobs"] for row in before if row)
            if not today or min(today["total_jobs"], jobs_before) < LEAST_JOBS:
                continue
            usual = sum(row["success_count"] for row in before if row) / jobs_before
            points, error = _points(today["success_count"], today["total_jobs"], usual * jobs_before, jobs_before)
            if today["failure_count"] >= LEAST_FAILURES and -points >= BAD_POINTS and -points > STANDARD_ERRORS * error:
                jobs, failures = today["total_jobs"], today["failure_count"]
                found.append(BadDay(day, marketplace, jobs, failures, today["success_rate"], usual))
    return found


def _points(success: float, jobs: int, success_before: float, jobs_before: int) -> tuple[float, float]:
    """By how much a success rate differs from one before, and the standard error of that (two proportions)."""
    pooled = (success + success_before) / (jobs + jobs_before)
    error = math.sqrt(max(0.0, pooled * (1 - pooled)) * (1 / jobs + 1 / jobs_before))
    return success / jobs - success_before / jobs_before, error


def compare(
    now: Mapping[str, Any] | None, before: Mapping[str, Any] | None, names: Sequence[str]
) -> list[float | None]:
    """By which share each of these numbers has changed; a rate by how much. None where it cannot be said."""
    if not now or not before:
        return [None] * len(names)
    changes: list[float | None] = []
    for name in names:
        if now[name] is None or before[name] is None:
            changes.append(None)
        elif name == "success_rate":
            changes.append(now[name] - before[name])
        else:
            changes.append(now[name] / before[name] - 1 if before[name] else None)
    return changes
