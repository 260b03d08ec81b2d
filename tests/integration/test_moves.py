"""Customers move between two servers, by the commands of docs/move-a-customer.md, also while runs are at work.

Afterwards each job is counted once on every day, in the customer's stats and in both summaries together.
"""

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest

from pipelines.definitions import build_defs
from pipelines.schedules import RANGE_END, RANGE_START
from pipelines.settings import Settings
from tests import application
from tests.conftest import create_database, create_run_role, run, run_url, url_of, wait_until
from tests.faults.harness import Run
from tests.integration.common import job
from tests.moves import CHECK, COMPARE, DROP, GIVEN, INTO, OUT, SUMMARIES, follow
from tests.server import running_server

TODAY = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
DAYS = [(TODAY - timedelta(back)).date() for back in range(6, 0, -1)]
WEDNESDAY = 3  # How many of these days are over when customers move.
MOVING = ("user_1", "user_2")  # With sequences and enums of its own, and a clone that shares the template's sequences.
TENANTS = {"eu": ("user_1", "user_2", "user_10"), "us": ("user_3", "user_4")}
WAITING = (
    "SELECT 1 FROM pg_locks WHERE NOT granted AND relation = '{}.marketplace_job_stats'::regclass HAVING count(*) = {}"
)


@dataclass
class World:
    """Two databases, and how many jobs ended on each day, whatever has become of them since."""

    conninfos: dict[str, str]
    folder: Path
    ended: Counter[tuple[str, date]]

    def connect(self, place: str) -> psycopg.Connection[Any]:
        return psycopg.connect(self.conninfos[place], autocommit=True)

    def variables(self, place: str) -> dict[str, str]:
        where = self.conninfos[place]
        return {
            "DATABASE_URL": run_url(where),
            "MIGRATION_DATABASE_URL": url_of(where),
            "STATS_KEY_PREFIX": place,
            "STATS_START_DATE": str(DAYS[0]),
        }

    def end_jobs(self, place: str, tenant: str, day: date, count: int = 2) -> None:
        """So many jobs of the application end at noon, with ids from wherever the tenant takes them."""
        noon = datetime(*day.timetuple()[:3], 12, tzinfo=UTC)
        times = {
            "completed_at": noon,
            "started_at": noon - timedelta(seconds=count),
            "created_at": noon - timedelta(hours=1),
        }
        with self.connect(place) as connection:
            application.insert(connection, tenant, "marketplace_jobs", [job(**times) for _ in range(count)])
        self.ended[tenant, day] += count

    def compute(self, monkeypatch: pytest.MonkeyPatch, place: str, *days: date) -> None:
        """A run of the stats, and one of the summary, over these days."""
        monkeypatch.setenv("DATABASE_URL", self.variables(place)["DATABASE_URL"])
        definitions = build_defs(Settings.from_env({"STATS_START_DATE": str(DAYS[0])}))
        tags = {RANGE_START: str(days[0]), RANGE_END: str(days[-1])}
        for name in ("marketplace_job_stats_job", "marketplace_daily_summary_job"):
            assert definitions.resolve_job_def(name).execute_in_process(tags=tags).success

    def follow(self, commands: str, customer: str, old: str, new: str, check: bool = True) -> str:
        """What these commands of the page say."""
        return follow(commands, self.folder, customer, self.variables(old), self.variables(new), check)

    def stored(self, place: str, tenant: str) -> dict[str, list[Any]]:
        """All rows of the tenant's four tables, in order."""
        with self.connect(place) as connection:
            return {
                table: connection.execute(f"SELECT * FROM {tenant}.{table} AS t ORDER BY t::text").fetchall()
                for table in ("marketplace_job_facts", "marketplace_job_stats", "marketplace_job_stats_changes")
            }

    def counted(self) -> Counter[date]:
        """The jobs of each day in both summaries together."""
        found: Counter[date] = Counter()
        for place in self.conninfos:
            with self.connect(place) as connection:
                for day, jobs in connection.execute(
                    "SELECT date, sum(total_jobs)::int FROM marketplace_stats.marketplace_daily_summary GROUP BY 1"
                ):
                    found[day] += jobs
        return found

    def expected(self) -> Counter[date]:
        days: Counter[date] = Counter()
        for (_, day), count in self.ended.items():
            days[day] += count
        return days


@pytest.fixture
def world(server: str, database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """Both places after three days, all computed; then some jobs were deleted, and one of a settled day came late."""
    with running_server() as other:
        create_run_role(other)
        conninfo = create_database(other, "shop")
        with psycopg.connect(conninfo) as connection:
            application.create_action_types(connection)
            application.create_tenant(connection, application.TEMPLATE)
            for tenant in TENANTS["us"]:
                application.clone_tenant(connection, tenant)
        run(
            "alembic",
            "upgrade",
            "head",
            environment={"DATABASE_URL": run_url(conninfo), "MIGRATION_DATABASE_URL": url_of(conninfo)},
        )
        world = World({"eu": database, "us": conninfo}, tmp_path, Counter())
        with world.connect("eu") as connection:  # Its template's sequence is far ahead of that of the younger place.
            connection.execute(f"SELECT setval('{application.TEMPLATE}.marketplace_jobs_id_seq', 1000)")
        for place, tenants in TENANTS.items():
            for tenant in tenants:
                for day in DAYS[:WEDNESDAY]:
                    world.end_jobs(place, tenant, day)
            world.compute(monkeypatch, place, *DAYS[:WEDNESDAY])
        with world.connect("eu") as connection:
            for tenant in MOVING:
                connection.execute(f"DELETE FROM {tenant}.marketplace_jobs WHERE id % 2 = 0")
                world.end_jobs("eu", tenant, DAYS[0], count=1)
        world.compute(monkeypatch, "eu", *DAYS[:WEDNESDAY])
        yield world


def test_customers_move_in_mid_week(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both move while runs are at work, the second one back again; each job is counted once, before and after.

    What was stored comes along byte for byte, and the first runs in the new place change none of it.
    """
    assert GIVEN.startswith("CUSTOMER=user_7 OLD=")
    assert world.counted() == world.expected()
    before = {tenant: world.stored("eu", tenant) for tenant in MOVING}
    assert all(len(tables["marketplace_job_stats_changes"]) == 1 for tables in before.values())
    first, last = str(DAYS[0]), str(DAYS[WEDNESDAY - 1])
    for tenant, run_comes_first in zip(MOVING, (True, False), strict=True):
        assert world.follow(CHECK, tenant, "eu", "us") == ""
        with world.connect("eu") as holder, ThreadPoolExecutor() as pool, holder.transaction():
            # Somebody holds the tenant's stats until both are waiting for them, in this order.
            holder.execute(f"LOCK TABLE {tenant}.marketplace_job_stats IN ACCESS EXCLUSIVE MODE")
            waiting: list[Any] = []
            for is_run in (run_comes_first, not run_comes_first):
                if is_run:
                    waiting.append(pool.submit(Run(world.variables("eu")["DATABASE_URL"], first, last).wait))
                else:
                    waiting.append(pool.submit(world.follow, OUT, tenant, "eu", "us"))
                wait_until(holder, WAITING.format(tenant, len(waiting)))
            holder.execute("COMMIT")
            answers = [one.result() for one in waiting]
        assert {"success": True, "message": ""} in answers
        assert world.follow(INTO + COMPARE, tenant, "eu", "us").endswith("0 failed\n")
        assert world.stored("us", tenant) == before[tenant]
        with world.connect("us") as connection:
            records = [
                connection.execute(f"SELECT version_num FROM {schema}.marketplace_job_stats_version").fetchall()
                for schema in (tenant, "user_3")
            ]
            assert len(records[0]) == 1 and records[0] == records[1]
            if tenant == "user_2":  # The clone: what it takes its ids from gives out new ones.
                sequence = f"{application.TEMPLATE}.marketplace_jobs_id_seq"
                query = f"SELECT last_value >= (SELECT max(id) FROM user_2.marketplace_jobs) FROM {sequence}"
                assert connection.execute(query).fetchall() == [(True,)]
    # Where they were and where they are, before the summaries are made again, each job is counted once.
    assert world.counted() == world.expected()
    # The week goes on in the new place: also with new ids, which must be free, from the sequences there.
    for day in DAYS[WEDNESDAY - 1 :]:
        for place, tenants in {"eu": ("user_10",), "us": (*TENANTS["us"], *MOVING)}.items():
            for tenant in tenants:
                world.end_jobs(place, tenant, day)
    for place in ("eu", "us"):
        world.compute(monkeypatch, place, *DAYS[WEDNESDAY:])
    world.follow(SUMMARIES.replace("2025-01-01", first), MOVING[0], "eu", "us")
    for place in ("eu", "us"):
        world.compute(monkeypatch, place, *DAYS)
    assert world.counted() == world.expected()
    for tenant in MOVING:
        after = world.stored("us", tenant)
        assert {tuple(row) for row in before[tenant]["marketplace_job_facts"]} <= set(after["marketplace_job_facts"])
        settled = [row for row in before[tenant]["marketplace_job_stats"] if DAYS[0] in row]
        assert [row for row in after["marketplace_job_stats"] if DAYS[0] in row] == settled
        # Nothing but the jobs that came late to Wednesday is in the journal.
        assert len(after["marketplace_job_stats_changes"]) == 2
        world.follow(DROP, tenant, "eu", "us")

    moved, back = world.stored("us", "user_2"), "user_2"
    for commands in (CHECK, OUT, INTO, COMPARE):
        world.follow(commands, back, "us", "eu")
    assert world.stored("eu", back) == moved
    for place in ("eu", "us"):
        world.compute(monkeypatch, place, *DAYS)
    assert world.counted() == world.expected()
    assert world.stored("eu", back) == moved


def test_a_move_that_is_refused_leaves_both_places_as_they_were(world: World) -> None:
    """A number that is taken, actions of other ids, and a copy that was forgotten: named, and nothing is written."""
    with world.connect("us") as connection:
        application.clone_tenant(connection, "user_10")
        world.follow(OUT, "user_10", "eu", "us")
        assert 'schema "user_10" already exists' in world.follow(INTO, "user_10", "eu", "us", check=False)
        connection.execute("DROP SCHEMA user_10 CASCADE; CREATE SCHEMA user_10_moved")
        assert 'schema "user_10_moved" already exists' in world.follow(INTO, "user_10", "eu", "us", check=False)
        connection.execute("DROP SCHEMA user_10_moved")
        assert not connection.execute("SELECT FROM pg_namespace WHERE nspname LIKE 'user_10%'").fetchall()
        connection.execute("UPDATE public.marketplace_action_types SET id = 77 WHERE id = 9")
    assert "77\tetsy\tdelete" in world.follow(CHECK, "user_10", "eu", "us", check=False)
