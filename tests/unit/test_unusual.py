"""What is unusual: the tails are exact, a quiet fleet is quiet, and what is put into it is found."""

import math
from datetime import date, timedelta
from fractions import Fraction
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from assets.unusual_numbers.statistics import (
    ALL,
    DURATION,
    JOBS,
    SUCCESS,
    WAIT,
    Baseline,
    Finding,
    baseline_days,
    benjamini_hochberg,
    jobs_score,
    rate_score,
)

DAY = date(2026, 11, 24)
MARKETPLACES = ("vinted", "ebay", "etsy")
ACTIONS = ("publish", "update", "sync")


def fleet(tenants: int, seed: int, jobs: int = 60, days: int = 8) -> pd.DataFrame:
    """A quiet fleet: of each tenant about so many jobs on each marketplace, of which one in twenty-five fails."""
    chance = np.random.default_rng(seed)
    dates = [*baseline_days(DAY)[8 - days :], DAY]

    def rows(tenant: str, marketplace: str, action: str, mean: float) -> list[dict[str, Any]]:
        found = []
        for day in dates:
            number = int(chance.poisson(mean * math.exp(0.1 * chance.standard_normal())))
            times = {name: int(chance.binomial(number, 0.05)) for name in ("long_durations", "long_waits")}
            failures = int(chance.binomial(number, 0.04))
            row = {"tenant": tenant, "marketplace": marketplace, "action": action, "date": day, "jobs": number}
            row |= {"failures": failures, "durations": number, "waits": number, **times}
            row |= {f"{usual}p95_{name}_ms": 9_000.0 for usual in ("", "usual_") for name in ("duration", "wait")}
            found.append(row)
        return found

    return pd.DataFrame(
        [
            row
            for key in [
                ("", ALL, ALL, 3.0 * tenants * jobs),
                *(("", m, a, tenants * jobs / 3) for m in MARKETPLACES for a in ACTIONS),
                *((f"user_{t}", m, ALL, jobs) for t in range(tenants) for m in MARKETPLACES),
            ]
            for row in rows(*key)
        ]
    )


def judge(frame: pd.DataFrame, **options: Any) -> tuple[list[Finding], int]:
    return Baseline(frame, DAY).judge(frame[frame["date"] == DAY].reset_index(drop=True), **options)


def put(frame: pd.DataFrame, tenant: str, marketplace: str, action: str = ALL, **values: Any) -> None:
    """Puts these values into the day."""
    frame.loc[
        (frame["tenant"] == tenant)
        & (frame["marketplace"] == marketplace)
        & (frame["action"] == action)
        & (frame["date"] == DAY),
        list(values),
    ] = list(values.values())


def names(findings: list[Finding]) -> set[tuple[str, str, str, str]]:
    return {(one.tenant, one.marketplace, one.action, one.number) for one in findings}


def test_the_tail_of_the_rates_is_exact() -> None:
    """With a = mean * size and b = (1 - mean) * size whole numbers, the beta-binomial is a sum of fractions."""

    def beta(a: int, b: int) -> Fraction:
        return Fraction(math.factorial(a - 1) * math.factorial(b - 1), math.factorial(a + b - 1))

    for hits, trials, a, b in ((3, 10, 1, 9), (7, 7, 2, 2), (1, 30, 2, 38), (25, 40, 3, 17)):
        exact = sum(math.comb(trials, x) * beta(x + a, trials - x + b) / beta(a, b) for x in range(hits, trials + 1))
        score = rate_score(hits, trials, a / (a + b), 1 / (a + b + 1))
        assert score == pytest.approx(-math.log(exact), rel=1e-6)


def test_the_tails_of_the_number_of_jobs_are_exact() -> None:
    """With 1 / scatter a whole number, the negative binomial is a sum of fractions; both tails overlap in one term."""
    for jobs, mean, size in ((9, 3, 2), (0, 20, 4), (40, 12, 5)):

        def mass(x: int, mean: int = mean, size: int = size) -> Fraction:
            return math.comb(x + size - 1, x) * Fraction(mean, mean + size) ** x * Fraction(size, mean + size) ** size

        less = sum(mass(x) for x in range(jobs + 1))
        assert jobs_score(jobs, mean, 1 / size, more=False) == pytest.approx(-math.log(less), rel=1e-6)
        more = 1 - less + mass(jobs)
        assert jobs_score(jobs, mean, 1 / size, more=True) == pytest.approx(-math.log(more), rel=1e-5, abs=1e-9)


@given(st.lists(st.floats(1e-12, 1), min_size=1, max_size=30))
def test_the_false_discovery_rate_is_that_of_benjamini_and_hochberg(p_values: list[float]) -> None:
    """Rejected are the k smallest, with the largest k of which p(k) <= k q / m."""
    adjusted = benjamini_hochberg(-np.log(np.array(p_values)))
    ordered = sorted(p_values)
    for q in (0.05, 0.2):
        rejected = max((k for k, p in enumerate(ordered, start=1) if p <= k * q / len(p_values)), default=0)
        bound = ordered[rejected - 1] if rejected else 0.0
        assert [value <= q * (1 + 1e-9) for value in adjusted] == [p <= bound for p in p_values]


@pytest.mark.parametrize("tenants", [2, 40])
def test_nothing_is_unusual_in_a_quiet_fleet(tenants: int) -> None:
    """Twenty quiet days of two tenants, and of forty: by the bound of 2 % hardly one of them may have a finding."""
    found = [judge(fleet(tenants, seed)) for seed in range(20)]
    assert sum(bool(findings) for findings, _ in found) <= 2
    assert min(tests for _, tests in found) >= 4 * (10 + 3 * tenants) * 0.9


@pytest.mark.parametrize("tenants", [2, 40])
def test_what_is_put_in_is_found(tenants: int) -> None:
    """A tenant whose jobs fail, a marketplace whose jobs wait: both are named, with expected and seen, and no other."""
    frame = fleet(tenants, seed=1)
    put(frame, "user_1", "vinted", failures=30, jobs=60)
    put(frame, "", "etsy", "publish", long_waits=int(tenants * 60 / 3 / 2), p95_wait_ms=40_000.0)
    findings, _ = judge(frame)
    assert names(findings) == {("user_1", "vinted", ALL, SUCCESS), ("", "etsy", "publish", WAIT)}
    of_tenant = next(one for one in findings if one.tenant)
    assert of_tenant.expected == pytest.approx(0.96, abs=0.02) and of_tenant.seen == 0.5
    of_all = next(one for one in findings if not one.tenant)
    assert (of_all.expected, of_all.seen) == (9_000, 40_000)


def test_too_little_to_matter_is_not_found() -> None:
    """Among a million jobs a day, three in a thousand more that fail are far from chance, and nobody is alerted."""
    frame = fleet(2, seed=1)
    is_all = frame["marketplace"] == ALL
    frame.loc[is_all, ["jobs", "durations", "waits"]] = 1_000_000
    frame.loc[is_all, "failures"] = 40_000
    frame.loc[is_all, ["long_durations", "long_waits"]] = 50_000
    put(frame, "", ALL, failures=43_000)
    assert names(judge(frame)[0]) == set()
    put(frame, "", ALL, failures=250_000)
    assert names(judge(frame)[0]) == {("", ALL, ALL, SUCCESS)}


def test_what_all_tenants_do_is_not_said_of_each() -> None:
    """On a holiday, and when a marketplace fails, forty tenants move together: the marketplace is named, not they."""
    frame = fleet(40, seed=2)
    today = frame["date"] == DAY
    is_ebay = frame["marketplace"] == "ebay"
    frame.loc[today & is_ebay, "failures"] = (frame["jobs"] * 0.5).astype(int)
    columns = ["jobs", "failures", "durations", "waits", "long_durations", "long_waits"]
    frame.loc[today, columns] = (frame.loc[today, columns] * 0.5).astype(int)
    found = names(judge(frame)[0])
    assert {one[:3] for one in found if one[3] == SUCCESS} == {("", "ebay", action) for action in ACTIONS}
    assert {one for one in found if one[3] == JOBS} == {("", ALL, ALL, JOBS)}
    assert not [one for one in found if one[0]]


@pytest.mark.parametrize("days", [0, 3])
def test_nothing_is_said_with_fewer_than_four_days_of_history(days: int) -> None:
    """Whatever the day is like: there is nothing to compare it with."""
    frame = fleet(3, seed=1, days=days)
    put(frame, "user_1", "vinted", failures=60, jobs=60)
    assert judge(frame) == ([], 0)


def test_a_tenant_that_came_is_no_surprise() -> None:
    """Who has jobs since three weeks is not tested; days before the first job are no days without jobs."""
    frame = fleet(40, seed=3)
    is_new = (frame["tenant"] == "user_5") & (frame["date"] < DAY - timedelta(weeks=3))
    columns = ["jobs", "failures", "durations", "waits", "long_durations", "long_waits"]
    frame.loc[is_new, columns] = 0
    put(frame, "user_5", "vinted", jobs=300, durations=300, waits=300)
    assert "user_5" not in {one.tenant for one in judge(frame)[0]}


def test_a_past_incident_does_not_hide_the_next() -> None:
    """A baseline day that was an incident itself is left out of the baseline."""
    frame = fleet(40, seed=4)
    frame.loc[
        (frame["tenant"] == "user_1")
        & (frame["marketplace"] == "vinted")
        & (frame["date"] == DAY - timedelta(weeks=3)),
        "failures",
    ] = 50
    put(frame, "user_1", "vinted", failures=30, jobs=60)
    assert names(judge(frame)[0]) == {("user_1", "vinted", ALL, SUCCESS)}


def test_a_stricter_bound_finds_less() -> None:
    """For days that are judged several times."""
    frame = fleet(40, seed=1)
    put(frame, "user_1", "vinted", long_durations=20, durations=60, p95_duration_ms=30_000.0)
    [finding] = judge(frame)[0]
    assert finding.number == DURATION
    assert judge(frame, fdr=finding.q / 2)[0] == []
