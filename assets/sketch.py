"""Sketches of durations and waits: percentiles that can be merged over days, actions, marketplaces and tenants.

A sketch is a histogram with logarithmic buckets, those of DDSketch (Masson, Rim, Lee, PVLDB 12(12), 2019): a value of
`ms` falls into the bucket `ceil(log_gamma(ms))`, which holds the values above `gamma^(key - 1)` up to `gamma^key`. With
`gamma = (1 + a) / (1 - a)`, the middle of a bucket is at most the share `a` away from each of them. Zero has a bucket
of its own. Two arrays hold it, the keys in ascending order and how many values each has, so equal values give equal
bytes, whatever their order. To merge is to add up the counts of each key: in SQL `merged`, in pandas `merge`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import aggregate_order_by

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

ACCURACY = 0.01
"""The share that a percentile may be away from the exact one."""
GAMMA = (1 + ACCURACY) / (1 - ACCURACY)
VERSION = 1
"""Changes with everything that gives a key its meaning; sketches of different versions refuse to merge."""
ZERO_KEY = -1
"""The key of 0 ms. That of 1 ms is 0."""
_KEY_SPAN = math.ceil(31 * math.log(2, GAMMA)) - ZERO_KEY + 1
"""How many keys there are, up to that of 2^31 ms."""


def bucket(ms: str) -> str:
    """The key of a value in whole milliseconds, as SQL, from SQL; null for null."""
    return (
        f"CASE WHEN {ms} > 0 THEN ceil(ln({ms}::float8) / {math.log(GAMMA)!r}::float8)::integer "
        f"WHEN {ms} = 0 THEN {ZERO_KEY} END"
    )


def middle(key: str) -> str:
    """The value in milliseconds that stands for a bucket, as SQL, from SQL; null for null."""
    return (
        f"CASE WHEN {key} = {ZERO_KEY} THEN 0::float8 "
        f"WHEN {key} >= 0 THEN {2 / (GAMMA + 1)!r}::float8 * power({GAMMA!r}::float8, {key}::float8) END"
    )


def middle_of(key: sa.ColumnElement[int]) -> sa.ColumnElement[float]:
    """The same for a column, where there is a bucket."""
    gamma, factor = (sa.literal(x, sa.Double, literal_execute=True) for x in (GAMMA, 2 / (GAMMA + 1)))
    return sa.case((key == ZERO_KEY, 0.0), else_=factor * sa.func.power(gamma, sa.cast(key, sa.Double)))


def percentile(counts: Mapping[int, int], numerator: int, denominator: int) -> float | None:
    """The percentile numerator / denominator of a merged sketch, in milliseconds; None if it is empty."""
    running, whole = 0, sum(counts.values())
    for key, number in counts.items():
        running += number
        if denominator * running >= numerator * whole:
            return 0.0 if key == ZERO_KEY else 2 / (GAMMA + 1) * GAMMA**key
    return None


@dataclass(frozen=True)
class Measure:
    """A time in milliseconds that is known of each job, with the names of its columns in the stats and the summary."""

    name: str
    percentiles: Mapping[str, tuple[int, int]]
    """The percentiles by column, each as a fraction, so that ranks are computed in whole numbers."""

    @property
    def count(self) -> str:
        return f"{self.name}_count"

    @property
    def sum(self) -> str:
        return f"{self.name}_sum_ms"

    @property
    def mean(self) -> str:
        return f"avg_{self.name}_ms"

    @property
    def keys(self) -> str:
        return f"{self.name}_sketch_keys"

    @property
    def counts(self) -> str:
        return f"{self.name}_sketch_counts"

    @property
    def version(self) -> str:
        return f"{self.name}_sketch_version"

    @property
    def sketch(self) -> tuple[str, str, str]:
        """The columns that hold the sketch."""
        return self.keys, self.counts, self.version

    @property
    def statistics(self) -> tuple[str, ...]:
        """The columns that do not add up over rows, but come from those that do."""
        return self.mean, *self.percentiles

    def arrays(self, buckets: sa.FromClause) -> list[sa.ColumnElement[Any]]:
        """The sketch as columns of a query over buckets (`key` and `bucket_count`, a bigint), one for each key."""
        return [
            sa.func.array_agg(aggregate_order_by(buckets.c.key, buckets.c.key)).label(self.keys),
            sa.func.array_agg(aggregate_order_by(buckets.c.bucket_count, buckets.c.key)).label(self.counts),
            sa.cast(VERSION, sa.SmallInteger).label(self.version),
        ]

    def merged(self, rows: sa.FromClause, by: Sequence[str]) -> sa.Select[Any]:
        """The sketches of these rows merged: one row for each group of the columns `by`, with sketch and percentiles.

        A group without values has no row. The server refuses to merge sketches of another version than this one.
        """
        bucket = sa.func.unnest(rows.c[self.keys], rows.c[self.counts]).table_valued(
            sa.column("key", sa.Integer), sa.column("bucket_count", sa.BigInteger)
        )
        bucket = bucket.render_derived(name=f"{self.name}_bucket")
        version = rows.c[self.version]
        other = sa.func.max(sa.case((version != VERSION, version)))
        buckets = (
            sa.select(
                *(rows.c[name] for name in by),
                # The server's refusal: a text that is no number. It is evaluated only where there is another version.
                sa.case(
                    (other.is_(None), bucket.c.key),
                    else_=sa.cast(sa.literal("sketches do not merge: version ") + sa.cast(other, sa.Text), sa.Integer),
                ).label("key"),
                sa.cast(sa.func.sum(bucket.c.bucket_count), sa.BigInteger).label("bucket_count"),
            )
            .select_from(rows.join(bucket, sa.true()))
            .group_by(*(rows.c[name] for name in by), bucket.c.key)
            .subquery(f"{self.name}_buckets")
        )
        group = [buckets.c[name] for name in by]
        running = sa.func.sum(buckets.c.bucket_count).over(partition_by=group, order_by=buckets.c.key)
        whole = sa.func.sum(buckets.c.bucket_count).over(partition_by=group)
        ranked = sa.select(buckets, running.label("running_count"), whole.label("whole_count")).subquery(
            f"{self.name}_ranked"
        )
        columns = self.arrays(ranked)
        for name, (numerator, denominator) in self.percentiles.items():
            # The value of rank ceil(q n) lies in the first bucket up to which there are at least q n values.
            is_reached = denominator * ranked.c.running_count >= numerator * ranked.c.whole_count
            columns.append(middle_of(sa.func.min(ranked.c.key).filter(is_reached)).label(name))
        return sa.select(*(ranked.c[name] for name in by), *columns).group_by(*(ranked.c[name] for name in by))

    def _check_versions(self, rows: "pd.DataFrame") -> None:
        versions = {int(version) for version in rows[self.version].dropna()}
        if versions - {VERSION}:
            raise ValueError(f"sketches of version {VERSION} and {sorted(versions - {VERSION})} do not merge")

    def histograms(self, rows: "pd.DataFrame", groups: "np.ndarray", group_count: int) -> "np.ndarray":
        """The merged sketches of each group of a frame's rows: a line for each group, a column for each key.

        `groups` has the number of each row's group, from 0. Raises ValueError for other versions.
        """
        import numpy as np  # Not for every import.

        self._check_versions(rows)
        keys, counts = ([entries or () for entries in rows[name]] for name in (self.keys, self.counts))
        place = np.repeat(groups, [len(entries) for entries in keys]) * _KEY_SPAN - ZERO_KEY
        place += np.fromiter(chain.from_iterable(keys), np.int64, len(place))
        count = np.fromiter(chain.from_iterable(counts), np.float64, len(place))  # Exact up to 2^53.
        found = np.bincount(place, count, group_count * _KEY_SPAN)
        return found.astype(np.int64).reshape(group_count, _KEY_SPAN)

    def percentiles_of(self, histograms: "np.ndarray") -> dict[str, list[float | None]]:
        """The percentiles of each line of `histograms`, by column; None where it is empty. See `percentile`."""
        running = histograms.cumsum(axis=1)
        whole = running[:, -1:]
        found = {}
        for name, (numerator, denominator) in self.percentiles.items():
            first = (denominator * running >= numerator * whole).argmax(axis=1) + ZERO_KEY
            found[name] = [
                (0.0 if key == ZERO_KEY else 2 / (GAMMA + 1) * GAMMA ** int(key)) if count else None
                for key, count in zip(first, whole[:, 0], strict=True)
            ]
        return found

    def merge(self, rows: "pd.DataFrame") -> dict[int, int]:
        """The sketches of a frame's rows merged: counts by key, ascending. Raises ValueError for other versions."""
        self._check_versions(rows)
        counts: dict[int, int] = {}
        for keys, numbers in zip(rows[self.keys], rows[self.counts], strict=True):
            for key, number in zip(keys or (), numbers or (), strict=True):
                counts[key] = counts.get(key, 0) + number
        return dict(sorted(counts.items()))

    def add_up(self, rows: "pd.DataFrame") -> dict[str, Any]:
        """All columns of the measure, of a frame's rows together; null where there is no value."""
        count, total = int(rows[self.count].sum()), int(rows[self.sum].sum())
        merged = self.merge(rows)
        return {
            self.count: count,
            self.sum: total,
            # Halves away from zero, in whole numbers.
            self.mean: (2 * total + count) // (2 * count) if count else None,
            **{name: percentile(merged, *fraction) for name, fraction in self.percentiles.items()},
            self.keys: list(merged) or None,
            self.counts: list(merged.values()) or None,
            self.version: VERSION if merged else None,
        }


DURATION = Measure("duration", {"p50_duration_ms": (1, 2), "p95_duration_ms": (19, 20), "p99_duration_ms": (99, 100)})
WAIT = Measure("wait", {"p50_wait_ms": (1, 2), "p95_wait_ms": (19, 20)})
MEASURES = (DURATION, WAIT)
