"""One tenant's transaction: lock, choose the days, write what differs from the stored rows, read back, prove.

`write_tenant` is the protocol; `difference` is the one statement that it stands on.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from functools import lru_cache
from typing import Any

import sqlalchemy as sa
from sqlalchemy import RowMapping
from sqlalchemy.dialects.postgresql import insert

from assets.marketplace_job_stats.aggregate import (
    COUNTS,
    FINISHED,
    FINISHED_TASKS,
    JOB_COUNTS,
    NUMBERS,
    RAN,
    TASK_COUNTS,
    counted_rows,
    days,
    job_status,
    jobs,
    kept_since,
    task_status,
    tasks,
)
from models.stats import KEY, MarketplaceJobStats, MarketplaceJobStatsDay
from pipelines.partitions import Window
from pipelines.tenants import on_tenant, quoted

stats = MarketplaceJobStats.__table__
ledger = MarketplaceJobStatsDay.__table__

_first_date = sa.bindparam("first_date", type_=sa.Date)
_last_date = sa.bindparam("last_date", type_=sa.Date)

_NOTHING = dict.fromkeys((*COUNTS, "row_count"), 0)


class ProofError(Exception):
    """The stored rows are not what was counted; the tenant's transaction is rolled back."""


class TimeZoneError(Exception):
    """The tenant's other days were computed in another time zone; nothing was done."""

    def __init__(self, computed_in: str, wanted: str, first: date, last: date) -> None:
        super().__init__(
            f"its days were computed in {computed_in}, not in {wanted}, and days of two zones overlap: "
            f"set STATS_TIMEZONE back, or recompute them all in one run, with --partition-range {first}...{last}"
        )


@dataclass(frozen=True)
class Order:
    """What a run asks of every tenant: these days, or with `only_missing` those of them that its ledger lacks.

    `catch_up`: days up to the last one asked for, of which those that the ledger lacks are taken along.
    `allow_shrink`: write a day also where stored numbers fall. `count_no_end`: look for jobs that have no day.
    """

    window: Window
    run_id: str
    only_missing: bool = False
    catch_up: Window | None = None
    allow_shrink: bool = False
    count_no_end: bool = False


@dataclass(frozen=True)
class TenantResult:
    """What a tenant's transaction did.

    `days`: a mapping per computed day (see `difference`), with `stored_row_count`, the rows that the table now holds.
    `sums`: the stored sums of these days per marketplace and action type (see `stored_sums`).
    `no_end_count`: how many jobs have no day, if they were looked for.
    """

    days: Sequence[Mapping[str, Any]]
    sums: Sequence[RowMapping]
    no_end_count: int = 0


def write_tenant(connection: sa.Connection, schema: str, order: Order) -> TenantResult:
    """Computes the days of one tenant in one transaction.

    The lock comes first: under REPEATABLE READ the snapshot is taken after it is granted, so runs over the same tenant,
    and writers of the stats, follow each other, and readers are not disturbed. No source row is locked. Raises
    ProofError, TimeZoneError, or what the database raises; then nothing is written.
    """
    on_tenant(connection, schema)
    result = TenantResult([], [])
    with connection.begin():
        connection.execute(sa.text(f"LOCK TABLE {quoted(schema)}.{stats.name} IN SHARE ROW EXCLUSIVE MODE"))
        for window in _windows(connection, order):
            parameters = {**window.parameters(), "run_id": order.run_id, "allow_shrink": order.allow_shrink}
            days = connection.execute(difference(), parameters).mappings().all()
            sums = connection.execute(stored_sums(), parameters).mappings().all()
            stored = {row["date"]: row for row in sums if row["is_day"]}
            _prove(days, stored)
            result = TenantResult(
                [*result.days, *({**day, "stored_row_count": _row_count(stored, day["date"])} for day in days)],
                [*result.sums, *(row for row in sums if not row["is_day"])],
            )
        if order.count_no_end:
            result = replace(result, no_end_count=connection.scalar(no_end()) or 0)
    return result


def _windows(connection: sa.Connection, order: Order) -> list[Window]:
    """The days to compute for this tenant: what the order says, in the light of its ledger. Raises TimeZoneError."""
    candidates = order.catch_up or order.window
    known = connection.execute(ledger_days(), candidates.parameters()).one()
    missing = set(candidates.dates) - set(known.dates or ())
    chosen = missing if order.only_missing else missing.union(order.window.dates)
    # Where the zone has changed, the days of the old and of the new one overlap, or leave hours out between them. So
    # no day of the old zone may stay.
    if known.elsewhere and not chosen.issuperset(known.elsewhere):
        last = max(*known.elsewhere, candidates.dates[-1])
        raise TimeZoneError(known.time_zone, candidates.time_zone, min(known.elsewhere), last)
    return candidates.parts(chosen)


@lru_cache
def ledger_days() -> sa.Select[Any, Any, Any]:
    """One row: `dates`, those of the window that the ledger has; `elsewhere`, all that are in another zone, and it."""
    is_elsewhere = ledger.c.time_zone != sa.bindparam("time_zone", type_=sa.Text)
    return sa.select(
        sa.func.array_agg(ledger.c.date).filter(ledger.c.date.between(_first_date, _last_date)).label("dates"),
        sa.func.array_agg(ledger.c.date).filter(is_elsewhere).label("elsewhere"),
        sa.func.min(ledger.c.time_zone).filter(is_elsewhere).label("time_zone"),
    )


@lru_cache
def no_end() -> sa.Select[Any]:
    """How many jobs ran to an end that is not a time, so that they have no day. Reads the whole table."""
    has_no_end = sa.or_(jobs.c.completed_at.is_(None), sa.not_(sa.func.isfinite(jobs.c.completed_at)))
    return sa.select(sa.func.count()).select_from(jobs).where(job_status.in_(RAN), has_no_end)


def _row_count(stored: Mapping[Any, Mapping[Any, Any]], day: date) -> int:
    return int(stored.get(day, _NOTHING)["row_count"])


def _prove(days: Sequence[RowMapping], stored: Mapping[Any, Mapping[Any, Any]]) -> None:
    """Compares every count of every day that was written with what the table now holds."""
    for day in days:
        if day["is_held_back"]:
            continue
        found = stored.get(day["date"], _NOTHING)
        for name in (*COUNTS, "row_count"):
            if found[name] != day[name]:
                raise ProofError(
                    f"{stats.name} holds {name} = {found[name]} for {day['date']}, but {day[name]} were counted: "
                    "look for a trigger or rule on the table"
                )


@lru_cache
def difference() -> sa.Select[Any]:
    """The statement that computes a window and writes what differs. Returns one row per day:

    date, is_held_back, every column of COUNTS as counted, row_count (counted rows), unknown_marketplace_count,
    bad_duration_count, stored_job_count and stored_task_count (before the run), and how many rows were inserted,
    updated and deleted.
    """
    day = days()
    counted = counted_rows(day)
    stored = (
        sa.select(*(stats.c[name] for name in (*KEY, *NUMBERS)))
        .where(stats.c.date.between(_first_date, _last_date))
        .cte("stored")
    )
    compared = _compared(counted, stored)
    outcome = _outcome(day, counted, compared)

    # The rows to write: all that differ, on the days that are not held back.
    changes = (
        sa.select(compared)
        .join(outcome, outcome.c.date == compared.c.date)
        .where(sa.not_(outcome.c.is_held_back), compared.c.change.is_not(None))
        .cte("changes")
    )
    values = {name: changes.c[name] for name in NUMBERS} | {"computed_at": sa.func.now()}
    same_row = sa.and_(*(stats.c[name] == changes.c[name] for name in KEY))
    inserted = (
        sa.insert(stats)
        .from_select(
            [*KEY, *values, "created_at"],
            sa.select(*(changes.c[name] for name in KEY), *values.values(), sa.func.now()).where(
                changes.c.change == "insert"
            ),
        )
        .returning(stats.c.date, sa.literal("insert").label("change"))
        .cte("inserted")
    )
    updated = (
        sa.update(stats)
        .values(values)
        .where(same_row, changes.c.change == "update")
        .returning(stats.c.date, sa.literal("update").label("change"))
        .cte("updated")
    )
    deleted = (
        sa.delete(stats)
        .where(same_row, changes.c.change == "delete")
        .returning(stats.c.date, sa.literal("delete").label("change"))
        .cte("deleted")
    )
    written = sa.union_all(sa.select(inserted), sa.select(updated), sa.select(deleted)).subquery("written")
    per_day = (
        sa.select(
            written.c.date,
            *(
                sa.func.count().filter(written.c.change == change).label(name)
                for change, name in (("insert", "inserted"), ("update", "updated"), ("delete", "deleted"))
            ),
        )
        .group_by(written.c.date)
        .subquery("per_day")
    )
    return (
        sa.select(
            outcome,
            *(sa.func.coalesce(per_day.c[name], 0).label(name) for name in ("inserted", "updated", "deleted")),
        )
        .join_from(outcome, per_day, per_day.c.date == outcome.c.date, isouter=True)
        .add_cte(_ledger_entries(outcome))
        .order_by(outcome.c.date)
    )


def _compared(counted: sa.CTE, stored: sa.CTE) -> sa.CTE:
    """Counted and stored rows side by side: what has to change, and which stored numbers would fall or vanish."""
    known = sa.select(counted).where(counted.c.marketplace.is_not(None)).subquery("known")

    def falls(names: Sequence[str]) -> sa.ColumnElement[bool]:
        # A stored null, from before the batch knew the column, is no number and cannot fall.
        return sa.func.coalesce(sa.or_(*(sa.func.coalesce(known.c[name], 0) < stored.c[name] for name in names)), False)

    differs = sa.or_(*(known.c[name].is_distinct_from(stored.c[name]) for name in NUMBERS))
    change = sa.case((stored.c.date.is_(None), "insert"), (known.c.date.is_(None), "delete"), (differs, "update"))
    same_key = sa.and_(*(known.c[name] == stored.c[name] for name in KEY))
    return (
        sa.select(
            *(sa.func.coalesce(known.c[name], stored.c[name]).label(name) for name in KEY),
            *(known.c[name] for name in NUMBERS),
            change.label("change"),
            falls(JOB_COUNTS).label("jobs_fall"),
            falls(TASK_COUNTS).label("tasks_fall"),
            (
                sa.func.coalesce(stored.c.total_jobs, 0)
                + sa.func.coalesce(stored.c.cancelled_count, 0)
                + sa.func.coalesce(stored.c.expired_count, 0)
            ).label("stored_job_count"),
            sa.func.coalesce(stored.c.total_tasks, 0).label("stored_task_count"),
        )
        .select_from(known.join(stored, same_key, full=True))
        .cte("compared")
    )


def _outcome(day: sa.CTE, counted: sa.CTE, compared: sa.CTE) -> sa.CTE:
    """One row per day of the window: what was counted and stored, and whether the day is held back."""
    total = (
        sa.select(
            counted.c.date,
            *(
                sa.func.sum(counted.c[name]).filter(counted.c.marketplace.is_not(None)).label(name)
                for name in (*COUNTS, "bad_duration_count")
            ),
            sa.func.count().filter(counted.c.marketplace.is_not(None)).label("row_count"),
            sa.func.sum(counted.c.total_jobs + counted.c.cancelled_count + counted.c.expired_count)
            .filter(counted.c.marketplace.is_(None))
            .label("unknown_marketplace_count"),
        )
        .group_by(counted.c.date)
        .subquery("total")
    )
    held = (
        sa.select(
            compared.c.date,
            sa.func.bool_or(compared.c.jobs_fall).label("jobs_fall"),
            sa.func.bool_or(compared.c.tasks_fall).label("tasks_fall"),
            sa.func.sum(compared.c.stored_job_count).label("stored_job_count"),
            sa.func.sum(compared.c.stored_task_count).label("stored_task_count"),
        )
        .group_by(compared.c.date)
        .subquery("held")
    )
    # A CASE, so that the source is searched for its oldest rows only where a stored number would fall.
    is_held_back = sa.case(
        (sa.bindparam("allow_shrink", type_=sa.Boolean), sa.false()),
        (held.c.jobs_fall & (kept_since(jobs, job_status, FINISHED) >= day.c.starts_at), sa.true()),
        (held.c.tasks_fall & (kept_since(tasks, task_status, FINISHED_TASKS) >= day.c.starts_at), sa.true()),
        else_=sa.false(),
    )
    numbers = (*COUNTS, "row_count", "bad_duration_count", "unknown_marketplace_count")
    return (
        sa.select(
            day.c.date,
            is_held_back.label("is_held_back"),
            *(sa.cast(sa.func.coalesce(total.c[name], 0), sa.BigInteger).label(name) for name in numbers),
            *(
                sa.cast(sa.func.coalesce(held.c[name], 0), sa.BigInteger).label(name)
                for name in ("stored_job_count", "stored_task_count")
            ),
        )
        .select_from(day.outerjoin(total, total.c.date == day.c.date).outerjoin(held, held.c.date == day.c.date))
        .cte("outcome")
    )


def _ledger_entries(outcome: sa.CTE) -> sa.CTE:
    """The upsert of the ledger's rows that are new or differ; the others are left alone."""
    job_count = outcome.c.total_jobs + outcome.c.cancelled_count + outcome.c.expired_count
    task_count = outcome.c.total_tasks
    entry = {
        "outcome": sa.case((outcome.c.is_held_back, "held_back"), else_="computed"),
        "time_zone": sa.bindparam("time_zone", type_=sa.Text),
        "job_count": job_count,
        "task_count": task_count,
        "stored_job_count": sa.case((outcome.c.is_held_back, outcome.c.stored_job_count), else_=job_count),
        "stored_task_count": sa.case((outcome.c.is_held_back, outcome.c.stored_task_count), else_=task_count),
        "unknown_marketplace_count": outcome.c.unknown_marketplace_count,
        "bad_duration_count": outcome.c.bad_duration_count,
    }
    stamp = {"run_id": sa.bindparam("run_id", type_=sa.Text), "changed_at": sa.func.now()}
    differs = sa.or_(*(ledger.c[name].is_distinct_from(value) for name, value in entry.items()))
    new = insert(ledger).from_select(
        ["date", *entry, *stamp],
        sa.select(outcome.c.date, *entry.values(), *stamp.values())
        .join_from(outcome, ledger, ledger.c.date == outcome.c.date, isouter=True)
        .where(differs),
    )
    return new.on_conflict_do_update(
        index_elements=[ledger.c.date], set_={name: new.excluded[name] for name in (*entry, *stamp)}
    ).cte("ledger_entries")


@lru_cache
def stored_sums() -> sa.Select[Any]:
    """What the table holds for the window: sums per date (`is_day`), and sums per marketplace and action type."""
    return (
        sa.select(
            (sa.func.grouping(stats.c.date) == 0).label("is_day"),
            stats.c.date,
            stats.c.marketplace,
            stats.c.action_type_id,
            sa.func.count().label("row_count"),
            *(sa.cast(sa.func.sum(stats.c[name]), sa.BigInteger).label(name) for name in COUNTS),
        )
        .where(stats.c.date.between(_first_date, _last_date))
        .group_by(
            sa.func.grouping_sets(sa.tuple_(stats.c.date), sa.tuple_(stats.c.marketplace, stats.c.action_type_id))
        )
    )
