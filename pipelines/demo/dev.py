"""The Dagster web UI and its daemon on this machine, on the demo's data or on `DATABASE_URL`: `make dev`."""

import os
import secrets
import sys

import click

from pipelines.demo import home, session
from pipelines.demo.__main__ import make
from pipelines.install import taking_turns
from pipelines.local import ROOT


@click.command(help=__doc__)
def main() -> None:
    with taking_turns():
        home.prepare()
        if not os.environ.get("DATABASE_URL"):
            make(once=True)
    environment = {
        # Dagster executes what any page in the browser sends, if that page knows the address (docs/operations.md).
        "DAGSTER_WEBSERVER_PATH_PREFIX": f"/{secrets.token_hex(8)}",
        "PATH": os.pathsep.join((str(ROOT / ".venv" / "bin"), os.environ.get("PATH", os.defpath))),
    }
    sys.exit(session.run(("dagster", "dev", "-w", "workspace.yaml"), os.environ | environment))


if __name__ == "__main__":
    main()
