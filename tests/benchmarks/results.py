"""What the benchmark of the stats tells: a row for each candidate in a case, tables, and what was aimed at."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.table import Table

from tests.benchmarks.candidates import BUSY, BY_DAY, OURSELVES, QUIET, STATEMENTS
from tests.benchmarks.measure import Run

INDEX = "+index"
"""Ends the name of a case that is run with the covering index."""
MANY = "many-tenants"
POPULATION = "population"
TOLD_FROM_TENANTS = 100
"""From how many tenants on the targets are told: what Dagster does for a run is the same for one and for thousands."""


@dataclass
class Row:
    """What is told of a candidate in a case; ratios are medians over the rounds. `scale`: what its seconds were
    multiplied with, because it did only a part.
    """

    case: str
    candidate: str
    kind: str
    tenants: int
    scale: float
    runs: list[Run] = field(default_factory=list)
    watched: dict[str, float] = field(default_factory=dict)
    to_aggregate: float | None = None
    to_plain: float | None = None
    to_ours: float | None = None
    wrong: list[str] = field(default_factory=list)

    @property
    def seconds(self) -> list[float]:
        return [run.seconds * self.scale for run in self.runs]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def most(self, what: Callable[[Run], float]) -> float:
        return max(map(what, self.runs))

    def as_json(self) -> dict[str, Any]:
        medians = {"median_s": self.median, "ms_per_tenant": 1000 * self.median / self.tenants} if self.runs else {}
        return asdict(self) | medians


def ratio_of(row: Row, other: Row) -> float | None:
    if row is other or not other.runs:
        return None
    return statistics.median(mine / its for mine, its in zip(row.seconds, other.seconds, strict=True))


def table_of(title: str, rows: Sequence[Row]) -> Table:
    table = Table(title=title, title_justify="left")
    names = ("seconds", "ms a tenant", "to aggregate", "to plain", "to ours", "WAL MB", "tuples written")
    for name in ("candidate", *names, "process MB (grown)", "largest backend MB", "locks"):
        table.add_column(name, justify="left" if name == "candidate" else "right")
    for row in rows:
        if not row.runs:
            table.add_row(row.candidate, f"[red]struck off: {row.wrong[0]}")
            continue
        about = "≈ " if row.scale != 1 else ""
        ratios = (f"{ratio:.2f}" if ratio else "" for ratio in (row.to_aggregate, row.to_plain, row.to_ours))
        table.add_row(
            row.candidate,
            f"{about}{row.median:.3f}",
            f"{1000 * row.median / row.tenants:.2f}",
            *ratios,
            f"{row.scale * statistics.median(run.wal_mb for run in row.runs):,.2f}",
            f"{row.scale * statistics.median(sum(run.tuples.values()) for run in row.runs):,.0f}",
            f"{row.most(lambda run: run.process_mb):,.0f} ({row.most(lambda run: run.grown_mb):,.0f})",
            f"{row.watched['backend_mb']:,.0f}",
            f"{row.watched['most_locks']:,.0f}",
        )
    return table


@dataclass(frozen=True)
class Target:
    """What is measured, and how much it may be."""

    text: str
    value: float
    limit: float

    @property
    def is_met(self) -> bool:
        return self.value <= self.limit


def targets(rows: Sequence[Row]) -> list[Target]:
    """What is to be reached, as far as it was measured."""
    found = []
    by_name = {(row.case, row.candidate): row for row in rows if row.runs}
    # What Dagster does is the same for one tenant and for thousands, so the statements are judged without it.
    to_limit = {"one-day": 1.5, "nightly": 1.5, "first-year": 1.6, "same-year": 0.9}
    for case in dict.fromkeys(row.case for row in rows):
        ours = by_name.get((case, OURSELVES.name))
        if ours is None:
            continue
        if case.startswith("day-by-day"):
            days = by_name[case, BY_DAY.name]
            found.append(Target(f"{case}: one run, to 365 runs", 1 / (days.to_ours or 1), 1 / 30))
            continue
        if case in to_limit:
            ratio = by_name[case, STATEMENTS.name].to_aggregate or 0
            found.append(Target(f"{case}: ours without Dagster, to the aggregate", ratio, to_limit[case]))
        if (case, QUIET.name) in by_name:
            ratio = ratio_of(by_name[case, QUIET.name], by_name[case, BUSY.name]) or 0
            found.append(Target(f"{case}: a tenant with nothing new, to one with jobs", ratio, 0.5))
        users = {
            row.candidate: row.to_ours for row in rows if row.case == case and row.kind == "user's" and row.to_ours
        }
        if users:
            fastest = min(users, key=lambda name: users[name])
            found.append(Target(f"{case}: ours, to the fastest of the users', {fastest}", 1 / users[fastest], 1))
        if "pandas" in users:
            found.append(Target(f"{case}: ours, to pandas", 1 / users["pandas"], 1 / 5))
        if case.startswith(("same-year", "known-day", "deleted-year")):
            tuples = ours.most(lambda run: sum(run.tuples.values()))
            found.append(Target(f"{case}: tuples that we write", tuples, 0))
        without = by_name.get((case.removesuffix(INDEX), OURSELVES.name))
        if case == "one-day" + INDEX and without:
            found.append(Target(f"{case}: ours, to ours without it", ours.median / without.median, 1 / 3))
        found.append(Target(f"{case}: MB of our process", ours.most(lambda run: run.process_mb), 400))
        found.append(Target(f"{case}: MB of our largest backend", ours.watched["backend_mb"], 150))
    many = {row.tenants: row for row in rows if row.candidate == OURSELVES.name and MANY in row.case}
    if len(many) > 1:
        few, most = (many[number] for number in sorted(many)[-2:])
        growth = (most.median / most.tenants) / (few.median / few.tenants)
        found.append(Target(f"{MANY}: a tenant of {most.tenants:,}, to one of {few.tenants:,}", growth, 1.3))
    return found
