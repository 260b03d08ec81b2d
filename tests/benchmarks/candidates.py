"""What the benchmark compares: the limits and ours; what a user would write instead is in `tests.benchmarks.users`.

A candidate is a function of (conninfo, tenants, first day, last day). It leaves its rows in a table of each tenant, so
that all can be compared cell by cell; the limits that write nothing are compared by their query. The days are those of
UTC, in every candidate. All have the same number of connections, and SQL runs with the settings of our own connections,
which favours it. Nobody but us keeps a sketch or a ledger, compares before he writes, holds a day back, or proves.
"""

import importlib.util
import os
import queue
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, time, timedelta
from functools import cache, partial
from typing import Any, Literal

import pandas as pd
import psycopg

from tests.conftest import url_of

CONNECTIONS = 4
SETTINGS = "-c jit=off -c synchronous_commit=off"
"""Those of our own connections. Who writes waits for the disk once, at the end, as we do."""

KEY = ("date", "action_type_id", "marketplace")
COUNTS = (
    "total_jobs",
    "success_count",
    "failure_count",
    "cancelled_count",
    "expired_count",
    "retry_count",
    "duration_count",
    "duration_sum_ms",
    "total_tasks",
    "task_success_count",
    "task_failure_count",
    "task_retry_count",
)
EXACT = (*COUNTS, "avg_duration_ms")
PERCENTILES = ("p50_duration_ms", "p95_duration_ms")
SKETCH = ("duration_sketch_keys", "duration_sketch_counts", "duration_sketch_version")

OURS = "marketplace_job_stats"
DATED = (OURS, "marketplace_job_stats_days", "marketplace_job_facts")
"""Our tables that are filled day by day."""
OUR_TABLES = (*DATED, "marketplace_job_stats_changes")

Frames = dict[str, pd.DataFrame]
Run = Callable[[str, Sequence[str], date, date], None]


@dataclass(frozen=True)
class Candidate:
    """`kind`: limit, ours or user's. `columns`: what it computes beyond EXACT. Its rows are in `table` of each tenant
    that it worked on, or are what `query` returns for a tenant.

    `packages` are the modules that it needs. Where `sampled`, it is too slow to be run whole: over a year it gets some
    of the tenants only, or, if `by_day`, some of the days, and its time is scaled up to all. `only`: the tenants that
    have jobs in the window, or those that have none; its time is given as if all were like them.
    """

    name: str
    kind: str
    run: Run
    columns: tuple[str, ...] = ()
    table: str | None = None
    query: Callable[[str], str] | None = None
    packages: tuple[str, ...] = ()
    sampled: bool = False
    by_day: bool = False
    only: Literal["busy", "quiet"] | None = None

    def missing(self) -> list[str]:
        return [name for name in self.packages if importlib.util.find_spec(name) is None]


def window(first: date, last: date) -> dict[str, Any]:
    """The bound parameters of all the SQL here, those of the project's own query included."""
    starts = [datetime.combine(first + timedelta(days=n), time(), UTC) for n in range((last - first).days + 2)]
    return {
        "dates": [start.date() for start in starts[:-1]],
        "starts": starts[:-1],
        "window_start": starts[0],
        "window_end": starts[-1],
    }


def each_tenant(
    conninfo: str, tenants: Sequence[str], work: Callable[[Any, str], Any], connect: Callable[[], Any] | None = None
) -> dict[str, Any]:
    """What `work` returned for each tenant; on CONNECTIONS connections, each used by one thread at a time."""
    free: queue.SimpleQueue[Any] = queue.SimpleQueue()
    with ExitStack() as stack:
        for _ in range(min(CONNECTIONS, len(tenants))):
            opened = connect() if connect else psycopg.connect(conninfo, autocommit=True, options=SETTINGS)
            free.put(stack.enter_context(opened))

        def call(tenant: str) -> Any:
            connection = free.get()
            try:
                return work(connection, tenant)
            finally:
                free.put(connection)

        with ThreadPoolExecutor(CONNECTIONS) as executor:
            return dict(zip(tenants, executor.map(call, tenants), strict=True))


def execute(
    conninfo: str,
    tenants: Sequence[str],
    statement: Callable[[str], str],
    first: date,
    last: date,
    *,
    writes: bool = False,
) -> None:
    """The statement for each tenant, over the window; what it wrote is on disk afterwards."""
    parameters = window(first, last)

    def work(connection: psycopg.Connection[Any], tenant: str) -> None:
        connection.execute(statement(tenant).encode(), parameters, prepare=False)

    each_tenant(conninfo, tenants, work)
    if writes:
        make_durable(conninfo)


def make_durable(conninfo: str) -> None:
    """Waits until all that was committed before is on disk: the log is written in order."""
    with psycopg.connect(conninfo) as connection:
        connection.execute("SELECT pg_logical_emit_message(true, 'benchmark', '')")


# The hand-written SQL. In all of it, SCHEMA stands for the tenant. -------------------------------------------------

# The finished jobs of the window. Microseconds are whole numbers that a double holds exactly, which is faster than the
# numeric that EXTRACT returns.
FINISHED = """
    SELECT id, (completed_at AT TIME ZONE 'UTC')::date AS date, action_type_id, marketplace, status, retry_count,
           CASE WHEN status IN ('completed', 'failed') AND started_at <= completed_at
                 AND started_at > completed_at - interval '2147483647.5 ms'
                THEN (floor(date_part('epoch', completed_at - started_at) * 1e6 + 0.5)::bigint + 500) / 1000 END AS ms
      FROM SCHEMA.marketplace_jobs
     WHERE completed_at >= %(window_start)s AND completed_at < %(window_end)s
       AND status IN ('completed', 'failed', 'cancelled', 'expired') AND marketplace IN ('vinted', 'ebay', 'etsy')"""
JOB_SUMS = """
           count(*) FILTER (WHERE status IN ('completed', 'failed')) AS total_jobs,
           count(*) FILTER (WHERE status = 'completed') AS success_count,
           count(*) FILTER (WHERE status = 'failed') AS failure_count,
           count(*) FILTER (WHERE status = 'cancelled') AS cancelled_count,
           count(*) FILTER (WHERE status = 'expired') AS expired_count,
           coalesce(sum(retry_count) FILTER (WHERE status IN ('completed', 'failed')), 0)::bigint AS retry_count,
           count(ms) AS duration_count, coalesce(sum(ms), 0)::bigint AS duration_sum_ms,
           (2 * sum(ms)::bigint + count(ms)) / nullif(2 * count(ms), 0) AS avg_duration_ms"""
TASK_SUMS = """
           count(*) AS total_tasks,
           count(*) FILTER (WHERE t.status = 'success') AS task_success_count,
           count(*) FILTER (WHERE t.status IN ('failed', 'timeout')) AS task_failure_count,
           coalesce(sum(t.retry_count), 0)::bigint AS task_retry_count"""
ITS_TASKS = """t.job_id = f.id AND f.status IN ('completed', 'failed')
                                         AND t.status IN ('success', 'failed', 'timeout')"""
TASK_NAMES = ("total_tasks", "task_success_count", "task_failure_count", "task_retry_count")
OUTER_SUMS = ", ".join(f"coalesce(sum({name}), 0)::bigint AS {name}" for name in TASK_NAMES)

# The tasks of each job, then the jobs of each row: as one writes it first.
_TWICE = f"""
    SELECT date, action_type_id, marketplace, {JOB_SUMS}, {OUTER_SUMS} PERCENTILES
      FROM (SELECT f.id, f.date, f.action_type_id, f.marketplace, f.status, f.retry_count, f.ms,
                   count(t.status) AS total_tasks,
                   count(*) FILTER (WHERE t.status = 'success') AS task_success_count,
                   count(*) FILTER (WHERE t.status IN ('failed', 'timeout')) AS task_failure_count,
                   sum(t.retry_count) AS task_retry_count
              FROM ({FINISHED}) AS f LEFT JOIN SCHEMA.marketplace_tasks AS t ON {ITS_TASKS}
             GROUP BY f.id, f.date, f.action_type_id, f.marketplace, f.status, f.retry_count, f.ms) AS job
     GROUP BY date, action_type_id, marketplace"""
# The finished jobs once; jobs and tasks summed apart, by the same key, and joined.
_APART = f"""
    WITH f AS MATERIALIZED ({FINISHED}),
         j AS (SELECT date, action_type_id, marketplace, {JOB_SUMS} PERCENTILES FROM f GROUP BY 1, 2, 3),
         k AS (SELECT date, action_type_id, marketplace, {TASK_SUMS}
                 FROM f JOIN SCHEMA.marketplace_tasks AS t ON {ITS_TASKS} GROUP BY 1, 2, 3)
    SELECT j.*, {", ".join(f"coalesce(k.{name}, 0) AS {name}" for name in TASK_NAMES)}
      FROM j LEFT JOIN k USING (date, action_type_id, marketplace)"""
# The tasks of each job first, of all jobs; only for long windows can that be good.
_TASKS_FIRST = f"""
    SELECT date, action_type_id, marketplace, {JOB_SUMS}, {OUTER_SUMS} PERCENTILES
      FROM ({FINISHED}) AS f
      LEFT JOIN (SELECT job_id, {TASK_SUMS}
                   FROM SCHEMA.marketplace_tasks AS t WHERE t.status IN ('success', 'failed', 'timeout')
                  GROUP BY job_id) AS k ON k.job_id = f.id AND f.status IN ('completed', 'failed')
     GROUP BY date, action_type_id, marketplace"""
_PERCENTILES = """,
           percentile_disc(0.5) WITHIN GROUP (ORDER BY ms)::double precision AS p50_duration_ms,
           percentile_disc(0.95) WITHIN GROUP (ORDER BY ms)::double precision AS p95_duration_ms"""


def exact(tenant: str) -> str:
    """The SELECT that says what is right: everything but the sketch, with exact percentiles."""
    return _TWICE.replace("PERCENTILES", _PERCENTILES).replace("SCHEMA", tenant)


@cache
def _aggregate() -> str:
    # Imported here, so that the process of a candidate that measures something else does not load the project.
    from tests.benchmarks.aggregate import text

    return text("SCHEMA")


def aggregate(tenant: str) -> str:
    """The aggregating SELECT, with sketch and percentiles."""
    return _aggregate().replace("SCHEMA", tenant)


PLAIN = {"twice": _TWICE, "apart": _APART, "tasks first": _TASKS_FIRST}
"""The same numbers without percentiles and sketch, by hand, in several shapes; the fastest is the limit."""


def plain(shape: str, tenant: str) -> str:
    """The hand-written SELECT of this shape."""
    return PLAIN[shape].replace("PERCENTILES", "").replace("SCHEMA", tenant)


def _bare(select: str) -> str:
    # Everything is computed, nothing travels. As a CTE that is counted over, no column may be left out.
    return f"WITH x AS MATERIALIZED ({select}) SELECT count(*) FROM x"


def inserted(select: str, table: str, columns: Sequence[str]) -> str:
    names = ", ".join((*KEY, *columns))
    return f"INSERT INTO {table} ({names}) SELECT {names} FROM ({select}) AS x"


# The limits. -------------------------------------------------------------------------------------------------------


def run_aggregate(conninfo: str, tenants: Sequence[str], first: date, last: date) -> None:
    """Computes counts, percentiles and sketch on the server; writes nothing."""
    execute(conninfo, tenants, lambda tenant: _bare(aggregate(tenant)), first, last)


def run_plain(shape: str, conninfo: str, tenants: Sequence[str], first: date, last: date) -> None:
    """Computes counts, sums and mean on the server; writes nothing."""
    execute(conninfo, tenants, lambda tenant: _bare(plain(shape, tenant)), first, last)


def run_insert_aggregate(conninfo: str, tenants: Sequence[str], first: date, last: date) -> None:
    """Computes counts, percentiles and sketch, and inserts them, without a question, into an empty table."""
    from tests.benchmarks.aggregate import NUMBERS

    def statement(tenant: str) -> str:
        return inserted(aggregate(tenant), f"{tenant}.stats_limit", NUMBERS)

    execute(conninfo, tenants, statement, first, last, writes=True)


def run_insert_plain(shape: str, conninfo: str, tenants: Sequence[str], first: date, last: date) -> None:
    """Computes counts, sums and mean, and inserts them, without a question, into an empty table."""

    def statement(tenant: str) -> str:
        return inserted(plain(shape, tenant), f"{tenant}.stats_plain", EXACT)

    execute(conninfo, tenants, statement, first, last, writes=True)


# Ours. -------------------------------------------------------------------------------------------------------------


@cache
def _job() -> Any:
    import logging

    from pipelines.definitions import build_defs
    from pipelines.settings import Settings

    logging.disable(logging.CRITICAL)
    settings = Settings.from_env({"STATS_START_DATE": "2024-01-01", "STATS_WORKERS": str(CONNECTIONS)})
    return build_defs(settings).resolve_job_def("marketplace_job_stats_job")


def run_ours(conninfo: str, tenants: Sequence[str], first: date, last: date) -> None:
    """The asset, run by Dagster, for all tenants of the database: everything computed, compared, written, proved and
    reported. The process has loaded the definitions before; Dagster's own storage is in memory.
    """
    os.environ["DATABASE_URL"] = url_of(conninfo)
    tags = {"dagster/asset_partition_range_start": str(first), "dagster/asset_partition_range_end": str(last)}
    assert _job().execute_in_process(tags=tags).success


def run_statements(conninfo: str, tenants: Sequence[str], first: date, last: date) -> None:
    """Ours without Dagster: the same transactions, by the same workers, with nobody to report to.

    What is between it and `ours` is Dagster's: the events and metadata of each day, however many tenants there are.
    """
    import dagster as dg

    from assets.marketplace_job_stats.transaction import ComputeSpec, write_tenant
    from pipelines.database import make_durable
    from pipelines.partitions import Days, Window
    from pipelines.resources import TenantDatabase

    os.environ["DATABASE_URL"] = url_of(conninfo)
    partitions = dg.DailyPartitionsDefinition(start_date="2024-01-01", timezone="UTC")
    keys = partitions.get_partition_keys_in_range(dg.PartitionKeyRange(str(first), str(last)))
    spec = ComputeSpec(Window.of(partitions, keys), "benchmark", Days(partitions))
    database = TenantDatabase(workers=CONNECTIONS, lock_timeout_ms=10_000, statement_timeout_ms=1_800_000)
    with database.connect() as (engine, sentinel):
        for _, outcome in database.for_each(
            engine, tenants, lambda on, tenant: write_tenant(on, tenant, spec, has_tasks=True)
        ):
            if isinstance(outcome, Exception):
                raise outcome
        make_durable(sentinel, "benchmark")


def run_ours_by_day(conninfo: str, tenants: Sequence[str], first: date, last: date) -> None:
    """The same, one run after the other for each day."""
    for n in range((last - first).days + 1):
        run_ours(conninfo, tenants, first + timedelta(days=n), first + timedelta(days=n))


_ALL = (*PERCENTILES, *SKETCH)
AGGREGATE = Candidate("aggregate", "limit", run_aggregate, _ALL, query=aggregate)
PLAINS = tuple(
    Candidate(f"plain, {shape}", "limit", partial(run_plain, shape), query=partial(plain, shape)) for shape in PLAIN
)
INSERT_AGGREGATE = Candidate("insert aggregate", "limit", run_insert_aggregate, _ALL, table="stats_limit")
INSERT_PLAINS = tuple(
    Candidate(f"insert plain, {shape}", "limit", partial(run_insert_plain, shape), table="stats_plain")
    for shape in PLAIN
)
OURSELVES = Candidate("ours", "ours", run_ours, _ALL, table=OURS)
STATEMENTS = Candidate("ours, no Dagster", "ours", run_statements, _ALL, table=OURS)
BUSY = replace(STATEMENTS, name="ours, tenants with jobs", only="busy")
QUIET = replace(STATEMENTS, name="ours, tenants without", only="quiet")
BY_DAY = Candidate("ours, a run a day", "ours", run_ours_by_day, _ALL, table=OURS, sampled=True, by_day=True)
