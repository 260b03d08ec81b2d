"""How long the migration takes, next to the same DDL sent by a plain psql script; `make bench`.

    python -m tests.benchmarks.migration --tenants 10000 --rounds 1

Each round copies one database of old tenants for each candidate, and takes the candidates in another order. Times are
told as ratios to the script's in the same round; their medians count. The server has its default lock settings.
"""

import json
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import click
import psycopg
from rich.console import Console
from rich.table import Table

from migrations import converge
from migrations.shape import NEW, OLD, VERSION, read_shapes
from pipelines.database import create_engine
from pipelines.local import ROOT
from tests import application
from tests.conftest import create_database, run, url_of
from tests.server import binaries, running_server

RESULT = ROOT / ".local" / "bench-migration.json"


def make_tenants(conninfo: str, count: int) -> None:
    """The template and so many clones of its old table, each with a row."""
    with psycopg.connect(conninfo, autocommit=True) as connection:
        application.create_tenant(connection, application.TEMPLATE)
        connection.execute(f"""
            CREATE PROCEDURE make(count integer) LANGUAGE plpgsql AS $$
            BEGIN
                FOR n IN 1..count LOOP
                    EXECUTE format('CREATE SCHEMA user_%s', n);
                    EXECUTE format('CREATE TABLE user_%s.{OLD} (LIKE template_tenant.{OLD} INCLUDING ALL)', n);
                    EXECUTE format('INSERT INTO user_%s.{OLD} (action_type_id, date) VALUES (1, ''2025-06-01'')', n);
                    IF n % 100 = 0 THEN COMMIT; END IF;
                END LOOP;
            END $$""")
        connection.execute("CALL make(%s)", [count])
        connection.execute("DROP PROCEDURE make")
        connection.execute("ANALYZE")  # By itself, so that it does not keep the locks of all tables.


def write_script(conninfo: str, path: Path) -> None:
    """What an operator would send by hand: per tenant one transaction of the very same statements, and a record."""
    engine = create_engine(conninfo)
    with engine.connect() as connection, path.open("w") as script:
        names = connection.exec_driver_sql("SELECT nspname FROM pg_namespace WHERE nspname ~ '^(template_|user_)'")
        for shape in read_shapes(connection, list(names.scalars())).values():
            statements = [
                *converge.upgrade(shape, legacy_view=True).statements,
                f"CREATE TABLE {shape.schema}.{VERSION} (version_num varchar(32) PRIMARY KEY)",
                f"INSERT INTO {shape.schema}.{VERSION} VALUES ('0001')",
            ]
            script.write("BEGIN;\n" + ";\n".join(statements) + ";\nCOMMIT;\n")
    engine.dispose()


@contextmanager
def most_locks(conninfo: str, found: list[int]) -> Iterator[None]:
    """Appends the largest number of locks that one session was seen to hold."""
    stop, most = threading.Event(), 0

    def watch() -> None:
        nonlocal most
        with psycopg.connect(conninfo, autocommit=True) as connection:
            query = "SELECT max(n) FROM (SELECT count(*) AS n FROM pg_locks WHERE pid <> pg_backend_pid() GROUP BY pid)"
            while not stop.is_set():
                row = connection.execute(f"{query} AS per_session").fetchone()
                most = max(most, (row and row[0]) or 0)
                time.sleep(0.1)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        found.append(most)


def timed(work: Callable[[], object]) -> float:
    """Seconds."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


@click.command(help=__doc__)
@click.option("--tenants", default=1_000, show_default=True, help="How many tenants.")
@click.option("--rounds", default=3, show_default=True, help="How many rounds.")
def main(tenants: int, rounds: int) -> None:
    seconds: dict[str, list[float]] = {}
    locks: list[int] = []
    with running_server(fsync="on") as server:
        click.echo(f"Making {tenants} tenants")
        source = create_database(server, "source")
        make_tenants(source, tenants)
        folder = Path(psycopg.conninfo.conninfo_to_dict(server)["host"])  # type: ignore[arg-type]
        script = folder / "migrate.sql"
        write_script(source, script)
        for number in range(rounds):
            by_script, by_us = (create_database(server, f"{name}_{number}", "source") for name in ("script", "ours"))

            def psql(conninfo: str = by_script) -> None:
                command = [str(binaries() / "psql"), "-qX", "-v", "ON_ERROR_STOP=1", "-f", str(script), conninfo]
                subprocess.run(command, check=True)

            def alembic(*arguments: str, conninfo: str = by_us) -> None:
                with most_locks(conninfo, locks):
                    run("alembic", *arguments, environment={"DATABASE_URL": url_of(conninfo)})

            candidates: list[tuple[str, Callable[[], object]]] = [
                ("psql script", psql),
                ("up", lambda: alembic("upgrade", "head")),
            ]
            for name, work in candidates if number % 2 else reversed(candidates):
                seconds.setdefault(name, []).append(timed(work))
            seconds.setdefault("nothing to do", []).append(timed(lambda: alembic("upgrade", "head")))
            seconds.setdefault("down", []).append(timed(lambda: alembic("downgrade", "base")))
            click.echo(f"Round {number + 1} of {rounds} done")
            with psycopg.connect(by_us) as connection:
                found = connection.execute("SELECT count(*) FROM pg_class WHERE relname = %s", [NEW]).fetchone()
                assert found == (0,), "the downgrade left tables behind"

    rows = []
    for name, values in seconds.items():
        ratios = [value / script for value, script in zip(values, seconds["psql script"], strict=True)]
        median = statistics.median(values)
        rows.append(
            {
                "what": name,
                "seconds": round(median, 2),
                "ms_per_tenant": round(1000 * median / (tenants + 1), 2),
                "ratio_to_script": round(statistics.median(ratios), 2),
            }
        )
    table = Table(title=f"{tenants} tenants, medians of {rounds} rounds; at most {max(locks)} locks in one session")
    for column in rows[0]:
        table.add_column(column.replace("_", " "), justify="left" if column == "what" else "right")
    for row in sorted(rows, key=lambda row: str(row["what"])):
        table.add_row(*map(str, row.values()))
    Console().print(table)
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(
        json.dumps({"tenants": tenants, "rounds": rounds, "most_locks": max(locks), "rows": rows}, indent=1)
    )
    click.echo(f"Also in {RESULT}")


if __name__ == "__main__":
    main()
