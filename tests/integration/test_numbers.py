"""The SQL against the independent reference: any mix of source and stored rows, on a real server."""

from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, date, timedelta
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa
from hypothesis import given, settings
from hypothesis import strategies as st

from assets.marketplace_job_stats.upsert import Order, write_tenant
from pipelines.database import create_engine
from pipelines.partitions import Window
from tests import application, strategies
from tests.conftest import create_database, run_url
from tests.reference import (
    JOB_COLUMNS,
    ROW_COLUMNS,
    TASK_COLUMNS,
    Day,
    expected_after_run,
    frame,
    reference_days,
)

Row = Mapping[str, Any]
TABLES = ("marketplace_jobs", "marketplace_tasks", "marketplace_job_stats", "marketplace_job_stats_days")
FAR_AWAY = date(2001, 1, 1)


@pytest.fixture(scope="module")
def shop(server: str, migrated_template: str) -> Iterator[tuple[psycopg.Connection[Any], sa.Engine]]:
    """One database for all examples of this module: each example empties the tables first."""
    conninfo = create_database(server, "numbers", migrated_template)
    engine = create_engine(run_url(conninfo), prepares=True)  # As a run does.
    with psycopg.connect(conninfo, autocommit=True) as connection:
        yield connection, engine
    engine.dispose()


def window(zone: str, days: Sequence[Day]) -> Window:
    """The same days for the code as for the reference."""
    return Window(tuple(d.date for d in days), tuple(d.start for d in days), days[-1].end, zone)


def fill(
    connection: psycopg.Connection[Any], schema: str, jobs: Sequence[Row], tasks: Sequence[Row], stored: Sequence[Row]
) -> None:
    """Exactly these rows, and one of a day that no window holds, which nothing may touch."""
    with connection.transaction():
        for table in TABLES:
            connection.execute(f"DELETE FROM {schema}.{table}")
        application.insert(connection, schema, "marketplace_jobs", jobs)
        application.insert(connection, schema, "marketplace_tasks", tasks)
        application.insert(connection, schema, "marketplace_job_stats", stored)
        far_away = {"action_type_id": 1, "marketplace": "etsy", "date": FAR_AWAY, "total_jobs": 7}
        application.insert(connection, schema, "marketplace_job_stats", [far_away])


def compute(engine: sa.Engine, schema: str, window: Window, allow_shrink: bool = False) -> list[Row]:
    """Runs the tenant's transaction; returns its days."""
    with engine.connect() as connection:
        result = write_tenant(connection, schema, Order(window, "test", allow_shrink=allow_shrink))
        return [day._asdict() for day in result.days]


def stored_rows(connection: psycopg.Connection[Any], schema: str) -> list[tuple[Any, ...]]:
    """The rows of the stats table but the far away one, which must be as it was."""
    columns = ", ".join(ROW_COLUMNS)
    rows = connection.execute(f"SELECT {columns} FROM {schema}.marketplace_job_stats ORDER BY 1, 2, 3").fetchall()
    far_away = [row for row in rows if row[2] == FAR_AWAY]
    assert [row[:4] for row in far_away] == [(1, "etsy", FAR_AWAY, 7)]
    return [row for row in rows if row[2] != FAR_AWAY]


def ledger(connection: psycopg.Connection[Any], schema: str) -> list[tuple[Any, ...]]:
    return connection.execute(f"""
        SELECT date, outcome, job_count, task_count, unknown_marketplace_count, bad_duration_count
          FROM {schema}.marketplace_job_stats_days ORDER BY date""").fetchall()


def physical_state(connection: psycopg.Connection[Any], schema: str) -> list[tuple[Any, ...]]:
    """The version of every row of our tables, and the sequence: what a run that writes nothing leaves alone."""
    return [
        *connection.execute(f"SELECT ctid, xmin, * FROM {schema}.marketplace_job_stats ORDER BY ctid").fetchall(),
        *connection.execute(f"SELECT ctid, xmin, * FROM {schema}.marketplace_job_stats_days ORDER BY ctid").fetchall(),
        connection.execute("SELECT last_value, is_called FROM template_tenant.vinted_job_stats_id_seq").fetchone()
        or (),
    ]


@given(data=st.data(), allow_shrink=st.booleans())
@settings(max_examples=120, deadline=None)
def test_rows_and_ledger_equal_the_reference(
    shop: tuple[psycopg.Connection[Any], sa.Engine], data: st.DataObject, allow_shrink: bool
) -> None:
    """Promises 13, 14, 15, 17, 19: a range, its days one by one in any order, and any replay give the reference's rows.

    Held-back days keep theirs; the replay leaves every row version and the sequence as they were.
    """
    connection, engine = shop
    zone, days = data.draw(strategies.windows())
    jobs = data.draw(strategies.jobs(days))
    tasks = data.draw(strategies.tasks([job["id"] for job in jobs], days))
    stored = data.draw(strategies.stored_rows(days))
    in_turn = data.draw(st.permutations(days))
    for schema in ("user_2", "user_10"):
        fill(connection, schema, jobs, tasks, stored)

    compute(engine, "user_2", window(zone, days), allow_shrink)
    for day in in_turn:
        compute(engine, "user_10", window(zone, [day]), allow_shrink)

    job_frame, task_frame = frame(jobs, JOB_COLUMNS), frame(tasks, TASK_COLUMNS)
    rows, held_back = expected_after_run(frame(stored, ROW_COLUMNS), job_frame, task_frame, days, allow_shrink)
    expected_rows = sorted(rows[list(ROW_COLUMNS)].itertuples(index=False, name=None), key=lambda row: row[:3])
    expected_ledger = [
        (day[0], "held_back" if day[0] in held_back else "computed", *day[1:])
        for day in reference_days(job_frame, task_frame, days).itertuples(index=False, name=None)
    ]
    for schema in ("user_2", "user_10"):
        assert stored_rows(connection, schema) == expected_rows
        assert ledger(connection, schema) == expected_ledger

    before = physical_state(connection, "user_2")
    again = compute(engine, "user_2", window(zone, days), allow_shrink)
    assert physical_state(connection, "user_2") == before
    assert not any(day["inserted"] or day["updated"] or day["deleted"] for day in again)


@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_enum_statuses_count_like_text(shop: tuple[psycopg.Connection[Any], sa.Engine], data: st.DataObject) -> None:
    """A tenant whose statuses are enum types, one of which lacks a label, gets the same rows as one with text."""
    connection, engine = shop
    zone, days = data.draw(strategies.windows())
    jobs = [job for job in data.draw(strategies.jobs(days)) if job["status"] != "expired"]
    tasks = data.draw(strategies.tasks([job["id"] for job in jobs], days))
    for schema in ("user_1", "user_2"):
        fill(connection, schema, jobs, tasks, [])
        compute(engine, schema, window(zone, days))
    assert stored_rows(connection, "user_1") == stored_rows(connection, "user_2")
    assert ledger(connection, "user_1") == ledger(connection, "user_2")


@pytest.mark.parametrize(
    ("zone", "day"), [("America/Havana", date(2025, 11, 2)), ("Atlantic/Azores", date(2025, 10, 26))]
)
def test_the_partitions_decide_where_postgresql_sees_another_midnight(
    shop: tuple[psycopg.Connection[Any], sa.Engine], zone: str, day: date
) -> None:
    """Promise 17: between the partition's midnight and PostgreSQL's, a job belongs to the partition's day."""
    connection, engine = shop
    days = [strategies.day_of(zone, day + timedelta(days=shift)) for shift in (-1, 0)]
    postgresql = connection.execute("SELECT %s::timestamp AT TIME ZONE %s", [day, zone]).fetchone()
    assert postgresql is not None
    midnights = sorted([days[1].start.astimezone(UTC), postgresql[0].astimezone(UTC)])
    assert midnights[0] < midnights[1], "the server knows better by now: find another day for this test"
    between = midnights[0] + timedelta(minutes=1)
    job = {"id": 1, "marketplace": "vinted", "action_type_id": 1, "status": "completed", "completed_at": between}
    fill(connection, "user_2", [job], [], [])

    compute(engine, "user_2", window(zone, days))

    ours = day if days[1].start.astimezone(UTC) <= between else day - timedelta(days=1)
    assert [row[2] for row in stored_rows(connection, "user_2")] == [ours]
