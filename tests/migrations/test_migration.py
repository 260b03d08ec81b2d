"""The migration as an operator runs it: every tenant to the new table and back, by the command line."""

from typing import Any

import psycopg
import pytest

from migrations.shape import LEDGER, NEW, OLD, VERSION
from migrations.target import HEAD
from tests import application
from tests.migrations.common import SCHEMAS, alembic, differences, shapes
from tests.migrations.conftest import OLD_ROW


def test_every_tenant_becomes_the_canonical_table(old_database: str, old_connection: psycopg.Connection[Any]) -> None:
    """Old tables, clones and own ones alike become what the models say, names included; the old rows are vinted."""
    assert "4 schemas: 4 done, 0 already there, 0 skipped, 0 failed" in alembic(old_database, "upgrade", "head")
    for schema in SCHEMAS:
        assert differences(old_database, schema) == []
    columns = (
        "action_type_id, date, total_jobs, success_count, failure_count, avg_duration_ms, marketplace, computed_at"
    )
    for schema in SCHEMAS[1:]:
        rows = old_connection.execute(f"SELECT {columns} FROM {schema}.{NEW}").fetchall()
        assert rows == [(*OLD_ROW.values(), 1234, "vinted", None)]


def test_what_is_done_is_on_disk(old_database: str, old_connection: psycopg.Connection[Any]) -> None:
    """Promise 22 for the migration: when it says done, the log is on disk beyond every tenant's commit."""
    alembic(old_database, "upgrade", "head")
    flushed = old_connection.execute("SELECT pg_current_wal_flush_lsn() >= pg_current_wal_insert_lsn()").fetchone()
    assert flushed == (True,)


def test_the_check_constraint_refuses_other_marketplaces(
    old_database: str, old_connection: psycopg.Connection[Any]
) -> None:
    """The three marketplaces are stored side by side under one action and day; a fourth is refused, by name."""
    alembic(old_database, "upgrade", "head")
    application.insert(old_connection, "user_2", NEW, [OLD_ROW | {"marketplace": name} for name in ("ebay", "etsy")])
    with pytest.raises(psycopg.errors.CheckViolation, match="ck_marketplace_job_stats_marketplace"):
        application.insert(old_connection, "user_2", NEW, [OLD_ROW | {"marketplace": "depop"}])
    with pytest.raises(psycopg.errors.UniqueViolation, match="uq_marketplace_job_stats_action_marketplace_date"):
        application.insert(old_connection, "user_2", NEW, [OLD_ROW | {"marketplace": "ebay"}])


@pytest.mark.parametrize(
    "unique",
    [
        "ADD CONSTRAINT uq_vinted_job_stats_action_date UNIQUE (action_type_id, date)",
        "ADD CONSTRAINT a_name_that_somebody_cut_off_because_it_was_too_lon UNIQUE (date, action_type_id)",
        'ADD CONSTRAINT "Odd ""Name""" UNIQUE (action_type_id, date)',
        None,
    ],
)
def test_the_old_key_is_found_by_its_columns(
    old_database: str, old_connection: psycopg.Connection[Any], unique: str | None
) -> None:
    """Whatever the unique constraint is called, and if it is only an index, it is replaced by the new one."""
    old_connection.execute(f"ALTER TABLE user_1.{OLD} DROP CONSTRAINT vinted_job_stats_action_type_id_date_key")
    if unique:
        old_connection.execute(f"ALTER TABLE user_1.{OLD} {unique}")
    else:
        old_connection.execute(f"CREATE UNIQUE INDEX plain ON user_1.{OLD} (action_type_id, date)")
    alembic(old_database, "upgrade", "head")
    assert differences(old_database, "user_1") == []


def test_a_foreign_key_to_a_vinted_only_table_is_dropped(
    old_database: str, old_connection: psycopg.Connection[Any]
) -> None:
    """Under it no eBay or Etsy row could ever be stored."""
    old_connection.execute(f"""
        CREATE TABLE public.vinted_action_types (id integer PRIMARY KEY);
        INSERT INTO public.vinted_action_types VALUES (1);
        ALTER TABLE user_1.{OLD} ADD FOREIGN KEY (action_type_id) REFERENCES public.vinted_action_types""")
    alembic(old_database, "upgrade", "head")
    application.insert(old_connection, "user_1", NEW, [OLD_ROW | {"action_type_id": 5, "marketplace": "ebay"}])
    assert differences(old_database, "user_1") == []


def test_tenants_without_the_old_table_and_new_clones_are_brought_along(
    old_database: str, old_connection: psycopg.Connection[Any]
) -> None:
    """No table, and a clone of the migrated template without a version record: the next run makes both canonical."""
    old_connection.execute(f"DROP TABLE user_2.{OLD}")
    alembic(old_database, "upgrade", "head")
    assert differences(old_database, "user_2") == []

    application.clone_tenant(old_connection, "user_11", ("marketplace_jobs", "marketplace_tasks", NEW, LEDGER))
    old_connection.execute("CREATE SCHEMA user_12")
    assert "6 schemas: " in alembic(old_database, "upgrade", "head")
    assert differences(old_database, "user_11") == []
    assert differences(old_database, "user_12") == []
    ids = old_connection.execute(
        f"INSERT INTO user_11.{NEW} (action_type_id, date) VALUES (1, '2026-01-01') RETURNING id, marketplace"
    ).fetchone()
    assert ids
    assert ids[1] == "vinted"


def test_up_down_up_restores_every_row(old_database: str, old_connection: psycopg.Connection[Any]) -> None:
    """Promise 7: down gives the old shape under the names that were met, up again the new one; no row changes."""
    met = shapes(old_database)
    alembic(old_database, "upgrade", "head")
    up = shapes(old_database)
    alembic(old_database, "downgrade", "base")
    down = shapes(old_database)
    for schema in SCHEMAS:
        assert down[schema].relations[OLD] == met[schema].relations[OLD]
    assert all(set(shape.relations) == {OLD, VERSION} for shape in down.values())
    columns = "action_type_id, date, total_jobs, success_count, failure_count, avg_duration_ms"
    for schema in SCHEMAS[1:]:
        assert old_connection.execute(f"SELECT {columns} FROM {schema}.{OLD}").fetchall() == [(*OLD_ROW.values(), 1234)]
    alembic(old_database, "upgrade", "head")
    assert shapes(old_database) == up
    assert old_connection.execute(f"SELECT count(*) FROM user_10.{NEW}").fetchone() == (1,)


def test_a_downgrade_that_would_lose_rows_is_refused(
    old_database: str, old_connection: psycopg.Connection[Any]
) -> None:
    """The tenant with an eBay row stays as it was, whole; the others go back; the exit status says that some failed."""
    alembic(old_database, "upgrade", "head")
    application.insert(old_connection, "user_2", NEW, [OLD_ROW | {"marketplace": "ebay"}])
    before = shapes(old_database)["user_2"]
    output = alembic(old_database, "downgrade", "base", status=3)
    assert "user_2: " in output
    assert "4 schemas: 3 done, 0 already there, 0 skipped, 1 failed" in output
    after = shapes(old_database)
    assert after["user_2"] == before
    assert OLD in after["user_10"].relations


def test_a_tenant_that_was_changed_can_be_taken_back(
    old_database: str, old_connection: psycopg.Connection[Any]
) -> None:
    """Promise 8 for the way back: other names and missing columns, ledger and view are no obstacle."""
    alembic(old_database, "upgrade", "head")
    old_connection.execute(f"""
        ALTER TABLE user_2.{NEW} RENAME CONSTRAINT {NEW}_pkey TO mine;
        ALTER TABLE user_2.{NEW} DROP COLUMN computed_at;
        DROP TABLE user_2.{LEDGER}; DROP VIEW user_2.{OLD}""")
    alembic(old_database, "downgrade", "base")
    down = shapes(old_database)
    assert set(down["user_2"].relations) == {OLD, VERSION}
    assert down["user_2"].relations[OLD].constraints == down["user_10"].relations[OLD].constraints


def test_one_tenant_can_be_migrated_alone(old_database: str, old_connection: psycopg.Connection[Any]) -> None:
    """`-x tenant=user_2` touches that schema only; a second run finds nothing to do."""
    for what in ("1 done, 0 already there", "0 done, 1 already there"):
        assert f"1 schemas: {what}" in alembic(old_database, "-x", "tenant=user_2", "upgrade", "head")
    found = shapes(old_database)
    assert NEW in found["user_2"].relations
    assert all(set(found[schema].relations) == {OLD} for schema in SCHEMAS if schema != "user_2")


def test_one_bad_tenant_is_named_and_stops_no_other(old_database: str, old_connection: psycopg.Connection[Any]) -> None:
    """Promise 4: a tenant that must not be touched is reported with the remedy and left as it was."""
    old_connection.execute(f"CREATE TABLE user_2.{NEW} (id integer)")
    before = shapes(old_database)["user_2"]
    output = alembic(old_database, "upgrade", "head", status=3)
    assert (
        f"user_2: failed, with {OLD} and {NEW}: {NEW} has no column action_type_id, date, total_jobs; rename it"
        in output
    )
    after = shapes(old_database)
    assert after["user_2"] == before
    assert differences(old_database, "user_10") == []


def test_the_applications_own_version_table_is_left_alone(
    old_database: str, old_connection: psycopg.Connection[Any]
) -> None:
    """The application uses Alembic too: its record, in `public` or in a tenant, is neither read nor written."""
    for schema in ("public", "user_2"):
        old_connection.execute(f"CREATE TABLE {schema}.alembic_version (version_num varchar(32) PRIMARY KEY)")
        old_connection.execute(f"INSERT INTO {schema}.alembic_version VALUES ('theirs')")
    alembic(old_database, "upgrade", "head")
    for schema in ("public", "user_2"):
        assert old_connection.execute(f"SELECT * FROM {schema}.alembic_version").fetchall() == [("theirs",)]
    assert old_connection.execute(f"SELECT * FROM user_2.{VERSION}").fetchall() == [("0002",)]


def test_schemas_that_only_look_like_tenants_are_not_touched(
    old_database: str, old_connection: psycopg.Connection[Any]
) -> None:
    """Only `user_<digits>` is a tenant, of any number of digits; hostile names do no harm."""
    strangers = (
        "user_settings",
        "user_1_old",
        "User_1",
        "user_",
        'user_1"; drop schema user_2; --',
        "user_٣",
        "xuser_1",
    )
    tenants = ("user_01", "user_99999999999999999999")
    for name in (*strangers, *tenants):
        old_connection.execute(psycopg.sql.SQL("CREATE SCHEMA {}").format(psycopg.sql.Identifier(name)))
    assert "6 schemas: " in alembic(old_database, "upgrade", "head")
    found = old_connection.execute(
        "SELECT nspname, array_agg(relname::text) FROM pg_namespace n LEFT JOIN pg_class c ON relnamespace = n.oid "
        "WHERE nspname = ANY (%s) AND relkind = 'r' GROUP BY 1",
        [[*strangers, *tenants]],
    ).fetchall()
    assert {name: sorted(tables) for name, tables in found} == {name: sorted((*HEAD, VERSION)) for name in tenants}
