"""Worlds in which a migration could lose something, or leave something behind, and still say that all is well."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa

from migrations import tenant
from migrations.shape import ARCHIVE, LEDGER, NEW, OLD, VERSION
from tests import application
from tests.conftest import ROOT, RUN_ROLE, create_database, run, url_of, wait_until
from tests.migrations.common import SCHEMAS, alembic, differences, drift_of, shapes
from tests.migrations.conftest import OLD_ROW
from tests.migrations.test_faults import process
from tests.migrations.test_states import NEW_TABLE, S, rows
from tests.server import binaries

BOTH = f"{NEW_TABLE}; INSERT INTO {S}.{NEW} (action_type_id, date, total_jobs) VALUES (1, '2025-06-01', 2)"
FUNCTION = "CREATE FUNCTION public.{name}() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN {body} END $$"


# ---- rows are moved, and counted ----

THIEVES = {
    "a rule on the new table": f"CREATE RULE away AS ON INSERT TO {S}.{NEW} DO INSTEAD NOTHING",
    "a trigger on the new table": f"""
        {FUNCTION.format(name="away", body="RETURN NULL;")};
        CREATE TRIGGER away BEFORE INSERT ON {S}.{NEW} FOR EACH ROW EXECUTE FUNCTION public.away()""",
    "a trigger that changes a number": f"""
        {FUNCTION.format(name="other", body="NEW.total_jobs := 0; RETURN NEW;")};
        CREATE TRIGGER other BEFORE INSERT ON {S}.{NEW} FOR EACH ROW EXECUTE FUNCTION public.other()""",
    "a trigger that deletes afterwards": f"""
        {FUNCTION.format(name="gone", body=f"DELETE FROM {S}.{NEW} WHERE action_type_id = 2; RETURN NULL;")};
        CREATE TRIGGER gone AFTER INSERT ON {S}.{NEW} EXECUTE FUNCTION public.gone()""",
    "a trigger on the archive": f"""
        CREATE TABLE {S}.{ARCHIVE} (reason text NOT NULL, archived_at timestamptz NOT NULL DEFAULT now());
        {FUNCTION.format(name="away", body="RETURN NULL;")};
        CREATE TRIGGER away BEFORE INSERT ON {S}.{ARCHIVE} FOR EACH ROW EXECUTE FUNCTION public.away()""",
}


@pytest.mark.parametrize("name", THIEVES)
def test_rows_that_would_be_lost_on_the_way_fail_the_tenant(
    old_database: str, old_connection: psycopg.Connection[Any], name: str
) -> None:
    """Promise 9: the old home goes only when every row of it is in the new table or in the archive."""
    old_connection.execute(f"{BOTH}; INSERT INTO {S}.{OLD} (action_type_id, date) VALUES (2, '2025-06-01')")
    old_connection.execute(THIEVES[name].encode())
    before = shapes(old_database)[S], rows_of(old_connection, S, OLD), rows(old_connection, f"{S}.{NEW}")
    output = alembic(old_database, "upgrade", "head", status=3)
    assert f"{S}: failed" in output
    assert "look for a trigger or a rule on these tables" in output
    assert (shapes(old_database)[S], rows_of(old_connection, S, OLD), rows(old_connection, f"{S}.{NEW}")) == before


def rows_of(connection: psycopg.Connection[Any], schema: str, table: str) -> list[Any]:
    return sorted(connection.execute(f"SELECT * FROM {schema}.{table}").fetchall(), key=str)


def test_rows_that_would_be_lost_on_the_way_back_fail_the_tenant(
    old_database: str, old_connection: psycopg.Connection[Any]
) -> None:
    """The way to the archive is counted as well."""
    alembic(old_database, "upgrade", "head")
    application.insert(old_connection, S, NEW, [OLD_ROW | {"marketplace": "ebay"}])
    old_connection.execute(THIEVES["a trigger on the archive"].encode())
    assert "P0004" in alembic(old_database, "-x", "archive=yes", "downgrade", "base", status=3)
    assert len(rows(old_connection, f"{S}.{NEW}")) == 2


@pytest.mark.parametrize(
    "change",
    [
        f"ALTER TABLE {S}.{OLD} ADD note text; UPDATE {S}.{OLD} SET note = 'kept'",
        f"ALTER TABLE {S}.{OLD} ALTER total_jobs TYPE bigint, ADD note text DEFAULT 'kept'",
        f"ALTER TABLE {S}.{NEW} ADD note text; ALTER TABLE {S}.{OLD} ADD note text DEFAULT 'kept'",
    ],
)
def test_what_changes_while_the_lock_is_waited_for_is_seen(
    old_database: str, old_connection: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    """Promise 9: the plan is made for the shape that is read under the lock."""
    old_connection.execute(BOTH)
    apply = tenant._apply
    changes = iter([change])

    def changed_before(connection: sa.Connection, schema: str, *arguments: Any) -> str:
        if schema == S and (sql := next(changes, None)):
            old_connection.execute(sql.encode())
        return apply(connection, schema, *arguments)

    monkeypatch.setattr(tenant, "_apply", changed_before)
    alembic(old_database, "upgrade", "head")
    assert next(changes, None) is None
    found = old_connection.execute(f"SELECT note FROM {S}.{NEW} WHERE total_jobs = 3").fetchall()
    assert found == [("kept",)]


def test_an_exact_row_beats_a_larger_one(old_database: str, old_connection: psycopg.Connection[Any]) -> None:
    """What the batch computed stays; the counter's row, whose number is larger, goes to the archive, both ways."""
    old_connection.execute(f"""
        {NEW_TABLE}; ALTER TABLE {S}.{NEW} ADD computed_at timestamptz; CREATE TABLE {S}.{LEDGER} (date date);
        INSERT INTO {S}.{NEW} (action_type_id, date, total_jobs, computed_at) VALUES (1, '2025-06-01', 2, now())""")
    alembic(old_database, "upgrade", "head")
    assert rows(old_connection, f"{S}.{NEW}") == [(1, "vinted", "2025-06-01", 2)]
    assert rows(old_connection, f"{S}.{ARCHIVE}") == [(1, "vinted", "2025-06-01", 3)]
    # Back from the archive it beats what a counter has written meanwhile.
    ebay = OLD_ROW | {"marketplace": "ebay", "total_jobs": 4, "computed_at": "2026-01-01"}
    application.insert(old_connection, S, NEW, [ebay])
    alembic(old_database, "-x", "archive=yes", "downgrade", "base")
    old_connection.execute(f"""
        ALTER TABLE {S}.{OLD} RENAME TO {NEW}; ALTER TABLE {S}.{NEW} ADD marketplace text DEFAULT 'vinted';
        ALTER TABLE {S}.{NEW} DROP CONSTRAINT vinted_job_stats_action_type_id_date_key""")
    application.insert(old_connection, S, NEW, [OLD_ROW | {"marketplace": "ebay", "total_jobs": 9}])
    alembic(old_database, "upgrade", "head")
    assert (1, "ebay", "2025-06-01", 4) in rows(old_connection, f"{S}.{NEW}")
    assert (1, "ebay", "2025-06-01", 9) in rows(old_connection, f"{S}.{ARCHIVE}")


# ---- columns of theirs ----


def test_the_archive_keeps_every_column(old_database: str, old_connection: psycopg.Connection[Any]) -> None:
    """Theirs as well; and where it has no place for one, the tenant is refused."""
    old_connection.execute(f"{BOTH}; ALTER TABLE {S}.{NEW} ADD note text DEFAULT 'loser'")
    old_connection.execute(f"{BOTH.replace(S, 'user_10')}; ALTER TABLE user_10.{NEW} ADD reason text")
    output = alembic(old_database, "upgrade", "head", status=3)
    assert f"user_10: failed, with {OLD} and {NEW}: rows have to go to {ARCHIVE}, and" in output
    assert old_connection.execute(f"SELECT note, reason FROM {S}.{ARCHIVE}").fetchall() == [("loser", "duplicate")]


def test_their_columns_under_our_names_come_back(old_database: str, old_connection: psycopg.Connection[Any]) -> None:
    """Promise 7: they are set aside, are not read as ours, keep their name for old readers, and come back; twice."""
    old_connection.execute(f"""
        ALTER TABLE {S}.{OLD} ADD computed_at timestamptz DEFAULT '2020-01-01', ADD retry_count text DEFAULT 'many',
              ADD marketplace varchar(50) DEFAULT 'vinted', ADD note int GENERATED ALWAYS AS (total_jobs * 2) STORED""")
    before = rows_of(old_connection, S, OLD)
    for _ in range(2):
        alembic(old_database, "upgrade", "head")
        assert old_connection.execute(f"SELECT computed_at, retry_count FROM {S}.{NEW}").fetchall() == [(None, None)]
        assert rows_of(old_connection, S, OLD) == before
        assert drift_of(old_database) == [f"{S}: {NEW}.note is not in the models"]
        alembic(old_database, "downgrade", "base")
        assert rows_of(old_connection, S, OLD) == before
    # Renamed by hand, and nothing else: still theirs.
    old_connection.execute(f"ALTER TABLE {S}.{OLD} RENAME TO {NEW}")
    alembic(old_database, "upgrade", "head")
    assert old_connection.execute(f"SELECT computed_at FROM {S}.{NEW}").fetchall() == [(None,)]


def test_names_that_were_met_come_back(old_database: str, old_connection: psycopg.Connection[Any]) -> None:
    """Promise 7: of the unique constraint, or plain index, and of the primary key."""
    old_connection.execute(f"""
        ALTER TABLE user_1.{OLD} RENAME CONSTRAINT {OLD}_pkey TO "their 'key'";
        ALTER TABLE {S}.{OLD} DROP CONSTRAINT vinted_job_stats_action_type_id_date_key;
        CREATE UNIQUE INDEX "theirs: 10%" ON {S}.{OLD} (action_type_id, date)""")
    before = shapes(old_database)
    alembic(old_database, "upgrade", "head")
    assert drift_of(old_database) == []
    alembic(old_database, "downgrade", "base")
    after = shapes(old_database)
    assert [after[schema].relations[OLD] for schema in SCHEMAS] == [before[schema].relations[OLD] for schema in SCHEMAS]


# ---- the old name ----


def test_positional_writers_of_the_old_name_meet_their_columns(
    old_database: str, old_connection: psycopg.Connection[Any]
) -> None:
    """Promise 6: the view has the order of the old table, with columns of theirs, and that is no drift."""
    old_connection.execute(f"""
        DROP TABLE {S}.{OLD};
        CREATE TABLE {S}.{OLD} (date date NOT NULL, action_type_id integer NOT NULL, failure_count integer NOT NULL,
            success_count integer NOT NULL, note text DEFAULT 'n', total_jobs integer NOT NULL, id serial PRIMARY KEY,
            created_at timestamptz NOT NULL DEFAULT now(), avg_duration_ms integer, UNIQUE (date, action_type_id))""")
    insert = f"INSERT INTO {S}.{OLD} VALUES (%s, 1, 2, 3, 'mine', 5)"
    old_connection.execute(insert, ["2025-01-01"])
    alembic(old_database, "upgrade", "head")
    old_connection.execute(insert, ["2025-01-02"])
    found = old_connection.execute(f"SELECT success_count, failure_count, note, total_jobs FROM {S}.{NEW}").fetchall()
    assert found == [(3, 2, "mine", 5)] * 2
    assert drift_of(old_database) == [f"{S}: {NEW}.note is not in the models"]
    old_connection.execute(f"DROP VIEW {S}.{OLD}")  # Made again, it is still in that order.
    alembic(old_database, "upgrade", "head")
    old_connection.execute(insert, ["2025-01-03"])


def test_what_is_cloned_from_the_view_gets_ids(old_database: str, old_connection: psycopg.Connection[Any]) -> None:
    """Promise 6: an application that does not know of the rename clones the view; the table has its defaults."""
    old_connection.execute(
        f"ALTER TABLE user_10.{OLD} ALTER id DROP DEFAULT, ALTER id ADD GENERATED ALWAYS AS IDENTITY (START 50)"
    )
    alembic(old_database, "upgrade", "head")
    application.clone_tenant(old_connection, "user_11")
    old_connection.execute(f"CREATE TABLE user_11.of_identity (LIKE user_10.{OLD} INCLUDING ALL)")
    for table in (OLD, "of_identity"):
        found = old_connection.execute(
            f"INSERT INTO user_11.{table} (action_type_id, date) VALUES (1, '2025-01-01') "
            "RETURNING id > 0, total_jobs, success_count, created_at > now() - interval '1 minute'"
        ).fetchall()
        assert found == [(True, 0, 0, True)]
    alembic(old_database, "upgrade", "head")
    assert rows(old_connection, f"user_11.{NEW}") == [(1, "vinted", "2025-01-01", 0)]


@pytest.mark.parametrize("by", ["nobody", "the application", "hand"])
def test_a_stats_table_that_was_dropped_is_made_again(
    old_database: str, old_connection: psycopg.Connection[Any], by: str
) -> None:
    """Promise 12: it gets its view, and the ledger no longer claims the days that it held."""
    alembic(old_database, "upgrade", "head")
    entry = "'computed', 'UTC', {0}, 0, {0}, 0, 0, 0, 'x', now()"
    old_connection.execute(f"""
        INSERT INTO {S}.{LEDGER} VALUES ('2025-06-01', {entry.format(3)}), ('2025-06-02', {entry.format(0)});
        DROP TABLE {S}.{NEW} CASCADE""")
    if by == "the application":
        old_connection.execute(f"CREATE TABLE {S}.{NEW} (LIKE template_tenant.{NEW} INCLUDING ALL)")
    if by == "hand":
        old_connection.execute(NEW_TABLE)
    alembic(old_database, "upgrade", "head")
    assert shapes(old_database)[S].view(OLD)
    assert drift_of(old_database) == []
    days = old_connection.execute(f"SELECT date::text FROM {S}.{LEDGER}").fetchall()
    assert days == [("2025-06-02",)]


# ---- durable, and replicated ----


def test_tables_that_a_crash_would_empty_become_durable(
    old_database: str, old_connection: psycopg.Connection[Any]
) -> None:
    """Whether they are met before the migration or made unlogged after it; their sequences with them."""
    old_connection.execute(f"ALTER TABLE {S}.{OLD} SET UNLOGGED; ALTER TABLE template_tenant.{OLD} SET UNLOGGED")
    alembic(old_database, "upgrade", "head")
    unlogged = "SELECT relname FROM pg_class WHERE relpersistence = 'u'"
    assert old_connection.execute(unlogged).fetchall() == []
    old_connection.execute(f"ALTER TABLE {S}.{NEW} SET UNLOGGED; ALTER TABLE {S}.{LEDGER} SET UNLOGGED")
    assert drift_of(old_database) == [f"{S}: {table} is unlogged: a crash would empty it" for table in (NEW, LEDGER)]
    alembic(old_database, "upgrade", "head")
    assert old_connection.execute(unlogged).fetchall() == []


def test_published_tables_go_up_and_down(old_database: str, old_connection: psycopg.Connection[Any]) -> None:
    """FOR ALL TABLES covers the archive as well, which has no key; and tables without one, whose rows get their ids."""
    old_connection.execute(f"""
        CREATE PUBLICATION everything FOR ALL TABLES;
        ALTER TABLE user_10.{OLD} DROP CONSTRAINT {OLD}_pkey, ALTER id DROP NOT NULL;
        INSERT INTO user_10.{OLD} (id, action_type_id, date) VALUES (1, 7, '2025-01-01')""")
    for _ in range(2):
        alembic(old_database, "upgrade", "head")
        old_connection.execute(f"DELETE FROM {S}.{NEW} WHERE marketplace = 'ebay'")
        application.insert(old_connection, S, NEW, [OLD_ROW | {"marketplace": "ebay"}])
        alembic(old_database, "-x", "archive=yes", "downgrade", "base")
    alembic(old_database, "upgrade", "head")
    assert (1, "ebay", "2025-06-01", 3) in rows(old_connection, f"{S}.{NEW}")
    assert {shape.relations[NEW].replica_identity for shape in shapes(old_database).values()} == {"d"}


def test_a_replica_identity_by_the_old_key_becomes_one_by_the_new(
    old_database: str, old_connection: psycopg.Connection[Any]
) -> None:
    """Promise 6: old and new writers of a published table go on, up and down; a lost one is drift, and repaired."""
    old_connection.execute(f"""
        CREATE PUBLICATION ours FOR TABLE {S}.{OLD};
        ALTER TABLE {S}.{OLD} REPLICA IDENTITY USING INDEX vinted_job_stats_action_type_id_date_key""")
    alembic(old_database, "upgrade", "head")
    for table in (OLD, NEW):
        old_connection.execute(f"UPDATE {S}.{table} SET total_jobs = 3")
    assert shapes(old_database)[S].relations[NEW].publications == ("ours",)
    old_connection.execute(f"ALTER TABLE {S}.{NEW} DROP CONSTRAINT uq_marketplace_job_stats_action_marketplace_date")
    assert f"{S}: {NEW} has a replica identity by an index that is gone" in drift_of(old_database)
    alembic(old_database, "upgrade", "head")
    old_connection.execute(f"UPDATE {S}.{NEW} SET total_jobs = 3")
    alembic(old_database, "downgrade", "base")
    old_connection.execute(f"UPDATE {S}.{OLD} SET total_jobs = 3")
    assert shapes(old_database)[S].relations[OLD].replica_identity == "i"
    # The table that would go is published, and the other is not: a person has to say what is meant.
    old_connection.execute(f"CREATE TABLE {S}.{NEW} (LIKE {S}.{OLD} INCLUDING ALL)")
    output = alembic(old_database, "upgrade", "head", status=3)
    assert f"{OLD} has to go, and is in publication ours; add {NEW} to it" in output


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
            wait_until(old_connection, f"SELECT WHERE to_regclass('user_1.{NEW}') IS NOT NULL")
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


@pytest.mark.skipif(not shutil.which("pgbouncer"), reason="There is no PgBouncer here.")
def test_time_outs_hold_behind_a_pooler(
    old_database: str, old_connection: psycopg.Connection[Any], tmp_path: Path
) -> None:
    """Promise 5: in session mode, where it drops what is given at the start; a lock is not waited for without end."""
    given = psycopg.conninfo.conninfo_to_dict(old_database)
    tmp_path.chmod(0o777)
    (tmp_path / "users").write_text('"postgres" ""\n')
    (tmp_path / "pgbouncer.ini").write_text(f"""
[databases]
* = host={given["host"]}
[pgbouncer]
listen_port = 6543
unix_socket_dir = {tmp_path}
auth_type = trust
auth_file = {tmp_path}/users
pool_mode = session
ignore_startup_parameters = options
logfile = {tmp_path}/log
""")
    parents = [tmp_path, *tmp_path.parents][:-2]
    for folder in parents:
        folder.chmod(folder.stat().st_mode | 0o055)
    user = Path(str(given["host"])).owner() if os.geteuid() == 0 else None
    command = [str(shutil.which("pgbouncer")), str(tmp_path / "pgbouncer.ini")]
    with subprocess.Popen(command, user=user, stderr=subprocess.DEVNULL) as pooler:
        try:
            deadline = time.monotonic() + 10
            while not (tmp_path / ".s.PGSQL.6543").exists():
                assert time.monotonic() < deadline, (tmp_path / "log").read_text()
                time.sleep(0.05)
            with psycopg.connect(old_database) as other:
                other.execute(f"LOCK TABLE {S}.{OLD} IN ACCESS SHARE MODE")
                url = f"postgresql://postgres@/{given['dbname']}?host={tmp_path}&port=6543"
                environment = {"DATABASE_URL": url, "STATS_LOCK_TIMEOUT_MS": "200"}
                result = run("alembic", "upgrade", "head", environment=environment, check=False)
            assert f"{S}: failed" in result.stderr, result.stdout + result.stderr
            assert "(SQLSTATE 55P03); another session keeps a lock" in result.stderr
            assert "4 schemas: 3 done, 0 already there, 0 skipped, 1 failed" in result.stdout
        finally:
            pooler.kill()


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


def test_both_tables_without_the_view(old_database: str, old_connection: psycopg.Connection[Any]) -> None:
    """The old rows are Vinted's, whatever the default of the new table."""
    old_connection.execute(BOTH)
    alembic(old_database, "-x", "legacy_view=no", "upgrade", "head")
    assert rows(old_connection, f"{S}.{NEW}") == [(1, "vinted", "2025-06-01", 3)]


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
