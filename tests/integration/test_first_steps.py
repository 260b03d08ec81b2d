"""What somebody meets with the first commands, in a checkout of one's own: another user, a path with a space, an older
`.venv`, two commands at once, Ctrl-C."""

import os
import pwd
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines import install
from tests.conftest import ROOT

pytestmark = pytest.mark.deployment


@pytest.fixture
def checkout() -> Iterator[Path]:
    """The sources, without packages to install, in a path with a space, which every user may enter."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        Path(folder).chmod(0o755)
        checkout = Path(folder) / "my projects" / "stats"
        shutil.copytree(ROOT / "pipelines", checkout / "pipelines", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "Makefile", checkout)
        (checkout / "requirements.lock").touch()
        yield checkout


def start(checkout: Path, *command: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command,
        cwd=checkout,
        env={"PATH": os.environ["PATH"], "HOME": "/tmp"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def test_two_installations_at_once_heal_an_older_environment(checkout: Path) -> None:
    """The second waits for the first and then has nothing to do; an older interpreter does not stay."""
    python = checkout / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/sh\necho '(3, 9)'\n")
    python.chmod(0o755)
    both = [start(checkout, "make", "install", f"PYTHON={sys.executable}") for _ in range(2)]
    output = sorted(process.communicate(timeout=120)[0] for process in both)
    assert [process.returncode for process in both] == [0, 0]
    assert "Another command is preparing this checkout" in output[0]
    assert "Installing Dagster" in output[1]
    assert "".join(output).count("Installing") == 1
    version = subprocess.run([python, "--version"], capture_output=True, text=True, check=True).stdout
    assert version.split()[1].startswith(".".join(map(str, sys.version_info[:2])))


def test_a_wrong_python_is_named_first(checkout: Path) -> None:
    """Before anything is made; the right ones are those of pyproject.toml."""
    code = "import sys; sys.version_info = (3, 9, 2, 'final', 0); from pipelines.install import main; main()"
    process = start(checkout, sys.executable, "-c", code)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 1
    assert f"Error: {sys.executable} is Python 3.9, but 3.11, 3.12 or 3.13 is needed." in output
    assert not (checkout / ".venv").exists()
    limits = re.search(r'requires-python = ">=3\.(\d+),<3\.(\d+)"', (ROOT / "pyproject.toml").read_text())
    assert limits
    assert tuple((3, minor) for minor in range(int(limits[1]), int(limits[2]))) == install.PYTHONS


@pytest.mark.parametrize("module", ["pipelines.stats", "pipelines.demo"])
def test_ctrl_c_shows_no_stack(checkout: Path, module: str) -> None:
    """From the first import on."""
    code = (
        "import pipelines, runpy, threading, _thread; threading.Timer(0.03, _thread.interrupt_main).start(); "
        f"runpy.run_module({module!r}, run_name='__main__')"
    )
    environment = {"PATH": os.environ["PATH"], "DATABASE_URL": "postgresql://nobody@127.0.0.1:1/none"}
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=checkout, env=environment, capture_output=True, text=True, timeout=60
    )
    assert ended.returncode
    assert ended.stderr in ("Interrupted.\n", "\nAborted!\n")


@pytest.mark.skipif(os.geteuid() != 0, reason="Only root can be two users.")
def test_the_embedded_server_of_a_second_user(checkout: Path) -> None:
    """Another user's lock in the common temporary folder does not matter, nor does the space in the path."""
    user = pwd.getpwnam("nobody")
    temporary = checkout.parent / "tmp"
    temporary.mkdir()
    temporary.chmod(0o1777)
    (temporary / ".lockfile").touch(mode=0o600)
    for path in (checkout, *checkout.rglob("*")):
        os.chown(path, user.pw_uid, user.pw_gid)

    def run(python: str, code: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*("setpriv", "--reuid=nobody", f"--regid={user.pw_gid}", "--clear-groups", python), "-c", code],
            cwd=checkout,
            env={"TMPDIR": str(temporary), "HOME": str(temporary), "PYTHONPATH": sysconfig.get_path("purelib")},
            capture_output=True,
            text=True,
            timeout=60,
        )

    # The interpreter of .venv may be one in root's own folder.
    version = ".".join(map(str, sys.version_info[:2]))
    pythons = [sys.executable, f"/usr/bin/python{version}"]
    python = next((python for python in pythons if not run(python, "import psycopg, click").returncode), None)
    if python is None:
        pytest.skip("A second user cannot run Python with the packages here.")
    ended = run(
        python,
        "import psycopg\n"
        "from pipelines import local\n"
        "print(psycopg.connect(local.start()).execute('SELECT 7').fetchone())\n"
        "local.stop()",
    )
    assert (ended.returncode, ended.stdout) == (0, "(7,)\n"), ended.stderr
