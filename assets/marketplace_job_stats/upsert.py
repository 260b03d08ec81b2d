"""One tenant's transaction: lock, choose the days, write what differs from the stored rows, read back, prove.

`write_tenant` is the protocol. It stands on two statements: `difference` compares what is counted with what is stored,
and `first_rows` is for days of which nothing is stored. It is half as long, and to plan the statement is most of what a
small tenant's day costs the server. Their texts are made once, for all tenants.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from functools import lru_cache
from typing import Any

import sqlalchemy as sa
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
    finished_jobs,
    job_status,
    jobs,
    kept_since,
    task_status,
    tasks,
    unknown_marketplaces,
)
from models.stats import KEY, MarketplaceJobStats, MarketplaceJobStatsDay
from pipelines.partitions import Window
from pipelines.tenants import enter_tenant, sql_in_tenant

stats = MarketplaceJobStats.__table__
ledger = MarketplaceJobStatsDay.__table__

_window = (sa.bindparam("first_date", type_=sa.Date), sa.bindparam("last_date", type_=sa.Date))

DAY_NUMBERS = (
    *COUNTS,
    "row_count",
    "unknown_marketplace_count",
    "stored_job_count",
    "stored_task_count",
    "stored_row_count",
    "inserted",
    "updated",
    "deleted",
)
"""What is told of a day, beside its date and whether it is held back.

COUNTS and `row_count` are what was counted; those that begin with `stored`, what the table held before; `inserted`,
`updated` and `deleted`, how many rows differ and were sent to the table: of a held-back day, none.
"""


PROVED = (*COUNTS, "row_count")
"""What is proved: the first of DAY_NUMBERS, and the last columns of `stored_sums`."""


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

    `days`: a row per computed day: date, is_held_back, and DAY_NUMBERS.
    `sums`: a row per marketplace and action type of these days, with what is stored of PROVED (see `stored_sums`).
    `no_end_count`: how many jobs have no day, if they were looked for.
    """

    days: Sequence[sa.Row[Any]]
    sums: Sequence[sa.Row[Any]]
    no_end_count: int = 0


def write_tenant(connection: sa.Connection, schema: str, order: Order) -> TenantResult:
    """Computes the days of one tenant in one transaction.

    The lock comes first: under REPEATABLE READ the snapshot is taken after it is granted, so runs over the same tenant,
    and writers of the stats, follow each other, and readers are not disturbed. No source row is locked. Raises
    ProofError, TimeZoneError, or what the database raises; then nothing is written.
    """
    result = TenantResult([], [])
    with connection.begin():
        enter_tenant(connection, schema, lock=stats)
        known = connection.exec_driver_sql(ledger_days(), (order.catch_up or order.window).parameters).one()
        for window in _windows(order, known):
            days = _write_window(connection, window, order, is_first=not (known.dates or known.has_rows))
            sums = connection.exec_driver_sql(stored_sums(), window.parameters).all()
            _prove(days, {row.date: row for row in sums if row.date})
            result = TenantResult([*result.days, *days], [*result.sums, *(row for row in sums if not row.date)])
        if order.count_no_end:
            result = replace(result, no_end_count=connection.exec_driver_sql(no_end()).scalar() or 0)
    return result


def _windows(order: Order, known: sa.Row[Any]) -> list[Window]:
    """The days to compute for this tenant: what the order says, in the light of its ledger. Raises TimeZoneError."""
    candidates = order.catch_up or order.window
    missing = set(candidates.dates) - set(known.dates or ())
    chosen = missing if order.only_missing else missing.union(order.window.dates)
    # Where the zone has changed, the days of the old and of the new one overlap, or leave hours out between them. So
    # no day of the old zone may stay.
    if known.elsewhere and not chosen.issuperset(known.elsewhere):
        last = max(*known.elsewhere, candidates.dates[-1])
        raise TimeZoneError(known.time_zone, candidates.time_zone, min(known.elsewhere), last)
    return candidates.parts(chosen)


def _write_window(connection: sa.Connection, window: Window, order: Order, is_first: bool) -> list[sa.Row[Any]]:
    """Writes a window; returns a row per day. `is_first`: neither a row nor a ledger entry of it is stored."""
    parameters = window.parameters | {"run_id": order.run_id, "allow_shrink": order.allow_shrink}
    days = connection.exec_driver_sql(first_rows() if is_first else difference(), parameters).all()
    if any(row.is_held_back is None for row in days):
        # Once for the whole window: its other days are right by now, and what was written of them is told already.
        decided = connection.exec_driver_sql(difference(is_in_doubt=True), parameters).all()
        days = [sure if row.is_held_back is None else row for row, sure in zip(days, decided, strict=True)]
    return list(days)


def _prove(days: Iterable[sa.Row[Any]], stored: Mapping[date, sa.Row[Any]]) -> None:
    """Compares every count of every day that was written with what the table now holds."""
    nothing = (0,) * len(PROVED)
    for day in days:
        # By position: a tenant has hundreds of days, and names are looked up slowly.
        counted, found = day[2 : 2 + len(PROVED)], nothing
        if day[0] in stored:
            found = stored[day[0]][-len(PROVED) :]
        if found != counted and not day.is_held_back:
            told = zip(PROVED, found, counted, strict=True)
            name, is_stored, was_counted = next(one for one in told if one[1] != one[2])
            raise ProofError(
                f"{stats.name} holds {name} = {is_stored} for {day.date}, but {was_counted} were counted: "
                "look for a trigger or rule on the table"
            )


@lru_cache
def ledger_days() -> str:
    """One row: `dates`, those of the window that the ledger has; `elsewhere`, all that are in another zone, and it;
    `has_rows`, whether a row of the window is stored.
    """
    is_elsewhere = ledger.c.time_zone != sa.bindparam("time_zone", type_=sa.Text)
    return sql_in_tenant(
        sa.select(
            sa.func.array_agg(sa.cast(ledger.c.date, sa.Date)).filter(ledger.c.date.between(*_window)).label("dates"),
            sa.func.array_agg(sa.cast(ledger.c.date, sa.Date)).filter(is_elsewhere).label("elsewhere"),
            sa.func.min(ledger.c.time_zone).filter(is_elsewhere).label("time_zone"),
            sa.select(stats.c.date).where(stats.c.date.between(*_window)).exists().label("has_rows"),
        )
    )


@lru_cache
def no_end() -> str:
    """How many jobs ran to an end that is not a time, so that they have no day. Reads the whole table."""
    has_no_end = sa.or_(jobs.c.completed_at.is_(None), sa.not_(sa.func.isfinite(jobs.c.completed_at)))
    return sql_in_tenant(sa.select(sa.func.count()).select_from(jobs).where(job_status.in_(RAN), has_no_end))


@lru_cache
def stored_sums() -> str:
    """What the table holds for the window: sums per date, and sums per marketplace and action type."""
    return sql_in_tenant(
        sa.select(
            # A prepared statement must have columns of the same types for every tenant.
            sa.cast(stats.c.date, sa.Date).label("date"),
            sa.cast(stats.c.marketplace, sa.Text).label("marketplace"),
            _big(stats.c.action_type_id).label("action_type_id"),
            *(_big(sa.func.sum(stats.c[name])).label(name) for name in COUNTS),
            sa.func.count().label("row_count"),
        )
        .where(stats.c.date.between(*_window))
        .group_by(
            sa.func.grouping_sets(sa.tuple_(stats.c.date), sa.tuple_(stats.c.marketplace, stats.c.action_type_id))
        )
    )


@lru_cache
def first_rows() -> str:
    """The statement that computes a window of which nothing is stored, and writes all. Returns what `difference`
    does.
    """
    day, finished = days(), finished_jobs()
    counted = counted_rows(finished, day)
    row_count = sa.func.count(counted.c.date)
    sums = {name: sa.func.sum(counted.c[name]) for name in COUNTS} | {"row_count": row_count, "inserted": row_count}
    outcome = _outcome(day, finished, _per_day(counted, sums), sa.false())
    entry = _ledger_entry(outcome)
    entered = sa.insert(ledger).from_select([*entry], sa.select(*entry.values()))
    inserted = _insert(counted, sa.select(counted))
    return sql_in_tenant(
        sa.select(outcome).add_cte(inserted.cte("inserted"), entered.cte("entered")).order_by(outcome.c.date)
    )


@lru_cache
def difference(is_in_doubt: bool = False) -> str:
    """The statement that computes a window and writes what differs. Returns a row per day: date, `is_held_back`, and
    DAY_NUMBERS.

    A day of which a stored number would fall is in doubt: `is_held_back` is null, and nothing is written. For such days
    there is the statement with `is_in_doubt`, which asks the source what it still holds, and so decides.
    """
    day, finished = days(), finished_jobs()
    stored = (
        sa.select(*(stats.c[name] for name in (*KEY, *NUMBERS))).where(stats.c.date.between(*_window)).cte("stored")
    )
    compared = _compared(counted_rows(finished, day), stored)
    sums = {name: sa.func.sum(compared.c[name]) for name in (*COUNTS, "stored_job_count", "stored_task_count")}
    counts = {
        "row_count": sa.func.count(compared.c.total_jobs),
        "stored_row_count": sa.func.count(compared.c.stored_date),
        "inserted": sa.func.count().filter(compared.c.change == "insert"),
        "updated": sa.func.count().filter(compared.c.change == "update"),
        "deleted": sa.func.count().filter(compared.c.change == "delete"),
    }
    falls = {name: sa.func.bool_or(compared.c[name]) for name in ("jobs_fall", "tasks_fall")}
    per_day = _per_day(compared, sums | counts | falls)

    unknown = sa.null()
    jobs_kept_since = kept_since(jobs, job_status, FINISHED) if is_in_doubt else unknown
    tasks_kept_since = kept_since(tasks, task_status, FINISHED_TASKS) if is_in_doubt else unknown
    # False where no number falls, or none may matter; else, as long as the comparison is with null, null.
    is_held_back = sa.not_(sa.bindparam("allow_shrink", type_=sa.Boolean)) & sa.or_(
        per_day.c.jobs_fall.is_(True) & (jobs_kept_since >= day.c.starts_at),
        per_day.c.tasks_fall.is_(True) & (tasks_kept_since >= day.c.starts_at),
    )
    outcome = _outcome(day, finished, per_day, is_held_back)

    # The rows to write: all that differ, on the days that are not held back, nor in doubt.
    changes = (
        sa.select(compared)
        .join(outcome, outcome.c.date == compared.c.date)
        .where(sa.not_(outcome.c.is_held_back), compared.c.change.is_not(None))
        .cte("changes")
    )
    same_row = sa.and_(*(stats.c[name] == changes.c[name] for name in KEY))
    values = {name: changes.c[name] for name in NUMBERS} | {"computed_at": sa.func.now()}
    inserted = _insert(changes, sa.select(changes).where(changes.c.change == "insert"))
    updated = sa.update(stats).values(values).where(same_row, changes.c.change == "update")
    deleted = sa.delete(stats).where(same_row, changes.c.change == "delete")
    written = (inserted.cte("inserted"), updated.cte("updated"), deleted.cte("deleted"), _entered(outcome))
    told = [
        sa.case((outcome.c.is_held_back, 0), else_=column).label(name)
        if name in ("inserted", "updated", "deleted")
        else column
        for name, column in outcome.c.items()
    ]
    return sql_in_tenant(sa.select(*told).add_cte(*written).order_by(outcome.c.date))


def _big(value: sa.ColumnElement[Any]) -> sa.ColumnElement[int]:
    return sa.cast(value, sa.BigInteger)


def _insert(rows: sa.CTE, chosen: sa.Select[Any]) -> sa.Insert:
    """All the rows that `chosen` selects of these."""
    values = {name: rows.c[name] for name in (*KEY, *NUMBERS)} | {
        "computed_at": sa.func.now(),
        "created_at": sa.func.now(),
    }
    return sa.insert(stats).from_select([*values], chosen.with_only_columns(*values.values()))


def _compared(counted: sa.CTE, stored: sa.CTE) -> sa.CTE:
    """Counted and stored rows side by side: what has to change, and which stored numbers would fall or vanish."""

    def falls(names: Sequence[str]) -> sa.ColumnElement[bool]:
        # A stored null, from before the batch knew the column, is no number and cannot fall.
        return sa.or_(*(sa.func.coalesce(counted.c[name], 0) < stored.c[name] for name in names))

    differs = sa.or_(*(counted.c[name].is_distinct_from(stored.c[name]) for name in NUMBERS))
    change = sa.case((stored.c.date.is_(None), "insert"), (counted.c.date.is_(None), "delete"), (differs, "update"))
    same_key = sa.and_(*(counted.c[name] == stored.c[name] for name in KEY))
    return (
        sa.select(
            *(sa.func.coalesce(counted.c[name], stored.c[name]).label(name) for name in KEY),
            *(counted.c[name] for name in NUMBERS),
            stored.c.date.label("stored_date"),
            change.label("change"),
            falls(JOB_COUNTS).label("jobs_fall"),
            falls(TASK_COUNTS).label("tasks_fall"),
            (
                sa.func.coalesce(stored.c.total_jobs, 0)
                + sa.func.coalesce(stored.c.cancelled_count, 0)
                + sa.func.coalesce(stored.c.expired_count, 0)
            ).label("stored_job_count"),
            stored.c.total_tasks.label("stored_task_count"),
        )
        .select_from(counted.join(stored, same_key, full=True))
        .cte("compared")
    )


def _per_day(rows: sa.CTE, columns: Mapping[str, sa.ColumnElement[Any]]) -> sa.Subquery:
    """These aggregates of the rows of each date."""
    return (
        sa.select(rows.c.date, *(column.label(name) for name, column in columns.items()))
        .group_by(rows.c.date)
        .subquery("per_day")
    )


def _outcome(day: sa.CTE, finished: sa.CTE, per_day: sa.Subquery, is_held_back: sa.ColumnElement[bool]) -> sa.CTE:
    """One row per day of the window: date, is_held_back, and DAY_NUMBERS, of which 0 are those that nobody gave."""
    unknown = unknown_marketplaces(finished)
    given = {**per_day.c, **unknown.c}
    return (
        sa.select(
            day.c.date,
            is_held_back.label("is_held_back"),
            *(_big(sa.func.coalesce(given.get(name), 0)).label(name) for name in DAY_NUMBERS),
        )
        .select_from(
            day.outerjoin(per_day, per_day.c.date == day.c.date).outerjoin(
                unknown, unknown.c.day_number == day.c.day_number
            )
        )
        .cte("outcome")
    )


def _ledger_entry(outcome: sa.CTE) -> dict[str, sa.ColumnElement[Any]]:
    """What the ledger says of a day, by its columns."""
    job_count = outcome.c.total_jobs + outcome.c.cancelled_count + outcome.c.expired_count
    task_count = outcome.c.total_tasks
    return {
        "date": outcome.c.date,
        "outcome": sa.case((outcome.c.is_held_back, "held_back"), else_="computed"),
        "time_zone": sa.bindparam("time_zone", type_=sa.Text),
        "job_count": job_count,
        "task_count": task_count,
        "stored_job_count": sa.case((outcome.c.is_held_back, outcome.c.stored_job_count), else_=job_count),
        "stored_task_count": sa.case((outcome.c.is_held_back, outcome.c.stored_task_count), else_=task_count),
        "unknown_marketplace_count": outcome.c.unknown_marketplace_count,
        "bad_duration_count": outcome.c.total_jobs - outcome.c.duration_count,
        "run_id": sa.bindparam("run_id", type_=sa.Text),
        "changed_at": sa.func.now(),
    }


def _entered(outcome: sa.CTE) -> sa.CTE:
    """The upsert of the ledger's rows that are new or differ; the others are left alone."""
    entry = _ledger_entry(outcome)
    stamp = ("date", "run_id", "changed_at")
    differs = sa.or_(*(ledger.c[name].is_distinct_from(value) for name, value in entry.items() if name not in stamp))
    new = insert(ledger).from_select(
        [*entry],
        sa.select(*entry.values())
        .join_from(outcome, ledger, ledger.c.date == outcome.c.date, isouter=True)
        .where(outcome.c.is_held_back.is_not(None), differs),
    )
    return new.on_conflict_do_update(
        index_elements=[ledger.c.date], set_={name: new.excluded[name] for name in entry if name != "date"}
    ).cte("entered")
