"""What the benchmark compares: the limits, ours, and what a user would write instead.

A candidate is a function of (conninfo, tenants, first day, last day). It leaves its rows in a table of each tenant, so
that all can be compared cell by cell; the limits that write nothing are compared by their query. The days are those of
UTC, in every candidate. All have the same number of connections, and SQL runs with the settings of our own connections,
which favours it. Nobody but us keeps a sketch or a ledger, compares before he writes, holds a day back, or proves.
"""

import importlib.util
import os
import queue
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from functools import cache, partial
from pathlib import Path
from typing import Any

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
LEDGER = "marketplace_job_stats_days"

Frames = dict[str, pd.DataFrame]
Run = Callable[[str, Sequence[str], date, date], None]


@dataclass(frozen=True)
class Candidate:
    """`kind`: limit, ours or user's. `columns`: what it computes beyond EXACT. Its rows are in `table` of each tenant
    that it worked on, or are what `query` returns for a tenant.

    `packages` are the modules that it needs. Where `sampled`, it is too slow to be run whole: over a year it gets some
    of the tenants only, or, if `by_day`, some of the days, and its time is told for all.
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
_FINISHED = """
    SELECT id, (completed_at AT TIME ZONE 'UTC')::date AS date, action_type_id, marketplace, status, retry_count,
           CASE WHEN status IN ('completed', 'failed') AND started_at <= completed_at
                 AND started_at > completed_at - interval '2147483647.5 ms'
                THEN (floor(date_part('epoch', completed_at - started_at) * 1e6 + 0.5)::bigint + 500) / 1000 END AS ms
      FROM SCHEMA.marketplace_jobs
     WHERE completed_at >= %(window_start)s AND completed_at < %(window_end)s
       AND status IN ('completed', 'failed', 'cancelled', 'expired') AND marketplace IN ('vinted', 'ebay', 'etsy')"""
_JOB_SUMS = """
           count(*) FILTER (WHERE status IN ('completed', 'failed')) AS total_jobs,
           count(*) FILTER (WHERE status = 'completed') AS success_count,
           count(*) FILTER (WHERE status = 'failed') AS failure_count,
           count(*) FILTER (WHERE status = 'cancelled') AS cancelled_count,
           count(*) FILTER (WHERE status = 'expired') AS expired_count,
           coalesce(sum(retry_count) FILTER (WHERE status IN ('completed', 'failed')), 0)::bigint AS retry_count,
           count(ms) AS duration_count, coalesce(sum(ms), 0)::bigint AS duration_sum_ms,
           (2 * sum(ms)::bigint + count(ms)) / nullif(2 * count(ms), 0) AS avg_duration_ms"""
_TASK_SUMS = """
           count(*) AS total_tasks,
           count(*) FILTER (WHERE t.status = 'success') AS task_success_count,
           count(*) FILTER (WHERE t.status IN ('failed', 'timeout')) AS task_failure_count,
           coalesce(sum(t.retry_count), 0)::bigint AS task_retry_count"""
_ITS_TASKS = """t.job_id = f.id AND f.status IN ('completed', 'failed')
                                         AND t.status IN ('success', 'failed', 'timeout')"""
_TASK_NAMES = ("total_tasks", "task_success_count", "task_failure_count", "task_retry_count")
_OUTER_SUMS = ", ".join(f"coalesce(sum({name}), 0)::bigint AS {name}" for name in _TASK_NAMES)

# The tasks of each job, then the jobs of each row: as one writes it first.
_TWICE = f"""
    SELECT date, action_type_id, marketplace, {_JOB_SUMS}, {_OUTER_SUMS} PERCENTILES
      FROM (SELECT f.id, f.date, f.action_type_id, f.marketplace, f.status, f.retry_count, f.ms,
                   count(t.status) AS total_tasks,
                   count(*) FILTER (WHERE t.status = 'success') AS task_success_count,
                   count(*) FILTER (WHERE t.status IN ('failed', 'timeout')) AS task_failure_count,
                   sum(t.retry_count) AS task_retry_count
              FROM ({_FINISHED}) AS f LEFT JOIN SCHEMA.marketplace_tasks AS t ON {_ITS_TASKS}
             GROUP BY f.id, f.date, f.action_type_id, f.marketplace, f.status, f.retry_count, f.ms) AS job
     GROUP BY date, action_type_id, marketplace"""
# The finished jobs once; jobs and tasks summed apart, by the same key, and joined.
_APART = f"""
    WITH f AS MATERIALIZED ({_FINISHED}),
         j AS (SELECT date, action_type_id, marketplace, {_JOB_SUMS} PERCENTILES FROM f GROUP BY 1, 2, 3),
         k AS (SELECT date, action_type_id, marketplace, {_TASK_SUMS}
                 FROM f JOIN SCHEMA.marketplace_tasks AS t ON {_ITS_TASKS} GROUP BY 1, 2, 3)
    SELECT j.*, {", ".join(f"coalesce(k.{name}, 0) AS {name}" for name in _TASK_NAMES)}
      FROM j LEFT JOIN k USING (date, action_type_id, marketplace)"""
# The tasks of each job first, of all jobs; only for long windows can that be good.
_TASKS_FIRST = f"""
    SELECT date, action_type_id, marketplace, {_JOB_SUMS}, {_OUTER_SUMS} PERCENTILES
      FROM ({_FINISHED}) AS f
      LEFT JOIN (SELECT job_id, {_TASK_SUMS}
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
def _ours() -> str:
    # Imported here, so that the process of a candidate that measures something else does not load the project.
    import sqlalchemy as sa

    from assets.marketplace_job_stats.aggregate import counted_rows, days, finished_jobs
    from pipelines.tenants import sql_in_tenant

    row = counted_rows(finished_jobs(), days())
    return sql_in_tenant(sa.select(*(row.c[name] for name in (*KEY, *EXACT, *PERCENTILES, *SKETCH))))


def aggregate(tenant: str) -> str:
    """The project's own aggregating SELECT, with sketch and percentiles."""
    return (
        _ours()
        .replace("FROM marketplace_", f"FROM {tenant}.marketplace_")
        .replace("JOIN marketplace_", f"JOIN {tenant}.marketplace_")
    )


PLAIN = {"twice": _TWICE, "apart": _APART, "tasks first": _TASKS_FIRST}
"""The same numbers without percentiles and sketch, by hand, in several shapes; the fastest is the limit."""


def plain(shape: str, tenant: str) -> str:
    """The hand-written SELECT of this shape."""
    return PLAIN[shape].replace("PERCENTILES", "").replace("SCHEMA", tenant)


def _bare(select: str) -> str:
    # Everything is computed, nothing travels. As a CTE that is counted over, no column may be left out.
    return f"WITH x AS MATERIALIZED ({select}) SELECT count(*) FROM x"


def _inserted(select: str, table: str, columns: Sequence[str]) -> str:
    names = ", ".join((*KEY, *columns))
    return f"INSERT INTO {table} ({names}) SELECT {names} FROM ({select}) AS x"


# The limits. -------------------------------------------------------------------------------------------------------


def run_aggregate(conninfo: str, tenants: Sequence[str], first: date, last: date) -> None:
    """Computes all that we do, percentiles and sketch included, on the server; writes nothing."""
    execute(conninfo, tenants, lambda tenant: _bare(aggregate(tenant)), first, last)


def run_plain(shape: str, conninfo: str, tenants: Sequence[str], first: date, last: date) -> None:
    """Computes counts, sums and mean on the server; writes nothing."""
    execute(conninfo, tenants, lambda tenant: _bare(plain(shape, tenant)), first, last)


def run_insert_aggregate(conninfo: str, tenants: Sequence[str], first: date, last: date) -> None:
    """Computes all that we do, and inserts it, without a question, into an empty table."""
    columns = (*EXACT, *PERCENTILES, *SKETCH)

    def statement(tenant: str) -> str:
        return _inserted(aggregate(tenant), f"{tenant}.stats_limit", columns)

    execute(conninfo, tenants, statement, first, last, writes=True)


def run_insert_plain(shape: str, conninfo: str, tenants: Sequence[str], first: date, last: date) -> None:
    """Computes counts, sums and mean, and inserts them, without a question, into an empty table."""

    def statement(tenant: str) -> str:
        return _inserted(plain(shape, tenant), f"{tenant}.stats_plain", EXACT)

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

    from assets.marketplace_job_stats.upsert import Order, write_tenant
    from pipelines.database import make_durable
    from pipelines.partitions import Window
    from pipelines.resources import TenantDatabase

    os.environ["DATABASE_URL"] = url_of(conninfo)
    partitions = dg.DailyPartitionsDefinition(start_date="2024-01-01", timezone="UTC")
    keys = partitions.get_partition_keys_in_range(dg.PartitionKeyRange(str(first), str(last)))
    order = Order(Window.of(partitions, keys), run_id="benchmark")
    database = TenantDatabase(workers=CONNECTIONS, lock_timeout_ms=10_000, statement_timeout_ms=1_800_000)
    with database.connect() as (engine, witness):
        for _, outcome in database.for_each(engine, tenants, lambda on, tenant: write_tenant(on, tenant, order)):
            if isinstance(outcome, Exception):
                raise outcome
        make_durable(witness, "benchmark")


def run_ours_by_day(conninfo: str, tenants: Sequence[str], first: date, last: date) -> None:
    """The same, one run after the other for each day."""
    for n in range((last - first).days + 1):
        run_ours(conninfo, tenants, first + timedelta(days=n), first + timedelta(days=n))


# What a user would write instead. ----------------------------------------------------------------------------------

_JOBS = f"SELECT id, date, action_type_id, marketplace, status, retry_count, ms FROM ({_FINISHED}) AS f"
_TASKS = f"""SELECT t.job_id, t.status, t.retry_count FROM SCHEMA.marketplace_tasks AS t
               JOIN ({_FINISHED}) AS f ON {_ITS_TASKS}"""


_VALUES = (*EXACT, *PERCENTILES)
_TAKEN = ", ".join(f"{name} = excluded.{name}" for name in _VALUES)
_ROWS = ", ".join((*KEY, *_VALUES))


def write_csv(connection: psycopg.Connection[Any], table: str, csv: str) -> None:
    """Rows of KEY and _VALUES into a table, over what is there: the fastest way to bring rows from outside."""
    with connection.transaction():
        empty = f"SELECT {_ROWS} FROM {table} LIMIT 0"
        connection.execute(f"CREATE TEMPORARY TABLE rows ON COMMIT DROP AS {empty}".encode())
        with connection.cursor().copy(f"COPY rows ({_ROWS}) FROM STDIN (FORMAT csv)".encode()) as copy:
            copy.write(csv)
        connection.execute(
            f"""INSERT INTO {table} ({_ROWS}) SELECT {_ROWS} FROM rows
                    ON CONFLICT (action_type_id, marketplace, date) DO UPDATE SET {_TAKEN}""".encode()
        )


def run_pandas(conninfo: str, tenants: Sequence[str], first: date, last: date) -> None:
    """Reads the finished jobs and their tasks into pandas, groups there, and writes the rows into `stats_pandas`: all
    but the sketch, with exact percentiles; even the durations and the days come ready from the server.
    """
    parameters = window(first, last)

    def read(connection: psycopg.Connection[Any], sql: str, tenant: str) -> pd.DataFrame:
        cursor = connection.execute(sql.replace("SCHEMA", tenant).encode(), parameters, prepare=False)
        return pd.DataFrame(cursor.fetchall(), columns=[column.name for column in cursor.description or ()])

    def work(connection: psycopg.Connection[Any], tenant: str) -> None:
        rows = grouped(read(connection, _JOBS, tenant), read(connection, _TASKS, tenant))
        rows["avg_duration_ms"] = rows["avg_duration_ms"].astype("Int64")
        write_csv(connection, f"{tenant}.stats_pandas", rows[[*KEY, *_VALUES]].to_csv(index=False, header=False))

    each_tenant(conninfo, tenants, work)
    make_durable(conninfo)


def grouped(jobs: pd.DataFrame, tasks: pd.DataFrame) -> pd.DataFrame:
    """The rows of a tenant, from its finished jobs and their tasks."""
    tasks = tasks.assign(
        total_tasks=1,
        task_success_count=(tasks["status"] == "success").astype("int64"),
        task_failure_count=tasks["status"].isin(("failed", "timeout")).astype("int64"),
        task_retry_count=tasks["retry_count"],
    )
    per_job = tasks.groupby("job_id")[list(_TASK_NAMES)].sum()
    jobs = jobs.join(per_job, on="id")
    ran = jobs["status"].isin(("completed", "failed"))
    jobs = jobs.assign(
        total_jobs=ran,
        success_count=jobs["status"] == "completed",
        failure_count=jobs["status"] == "failed",
        cancelled_count=jobs["status"] == "cancelled",
        expired_count=jobs["status"] == "expired",
        retry_count=jobs["retry_count"].where(ran, 0),
        duration_count=jobs["ms"].notna(),
        duration_sum_ms=jobs["ms"].fillna(0),
    )
    jobs = jobs.assign(**{name: jobs[name].fillna(0).astype("int64") for name in COUNTS})
    by = list(KEY)
    rows = jobs.groupby(by)[list(COUNTS)].sum()
    rows["avg_duration_ms"] = (2 * rows["duration_sum_ms"] + rows["duration_count"]) // (
        2 * rows["duration_count"].where(rows["duration_count"] > 0)
    )
    # The value of rank ceil(q n): none of the interpolations of pandas is that.
    timed = jobs[jobs["ms"].notna()].sort_values([*by, "ms"])
    rank = timed.groupby(by).cumcount() + 1
    count = timed.groupby(by)["ms"].transform("size")
    for name, (numerator, denominator) in {"p50_duration_ms": (1, 2), "p95_duration_ms": (19, 20)}.items():
        chosen = timed[rank == -(-numerator * count // denominator)]
        rows[name] = chosen.set_index(by)["ms"].astype("float64")
    return rows.reset_index()


def run_polars(conninfo: str, tenants: Sequence[str], first: date, last: date) -> None:
    """The same with polars, which reads by ADBC, as Arrow; into `stats_polars`."""
    import adbc_driver_postgresql.dbapi as adbc
    import polars as pl

    ran = pl.col("status").is_in(("completed", "failed"))
    days = window(first, last)
    bounds = {f"%({name})s": f"'{days[name].isoformat()}'" for name in ("window_start", "window_end")}

    def read(connection: Any, sql: str, tenant: str) -> Any:
        sql = sql.replace("SCHEMA", tenant)
        for name, value in bounds.items():
            sql = sql.replace(name, value)
        return pl.read_database(sql, connection)

    @contextmanager
    def connect() -> Iterator[Any]:
        with (
            adbc.connect(url_of(conninfo), autocommit=True) as reader,
            psycopg.connect(conninfo, autocommit=True, options=SETTINGS) as writer,
        ):
            yield reader, writer

    def work(connections: Any, tenant: str) -> None:
        connection, writer = connections
        jobs, tasks = read(connection, _JOBS, tenant).lazy(), read(connection, _TASKS, tenant).lazy()
        per_job = tasks.group_by("job_id").agg(
            pl.len().alias("total_tasks"),
            (pl.col("status") == "success").sum().alias("task_success_count"),
            pl.col("status").is_in(("failed", "timeout")).sum().alias("task_failure_count"),
            pl.col("retry_count").sum().alias("task_retry_count"),
        )
        duration_sum, duration_count = pl.col("duration_sum_ms"), pl.col("duration_count").cast(pl.Int64)
        rows = (
            jobs.join(per_job, left_on="id", right_on="job_id", how="left")
            .group_by(KEY)
            .agg(
                ran.sum().alias("total_jobs"),
                *(
                    (pl.col("status") == status).sum().alias(f"{name}_count")
                    for name, status in (("success", "completed"), ("failure", "failed"))
                ),
                *((pl.col("status") == name).sum().alias(f"{name}_count") for name in ("cancelled", "expired")),
                pl.col("retry_count").filter(ran).sum(),
                pl.col("ms").count().alias("duration_count"),
                pl.col("ms").sum().alias("duration_sum_ms"),
                *(pl.col(name).sum() for name in _TASK_NAMES),
                pl.col("ms").quantile(0.5, "equiprobable").alias("p50_duration_ms"),
                pl.col("ms").quantile(0.95, "equiprobable").alias("p95_duration_ms"),
            )
            .with_columns(
                pl.when(duration_count > 0)
                .then((2 * duration_sum + duration_count) // (2 * duration_count))
                .alias("avg_duration_ms")
            )
        )
        csv = rows.select(*KEY, *_VALUES).collect().write_csv(include_header=False)
        write_csv(writer, f"{tenant}.stats_polars", csv)

    each_tenant(conninfo, tenants, work, connect)
    make_durable(conninfo)


def run_duckdb(conninfo: str, tenants: Sequence[str], first: date, last: date) -> None:
    """DuckDB over its scanner of PostgreSQL's tables, into `stats_duckdb`: all but the sketch, exact percentiles."""
    import duckdb
    import duckdb_extension_postgres_scanner as extension

    [folder] = extension.__path__
    file = Path(folder) / "extensions" / f"v{duckdb.__version__}" / "postgres_scanner.duckdb_extension"
    days = window(first, last)
    with duckdb.connect() as database:
        database.execute(f"LOAD '{file}'")
        database.execute("SET TimeZone = 'UTC'")
        database.execute(f"SET GLOBAL pg_connection_limit = {CONNECTIONS}")
        # The rest is left to DuckDB; a filter that it does not send to the server is applied to all rows.
        database.execute("SET GLOBAL pg_experimental_filter_pushdown = true")

        @contextmanager
        def connect() -> Iterator[Any]:
            with (
                database.cursor() as reader,
                psycopg.connect(conninfo, autocommit=True, options=SETTINGS) as writer,
            ):
                yield reader, writer

        def work(connections: Any, tenant: str) -> None:
            reader, writer = connections
            sql = _DUCKDB.replace("window_start", f"TIMESTAMPTZ '{days['window_start'].isoformat()}'")
            sql = sql.replace("window_end", f"TIMESTAMPTZ '{days['window_end'].isoformat()}'")
            for table in ("marketplace_jobs", "marketplace_tasks"):
                sql = sql.replace(f"SCHEMA.{table}", f"postgres_scan_pushdown('{conninfo}', '{tenant}', '{table}')")
            rows = reader.execute(f"SELECT {_ROWS} FROM ({sql})").fetchall()
            lines = (",".join("" if value is None else str(value) for value in row) for row in rows)
            write_csv(writer, f"{tenant}.stats_duckdb", "\n".join(lines))

        each_tenant(conninfo, tenants, work, connect)
    make_durable(conninfo)


_DUCKDB = f"""
    WITH f AS (SELECT *, CASE WHEN status IN ('completed', 'failed') AND started_at <= completed_at
                               AND started_at > completed_at - to_microseconds(2147483647500)
                              THEN (date_diff('microsecond', started_at, completed_at) + 500) // 1000 END AS ms
                 FROM SCHEMA.marketplace_jobs
                WHERE completed_at >= window_start AND completed_at < window_end
                  AND status IN ('completed', 'failed', 'cancelled', 'expired')
                  AND marketplace IN ('vinted', 'ebay', 'etsy')),
         k AS (SELECT job_id, {_TASK_SUMS.replace("::bigint", "")}
                 FROM SCHEMA.marketplace_tasks AS t WHERE status IN ('success', 'failed', 'timeout') GROUP BY job_id)
    SELECT completed_at::date AS date, action_type_id, marketplace,
           {_JOB_SUMS.replace(" / ", " // ")}, {_OUTER_SUMS},
           quantile_disc(ms, 0.5)::double AS p50_duration_ms, quantile_disc(ms, 0.95)::double AS p95_duration_ms
      FROM f LEFT JOIN k ON k.job_id = f.id AND f.status IN ('completed', 'failed')
     GROUP BY ALL"""


def run_upsert(conninfo: str, tenants: Sequence[str], first: date, last: date) -> None:
    """One INSERT ... ON CONFLICT DO UPDATE per tenant and day, into `stats_upsert`: all but the sketch, with exact
    percentiles.
    """
    days = window(first, last)
    ends = [*days["starts"][1:], days["window_end"]]

    def work(connection: psycopg.Connection[Any], tenant: str) -> None:
        statement = _inserted(exact(tenant), f"{tenant}.stats_upsert", _VALUES)
        statement += f" ON CONFLICT (action_type_id, marketplace, date) DO UPDATE SET {_TAKEN}"
        for start, end in zip(days["starts"], ends, strict=True):
            connection.execute(statement.encode(), {"window_start": start, "window_end": end}, prepare=False)

    each_tenant(conninfo, tenants, work)
    make_durable(conninfo)


def run_merge(conninfo: str, tenants: Sequence[str], first: date, last: date) -> None:
    """What dbt's incremental strategy `merge` sends, a model per tenant: the window into a temporary table, and a
    MERGE of all its rows into `stats_merge`. All but the sketch, with exact percentiles.
    """
    parameters = window(first, last)
    same_key = " AND ".join(f"target.{name} = source.{name}" for name in KEY)

    def work(connection: psycopg.Connection[Any], tenant: str) -> None:
        with connection.transaction(), psycopg.ClientCursor(connection) as cursor:
            cursor.execute(f"CREATE TEMPORARY TABLE source ON COMMIT DROP AS {exact(tenant)}".encode(), parameters)
            cursor.execute(
                f"""MERGE INTO {tenant}.stats_merge AS target USING source ON {same_key}
                    WHEN MATCHED THEN UPDATE SET {_TAKEN.replace("excluded.", "source.")}
                    WHEN NOT MATCHED THEN INSERT ({_ROWS})
                         VALUES ({", ".join(f"source.{name}" for name in (*KEY, *_VALUES))})""".encode()
            )

    each_tenant(conninfo, tenants, work)
    make_durable(conninfo)


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
BY_DAY = Candidate("ours, a run a day", "ours", run_ours_by_day, _ALL, table=OURS, sampled=True, by_day=True)
USERS = (
    Candidate("pandas", "user's", run_pandas, PERCENTILES, "stats_pandas"),
    Candidate(
        "polars, ADBC",
        "user's",
        run_polars,
        PERCENTILES,
        "stats_polars",
        packages=("polars", "adbc_driver_postgresql"),
    ),
    Candidate(
        "DuckDB",
        "user's",
        run_duckdb,
        PERCENTILES,
        "stats_duckdb",
        packages=("duckdb", "duckdb_extension_postgres_scanner"),
    ),
    Candidate("upsert a day", "user's", run_upsert, PERCENTILES, table="stats_upsert", sampled=True),
    Candidate("dbt-style merge", "user's", run_merge, PERCENTILES, table="stats_merge"),
)
