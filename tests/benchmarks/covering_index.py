"""What the optional covering index costs the application, and what it gains a run.

    python -m tests.benchmarks.covering_index --tenants 100 --jobs 10000 --rounds 7

Two copies of one database, one of them with the index, take turns, each round in another order. Everything is told as
the ratio of the indexed copy to the other in the same round; the medians count. Writes are timed inside the server,
each in a transaction of its own, so no round trip dilutes what they cost.
"""

import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import click
import psycopg
import pytest
import sqlalchemy as sa

from assets.marketplace_job_stats.transaction import ComputeSpec, write_tenant
from pipelines.covering_index.index import KEY, NAME
from pipelines.covering_index.tenants import Action, carry_out
from pipelines.partitions import Days, Window, day_partitions
from pipelines.resources import TenantDatabase
from pipelines.settings import Settings
from pipelines.tenants import choose_tenants, quoted
from tests.benchmarks import data
from tests.benchmarks.candidates import aggregate
from tests.conftest import create_database, url_of
from tests.server import running_server

# What happens to a job, one statement for each row; IDS is put in.
WRITES = {
    "insert a pending job": "INSERT INTO user_1.marketplace_jobs (id, marketplace, action_type_id, status, input_data) "
    "VALUES (n, 'vinted', 1, 'pending', '{\"product\": 1234567}')",
    "start it": "UPDATE user_1.marketplace_jobs SET status = 'running', started_at = clock_timestamp() WHERE id = n",
    "note its progress": "UPDATE user_1.marketplace_jobs SET result_data = '{\"step\": 2}' WHERE id = n",
    "count a retry": "UPDATE user_1.marketplace_jobs SET retry_count = retry_count + 1 WHERE id = n",
    "complete it": "UPDATE user_1.marketplace_jobs SET status = 'completed', completed_at = clock_timestamp() "
    "WHERE id = n",
}
WITHOUT, WITH = "without", "with"


def runs(conninfo: str, count: int, bare: bool) -> float:
    """Seconds for the last `count` days of all tenants, as a run takes them; `bare`: the SELECT alone."""
    partitions = day_partitions(Settings.from_env({}))
    keys = [str(data.LAST - timedelta(days=n)) for n in reversed(range(count))]
    spec = ComputeSpec(Window.of(partitions, keys), "benchmark", Days(partitions))
    database = TenantDatabase(workers=2, lock_timeout_ms=10_000, statement_timeout_ms=1_800_000)

    def work(connection: sa.Connection, schema: str) -> None:
        if not bare:
            write_tenant(connection, schema, spec, has_tasks=True)
            return
        with connection.begin():
            connection.exec_driver_sql(aggregate(schema), spec.window.parameters).all()

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DATABASE_URL", url_of(conninfo))
        with database.connect() as (engine, sentinel):
            with sentinel.begin():
                schemas = [tenant.schema for tenant in choose_tenants(sentinel)]
            start = time.perf_counter()
            for schema, outcome in database.for_each(engine, schemas, work):
                if isinstance(outcome, Exception):
                    raise RuntimeError(schema) from outcome
            return time.perf_counter() - start


def writes(conninfo: str, ids: range) -> Iterator[tuple[str, float]]:
    """Seconds, bytes of log and the share of HOT updates of each kind of write, over so many new jobs."""
    with psycopg.connect(conninfo, autocommit=True) as connection:
        for name, statement in WRITES.items():
            connection.execute("CHECKPOINT")  # So that no copy has more whole pages to log than the other.
            before = _counters(connection)
            connection.execute(
                f"DO $$ BEGIN FOR n IN {ids.start}..{ids.stop - 1} LOOP {statement}; COMMIT; END LOOP; END $$".encode()
            )
            after = _counters(connection)
            spent = {key: after[key] - before[key] for key in before}
            yield f"{name}: time", spent["seconds"]
            yield f"{name}: log", spent["bytes"]
            if statement.startswith("UPDATE"):
                yield f"{name}: HOT share", spent["hot"] / spent["updates"]


def _counters(connection: psycopg.Connection[Any]) -> dict[str, float]:
    connection.execute("SELECT pg_stat_force_next_flush()")
    row = connection.execute("""
        SELECT n_tup_upd, n_tup_hot_upd, pg_wal_lsn_diff(pg_current_wal_insert_lsn(), '0/0') FROM pg_stat_user_tables
         WHERE schemaname = 'user_1' AND relname = 'marketplace_jobs'""").fetchone()
    assert row
    return {
        "updates": row[0],
        "hot": row[1],
        "bytes": float(row[2]),
        "seconds": time.perf_counter(),
    }


def size_and_build(conninfo: str, jobs: int) -> None:
    """Builds it as the command does, and says how large it is and how long it took."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DATABASE_URL", url_of(conninfo))
        start = time.perf_counter()
        carry_out(Action.build, [], click.echo)
        built_s = time.perf_counter() - start
        carry_out(Action.show, [], click.echo)
    with psycopg.connect(conninfo, autocommit=True) as connection:
        sizes = {
            name: connection.execute(
                "SELECT sum(pg_relation_size(indexrelid)), sum(pg_relation_size(indrelid)) FROM pg_index "
                "JOIN pg_class c ON c.oid = indexrelid WHERE relname LIKE %s",
                [name],
            ).fetchone()
            or (0, 0)
            for name in (NAME, "marketplace_jobs_pkey")
        }
        index, table = sizes[NAME]
        click.echo(
            f"Size: {index / jobs:.1f} MB per million jobs; to the table {index / table:.3f}; "
            f"to its primary key {index / sizes['marketplace_jobs_pkey'][0]:.2f}"
        )
        start = time.perf_counter()
        schemas = [row[0] for row in connection.execute("SELECT nspname FROM pg_namespace WHERE nspname ~ '^user_'")]
        for schema in schemas:
            connection.execute(f"CREATE INDEX CONCURRENTLY plain ON {quoted(schema)}.marketplace_jobs ({KEY})".encode())
        plain_s = time.perf_counter() - start
        for schema in schemas:
            connection.execute(f"DROP INDEX {quoted(schema)}.plain".encode())
    click.echo(
        f"Build: {built_s / plain_s:.2f} of the time of a plain concurrent index on {KEY} ({built_s:.1f} s in all)"
    )


@click.command(help=__doc__)
@click.option("--tenants", default=100, show_default=True)
@click.option("--jobs", default=10_000, show_default=True)
@click.option("--rounds", default=7, show_default=True)
@click.option("--rows", default=3_000, show_default=True, help="How many jobs a round of writes has.")
def main(tenants: int, jobs: int, rounds: int, rows: int) -> None:
    with running_server(shared_buffers="512MB", autovacuum="off", max_wal_size="4GB") as server:
        original = create_database(server, "original")
        data.make(original, tenants, jobs)
        copies = {
            WITHOUT: create_database(server, "without", "original"),
            WITH: create_database(server, "indexed", "original"),
        }
        size_and_build(copies[WITH], tenants * jobs)
        # The first round of each computes what is not there yet; the others find that nothing has changed.
        measures = {
            f"{count} days, {'the SELECT' if bare else 'the run'}": (count, bare)
            for count in (1, 3, 35)
            for bare in (True, False)
        }
        times: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        for conninfo in copies.values():
            runs(conninfo, data.DAYS, bare=False)
            with psycopg.connect(conninfo, autocommit=True) as connection:
                connection.execute("VACUUM ANALYZE")
        for number in range(rounds):
            order = list(copies.items())[:: 1 if number % 2 else -1]
            for name, (count, bare) in measures.items():
                for copy, conninfo in order:
                    times[name][copy].append(runs(conninfo, count, bare))
            for copy, conninfo in order:
                ids = range(100_000_000 + number * rows, 100_000_000 + (number + 1) * rows)
                for name, value in writes(conninfo, ids):
                    times[name][copy].append(value)
    for name, values in times.items():
        pairs = list(zip(values[WITHOUT], values[WITH], strict=True))
        if name.endswith("share"):
            click.echo(
                f"{name}: {statistics.median(a for a, _ in pairs):.2f} -> {statistics.median(b for _, b in pairs):.2f}"
            )
        else:
            ratios = [b / a for a, b in pairs]
            click.echo(
                f"{name}: {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f}); "
                f"medians {statistics.median(a for a, _ in pairs):.4g} -> {statistics.median(b for _, b in pairs):.4g}"
            )


if __name__ == "__main__":
    main()
