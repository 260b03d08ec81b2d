"""Our own schema, `marketplace_stats`: one more target of the same history."""

from typing import Any

import psycopg
import pytest

from tests.conftest import url_of
from tests.migrations.common import alembic

SUMMARY = "marketplace_stats.marketplace_daily_summary"


def exists(connection: psycopg.Connection[Any], name: str) -> bool:
    row = connection.execute("SELECT to_regclass(%s) IS NOT NULL", [name]).fetchone()
    return row == (True,)


def versions(connection: psycopg.Connection[Any]) -> list[tuple[str]]:
    return connection.execute("SELECT version_num FROM marketplace_stats.marketplace_job_stats_version").fetchall()


def test_up_down_up(old_database: str, old_connection: psycopg.Connection[Any]) -> None:
    """The summary comes, goes and comes again, with its own version record; twice up does nothing."""
    alembic(old_database, "upgrade", "head")
    assert exists(old_connection, SUMMARY)
    assert versions(old_connection) == [("0002",)]
    oid = old_connection.execute("SELECT %s::regclass::oid", [SUMMARY]).fetchone()
    alembic(old_database, "upgrade", "head")
    assert old_connection.execute("SELECT %s::regclass::oid", [SUMMARY]).fetchone() == oid
    alembic(old_database, "downgrade", "base")
    assert not exists(old_connection, SUMMARY)
    assert versions(old_connection) == []
    alembic(old_database, "upgrade", "head")
    assert exists(old_connection, SUMMARY)


def test_it_is_left_alone_where_it_is_not_meant(old_database: str, old_connection: psycopg.Connection[Any]) -> None:
    """A dry run shows its statements and makes nothing; one tenant's migration does not touch it."""
    output = alembic(old_database, "-x", "dry_run=yes", "upgrade", "head")
    assert "CREATE SCHEMA marketplace_stats" in output
    assert "CREATE TABLE marketplace_daily_summary (" in output
    alembic(old_database, "-x", "tenant=user_2", "upgrade", "head")
    assert old_connection.execute("SELECT FROM pg_namespace WHERE nspname = 'marketplace_stats'").fetchall() == []


def test_something_else_of_its_name_is_refused(old_database: str, old_connection: psycopg.Connection[Any]) -> None:
    """Nothing of somebody else's is dropped, and the tenants are migrated all the same."""
    old_connection.execute(f"CREATE SCHEMA marketplace_stats; CREATE TABLE {SUMMARY} (date date, note text)")
    output = alembic(old_database, "upgrade", "head", status=3)
    assert "marketplace_stats: failed" in output
    assert "marketplace_daily_summary has another shape; drop it" in output
    assert "4 schemas: 4 done" in output
    assert old_connection.execute(f"SELECT note FROM {SUMMARY}").fetchall() == []


def test_the_runs_role_may_write_it(
    old_database: str, old_connection: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is granted with the rest, also where the table was there before the role."""
    alembic(old_database, "upgrade", "head")
    role = f"writer_{psycopg.conninfo.conninfo_to_dict(old_database)['dbname']}"
    old_connection.execute(f"CREATE ROLE {role} LOGIN")
    monkeypatch.setenv("MIGRATION_DATABASE_URL", url_of(old_database))
    runner = old_database.replace("user=postgres", f"user={role}")
    for _ in range(2):
        alembic(runner, "upgrade", "head")
        with psycopg.connect(runner) as connection:
            connection.execute(f"DELETE FROM {SUMMARY}")
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                connection.execute("CREATE TABLE marketplace_stats.x ()")
        old_connection.execute(f"DROP TABLE {SUMMARY}")
        alembic(runner, "downgrade", "base")
