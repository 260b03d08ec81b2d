"""The application's side of a database: what it creates for its customers, in the variants that are met.

Factories write rows as the application does; nothing here belongs to this project's own tables but the old one.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import psycopg
from psycopg import sql

TEMPLATE = "template_tenant"

_JOBS = """
    id serial PRIMARY KEY,
    marketplace varchar(50) NOT NULL,
    action_type_id integer NOT NULL,
    product_id bigint,
    batch_job_id integer,
    status {job_status} NOT NULL,
    priority integer NOT NULL DEFAULT 0,
    retry_count integer NOT NULL DEFAULT 0,
    max_retries integer NOT NULL DEFAULT 3,
    error_message text,
    input_data jsonb,
    result_data jsonb,
    started_at timestamptz,
    completed_at timestamptz,
    expires_at timestamptz,
    created_at timestamptz NOT NULL DEFAULT now()
"""
_TASKS = """
    id serial PRIMARY KEY,
    job_id integer,
    task_type varchar(100),
    status {task_status} NOT NULL,
    retry_count integer NOT NULL DEFAULT 0,
    started_at timestamptz,
    completed_at timestamptz,
    created_at timestamptz NOT NULL DEFAULT now(),
    payload jsonb,
    result jsonb
"""
_OLD_STATS = """
    id serial PRIMARY KEY,
    action_type_id integer NOT NULL,
    date date NOT NULL,
    total_jobs integer NOT NULL DEFAULT 0,
    success_count integer NOT NULL DEFAULT 0,
    failure_count integer NOT NULL DEFAULT 0,
    avg_duration_ms integer,
    created_at timestamptz NOT NULL DEFAULT now()
"""
TABLES = ("marketplace_jobs", "marketplace_tasks", "vinted_job_stats")


def create_action_types(connection: psycopg.Connection[Any]) -> None:
    """`public.marketplace_action_types`, with ids 1 to 9: three codes for each marketplace."""
    connection.execute("""
        CREATE TABLE public.marketplace_action_types (
            id serial PRIMARY KEY, marketplace varchar(50) NOT NULL, code varchar(50) NOT NULL, name text NOT NULL,
            UNIQUE (marketplace, code));
        INSERT INTO public.marketplace_action_types (marketplace, code, name)
        SELECT m, c, initcap(m || ' ' || c)
          FROM unnest(ARRAY['vinted', 'ebay', 'etsy']) m, unnest(ARRAY['publish', 'update', 'delete']) c""")


def create_tenant(connection: psycopg.Connection[Any], schema: str, *, enums: bool = False) -> None:
    """An older tenant (or the template), created with tables of its own; with `enums`, its statuses are enum types."""
    name = sql.Identifier(schema)
    job_status: sql.Composable = sql.SQL("varchar(20)")
    task_status = job_status
    connection.execute(sql.SQL("CREATE SCHEMA {}").format(name))
    if enums:
        job_status, task_status = (sql.SQL("{}.").format(name) + sql.SQL(t) for t in ("jobstatus", "taskstatus"))
        # Without the label 'expired', which some deployments do not have.
        connection.execute(
            sql.SQL("""CREATE TYPE {} AS ENUM ('pending', 'running', 'paused', 'completed', 'failed', 'cancelled');
                       CREATE TYPE {} AS ENUM ('pending', 'processing', 'success', 'failed', 'timeout', 'cancelled')
            """).format(job_status, task_status)
        )
    for table, columns in zip(TABLES, (_JOBS, _TASKS, _OLD_STATS), strict=True):
        body = sql.SQL(columns).format(job_status=job_status, task_status=task_status)
        connection.execute(sql.SQL("CREATE TABLE {}.{} ({})").format(name, sql.Identifier(table), body))
    connection.execute(
        sql.SQL("""
            CREATE INDEX ON {0}.marketplace_jobs (status);
            CREATE INDEX ON {0}.marketplace_jobs (created_at);
            CREATE INDEX ON {0}.marketplace_jobs (marketplace);
            CREATE INDEX ON {0}.marketplace_tasks (job_id);
            ALTER TABLE {0}.vinted_job_stats ADD UNIQUE (action_type_id, date)""").format(name)
    )


def clone_tenant(connection: psycopg.Connection[Any], schema: str, tables: Iterable[str] = TABLES) -> None:
    """A new customer, cloned from the template the way the application does it."""
    connection.execute(sql.SQL("CREATE SCHEMA {}").format(sql.Identifier(schema)))
    for table in tables:
        connection.execute(
            sql.SQL("CREATE TABLE {}.{} (LIKE {}.{} INCLUDING ALL)").format(
                sql.Identifier(schema), sql.Identifier(table), sql.Identifier(TEMPLATE), sql.Identifier(table)
            )
        )


def insert(connection: psycopg.Connection[Any], schema: str, table: str, rows: Iterable[Mapping[str, Any]]) -> None:
    """Rows of any columns of a tenant's table."""
    for row in rows:
        connection.execute(
            sql.SQL("INSERT INTO {}.{} ({}) VALUES ({})").format(
                sql.Identifier(schema),
                sql.Identifier(table),
                sql.SQL(", ").join(map(sql.Identifier, row)),
                sql.SQL(", ").join(sql.Placeholder() * len(row)),
            ),
            list(row.values()),
        )
