"""What an owner may have put around the tables: functions, operators, triggers, views, defaults, odd names."""

import shutil
from typing import Any

import psycopg
import pytest

from migrations.shape import ARCHIVE, NEW, OLD, VERSION
from tests import application
from tests.conftest import RUN_ROLE
from tests.migrations.common import alembic, drift_of, shapes
from tests.migrations.conftest import OLD_ROW
from tests.migrations.releases import COLUMN, TABLE, Release
from tests.migrations.test_odd_worlds import BOTH, FUNCTION
from tests.migrations.test_states import S, rows

# Each of these fits the migration's arguments better than PostgreSQL's own, if it is looked for in the tenant's schema.
HIJACKS = f"""
    CREATE TABLE {S}.calls (what text);
    CREATE FUNCTION {S}.concat(bigint, text, numeric) RETURNS text LANGUAGE plpgsql AS
        $$ BEGIN INSERT INTO {S}.calls VALUES ('concat'); RETURN 'same'; END $$;
    CREATE FUNCTION {S}.eq(varchar, varchar) RETURNS boolean LANGUAGE plpgsql AS
        $$ BEGIN INSERT INTO {S}.calls VALUES ('eq'); RETURN true; END $$;
    CREATE OPERATOR {S}.= (FUNCTION = {S}.eq, LEFTARG = varchar, RIGHTARG = varchar);
    CREATE OPERATOR {S}.<> (FUNCTION = {S}.eq, LEFTARG = varchar, RIGHTARG = varchar);
    CREATE FUNCTION {S}.setval(text, integer) RETURNS bigint LANGUAGE plpgsql AS
        $$ BEGIN INSERT INTO {S}.calls VALUES ('setval'); RETURN 1; END $$;
    CREATE FUNCTION {S}.nextval(text) RETURNS bigint LANGUAGE plpgsql AS
        $$ BEGIN INSERT INTO {S}.calls VALUES ('nextval'); RETURN 1; END $$;
    CREATE FUNCTION {S}.lower(varchar) RETURNS text LANGUAGE plpgsql AS
        $$ BEGIN INSERT INTO {S}.calls VALUES ('lower'); RETURN 'etsy'; END $$"""


def test_no_function_or_operator_of_an_owner_runs(old_database: str, old_connection: psycopg.Connection[Any]) -> None:
    """Promise 27: neither while rows move, up and down, nor later, when the batch writes."""
    old_connection.execute(f"{BOTH}; {HIJACKS}; ALTER TABLE user_1.{OLD} DROP CONSTRAINT {OLD}_pkey")
    old_connection.execute(f"ALTER TABLE {S}.{OLD} ALTER total_jobs DROP NOT NULL, ALTER id DROP DEFAULT")
    alembic(old_database, "upgrade", "head")
    application.insert(old_connection, S, NEW, [OLD_ROW | {"marketplace": "ebay"}])
    assert old_connection.execute(f"SELECT count(*) FROM {S}.{OLD}").fetchall() == [(1,)]
    assert "eBay or Etsy rows would be lost" in alembic(old_database, "downgrade", "base", status=3)
    with pytest.raises(psycopg.errors.CheckViolation):
        application.insert(old_connection, S, NEW, [OLD_ROW | {"marketplace": "amazon", "action_type_id": 3}])
    alembic(old_database, "-x", "archive=yes", "downgrade", "base")
    alembic(old_database, "upgrade", "head")
    old_connection.execute(f"SELECT setval('template_tenant.{OLD}_id_seq', 1, false)")
    alembic(old_database, "upgrade", "head")
    assert old_connection.execute(f"SELECT * FROM {S}.calls").fetchall() == []
    assert sorted(rows(old_connection, f"{S}.{NEW}")) == [
        (1, "ebay", "2025-06-01", 3),
        (1, "vinted", "2025-06-01", 3),
    ]


def test_rows_are_corrected_without_triggers(old_database: str, old_connection: psycopg.Connection[Any]) -> None:
    """Promise 9: nulls, spellings, ids and types change with their columns; no trigger of theirs takes part in it."""
    old_connection.execute(f"""
        {FUNCTION.format(name="away", body="RETURN NULL;")};
        {FUNCTION.format(name="other", body="NEW.total_jobs := 99; RETURN NEW;")};
        DROP TABLE {S}.{OLD};
        CREATE TABLE {S}.{NEW} (id integer, action_type_id integer NOT NULL, marketplace text, date date NOT NULL,
            total_jobs bigint, success_count numeric, failure_count integer, avg_duration_ms float,
            created_at timestamp);
        INSERT INTO {S}.{NEW} VALUES
            (1, 1, ' EBAY ', '2025-06-01', NULL, 1.5, NULL, 2.5, NULL),
            (1, 2, NULL, '2025-06-02', 7, 2, 5, NULL, 'now');
        CREATE TRIGGER other BEFORE UPDATE ON {S}.{NEW} FOR EACH ROW EXECUTE FUNCTION public.other();
        CREATE RULE away AS ON UPDATE TO user_10.{OLD} DO INSTEAD DELETE FROM user_10.{OLD};
        ALTER TABLE user_10.{OLD} ALTER success_count DROP NOT NULL, DROP CONSTRAINT {OLD}_pkey""")
    alembic(old_database, "upgrade", "head")
    found = old_connection.execute(f"""
        SELECT id > 0, action_type_id, marketplace, total_jobs, success_count, failure_count, avg_duration_ms,
               created_at = '2025-06-01 00:00Z' FROM {S}.{NEW} ORDER BY action_type_id""").fetchall()
    assert found == [(True, 1, "ebay", 0, 2, 0, 3, True), (True, 2, "vinted", 7, 2, 5, None, False)]
    assert rows(old_connection, f"user_10.{NEW}") == [(1, "vinted", "2025-06-01", 3)]


def test_the_schemas_name_stands_only_for_the_schema(
    old_database: str, old_connection: psycopg.Connection[Any]
) -> None:
    """In a literal, in a longer name and in a column's name it is something else, and stays what it is."""
    old_connection.execute(f"""
        CREATE SCHEMA backup_{S}; CREATE SEQUENCE backup_{S}.s; CREATE TYPE {S}.mood AS ENUM ('good');
        ALTER TABLE {S}.{OLD} ADD mail text DEFAULT 'shop@{S}.com', ADD "{S}.x" integer DEFAULT 7,
              ADD other bigint DEFAULT nextval('backup_{S}.s'), ADD mood {S}.mood DEFAULT 'good'""")
    columns = shapes(old_database)[S].relations[OLD].columns
    assert columns["mail"].default == f"'shop@{S}.com'::text"
    assert columns[f"{S}.x"].default == "7"
    assert columns["other"].default == f"nextval('backup_{S}.s'::regclass)"
    assert (columns["mood"].type, columns["mood"].default) == ("mood", "'good'::mood")
    alembic(old_database, "upgrade", "head")
    insert = f"INSERT INTO {S}.{OLD} (action_type_id, date) VALUES (9, '2025-06-01')"
    old_connection.execute(insert)
    query = f"""SELECT mail, "{S}.x", other > 0, mood::text FROM {S}.{NEW} WHERE action_type_id = 9"""
    assert old_connection.execute(query).fetchall() == [(f"shop@{S}.com", 7, True, "good")]
    assert [line for line in drift_of(old_database) if "view" in line] == []


# ---- views ----


def test_a_repair_leaves_the_view_alone(old_database: str, old_connection: psycopg.Connection[Any]) -> None:
    """Views of theirs over it, its options, rights on single columns: nothing of it goes unless a type changes."""
    alembic(old_database, "upgrade", "head")
    old_connection.execute(f"""
        ALTER VIEW {S}.{OLD} SET (security_barrier = true); GRANT SELECT (date) ON {S}.{OLD} TO {RUN_ROLE};
        CREATE VIEW {S}.mine AS SELECT date FROM {S}.{OLD}; ALTER TABLE {S}.{NEW} DROP COLUMN p50_duration_ms;
        DROP INDEX {S}.ix_marketplace_job_stats_marketplace_created_at""")
    alembic(old_database, "upgrade", "head")
    assert drift_of(old_database) == []
    query = f"SELECT has_column_privilege('{RUN_ROLE}', '{S}.{OLD}', 'date', 'SELECT')"
    assert old_connection.execute(query).fetchall() == [(True,)]
    assert len(old_connection.execute(f"SELECT * FROM {S}.mine").fetchall()) == 1
    # Where it has to go it comes back with its options.
    old_connection.execute(f"DROP VIEW {S}.mine; ALTER VIEW {S}.{OLD} ALTER total_jobs DROP DEFAULT")
    alembic(old_database, "upgrade", "head")
    assert drift_of(old_database) == []
    assert shapes(old_database)[S].relations[OLD].options == ("security_barrier=true",)


def test_a_view_under_the_new_name(old_database: str, old_connection: psycopg.Connection[Any]) -> None:
    """One that plainly shows the old table gives way, and its rights go to the table; any other one is refused."""
    old_connection.execute(f"""
        CREATE VIEW {S}.{NEW} AS SELECT *, 'vinted'::varchar(20) AS marketplace FROM {S}.{OLD};
        GRANT SELECT, INSERT ON {S}.{NEW} TO {RUN_ROLE};
        CREATE VIEW user_10.{NEW} AS SELECT * FROM user_10.{OLD} WHERE total_jobs > 1""")
    output = alembic(old_database, "upgrade", "head", status=3)
    assert f"user_10: failed, with {OLD}: {NEW} is a view, and not plainly one of {OLD}; drop it" in output
    query = f"SELECT has_table_privilege('{RUN_ROLE}', '{S}.{NEW}', 'INSERT')"
    assert old_connection.execute(query).fetchall() == [(True,)]
    assert shapes(old_database)["user_10"].view(NEW)


def test_the_view_belongs_to_the_owner(old_database: str, old_connection: psycopg.Connection[Any]) -> None:
    """Else who owns the tables could not migrate the next time."""
    alembic(old_database, "upgrade", "head")
    old_connection.execute(f"ALTER VIEW {S}.{OLD} OWNER TO {RUN_ROLE}")
    assert "1 done" in alembic(old_database, "upgrade", "head")
    assert shapes(old_database)[S].relations[OLD].owner == "postgres"


def test_defaults_of_theirs_on_our_columns_stay(old_database: str, old_connection: psycopg.Connection[Any]) -> None:
    """Promise 6: in the view, whatever is repaired; and with a downgrade they are the table's again."""
    old_connection.execute(
        f"ALTER TABLE {S}.{OLD} ALTER date SET DEFAULT '2020-02-20', ALTER avg_duration_ms SET DEFAULT 5"
    )
    alembic(old_database, "upgrade", "head")
    old_connection.execute(f"ALTER VIEW {S}.{OLD} ALTER total_jobs DROP DEFAULT")  # So that the view is made again.
    alembic(old_database, "upgrade", "head")
    insert = f"INSERT INTO {S}.{OLD} (action_type_id) VALUES (%s) RETURNING date::text, avg_duration_ms, total_jobs"
    assert old_connection.execute(insert, [7]).fetchall() == [("2020-02-20", 5, 0)]
    assert drift_of(old_database) == []
    alembic(old_database, "downgrade", "base")
    assert old_connection.execute(insert, [8]).fetchall() == [("2020-02-20", 5, 0)]


# ---- columns ----


def test_columns_of_the_old_table_come_whole_into_the_new_one(
    old_database: str, old_connection: psycopg.Connection[Any]
) -> None:
    """With their defaults and comments; values that a generated column would swallow are refused."""
    old_connection.execute(f"""
        {BOTH}; ALTER TABLE {S}.{OLD} ADD note text DEFAULT 'theirs'; COMMENT ON COLUMN {S}.{OLD}.note IS 'why';
        {BOTH.replace(S, "user_10")}; ALTER TABLE user_10.{OLD} ADD note integer DEFAULT 5;
        ALTER TABLE user_10.{NEW} ADD note integer GENERATED ALWAYS AS (total_jobs * 2) STORED""")
    output = alembic(old_database, "upgrade", "head", status=3)
    assert f"user_10: failed, with {OLD} and {NEW}: column note is generated in {NEW}, and not in {OLD}" in output
    old_connection.execute(f"INSERT INTO {S}.{NEW} (action_type_id, date) VALUES (9, '2025-06-01')")
    query = (
        f"SELECT note, col_description('{S}.{NEW}'::regclass, attnum) FROM {S}.{NEW}, pg_attribute "
        f"WHERE attrelid = '{S}.{NEW}'::regclass AND attname = 'note' AND action_type_id = 9"
    )
    assert old_connection.execute(query).fetchall() == [("theirs", "why")]


def test_a_column_that_is_called_as_if_set_aside_stays(
    old_database: str, old_connection: psycopg.Connection[Any]
) -> None:
    """What a downgrade gives its name back is known by a comment, not by its name; their comment comes back, too."""
    old_connection.execute(f"""
        ALTER TABLE {S}.{OLD} ADD legacy_retry_count integer DEFAULT 1, ADD computed_at text DEFAULT 'x';
        COMMENT ON COLUMN {S}.{OLD}.computed_at IS 'by the counter'""")
    before = shapes(old_database)[S].relations[OLD]
    alembic(old_database, "upgrade", "head")
    assert f"{S}: {NEW}.legacy_retry_count is not in the models" in drift_of(old_database)
    alembic(old_database, "downgrade", "base")
    after = shapes(old_database)[S].relations[OLD]
    assert (after.columns, after.comments) == (before.columns, before.comments)


def test_what_a_repair_sets_aside_comes_back_in_the_same_command(
    old_database: str, old_connection: psycopg.Connection[Any]
) -> None:
    """A tenant that is recorded, whose old table was made again by others: repaired first, then taken back."""
    alembic(old_database, "upgrade", "head")
    old_connection.execute(f"""
        DROP TABLE {S}.{NEW} CASCADE;
        CREATE TABLE {S}.{OLD} (id serial PRIMARY KEY, action_type_id int NOT NULL, date date NOT NULL,
            total_jobs int NOT NULL DEFAULT 0, computed_at text DEFAULT 'theirs');
        INSERT INTO {S}.{OLD} (action_type_id, date) VALUES (1, '2025-06-01'), (1, '2025-06-01')""")
    output = alembic(old_database, "-x", "dry_run=yes", "downgrade", "base")
    assert "-- Then the way back, which is planned for what is there after this" in output
    alembic(old_database, "-x", "archive=yes", "downgrade", "base")
    found = old_connection.execute(f"SELECT action_type_id, computed_at FROM {S}.{OLD}").fetchall()
    assert found == [(1, "theirs")]
    assert old_connection.execute(f"SELECT count(*) FROM {S}.{ARCHIVE}").fetchall() == [(1,)]


@pytest.mark.parametrize("name", ["a\ttab", "two  blanks", f"{NEW}.x", "$proof$", "it's \\ 100%", "a, b AS c", 'a"b'])
def test_odd_names_of_columns(old_database: str, old_connection: psycopg.Connection[Any], name: str) -> None:
    """They go through every kind of statement: moved, shown, archived, taken back."""
    column = psycopg.sql.Identifier(name).as_string()
    old_connection.execute(f"{BOTH}; ALTER TABLE {S}.{OLD} ADD {column} text DEFAULT 'v'".encode())
    alembic(old_database, "upgrade", "head")
    assert [line for line in drift_of(old_database) if "view" in line] == []
    old_connection.execute(
        f"INSERT INTO {S}.{NEW} (action_type_id, date, marketplace) VALUES (2, '2025-06-01', 'ebay')"
    )
    alembic(old_database, "-x", "archive=yes", "downgrade", "base")
    assert old_connection.execute(f"SELECT {column} FROM {S}.{OLD}".encode()).fetchall() == [("v",)]
    alembic(old_database, "upgrade", "head")
    found = old_connection.execute(f"SELECT {column} FROM {S}.{NEW} ORDER BY marketplace".encode()).fetchall()
    assert found == [("v",), ("v",)]


def test_ids_of_a_strange_type_are_refused(old_database: str, old_connection: psycopg.Connection[Any]) -> None:
    """By name, and before anything is done."""
    old_connection.execute(f"""
        ALTER TABLE {S}.{OLD} DROP COLUMN id;
        ALTER TABLE {S}.{OLD} ADD id uuid PRIMARY KEY DEFAULT gen_random_uuid()""")
    output = alembic(old_database, "upgrade", "head", status=3)
    assert f"column id of {OLD} is of type uuid; change it to integer" in output


# ---- keys and sequences ----


def test_keys_of_other_kinds_are_found(old_database: str, old_connection: psycopg.Connection[Any]) -> None:
    """An exclusion by the old key would refuse eBay's rows; a check of theirs over more than ours stays."""
    old_connection.execute(f"""
        ALTER TABLE {S}.{OLD} DROP CONSTRAINT vinted_job_stats_action_type_id_date_key,
              ADD EXCLUDE USING btree (action_type_id WITH =, date WITH =), ADD note text, ADD marketplace text,
              ADD CONSTRAINT mine CHECK (marketplace <> 'etsy' OR note IS NOT NULL)""")
    alembic(old_database, "upgrade", "head")
    application.insert(old_connection, S, NEW, [OLD_ROW | {"marketplace": "ebay"}])
    assert [key.name for key in shapes(old_database)[S].relations[NEW].of_kind("c")] == [
        "ck_marketplace_job_stats_marketplace",
        "mine",
    ]


def test_not_null_that_was_never_validated(old_database: str, old_connection: psycopg.Connection[Any]) -> None:
    """PostgreSQL 18 has such constraints: there may be nulls, which become 0."""
    if old_connection.info.server_version < 180000:
        pytest.skip("from PostgreSQL 18 on")
    old_connection.execute(f"""
        ALTER TABLE {S}.{OLD} ALTER total_jobs DROP NOT NULL; UPDATE {S}.{OLD} SET total_jobs = NULL;
        ALTER TABLE {S}.{OLD} ADD CONSTRAINT later NOT NULL total_jobs NOT VALID""")
    alembic(old_database, "upgrade", "head")
    assert rows(old_connection, f"{S}.{NEW}") == [(1, "vinted", "2025-06-01", 0)]
    assert drift_of(old_database) == []


def test_sequences_that_lag_before_rows_move(old_database: str, old_connection: psycopg.Connection[Any]) -> None:
    """Rows that come in get ids from the new table's sequence or identity, which may lie behind after a restore."""
    old_connection.execute(f"""
        {BOTH}; UPDATE {S}.{NEW} SET id = 1 + (SELECT last_value FROM template_tenant.{OLD}_id_seq);
        {BOTH.replace(S, "user_10")}; ALTER TABLE user_10.{NEW} ALTER id DROP DEFAULT;
        ALTER TABLE user_10.{NEW} ALTER id ADD GENERATED BY DEFAULT AS IDENTITY; UPDATE user_10.{NEW} SET id = 1;
        UPDATE user_10.{OLD} SET action_type_id = 8""")
    alembic(old_database, "upgrade", "head")
    assert len(rows(old_connection, f"user_10.{NEW}")) == 2
    old_connection.execute(f"ALTER TABLE user_10.{NEW} ALTER id RESTART WITH 1")
    assert "1 done, 3 already there" in alembic(old_database, "upgrade", "head")
    application.insert(old_connection, "user_10", NEW, [OLD_ROW | {"action_type_id": 7}])


def test_an_archiving_downgrade_of_a_table_that_lost_its_key(
    old_database: str, old_connection: psycopg.Connection[Any]
) -> None:
    """Repaired first: duplicates go to the archive, then the rest; both lie there afterwards."""
    alembic(old_database, "upgrade", "head")
    old_connection.execute(f"ALTER TABLE {S}.{NEW} DROP CONSTRAINT uq_marketplace_job_stats_action_marketplace_date")
    ebay = OLD_ROW | {"marketplace": "ebay"}
    application.insert(old_connection, S, NEW, [OLD_ROW, ebay, ebay])
    alembic(old_database, "-x", "archive=yes", "downgrade", "base")
    reasons = f"SELECT reason, marketplace, count(*) FROM {S}.{ARCHIVE} GROUP BY 1, 2 ORDER BY 1, 2"
    assert old_connection.execute(reasons).fetchall() == [
        ("downgrade", "ebay", 1), ("duplicate", "ebay", 1), ("duplicate", "vinted", 1),
    ]  # fmt: skip


# ---- records, revisions, clones ----


def test_a_locked_version_table_is_a_locked_tenant(
    old_database: str, old_connection: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It costs that tenant alone; a locked template is named, and `current` says which ones are locked."""
    monkeypatch.setenv("STATS_LOCK_TIMEOUT_MS", "300")
    alembic(old_database, "upgrade", "head")
    with psycopg.connect(old_database) as other:
        other.execute(f"LOCK TABLE {S}.{VERSION} IN ACCESS EXCLUSIVE MODE")
        output = alembic(old_database, "upgrade", "head", status=3)
        assert "4 schemas: 0 done, 3 already there, 0 skipped, 1 failed" in output
        assert f"{S}: failed, not reached: a table is locked (SQLSTATE 55P03)" in output
        assert f"locked by another session, 1 schemas: {S}" in alembic(old_database, "current")
        other.execute(f"LOCK TABLE template_tenant.{VERSION} IN ACCESS EXCLUSIVE MODE")
        output = alembic(old_database, "upgrade", "head", status=1)
        assert f"template_tenant.{VERSION} is locked by another session: end it, or wait" in output


def test_a_part_of_theirs_is_no_clone(
    old_database: str, old_connection: psycopg.Connection[Any], releases: list[Release]
) -> None:
    """Without a record, a table or an index of theirs under a later name is no evidence; nothing is taken for ours."""
    old_connection.execute(f"""
        CREATE TABLE {S}.{TABLE} (mine text); INSERT INTO {S}.{TABLE} VALUES ('kept');
        CREATE INDEX ix_marketplace_job_stats_total ON user_10.{OLD} (total_jobs)""")
    output = releases[2].alembic(old_database, "upgrade head", status=3)
    assert f"{S}: failed" in output
    assert "a revision makes it, and it is there already: if it is yours, rename it" in output
    assert old_connection.execute(f"SELECT mine FROM {S}.{TABLE}").fetchall() == [("kept",)]
    assert shapes(old_database)[S].table(OLD)


def test_a_revision_between_that_has_lost_something(
    old_database: str, old_connection: psycopg.Connection[Any], releases: list[Release]
) -> None:
    """What the first and the last share is repaired; what only that revision can make is named, with the remedy."""
    third = releases[2]
    third.alembic(old_database, "upgrade 0003")
    old_connection.execute(f"""
        ALTER TABLE {S}.{NEW} DROP COLUMN retry_count, DROP COLUMN date CASCADE;
        ALTER TABLE user_1.{NEW} DROP COLUMN {COLUMN}; DROP TABLE user_10.{NEW} CASCADE""")
    old_connection.execute(f"ALTER TABLE {S}.{NEW} ADD date date NOT NULL DEFAULT '2025-06-01'")
    output = third.alembic(old_database, "upgrade head", status=3)
    assert "4 schemas: 2 done, 0 already there, 0 skipped, 2 failed" in output
    for tenant in ("user_1", "user_10"):
        assert f"{tenant}: failed" in output
        releases[1].alembic(old_database, f"-x tenant={tenant} upgrade head")
    assert output.count("repair it with the release whose newest one that is") == 2
    third.alembic(old_database, "upgrade head")
    assert "0 differences" in third.drift(old_database)


def test_a_revision_that_changes_a_type_under_the_view(
    old_database: str, old_connection: psycopg.Connection[Any], releases: list[Release], tmp_path: Any
) -> None:
    """It is plain all the same: the view gives way and comes back as it was, up and down, from either side."""
    folder = tmp_path / "project"
    shutil.copytree(releases[1].folder, folder)
    [revision] = (folder / "migrations" / "versions").glob("0003*.py")
    for way, type_ in (("upgrade", "BigInteger"), ("downgrade", "Integer")):
        change = f'    op.alter_column("{NEW}", "total_jobs", type_=sa.{type_}())'
        function = f"def {way}_tenant() -> None:"
        revision.write_text(revision.read_text().replace(function, f"{function}\n{change}"))
    models = folder / "models" / "stats.py"
    column = "total_jobs: Mapped[int] = mapped_column(\n        {}, "
    models.write_text(models.read_text().replace(column.format("Integer"), column.format("BigInteger")))
    release = Release(folder)
    releases[0].alembic(old_database, f"-x tenant={S} upgrade head")
    old_connection.execute(f"GRANT SELECT ON {S}.{OLD} TO {RUN_ROLE}")
    release.alembic(old_database, "upgrade head")
    assert "0 differences" in release.drift(old_database)
    for schema in (S, "user_1"):
        assert shapes(old_database)[schema].relations[NEW].columns["total_jobs"].type == "bigint"
    release.alembic(old_database, "downgrade 0002")
    assert shapes(old_database)[S].relations[OLD].columns["total_jobs"].type == "integer"
    assert (RUN_ROLE, "SELECT") in shapes(old_database)[S].relations[OLD].grants
    release.alembic(old_database, "upgrade head")
    release.alembic(old_database, "downgrade base")
    assert shapes(old_database)[S].table(OLD)
