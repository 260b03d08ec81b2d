"""The tables of our own schema: the stats of all tenants together, small enough for any BI tool, and what stands behind
them."""

import datetime as dt
from typing import Any

from sqlalchemy import ARRAY, BigInteger, Date, DateTime, Double, Integer, SmallInteger, String, Text
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import Mapped, mapped_column

from models import SHARED
from models.stats import StatsBase

MOST_NAMED = 5
"""How many tenants, and how many failure reasons, are named in a row."""


def _sum(doc: str) -> Mapped[int]:
    return mapped_column(BigInteger, doc=doc)


def _added_sum(doc: str) -> Mapped[int]:
    """A sum that earlier rows lack."""
    return mapped_column(BigInteger, server_default="0", doc=doc)


class _Completeness:
    """How complete the summary of one day is.

    `tenants_expected` is the sum of computed, held back, open, counter only and missing ones. A day that is not here
    was never summarized.
    """

    date: Mapped[dt.date] = mapped_column(Date, primary_key=True, doc="The day.", sort_order=-1)
    tenants_expected: Mapped[int] = mapped_column(Integer, doc="Tenants that should stand behind the day's numbers.")
    tenants_computed: Mapped[int] = mapped_column(Integer, doc="Those whose ledger has the day as computed.")
    tenants_held_back: Mapped[int] = mapped_column(Integer, doc="Those whose ledger has the day as held back.")
    tenants_open: Mapped[int] = mapped_column(
        Integer, doc="Those whose ledger has the day as open: it was computed while it was not over, as today is."
    )
    tenants_counter_only: Mapped[int] = mapped_column(
        Integer, doc="Those with numbers that no entry of the ledger stands behind: the old counter's."
    )
    tenants_missing: Mapped[int] = mapped_column(Integer, doc="Those of which nothing is in the numbers.")
    missing_tenants: Mapped[list[str]] = mapped_column(
        ARRAY(Text), doc="Their names: the day was not computed for them, or what is stored could not be read."
    )
    job_count: Mapped[int] = _sum("Jobs in the day's rows of the summary, whatever their end.")
    computed_at: Mapped[dt.datetime] = mapped_column(DateTime(timezone=True), doc="When the day was last summarized.")


class MarketplaceDailySummaryDay(_Completeness, StatsBase):
    """What stands behind the summary of one day: how complete it is, and the state of what it was read from."""

    __tablename__ = "marketplace_daily_summary_days"
    __table_args__ = ({"schema": SHARED},)

    ledger_state: Mapped[int] = _sum("Sum of a hash of each tenant's entry in its ledger, when the day was read.")
    action_types: Mapped[dict[str, list[str]]] = mapped_column(
        JSONB, doc='Code and name of each action of the day, by id, when it was read: `{"1": ["publish", "Publish"]}`.'
    )
    time_zone: Mapped[str] = mapped_column(Text, doc="The reporting time zone that the day's limits were taken from.")
    active_tenants: Mapped[list[str]] = mapped_column(
        ARRAY(Text), doc="The tenants with at least one job on the day, by name."
    )
    first_written: Mapped[list[dt.datetime]] = mapped_column(
        ARRAY(DateTime(timezone=True)),
        doc="When the first of the stats rows of each of them was first written: two tenants of one name, in two "
        "databases, have two times, and a copy has the same.",
    )


class MarketplaceGlobalSummaryDay(_Completeness, StatsBase):
    """What stands behind the summary of one day over all databases."""

    __tablename__ = "marketplace_global_summary_days"
    __table_args__ = ({"schema": SHARED},)

    missing_databases: Mapped[list[str]] = mapped_column(
        ARRAY(Text), doc="Databases of which nothing is in the numbers; each counts as its tenants of the day before."
    )
    old_databases: Mapped[list[str]] = mapped_column(
        ARRAY(Text), doc="Databases that could not be read when the day was last summarized: they are in as last seen."
    )
    tenants_twice: Mapped[list[str]] = mapped_column(
        ARRAY(Text),
        doc="Customers that two databases count; as long as there is one, the day's rows stay as they were.",
    )


class MarketplaceGlobalSummaryPart(StatsBase):
    """The summary of one day in one database, as it was last read there: so it is known while the database is down."""

    __tablename__ = "marketplace_global_summary_parts"
    __table_args__ = ({"schema": SHARED},)

    date: Mapped[dt.date] = mapped_column(Date, primary_key=True, doc="The day.")
    database: Mapped[str] = mapped_column(Text, primary_key=True, doc="The name of the database.")
    version: Mapped[str] = mapped_column(Text, doc="A hash of when each row was written there.")
    rows: Mapped[list[dict[str, Any]]] = mapped_column(JSONB, doc="The rows of its summary.")
    day: Mapped[dict[str, Any]] = mapped_column(JSONB, doc="What stands behind them: the row of its days.")
    computed_at: Mapped[dt.datetime] = mapped_column(DateTime(timezone=True), doc="When it was last read.")


class _Summary:
    """What the jobs of one action did on one marketplace on one day, over all tenants."""

    date: Mapped[dt.date] = mapped_column(
        Date, primary_key=True, doc="The day, in the reporting time zone, on which the jobs ended."
    )
    marketplace: Mapped[str] = mapped_column(String(20), primary_key=True, doc="`vinted`, `ebay` or `etsy`.")
    action_code: Mapped[str] = mapped_column(
        Text, primary_key=True, doc="The action: `publish`, `update` ...; `unknown` if its id is in no table."
    )
    action_name: Mapped[str] = mapped_column(Text, doc="The action's name that people see.")
    tenants_active: Mapped[int] = mapped_column(
        Integer, doc="Tenants with at least one job in this row, cancelled and expired ones included."
    )
    total_jobs: Mapped[int] = _sum("Jobs that ran to an end: `success_count + failure_count`.")
    success_count: Mapped[int] = _sum("Jobs with status `completed`.")
    failure_count: Mapped[int] = _sum("Jobs with status `failed`.")
    success_rate: Mapped[float | None] = mapped_column(
        Double, doc="`success_count / total_jobs`, from 0 to 1; null where nothing ran."
    )
    cancelled_count: Mapped[int] = _sum("Jobs with status `cancelled`; not part of `total_jobs`.")
    expired_count: Mapped[int] = _sum("Jobs with status `expired`; not part of `total_jobs`.")
    retry_count: Mapped[int] = _sum("Sum of the retries of the completed and failed jobs.")
    duration_count: Mapped[int] = _sum("Completed and failed jobs with a usable duration.")
    duration_sum_ms: Mapped[int] = _sum("Milliseconds: sum of these durations.")
    avg_duration_ms: Mapped[int | None] = mapped_column(
        Integer, doc="Milliseconds: `duration_sum_ms / duration_count`, halves away from zero; null without durations."
    )
    p50_duration_ms: Mapped[float | None] = mapped_column(
        Double, doc="Milliseconds: half of the durations are at most that long; within 1 %."
    )
    p95_duration_ms: Mapped[float | None] = mapped_column(
        Double, doc="Milliseconds: 95 % of the durations are at most that long; within 1 %."
    )
    duration_sketch_keys: Mapped[list[int] | None] = mapped_column(
        ARRAY(Integer), doc="Buckets of the durations: as in `marketplace_job_stats`."
    )
    duration_sketch_counts: Mapped[list[int] | None] = mapped_column(
        ARRAY(BigInteger), doc="How many durations each bucket has."
    )
    duration_sketch_version: Mapped[int | None] = mapped_column(SmallInteger, doc="What the buckets mean.")
    total_tasks: Mapped[int] = _sum("Tasks of these jobs: `task_success_count + task_failure_count`.")
    task_success_count: Mapped[int] = _sum("Tasks with status `success`.")
    task_failure_count: Mapped[int] = _sum("Tasks with status `failed` or `timeout`.")
    task_retry_count: Mapped[int] = _sum("Sum of the retries of these tasks.")
    top_failing: Mapped[list[dict[str, Any]]] = mapped_column(
        JSONB, doc='The tenants with the most failed jobs, at most five: `[{"tenant": "user_7", "failures": 3}, ...]`.'
    )
    computed_at: Mapped[dt.datetime] = mapped_column(DateTime(timezone=True), doc="When the row was last written.")
    p99_duration_ms: Mapped[float | None] = mapped_column(
        Double, doc="Milliseconds: 99 % of the durations are at most that long; within 1 %."
    )
    wait_count: Mapped[int] = _added_sum("Completed and failed jobs with a usable wait for their last start.")
    wait_sum_ms: Mapped[int] = _added_sum("Milliseconds: sum of these waits.")
    avg_wait_ms: Mapped[int | None] = mapped_column(
        Integer, doc="Milliseconds: `wait_sum_ms / wait_count`, halves away from zero; null without waits."
    )
    p50_wait_ms: Mapped[float | None] = mapped_column(
        Double, doc="Milliseconds: half of the waits are at most that long; within 1 %."
    )
    p95_wait_ms: Mapped[float | None] = mapped_column(
        Double, doc="Milliseconds: 95 % of the waits are at most that long; within 1 %."
    )
    wait_sketch_keys: Mapped[list[int] | None] = mapped_column(
        ARRAY(Integer), doc="Buckets of the waits: as in `marketplace_job_stats`."
    )
    wait_sketch_counts: Mapped[list[int] | None] = mapped_column(
        ARRAY(BigInteger), doc="How many waits each bucket has."
    )
    wait_sketch_version: Mapped[int | None] = mapped_column(SmallInteger, doc="What the buckets mean.")
    top_reasons: Mapped[list[dict[str, Any]]] = mapped_column(
        JSONB,
        server_default="[]",
        doc="The most frequent reasons of failed jobs, at most five: "
        '`[{"reason": "HTTP 429", "jobs": 3, "tenants": 2}, ...]`.',
    )
    tenants_older_definition: Mapped[int] = mapped_column(
        Integer,
        server_default="0",
        doc="Active tenants whose numbers are of an older definition: computed by it, held back, or not in the ledger.",
    )
    failure_reasons: Mapped[list[dict[str, Any]]] = mapped_column(
        JSONB,
        server_default="[]",
        doc="All reasons, as in `top_reasons`: what the summary over several databases adds up.",
    )


class MarketplaceDailySummary(_Summary, StatsBase):
    """What the jobs of one action did on one marketplace on one day, over all tenants."""

    __tablename__ = "marketplace_daily_summary"
    __table_args__ = ({"schema": SHARED},)


class MarketplaceGlobalSummary(_Summary, StatsBase):
    """The same over all databases: made in the one that is their home, empty in the others."""

    __tablename__ = "marketplace_global_summary"
    __table_args__ = ({"schema": SHARED},)
