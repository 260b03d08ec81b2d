"""One tenant's transaction: lock, look into the ledger, bring the facts in line, write what differs, prove, commit.

`write_tenant` is the protocol; the statements are in `facts` and `stats`.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date, timedelta
from typing import Any

import sqlalchemy as sa

from assets.marketplace_job_stats import DEFINITION as DEFINITION
from assets.marketplace_job_stats import facts, stats
from assets.marketplace_job_stats.statement import Statement
from assets.marketplace_job_stats.stats import COUNTS
from models.stats import MarketplaceJobStats
from pipelines.failure import TenantError
from pipelines.partitions import Days, Window
from pipelines.tenants import quoted

LONG_DAYS = 31
"""From so many days on, all tasks are read at once; for fewer, those of each job are looked up."""

REASONS = ("unknown_marketplace", "no_start", "bad_duration")
"""Why a job of a day is not counted, or not wholly."""


_Row = tuple[date, int | None, str | None]
"""Date, action type and marketplace of a stats row; the last two are null for what is new of a new day."""


class ProofError(TenantError):
    """The stored rows are not what was counted; the tenant's transaction is rolled back."""


class TimeZoneError(TenantError):
    """The tenant's other days were computed in another time zone; nothing was done."""

    def __init__(self, computed_in: str, wanted: str, first: date, last: date) -> None:
        super().__init__(
            f"its days were computed in {computed_in}, not in {wanted}, and days of two zones overlap: "
            f"set STATS_TIMEZONE back, or recompute them all in one run, with --partition-range {first}...{last}"
        )


class DefinitionError(TenantError):
    """A newer release has computed days of this tenant; nothing was done."""

    def __init__(self, found: int) -> None:
        super().__init__(
            f"its days were computed by definition {found}, and this release knows no newer one than {DEFINITION}: "
            "run the newer release"
        )


@dataclass(frozen=True)
class ComputeSpec:
    """What a run asks of every tenant: these days, or with `only_missing` those of them that are due.

    A day is due that the ledger lacks, or has open, or by an older definition. `is_open`: the window is one day, which
    is not over. `catch_up`: days up to the last one asked for, of which those that are due are taken along.
    `allow_shrink`: forget, for the days of the run, what the source no longer holds. `count_no_end`: look for jobs that
    have no day. `reasons`: keep why jobs failed.
    """

    window: Window
    run_id: str
    days: Days
    is_open: bool = False
    only_missing: bool = False
    catch_up: Window | None = None
    allow_shrink: bool = False
    count_no_end: bool = False
    reasons: bool = True


@dataclass(frozen=True)
class Day:
    """What is stored of a day, and what the ledger says of it; `entry` is None if it lacks the day."""

    entry: str | None  # The outcome.
    definition: int | None
    job_count: int | None
    uncounted: tuple[int, ...]  # As REASONS.
    is_as_left: bool  # The stored rows are those that the ledger knows.
    row_count: int
    sums: tuple[int, ...]  # As COUNTS.


@dataclass
class TenantResult:
    """What a tenant's transaction did, and what its days are now.

    `days`: what is stored of each day of the run. `stored`: the same of all days looked at of which something is
    stored, also of those that were not due. `written`: rows inserted, updated and deleted of each day that was
    written. `sums`: what is stored, by marketplace and action type. `uncounted`: jobs that are not counted, or not
    wholly, by reason, marketplace and action type. `changes`: of settled rows, how many changed, and the largest.
    """

    days: dict[date, Day] = field(default_factory=dict)
    stored: dict[date, Day] = field(default_factory=dict)
    written: dict[date, tuple[int, int, int]] = field(default_factory=dict)
    sums: dict[tuple[str, int], tuple[int, ...]] = field(default_factory=dict)
    uncounted: Counter[tuple[str, str, int]] = field(default_factory=Counter)
    change_count: int = 0
    changes: list[dict[str, Any]] = field(default_factory=list)

    @property
    def held_back(self) -> set[date]:
        """Those of the days that keep their stored rows."""
        return {day for day, it in self.days.items() if it.entry == "held_back"}


def _numbers(sums: Sequence[int | None] | None) -> tuple[int, ...]:
    """Sums as they come from the database, in which null stands for what is unknown, or for no rows."""
    return tuple(number or 0 for number in sums) if sums else (0,) * len(COUNTS)


def write_tenant(connection: sa.Connection, schema: str, spec: ComputeSpec, has_tasks: bool) -> TenantResult:
    """Computes the days of one tenant in one transaction.

    The lock comes first: under REPEATABLE READ the snapshot is taken after it is granted, so runs over the same tenant,
    and writers of the stats, follow each other, and readers are not disturbed. No source row is locked. Raises
    ProofError, TimeZoneError, DefinitionError, or what the database raises; then nothing is written.
    """
    result = TenantResult()
    with connection.begin():
        table = f"{quoted(schema)}.{MarketplaceJobStats.__tablename__}"
        connection.exec_driver_sql(f"LOCK TABLE {table} IN SHARE ROW EXCLUSIVE MODE")
        tenant = _Tenant(connection, schema, spec, has_tasks, result)
        tenant.look()
        tenant.compute(tenant.windows())
        if tenant.must_look_again:
            tenant.look()
        if spec.count_no_end:
            for marketplace, action_type_id, count in stats.NO_END.run(connection, schema, {}):
                result.uncounted["no_end", marketplace, action_type_id] += count
    return result


def stored_days(connection: sa.Connection, schema: str, spec: ComputeSpec) -> dict[date, Day]:
    """What is stored of the days of a run for a tenant that it has not computed. Raises what the database raises."""
    result = TenantResult()
    with connection.begin():
        _Tenant(connection, schema, replace(spec, catch_up=None), True, result).look()
    return result.stored


class _Tenant:
    """The work within the transaction."""

    def __init__(
        self, connection: sa.Connection, schema: str, spec: ComputeSpec, has_tasks: bool, result: TenantResult
    ) -> None:
        self._connection, self._schema, self._spec = connection, schema, spec
        self._has_tasks, self._result = has_tasks, result
        self._candidates = spec.catch_up or spec.window
        self._dates = frozenset(self._candidates.dates)
        self._known: dict[date, Day] = {}
        self._elsewhere: dict[date, tuple[str, str]] = {}  # Zone and outcome of days in another zone.
        self.must_look_again = False
        """Whether rows were stored before of days that were written: the result is what is stored now."""

    def look(self) -> None:
        """Reads what is stored, and the ledger. Raises DefinitionError."""
        candidates = self._candidates
        self._known, self._elsewhere, self._result.sums = {}, {}, {}
        dates = set(candidates.dates)
        for row in self._run(stats.STORED, candidates.parameters):
            day, time_zone, outcome, definition, job_count, *uncounted, is_as_left = row[:9]
            marketplace, action_type_id, row_count, sums = row[9:]
            sums = _numbers(sums)
            if day is None:
                self._result.sums[marketplace, action_type_id] = sums
                continue
            if time_zone not in (None, candidates.time_zone):
                self._elsewhere[day] = time_zone, outcome
            if (definition or 0) > DEFINITION:
                raise DefinitionError(definition)
            if day in dates:
                counts = tuple(number or 0 for number in uncounted)
                self._known[day] = Day(outcome, definition, job_count, counts, is_as_left, row_count or 0, sums)
        self._result.days |= {day: known for day, known in self._known.items() if day in self._result.days}
        self._result.stored = self._known

    def windows(self) -> list[Window]:
        """The days to compute for this tenant, in the light of its ledger. Raises TimeZoneError."""
        spec = self._spec
        candidates = self._candidates
        due = {day for day in candidates.dates if self._is_due(day)}
        chosen = due if spec.only_missing else due.union(spec.window.dates)
        # Where the zone has changed, the days of the old and of the new one overlap, or leave hours out between them.
        # So no day of the old zone may stay. One that was still open is made again, when it is there in the new zone.
        if self._elsewhere:
            settled = {day: zone for day, (zone, outcome) in self._elsewhere.items() if outcome != "open"}
            if not chosen.issuperset(settled):
                asked = () if spec.is_open else (candidates.dates[-1],)
                raise TimeZoneError(
                    next(iter(settled.values())), candidates.time_zone, min(settled), max((*settled, *asked))
                )
            if left := sorted(self._elsewhere.keys() - chosen):
                self._run(stats.DROP_ROWS, {"days": left})
                self._run(stats.DROP_ENTRIES, {"days": left})
            day_s = timedelta(days=1)
            edges = [candidates.starts[0] - day_s / 2, candidates.end + day_s / 2]
            self._run(facts.REDATE, spec.days.of(candidates, edges))
        return candidates.parts(chosen)

    def _is_due(self, day: date) -> bool:
        known = self._known.get(day)
        is_unsettled = known is not None and known.entry == "open" and not self._spec.is_open
        return known is None or known.definition is None or known.definition < DEFINITION or is_unsettled

    def compute(self, windows: Sequence[Window]) -> None:
        """Brings the facts of the windows in line with the source, then their days, and others that changed with them.

        The stats are written once for all windows: a job may have moved from one to another.
        """
        asked = [day for window in windows for day in window.dates]
        changes, uncounted = self._bring_in_line(windows)
        changed = {day for day, _, _ in changes}
        outside = self._outside(changed.difference(asked), changes)
        days = {
            day
            for day in asked
            if day in changed
            or self._is_due(day)
            or day in self._elsewhere
            or not self._known[day].is_as_left
            or self._known[day].entry == "held_back"
            or self._known[day].uncounted != uncounted[day]
        }
        doubtful = self._doubtful(days, changes)
        held_back = set() if self._spec.allow_shrink else self._held_back(windows, doubtful)
        entered = {day: self._entry(day, day in held_back) for day in days}
        for day, known in outside.items():
            entered[day] = (str(known.entry), int(known.definition or 1))
            uncounted[day] = known.uncounted
        if not self._enter_empty(entered, changed, uncounted):
            self._write(days - held_back, outside, doubtful, changes)
            self._enter(entered, uncounted)
        nothing = Day(None, None, None, (0,) * len(REASONS), True, 0, _numbers(None))
        self._result.days |= {day: self._known.get(day, nothing) for day in asked}

    def _entry(self, day: date, is_held_back: bool) -> tuple[str, int]:
        """Outcome and definition of a day that is computed. What is settled stays so, though its run began before
        midnight; and an open day that keeps its rows has to be judged again, so it is of no definition of facts."""
        if self._spec.is_open and (day not in self._known or self._known[day].entry in (None, "open")):
            return "open", 1 if is_held_back else DEFINITION
        return "held_back" if is_held_back else "computed", DEFINITION

    def _bring_in_line(
        self, windows: Iterable[Window]
    ) -> tuple[dict[_Row, Counter[str]], defaultdict[date, tuple[int, ...]]]:
        """What has happened to the jobs of each stats row, by date, action type and marketplace; and per day how many
        jobs are not counted, as REASONS."""
        changes: defaultdict[_Row, Counter[str]] = defaultdict(Counter)
        uncounted: defaultdict[date, tuple[int, ...]] = defaultdict(lambda: (0,) * len(REASONS))
        for window in windows:
            self._compare(window, changes, uncounted)
        return dict(changes), uncounted

    def _compare(
        self,
        window: Window,
        changes: defaultdict[_Row, Counter[str]],
        uncounted: defaultdict[date, tuple[int, ...]],
    ) -> None:
        """Brings the facts of one window in line, and adds to what has happened."""
        spec = self._spec
        # Of days that are not in the ledger nobody asks what is new in each of their rows: nothing there can change.
        is_new = all(map(self._is_new, window.dates))
        parameters = window.parameters | {"allow_shrink": spec.allow_shrink, "is_new": is_new}
        tasks = "none" if not self._has_tasks else "scan" if len(window.dates) >= LONG_DAYS else "lookup"
        ids: list[int] = []
        for kind, day, action_type_id, marketplace, count, found in self._run(
            facts.compare(tasks, spec.reasons), parameters
        ):
            if kind == "others":
                ids = found or []
            elif kind == "late":
                changes[day, action_type_id, marketplace]["late"] += count
            else:
                self._result.uncounted[kind, marketplace, action_type_id] += count
                uncounted[day] = tuple(
                    number + count * (kind == reason) for reason, number in zip(REASONS, uncounted[day], strict=True)
                )
        if ids:
            ends = [end for (end,) in self._run(facts.ENDS, {"ids": ids})]
            around = parameters | spec.days.of(window, ends) | {"ids": ids}
            tasks = "lookup" if self._has_tasks else "none"
            names = ("corrected", "removed", "moved_in", "moved_out", "forgotten", "is_forgetful")
            for day, action_type_id, marketplace, *numbers in self._run(facts.change(tasks, spec.reasons), around):
                changes[day, action_type_id, marketplace].update(dict(zip(names, map(int, numbers), strict=True)))

    def _outside(self, days: Collection[date], changes: Mapping[_Row, Counter[str]]) -> dict[date, Day]:
        """Of the days that nobody asked for, but whose facts changed, those that are aggregated again.

        A day that nobody has computed waits. One whose numbers its facts do not account for is left alone, and judged
        when somebody asks for it.
        """
        if not days:
            return {}
        known: dict[date, Day] = {}
        span = {"first_date": min(days), "last_date": max(days), "time_zone": self._spec.window.time_zone}
        for row in self._run(stats.STORED, span):
            if row[0] in days and row[2] is not None:
                if row[3] > DEFINITION:
                    raise DefinitionError(row[3])
                uncounted = tuple(number or 0 for number in row[5:8])
                known[row[0]] = Day(row[2], row[3], row[4], uncounted, row[8], row[11] or 0, ())
        accounted = self._accounted(known, changes)
        if left := sorted(known.keys() - accounted):
            self._run(stats.SPOIL, {"days": left})
        return {day: known[day] for day in accounted}

    def _accounted(self, known: Mapping[date, Day], changes: Mapping[_Row, Counter[str]]) -> set[date]:
        """Of these days, those whose stored numbers are what their facts counted, before anything of this run: nobody
        has pruned them, and they were computed from facts."""
        computed = [day for day, it in known.items() if it.entry in ("computed", "open") and (it.definition or 0) > 1]
        if not computed:
            return set()
        counts = dict(self._run(facts.COUNTS, {"days": computed}))
        for (day, _, _), change in changes.items():
            if day in known:
                came = change["late"] + change["moved_in"]
                went = change["moved_out"] + change["forgotten"] + change["removed"]
                counts[day] = counts.get(day, 0) - came + went
        return {day for day in computed if counts.get(day, 0) == known[day].job_count}

    def _doubtful(self, days: Iterable[date], changes: Mapping[_Row, Counter[str]]) -> list[date]:
        """Of these days, those that have stored numbers for which their facts do not account."""
        stored = {day: self._known[day] for day in days if day in self._known and self._known[day].row_count}
        return sorted(stored.keys() - self._accounted(stored, changes)) if stored else []

    def _held_back(self, windows: Iterable[Window], doubtful: Sequence[date]) -> set[date]:
        """Of these days, those that keep their stored rows."""
        if not doubtful:
            return set()
        starts = {day: start for window in windows for day, start in zip(window.dates, window.starts, strict=True)}
        parameters = {"days": doubtful, "starts": [starts[day] for day in doubtful]}
        return {row[0] for row in self._run(stats.HELD_BACK, parameters)}

    def _write(
        self,
        asked: Collection[date],
        outside: Collection[date],
        doubtful: Sequence[date],
        changes: Mapping[_Row, Counter[str]],
    ) -> None:
        """Writes the stats of these days where they are not what their facts say."""
        days = sorted({*asked, *outside})
        if not days:
            return
        parameters: dict[str, Any] = {"days": days}
        statement = stats.INSERT
        if not all(map(self._is_new, days)):
            statement = stats.UPDATE
            happened = [
                {"date": day.isoformat(), "action_type_id": action_type_id, "marketplace": marketplace, **change}
                | {"is_forgetful": bool(change["is_forgetful"])}
                for (day, action_type_id, marketplace), change in changes.items()
            ]
            parameters |= {
                "changes": json.dumps(happened),
                "run_id": self._spec.run_id,
                "redefined": sorted(day for day in asked if self._is_due(day)),
                "shrinking": doubtful if self._spec.allow_shrink else [],
            }
        for day, inserted, updated, deleted, journal in self._run(statement, parameters):
            if day is None:
                self._result.change_count += inserted
                self._result.changes += journal or []
            else:
                self._result.written[day] = (inserted, updated, deleted)

    def _is_new(self, day: date) -> bool:
        """Whether nothing is stored of a day that was asked for, not even that it has no jobs."""
        return day in self._dates and day not in self._known

    def _enter_empty(
        self,
        entered: Mapping[date, tuple[str, int]],
        changed: Collection[date],
        uncounted: Mapping[date, tuple[int, ...]],
    ) -> bool:
        """Enters these days in one small statement, if neither rows nor facts are stored of any; whether it did."""
        stored = {day for day, it in self._known.items() if it.row_count}
        if changed or not entered or not self._dates.issuperset(entered) or stored.intersection(entered):
            return False
        if not self._run(stats.ENTER_EMPTY, self._entries(entered, uncounted)):
            return False
        for day in entered:
            self._known[day] = Day(*entered[day], 0, uncounted[day], True, 0, _numbers(None))
            self._result.written[day] = (0, 0, 0)
        return True

    def _entries(
        self, entered: Mapping[date, tuple[str, int]], uncounted: Mapping[date, Sequence[int]]
    ) -> dict[str, Any]:
        """The parameters by which days are entered into the ledger."""
        days = sorted(entered)
        return {
            "days": days,
            "outcomes": [entered[day][0] for day in days],
            "definitions": [entered[day][1] for day in days],
            "time_zone": self._spec.window.time_zone,
            "run_id": self._spec.run_id,
        } | {reason: [uncounted[day][place] for day in days] for place, reason in enumerate(REASONS)}

    def _enter(self, entered: Mapping[date, tuple[str, int]], uncounted: Mapping[date, Sequence[int]]) -> None:
        """Enters these days into the ledger; raises ProofError if what is stored is not what was counted."""
        if not entered:
            return
        before = {day: self._known[day].row_count for day in entered if day in self._known}
        self.must_look_again = any(before.values()) or not self._dates.issuperset(entered)
        totals = self._result.sums
        for day, marketplace, action_type_id, row_count, stored, job_count, differs, counted in self._run(
            stats.ENTER, self._entries(entered, uncounted)
        ):
            sums = _numbers(stored)
            if day is None:
                key = marketplace, action_type_id
                totals[key] = tuple(map(sum, zip(totals.get(key, _numbers(None)), sums, strict=True)))
                continue
            if differs:
                unknown = (None,) * len(COUNTS)
                pairs = zip(COUNTS, stored or unknown, counted or unknown, strict=True)
                name, found, right = next(pair for pair in pairs if pair[1] != pair[2])
                raise ProofError(
                    f"{MarketplaceJobStats.__tablename__} holds {name} = {found} for {day}, but {right} were "
                    "counted: look for a trigger or rule on the table"
                )
            outcome, definition = entered[day]
            self._known[day] = Day(outcome, definition, job_count, tuple(uncounted[day]), True, row_count or 0, sums)
            if before.get(day) or day not in self._dates:
                self._result.written.setdefault(day, (0, 0, 0))
            else:
                self._result.written[day] = (row_count or 0, 0, 0)

    def _run(self, statement: Statement, parameters: dict[str, Any]) -> Sequence[Any]:
        return statement.run(self._connection, self._schema, parameters)
