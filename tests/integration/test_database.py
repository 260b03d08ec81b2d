"""The lookup of tenants, and the connections that a run works with; on a real server."""

import time
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa

from assets.reporting import explain
from migrations.target import HEAD, SHARED_HEAD
from pipelines.database import SERVER_REMEDIES, connected, conninfo, create_engine
from pipelines.resources import TenantDatabase
from pipelines.settings import UsageError
from pipelines.tenants import Tenant, find_tenants
from tests import application
from tests.conftest import RUN_ROLE, url_of

STATS, LEDGER = "user_2.marketplace_job_stats", "user_2.marketplace_job_stats_days"
UNIQUE = "uq_marketplace_job_stats_action_marketplace_date"


def tenants(engine: sa.Engine) -> dict[str, Tenant]:
    with engine.connect() as connection:
        return {tenant.schema: tenant for tenant in find_tenants(connection)}


def test_tenants_come_in_numeric_order(connection: psycopg.Connection[Any], engine: sa.Engine) -> None:
    """Not in the order of the letters, and without those that only look like tenants."""
    for number in (3, 100, 20, 99999999999999999999):
        application.clone_tenant(connection, f"user_{number}", ())
    assert list(tenants(engine)) == [f"user_{n}" for n in (1, 2, 3, 10, 20, 100, 99999999999999999999)]


@pytest.mark.parametrize(
    ("sql", "failed"),
    [
        (f"ALTER TABLE {STATS} DROP COLUMN computed_at", "lacks the columns computed_at"),
        (f"ALTER TABLE {LEDGER} DROP COLUMN run_id", "marketplace_job_stats_days lacks the columns run_id"),
        (f"ALTER TABLE {LEDGER} DROP CONSTRAINT marketplace_job_stats_days_pkey", "has no unique key on date"),
        (f"DROP TABLE {LEDGER}", "marketplace_job_stats_days is missing"),
        (
            f"ALTER TABLE {STATS} RENAME TO other; CREATE VIEW {STATS} AS SELECT * FROM user_2.other",
            "marketplace_job_stats is missing",
        ),
        (
            f"""ALTER TABLE {STATS} DROP CONSTRAINT {UNIQUE};
                CREATE UNIQUE INDEX ON {STATS} (action_type_id, marketplace, date) WHERE total_jobs > 0""",
            "has no unique key on action_type_id, marketplace, date",
        ),
        (
            f"""ALTER TABLE {STATS} DROP CONSTRAINT {UNIQUE};
                CREATE UNIQUE INDEX ON {STATS} (action_type_id, lower(marketplace), date)""",
            "has no unique key on",
        ),
        (
            f"""ALTER TABLE {STATS} DROP CONSTRAINT {UNIQUE};
                CREATE UNIQUE INDEX ON {STATS} (action_type_id, date) INCLUDE (marketplace)""",
            "has no unique key on",
        ),
    ],
)
def test_a_target_that_is_not_usable_is_failed_with_the_remedy(
    connection: psycopg.Connection[Any], engine: sa.Engine, sql: str, failed: str
) -> None:
    """Columns, kinds and keys are judged by what they are; the tenant beside it is fine."""
    connection.execute(sql.encode())
    found = tenants(engine)
    assert failed in (found["user_2"].failed or "")
    assert (found["user_2"].failed or "").endswith(": run `alembic -x tenant=user_2 upgrade head`")
    assert found["user_10"] == Tenant("user_10")


def test_a_source_may_be_a_view(connection: psycopg.Connection[Any], engine: sa.Engine) -> None:
    """Some applications left a view under the new name of their jobs."""
    connection.execute("""
        ALTER TABLE user_2.marketplace_jobs RENAME TO vinted_jobs;
        CREATE VIEW user_2.marketplace_jobs AS SELECT * FROM user_2.vinted_jobs""")
    assert tenants(engine)["user_2"] == Tenant("user_2")


def test_a_run_has_its_time_outs_and_the_urls_own_options(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the environment and the URL say is what the server applies, on every connection of a run."""
    url = f"{url_of(database)}&options=-c%20work_mem%3D7MB&application_name=mine"
    monkeypatch.setenv("DATABASE_URL", url)
    expected = {
        "lock_timeout": "1s",
        "statement_timeout": "2s",
        "work_mem": "7MB",
        "application_name": "mine",
        "transaction_isolation": "repeatable read",
        "synchronous_commit": "off",
    }
    resource = TenantDatabase(workers=2, lock_timeout_ms=1000, statement_timeout_ms=2000)
    with resource.connect() as (engine, _), engine.connect() as connection:
        found = {name: connection.scalar(sa.text(f"SHOW {name}")) for name in expected}
    assert found == expected


def test_few_connections_are_enough(
    connection: psycopg.Connection[Any], database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the server has fewer connections than there are workers, those that there are do all the work."""
    role = f"few_{connection.info.dbname}"
    connection.execute(f"CREATE ROLE {role} LOGIN CONNECTION LIMIT 2".encode())
    monkeypatch.setenv("DATABASE_URL", url_of(database.replace("user=postgres", f"user={role}")))
    resource = TenantDatabase(workers=8, lock_timeout_ms=1000, statement_timeout_ms=2000)
    many = [Tenant(f"user_{number}") for number in range(50)]
    with resource.connect() as (engine, first):
        first.close()
        found = dict(resource.for_each(engine, many, lambda c, tenant: c.scalar(sa.text("SELECT 1"))))
    assert list(found.values()) == [1] * 50


def test_an_interrupted_run_cancels_what_is_under_way(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever stops a run does not wait for its statements."""
    monkeypatch.setenv("DATABASE_URL", url_of(database))
    resource = TenantDatabase(workers=2, lock_timeout_ms=1000, statement_timeout_ms=60_000)
    with resource.connect() as (engine, connection):

        def work(connection: sa.Connection, tenant: Tenant) -> None:
            connection.execute(
                sa.text("SELECT pg_sleep(:seconds)"), {"seconds": 0 if tenant.schema == "user_1" else 50}
            )

        results = resource.for_each(engine, [Tenant("user_1"), Tenant("user_2"), Tenant("user_3")], work)
        next(results)
        results.close()
        sleeping = sa.text("SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'PgSleep' AND state = 'active'")
        assert connection.scalar(sleeping) == 0


def test_no_first_connection_is_one_sentence(monkeypatch: pytest.MonkeyPatch, server: str) -> None:
    """Also what libpq refuses before it connects."""
    conninfo = f"{server} dbname=postgres connect_timeout=abc"
    told = "Cannot connect to database postgres on /tmp/"
    with pytest.raises(UsageError, match=told), connected(create_engine(conninfo), conninfo):
        pass


def test_the_runs_role_has_what_it_needs_and_nothing_else(connection: psycopg.Connection[Any]) -> None:
    """Least privilege: it reads the sources and writes our tables, in each tenant, clones included."""
    rows = connection.execute(
        """
        SELECT table_schema, table_name, array_agg(privilege_type::text ORDER BY privilege_type)
          FROM information_schema.role_table_grants WHERE grantee = %s GROUP BY 1, 2""",
        [RUN_ROLE],
    ).fetchall()
    read, write = ["SELECT"], ["DELETE", "INSERT", "SELECT", "UPDATE"]
    tables = {
        "marketplace_jobs": read,
        "marketplace_tasks": read,
    } | dict.fromkeys(HEAD, write)
    expected = {(schema, table): right for schema in ("user_1", "user_2", "user_10") for table, right in tables.items()}
    expected |= {("marketplace_stats", table): write for table in SHARED_HEAD}
    expected["public", "marketplace_action_types"] = read
    found = {(schema, table): rights for schema, table, rights in rows if schema != "template_tenant"}
    assert found == expected
    role = connection.execute(
        "SELECT rolsuper, rolcreatedb, rolcreaterole, rolbypassrls FROM pg_roles WHERE rolname = %s", [RUN_ROLE]
    )
    assert role.fetchall() == [(False, False, False, False)]


@pytest.mark.parametrize(
    ("url", "secret"),
    [
        ("postgresql://hunter2", "hunter2"),
        ("postgresql://user@hunter2/shop", "hunter2"),
        ("postgresql://user:pass@hunter.2:5432/shop", "hunter"),
        ("postgresql://user:hun@ter2@/shop", "ter2"),
        ("postgresql://user:hun/ter2@localhost/shop", "ter2"),
        ("postgresql://user:hun#ter2@localhost:1/shop", "ter2"),
        ("postgresql:///shop?host=hunter2", "hunter2"),
    ],
)
def test_a_word_that_may_be_a_secret_is_not_shown(monkeypatch: pytest.MonkeyPatch, url: str, secret: str) -> None:
    """A password that is taken apart may stand in the host's place; whatever is not known as a host is not repeated."""
    monkeypatch.setenv("DATABASE_URL", url)

    def connect() -> None:
        where = conninfo()
        with connected(create_engine(where), where):
            pass

    with pytest.raises(UsageError) as error:
        connect()
    assert secret not in error.value.message
    assert "percent-encoded" in error.value.message or "Connection refused" in error.value.message


def test_why_there_is_no_connection_has_a_remedy(
    connection: psycopg.Connection[Any], database: str, server: str
) -> None:
    """libpq tells no SQLSTATE, so its words have to do."""
    none = f"none_{connection.info.dbname}"
    connection.execute(f"CREATE ROLE {none} LOGIN CONNECTION LIMIT 0".encode())
    for where, said in (
        (
            f"{database} user=nobody",
            'role "nobody" does not exist. Check the user in DATABASE_URL, or create the role.',
        ),
        (
            f"{server} dbname=nothing",
            'database "nothing" does not exist. Check the name of the database in DATABASE_URL.',
        ),
        (f"{database} user={none}", f'too many connections for role "{none}". Lower STATS_WORKERS, or raise'),
        (f"{database} host=/tmp/nowhere", "Check DATABASE_URL, and that the server is up."),
    ):
        with pytest.raises(UsageError) as error, connected(create_engine(where), where):
            pass
        assert said in error.value.message


@pytest.mark.parametrize(
    ("statements", "said"),
    [
        (
            ["SELECT nothing FROM pg_class"],
            'column "nothing" does not exist (SQLSTATE 42703): if it is a column of the',
        ),
        (
            ["CREATE VIEW user_2.mine AS SELECT id FROM user_2.marketplace_jobs", "DROP TABLE user_2.marketplace_jobs"],
            "(view user_2.mine depends on table user_2.marketplace_jobs) (SQLSTATE 2BP01)",
        ),
        (["SET TRANSACTION READ ONLY", "CREATE TABLE user_2.new ()"], "(SQLSTATE 25006): the server, the database or"),
        (
            ["SET LOCAL idle_in_transaction_session_timeout = 50", "pause", "SELECT 1"],
            "(SQLSTATE 25P03): idle_in_transaction_session_timeout of the server or the role has ended it",
        ),
        (
            ["SET LOCAL transaction_timeout = 50", "SELECT pg_sleep(9)"],
            "(SQLSTATE 25P04): transaction_timeout of the server or the role has ended it",
        ),
        (["SELECT convert_from('\\xe9', 'UTF8')"], "(SQLSTATE 22021): a text is not in the encoding"),
        (["SELECT convert('\\xe2809c', 'UTF8', 'LATIN1')"], "(SQLSTATE 22P05): a text does not exist in the encoding"),
        (["SET ROLE stats", "SELECT FROM user_2.vinted_job_stats"], "(SQLSTATE 42501): migrate it with"),
        (
            ["INSERT INTO user_2.marketplace_job_stats (action_type_id, date, marketplace) VALUES (7, now(), 'x')"],
            'violates check constraint "ck_marketplace_job_stats_marketplace" (SQLSTATE 23514)',
        ),
    ],
)
def test_errors_keep_their_detail_and_have_a_remedy(
    connection: psycopg.Connection[Any], database: str, statements: list[str], said: str
) -> None:
    """On one line: what the server says, its detail but no row of a customer's, the SQLSTATE, and what to do."""
    if statements[0].startswith("SET LOCAL transaction_timeout") and connection.info.server_version < 170_000:
        pytest.skip("transaction_timeout is of PostgreSQL 17.")
    engine = create_engine(url_of(database))

    def execute() -> None:
        with engine.connect() as other:
            for statement in statements:
                if statement == "pause":
                    time.sleep(0.3)
                else:
                    other.exec_driver_sql(statement)

    with pytest.raises(sa.exc.DBAPIError) as error:
        execute()
    engine.dispose()
    text = explain(error.value)
    assert said in text
    assert "Failing row" not in text


@pytest.mark.parametrize("sqlstate", SERVER_REMEDIES)
def test_every_remedy_is_found(engine: sa.Engine, sqlstate: str) -> None:
    """For what a test had better not bring about: a full disk, a server that stops."""
    raised = f"DO $$ BEGIN RAISE EXCEPTION 'so it is' USING ERRCODE = '{sqlstate}', DETAIL = 'why.'; END $$"
    with engine.connect() as connection, pytest.raises(sa.exc.DBAPIError) as error:
        connection.exec_driver_sql(raised)
    assert explain(error.value) == f"so it is (why) (SQLSTATE {sqlstate}): {SERVER_REMEDIES[sqlstate]}"
