"""A real PgBouncer before a test's server, where Debian's package is installed."""

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest

PORT = 6543

needs_pgbouncer = pytest.mark.skipif(not shutil.which("pgbouncer"), reason="There is no PgBouncer here.")


@contextmanager
def running_pooler(conninfo: str, mode: str, **settings: str | int) -> Iterator[str]:
    """The conninfo of the same database by a pooler in this mode, which drops what is given at the start."""
    given = psycopg.conninfo.conninfo_to_dict(conninfo)
    user = Path(str(given["host"])).owner() if os.geteuid() == 0 else None  # It refuses to run as root.
    with tempfile.TemporaryDirectory(prefix="pb", dir="/tmp") as name:
        folder = Path(name)
        (folder / "log").touch()
        (folder / "users").write_text('"postgres" ""\n"stats" ""\n')
        lines = {
            "listen_port": PORT,
            "unix_socket_dir": folder,
            "auth_type": "trust",
            "auth_file": folder / "users",
            "pool_mode": mode,
            "ignore_startup_parameters": "options",
            "logfile": folder / "log",
            **settings,
        }
        text = "\n".join(f"{key} = {value}" for key, value in lines.items())
        (folder / "pgbouncer.ini").write_text(f"[databases]\n* = host={given['host']}\n[pgbouncer]\n{text}\n")
        if user:
            for path in (folder, *folder.iterdir()):
                shutil.chown(path, user)
        command = [str(shutil.which("pgbouncer")), str(folder / "pgbouncer.ini")]
        with subprocess.Popen(command, user=user, stderr=subprocess.DEVNULL) as pooler:
            try:
                deadline = time.monotonic() + 10
                while "process up" not in (folder / "log").read_text():
                    assert time.monotonic() < deadline and pooler.poll() is None
                    time.sleep(0.02)
                yield f"host={folder} port={PORT} user={given['user']} dbname={given['dbname']}"
            finally:
                pooler.kill()
