"""Runs candidates, each in a process of its own, and measures what a run costs: the client, the server, the log.

A candidate's process stays for all its runs, so that what it loads is loaded before the clock starts, and its memory is
its own.
"""

import multiprocessing
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import pandas as pd
import psycopg

from tests import reference
from tests.benchmarks.candidates import (
    EXACT,
    KEY,
    SETTINGS,
    SKETCH,
    Candidate,
    Frames,
    aggregate,
    exact,
    window,
)
from tests.benchmarks.compare import TOLD, differences

MB = 1024 * 1024
"""Bytes."""


@dataclass
class Run:
    """One run of a candidate. Seconds; megabytes of the process at its most, and before; what was written.

    `watched`: only for runs that were watched, since that costs time: the most locks that a session held, and the
    megabytes of the largest backend (RssAnon of /proc: what is its own, without the shared buffers).
    """

    seconds: float
    process_mb: float
    grown_mb: float
    wal_mb: float = 0.0
    tuples: dict[str, int] = field(default_factory=dict)
    watched: dict[str, float] = field(default_factory=dict)


# In the candidate's process. ---------------------------------------------------------------------------------------


def _memory(name: str) -> float:
    """Megabytes of this process, from /proc: VmRSS now, or VmHWM at its most."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name)]
    return int(line.split()[1]) / 1024


def _timed(candidate: Candidate, conninfo: str, tenants: Sequence[str], first: date, last: date) -> Run:
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins again.
    before = _memory("VmRSS")
    start = time.perf_counter()
    candidate.run(conninfo, tenants, first, last)
    seconds = time.perf_counter() - start
    most = _memory("VmHWM")
    return Run(seconds, most, most - before)


def frame_of(conninfo: str, query: str, parameters: dict[str, Any] | None = None) -> pd.DataFrame:
    with psycopg.connect(conninfo, options=SETTINGS) as connection:
        cursor = connection.execute(query.encode(), parameters, prepare=False)
        return pd.DataFrame(cursor.fetchall(), columns=[column.name for column in cursor.description or ()])


def right_frame(conninfo: str, tenant: str, first: date, last: date) -> pd.DataFrame:
    """What is right: hand-written SQL with exact percentiles, and the sketches of the project's own SELECT."""
    parameters = window(first, last)
    right = frame_of(conninfo, exact(tenant), parameters)
    sketches = frame_of(conninfo, aggregate(tenant), parameters)[[*KEY, *SKETCH]]
    return right.merge(sketches, on=list(KEY), how="outer")


def result_differences(candidate: Candidate, conninfo: str, right: Frames, first: date, last: date) -> list[str]:
    """What the candidate's result has wrong in these tenants."""
    told: list[str] = []
    for tenant, frame in right.items():
        if candidate.query:
            found = frame_of(conninfo, candidate.query(tenant), window(first, last))
        else:
            columns = ", ".join((*KEY, *EXACT, *candidate.columns))
            found = frame_of(conninfo, f"SELECT {columns} FROM {tenant}.{candidate.table}")
        told += [f"{tenant} {one}" for one in differences(found, frame, candidate.columns, first, last)]
    return told[:TOLD]


# In the benchmark's process. ---------------------------------------------------------------------------------------


class Process:
    """A candidate in a process of its own."""

    def __init__(self, candidate: Candidate) -> None:
        self.candidate = candidate
        # A fresh interpreter: a fork would begin with the memory of this one.
        self._executor = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))

    def run(self, conninfo: str, tenants: Sequence[str], first: date, last: date, *, watched: bool = False) -> Run:
        """One run, from a checkpoint on, so that each pays alike for the first change of each page."""
        with psycopg.connect(conninfo, autocommit=True) as connection:
            connection.execute("CHECKPOINT")
            before, start = written(connection), _position(connection)
            if watched:
                with _watching(conninfo) as seen:
                    run = self._executor.submit(_timed, self.candidate, conninfo, tenants, first, last).result()
                run.watched = seen
            else:
                run = self._executor.submit(_timed, self.candidate, conninfo, tenants, first, last).result()
            run.wal_mb = (_position(connection) - start) / MB
            _wait_for_the_end(connection)
            after = written(connection)
        run.tuples = {name: after[name] - before[name] for name in after}
        return run

    def close(self) -> None:
        self._executor.shutdown()


def _position(connection: psycopg.Connection[Any]) -> int:
    row = connection.execute("SELECT pg_wal_lsn_diff(pg_current_wal_insert_lsn(), '0/0')::bigint").fetchone()
    assert row
    return int(row[0])


def written(connection: psycopg.Connection[Any]) -> dict[str, int]:
    """The tuples that were ever inserted, updated and deleted in the tables of this database, the catalog aside."""
    connection.execute("SELECT pg_stat_clear_snapshot()")
    row = connection.execute(
        """SELECT coalesce(sum(n_tup_ins), 0)::bigint, coalesce(sum(n_tup_upd), 0)::bigint,
                  coalesce(sum(n_tup_del), 0)::bigint FROM pg_stat_user_tables"""
    ).fetchone()
    assert row
    return dict(zip(("inserted", "updated", "deleted"), row, strict=True))


_SESSIONS = """
    SELECT a.pid, (SELECT count(*) FROM pg_locks AS l WHERE l.pid = a.pid)
      FROM pg_stat_activity AS a
     WHERE a.datname = current_database() AND a.pid <> pg_backend_pid()
       AND a.backend_type IN ('client backend', 'parallel worker')
       AND a.application_name <> 'benchmark_watch'"""


def _wait_for_the_end(connection: psycopg.Connection[Any]) -> None:
    """A backend tells what it wrote when it ends, which is a moment after its client has gone."""
    deadline = time.monotonic() + 10
    while connection.execute(_SESSIONS).fetchall() and time.monotonic() < deadline:
        time.sleep(0.02)


@contextmanager
def _watching(conninfo: str) -> Iterator[dict[str, float]]:
    """Looks at all sessions of the database up to fifty times a second."""
    seen = {"most_locks": 0.0, "backend_mb": 0.0, "all_backends_mb": 0.0}
    stop = threading.Event()

    def watch() -> None:
        with psycopg.connect(f"{conninfo} application_name=benchmark_watch", autocommit=True) as connection:
            while not stop.wait(0.02):
                sessions = connection.execute(_SESSIONS).fetchall()
                sizes = [_own_memory(pid) for pid, _ in sessions] or [0.0]
                seen["most_locks"] = max(seen["most_locks"], *(locks for _, locks in sessions), 0)
                seen["backend_mb"] = max(seen["backend_mb"], *sizes)
                seen["all_backends_mb"] = max(seen["all_backends_mb"], sum(sizes))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield seen
    finally:
        stop.set()
        thread.join()


def _own_memory(pid: int) -> float:
    """Megabytes of a backend that are its own, without the shared buffers; 0 if it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return sum(int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon"))


def reference_differences(conninfo: str, tenant: str, right: pd.DataFrame, first: date, last: date) -> list[str]:
    """What these rows of a tenant have different from the reference of the tests."""
    jobs = frame_of(conninfo, f"SELECT {', '.join(reference.JOB_COLUMNS)} FROM {tenant}.marketplace_jobs")
    tasks = frame_of(conninfo, f"SELECT {', '.join(reference.TASK_COLUMNS)} FROM {tenant}.marketplace_tasks")
    limits = window(first, last)
    ends = [*limits["starts"][1:], limits["window_end"]]
    days = [reference.Day(*day) for day in zip(limits["dates"], limits["starts"], ends, strict=True)]
    rows = reference.reference_rows(jobs.astype(object), tasks.astype(object), days)
    return differences(right, rows, (), first, last)
