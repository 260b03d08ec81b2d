"""How complete the numbers of a day are, in words: for the report and the command line. No I/O.

A record is a row of `models.summary.MarketplaceDailySummaryDay`, or of the global one, as a mapping; None of a day that
is not there.
"""

from collections.abc import Iterable, Mapping
from datetime import date
from typing import Any

MOST_NAMES = 5
"""How many missing tenants are named."""

OUTCOMES = ("computed", "held_back", "open", "counter_only", "missing")
"""What a tenant may be on a day on which it is expected."""
COUNTS = ("tenants_expected", *(f"tenants_{outcome}" for outcome in OUTCOMES))

Record = Mapping[str, Any]


def is_complete(record: Record | None) -> bool:
    """Whether a day may be compared with others: for every expected tenant it was computed, or held back."""
    return (
        record is not None
        and bool(record["tenants_expected"])
        and not record["tenants_missing"]
        and not record["tenants_open"]
        and not record["tenants_counter_only"]
        and not record.get("old_databases")
        and not record.get("tenants_twice")
    )


def describe(record: Record | None) -> str:
    """What stands behind a day: `2 of 3 tenants computed; 1 missing: user_7`."""
    if record is None or record["tenants_expected"] is None:
        return "not summarized yet"
    if not record["tenants_expected"]:
        return "no tenant computed"
    parts = [f"{record['tenants_computed']:,} of {record['tenants_expected']:,} tenants computed"]
    if record["tenants_held_back"]:
        parts.append(f"{record['tenants_held_back']:,} held back")
    if record["tenants_open"]:
        parts.append(f"{record['tenants_open']:,} not yet for the whole day")
    if record["tenants_counter_only"]:
        parts.append(f"{record['tenants_counter_only']:,} from the old counter only")
    if record["tenants_missing"]:
        names = record["missing_tenants"]
        more = f" and {len(names) - MOST_NAMES:,} more" if len(names) > MOST_NAMES else ""
        parts.append(f"{record['tenants_missing']:,} missing: {', '.join(names[:MOST_NAMES])}{more}")
    if record.get("old_databases"):
        parts.append(f"as last seen, since they could not be read: {', '.join(record['old_databases'])}")
    if record.get("tenants_twice"):
        parts.append(f"as before, since two databases count {', '.join(record['tenants_twice'][:MOST_NAMES])}")
    return "; ".join(parts)


def notes(days: Iterable[date], records: Mapping[date, Record]) -> list[str]:
    """A sentence for each chain of these days, in order, that is not complete or has something to say."""
    found: list[tuple[date, date, str]] = []
    for day in days:
        record = records.get(day)
        if is_complete(record) and not (record and record["tenants_held_back"]):
            continue
        text = describe(record)
        if found and found[-1][2] == text and (day - found[-1][1]).days == 1:
            found[-1] = (found[-1][0], day, text)
        else:
            found.append((day, day, text))
    return [f"{first}{f' to {last}' if last > first else ''}: {text}." for first, last, text in found]
