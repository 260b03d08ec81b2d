"""Promise 27: a tenant's owner who puts code of theirs in our way. None of it runs as the run, or as the migrator."""

from typing import Any

import psycopg
import pytest

from pipelines.covering_index.tenants import Action, carry_out
from pipelines.definitions import build_defs
from pipelines.settings import Settings
from pipelines.stats import get_stats
from tests.conftest import RUN_ROLE, run_url, url_of
from tests.integration.common import DAY, TENANTS, create_extension, failure, materialize, metadata

# Each of these fits the arguments in our statements as well as PostgreSQL's own, or better.
HIJACKS = """
    CREATE TABLE user_2.calls (what text, who name DEFAULT session_user);
    GRANT INSERT ON user_2.calls TO PUBLIC;
    CREATE FUNCTION user_2.{name}({arguments}) RETURNS {result} LANGUAGE plpgsql AS
        $$ BEGIN INSERT INTO user_2.calls (what) VALUES ('{name}'); RETURN NULL; END $$"""
FUNCTIONS = (
    ("width_bucket", "timestamptz, timestamptz[]", "integer"),
    ("date_part", "text, interval", "float8"),
    ("to_regclass", "text", "regclass"),
    ("row_security_active", "oid", "boolean"),
    ("pg_try_advisory_lock", "bigint", "boolean"),
    ("pg_relation_size", "oid", "bigint"),
    ("current_setting", "varchar", "text"),
    ("set_config", "varchar, varchar, boolean", "text"),
    ("eq", "varchar, varchar", "boolean"),
    ("eq_text", "varchar, text", "boolean"),
    ("eq_name", "name, varchar", "boolean"),
    ("eq_date", "date, date", "boolean"),
)
OPERATORS = (
    ("eq", "varchar", "varchar"),
    ("eq_text", "varchar", "text"),
    ("eq_name", "name", "varchar"),
    ("eq_date", "date", "date"),
)


@pytest.fixture
def owner(database: str, connection: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch) -> str:
    """A role that owns user_2 and all that is in it, as whom `connection` works; it is on everybody's search path."""
    monkeypatch.setenv("DATABASE_URL", run_url(database))
    monkeypatch.setenv("MIGRATION_DATABASE_URL", url_of(database))
    name = connection.info.dbname
    role = f"owner_of_{name}"
    connection.execute(f"CREATE ROLE {role}; ALTER SCHEMA user_2 OWNER TO {role}")
    for table in ("jobs", "tasks", "job_stats", "job_facts", "job_stats_days", "job_stats_changes"):
        connection.execute(f"ALTER TABLE user_2.marketplace_{table} OWNER TO {role}")
    connection.execute(f"ALTER DATABASE {name} SET search_path = user_2, pg_catalog; SET ROLE {role}")
    connection.execute(f"GRANT USAGE ON SCHEMA user_2 TO {RUN_ROLE}")
    table, _, function = HIJACKS.partition("CREATE FUNCTION")
    connection.execute(table)
    for name, arguments, result in FUNCTIONS:
        connection.execute(f"CREATE FUNCTION {function}".format(name=name, arguments=arguments, result=result))
    for function, left, right in OPERATORS:
        connection.execute(
            f"CREATE OPERATOR user_2.= (FUNCTION = user_2.{function}, LEFTARG = {left}, RIGHTARG = {right})"
        )
    return role


def calls(connection: psycopg.Connection[Any]) -> list[Any]:
    return connection.execute("SELECT DISTINCT what, who FROM user_2.calls ORDER BY 1").fetchall()


def summarise() -> Any:
    return (
        build_defs(Settings.from_env({}))
        .resolve_job_def("marketplace_daily_summary_job")
        .execute_in_process(partition_key=DAY, raise_on_error=False)
    )


@pytest.mark.usefixtures("source_rows")
def test_nothing_of_an_owner_is_found_by_a_name(owner: str, connection: psycopg.Connection[Any]) -> None:
    """Neither by the run, nor by the summary, the readers and the index tool, whatever search path they are given."""
    run = materialize()
    assert run.success, failure(run)
    assert metadata(run)[DAY]["run_tenants_done"] == 3
    assert summarise().success
    assert (
        get_stats(days=9999)["total_jobs"].sum() == get_stats(days=9999, tenant="user_2")["total_jobs"].sum() * 3 == 6
    )
    report = carry_out(Action.build, [], lambda _: None)
    assert (report.changed, report.failed) == (4, {})
    assert calls(connection) == []


@pytest.mark.usefixtures("source_rows")
def test_triggers_of_an_owner_do_not_run(owner: str, connection: psycopg.Connection[Any]) -> None:
    """The tenant is refused, the others are computed; the summary reads what is stored, the index is built."""
    materialize()
    connection.execute("""
        CREATE FUNCTION user_2.note() RETURNS trigger LANGUAGE plpgsql AS
            $$ BEGIN INSERT INTO user_2.calls (what) VALUES ('trigger'); RETURN NEW; END $$""")
    for table in ("job_stats", "job_facts", "job_stats_days", "job_stats_changes", "jobs"):
        connection.execute(f"""
            CREATE TRIGGER note BEFORE INSERT OR UPDATE OR DELETE ON user_2.marketplace_{table}
                FOR EACH ROW EXECUTE FUNCTION user_2.note()""")
    connection.execute("RESET ROLE")
    for schema in TENANTS:
        connection.execute(f"DELETE FROM {schema}.marketplace_job_stats")
    connection.execute("TRUNCATE user_2.calls")
    run = materialize()
    assert "2 tenants done, 0 skipped, 1 failed" in failure(run)
    assert "user_2: marketplace_job_stats has a trigger of somebody else's" in failure(run)
    assert summarise().success
    assert carry_out(Action.build, [], lambda _: None).failed == {}
    assert calls(connection) == []


@pytest.mark.usefixtures("source_rows", "url")
def test_what_an_extension_brings_is_nobodys(connection: psycopg.Connection[Any]) -> None:
    """A default with a function of an extension is like one of PostgreSQL's own."""
    function = "CREATE FUNCTION public.{}() RETURNS integer LANGUAGE sql AS 'SELECT 7'"
    create_extension(connection, "lucky", function.format("seven"))
    connection.execute("ALTER TABLE user_2.marketplace_job_stats ADD note integer DEFAULT public.seven()")
    assert materialize().success
    connection.execute(function.format("eight"))
    connection.execute("ALTER TABLE user_2.marketplace_job_stats ALTER note SET DEFAULT public.eight()")
    assert "user_2: marketplace_job_stats has a default, a check or an index with a function" in failure(materialize())


@pytest.mark.usefixtures("source_rows", "url")
def test_the_summarys_table_is_looked_at_as_well(connection: psycopg.Connection[Any]) -> None:
    """What is in its way is said in one sentence, and nothing is written."""
    materialize()
    connection.execute("ALTER TABLE marketplace_stats.marketplace_daily_summary SET UNLOGGED")
    assert failure(summarise()) == (
        "marketplace_stats.marketplace_daily_summary is unlogged, so a crash empties it: "
        "ALTER TABLE marketplace_stats.marketplace_daily_summary SET LOGGED."
    )
    connection.execute("""
        ALTER TABLE marketplace_stats.marketplace_daily_summary SET LOGGED;
        CREATE RULE away AS ON INSERT TO marketplace_stats.marketplace_daily_summary DO INSTEAD NOTHING""")
    assert "marketplace_daily_summary has a rule of somebody else's" in failure(summarise())
    connection.execute("ALTER TABLE marketplace_stats.marketplace_daily_summary DISABLE RULE away")
    assert summarise().success


@pytest.mark.usefixtures("source_rows")
def test_a_superuser_over_owners_that_are_none_is_warned(
    owner: str, database: str, connection: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the run, the summary and the index tool; nobody else is."""
    said: list[str] = []
    carry_out(Action.show, [], said.append)
    sentence = "postgres is a superuser, and 1 schemas, user_2 for instance, belong to roles that are none"
    assert sentence in "\n".join(said)
    monkeypatch.setenv("MIGRATION_DATABASE_URL", run_url(database))
    said.clear()
    carry_out(Action.show, [], said.append)
    assert "superuser" not in "\n".join(said)
