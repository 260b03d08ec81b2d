"""Makes the data that benchmarks run on: tenants with jobs and tasks over a year, as fast as the server writes them.

All tenants of a size have the same kind of rows: seven actions on three marketplaces, one job in twenty failed, three
tasks a job, durations spread evenly over four powers of ten, waits over three. Those that failed have a message, of one
of five kinds, with the ids, addresses and numbers of its case in it. The rows lie in the order of their time, as an
application writes them; no two tenants have their jobs at the same times.
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

# What failed jobs say; `n` is the job's id.
_MESSAGES = (
    "'HTTP 429 Too Many Requests: https://api.example.com/v2/items/' || 7000000 + n || '?page=' || n % 9",
    "'Item ' || 7000000 + n || ' not found: it was deleted by user_' || n % 977 || '@example.com'",
    """'Connection to 10.0.' || n % 250 || '.17:8443 timed out after ' || n % 30 || '.5 s (request '
       || md5(n::text) || ')' || chr(10) || '  File "/app/worker/client.py", line ' || n % 400 || ', in send'""",
    "'Price ' || n % 90 || '.99 of \"Blue jacket, size ' || n % 12 || '\" is below the minimum of 2.50 EUR'",
    "'Upload of /var/lib/worker/' || md5(n::text) || '.jpg refused: status code 413, response: too large'",
)

# Indexes are made after the rows, which is faster. SCHEMA, SEED, JOBS, BEGIN, DAYS and MESSAGES are put in: numbers,
# dates, names and texts of this module.
_TENANT = """
    CREATE SCHEMA SCHEMA;
    CREATE TABLE SCHEMA.marketplace_jobs (LIKE template_tenant.marketplace_jobs INCLUDING DEFAULTS);
    CREATE TABLE SCHEMA.marketplace_tasks (LIKE template_tenant.marketplace_tasks INCLUDING DEFAULTS);
    CREATE TABLE SCHEMA.marketplace_job_facts (LIKE template_tenant.marketplace_job_facts INCLUDING ALL);
    CREATE TABLE SCHEMA.marketplace_job_stats (LIKE template_tenant.marketplace_job_stats INCLUDING ALL);
    CREATE TABLE SCHEMA.marketplace_job_stats_days (LIKE template_tenant.marketplace_job_stats_days INCLUDING ALL);
    CREATE TABLE SCHEMA.marketplace_job_stats_changes
           (LIKE template_tenant.marketplace_job_stats_changes INCLUDING ALL);
    SELECT setseed(SEED);
    INSERT INTO SCHEMA.marketplace_jobs
           (id, marketplace, action_type_id, status, retry_count, error_message,
            started_at, completed_at, created_at, input_data, result_data)
    SELECT n, (ARRAY['vinted', 'vinted', 'vinted', 'ebay', 'ebay', 'etsy'])[1 + n % 6], 1 + floor(random() * 7)::int,
           CASE WHEN n % 20 = 0 THEN 'failed' WHEN n % 33 = 0 THEN 'cancelled' ELSE 'completed' END, n % 50 / 48,
           CASE WHEN n % 20 = 0 THEN (ARRAY[MESSAGES])[1 + n / 20 % 5] END,
           started, ended, started - exp(4.6 + 6.9 * random()) * interval '1 ms',
           '{"product": 1234567, "title": "Blue jacket, worn twice"}', '{"ok": true}'
      FROM (SELECT n, ended - exp(4.6 + 9.2 * random()) * interval '1 ms', ended
              FROM (SELECT n, timestamptz 'BEGIN 00:00:00Z' + (n - SEED) * interval 'DAYS days' / JOBS
                      FROM generate_series(1, JOBS) AS n) AS job (n, ended)) AS job (n, started, ended);
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
                    ("MESSAGES", ", ".join(_MESSAGES)),
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
