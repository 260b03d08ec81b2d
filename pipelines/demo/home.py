"""Where Dagster keeps the demo's runs, so that `make dev` shows what `make demo` did."""

import os
from pathlib import Path

from pipelines.local import ROOT

SETTINGS = """\
telemetry:
  enabled: false
nux:
  enabled: false
python_logs:
  python_log_level: INFO
"""


def prepare() -> None:
    """Makes the folder that `DAGSTER_HOME` names, or `.local/dagster`, ready, if it is not, and sets the variable.

    Two processes that find it empty at once would make its SQLite files together, and break them for good. So whoever
    calls this is the only one, and does not leave that to the commands that follow.
    """
    home = Path(os.environ.setdefault("DAGSTER_HOME", str(ROOT / ".local" / "dagster"))).absolute()
    settings = home / "dagster.yaml"
    if settings.exists() and (home / "schedules").exists():
        return
    from dagster import DagsterInstance  # Not at the top: it takes two seconds.

    home.mkdir(parents=True, exist_ok=True)
    if not settings.exists():
        settings.write_text(SETTINGS)
    with DagsterInstance.get() as instance:
        instance.get_runs(limit=1)
