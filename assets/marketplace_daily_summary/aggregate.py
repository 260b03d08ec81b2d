"""From the stats of many tenants to one row per day, marketplace and action: in SQL for a batch, then in pandas.

A statement over all of ten thousand tenants would be planned for ever and lock too much, so the database adds up some
at a time, and what is left to add is small.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd
import sqlalchemy as sa
from psycopg import sql

from assets.marketplace_daily_summary.table import COLUMNS, KEY, summary
from assets.marketplace_job_stats import DEFINITION
from assets.sketch import MEASURES
from models.stats import MarketplaceJobFact, MarketplaceJobStats, MarketplaceJobStatsDay
from models.summary import MOST_NAMED
from pipelines.action_types import UNKNOWN
from pipelines.tenants import quoted

SUMS = tuple(column.name for column in summary.columns if isinstance(column.type, sa.BigInteger))
"""The columns that add up: the summary has each of them as a bigint."""

_stats, _ledger, _facts = (
    model.__table__ for model in (MarketplaceJobStats, MarketplaceJobStatsDay, MarketplaceJobFact)
)
_READ = (*(name for measure in MEASURES for name in measure.sketch), *SUMS)


def batch_query(schemas: Sequence[str]) -> sa.Select[Any]:
    """What these tenants did, one row per key, with `action_name`, every column of SUMS, the sketches, top_failing, the
    `action_ids` that it comes from, and how many of the active tenants have numbers of an older definition: in the row
    (`tenants_older_definition`), and on the whole day (`tenants_older_on_date`, null if none has).

    Parameters: `first_date`, `last_date`; and as arrays `action_type_ids`, `action_codes`, `action_names`.
    """
    stored = _of_each(schemas, _stats, ("date", "marketplace", "action_type_id", *_READ), "stored")
    ledger = _of_each(schemas, _ledger, ("date", "outcome", "definition"), "ledger")
    # Who has no entry was never computed: the old live counter has left its rows. A day that is held back has rows
    # that this definition could not account for, although it was judged by it.
    is_current = sa.and_(ledger.c.definition >= DEFINITION, ledger.c.outcome != "held_back")
    is_active = stored.c.total_jobs + sa.func.coalesce(stored.c.cancelled_count + stored.c.expired_count, 0) > 0
    action = _action_types()
    rows = (
        sa.select(
            stored,
            sa.func.coalesce(action.c.code, UNKNOWN).label("action_code"),
            sa.func.coalesce(action.c.name, UNKNOWN).label("action_name"),
            is_active.label("is_active"),
            sa.and_(is_active, is_current.is_not(True)).label("is_older"),
        )
        .select_from(
            stored.outerjoin(action, action.c.id == stored.c.action_type_id).outerjoin(
                ledger, sa.and_(ledger.c.tenant == stored.c.tenant, ledger.c.date == stored.c.date)
            )
        )
        .cte("rows")
    )
    key = [rows.c[name] for name in KEY]
    tenants = sa.func.count(rows.c.tenant.distinct())
    sums = (
        sa.select(
            *key,
            sa.func.min(rows.c.action_name).label("action_name"),
            sa.func.array_agg(rows.c.action_type_id.distinct()).label("action_ids"),
            tenants.filter(rows.c.is_active).label("tenants_active"),
            tenants.filter(rows.c.is_older).label("tenants_older_definition"),
            *(sa.cast(sa.func.coalesce(sa.func.sum(rows.c[name]), 0), sa.BigInteger).label(name) for name in SUMS),
        )
        .group_by(*key)
        .subquery("sums")
    )
    # A tenant may be in several rows of a day, so the rows' numbers do not add up to the day's.
    on_date = (
        sa.select(rows.c.date, tenants.label("tenants_older_on_date"))
        .where(rows.c.is_older)
        .group_by(rows.c.date)
        .subquery("on_date")
    )
    by_tenant = (
        sa.select(*key, rows.c.tenant, sa.func.sum(rows.c.failure_count).label("failures"))
        .where(rows.c.failure_count > 0)
        .group_by(*key, rows.c.tenant)
        .subquery("by_tenant")
    )
    rank = sa.func.row_number().over(
        partition_by=[by_tenant.c[name] for name in KEY], order_by=(by_tenant.c.failures.desc(), by_tenant.c.tenant)
    )
    ranked = sa.select(by_tenant, rank.label("rank")).subquery("ranked")
    entry = sa.func.jsonb_build_object("tenant", ranked.c.tenant, "failures", ranked.c.failures)
    failing = (
        sa.select(*(ranked.c[name] for name in KEY), sa.func.jsonb_agg(entry).label("top_failing"))
        .where(ranked.c.rank <= MOST_NAMED)
        .group_by(*(ranked.c[name] for name in KEY))
        .subquery("failing")
    )
    merged = [measure.merged(rows, KEY).subquery(f"merged_{measure.name}") for measure in MEASURES]
    joined = sums.outerjoin(on_date, on_date.c.date == sums.c.date)
    for part in (*merged, failing):
        joined = joined.outerjoin(part, sa.and_(*(part.c[name] == sums.c[name] for name in KEY)))
    sketches = (part.c[name] for part, measure in zip(merged, MEASURES, strict=True) for name in measure.sketch)
    return sa.select(sums, on_date.c.tenants_older_on_date, *sketches, failing.c.top_failing).select_from(joined)


def active_query(schemas: Sequence[str]) -> sa.TextClause:
    """Which of these tenants have a job on a day, and when the first of its stats rows was written: `date`, `tenant`,
    `first_written`. Parameters: `first_date`, `last_date`."""
    columns = ("date", "total_jobs", "cancelled_count", "expired_count", "created_at")
    return sa.text(f"""
        SELECT CAST(date AS date) AS date, tenant, min(created_at) AS first_written
          FROM ({of_each(schemas, _stats, columns, in_window=True)}) AS stored
         WHERE total_jobs + coalesce(cancelled_count, 0) + coalesce(expired_count, 0) > 0
         GROUP BY 1, 2""")


def reasons_query(schemas: Sequence[str]) -> sa.Select[Any]:
    """Why the jobs of these tenants failed: KEY, `failure_reason`, and how many `jobs` of how many `tenants`.

    All reasons, since one that is rare in each batch may be frequent over all. They are not many: whatever is about one
    case is taken out of a reason, so that those of a key are at most its failed jobs, and mostly a handful.

    Parameters: those of `batch_query`.
    """
    has_failed = "AND status = 'failed' AND failure_reason IS NOT NULL"
    facts = _of_each(schemas, _facts, ("date", "marketplace", "action_type_id", "failure_reason"), "facts", has_failed)
    action = _action_types()
    code = sa.func.coalesce(action.c.code, UNKNOWN)
    # First each tenant's, so that a tenant is counted once without sorting its jobs.
    by_tenant = (
        sa.select(
            facts.c.date,
            facts.c.marketplace,
            code.label("action_code"),
            facts.c.failure_reason,
            sa.func.count().label("jobs"),
        )
        .select_from(facts.outerjoin(action, action.c.id == facts.c.action_type_id))
        .group_by(facts.c.tenant, facts.c.date, facts.c.marketplace, code, facts.c.failure_reason)
        .subquery("by_tenant")
    )
    reason = [by_tenant.c[name] for name in (*KEY, "failure_reason")]
    jobs = sa.cast(sa.func.sum(by_tenant.c.jobs), sa.BigInteger)
    return sa.select(*reason, jobs.label("jobs"), sa.func.count().label("tenants")).group_by(*reason)


def _of_each(schemas: Sequence[str], table: sa.Table, names: Sequence[str], name: str, condition: str = "") -> Any:
    """These columns of all these tenants' tables, and `tenant`, from `first_date` to `last_date`."""
    columns = [sa.column("tenant", sa.Text), *(sa.column(column, table.c[column].type) for column in names)]
    return sa.text(of_each(schemas, table, names, condition, in_window=True)).columns(*columns).subquery(name)


def of_each(
    schemas: Sequence[str], table: sa.Table, names: Sequence[str], condition: str = "", in_window: bool = False
) -> str:
    """The same as SQL; of all dates, unless it is `in_window`."""
    where = f" WHERE date BETWEEN :first_date AND :last_date {condition}" if in_window else ""
    return " UNION ALL ".join(
        f"SELECT {sql.Literal(schema).as_string()} AS tenant, {', '.join(names)} "
        f"FROM {quoted(schema)}.{table.name}{where}"
        for schema in schemas
    )


def _action_types() -> Any:
    """The given action types: `id`, `code` and `name`."""
    return (
        sa.func.unnest(
            sa.bindparam("action_type_ids", type_=sa.ARRAY(sa.BigInteger)),
            sa.bindparam("action_codes", type_=sa.ARRAY(sa.Text)),
            sa.bindparam("action_names", type_=sa.ARRAY(sa.Text)),
        )
        .table_valued(sa.column("id", sa.BigInteger), sa.column("code", sa.Text), sa.column("name", sa.Text))
        .render_derived(name="action")
    )


def add_up_reasons(rows: Iterable[Mapping[str, Any]]) -> dict[tuple[Any, ...], list[dict[str, Any]]]:
    """The reasons of each key, the most frequent first, from the rows of `reasons_query` of all batches, which share no
    tenant.

    The rows are taken one by one, and added up, so that a reason is held once for a key, however many batches have it.
    """
    jobs: Counter[tuple[Any, ...]] = Counter()
    tenants: Counter[tuple[Any, ...]] = Counter()
    for row in rows:
        reason = tuple(row[name] for name in (*KEY, "failure_reason"))
        jobs[reason] += row["jobs"]
        tenants[reason] += row["tenants"]
    found: defaultdict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for reason in sorted(jobs, key=lambda reason: (-jobs[reason], reason[-1])):
        found[reason[:-1]].append({"reason": reason[-1], "jobs": jobs[reason], "tenants": tenants[reason]})
    return dict(found)


def top_reasons(rows: Iterable[Mapping[str, Any]]) -> dict[tuple[Any, ...], list[dict[str, Any]]]:
    """The most frequent of them."""
    return {key: reasons[:MOST_NAMED] for key, reasons in add_up_reasons(rows).items()}


def add_up(parts: Sequence[Mapping[str, Any]], reasons: Mapping[tuple[Any, ...], list[dict[str, Any]]]) -> pd.DataFrame:
    """The rows of all batches, or databases, as a summary frame with COLUMNS: one row per key, sorted by it.

    They share no tenant; what comes out is the same for any way to part them.
    """
    if not parts:
        return pd.DataFrame(columns=list(COLUMNS))
    frame = pd.DataFrame([dict(part) for part in parts], dtype=object)
    return pd.DataFrame(
        [
            dict(zip(KEY, key, strict=True))
            | _add(rows)
            | {"top_reasons": reasons.get(key, [])[:MOST_NAMED], "failure_reasons": reasons.get(key, [])}
            for key, rows in frame.groupby(list(KEY), sort=True)
        ],
        columns=list(COLUMNS),
        dtype=object,
    )


def _add(rows: pd.DataFrame) -> dict[str, Any]:
    """The rows of one key together."""
    sums = {name: int(rows[name].sum()) for name in ("tenants_active", "tenants_older_definition", *SUMS)}
    failing = [entry for entries in rows["top_failing"] for entry in entries or ()]
    return {
        "action_name": rows["action_name"].min(),
        **sums,
        "success_rate": sums["success_count"] / sums["total_jobs"] if sums["total_jobs"] else None,
        **{name: value for measure in MEASURES for name, value in measure.add_up(rows).items()},
        "top_failing": sorted(failing, key=lambda entry: (-entry["failures"], entry["tenant"]))[:MOST_NAMED],
    }
