"""The commands of docs/move-a-customer.md, as a shell runs them."""

import os
import re
import shlex
import subprocess
from collections.abc import Mapping
from pathlib import Path

from tests.conftest import ROOT
from tests.server import binaries

_PAGE = (ROOT / "docs" / "move-a-customer.md").read_text()
GIVEN, CHECK, OUT, INTO, COMPARE, SUMMARIES, DROP = re.findall(r"^```sh\n(.*?)```", _PAGE, re.DOTALL | re.MULTILINE)


def follow(
    commands: str,
    folder: Path,
    customer: str,
    old: Mapping[str, str],
    new: Mapping[str, str],
    check: bool = True,
) -> str:
    """What these commands say in this folder, where `eu` and `us` stand for the environments of the old and new place.

    Their MIGRATION_DATABASE_URL is what is moved from and to. Without `check` they may fail, and what they complain of
    is there, too.
    """
    for name in ("pipelines", "assets", "models", "migrations", "deploy", "alembic.ini"):
        if not (folder / name).exists():
            (folder / name).symlink_to(ROOT / name)
    given = {
        alias: shlex.join(f"{name}={value}" for name, value in place.items())
        for alias, place in (("eu", old), ("us", new))
    }
    aliases = [f'{alias}() {{ env {variables} "$@"; }}' for alias, variables in given.items()]
    result = subprocess.run(
        ["/bin/bash", "-c", "\n".join(["set -eo pipefail", *aliases, commands])],
        cwd=folder,
        env={
            "PATH": f"{binaries()}:{ROOT / '.venv' / 'bin'}:{os.environ['PATH']}",
            "HOME": str(folder),
            "DAGSTER_HOME": str(folder),
            "CUSTOMER": customer,
            "OLD": old["MIGRATION_DATABASE_URL"],
            "NEW": new["MIGRATION_DATABASE_URL"],
        },
        capture_output=True,
        text=True,
        timeout=120,
    )
    if check and result.returncode:
        raise AssertionError(f"{commands} ended with {result.returncode}:\n{result.stdout}\n{result.stderr}")
    return result.stdout + ("" if check else result.stderr)
