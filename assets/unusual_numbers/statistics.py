"""What is unusual about a day, against the same weekdays of the weeks before. Pure: no I/O, no context, no clock.

A *series* is a marketplace and action over all tenants, or a marketplace of one tenant. Of each, four numbers are
tested:

- **success rate**: how many of the jobs failed; **p95 of duration, of wait**: how many of the times lie above the 95th
  percentile of the baseline. Both are so many of so many, from a rate that also varies from day to day: beta-binomial.
- **number of jobs**, on both sides: Poisson with a mean that also varies from day to day: negative binomial.

The scatter from day to day is the larger one of the series' own and of the typical one of its level (the median of the
method-of-moments estimates, Williams 1982), and the uncertainty of the baseline's mean is added to it.

What all do together is a finding about all, not about each: where tenants of a marketplace move together, each is
compared with its own past, and with that past moved by the median of the others (a median of means, so that no tenant
decides it).

No model fits a fleet's tails. So each baseline day is tested against the others in the same way, and how small these
p-values become in an ordinary week says how small a p-value has to be: beyond a high quantile of them the p-values are
continued with an exponential tail on -log p (peaks over a threshold, Pickands 1975; compare the conformal p-values of
Bates, Candès, Lei, Romano, Sesia 2023). A baseline day that was an incident itself is then left out.

The false-discovery rate is controlled over all tests of the day (Benjamini, Hochberg 1995; it holds for tests that
depend positively, Benjamini, Yekutieli 2001), with half of the weight for each of the two levels (Genovese, Roeder,
Wasserman 2006), so that 100,000 tests of tenants do not drown those of the marketplaces.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import date, timedelta
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]

WEEKS = 8
"""How many weeks before count at most."""
LEAST_DAYS = 4
"""How many baseline days with jobs a series needs to be tested."""
FDR = 0.02
"""The share of findings that may be false alarms; on a day without anything unusual, the chance of a false alarm."""
LEAST_JOBS = 5
"""A finding is about at least so many more (or fewer) jobs than expected."""
LEAST_POINTS, LEAST_RATIO = 0.01, 1.25
"""The least rise of a failure rate: by a percentage point, and by a quarter of itself."""
LEAST_TIME_RATIO = 1.4
"""The least rise of a p95."""
LEAST_JOBS_RATIO = 1.5
"""The least rise of the number of jobs, or fall by the same factor."""

SERIES = ("tenant", "marketplace", "action")
ALL = "all"
SUCCESS, DURATION, WAIT, JOBS = "success rate", "p95 of duration", "p95 of wait", "number of jobs"
_COLUMNS = {SUCCESS: ("failures", "jobs"), DURATION: ("long_durations", "durations"), WAIT: ("long_waits", "waits")}
"""Of the rates: what is counted, and of how many."""
_P95 = {DURATION: "duration", WAIT: "wait"}
_OUTLIER = 14.0
"""A baseline day with a -log p of more, about one in a million, is left out of the baseline."""
_GROUPS = 15
TAIL = 0.8
TAIL_OF_TIMES = 0.95
LEAST_MEAN = 10.0
"""How many jobs a day a series needs on average: of fewer, hardly anything could be found."""


def baseline_days(day: date) -> list[date]:
    """The same weekdays of the weeks before, in order."""
    return [day - timedelta(weeks=week) for week in range(WEEKS, 0, -1)]


@dataclass(frozen=True)
class Finding:
    """What is unusual: rates from 0 to 1, times in ms; `q`: the share of false alarms among what is as unusual."""

    tenant: str
    marketplace: str
    action: str
    number: str
    expected: float
    seen: float
    jobs: int
    q: float


@dataclass
class _Number:
    """One number of the series of a level. Arrays of a row for each series; of the baseline, a column for each day."""

    name: str
    series: list[tuple[str, str, str]]
    hits: Floats
    trials: Floats
    # The trials times what all series of the marketplace did on the day.
    exposure: Floats
    used: Flags
    # What the typical series of the level has: the scatter from day to day, and the rate.
    scatter: float = 0.0
    rate: float = 0.0
    # The largest -log p of the baseline days, descending, and of how many tests.
    decoys: Floats = field(default_factory=lambda: np.empty(0))
    decoy_count: int = 0
    expected: "_Expected | None" = None


@dataclass
class _Expected:
    """The mean of a series' rate, or of its number of jobs, and its scatter on a new day (see `_tail`)."""

    mean: Floats
    scatter: Floats
    is_tested: Flags


class Baseline:
    """What the days before let one expect, made once; `judge` compares days, or parts of days, with it."""

    def __init__(self, frame: pd.DataFrame, day: date) -> None:
        """`frame`: one row for each series and day, zeros included, with the columns SERIES, date, jobs, failures,
        durations, long_durations, waits and long_waits (those above the baseline's p95). A day that is not known of a
        series has no row. The tenant is empty for all tenants.
        """
        self.day = day
        days = baseline_days(day)
        frame = frame[frame["date"].isin(days)]
        self._levels = [
            [_number(name, part, days) for name in (*_COLUMNS, JOBS)]
            for part in (frame[frame["tenant"] == ""], frame[frame["tenant"] != ""])
        ]
        for number in self._numbers():
            _learn(number)

    def _numbers(self) -> Iterator[_Number]:
        for level in self._levels:
            yield from level

    def judge(self, today: pd.DataFrame, fdr: float = FDR) -> tuple[list[Finding], int]:
        """What is unusual in these rows of the day, the most unusual first, and how many tests were made.

        `today`: the columns of the baseline, and of each row the 95th percentiles of the day and of the baseline:
        p95_duration_ms, usual_p95_duration_ms, p95_wait_ms, usual_p95_wait_ms. `fdr`: a stricter bound, for days that
        are judged several times.
        """
        rows = {key: row for row, key in enumerate(zip(*(today[name] for name in SERIES), strict=True))}
        tests: list[tuple[Floats, list[Callable[[float], Finding]]]] = []
        for level in self._levels:
            scores: list[Floats] = []
            makers: list[Callable[[float], Finding]] = []
            for number in level:
                found, made = _judge(number, today, rows)
                scores.append(found)
                makers += made
            tests.append((np.concatenate(scores), makers))
        count = sum(len(scores) for scores, _ in tests)
        levels = sum(len(scores) > 0 for scores, _ in tests)
        # The weights of Genovese et al.: each level has an equal share of the bound.
        weighted = [scores + math.log(count / levels / len(scores)) for scores, _ in tests if len(scores)]
        makers = [make for _, of_level in tests for make in of_level]
        if not weighted:
            return [], 0
        q = benjamini_hochberg(np.concatenate(weighted))
        order = [int(test) for test in np.argsort(q, kind="stable") if q[test] <= fdr]
        return [makers[test](float(q[test])) for test in order], count


def benjamini_hochberg(scores: Floats) -> Floats:
    """The adjusted p-values of tests, from their -log p."""
    order = np.argsort(-scores, kind="stable")
    logs = np.log(len(scores) / np.arange(1, len(scores) + 1)) - scores[order]
    adjusted = np.empty(len(scores))
    adjusted[order] = np.exp(np.minimum(np.minimum.accumulate(logs[::-1])[::-1], 0))
    return adjusted


# Expectations ------------------------------------------------------------------------------------------------------


def _number(name: str, frame: pd.DataFrame, days: list[date]) -> _Number:
    index = frame.groupby(list(SERIES), sort=True).ngroup().to_numpy()
    keys = frame[list(SERIES)].drop_duplicates().sort_values(list(SERIES))
    series = [tuple(key) for key in keys.itertuples(index=False)]
    column = frame["date"].map({day: number for number, day in enumerate(days)}).to_numpy(dtype=int)
    hits, trials = np.zeros((len(series), len(days))), np.zeros((len(series), len(days)))
    counted, of = _COLUMNS.get(name, ("jobs", None))
    hits[index, column] = frame[counted].to_numpy(dtype=float)
    trials[index, column] = 1.0 if of is None else frame[of].to_numpy(dtype=float)
    used = trials > 0
    if name == JOBS:
        # Before its first job a tenant was not there, which says nothing about its days.
        used &= np.cumsum(hits, axis=1) > 0
    return _Number(name, series, hits, trials, trials.copy(), used)


def _moments(number: _Number, used: Flags) -> tuple[Floats, Floats, Floats]:
    """Of each series the raw mean, its own scatter from day to day, negative if it is smaller than chance makes it,
    and the weight of that estimate."""
    with np.errstate(divide="ignore", invalid="ignore"):
        n = np.where(used, number.exposure, 0.0)
        x = np.where(used, number.hits, 0.0)
        whole, total = n.sum(axis=1), x.sum(axis=1)
        mean = total / whole
        if number.name == JOBS:
            days = used.sum(axis=1)
            variance = ((x - n * mean[:, None]) ** 2).sum(axis=1) / (days - 1) * days / (n**2).sum(axis=1)
            scatter, weight = (variance - mean) / mean**2, mean / (1 + mean)
        else:
            squares = ((x - n * mean[:, None]) ** 2).sum(axis=1) / (mean * (1 - mean))
            share = (n**2).sum(axis=1) / whole**2

            def expected(v: Floats) -> Floats:
                return np.asarray((v * (1 - 2 * n / whole[:, None])).sum(axis=1) + share * v.sum(axis=1))

            chance, extra = expected(n), expected(n * (n - 1))
            scatter, weight = (squares - chance) / extra, extra / chance
    return mean, scatter, weight


def _expect(number: _Number, used: Flags) -> _Expected:
    mean, own, _ = _moments(number, used)
    days = used.sum(axis=1)
    n = np.where(used, number.exposure, 0.0)
    own = np.maximum(np.nan_to_num(own, nan=0.0, posinf=0.0, neginf=0.0), 0.0)
    # Of 7 or 8 days the own is known badly, so half of it is the typical one. What is over all has no other like it:
    # there it is the upper bound (90 %, chi-squared of 7 degrees of freedom).
    is_all = np.array([key[0] == "" and key[1] == ALL for key in number.series])
    scatter = (own + number.scatter) / 2 * np.where(is_all, 2.5, 1.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        if number.name == JOBS:
            # Of a new day's mean: the scatter of one day, and of the mean of so many.
            scatter = scatter * (1 + 1 / days) + 1 / (mean * days)
            has_jobs = np.where(used, number.hits > 0, False).sum(axis=1)
        else:
            whole = n.sum(axis=1)
            mean = (np.where(used, number.hits, 0.0).sum(axis=1) + PRIOR * number.rate) / (whole + PRIOR)
            effective = (n / (1 + np.maximum(n - 1, 0) * scatter[:, None])).sum(axis=1) + PRIOR
            scatter = scatter + 1 / (effective + 1)
            has_jobs = (n > 0).sum(axis=1)
    volume = mean if number.name == JOBS else np.where(used, number.trials, 0.0).sum(axis=1) / np.maximum(days, 1)
    is_tested = (has_jobs >= LEAST_DAYS) & (mean > 0) & (volume >= LEAST_MEAN)
    return _Expected(np.nan_to_num(mean), np.nan_to_num(scatter), is_tested)


PRIOR = 10.0
"""How many jobs the rate of the typical series weighs in that of each: who never failed is not said to never fail."""


def _learn(number: _Number) -> None:
    """Learns the typical scatter, how unusual the baseline days are among themselves, and which to leave out."""
    if not number.series:
        return
    mean = np.nan_to_num(_moments(number, number.used)[0])
    days = number.used.shape[1]
    for day in range(days):
        here = number.used[:, day] & (mean > 0)
        number.exposure[:, day] *= _common(number, here, number.hits[:, day], mean * number.trials[:, day])
    mean, scatter, weight = _moments(number, number.used)
    total = np.where(number.used, number.hits, 0.0).sum(axis=1)
    usable = np.isfinite(scatter) & (weight > 0) & (number.used.sum(axis=1) >= LEAST_DAYS)
    if (usable & (total >= 20)).sum() >= 5:
        usable &= total >= 20
    number.scatter = max(0.0, _median(scatter[usable]))
    number.rate = _median(mean[usable])
    scores, count = np.zeros(number.used.shape), np.zeros(days)
    for day in range(days):
        others = number.used.copy()
        others[:, day] = False
        expected = _expect(number, others)
        tested = expected.is_tested & number.used[:, day]
        scores[:, day] = np.where(
            tested, _scores(number, expected, tested, number.hits[:, day], number.trials[:, day])[0], 0.0
        )
        count[day] = tested.sum()
    # Without the worst of the days: it may have been an incident of all.
    ordinary = np.arange(days) != np.argmax(scores.sum(axis=0))
    number.decoys, number.decoy_count = np.sort(scores[:, ordinary].ravel())[::-1], int(count[ordinary].sum())
    is_outlier = (_calibrated(number, scores) > _OUTLIER) & (number.used.sum(axis=1) > LEAST_DAYS)[:, None]
    number.used = number.used & ~is_outlier
    number.expected = _expect(number, number.used)


def _median(values: Floats) -> float:
    """The median; 0 of nothing."""
    return float(np.median(values)) if len(values) else 0.0


def _common(number: _Number, tested: Flags, observed: Floats, expected: Floats) -> Floats:
    """By how much the series of each marketplace have moved together: the median, over groups of them, of observed by
    expected. 1 where there are too few to say so, and for what is over all marketplaces."""
    moved = np.ones(len(tested))
    is_fleet = bool(number.series) and number.series[0][0] == ""
    names = np.array(["" if is_fleet and key[1] != ALL else key[1] for key in number.series])
    for name in np.unique(names):
        chosen = np.flatnonzero((names == name) & tested)
        groups = min(_GROUPS, len(chosen), int(max(expected[chosen].sum(), observed[chosen].sum()) / 20))
        if name != ALL and groups >= 5:
            parts = np.array_split(chosen, groups)
            ratios = [observed[part].sum() / expected[part].sum() for part in parts if expected[part].sum() > 0]
            moved[names == name] = np.median(ratios)
    return moved


# Tests -------------------------------------------------------------------------------------------------------------


def _scores(number: _Number, expected: _Expected, tested: Flags, hits: Floats, trials: Floats) -> tuple[Floats, Floats]:
    """The -log p of each series, 0 unless the change is large enough to matter, and the mean that was expected."""
    scores = np.zeros(len(hits))
    moved = _common(number, tested, hits, expected.mean * trials)
    mean = expected.mean * np.maximum(moved, 1.0)
    if number.name != JOBS:
        mean = np.minimum(mean, 0.98)
        # What is uncertain about the rate is moved with it.
        with np.errstate(divide="ignore", invalid="ignore"):
            wider = (mean / expected.mean) ** 2 * expected.mean * (1 - expected.mean) / (mean * (1 - mean))
        scatter = np.minimum(expected.scatter * np.maximum(np.nan_to_num(wider, nan=1.0), 1.0), 0.99)
        with np.errstate(divide="ignore", invalid="ignore"):
            rate = np.where(trials > 0, hits / trials, 0.0)
        matters = (rate >= LEAST_RATIO * mean) & (hits - trials * mean >= LEAST_JOBS)
        if number.name == SUCCESS:
            matters &= rate - mean >= LEAST_POINTS
        for row in np.flatnonzero(tested & matters):
            scores[row] = rate_score(int(hits[row]), int(trials[row]), mean[row], scatter[row])
        return scores, mean
    # Unusual is what neither its own past nor what all do together explains.
    low = expected.mean * np.minimum(moved, 1.0)
    is_more = (hits >= LEAST_JOBS_RATIO * mean) & (hits - mean >= LEAST_JOBS)
    is_less = (hits <= low / LEAST_JOBS_RATIO) & (low - hits >= LEAST_JOBS)
    for row in np.flatnonzero(tested & (is_more | is_less)):
        at = mean[row] if is_more[row] else low[row]
        score = jobs_score(int(hits[row]), at, expected.scatter[row], more=bool(is_more[row]))
        scores[row] = max(0.0, score - math.log(2))
    return scores, expected.mean * moved


def rate_score(hits: int, trials: int, mean: float, scatter: float) -> float:
    """-log P(at least so many hits) of a beta-binomial with this mean, and the intra-day correlation `scatter`."""
    size = max(1 / scatter - 1, 1e-3)
    a, b = mean * size, (1 - mean) * size
    log_first = (
        math.lgamma(trials + 1)
        - math.lgamma(hits + 1)
        - math.lgamma(trials - hits + 1)
        + math.lgamma(hits + a)
        + math.lgamma(trials - hits + b)
        - math.lgamma(trials + size)
        + math.lgamma(size)
        - math.lgamma(a)
        - math.lgamma(b)
    )
    ratios = ((trials - j) * (j + a) / ((j + 1) * (trials - j - 1 + b)) for j in range(hits, trials))
    return -min(0.0, log_first + math.log(_series(ratios)))


def jobs_score(jobs: int, mean: float, scatter: float, *, more: bool) -> float:
    """-log P(at least, or at most, so many jobs) of a negative binomial with variance mean + scatter * mean^2."""
    size = 1 / max(scatter, 1e-9)
    share = mean / (size + mean)
    log_first = (
        math.lgamma(jobs + size)
        - math.lgamma(jobs + 1)
        - math.lgamma(size)
        + size * math.log1p(-share)
        + jobs * math.log(share)
    )
    if more:
        ratios = ((j + size) / (j + 1) * share for j in range(jobs, 10**9))
    else:
        ratios = (j / ((j - 1 + size) * share) for j in range(jobs, 0, -1))
    return -min(0.0, log_first + math.log(_series(ratios)))


def _series(ratios: Iterator[float]) -> float:
    """1 + r1 + r1 r2 + ..., of ratios that fall: what is left after many steps is bounded by a geometric series."""
    total = term = 1.0
    for step, ratio in enumerate(ratios):
        term *= ratio
        total += term
        if ratio < 1 and (term < 1e-7 * total or step > 3_000):
            return total + term * ratio / (1 - ratio)
    return total


def _calibrated(number: _Number, scores: Floats) -> Floats:
    """The scores, made no larger than what the baseline days show how often such scores come."""
    count = min(int((number.decoys > 0).sum()), max(10, min(1_000, number.decoy_count // 100)))
    if count < 5:
        return scores
    top = number.decoys[:count]
    beyond = np.maximum(scores, top[-1])
    is_of_tenants = number.series[0][0] != ""
    if number.name == JOBS and is_of_tenants:
        # Tenants pause, and load whole catalogues: a tail as heavy as that of the baseline days (Hill 1975).
        tail = np.log(beyond / top[-1]) / max(float(np.log(top / top[-1]).mean()), 1e-3)
    else:
        # By a quantile of the exponential tail, so that a few incidents among the baseline days do not stretch it.
        quantile = TAIL_OF_TIMES if number.name in _P95 and is_of_tenants else TAIL
        stretch = float(np.quantile(top - top[-1], quantile)) / -math.log(1 - quantile)
        tail = (beyond - top[-1]) / max(1.0, stretch)
    return np.asarray(np.minimum(scores, math.log(number.decoy_count / count) + tail))


def _judge(
    number: _Number, today: pd.DataFrame, rows: dict[tuple[Any, ...], int]
) -> tuple[Floats, list[Callable[[float], Finding]]]:
    """The calibrated scores of the tested series, and how to say that one is a finding."""
    if number.expected is None or not len(today):
        return np.empty(0), []
    row_of = np.array([rows.get(key, -1) for key in number.series])
    counted, of = _COLUMNS.get(number.name, ("jobs", None))
    hits = np.where(row_of >= 0, today[counted].to_numpy(dtype=float)[row_of], 0.0)
    trials = np.where(row_of >= 0, 1.0 if of is None else today[of].to_numpy(dtype=float)[row_of], 0.0)
    expected = number.expected
    tested = expected.is_tested & (trials > 0)
    scores, mean = _scores(number, expected, tested, hits, trials)
    if kind := _P95.get(number.name):
        seen, usual = (today[f"{name}_{kind}_ms"].to_numpy(dtype=float)[row_of] for name in ("p95", "usual_p95"))
        with np.errstate(invalid="ignore"):
            scores[~(seen >= LEAST_TIME_RATIO * usual)] = 0.0
    scores = _calibrated(number, scores)

    def maker(series: int) -> Callable[[float], Finding]:
        def make(q: float) -> Finding:
            if kind:
                values = float(usual[series]), float(seen[series])
            elif number.name == SUCCESS:
                values = 1 - float(mean[series]), 1 - float(hits[series] / trials[series])
            else:
                values = float(mean[series]), float(hits[series])
            jobs = int(today["jobs"].iloc[row_of[series]])
            return Finding(*number.series[series], number.name, *values, jobs, q)

        return make

    chosen = np.flatnonzero(tested)
    return scores[chosen], [maker(int(series)) for series in chosen]
