"""What is met in real databases: each kind ends in right numbers, or is named; no tenant is lost."""

from datetime import timedelta
from typing import Any

import psycopg
import pytest

from migrations.target import HEAD
from tests import application
from tests.conftest import RUN_ROLE
from tests.integration.common import DAY, NOON, failure, job, materialize, metadata

pytestmark = pytest.mark.usefixtures("url")

TABLES = ("marketplace_jobs", "marketplace_tasks", *HEAD)

DONE, DONE_WITHOUT_TASKS = "done", "done, without the numbers of tasks"
# What is done to a tenant that is a migrated clone with two jobs on the day, and what becomes of it.
CASES = {
    "nothing": ("", DONE),
    "extra columns": ("ALTER TABLE {t}.marketplace_jobs ADD batch_id uuid, ADD cancel_requested boolean", DONE),
    "columns in another order": (
        """CREATE TABLE {t}.j AS SELECT completed_at, started_at, retry_count, status, marketplace, action_type_id, id,
                  error_message, created_at FROM {t}.marketplace_jobs;
           DROP TABLE {t}.marketplace_jobs; ALTER TABLE {t}.j RENAME TO marketplace_jobs;
           GRANT SELECT ON {t}.marketplace_jobs TO {role}""",
        DONE,
    ),
    "partitioned": (
        """CREATE TABLE {t}.j (LIKE {t}.marketplace_jobs) PARTITION BY RANGE (id);
           CREATE TABLE {t}.j1 PARTITION OF {t}.j FOR VALUES FROM (MINVALUE) TO (MAXVALUE);
           INSERT INTO {t}.j SELECT * FROM {t}.marketplace_jobs;
           DROP TABLE {t}.marketplace_jobs; ALTER TABLE {t}.j RENAME TO marketplace_jobs;
           GRANT SELECT ON {t}.marketplace_jobs TO {role}""",
        DONE,
    ),
    "no tables": ("DROP SCHEMA {t} CASCADE; CREATE SCHEMA {t}", "marketplace_jobs is missing"),
    "no tasks": ("DROP TABLE {t}.marketplace_tasks", DONE_WITHOUT_TASKS),
    "before the rename": (
        "ALTER TABLE {t}.marketplace_jobs RENAME TO vinted_jobs; "
        "ALTER TABLE {t}.marketplace_tasks RENAME TO plugin_tasks",
        "marketplace_jobs still has vinted_jobs, its name before the rename",
    ),
    "no stats": (
        "DROP TABLE {t}.marketplace_job_stats CASCADE",
        "marketplace_job_stats is missing: run `alembic -x tenant={t} upgrade head`",
    ),
    "a clone of the view": (
        "DROP TABLE {t}.marketplace_job_stats CASCADE; "
        "CREATE TABLE {t}.vinted_job_stats (LIKE template_tenant.vinted_job_stats INCLUDING ALL)",
        "marketplace_job_stats is missing: run `alembic -x tenant={t} upgrade head`",
    ),
    "no facts": (
        "DROP TABLE {t}.marketplace_job_facts",
        "marketplace_job_facts is missing: run `alembic -x tenant={t} upgrade head`",
    ),
    "no ledger": (
        "DROP TABLE {t}.marketplace_job_stats_days",
        "marketplace_job_stats_days is missing: run `alembic -x tenant={t} upgrade head`",
    ),
    "half a target": (
        "ALTER TABLE {t}.marketplace_job_stats DROP COLUMN total_tasks",
        "marketplace_job_stats lacks the columns total_tasks: run `alembic -x tenant={t} upgrade head`",
    ),
    "half a source": (
        "ALTER TABLE {t}.marketplace_tasks DROP COLUMN retry_count",
        "column marketplace_tasks.retry_count does not exist (SQLSTATE 42703)",
    ),
    "no privilege": (
        "REVOKE SELECT ON {t}.marketplace_tasks FROM {role}",
        "permission denied for table marketplace_tasks (SQLSTATE 42501): migrate it with MIGRATION_DATABASE_URL",
    ),
    "no privilege on the schema": (
        "REVOKE USAGE ON SCHEMA {t} FROM {role}",
        "permission denied for schema {t} (SQLSTATE 42501): migrate it with MIGRATION_DATABASE_URL",
    ),
    "a trigger that looks elsewhere": (
        """CREATE FUNCTION {t}.note() RETURNS trigger LANGUAGE plpgsql AS
           $$ BEGIN INSERT INTO audit SELECT NEW.date; RETURN NEW; END $$;
           CREATE TABLE IF NOT EXISTS public.audit (date date);
           CREATE TRIGGER note AFTER INSERT ON {t}.marketplace_job_stats FOR EACH ROW EXECUTE FUNCTION {t}.note()""",
        'relation "audit" does not exist (SQLSTATE 42P01): if it is not a table of ours',
    ),
    "dates of another type": ("ALTER TABLE {t}.marketplace_job_stats ALTER date TYPE timestamp", DONE),
    "hidden rows": (
        "ALTER TABLE {t}.marketplace_jobs ENABLE ROW LEVEL SECURITY",
        'query would be affected by row-level security policy for table "marketplace_jobs" (SQLSTATE 42501)',
    ),
    "a date that is none": (
        "ALTER TABLE {t}.marketplace_jobs ALTER completed_at TYPE text",
        "does not exist (SQLSTATE 42883)",
    ),
    "a number too large": (
        "ALTER TABLE {t}.marketplace_jobs ALTER retry_count TYPE bigint; "
        "UPDATE {t}.marketplace_jobs SET retry_count = 9223372036854775807",
        "integer out of range (SQLSTATE 22003)",
    ),
}


def test_no_tenant_is_lost(connection: psycopg.Connection[Any]) -> None:
    """Each kind of tenant is computed, or named with its reason; together they are all that there are."""
    expected: dict[str, str] = {}
    connection.execute("DROP SCHEMA user_1 CASCADE; DROP SCHEMA user_10 CASCADE")
    names = ["007", "7", "99999999999999999999999999", *map(str, range(100, 200))]
    for number, (statements, result) in zip(names, CASES.values(), strict=False):
        schema = f"user_{number}"
        application.clone_tenant(connection, schema, TABLES)
        connection.execute(
            f"GRANT USAGE ON SCHEMA {schema} TO {RUN_ROLE}; GRANT ALL ON ALL TABLES IN SCHEMA {schema} TO {RUN_ROLE}"
        )
        application.insert(connection, schema, "marketplace_jobs", [job(id=1), job(id=2, status="failed")])
        application.insert(connection, schema, "marketplace_tasks", [{"job_id": 1, "status": "success"}])
        if statements:
            connection.execute(statements.format(t=schema, role=RUN_ROLE))
        expected[schema] = result.format(t=schema)

    run = materialize()

    day = metadata(run)[DAY]
    named = {row["tenant"]: row["reason"] for kind in ("failed", "skipped") for row in day[f"run_tenants_{kind}"]}
    refused = {schema: reason for schema, reason in expected.items() if not reason.startswith(DONE)}
    assert set(named) == set(refused)
    assert [(named[schema], reason) for schema, reason in refused.items() if reason not in named[schema]] == []
    done = {schema: reason for schema, reason in expected.items() if reason.startswith(DONE)}
    assert day["tenants_done"] == len(done) + 1
    assert f"{len(done) + 1} tenants done, 2 skipped" in failure(run)
    for schema, reason in done.items():
        row = connection.execute(f"SELECT total_jobs, failure_count, total_tasks FROM {schema}.marketplace_job_stats")
        assert (schema, row.fetchall()) == (schema, [(2, 1, 1 if reason == DONE else None)])


def test_columns_of_other_types_spoil_no_other_tenant(connection: psycopg.Connection[Any]) -> None:
    """A statement that a connection has prepared for some tenants serves those with other types as well, and back."""
    for number in range(11, 17):
        schema = f"user_{number}"
        application.clone_tenant(connection, schema, TABLES)
        connection.execute(
            f"GRANT USAGE ON SCHEMA {schema} TO {RUN_ROLE}; GRANT ALL ON ALL TABLES IN SCHEMA {schema} TO {RUN_ROLE}"
        )
        application.insert(connection, schema, "marketplace_jobs", [job(id=1)])
    connection.execute("""
        ALTER TABLE user_14.marketplace_job_stats ALTER date TYPE timestamp, ALTER action_type_id TYPE bigint,
              ALTER marketplace TYPE text, ALTER total_jobs TYPE bigint;
        ALTER TABLE user_14.marketplace_job_stats_days ALTER date TYPE timestamp, ALTER time_zone TYPE varchar(40);
        ALTER TABLE user_14.marketplace_jobs ALTER id TYPE bigint, ALTER action_type_id TYPE bigint""")
    for _ in range(2):  # The first rows, and the difference.
        run = materialize(environment={"STATS_WORKERS": "1"})
        assert metadata(run)[DAY]["tenants_done"] == 9, failure(run)
        assert run.success


def test_rows_of_every_kind_are_counted_or_reported(connection: psycopg.Connection[Any]) -> None:
    """What the domain page lists as untidy in the rows themselves: each goes where its definition says."""
    rows = [
        job(id=1, action_type_id=2**31 - 1),  # An action that nobody knows.
        job(id=2, marketplace="Vinted"),
        job(id=3, marketplace="x" * 50, status="cancelled"),
        job(id=4, started_at=None),
        job(id=5, started_at=NOON + timedelta(seconds=1)),
        job(id=6, started_at="-infinity"),
        job(id=7, started_at="infinity"),
        job(id=8, started_at=NOON - timedelta(milliseconds=2**31)),
        job(id=9, retry_count=-3),
        job(id=10, status="Completed"),  # No status of the application: not finished.
        job(id=11, completed_at=None),
        job(id=12, completed_at="infinity"),
        job(id=13, completed_at="-infinity", status="expired"),
    ]
    application.insert(connection, "user_2", "marketplace_jobs", rows)
    tasks: list[dict[str, Any]] = [
        {"job_id": None, "status": "success"},  # An orphan.
        {"job_id": 999, "status": "success"},
        {"job_id": 2, "status": "success"},  # Of a job that is not counted.
        {"job_id": 1, "status": "timeout", "task_type": None, "retry_count": 2**31 - 1},
        {"job_id": 1, "status": "failed", "retry_count": 2**31 - 1},
        {"job_id": 1, "status": "cancelled"},
        {"job_id": 1, "status": "SUCCESS"},
    ]
    application.insert(connection, "user_2", "marketplace_tasks", tasks)

    run = materialize(schedule="weekly")

    assert run.success
    found = connection.execute("""
        SELECT action_type_id, total_jobs, duration_count, retry_count, total_tasks, task_retry_count
          FROM user_2.marketplace_job_stats ORDER BY 1""")
    assert found.fetchall() == [(1, 6, 1, -3, 0, 0), (2**31 - 1, 1, 1, 0, 2, 2**32 - 2)]
    day = metadata(run)[DAY]
    reasons = ("unknown_marketplace_jobs", "no_start_jobs", "bad_duration_jobs", "run_jobs_without_day")
    assert [day[reason] for reason in reasons] == [2, 1, 4, 3]
