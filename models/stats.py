"""The tables that this project owns, in every tenant: the stats and their ledger.

The definition of every number stands at its column (`doc`), and is shown in Dagit from there.
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


KEY = ("action_type_id", "marketplace", "date")
"""What one row of the stats is about."""


def _count(doc: str) -> Mapped[int | None]:
    """A count that the old live counter never kept: null in its rows until the batch writes them."""
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


class MarketplaceJobStatsDay(StatsBase):
    """The ledger: which days were computed for this tenant, from what, and how it ended. One row a day.

    A row is written only when it changes, so `run_id` and `changed_at` tell of the run that last found a difference.
    """

    __tablename__ = "marketplace_job_stats_days"
    __table_args__ = (
        CheckConstraint("outcome::text IN ('computed', 'held_back')", name="outcome"),
        {"schema": TENANT},
    )

    date: Mapped[dt.date] = mapped_column(Date, primary_key=True, doc="The day, in `time_zone`.")
    outcome: Mapped[str] = mapped_column(
        String(20),
        doc="`computed`, or `held_back`: the source has lost rows of that day by age, so nothing was written.",
    )
    time_zone: Mapped[str] = mapped_column(Text, doc="The reporting time zone that the day's limits were taken from.")
    job_count: Mapped[int] = mapped_column(
        Integer, doc="Jobs that the source holds: completed, failed, cancelled and expired, on a known marketplace."
    )
    task_count: Mapped[int] = mapped_column(
        Integer, doc="Their tasks that the source holds with status success, failed or timeout."
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
        Integer, doc="Jobs counted, but left out of the durations: start missing, after the end, or too far away."
    )
    run_id: Mapped[str] = mapped_column(Text, doc="The Dagster run that last changed this entry.")
    changed_at: Mapped[dt.datetime] = mapped_column(DateTime(timezone=True), doc="When it did.")
