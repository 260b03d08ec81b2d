"""The same world on one server and spread over several: customers move, runs and servers are killed, nothing differs.

Each layout is a number of databases on some servers, with the same customers and the same changes of their rows in the
same order. What differs is where a customer lives, and what goes wrong meanwhile. At the end the global summaries must
be the same byte for byte, and so must the stats and the facts of each customer.

    python -m tests.faults.places --servers 4 --steps 20 --seed 1      # the campaign: minutes
"""

import argparse
import os
import random
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg

from pipelines.databases import NAMES, url_variable
from pipelines.definitions import build_defs
from pipelines.global_definitions import build_global_defs
from pipelines.schedules import RANGE_END, RANGE_START
from pipelines.settings import Settings
from tests import application
from tests.conftest import create_database, create_run_role, run, run_url, url_of
from tests.faults.harness import Run
from tests.moves import DROP, INTO, OUT, follow
from tests.server import Server, binaries, server_to_control

START = datetime(2026, 1, 10, tzinfo=UTC)
DAYS = [(START + timedelta(number)).date().isoformat() for number in range(6)]
SETTINGS = {"STATS_START_DATE": DAYS[0]}
ALL = {RANGE_START: DAYS[0], RANGE_END: DAYS[-1]}

# So many new jobs of a customer, which differ by their ids alone; more reasons than a summary names.
_JOBS = """
    INSERT INTO {schema}.marketplace_jobs
           (id, marketplace, action_type_id, status, retry_count, error_message, created_at, started_at, completed_at)
    SELECT id, (ARRAY['vinted', 'ebay', 'etsy'])[1 + h % 3], 1 + h / 11 % 9,
           (ARRAY['completed', 'completed', 'failed', 'cancelled'])[1 + h / 7 % 4], h % 3,
           CASE WHEN h / 7 % 4 = 2 THEN 'no answer from ' || chr(97 + h % 17) END,
           ended - interval '1 hour', ended - h % 900000 * interval '1 ms', ended
      FROM (SELECT id, abs(hashint4(id * {number})) AS h FROM generate_series({first}, {last}) AS id) AS job,
           LATERAL (SELECT timestamptz '{start}' + h % {seconds} * interval '1 s' AS ended) AS at"""
_TASKS = """
    INSERT INTO {schema}.marketplace_tasks (id, job_id, status, retry_count, completed_at)
    SELECT id, id, (ARRAY['success', 'failed', 'timeout', 'pending'])[1 + id % 4], id % 2, timestamptz '{start}'
      FROM generate_series({first}, {last}) AS id"""
_CHANGES = (
    "DELETE FROM {schema}.marketplace_jobs WHERE id % 7 = {remainder}",
    "DELETE FROM {schema}.marketplace_tasks WHERE id % 5 = {remainder}",
    "UPDATE {schema}.marketplace_jobs SET status = 'failed', error_message = 'late' WHERE id % 11 = {remainder}",
    "UPDATE {schema}.marketplace_jobs SET completed_at = completed_at + interval '1 day' WHERE id % 13 = {remainder} "
    f"AND completed_at < '{START + timedelta(5)}'",
)


class Layout:
    """Some databases, and which customer lives in which of them."""

    def __init__(
        self, name: str, servers: Sequence[Server], count: int, customers: Sequence[str], folder: Path
    ) -> None:
        self.name, self.folder = name, folder
        self.databases: dict[str, tuple[Server, str]] = {}
        for number in range(count):
            server = servers[number % len(servers)]
            place = f"{name}_{number}"
            self.databases[place] = server, create_database(server.conninfo, place, "template")
        self.places = {one: list(self.databases)[number % count] for number, one in enumerate(customers)}
        for place in self.databases:
            with self.connect(place) as connection:
                for one in customers:
                    if self.places[one] != place:
                        connection.execute(f"DROP SCHEMA {one} CASCADE")
        self.home = next(iter(self.databases))

    def connect(self, place: str) -> psycopg.Connection[Any]:
        return psycopg.connect(self.databases[place][1], autocommit=True)

    def customers_in(self, place: str) -> list[str]:
        return [one for one, where in self.places.items() if where == place]

    def environment(self, place: str) -> dict[str, str]:
        conninfo = self.databases[place][1]
        return {"DATABASE_URL": run_url(conninfo), "MIGRATION_DATABASE_URL": url_of(conninfo)}

    def execute(self, customer: str, statement: str) -> None:
        with self.connect(self.places[customer]) as connection:
            connection.execute(statement.format(schema=customer).encode())

    def compute(self, place: str, *jobs: str) -> None:
        """Clean runs over all days of one database."""
        if not self.customers_in(place):
            return
        with environment(self.environment(place)):
            for job in jobs:
                definitions = build_defs(Settings.from_env(SETTINGS))
                assert definitions.resolve_job_def(job).execute_in_process(tags=ALL).success, (place, job)

    def add_up(self, raise_on_error: bool = True) -> Any:
        """A run of the global summary over all days, in the home."""
        names = [place for place in self.databases if self.customers_in(place)]
        urls = {url_variable(name): self.environment(name)["DATABASE_URL"] for name in names}
        with environment({"DATABASE_URL": self.environment(self.home)["DATABASE_URL"], NAMES: " ".join(names), **urls}):
            job = build_global_defs(Settings.from_env(SETTINGS), names).resolve_job_def(
                "marketplace_global_summary_job"
            )
            return job.execute_in_process(tags=ALL, raise_on_error=raise_on_error)

    def move(self, customer: str, place: str) -> None:
        """By the commands of the guide; the roles are the same everywhere, so there is nothing to be granted."""
        old, new = self.environment(self.places[customer]), self.environment(place)
        into = "".join(line for line in INTO.splitlines(keepends=True) if not line.startswith("us alembic"))
        follow(OUT + into + DROP, self.folder, customer, old, new)
        self.places[customer] = place

    def break_a_run(self, place: str, is_crash: bool) -> None:
        """Kills a run in the middle of a customer's transaction, or crashes its server."""
        server, conninfo = self.databases[place]
        held = self.customers_in(place)[-1]
        # Closed without a word: its server may be dead by then.
        with closing(psycopg.connect(conninfo)) as holder:
            holder.execute(f"LOCK TABLE {held}.marketplace_job_stats IN ACCESS EXCLUSIVE MODE".encode())
            broken = Run(self.environment(place)["DATABASE_URL"], DAYS[0], DAYS[-1])
            with self.connect(place) as connection:
                deadline = time.monotonic() + 60
                waiting = "SELECT FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
                while not connection.execute(waiting).fetchall():
                    assert time.monotonic() < deadline, "the run does not wait for the customer that is held"
                    time.sleep(0.02)
            if is_crash:
                server.restart()
            else:
                broken.process.kill()
        broken.wait()  # After a crash it may begin again, and succeed.

    def stored(self) -> dict[str, list[Any]]:
        """What must be the same in all layouts: the global summary, and each customer's stats and facts."""
        with self.connect(self.home) as connection:
            found = {
                "global": _texts(
                    connection, "to_jsonb(t) - 'computed_at'", "marketplace_stats.marketplace_global_summary"
                ),
                "days": _texts(
                    connection,
                    "(to_jsonb(t) - 'computed_at')::text",
                    "marketplace_stats.marketplace_global_summary_days",
                ),
            }
        for customer, place in self.places.items():
            with self.connect(place) as connection:
                found[customer] = [
                    *_texts(
                        connection,
                        "to_jsonb(t) - '{id,created_at,computed_at}'::text[]",
                        f"{customer}.marketplace_job_stats",
                    ),
                    *_texts(
                        connection,
                        "jsonb_set(to_jsonb(t), '{deleted_at}', to_jsonb(deleted_at IS NOT NULL))",
                        f"{customer}.marketplace_job_facts",
                    ),
                ]
        return found


def _texts(connection: psycopg.Connection[Any], expression: str, table: str) -> list[str]:
    rows = connection.execute(f"SELECT ({expression})::text FROM {table} AS t ORDER BY 1".encode())
    return [text for (text,) in rows]


@contextmanager
def environment(variables: dict[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def make_template(servers: Sequence[Server], customers: Sequence[str]) -> None:
    """On each server a database `template` with all customers, migrated and empty, and the role of the runs."""
    first = servers[0]
    for server in servers:
        create_run_role(server.conninfo)
        create_database(server.conninfo, "template")
    conninfo = f"{first.conninfo} dbname=template"
    with psycopg.connect(conninfo) as connection:
        application.create_action_types(connection)
        application.create_tenant(connection, application.TEMPLATE)
        for number, customer in enumerate(customers):
            if number % 3:
                application.clone_tenant(connection, customer)
            else:
                application.create_tenant(connection, customer)
    run(
        "alembic",
        "upgrade",
        "head",
        environment={"DATABASE_URL": run_url(conninfo), "MIGRATION_DATABASE_URL": url_of(conninfo)},
    )
    dump = subprocess.run([binaries() / "pg_dump", url_of(conninfo)], check=True, capture_output=True).stdout
    for server in servers[1:]:
        where = url_of(f"{server.conninfo} dbname=template")
        subprocess.run([binaries() / "psql", "-Xq", "-v", "ON_ERROR_STOP=1", where], input=dump, check=True, stdout=-3)


def campaign(server_count: int, customer_count: int, jobs: int, steps: int, seed: int, folder: Path) -> Counter[str]:
    """Plays the world in all layouts and compares them; returns what was done."""
    dice = random.Random(seed)
    figures: Counter[str] = Counter()
    customers = [f"user_{number}" for number in range(1, customer_count + 1)]
    with ExitStack() as stack:
        servers = [stack.enter_context(server_to_control()) for _ in range(server_count)]
        make_template(servers, customers)
        layouts = [
            Layout(name, servers, count, customers, folder) for name, count in (("one", 1), ("two", 2), ("four", 4))
        ]
        for step in range(steps):
            changes = [
                (one, text) for one in customers for text in _changes(dice, step, int(one.removeprefix("user_")), jobs)
            ]
            for layout in layouts:
                for customer, statement in changes:
                    layout.execute(customer, statement)
                place = dice.choice([place for place in layout.databases if layout.customers_in(place)])
                is_crash = dice.random() < 0.5
                layout.break_a_run(place, is_crash)
                figures["servers crashed" if is_crash else "runs killed"] += 1
                if len(layout.databases) > 1:
                    for customer in dice.sample(customers, 2):
                        layout.move(
                            customer, dice.choice([p for p in layout.databases if p != layout.places[customer]])
                        )
                        figures["moves"] += 1
                # What the application deletes next was seen by then, in every layout.
                for place in layout.databases:
                    layout.compute(place, "marketplace_job_stats_job", "marketplace_daily_summary_job")
                layout.add_up()
                figures["global runs"] += 1
            one, *others = [layout.stored() for layout in layouts]
            for other in others:
                for name, texts in one.items():
                    assert other[name] == texts, f"{name} differs after step {step} of seed {seed}"
                    figures["rows compared"] += len(texts)
            figures["rows in the global summary"] = len(one["global"])
    return figures


def _changes(dice: random.Random, step: int, number: int, jobs: int) -> Iterator[str]:
    """What the application does to a customer in a step."""
    first = step * jobs + 1
    given = {"number": number, "first": first, "last": first + jobs - 1, "start": START.isoformat()}
    for text in (_JOBS, _TASKS):
        yield text.format(schema="{schema}", seconds=6 * 86_400, **given)
    if step:
        yield dice.choice(_CHANGES).format(schema="{schema}", remainder=dice.randrange(5))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--servers", type=int, default=4)
    parser.add_argument("--customers", type=int, default=12)
    parser.add_argument("--jobs", type=int, default=200, help="of a customer in a step")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(dict(campaign(given.servers, given.customers, given.jobs, given.steps, given.seed, Path(folder))))


if __name__ == "__main__":
    main()
