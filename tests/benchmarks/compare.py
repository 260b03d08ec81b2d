"""Compares what a candidate left with what is right, cell by cell: who computes something else is not measured."""

from collections.abc import Sequence

import pandas as pd

from tests.benchmarks.candidates import EXACT, KEY, PERCENTILES, SKETCH

ACCURACY = 0.01
"""The share that a percentile may be away from the exact one: what a sketch promises."""
TOLD = 5
"""How many differences are told, at most."""


def differences(
    found: pd.DataFrame, right: pd.DataFrame, columns: Sequence[str], first: object, last: object
) -> list[str]:
    """What is different, as sentences. The frames have KEY, EXACT, and `columns`: what the candidate computes beyond
    EXACT. Rows of other days are ignored.
    """
    found, right = (_by_key(frame, first, last) for frame in (found, right))
    odd = found.index.symmetric_difference(right.index)
    told = [f"{key}: {'too much' if key in found.index else 'missing'}" for key in odd[:TOLD]]
    if found.index.has_duplicates:
        told.append("a key is there twice")
    if told:
        return told
    for name in (*EXACT, *columns):
        mine, true = found[name], right[name]
        if name in SKETCH[:2]:  # Arrays; null where there is no duration.
            mine, true = (values.map(lambda array: array if isinstance(array, list) else []) for values in (mine, true))
            wrong = mine.map(str) != true.map(str)
        else:
            mine, true = (pd.to_numeric(values).astype("float64") for values in (mine, true))
            # The last bits of a double may differ at the very limit.
            distance = true.abs() * (ACCURACY + 1e-9) if name in PERCENTILES else 0.0
            wrong = ~((mine - true).abs() <= distance) & ~(mine.isna() & true.isna())
        told += [f"{key}: {name} is {mine[key]}, not {true[key]}" for key in right.index[wrong]]
    return told[:TOLD]


def _by_key(frame: pd.DataFrame, first: object, last: object) -> pd.DataFrame:
    frame = frame[(frame["date"] >= first) & (frame["date"] <= last)]
    return frame.set_index(list(KEY)).sort_index()
