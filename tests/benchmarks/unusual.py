"""How many unusual days are found the next morning, and how many false alarms a week come: on simulated fleets.

    python -m tests.benchmarks.unusual [--tenants 10000] [--days 28] [--seed 1]

A fleet has what real ones have. Tenants: sizes over two powers of ten, failure rates of their own (a few never fail, a
few always do), one to three marketplaces, pauses of a day (2 %), bursts of five times as many jobs (1 %), new ones (8 %
began within the eight weeks) and some that have left (1 %). Days: all that a tenant, a marketplace or the fleet does
varies from day to day, for each tenant differently much; half a percent more jobs each week; now and then a holiday;
and among the baseline days, incidents: a marketplace's outage, and here and there a tenant's.

Each tested day is quiet but for pauses, bursts and the usual variation: what is found there is a false alarm. Then one
thing is put into the same day, and it is looked for.
"""

import argparse
import math
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from typing import Any

import numpy as np
import pandas as pd

from assets.sketch import GAMMA
from assets.unusual_numbers.statistics import (
    ALL,
    FDR,
    SERIES,
    SUCCESS,
    WAIT,
    Baseline,
    Finding,
    _judge,
    baseline_days,
)

MARKETPLACES = ("vinted", "ebay", "etsy")
ACTIONS = ("publish", "update", "sync", "orders", "delete", "message", "link_product")
SHARES = np.array([0.36, 0.22, 0.16, 0.1, 0.08, 0.05, 0.03])
SECONDS = np.array([9.0, 4.0, 25.0, 12.0, 2.0, 1.5, 3.0])
DAY = date(2026, 11, 2)
DOUBLED = round(math.log(2) / math.log(GAMMA))
KEYS = 1_500
WHAT = ("+20 points", "x 1.2", "70 % fail", "wait x 2")


@dataclass
class Jobs:
    """The jobs of the baseline days and of the tested one (column DAYS - 1), one element for each job."""

    tenant: Any  # The number of the tenant's marketplace.
    action: Any
    column: Any
    failed: Any
    duration: Any  # The sketch's keys.
    wait: Any


class Fleet:
    """Who the tenants are; it stays over the days."""

    def __init__(self, chance: np.random.Generator, tenants: int) -> None:
        self.chance = chance
        uses = chance.random((tenants, 3)) < np.array([0.9, 0.45, 0.25])
        uses[~uses.any(axis=1), 0] = True
        self.tenant, self.marketplace = np.nonzero(uses)
        count = len(self.tenant)
        self.size = np.exp(np.log(15) + 1.2 * chance.standard_normal(tenants))[self.tenant] * chance.uniform(
            0.5, 1.5, count
        )
        self.failing = -3.3 + 0.8 * chance.standard_normal(count) + np.array([0.0, 0.2, -0.4])[self.marketplace]
        self.slow = 0.2 * chance.standard_normal(count)
        # How regular each is from day to day: in failures, numbers of jobs, durations and waits.
        self.unsteady = {
            name: size * np.exp(0.5 * chance.standard_normal(count))
            for name, size in (("failed", 0.2), ("jobs", 0.35), ("duration", 0.08), ("wait", 0.1))
        }
        self.began = np.where(chance.random(tenants) < 0.08, chance.integers(0, 9, tenants), 0)[self.tenant]
        self.left = np.where(chance.random(tenants) < 0.01, chance.integers(1, 9, tenants), 99)[self.tenant]

    def jobs(self) -> Jobs:
        """Eight baseline days and a quiet day, all anew."""
        chance, count, days = self.chance, len(self.tenant), 9
        shape = (count, days)

        def varied(name: str, fleet: float, marketplace: float) -> Any:
            """The deviation of each tenant's marketplace on each day."""
            common = fleet * chance.standard_normal(days) + marketplace * chance.standard_normal((3, days))
            return common[self.marketplace] + self.unsteady[name][:, None] * chance.standard_normal(shape)

        mean = self.size[:, None] * np.exp(varied("jobs", 0.03, 0.04)) * 1.005 ** np.arange(days)
        mean[:, 4] *= 0.6 if chance.random() < 1 / 4 else 1.0
        mean *= np.where(chance.random(shape) < 0.02, 0.0, np.where(chance.random(shape) < 0.01, 5.0, 1.0))
        column = np.arange(days)
        mean *= (column >= self.began[:, None]) & (column < self.left[:, None])
        number = chance.poisson(mean[:, :, None] * SHARES)
        tenant, column, action = (np.repeat(one, number.ravel()) for one in np.indices(number.shape).reshape(3, -1))
        logit = self.failing[:, None] + varied("failed", 0.03, 0.06)
        # Incidents among the baseline days.
        incident = (chance.random(shape) < 0.0005) & (np.arange(days) < days - 1)
        if chance.random() < 1 / 3:
            incident[:, 3] |= self.marketplace == 1
        logit = np.where(incident, 0.5, logit)
        odds = logit[tenant, column] + np.array([0.3, 0, 0.2, -0.3, -0.2, 0, 0])[action]
        failed = chance.random(len(tenant)) < 1 / (1 + np.exp(-odds))

        def keys(log_ms: Any) -> Any:
            return np.clip(np.ceil(log_ms / math.log(GAMMA)), 0, KEYS - 1).astype(np.int16)

        noise = chance.standard_normal
        duration = (
            np.log(1000 * SECONDS)[action] + (self.slow[:, None] + varied("duration", 0.02, 0.04))[tenant, column]
        )
        wait = math.log(8_000) + varied("wait", 0.1, 0.05)[tenant, column]
        size = len(tenant)
        return Jobs(tenant, action, column, failed, keys(duration + 0.7 * noise(size)), keys(wait + 0.8 * noise(size)))

    def frame(self, jobs: Jobs, tenants_too: bool = True) -> pd.DataFrame:
        """The numbers of all series, as the check reads them."""
        of_action = self.marketplace[jobs.tenant] * len(ACTIONS) + jobs.action
        levels = [
            (np.zeros(len(jobs.tenant), int), [("", ALL, ALL)]),
            (of_action, [("", marketplace, action) for marketplace in MARKETPLACES for action in ACTIONS]),
        ]
        if tenants_too:
            names = zip(self.tenant, self.marketplace, strict=True)
            levels.append((jobs.tenant, [(f"user_{t}", MARKETPLACES[m], ALL) for t, m in names]))
        return pd.concat([_numbers(jobs, index, series) for index, series in levels], ignore_index=True)


def _numbers(jobs: Jobs, index: Any, series: list[tuple[str, str, str]]) -> pd.DataFrame:
    count, days = len(series), 9
    cell = index * days + jobs.column

    def counts(chosen: Any) -> Any:
        return np.bincount(cell[chosen], minlength=count * days)

    everything = np.ones(len(cell), bool)
    dates = [*baseline_days(DAY), DAY]
    names = pd.DataFrame(
        np.repeat(np.array(series, dtype=object), days, axis=0), columns=["tenant", "marketplace", "action"]
    )
    frame = names.assign(
        date=np.tile(np.array(dates, dtype=object), count),
        jobs=counts(everything),
        failures=counts(jobs.failed),
    )
    for name, plural, key in (("duration", "durations", jobs.duration), ("wait", "waits", jobs.wait)):
        before = jobs.column < days - 1
        usual, today = (_p95(index[chosen], key[chosen], count) for chosen in (before, ~before))
        with np.errstate(invalid="ignore"):
            frame[f"long_{plural}"] = counts(key > usual[index])
        frame[plural] = frame["jobs"]
        frame[f"usual_p95_{name}_ms"] = np.repeat(GAMMA**usual, days)
        frame[f"p95_{name}_ms"] = np.repeat(GAMMA**today, days)
    return frame


def _p95(index: Any, key: Any, count: int) -> Any:
    """The key of the 95th percentile of each series; NaN of none."""
    ordered = np.sort(index.astype(np.int64) * KEYS + key)
    number = np.bincount(index, minlength=count)
    last = np.cumsum(number) - number + np.ceil(0.95 * number).astype(int) - 1
    return np.where(number > 0, ordered[np.minimum(np.maximum(last, 0), len(ordered) - 1)] % KEYS, np.nan)


def changed(jobs: Jobs, chosen: Any, what: str, chance: np.random.Generator) -> Jobs:
    """The same jobs with something put into those that are chosen."""
    if what == "wait x 2":
        return Jobs(**{**vars(jobs), "wait": np.where(chosen, jobs.wait + DOUBLED, jobs.wait).astype(np.int16)})
    rate = jobs.failed[chosen].mean()
    wanted = {"+20 points": min(1.0, rate + 0.2), "x 1.2": 1.2 * rate, "70 % fail": max(rate, 0.7)}[what]
    more = chosen & (chance.random(len(chosen)) < (wanted - rate) / max(1 - rate, 1e-9))
    return Jobs(**{**vars(jobs), "failed": jobs.failed | more})


def today_of(frame: pd.DataFrame) -> pd.DataFrame:
    return frame[frame["date"] == DAY].reset_index(drop=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tenants", type=int, default=1_000)
    parser.add_argument("--days", type=int, default=28)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--tries", type=int, default=3, help="things of each kind and size put into each day")
    options = parser.parse_args()
    chance = np.random.default_rng(options.seed)
    false: list[list[Finding]] = []
    found: defaultdict[tuple[str, str], list[bool]] = defaultdict(list)
    seconds = []
    for number in range(options.days):
        if number % 7 == 0:
            fleet = Fleet(chance, options.tenants)
        jobs = fleet.jobs()
        frame = fleet.frame(jobs)
        began = time.perf_counter()
        baseline = Baseline(frame, DAY)
        findings, tests = baseline.judge(today_of(frame))
        seconds.append(time.perf_counter() - began)
        false.append(findings)
        for where, what, is_found in put(fleet, jobs, baseline, chance, options.tries):
            found[where, what].append(is_found)
    print(f"{options.tenants:,} tenants, {tests:,} tests a day, {np.median(seconds):.1f} s a day")
    count = sum(map(len, false))
    print(f"false alarms: {count} on {sum(map(bool, false))} of {len(false)} days, {7 * count / len(false):.2f} a week")
    for finding in [one for day in false for one in day][:12]:
        print("   ", finding)
    for (where, what), hits in sorted(found.items(), key=lambda item: (str(item[0][0]), item[0][1])):
        print(f"{where:<34} {what:<12} found {np.mean(hits):6.1%} of {len(hits)}")


def _is_found(
    baseline: Baseline, tests: list[int], level: int, name: str, new: pd.DataFrame, key: tuple[str, str, str]
) -> bool:
    """Whether this series is found with these rows, as the only one of the day; quicker than to judge all again."""
    number = next(number for number in baseline._levels[level] if number.name == name)
    rows = {row: at for at, row in enumerate(zip(*(new[column] for column in SERIES), strict=True))}
    scores, makers = _judge(number, new, rows)
    bound = math.log(sum(tests) / FDR) - math.log(sum(tests) / 2 / tests[level])
    made = (make(0.0) for score, make in zip(scores, makers, strict=True) if score >= bound)
    return key in {(one.tenant, one.marketplace, one.action) for one in made}


def put(
    fleet: Fleet, jobs: Jobs, baseline: Baseline, chance: np.random.Generator, tries: int
) -> Iterator[tuple[str, str, bool]]:
    """Puts one thing after another into the quiet day, and looks whether it is found: where, what, and whether."""
    is_today = jobs.column == 8
    tests = [sum(int((n.expected.is_tested).sum()) for n in level if n.expected) for level in baseline._levels]
    number = np.bincount(jobs.tenant[is_today], minlength=len(fleet.tenant))
    for what in WHAT:
        name = WAIT if what == "wait x 2" else SUCCESS
        for marketplace, action in ((0, 0), (1, 0), (2, 3)):
            chosen = is_today & (fleet.marketplace[jobs.tenant] == marketplace) & (jobs.action == action)
            new = today_of(fleet.frame(changed(jobs, chosen, what, chance), tenants_too=False))
            key = ("", MARKETPLACES[marketplace], ACTIONS[action])
            yield " ".join(key[1:]), what, _is_found(baseline, tests, 0, name, new, key)
        for low, high in ((10, 20), (20, 50), (50, 100), (100, 200), (200, 1_000)):
            # Of those who have been there for four weeks.
            able = np.flatnonzero((number >= low) & (number < high) & (fleet.began <= 4) & (fleet.size >= low / 2))
            for series in chance.permutation(able)[:tries]:
                of_series = jobs.tenant == series
                few = Jobs(**{field: value[of_series] for field, value in vars(jobs).items()})
                few = changed(few, few.column == 8, what, chance)
                names = (f"user_{fleet.tenant[series]}", MARKETPLACES[fleet.marketplace[series]], ALL)
                few.tenant = np.zeros(len(few.tenant), int)
                new = today_of(_numbers(few, few.tenant, [names]))
                yield f"one tenant, {low} to {high - 1} jobs", what, _is_found(baseline, tests, 1, name, new, names)


if __name__ == "__main__":
    main()
