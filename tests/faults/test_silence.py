"""A server that does not answer, and does not go away either: as a network that swallows everything."""

import os
import signal
import subprocess
import time
from pathlib import Path

import psycopg
import pytest
import sqlalchemy as sa

from pipelines.resources import TenantDatabase
from tests.conftest import url_of
from tests.server import running_server


def test_an_interrupted_run_does_not_wait_for_a_silent_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is under way is given up after some seconds: neither the statement nor its cancellation is answered."""
    with running_server() as server:
        monkeypatch.setenv("DATABASE_URL", url_of(f"{server} dbname=postgres"))
        folder = Path(str(psycopg.conninfo.conninfo_to_dict(server)["host"]))
        postmaster = int((folder / "data" / "postmaster.pid").read_text().split()[0])
        database = TenantDatabase(workers=4, lock_timeout_ms=1000, statement_timeout_ms=90_000)
        sleep = sa.text("SELECT :seconds FROM pg_sleep(:seconds)")
        with database.connect() as (engine, _):
            waiting = database.for_each(engine, [0, 60, 60, 60, 60], lambda c, n: c.scalar(sleep, {"seconds": n}))
            assert next(waiting) == (0, 0)
            children = subprocess.run(["pgrep", "-P", str(postmaster)], capture_output=True, text=True, check=True)  # noqa: S607
            pids = [postmaster, *map(int, children.stdout.split())]
            for pid in pids:
                os.kill(pid, signal.SIGSTOP)
            try:
                started = time.monotonic()
                waiting.close()
                assert time.monotonic() - started < 30
            finally:
                for pid in pids:
                    os.kill(pid, signal.SIGCONT)
