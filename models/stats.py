"""The tables that this project owns, in every tenant: the facts, the stats that are made of them, their ledger, and the
journal of what has changed afterwards.

The definition of every number stands at its column (`doc`), and is shown in the Dagster UI from there.
"""

import datetime as dt
from typing import ClassVar

from sqlalchemy import (
    ARRAY,
    BigInteger,
    CheckConstraint,
    Date,
    DateTime,
    Double,
    Index,
    Integer,
    MetaData,
    SmallInteger,
    String,
    Table,
    Text,
    UniqueConstraint,
    func,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from models import MARKETPLACES, TENANT


class StatsBase(DeclarativeBase):
    """Our own tables; constraints are named, because a migration has to find them again."""

    __table__: ClassVar[Table]
    metadata = MetaData(
        naming_convention={"pk": "%(table_name)s_pkey", "ck": "ck_%(table_name)s_%(constraint_name)s"},
    )


DEFINITION = 2
"""What the numbers mean, as the ledger keeps it: raised with every change of a meaning, and with every column that is
new. Definition 1 had no facts."""
KEY = ("action_type_id", "marketplace", "date")
"""What one row of the stats is about."""


def _count(doc: str) -> Mapped[int | None]:
    """A count that the old live counter never kept: null in its rows until the batch writes them."""
    return mapped_column(Integer, nullable=True, doc=doc)


def _fact(doc: str) -> Mapped[int | None]:
    return mapped_column(Integer, nullable=True, doc=doc)


class MarketplaceJobStats(StatsBase):
    """What one customer's jobs of one action type did on one marketplace on one day."""

    __tablename__ = "marketplace_job_stats"
    __table_args__ = (
        CheckConstraint(
            "marketplace::text IN ({})".format(", ".join(f"'{name}'" for name in MARKETPLACES)), name="marketplace"
        ),
        UniqueConstraint(*KEY, name="uq_marketplace_job_stats_action_marketplace_date"),
        Index("ix_marketplace_job_stats_marketplace_created_at", "marketplace", "created_at"),
        Index("ix_marketplace_job_stats_date", "date"),
        {"schema": TENANT},
    )

    id: Mapped[int] = mapped_column(Integer, primary_key=True, doc="Technical key; says nothing.")
    action_type_id: Mapped[int] = mapped_column(
        Integer,
        doc="The action: an id of `public.marketplace_action_types`; if it is not there, its code reads `unknown`.",
    )
    marketplace: Mapped[str] = mapped_column(
        String(20), server_default="vinted", doc="The job's own marketplace: `vinted`, `ebay` or `etsy`."
    )
    date: Mapped[dt.date] = mapped_column(Date, doc="The day, in the reporting time zone, on which the jobs ended.")
    total_jobs: Mapped[int] = mapped_column(
        Integer, server_default="0", doc="Jobs that ran to an end: `success_count + failure_count`."
    )
    success_count: Mapped[int] = mapped_column(Integer, server_default="0", doc="Jobs with status `completed`.")
    failure_count: Mapped[int] = mapped_column(Integer, server_default="0", doc="Jobs with status `failed`.")
    avg_duration_ms: Mapped[int | None] = mapped_column(
        Integer, doc="Milliseconds: `duration_sum_ms / duration_count`, halves away from zero; null without durations."
    )
    created_at: Mapped[dt.datetime] = mapped_column(
        DateTime(timezone=True), server_default=func.now(), doc="When the row was first written."
    )
    cancelled_count: Mapped[int | None] = _count("Jobs with status `cancelled`; not part of `total_jobs`.")
    expired_count: Mapped[int | None] = _count("Jobs with status `expired`; not part of `total_jobs`.")
    retry_count: Mapped[int | None] = mapped_column(
        BigInteger, doc="Sum of the retries of the completed and failed jobs."
    )
    duration_count: Mapped[int | None] = _count(
        "Completed and failed jobs with a usable duration: both ends there, finite, in order, below 2^31 ms."
    )
    duration_sum_ms: Mapped[int | None] = mapped_column(
        BigInteger, doc="Milliseconds: sum of these durations, each rounded. Means of several rows come from here."
    )
    p50_duration_ms: Mapped[float | None] = mapped_column(
        Double, doc="Milliseconds: half of these durations are at most that long; from the sketch, so within 1 %."
    )
    p95_duration_ms: Mapped[float | None] = mapped_column(
        Double, doc="Milliseconds: 95 % of these durations are at most that long; from the sketch, so within 1 %."
    )
    duration_sketch_keys: Mapped[list[int] | None] = mapped_column(
        ARRAY(Integer), doc="Buckets of these durations, ascending: `ceil(log(ms) / log(1.01 / 0.99))`; -1 for 0 ms."
    )
    duration_sketch_counts: Mapped[list[int] | None] = mapped_column(
        ARRAY(BigInteger), doc="How many durations each bucket has. Percentiles of several rows come from here."
    )
    duration_sketch_version: Mapped[int | None] = mapped_column(
        SmallInteger, doc="What the buckets mean: 1. Sketches of different versions do not merge."
    )
    total_tasks: Mapped[int | None] = _count("Tasks of these jobs: `task_success_count + task_failure_count`.")
    task_success_count: Mapped[int | None] = _count("Tasks with status `success`, of the completed and failed jobs.")
    task_failure_count: Mapped[int | None] = _count(
        "Tasks with status `failed` or `timeout`, of the completed and failed jobs."
    )
    task_retry_count: Mapped[int | None] = mapped_column(
        BigInteger, doc="Sum of the retries of the tasks in `total_tasks`."
    )
    computed_at: Mapped[dt.datetime | None] = mapped_column(
        DateTime(timezone=True), doc="When the batch last wrote the row; null if only the old live counter did."
    )
    p99_duration_ms: Mapped[float | None] = mapped_column(
        Double, doc="Milliseconds: 99 % of these durations are at most that long; from the sketch, so within 1 %."
    )
    wait_count: Mapped[int | None] = _count("Completed and failed jobs with a usable wait for their last start.")
    wait_sum_ms: Mapped[int | None] = mapped_column(
        BigInteger, doc="Milliseconds: sum of these waits, from `created_at` to `started_at`, each rounded."
    )
    avg_wait_ms: Mapped[int | None] = mapped_column(
        Integer, doc="Milliseconds: `wait_sum_ms / wait_count`, halves away from zero; null without waits."
    )
    p50_wait_ms: Mapped[float | None] = mapped_column(
        Double, doc="Milliseconds: half of these waits are at most that long; from the sketch, so within 1 %."
    )
    p95_wait_ms: Mapped[float | None] = mapped_column(
        Double, doc="Milliseconds: 95 % of these waits are at most that long; from the sketch, so within 1 %."
    )
    wait_sketch_keys: Mapped[list[int] | None] = mapped_column(
        ARRAY(Integer), doc="Buckets of these waits, as those of the durations."
    )
    wait_sketch_counts: Mapped[list[int] | None] = mapped_column(
        ARRAY(BigInteger), doc="How many waits each bucket has."
    )
    wait_sketch_version: Mapped[int | None] = mapped_column(SmallInteger, doc="What the buckets mean: 1.")


class MarketplaceJobStatsDay(StatsBase):
    """The ledger: which days were computed for this tenant, from what, and how it ended. One row a day.

    A row is written only when it changes, so `run_id` and `changed_at` tell of the run that last found a difference.
    """

    __tablename__ = "marketplace_job_stats_days"
    __table_args__ = (
        CheckConstraint("outcome::text IN ('computed', 'held_back', 'open')", name="outcome"),
        {"schema": TENANT},
    )

    date: Mapped[dt.date] = mapped_column(Date, primary_key=True, doc="The day, in `time_zone`.")
    outcome: Mapped[str] = mapped_column(
        String(20),
        doc="`computed`; `held_back`: no facts stand behind the stored numbers, and they are kept; or `open`: computed "
        "while the day was not over.",
    )
    time_zone: Mapped[str] = mapped_column(Text, doc="The reporting time zone that the day's limits were taken from.")
    job_count: Mapped[int] = mapped_column(
        Integer, doc="Jobs of the day, as last seen: completed, failed, cancelled and expired, on a known marketplace."
    )
    task_count: Mapped[int] = mapped_column(
        Integer, doc="Tasks of its completed and failed jobs, as last seen, with status success, failed or timeout."
    )
    stored_job_count: Mapped[int] = mapped_column(
        Integer, doc="Jobs in the stats rows of the day after the run; `job_count` unless held back."
    )
    stored_task_count: Mapped[int] = mapped_column(
        Integer, doc="Tasks in the stats rows of the day after the run; `task_count` unless held back."
    )
    unknown_marketplace_count: Mapped[int] = mapped_column(
        Integer, doc="Jobs not counted, because their marketplace is none of the known ones."
    )
    bad_duration_count: Mapped[int] = mapped_column(
        Integer, doc="Jobs counted, but left out of the durations: start after the end, or too far away."
    )
    run_id: Mapped[str] = mapped_column(Text, doc="The Dagster run that last changed this entry.")
    changed_at: Mapped[dt.datetime] = mapped_column(DateTime(timezone=True), doc="When it did.")
    definition: Mapped[int] = mapped_column(
        SmallInteger, server_default="1", doc="The definition of the numbers that the day was computed, or judged, by."
    )
    no_start_count: Mapped[int] = mapped_column(
        Integer, server_default="0", doc="Jobs counted, but left out of the durations: they have no start."
    )
    row_count: Mapped[int | None] = mapped_column(Integer, doc="Stats rows of the day when the run had written them.")
    row_versions: Mapped[int | None] = mapped_column(
        BigInteger, doc="Sum of their `xmin`: whoever has written to one of them since has changed it."
    )


class MarketplaceJobFact(StatsBase):
    """One finished job as it was last seen: what the stats are made of. It stays when the application deletes the job.

    A job is its id and its `created_at` together, since ids are given out again. Texts are `text`, so that they are
    compared by PostgreSQL's own operators, whatever a tenant's owner has made.
    """

    __tablename__ = "marketplace_job_facts"
    __table_args__ = (Index("ix_marketplace_job_facts_date", "date"), {"schema": TENANT})

    # Those of 8 bytes first, then those of 4, then the texts: so no byte is lost between them.
    job_id: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False, doc="The job's id.")
    created_at: Mapped[dt.datetime] = mapped_column(
        DateTime(timezone=True), primary_key=True, doc="When the job was created."
    )
    completed_at: Mapped[dt.datetime] = mapped_column(DateTime(timezone=True), doc="When the job ended.")
    task_retry_count: Mapped[int | None] = mapped_column(BigInteger, doc="Sum of the retries of its counted tasks.")
    deleted_at: Mapped[dt.datetime | None] = mapped_column(
        DateTime(timezone=True), doc="When a run first saw that the source no longer holds the job; else null."
    )
    date: Mapped[dt.date] = mapped_column(Date, doc="The day in the reporting time zone on which it ended.")
    action_type_id: Mapped[int] = mapped_column(Integer, doc="Its action.")
    retry_count: Mapped[int] = mapped_column(Integer, doc="Its failed attempts.")
    duration_ms: Mapped[int | None] = mapped_column(
        Integer, doc="Milliseconds from its last start to its end, of completed and failed jobs; null if not usable."
    )
    wait_ms: Mapped[int | None] = mapped_column(
        Integer, doc="Milliseconds from `created_at` to its last start, of the same jobs; null if not usable."
    )
    task_count: Mapped[int | None] = _fact("Task rows of the job, of any status; null: there was no tasks table.")
    task_success_count: Mapped[int | None] = _fact("Those of them with status `success`.")
    task_failure_count: Mapped[int | None] = _fact("Those of them with status `failed` or `timeout`.")
    marketplace: Mapped[str] = mapped_column(Text, doc="`vinted`, `ebay` or `etsy`.")
    status: Mapped[str] = mapped_column(Text, doc="`completed`, `failed`, `cancelled` or `expired`.")
    failure_reason: Mapped[str | None] = mapped_column(
        Text, doc="Of a failed job, the first line of its message, without what is about one case."
    )


class MarketplaceJobStatsChange(StatsBase):
    """The journal: stats rows of settled days that changed, with both numbers and the cause."""

    __tablename__ = "marketplace_job_stats_changes"
    __table_args__ = (
        CheckConstraint("cause IN ('jobs', 'forgotten', 'definition', 'overwritten')", name="cause"),
        {"schema": TENANT},
    )

    date: Mapped[dt.date] = mapped_column(Date, primary_key=True, doc="The row's day.")
    action_type_id: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False, doc="The row's action.")
    marketplace: Mapped[str] = mapped_column(Text, primary_key=True, doc="The row's marketplace.")
    changed_at: Mapped[dt.datetime] = mapped_column(
        DateTime(timezone=True), primary_key=True, doc="When the run changed it."
    )
    run_id: Mapped[str] = mapped_column(Text, doc="The Dagster run that did.")
    cause: Mapped[str] = mapped_column(
        Text,
        doc="`jobs` (late, corrected or moved), `forgotten` (`allow_shrink`), `definition` (a new one), or "
        "`overwritten` (somebody else had written to the row).",
    )
    total_jobs_before: Mapped[int | None] = _fact("`total_jobs` before; null: there was no row.")
    total_jobs_after: Mapped[int | None] = _fact("`total_jobs` after; null: the row went.")
    failure_count_before: Mapped[int | None] = _fact("`failure_count` before.")
    failure_count_after: Mapped[int | None] = _fact("`failure_count` after.")
    late_count: Mapped[int] = mapped_column(Integer, doc="Jobs of the row that are new to the facts.")
    corrected_count: Mapped[int] = mapped_column(Integer, doc="Jobs of the row that changed.")
    moved_in_count: Mapped[int] = mapped_column(Integer, doc="Jobs that came from another row.")
    moved_out_count: Mapped[int] = mapped_column(Integer, doc="Jobs that went to another row, or are not finished now.")
    forgotten_count: Mapped[int] = mapped_column(
        Integer, doc="Jobs that the source no longer holds, forgotten on request."
    )
