"""The limit: the SELECT that turns the jobs and tasks of a window into rows of the stats, and keeps no facts of them.

Durations have a sketch and percentiles; waits and reasons of failures are not computed. Bound parameters: see
`pipelines.partitions.Window.parameters`.

The finished jobs are read once, and held; jobs, tasks and buckets of durations are each summed from there by the same
three numbers, and only the sums are joined. To group each job's tasks first, and then the jobs, would sort them twice.
"""

import math
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import INTERVAL
from sqlalchemy.dialects.postgresql.psycopg import PGCompiler_psycopg, PGDialect_psycopg

from assets.sketch import DURATION, GAMMA, ZERO_KEY, middle_of
from models import MARKETPLACES, TENANT
from models.sources import MarketplaceJob, MarketplaceTask

RAN = ("completed", "failed")
FINISHED = (*RAN, "cancelled", "expired")
COUNTED_TASKS = ("success", "failed", "timeout")

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
NUMBERS = (*COUNTS, *DURATION.statistics, *DURATION.sketch)
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

_ROW = ("day_number", "marketplace_number", "action_type_id")
"""What one row is about, in whole numbers: they are grouped, sorted and joined faster than a marketplace's name."""


def days() -> sa.CTE:
    """The days of the window: date, the instant at which it begins, and its number from 1."""
    day = sa.func.unnest(_dates, _starts).table_valued(
        sa.column("date", sa.Date), sa.column("starts_at", sa.DateTime(timezone=True)), with_ordinality="day_number"
    )
    return sa.select(day.render_derived()).cte("days")


def _count(condition: sa.ColumnElement[bool]) -> sa.ColumnElement[int]:
    return sa.cast(sa.func.count().filter(condition), sa.Integer)


def finished_jobs() -> sa.CTE:
    """The jobs that finished in the window, one row each. The marketplace's number is null for an unknown one, the
    duration for a job that did not run, or has none that is usable.
    """
    ran = job_status.in_(RAN)
    # The longest duration is the one that still rounds to less than 2^31 ms. This comparison also refuses a start that
    # is null or infinite, before anything is subtracted: PostgreSQL 16 and older cannot subtract infinities. The
    # interval has no days in it, so no time zone has a say in the result.
    longest = sa.cast(sa.literal("2147483647.5 milliseconds"), INTERVAL)
    usable = sa.and_(ran, jobs.c.started_at <= jobs.c.completed_at, jobs.c.started_at > jobs.c.completed_at - longest)
    # A double holds the microseconds of such a duration exactly, and is faster than the numeric that EXTRACT returns.
    seconds = sa.func.date_part("epoch", jobs.c.completed_at - jobs.c.started_at, type_=sa.Double)
    microseconds = sa.cast(seconds * 1_000_000.0, sa.BigInteger)
    numbers = {name: number for number, name in enumerate(MARKETPLACES, start=1)}
    return (
        sa.select(
            jobs.c.id,
            sa.func.width_bucket(jobs.c.completed_at, _starts, type_=sa.Integer).label("day_number"),
            sa.case(numbers, value=jobs.c.marketplace).label("marketplace_number"),
            jobs.c.action_type_id,
            job_status.label("status"),
            ran.label("ran"),
            jobs.c.retry_count,
            sa.case((usable, sa.cast((microseconds + 500) // 1000, sa.Integer))).label("duration_ms"),
        )
        .where(jobs.c.completed_at >= window_start, jobs.c.completed_at < window_end, job_status.in_(FINISHED))
        .cte("finished")
    )


def _key_of(ms: sa.ColumnElement[int]) -> sa.ColumnElement[int]:
    """The bucket of a duration; null for null."""
    logarithm = sa.func.ln(sa.cast(ms, sa.Double)) / sa.literal(math.log(GAMMA), sa.Double, literal_execute=True)
    return sa.case((ms == 0, ZERO_KEY), (ms > 0, sa.cast(sa.func.ceil(logarithm), sa.Integer)))


def _percentile_keys(key: sa.ColumnElement[int]) -> sa.ColumnElement[Any]:
    """The buckets of the percentiles, as an array. Their ranks are ceil(q n) in doubles, which is exact here."""
    shares = sa.cast([n / d for n, d in DURATION.percentiles.values()], sa.ARRAY(sa.Double))
    return sa.type_coerce(sa.func.percentile_disc(shares).within_group(key), sa.ARRAY(sa.Integer))


def counted_rows(finished: sa.CTE, days: sa.CTE) -> sa.CTE:
    """One row per action type, marketplace and date, with every column of NUMBERS, in the types of the table's columns.

    The jobs of unknown marketplaces are left out.
    """
    by = [finished.c[name] for name in _ROW]
    is_known = finished.c.marketplace_number.is_not(None)
    duration_ms = finished.c.duration_ms
    key = _key_of(duration_ms)
    job_sums = (
        sa.select(
            *by,
            _count(finished.c.status == "completed").label("success_count"),
            _count(finished.c.status == "failed").label("failure_count"),
            _count(finished.c.status == "cancelled").label("cancelled_count"),
            _count(finished.c.status == "expired").label("expired_count"),
            sa.func.coalesce(sa.func.sum(finished.c.retry_count).filter(finished.c.ran), 0).label("retry_count"),
            sa.cast(sa.func.count(duration_ms), sa.Integer).label("duration_count"),
            sa.func.coalesce(sa.func.sum(duration_ms), 0).label("duration_sum_ms"),
            _percentile_keys(key).label("percentile_keys"),
        )
        .where(is_known)
        .group_by(*by)
        .cte("job_sums")
    )
    # The tasks of the jobs that ran, if they came to an end; by their job, whatever day they ended.
    its_tasks = sa.and_(tasks.c.job_id == finished.c.id, task_status.in_(COUNTED_TASKS))
    task_sums = (
        sa.select(
            *by,
            sa.cast(sa.func.count(), sa.Integer).label("total_tasks"),
            _count(task_status == "success").label("task_success_count"),
            sa.func.sum(tasks.c.retry_count).label("task_retry_count"),
        )
        .join_from(finished, tasks, its_tasks)
        .where(finished.c.ran, is_known)
        .group_by(*by)
        .cte("task_sums")
    )
    buckets = (
        sa.select(*by, key.label("key"), sa.func.count().label("bucket_count"))
        .where(duration_ms.is_not(None), is_known)
        .group_by(*by, key)
        .subquery("buckets")
    )
    sketches = (
        sa.select(*(buckets.c[name] for name in _ROW), *DURATION.arrays(buckets))
        .group_by(*(buckets.c[name] for name in _ROW))
        .cte("sketches")
    )

    def same_row(sums: sa.CTE) -> sa.ColumnElement[bool]:
        return sa.and_(*(sums.c[name] == job_sums.c[name] for name in _ROW))

    def or_zero(value: sa.ColumnElement[int]) -> sa.ColumnElement[int]:  # A row may have no tasks.
        return sa.func.coalesce(value, 0)

    marketplace = sa.case(dict(enumerate(MARKETPLACES, start=1)), value=job_sums.c.marketplace_number)
    count, total = job_sums.c.duration_count, job_sums.c.duration_sum_ms
    # Whole numbers only, so that the mean is exact: sum / count rounded is (2 sum + count) / (2 count) cut off.
    mean = sa.cast((2 * total + count) // sa.func.nullif(2 * count, 0, type_=sa.Integer), sa.Integer)
    return (
        sa.select(
            days.c.date,
            job_sums.c.action_type_id,
            marketplace.label("marketplace"),
            (job_sums.c.success_count + job_sums.c.failure_count).label("total_jobs"),
            *(job_sums.c[name] for name in JOB_COUNTS[1:]),
            or_zero(task_sums.c.total_tasks).label("total_tasks"),
            or_zero(task_sums.c.task_success_count).label("task_success_count"),
            or_zero(task_sums.c.total_tasks - task_sums.c.task_success_count).label("task_failure_count"),
            or_zero(task_sums.c.task_retry_count).label("task_retry_count"),
            mean.label("avg_duration_ms"),
            *(sketches.c[name] for name in DURATION.sketch),
            *(
                middle_of(job_sums.c.percentile_keys[place]).label(name)
                for place, name in enumerate(DURATION.percentiles, start=1)
            ),
        )
        .select_from(
            job_sums.join(days, days.c.day_number == job_sums.c.day_number)
            .outerjoin(task_sums, same_row(task_sums))
            .outerjoin(sketches, same_row(sketches))
        )
        .cte("counted")
    )


class _Compiler(PGCompiler_psycopg):
    """Writes constants into the text; only what the caller binds stays a parameter."""

    def visit_bindparam(self, bindparam: Any, *_: Any, **options: Any) -> Any:
        options["literal_binds"] = not bindparam.required
        return super().visit_bindparam(bindparam, **options)  # type: ignore[no-untyped-call]


def text(schema: str) -> str:
    """The SELECT for this tenant: key and NUMBERS."""
    dialect: Any = PGDialect_psycopg()  # type: ignore[no-untyped-call]
    dialect.statement_compiler = _Compiler
    row = counted_rows(finished_jobs(), days())
    statement = sa.select(*(row.c[name] for name in ("date", "action_type_id", "marketplace", *NUMBERS)))
    return str(statement.compile(dialect=dialect, schema_translate_map={TENANT: schema}, render_schema_translate=True))
