"""The SELECT that turns the jobs and tasks of a window into rows. Pure: no context, no engine, no clock.

Bound parameters: see `pipelines.partitions.Window.parameters`.
"""

from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import INTERVAL

from models import MARKETPLACES
from models.sources import MarketplaceJob, MarketplaceTask
from pipelines import sketch

RAN = ("completed", "failed")
FINISHED = (*RAN, "cancelled", "expired")
COUNTED_TASKS = ("success", "failed", "timeout")
FINISHED_TASKS = (*COUNTED_TASKS, "cancelled")

JOB_COUNTS = (
    "total_jobs",
    "success_count",
    "failure_count",
    "cancelled_count",
    "expired_count",
    "retry_count",
    "duration_count",
    "duration_sum_ms",
)
TASK_COUNTS = ("total_tasks", "task_success_count", "task_failure_count", "task_retry_count")
COUNTS = (*JOB_COUNTS, *TASK_COUNTS)
"""The columns that add up over rows."""
NUMBERS = (*COUNTS, "avg_duration_ms", *sketch.COLUMNS, *sketch.PERCENTILES)
"""All that is computed for a row."""

jobs = MarketplaceJob.__table__
tasks = MarketplaceTask.__table__
# A status may be an enum type that lacks a label: only as text can it be compared with every label.
job_status = sa.cast(jobs.c.status, sa.Text)
task_status = sa.cast(tasks.c.status, sa.Text)

window_start = sa.bindparam("window_start", type_=sa.DateTime(timezone=True))
window_end = sa.bindparam("window_end", type_=sa.DateTime(timezone=True))
_dates = sa.bindparam("dates", type_=sa.ARRAY(sa.Date))
_starts = sa.bindparam("starts", type_=sa.ARRAY(sa.DateTime(timezone=True)))


def days() -> sa.CTE:
    """The days of the window: date, the instant at which it begins, and its number from 1."""
    day = sa.func.unnest(_dates, _starts).table_valued(
        sa.column("date", sa.Date), sa.column("starts_at", sa.DateTime(timezone=True)), with_ordinality="day_number"
    )
    return sa.select(day.render_derived()).cte("days")


def _count(condition: sa.ColumnElement[bool]) -> sa.ColumnElement[int]:
    return sa.func.count().filter(condition)


def _sum(value: sa.ColumnElement[int], condition: sa.ColumnElement[bool]) -> sa.ColumnElement[int]:
    return sa.cast(sa.func.coalesce(sa.func.sum(value).filter(condition), 0), sa.BigInteger)


def finished_jobs() -> sa.Subquery:
    """The jobs that finished in the window, one row each: its day, its duration, and the counts of its tasks."""
    # The longest duration is the one that still rounds to less than 2^31 ms. This comparison also refuses a start that
    # is null or infinite, before anything is subtracted: PostgreSQL 16 and older cannot subtract infinities. The
    # interval has no days in it, so no time zone has a say in the result.
    longest = sa.cast(sa.literal("2147483647.5 milliseconds", literal_execute=True), INTERVAL)
    usable = sa.and_(jobs.c.started_at <= jobs.c.completed_at, jobs.c.started_at > jobs.c.completed_at - longest)
    seconds = sa.extract("epoch", jobs.c.completed_at - jobs.c.started_at)
    duration_ms = sa.case((usable, sa.cast(sa.func.round(seconds * 1000), sa.BigInteger)))
    # Only the tasks of jobs that ran, and only those that came to an end; by their job, whatever day they ended.
    its_tasks = sa.and_(tasks.c.job_id == jobs.c.id, job_status.in_(RAN), task_status.in_(COUNTED_TASKS))
    job_columns = (jobs.c.id, jobs.c.action_type_id, jobs.c.marketplace, jobs.c.status, jobs.c.retry_count)
    return (
        sa.select(
            sa.func.width_bucket(jobs.c.completed_at, _starts).label("day_number"),
            jobs.c.action_type_id,
            sa.case((jobs.c.marketplace.in_(MARKETPLACES), jobs.c.marketplace)).label("marketplace"),
            job_status.label("status"),
            jobs.c.retry_count,
            duration_ms.label("duration_ms"),
            _count(task_status == "success").label("task_success_count"),
            _count(task_status.in_(("failed", "timeout"))).label("task_failure_count"),
            sa.func.coalesce(sa.func.sum(tasks.c.retry_count), 0).label("task_retry_count"),
        )
        .select_from(jobs.outerjoin(tasks, its_tasks))
        .where(jobs.c.completed_at >= window_start, jobs.c.completed_at < window_end, job_status.in_(FINISHED))
        .group_by(*job_columns, jobs.c.started_at, jobs.c.completed_at)
        .subquery("finished")
    )


def counted_rows(days: sa.CTE) -> sa.CTE:
    """One row per action type, marketplace and date, with every column of NUMBERS, and `bad_duration_count`.

    The marketplace is null for the jobs of unknown ones, which are reported but not counted.
    """
    job = finished_jobs()
    ran = job.c.status.in_(RAN)
    group = ("day_number", "action_type_id", "marketplace")
    # First by the bucket of the duration, too: from there both the sums and the sketch are a short way.
    key = sketch.key_of(sa.case((ran, job.c.duration_ms))).label("key")
    buckets = (
        sa.select(
            *(job.c[name] for name in group),
            key,
            _count(ran).label("total_jobs"),
            _count(job.c.status == "completed").label("success_count"),
            _count(job.c.status == "failed").label("failure_count"),
            _count(job.c.status == "cancelled").label("cancelled_count"),
            _count(job.c.status == "expired").label("expired_count"),
            _sum(job.c.retry_count, ran).label("retry_count"),
            _count(ran & job.c.duration_ms.is_not(None)).label("duration_count"),
            _sum(job.c.duration_ms, ran).label("duration_sum_ms"),
            _count(ran & job.c.duration_ms.is_(None)).label("bad_duration_count"),
            _sum(job.c.task_success_count + job.c.task_failure_count, ran).label("total_tasks"),
            _sum(job.c.task_success_count, ran).label("task_success_count"),
            _sum(job.c.task_failure_count, ran).label("task_failure_count"),
            _sum(job.c.task_retry_count, ran).label("task_retry_count"),
        )
        .group_by(*(job.c[name] for name in group), key)
        .subquery("buckets")
    )
    ranked = sketch.ranked(buckets, group)
    grouped = (
        sa.select(
            *(ranked.c[name] for name in group),
            *(
                sa.cast(sa.func.sum(ranked.c[name]), sa.BigInteger).label(name)
                for name in (*COUNTS, "bad_duration_count")
            ),
            *sketch.summed(ranked),
        )
        .group_by(*(ranked.c[name] for name in group))
        .subquery("grouped")
    )
    # Whole numbers only, so that the mean is exact: sum / count rounded is (2 sum + count) / (2 count) cut off.
    twice = sa.func.nullif(2 * grouped.c.duration_count, 0, type_=sa.BigInteger)
    mean = (2 * grouped.c.duration_sum_ms + grouped.c.duration_count) // twice
    return (
        sa.select(
            days.c.date,
            grouped.c.action_type_id,
            grouped.c.marketplace,
            *(grouped.c[name] for name in NUMBERS if name != "avg_duration_ms"),
            mean.label("avg_duration_ms"),
            grouped.c.bad_duration_count,
        )
        .join_from(grouped, days, days.c.day_number == grouped.c.day_number)
        .cte("counted")
    )


def kept_since(table: sa.Table, status: sa.ColumnElement[str], finished: tuple[str, ...]) -> sa.ScalarSelect[Any]:
    """The end of the oldest finished row that the source still holds; 'infinity' if it holds none.

    Days that begin after it are covered. Usually any row from before the window answers, and the full scan for the
    oldest is not needed; then '-infinity' is returned.
    """
    ended = (status.in_(finished), table.c.completed_at > sa.text("'-infinity'"))
    before_window = sa.select(sa.literal(1)).where(*ended, table.c.completed_at < window_start).exists()
    oldest = sa.select(sa.func.coalesce(sa.func.min(table.c.completed_at), sa.text("'infinity'"))).where(*ended)
    return sa.select(sa.case((before_window, sa.text("'-infinity'")), else_=oldest.scalar_subquery())).scalar_subquery()
