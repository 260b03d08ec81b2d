"""What a command costs beyond the database: its start, its imports, and what Dagster notes of a run.

    python -m tests.benchmarks.overhead --rounds 7 --json overhead.json

Each pair is a command of ours and its floor: the same command of Dagster on an asset that does nothing, or the bare
import. They take turns, every other round the other way round. It reports medians, and the medians of the ratios of
each round; of wall time, and of CPU time, which other work on the machine disturbs less. The tenants are few and small,
so that the database has next to nothing to do, and the second run of a day finds nothing to write.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from pipelines.local import ROOT
from tests.benchmarks import data
from tests.conftest import create_database, url_of
from tests.server import running_server

DAY = ("--partition", "2025-06-15")
YEAR = ("--partition-range", "2025-01-01...2025-12-31")
TRIVIAL = """
import dagster as dg
@dg.asset(partitions_def=dg.DailyPartitionsDefinition("2025-01-01"), backfill_policy=dg.BackfillPolicy.single_run())
def nothing() -> None: ...
defs = dg.Definitions(assets=[nothing], executor=dg.in_process_executor)
"""


def _python(script: str) -> tuple[str, ...]:
    return (sys.executable, "-c", script)


def _module(*arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-m", *arguments)


def _list(module: str, _: str) -> tuple[str, ...]:
    return _module("dagster", "asset", "list", "-m", module)


def _validate(module: str, _: str) -> tuple[str, ...]:
    return _module("dagster", "definitions", "validate", "-m", module, "--load-with-grpc")


def _materialize(module: str, asset: str, *days: str) -> tuple[str, ...]:
    return _module("dagster", "asset", "materialize", "-m", module, "--select", asset, *days)


@dataclass
class Pair:
    """A command of ours and its floor; and of each round the wall and the CPU time of ours, and of the floor."""

    title: str
    ours: tuple[str, ...]
    floor: tuple[str, ...]
    rounds: list[tuple[float, float, float, float]] = field(default_factory=list)

    def take(self, environment: Mapping[str, str], is_floor_first: bool) -> None:
        floor = measured(self.floor, environment) if is_floor_first else None
        ours = measured(self.ours, environment)
        self.rounds.append((*ours, *(floor or measured(self.floor, environment))))

    def medians(self) -> dict[str, float]:
        wall, cpu, wall_floor, cpu_floor = zip(*self.rounds, strict=True)
        return {
            "wall_s": statistics.median(wall),
            "wall_floor_s": statistics.median(wall_floor),
            "wall_ratio": statistics.median(ours / floor for ours, floor in zip(wall, wall_floor, strict=True)),
            "cpu_s": statistics.median(cpu),
            "cpu_floor_s": statistics.median(cpu_floor),
            "cpu_ratio": statistics.median(ours / floor for ours, floor in zip(cpu, cpu_floor, strict=True)),
        }


OURS, NOTHING = ("pipelines.definitions", "marketplace_job_stats"), ("nothing", "nothing")
PAIRS = (
    ("import the definitions / dagster", _python("import pipelines.definitions"), _python("import dagster")),
    ("dagster asset list", _list(*OURS), _list(*NOTHING)),
    ("a code server, started and asked", _validate(*OURS), _validate(*NOTHING)),
    ("materialize a day", _materialize(*OURS, *DAY), _materialize(*NOTHING, *DAY)),
    ("materialize a year in one run", _materialize(*OURS, *YEAR), _materialize(*NOTHING, *YEAR)),
    (
        "pipelines.stats / import of SQLAlchemy and psycopg",
        _module("pipelines.stats", "--tenant", "user_1"),
        _python("import sqlalchemy.orm, psycopg"),
    ),
    ("alembic upgrade head / import of alembic", _module("alembic", "upgrade", "head"), _python("import alembic")),
)


def measured(command: tuple[str, ...], environment: Mapping[str, str]) -> tuple[float, float]:
    """Seconds of wall and of CPU time of a command and its children. Raises CalledProcessError if it fails."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


@click.command(help=__doc__)
@click.option("--rounds", default=5, show_default=True)
@click.option("--tenants", default=2, show_default=True)
@click.option("--jobs", default=500, show_default=True, help="How many jobs a tenant has in the year.")
@click.option("--json", "result", type=click.Path(path_type=Path), help="A file for all times of all rounds.")
def main(rounds: int, tenants: int, jobs: int, result: Path | None) -> None:
    pairs = [Pair(*pair) for pair in PAIRS]
    with running_server() as server, tempfile.TemporaryDirectory() as folder:
        conninfo = create_database(server, "overhead")
        data.make(conninfo, tenants, jobs)
        (Path(folder) / "nothing.py").write_text(TRIVIAL)
        home = Path(folder) / "dagster"
        home.mkdir()
        (home / "dagster.yaml").write_text("telemetry:\n  enabled: false\n")
        environment = {
            "PATH": os.environ["PATH"],
            "HOME": folder,
            "PYTHONPATH": folder,
            "DATABASE_URL": url_of(conninfo),
            "DAGSTER_HOME": str(home),
        }
        for number in range(-1, rounds):
            for pair in pairs:
                pair.take(environment, is_floor_first=number % 2 == 0)
                if number < 0:
                    pair.rounds.clear()  # It has compiled the modules and filled the caches.
    table = Table(*("", "wall s", "floor", "ratio", "CPU s", "floor", "ratio"), title=f"Medians of {rounds} rounds")
    told: list[dict[str, Any]] = []
    for pair in pairs:
        medians = pair.medians()
        table.add_row(pair.title, *(f"{value:.2f}" for value in medians.values()))
        told.append({"title": pair.title, **medians, "rounds": pair.rounds})
    Console(width=max(120, Console().width)).print(table)
    if result:
        result.write_text(json.dumps(told, indent=1))


if __name__ == "__main__":
    main()
