"""The demo: an application's tables with three months of jobs in them, and two tables for the terminal.

What belongs here: the application's side as the demo plays it (schemas, jobs, tasks, and the old counter with its known
faults) and what `make demo` prints. Nothing of the product imports this module; the server is `pipelines.local`'s, and
the migration and the computing are the real ones.

The data are made in SQL from hashes, so the same day gives the same rows, on every machine of one byte order.
"""

from collections.abc import Callable, Sequence
from datetime import date, timedelta

import click
import pandas as pd
import psycopg
from psycopg import sql
from rich import box
from rich.console import Console
from rich.table import Table

from pipelines.settings import UsageError

TEMPLATE = "template_tenant"

TENANTS = {"user_1": 6_000, "user_2": 1_500, "user_3": 3_000, "user_7": 12_000, "user_42": 8_000}
"""The demo's customers, and about how many jobs each gets."""

OLDER_TENANT = "user_1"
"""The customer from before the application cloned a template: own sequences, enum types and constraint names."""

DAY_COUNT = 92

MARK = "marketplace-job-stats: demo data, dropped and made again by every `make demo`"
"""The comment by which the demo knows what it may drop."""


def create(connection: psycopg.Connection, today: date, say: Callable[[str], None] = click.echo) -> None:
    """Make the demo's data anew, up to and including the day before `today` (a day in UTC).

    One transaction: if it is interrupted, the former demo is still there, whole. `say` gets one line per tenant.
    Raises UsageError, and changes nothing, in a database that holds tenants or tables that the demo did not make.
    """
    with connection.transaction():
        _drop_former_demo(connection)
        create_application_schema(connection)
        for seed, schema in enumerate(TENANTS):
            if schema == OLDER_TENANT:
                _create_older_tenant(connection, schema)
            else:
                clone_tenant(connection, schema)
            job_count, task_count = fill_tenant(connection, schema, today, seed)
            live_counter(connection, schema)
            say(f"{schema:<8} {job_count:>7,} jobs {task_count:>7,} tasks")


def _drop_former_demo(connection: psycopg.Connection) -> None:
    """Drop what bears the demo's mark; refuse if something else is in its place."""
    found = connection.execute(
        r"""
        SELECT nspname, obj_description(oid, 'pg_namespace') IS NOT DISTINCT FROM %(mark)s
          FROM pg_namespace
         WHERE nspname ~ '^user_[0-9]+$' OR nspname = %(template)s
        UNION ALL
        SELECT 'public.marketplace_action_types', obj_description(oid, 'pg_class') IS NOT DISTINCT FROM %(mark)s
          FROM pg_class
         WHERE oid = to_regclass('public.marketplace_action_types')
         ORDER BY 1
        """,
        {"mark": MARK, "template": TEMPLATE},
    ).fetchall()
    foreign = [name for name, is_ours in found if not is_ours]
    if foreign:
        shown = ", ".join(foreign[:3]) + (f" and {len(foreign) - 3} more" if len(foreign) > 3 else "")
        raise UsageError(
            f"The demo wants a database without other tenants, but {shown} in {connection.info.dbname!r} is not of its "
            "making: name an empty database in DATABASE_URL, or unset it to use the embedded one."
        )
    for name, _ in found:
        if "." not in name:
            connection.execute(sql.SQL("DROP SCHEMA {} CASCADE").format(sql.Identifier(name)))
    connection.execute("DROP TABLE IF EXISTS public.marketplace_action_types CASCADE")


# The application's tables -----------------------------------------------------------------------------------------

_TABLES = """
CREATE TABLE {schema}.marketplace_jobs (
    id serial PRIMARY KEY,
    marketplace varchar(50) NOT NULL,
    action_type_id integer NOT NULL REFERENCES public.marketplace_action_types (id),
    product_id bigint,
    batch_job_id integer,
    status {job_status} NOT NULL DEFAULT 'pending',
    priority integer NOT NULL DEFAULT 3,
    retry_count integer NOT NULL DEFAULT 0,
    max_retries integer NOT NULL DEFAULT 3,
    error_message text,
    input_data jsonb,
    result_data jsonb,
    started_at timestamptz,
    completed_at timestamptz,
    expires_at timestamptz,
    created_at timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX ON {schema}.marketplace_jobs (status);
CREATE INDEX ON {schema}.marketplace_jobs (created_at);
CREATE INDEX ON {schema}.marketplace_jobs (marketplace);

CREATE TABLE {schema}.marketplace_tasks (
    id serial PRIMARY KEY,
    job_id integer REFERENCES {schema}.marketplace_jobs (id) ON DELETE SET NULL,
    task_type varchar(100),
    status {task_status} NOT NULL DEFAULT 'pending',
    retry_count integer NOT NULL DEFAULT 0,
    started_at timestamptz,
    completed_at timestamptz,
    created_at timestamptz NOT NULL DEFAULT now(),
    payload jsonb,
    result jsonb
);
CREATE INDEX ON {schema}.marketplace_tasks (job_id, status);

CREATE TABLE {schema}.vinted_job_stats (
    id serial PRIMARY KEY,
    action_type_id integer NOT NULL,
    date date NOT NULL,
    total_jobs integer NOT NULL DEFAULT 0,
    success_count integer NOT NULL DEFAULT 0,
    failure_count integer NOT NULL DEFAULT 0,
    avg_duration_ms integer,
    created_at timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT {unique_name} UNIQUE (action_type_id, date)
);
"""


def create_application_schema(connection: psycopg.Connection) -> None:
    """What all customers share: the action types, and the template that new customers are cloned from."""
    connection.execute(
        """
        CREATE TABLE public.marketplace_action_types (
            id serial PRIMARY KEY,
            marketplace varchar(50) NOT NULL,
            code varchar(50) NOT NULL,
            name varchar(100) NOT NULL,
            is_active boolean NOT NULL DEFAULT true,
            created_at timestamptz NOT NULL DEFAULT now(),
            UNIQUE (marketplace, code)
        );
        INSERT INTO public.marketplace_action_types (marketplace, code, name)
        SELECT marketplace, code, name
          FROM unnest(ARRAY['vinted', 'ebay', 'etsy']) WITH ORDINALITY AS m (marketplace, m_rank),
               (VALUES (1, 'publish', 'Publish a listing'), (2, 'update', 'Update a listing'),
                       (3, 'delete', 'Delete a listing'), (4, 'sync', 'Synchronize the listings'),
                       (5, 'orders', 'Fetch the orders'), (6, 'message', 'Answer a message'),
                       (7, 'link_product', 'Link a listing to a product')) AS a (a_rank, code, name)
         ORDER BY m_rank, a_rank;
        """
    )
    connection.execute(sql.SQL("COMMENT ON TABLE public.marketplace_action_types IS {}").format(sql.Literal(MARK)))
    _create_schema(connection, TEMPLATE)
    varchar = sql.SQL("varchar(20)")
    _create_tables(connection, TEMPLATE, varchar, varchar, "vinted_job_stats_action_type_id_date_key")


def clone_tenant(connection: psycopg.Connection, schema: str) -> None:
    """A new customer, as the application makes one: no foreign keys, and ids from the template's sequences."""
    _create_schema(connection, schema)
    for table in ("marketplace_jobs", "marketplace_tasks", "vinted_job_stats"):
        connection.execute(
            sql.SQL("CREATE TABLE {} (LIKE {} INCLUDING ALL)").format(
                sql.Identifier(schema, table), sql.Identifier(TEMPLATE, table)
            )
        )


def _create_older_tenant(connection: psycopg.Connection, schema: str) -> None:
    _create_schema(connection, schema)
    job_status, task_status = sql.Identifier(schema, "jobstatus"), sql.Identifier(schema, "taskstatus")
    connection.execute(
        sql.SQL(
            """
            CREATE TYPE {} AS ENUM (
                'pending', 'running', 'paused', 'completed', 'failed', 'cancelled', 'expired');
            CREATE TYPE {} AS ENUM ('pending', 'processing', 'success', 'failed', 'timeout', 'cancelled');
            """
        ).format(job_status, task_status)
    )
    _create_tables(connection, schema, job_status, task_status, "uq_vinted_job_stats_action_date")


def _create_schema(connection: psycopg.Connection, schema: str) -> None:
    connection.execute(
        sql.SQL("CREATE SCHEMA {0}; COMMENT ON SCHEMA {0} IS {1}").format(sql.Identifier(schema), sql.Literal(MARK))
    )


def _create_tables(
    connection: psycopg.Connection,
    schema: str,
    job_status: sql.Composable,
    task_status: sql.Composable,
    unique_name: str,
) -> None:
    connection.execute(
        sql.SQL(_TABLES).format(
            schema=sql.Identifier(schema),
            job_status=job_status,
            task_status=task_status,
            unique_name=sql.Identifier(unique_name),
        )
    )


# The jobs and tasks -----------------------------------------------------------------------------------------------

# A number in [0, 1) that looks random and is always the same for the same topic, row and seed.
_NOISE = """
CREATE OR REPLACE FUNCTION pg_temp.noise(topic text, n bigint, seed bigint) RETURNS float8 LANGUAGE sql IMMUTABLE AS
$$ SELECT (hashint8extended(n, hashtextextended(topic, seed)) & 1099511627775)::float8 / 1099511627776 $$
"""

_JOBS = """
WITH actions (kind, code, seconds) AS (
    VALUES (0, 'publish', 9.0), (1, 'update', 4.0), (2, 'sync', 25.0), (3, 'orders', 12.0), (4, 'delete', 2.0),
           (5, 'message', 1.5), (6, 'link_product', 3.0)
),
-- Every day of the demo with the number of its jobs: fewer on weekends, slowly growing, with some noise.
days AS (
    SELECT day, day - date '2000-01-01' AS day_number,
           round(%(job_count)s / %(day_count)s::float8
                 * (ARRAY[1.12, 1.2, 1.15, 1.13, 1.05, 0.75, 0.6])[extract(isodow FROM day)::integer]
                 * (0.85 + 0.3 * age / %(day_count)s)
                 * (0.9 + 0.2 * pg_temp.noise('day', day - date '2000-01-01', %(seed)s)))::integer AS job_count
      FROM generate_series(0, %(day_count)s - 1) AS age
     CROSS JOIN LATERAL (SELECT %(today)s::date - %(day_count)s + age AS day) AS dated
),
-- Every job: where, what, and when it was asked for. One sync in ten is a long one just before midnight.
drawn AS (
    SELECT n, day, code, seconds, marketplace, is_nightly,
           marketplace = 'ebay' AND code = 'publish' AND day = %(outage)s::date AS is_outage,
           day::timestamp AT TIME ZONE 'UTC' + make_interval(secs => 86400 * CASE
               WHEN is_nightly THEN 1 - 0.01 * pg_temp.noise('time', n, %(seed)s)
               ELSE 0.25 + 0.35 * (pg_temp.noise('time', n, %(seed)s) + pg_temp.noise('time 2', n, %(seed)s))
           END) AS created_at
      FROM days
     CROSS JOIN LATERAL generate_series(1, days.job_count) AS i
     CROSS JOIN LATERAL (SELECT day_number * 100000::bigint + i AS n) AS numbered
      JOIN actions
        ON kind = width_bucket(pg_temp.noise('action', n, %(seed)s),
                               ARRAY[0.36, 0.58, 0.74, 0.84, 0.92, 0.97]::float8[])
     CROSS JOIN LATERAL (
        SELECT (ARRAY['vinted', 'ebay', 'etsy', 'depop'])[1 + width_bucket(
                   pg_temp.noise('marketplace', n, %(seed)s), ARRAY[0.55, 0.83, 0.999]::float8[])] AS marketplace,
               code = 'sync' AND pg_temp.noise('nightly', n, %(seed)s) < 0.1 AS is_nightly) AS chosen
),
-- How each would end, were there no midnight.
ended AS (
    SELECT drawn.*, pg_temp.noise('oddity', n, %(seed)s) AS oddity, status, started_at,
           CASE status WHEN 'expired' THEN created_at + interval '1 hour'
                       WHEN 'cancelled' THEN created_at + interval '9 minutes' * pg_temp.noise('cancel', n, %(seed)s)
                       ELSE started_at + make_interval(secs => CASE
                           WHEN is_outage AND status = 'failed' THEN 60 + 5 * pg_temp.noise('length', n, %(seed)s)
                           ELSE seconds
                                * CASE WHEN is_nightly THEN 20 ELSE 1 END
                                * CASE marketplace WHEN 'ebay' THEN 0.7 WHEN 'etsy' THEN 0.85 ELSE 1.1 END
                                * CASE status WHEN 'failed' THEN 1.4 ELSE 1 END
                                * exp(1.6 * (pg_temp.noise('length', n, %(seed)s)
                                             + pg_temp.noise('length 2', n, %(seed)s) - 1))
                       END)
           END AS completed_at
      FROM drawn
     CROSS JOIN LATERAL (
        SELECT CASE WHEN is_outage THEN 0.85 WHEN marketplace = 'etsy' THEN 0.02 WHEN code = 'publish' THEN 0.06
                    ELSE 0.03 END AS failure_share) AS odds
     CROSS JOIN LATERAL (
        SELECT (ARRAY['failed', 'cancelled', 'expired', 'completed'])[1 + width_bucket(
                   pg_temp.noise('status', n, %(seed)s),
                   ARRAY[failure_share, failure_share + 0.012, failure_share + 0.02]::float8[])] AS status) AS chosen
     CROSS JOIN LATERAL (
        SELECT CASE WHEN status IN ('completed', 'failed')
                    THEN created_at + make_interval(secs => 1 + 30 * pg_temp.noise('wait', n, %(seed)s))
               END AS started_at) AS waited
),
-- The demo is a picture taken at midnight: what would end today is still under way. And a few rows are odd, as in real
-- life: a start that is missing or after the end, an end that was never written, a job that nobody ever picked up.
pictured AS (
    SELECT n, marketplace, code, is_outage, created_at,
           CASE WHEN is_stuck THEN 'pending'
                WHEN completed_at < midnight THEN status
                WHEN started_at < midnight THEN 'running'
                ELSE 'pending' END AS status,
           CASE WHEN is_stuck OR oddity < 0.0006 THEN NULL
                WHEN oddity < 0.0009 THEN completed_at + interval '2 seconds'
                WHEN started_at < midnight THEN started_at END AS started_at,
           CASE WHEN is_stuck OR oddity BETWEEN 0.0009 AND 0.0012 THEN NULL
                WHEN completed_at < midnight THEN completed_at END AS completed_at
      FROM ended
     CROSS JOIN LATERAL (
        SELECT %(today)s::date::timestamp AT TIME ZONE 'UTC' AS midnight,
               oddity BETWEEN 0.0012 AND 0.002 AS is_stuck) AS limits
)
INSERT INTO {jobs} (marketplace, action_type_id, product_id, status, priority, retry_count, error_message, input_data,
                    started_at, completed_at, expires_at, created_at)
SELECT pictured.marketplace, action.id, 1000 + (900 * pg_temp.noise('product', n, %(seed)s))::integer,
       status::{job_status}, 1 + (3 * pg_temp.noise('priority', n, %(seed)s))::integer,
       CASE WHEN status = 'failed' AND is_outage THEN 3
            WHEN status = 'failed' THEN (3 * pg_temp.noise('retries', n, %(seed)s))::integer
            WHEN status = 'completed' AND pg_temp.noise('retries', n, %(seed)s) < 0.06 THEN 1
            ELSE 0 END,
       CASE WHEN status <> 'failed' THEN NULL
            WHEN is_outage THEN 'no answer from eBay within 60 s'
            ELSE 'the marketplace refused the request' END,
       jsonb_build_object('source', 'demo'),
       started_at, completed_at, pictured.created_at + interval '1 hour', pictured.created_at
  FROM pictured
  -- A marketplace that the application does not know yet borrows Vinted's action types.
  JOIN public.marketplace_action_types AS action
    ON action.code = pictured.code
   AND action.marketplace = CASE pictured.marketplace WHEN 'depop' THEN 'vinted' ELSE pictured.marketplace END
 ORDER BY pictured.created_at, n
"""

_TASKS = """
-- Jobs by their rank, not by their id: the ids of cloned tenants come from one sequence for all.
WITH jobs AS (
    SELECT job.id, row_number() OVER (ORDER BY job.id) AS n, marketplace, status::text AS status, created_at,
           error_message LIKE 'no answer%%' AS is_outage,
           coalesce(least(started_at, completed_at), created_at) AS began_at,
           coalesce(completed_at, started_at + interval '5 seconds') AS ended_at
      FROM {jobs} AS job
),
steps AS (
    SELECT jobs.*, step, task_count, n * 10 + step AS m,
           CASE status WHEN 'failed' THEN 1 + floor(task_count * pg_temp.noise('breaks', n, %(seed)s))::integer
                       ELSE task_count END AS last_step
      FROM jobs
     CROSS JOIN LATERAL (SELECT 2 + floor(3 * pg_temp.noise('tasks', n, %(seed)s))::integer AS task_count) AS sized
     CROSS JOIN LATERAL generate_series(1, task_count) AS step
),
-- A failed job stops at the task that broke; what came after it was never tried.
ended AS (
    SELECT steps.*,
           CASE WHEN status IN ('cancelled', 'expired') THEN 'cancelled'
                WHEN status = 'running' AND step = 1 THEN 'processing'
                WHEN status IN ('running', 'pending') THEN 'pending'
                WHEN step > last_step THEN 'cancelled'
                WHEN status = 'completed' OR step < last_step THEN 'success'
                WHEN is_outage OR pg_temp.noise('timeout', n, %(seed)s) < 0.3 THEN 'timeout'
                ELSE 'failed' END AS task_status
      FROM steps
)
INSERT INTO {tasks} (job_id, task_type, status, retry_count, started_at, completed_at, created_at, payload)
-- Now and then a task's job was deleted, or its type never written.
SELECT CASE WHEN pg_temp.noise('orphan', m, %(seed)s) >= 0.0004 THEN id END,
       CASE WHEN pg_temp.noise('type', m, %(seed)s) < 0.002 THEN NULL
            WHEN step = task_count THEN 'db_operation'
            WHEN step = 2 THEN 'file_operation'
            WHEN marketplace = 'vinted' THEN 'plugin_http'
            ELSE 'direct_http' END,
       task_status::{task_status},
       CASE WHEN task_status IN ('failed', 'timeout') THEN 1 + (2 * pg_temp.noise('again', m, %(seed)s))::integer
            WHEN task_status = 'success' AND pg_temp.noise('again', m, %(seed)s) < 0.04 THEN 1
            ELSE 0 END,
       CASE WHEN task_status IN ('success', 'failed', 'timeout', 'processing')
            THEN began_at + (ended_at - began_at) * ((step - 1)::float8 / last_step) END,
       CASE WHEN task_status IN ('success', 'failed', 'timeout')
            THEN began_at + (ended_at - began_at) * (step::float8 / last_step) END,
       created_at, jsonb_build_object('step', step)
  FROM ended
 ORDER BY n, step
"""


def fill_tenant(connection: psycopg.Connection, schema: str, today: date, seed: int) -> tuple[int, int]:
    """Three months of jobs and tasks, the last of them yesterday; returns how many of each.

    There is a weekly rhythm, and one bad day about three weeks ago, when eBay did not answer.
    """
    jobs, tasks = sql.Identifier(schema, "marketplace_jobs"), sql.Identifier(schema, "marketplace_tasks")
    values = {
        "today": today,
        # A Tuesday, so that it does not fall on a quiet weekend.
        "outage": today - timedelta(days=20 + (today - timedelta(days=20) - timedelta(days=1)).weekday()),
        "job_count": TENANTS[schema],
        "day_count": DAY_COUNT,
        "seed": seed,
    }
    connection.execute(_NOISE)
    job_count = connection.execute(
        sql.SQL(_JOBS).format(jobs=jobs, job_status=_type_or_varchar(connection, schema, "jobstatus")), values
    ).rowcount
    connection.execute(sql.SQL("ANALYZE {}").format(jobs))
    task_count = connection.execute(
        sql.SQL(_TASKS).format(jobs=jobs, tasks=tasks, task_status=_type_or_varchar(connection, schema, "taskstatus")),
        values,
    ).rowcount
    connection.execute(sql.SQL("ANALYZE {}").format(tasks))
    return job_count, task_count


def _type_or_varchar(connection: psycopg.Connection, schema: str, name: str) -> sql.Composable:
    """The tenant's own enum type for a status, if it has one."""
    found = connection.execute(
        "SELECT FROM pg_type WHERE typname = %s AND typnamespace = %s::regnamespace", [name, schema]
    ).fetchone()
    return sql.SQL("varchar") if found is None else sql.Identifier(schema, name)


# The old live counter ---------------------------------------------------------------------------------------------

# The counter as the application bumped it after every job, faults included: any marketplace is booked under Vinted's
# action of the same code, one job in 41 is bumped twice, and the average, which only completed jobs move, is weighted
# with the count of all jobs and truncated by the integer division at every step.
_COUNTER = """
DO $counter$
DECLARE
    bump record;
BEGIN
    FOR bump IN
        SELECT vinted.id AS action_id, (completed_at AT TIME ZONE 'UTC')::date AS day, completed_at,
               (status::text = 'completed')::integer AS success,
               (extract(epoch FROM completed_at - started_at) * 1000)::integer AS duration_ms
          FROM {jobs} AS job
          JOIN public.marketplace_action_types AS action ON action.id = job.action_type_id
          JOIN public.marketplace_action_types AS vinted
            ON vinted.code = action.code AND vinted.marketplace = 'vinted'
         CROSS JOIN generate_series(1, CASE WHEN mod(job.id, 41) = 0 THEN 2 ELSE 1 END)
         WHERE status::text IN ('completed', 'failed')
           -- The counter was switched on a day after the first jobs. So the source still holds a job from before every
           -- day that it counted, and no day of the demo looks as if its jobs had been purged.
           AND completed_at >= (SELECT date_trunc('day', min(created_at), 'UTC') + interval '1 day' FROM {jobs})
         ORDER BY completed_at, job.id
    LOOP
        INSERT INTO {stats} AS stored
            (action_type_id, date, total_jobs, success_count, failure_count, avg_duration_ms, created_at)
        VALUES (bump.action_id, bump.day, 1, bump.success, 1 - bump.success, coalesce(bump.duration_ms, 0),
                bump.completed_at)
        ON CONFLICT (action_type_id, date) DO UPDATE SET
            total_jobs = stored.total_jobs + 1,
            success_count = stored.success_count + excluded.success_count,
            failure_count = stored.failure_count + excluded.failure_count,
            avg_duration_ms = CASE WHEN excluded.success_count = 0 THEN stored.avg_duration_ms ELSE
                (stored.avg_duration_ms::bigint * stored.total_jobs + excluded.avg_duration_ms)
                / (stored.total_jobs + 1) END;
    END LOOP;
END
$counter$
"""


def live_counter(connection: psycopg.Connection, schema: str) -> None:
    """Fill the tenant's old `vinted_job_stats` as the drifting live counter would have."""
    jobs, stats = sql.Identifier(schema, "marketplace_jobs"), sql.Identifier(schema, "vinted_job_stats")
    connection.execute(sql.SQL(_COUNTER).format(jobs=jobs, stats=stats))
    connection.execute(sql.SQL("ANALYZE {}").format(stats))


# What the demo prints ---------------------------------------------------------------------------------------------


def old_counters(connection: psycopg.Connection, schema: str) -> pd.DataFrame:
    """The old counter's rows, to be kept before the migration takes the table over.

    Columns: code, date, total_jobs, failure_count, avg_duration_ms.
    """
    cursor = connection.execute(
        sql.SQL(
            """
            SELECT coalesce(action.code, 'unknown') AS code, date, total_jobs, failure_count, avg_duration_ms
              FROM {} AS stats
              LEFT JOIN public.marketplace_action_types AS action ON action.id = stats.action_type_id
             ORDER BY date, code
            """
        ).format(sql.Identifier(schema, "vinted_job_stats"))
    )
    columns = ["code", "date", "total_jobs", "failure_count", "avg_duration_ms"]
    return pd.DataFrame(cursor.fetchall(), columns=columns)


def print_drift(connection: psycopg.Connection, schema: str, old: pd.DataFrame, console: Console | None = None) -> None:
    """What the old counter said of one tenant beside what its job rows say, over the days that the counter knew.

    `old` is from `old_counters`. Its mean over the days can only be a mean of means weighted with jobs; the exact one
    comes from `duration_sum_ms` and `duration_count`.
    """
    # Rolled up by code: the last row, without a code, is the sum.
    exact = connection.execute(
        sql.SQL(
            """
            SELECT coalesce(action.code, 'unknown') AS code,
                   coalesce(sum(total_jobs) FILTER (WHERE stats.marketplace = 'vinted'), 0),
                   coalesce(sum(total_jobs) FILTER (WHERE stats.marketplace = 'ebay'), 0),
                   coalesce(sum(total_jobs) FILTER (WHERE stats.marketplace = 'etsy'), 0),
                   sum(failure_count), sum(duration_sum_ms), sum(duration_count)
              FROM {} AS stats
              LEFT JOIN public.marketplace_action_types AS action ON action.id = stats.action_type_id
             WHERE date BETWEEN %s AND %s
             GROUP BY ROLLUP (coalesce(action.code, 'unknown'))
             ORDER BY grouping(coalesce(action.code, 'unknown')), sum(total_jobs) DESC
            """
        ).format(sql.Identifier(schema, "marketplace_job_stats")),
        [old["date"].min(), old["date"].max()],
    ).fetchall()

    table = Table(
        title=f"{schema}, {old['date'].min()} to {old['date'].max()}: the old counter, and what the jobs say",
        caption="The old counter booked every marketplace as vinted.",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 0, 0, 1),  # Fits into 80 columns with seven-digit sums.
    )
    table.add_column("\naction", no_wrap=True)
    numbers = (
        "old jobs",
        "old failed",
        "old mean ms",
        "now vinted",
        "now ebay",
        "now etsy",
        "now failed",
        "exact mean ms",
    )
    for header in numbers:
        table.add_column(header.replace(" ", "\n", 1), justify="right", no_wrap=True)
    for code, vinted, ebay, etsy, failed, duration_sum, duration_count in exact:
        rows = old if code is None else old[old["code"] == code]
        if code is None:
            table.add_section()
        table.add_row(
            "all" if code is None else code,
            f"{rows['total_jobs'].sum():,}",
            f"{rows['failure_count'].sum():,}",
            _mean(int((rows["avg_duration_ms"] * rows["total_jobs"]).sum()), int(rows["total_jobs"].sum())),
            *(f"{number or 0:,}" for number in (vinted, ebay, etsy, failed)),
            _mean(duration_sum, duration_count),
        )
    (console or Console()).print(table)


def print_last_week(
    connection: psycopg.Connection, schemas: Sequence[str], today: date, console: Console | None = None
) -> None:
    """The last seven closed days by marketplace, over all the tenants named in `schemas` (at least one)."""
    week = sql.SQL(" UNION ALL ").join(
        sql.SQL("SELECT * FROM {} WHERE date >= %(first)s AND date < %(today)s").format(
            sql.Identifier(schema, "marketplace_job_stats")
        )
        for schema in schemas
    )
    first = today - timedelta(days=7)
    found = connection.execute(
        sql.SQL(
            """
            SELECT marketplace, sum(total_jobs), sum(success_count), sum(failure_count), sum(duration_sum_ms),
                   sum(duration_count), sum(total_tasks), sum(retry_count), sum(task_retry_count)
              FROM ({}) AS week
             GROUP BY ROLLUP (marketplace)
             ORDER BY grouping(marketplace), sum(total_jobs) DESC
            """
        ).format(week),
        {"first": first, "today": today},
    ).fetchall()

    table = Table(
        title=f"Last week, {first} to {today - timedelta(days=1)}, all {len(schemas)} tenants",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("\nmarketplace")
    for header in ("\njobs", "\nfailed", "success\nrate", "mean\nms", "\ntasks", "job\nretries", "task\nretries"):
        table.add_column(header, justify="right", no_wrap=True)
    for marketplace, jobs, succeeded, failed, duration_sum, duration_count, *others in found:
        if marketplace is None:
            table.add_section()
        table.add_row(
            marketplace or "all",
            f"{jobs or 0:,}",
            f"{failed or 0:,}",
            f"{succeeded / jobs:.1%}" if jobs else "-",
            _mean(duration_sum, duration_count),
            *(f"{number or 0:,}" for number in others),
        )
    (console or Console()).print(table)


def _mean(total: int | None, count: int | None) -> str:
    """The rounded mean of numbers that are not negative, halves upwards; a dash if there are none."""
    if not total or not count:
        return "0" if count else "-"
    return f"{(2 * int(total) + int(count)) // (2 * int(count)):,}"
