"""Which columns the columns of our tables come from, as Dagit shows it; the values are computed elsewhere."""

from collections.abc import Iterable, Mapping

import dagster as dg

from models.sources import MarketplaceActionType, MarketplaceJob, MarketplaceTask
from models.stats import MarketplaceJobStats
from models.summary import MarketplaceDailySummary
from pipelines import sketch

_JOBS, _TASKS, _TYPES, _STATS = (
    model.__tablename__ for model in (MarketplaceJob, MarketplaceTask, MarketplaceActionType, MarketplaceJobStats)
)
_FINISHED = ((_JOBS, "status"), (_JOBS, "completed_at"))
_DURATION = ((_JOBS, "started_at"), (_JOBS, "completed_at"), (_JOBS, "status"))
_TASK = ((_TASKS, "status"), (_TASKS, "job_id"), (_JOBS, "status"))
_OF_DURATIONS = ("duration_count", "duration_sum_ms", "avg_duration_ms", *sketch.PERCENTILES, *sketch.COLUMNS)

Sources = Mapping[str, Iterable[tuple[str, str]]]

STATS: Sources = {
    "action_type_id": ((_JOBS, "action_type_id"),),
    "marketplace": ((_JOBS, "marketplace"),),
    "date": ((_JOBS, "completed_at"),),
    **dict.fromkeys(("total_jobs", "success_count", "failure_count", "cancelled_count", "expired_count"), _FINISHED),
    "retry_count": ((_JOBS, "retry_count"), (_JOBS, "status")),
    **dict.fromkeys(_OF_DURATIONS, _DURATION),
    **dict.fromkeys(("total_tasks", "task_success_count", "task_failure_count"), _TASK),
    "task_retry_count": ((_TASKS, "retry_count"), *_TASK),
}
"""Table and column that each column of the stats is computed from; the technical columns are not among them."""

SUMMARY: Sources = {
    **{
        column.name: ((_STATS, column.name),)
        for column in MarketplaceDailySummary.__table__.columns
        if column.name in STATS
    },
    "action_code": ((_STATS, "action_type_id"), (_TYPES, "code")),
    "action_name": ((_STATS, "action_type_id"), (_TYPES, "name")),
    "tenants_active": ((_STATS, "total_jobs"), (_STATS, "cancelled_count"), (_STATS, "expired_count")),
    "success_rate": ((_STATS, "success_count"), (_STATS, "total_jobs")),
    "avg_duration_ms": ((_STATS, "duration_sum_ms"), (_STATS, "duration_count")),
    **dict.fromkeys(sketch.PERCENTILES, tuple((_STATS, name) for name in sketch.COLUMNS)),
    "top_failing": ((_STATS, "failure_count"),),
}
"""The same for the summary."""


def column_lineage(sources: Sources, key_prefix: tuple[str, ...] = ()) -> dg.TableColumnLineage:
    """The lineage under these asset keys."""
    return dg.TableColumnLineage(
        {
            column: [dg.TableColumnDep(dg.AssetKey([*key_prefix, table]), name) for table, name in origins]
            for column, origins in sources.items()
        }
    )
