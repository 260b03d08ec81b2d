"""What stands between us and the database, and what it is: each works, or is refused in one sentence."""

import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psycopg
import pytest

from pipelines.covering_index.tenants import Action, carry_out
from pipelines.database import cannot_connect, create_engine
from pipelines.definitions import build_defs
from pipelines.settings import Settings, UsageError
from pipelines.stats import get_stats
from tests import application
from tests.conftest import run, run_url, url_of
from tests.integration.common import DAY, create_extension, failure, job, materialize, metadata
from tests.pooler import needs_pgbouncer, running_pooler
from tests.server import running_server, running_standby

TRANSACTION_MODE = "The settings of a session do not last: is there a pooler in transaction mode?"


def summarise() -> str:
    """The summary of the day; its failure, if it has failed."""
    run = (
        build_defs(Settings.from_env({}))
        .resolve_job_def("marketplace_daily_summary_job")
        .execute_in_process(partition_key=DAY, raise_on_error=False)
    )
    return "" if run.success else failure(run)


def refusals(writers_only: bool = False) -> list[str]:
    """What each of our programs says, run in turn: the run, the summary, the index tool, the reader."""
    said = [failure(materialize()), summarise()]
    readers: list[Callable[[], Any]] = [lambda: carry_out(Action.show, [], lambda _: None)]
    if not writers_only:
        readers.append(lambda: get_stats(days=9999))
    for work in readers:
        with pytest.raises(UsageError) as error:
            work()
        said.append(error.value.message)
    return said


# ---- poolers ----


def backend(where: str) -> Any:
    with psycopg.connect(where, autocommit=True) as connection:
        return connection.execute("SELECT pg_backend_pid() FROM pg_sleep(0.3)").fetchone()


@needs_pgbouncer
@pytest.mark.parametrize("mode", ["transaction", "statement"])
@pytest.mark.parametrize("settings", [{}, {"default_pool_size": 1}, {"server_round_robin": 1}])
def test_a_pooler_that_keeps_no_sessions_is_refused(
    database: str, monkeypatch: pytest.MonkeyPatch, mode: str, settings: dict[str, Any]
) -> None:
    """Also where nobody else uses it, so that it looks like a session; several backends are lent in turn."""
    with running_pooler(database, mode, **settings) as where:
        if "default_pool_size" not in settings:
            with ThreadPoolExecutor(3) as at_once:  # Which leaves as many backends to be lent.
                assert len(set(at_once.map(backend, [where] * 3))) == 3
        for name in ("DATABASE_URL", "MIGRATION_DATABASE_URL"):
            monkeypatch.setenv(name, url_of(where))
        said = refusals()
    assert len(said) == 4
    assert [sentence for sentence in said if not sentence.startswith(TRANSACTION_MODE)] == []


@needs_pgbouncer
@pytest.mark.usefixtures("source_rows")
def test_a_pooler_in_session_mode_serves(
    database: str, connection: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All programs; a lock is not waited for without end, and a policy hides no rows on a green run."""
    connection.execute("ALTER TABLE user_10.marketplace_jobs ENABLE ROW LEVEL SECURITY")
    with running_pooler(database, "session") as where:
        monkeypatch.setenv("DATABASE_URL", run_url(where))
        monkeypatch.setenv("MIGRATION_DATABASE_URL", url_of(where))
        with psycopg.connect(database) as other:
            other.execute("LOCK TABLE user_2.marketplace_job_stats IN SHARE MODE")
            outcome = materialize()
        assert metadata(outcome)[DAY]["run_tenants_done"] == 1
        assert "user_2: canceling statement due to lock timeout (SQLSTATE 55P03)" in failure(outcome)
        assert "user_10: query would be affected by row-level security policy" in failure(outcome)
        assert summarise() == ""
        assert get_stats(days=9999)["total_jobs"].sum() == 2
        assert carry_out(Action.build, [], lambda _: None).failed == {}


@needs_pgbouncer
def test_a_session_of_its_own_may_be_the_only_one(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pooler in session mode with one backend: the reader, which needs no more, has it."""
    with running_pooler(database, "session", default_pool_size=1) as where:
        monkeypatch.setenv("DATABASE_URL", run_url(where))
        assert len(get_stats(days=9999)) == 0


@needs_pgbouncer
def test_a_pool_that_is_too_small_is_named(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By who writes, which takes more than one connection."""
    remedy = "The pooler has no connection left, and one more is taken than STATS_WORKERS: raise the size of its pool"
    with running_pooler(database, "session", default_pool_size=1, query_wait_timeout=1) as where:
        for name in ("DATABASE_URL", "MIGRATION_DATABASE_URL"):
            monkeypatch.setenv(name, url_of(where))
        assert remedy in failure(materialize())
        environment = {"DATABASE_URL": url_of(where), "STATS_LOCK_TIMEOUT_MS": "100"}
        migration = run("alembic", "upgrade", "head", environment=environment, check=False)
    assert remedy in migration.stderr
    assert migration.returncode in (1, 3)


# ---- servers ----


def test_a_standby_is_refused_by_who_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    """In one sentence, also the migration; whoever only reads may read there."""
    with running_server() as primary, running_standby(primary) as standby:
        for name in ("DATABASE_URL", "MIGRATION_DATABASE_URL"):
            monkeypatch.setenv(name, url_of(f"{standby} dbname=postgres"))
        said = refusals(writers_only=True)
        environment = {"DATABASE_URL": url_of(f"{standby} dbname=postgres")}
        migration = run("alembic", "upgrade", "head", environment=environment, check=False)
        with pytest.raises(UsageError, match="marketplace_daily_summary is missing"):
            get_stats(days=9999)
    assert migration.returncode == 1
    sentence = re.compile(
        r"(Error: )?Database postgres on /tmp/\S+:5432 is on a standby, which takes no writes: connect to the primary "
        r"server\.\s?"
    )
    assert [one for one in (*said, migration.stderr) if not sentence.fullmatch(one)] == []


def test_a_role_that_may_only_read_is_refused(
    database: str, connection: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before each tenant fails by itself."""
    connection.execute(f"ALTER DATABASE {connection.info.dbname} SET default_transaction_read_only = on")
    for name in ("DATABASE_URL", "MIGRATION_DATABASE_URL"):
        monkeypatch.setenv(name, run_url(database))
    assert [one for one in refusals(writers_only=True) if "is read-only for this role: see to" not in one] == []
    assert len(get_stats(days=9999)) == 0


def test_a_cluster_of_citus_is_refused(
    database: str, connection: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is known by its extension; here by an empty one of that name."""
    create_extension(connection, "citus")
    for variable in ("DATABASE_URL", "MIGRATION_DATABASE_URL"):
        monkeypatch.setenv(variable, run_url(database))
    said = refusals(writers_only=True)
    assert [
        one for one in said if "belongs to a cluster of Citus, whose workers have logs of their own" not in one
    ] == []


def test_settings_of_a_role_change_no_number(connection: psycopg.Connection[Any], source_rows: None, url: str) -> None:
    """Every setting that a number rests on is set after connecting, whatever the role or the database has."""
    application.insert(
        connection,
        "user_2",
        "marketplace_jobs",
        [job(id=9, status="failed", error_message="No 12 at C:\\x 'a' (HTTP 404)")],
    )
    materialize()
    query = """SELECT failure_reason FROM user_2.marketplace_job_facts WHERE job_id = 9
               UNION ALL SELECT (s - 'id')::text FROM user_2.marketplace_job_stats_days d, to_jsonb(d) s"""
    before = connection.execute(query).fetchall()
    name = connection.info.dbname
    for setting in (
        "standard_conforming_strings = off",
        "client_encoding = 'LATIN1'",
        "search_path = user_2, public",
        "DateStyle = 'German, DMY'",
        "IntervalStyle = 'sql_standard'",
        "TimeZone = 'Asia/Kathmandu'",
        "extra_float_digits = -15",
        "transform_null_equals = on",
        "default_transaction_isolation = 'read uncommitted'",
        "quote_all_identifiers = on",
        "row_security = on",
        "statement_timeout = '1ms'",
        "bytea_output = 'escape'",
    ):
        connection.execute(f"ALTER DATABASE {name} SET {setting}")
    again = materialize()
    assert again.success, failure(again)
    assert metadata(again)[DAY]["run_rows_updated"] == 0
    assert connection.execute(query).fetchall() == before


@pytest.mark.parametrize(
    ("sqlstate", "setting"),
    [
        ("57014", "statement_timeout"),
        ("25P03", "idle_in_transaction_session_timeout"),
        ("25P04", "transaction_timeout"),
        ("57P05", "idle_session_timeout"),
    ],
)
def test_a_time_out_that_ends_a_session_at_once_is_named(server: str, sqlstate: str, setting: str) -> None:
    """It is raised here: in time, it would be too short or just long enough by chance."""
    with psycopg.connect(f"{server} dbname=postgres") as connection, pytest.raises(psycopg.Error) as error:
        connection.execute(f"DO $$ BEGIN RAISE EXCEPTION 'so it is' USING ERRCODE = '{sqlstate}'; END $$")
    assert cannot_connect("host=here dbname=shop", error.value) == (
        f"Cannot connect to database shop on here:5432: so it is. {setting} of the role, the database or the server "
        f"leaves no time to set up a session: raise it, with ALTER ROLE ... SET {setting}."
    )


def test_dates_as_texts_are_those_of_iso(database: str, connection: psycopg.Connection[Any]) -> None:
    """Whatever the database is set to."""
    connection.execute(f"ALTER DATABASE {connection.info.dbname} SET DateStyle = 'German, DMY'")
    engine = create_engine(database, is_reader=True)
    with engine.connect() as other:
        assert other.exec_driver_sql("SELECT '2026-01-15'::date::text").scalar() == "2026-01-15"
    engine.dispose()


@pytest.mark.parametrize("encoding", ["SQL_ASCII", "LATIN1"])
def test_a_database_of_another_encoding_is_refused(server: str, monkeypatch: pytest.MonkeyPatch, encoding: str) -> None:
    """One that knows no characters, and one that lacks some of our statements'; by whoever reads, too."""
    name = f"in_{encoding.lower()}"
    with psycopg.connect(f"{server} dbname=postgres", autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name} TEMPLATE template0 ENCODING '{encoding}' LOCALE 'C'")
    for variable in ("DATABASE_URL", "MIGRATION_DATABASE_URL"):
        monkeypatch.setenv(variable, url_of(f"{server} dbname={name}"))
    sentence = f"has the encoding {encoding}, in which names, codes and reasons would be read wrongly, or not at all"
    assert [one for one in refusals() if sentence not in one] == []
