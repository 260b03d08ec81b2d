"""Duration sketches: percentiles that can be merged over days, actions, marketplaces and tenants.

A sketch is a histogram with logarithmic buckets, those of DDSketch (Masson, Rim, Lee, PVLDB 12(12), 2019): a duration
of `ms` falls into the bucket `ceil(log_gamma(ms))`, which holds the durations above `gamma^(key - 1)` up to
`gamma^key`. With `gamma = (1 + a) / (1 - a)`, the middle of a bucket is at most the share `a` away from each of them.
Zero has a bucket of its own. Two arrays hold it, the keys in ascending order and how many durations each has, so equal
durations give equal bytes, whatever their order. To merge is to add up the counts of each key: in SQL `merged`, in
pandas `merge`.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import aggregate_order_by

if TYPE_CHECKING:
    import pandas as pd

ACCURACY = 0.01
"""The share that a percentile may be away from the exact one."""
GAMMA = (1 + ACCURACY) / (1 - ACCURACY)
VERSION = 1
"""Changes with everything that gives a key its meaning; sketches of different versions refuse to merge."""
ZERO_KEY = -1
"""The key of 0 ms. That of 1 ms is 0."""

KEYS, COUNTS, VERSION_COLUMN = "duration_sketch_keys", "duration_sketch_counts", "duration_sketch_version"
COLUMNS = (KEYS, COUNTS, VERSION_COLUMN)
PERCENTILES = {"p50_duration_ms": (1, 2), "p95_duration_ms": (19, 20)}
"""The percentiles by name, each as a fraction, so that ranks are computed in whole numbers."""


def key_of(duration_ms: sa.ColumnElement[int]) -> sa.ColumnElement[int]:
    """The bucket of a duration in whole milliseconds, as SQL; null for null."""
    logarithm = sa.func.ln(sa.cast(duration_ms, sa.Double)) / sa.literal(
        math.log(GAMMA), sa.Double, literal_execute=True
    )
    return sa.case((duration_ms == 0, ZERO_KEY), (duration_ms > 0, sa.cast(sa.func.ceil(logarithm), sa.Integer)))


def middle_of(key: sa.ColumnElement[int]) -> sa.ColumnElement[float]:
    """The duration in milliseconds that stands for a bucket, as SQL."""
    gamma, factor = (sa.literal(x, sa.Double, literal_execute=True) for x in (GAMMA, 2 / (GAMMA + 1)))
    return sa.case((key == ZERO_KEY, 0.0), else_=factor * sa.func.power(gamma, sa.cast(key, sa.Double)))


def arrays(buckets: sa.FromClause) -> list[sa.ColumnElement[Any]]:
    """The sketch as columns of a query over buckets (`key` and `duration_count`, a bigint), one for each key."""
    return [
        sa.func.array_agg(aggregate_order_by(buckets.c.key, buckets.c.key)).label(KEYS),
        sa.func.array_agg(aggregate_order_by(buckets.c.duration_count, buckets.c.key)).label(COUNTS),
        sa.cast(VERSION, sa.SmallInteger).label(VERSION_COLUMN),
    ]


def percentile_keys(key: sa.ColumnElement[int]) -> sa.ColumnElement[Any]:
    """The buckets of PERCENTILES, as an array, from the bucket of each duration. An aggregate, as SQL.

    Its rank is ceil(q n) in doubles. That is exact: where q n is a whole number, the product is rounded to it, for the
    double next to 19/20 is nearer to it than half of what a product can tell apart.
    """
    shares = sa.cast([n / d for n, d in PERCENTILES.values()], sa.ARRAY(sa.Double))
    return sa.type_coerce(sa.func.percentile_disc(shares).within_group(key), sa.ARRAY(sa.Integer))


def percentiles(keys: sa.ColumnElement[Any]) -> list[sa.ColumnElement[Any]]:
    """The percentiles as columns, from a column that `percentile_keys` has made."""
    return [middle_of(keys[place]).label(name) for place, name in enumerate(PERCENTILES, start=1)]


def merged(rows: sa.FromClause, by: Sequence[str]) -> sa.Select[Any]:
    """The sketches of these rows added up: one row for each group of the columns `by`, with its sketch and percentiles.

    A group without durations has no row. The server refuses to merge sketches of another version than this one.
    """
    bucket = sa.func.unnest(rows.c[KEYS], rows.c[COUNTS]).table_valued(
        sa.column("key", sa.Integer), sa.column("bucket_count", sa.BigInteger)
    )
    bucket = bucket.render_derived()
    other = sa.func.max(sa.case((rows.c[VERSION_COLUMN] != VERSION, rows.c[VERSION_COLUMN])))
    buckets = (
        sa.select(
            *(rows.c[name] for name in by),
            # The server's refusal: a text that is no number. Only where there is another version is it evaluated.
            sa.case(
                (other.is_(None), bucket.c.key),
                else_=sa.cast(sa.literal("sketches do not merge: version ") + sa.cast(other, sa.Text), sa.Integer),
            ).label("key"),
            sa.cast(sa.func.sum(bucket.c.bucket_count), sa.BigInteger).label("duration_count"),
        )
        .select_from(rows.join(bucket, sa.true()))
        .group_by(*(rows.c[name] for name in by), bucket.c.key)
        .subquery("buckets")
    )
    group = [buckets.c[name] for name in by]
    running = sa.func.sum(buckets.c.duration_count).over(partition_by=group, order_by=buckets.c.key)
    whole = sa.func.sum(buckets.c.duration_count).over(partition_by=group)
    ranked = sa.select(buckets, running.label("running_count"), whole.label("whole_count")).subquery("ranked")
    columns = arrays(ranked)
    for name, (numerator, denominator) in PERCENTILES.items():
        # The value of rank ceil(q n) lies in the first bucket up to which there are at least q n durations.
        is_reached = denominator * ranked.c.running_count >= numerator * ranked.c.whole_count
        columns.append(middle_of(sa.func.min(ranked.c.key).filter(is_reached)).label(name))
    return sa.select(*(ranked.c[name] for name in by), *columns).group_by(*(ranked.c[name] for name in by))


def merge(sketches: "pd.DataFrame") -> dict[int, int]:
    """The sketches of a frame's rows added up: counts by key, ascending. Raises ValueError for other versions."""
    versions = {int(version) for version in sketches[VERSION_COLUMN].dropna()}
    if versions - {VERSION}:
        raise ValueError(f"sketches of version {VERSION} and {sorted(versions - {VERSION})} do not merge")
    counts: dict[int, int] = {}
    for keys, numbers in zip(sketches[KEYS], sketches[COUNTS], strict=True):
        for key, number in zip(keys or (), numbers or (), strict=True):
            counts[key] = counts.get(key, 0) + number
    return dict(sorted(counts.items()))


def percentile(counts: Mapping[int, int], numerator: int, denominator: int) -> float | None:
    """The percentile numerator / denominator of a merged sketch, in milliseconds; None if it is empty."""
    running, whole = 0, sum(counts.values())
    for key, number in counts.items():
        running += number
        if denominator * running >= numerator * whole:
            return 0.0 if key == ZERO_KEY else 2 / (GAMMA + 1) * GAMMA**key
    return None
