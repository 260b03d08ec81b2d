"""From what is known of each database to what stands behind a day over all of them. No I/O."""

from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from datetime import date
from typing import Any

from assets.marketplace_daily_summary.completeness import by_number
from assets.marketplace_daily_summary.table import KEY
from pipelines.completeness import COUNTS

Part = Mapping[str, Any]
"""The `rows` of a database's summary on a day, and the `day` that stands behind them, as they were read: of JSON."""

EVERYBODY = "all of {}"
"""What stands for the tenants of a database of which nothing is known."""


def record_of(parts: Mapping[str, Part], missing: Mapping[str, int], old: Collection[str]) -> dict[str, Any]:
    """The columns of `models.summary.MarketplaceGlobalSummaryDay`, but date and time, from the parts by database.

    `missing`: the databases that should have a part, and how many tenants each is taken for. `old`: those of the parts
    whose database could not be read now.
    """
    counts = Counter({name: sum(part["day"][name] for part in parts.values()) for name in COUNTS})
    for number in missing.values():
        counts.update(tenants_expected=number, tenants_missing=number)
    tenants = sorted((name for part in parts.values() for name in part["day"]["missing_tenants"]), key=by_number)
    return {
        **{name: counts[name] for name in COUNTS},
        "missing_tenants": [*(EVERYBODY.format(name) for name in sorted(missing)), *tenants],
        "job_count": sum(part["day"]["job_count"] for part in parts.values()),
        "missing_databases": sorted(missing),
        "old_databases": sorted(old),
        "tenants_twice": sorted(counted_twice(parts), key=by_number),
    }


def counted_twice(parts: Mapping[str, Part]) -> dict[str, list[str]]:
    """The customers that are in more than one of these databases on a day, with their names.

    The same number alone does not make the same customer, since databases may number their customers by themselves. But
    a copy has the stats rows of the one that it was copied from, and so the time at which they were first written.
    """
    places: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
    for database, part in sorted(parts.items()):
        for customer in zip(part["day"]["active_tenants"], part["day"]["first_written"], strict=True):
            places[customer].append(database)
    return {tenant: databases for (tenant, _), databases in places.items() if len(databases) > 1}


def active_tenants(parts: Mapping[str, Part]) -> set[tuple[str, str]]:
    """Who stands behind the numbers of a day: name, and when it was first written."""
    return {
        customer
        for part in parts.values()
        for customer in zip(part["day"]["active_tenants"], part["day"]["first_written"], strict=True)
    }


def rows_of(day: date, parts: Mapping[str, Part]) -> list[dict[str, Any]]:
    """The summary's rows of these parts, for `aggregate.add_up`."""
    return [row | {"date": day} for part in parts.values() for row in part["rows"]]


def reasons_of(rows: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Their failure reasons, for `aggregate.add_up_reasons`."""
    for row in rows:
        for reason in row["failure_reasons"]:
            yield {**{name: row[name] for name in KEY}, "failure_reason": reason["reason"], **reason}
