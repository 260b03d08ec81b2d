"""Promises 13 to 17 over time: whatever the application, its purges, its old counter, runs and crashes do in turn.

A state machine does in any order what happens to a database over months. Beside it stands a model of what the stats
and the ledger of every tenant must hold: a run makes of it what the independent reference makes of the source rows,
the old counter bumps it, and nothing else changes it. After each step the tables are compared with it.
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from itertools import count
from typing import Any, ClassVar

import pandas as pd
import psycopg
import pytest
import sqlalchemy as sa
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from assets.marketplace_job_stats.upsert import Order, TenantResult, write_tenant
from pipelines.database import create_engine
from pipelines.partitions import Window
from tests import application, strategies
from tests.conftest import RUN_ROLE, create_database, run_url
from tests.reference import (
    FINISHED_JOB_STATUSES,
    FINISHED_TASK_STATUSES,
    JOB_COLUMNS,
    ROW_COLUMNS,
    TASK_COLUMNS,
    expected_after_run,
    frame,
    reference_days,
)

DATABASE = "machine"
SERVER_SIDES = (f"DATABASE {DATABASE}", f"ROLE {RUN_ROLE} IN DATABASE {DATABASE}")
TENANTS = ("user_1", "user_2", "user_10")
"""The first one has statuses of enum types, which lack the label `expired`; the others share one sequence of ids."""
SOURCES = ("marketplace_jobs", "marketplace_tasks")
COUNTS = ("job_count", "task_count", "unknown_marketplace_count", "bad_duration_count")
TARGETS = {
    "marketplace_job_stats": ROW_COLUMNS,
    "marketplace_job_stats_days": ("date", "outcome", *COUNTS, "stored_job_count", "stored_task_count", "run_id"),
}
DAY_COUNT = 4

# Most happens to one tenant, so that its history gets long, and to few instants, so that they meet.
tenants = st.sampled_from(("user_2", "user_2", "user_2", "user_10", "user_1"))
# Days go by their numbers, from 0. Day 2 is the one that the zone was chosen for; in half of the examples PostgreSQL
# and Python disagree about its midnight.
numbers = st.sampled_from((2, *range(DAY_COUNT)))
ranges = st.tuples(numbers, numbers).map(sorted) | numbers.map(lambda number: [number, number])
havana, azores = ("America/Havana", date(2025, 11, 2)), ("Atlantic/Azores", date(2025, 10, 26))
zones = strategies.zones() | st.sampled_from((havana, azores))
clock_zones = st.sampled_from(("America/Havana", "Europe/Paris", "Australia/Lord_Howe", "Etc/GMT+12"))
# The limit of a day, by its number, and how long after it.
later = st.sampled_from((timedelta(0), timedelta(0), strategies.US, timedelta(hours=12)))
instants = st.tuples(st.integers(0, DAY_COUNT), later)
flags = st.sampled_from((False, False, False, True))
# What changes together in one job or task.
job_changes = st.sampled_from((("status", "started_at", "completed_at"), *((name,) for name in JOB_COLUMNS[1:])))
task_changes = st.sampled_from(tuple((name,) for name in TASK_COLUMNS[1:]))


class Machine(RuleBasedStateMachine):
    """The database, driven by the rules; and the model: `rows` and `ledger`, by tenant."""

    owner: ClassVar[psycopg.Connection[Any]]
    engine: ClassVar[sa.Engine]

    @initialize(zone=zones, clock_zone=clock_zones, computed=numbers, data=st.data())
    def begin(self, zone: tuple[str, date], clock_zone: str, computed: int, data: st.DataObject) -> None:
        """Days around a clock change of the reporting zone, with source and stored rows; one of them is computed."""
        self.zone, interesting = zone
        self.days = [strategies.day_of(self.zone, interesting + timedelta(days)) for days in range(-2, DAY_COUNT - 2)]
        self.limits = [limit.astimezone(UTC) for limit in (*(day.start for day in self.days), self.days[-1].end)]
        self.session_zone = clock_zone
        self.rows: dict[str, list[Mapping[str, Any]]] = {}
        self.ledger: dict[str, dict[date, tuple[Any, ...]]] = {schema: {} for schema in TENANTS}
        self.ids, self.run_ids = count(1), count(1)
        for schema in TENANTS:
            for table in (*SOURCES, *TARGETS):
                self.owner.execute(f"DELETE FROM {schema}.{table}")
            self.rows[schema] = [*data.draw(strategies.stored_rows(self.days))]
            application.insert(self.owner, schema, "marketplace_job_stats", self.rows[schema])
            self.arrive(schema, computed, data)
        for schema in TENANTS:
            self.run(schema, [computed, computed], allow_shrink=False)

    def teardown(self) -> None:
        """No zone stays changed for the next example, nor for other tests."""
        for where in SERVER_SIDES:
            self.owner.execute(f"ALTER {where} RESET timezone")
        os.environ.pop("PGTZ", None)
        self.engine.dispose()

    @invariant()
    def tables_equal_the_model(self) -> None:
        """Every tenant's rows and ledger are what the model says, to the last column that is no time of writing."""
        stored = {
            (schema, *row)
            for schema in TENANTS
            for table, columns in TARGETS.items()
            for row in self.owner.execute(f"SELECT {', '.join(columns)} FROM {schema}.{table}")
        }
        assert stored == self._expected()

    # What the application does to its own rows. None of it changes the stats.

    @rule(schema=tenants, day=numbers, data=st.data())
    def arrive(self, schema: str, day: int, data: st.DataObject) -> None:
        """Jobs of any status that mostly end on one day, and tasks of these, of earlier ones and of none."""
        jobs = [job | {"id": next(self.ids)} for job in data.draw(strategies.jobs([self.days[day]], max_size=8))]
        application.insert(self.owner, schema, "marketplace_jobs", [_fitting(schema, job) for job in jobs])
        tasks = data.draw(strategies.tasks(self._ids(schema, "marketplace_jobs"), [self.days[day]], max_size=8))
        application.insert(self.owner, schema, "marketplace_tasks", [task | {"id": next(self.ids)} for task in tasks])

    @rule(schema=tenants, day=numbers, columns=job_changes, data=st.data())
    def change_jobs(self, schema: str, day: int, columns: tuple[str, ...], data: st.DataObject) -> None:
        """Jobs end, on any day; or they turn out to have ended at another time, in another way, or elsewhere."""
        for new in data.draw(strategies.jobs([self.days[day]], max_size=3)):
            self._change(schema, "marketplace_jobs", _fitting(schema, {name: new[name] for name in columns}), data)

    @rule(schema=tenants, day=numbers, columns=task_changes, data=st.data())
    def change_tasks(self, schema: str, day: int, columns: tuple[str, ...], data: st.DataObject) -> None:
        """Tasks come to another end, are tried again, or turn out to be another job's; the jobs do not change."""
        for new in data.draw(strategies.tasks(self._ids(schema, "marketplace_jobs"), [self.days[day]], max_size=3)):
            self._change(schema, "marketplace_tasks", {name: new[name] for name in columns}, data)

    @rule(schema=tenants, data=st.data())
    def reopen_job(self, schema: str, data: st.DataObject) -> None:
        """A job runs again, and has not ended any more."""
        self._change(schema, "marketplace_jobs", {"status": "running", "completed_at": None}, data)

    @rule(schema=tenants, data=st.data())
    def delete_job(self, schema: str, data: st.DataObject) -> None:
        """A single job is deleted; its tasks become orphans."""
        if ids := self._ids(schema, "marketplace_jobs"):
            self._delete_jobs(schema, "id = %s", data.draw(st.sampled_from(ids)))

    @rule(schema=tenants, limit=instants)
    def purge_jobs(self, schema: str, limit: tuple[int, timedelta]) -> None:
        """Finished jobs are deleted by age, also in the middle of a day; their tasks become orphans."""
        finished = ", ".join(f"'{status}'" for status in FINISHED_JOB_STATUSES)
        self._delete_jobs(schema, f"status::text IN ({finished}) AND completed_at < %s", self._instant(limit))

    @rule(schema=tenants, limit=instants)
    def purge_tasks(self, schema: str, limit: tuple[int, timedelta]) -> None:
        """Finished tasks are deleted by age, while their jobs stay."""
        self.owner.execute(
            f"DELETE FROM {schema}.marketplace_tasks WHERE status::text = ANY (%s) AND completed_at < %s",
            [list(FINISHED_TASK_STATUSES), self._instant(limit)],
        )

    # What else happens around the runs.

    @rule(
        schema=tenants,
        action_type_id=st.sampled_from(strategies.ACTION_TYPE_IDS),
        day=numbers,
        outcome=st.sampled_from(("success_count", "failure_count")),
        mean=st.sampled_from((None, 0, 1500)),
    )
    def bump(self, schema: str, action_type_id: int, day: int, outcome: str, mean: int | None) -> None:
        """The old live counter counts a job, maybe once more, through the view that bears its table's name."""
        key = {"action_type_id": action_type_id, "date": self.days[day].date}
        vinted = [row for row in self.rows[schema] if (key | {"marketplace": "vinted"}).items() <= row.items()]
        if not vinted:
            new = key | {"total_jobs": 0, "success_count": 0, "failure_count": 0, "created_at": datetime.now(UTC)}
            application.insert(self.owner, schema, "vinted_job_stats", [new])
            vinted = [{name: new.get(name) for name in ROW_COLUMNS} | {"marketplace": "vinted"}]
        self.owner.execute(
            f"""UPDATE {schema}.vinted_job_stats
                   SET total_jobs = total_jobs + 1, {outcome} = {outcome} + 1, avg_duration_ms = %s
                 WHERE action_type_id = %s AND date = %s""",
            [mean, *key.values()],
        )
        [old] = vinted
        bumped = {"total_jobs": old["total_jobs"] + 1, outcome: old[outcome] + 1, "avg_duration_ms": mean}
        self.rows[schema] = [*(row for row in self.rows[schema] if row is not old), {**old, **bumped}]

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

    # Runs.

    @rule(schema=tenants, days=ranges, allow_shrink=flags)
    def run(self, schema: str, days: list[int], allow_shrink: bool) -> None:
        """Promises 14, 15: a run over a range makes its days right, and holds back what age has taken rows from."""
        self._run(schema, self._order(days, allow_shrink=allow_shrink))

    @rule(schema=tenants, days=ranges, allow_shrink=flags)
    def run_missing(self, schema: str, days: list[int], allow_shrink: bool) -> None:
        """A run with `only_missing` computes the days that the tenant's ledger lacks, and no other."""
        self._run(schema, self._order(days, only_missing=True, allow_shrink=allow_shrink))

    @rule(schema=tenants, days=ranges, earlier=numbers, only_missing=flags)
    def catch_up(self, schema: str, days: list[int], earlier: int, only_missing: bool) -> None:
        """A nightly run takes along the days before its own that the ledger lacks."""
        self._run(schema, self._order(days, earlier, only_missing=only_missing))

    @rule(schema=tenants, days=ranges, earlier=numbers, only_missing=flags, allow_shrink=flags)
    def replay(self, schema: str, days: list[int], earlier: int, only_missing: bool, allow_shrink: bool) -> None:
        """Promise 13: after a run, the same days once more, together and one by one, write and burn nothing."""
        order = self._order(days, earlier, only_missing=only_missing, allow_shrink=allow_shrink)
        self._run(schema, order)
        before = self._versions(), self._sequences()
        self._write(schema, order)
        for number in reversed(range(days[0], days[1] + 1)):
            self._write(schema, replace(order, window=self._window(number, number), catch_up=None, run_id="replay"))
        assert (self._versions(), self._sequences()) == before

    @rule(schema=tenants, days=ranges, earlier=numbers, only_missing=flags, statement=st.integers(0, 7))
    def crash(self, schema: str, days: list[int], earlier: int, only_missing: bool, statement: int) -> None:
        """Promise 16: a run whose backend dies before any of its statements, or before the commit, leaves no trace."""
        before = self._versions()
        with pytest.raises(sa.exc.OperationalError):
            self._write(schema, self._order(days, earlier, only_missing=only_missing), dies_at=statement)
        assert self._versions() == before

    # The machinery of the above.

    def _instant(self, at: tuple[int, timedelta]) -> datetime:
        return self.limits[at[0]] + at[1]

    def _ids(self, schema: str, table: str) -> list[int]:
        return [id_ for (id_,) in self.owner.execute(f"SELECT id FROM {schema}.{table} ORDER BY id")]

    def _change(self, schema: str, table: str, change: Mapping[str, Any], data: st.DataObject) -> None:
        """Gives these values to one of the rows, if there is any."""
        if ids := self._ids(schema, table):
            assignments = ", ".join(f"{name} = %s" for name in change)
            parameters = [*change.values(), data.draw(st.sampled_from(ids))]
            self.owner.execute(f"UPDATE {schema}.{table} SET {assignments} WHERE id = %s", parameters)

    def _delete_jobs(self, schema: str, condition: str, value: int | datetime) -> None:
        self.owner.execute(
            f"""WITH gone AS (DELETE FROM {schema}.marketplace_jobs WHERE {condition} RETURNING id)
                UPDATE {schema}.marketplace_tasks SET job_id = NULL WHERE job_id IN (SELECT id FROM gone)""",
            [value],
        )

    def _window(self, first: int, last: int) -> Window:
        dates = tuple(day.date for day in self.days)
        return Window(dates[first : last + 1], tuple(self.limits[first : last + 1]), self.limits[last + 1], self.zone)

    def _order(self, days: list[int], earlier: int = 0, **options: bool) -> Order:
        """An order for the days, with as many earlier ones to catch up on."""
        first, last = days
        catch_up = self._window(max(first - earlier, 0), last) if earlier else None
        return Order(self._window(first, last), f"run {next(self.run_ids)}", catch_up=catch_up, **options)

    def _write(self, schema: str, order: Order, dies_at: int | None = None) -> TenantResult:
        """A run. Its backend may die before a statement, by its number, or before the commit if there are fewer."""
        with self.engine.connect() as connection:
            if self.session_zone:
                connection.exec_driver_sql(f"SET timezone = '{self.session_zone}'")
                connection.commit()
            if dies_at is not None:
                backend_pid = connection.connection.driver_connection.info.backend_pid  # type: ignore[union-attr]
                statements = count()

                def die(*_: Any) -> None:
                    self.owner.execute("SELECT pg_terminate_backend(%s)", [backend_pid])

                def count_down(*_: Any) -> None:
                    if next(statements) == dies_at:
                        die()

                sa.event.listen(connection, "before_cursor_execute", count_down)
                sa.event.listen(connection, "commit", die)
            return write_tenant(connection, schema, order)

    def _run(self, schema: str, order: Order) -> None:
        """A run that reports the days that it should, and writes what differs and nothing else."""
        versions, sequences, old = self._versions(), self._sequences(), self._expected()
        outcomes = self._expect(schema, order)
        new = self._expected()
        result = self._write(schema, order)
        assert {day.date: "held_back" if day.is_held_back else "computed" for day in result.days} == outcomes
        gone, written = versions - self._versions(), self._versions() - versions
        assert not {(table, content) for table, content, *_ in gone} & {
            (table, content) for table, content, *_ in written
        }
        assert old != new or self._sequences() == sequences

    def _expect(self, schema: str, order: Order) -> dict[date, str]:
        """Brings the model to where the run must bring the tables; returns the outcomes of the days that it chose."""
        known = self.ledger[schema]
        candidates = order.catch_up or order.window
        asked = () if order.only_missing else order.window.dates
        missing = {date for date in candidates.dates if date not in known}
        days = [day for day in self.days if day.date in missing.union(asked)]
        if not days:
            return {}
        jobs = self._source(f"{schema}.marketplace_jobs", JOB_COLUMNS)
        tasks = self._source(f"{schema}.marketplace_tasks", TASK_COLUMNS)
        stored = frame(self.rows[schema], ROW_COLUMNS)
        computed, held_back = expected_after_run(stored, jobs, tasks, days, order.allow_shrink)
        outcomes = {day.date: "held_back" if day.date in held_back else "computed" for day in days}
        rows: list[Any] = computed.to_dict("records")
        self.rows[schema] = [row for row in self.rows[schema] if row["date"] not in outcomes] + rows
        for day, *counts in reference_days(jobs, tasks, days).itertuples(index=False, name=None):
            stored_counts = [
                sum(row[name] or 0 for row in rows for name in names if row["date"] == day)
                for names in (("total_jobs", "cancelled_count", "expired_count"), ("total_tasks",))
            ]
            entry = (day, outcomes[day], *counts, *stored_counts)
            if entry != known.get(day, ())[:-1]:
                known[day] = (*entry, order.run_id)
        return outcomes

    def _source(self, table: str, columns: tuple[str, ...]) -> pd.DataFrame:
        """The source's rows; an infinite time, which is no instant, comes as null."""
        finite = "CASE WHEN isfinite({0}) THEN {0} END"
        values = ", ".join(finite.format(name) if name.endswith("_at") else name for name in columns)
        rows = self.owner.execute(f"SELECT {values} FROM {table}")
        return frame([dict(zip(columns, row, strict=True)) for row in rows], columns)

    def _expected(self) -> set[tuple[Any, ...]]:
        """All rows of the model, with their tenants."""
        rows = {(schema, *(row[name] for name in ROW_COLUMNS)) for schema in TENANTS for row in self.rows[schema]}
        return rows | {(schema, *entry) for schema in TENANTS for entry in self.ledger[schema].values()}

    def _versions(self) -> set[tuple[Any, ...]]:
        """Every row of our tables: where, all that it says but who wrote it when, and its version, new if touched."""
        tables = [f"{schema}.{table}" for schema in TENANTS for table in TARGETS]
        content = "(to_jsonb(t) - ARRAY['computed_at', 'changed_at', 'run_id'])::text"
        row = "SELECT '{0}', " + content + ", ctid::text, xmin::text FROM {0} t"
        return set(self.owner.execute(" UNION ALL ".join(row.format(table) for table in tables)))

    def _sequences(self) -> set[tuple[Any, ...]]:
        return set(self.owner.execute("SELECT schemaname, sequencename, last_value FROM pg_sequences"))


def _fitting(schema: str, job: Mapping[str, Any]) -> Mapping[str, Any]:
    """The columns of a job with a status that the tenant's type has."""
    return {**job, "status": "cancelled"} if schema == "user_1" and job.get("status") == "expired" else job


@pytest.fixture(scope="module")
def machine(server: str, migrated_template: str) -> Iterator[type[Machine]]:
    """The machine on a database of its own."""
    conninfo = create_database(server, DATABASE, migrated_template)
    Machine.engine = create_engine(run_url(conninfo), prepares=True)
    with psycopg.connect(conninfo, autocommit=True, options="-c timezone=UTC") as Machine.owner:
        yield Machine
    Machine.engine.dispose()


def test_the_tables_follow_the_model_whatever_happens(machine: type[Machine]) -> None:
    """Promises 13 to 17: see the rules of the machine."""
    run_state_machine_as_test(machine, settings=settings(max_examples=40, stateful_step_count=50, deadline=None))
