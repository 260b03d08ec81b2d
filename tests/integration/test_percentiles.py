"""Promise 18: percentiles over any set of days, actions, marketplaces and tenants are within 1 % of the exact ones."""

import math
import random
from collections.abc import Iterator, Sequence
from datetime import timedelta
from fractions import Fraction
from itertools import combinations
from typing import Any

import dagster as dg
import pandas as pd
import psycopg
import pytest
import sqlalchemy as sa
from hypothesis import given, settings
from hypothesis import strategies as st

from assets.marketplace_job_stats.transaction import ComputeSpec, write_tenant
from assets.sketch import MEASURES, bucket, middle, middle_of, percentile
from pipelines.database import create_engine
from pipelines.partitions import Days, Window
from tests import application, strategies
from tests.conftest import create_database, run_url
from tests.integration.common import NOON
from tests.reference import (
    JOB_COLUMNS,
    KEY,
    Day,
    exact_percentile,
    frame,
    reference_durations,
    reference_waits,
)

TENANTS = ("user_2", "user_10")
Q = {
    "p50_duration_ms": Fraction(1, 2),
    "p95_duration_ms": Fraction(95, 100),
    "p99_duration_ms": Fraction(99, 100),
    "p50_wait_ms": Fraction(1, 2),
    "p95_wait_ms": Fraction(95, 100),
}
Shop = tuple[psycopg.Connection[Any], sa.Engine]


@pytest.fixture(scope="module")
def shop(server: str, migrated_template: str) -> Iterator[Shop]:
    """One database for all examples of this module: each example empties the tables first."""
    conninfo = create_database(server, "percentiles", migrated_template)
    engine = create_engine(run_url(conninfo))
    with psycopg.connect(conninfo, autocommit=True) as connection:
        yield connection, engine
    engine.dispose()


TABLES = ("jobs", "job_facts", "job_stats", "job_stats_days", "job_stats_changes")
Times = dict[str, pd.DataFrame]
"""For each measure, the exact value of each job that has one: tenant, KEY, and `ms`."""


def compute(shop: Shop, zone: str, days: Sequence[Day], jobs: dict[str, list[dict[str, Any]]]) -> Times:
    """Runs the tenants over these jobs, and nothing else."""
    spec = ComputeSpec(
        Window(tuple(day.date for day in days), tuple(day.start for day in days), days[-1].end, zone),
        "test",
        Days(dg.DailyPartitionsDefinition("2020-01-01", timezone=zone)),
    )
    found: dict[str, list[pd.DataFrame]] = {measure.name: [] for measure in MEASURES}
    for tenant, rows in jobs.items():
        with shop[0].transaction():
            for table in TABLES:
                shop[0].execute(f"DELETE FROM {tenant}.marketplace_{table}".encode())
            application.insert(shop[0], tenant, "marketplace_jobs", rows)
        with shop[1].connect() as connection:
            write_tenant(connection, tenant, spec, has_tasks=True)
        for name, reference in (("duration", reference_durations), ("wait", reference_waits)):
            of_tenant = reference(frame(rows, JOB_COLUMNS), days).assign(tenant=tenant)
            found[name].append(of_tenant.rename(columns={f"{name}_ms": "ms"}))
    return {name: pd.concat(frames) for name, frames in found.items()}


def all_rows() -> sa.Subquery:
    """The stored rows of both tenants, as a query would take them together."""
    names = [name for measure in MEASURES for name in (measure.count, *measure.sketch, *measure.percentiles)]
    parts = []
    for tenant in TENANTS:
        table = sa.table("marketplace_job_stats", *map(sa.column, (*KEY, *names)), schema=tenant)
        parts.append(sa.select(sa.literal(tenant).label("tenant"), *table.columns))
    return sa.union_all(*parts).subquery("stored")


def read(engine: sa.Engine, query: sa.Select[Any]) -> list[dict[str, Any]]:
    with engine.connect() as connection:
        return [dict(row) for row in connection.execute(query).mappings()]


def agree(found: float | None, exact: Sequence[int], name: str) -> bool:
    """Whether a percentile is within 1 % of the exact one."""
    return found is not None and math.isclose(found, exact_percentile(exact, Q[name]), rel_tol=0.01 + 1e-9)


def check_rows(engine: sa.Engine, times: Times) -> None:
    """Each stored row has its own percentiles and sketches; null where there is no value."""
    stored = read(engine, sa.select(all_rows()))
    for measure in MEASURES:
        exact = {key: list(group["ms"]) for key, group in times[measure.name].groupby(["tenant", *KEY])}
        for row in stored:
            values = exact.pop((row["tenant"], *(row[name] for name in KEY)), None)
            if values is None:
                assert {row[name] for name in (*measure.sketch, *measure.percentiles)} == {None}
                continue
            assert row[measure.version] == 1
            assert sum(row[measure.counts]) == row[measure.count] == len(values)
            assert row[measure.keys] == sorted(set(row[measure.keys]))
            assert all(agree(row[name], values, name) for name in measure.percentiles), (row, values)
        assert exact == {}


def check_merged(engine: sa.Engine, times: Times, by: Sequence[str]) -> None:
    """The percentiles of groups of rows are those of all their jobs, merged in SQL and in pandas."""
    stored = pd.DataFrame(read(engine, sa.select(all_rows())))
    for measure in MEASURES:
        of_jobs = times[measure.name]
        if of_jobs.empty:
            continue
        groups = list(of_jobs.groupby(list(by))) if by else [((), of_jobs)]
        exact = {key: list(group["ms"]) for key, group in groups}
        merged = read(engine, measure.merged(all_rows(), by))
        assert len(merged) == len(exact)
        for row in merged:
            key = tuple(row[name] for name in by)
            values = exact[key]
            rows = stored[(stored[list(by)] == list(key)).all(axis=1)] if by else stored
            counts = measure.merge(rows)
            assert dict(zip(row[measure.keys], row[measure.counts], strict=True)) == counts
            assert sum(counts.values()) == len(values)
            for name, q in measure.percentiles.items():
                assert agree(row[name], values, name), (by, key, row[name], values)
                assert row[name] == pytest.approx(percentile(counts, *q), rel=1e-12)


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_edges(shop: Shop, data: st.DataObject) -> None:
    """On jobs at the edges of the definitions, each row and the whole are within 1 %."""
    zone, days = data.draw(strategies.windows())
    times = compute(shop, zone, days, {tenant: data.draw(strategies.jobs(days)) for tenant in TENANTS})
    check_rows(shop[1], times)
    check_merged(shop[1], times, [])


def test_any_set_of_rows(shop: Shop) -> None:
    """On a few thousand times of every size, each way to put rows together is within 1 %, in SQL and in pandas."""
    random.seed(1)
    days = [strategies.day_of("UTC", NOON.date() + timedelta(shift)) for shift in range(3)]

    def job(number: int) -> dict[str, Any]:
        longest = random.choice((3, 60, 1_000, 60_000, 2**31 - 1))
        end = random.choice(days).start + timedelta(seconds=random.randrange(86_400))
        start = end - timedelta(milliseconds=random.randrange(longest))
        return {
            "id": number,
            "marketplace": random.choice(("vinted", "ebay", "etsy")),
            "action_type_id": random.choice((1, 1, 2, 3)),
            "status": random.choice(("completed", "failed", "cancelled")),
            "retry_count": 0,
            "error_message": None,
            "created_at": start - timedelta(milliseconds=random.randrange(random.choice((3, 60, 60_000, 2**31 - 1)))),
            "started_at": start,
            "completed_at": end,
        }

    times = compute(shop, "UTC", days, {tenant: [job(n) for n in range(2_000)] for tenant in TENANTS})
    check_rows(shop[1], times)
    columns = ("tenant", "action_type_id", "marketplace", "date")
    sets = [by for size in range(5) for by in combinations(columns, size)]
    assert len(sets) == 16
    for by in sets:
        check_merged(shop[1], times, by)


def test_every_duration_is_within_one_percent_of_its_bucket(engine: sa.Engine) -> None:
    """The middle of its bucket is at most 1 % away from a duration, from 0 to the longest."""
    values = sorted({*range(20_000), *(2**n + d for n in range(14, 31) for d in (-1, 0, 1)), 2**31 - 1})
    value = sa.func.unnest(sa.cast(values, sa.ARRAY(sa.BigInteger))).column_valued("value")
    pair = sa.select(value.label("ms"), sa.literal_column(bucket("value"), sa.Integer).label("key")).subquery("pair")
    text = sa.literal_column(middle("pair.key"), sa.Double).label("text")
    for row in read(engine, sa.select(pair, middle_of(pair.c.key).label("middle"), text)):
        assert row["middle"] == row["text"]
        assert math.isclose(row["ms"], row["middle"], rel_tol=0.01 + 1e-9), row
        assert row["key"] == (-1 if row["ms"] == 0 else math.ceil(math.log(row["ms"]) / math.log(1.01 / 0.99)))


def test_sketches_of_different_versions_refuse_to_merge(shop: Shop) -> None:
    """Buckets that mean something else are not added up, neither in SQL nor in pandas."""
    connection, engine = shop
    days = [strategies.day_of("UTC", NOON.date())]
    job = {"marketplace": "vinted", "action_type_id": 1, "status": "completed", "completed_at": NOON}
    times = {"created_at": NOON - timedelta(seconds=3), "started_at": NOON - timedelta(seconds=2)}
    jobs = [{**job, **times, "id": 1, "retry_count": 0, "error_message": None}]
    compute(shop, "UTC", days, dict.fromkeys(TENANTS, jobs))
    for measure in MEASURES:
        connection.execute(f"UPDATE user_10.marketplace_job_stats SET {measure.version} = 2".encode())
        with pytest.raises(sa.exc.DataError, match="sketches do not merge: version 2"):
            read(engine, measure.merged(all_rows(), []))
        with pytest.raises(ValueError, match=r"sketches of version 1 and \[2\] do not merge"):
            measure.merge(pd.DataFrame(read(engine, sa.select(all_rows()))))
