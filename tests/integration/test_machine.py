"""Promises 13 to 17, 19, 23 and 24 over time: whatever the application, its clean-ups, its old counter, people,
runs and crashes do in turn.

A state machine does in any order what happens to a database over months. Beside each tenant stands a `Memory` of the
independent reference: a run makes of it what the definitions make of the source rows, the old counter and people write
to it, and nothing else changes it. After each step facts, stats, ledger and journal are compared with it.
"""

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, timedelta
from itertools import count
from typing import Any, ClassVar
from unittest import mock

import dagster as dg
import psycopg
import pytest
import sqlalchemy as sa
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from hypothesis.stateful import run_state_machine_as_test as run_machine
from psycopg.types.datetime import TimestamptzLoader

from assets.marketplace_job_stats import transaction
from assets.marketplace_job_stats.statement import Statement
from assets.marketplace_job_stats.stats import COUNTS
from assets.marketplace_job_stats.transaction import ComputeSpec, DefinitionError, TenantResult, write_tenant
from pipelines.database import create_engine
from pipelines.partitions import Days, Window
from tests import application, strategies
from tests.conftest import RUN_ROLE, create_database, run_url
from tests.reference import (
    FINISHED_JOB_STATUSES,
    JOB_COLUMNS,
    KNOWN_MARKETPLACES,
    NUMBERS,
    ROW_COLUMNS,
    TASK_COLUMNS,
    Day,
    Fact,
    JournalLine,
    LedgerDay,
    Memory,
    RowKey,
    Source,
    StatsRow,
    percentiles,
    uncounted,
    without_end,
)

DATABASE = "machine"
SERVER_SIDES = (f"DATABASE {DATABASE}", f"ROLE {RUN_ROLE} IN DATABASE {DATABASE}")
TENANTS = ("user_1", "user_2", "user_10")
"""The first one has statuses of enum types, which lack the label `expired`; the others share one sequence of ids."""
SOURCES = {"marketplace_jobs": (*JOB_COLUMNS, "product_id"), "marketplace_tasks": (*TASK_COLUMNS, "task_type")}
TARGETS = (
    "marketplace_job_facts",
    "marketplace_job_stats",
    "marketplace_job_stats_days",
    "marketplace_job_stats_changes",
)
FACT_COLUMNS = tuple(name for name in Fact.__dataclass_fields__ if name != "deleted_at")
PERCENTILES = ("p50_duration_ms", "p95_duration_ms", "p99_duration_ms", "p50_wait_ms", "p95_wait_ms")
TALLY = ("late", "corrected", "moved_in", "moved_out", "forgotten")
REASONS = ("unknown_marketplace", "no_start", "bad_duration")
LATER_COLUMNS = tuple(name for name in NUMBERS if "wait" in name)
"""What the definition before facts did not know."""
FIRST_DEFINITION = 2
DAY_COUNT = 4
NOW = datetime(2026, 6, 1, tzinfo=UTC)
"""When all runs of the reference are: after all days."""

# Most happens to one tenant, so that its history gets long, and to few instants, so that they meet.
tenants = st.sampled_from(("user_2", "user_2", "user_2", "user_10", "user_1"))
# Days go by their numbers, from 0. Day 2 is the one that the zone was chosen for; in half of the examples PostgreSQL
# and Python disagree about its midnight.
numbers = st.sampled_from((2, *range(DAY_COUNT)))
ranges = st.tuples(numbers, numbers).map(sorted) | numbers.map(lambda number: [number, number]) | st.just([0, 3])
havana, azores = ("America/Havana", date(2025, 11, 2)), ("Atlantic/Azores", date(2025, 10, 26))
zones = strategies.zones() | st.sampled_from((havana, azores))
clock_zones = st.sampled_from(("America/Havana", "Europe/Paris", "Australia/Lord_Howe", "Etc/GMT+12"))
# The limit of a day, by its number, and how long after it.
later = st.sampled_from((timedelta(0), timedelta(0), strategies.US, -strategies.US, timedelta(hours=12)))
instants = st.tuples(st.integers(0, DAY_COUNT), later)
strays = st.sampled_from((datetime(1970, 1, 1, tzinfo=UTC), datetime(2024, 2, 29, 12, tzinfo=UTC), "infinity", None))
flags = st.sampled_from((False, False, False, True))
# What changes together in one job or task.
job_changes = st.sampled_from((("status", "started_at", "completed_at"), *((name,) for name in JOB_COLUMNS[1:])))
task_changes = st.sampled_from(tuple((name,) for name in TASK_COLUMNS[1:]))
# What becomes of the tasks of deleted jobs: orphans without a job, orphans that name it, or they go, too.
fates = st.sampled_from(("UPDATE {0}.marketplace_tasks SET job_id = NULL", None, "DELETE FROM {0}.marketplace_tasks"))
task_types = ("plugin_http", "direct_http")
overwritten = st.sampled_from(
    ("total_jobs", "failure_count", "cancelled_count", "duration_sum_ms", "total_tasks", "wait_count")
)

Row = Mapping[str, Any]


class Killed(Exception):
    """The run ends here."""


class InfiniteLoader(TimestamptzLoader):
    """Times as the reference takes them: an infinite one is PostgreSQL's text of it."""

    def load(self, data: Any) -> Any:
        text = bytes(data).decode()
        return text if text.endswith("infinity") else super().load(data)


@dataclass(frozen=True)
class Copy:
    """What a backup holds of a tenant."""

    jobs: list[Row]
    tasks: list[Row]


class Machine(RuleBasedStateMachine):
    """The database, driven by the rules; and the memories, by tenant."""

    owner: ClassVar[psycopg.Connection[Any]]
    engine: ClassVar[sa.Engine]

    @initialize(zone=zones, clock_zone=clock_zones, computed=numbers, data=st.data())
    def begin(self, zone: tuple[str, date], clock_zone: str, computed: int, data: st.DataObject) -> None:
        """Days around a clock change of the reporting zone, with source and stored rows; one of them is computed."""
        self.zone, interesting = zone
        around = [strategies.day_of(self.zone, interesting + timedelta(days)) for days in range(-4, DAY_COUNT)]
        self.days = around[2 : 2 + DAY_COUNT]
        self.limits = [limit.astimezone(UTC) for limit in (*(day.start for day in self.days), self.days[-1].end)]
        self.all_days = Days(dg.DailyPartitionsDefinition(start_date="2025-01-01", timezone=self.zone))
        self.session_zone = clock_zone
        self.definition, self.reasons = FIRST_DEFINITION, True
        self.memories = {schema: Memory(calendar=around, zone=self.zone) for schema in TENANTS}
        self.line_counts = dict.fromkeys(TENANTS, 0)
        self.has_tasks = dict.fromkeys(TENANTS, True)
        self.copies = {schema: Copy([], []) for schema in TENANTS}
        self.gone: dict[str, list[Row]] = {schema: [] for schema in TENANTS}
        self.ids, self.run_ids = count(1), count(1)
        for schema in TENANTS:
            for table in (*SOURCES, *TARGETS):
                self.owner.execute(f"DELETE FROM {schema}.{table}")
            self._store(schema, data.draw(strategies.stored_rows(self.days)))
            self.arrive(schema, computed, data)
        for schema in TENANTS:
            self.run(schema, [computed, computed], allow_shrink=False)

    def teardown(self) -> None:
        """No zone and no definition stays changed for the next example, nor for other tests; no table stays away."""
        transaction.DEFINITION = FIRST_DEFINITION
        for where in SERVER_SIDES:
            self.owner.execute(f"ALTER {where} RESET timezone")
        for schema, has_tasks in self.has_tasks.items() if hasattr(self, "has_tasks") else ():
            if not has_tasks:
                self.owner.execute(f"ALTER TABLE {schema}.away RENAME TO marketplace_tasks")
        os.environ.pop("PGTZ", None)
        self.engine.dispose()

    @invariant()
    def tables_equal_the_memories(self) -> None:
        """Every tenant's facts, stats and ledger are what the memory says, and nobody adds to the journal but runs."""
        for schema, memory in self.memories.items():
            columns = ", ".join(FACT_COLUMNS)
            stored = self._rows(f"SELECT {columns}, deleted_at IS NOT NULL FROM {schema}.marketplace_job_facts")
            facts = [
                (*(getattr(fact, name) for name in FACT_COLUMNS), fact.deleted_at is not None)
                for fact in memory.facts.values()
            ]
            assert Counter(stored) == Counter(facts)
            columns = ", ".join(ROW_COLUMNS)
            stored = self._rows(f"SELECT {columns}, computed_at IS NOT NULL FROM {schema}.marketplace_job_stats")
            rows = [
                (*key, *(row.numbers.get(name) for name in NUMBERS), row.computed_at is not None)
                for key, row in memory.rows.items()
            ]
            assert Counter(stored) == Counter(rows)
            self._ledger_equals(schema, memory)
            lines = self._rows(f"SELECT count(*) FROM {schema}.marketplace_job_stats_changes")
            assert lines == [(self.line_counts[schema],)]

    def _ledger_equals(self, schema: str, memory: Memory) -> None:
        entries = self._rows(f"SELECT date, outcome, definition, job_count FROM {schema}.marketplace_job_stats_days")
        assert {day: outcome for day, outcome, _, _ in entries} == {
            day: entry.outcome for day, entry in memory.ledger.items()
        }
        for day, _, definition, job_count in entries:
            entry = memory.ledger[day]
            # A day whose facts changed, though they do not account for its numbers, counts as one of the definition
            # before there were facts: so it is judged when somebody asks for it.
            assert definition == entry.definition or (definition == 1 and entry.jobs is None)
            assert entry.jobs is None or job_count == len(entry.jobs)

    # What the application does to its own rows. None of it changes what is ours.

    @rule(schema=tenants, day=numbers, data=st.data())
    def arrive(self, schema: str, day: int, data: st.DataObject) -> None:
        """Jobs of any status that mostly end on one day, and tasks of these, of earlier ones and of none."""
        jobs = data.draw(strategies.jobs([self.days[day]], max_size=8))
        self._insert(schema, "marketplace_jobs", [job | {"id": next(self.ids)} for job in jobs])
        self.add_tasks(schema, day, data)

    @rule(schema=tenants, day=numbers, data=st.data())
    def add_tasks(self, schema: str, day: int, data: st.DataObject) -> None:
        """Jobs get more tasks, also after they have ended."""
        if self.has_tasks[schema]:
            ids = self._ids(schema, "marketplace_jobs")
            tasks = data.draw(strategies.tasks(ids, [self.days[day]], max_size=8))
            self._insert(schema, "marketplace_tasks", [task | {"id": next(self.ids)} for task in tasks])

    @rule(schema=tenants, day=numbers, columns=job_changes, data=st.data())
    def change_jobs(self, schema: str, day: int, columns: tuple[str, ...], data: st.DataObject) -> None:
        """Jobs end, on any day; or they turn out to have ended at another time, in another way, or elsewhere."""
        for new in data.draw(strategies.jobs([self.days[day]], max_size=3)):
            self._change(schema, "marketplace_jobs", _fitting(schema, {name: new[name] for name in columns}), data)

    @rule(schema=tenants, day=numbers, columns=task_changes, data=st.data())
    def change_tasks(self, schema: str, day: int, columns: tuple[str, ...], data: st.DataObject) -> None:
        """Tasks come to another end, are tried again, or turn out to be another job's; the jobs do not change."""
        if self.has_tasks[schema]:
            ids = self._ids(schema, "marketplace_jobs")
            for new in data.draw(strategies.tasks(ids, [self.days[day]], max_size=3)):
                self._change(schema, "marketplace_tasks", {name: new[name] for name in columns}, data)

    @rule(
        schema=tenants, instant=instants | strays, marketplace=st.sampled_from((None, "depop", "ebay")), data=st.data()
    )
    def move_job(self, schema: str, instant: Any, marketplace: str | None, data: st.DataObject) -> None:
        """A job turns out to have ended on another day, or on none, maybe of another marketplace."""
        end = self._instant(instant) if isinstance(instant, tuple) else instant
        change = {"completed_at": end} | ({"marketplace": marketplace} if marketplace else {})
        self._change(schema, "marketplace_jobs", change, data)

    @rule(schema=tenants, keeps_end=st.booleans(), data=st.data())
    def reopen_job(self, schema: str, keeps_end: bool, data: st.DataObject) -> None:
        """A job runs again, and has not ended any more; some paths leave the old end."""
        change: dict[str, Any] = {"status": "running"}
        self._change(schema, "marketplace_jobs", change if keeps_end else change | {"completed_at": None}, data)

    @rule(schema=tenants, status=st.sampled_from(FINISHED_JOB_STATUSES), data=st.data())
    def finish_without_end(self, schema: str, status: str, data: st.DataObject) -> None:
        """Plain SQL ends a job and sets no time."""
        self._change(schema, "marketplace_jobs", _fitting(schema, {"status": status, "completed_at": None}), data)

    @rule(
        schema=tenants,
        by=st.sampled_from(
            ("completed_at", "created_at", "status", "action", "marketplace", "product", "random", "id")
        ),
        limit=instants,
        choice=st.integers(0, 2),
        is_half_done=flags,
        fate=fates,
    )
    def delete_jobs(
        self, schema: str, by: str, limit: tuple[int, timedelta], choice: int, is_half_done: bool, fate: str | None
    ) -> None:
        """Jobs are deleted by any rule, maybe seen when half of them are gone."""
        condition, value = {
            "completed_at": ("completed_at < %s", self._instant(limit)),
            "created_at": ("created_at < %s", self._instant(limit)),
            "status": ("status::text = %s", ("completed", "failed", "cancelled")[choice]),
            "action": ("action_type_id = %s", 1 + choice),
            "marketplace": ("marketplace = %s", KNOWN_MARKETPLACES[choice]),
            "product": ("product_id = %s", choice),
            "random": ("id * 7919 %% 3 = %s", choice),
            "id": ("id = (SELECT id FROM {0}.marketplace_jobs ORDER BY id OFFSET %s LIMIT 1)", choice),
        }[by]
        self._delete_jobs(schema, condition.format(schema), value, fate, is_half_done)

    @rule(schema=tenants, fate=fates)
    def truncate_jobs(self, schema: str, fate: str | None) -> None:
        """The whole table is emptied."""
        self._delete_jobs(schema, "%s", True, fate)

    @rule(schema=tenants)
    def back_up(self, schema: str) -> None:
        """Somebody makes a copy of the source."""
        tasks = self._table(schema, "marketplace_tasks") if self.has_tasks[schema] else []
        self.copies[schema] = Copy(self._table(schema, "marketplace_jobs"), tasks)

    @rule(schema=tenants, part=st.integers(0, 3), overwrites=st.booleans(), with_tasks=st.booleans())
    def restore(self, schema: str, part: int, overwrites: bool, with_tasks: bool) -> None:
        """The rows of a copy come back, all or a part, over those of now or beside them."""
        copy = self.copies[schema]
        tables = {"marketplace_jobs": copy.jobs}
        if with_tasks and self.has_tasks[schema]:
            tables["marketplace_tasks"] = copy.tasks
        for table, rows in tables.items():
            ids = self._ids(schema, table)
            chosen = [row for row in rows if not part or row["id"] % 3 != part - 1]
            if overwrites:
                self.owner.execute(f"DELETE FROM {schema}.{table} WHERE id = ANY (%s)", [[row["id"] for row in chosen]])
            self._insert(schema, table, [row for row in chosen if overwrites or row["id"] not in ids])

    @rule(schema=tenants, day=numbers, is_same_job=flags, data=st.data())
    def reuse_ids(self, schema: str, day: int, is_same_job: bool, data: st.DataObject) -> None:
        """Ids of deleted jobs are given out again; or the same jobs come back with other contents."""
        taken = set(self._ids(schema, "marketplace_jobs"))
        gone = {job["id"]: job for job in self.gone[schema] if job["id"] not in taken}
        jobs = []
        for new, old in zip(data.draw(strategies.jobs([self.days[day]], max_size=3)), gone.values(), strict=False):
            same = {"created_at": old["created_at"]} if is_same_job else {}
            jobs.append(new | {"id": old["id"]} | same)
        self._insert(schema, "marketplace_jobs", jobs)

    @rule(schema=tenants, by=st.sampled_from(("type", "status", "job", "half", "all")), choice=st.integers(0, 2))
    def delete_tasks(self, schema: str, by: str, choice: int) -> None:
        """Tasks are deleted while their jobs stay."""
        condition, value = {
            "type": ("task_type = %s", task_types[choice % 2]),
            "status": ("status::text = %s", ("success", "failed", "pending")[choice]),
            "job": ("job_id = (SELECT id FROM {0}.marketplace_jobs ORDER BY id OFFSET %s LIMIT 1)", choice),
            "half": ("id %% 2 = %s", choice % 2),
            "all": ("%s", True),
        }[by]
        if self.has_tasks[schema]:
            self.owner.execute(f"DELETE FROM {schema}.marketplace_tasks WHERE {condition.format(schema)}", [value])

    @rule(schema=tenants, is_emptied=st.booleans())
    def drop_or_create_tasks(self, schema: str, is_emptied: bool) -> None:
        """The tasks table is dropped; or it is made again, empty or with its rows."""
        if self.has_tasks[schema]:
            self.owner.execute(f"ALTER TABLE {schema}.marketplace_tasks RENAME TO away")
        else:
            self.owner.execute(f"ALTER TABLE {schema}.away RENAME TO marketplace_tasks")
            if is_emptied:
                self.owner.execute(f"DELETE FROM {schema}.marketplace_tasks")
        self.has_tasks[schema] = not self.has_tasks[schema]

    # What others do to what is ours.

    @rule(
        schema=tenants,
        action_type_id=st.sampled_from(strategies.ACTION_TYPE_IDS),
        day=numbers,
        outcome=st.sampled_from(("success_count", "failure_count")),
        mean=st.sampled_from((None, 0, 1500)),
    )
    def bump(self, schema: str, action_type_id: int, day: int, outcome: str, mean: int | None) -> None:
        """The old live counter counts a job, maybe once more, through the view that bears its table's name."""
        stored, key = self.memories[schema].rows, (action_type_id, "vinted", self.days[day].date)
        if key not in stored:
            zeros = dict.fromkeys(("total_jobs", "success_count", "failure_count"), 0)
            new = {"action_type_id": key[0], "date": key[2], "created_at": datetime.now(UTC)}
            application.insert(self.owner, schema, "vinted_job_stats", [new | zeros])
            stored[key] = StatsRow({name: zeros.get(name) for name in NUMBERS}, None)
        self.owner.execute(
            f"""UPDATE {schema}.vinted_job_stats
                   SET total_jobs = total_jobs + 1, {outcome} = {outcome} + 1, avg_duration_ms = %s
                 WHERE action_type_id = %s AND date = %s""",
            [mean, key[0], key[2]],
        )
        old = stored[key].numbers
        bumped = {name: (old[name] or 0) + 1 for name in ("total_jobs", outcome)}
        stored[key] = replace(stored[key], numbers={**old, **bumped, "avg_duration_ms": mean})

    @precondition(lambda self: any(memory.rows for memory in self.memories.values()))
    @rule(schema=tenants, column=overwritten, change=st.sampled_from((1, -1, None)), data=st.data())
    def overwrite(self, schema: str, column: str, change: int | None, data: st.DataObject) -> None:
        """A person raises or lowers a number of a stats row, or deletes the row."""
        stored = self.memories[schema].rows
        if not stored:
            return
        key = data.draw(st.sampled_from(sorted(stored)))
        if change is None:
            statement = f"DELETE FROM {schema}.marketplace_job_stats"
            del stored[key]
        else:
            number = max((stored[key].numbers[column] or 0) + change, 0)
            if number == stored[key].numbers[column]:
                return
            statement = f"UPDATE {schema}.marketplace_job_stats SET {column} = {number}"
            stored[key] = replace(stored[key], numbers={**stored[key].numbers, column: number})
        self.owner.execute(f"{statement} WHERE (action_type_id, marketplace, date) = (%s, %s, %s)", key)

    @rule(schema=tenants, data=st.data())
    def insert_rows(self, schema: str, data: st.DataObject) -> None:
        """A person inserts stats rows."""
        rows = data.draw(strategies.stored_rows(self.days, max_size=2))
        self._store(schema, [row for row in rows if _key(row) not in self.memories[schema].rows])

    @rule(schema=tenants)
    def recreate_stats(self, schema: str) -> None:
        """The stats table is made again: its rows are gone, its ledger is emptied, and its facts stay."""
        for table in ("marketplace_job_stats", "marketplace_job_stats_days"):
            self.owner.execute(f"DELETE FROM {schema}.{table}")
        self.memories[schema].rows.clear()
        self.memories[schema].ledger.clear()

    @rule(schema=tenants, day=numbers, what=st.sampled_from(("before", "day", "fact")), data=st.data())
    def prune(self, schema: str, day: int, what: str, data: st.DataObject) -> None:
        """Somebody deletes the facts before a day, of one day, or one of them."""
        memory, limit = self.memories[schema], self.days[day].date
        if what == "before":
            self.owner.execute(f"DELETE FROM {schema}.marketplace_job_facts WHERE date < %s", [limit])
            memory.prune(limit)
            return
        of_day = sorted((key for key, fact in memory.facts.items() if fact.date == limit), key=str)
        if what == "fact" and of_day:
            of_day = [data.draw(st.sampled_from(of_day))]
        for key in of_day:
            condition = "(job_id, created_at) = (%s, %s)"
            self.owner.execute(f"DELETE FROM {schema}.marketplace_job_facts WHERE {condition}", key)
            del memory.facts[key]

    @rule(schema=tenants, day=numbers)
    def forget_ledger(self, schema: str, day: int) -> None:
        """The ledger loses a day, as when somebody wants it computed again."""
        self.owner.execute(f"DELETE FROM {schema}.marketplace_job_stats_days WHERE date = %s", [self.days[day].date])
        self.memories[schema].ledger.pop(self.days[day].date, None)

    @rule(schema=tenants, day=numbers)
    def leave_without_facts(self, schema: str, day: int) -> None:
        """A day is as the release before there were facts has left it."""
        memory, when = self.memories[schema], self.days[day].date
        if when not in memory.ledger:
            return
        unknown = ", ".join(f"{name} = NULL" for name in LATER_COLUMNS)
        self.owner.execute(f"DELETE FROM {schema}.marketplace_job_facts WHERE date = %s", [when])
        self.owner.execute(f"UPDATE {schema}.marketplace_job_stats SET {unknown} WHERE date = %s", [when])
        self.owner.execute(
            f"""UPDATE {schema}.marketplace_job_stats_days SET definition = 1, row_count = NULL, row_versions = NULL
                 WHERE date = %s""",
            [when],
        )
        memory.facts = {key: fact for key, fact in memory.facts.items() if fact.date != when}
        left: dict[RowKey, dict[str, int | None]] = {}
        for key, row in memory.rows.items():
            if key[2] == when:
                left[key] = {name: None if name in LATER_COLUMNS else number for name, number in row.numbers.items()}
                memory.rows[key] = replace(row, numbers=left[key])
        memory.ledger[when] = replace(memory.ledger[when], definition=1, jobs=None, rows=left)

    @rule(where=st.sampled_from((*SERVER_SIDES, "client", "session")), zone=clock_zones)
    def change_clock_zone(self, where: str, zone: str) -> None:
        """Promise 17: the zone of the database, of the role, of the client or of the session has no say in anything."""
        os.environ.pop("PGTZ", None)
        self.session_zone = zone if where == "session" else ""
        if where == "client":
            os.environ["PGTZ"] = zone
        elif where in SERVER_SIDES:
            self.owner.execute(f"ALTER {where} SET timezone = '{zone}'")
        self.engine.dispose()

    @precondition(lambda self: self.definition < FIRST_DEFINITION + 3)
    @rule()
    def raise_definition(self) -> None:
        """Promise 23: a release comes in which the numbers mean something else."""
        self.definition += 1
        transaction.DEFINITION = self.definition

    @rule(reasons=st.booleans())
    def keep_reasons(self, reasons: bool) -> None:
        """From now on runs keep the reasons of failures, or none."""
        self.reasons = reasons

    # Runs.

    @rule(schema=tenants, days=ranges, allow_shrink=flags)
    def run(self, schema: str, days: list[int], allow_shrink: bool) -> None:
        """Promises 14, 15: a run over a range makes its days right, and holds back what no facts stand behind."""
        self._run(schema, self._spec(days, allow_shrink=allow_shrink))

    @rule(schema=tenants)
    def run_all(self, schema: str) -> None:
        """A run over all days sees whatever has happened since the last one."""
        self._run(schema, self._spec([0, DAY_COUNT - 1]))

    @rule(schema=tenants, day=numbers, allow_shrink=flags, data=st.data())
    def lose_tasks(self, schema: str, day: int, allow_shrink: bool, data: st.DataObject) -> None:
        """Tasks of a counted job go, others come, and a run keeps what it had, or forgets it."""
        facts = [fact for fact in self.memories[schema].facts.values() if fact.task_count]
        if facts and self.has_tasks[schema]:
            fact = data.draw(st.sampled_from(sorted(facts, key=str)))
            self.owner.execute(
                f"""DELETE FROM {schema}.marketplace_tasks
                     WHERE id = (SELECT max(id) FROM {schema}.marketplace_tasks WHERE job_id = %s)""",
                [fact.job_id],
            )
            self.add_tasks(schema, day, data)
            self._run(schema, self._spec([0, DAY_COUNT - 1], allow_shrink=allow_shrink))

    @rule(schema=tenants, fate=fates, allow_shrink=st.booleans(), comes_back=st.booleans(), data=st.data())
    def lose_counted_job(
        self, schema: str, fate: str | None, allow_shrink: bool, comes_back: bool, data: st.DataObject
    ) -> None:
        """A counted job is deleted, and a run sees that or forgets it; then it may come back, and be seen again."""
        if fact := self._counted(schema, data):
            self.back_up(schema)
            self._delete_jobs(schema, "id = %s", fact.job_id, fate)
            self._run(schema, self._spec([0, DAY_COUNT - 1], allow_shrink=allow_shrink))
            if comes_back:
                self.restore(schema, part=0, overwrites=False, with_tasks=True)
                self.run_all(schema)

    @rule(schema=tenants, day=numbers, columns=job_changes, is_renamed=st.booleans(), run=numbers, data=st.data())
    def change_counted_job(
        self, schema: str, day: int, columns: tuple[str, ...], is_renamed: bool, run: int, data: st.DataObject
    ) -> None:
        """A counted job changes or moves, and a run over one day sees where it is now or where it was."""
        if fact := self._counted(schema, data):
            if is_renamed:
                change: Row = {"marketplace": "depop", "completed_at": self.limits[day]}
            else:
                new = data.draw(strategies.jobs([self.days[day]], max_size=2))
                change = _fitting(schema, {name: new[0][name] for name in columns}) if new else {"status": "running"}
            assignments = ", ".join(f"{name} = %s" for name in change)
            self.owner.execute(
                f"UPDATE {schema}.marketplace_jobs SET {assignments} WHERE id = %s", [*change.values(), fact.job_id]
            )
            self._run(schema, self._spec([run, run]))
            self._run(schema, self._spec([day, day]))

    @rule(schema=tenants, days=ranges, allow_shrink=flags, count_no_end=st.booleans())
    def run_missing(self, schema: str, days: list[int], allow_shrink: bool, count_no_end: bool) -> None:
        """A run with `only_missing` computes the days that are due, and no other."""
        self._run(schema, self._spec(days, only_missing=True, allow_shrink=allow_shrink, count_no_end=count_no_end))

    @rule(schema=tenants, days=ranges, earlier=numbers, only_missing=flags)
    def catch_up(self, schema: str, days: list[int], earlier: int, only_missing: bool) -> None:
        """A nightly run takes along the days before its own that are due."""
        self._run(schema, self._spec(days, earlier, only_missing=only_missing))

    @rule(schema=tenants, days=ranges, earlier=numbers, only_missing=flags, allow_shrink=flags)
    def replay(self, schema: str, days: list[int], earlier: int, only_missing: bool, allow_shrink: bool) -> None:
        """Promise 13: after a run, the same days once more, together and one by one, write and burn nothing."""
        spec = self._spec(days, earlier, only_missing=only_missing, allow_shrink=allow_shrink)
        self._run(schema, spec)
        before = self._versions(), self._sequences()
        again = [spec]
        if not only_missing:
            alone = [self._window(number, number) for number in reversed(range(days[0], days[1] + 1))]
            again += [replace(spec, window=window, catch_up=None, run_id="replay") for window in alone]
        for one in again:
            result = self._write(schema, one)
            assert not result.changes and not any(map(any, result.written.values()))
        assert (self._versions(), self._sequences()) == before

    @rule(schema=tenants, days=ranges, earlier=numbers, only_missing=flags)
    def kill(self, schema: str, days: list[int], earlier: int, only_missing: bool) -> None:
        """Promise 16: a run that is killed before any of its statements leaves no trace; then it succeeds."""
        spec = self._spec(days, earlier, only_missing=only_missing)
        before = self._versions()
        self.is_committing = False
        for statement in count():
            # The last time, when there are no more statements, it is killed before the commit.
            with _killed_before(statement), pytest.raises(Killed):
                self._write(schema, spec, dies_at_commit=True)
            assert self._versions() == before
            if self.is_committing:
                break
        self._run(schema, spec)

    @rule(schema=tenants, day=numbers)
    def run_older_release(self, schema: str, day: int) -> None:
        """Promise 10: older code does not compute what a newer definition has computed."""
        when = self.days[day].date
        entries = self._rows(f"SELECT definition FROM {schema}.marketplace_job_stats_days WHERE date = %s", [when])
        if entries == [(self.definition,)] and self.definition > FIRST_DEFINITION:
            before = self._versions()
            with mock.patch.object(transaction, "DEFINITION", self.definition - 1), pytest.raises(DefinitionError):
                self._write(schema, self._spec([day, day]))
            assert self._versions() == before

    @rule(schema=tenants, days=ranges)
    def run_without_jobs_table(self, schema: str, days: list[int]) -> None:
        """A tenant whose jobs table is away is refused, and keeps what it has."""
        before = self._versions()
        self.owner.execute(f"ALTER TABLE {schema}.marketplace_jobs RENAME TO jobs_away")
        try:
            with pytest.raises(sa.exc.ProgrammingError, match=r"marketplace_jobs.* does not exist"):
                self._write(schema, self._spec(days))
        finally:
            self.owner.execute(f"ALTER TABLE {schema}.jobs_away RENAME TO marketplace_jobs")
        assert self._versions() == before

    # The machinery of the above.

    def _instant(self, at: tuple[int, timedelta]) -> datetime:
        return self.limits[at[0]] + at[1]

    def _rows(self, query: str, parameters: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        return self.owner.execute(query, parameters).fetchall()

    def _ids(self, schema: str, table: str) -> list[int]:
        return [id_ for (id_,) in self._rows(f"SELECT id FROM {schema}.{table} ORDER BY id")]

    def _table(self, schema: str, table: str) -> list[Row]:
        columns = SOURCES[table]
        rows = self._rows(f"SELECT {', '.join(columns)} FROM {schema}.{table} ORDER BY id")
        return [dict(zip(columns, row, strict=True)) for row in rows]

    def _insert(self, schema: str, table: str, rows: Sequence[Row]) -> None:
        """Rows of the source; what Hypothesis does not draw depends on their ids."""
        if table == "marketplace_jobs":
            rows = [{"product_id": row["id"] % 5, **_fitting(schema, row)} for row in rows]
        else:
            rows = [{"task_type": task_types[row["id"] % 2], **row} for row in rows]
        application.insert(self.owner, schema, table, rows)

    def _store(self, schema: str, rows: Sequence[Row]) -> None:
        """Stats rows that no run of ours has written."""
        application.insert(self.owner, schema, "marketplace_job_stats", rows)
        for row in rows:
            stored = StatsRow({name: row[name] for name in NUMBERS}, row["computed_at"])
            self.memories[schema].rows[_key(row)] = stored

    def _change(self, schema: str, table: str, change: Row, data: st.DataObject) -> None:
        """Gives these values to one of the rows, if there is any."""
        if ids := self._ids(schema, table):
            assignments = ", ".join(f"{name} = %s" for name in change)
            parameters = [*change.values(), data.draw(st.sampled_from(ids))]
            self.owner.execute(f"UPDATE {schema}.{table} SET {assignments} WHERE id = %s", parameters)

    def _counted(self, schema: str, data: st.DataObject) -> Fact | None:
        """A job that is counted and there, if there is any."""
        ids = set(self._ids(schema, "marketplace_jobs"))
        facts = [fact for fact in self.memories[schema].facts.values() if fact.job_id in ids and not fact.deleted_at]
        return data.draw(st.sampled_from(sorted(facts, key=str))) if facts else None

    def _delete_jobs(
        self, schema: str, condition: str, value: Any, fate: str | None, is_half_done: bool = False
    ) -> None:
        ids = [id_ for (id_,) in self._rows(f"SELECT id FROM {schema}.marketplace_jobs WHERE {condition}", [value])]
        ids = ids[: len(ids) // 2] if is_half_done else ids
        self.gone[schema] += [job for job in self._table(schema, "marketplace_jobs") if job["id"] in ids]
        self.owner.execute(f"DELETE FROM {schema}.marketplace_jobs WHERE id = ANY (%s)", [ids])
        if fate and self.has_tasks[schema]:
            self.owner.execute(f"{fate.format(schema)} WHERE job_id = ANY (%s)", [ids])

    def _source(self, schema: str) -> Source:
        tasks = self._table(schema, "marketplace_tasks") if self.has_tasks[schema] else None
        return Source(self._table(schema, "marketplace_jobs"), tasks)

    def _window(self, first: int, last: int) -> Window:
        dates = tuple(day.date for day in self.days)
        return Window(dates[first : last + 1], tuple(self.limits[first : last + 1]), self.limits[last + 1], self.zone)

    def _spec(self, days: list[int], earlier: int = 0, **options: bool) -> ComputeSpec:
        """A run over the days, with as many earlier ones to catch up on."""
        first, last = days
        catch_up = self._window(max(first - earlier, 0), last) if earlier else None
        run_id, window = f"run {next(self.run_ids)}", self._window(first, last)
        return ComputeSpec(window, run_id, self.all_days, catch_up=catch_up, reasons=self.reasons, **options)

    def _write(self, schema: str, spec: ComputeSpec, dies_at_commit: bool = False) -> TenantResult:
        """A run, which may be killed before it commits."""
        with self.engine.connect() as connection:
            if self.session_zone:
                connection.exec_driver_sql(f"SET timezone = '{self.session_zone}'")
                connection.commit()
            if dies_at_commit:

                def die(*_: Any) -> None:
                    self.is_committing = True
                    raise Killed

                sa.event.listen(connection, "commit", die)
            return write_tenant(connection, schema, spec, self.has_tasks[schema])

    def _run(self, schema: str, spec: ComputeSpec) -> None:
        """A run that does what the reference does and reports it, and writes what differs and nothing else."""
        memory, source, days = self.memories[schema], self._source(schema), self._chosen(schema, spec)
        versions, sequences = self._versions(), self._sequences()
        entries = dict(self._rows(f"SELECT date, definition FROM {schema}.marketplace_job_stats_days"))
        ledger, rows, facts = dict(memory.ledger), dict(memory.rows), dict(memory.facts)
        run = memory.observe(
            source,
            days,
            NOW,
            run_id=spec.run_id,
            allow_shrink=spec.allow_shrink,
            definition=self.definition,
            failure_reasons=self.reasons,
        )
        result = self._write(schema, spec)
        assert {day: "held_back" if day in result.held_back else "computed" for day in result.days} == run.outcomes
        self._reports_counts(schema, spec, days, source, result)
        self._journal_has(schema, spec, run.lines, ledger, rows, entries, result)
        self._percentiles_are_near(schema)
        gone, written = versions - self._versions(), self._versions() - versions
        assert not {(table, content) for table, content, *_ in gone} & {
            (table, content) for table, content, *_ in written
        }
        if (ledger, rows, facts) == (memory.ledger, memory.rows, memory.facts):
            assert self._sequences() == sequences

    def _chosen(self, schema: str, spec: ComputeSpec) -> list[Day]:
        """The days that a run looks at."""
        entries = dict(self._rows(f"SELECT date, definition FROM {schema}.marketplace_job_stats_days"))
        candidates = (spec.catch_up or spec.window).dates
        days = [day for day in self.days if day.date in candidates]
        due = {day.date for day in self.memories[schema].missing(days, self.definition)}
        due |= {day.date for day in days if entries.get(day.date, 0) < self.definition}
        asked = () if spec.only_missing else spec.window.dates
        return [day for day in days if day.date in due.union(asked)]

    def _versions(self) -> set[tuple[Any, ...]]:
        """Every row of our tables: where, all that it says but who wrote it when, and its version, new if touched."""
        tables = [f"{schema}.{table}" for schema in TENANTS for table in TARGETS]
        content = "(to_jsonb(t) - ARRAY['computed_at', 'changed_at', 'run_id'])::text"
        row = "SELECT '{0}', " + content + ", ctid::text, xmin::text FROM {0} t"
        return set(self._rows(" UNION ALL ".join(row.format(table) for table in tables)))

    def _sequences(self) -> set[tuple[Any, ...]]:
        return set(self._rows("SELECT schemaname, sequencename, last_value FROM pg_sequences"))

    def _reports_counts(
        self, schema: str, spec: ComputeSpec, days: Sequence[Day], source: Source, result: TenantResult
    ) -> None:
        """What a run says of its days is what the reference says, and what is stored; so is the ledger."""
        expected = uncounted(source, days) + (without_end(source) if spec.count_no_end else Counter())
        assert result.uncounted == expected
        entries = {
            day: counts
            for day, *counts in self._rows(
                f"""SELECT date, unknown_marketplace_count, no_start_count, bad_duration_count, stored_job_count
                      FROM {schema}.marketplace_job_stats_days"""
            )
        }
        rows = self.memories[schema].rows
        for day in days:
            stored = [row.numbers for key, row in rows.items() if key[2] == day.date]
            assert result.days[day.date].sums == _sums(stored)
            counts = [self.memories[schema].ledger[day.date].uncounted.get(reason, 0) for reason in REASONS]
            jobs = sum(row[name] or 0 for row in stored for name in ("total_jobs", "cancelled_count", "expired_count"))
            assert entries[day.date] == [*counts, jobs]
        candidates = (spec.catch_up or spec.window).dates
        keys = {(marketplace, action_type_id) for action_type_id, marketplace, day in rows if day in candidates}
        assert result.sums == {
            (marketplace, action_type_id): _sums(
                [
                    row.numbers
                    for key, row in rows.items()
                    if key[:2] == (action_type_id, marketplace) and key[2] in candidates
                ]
            )
            for marketplace, action_type_id in keys
        }

    def _journal_has(
        self,
        schema: str,
        spec: ComputeSpec,
        lines: Sequence[JournalLine],
        ledger: Mapping[date, LedgerDay],
        rows: Mapping[RowKey, StatsRow],
        entries: Mapping[date, int],
        result: TenantResult,
    ) -> None:
        """The run has written the reference's lines."""
        totals = ("total_jobs_before", "total_jobs_after", "failure_count_before", "failure_count_after")
        columns = ", ".join((*(f"coalesce({name}, 0)" for name in totals), *(f"{name}_count" for name in TALLY)))
        found = {
            tuple(key): (tuple(content), cause)
            for *key, cause, content in (
                (*row[:3], row[3], row[4:])
                for row in self._rows(
                    f"""SELECT action_type_id, marketplace, date, cause, {columns}
                          FROM {schema}.marketplace_job_stats_changes WHERE run_id = %s""",
                    [spec.run_id],
                )
            )
        }
        self.line_counts[schema] += len(found)
        assert result.change_count == len(found) and len(result.changes) == min(len(found), 20)
        for line in lines:
            content = tuple(getattr(line, name) for name in (*totals, *TALLY))
            causes, is_certain = {line.cause}, line.is_certain
            if entries[line.key[2]] < ledger[line.key[2]].definition:
                causes.add("definition")
            if line.cause == "overwritten" and (line.key not in rows or ledger[line.key[2]].outcome == "held_back"):
                # Of a row that somebody has deleted nothing tells that it was there, if its jobs changed, too; and
                # whoever has written to a held-back day has written to rows that no facts account for.
                causes |= {"jobs", "forgotten", "definition"}
            is_same = content[0] == content[1] and content[2] == content[3]
            # Where a row only gets numbers that were unknown before, nobody has seen anything change.
            before, after = rows.get(line.key), self.memories[schema].rows.get(line.key)
            if before and after:
                known = {name: number for name, number in before.numbers.items() if number is not None}
                is_certain = is_certain and not known.items() <= after.numbers.items()
            if line.key in found:
                found_content, cause = found.pop(line.key)
                assert (found_content, cause in causes) == (content, True), (line, cause)
            else:
                assert not is_certain or ("definition" in causes and is_same), line
        for *_, day in found:
            # Of a day that is held back, rows of the batch tell that it was settled, if the ledger has lost it since.
            assert ledger[day].outcome == "held_back" and not ledger[day].is_settled
            assert any(key[2] == day and row.computed_at for key, row in rows.items())

    def _percentiles_are_near(self, schema: str) -> None:
        """Promise 18: the percentiles of each row of a day that facts account for are within 1 % of the exact ones."""
        memory = self.memories[schema]
        columns = ", ".join(("action_type_id", "marketplace", "date", *PERCENTILES))
        for *key, p50, p95, p99, p50_wait, p95_wait in self._rows(
            f"SELECT {columns} FROM {schema}.marketplace_job_stats"
        ):
            entry, row = memory.ledger.get(key[2]), memory.rows[tuple(key)]
            facts = {id_: fact for id_, fact in memory.facts.items() if fact.date == key[2]}
            if entry and entry.jobs == facts.keys() and entry.rows.get(tuple(key)) == row.numbers:
                exact = percentiles(fact for fact in facts.values() if fact.row_key == tuple(key))
                stored = dict(zip(PERCENTILES, (p50, p95, p99, p50_wait, p95_wait), strict=True))
                assert stored == {name: _near(exact[name]) for name in PERCENTILES}


def _sums(rows: Sequence[Row]) -> tuple[int, ...]:
    return tuple(sum(row[name] or 0 for row in rows) for name in COUNTS)


def _near(exact: int | None) -> Any:
    return None if exact is None else pytest.approx(exact, rel=0.01 + 1e-9)


def _key(row: Row) -> RowKey:
    return row["action_type_id"], row["marketplace"], row["date"]


def _fitting(schema: str, job: Row) -> Row:
    """The columns of a job with a status that the tenant's type has."""
    return {**job, "status": "cancelled"} if schema == "user_1" and job.get("status") == "expired" else job


@contextmanager
def _killed_before(number: int) -> Iterator[None]:
    """A run is killed before the statement of this number, counted from 0."""
    statements, run = count(), Statement.run

    def count_down(statement: Statement, *arguments: Any) -> Any:
        if next(statements) == number:
            raise Killed
        return run(statement, *arguments)

    with mock.patch.object(Statement, "run", count_down):
        yield


@pytest.fixture(scope="module")
def machine(server: str, migrated_template: str) -> Iterator[type[Machine]]:
    """The machine on a database of its own."""
    conninfo = create_database(server, DATABASE, migrated_template)
    Machine.engine = create_engine(run_url(conninfo), search_path="pg_catalog", jit="off")
    with psycopg.connect(conninfo, autocommit=True, options="-c timezone=UTC") as Machine.owner:
        Machine.owner.adapters.register_loader("timestamptz", InfiniteLoader)
        yield Machine
    Machine.engine.dispose()


def test_the_tables_follow_the_reference_whatever_happens(machine: type[Machine]) -> None:
    """Promises 13 to 17, 19, 23 and 24: see the rules of the machine."""
    run_machine(machine, settings=settings(max_examples=40, stateful_step_count=50, deadline=None))
