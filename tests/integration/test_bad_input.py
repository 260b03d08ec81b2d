"""What is met in real databases: each kind ends in right numbers, or is named; no tenant is lost."""

from datetime import timedelta
from typing import Any

import psycopg
import pytest

from migrations.target import HEAD
from tests import application
from tests.conftest import RUN_ROLE
from tests.integration.common import DAY, NOON, failure, job, materialize, metadata
from tests.integration.test_summary import summarize

pytestmark = pytest.mark.usefixtures("url")

TABLES = ("marketplace_jobs", "marketplace_tasks", *HEAD)

STATS, FACTS = "marketplace_job_stats", "marketplace_job_facts"
NOTE = """CREATE FUNCTION {t}.note() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RETURN NEW; END $$"""
CODE = """CREATE FUNCTION {t}.code(integer) RETURNS integer IMMUTABLE LANGUAGE sql AS $$ SELECT $1 $$;
          CREATE FUNCTION {t}.equal(integer, integer) RETURNS boolean IMMUTABLE LANGUAGE sql AS $$ SELECT true $$;
          CREATE OPERATOR {t}.@@@ (FUNCTION = {t}.equal, LEFTARG = integer, RIGHTARG = integer)"""
SHOWN = """ALTER TABLE {{t}}.marketplace_jobs RENAME TO stored_jobs;
           CREATE VIEW {{t}}.marketplace_jobs AS SELECT {} FROM {{t}}.stored_jobs;
           GRANT SELECT ON {{t}}.marketplace_jobs TO {{role}}"""

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
        "ALTER TABLE {t}.marketplace_tasks DROP COLUMN retry_count, DROP COLUMN status",
        "marketplace_tasks lacks the columns status, retry_count, which are read: give {t}.marketplace_tasks the",
    ),
    "a source without what is not read": (
        "ALTER TABLE {t}.marketplace_tasks DROP COLUMN id, DROP COLUMN completed_at; "
        "ALTER TABLE {t}.marketplace_jobs DROP COLUMN priority",
        DONE,
    ),
    **{
        f"{table} as a materialized view": (
            f"""ALTER TABLE {{t}}.{table} RENAME TO stored;
                CREATE MATERIALIZED VIEW {{t}}.{table} AS SELECT * FROM {{t}}.stored;
                GRANT SELECT ON {{t}}.{table} TO {{role}}""",
            f"{table} is a materialized view, which shows rows as they were at its last refresh: make it a view, or a "
            "table",
        )
        for table in ("marketplace_jobs", "marketplace_tasks")
    },
    **{
        f"{table}: {column} of another type": (
            f"ALTER TABLE {{t}}.{table} {more} ALTER {column} TYPE {type_} USING {value}",
            f"{table} has {column} as {type_}, not {right}, so its values would not be what they say: change the type "
            f"in {{t}}.{table}",
        )
        for table, column, type_, right, value, more in (
            ("marketplace_jobs", "completed_at", "date", "timestamp with time zone", "completed_at::date", ""),
            ("marketplace_jobs", "started_at", "text", "timestamp with time zone", "started_at::text", ""),
            ("marketplace_jobs", "status", "integer", "text", "length(status)", ""),
            ("marketplace_jobs", "marketplace", "jsonb", "varchar(50)", "to_jsonb(marketplace)", ""),
            ("marketplace_jobs", "retry_count", "numeric(9,1)", "integer", "0.5", "ALTER retry_count DROP DEFAULT,"),
            ("marketplace_jobs", "action_type_id", "text", "integer", "action_type_id::text", ""),
            ("marketplace_jobs", "id", "numeric", "integer", "id + 0.4", "ALTER id DROP DEFAULT,"),
            ("marketplace_tasks", "job_id", "text", "integer", "job_id::text", ""),
            ("marketplace_tasks", "status", "jsonb", "text", "to_jsonb(status)", ""),
            ("marketplace_tasks", "retry_count", "real", "integer", "0.5", "ALTER retry_count DROP DEFAULT,"),
        )
    },
    "a domain over a date": (
        """CREATE DOMAIN {t}.day AS date;
           ALTER TABLE {t}.marketplace_jobs ALTER completed_at TYPE {t}.day USING completed_at::date""",
        "marketplace_jobs has completed_at as {t}.day, not timestamp with time zone",
    ),
    "domains, an enum and types that hold as much": (
        """CREATE DOMAIN {t}.word AS varchar; CREATE DOMAIN {t}.number AS bigint;
           CREATE DOMAIN {t}.instant AS timestamptz; CREATE TYPE {t}.shop AS ENUM ('vinted', 'ebay', 'etsy');
           ALTER TABLE {t}.marketplace_jobs ALTER id TYPE {t}.number, ALTER status TYPE {t}.word,
               ALTER marketplace TYPE {t}.shop USING marketplace::{t}.shop, ALTER completed_at TYPE {t}.instant,
               ALTER retry_count TYPE smallint, ALTER action_type_id TYPE bigint, ALTER started_at TYPE timestamptz(0);
           ALTER TABLE {t}.marketplace_tasks ALTER job_id TYPE bigint, ALTER status TYPE char(20)""",
        DONE,
    ),
    "retries that are null": (
        """ALTER TABLE {t}.marketplace_jobs ALTER retry_count DROP NOT NULL;
           UPDATE {t}.marketplace_jobs SET retry_count = NULL WHERE id = 1""",
        DONE,
    ),
    **{
        f"ours: {table}.{column} as {type_}": (
            f"ALTER TABLE {{t}}.{table} ALTER {column} TYPE {type_}",
            f"{table} has {column} as {type_}, not {right}: run `alembic -x tenant={{t}} upgrade head`",
        )
        for table, column, type_, right in (
            (STATS, "date", "timestamp with time zone", "date"),
            (STATS, "duration_sum_ms", "integer", "bigint"),
            (STATS, "p50_duration_ms", "real", "double precision"),
            (FACTS, "created_at", "timestamp(0) with time zone", "timestamp with time zone"),
            ("marketplace_job_stats_days", "date", "timestamp without time zone", "date"),
            ("marketplace_job_stats_changes", "action_type_id", "smallint", "integer"),
        )
    },
    "no privilege": (
        "REVOKE SELECT ON {t}.marketplace_tasks FROM {role}",
        "permission denied for table marketplace_tasks (SQLSTATE 42501): migrate it with MIGRATION_DATABASE_URL",
    ),
    "no privilege on the schema": (
        "REVOKE USAGE ON SCHEMA {t} FROM {role}",
        "permission denied for schema {t} (SQLSTATE 42501): migrate it with MIGRATION_DATABASE_URL",
    ),
    "a trigger": (
        f"{NOTE}; CREATE TRIGGER note AFTER INSERT ON {{t}}.marketplace_job_stats EXECUTE FUNCTION {{t}}.note()",
        "marketplace_job_stats has a trigger of somebody else's, which would run with the rights of this role: "
        'DROP TRIGGER "note" ON {t}.marketplace_job_stats, or disable it',
    ),
    "a trigger of replication": (
        f"""{NOTE}; CREATE TRIGGER note AFTER INSERT ON {{t}}.marketplace_job_facts EXECUTE FUNCTION {{t}}.note();
            ALTER TABLE {{t}}.marketplace_job_facts ENABLE ALWAYS TRIGGER note""",
        "marketplace_job_facts has a trigger of somebody else's",
    ),
    "a trigger that is disabled": (
        f"""{NOTE}; CREATE TRIGGER note AFTER INSERT ON {{t}}.marketplace_job_facts EXECUTE FUNCTION {{t}}.note();
            ALTER TABLE {{t}}.marketplace_job_facts DISABLE TRIGGER note""",
        DONE,
    ),
    "triggers of a foreign key": (
        """ALTER TABLE {t}.marketplace_job_stats ADD FOREIGN KEY (action_type_id)
               REFERENCES public.marketplace_action_types (id) DEFERRABLE""",
        DONE,
    ),
    "a rule": (
        """CREATE RULE away AS ON INSERT TO {t}.marketplace_job_stats_changes DO INSTEAD NOTHING""",
        "marketplace_job_stats_changes has a rule of somebody else's, which changes what is written: "
        'DROP RULE "away" ON {t}.marketplace_job_stats_changes, or disable it',
    ),
    "a rule that is disabled": (
        """CREATE RULE away AS ON INSERT TO {t}.marketplace_job_facts DO INSTEAD NOTHING;
           ALTER TABLE {t}.marketplace_job_facts DISABLE RULE away""",
        DONE,
    ),
    **{
        f"unlogged {table}": (
            f"ALTER TABLE {{t}}.{table} SET UNLOGGED",
            f"{table} is unlogged, so a crash empties it: ALTER TABLE {{t}}.{table} SET LOGGED",
        )
        for table in HEAD
    },
    "hidden rows of ours": (
        "ALTER TABLE {t}.marketplace_job_stats_days ENABLE ROW LEVEL SECURITY",
        "marketplace_job_stats_days has row-level security, which hides rows: ALTER TABLE "
        "{t}.marketplace_job_stats_days DISABLE ROW LEVEL SECURITY, or give the role BYPASSRLS",
    ),
    "rows that are inherited": (
        "CREATE TABLE {t}.more () INHERITS ({t}.marketplace_job_facts)",
        "marketplace_job_facts has a table that inherits from it, whose rows would count, too: "
        "ALTER TABLE {t}.more NO INHERIT {t}.marketplace_job_facts",
    ),
    "a domain": (
        f"""{CODE}; CREATE DOMAIN {{t}}.checked AS text CHECK ({{t}}.code(1) > 0);
            ALTER TABLE {{t}}.marketplace_job_stats ADD note {{t}}.checked""",
        "marketplace_job_stats has columns of somebody else's types, which may run code with the rights of this role: "
        'change the type of "note"',
    ),
    "an enum of theirs in a column of ours": (
        """CREATE TYPE {t}.shop AS ENUM ('vinted', 'ebay', 'etsy');
           ALTER TABLE {t}.marketplace_job_facts ALTER marketplace TYPE {t}.shop USING marketplace::{t}.shop""",
        "marketplace_job_facts has columns of somebody else's types, which may run code with the rights of this role: "
        'change the type of "marketplace"',
    ),
    "an enum in a column of theirs": (
        "CREATE TYPE {t}.mood AS ENUM ('good'); ALTER TABLE {t}.marketplace_job_facts ADD mood {t}.mood DEFAULT 'good'",
        DONE,
    ),
    **{
        f"code in {what}": (
            f"{CODE}; {statement}",
            f"{table} has a default, a check or an index with a function or operator of somebody else's",
        )
        for what, table, statement in (
            ("a default", STATS, f"ALTER TABLE {{t}}.{STATS} ADD note integer DEFAULT {{t}}.code(1)"),
            ("a check", STATS, f"ALTER TABLE {{t}}.{STATS} ADD CHECK ({{t}}.code(total_jobs) > -1)"),
            ("an operator", FACTS, f"ALTER TABLE {{t}}.{FACTS} ADD CHECK (job_id::int OPERATOR({{t}}.@@@) 1)"),
            ("an index", FACTS, f"CREATE INDEX ON {{t}}.{FACTS} (({{t}}.code(retry_count)))"),
            ("a condition", FACTS, f"CREATE INDEX ON {{t}}.{FACTS} (date) WHERE {{t}}.code(retry_count) > 0"),
            ("a column", FACTS, f"ALTER TABLE {{t}}.{FACTS} ADD n int GENERATED ALWAYS AS ({{t}}.code(1)) STORED"),
        )
    },
    "code in a source": (
        f"{CODE}; {SHOWN.format('*, {t}.code(1) AS code')}",
        "marketplace_jobs is a view with a function or operator of somebody else's",
    ),
    "code in a view of a view": (
        f"""{CODE}; CREATE VIEW {{t}}.inner_jobs AS SELECT * FROM {{t}}.marketplace_jobs WHERE id OPERATOR({{t}}.@@@) 1;
            ALTER TABLE {{t}}.marketplace_jobs RENAME TO stored_jobs;
            CREATE VIEW {{t}}.marketplace_jobs AS SELECT * FROM {{t}}.inner_jobs;
            GRANT SELECT ON {{t}}.marketplace_jobs TO {{role}}""",
        "marketplace_jobs is a view with a function or operator of somebody else's",
    ),
    "a view": (SHOWN.format("*"), DONE),
    "code in a cast": (
        """CREATE TYPE {t}.jobstatus AS ENUM ('completed', 'failed');
           CREATE FUNCTION {t}.word({t}.jobstatus) RETURNS text LANGUAGE sql AS $$ SELECT 'failed' $$;
           CREATE CAST ({t}.jobstatus AS text) WITH FUNCTION {t}.word({t}.jobstatus);
           ALTER TABLE {t}.marketplace_jobs ALTER status TYPE {t}.jobstatus USING status::{t}.jobstatus""",
        "marketplace_jobs has columns of a type with a cast of somebody else's",
    ),
    "timestamps without a zone": (
        "ALTER TABLE {t}.marketplace_jobs ALTER completed_at TYPE timestamp, ALTER created_at TYPE timestamp",
        "marketplace_jobs has timestamps without time zone, so nobody knows what instants they mean: ALTER TABLE "
        "{t}.marketplace_jobs ALTER completed_at TYPE timestamptz USING completed_at AT TIME ZONE '<zone>', ALTER "
        "created_at TYPE timestamptz USING created_at AT TIME ZONE '<zone>', with the zone that the application writes",
    ),
    "timestamps without a zone that are not read": (
        "ALTER TABLE {t}.marketplace_jobs ALTER expires_at TYPE timestamp",
        DONE,
    ),
    "facts without a zone": (
        "ALTER TABLE {t}.marketplace_job_facts ALTER created_at TYPE timestamp",
        "marketplace_job_facts has created_at as timestamp without time zone, not timestamp with time zone: "
        "run `alembic -x tenant={t} upgrade head`",
    ),
    "a sequence behind its ids": (
        """INSERT INTO {t}.marketplace_job_stats (id, action_type_id, marketplace, date)
           SELECT n, n, 'etsy', '2020-01-01' FROM generate_series(1, 999) n""",
        "(SQLSTATE 23505): its sequence lies behind its ids, as after a restore: run `alembic -x "
        "tenant=<schema> upgrade head`",
    ),
    "hidden rows": (
        "ALTER TABLE {t}.marketplace_jobs ENABLE ROW LEVEL SECURITY",
        'query would be affected by row-level security policy for table "marketplace_jobs" (SQLSTATE 42501)',
    ),
    "a message of another type": (
        "ALTER TABLE {t}.marketplace_jobs ALTER error_message TYPE bytea USING error_message::bytea",
        "does not exist (SQLSTATE 42883): a column of the application has another type",
    ),
    "jobs that nobody knows when they were created": (
        """ALTER TABLE {t}.marketplace_jobs ALTER created_at DROP NOT NULL;
           UPDATE {t}.marketplace_jobs SET created_at = NULL WHERE id = 1""",
        "(SQLSTATE 23502): SELECT * FROM {t}.marketplace_jobs WHERE created_at IS NULL shows the rows of the "
        "application: correct them",
    ),
    "jobs of no action": (
        """ALTER TABLE {t}.marketplace_jobs ALTER action_type_id DROP NOT NULL;
           UPDATE {t}.marketplace_jobs SET action_type_id = NULL""",
        DONE,
    ),
    "the same job twice": (
        """ALTER TABLE {t}.marketplace_jobs DROP CONSTRAINT marketplace_jobs_pkey;
           INSERT INTO {t}.marketplace_jobs SELECT * FROM {t}.marketplace_jobs""",
        "(SQLSTATE 21000): two jobs have the same id and created_at: delete or correct one of them",
    ),
    "a column that must be given": (
        f"ALTER TABLE {{t}}.{STATS} ADD forgotten int NOT NULL",
        'null value in column "forgotten" of relation "marketplace_job_stats" violates not-null constraint (SQLSTATE '
        "23502): it is none of our columns, and has no default: ALTER TABLE {t}.marketplace_job_stats ALTER "
        '"forgotten" DROP NOT NULL, or drop it',
    ),
    "a foreign key": (
        f"CREATE TABLE {{t}}.types (id int PRIMARY KEY); ALTER TABLE {{t}}.{FACTS} "
        "ADD CONSTRAINT known FOREIGN KEY (action_type_id) REFERENCES {t}.types",
        '(SQLSTATE 23503): "known" of {t}.marketplace_job_facts is none of ours: drop it',
    ),
    "a check": (
        f"ALTER TABLE {{t}}.{STATS} ADD CONSTRAINT few CHECK (total_jobs < 1)",
        '(SQLSTATE 23514): "few" of {t}.marketplace_job_stats is none of ours: drop it',
    ),
    "a unique key": (
        f"CREATE UNIQUE INDEX one ON {{t}}.{FACTS} (date)",
        '(SQLSTATE 23505): "one" of {t}.marketplace_job_facts is none of ours: drop it',
    ),
    "a sequence at its end": (
        f"""CREATE SEQUENCE {{t}}.ids START 2 MAXVALUE 2; GRANT USAGE ON {{t}}.ids TO {{role}};
            SELECT nextval('{{t}}.ids');
            ALTER TABLE {{t}}.{STATS} ALTER id SET DEFAULT nextval('{{t}}.ids')""",
        'reached maximum value of sequence "ids" (2) (SQLSTATE 2200H): the ids have used up their sequence: ALTER',
    ),
    "a number too large": (
        "ALTER TABLE {t}.marketplace_jobs ALTER retry_count TYPE bigint; "
        "UPDATE {t}.marketplace_jobs SET retry_count = 9223372036854775807",
        "integer out of range (SQLSTATE 22003): a number is too large",
    ),
}


AT_ONCE = 16
"""How many cases share a run, which names twenty failed tenants."""


@pytest.mark.parametrize("first", range(0, len(CASES), AT_ONCE))
def test_no_tenant_is_lost(connection: psycopg.Connection[Any], first: int) -> None:
    """Each kind of tenant is computed, or named with its reason; together they are all that there are."""
    cases = [*CASES.values()][first : first + AT_ONCE]
    expected: dict[str, str] = {}
    connection.execute("DROP SCHEMA user_1 CASCADE; DROP SCHEMA user_10 CASCADE")
    names = ["007", "7", "99999999999999999999999999", *map(str, range(100, 200))]
    for number, (statements, result) in zip(names, cases, strict=False):
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
    named = {
        row["tenant"]: row["reason"] for kind in ("failed", "skipped") for row in day.get(f"run_{kind}_tenants", ())
    }
    refused = {schema: reason for schema, reason in expected.items() if not reason.startswith(DONE)}
    assert set(named) == set(refused)
    assert [(named[schema], reason) for schema, reason in refused.items() if reason not in named[schema]] == []
    done = {schema: reason for schema, reason in expected.items() if reason.startswith(DONE)}
    assert day["run_tenants_done"] == len(done) + 1
    skipped = len(day.get("run_skipped_tenants", ()))
    assert f"{len(done) + 1} tenants done, {skipped} skipped" in failure(run)
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
        ALTER TABLE user_14.marketplace_job_stats ALTER action_type_id TYPE bigint,
              ALTER marketplace TYPE text, ALTER total_jobs TYPE bigint;
        ALTER TABLE user_14.marketplace_job_stats_days ALTER time_zone TYPE varchar(40);
        ALTER TABLE user_14.marketplace_jobs ALTER id TYPE bigint, ALTER action_type_id TYPE bigint""")
    for _ in range(2):  # The first rows, and the difference.
        run = materialize(environment={"STATS_WORKERS": "1"})
        assert metadata(run)[DAY]["run_tenants_done"] == 9, failure(run)
        assert run.success


def test_the_summary_does_without_a_tenant_whose_source_is_refused(connection: psycopg.Connection[Any]) -> None:
    """Nothing is stored of it, so its source says whether a day of it is missing."""
    for schema in ("user_1", "user_2"):
        application.insert(connection, schema, "marketplace_jobs", [job(id=1)])
    connection.execute("ALTER TABLE user_2.marketplace_jobs ALTER completed_at TYPE timestamp")
    assert "user_2: marketplace_jobs has timestamps without time zone" in failure(materialize())

    run = summarize(DAY)

    assert run.success, failure(run)
    found = connection.execute(
        "SELECT job_count, missing_tenants FROM marketplace_stats.marketplace_daily_summary_days WHERE date = %s", [DAY]
    )
    assert found.fetchall() == [(1, ["user_2"])]


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


@pytest.mark.parametrize("first", [True, False])
def test_a_row_that_cannot_be_right_is_nobody_elses_fault(connection: psycopg.Connection[Any], first: bool) -> None:
    """Instants that no day holds, ids that no integer holds: the other rows count, met at first or when they change."""
    connection.execute("""
        ALTER TABLE user_2.marketplace_jobs ALTER id TYPE bigint, ALTER action_type_id TYPE bigint,
              ALTER action_type_id DROP NOT NULL;
        ALTER TABLE user_2.marketplace_tasks ALTER id TYPE bigint, ALTER job_id TYPE bigint""")
    odd: list[dict[str, Any]] = [
        {"completed_at": "1970-01-01 00:00Z", "started_at": "1970-01-01 00:00Z"},
        {"completed_at": "0001-01-01 00:00Z BC"},
        {"completed_at": "4713-01-02 00:00Z BC", "started_at": "-infinity"},
        {"completed_at": "294276-12-31 00:00Z", "created_at": "294276-12-31 00:00Z"},
        {"completed_at": "2999-12-31 00:00Z", "created_at": "-infinity"},
        {"completed_at": "infinity"},
        {"completed_at": "-infinity"},
        {"created_at": "infinity"},
        {"created_at": "-infinity", "started_at": "infinity"},
        {"created_at": "0001-01-01 00:00Z BC", "started_at": "0001-01-01 00:00Z BC"},
        {"id": 2**62, "action_type_id": 2},
        {"id": -(2**62), "action_type_id": 2},
        {"action_type_id": 2**31},
        {"action_type_id": -(2**62)},
        {"action_type_id": None},
        {"action_type_id": None, "completed_at": None},
        {"error_message": "\x01\x7f\u202e\U0001f600" * 200, "status": "failed", "action_type_id": 3},
    ]
    rows = [job(id=100 + number, created_at=NOON - timedelta(minutes=1)) for number in range(len(odd))]
    if not first:
        application.insert(connection, "user_2", "marketplace_jobs", rows)
        run = materialize(schedule="weekly")
        assert metadata(run)[DAY]["jobs"] == len(odd), failure(run)
        connection.execute("DELETE FROM user_2.marketplace_jobs")
    rows = [given | row for given, row in zip(rows, odd, strict=True)]
    application.insert(connection, "user_2", "marketplace_jobs", [job(id=1), job(id=2, status="failed"), *rows])
    application.insert(connection, "user_2", "marketplace_tasks", [{"job_id": 2**62, "status": "success"}])

    run = materialize(schedule="weekly")

    assert run.success, failure(run)
    found = connection.execute("""
        SELECT action_type_id, total_jobs, total_tasks FROM user_2.marketplace_job_stats
         WHERE date = '2026-01-15' ORDER BY 1""").fetchall()
    # A row with another id or creation is another job: seven that were counted before are gone, and stay counted.
    assert found == [(-(2**31), 2, 0), (1, 5 if first else 12, 0), (2, 2, 1), (3, 1, 0), (2**31 - 1, 1, 0)]
    again = materialize(schedule="weekly")
    assert metadata(again)[DAY]["run_rows_updated"] == 0, failure(again)
