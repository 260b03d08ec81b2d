"""How long the stats take, next to the limit and to what a user would write instead; `make bench`.

    python -m tests.benchmarks.stats --size small
    python -m tests.benchmarks.stats --tenants 100 --jobs 10000 --rounds 5 --only one-day --only first-year

Each case warms every candidate up, and compares its result cell by cell with what is right; who fails, or computes
something else, is struck off. Then each round takes all candidates, ours between the two limits, every other round the
other way round. Times are told as ratios to those of the same round; their medians count.

The limits: `aggregate` is the SELECT from jobs and tasks to rows with sketches, run bare; `plain` is SQL by hand,
without percentiles and sketch, in the fastest of three shapes. For a first load both are an INSERT SELECT into an empty
table; no limit keeps facts. `ours` is the run of the asset by Dagster, all promises kept. The server syncs to disk;
autovacuum is off, so that it disturbs nobody.
"""

import contextlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import date, timedelta
from typing import Any

import click
import psycopg
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from pipelines.local import ROOT
from tests.benchmarks import data
from tests.benchmarks.candidates import (
    AGGREGATE,
    BUSY,
    BY_DAY,
    DATED,
    INSERT_AGGREGATE,
    INSERT_PLAINS,
    OUR_TABLES,
    OURS,
    OURSELVES,
    PLAINS,
    QUIET,
    STATEMENTS,
    Candidate,
    Frames,
    each_tenant,
)
from tests.benchmarks.measure import Process, Run, reference_differences, result_differences, right_frame
from tests.benchmarks.results import INDEX, MANY, POPULATION, TOLD_FROM_TENANTS, Row, ratio_of, table_of, targets
from tests.benchmarks.users import USERS
from tests.conftest import create_database, run, url_of
from tests.server import running_server

RESULT = ROOT / ".local" / "bench-stats.json"
COMPARED_TENANTS = 20
"""In how many tenants, spread over all, and in SAMPLED_TENANTS, all cells are compared. All would take longer than the
runs: a tenant's year has some hundred thousand cells for each candidate."""
SAMPLED_TENANTS, SAMPLED_DAYS = 8, 5
"""What a candidate gets that is too slow for a year of all."""
OTHER_TABLES = ("stats_limit", "stats_plain", *(str(user.table) for user in USERS))
APART_DAYS = 7
"""How far from each other the days are that are new in turn. Each run gets one of its own: to delete a day and compute
it again leaves dead entries in the indexes, which no real run meets."""


@dataclass(frozen=True)
class Case:
    """`days`, the last ones of the year, or up to the new day. What the tables hold before each run says `before`:

    nothing; the year; a new day: the year without it; changes: the year, then a hundredth of the jobs changed;
    deletions: the year, then three tenths of the jobs were deleted, and no run has seen it; deleted: one has.
    """

    name: str
    title: str
    days: int
    before: str
    limits: tuple[Candidate, tuple[Candidate, ...]] = (AGGREGATE, PLAINS)
    ours: tuple[Candidate, ...] = (OURSELVES, STATEMENTS)
    users: tuple[Candidate, ...] = USERS


CASES = (
    Case("one-day", "A day, which is new", 1, "a new day"),
    Case("known-day", "A day that is known, nothing new", 1, "the year"),
    Case("nightly", "3 days, the last of them new", 3, "a new day"),
    Case("first-year", "A year, for the first time", 365, "nothing", (INSERT_AGGREGATE, INSERT_PLAINS)),
    Case("same-year", "The same year again, unchanged", 365, "the year"),
    Case("changed-year", "The same year again, 1 % of its jobs changed", 365, "changes"),
    Case(
        "day-by-day",
        "A year for the first time, in one run and in 365",
        365,
        "nothing",
        (INSERT_AGGREGATE, INSERT_PLAINS),
        (OURSELVES, BY_DAY),
        (),
    ),
)
# Who deletes jobs has other numbers than the source, and the users' tables would lose what ours keeps.
DELETED_CASES = (
    Case("deletions", "The same year again, 30 % of its jobs deleted", 365, "deletions", users=()),
    Case("deleted-year", "The same year again, 30 % of its jobs deleted before", 365, "deleted", users=()),
)
MANY_TENANTS = Case(MANY, "A day, which is new, of small tenants", 1, "a new day", users=())
_KINDS = (OURSELVES, STATEMENTS, BUSY, QUIET)
POPULATION_CASES = (
    Case(POPULATION, "A day, which is new, 9 of 10 tenants without a job", 1, "a new day", ours=_KINDS, users=()),
    Case(f"{POPULATION}-known", "The same, the day is known", 1, "the year", ours=_KINDS, users=()),
    Case(f"{POPULATION}-nightly", "3 days, the last of them new", 3, "a new day", ours=_KINDS, users=()),
)
NAMES = [
    *(case.name + suffix for suffix in ("", INDEX) for case in CASES),
    *(case.name for case in (*DELETED_CASES, *POPULATION_CASES)),
    MANY,
]


@dataclass(frozen=True)
class Size:
    """`cases` and `indexed`: what is run without and with the index. `population`: how many tenants it has. `many`:
    numbers of tenants with 100 jobs each."""

    tenants: int
    jobs: int
    rounds: int
    cases: tuple[str, ...]
    indexed: tuple[str, ...]
    population: int
    many: tuple[int, ...]
    shared_buffers: str


_ALL = tuple(case.name for case in CASES)
_POPULATION = tuple(case.name for case in POPULATION_CASES)
_FEW = tuple(name for name in _ALL if name != "day-by-day")
_DELETED = tuple(case.name for case in DELETED_CASES)
SIZES = {
    "small": Size(10, 2_000, 2, (*_FEW, *_DELETED, *_POPULATION), (), 100, (), "512MB"),
    "full": Size(1_000, 10_000, 5, (*_ALL, *_DELETED, *_POPULATION), _ALL, 10_000, (1, 100, 10_000), "4GB"),
}


class Bench:
    """A database of tenants, and the cases that are run on it."""

    def __init__(self, conninfo: str, tenants: int, rounds: int, progress: Progress) -> None:
        self.conninfo, self.rounds, self.progress = conninfo, rounds, progress
        self.tenants = [f"user_{number}" for number in range(1, tenants + 1)]
        self.processes: dict[str, Process] = {}
        self.filled: set[str] = set()
        self.changes = 0
        self.whole: Frames = {}  # What was right before jobs were deleted.

    def close(self) -> None:
        for process in self.processes.values():
            process.close()

    def each(self, *statements: str) -> None:
        """The statements for every tenant, whose schema is {0}."""

        def work(connection: psycopg.Connection[Any], tenant: str) -> None:
            for statement in statements:
                connection.execute(statement.format(tenant).encode())

        each_tenant(self.conninfo, self.tenants, work)

    def run_case(self, case: Case, suffix: str = "") -> list[Row]:
        aggregate, plains = case.limits
        candidates = [aggregate, *plains, *case.ours, *(user for user in case.users if not user.missing())]
        self._prepare_case(case)
        rows = {one.name: self._row(case, suffix, one) for one in candidates}
        bar = self.progress.add_task(f"{case.name}{suffix}", total=len(candidates) + self.rounds * len(candidates))

        # Warming up: each candidate once, watched, and compared. The shapes of the plain limit compete here.
        right: dict[tuple[date, date], Frames] = {}
        fastest: dict[str, float] = {}
        for one in candidates:
            self.progress.update(bar, description=f"{case.name}{suffix}, warming up: {one.name}")
            changes = self.changes
            self._prepare(case, one)
            try:
                run = self._run(case, one, 0, watched=True)
            except Exception as error:
                if one.kind != "user's":
                    raise
                rows[one.name].wrong = [f"it failed: {error!r}"]
                self.progress.advance(bar)
                continue
            rows[one.name].watched = run.watched
            if self.changes != changes:
                right.clear()
            window = self._window(case, one, 0)
            if window not in right:
                right[window] = self._right(*window)
            rows[one.name].wrong = self._differences(case, one, right[window])
            if one in plains:
                self._prepare(case, one)
                fastest[one.name] = min(run.seconds, self._run(case, one, 0).seconds)
            self.progress.advance(bar)
        plain = min((one for one in plains if not rows[one.name].wrong), key=lambda one: fastest[one.name])
        kept = [aggregate, case.ours[0], plain, *case.ours[1:], *(one for one in candidates if one in case.users)]
        kept = [one for one in kept if not rows[one.name].wrong]
        self.progress.update(bar, total=len(candidates) + self.rounds * len(kept))

        for number in range(self.rounds):
            for one in kept if number % 2 == 0 else reversed(kept):
                self.progress.update(bar, description=f"{case.name}{suffix}, round {number + 1}: {one.name}")
                self._prepare(case, one)
                rows[one.name].runs.append(self._run(case, one, number + 1))
                self.progress.advance(bar)
        self.progress.update(bar, description=f"{case.name}{suffix}")

        for row in rows.values():
            if row.runs:
                row.to_aggregate = ratio_of(row, rows[aggregate.name])
                row.to_plain = ratio_of(row, rows[plain.name])
                row.to_ours = ratio_of(row, rows[case.ours[0].name])
        return [rows[one.name] for one in candidates if one in kept or rows[one.name].wrong]

    def _row(self, case: Case, suffix: str, one: Candidate) -> Row:
        tenants, days = self._part(case, one, 0)
        scale = len(self.tenants) / len(tenants) * case.days / days
        return Row(case.name + suffix, one.name, one.kind, len(self.tenants), scale)

    def _window(self, case: Case, one: Candidate, number: int) -> tuple[date, date]:
        """The first and the last day of a case, for a candidate's run of this number."""
        last = data.LAST
        if case.before == "a new day":
            # Ours leave what they have done in one table, so that each needs a new day of its own.
            place = case.ours.index(one) if one in case.ours else 0
            last -= timedelta(days=APART_DAYS * (number * len(case.ours) + place))
        return last - timedelta(days=case.days - 1), last

    def _part(self, case: Case, one: Candidate, number: int) -> tuple[Sequence[str], int]:
        """The tenants and the number of days, up to the last, that a candidate gets."""
        if one.only:
            has_jobs = self._tenants_with_jobs(*self._window(case, one, number))
            return [tenant for tenant in self.tenants if (tenant in has_jobs) == (one.only == "busy")], case.days
        if one.sampled and case.days > SAMPLED_DAYS:
            if one.by_day:
                return self.tenants, SAMPLED_DAYS
            return self.tenants[: max(SAMPLED_TENANTS, len(self.tenants) // 20)], case.days
        return self.tenants, case.days

    def _run(self, case: Case, one: Candidate, number: int, *, watched: bool = False) -> Run:
        process = self.processes.setdefault(one.name, Process(one))
        tenants, days = self._part(case, one, number)
        _, last = self._window(case, one, number)
        return process.run(self.conninfo, tenants, last - timedelta(days=days - 1), last, watched=watched)

    def _tenants_with_jobs(self, first: date, last: date) -> set[str]:
        def work(connection: psycopg.Connection[Any], tenant: str) -> bool:
            row = connection.execute(
                f"SELECT EXISTS (SELECT FROM {tenant}.marketplace_jobs WHERE completed_at >= '{first} 00:00Z' "
                f"AND completed_at < '{last + timedelta(days=1)} 00:00Z')".encode()
            ).fetchone()
            return bool(row and row[0])

        return {tenant for tenant, has_jobs in each_tenant(self.conninfo, self.tenants, work).items() if has_jobs}

    def _right(self, first: Any, last: Any) -> Frames:
        step = max(1, len(self.tenants) // COMPARED_TENANTS)
        # The first ones are those that everybody computes.
        chosen = dict.fromkeys([*self.tenants[:SAMPLED_TENANTS], *self.tenants[::step]])
        right = {tenant: right_frame(self.conninfo, tenant, first, last) for tenant in chosen}
        # What is right is itself compared, in a tenant, with the reference of the tests, which is too slow for all.
        if wrong := reference_differences(self.conninfo, self.tenants[0], right[self.tenants[0]], first, last):
            raise click.ClickException(f"What is held for right differs from the reference: {wrong}")
        return right

    def _differences(self, case: Case, one: Candidate, right: Frames) -> list[str]:
        tenants, days = self._part(case, one, 0)
        if self.whole and one.table == OURS:
            right = self.whole
        some = {tenant: frame for tenant, frame in right.items() if tenant in set(tenants)}
        _, last = self._window(case, one, 0)
        return result_differences(one, self.conninfo, some, last - timedelta(days=days - 1), last)

    def _prepare_case(self, case: Case) -> None:
        """What the source and all tables must hold before the case."""
        if case.before == "a new day":
            runs = range((self.rounds + 1) * len(case.ours))
            new = ", ".join(f"'{data.LAST - timedelta(days=APART_DAYS * number)}'" for number in runs)
            for one in (*case.ours, *case.users):
                if one.table not in self.filled:
                    self._fill(one)
            tables = [*DATED, *(str(user.table) for user in case.users)]
            self.each(*(f"DELETE FROM {{0}}.{table} WHERE date IN ({new})" for table in tables))
            self.each(*(f"VACUUM ANALYZE {{0}}.{table}" for table in tables))
            self.filled.clear()  # Whoever needs the whole year has to fill it again.
        elif case.before in ("deletions", "deleted") and not self.whole:
            self._fill(STATEMENTS)
            self.whole = self._right(data.FIRST, data.LAST)
            self.each(
                "DELETE FROM {0}.marketplace_tasks WHERE abs(hashint4(job_id)::bigint) % 10 < 3",
                "DELETE FROM {0}.marketplace_jobs WHERE abs(hashint4(id)::bigint) % 10 < 3",
                "VACUUM ANALYZE {0}.marketplace_tasks",
                "VACUUM ANALYZE {0}.marketplace_jobs",
            )
            self._run(_YEAR, STATEMENTS, 0)

    def _prepare(self, case: Case, one: Candidate) -> None:
        """What the candidate's table must hold before it is run."""
        if not one.table or case.before == "a new day":
            return
        tables = OUR_TABLES if one.table == OURS else (one.table,)
        if case.before == "nothing":
            self.each(*(f"TRUNCATE {{0}}.{table}" for table in tables))
            # Day by day, only a part of the year comes back.
            self.filled.discard(one.table)
            if one is not BY_DAY:
                self.filled.add(one.table)
            return
        if one.table not in self.filled:
            self._fill(one)
        # The users' candidates write all rows, whatever changed, so that the changes before our runs do for all.
        if case.before == "changes" and one.table == OURS:
            self._change()
        if case.before == "deletions":
            facts = "{0}.marketplace_job_facts"
            self.each(
                f"UPDATE {facts} SET deleted_at = NULL WHERE deleted_at IS NOT NULL",
                f"VACUUM ANALYZE {facts}",
                f"SELECT count(*) FROM {facts} WHERE deleted_at IS NULL",
            )

    def _fill(self, one: Candidate) -> None:
        """The year, computed by us; others get a copy."""
        if OURS not in self.filled:
            self._run(_YEAR, STATEMENTS, 0)
            self.filled.add(OURS)
        if one.table != OURS:
            table = f"{{0}}.{one.table}"
            self.each(f"TRUNCATE {table}", f"INSERT INTO {table} SELECT * FROM {{0}}.{OURS}", f"VACUUM ANALYZE {table}")
        else:
            self.each(*(f"VACUUM ANALYZE {{0}}.{table}" for table in OUR_TABLES))
        self.filled.add(str(one.table))

    def _change(self) -> None:
        """Changes a hundredth of the jobs, others each time, and reads all, so that nobody pays for hint bits."""
        self.changes += 1
        self.each(
            "UPDATE {0}.marketplace_jobs SET retry_count = retry_count + 1 "
            f"WHERE abs(hashint4(id)::bigint) % 100 = {self.changes % 100} AND status IN ('completed', 'failed')",
            "SELECT count(*) FROM {0}.marketplace_jobs WHERE retry_count >= 0",
        )

    def sizes(self) -> str:
        """How large the year of all tenants is, computed by us, in a sentence."""
        self._fill(STATEMENTS)

        def work(connection: psycopg.Connection[Any], tenant: str) -> tuple[int, ...]:
            tables = ("marketplace_jobs", "marketplace_tasks", *OUR_TABLES)
            counted = f"(SELECT count(*) FROM {tenant}.marketplace_job_facts)"
            columns = [counted, *(f"pg_total_relation_size('{tenant}.{table}')" for table in tables)]
            return tuple(connection.execute(f"SELECT {', '.join(columns)}".encode()).fetchall()[0])

        found = each_tenant(self.conninfo, self.tenants, work).values()
        count, jobs, tasks, *ours = (sum(numbers) for numbers in zip(*found, strict=True))
        facts = ours[OUR_TABLES.index("marketplace_job_facts")]
        return (
            f"{count:,} facts of {facts / count:.0f} bytes with their indexes, {facts / (jobs + tasks):.2f} of the "
            f"source's tables and indexes; everything of ours {sum(ours) / (jobs + tasks):.2f}"
        )


_YEAR = Case("", "", data.DAYS, "the year")


def run_all(
    server: str, size: Size, only: Sequence[str], progress: Progress, save: Callable[[Sequence[Row]], None]
) -> list[Row]:
    """Runs the cases; `save` is called after each, so that an interrupted benchmark keeps what it has."""
    names = [*size.cases, *(name + INDEX for name in size.indexed), *([MANY] if size.many else [])]
    wanted = list(only or names)
    rows: list[Row] = []

    def database(name: str, tenants: int, jobs: int) -> Bench:
        progress.console.print(f"Making {tenants:,} tenants with {jobs:,} jobs and {3 * jobs:,} tasks each")
        conninfo = create_database(server, name)
        data.make(conninfo, tenants, jobs)
        bench = Bench(conninfo, tenants, size.rounds, progress)
        bench.each(
            *(f"CREATE TABLE {{0}}.{table} (LIKE {{0}}.{OURS} INCLUDING ALL)" for table in OTHER_TABLES),
        )
        return bench

    def show(case: Case, found: list[Row], suffix: str, of: str) -> None:
        rows.extend(found)
        save(rows)
        progress.console.print(table_of(f"{case.name}{suffix}: {case.title}; {of}", found), "")

    of = f"{size.tenants:,} tenants with {size.jobs:,} jobs each, medians of {size.rounds} rounds"
    if any(case.name + suffix in wanted for case in CASES for suffix in ("", INDEX)):
        with contextlib.closing(database("bench", size.tenants, size.jobs)) as bench:
            progress.console.print(bench.sizes(), "")
            for case in CASES:
                if case.name in wanted:
                    show(case, bench.run_case(case), "", of)
            indexed = [case for case in CASES if case.name + INDEX in wanted]
            if indexed:
                command = ("python", "-m", "pipelines.covering_index", "build", "--yes")
                run(*command, environment={"DATABASE_URL": url_of(bench.conninfo)})
                bench.each("VACUUM ANALYZE {0}.marketplace_jobs")
            for case in indexed:
                show(case, bench.run_case(case, INDEX), INDEX, of)
    for name, cases, tenants, jobs in (
        ("deleted", DELETED_CASES, size.tenants, size.jobs),
        # So few that nine of ten tenants have no job on a day.
        ("population", POPULATION_CASES, size.population, (data.DAYS + data.BEFORE) // 10),
    ):
        if not any(case.name in wanted for case in cases):
            continue
        of = f"{tenants:,} tenants with {jobs:,} jobs each, medians of {size.rounds} rounds"
        with contextlib.closing(database(name, tenants, jobs)) as bench:
            for case in cases:
                if case.name in wanted:
                    show(case, bench.run_case(case), "", of)
    if MANY in wanted:
        for tenants in size.many or SIZES["full"].many:
            with contextlib.closing(database(f"many_{tenants}", tenants, 100)) as bench:
                of = f"{tenants:,} tenants with 100 jobs each"
                show(MANY_TENANTS, bench.run_case(MANY_TENANTS, f" ({tenants:,})"), f" ({tenants:,})", of)
    return rows


@click.command(help=__doc__)
@click.option("--size", type=click.Choice(list(SIZES)), default="small", show_default=True)
@click.option("--tenants", type=int, help="How many tenants, instead of the size's.")
@click.option("--jobs", type=int, help="How many jobs each, and three times as many tasks.")
@click.option("--rounds", type=int, help="How many rounds.")
@click.option("--population", type=int, help="How many small tenants, of which most have no job on a day.")
@click.option("--only", multiple=True, type=click.Choice(NAMES), help="Only this; may be given several times.")
def main(
    size: str,
    tenants: int | None,
    jobs: int | None,
    rounds: int | None,
    population: int | None,
    only: tuple[str, ...],
) -> None:
    base = SIZES[size]
    chosen = Size(
        tenants or base.tenants,
        jobs or base.jobs,
        rounds or base.rounds,
        base.cases,
        base.indexed,
        population or base.population,
        base.many,
        base.shared_buffers if not tenants else SIZES["full"].shared_buffers,
    )
    console = Console(width=None if Console().is_terminal else 160)
    for name in os.environ:
        if name.startswith(("STATS_", "PG", "DAGSTER_")) or name in ("DATABASE_URL", "ALERT_WEBHOOK_URL"):
            del os.environ[name]  # None of the user's own settings may reach a candidate.
    os.environ["PYTHONWARNINGS"] = "ignore:XDG_RUNTIME_DIR is not set"  # The candidates' processes would all tell.
    for user in USERS:
        if missing := user.missing():
            console.print(f"Left out: {user.name}, since {', '.join(missing)} is not installed; `make bench` does that")
    settings = {
        "fsync": "on",
        "autovacuum": "off",
        "shared_buffers": chosen.shared_buffers,
        # No checkpoint but those before each run.
        "max_wal_size": "32GB",
        "checkpoint_timeout": "1d",
    }
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())

    def save(rows: Sequence[Row]) -> None:
        RESULT.parent.mkdir(exist_ok=True)
        content = {
            "size": asdict(chosen),
            "settings": settings,
            "compared_tenants": COMPARED_TENANTS,
            "rows": [row.as_json() for row in rows],
            "targets": [asdict(target) | {"is_met": target.is_met} for target in targets(rows)],
        }
        RESULT.write_text(json.dumps(content, indent=1))

    with running_server(**settings) as server, Progress(*columns, console=console) as progress:
        rows = run_all(server, chosen, only, progress, save)
    table = Table("target", "measured", "at most", "", title="Targets", title_justify="left")
    for target in targets(rows) if max(row.tenants for row in rows) >= TOLD_FROM_TENANTS else []:
        verdict = "[green]met" if target.is_met else "[red]missed"
        table.add_row(target.text, f"{target.value:.2f}", f"{target.limit:g}", verdict)
    console.print(table if table.row_count else f"The targets are judged from {TOLD_FROM_TENANTS} tenants on.")
    console.print(f"Also in {RESULT}")
    if wrong := [row for row in rows if row.wrong]:
        lines = [f"{row.case}, {row.candidate}: {one}" for row in wrong for one in row.wrong]
        raise click.ClickException("\n".join(["Some were struck off:", *lines]))


if __name__ == "__main__":
    main()
