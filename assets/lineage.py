"""Which columns the columns of our tables come from, as the Dagster UI shows it; the values are computed elsewhere.

Technical columns, which say when, by which run and how a row was written, are left out.
"""

from collections.abc import Iterable, Mapping

import dagster as dg

from assets.sketch import MEASURES
from models.sources import MarketplaceActionType, MarketplaceJob, MarketplaceTask
from models.stats import MarketplaceJobFact, MarketplaceJobStats, MarketplaceJobStatsDay
from models.summary import MarketplaceDailySummary

_JOBS, _TASKS, _TYPES = (model.__tablename__ for model in (MarketplaceJob, MarketplaceTask, MarketplaceActionType))
_FACTS, _STATS, _LEDGER = (
    model.__tablename__ for model in (MarketplaceJobFact, MarketplaceJobStats, MarketplaceJobStatsDay)
)

Sources = Mapping[str, Iterable[tuple[str, str]]]
"""Table and column that each column is computed from."""


def _of(table: str, *columns: str) -> tuple[tuple[str, str], ...]:
    return tuple((table, column) for column in columns)


FACTS: Sources = {
    "job_id": _of(_JOBS, "id"),
    "date": _of(_JOBS, "completed_at"),
    **{
        name: _of(_JOBS, name)
        for name in ("created_at", "completed_at", "action_type_id", "retry_count", "marketplace", "status")
    },
    "duration_ms": _of(_JOBS, "started_at", "completed_at", "status"),
    "wait_ms": _of(_JOBS, "created_at", "started_at", "status"),
    "task_count": _of(_TASKS, "job_id"),
    **dict.fromkeys(("task_success_count", "task_failure_count"), _of(_TASKS, "job_id", "status")),
    "task_retry_count": _of(_TASKS, "job_id", "status", "retry_count"),
    "failure_reason": _of(_JOBS, "error_message", "status"),
    # A job is gone when the source holds none of its id and its time of creation.
    "deleted_at": _of(_JOBS, "id", "created_at"),
}

_JOB_COUNTS = ("total_jobs", "success_count", "failure_count", "cancelled_count", "expired_count")
_TASKS_OF_JOBS = ("task_success_count", "task_failure_count", "status")

STATS: Sources = {
    **{name: _of(_FACTS, name) for name in ("action_type_id", "marketplace", "date")},
    **dict.fromkeys(_JOB_COUNTS, _of(_FACTS, "status")),
    "retry_count": _of(_FACTS, "retry_count", "status"),
    **{
        name: _of(_FACTS, f"{measure.name}_ms")
        for measure in MEASURES
        for name in (measure.count, measure.sum, *measure.statistics, *measure.sketch)
    },
    "total_tasks": _of(_FACTS, *_TASKS_OF_JOBS),
    **{name: _of(_FACTS, name, "status") for name in ("task_success_count", "task_failure_count", "task_retry_count")},
}

LEDGER: Sources = {
    "date": _of(_FACTS, "date"),
    "job_count": _of(_FACTS, "status"),
    "task_count": _of(_FACTS, *_TASKS_OF_JOBS),
    "stored_job_count": _of(_STATS, "total_jobs", "cancelled_count", "expired_count"),
    "stored_task_count": _of(_STATS, "total_tasks"),
    "unknown_marketplace_count": _of(_JOBS, "marketplace", "status", "completed_at"),
    "no_start_count": _of(_JOBS, "started_at", "status"),
    "bad_duration_count": _of(_JOBS, "started_at", "completed_at", "status"),
    "row_count": _of(_STATS, "date"),
}

JOURNAL: Sources = {
    **{name: _of(_STATS, name) for name in ("date", "action_type_id", "marketplace")},
    **{f"{name}_{when}": _of(_STATS, name) for name in ("total_jobs", "failure_count") for when in ("before", "after")},
    **dict.fromkeys(("late_count", "forgotten_count"), _of(_FACTS, "job_id", "created_at")),
    "corrected_count": _of(_FACTS, "status"),
    **dict.fromkeys(("moved_in_count", "moved_out_count"), _of(_FACTS, "date", "action_type_id", "marketplace")),
}

SUMMARY: Sources = {
    **{
        column.name: _of(_STATS, column.name)
        for column in MarketplaceDailySummary.__table__.columns
        if column.name in STATS
    },
    "action_code": (*_of(_STATS, "action_type_id"), (_TYPES, "code")),
    "action_name": (*_of(_STATS, "action_type_id"), (_TYPES, "name")),
    "tenants_active": _of(_STATS, "total_jobs", "cancelled_count", "expired_count"),
    "success_rate": _of(_STATS, "success_count", "total_jobs"),
    **{measure.mean: _of(_STATS, measure.sum, measure.count) for measure in MEASURES},
    **{name: _of(_STATS, *measure.sketch) for measure in MEASURES for name in measure.percentiles},
    "top_failing": _of(_STATS, "failure_count"),
    **dict.fromkeys(("top_reasons", "failure_reasons"), _of(_FACTS, "failure_reason", "status")),
    "tenants_older_definition": (
        *_of(_STATS, "total_jobs", "cancelled_count", "expired_count"),
        *_of(_LEDGER, "definition", "outcome"),
    ),
}


def column_lineage(sources: Sources, key_prefix: tuple[str, ...] = ()) -> dg.TableColumnLineage:
    """The lineage under these asset keys."""
    return dg.TableColumnLineage(
        {
            column: [dg.TableColumnDep(dg.AssetKey([*key_prefix, table]), name) for table, name in origins]
            for column, origins in sources.items()
        }
    )
