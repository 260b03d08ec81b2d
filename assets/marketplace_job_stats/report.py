"""What people see of a run: numbers per day, and tables of the tenants that need a look.

Nothing is decided or computed here; every number comes from the tenants' own transactions.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from datetime import date
from operator import add
from typing import Any

import dagster as dg
import sqlalchemy as sa

from assets.marketplace_job_stats.upsert import DAY_NUMBERS, PROVED, Order, ProofError, TenantResult, TimeZoneError
from pipelines.action_types import UNKNOWN
from pipelines.tenants import Tenant

MOST_ROWS = 20
"""Every row of a table is stored with every event, and Dagit does not page."""

_TOLD = (*DAY_NUMBERS, "tenants_done", "tenants_held_back", "rows_held_back")
"""What is added up for each day over the tenants."""

_REMEDIES = {
    "42501": "migrate it with MIGRATION_DATABASE_URL set, which grants what is missing: see `Roles` in the README",
    "40001": "other sessions were in its way each time: run the tenant again",
    "40P01": "other sessions were in its way each time: run the tenant again",
    "42P01": "only the tenant's own schema is searched, so a trigger, or a function of a view, has to name any other",
    "53300": "the server has no connection left: lower STATS_WORKERS, or raise its max_connections",
    "55P03": "another session kept a lock for longer than STATS_LOCK_TIMEOUT_MS: find it, and run the tenant again",
    "57014": "it took longer than STATS_STATEMENT_TIMEOUT_MS: raise it, or run fewer days at once",
}


def explain(error: Exception) -> str:
    """An error of a tenant as one sentence: the server's first line, the SQLSTATE, and the remedy if one is known."""
    if isinstance(error, ProofError | TimeZoneError):
        return str(error)
    if not isinstance(error, sa.exc.DBAPIError):
        return f"{type(error).__name__}: {error}"
    sqlstate = getattr(error.orig, "sqlstate", None)
    first_line = (str(error.orig).splitlines() or [type(error.orig).__name__])[0]
    remedy = _REMEDIES.get(sqlstate or "")
    if "row-level security" in first_line:
        remedy = "rows would be hidden: give the role BYPASSRLS, or take the policy away"
    return first_line + (f" (SQLSTATE {sqlstate})" if sqlstate else "") + (f": {remedy}" if remedy else "")


class RunReport:
    """Adds up what the tenants' transactions returned; of a tenant that was done, only what has to be named is kept."""

    def __init__(self, order: Order, database: str, action_types: Iterable[sa.Row[Any, Any, Any]]) -> None:
        self.order = order
        self.database = database
        self.done = 0
        self.skipped: dict[str, str] = {}
        self.failed: dict[str, str] = {}
        self._action_codes = {row.id: row.code for row in action_types}
        self._dates = set(order.window.dates)
        self._days: dict[date, list[int]] = defaultdict(lambda: [0] * len(_TOLD))
        self._sums: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0] * len(PROVED))
        # The first of the days that were held back, each with the stored numbers and those of the source.
        self.held_back: list[dict[str, Any]] = []
        self.held_back_count = 0
        self.unproved: set[str] = set()
        self.finished_jobs = 0
        self.uncounted: Counter[str] = Counter()
        self._uncounted_by_tenant: dict[str, Counter[str]] = {}
        self._caught_up: dict[str, list[date]] = {}
        self._rows_changed = 0
        self._tenants_changed = 0

    def add(self, tenant: Tenant, outcome: TenantResult | Tenant | Exception) -> None:
        """Takes the outcome of one tenant: its result, the state that it was found in, or the error."""
        match outcome:
            case TenantResult():
                self.done += 1
                self._add_result(tenant, outcome)
            case Tenant(skipped=str() as reason):
                self.skipped[tenant.schema] = reason
            case Tenant(failed=reason):
                self.failed[tenant.schema] = str(reason)
            case Exception():
                self.failed[tenant.schema] = explain(outcome)
                if isinstance(outcome, ProofError):
                    self.unproved.add(tenant.schema)

    def _add_result(self, tenant: Tenant, result: TenantResult) -> None:
        dates = [day.date for day in result.days]
        told = [self._hold_back(tenant, day) if day.is_held_back else (*day[2:], 1, 0, 0) for day in result.days]
        for day, numbers in zip(dates, told, strict=True):
            self._days[day] = list(map(add, self._days[day], numbers))
        if caught_up := [day for day in dates if day not in self._dates]:
            self._caught_up[tenant.schema] = caught_up
        totals = map(sum, zip(*told, strict=True)) if told else (0,) * len(_TOLD)
        tenant_sums = dict(zip(_TOLD, totals, strict=True))
        changed = _rows_changed(tenant_sums)
        self._rows_changed += changed
        self._tenants_changed += changed > 0
        uncounted = Counter(
            no_end=result.no_end_count,
            unknown_marketplace=tenant_sums["unknown_marketplace_count"],
            bad_duration=_bad_durations(tenant_sums),
        )
        self.finished_jobs += _finished_jobs(tenant_sums) + tenant_sums["unknown_marketplace_count"]
        if uncounted.total():
            self.uncounted += uncounted
            self._uncounted_by_tenant[tenant.schema] = uncounted
        for row in result.sums:
            action = row.marketplace, self._action_codes.get(row.action_type_id, UNKNOWN)
            # A row of the old live counter has nulls.
            stored = [number or 0 for number in row[-len(PROVED) :]]
            self._sums[action] = list(map(add, self._sums[action], stored))

    def _hold_back(self, tenant: Tenant, day: sa.Row[Any]) -> tuple[int, ...]:
        """Notes a day that is held back, and returns its _TOLD: no row was written, the stored ones are kept."""
        self.held_back_count += 1
        numbers: dict[str, int] = dict(zip(DAY_NUMBERS, day[2:], strict=True))
        if len(self.held_back) < MOST_ROWS:
            self.held_back.append(
                {
                    "tenant": tenant.schema,
                    "date": day.date.isoformat(),
                    "stored jobs": day.stored_job_count,
                    "jobs in the source": _finished_jobs(numbers),
                    "stored tasks": day.stored_task_count,
                    "tasks in the source": day.total_tasks,
                }
            )
        return (*(numbers | {"row_count": 0}).values(), 1, 1, day.stored_row_count)

    def day_metadata(self, day: date) -> dict[str, Any]:
        """The numbers of one day over all tenants."""
        sums = dict(zip(_TOLD, self._days[day], strict=True))
        return {
            "dagster/row_count": sums["row_count"] + sums["rows_held_back"],
            "jobs": sums["total_jobs"],
            "failed_jobs": sums["failure_count"],
            "cancelled_or_expired_jobs": sums["cancelled_count"] + sums["expired_count"],
            "tasks": sums["total_tasks"],
            "rows_inserted": sums["inserted"],
            "rows_updated": sums["updated"],
            "rows_deleted": sums["deleted"],
            "rows_unchanged": sums["row_count"] - sums["inserted"] - sums["updated"],
            "unknown_marketplace_jobs": sums["unknown_marketplace_count"],
            "bad_duration_jobs": _bad_durations(sums),
            "tenants_held_back": sums["tenants_held_back"],
            "tenants_done": sums["tenants_done"],
            "tenants_skipped": len(self.skipped),
            "tenants_failed": len(self.failed),
        }

    def run_metadata(self) -> dict[str, Any]:
        """What belongs to the run as a whole; tables are cut after MOST_ROWS rows, the numbers beside them are not."""
        metadata: dict[str, Any] = {
            "run_window": str(self.order.window),
            "run_database": self.database,
            "run_tenants_changed": self._tenants_changed,
            "run_days_changed": sum(
                _rows_changed(dict(zip(_TOLD, day, strict=True))) > 0 for day in self._days.values()
            ),
            "run_days_held_back": self.held_back_count,
            "run_days_caught_up": sum(map(len, self._caught_up.values())),
            "run_preview": table(self._preview()),
            "run_action_count": len(self._sums),
        }
        for name, reasons in (("run_tenants_failed", self.failed), ("run_tenants_skipped", self.skipped)):
            if reasons:
                rows = [{"tenant": schema, "reason": reason} for schema, reason in reasons.items()]
                metadata[name] = table(rows)
        if self.order.count_no_end:
            metadata["run_jobs_without_day"] = self.uncounted["no_end"]
        for name, rows in (
            ("run_held_back", self.held_back),
            ("run_uncounted", self.uncounted_rows()),
            ("run_caught_up", self._caught_up_rows()),
        ):
            if rows:
                metadata[name] = table(rows)
        return metadata

    def uncounted_rows(self) -> list[dict[str, Any]]:
        """How many jobs were left out, by tenant and reason, the most first."""
        worst = sorted(self._uncounted_by_tenant.items(), key=lambda item: -item[1].total())
        return [
            {"tenant": schema, **{name: counts[name] for name in ("unknown_marketplace", "bad_duration", "no_end")}}
            for schema, counts in worst[:MOST_ROWS]
        ]

    def _caught_up_rows(self) -> list[dict[str, Any]]:
        """The tenants for which earlier days were missing, and are there now."""
        return [
            {"tenant": schema, "days": len(dates), "first": str(min(dates)), "last": str(max(dates))}
            for schema, dates in list(self._caught_up.items())[:MOST_ROWS]
        ]

    def _preview(self) -> list[dict[str, Any]]:
        """The stored rows of the computed days, added up over days and tenants, the busiest actions first."""
        named = ((action, dict(zip(PROVED, sums, strict=True))) for action, sums in self._sums.items())
        busiest = sorted(named, key=lambda item: (-item[1]["total_jobs"], item[0]))
        return [
            {
                "marketplace": marketplace,
                "action": action,
                "jobs": sums["total_jobs"],
                "failed": sums["failure_count"],
                "success %": round(100 * sums["success_count"] / sums["total_jobs"], 1) if sums["total_jobs"] else None,
                "mean ms": round(sums["duration_sum_ms"] / sums["duration_count"]) if sums["duration_count"] else None,
                "tasks": sums["total_tasks"],
                "retries": sums["retry_count"],
            }
            for (marketplace, action), sums in busiest[:MOST_ROWS]
        ]

    def summary(self) -> str:
        """The run in one sentence."""
        return (
            f"{self.done} tenants done, {len(self.skipped)} skipped, {len(self.failed)} failed; "
            f"{self._rows_changed} rows changed, {counted(self.held_back_count, 'day')} held back"
        )

    def failure(self) -> str:
        """What to say when tenants failed: how many, and the first few by name with their reason."""
        return f"{self.summary()}. Failed: {first_reasons(self.failed)}."


def _finished_jobs(numbers: Mapping[str, int]) -> int:
    """How many jobs of a known marketplace came to an end, whatever end."""
    return numbers["total_jobs"] + numbers["cancelled_count"] + numbers["expired_count"]


def _bad_durations(numbers: Mapping[str, int]) -> int:
    """How many jobs ran without a duration that counts."""
    return numbers["total_jobs"] - numbers["duration_count"]


def _rows_changed(numbers: Mapping[str, int]) -> int:
    return numbers["inserted"] + numbers["updated"] + numbers["deleted"]


def counted(number: int, noun: str) -> str:
    """`1 day`, `2 days`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def first_reasons(tenants: Mapping[str, str]) -> str:
    """The first few of the tenants with their reason."""
    first = "; ".join(f"{schema}: {reason}" for schema, reason in list(tenants.items())[:3])
    return first + (f"; and {len(tenants) - 3} more" if len(tenants) > 3 else "")


def table(rows: Iterable[Mapping[str, Any]]) -> dg.MetadataValue[Any]:
    records = [dg.TableRecord(dict(row)) for row in list(rows)[:MOST_ROWS]]
    if not records:
        return dg.MetadataValue.text("no rows")
    return dg.MetadataValue.table(records)
