"""The optional covering index: built, shown, dropped, recognised; and that a day is then read from it alone."""

import re
import threading
from collections.abc import Iterator
from typing import Any

import dagster as dg
import psycopg
import pytest
from psycopg import sql

from assets.marketplace_job_stats import facts
from pipelines.covering_index.index import INCLUDED, KEY, NAME
from pipelines.covering_index.tenants import Action, Report, carry_out
from pipelines.definitions import build_defs
from pipelines.partitions import Window, day_partitions
from pipelines.settings import Settings, UsageError
from tests import application
from tests.conftest import run, run_url, url_of, wait_until
from tests.integration.common import NOON, TENANTS, failure, materialize

SCHEMAS = ("template_tenant", *TENANTS)
OLDER_NAME = "ix_marketplace_jobs_completed_at_covering"


@pytest.fixture
def owner(database: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The owner's URL as that of the migration, the run's role as that of the run; no lock is waited for long."""
    monkeypatch.setenv("DATABASE_URL", run_url(database))
    monkeypatch.setenv("MIGRATION_DATABASE_URL", url_of(database))
    monkeypatch.setenv("STATS_LOCK_TIMEOUT_MS", "300")
    return url_of(database)


def do(action: Action, *tenants: str) -> tuple[Report, str]:
    """What a command reports, and all that it says."""
    said: list[str] = []
    return carry_out(action, tenants, said.append), "\n".join(said)


def indexes(connection: psycopg.Connection[Any]) -> dict[str, list[tuple[str, bool]]]:
    """The covering indexes of each schema, by all that they include: name, and whether they are valid."""
    rows = connection.execute("""
        SELECT n.nspname, array_agg(c.relname::text ORDER BY c.relname), array_agg(indisvalid ORDER BY c.relname)
          FROM pg_index JOIN pg_class c ON c.oid = indexrelid JOIN pg_namespace n ON n.oid = c.relnamespace
         WHERE pg_get_indexdef(indexrelid) LIKE '%INCLUDE%' GROUP BY n.nspname""")
    return {schema: list(zip(names, valid, strict=True)) for schema, names, valid in rows}


def build_older(connection: psycopg.Connection[Any], schema: str, name: str = OLDER_NAME) -> None:
    """The index as the release before this one has built it."""
    connection.execute(
        sql.SQL(
            "CREATE INDEX {} ON {}.marketplace_jobs (completed_at) INCLUDE (started_at, id, action_type_id, "
            "retry_count, status, marketplace) WHERE completed_at IS NOT NULL"
        ).format(sql.Identifier(name), sql.Identifier(schema))
    )


def invalidate(connection: psycopg.Connection[Any], schema: str, name: str) -> None:
    """Leaves this index as an interrupted build or drop leaves it."""
    connection.execute("UPDATE pg_index SET indisvalid = false WHERE indexrelid = %s::regclass", [f"{schema}.{name}"])


def fill(connection: psycopg.Connection[Any], schema: str, count: int = 20_000) -> None:
    """A job each ten minutes up to noon of the 15th, a few of them not finished, each with a task."""
    status = "user_1.jobstatus" if schema == "user_1" else "varchar"
    statements = f"""
        INSERT INTO {schema}.marketplace_jobs
               (id, marketplace, action_type_id, status, started_at, completed_at, input_data)
        SELECT n, (ARRAY['vinted', 'ebay', 'etsy'])[1 + n % 3], 1,
               (ARRAY['completed', 'failed', 'running'])[1 + n % 20 / 9]::{status}, ended - interval '2 s',
               CASE WHEN n % 20 / 9 < 2 THEN ended END, '{{"title": "Blue jacket, worn twice"}}'
          FROM (SELECT n, timestamptz '{NOON}' - n * interval '10 min' FROM generate_series(0, {count - 1}) AS n)
               AS job (n, ended);
        INSERT INTO {schema}.marketplace_tasks (job_id, status) SELECT id, 'success' FROM {schema}.marketplace_jobs;
        VACUUM ANALYZE {schema}.marketplace_jobs, {schema}.marketplace_tasks"""
    for statement in statements.split(";"):
        connection.execute(statement.encode())


@pytest.fixture
def held(database: str, connection: psycopg.Connection[Any]) -> Iterator[psycopg.Connection[Any]]:
    """A transaction of the application that has written to a job of user_2, and stays open."""
    fill(connection, "user_2", 10)
    with psycopg.connect(database) as other:
        other.execute("UPDATE user_2.marketplace_jobs SET priority = 1 WHERE id = 1")
        yield other


def test_it_covers_all_that_is_read_of_a_job() -> None:
    """So that a day needs no row of the table. Of free text it holds none."""
    read = set(re.findall(r"\bjob\.(\w+)", facts.compare("lookup", reasons=True).text("x")))
    assert read == {KEY, *INCLUDED}


def test_build_show_drop(owner: str, connection: psycopg.Connection[Any]) -> None:
    """In the template and in every tenant; a second build finds nothing to do, and a drop leaves nothing."""
    before, said = do(Action.show)
    assert before.numbers()["without"] == 4
    assert "4 schemas: 0 have the index, 4 do not, 0 have no marketplace_jobs" in said
    built, said = do(Action.build)
    assert (built.changed, built.failed) == (4, {})
    assert "4 schemas changed, 0 failed" in said
    assert indexes(connection) == {schema: [(NAME, True)] for schema in SCHEMAS}
    assert do(Action.build)[0].changed == 0
    assert do(Action.show)[0].numbers() | {"size_bytes": 0} == dict.fromkeys(before.numbers(), 0) | {
        "with_the_index": 4
    }
    assert do(Action.drop, "user_2", "user_10")[0].changed == 2
    assert set(indexes(connection)) == {"template_tenant", "user_1"}
    assert do(Action.drop)[0].changed == 2
    assert indexes(connection) == {}


def test_the_estimate_is_near_what_comes_out(owner: str, connection: psycopg.Connection[Any]) -> None:
    """Within a factor of 1.5, for an enum and a text as status; a table that nobody has analyzed is told apart."""
    connection.execute(
        "INSERT INTO user_10.marketplace_jobs (marketplace, action_type_id, status) VALUES ('x', 1, 'y')"
    )
    for schema in ("user_1", "user_2"):
        fill(connection, schema)
    report, said = do(Action.build)
    after, _ = do(Action.show)
    assert report.numbers()["never_analyzed"] == 1
    assert "But 1 tables were never analyzed, and are not in that: ANALYZE them" in said
    for schema in ("template_tenant", "user_1", "user_2"):
        estimate, size = report.found[schema].estimate_bytes, after.found[schema].size_bytes
        assert estimate is not None
        assert size / 1.5 <= estimate <= size * 1.5


def test_clones_have_it_and_it_is_recognised(owner: str, connection: psycopg.Connection[Any]) -> None:
    """A clone's index has a name of PostgreSQL's choice: it is not built again, and it is dropped with the others.
    An index of somebody's own on the same column is none of ours."""
    do(Action.build)
    application.clone_tenant(connection, "user_11", ["marketplace_jobs"])
    connection.execute("CREATE INDEX own ON user_11.marketplace_jobs (completed_at) INCLUDE (id)")
    [(name, _), (own, _)] = indexes(connection)["user_11"]
    assert (own, name != NAME) == ("own", True)
    assert do(Action.build)[0].changed == 0
    assert do(Action.drop)[0].changed == 5
    assert indexes(connection) == {"user_11": [("own", True)]}


@pytest.mark.parametrize("schema", ["user_1", "user_2"])
def test_a_day_is_read_from_the_index_alone(owner: str, connection: psycopg.Connection[Any], schema: str) -> None:
    """In the statement of a run, for statuses of an enum type and of text; not one row of the table is fetched but
    those of failed jobs, for their messages. And the numbers stay what they were without it."""
    fill(connection, schema)
    window = Window.of(day_partitions(Settings.from_env({})), ["2026-01-14"])
    before = materialize("2026-01-13", "2026-01-14", tenants=[schema])
    numbers = connection.execute(f"SELECT * FROM {schema}.marketplace_job_stats ORDER BY 1".encode()).fetchall()
    assert before.success and numbers
    do(Action.build, schema)
    query = f"EXPLAIN (ANALYZE) {facts.compare('lookup', reasons=True).text(schema)}"
    parameters = window.parameters | {"allow_shrink": False, "is_new": False}
    plan = "\n".join(line for (line,) in connection.execute(query.encode(), parameters))
    assert f"Index Only Scan using {NAME}" in plan, plan
    scan = plan.partition(f"Index Only Scan using {NAME}")[2]
    assert scan.partition("Heap Fetches: ")[2].split()[0] == "0", plan
    assert "Seq Scan on marketplace_jobs job" not in plan, plan
    assert materialize("2026-01-13", "2026-01-14", tenants=[schema]).success
    assert connection.execute(f"SELECT * FROM {schema}.marketplace_job_stats ORDER BY 1".encode()).fetchall() == numbers


def test_the_older_shape_is_named_and_replaced(owner: str, connection: psycopg.Connection[Any]) -> None:
    """Under whatever name: a clone's is of PostgreSQL's choice, and an owner may have chosen a strange one."""
    build_older(connection, "template_tenant")
    build_older(connection, "user_1")
    build_older(connection, "user_2", 'an "odd" %s name')
    application.clone_tenant(connection, "user_11", ["marketplace_jobs"])
    before, said = do(Action.show)
    assert (before.numbers()["of_older_shape"], before.numbers()["without"]) == (4, 5)
    assert "5 schemas: 0 have the index, 5 do not" in said
    assert (
        "4 have one of an older shape: lacks created_at (template_tenant.ix_marketplace_jobs_completed_at_covering, "
        'user_1.ix_marketplace_jobs_completed_at_covering, user_2.an "odd" %s name, and 1 more); a build replaces it'
    ) in said
    report, _ = do(Action.build)
    assert (report.changed, report.failed) == (5, {})
    assert indexes(connection) == {schema: [(NAME, True)] for schema in (*SCHEMAS, "user_11")}
    after, said = do(Action.show)
    assert after.numbers()["of_older_shape"] == 0
    assert "older shape" not in said


def test_the_older_shape_stays_until_the_new_one_is_built(
    owner: str, connection: psycopg.Connection[Any], held: psycopg.Connection[Any]
) -> None:
    """A build that fails leaves the older index as it was, so that the next run has one."""
    build_older(connection, "user_1")
    connection.execute("ALTER TABLE user_1.marketplace_jobs RENAME created_at TO born_at")
    held.rollback()
    build_older(connection, "user_2")
    held.execute("UPDATE user_2.marketplace_jobs SET priority = 2 WHERE id = 1")
    assert do(Action.build, "user_1", "user_2")[0].failed.keys() == {"user_1", "user_2"}
    found = indexes(connection)
    assert found["user_1"] == [(OLDER_NAME, True)]
    assert (OLDER_NAME, True) in found["user_2"]
    held.rollback()
    assert do(Action.build, "user_2")[0].changed == 1
    assert indexes(connection)["user_2"] == [(NAME, True)]


@pytest.mark.parametrize("invalid", ["none", "new", "older"])
@pytest.mark.parametrize("action", [Action.build, Action.drop])
def test_an_interrupted_replacement_goes_on(
    owner: str, connection: psycopg.Connection[Any], action: Action, invalid: str
) -> None:
    """From wherever it was interrupted: while building the new one, between the two, while dropping the older one."""
    do(Action.build, "user_1", "user_2")
    for schema in ("user_1", "user_2"):
        build_older(connection, schema)
        if invalid != "none":
            invalidate(connection, schema, {"new": NAME, "older": OLDER_NAME}[invalid])
    said = do(Action.show)[1]
    assert ("2 have what an interrupted build or drop has left" in said) == (invalid != "none")
    assert ("2 have one of an older shape" in said) == (invalid != "older")
    report, _ = do(action, "user_1", "user_2")
    assert (report.changed, report.failed) == (2, {})
    expected = {"user_1": [(NAME, True)], "user_2": [(NAME, True)]} if action == Action.build else {}
    assert indexes(connection) == expected


def test_nothing_of_an_owner_runs(owner: str, database: str, connection: psycopg.Connection[Any]) -> None:
    """Functions and operators in a tenant's schema that fit better than those of PostgreSQL are not found, though the
    database's search path has it before pg_catalog. Nor does a setting of how expressions are shown hide an index."""
    build_older(connection, "user_2")
    connection.execute("""
        CREATE FUNCTION user_1.trap(name, varchar) RETURNS boolean LANGUAGE plpgsql
            AS $$ BEGIN RAISE 'trapped by = of names'; END $$;
        CREATE FUNCTION user_1.trap(text, varchar) RETURNS boolean LANGUAGE plpgsql
            AS $$ BEGIN RAISE 'trapped by = of texts'; END $$;
        CREATE FUNCTION user_1.pg_relation_size(oid) RETURNS bigint LANGUAGE plpgsql
            AS $$ BEGIN RAISE 'trapped by a function'; END $$;
        CREATE FUNCTION user_1.set_config(text, text, boolean) RETURNS text LANGUAGE plpgsql
            AS $$ BEGIN RAISE 'trapped by a setting'; END $$;
        CREATE FUNCTION user_1.current_setting(text) RETURNS text LANGUAGE plpgsql
            AS $$ BEGIN RAISE 'trapped by reading a setting'; END $$;
        CREATE OPERATOR user_1.= (LEFTARG = name, RIGHTARG = varchar, FUNCTION = user_1.trap);
        CREATE OPERATOR user_1.= (LEFTARG = text, RIGHTARG = varchar, FUNCTION = user_1.trap)""")
    name = sql.Identifier(connection.info.dbname)
    connection.execute(sql.SQL("ALTER DATABASE {} SET search_path = user_1, pg_catalog").format(name))
    connection.execute(sql.SQL("ALTER DATABASE {} SET quote_all_identifiers = on").format(name))
    report, said = do(Action.build)
    assert (report.changed, report.failed) == (4, {}), said
    assert indexes(connection) == {schema: [(NAME, True)] for schema in SCHEMAS}
    assert do(Action.drop)[0].changed == 4
    assert indexes(connection) == {}


def test_a_locked_and_a_broken_tenant_stop_no_other(
    owner: str, connection: psycopg.Connection[Any], held: psycopg.Connection[Any]
) -> None:
    """Each is named with the reason and the remedy; the others are done, and a second build does the rest."""
    connection.execute(
        "ALTER TABLE user_1.marketplace_jobs DROP COLUMN retry_count; DROP TABLE user_10.marketplace_jobs"
    )
    held.execute("LOCK TABLE user_2.marketplace_jobs")
    application.clone_tenant(connection, "user_11", ["marketplace_jobs"])
    report, said = do(Action.build)
    assert "1 have no marketplace_jobs" in said
    assert set(report.failed) == {"user_1", "user_2"}
    assert 'user_1: failed: column "retry_count" does not exist (SQLSTATE 42703): correct what the message says' in said
    assert "user_2: failed: canceling statement due to lock timeout (SQLSTATE 55P03): another session" in said
    held.rollback()
    assert set(indexes(connection)) == {"template_tenant", "user_11"}
    assert do(Action.build)[0].failed.keys() == {"user_1"}
    assert indexes(connection)["user_2"] == [(NAME, True)]


def test_what_an_interrupted_build_left_is_replaced(
    owner: str, connection: psycopg.Connection[Any], held: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A build that waits for an open transaction is killed: its index is not valid. The next one replaces it."""
    monkeypatch.setenv("STATS_LOCK_TIMEOUT_MS", "60000")
    ended: list[BaseException] = []

    def interrupted() -> None:
        try:
            do(Action.build, "user_2")
        except UsageError as error:
            ended.append(error)

    thread = threading.Thread(target=interrupted)
    thread.start()
    waiting = "FROM pg_stat_activity WHERE wait_event = 'virtualxid' AND query LIKE 'CREATE INDEX CONCURRENTLY%'"
    wait_until(connection, f"SELECT 1 {waiting}")
    # A second command keeps out while the first one is at work.
    with pytest.raises(UsageError, match="Another build or drop goes on in database test_"):
        do(Action.build)
    connection.execute(f"SELECT pg_terminate_backend(pid) {waiting}".encode())
    thread.join()
    assert "was lost at user_2, number 1 of 1" in str(ended[0])
    assert "Give the same command again" in str(ended[0])
    assert indexes(connection) == {"user_2": [(NAME, False)]}
    held.rollback()
    assert "1 have what an interrupted build or drop has left" in do(Action.show)[1]
    assert do(Action.build, "user_2")[0].changed == 1
    assert indexes(connection) == {"user_2": [(NAME, True)]}


def test_what_ran_into_the_time_out_is_cleared_away(
    owner: str, connection: psycopg.Connection[Any], held: psycopg.Connection[Any]
) -> None:
    """A build that fails by itself is not left behind, or if it cannot be dropped either, goes with the next one."""
    report, _ = do(Action.build, "user_2")
    assert "SQLSTATE 55P03" in report.failed["user_2"]
    held.rollback()
    assert do(Action.drop, "user_2")[0].failed == {}
    assert indexes(connection) == {}


def test_something_else_of_that_name_is_refused(owner: str, connection: psycopg.Connection[Any]) -> None:
    """It is neither taken for the index nor touched."""
    connection.execute(f"CREATE INDEX {NAME} ON user_2.marketplace_jobs (completed_at)".encode())
    report, _ = do(Action.build, "user_2")
    assert "rename or drop that, then build again" in report.failed["user_2"]
    assert do(Action.drop)[0].changed == 0


def test_the_migration_does_not_see_it(owner: str) -> None:
    """It is no drift, and nothing to migrate."""
    do(Action.build)
    environment = {"DATABASE_URL": owner}
    assert "4 schemas" in run("alembic", "upgrade", "head", environment=environment).stdout
    drift = run("python", "-m", "migrations.drift", environment=environment).stdout
    assert drift.splitlines()[-1].endswith("compared with the models, 0 differences")


def test_the_command_line(owner: str, database: str, connection: psycopg.Connection[Any]) -> None:
    """It says what it would build, is refused where nobody can answer, and ends with the status of a migration."""

    def command(*arguments: str, url: str = owner, check: bool = True) -> tuple[int, str]:
        ended = run("python", "-m", "pipelines.covering_index", *arguments, environment={"MIGRATION_DATABASE_URL": url,
                    "STATS_LOCK_TIMEOUT_MS": "300"}, check=check)  # fmt: skip
        return ended.returncode, ended.stdout + ended.stderr

    status, said = command("build", check=False)
    assert status == 1
    assert "Where it is missing, it would take about 0.0 MB" in said
    assert said.splitlines()[-1] == "Error: A build asks before it begins, and nobody is here to answer: add --yes."
    assert indexes(connection) == {}
    connection.execute("ALTER TABLE user_2.marketplace_jobs DROP COLUMN retry_count")
    assert command("build", "--yes", check=False)[0] == 3
    assert command("build", "--yes", "--tenant", "user_2", check=False)[0] == 1
    # The role of a run does not own the tables.
    status, said = command("drop", url=run_url(database), check=False)
    assert status == 1 or "user_1: failed: must be owner" in said
    assert "SQLSTATE 42501): work as the owner of the tables: set MIGRATION_DATABASE_URL" in said
    assert command("show", "--tenant", "user_1", url=run_url(database))[0] == 0
    assert command("show", "--tenant", "user_99", check=False)[1].startswith("Show: the covering index in database")
    assert command("drop", "--tenant", "user_1", "--tenant", "user_10", "--tenant", "template_tenant")[0] == 0
    assert indexes(connection) == {}


def test_the_job(owner: str, connection: psycopg.Connection[Any]) -> None:
    """The same from Dagit; a run that was told nothing only shows."""
    connection.execute("ALTER TABLE user_2.marketplace_jobs DROP COLUMN retry_count")
    job = build_defs(Settings.from_env()).resolve_job_def("covering_index_job")

    def start(**config: Any) -> dg.ExecuteInProcessResult:
        return job.execute_in_process(run_config={"ops": {"covering_index": {"config": config}}}, raise_on_error=False)

    assert start().success
    assert indexes(connection) == {}
    assert start(action="build", tenants=["user_1"]).success
    assert set(indexes(connection)) == {"user_1"}
    result = start(action="build")
    assert not result.success
    assert failure(result).startswith('Build failed in 1 of 4 schemas. user_2: column "retry_count" does not exist')
    assert set(indexes(connection)) == {"template_tenant", "user_1", "user_10"}
    assert "There is no tenant user_99 in database" in failure(start(action="drop", tenants=["user_99"]))
