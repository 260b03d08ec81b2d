"""A world of tenants to break things in: runs in processes of their own, and the judgement of what they leave behind.

Every change of the world changes every day of every tenant, in its stats and in its ledger. So after a fault each
tenant is wholly as before the change or wholly as after it; everything else is a mixture, which there must never be.
"""

import copy
import json
import multiprocessing
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg

from tests import application
from tests.conftest import RUN_ROLE, create_database, hide_triggers, run, run_url, url_of
from tests.reference import JOB_COLUMNS, ROW_COLUMNS, TASK_COLUMNS, Day, Memory, Source, uncounted
from tests.server import Server

FIGURES: Counter[str] = Counter()
"""What was injected, and what came of it."""

SEED = 20260115
START = datetime(2026, 1, 10, tzinfo=UTC)
DAYS = [Day((START + timedelta(n)).date(), START + timedelta(n), START + timedelta(n + 1)) for n in range(6)]
FIRST, LAST = DAYS[0].date.isoformat(), DAYS[-1].date.isoformat()
TENANTS = [f"user_{number}" for number in (1, 2, 3, 4, 5, 6, 7, 8, 10, 11, 12, 13)]

FACT_COLUMNS = ("job_id", "date", "status", "retry_count", "duration_ms", "task_count", "task_success_count")

State = tuple[tuple[Any, ...], tuple[Any, ...], tuple[Any, ...]]
"""The stats rows of a tenant, its ledger, and its facts with whether their jobs are gone."""

_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(["pipelines.definitions", "pandas"])


def _execute(url: str, tags: Mapping[str, str], config: Mapping[str, Any], answer: str) -> None:
    """What a run's process does: the job as Dagster executes it, and at the end what it said, into a file."""
    from pipelines.definitions import build_defs
    from pipelines.settings import Settings

    for stream in (sys.stdout, sys.stderr):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    os.environ["DATABASE_URL"] = url
    job = build_defs(Settings.from_env({"STATS_LOCK_TIMEOUT_MS": "1000"})).resolve_job_def("marketplace_job_stats_job")
    result = job.execute_in_process(
        run_config={"ops": {"marketplace_job_stats": {"config": config}}}, tags=dict(tags), raise_on_error=False
    )
    errors = [event.step_failure_data.error for event in result.all_events if event.is_step_failure]
    message = errors[0].message if errors and errors[0] else ""
    Path(answer).write_text(json.dumps({"success": result.success, "message": message}))


class Run:
    """A run in a process of its own."""

    def __init__(
        self, url: str, first: str = FIRST, last: str = LAST, schedule: str | None = None, **config: Any
    ) -> None:
        self._answer = tempfile.NamedTemporaryFile(suffix=".json")  # noqa: SIM115 Closed in `wait`.
        tags = {"dagster/asset_partition_range_start": first, "dagster/asset_partition_range_end": last}
        tags |= {"marketplace_job_stats/schedule": schedule} if schedule else {}
        self.process = _processes.Process(target=_execute, args=(url, tags, config, self._answer.name))
        self.process.start()

    def wait(self) -> dict[str, Any] | None:
        """What it said; None if it was killed."""
        self.process.join(timeout=150)
        assert self.process.exitcode is not None, "the run does not end"
        self.process.close()
        text = Path(self._answer.name).read_text()
        self._answer.close()
        answer: dict[str, Any] | None = json.loads(text) if text else None
        FIGURES[
            "runs " + ("killed" if answer is None else "succeeded" if answer["success"] else "failed honestly")
        ] += 1
        return answer


class World:
    """The database, its tenants, and what their stats must be."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.random = random.Random(SEED)
        self.conninfo = create_database(server.conninfo, "world")
        self.url = run_url(self.conninfo)
        with self.connect() as connection:
            application.create_action_types(connection)
            application.create_tenant(connection, application.TEMPLATE)
            application.create_tenant(connection, "user_1", enums=True)
            for schema in TENANTS[1:]:
                application.clone_tenant(connection, schema)
            for schema in TENANTS:
                self._fill(connection, schema)
        environment = {"MIGRATION_DATABASE_URL": url_of(self.conninfo), "DATABASE_URL": self.url}
        run("alembic", "upgrade", "head", environment=environment)
        with self.connect() as connection:
            # So that a run is long enough to be hit in the middle.
            connection.execute("""
                CREATE FUNCTION public.slowly() RETURNS trigger LANGUAGE plpgsql AS
                $$ BEGIN PERFORM pg_sleep(0.05); RETURN NULL; END $$;
                CREATE FUNCTION public.pause() RETURNS trigger LANGUAGE plpgsql AS
                $$ BEGIN PERFORM pg_advisory_lock(1); PERFORM pg_advisory_unlock(1); RETURN NULL; END $$""")
            for schema in TENANTS:
                connection.execute(f"""
                    CREATE TRIGGER slowly AFTER UPDATE ON {schema}.marketplace_job_stats EXECUTE FUNCTION slowly()""")
            hide_triggers(connection)
        self.old: dict[str, State] = {}
        self.new: dict[str, State] = {}
        # What the batch remembers, and what it will remember once it has seen the change.
        self.memory = {schema: Memory(DAYS) for schema in TENANTS}
        self.next = dict(self.memory)
        self.change()
        self.rerun()

    def connect(self) -> psycopg.Connection[Any]:
        """A connection of the owner, in autocommit."""
        return psycopg.connect(self.conninfo, autocommit=True)

    def _fill(self, connection: psycopg.Connection[Any], schema: str) -> None:
        """Some jobs and tasks on each day; the first two of a day come and go with each change."""
        before = START - timedelta(days=90)  # So that all days are covered; further back than a nightly run looks.
        jobs: list[dict[str, Any]] = [{"status": "completed", "completed_at": before}]
        tasks: list[dict[str, Any]] = [{"job_id": None, "status": "success", "completed_at": before}]
        for day in DAYS:
            for number in range(6):
                end = day.start + timedelta(seconds=self.random.randrange(86_400))
                status = "completed" if number < 2 else self.random.choice(("completed", "failed", "cancelled"))
                started_at = end - timedelta(milliseconds=self.random.randrange(99_999))
                jobs.append({"status": status, "completed_at": end, "started_at": started_at, "priority": number})
                tasks.append({"job_id": len(jobs), "status": "success", "completed_at": end})
        for number, job in enumerate(jobs, start=1):
            marketplace = self.random.choice(("vinted", "ebay", "etsy"))
            job |= {"id": number, "marketplace": marketplace, "action_type_id": self.random.choice((1, 2, 4))}
        application.insert(connection, schema, "marketplace_jobs", [{"priority": 9, **job} for job in jobs])
        application.insert(connection, schema, "marketplace_tasks", tasks)

    def change(self) -> None:
        """Changes every row of stats and every ledger entry that there must be; some jobs and tasks are deleted."""
        with self.connect() as connection:
            self.old = {schema: self.stored(connection, schema) for schema in TENANTS}
            for schema in TENANTS:
                connection.execute(f"UPDATE {schema}.marketplace_jobs SET retry_count = retry_count + 1")
                connection.execute(f"""
                    UPDATE {schema}.marketplace_jobs SET priority = 1 - priority,
                           completed_at = completed_at + interval '1 year' * (1 - 2 * (priority = 1)::int)
                     WHERE priority < 2 AND (priority = 1 OR completed_at < '2026-12-31')""")
                for table in ("marketplace_jobs WHERE priority = 5 AND", "marketplace_tasks WHERE"):
                    connection.execute(f"DELETE FROM {schema}.{table} random() < 0.05")
            for schema in TENANTS:
                self.next[schema] = copy.deepcopy(self.memory[schema])
                self.new[schema] = self.expected(connection, schema)

    def expected(self, connection: psycopg.Connection[Any], schema: str) -> State:
        """What the independent reference remembers and makes of the tenant's source rows."""

        def read(table: str, columns: tuple[str, ...]) -> list[dict[str, Any]]:
            rows = connection.execute(f"SELECT {', '.join(columns)} FROM {schema}.{table}").fetchall()
            return [dict(zip(columns, row, strict=True)) for row in rows]

        source = Source(read("marketplace_jobs", JOB_COLUMNS), read("marketplace_tasks", TASK_COLUMNS))
        memory = self.next[schema]
        memory.observe(source, DAYS, DAYS[-1].end, definition=2)
        rows = tuple(tuple(row[name] for name in ROW_COLUMNS) for row in memory.table())
        ledger = []
        for day in DAYS:
            entry = memory.ledger[day.date]
            tasks = sum(numbers["total_tasks"] or 0 for numbers in entry.rows.values())
            reasons = uncounted(source, [day])
            counts = [
                sum(count for (reason, _, _), count in reasons.items() if reason == name)
                for name in ("unknown_marketplace", "no_start", "bad_duration")
            ]
            ledger.append((day.date, entry.outcome, len(entry.jobs or ()), tasks, *counts))
        facts = tuple(
            sorted(
                (*(getattr(fact, name) for name in FACT_COLUMNS), fact.deleted_at is not None)
                for fact in memory.facts.values()
                if DAYS[0].date <= fact.date <= DAYS[-1].date
            )
        )
        return tuple(sorted(rows, key=lambda row: row[:3])), tuple(ledger), facts

    def stored(self, connection: psycopg.Connection[Any], schema: str) -> State:
        """What the tenant's tables hold for these days."""
        window = [DAYS[0].date, DAYS[-1].date]
        rows = connection.execute(
            f"SELECT {', '.join(ROW_COLUMNS)} FROM {schema}.marketplace_job_stats "
            "WHERE date BETWEEN %s AND %s ORDER BY 1, 2, 3",
            window,
        ).fetchall()
        ledger = connection.execute(
            f"""
            SELECT date, outcome, job_count, task_count, unknown_marketplace_count, no_start_count, bad_duration_count
              FROM {schema}.marketplace_job_stats_days WHERE date BETWEEN %s AND %s ORDER BY date""",
            window,
        ).fetchall()
        facts = connection.execute(
            f"SELECT {', '.join(FACT_COLUMNS)}, deleted_at IS NOT NULL FROM {schema}.marketplace_job_facts "
            "WHERE date BETWEEN %s AND %s ORDER BY 1",
            window,
        ).fetchall()
        return tuple(rows), tuple(ledger), tuple(facts)

    def judge(self, answer: dict[str, Any] | None, spared: str | None = None) -> dict[str, str]:
        """After a fault: which tenants are old, new or mixed, and whether the run has lied when it said success.

        Before a success is believed, the server crashes.
        """
        self.quiet()
        if answer and answer["success"]:
            self.server.restart()
        found = {}
        with self.connect() as connection:
            for schema in TENANTS:
                state = self.stored(connection, schema)
                found[schema] = {self.new[schema]: "new", self.old[schema]: "old"}.get(state, "mixed")
                if found[schema] == "new":
                    self.memory[schema] = self.next[schema]
        FIGURES.update({f"tenants {kind}": list(found.values()).count(kind) for kind in ("old", "new", "mixed")})
        lied = bool(answer and answer["success"]) and any(
            kind != "new" for schema, kind in found.items() if schema != spared
        )
        FIGURES["lies"] += lied
        assert "mixed" not in found.values(), f"half a window was stored: {found}"
        assert not lied, f"the run said success, but its data is not there: {found}"
        return found

    def rerun(self) -> None:
        """One clean run, after which everything is right."""
        answer = Run(self.url).wait()
        assert answer == {"success": True, "message": ""}, answer
        self.server.restart()
        with self.connect() as connection:
            for schema in TENANTS:
                wrong = set(self.stored(connection, schema)[0]) ^ set(self.new[schema][0])
                FIGURES["wrong rows"] += len(wrong)
                assert not wrong, f"{schema}: {wrong}"
                assert self.stored(connection, schema) == self.new[schema]
        self.memory = dict(self.next)

    def quiet(self) -> None:
        """Returns when no connection of a run is left."""
        with self.connect() as connection:
            self.wait_for(
                connection, f"SELECT 1 WHERE NOT EXISTS (SELECT FROM pg_stat_activity WHERE usename = '{RUN_ROLE}')"
            )

    @staticmethod
    def wait_for(connection: psycopg.Connection[Any], query: str, seconds: float = 60) -> None:
        """Returns when the query finds a row."""
        deadline = time.monotonic() + seconds
        while not connection.execute(query).fetchall():
            assert time.monotonic() < deadline, f"nothing found: {query}"
            time.sleep(0.01)
