"""What the summary makes of the rows of its batches."""

from datetime import date
from typing import Any

import pytest

from assets.marketplace_daily_summary.aggregate import top_reasons

KEY = {"date": date(2026, 1, 15), "marketplace": "ebay", "action_code": "publish"}


def reason(text: str, jobs: int, **others: Any) -> dict[str, Any]:
    return {**KEY, "failure_reason": text, "jobs": jobs, "tenants": 1, **others}


@pytest.mark.parametrize("step", [1, -1])
def test_equally_frequent_reasons_are_in_the_order_of_their_text(step: int) -> None:
    """Whatever batch comes first, so that a replay gives the same rows; each key has its own."""
    rows = [
        *(reason(letter, 2) for letter in "abcdefg"),
        reason("g", 1),
        reason("z", 9, action_code="delete"),
    ]
    found = top_reasons(rows[::step])
    assert [entry["reason"] for entry in found[tuple(KEY.values())]] == ["g", "a", "b", "c", "d"]
    assert found[tuple(KEY.values())][0] == {"reason": "g", "jobs": 3, "tenants": 2}
    assert [entry["reason"] for entry in found[KEY["date"], "ebay", "delete"]] == ["z"]
