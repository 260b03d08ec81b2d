"""The next revisions, rehearsed: a copy of the project per release, as real processes over the same database.

See `tests.migrations.releases`.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import psycopg

from migrations.shape import LEDGER, NEW, OLD, VERSION
from tests import application
from tests.conftest import ROOT
from tests.migrations.releases import COLUMN, TABLE, Release
from tests.migrations.test_states import S


def records(connection: psycopg.Connection[Any]) -> set[str]:
    """The revisions that are recorded in the template, the tenants and our own schema."""
    schemas = connection.execute(
        "SELECT relnamespace::regnamespace::text FROM pg_class WHERE relname = %s", [VERSION]
    ).fetchall()
    found: set[str] = set()
    for (schema,) in schemas:
        found |= {row[0] for row in connection.execute(f"SELECT version_num FROM {schema}.{VERSION}").fetchall()}
    return found


def columns(connection: psycopg.Connection[Any], schema: str, table: str = NEW) -> set[str]:
    found = connection.execute(
        "SELECT column_name FROM information_schema.columns WHERE (table_schema, table_name) = (%s, %s)",
        [schema, table],
    ).fetchall()
    return {row[0] for row in found}


def count(connection: psycopg.Connection[Any], table: str) -> int:
    row = connection.execute(f"SELECT count(*) FROM {table}").fetchone()
    assert row
    return int(row[0])


def test_the_page_says_all_that_it_takes(
    old_database: str, old_connection: psycopg.Connection[Any], releases: list[Release]
) -> None:
    """Two places, then the commands of the page: each does what it says, and drift is 0."""
    page = (ROOT / "docs" / "add-a-column.md").read_text()
    commands = [line.removeprefix("$ ") for line in page.splitlines() if line.startswith("$ ")][1:]
    outputs = {command: releases[1].run(old_database, command) for command in commands}
    assert "ALTER TABLE marketplace_job_stats ADD COLUMN annotated_count INTEGER;" in outputs[commands[0]]
    assert "5 schemas compared with the models, 0 differences" in outputs["python -m migrations.drift"]
    assert COLUMN in columns(old_connection, S)
    assert records(old_connection) == {"0003"}


def test_any_revision_up_and_down(
    old_database: str, old_connection: psycopg.Connection[Any], releases: list[Release]
) -> None:
    """One step or all, by name or by number: the record, the tables and the rows are those of the revision."""
    third = releases[2]
    # What -x gives, and where it must be afterwards.
    for command, revision in (
        ("upgrade 0001", "0001"),
        ("upgrade +1", "0002"),
        ("upgrade +1", "0003"),
        ("upgrade head", "0004"),
        ("upgrade +1", "0004"),
        ("downgrade -1", "0003"),
        ("downgrade 0001", "0001"),
        ("upgrade 0004", "0004"),
        ("upgrade 0001", "0004"),
        ("downgrade base", None),
        ("downgrade -1", None),
        ("upgrade head", "0004"),
        ("downgrade 0003", "0003"),
        ("upgrade heads", "0004"),
    ):
        output = third.alembic(old_database, command)
        assert "0 failed" in output, (command, output)
        assert records(old_connection) == ({revision} if revision else set()), command
        assert bool(columns(old_connection, S, TABLE)) == (revision == "0004"), command
        assert (COLUMN in columns(old_connection, S)) == (revision in ("0003", "0004")), command
        assert count(old_connection, f"{S}.{OLD}") == 1, command
    assert third.alembic(old_database, "current").splitlines()[1:] == ["0004 (head), 4 schemas"]
    for command in ("history", "heads"):
        assert "0004" in third.alembic(old_database, command)
    assert "0 differences" in third.drift(old_database)
    assert "0 done, 4 already there" in third.alembic(old_database, "upgrade head")


def test_what_a_revision_backfills_is_there(
    old_database: str, old_connection: psycopg.Connection[Any], releases: list[Release]
) -> None:
    """From the old table and from the revision before alike; what is made belongs to whom the stats belong to."""
    releases[0].alembic(old_database, f"-x tenant={S} upgrade head")
    releases[2].alembic(old_database, "upgrade head")
    for schema in ("user_1", S):
        found = old_connection.execute(f"SELECT total_jobs, {COLUMN} FROM {schema}.{NEW}").fetchall()
        assert found == [(3, 3)]


def test_clones_of_the_new_template_are_adopted(
    old_database: str, old_connection: psycopg.Connection[Any], releases: list[Release]
) -> None:
    """A clone has the columns of the template that it was made of, of this revision or an earlier one; no record."""
    releases[1].alembic(old_database, "upgrade head")
    application.clone_tenant(old_connection, "user_20", ("marketplace_jobs", "marketplace_tasks", NEW, LEDGER))
    old_connection.execute(f"INSERT INTO user_20.{NEW} (action_type_id, date, {COLUMN}) VALUES (1, '2025-06-01', 7)")
    releases[2].alembic(old_database, "upgrade head")
    application.clone_tenant(old_connection, "user_21", ("marketplace_jobs", NEW, LEDGER, TABLE))
    application.clone_tenant(old_connection, "user_22", ("marketplace_jobs", NEW))
    application.clone_tenant(old_connection, "user_23", ("marketplace_jobs", OLD))
    output = releases[2].alembic(old_database, "upgrade head")
    assert "8 schemas: 3 done, 5 already there" in output
    assert "0 differences" in releases[2].drift(old_database)
    assert records(old_connection) == {"0004"}
    assert old_connection.execute(f"SELECT {COLUMN} FROM user_20.{NEW}").fetchall() == [(7,)]
    # A clone that no upgrade has seen goes back with the others.
    application.clone_tenant(old_connection, "user_24", ("marketplace_jobs", NEW, LEDGER, TABLE))
    releases[2].alembic(old_database, "downgrade base")
    assert columns(old_connection, "user_24", OLD) == columns(old_connection, "user_1", OLD)
    assert not columns(old_connection, "user_24", NEW)


def test_what_was_lost_is_made_again(
    old_database: str, old_connection: psycopg.Connection[Any], releases: list[Release]
) -> None:
    """A lost column of any revision, an index, a table: definition and default come back; the days become missing."""
    releases[2].alembic(old_database, "upgrade head")
    day = "'computed', 'UTC', 1, 0, 1, 0, 0, 0, 'x', now()"
    old_connection.execute(f"""
        INSERT INTO {S}.{LEDGER} VALUES ('2025-06-01', {day}), ('2025-06-02', {day});
        INSERT INTO {S}.{NEW} (action_type_id, date, total_jobs) VALUES (1, '2025-06-02', 1);
        INSERT INTO {S}.{LEDGER} SELECT '2025-06-03', {day.replace(" 1, 0, 1,", " 0, 0, 0,")};
        ALTER TABLE {S}.{NEW} DROP COLUMN {COLUMN}, DROP COLUMN duration_sum_ms;
        DROP INDEX user_1.ix_marketplace_job_stats_total; DROP TABLE user_10.{TABLE};
        ALTER TABLE marketplace_stats.marketplace_global_summary DROP COLUMN annotated_count""")
    assert "4 schemas compared" not in releases[2].drift(old_database, status=1)
    dry = releases[2].alembic(old_database, "-x dry_run=yes upgrade head")
    assert f"ADD COLUMN duration_sum_ms bigint, ADD COLUMN {COLUMN} integer" in dry
    assert "4 schemas: 3 done, 1 already there" in releases[2].alembic(old_database, "upgrade head")
    assert "0 differences" in releases[2].drift(old_database)
    assert old_connection.execute(f"SELECT date::text FROM {S}.{LEDGER}").fetchall() == [("2025-06-03",)]


def test_a_dry_run_prints_every_revision_to_come(
    old_database: str, old_connection: psycopg.Connection[Any], releases: list[Release]
) -> None:
    """Promise 11: what it prints, run by hand, is what the upgrade does; from the old table, and from a revision."""
    releases[0].alembic(old_database, f"-x tenant={S} upgrade head")
    for tenant, headings in ((S, 2), ("user_10", 4)):
        output = releases[2].alembic(old_database, f"-x dry_run=yes -x tenant={tenant} upgrade head")
        assert output.count("-- Running upgrade") == headings
        script = output.partition(f"\n-- {tenant}: ")[2].partition("\n")[2].partition("\nDry run, nothing was")[0]
        old_connection.execute(script.encode())
        again = releases[2].alembic(old_database, f"-x tenant={tenant} upgrade head")
        assert "0 done, 1 already there" in again


def test_older_and_newer_code_take_turns(
    old_database: str, old_connection: psycopg.Connection[Any], releases: list[Release], tmp_path: Path
) -> None:
    """Promise 10: older code touches nothing of a newer release, clones without a record included, and says why."""
    first, second, third = releases
    first.alembic(old_database, "upgrade head")
    third.alembic(old_database, "upgrade head")
    application.clone_tenant(old_connection, "user_20", ("marketplace_jobs", NEW, LEDGER, TABLE))
    for older in (first, second):
        for command in ("upgrade head", "downgrade base", "downgrade -1"):
            report = tmp_path / "report.json"
            output = older.alembic(old_database, f"-x report={report} {command}", status=1)
            assert "5 schemas: 0 done, 0 already there, 0 skipped, 5 failed" in output
            errors = {entry["error"] for entry in json.loads(report.read_text())["schemas"]}
            assert errors == {
                "the version record names revision 0004, which this release does not have",
                "it has no record, and that of the template or of our own schema names revision 0004, which this "
                "release does not have",
            }
    assert records(old_connection) == {"0004"}
    assert "5 schemas: 1 done, 4 already there" in third.alembic(old_database, "upgrade head")
    third.alembic(old_database, "downgrade 0002")
    assert "5 schemas: 0 done, 5 already there" in first.alembic(old_database, "upgrade head")
    assert "0 differences" in first.drift(old_database)
    second.alembic(old_database, "upgrade head")
    first.alembic(old_database, "upgrade head", status=1)
    third.alembic(old_database, "upgrade head")
    assert "0 differences" in third.drift(old_database)


def test_tenants_that_an_older_release_has_stamped_over_are_found(
    old_database: str, old_connection: psycopg.Connection[Any], releases: list[Release]
) -> None:
    """A record of 0001 over the tables of 0004, as a release before this one could leave it, is put right."""
    releases[2].alembic(old_database, "upgrade head")
    for schema in ("template_tenant", "user_1", S, "user_10", "marketplace_stats"):
        old_connection.execute(f"UPDATE {schema}.{VERSION} SET version_num = '0001'")
    releases[2].alembic(old_database, "upgrade head")
    assert records(old_connection) == {"0004"}
    assert "0 differences" in releases[2].drift(old_database)


def test_a_column_of_theirs_under_the_name_of_a_later_one(
    old_database: str, old_connection: psycopg.Connection[Any], releases: list[Release]
) -> None:
    """In the old table it is set aside, keeps its name in the view, and comes back with the downgrade."""
    old_connection.execute(
        f"ALTER TABLE {S}.{OLD} ADD {COLUMN} integer DEFAULT 9, ADD computed_at text DEFAULT 'theirs'"
    )
    releases[2].alembic(old_database, "upgrade head")
    found = old_connection.execute(f"SELECT {COLUMN}, computed_at FROM {S}.{OLD}").fetchall()
    assert found == [(9, "theirs")]
    assert old_connection.execute(f"SELECT {COLUMN}, computed_at FROM {S}.{NEW}").fetchall() == [(3, None)]
    assert "0 differences" in releases[2].drift(old_database)
    releases[2].alembic(old_database, "downgrade base")
    assert old_connection.execute(f"SELECT {COLUMN}, computed_at FROM {S}.{OLD}").fetchall() == [(9, "theirs")]


def test_a_column_of_theirs_in_the_new_table_under_the_name_of_a_later_one(
    old_database: str, old_connection: psycopg.Connection[Any], releases: list[Release]
) -> None:
    """It is not taken for ours: the tenant fails by name, as it was, and the others go on."""
    releases[0].alembic(old_database, "upgrade head")
    old_connection.execute(f"ALTER TABLE {S}.{NEW} ADD {COLUMN} numeric(6, 2) DEFAULT 1.5")
    old_connection.execute(f"CREATE INDEX byday ON user_10.{NEW} (date)")
    output = releases[2].alembic(old_database, "upgrade head", status=3)
    assert "4 schemas: 3 done, 0 already there, 0 skipped, 1 failed" in output
    assert "a revision adds it, and it is there already: if it is yours, rename it" in output
    assert str(old_connection.execute(f"SELECT {COLUMN} FROM {S}.{NEW}").fetchall()) == "[(Decimal('1.50'),)]"
    assert old_connection.execute(f"SELECT {COLUMN} FROM user_10.{NEW}").fetchall() == [(3,)]


def test_a_revision_that_leaves_its_transaction_is_refused(
    old_database: str, old_connection: psycopg.Connection[Any], releases: list[Release], tmp_path: Path
) -> None:
    """A tenant must not be left between; nothing is done."""
    folder = tmp_path / "project"
    shutil.copytree(releases[1].folder, folder)
    [revision] = (folder / "migrations" / "versions").glob("0003*.py")
    text = revision.read_text()
    block = "    with op.get_context().autocommit_block():\n    "
    revision.write_text(text.replace("    op.add_column", f"{block}    op.add_column"))
    output = Release(folder).alembic(old_database, "upgrade head", status=1)
    assert "A revision leaves its transaction" in output
    assert not columns(old_connection, S)
