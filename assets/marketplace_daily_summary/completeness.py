"""Which tenants stand behind each day of the summary, and in what state their ledgers were when it was read.

Both come from what is stored, stats and ledgers, whatever has become of the sources. A day whose ledgers are in another
state than the one that was read is summarized again: it does not matter which run changed them, and when.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime
from typing import Any

import sqlalchemy as sa

from assets.marketplace_daily_summary.aggregate import of_each
from models.sources import MarketplaceJob
from models.stats import MarketplaceJobStats, MarketplaceJobStatsDay
from models.summary import MarketplaceDailySummaryDay
from pipelines.action_types import UNKNOWN
from pipelines.tenants import quoted

DAY_COLUMNS = tuple(c.name for c in MarketplaceDailySummaryDay.__table__.columns if c.name != "computed_at")

_stats, _ledger = MarketplaceJobStats.__table__, MarketplaceJobStatsDay.__table__


@dataclass
class Day:
    """What stands behind the summary of a day; see `models.summary` for the columns that it becomes."""

    computed: int = 0
    held_back: int = 0
    open: int = 0
    counter_only: int = 0
    missing: set[str] = field(default_factory=set)
    state: int = 0
    action_types: dict[str, list[str]] = field(default_factory=dict)
    job_count: int = 0
    active: dict[str, datetime] = field(default_factory=dict)

    def record(self, time_zone: str) -> dict[str, Any]:
        """The values of DAY_COLUMNS, without the date."""
        return {
            "tenants_expected": self.computed + self.held_back + self.open + self.counter_only + len(self.missing),
            "tenants_computed": self.computed,
            "tenants_held_back": self.held_back,
            "tenants_open": self.open,
            "tenants_counter_only": self.counter_only,
            "tenants_missing": len(self.missing),
            "missing_tenants": sorted(self.missing, key=by_number),
            "job_count": self.job_count,
            "ledger_state": self.state,
            "action_types": self.action_types,
            "time_zone": time_zone,
            "active_tenants": sorted(self.active, key=by_number),
            "first_written": [self.active[schema] for schema in sorted(self.active, key=by_number)],
        }


def by_number(schema: str) -> tuple[int, str]:
    """Sorts tenants by their numbers."""
    return len(schema), schema


def ledgers_query(schemas: Sequence[str], in_window: bool = False) -> sa.TextClause:
    """The ledgers of these tenants added up: of each date that one of them has, or of those of the window, `computed`,
    `held_back`, `open` and `state`.

    The state is a sum, so that it does not matter in what order, or how many at a time, the tenants are read. It
    changes with every entry that comes, goes or changes, as the entry of each day does whose rows a run has changed.
    """
    columns = ("outcome", "definition", "stored_job_count", "stored_task_count", "row_count", "row_versions")
    entry = f"concat_ws('/', tenant, {', '.join(columns)})"
    return sa.text(f"""
        SELECT CAST(date AS date) AS date,
               count(*) FILTER (WHERE outcome = 'computed') AS computed,
               count(*) FILTER (WHERE outcome = 'held_back') AS held_back,
               count(*) FILTER (WHERE outcome = 'open') AS open,
               CAST(sum(CAST(CAST('x' || substr(md5({entry}), 1, 12) AS bit(48)) AS bigint)) AS bigint) AS state
          FROM ({of_each(schemas, _ledger, ("date", *columns), in_window=in_window)}) AS ledger
         GROUP BY 1""")


def exceptions_query(schemas: Sequence[str], in_window: bool = False) -> sa.TextClause:
    """Of these tenants, the days of the window that the ledger lacks, or whose stored rows are not what it says.

    `date`, `tenant`, `has_entry`, `has_rows`, and `first_date`, the first day of the tenant's ledger, or of what is
    `in_window` of it. A day before it is an exception only if it has rows. Parameters: `dates`, `first_date` and
    `last_date`.
    """
    names = ", ".join(f"('{schema}')" for schema in schemas)
    entry = ("date", "stored_job_count", "stored_task_count")
    columns = ("date", "total_jobs", "cancelled_count", "expired_count", "total_tasks")
    return sa.text(f"""
        WITH ledger AS ({of_each(schemas, _ledger, entry, in_window=in_window)}),
             tenant AS (SELECT name.tenant, min(ledger.date) AS first_date
                          FROM (VALUES {names}) AS name (tenant) LEFT JOIN ledger USING (tenant) GROUP BY 1),
             stored AS (SELECT tenant, date, sum(total_tasks) AS tasks,
                               sum(total_jobs + coalesce(cancelled_count, 0) + coalesce(expired_count, 0)) AS jobs
                          FROM ({of_each(schemas, _stats, columns, in_window=True)}) AS stats GROUP BY 1, 2)
        SELECT day.date, tenant.tenant, ledger.date IS NOT NULL AS has_entry, stored.date IS NOT NULL AS has_rows,
               CAST(tenant.first_date AS date) AS first_date
          FROM unnest(CAST(:dates AS date[])) AS day (date)
         CROSS JOIN tenant
          LEFT JOIN ledger ON ledger.tenant = tenant.tenant AND ledger.date = day.date
          LEFT JOIN stored ON stored.tenant = tenant.tenant AND stored.date = day.date
         WHERE CASE WHEN ledger.date IS NULL
                    THEN stored.date IS NOT NULL OR tenant.first_date < day.date OR tenant.first_date IS NULL
                    ELSE ledger.stored_job_count <> coalesce(stored.jobs, 0)
                         OR ledger.stored_task_count <> coalesce(stored.tasks, 0) END""")


def first_job_query(schema: str) -> sa.TextClause:
    """When the first job of a tenant of which nothing is stored ended, among those from `start` to before `end`.

    The source may be one that no run has read: an instant without a zone is as good as any here.
    """
    return sa.text(f"""
        SELECT CAST(min(completed_at) AS timestamptz) FROM {quoted(schema)}.{MarketplaceJob.__tablename__}
         WHERE completed_at >= :start AND completed_at < :end
           AND CAST(status AS text) IN ('completed', 'failed', 'cancelled', 'expired')""")


def changed_days(
    recorded: Mapping[date, Mapping[str, Any]],
    states: Mapping[date, int],
    action_types: Mapping[int, tuple[str, str]],
    unread: Collection[str],
) -> dict[date, str]:
    """The days whose summary is not what would be read now, with the reason.

    `recorded` are the DAY_COLUMNS of the summary's days, and the `stored_job_count` of its rows; `states` those of the
    ledgers of all tenants but `unread`. A day in which one of these may have a part cannot be judged, and stays.
    """
    changed: dict[date, str] = {}
    for day in sorted(recorded.keys() | states.keys()):
        record = recorded.get(day)
        if record is None or record["ledger_state"] is None:
            changed[day] = "it was not summarized yet"
        elif not set(unread).issubset(record["missing_tenants"]):
            continue
        elif record["ledger_state"] != states.get(day, 0):
            changed[day] = "the ledgers have changed since it was read"
        elif record["job_count"] != record["stored_job_count"]:
            changed[day] = "somebody else has changed its rows"
        elif any(
            list(action_types.get(int(id_), (UNKNOWN, UNKNOWN))) != names
            for id_, names in record["action_types"].items()
        ):
            changed[day] = "an action has another name since"
    return changed
