"""Makes the data that benchmarks run on: tenants with jobs and tasks over a year and more, as fast as the server writes.

All tenants of a size have the same kind of rows: seven actions on three marketplaces, one job in twenty failed, three
tasks a job, durations spread over four powers of ten. The rows lie in the order of their time, as an application writes
them.
"""

from concurrent.futures import ThreadPoolExecutor
from datetime import date, timedelta

import psycopg

from tests import application
from tests.conftest import run, url_of

LAST = date(2025, 12, 31)
DAYS = 365
BEFORE = 20
"""The year that is computed, and how many days before it the jobs begin, so that all its days are covered."""


def make(conninfo: str, tenants: int, jobs: int, connections: int = 2) -> None:
    """The template, migrated, and so many tenants with so many jobs, and three times as many tasks, each."""
    with psycopg.connect(conninfo, autocommit=True) as connection:
        application.create_tenant(connection, application.TEMPLATE)
        application.create_action_types(connection)
        application.clone_tenant(connection, "user_0")  # Without a tenant, nothing is migrated.
        run("alembic", "upgrade", "head", environment={"DATABASE_URL": url_of(conninfo)})
        connection.execute("DROP SCHEMA user_0 CASCADE")
    first = LAST - timedelta(days=DAYS + BEFORE)
    statements = f"""
        CREATE SCHEMA %(s)s;
        CREATE TABLE %(s)s.marketplace_jobs (LIKE template_tenant.marketplace_jobs INCLUDING DEFAULTS);
        CREATE TABLE %(s)s.marketplace_tasks (LIKE template_tenant.marketplace_tasks INCLUDING DEFAULTS);
        CREATE TABLE %(s)s.marketplace_job_stats (LIKE template_tenant.marketplace_job_stats INCLUDING ALL);
        CREATE TABLE %(s)s.marketplace_job_stats_days (LIKE template_tenant.marketplace_job_stats_days INCLUDING ALL);
        SELECT setseed(0.%(n)s);
        INSERT INTO %(s)s.marketplace_jobs (id, marketplace, action_type_id, status, retry_count,
                                            started_at, completed_at, created_at, input_data, result_data)
        SELECT n, (ARRAY['vinted', 'vinted', 'vinted', 'ebay', 'ebay', 'etsy'])[1 + n %% 6], 1 + floor(random() * 7)::int,
               CASE WHEN n %% 20 = 0 THEN 'failed' WHEN n %% 33 = 0 THEN 'cancelled' ELSE 'completed' END, (n %% 50) / 48,
               ended - exp(4.6 + 9.2 * random()) * interval '1 ms', ended, ended - interval '1 hour',
               '{{"product": 1234567, "title": "Blue jacket, worn twice"}}', '{{"ok": true}}'
          FROM (SELECT n, timestamptz '{first} 00:00:00Z' + n * interval '{DAYS + BEFORE} days' / {jobs + 1}
                  FROM generate_series(1, {jobs}) AS n) AS job (n, ended);
        INSERT INTO %(s)s.marketplace_tasks (id, job_id, task_type, status, retry_count,
                                             started_at, completed_at, created_at, payload)
        SELECT 3 * id + t, id, 'plugin_http', CASE WHEN (id + t) %% 25 = 0 THEN 'failed' ELSE 'success' END, (id %% 40) / 39,
               started_at, completed_at, created_at, '{{"url": "https://example.com/items/1234567"}}'
          FROM %(s)s.marketplace_jobs, generate_series(0, 2) AS t;
        ALTER TABLE %(s)s.marketplace_jobs ADD PRIMARY KEY (id);
        ALTER TABLE %(s)s.marketplace_tasks ADD PRIMARY KEY (id);
        CREATE INDEX ON %(s)s.marketplace_jobs (status);
        CREATE INDEX ON %(s)s.marketplace_jobs (created_at);
        CREATE INDEX ON %(s)s.marketplace_jobs (marketplace);
        CREATE INDEX ON %(s)s.marketplace_tasks (job_id);
    """

    def fill(numbers: range) -> None:
        with psycopg.connect(conninfo, autocommit=True, options="-c synchronous_commit=off") as connection:
            for number in numbers:
                connection.execute(
                    statements.replace("%(s)s", f"user_{number}")
                    .replace("%(n)s", f"{number}")
                    .replace("%%", "%")
                    .encode()
                )

    with ThreadPoolExecutor(connections) as executor:
        list(executor.map(fill, (range(start, tenants + 1, connections) for start in range(1, connections + 1))))
    with psycopg.connect(conninfo, autocommit=True) as connection:
        connection.execute("VACUUM ANALYZE")
        connection.execute("CHECKPOINT")
