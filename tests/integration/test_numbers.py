"""The SQL against the independent reference: any mix of source and stored rows, on a real server."""

from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, date, timedelta
from typing import Any

import dagster as dg
import psycopg
import pytest
import sqlalchemy as sa
from hypothesis import given, settings
from hypothesis import strategies as st

from assets.marketplace_job_stats.reasons import failure_reason as reason_sql
from assets.marketplace_job_stats.statement import Statement
from assets.marketplace_job_stats.transaction import ComputeSpec, TenantResult, write_tenant
from pipelines.database import create_engine
from pipelines.partitions import Days, Window
from tests import application, strategies
from tests.conftest import create_database, run_url
from tests.reference import NUMBERS, ROW_COLUMNS, Day, Memory, Source, StatsRow, failure_reason

Row = Mapping[str, Any]
TABLES = (
    "marketplace_jobs",
    "marketplace_tasks",
    "marketplace_job_facts",
    "marketplace_job_stats",
    "marketplace_job_stats_days",
    "marketplace_job_stats_changes",
)
REASONS = ("unknown_marketplace", "no_start", "bad_duration")
FAR_AWAY = date(2001, 1, 1)
FAR_AWAY_ROW: Row = {"action_type_id": 1, "marketplace": "etsy", "date": FAR_AWAY, "total_jobs": 7}
"""Of a day that no window holds: nothing may touch it, though it says that there was an earlier day."""


@pytest.fixture(scope="module")
def shop(server: str, migrated_template: str) -> Iterator[tuple[psycopg.Connection[Any], sa.Engine]]:
    """One database for all examples of this module: each example empties the tables first."""
    conninfo = create_database(server, "numbers", migrated_template)
    engine = create_engine(run_url(conninfo), search_path="pg_catalog", jit="off")  # As a run does.
    with psycopg.connect(conninfo, autocommit=True) as connection:
        yield connection, engine
    engine.dispose()


def window(zone: str, days: Sequence[Day]) -> Window:
    """The same days for the code as for the reference."""
    return Window(tuple(d.date for d in days), tuple(d.start for d in days), days[-1].end, zone)


def fill(
    connection: psycopg.Connection[Any], schema: str, jobs: Sequence[Row], tasks: Sequence[Row], stored: Sequence[Row]
) -> None:
    """Exactly these rows, and the far away one."""
    with connection.transaction():
        for table in TABLES:
            connection.execute(f"DELETE FROM {schema}.{table}")
        application.insert(connection, schema, "marketplace_jobs", jobs)
        application.insert(connection, schema, "marketplace_tasks", tasks)
        application.insert(connection, schema, "marketplace_job_stats", stored)
        application.insert(connection, schema, "marketplace_job_stats", [FAR_AWAY_ROW])


def compute(engine: sa.Engine, schema: str, window: Window, allow_shrink: bool = False) -> TenantResult:
    """Runs the tenant's transaction."""
    days = Days(dg.DailyPartitionsDefinition(start_date="2025-01-01", timezone=window.time_zone))
    with engine.connect() as connection:
        return write_tenant(connection, schema, ComputeSpec(window, "test", days, allow_shrink=allow_shrink), True)


def stored_rows(connection: psycopg.Connection[Any], schema: str) -> list[tuple[Any, ...]]:
    """The rows of the stats table but the far away one, which must be as it was."""
    columns = ", ".join(ROW_COLUMNS)
    rows = connection.execute(f"SELECT {columns} FROM {schema}.marketplace_job_stats ORDER BY 1, 2, 3").fetchall()
    far_away = [row for row in rows if row[2] == FAR_AWAY]
    assert [row[:4] for row in far_away] == [(1, "etsy", FAR_AWAY, 7)]
    return [row for row in rows if row[2] != FAR_AWAY]


def ledger(connection: psycopg.Connection[Any], schema: str) -> list[tuple[Any, ...]]:
    return connection.execute(f"""
        SELECT date, outcome, unknown_marketplace_count, no_start_count, bad_duration_count
          FROM {schema}.marketplace_job_stats_days ORDER BY date""").fetchall()


def physical_state(connection: psycopg.Connection[Any], schema: str) -> list[tuple[Any, ...]]:
    """The version of every row of our tables, and the sequence: what a run that writes nothing leaves alone."""
    rows = [
        row
        for table in TABLES[2:]
        for row in connection.execute(f"SELECT ctid, xmin, to_jsonb(t) FROM {schema}.{table} t ORDER BY ctid")
    ]
    return [*rows, *connection.execute("SELECT last_value, is_called FROM template_tenant.vinted_job_stats_id_seq")]


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

    memory = Memory(calendar=days, zone=zone)
    for row in (*stored, FAR_AWAY_ROW):
        key = (row["action_type_id"], row["marketplace"], row["date"])
        memory.rows[key] = StatsRow({name: row.get(name) for name in NUMBERS}, row.get("computed_at"))
    memory.observe(Source(jobs, tasks), days, days[-1].end, allow_shrink=allow_shrink)
    expected_rows = [tuple(row[name] for name in ROW_COLUMNS) for row in memory.table() if row["date"] != FAR_AWAY]
    expected_ledger = [
        (day, entry.outcome, *(entry.uncounted.get(reason, 0) for reason in REASONS))
        for day, entry in sorted(memory.ledger.items())
    ]
    for schema in ("user_2", "user_10"):
        assert stored_rows(connection, schema) == expected_rows
        assert ledger(connection, schema) == expected_ledger

    before = physical_state(connection, "user_2")
    again = compute(engine, "user_2", window(zone, days), allow_shrink)
    assert physical_state(connection, "user_2") == before
    assert not any(map(any, again.written.values()))


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


# Pieces of messages: what is about one case, what is not, and what is easily taken for the other.
_PIECES = (
    *("HTTP 503", "HTTP/1.1 404", "status: 502", "status_code=429", "Code 17", "code 99999", "503", "1.5", "1,000"),
    *("'a b'", "it's", '"x"', '"open', "`id`", "«c»", "“d”", "\u2018e\u2019s\u2019", "'"),
    *("https://a.example/b?c=1", "www.example.com", "a.b@example.com", "@anna", "/srv/a/b.jpg", "C:\\a\\b"),
    *("10.0.0.1:5432", "db.example:80", "::1", "fe80::1:2", "12:30:59", "deadbeef01", "c2VjcmV0IHRva2Vu" * 2 + "=="),
    *("a1b2", "x" * 130, "é", "\n", "\r\n", "\t", " ", ":", ", ", "(", ")", "[", "#", "-", "_", "/", "=", "\\"),
)
messages = st.lists(st.sampled_from(_PIECES) | st.text(max_size=3), max_size=8).map("".join) | st.lists(
    st.sampled_from(_PIECES), max_size=6
).map(" ".join)


@given(texts=st.lists(messages.filter(lambda text: "\0" not in text), min_size=1, max_size=20))
@settings(max_examples=200, deadline=None)
def test_reasons_equal_the_reference(shop: tuple[psycopg.Connection[Any], sa.Engine], texts: list[str]) -> None:
    """The SQL makes of any message the reason that the reference makes of it."""
    query = Statement("SELECT {reason} FROM unnest(%(texts)s::text[]) AS given (message)", reason=reason_sql("message"))
    found = [reason for (reason,) in shop[0].execute(query.text("user_2"), {"texts": texts})]
    assert found == [failure_reason(text) for text in texts]
