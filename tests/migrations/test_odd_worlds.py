"""Worlds in which a migration could lose something, or leave something behind, and still say that all is well."""

from typing import Any

import psycopg
import pytest
import sqlalchemy as sa

from migrations import tenant
from migrations.first import UNIQUE
from migrations.plan import Plan
from migrations.shape import ARCHIVE, LEDGER, NEW, OLD
from tests import application
from tests.conftest import RUN_ROLE
from tests.migrations.common import SCHEMAS, alembic, drift_of, shapes
from tests.migrations.conftest import OLD_ROW
from tests.migrations.test_states import NEW_TABLE, S, rows

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

    def changed_before(connection: sa.Connection, schema: str, *arguments: Any) -> Plan:
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


def test_both_tables_without_the_view(old_database: str, old_connection: psycopg.Connection[Any]) -> None:
    """The old rows are Vinted's, whatever the default of the new table."""
    old_connection.execute(BOTH)
    alembic(old_database, "-x", "legacy_view=no", "upgrade", "head")
    assert rows(old_connection, f"{S}.{NEW}") == [(1, "vinted", "2025-06-01", 3)]


def test_rights_given_on_the_view_come_back(old_database: str, old_connection: psycopg.Connection[Any]) -> None:
    """Promise 7: with the table; and a comment of somebody else's that looks like ours is no obstacle."""
    alembic(old_database, "upgrade", "head")
    old_connection.execute(f"""
        GRANT SELECT ON {S}.{OLD} TO {RUN_ROLE};
        COMMENT ON CONSTRAINT {UNIQUE} ON {S}.{NEW} IS 'met before 0001: foo'""")
    alembic(old_database, "downgrade", "base")
    query = f"SELECT has_table_privilege('{RUN_ROLE}', '{S}.{OLD}', 'SELECT')"
    assert old_connection.execute(query).fetchall() == [(True,)]


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
