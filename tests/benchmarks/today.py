"""How long a run of today so far takes, where one tenant in ten has new jobs, and where none has.

    python -m tests.benchmarks.today --tenants 10000

Each tenant has small tables and some jobs of today. It reports medians, of the two assets as Dagster runs them,
next to the limit: the aggregating SELECT over today, bare, which writes nothing. Not to be run around midnight
(UTC).
"""

import argparse
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from datetime import UTC, date, datetime, timedelta
from functools import partial
from typing import Any

import psycopg

from tests.benchmarks import data
from tests.benchmarks.candidates import CONNECTIONS, DATED, each_tenant, run_aggregate
from tests.benchmarks.measure import written
from tests.conftest import create_database, url_of
from tests.server import running_server

STATS, SUMMARY = "marketplace_job_stats_today", "marketplace_daily_summary_today"
SMALL = 400
"""Jobs of a tenant in the year before."""
NEW = 10
"""Jobs that a tenant with new ones gets before each run."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tenants", type=int, default=1_000)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    for name in os.environ:
        if name.startswith(("STATS_", "PG", "DAGSTER_")) or name == "DATABASE_URL":
            del os.environ[name]
    with running_server(
        fsync="on", autovacuum="off", shared_buffers="2GB", max_wal_size="32GB", checkpoint_timeout="1d"
    ) as server:
        conninfo = create_database(server, "today")
        data.make(conninfo, options.tenants, SMALL)
        measure(conninfo, [f"user_{number}" for number in range(1, options.tenants + 1)], options.rounds)


def measure(conninfo: str, tenants: Sequence[str], rounds: int) -> None:
    """Prints a line for each kind of run."""
    seconds: defaultdict[str, list[float]] = defaultdict(list)
    tuples: defaultdict[str, list[int]] = defaultdict(list)
    today = datetime.now(UTC).date()
    run = _runner(conninfo)

    def take(name: str, work: Callable[[], Any]) -> None:
        with psycopg.connect(conninfo, autocommit=True) as connection:
            connection.execute("CHECKPOINT")
            before, start = sum(written(connection).values()), time.perf_counter()
            work()
            seconds[name].append(time.perf_counter() - start)
            time.sleep(1)  # A backend tells what it wrote when it ends.
            tuples[name].append(sum(written(connection).values()) - before)

    add(conninfo, tenants, 1)
    for asset in (STATS, SUMMARY):
        run(asset)  # What is imported, and planned, once.
    for number in range(rounds):
        take("nothing new", partial(run, STATS))
        add(conninfo, tenants[number % 10 :: 10], 2 + number)
        take("one in ten with new jobs", partial(run, STATS))
        take("the summary, after that", partial(run, SUMMARY))
        take("limit: the SELECT, bare", partial(run_aggregate, conninfo, tenants, today, today))
        forget(conninfo, tenants, today)
        take("the first of the day, all with jobs", partial(run, STATS))
    for name, times in seconds.items():
        median = statistics.median(times)
        print(
            f"{name:<36} {median:8.2f} s, {1000 * median / len(tenants):6.2f} ms a tenant, "
            f"{statistics.median(tuples[name]):,.0f} tuples"
        )


def forget(conninfo: str, tenants: Sequence[str], day: date) -> None:
    """As if no run had looked at the day."""

    def work(connection: psycopg.Connection[Any], tenant: str) -> None:
        for table in DATED:
            connection.execute(f"DELETE FROM {tenant}.{table} WHERE date = '{day}'".encode())

    each_tenant(conninfo, tenants, work)


def _runner(conninfo: str) -> Callable[[str], None]:
    import logging

    import dagster as dg

    from pipelines.definitions import build_defs
    from pipelines.settings import Settings

    logging.disable(logging.CRITICAL)
    settings = Settings.from_env({"STATS_START_DATE": "2024-01-01", "STATS_WORKERS": str(CONNECTIONS)})
    job = build_defs(settings).resolve_job_def("marketplace_job_stats_today_job")
    os.environ["DATABASE_URL"] = url_of(conninfo)

    instance = dg.DagsterInstance.ephemeral()  # It knows for which day the stats were computed.

    def run(asset: str) -> None:
        assert job.execute_in_process(instance=instance, asset_selection=[dg.AssetKey(asset)]).success

    return run


def add(conninfo: str, tenants: Sequence[str], number: int) -> None:
    """Some jobs that have just ended, each with a task."""
    now = datetime.now(UTC)
    first = 1_000_000 * number

    def work(connection: psycopg.Connection[Any], tenant: str) -> None:
        connection.execute(
            f"""INSERT INTO {tenant}.marketplace_jobs
                       (id, marketplace, action_type_id, status, retry_count, started_at, completed_at, created_at)
                SELECT {first} + n, 'ebay', 1 + n % 3, 'completed', 0, '{now - timedelta(seconds=2)}', '{now}',
                       '{now - timedelta(seconds=5)}' FROM generate_series(1, {NEW}) AS n""".encode()
        )
        connection.execute(
            f"""INSERT INTO {tenant}.marketplace_tasks
                       (id, job_id, task_type, status, retry_count, started_at, completed_at, created_at)
                SELECT {first} + n, {first} + n, 'plugin_http', 'success', 0, '{now}', '{now}', '{now}'
                  FROM generate_series(1, {NEW}) AS n""".encode()
        )

    each_tenant(conninfo, tenants, work)


if __name__ == "__main__":
    main()
