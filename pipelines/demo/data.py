"""The application's side as the demo plays it: schemas, jobs, tasks, and the old counter with its known faults.

The data are made in SQL from hashes, so the same day gives the same rows, on every machine of one byte order.
"""

from collections.abc import Callable
from datetime import date, timedelta
from pathlib import Path

import click
import psycopg
from psycopg import sql

from pipelines.settings import UsageError

TEMPLATE = "template_tenant"

TENANTS = {"user_1": 6_000, "user_2": 1_500, "user_3": 3_000, "user_7": 12_000, "user_42": 8_000}
"""The demo's customers, and about how many jobs each gets."""

OLDER_TENANT = "user_1"
"""The customer from before the application cloned a template: own sequences, enum types and constraint names."""

CUT_OFF_TENANT = "user_42"
"""The customer whose connection to Vinted has broken the day before yesterday."""

CORRECTED_TENANT = "user_7"
"""The customer some of whose failed jobs turn out to be done, after their day was computed."""

DAY_COUNT = 92

MARK = "marketplace-job-stats: demo data, dropped and made again by every `make demo`"
"""The comment by which the demo knows what it may drop."""


def _statement(file: str) -> sql.SQL:
    """A statement of this folder; names in braces are filled in, values are bound."""
    return sql.SQL((Path(__file__).parent / file).read_text())


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

_TABLES = _statement("tables.sql")


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
        _TABLES.format(
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

_JOBS = _statement("jobs.sql")

_TASKS = _statement("tasks.sql")


def fill_tenant(connection: psycopg.Connection, schema: str, today: date, seed: int) -> tuple[int, int]:
    """Three months of jobs and tasks, the last of them yesterday; returns how many of each.

    There is a weekly rhythm, and one bad day about three weeks ago, when eBay did not answer. Yesterday, Etsy was slow,
    and one customer's connection to Vinted is broken.
    """
    jobs, tasks = sql.Identifier(schema, "marketplace_jobs"), sql.Identifier(schema, "marketplace_tasks")
    values = {
        "today": today,
        # A Tuesday, so that it does not fall on a quiet weekend.
        "outage": today - timedelta(days=20 + (today - timedelta(days=20) - timedelta(days=1)).weekday()),
        "cut_off": today - timedelta(days=2) if schema == CUT_OFF_TENANT else today,
        "slow": today - timedelta(days=1),
        "schema": schema,
        "job_count": TENANTS[schema],
        "day_count": DAY_COUNT,
        "seed": seed,
    }
    connection.execute(_NOISE)
    job_count = connection.execute(
        _JOBS.format(jobs=jobs, job_status=_type_or_varchar(connection, schema, "jobstatus")), values
    ).rowcount
    connection.execute(sql.SQL("ANALYZE {}").format(jobs))
    task_count = connection.execute(
        _TASKS.format(jobs=jobs, tasks=tasks, task_status=_type_or_varchar(connection, schema, "taskstatus")),
        values,
    ).rowcount
    connection.execute(sql.SQL("ANALYZE {}").format(tasks))
    return job_count, task_count


def correct(connection: psycopg.Connection, today: date) -> date:
    """Three days ago, some jobs were booked as failed that had gone through: the application corrects them. The day."""
    day = today - timedelta(days=3)
    with connection.transaction():
        connection.execute(
            sql.SQL(
                """
                UPDATE {} SET status = 'completed', error_message = NULL
                 WHERE status = 'failed' AND (completed_at AT TIME ZONE 'UTC')::date = %s
                """
            ).format(sql.Identifier(CORRECTED_TENANT, "marketplace_jobs")),
            [day],
        )
    return day


def _type_or_varchar(connection: psycopg.Connection, schema: str, name: str) -> sql.Composable:
    """The tenant's own enum type for a status, if it has one."""
    found = connection.execute(
        "SELECT FROM pg_type WHERE typname = %s AND typnamespace = %s::regnamespace", [name, schema]
    ).fetchone()
    return sql.SQL("varchar") if found is None else sql.Identifier(schema, name)


# The old live counter ---------------------------------------------------------------------------------------------

_COUNTER = _statement("counter.sql")


def live_counter(connection: psycopg.Connection, schema: str) -> None:
    """Fill the tenant's old `vinted_job_stats` as the drifting live counter would have."""
    jobs, stats = sql.Identifier(schema, "marketplace_jobs"), sql.Identifier(schema, "vinted_job_stats")
    connection.execute(_COUNTER.format(jobs=jobs, stats=stats))
    connection.execute(sql.SQL("ANALYZE {}").format(stats))
