"""What people see of a run: numbers per day, and tables of the tenants that need a look.

Nothing is decided or computed here; every number comes from the tenants' own transactions.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from datetime import date
from operator import add
from typing import Any

from assets.marketplace_job_stats.stats import COUNTS
from assets.marketplace_job_stats.transaction import REASONS, ComputeSpec, Day, ProofError, TenantResult
from assets.reporting import MOST_ROWS, counted, explain, first_reasons, table
from pipelines.action_types import UNKNOWN
from pipelines.tenants import Tenant

_OF_RUN = ("inserted", "updated", "deleted", "rows_done", "tenants_done")
_ADDED_UP = (*COUNTS, *REASONS, "row_count", "tenants_computed", "tenants_held_back", "tenants_open", *_OF_RUN)
"""What is added up for each day over the tenants: what is stored, and what the run did."""


class RunReport:
    """Adds up what the tenants' transactions returned; of a tenant that was done, only what has to be named is kept."""

    def __init__(self, spec: ComputeSpec, database: str, action_types: Mapping[int, tuple[str, str]] | None) -> None:
        """`action_types`: as of `pipelines.action_types`; None if their names could not be read."""
        self.spec = spec
        self.database = database
        self.done = 0
        self.skipped: dict[str, str] = {}
        self.failed: dict[str, str] = {}
        # Those that were not computed, but may have something stored; and those of them that could not be read.
        self.left: list[Tenant] = []
        self.unread: dict[str, str] = {}
        self._action_types = action_types
        self._dates = set(spec.window.dates)
        self._days: dict[date, list[int]] = defaultdict(lambda: [0] * len(_ADDED_UP))
        self._sums: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0] * len(COUNTS))
        # The first of the days that were held back, each with the stored numbers and those of the facts.
        self.held_back: list[dict[str, Any]] = []
        self.held_back_count = 0
        self.unproved: set[str] = set()
        self.finished_jobs = 0
        self.uncounted: Counter[str] = Counter()
        self._uncounted_rows: Counter[tuple[str, str, str, str]] = Counter()
        self._caught_up: dict[str, list[date]] = {}
        self._other_days: dict[str, list[date]] = {}
        self._rows_changed = 0
        self._tenants_changed = 0
        self.change_count = 0
        self._changes: list[dict[str, Any]] = []

    def add(self, tenant: Tenant, outcome: TenantResult | Tenant | Exception) -> None:
        """Takes the outcome of one tenant: its result, the state that it was found in, or the error."""
        match outcome:
            case TenantResult():
                self.done += 1
                self._add_result(tenant, outcome)
            case Tenant(skipped=str() as reason):
                self.skipped[tenant.schema] = reason
                self.left.append(outcome)
            case Tenant(failed=reason):
                self.failed[tenant.schema] = str(reason)
                self.left.append(outcome)
            case Exception():
                self.failed[tenant.schema] = explain(outcome)
                self.left.append(tenant)
                if isinstance(outcome, ProofError):
                    self.unproved.add(tenant.schema)

    def add_stored(self, tenant: Tenant, outcome: Mapping[date, Day] | Exception) -> None:
        """Takes what is stored for a tenant that the run has not computed, or the error."""
        if isinstance(outcome, Exception):
            self.unread[tenant.schema] = explain(outcome)
            return
        for day in outcome.keys() & self._dates:
            self._add_day(day, outcome[day], (0,) * len(_OF_RUN))

    def _add_day(self, day: date, it: Day, of_run: Sequence[int]) -> None:
        outcomes = tuple(int(it.entry == outcome) for outcome in ("computed", "held_back", "open"))
        self._days[day] = list(map(add, self._days[day], (*it.sums, *it.uncounted, it.row_count, *outcomes, *of_run)))

    def _add_result(self, tenant: Tenant, result: TenantResult) -> None:
        for day, it in result.days.items():
            self._add_day(day, it, (*result.written.get(day, (0, 0, 0)), it.row_count, 1))
            self.finished_jobs += it.job_count or 0
            if it.entry == "held_back":
                self._hold_back(tenant, day, it)
        # Days that were not due are stored all the same.
        self.add_stored(tenant, {day: it for day, it in result.stored.items() if day not in result.days})
        changed = sum(map(sum, result.written.values()))
        self._rows_changed += changed
        self._tenants_changed += changed > 0
        if caught_up := sorted(result.days.keys() - self._dates):
            self._caught_up[tenant.schema] = caught_up
        if others := sorted(result.written.keys() - result.days.keys()):
            self._other_days[tenant.schema] = others
        for (reason, marketplace, action_type_id), count in result.uncounted.items():
            self.uncounted[reason] += count
            self._uncounted_rows[tenant.schema, reason, marketplace, self._action(action_type_id)] += count
        for (marketplace, action_type_id), sums in result.sums.items():
            action = marketplace, self._action(action_type_id)
            self._sums[action] = list(map(add, self._sums[action], sums))
        self.change_count += result.change_count
        self._changes += [{"tenant": tenant.schema, **change} for change in result.changes]
        self._changes = sorted(self._changes, key=_difference, reverse=True)[:MOST_ROWS]

    def _action(self, action_type_id: int) -> str:
        if self._action_types is None:
            return f"action {action_type_id}"
        return self._action_types.get(action_type_id, (UNKNOWN, UNKNOWN))[0]

    def _hold_back(self, tenant: Tenant, day: date, it: Day) -> None:
        self.held_back_count += 1
        if len(self.held_back) < MOST_ROWS:
            stored = dict(zip(COUNTS, it.sums, strict=True))
            self.held_back.append(
                {
                    "tenant": tenant.schema,
                    "date": day.isoformat(),
                    "stored jobs": _finished_jobs(stored),
                    "jobs in the facts": it.job_count,
                }
            )

    def day_metadata(self, day: date, of_all: bool = True) -> dict[str, Any]:
        """The numbers of one day: what is stored for all tenants, and under `run_` what the run did.

        If what is stored for a tenant could not be read, nothing is said of all of them: plots would dip. Of a run of
        some tenants, all is under `run_`.
        """
        sums = dict(zip(_ADDED_UP, self._days[day], strict=True))
        stored = {
            "jobs": sums["total_jobs"],
            "failed_jobs": sums["failure_count"],
            "cancelled_or_expired_jobs": sums["cancelled_count"] + sums["expired_count"],
            "tasks": sums["total_tasks"],
            "unknown_marketplace_jobs": sums["unknown_marketplace"],
            "no_start_jobs": sums["no_start"],
            "bad_duration_jobs": sums["bad_duration"],
            "tenants_computed": sums["tenants_computed"],
            "tenants_held_back": sums["tenants_held_back"],
            "tenants_open": sums["tenants_open"],
        }
        if not of_all:
            shown = {f"run_{name}": number for name, number in stored.items()}
        else:
            shown = {} if self.unread else {"dagster/row_count": sums["row_count"], **stored}
        return shown | {
            "run_rows_inserted": sums["inserted"],
            "run_rows_updated": sums["updated"],
            "run_rows_deleted": sums["deleted"],
            "run_rows_unchanged": sums["rows_done"] - sums["inserted"] - sums["updated"],
            "run_tenants_done": sums["tenants_done"],
            "run_tenants_skipped": len(self.skipped),
            "run_tenants_failed": len(self.failed),
        }

    def run_metadata(self) -> dict[str, Any]:
        """What belongs to the run as a whole; tables are cut after MOST_ROWS rows, the numbers beside them are not."""
        metadata: dict[str, Any] = {
            "run_window": str(self.spec.window),
            "run_database": self.database,
            "run_tenants_changed": self._tenants_changed,
            "run_days_changed": sum(
                _rows_changed(dict(zip(_ADDED_UP, day, strict=True))) > 0 for day in self._days.values()
            ),
            "run_days_held_back": self.held_back_count,
            "run_days_caught_up": sum(map(len, self._caught_up.values())),
            "run_other_days_changed": sum(map(len, self._other_days.values())),
            "run_settled_rows_changed": self.change_count,
            "run_preview": table(self._preview()),
            "run_action_count": len(self._sums),
        }
        for name, reasons in (
            ("run_failed_tenants", self.failed),
            ("run_skipped_tenants", self.skipped),
            ("run_unread_tenants", self.unread),
        ):
            if reasons:
                rows = [{"tenant": schema, "reason": reason} for schema, reason in reasons.items()]
                metadata[name] = table(rows)
        if self.spec.count_no_end:
            metadata["run_jobs_without_day"] = self.uncounted["no_end"]
        for name, rows in (
            ("run_held_back", self.held_back),
            ("run_uncounted", self.uncounted_rows()),
            ("run_caught_up", _spans(self._caught_up)),
            ("run_other_days", _spans(self._other_days)),
            ("run_changes", self._change_rows()),
        ):
            if rows:
                metadata[name] = table(rows)
        return metadata

    def uncounted_rows(self) -> list[dict[str, Any]]:
        """How many jobs were left out, wholly or from the durations, and why, the most first."""
        return [
            {"tenant": schema, "reason": reason, "marketplace": marketplace, "action": action, "jobs": count}
            for (schema, reason, marketplace, action), count in self._uncounted_rows.most_common(MOST_ROWS)
        ]

    def _change_rows(self) -> list[dict[str, Any]]:
        """The settled rows that changed most, from the journal."""
        return [
            {
                "tenant": change["tenant"],
                "date": change["date"],
                "marketplace": change["marketplace"],
                "action": self._action(change["action_type_id"]),
                "cause": change["cause"],
                "jobs before": change["total_jobs_before"],
                "jobs after": change["total_jobs_after"],
                "failed before": change["failure_count_before"],
                "failed after": change["failure_count_after"],
                "late": change["late_count"],
                "corrected": change["corrected_count"],
                "moved in": change["moved_in_count"],
                "moved out": change["moved_out_count"],
                "forgotten": change["forgotten_count"],
            }
            for change in self._changes
        ]

    def _preview(self) -> list[dict[str, Any]]:
        """The stored rows of the computed days, added up over days and tenants, the busiest actions first."""
        named = ((action, dict(zip(COUNTS, sums, strict=True))) for action, sums in self._sums.items())
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


def _difference(change: Mapping[str, Any]) -> int:
    """By how many jobs a row has changed, failed ones twice."""
    return sum(
        abs(int(change[f"{name}_after"] or 0) - int(change[f"{name}_before"] or 0))
        for name in ("total_jobs", "failure_count")
    )


def _spans(days: Mapping[str, Sequence[date]]) -> list[dict[str, Any]]:
    """For each tenant how many days, the first and the last."""
    return [
        {"tenant": schema, "days": len(dates), "first": str(min(dates)), "last": str(max(dates))}
        for schema, dates in list(days.items())[:MOST_ROWS]
    ]


def _rows_changed(numbers: Mapping[str, int]) -> int:
    return numbers["inserted"] + numbers["updated"] + numbers["deleted"]
