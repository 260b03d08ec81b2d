"""From the stats of many tenants to one row per day, marketplace and action: in SQL for a batch, then in pandas.

A statement over all of ten thousand tenants would be planned for ever and lock too much, so the database adds up some
at a time, and what is left to add is small.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import sqlalchemy as sa
from psycopg import sql

from assets.marketplace_daily_summary.table import COLUMNS, KEY
from assets.marketplace_job_stats.stats import COUNTS
from models.stats import MarketplaceJobStats
from pipelines import sketch
from pipelines.action_types import UNKNOWN
from pipelines.tenants import quoted

MOST_FAILING = 5
"""How many tenants are named in a row."""

_stats = MarketplaceJobStats.__table__
_READ = ("date", "marketplace", "action_type_id", *COUNTS, *sketch.COLUMNS)


def batch_query(schemas: Sequence[str]) -> sa.Select[Any]:
    """What these tenants did, one row per key, with `action_name`, every column of COUNTS, the sketch, and top_failing.

    Parameters: `first_date`, `last_date`; and as arrays `action_type_ids`, `action_codes`, `action_names`.
    """
    selects = (
        f"SELECT {sql.Literal(schema).as_string()} AS tenant, {', '.join(_READ)} FROM {quoted(schema)}.{_stats.name} "
        "WHERE date BETWEEN :first_date AND :last_date"
        for schema in schemas
    )
    columns = [sa.column("tenant", sa.Text), *(sa.column(name, _stats.c[name].type) for name in _READ)]
    stored = sa.text(" UNION ALL ".join(selects)).columns(*columns).subquery("stored")
    action = (
        sa.func.unnest(
            sa.bindparam("action_type_ids", type_=sa.ARRAY(sa.BigInteger)),
            sa.bindparam("action_codes", type_=sa.ARRAY(sa.Text)),
            sa.bindparam("action_names", type_=sa.ARRAY(sa.Text)),
        )
        .table_valued(sa.column("id", sa.BigInteger), sa.column("code", sa.Text), sa.column("name", sa.Text))
        .render_derived(name="action")
    )
    rows = (
        sa.select(
            stored,
            sa.func.coalesce(action.c.code, UNKNOWN).label("action_code"),
            sa.func.coalesce(action.c.name, UNKNOWN).label("action_name"),
        )
        .select_from(stored.outerjoin(action, action.c.id == stored.c.action_type_id))
        .cte("rows")
    )
    key = [rows.c[name] for name in KEY]
    is_active = rows.c.total_jobs + sa.func.coalesce(rows.c.cancelled_count + rows.c.expired_count, 0) > 0
    sums = (
        sa.select(
            *key,
            sa.func.min(rows.c.action_name).label("action_name"),
            sa.func.count(rows.c.tenant.distinct()).filter(is_active).label("tenants_active"),
            *(sa.cast(sa.func.coalesce(sa.func.sum(rows.c[name]), 0), sa.BigInteger).label(name) for name in COUNTS),
        )
        .group_by(*key)
        .subquery("sums")
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
        .where(ranked.c.rank <= MOST_FAILING)
        .group_by(*(ranked.c[name] for name in KEY))
        .subquery("failing")
    )
    merged = sketch.merged(rows, KEY).subquery("merged")
    return sa.select(sums, *(merged.c[name] for name in sketch.COLUMNS), failing.c.top_failing).select_from(
        sums.outerjoin(merged, sa.and_(*(merged.c[name] == sums.c[name] for name in KEY))).outerjoin(
            failing, sa.and_(*(failing.c[name] == sums.c[name] for name in KEY))
        )
    )


def add_up(parts: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """The rows of all batches as a summary frame: one row per key, sorted by it, with the columns COLUMNS."""
    if not parts:
        return pd.DataFrame(columns=list(COLUMNS))
    frame = pd.DataFrame([dict(part) for part in parts], dtype=object)
    return pd.DataFrame(
        [_add(dict(zip(KEY, key, strict=True)), rows) for key, rows in frame.groupby(list(KEY), sort=True)],
        columns=list(COLUMNS),
        dtype=object,
    )


def _add(key: dict[str, Any], rows: pd.DataFrame) -> dict[str, Any]:
    sums = {name: int(rows[name].sum()) for name in ("tenants_active", *COUNTS)}
    buckets = sketch.merge(rows)
    failing = [entry for entries in rows["top_failing"] for entry in entries or ()]
    count = sums["duration_count"]
    return {
        **key,
        "action_name": rows["action_name"].iloc[0],
        **sums,
        "success_rate": sums["success_count"] / sums["total_jobs"] if sums["total_jobs"] else None,
        # Halves away from zero, in whole numbers: as for a single tenant.
        "avg_duration_ms": (2 * sums["duration_sum_ms"] + count) // (2 * count) if count else None,
        **{name: sketch.percentile(buckets, *q) for name, q in sketch.PERCENTILES.items()},
        sketch.KEYS: list(buckets) or None,
        sketch.COUNTS: list(buckets.values()) or None,
        sketch.VERSION_COLUMN: sketch.VERSION if buckets else None,
        "top_failing": sorted(failing, key=lambda entry: (-entry["failures"], entry["tenant"]))[:MOST_FAILING],
    }
