"""Promise 18: percentiles over any set of days, actions, marketplaces and tenants are within 1 % of the exact ones."""

import math
import random
from collections.abc import Iterator, Sequence
from datetime import timedelta
from itertools import combinations
from typing import Any

import pandas as pd
import psycopg
import pytest
import sqlalchemy as sa
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines import sketch
from pipelines.database import create_engine
from tests import strategies
from tests.conftest import create_database, run_url
from tests.integration.common import NOON
from tests.integration.test_numbers import FAR_AWAY, fill, window
from tests.integration.test_numbers import compute as compute_tenant
from tests.reference import (
    JOB_COLUMNS,
    KEY,
    PERCENTILES,
    Day,
    exact_percentile,
    frame,
    reference_durations,
    reference_waits,
)

TENANTS = ("user_2", "user_10")
STORED = {
    "duration_ms": ("p50_duration_ms", "p95_duration_ms", "p99_duration_ms"),
    "wait_ms": ("p50_wait_ms", "p95_wait_ms"),
}
"""The percentiles of a row, by what they are of."""
WAIT_COLUMNS = tuple(name.replace("duration", "wait") for name in sketch.COLUMNS)
Shop = tuple[psycopg.Connection[Any], sa.Engine]


@pytest.fixture(scope="module")
def shop(server: str, migrated_template: str) -> Iterator[Shop]:
    """One database for all examples of this module: each example empties the tables first."""
    conninfo = create_database(server, "percentiles", migrated_template)
    engine = create_engine(run_url(conninfo))
    with psycopg.connect(conninfo, autocommit=True) as connection:
        yield connection, engine
    engine.dispose()


def compute(
    shop: Shop, zone: str, days: Sequence[Day], jobs: dict[str, list[dict[str, Any]]]
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Runs the tenants over these jobs; the exact durations and waits, with their tenant."""
    durations, waits = [], []
    for tenant, rows in jobs.items():
        fill(shop[0], tenant, rows, [], [])
        compute_tenant(shop[1], tenant, window(zone, days))
        durations.append(reference_durations(frame(rows, JOB_COLUMNS), days).assign(tenant=tenant))
        waits.append(reference_waits(frame(rows, JOB_COLUMNS), days).assign(tenant=tenant))
    return pd.concat(durations), pd.concat(waits)


def all_rows() -> sa.Subquery:
    """The stored rows of both tenants, as a query would take them together."""
    percentiles = [name for names in STORED.values() for name in names]
    names = (*KEY, "duration_count", "wait_count", *sketch.COLUMNS, *WAIT_COLUMNS, *percentiles)
    parts = []
    for tenant in TENANTS:
        table = sa.table("marketplace_job_stats", *map(sa.column, names), schema=tenant)
        is_ours = table.c.date > sa.literal(FAR_AWAY)
        parts.append(sa.select(sa.literal(tenant).label("tenant"), *table.columns).where(is_ours))
    return sa.union_all(*parts).subquery("stored")


def read(engine: sa.Engine, query: sa.Select[Any]) -> list[dict[str, Any]]:
    with engine.connect() as connection:
        return [dict(row) for row in connection.execute(query).mappings()]


def agree(found: float | None, exact: Sequence[int], name: str) -> bool:
    """Whether a percentile is within 1 % of the exact one."""
    return found is not None and math.isclose(
        found, exact_percentile(exact, PERCENTILES[name[:3]]), rel_tol=0.01 + 1e-9
    )


def check_rows(engine: sa.Engine, values: pd.DataFrame, what: str) -> None:
    """Each stored row has its own percentiles and sketch of durations or waits; null where there are none."""
    count_name = what.replace("_ms", "_count")
    columns = sketch.COLUMNS if what == "duration_ms" else WAIT_COLUMNS
    keys, counts, version = columns
    exact = {key: list(group[what]) for key, group in values.groupby(["tenant", *KEY])}
    for row in read(engine, sa.select(all_rows())):
        of_row = exact.pop((row["tenant"], *(row[name] for name in KEY)), None)
        if of_row is None:
            assert all(row[name] is None for name in (*columns, *STORED[what]))
            continue
        assert row[version] == 1
        assert sum(row[counts]) == row[count_name] == len(of_row)
        assert row[keys] == sorted(set(row[keys]))
        assert all(agree(row[name], of_row, name) for name in STORED[what]), (row, of_row)
    assert exact == {}


def check_merged(engine: sa.Engine, durations: pd.DataFrame, by: Sequence[str]) -> None:
    """The percentiles of groups of rows are those of all their durations, merged in SQL and in pandas."""
    stored = pd.DataFrame(read(engine, sa.select(all_rows())))
    groups = list(durations.groupby(list(by))) if by else [((), durations)]
    exact = {key: list(group["duration_ms"]) for key, group in groups}
    merged = read(engine, sketch.merged(all_rows(), by))
    assert len(merged) == len(exact)
    for row in merged:
        key = tuple(row[name] for name in by)
        values = exact[key]
        rows = stored[(stored[list(by)] == list(key)).all(axis=1)] if by else stored
        counts = sketch.merge(rows)
        assert dict(zip(row["duration_sketch_keys"], row["duration_sketch_counts"], strict=True)) == counts
        assert sum(counts.values()) == len(values)
        for name, q in sketch.PERCENTILES.items():
            assert agree(row[name], values, name), (by, key, row[name], values)
            assert row[name] == pytest.approx(sketch.percentile(counts, *q), rel=1e-12)


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_edges(shop: Shop, data: st.DataObject) -> None:
    """On jobs at the edges of the definitions, each row and the whole are within 1 %."""
    zone, days = data.draw(strategies.windows())
    durations, waits = compute(shop, zone, days, {tenant: data.draw(strategies.jobs(days)) for tenant in TENANTS})
    check_rows(shop[1], durations, "duration_ms")
    check_rows(shop[1], waits, "wait_ms")
    if len(durations):
        check_merged(shop[1], durations, [])


def test_any_set_of_rows(shop: Shop) -> None:
    """On a few thousand durations of every size, each way to put rows together is within 1 %, in SQL and in pandas."""
    random.seed(1)
    days = [strategies.day_of("UTC", NOON.date() + timedelta(shift)) for shift in range(3)]

    def job(number: int) -> dict[str, Any]:
        longest = random.choice((3, 60, 1_000, 60_000, 2**31 - 1))
        end = random.choice(days).start + timedelta(seconds=random.randrange(86_400))
        return {
            "id": number,
            "marketplace": random.choice(("vinted", "ebay", "etsy")),
            "action_type_id": random.choice((1, 1, 2, 3)),
            "status": random.choice(("completed", "failed", "cancelled")),
            "retry_count": 0,
            "started_at": (start := end - timedelta(milliseconds=random.randrange(longest))),
            "completed_at": end,
            "created_at": start - timedelta(milliseconds=random.randrange(longest)),
            "error_message": None,
        }

    durations, waits = compute(shop, "UTC", days, {tenant: [job(n) for n in range(2_000)] for tenant in TENANTS})
    check_rows(shop[1], durations, "duration_ms")
    check_rows(shop[1], waits, "wait_ms")
    columns = ("tenant", "action_type_id", "marketplace", "date")
    sets = [by for size in range(5) for by in combinations(columns, size)]
    assert len(sets) == 16
    for by in sets:
        check_merged(shop[1], durations, by)


def test_every_duration_is_within_one_percent_of_its_bucket(engine: sa.Engine) -> None:
    """The middle of its bucket is at most 1 % away from a duration, from 0 to the longest."""
    values = sorted({*range(20_000), *(2**n + d for n in range(14, 31) for d in (-1, 0, 1)), 2**31 - 1})
    value = sa.func.unnest(sa.cast(values, sa.ARRAY(sa.BigInteger))).column_valued("value")
    query = sa.select(value.label("ms"), sketch.key_of(value).label("key"))
    pair = query.subquery()
    for row in read(engine, sa.select(pair, sketch.middle_of(pair.c.key).label("middle"))):
        assert math.isclose(row["ms"], row["middle"], rel_tol=0.01 + 1e-9), row
        assert row["key"] == (-1 if row["ms"] == 0 else math.ceil(math.log(row["ms"]) / math.log(1.01 / 0.99)))


def test_sketches_of_different_versions_refuse_to_merge(shop: Shop) -> None:
    """Buckets that mean something else are not added up, neither in SQL nor in pandas."""
    connection, engine = shop
    days = [strategies.day_of("UTC", NOON.date())]
    job = {"marketplace": "vinted", "action_type_id": 1, "status": "completed", "completed_at": NOON}
    job |= {"created_at": NOON - timedelta(seconds=3), "error_message": None}
    jobs = [{**job, "id": 1, "retry_count": 0, "started_at": NOON - timedelta(seconds=2)}]
    compute(shop, "UTC", days, dict.fromkeys(TENANTS, jobs))
    connection.execute("UPDATE user_10.marketplace_job_stats SET duration_sketch_version = 2 WHERE date > '2002-01-01'")
    with pytest.raises(sa.exc.DataError, match="sketches do not merge: version 2"):
        read(engine, sketch.merged(all_rows(), []))
    with pytest.raises(ValueError, match=r"sketches of version 1 and \[2\] do not merge"):
        sketch.merge(pd.DataFrame(read(engine, sa.select(all_rows()))))
