"""Makes `.venv`: `python3 -m pipelines.install`, as `make install` does it.

Needs nothing but the standard library, and can be read by every Python 3, so that a wrong one is named before anything
else goes wrong. First commands that are given at once take turns here.
"""

import fcntl
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator  # noqa: UP035 An older Python has no subscripts for the other one.

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "requirements.lock"
VENV = ROOT / ".venv"
STAMP = VENV / ".installed"
PYTHONS = ((3, 11), (3, 12), (3, 13))


@contextmanager
def taking_turns() -> Iterator[None]:
    """One command of this checkout at a time; the others wait, and say so."""
    with LOCK.open() as file:  # A file that is there before everything else; nothing is written to it.
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("Another command is preparing this checkout: waiting for it to end.", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def main() -> None:
    if sys.version_info[:2] not in PYTHONS:
        sys.exit(
            "Error: {} is Python {}.{}, but 3.11, 3.12 or 3.13 is needed. If there is one under another name, say so, "
            "for instance: make demo PYTHON=python3.12".format(sys.executable, *sys.version_info)
        )
    with taking_turns():
        if STAMP.exists() and STAMP.stat().st_mtime >= LOCK.stat().st_mtime:
            return
        print(
            "Installing Dagster, a PostgreSQL to try it with, and what else they need, into .venv: a minute or two.",
            flush=True,
        )
        # An older interpreter would stay, whoever calls venv.
        kept = [] if _version(VENV / "bin" / "python") == _version(Path(sys.executable)) else ["--clear"]
        pip = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--require-hashes", "-r", str(LOCK)]
        for command in ([sys.executable, "-m", "venv", *kept, str(VENV)], [str(VENV / "bin" / "python"), *pip]):
            status = subprocess.run(command).returncode
            if status:
                sys.exit(status)
        STAMP.touch()


def _version(python: Path) -> bytes:
    """Major and minor version of an interpreter; nothing if it does not work."""
    try:
        return subprocess.run([python, "-c", "import sys; print(sys.version_info[:2])"], stdout=subprocess.PIPE).stdout
    except OSError:
        return b""


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("Interrupted. The same command again begins where it is needed.")
