"""How long the migration takes, next to the same DDL sent by plain psql sessions; `make bench`.

    python -m tests.benchmarks.migration --tenants 10000 --rounds 1

Each round copies one database of old tenants for each candidate, and takes the candidates in another order. Times are
ratios to those of psql in the same round: one session that waits for the disk at each tenant, and four at once that do
not. Their medians count. The server has its default lock settings.
"""

import itertools
import json
import os
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import click
import psycopg
from rich.console import Console
from rich.table import Table

from migrations.shape import OLD
from pipelines.local import ROOT
from tests import application
from tests.conftest import create_database, run, url_of
from tests.server import binaries, running_server

SESSIONS = 4
ONE, FOUR = "one psql session", "four psql sessions, asynchronous"
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


def write_scripts(conninfo: str, folder: Path) -> list[Path]:
    """What an operator would send by hand: per tenant one transaction of the very same statements, and a record.

    The first script has all of it, the others a part each.
    """
    dry_run = run("alembic", "-x", "dry_run=yes", "upgrade", "head", environment={"DATABASE_URL": url_of(conninfo)})
    transactions = [f"BEGIN;{text}" for text in dry_run.stdout.partition("BEGIN;")[2].split("BEGIN;")]
    transactions[-1] = transactions[-1].partition("\nDry run")[0]
    parts = [transactions[number::SESSIONS] for number in range(SESSIONS)]
    paths = []
    for number, part in enumerate([transactions, *parts]):
        paths.append(folder / f"migrate_{number}.sql")
        paths[-1].write_text("\n".join(part))
    return paths


@contextmanager
def reader(conninfo: str, tenants: int, found: list[float]) -> Iterator[None]:
    """Reads the tenants one after the other meanwhile; appends the longest time, in milliseconds."""
    stop = threading.Event()

    def read() -> None:
        longest = 0.0
        with psycopg.connect(conninfo, autocommit=True) as connection:
            for number in itertools.cycle(range(1, tenants + 1)):
                if stop.is_set():
                    break
                start = time.perf_counter()
                connection.execute(f"SELECT sum(total_jobs) FROM user_{number}.{OLD}")
                longest = max(longest, time.perf_counter() - start)
        found.append(1000 * longest)

    thread = threading.Thread(target=read)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


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


def timed(work: Callable[..., object], *arguments: str) -> float:
    """Seconds."""
    start = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - start


@click.command(help=__doc__)
@click.option("--tenants", default=1_000, show_default=True, help="How many tenants.")
@click.option("--rounds", default=3, show_default=True, help="How many rounds.")
def main(tenants: int, rounds: int) -> None:
    seconds: dict[str, list[float]] = {}
    locks: list[int] = []
    waits: list[float] = []
    with running_server(fsync="on") as server:
        click.echo(f"Making {tenants} tenants")
        source = create_database(server, "source")
        make_tenants(source, tenants)
        folder = Path(psycopg.conninfo.conninfo_to_dict(server)["host"])  # type: ignore[arg-type]
        whole, *parts = write_scripts(source, folder)

        def psql(conninfo: str, scripts: Sequence[Path], **environment: str) -> None:
            command = [str(binaries() / "psql"), "-qX", "-v", "ON_ERROR_STOP=1", "-o", "/dev/null", conninfo, "-f"]
            running = [
                subprocess.Popen([*command, str(script)], env={"PATH": os.environ["PATH"], **environment})
                for script in scripts
            ]
            assert [process.wait() for process in running] == [0] * len(scripts)

        def alembic(conninfo: str, *arguments: str) -> None:
            with most_locks(conninfo, locks):
                run("alembic", *arguments, environment={"DATABASE_URL": url_of(conninfo)})

        def fresh(name: str) -> str:
            """A copy of the database; the pages that it has made dirty are not this candidate's to write."""
            conninfo = create_database(server, name, "source")
            with psycopg.connect(conninfo, autocommit=True) as connection:
                connection.execute("CHECKPOINT")
            return conninfo

        asynchronous = {"PGOPTIONS": "-c synchronous_commit=off"}
        candidates: list[tuple[str, str, Callable[[str], object]]] = [
            (ONE, "one", lambda conninfo: psql(conninfo, [whole])),
            (FOUR, "four", lambda conninfo: psql(conninfo, parts, **asynchronous)),
            ("up", "ours", lambda conninfo: alembic(conninfo, "upgrade", "head")),
        ]
        for number in range(rounds):
            for name, database, work in candidates if number % 2 else reversed(candidates):
                conninfo = fresh(f"{database}_{number}")
                seconds.setdefault(name, []).append(timed(work, conninfo))
            ours = f"{server} dbname=ours_{number}"
            seconds.setdefault("nothing to do", []).append(timed(alembic, ours, "upgrade", "head"))
            seconds.setdefault("down", []).append(timed(alembic, ours, "downgrade", "base"))
            with reader(ours, tenants, waits):
                alembic(ours, "upgrade", "head")
            click.echo(f"Round {number + 1} of {rounds} done")

    def ratio(values: list[float], name: str) -> float:
        return round(statistics.median(v / other for v, other in zip(values, seconds[name], strict=True)), 2)

    rows = [
        {
            "what": name,
            "seconds": round(statistics.median(values), 2),
            "ms_per_tenant": round(1000 * statistics.median(values) / (tenants + 1), 2),
            "ratio_to_one_session": ratio(values, ONE),
            "ratio_to_four": ratio(values, FOUR),
        }
        for name, values in seconds.items()
    ]
    table = Table(
        title=f"{tenants} tenants, medians of {rounds} rounds; at most {max(locks)} locks in one session; "
        f"one who reads tenant after tenant waited for {max(waits):.0f} ms at most"
    )
    for column in rows[0]:
        table.add_column(column.replace("_", " "), justify="left" if column == "what" else "right")
    for row in sorted(rows, key=lambda row: str(row["what"])):
        table.add_row(*map(str, row.values()))
    Console().print(table)
    RESULT.parent.mkdir(exist_ok=True)
    measured = {"most_locks": max(locks), "longest_wait_ms": max(waits), "rows": rows}
    RESULT.write_text(json.dumps({"tenants": tenants, "rounds": rounds} | measured, indent=1))
    click.echo(f"Also in {RESULT}")


if __name__ == "__main__":
    main()
