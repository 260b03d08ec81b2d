"""The Dagster web UI and its daemon on this machine, on the demo's data or on `DATABASE_URL`: `make dev`."""

import os
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
    path = os.pathsep.join((str(ROOT / ".venv" / "bin"), os.environ.get("PATH", os.defpath)))
    sys.exit(session.run(("dagster", "dev", "-w", "workspace.yaml"), os.environ | {"PATH": path}))


if __name__ == "__main__":
    main()
