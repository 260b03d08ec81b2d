"""What the benchmark compares ours with: what one would write instead. See `tests.benchmarks.candidates`.

All compute everything but the sketch, with exact percentiles, and write it over what is there.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

import pandas as pd
import psycopg

from tests.benchmarks.candidates import (
    CONNECTIONS,
    COUNTS,
    EXACT,
    FINISHED,
    ITS_TASKS,
    JOB_SUMS,
    KEY,
    OUTER_SUMS,
    PERCENTILES,
    SETTINGS,
    TASK_NAMES,
    TASK_SUMS,
    Candidate,
    each_tenant,
    exact,
    inserted,
    make_durable,
    window,
)
from tests.conftest import url_of

_JOBS = f"SELECT id, date, action_type_id, marketplace, status, retry_count, ms FROM ({FINISHED}) AS f"
_TASKS = f"""SELECT t.job_id, t.status, t.retry_count FROM SCHEMA.marketplace_tasks AS t
               JOIN ({FINISHED}) AS f ON {ITS_TASKS}"""


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
    per_job = tasks.groupby("job_id")[list(TASK_NAMES)].sum()
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
                *(pl.col(name).sum() for name in TASK_NAMES),
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
         k AS (SELECT job_id, {TASK_SUMS.replace("::bigint", "")}
                 FROM SCHEMA.marketplace_tasks AS t WHERE status IN ('success', 'failed', 'timeout') GROUP BY job_id)
    SELECT completed_at::date AS date, action_type_id, marketplace,
           {JOB_SUMS.replace(" / ", " // ")}, {OUTER_SUMS},
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
        statement = inserted(exact(tenant), f"{tenant}.stats_upsert", _VALUES)
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
