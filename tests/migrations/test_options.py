"""What the operator can ask for: dry run, report, the old name, the archive, drift, grants."""

import json
from pathlib import Path
from typing import Any

import psycopg
import pytest
from click.testing import CliRunner

from migrations import drift
from migrations.shape import ARCHIVE, LEDGER, NEW, OLD, VERSION
from pipelines.migration import build_migration_job
from tests import application
from tests.conftest import url_of
from tests.migrations.common import SCHEMAS, alembic, differences, shapes
from tests.migrations.conftest import OLD_ROW
from tests.migrations.test_states import STATES, S, rows


@pytest.mark.parametrize("name", ["old", "both tables", "neither table"])
def test_a_dry_run_prints_the_exact_statements_and_writes_nothing(
    old_database: str, old_connection: psycopg.Connection[Any], name: str
) -> None:
    """Promise 11: no tuple of any catalog changes; what was printed, run by hand, makes the tables canonical."""
    old_connection.execute(STATES[name].sql)
    catalog = (
        "SELECT (SELECT max(xmin::text::bigint) FROM pg_class), (SELECT max(xmin::text::bigint) FROM pg_attribute)"
    )
    before = old_connection.execute(catalog).fetchone(), shapes(old_database)

    output = alembic(old_database, "-x", "dry_run=yes", "-x", f"tenant={S}", "upgrade", "head")

    assert (old_connection.execute(catalog).fetchone(), shapes(old_database)) == before
    heading, _, statements = output.partition(f"\n-- {S}: ")[2].partition("\n")
    assert heading == {"old": "old", "both tables": "both", "neither table": "missing"}[name]
    old_connection.execute(statements.partition("\nDry run, nothing was written")[0].encode())
    assert differences(old_database, S) == []


def test_the_report_tells_all_of_every_schema(
    old_database: str, old_connection: psycopg.Connection[Any], tmp_path: Path
) -> None:
    """Counts, and per schema status, state, error, SQLSTATE and remedy."""
    old_connection.execute(f"ALTER TABLE {S}.{OLD} ALTER date TYPE text")
    report = tmp_path / "report.json"
    alembic(old_database, "-x", f"report={report}", "upgrade", "head", status=3)
    told = json.loads(report.read_text())
    assert told["counts"] == {"done": 3, "failed": 1}
    assert {entry["schema"]: entry["status"] for entry in told["schemas"]} == {
        "marketplace_stats": "done",
        "template_tenant": "done",
        "user_1": "done",
        S: "failed",
        "user_10": "done",
    }
    [failed] = [entry for entry in told["schemas"] if entry["status"] == "failed"]
    assert (failed["state"], failed["remedy"]) == (f"with {OLD}", "change it to date")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("-x", "tennant=user_1", "upgrade", "head"), "-x tennant is not known: use one of archive, dry_run"),
        (("-x", "dry_run=true", "upgrade", "head"), "-x dry_run=true is not allowed: say yes or no."),
        (("-x", "tenant=user_99", "upgrade", "head"), "There is no tenant user_99 in database"),
        (("upgrade", "head", "--sql"), "There is no offline mode here: use -x dry_run=yes"),
        (("-x", "report=/no/such/folder/r.json", "upgrade", "head"), "there is no folder /no/such/folder"),
        (("-x", "tenant", "upgrade", "head"), "There is no tenant  in database"),
        (("-x", "report=/tmp", "upgrade", "head"), "-x report=/tmp: it is a folder, or may not be written"),
        (("-x", "archive=yes", "-x", "archive=no", "upgrade", "head"), "-x archive is given twice: yes and no."),
        (("upgrade", "nope"), "Can't locate revision identified by 'nope': use head, base, +1, -1 or one that"),
        (("stamp", "head"), "stamp is not for many schemas: use upgrade, downgrade, current, history or heads."),
    ],
)
def test_a_wrong_option_is_one_sentence(old_database: str, arguments: tuple[str, ...], sentence: str) -> None:
    """Nothing is done, and the exit status says so."""
    assert sentence in alembic(old_database, *arguments, status=1)
    assert set(shapes(old_database)["user_1"].relations) == {OLD}


def test_current_tells_what_is_recorded(old_database: str, old_connection: psycopg.Connection[Any]) -> None:
    """By revision, with the schemas that are not at the head by name; and it changes no record, known or not."""
    alembic(old_database, "-x", f"tenant={S}", "upgrade", "head")
    alembic(old_database, "-x", "tenant=user_1", "upgrade", "head")
    old_connection.execute(f"UPDATE user_1.{VERSION} SET version_num = 'beef'")
    assert alembic(old_database, "current").splitlines()[1:] == [
        "no record, 2 schemas: template_tenant, user_10",
        "beef, 1 schemas: user_1",
        "0002 (head), 1 schemas",
    ]
    assert old_connection.execute(f"SELECT * FROM user_1.{VERSION}").fetchall() == [("beef",)]


def test_nothing_done_is_status_1(old_database: str, old_connection: psycopg.Connection[Any]) -> None:
    """When every schema fails, that is not 'some'."""
    for schema in SCHEMAS:
        old_connection.execute(f"ALTER TABLE {schema}.{OLD} ALTER date TYPE text")
    assert "4 schemas: 0 done, 0 already there, 0 skipped, 4 failed" in alembic(
        old_database, "upgrade", "head", status=1
    )


def test_old_readers_and_writers_keep_their_rights_and_see_vinted_only(
    old_database: str, old_connection: psycopg.Connection[Any]
) -> None:
    """Promise 6: the view has the table's owner and grants; it shows and makes vinted rows, and no others."""
    role = f"reader_{psycopg.conninfo.conninfo_to_dict(old_database)['dbname']}"
    old_connection.execute(f"""
        CREATE ROLE {role} LOGIN; GRANT USAGE ON SCHEMA {S} TO {role};
        GRANT SELECT, UPDATE ON {S}.{OLD} TO {role}""")
    alembic(old_database, "upgrade", "head")
    application.insert(old_connection, S, NEW, [OLD_ROW | {"marketplace": "ebay", "total_jobs": 50}])
    with psycopg.connect(old_database.replace("user=postgres", f"user={role}"), autocommit=True) as reader:
        assert reader.execute(f"SELECT sum(total_jobs) FROM {S}.{OLD}").fetchone() == (3,)
        reader.execute(f"UPDATE {S}.{OLD} SET total_jobs = total_jobs + 1")
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            reader.execute(f"DELETE FROM {S}.{OLD}")
    old_connection.execute(f"INSERT INTO {S}.{OLD} (action_type_id, date, total_jobs) VALUES (4, '2025-06-01', 1)")
    assert rows(old_connection, f"{S}.{NEW}") == [
        (1, "ebay", "2025-06-01", 50),
        (1, "vinted", "2025-06-01", 4),
        (4, "vinted", "2025-06-01", 1),
    ]


def test_the_old_name_can_be_left_out_or_dropped_later(
    old_database: str, old_connection: psycopg.Connection[Any]
) -> None:
    """View and default go together, stay gone in later runs, and a new customer gets what the template has."""
    alembic(old_database, "upgrade", "head")
    assert shapes(old_database)[S].view(OLD)
    alembic(old_database, "-x", "legacy_view=no", "upgrade", "head")
    old_connection.execute("CREATE SCHEMA user_11")
    alembic(old_database, "upgrade", "head")
    for schema, shape in shapes(old_database, *SCHEMAS, "user_11").items():
        assert OLD not in shape.relations, schema
        assert shape.relations[NEW].columns["marketplace"].default is None
    alembic(old_database, "-x", "legacy_view=yes", "upgrade", "head")
    assert all(shape.view(OLD) for shape in shapes(old_database).values())
    assert differences(old_database, S) == []


def test_the_first_migration_can_leave_the_old_name_out(
    old_database: str, old_connection: psycopg.Connection[Any]
) -> None:
    """Every tenant, with rows, without view and default; also those that are cloned from the old table later."""
    alembic(old_database, "-x", "legacy_view=no", "-x", f"tenant={S}", "upgrade", "head")
    assert rows(old_connection, f"{S}.{NEW}") == [(1, "vinted", "2025-06-01", 3)]
    assert OLD not in shapes(old_database)[S].relations
    assert shapes(old_database)[S].relations[NEW].columns["marketplace"].default is None


def test_an_unmigrated_template_decides_nothing(old_database: str, old_connection: psycopg.Connection[Any]) -> None:
    """After a downgrade a tenant that is migrated before the template gets the view, as at the first time."""
    alembic(old_database, "upgrade", "head")
    alembic(old_database, "downgrade", "base")
    alembic(old_database, "-x", f"tenant={S}", "upgrade", "head")
    assert shapes(old_database)[S].view(OLD)
    assert differences(old_database, S) == []


def test_rows_that_a_policy_hides_are_not_lost(
    old_database: str, old_connection: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Promise 9: with both tables, and a role to which row level security hides rows, the tenant fails and stays."""
    role = f"owner_{psycopg.conninfo.conninfo_to_dict(old_database)['dbname']}"
    old_connection.execute(STATES["both tables"].sql)
    old_connection.execute(f"""
        CREATE ROLE {role} LOGIN; ALTER SCHEMA {S} OWNER TO {role};
        ALTER TABLE {S}.{OLD} OWNER TO {role}; ALTER TABLE {S}.{NEW} OWNER TO {role};
        GRANT USAGE ON SCHEMA template_tenant TO {role}; GRANT USAGE ON template_tenant.{OLD}_id_seq TO {role};
        ALTER TABLE {S}.{OLD} ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY""")
    monkeypatch.setenv("MIGRATION_DATABASE_URL", url_of(old_database).replace("postgres@", f"{role}@"))
    assert "SQLSTATE 42501" in alembic(old_database, "-x", f"tenant={S}", "upgrade", "head", status=1)
    assert old_connection.execute(f"SELECT count(*) FROM {S}.{OLD}").fetchone() == (3,)


def test_another_owner_keeps_the_tables_and_the_rights_on_the_old_name(
    old_database: str, old_connection: psycopg.Connection[Any]
) -> None:
    """The migrator may be another role than the owner: what is made becomes the owner's; grants are kept."""
    name = psycopg.conninfo.conninfo_to_dict(old_database)["dbname"]
    owner, reader = f"app_{name}", f"analyst_{name}"
    old_connection.execute(STATES["both tables"].sql)
    old_connection.execute(f"""
        CREATE ROLE {owner}; CREATE ROLE {reader}; GRANT SELECT ON {S}.{OLD} TO {reader};
        ALTER TABLE {S}.{OLD} OWNER TO {owner}; ALTER TABLE {S}.{NEW} OWNER TO {owner};
        ALTER TABLE user_10.{OLD} DROP COLUMN id; ALTER TABLE user_10.{OLD} ADD id integer;
        ALTER TABLE user_10.{OLD} OWNER TO {owner}""")
    alembic(old_database, "upgrade", "head")
    for schema in (S, "user_10"):
        relations = shapes(old_database)[schema].relations
        assert {relations[table].owner for table in (NEW, LEDGER, OLD)} == {owner}
        assert differences(old_database, schema) == []
    assert (reader, "SELECT") in shapes(old_database)[S].relations[OLD].grants
    # A repair makes the view again, with the rights that it had.
    old_connection.execute(
        f"GRANT UPDATE ON {S}.{OLD} TO {reader}; ALTER TABLE {S}.{NEW} ALTER total_jobs DROP NOT NULL"
    )
    alembic(old_database, "upgrade", "head")
    assert shapes(old_database)[S].relations[OLD].grants == ((reader, "SELECT"), (reader, "UPDATE"))


def test_archived_rows_come_back_whatever_became_of_the_table(
    old_database: str, old_connection: psycopg.Connection[Any]
) -> None:
    """Promise 7: also if the old table was dropped meanwhile, or the same key was put away twice."""
    ebay = OLD_ROW | {"marketplace": "ebay"}
    for jobs in (5, 8):
        alembic(old_database, "upgrade", "head")
        old_connection.execute(f"DELETE FROM {S}.{NEW} WHERE marketplace = 'ebay'")
        application.insert(old_connection, S, NEW, [ebay | {"total_jobs": jobs}])
        alembic(old_database, "-x", "archive=yes", "-x", f"tenant={S}", "downgrade", "base")
    application.insert(
        old_connection, S, ARCHIVE, [ebay | {"total_jobs": 2, "reason": "downgrade"}, ebay | {"reason": "downgrade"}]
    )
    old_connection.execute(f"DROP TABLE {S}.{OLD}")
    alembic(old_database, "upgrade", "head")
    assert rows(old_connection, f"{S}.{NEW}") == [(1, "ebay", "2025-06-01", 8)]


def test_an_archiving_downgrade_and_the_next_upgrade_lose_no_row(
    old_database: str, old_connection: psycopg.Connection[Any]
) -> None:
    """Promise 7: eBay and Etsy rows go to the archive with all their numbers, and come back."""
    alembic(old_database, "upgrade", "head")
    others = [OLD_ROW | {"marketplace": name, "duration_sum_ms": 5, "expired_count": 6} for name in ("ebay", "etsy")]
    application.insert(old_connection, S, NEW, others)
    everything = f"SELECT action_type_id, marketplace, date, total_jobs, duration_sum_ms, expired_count FROM {S}.{NEW}"
    before = sorted(old_connection.execute(everything).fetchall(), key=str)

    output = alembic(old_database, "downgrade", "base", status=3)
    assert "eBay or Etsy rows would be lost: repeat with -x archive=yes to put them away" in output
    alembic(old_database, "-x", "archive=yes", "downgrade", "base")
    assert set(shapes(old_database)[S].relations) >= {OLD, ARCHIVE}
    assert old_connection.execute(f"SELECT count(*) FROM {S}.{OLD}").fetchone() == (1,)

    alembic(old_database, "upgrade", "head")
    assert sorted(old_connection.execute(everything).fetchall(), key=str) == before
    assert old_connection.execute(f"SELECT count(*) FROM {S}.{ARCHIVE}").fetchone() == (0,)


def test_drift_is_found_and_named(
    old_database: str, old_connection: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """None after a migration, in clones and older tenants alike; status 1 and a line for each afterwards."""
    monkeypatch.setenv("DATABASE_URL", url_of(old_database))
    alembic(old_database, "upgrade", "head")
    result = CliRunner().invoke(drift.main)
    assert (result.exit_code, result.output.splitlines()[1:]) == (
        0,
        ["5 schemas compared with the models, 0 differences"],
    )

    old_connection.execute(
        f"""
        ALTER TABLE {S}.{NEW} ALTER success_count DROP NOT NULL, ADD note text;
        ALTER TABLE {S}.{NEW} RENAME CONSTRAINT uq_marketplace_job_stats_action_marketplace_date TO other;
        ALTER TABLE user_10.{NEW} DROP CONSTRAINT ck_marketplace_job_stats_marketplace;
        DROP VIEW user_10.{OLD}; DROP TABLE user_1.{LEDGER}""".replace("ALTER total_jobs TYPE bigint, ", "")
    )
    result = CliRunner().invoke(drift.main)
    assert result.exit_code == 1
    unique = "UNIQUE (action_type_id, marketplace, date)"
    check = f"user_10: {NEW} has no ck_marketplace_job_stats_marketplace CHECK ("
    told = [check if line.startswith(check) else line for line in result.output.splitlines()[1:]]
    assert told == [
        f"user_1: {LEDGER} is missing",
        f"{S}: {NEW}.note is not in the models",
        f"{S}: {NEW}.success_count allows null",
        f"{S}: {NEW} has no uq_marketplace_job_stats_action_marketplace_date {unique}",
        f"{S}: {NEW} has other {unique}, which is not in the models",
        check,
        f"user_10: the view {OLD} is missing, or the default of {NEW}.marketplace should go with it",
        "5 schemas compared with the models, 7 differences",
    ]


def test_the_runs_role_is_granted_what_it_needs(
    old_database: str, old_connection: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a role of its own, the migration grants the run's role the sources to read and our tables to write.

    Clones made later included; nothing to do afterwards; the dry run lists the grants.
    """
    role = f"runner_{psycopg.conninfo.conninfo_to_dict(old_database)['dbname']}"
    old_connection.execute(f"CREATE ROLE {role} LOGIN")
    monkeypatch.setenv("MIGRATION_DATABASE_URL", url_of(old_database))
    runner = old_database.replace("user=postgres", f"user={role}")
    assert f"GRANT SELECT ON user_2.marketplace_jobs TO {role}" in alembic(
        runner, "-x", "dry_run=yes", "upgrade", "head"
    )
    alembic(runner, "upgrade", "head")
    assert "4 schemas: 0 done, 4 already there" in alembic(runner, "upgrade", "head")
    application.clone_tenant(old_connection, "user_11", ("marketplace_jobs", "marketplace_tasks", NEW, LEDGER))
    assert "5 schemas: 1 done, 4 already there" in alembic(runner, "upgrade", "head")
    with psycopg.connect(runner, autocommit=True) as connection:
        for schema in (*SCHEMAS[1:], "user_11"):
            application.insert(connection, schema, NEW, [OLD_ROW | {"marketplace": "etsy"}])
            connection.execute(f"SELECT FROM {schema}.marketplace_tasks")
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                connection.execute(f"DELETE FROM {schema}.marketplace_jobs")


def test_the_job_does_the_same_from_dagit(
    old_database: str, old_connection: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`migrate_tenants_job` migrates, says how many, and fails with the tenants named that it could not migrate."""
    monkeypatch.setenv("DATABASE_URL", url_of(old_database))
    old_connection.execute(f"ALTER TABLE {S}.{OLD} ALTER date TYPE text")
    migrate_tenants_job = build_migration_job({})
    failed = migrate_tenants_job.execute_in_process(raise_on_error=False)
    [event] = [event for event in failed.all_events if event.is_step_failure]
    assert event.step_failure_data.error is not None
    assert event.step_failure_data.error.message == (
        f"1 of 4 schemas were not migrated. {S}: column date of {OLD} is of type text: change it to date."
    )
    assert differences(old_database, "user_10") == []

    old_connection.execute(f"ALTER TABLE {S}.{OLD} ALTER date TYPE date USING date::date")
    assert migrate_tenants_job.execute_in_process(raise_on_error=False).success
    assert differences(old_database, S) == []

    monkeypatch.setenv("DATABASE_URL", "postgresql://root:s3cret@127.0.0.1:1/shop")
    down = migrate_tenants_job.execute_in_process(raise_on_error=False)
    [event] = [event for event in down.all_events if event.is_step_failure]
    assert event.step_failure_data.error is not None
    assert event.step_failure_data.error.message.startswith("Error: Cannot connect to database shop on 127.0.0.1:1")
