"""The benchmark's comparison finds every planted difference; else a candidate could win by computing less."""

from datetime import date
from typing import Any

import pandas as pd
import pytest

from tests.benchmarks.candidates import EXACT, KEY, PERCENTILES, SKETCH
from tests.benchmarks.compare import differences

DAY, LATER = date(2025, 6, 1), date(2025, 6, 2)
COLUMNS = (*PERCENTILES, *SKETCH)


def rows(**first: Any) -> pd.DataFrame:
    """Two rows, one of them without durations; the first with these values."""
    row: dict[str, Any] = dict(zip(KEY, (DAY, 1, "ebay"), strict=True)) | dict.fromkeys(EXACT, 7)
    row |= {"p50_duration_ms": 1000, "p95_duration_ms": 2000}
    row |= dict(zip(SKETCH, ([1, 2], [3, 4], 1), strict=True))
    other = row | dict.fromkeys((*COLUMNS, "avg_duration_ms")) | {"date": LATER}
    return pd.DataFrame([row | first, other])


def found(frame: pd.DataFrame) -> list[str]:
    return differences(frame, rows(), COLUMNS, DAY, LATER)


def test_equal_rows_in_any_order_do_not_differ() -> None:
    """Nor do percentiles that are as near as a sketch promises."""
    assert found(rows()) == []
    assert found(rows()[::-1]) == []
    assert found(rows(p50_duration_ms=1010.0, p95_duration_ms=1980.0)) == []


@pytest.mark.parametrize("name", EXACT)
def test_every_count_is_compared_exactly(name: str) -> None:
    """By one too much, or null."""
    for value in (8, None):
        [told] = found(rows(**{name: value}))
        assert name in told


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("p50_duration_ms", 1010.1),
        ("p95_duration_ms", 1979.9),
        ("p50_duration_ms", None),
        ("duration_sketch_keys", [1, 3]),
        ("duration_sketch_counts", [4, 3]),
        ("duration_sketch_keys", None),
        ("duration_sketch_version", 2),
    ],
)
def test_percentiles_and_sketches_are_compared(name: str, value: Any) -> None:
    """A percentile that is farther away, another bucket, another count, another version."""
    frame = rows()
    frame.at[0, name] = value
    [told] = found(frame)
    assert name in told


def test_rows_that_are_missing_too_many_or_there_twice_are_found() -> None:
    """And only those of the days are looked at."""
    frame = rows()
    assert "missing" in found(frame[:1])[0]
    assert "too much" in found(pd.concat([frame, frame.assign(marketplace="etsy")]))[0]
    assert "twice" in found(pd.concat([frame, frame]))[0]
    assert differences(frame[:1], frame, COLUMNS, DAY, DAY) == []
