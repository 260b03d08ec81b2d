"""Makes the data that benchmarks run on: tenants with jobs and tasks over a year, as fast as the server writes them.

All tenants of a size have the same kind of rows: seven actions on three marketplaces, one job in twenty failed, three
tasks a job, durations spread evenly over four powers of ten. The rows lie in the order of their time, as an application
writes them.
"""

from concurrent.futures import ThreadPoolExecutor
from datetime import date, timedelta

import psycopg

from tests import application
from tests.conftest import run, url_of

DAYS = 365
LAST = date(2025, 12, 31)
FIRST = LAST - timedelta(days=DAYS - 1)
"""The year that is computed."""
BEFORE = 20
"""How many days before it the jobs begin, so that all its days are covered."""

# Indexes are made after the rows, which is faster. SCHEMA, SEED, JOBS, BEGIN and DAYS are put in: numbers, dates and
# names of this module.
_TENANT = """
    CREATE SCHEMA SCHEMA;
    CREATE TABLE SCHEMA.marketplace_jobs (LIKE template_tenant.marketplace_jobs INCLUDING DEFAULTS);
    CREATE TABLE SCHEMA.marketplace_tasks (LIKE template_tenant.marketplace_tasks INCLUDING DEFAULTS);
    CREATE TABLE SCHEMA.marketplace_job_stats (LIKE template_tenant.marketplace_job_stats INCLUDING ALL);
    CREATE TABLE SCHEMA.marketplace_job_stats_days (LIKE template_tenant.marketplace_job_stats_days INCLUDING ALL);
    SELECT setseed(SEED);
    INSERT INTO SCHEMA.marketplace_jobs
           (id, marketplace, action_type_id, status, retry_count,
            started_at, completed_at, created_at, input_data, result_data)
    SELECT n, (ARRAY['vinted', 'vinted', 'vinted', 'ebay', 'ebay', 'etsy'])[1 + n % 6], 1 + floor(random() * 7)::int,
           CASE WHEN n % 20 = 0 THEN 'failed' WHEN n % 33 = 0 THEN 'cancelled' ELSE 'completed' END, n % 50 / 48,
           ended - exp(4.6 + 9.2 * random()) * interval '1 ms', ended, ended - interval '1 hour',
           '{"product": 1234567, "title": "Blue jacket, worn twice"}', '{"ok": true}'
      FROM (SELECT n, timestamptz 'BEGIN 00:00:00Z' + n * interval 'DAYS days' / (JOBS + 1)
              FROM generate_series(1, JOBS) AS n) AS job (n, ended);
    INSERT INTO SCHEMA.marketplace_tasks
           (id, job_id, task_type, status, retry_count, started_at, completed_at, created_at, payload)
    SELECT 3 * id + t, id, 'plugin_http', CASE WHEN (id + t) % 25 = 0 THEN 'failed' ELSE 'success' END, id % 40 / 39,
           started_at, completed_at, created_at, '{"url": "https://example.com/items/1234567"}'
      FROM SCHEMA.marketplace_jobs, generate_series(0, 2) AS t;
    ALTER TABLE SCHEMA.marketplace_jobs ADD PRIMARY KEY (id);
    ALTER TABLE SCHEMA.marketplace_tasks ADD PRIMARY KEY (id);
    CREATE INDEX ON SCHEMA.marketplace_jobs (status);
    CREATE INDEX ON SCHEMA.marketplace_jobs (created_at);
    CREATE INDEX ON SCHEMA.marketplace_jobs (marketplace);
    CREATE INDEX ON SCHEMA.marketplace_tasks (job_id);
"""


def make(conninfo: str, tenants: int, jobs: int, connections: int = 2) -> None:
    """The template, migrated, and so many tenants with so many jobs, and three times as many tasks, each."""
    with psycopg.connect(conninfo, autocommit=True) as connection:
        application.create_tenant(connection, application.TEMPLATE)
        application.create_action_types(connection)
        application.clone_tenant(connection, "user_0")  # Without a tenant, nothing is migrated.
        run("alembic", "upgrade", "head", environment={"DATABASE_URL": url_of(conninfo)})
        connection.execute("DROP SCHEMA user_0 CASCADE")

    def fill(numbers: range) -> None:
        with psycopg.connect(conninfo, autocommit=True, options="-c synchronous_commit=off") as connection:
            for number in numbers:
                statements = _TENANT
                for name, value in (
                    ("SCHEMA SCHEMA", f"SCHEMA user_{number}"),
                    ("SCHEMA.", f"user_{number}."),
                    ("SEED", f"{number / (tenants + 1)}"),
                    ("JOBS", f"{jobs}"),
                    ("BEGIN", f"{FIRST - timedelta(days=BEFORE)}"),
                    ("DAYS", f"{DAYS + BEFORE}"),
                ):
                    statements = statements.replace(name, value)
                connection.execute(statements.encode())

    with ThreadPoolExecutor(connections) as executor:
        list(executor.map(fill, (range(start, tenants + 1, connections) for start in range(1, connections + 1))))
    with psycopg.connect(conninfo, autocommit=True) as connection:
        connection.execute("VACUUM ANALYZE")
        connection.execute("CHECKPOINT")
