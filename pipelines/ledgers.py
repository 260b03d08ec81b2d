"""What the tenants' ledgers say of the last closed days: for whom the last one is computed, and which days are due.

A day is due that a tenant's ledger lacks, has open, from an older definition, or from another time zone: what the
stats' own runs would compute, or refuse. A day that is held back is not.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import date
from typing import Any

import sqlalchemy as sa
from psycopg import sql

from assets.marketplace_job_stats import DEFINITION
from models.sources import MarketplaceJob
from models.stats import MarketplaceJobStats, MarketplaceJobStatsDay
from pipelines.partitions import Window
from pipelines.resources import TenantDatabase
from pipelines.tenants import Tenant, choose_tenants, quoted

BATCH = 50
"""How many tenants one statement reads."""

OUTCOMES = {
    "computed": "by the newest definition",
    "outdated": "by an older definition, or in another time zone",
    "held_back": "the stored numbers are kept",
    "open": "computed while the day was not over",
    "counter_only": "no entry in the ledger, but rows of the old counter",
    "missing": "no entry in the ledger",
    "new": "no job has ended before today, so nothing is missing",
    "skipped": "no table of jobs",
    "unreadable": "the ledger cannot be read",
}
"""What the last closed day is for a tenant."""

_JOBS, _STATS, _LEDGER = (
    model.__tablename__ for model in (MarketplaceJob, MarketplaceJobStats, MarketplaceJobStatsDay)
)


@dataclass(frozen=True)
class Ledgers:
    """How many tenants the last day has each of OUTCOMES for, and which days some tenant lacks, the first one first."""

    outcomes: dict[str, int]
    due: tuple[date, ...]


def read_ledgers(database: TenantDatabase, window: Window, timeout_s: float) -> Ledgers:
    """Reads the ledgers of all tenants over these days. Of a tenant that cannot be read, no day is known to be due.

    Raises UsageError or a DBAPIError if the database cannot be read, and TimeoutError after so many seconds.
    """
    deadline = time.monotonic() + timeout_s
    parameters = {
        "first_date": window.dates[0],
        "last_date": window.dates[-1],
        "end": window.end,
        "day_count": len(window.dates),
        "time_zone": window.time_zone,
        "definition": DEFINITION,
    }
    with database.connect() as (engine, connection):
        with connection.begin():
            tenants = choose_tenants(connection)

        def read(of: Sequence[Tenant], select: Callable[[Tenant], str], frame: str) -> Iterator[tuple[str, Any]]:
            """Each tenant with its row, or None, of one statement over a batch of them; where it fails, over each. A
            tenant for which it fails then is left out."""

            def work(connection: sa.Connection, batch: Sequence[Tenant]) -> Sequence[Any]:
                query = sa.text(frame.format(" UNION ALL ".join(map(select, batch))))
                with connection.begin():
                    # Several batches are read at once anyway.
                    connection.exec_driver_sql("SET LOCAL max_parallel_workers_per_gather = 0")
                    return connection.execute(query, parameters).all()

            for size in (BATCH, 1):
                batches = [of[start : start + size] for start in range(0, len(of), size)]
                of = []
                timeout_s = max(0, deadline - time.monotonic())
                with closing(database.for_each(engine, batches, work, timeout_s)) as outcomes:
                    for batch, outcome in outcomes:
                        if isinstance(outcome, Exception):
                            of = [*of, *batch]
                        else:
                            rows = {row.tenant: row for row in outcome}
                            yield from ((tenant.schema, rows.get(tenant.schema)) for tenant in batch)

        found = dict(read([tenant for tenant in tenants if not tenant.unreadable], _entries, _BY_TENANT))
        outcomes = {tenant.schema: _outcome(tenant, found) for tenant in tenants}
        # New customers come during the day, and lack what nobody expects of them.
        doubtful = [tenant for tenant in tenants if outcomes[tenant.schema] in ("missing", "unreadable")]
        for schema, row in read(doubtful, _other_traces, "{}"):
            if row.is_counted:
                outcomes[schema] = "counter_only"
            elif row.is_new:
                outcomes[schema] = "new"
    due: set[date] = set()
    for schema, row in found.items():
        if outcomes[schema] not in ("new", "skipped") and (row is None or row.current_dates is not None):
            due.update(set(window.dates).difference(row.current_dates if row else ()))
    counts = Counter(outcomes.values())
    return Ledgers({outcome: counts[outcome] for outcome in OUTCOMES}, tuple(sorted(due)))


def _outcome(tenant: Tenant, found: Mapping[str, Any]) -> str:
    """What the last day is for this tenant, by the row of its ledger; one that is not among them could not be read."""
    row = found.get(tenant.schema)
    if tenant.skipped and (row is None or row.outcome is None):
        return "skipped"
    if tenant.schema not in found:
        return "unreadable"
    if row is None or row.outcome is None:
        return "missing"
    return str(row.outcome) if row.outcome != "computed" or row.is_current else "outdated"


def _entries(tenant: Tenant) -> str:
    """The entries of these days, and which of them are not due."""
    name = sql.Literal(tenant.schema).as_string()
    return (
        f"SELECT {name} AS tenant, date, outcome::text, time_zone = :time_zone AND definition >= :definition "
        f"AND outcome::text <> 'open' AS is_current FROM {quoted(tenant.schema)}.{_LEDGER} "
        "WHERE date BETWEEN :first_date AND :last_date"
    )


# One row a tenant: the outcome of the last day, and the days that are not due; null if none is.
_BY_TENANT = """
    SELECT tenant,
           max(outcome) FILTER (WHERE date = :last_date) AS outcome,
           bool_or(is_current) FILTER (WHERE date = :last_date) AS is_current,
           CASE WHEN count(*) FILTER (WHERE is_current) < :day_count
                THEN coalesce(array_agg(date) FILTER (WHERE is_current), '{{}}') END AS current_dates
      FROM ({}) AS entries
     GROUP BY tenant
"""


def _other_traces(tenant: Tenant) -> str:
    """Whether the old counter has counted on the last day, and whether no job had ended by its end."""
    schema = quoted(tenant.schema)
    is_counted = f"EXISTS (SELECT FROM {schema}.{_STATS} WHERE date = :last_date AND computed_at IS NULL)"
    return (
        f"SELECT {sql.Literal(tenant.schema).as_string()} AS tenant, "
        f"{'false' if tenant.unreadable else is_counted} AS is_counted, "
        f"NOT EXISTS (SELECT FROM {schema}.{_JOBS} WHERE completed_at < :end) AS is_new"
    )
