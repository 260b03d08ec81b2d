"""Worlds at random: shapes, rows, roles, kills and revisions, crossed; and a model of what must not be lost.

The model knows nothing of the migration's statements. It follows each row by a mark in a column of theirs, or by its
numbers where there is none: after every command each row that was there is in the stats, under the old name, or in the
archive, with all its values; every column that was theirs is there with its values; grants are as they were; the
record names one revision; and what is recorded at the head is what the models say.

    python -m tests.migrations.worlds --cases 2000
"""

import os
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import click
import psycopg

from migrations.shape import ARCHIVE, LEDGER, NEW, OLD, VERSION
from tests import application
from tests.conftest import create_database
from tests.migrations.common import alembic, drift_of
from tests.server import running_server

MARKETPLACES = ("vinted", "ebay", "etsy")
TENANTS = ("user_1", "user_2", "user_3")
COLUMNS = ("action_type_id", "date", "total_jobs", "success_count", "failure_count", "avg_duration_ms")

THEIRS = ("note", "computed_at", "retry_count", "Odd, name", "a\ttab  $proof$")
"""Columns of theirs: two are called as ours."""

# A benign one, as people have them for a column that says when a row was changed; and one that would lose rows.
TRIGGERS = (
    "NEW.success_count := 99; RETURN NEW;",
    "RETURN NULL;",
)

KILL = """
    CREATE FUNCTION public.fault() RETURNS event_trigger LANGUAGE plpgsql AS $$
    BEGIN
        IF random() < 0.08 THEN PERFORM pg_terminate_backend(pg_backend_pid()); END IF;
    END $$;
    CREATE EVENT TRIGGER fault ON ddl_command_end EXECUTE FUNCTION public.fault()"""


Migrate = Callable[..., str]
"""Runs Alembic on a conninfo with arguments, whatever its exit status; returns what it prints."""


def here(conninfo: str, *arguments: str) -> str:
    """In this process: much quicker, and always the release at hand."""
    return alembic(conninfo, *arguments, status=None)


@dataclass
class World:
    """A database, what was done to it, and what it held before."""

    conninfo: str
    connection: psycopg.Connection[Any]
    random: random.Random
    releases: Sequence[Migrate]
    owner: str | None  # Whom all belongs to, if not to the superuser.
    log: list[str] = field(default_factory=list)
    refused: int = 0

    def migrate(self, release: Migrate, *command: str) -> str:
        """What it prints; as the superuser, or as the owner, if there is one."""
        role = self.random.choice(("postgres", self.owner)) if self.owner else "postgres"
        self.log.append(f"{' '.join(command)} as {role} by {self.releases.index(release)}")
        return release(self.conninfo.replace("user=postgres", f"user={role}"), *command)

    def execute(self, statement: str) -> None:
        self.log.append(statement)
        self.connection.execute(statement.encode())

    def some(self, chance: float) -> bool:
        return self.random.random() < chance


def make(world: World, schema: str) -> None:
    """One tenant of a shape that is met, or that somebody may have made."""
    pick = world.random.choice
    world.connection.execute(f"CREATE SCHEMA {schema}")
    how = pick(("clone", "own", "own", "renamed", "both", "both", "missing"))
    if how == "missing":
        return
    if how == "clone":
        world.execute(f"CREATE TABLE {schema}.{OLD} (LIKE template_tenant.{OLD} INCLUDING ALL)")
    else:
        number = pick(("integer", "bigint", "smallint", "numeric"))
        lines = [
            pick(
                (
                    "id serial PRIMARY KEY",
                    "id bigserial PRIMARY KEY",
                    "id integer",
                    "id int GENERATED ALWAYS AS IDENTITY",
                )
            ),
            f"action_type_id {pick(('integer', 'bigint'))} NOT NULL",
            "date date NOT NULL",
            f"total_jobs {number} NOT NULL DEFAULT 0",
            f"success_count integer {pick(('', 'NOT NULL DEFAULT 0'))}",
            f"failure_count {number}",
            f"avg_duration_ms {pick(('integer', 'double precision'))}",
            f"created_at {pick(('timestamptz NOT NULL DEFAULT now()', 'timestamp', 'timestamptz'))}",
        ]
        world.random.shuffle(lines)
        world.execute(f"CREATE TABLE {schema}.{OLD} ({', '.join(lines)})")
        key = pick(("", "UNIQUE (action_type_id, date)", "CONSTRAINT mine UNIQUE (date, action_type_id)", "index"))
        if key == "index":
            world.execute(f'CREATE UNIQUE INDEX "a key" ON {schema}.{OLD} (action_type_id, date)')
        elif key:
            world.execute(f"ALTER TABLE {schema}.{OLD} ADD {key}")
    theirs(world, schema, OLD)
    rows(world, schema, OLD, is_new=False)
    if how == "renamed":
        world.execute(f"ALTER TABLE {schema}.{OLD} RENAME TO {NEW}")
        if world.some(0.5):
            world.execute(f"ALTER TABLE {schema}.{NEW} ADD marketplace varchar(50) {pick(('', 'DEFAULT $$vinted$$'))}")
    if how == "both":
        world.execute(f"""
            CREATE TABLE {schema}.{NEW} (id serial {pick(("", "PRIMARY KEY"))}, action_type_id int NOT NULL,
                date date NOT NULL, total_jobs integer NOT NULL DEFAULT 0, success_count integer,
                failure_count integer, avg_duration_ms integer, marketplace varchar(20) DEFAULT 'vinted')""")
        theirs(world, schema, NEW)
        rows(world, schema, NEW, is_new=True)
    for table in (OLD, NEW):
        if exists(world, schema, table) and world.some(0.2):
            world.execute(f"ALTER TABLE {schema}.{table} SET UNLOGGED")
    if world.some(0.3):
        for table in (OLD, NEW):
            if exists(world, schema, table):
                world.execute(f"GRANT SELECT, UPDATE ON {schema}.{table} TO reader")


def theirs(world: World, schema: str, table: str) -> None:
    """Columns of somebody else's, some under our names."""
    for name in THEIRS:
        # In a table under the new name ours and theirs can be distinguished only by what is beside them.
        if world.some(0.3) and not (table == NEW and name in ("computed_at", "retry_count")):
            default = f" DEFAULT '{schema}.x'" if world.some(0.2) else ""
            world.execute(f"""ALTER TABLE {schema}.{table} ADD "{name}" text{default}""")
    if world.some(0.1):
        world.execute(f"ALTER TABLE {schema}.{table} ALTER date SET DEFAULT CURRENT_DATE")
    if world.some(0.15) and len(world.releases) == 1:  # A revision may well update rows.
        body = world.random.choice(TRIGGERS)
        world.execute(f"""
            CREATE OR REPLACE FUNCTION {schema}.f() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN {body} END $$;
            CREATE TRIGGER f BEFORE UPDATE ON {schema}.{table} FOR EACH ROW EXECUTE FUNCTION {schema}.f()""")


def rows(world: World, schema: str, table: str, *, is_new: bool) -> None:
    """Rows that may meet under one key where nothing forbids it."""
    extra = [name for name in THEIRS if name in columns(world, schema, table)]
    for _ in range(world.random.randint(0, 6)):
        values: dict[str, Any] = {
            "action_type_id": world.random.randint(1, 2),
            "date": f"2025-06-0{world.random.randint(1, 2)}",
            "total_jobs": world.random.randint(0, 9),
            "success_count": world.random.choice((None, 3)),
            "failure_count": world.random.choice((None, 4)),
            "avg_duration_ms": world.random.choice((None, 1234)),
        }
        if is_new:
            values["marketplace"] = world.random.choice(MARKETPLACES)
        values |= {name: f"{name} {world.random.random()}" for name in extra}
        names = ", ".join(f'"{name}"' for name in values)
        marks = ", ".join(["%s"] * len(values))
        try:
            world.connection.execute(f"INSERT INTO {schema}.{table} ({names}) VALUES ({marks})", list(values.values()))
        except (psycopg.errors.UniqueViolation, psycopg.errors.NotNullViolation):
            continue


def exists(world: World, schema: str, table: str) -> bool:
    row = world.connection.execute("SELECT to_regclass(%s) IS NOT NULL", [f"{schema}.{table}"]).fetchone()
    return bool(row and row[0])


def columns(world: World, schema: str, table: str) -> dict[str, str]:
    """The columns of a relation with their types."""
    found = world.connection.execute(
        "SELECT attname, format_type(atttypid, NULL) FROM pg_attribute "
        "WHERE attrelid = to_regclass(%s) AND attnum > 0 AND NOT attisdropped ORDER BY attnum",
        [f"{schema}.{table}"],
    ).fetchall()
    return {row[0]: row[1] for row in found}


def is_table(world: World, schema: str, table: str) -> bool:
    query = "SELECT relkind IN ('r') FROM pg_class WHERE oid = to_regclass(%s)"
    row = world.connection.execute(query, [f"{schema}.{table}"]).fetchone()
    return bool(row and row[0])


def held(world: World, schema: str) -> Counter[tuple[str, ...]]:
    """Every row of a tenant, in whatever table it lies: marketplace, the old table's numbers, and theirs, as texts."""
    found: Counter[tuple[str, ...]] = Counter()
    for table in (OLD, NEW, ARCHIVE):
        if not is_table(world, schema, table):
            continue
        there = columns(world, schema, table)
        marketplace = "lower(btrim(coalesce(marketplace, 'vinted')))" if "marketplace" in there else "'vinted'"
        numbers = [
            f"round(coalesce({name}, {0 if name.endswith(('jobs', 'count')) else -1})::numeric)::text"
            if name != "date"
            else "date::text"
            for name in COLUMNS
        ]
        # Theirs are texts, whatever they are called by now.
        own = [
            next((each for each in (f"legacy_{name}", name) if there.get(each) == "text"), name + " is not there")
            for name in THEIRS
        ]
        texts = [f'"{name}"::text' if name in there else "NULL" for name in own]
        selected = ", ".join([marketplace, *numbers, *(f"coalesce({text}, '-')" for text in texts)])
        for row in world.connection.execute(f"SELECT {selected} FROM {schema}.{table}"):
            found[tuple(row)] += 1
    return found


def grants(world: World, schema: str) -> set[str]:
    """What the reader may do under the old name."""
    if not exists(world, schema, OLD):
        return set()
    return {
        privilege
        for privilege in ("SELECT", "UPDATE")
        for row in world.connection.execute(
            "SELECT has_table_privilege('reader', %s, %s)", [f"{schema}.{OLD}", privilege]
        ).fetchall()
        if row[0]
    }


def act(world: World) -> str | None:
    """One command, perhaps with backends that die in it, or something that somebody does meanwhile; what it was."""
    pick = world.random.choice
    if world.some(0.25):
        schema = pick(TENANTS)
        if is_table(world, schema, NEW) and exists(world, schema, VERSION):
            index = "ix_marketplace_job_stats_marketplace_created_at"
            statement = pick(
                (
                    f"DROP INDEX IF EXISTS {schema}.{index}",
                    f"ALTER TABLE {schema}.{NEW} DROP COLUMN IF EXISTS duration_sum_ms",
                    f"ALTER TABLE {schema}.{NEW} ALTER success_count DROP NOT NULL",
                    f"ALTER TABLE {schema}.{NEW} ADD COLUMN IF NOT EXISTS note text",
                    f"DROP VIEW IF EXISTS {schema}.{OLD}" if not is_table(world, schema, OLD) else "SELECT 1",
                    f"DROP TABLE IF EXISTS {schema}.{LEDGER}",
                    f"ALTER TABLE {schema}.{NEW} DROP CONSTRAINT IF EXISTS "
                    "uq_marketplace_job_stats_action_marketplace_date",
                    f"UPDATE {schema}.{NEW} SET computed_at = now()"
                    if "computed_at" in columns(world, schema, NEW)
                    else "SELECT 1",
                )
            )
            world.execute(statement)
            return None
    kills = world.some(0.3)
    if kills:
        world.connection.execute(KILL.encode())
    command = pick((
        ("upgrade", "head"), ("upgrade", "head"), ("upgrade", "+1"), ("-x", "archive=yes", "downgrade", "base"),
        ("downgrade", "base"), ("-x", "dry_run=yes", "upgrade", "head"), ("-x", "legacy_view=no", "upgrade", "head"),
        ("-x", f"tenant={pick(TENANTS)}", "upgrade", "head"), ("downgrade", "-1"),
    ))  # fmt: skip
    try:
        world.migrate(pick(world.releases), *command)
    finally:
        if kills:
            world.connection.execute("DROP EVENT TRIGGER fault; DROP FUNCTION public.fault()")
    return " ".join(command)


def check(
    world: World, before: dict[str, Counter[tuple[str, ...]]], readers: dict[str, set[str]], command: str
) -> None:
    """Nothing is lost: rows, columns, grants, records."""
    for schema in TENANTS:
        after = held(world, schema)
        assert after == before[schema], (schema, before[schema] - after, after - before[schema])
        if "legacy_view=no" not in command and exists(world, schema, OLD) and readers[schema]:
            assert grants(world, schema) >= readers[schema], (schema, readers[schema])
        if exists(world, schema, VERSION):
            row = world.connection.execute(f"SELECT count(*) FROM {schema}.{VERSION}").fetchone()
            assert row in ((0,), (1,)), schema


def play(conninfo: str, seed: int, releases: Sequence[Migrate]) -> World:
    """One case: tenants, then commands with a check after each; at the end all of them at the head, without drift."""
    with psycopg.connect(conninfo, autocommit=True) as connection:
        world = World(conninfo, connection, random.Random(seed), releases, "owner" if seed % 2 else None)
        application.create_tenant(connection, application.TEMPLATE)
        for schema in TENANTS:
            make(world, schema)
        if world.owner:
            give(world, world.owner)
        try:
            for _ in range(world.random.randint(1, 2)):
                before = {schema: held(world, schema) for schema in TENANTS}
                readers = {schema: grants(world, schema) for schema in TENANTS}
                if command := act(world):
                    check(world, before, readers, command)
            before = {schema: held(world, schema) for schema in TENANTS}
            newest = releases[-1]
            output = world.migrate(newest, "upgrade", "head")
            check(world, before, {schema: set() for schema in TENANTS}, "")
            world.refused = output.count(": failed, ")
            if not world.refused:
                if newest is here:
                    assert [line for line in drift_of(conninfo) if not line.endswith("is not in the models")] == []
                output = world.migrate(newest, "upgrade", "head")
                assert f"0 done, {1 + len(TENANTS)} already there" in output, output
                assert owners(world) <= {world.owner or "postgres"}
        except Exception as error:
            raise AssertionError(f"case {seed}: {error}\n" + "\n".join(world.log)) from error
        return world


def give(world: World, owner: str) -> None:
    """The schemas and what is in them belong to a role of their own."""
    database = psycopg.conninfo.conninfo_to_dict(world.conninfo)["dbname"]
    world.connection.execute(f"GRANT CREATE ON DATABASE {database} TO {owner}")
    for schema in ("template_tenant", *TENANTS):
        world.connection.execute(f"ALTER SCHEMA {schema} OWNER TO {owner}")
        for table in (OLD, NEW):
            if exists(world, schema, table):
                world.connection.execute(f"ALTER TABLE {schema}.{table} OWNER TO {owner}")


def owners(world: World) -> set[str]:
    """Whom our tables belong to."""
    found = world.connection.execute(
        "SELECT relowner::regrole::text FROM pg_class WHERE relname = ANY (%s)", [[OLD, NEW, LEDGER, ARCHIVE, VERSION]]
    ).fetchall()
    return {row[0] for row in found}


def create_roles(server: str) -> None:
    """The roles that all worlds of a server share."""
    with psycopg.connect(f"{server} dbname=postgres", autocommit=True) as connection:
        if not connection.execute("SELECT FROM pg_roles WHERE rolname = 'reader'").fetchall():
            connection.execute("CREATE ROLE reader; CREATE ROLE owner LOGIN")


def play_all(server: str, seeds: Sequence[int], releases: Sequence[Migrate] = (here,)) -> tuple[int, int]:
    """How many cases were played, and how many tenants were refused in the end; raises at the first loss."""
    refused = 0
    conninfo = create_database(server, f"worlds_{seeds[0]}")
    schemas = ", ".join(("template_tenant", "marketplace_stats", *TENANTS))
    for seed in seeds:
        with psycopg.connect(conninfo, autocommit=True) as connection:  # Quicker than a new database.
            connection.execute(f"DROP SCHEMA IF EXISTS {schemas} CASCADE")
        refused += play(conninfo, seed, releases).refused
    return len(seeds), refused


@click.command(help=__doc__)
@click.option("--cases", default=1_000, show_default=True, help="How many cases.")
@click.option("--first", default=1_000, show_default=True, help="The first case's number.")
def main(cases: int, first: int) -> None:
    os.environ["STATS_LOCK_TIMEOUT_MS"] = "50"  # Who is killed is not tried for long.
    with running_server() as server:
        create_roles(server)
        with click.progressbar(range(first, first + cases), label="Playing") as seeds:
            played, refused = play_all(server, list(seeds))
    click.echo(f"{played} cases of {len(TENANTS)} tenants played: 0 lost; {refused} tenants refused in the end")


if __name__ == "__main__":
    main()
