"""What operators meet: locks, signals, poolers, roles, drift, sequences, and what is in the way."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psycopg
import pytest

from migrations.shape import LEDGER, NEW, OLD, VERSION
from tests import application
from tests.conftest import ROOT, RUN_ROLE, create_database, run, url_of, wait_until
from tests.migrations.common import SCHEMAS, alembic, differences, drift_of, shapes
from tests.migrations.test_faults import process
from tests.migrations.test_states import NEW_TABLE, S
from tests.pooler import needs_pgbouncer, running_pooler
from tests.server import binaries

# ---- locks and signals ----


def test_a_reader_of_everything_costs_a_bounded_time(
    old_database: str, old_connection: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Promise 5: as a dump does it. Each tenant is tried shortly, none is waited for by another, others are done."""
    for number in range(100, 140):
        application.clone_tenant(old_connection, f"user_{number}")
    monkeypatch.setenv("STATS_LOCK_TIMEOUT_MS", "1000")
    with psycopg.connect(old_database) as dump:
        dump.execute("; ".join(f"LOCK TABLE user_{number}.{OLD} IN ACCESS SHARE MODE" for number in range(100, 140)))
        start = time.monotonic()
        output = alembic(old_database, "upgrade", "head", status=3)
        assert "44 schemas: 4 done, 0 already there, 0 skipped, 40 failed" in output
        assert time.monotonic() - start < 20
    assert "44 schemas: 40 done, 4 already there" in alembic(old_database, "upgrade", "head")


def test_a_tenant_that_is_locked_for_a_while_comes_at_the_end(
    old_database: str, old_connection: psycopg.Connection[Any]
) -> None:
    """It is done by the same command once the lock is gone."""
    with psycopg.connect(old_database) as other:
        other.execute(f"LOCK TABLE user_1.{OLD} IN ACCESS SHARE MODE")
        with process(old_database, "upgrade", "head") as running:
            wait_until(old_connection, f"SELECT WHERE to_regclass('user_10.{NEW}') IS NOT NULL")
            time.sleep(1)
            assert running.poll() is None
            other.rollback()
            output = running.communicate(timeout=30)[0]
    assert (running.returncode, "4 schemas: 4 done" in output) == (0, True), output


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_with_the_summary(
    old_database: str, old_connection: psycopg.Connection[Any], tmp_path: Path, number: signal.Signals
) -> None:
    """Promise 1: what was done is shown and reported, what was not is as before; no session, no traceback; status 3."""
    report = tmp_path / "report.json"
    name = psycopg.conninfo.conninfo_to_dict(old_database)["dbname"]
    with psycopg.connect(old_database) as other:
        other.execute(f"LOCK TABLE user_10.{OLD} IN ACCESS SHARE MODE")
        with process(old_database, "-x", f"report={report}", "upgrade", "head") as running:
            for tenant in ("user_1", "user_2"):
                wait_until(old_connection, f"SELECT WHERE to_regclass('{tenant}.{NEW}') IS NOT NULL")
            running.send_signal(number)
            output = running.communicate(timeout=20)[0]
        other.rollback()
    assert running.returncode == 3
    assert "Interrupted, by a signal: 1 schemas were not reached. Repeat it to resume." in output
    assert "Traceback" not in output
    assert "3 schemas: 3 done" in output
    assert '"user_1"' in report.read_text()
    others = f"SELECT FROM pg_stat_activity WHERE datname = '{name}' AND pid <> pg_backend_pid()"
    wait_until(old_connection, f"SELECT WHERE NOT EXISTS ({others})")
    assert "4 schemas: 1 done, 3 already there" in alembic(old_database, "upgrade", "head")


@needs_pgbouncer
def test_time_outs_hold_behind_a_pooler(old_database: str, old_connection: psycopg.Connection[Any]) -> None:
    """Promise 5: in session mode, where it drops what is given at the start; a lock is not waited for without end."""
    with running_pooler(old_database, "session") as where, psycopg.connect(old_database) as other:
        other.execute(f"LOCK TABLE {S}.{OLD} IN ACCESS SHARE MODE")
        environment = {"DATABASE_URL": url_of(where), "STATS_LOCK_TIMEOUT_MS": "200"}
        result = run("alembic", "upgrade", "head", environment=environment, check=False)
    assert f"{S}: failed" in result.stderr, result.stdout + result.stderr
    assert "(SQLSTATE 55P03); another session keeps a lock" in result.stderr
    assert "4 schemas: 3 done, 0 already there, 0 skipped, 1 failed" in result.stdout


@needs_pgbouncer
def test_a_pooler_in_transaction_mode_is_refused(old_database: str) -> None:
    """In one sentence, and nothing is done."""
    with running_pooler(old_database, "transaction") as where:
        result = run("alembic", "upgrade", "head", environment={"DATABASE_URL": url_of(where)}, check=False)
    assert result.returncode == 1
    assert result.stderr.startswith("Error: The settings of a session do not last: is there a pooler in transaction")
    assert result.stdout == ""


# ---- roles ----


def test_the_owner_goes_on_where_an_administrator_began(
    old_database: str, old_connection: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a superuser makes belongs to whom the tables belong to; where a release before this left it, it is given."""
    owner = f"app_{psycopg.conninfo.conninfo_to_dict(old_database)['dbname']}"
    old_connection.execute(
        f"CREATE ROLE {owner} LOGIN; GRANT CREATE ON DATABASE {owner.removeprefix('app_')} TO {owner}"
    )
    for schema in SCHEMAS:
        old_connection.execute(f"ALTER SCHEMA {schema} OWNER TO {owner}; ALTER TABLE {schema}.{OLD} OWNER TO {owner}")
    old_connection.execute(f"DROP TABLE user_10.{OLD}")
    by_owner = url_of(old_database).replace("postgres@", f"{owner}@")

    def as_owner(*arguments: str, status: int = 0) -> str:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("MIGRATION_DATABASE_URL", by_owner)
            return alembic(old_database, *arguments, status=status)

    alembic(old_database, "upgrade", "head")
    assert "4 schemas: 0 done, 4 already there" in as_owner("upgrade", "head")
    as_owner("downgrade", "base")
    as_owner("upgrade", "head")
    for table in (f"{S}.{VERSION}", f"{S}.{LEDGER}"):
        old_connection.execute(f"ALTER TABLE {table} OWNER TO postgres")
    output = as_owner("upgrade", "head", status=3)
    assert f"{VERSION} belongs to postgres, and not to {owner}; run the migration once as that role" in output
    assert "4 schemas: 1 done, 3 already there" in alembic(old_database, "upgrade", "head")
    assert "4 schemas: 0 done, 4 already there" in as_owner("upgrade", "head")


def test_what_a_role_may_not_use_is_named(old_database: str, old_connection: psycopg.Connection[Any]) -> None:
    """A tablespace that its settings name; a schema of somebody else's, around tables of its own."""
    database = psycopg.conninfo.conninfo_to_dict(old_database)["dbname"]
    role = f"mover_{database}"
    old_connection.execute(f"CREATE ROLE {role} LOGIN; GRANT CREATE ON DATABASE {database} TO {role}")
    for schema in SCHEMAS:
        old_connection.execute(f"ALTER TABLE {schema}.{OLD} OWNER TO {role}; GRANT ALL ON SCHEMA {schema} TO {role}")
    old_connection.execute(f"""
        REVOKE ALL ON SCHEMA {S} FROM {role};
        ALTER ROLE {role} IN DATABASE {database} SET default_tablespace = 'pg_global'""")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MIGRATION_DATABASE_URL", url_of(old_database).replace("postgres@", f"{role}@"))
        output = alembic(old_database, "upgrade", "head", status=None)
        assert "(SQLSTATE 42501); default_tablespace is one that this role must not use" in output
        old_connection.execute(f"ALTER ROLE {role} IN DATABASE {database} RESET default_tablespace")
        output = alembic(old_database, "upgrade", "head", status=None)
    assert f"{S}: failed, with {OLD}: permission denied for schema {S}; the schema belongs to postgres" in output
    assert f"(SQLSTATE 42501); GRANT ALL ON SCHEMA ... TO {role}" in output


def test_the_runs_role_is_known_wherever_it_comes_from(
    old_database: str, old_connection: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A user from PGUSER gets its grants like one in the URL."""
    given = psycopg.conninfo.conninfo_to_dict(old_database)
    environment = {
        "MIGRATION_DATABASE_URL": url_of(old_database),
        "DATABASE_URL": f"postgresql:///{given['dbname']}?host={given['host']}",
        "PGUSER": RUN_ROLE,
    }
    run("alembic", "upgrade", "head", environment=environment)
    query = f"SELECT has_table_privilege('{RUN_ROLE}', '{S}.{NEW}', 'INSERT')"
    assert old_connection.execute(query).fetchall() == [(True,)]


# ---- drift, sequences, and the rest ----


def test_a_dump_and_restore_is_no_drift(
    server: str, old_database: str, old_connection: psycopg.Connection[Any], tmp_path: Path
) -> None:
    """Promise 8: the catalog writes constraints in another way afterwards; nothing is to be done either."""
    alembic(old_database, "upgrade", "head")
    check = "ck_marketplace_job_stats_marketplace"
    for schema in SCHEMAS:  # As another release, or a person, may have written it.
        old_connection.execute(f"""
            ALTER TABLE {schema}.{NEW} DROP CONSTRAINT {check},
                  ADD CONSTRAINT {check} CHECK (marketplace IN ('vinted', 'ebay', 'etsy'))""")
    name = str(psycopg.conninfo.conninfo_to_dict(old_database)["dbname"])
    copy = create_database(server, f"{name}_restored")
    dump = tmp_path / "dump.sql"
    subprocess.run([binaries() / "pg_dump", "-f", dump, old_database], check=True)
    subprocess.run([binaries() / "psql", "-qX", "-v", "ON_ERROR_STOP=1", "-f", dump, copy], check=True, stdout=-3)
    before, after = (connection_definition(c) for c in (old_database, copy))
    assert before != after, "The catalog writes it as before: this test shows nothing."
    assert drift_of(copy) == []
    assert "4 schemas: 0 done, 4 already there" in alembic(copy, "upgrade", "head")


def connection_definition(conninfo: str) -> Any:
    with psycopg.connect(conninfo) as connection:
        return connection.execute(
            "SELECT pg_get_constraintdef(oid) FROM pg_constraint WHERE conname = 'ck_marketplace_job_stats_marketplace'"
        ).fetchone()


def test_a_lost_default_of_the_ids_is_drift_and_repaired(
    old_database: str, old_connection: psycopg.Connection[Any]
) -> None:
    """Without it no run could write a row."""
    alembic(old_database, "upgrade", "head")
    old_connection.execute(f"ALTER TABLE {S}.{NEW} ALTER id DROP DEFAULT")
    assert drift_of(old_database)[0] == f"{S}: {NEW}.id has the default None, not serial"
    alembic(old_database, "upgrade", "head")
    assert drift_of(old_database) == []
    old_connection.execute(f"INSERT INTO {S}.{NEW} (action_type_id, date) VALUES (8, '2025-01-01')")


@pytest.mark.parametrize("schema", ["user_1", S])
def test_a_sequence_behind_its_ids_catches_up(
    old_database: str, old_connection: psycopg.Connection[Any], schema: str
) -> None:
    """A tenant's own one, and the template's that many share; without it every insert would fail."""
    alembic(old_database, "upgrade", "head")
    assert "4 schemas: 0 done, 4 already there" in alembic(old_database, "upgrade", "head")
    old_connection.execute(f"INSERT INTO {schema}.{NEW} (id, action_type_id, date) VALUES (500, 8, '2025-01-01')")
    assert "setval" in alembic(old_database, "-x", "dry_run=yes", "upgrade", "head")
    assert "4 schemas: 1 done, 3 already there" in alembic(old_database, "upgrade", "head")
    found = old_connection.execute(
        f"INSERT INTO {schema}.{NEW} (action_type_id, date) VALUES (9, '2025-01-01') RETURNING id"
    ).fetchone()
    assert found == (501,)
    assert "4 schemas: 0 done, 4 already there" in alembic(old_database, "upgrade", "head")


def test_several_tenants_by_name(old_database: str, old_connection: psycopg.Connection[Any]) -> None:
    """Each `-x tenant=` counts."""
    output = alembic(old_database, "-x", "tenant=user_10", "-x", f"tenant={S}", "upgrade", "head")
    assert "2 schemas: 2 done" in output
    assert NEW not in shapes(old_database)["user_1"].relations


def test_from_another_folder(old_database: str, old_connection: psycopg.Connection[Any], tmp_path: Path) -> None:
    """`alembic -c` finds the project's modules wherever it is called from."""
    environment = {"DATABASE_URL": url_of(old_database), "PATH": os.environ["PATH"]}
    command = [str(Path(sys.executable).parent / "alembic"), "-c", str(ROOT / "alembic.ini"), "upgrade", "head"]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True)


def test_a_server_that_quotes_all_identifiers(old_database: str, old_connection: psycopg.Connection[Any]) -> None:
    """A setting of the database that changes how the catalog writes everything changes nothing else."""
    name = psycopg.conninfo.conninfo_to_dict(old_database)["dbname"]
    old_connection.execute(f"ALTER DATABASE {name} SET quote_all_identifiers = on")
    alembic(old_database, "upgrade", "head")
    assert "4 schemas: 0 done, 4 already there" in alembic(old_database, "upgrade", "head")
    assert drift_of(old_database) == []


DEPENDENTS = {
    "a view": (f"{NEW_TABLE}; CREATE VIEW {S}.report AS SELECT * FROM {S}.{OLD}", f"view {S}.report depends on table"),
    "a foreign key": (
        f"{NEW_TABLE}; CREATE TABLE {S}.notes (stats_id integer REFERENCES {S}.{OLD})",
        f"constraint notes_stats_id_fkey on table {S}.notes depends on",
    ),
    "a generated column": (
        f"""ALTER TABLE {S}.{OLD} ALTER total_jobs TYPE bigint,
                ADD twice bigint GENERATED ALWAYS AS (total_jobs * 2) STORED""",
        'used by generated column "twice"',
    ),
}


@pytest.mark.parametrize("name", DEPENDENTS)
def test_what_depends_on_a_table_is_named(
    old_database: str, old_connection: psycopg.Connection[Any], name: str
) -> None:
    """Promise 4: the error says what is in the way."""
    statements, text = DEPENDENTS[name]
    old_connection.execute(statements.encode())
    output = alembic(old_database, "upgrade", "head", status=3)
    assert text.replace(f"{S}.", "") in output.replace(f"{S}.", "")
    assert "something of yours depends on it" in output
    assert differences(old_database, "user_10") == []
