"""The second revision: facts of jobs that are gone, and the journal, cannot be computed again; so no way back loses
them."""

from typing import Any

import psycopg
import pytest

from migrations.shape import CHANGES, FACTS, LEDGER, NEW, archived
from tests import application
from tests.migrations.common import alembic, drift_of, shapes
from tests.migrations.test_states import S

TODAY = "2025-06-02"
FACT = {
    "job_id": 1,
    "created_at": "2025-06-01 10:00Z",
    "completed_at": "2025-06-01 12:00Z",
    "date": "2025-06-01",
    "action_type_id": 1,
    "retry_count": 0,
    "marketplace": "vinted",
    "status": "completed",
}
LINE = {
    "date": "2025-06-01",
    "action_type_id": 1,
    "marketplace": "vinted",
    "changed_at": "2025-06-03",
    "run_id": "x",
    "cause": "jobs",
} | dict.fromkeys(("late_count", "corrected_count", "moved_in_count", "moved_out_count", "forgotten_count"), 0)


def job(connection: psycopg.Connection[Any]) -> None:
    """The job of the fact, as the source holds it."""
    row = {"id": 1, "marketplace": "vinted", "action_type_id": 1, "status": "completed"}
    application.insert(connection, S, "marketplace_jobs", [row | {"created_at": FACT["created_at"]}])


@pytest.mark.parametrize("command", ["base", "0001"])
@pytest.mark.parametrize(
    "loss", ["the job is gone", "it was seen to be gone", "no jobs table", "a line of the journal"]
)
def test_a_downgrade_that_would_lose_facts_is_refused(
    old_database: str, old_connection: psycopg.Connection[Any], command: str, loss: str
) -> None:
    """Promise 7: unless they are to be archived, from where the next upgrade takes them back."""
    alembic(old_database, "upgrade", "head")
    deleted_at = "2025-06-03" if loss == "it was seen to be gone" else None
    application.insert(old_connection, S, FACTS, [FACT | {"deleted_at": deleted_at}])
    if loss != "the job is gone":
        job(old_connection)
    if loss == "no jobs table":
        old_connection.execute(f"DROP TABLE {S}.marketplace_jobs CASCADE")
    if loss == "a line of the journal":
        application.insert(old_connection, S, CHANGES, [LINE])
    output = alembic(old_database, "downgrade", command, status=3)
    assert f"{S}: failed, with {NEW}: facts of jobs that are gone, or the journal, would be lost" in output
    assert "they cannot be computed again: repeat with -x archive=yes" in output
    assert shapes(old_database)[S].table(FACTS)

    alembic(old_database, "-x", "archive=yes", "downgrade", command)
    shape = shapes(old_database)[S]
    assert not shape.table(FACTS) and shape.table(archived(FACTS)) and shape.table(archived(CHANGES))
    alembic(old_database, "upgrade", "head")
    assert old_connection.execute(f"SELECT job_id FROM {S}.{FACTS}").fetchall() == [(1,)]
    lines = old_connection.execute(f"SELECT count(*) FROM {S}.{CHANGES}").fetchall()
    assert lines == [(int(loss == "a line of the journal"),)]
    assert drift_of(old_database) == []


def test_facts_that_can_be_computed_again_go(old_database: str, old_connection: psycopg.Connection[Any]) -> None:
    """Where the source holds every job, and nothing has changed, a downgrade needs no word."""
    alembic(old_database, "upgrade", "head")
    application.insert(old_connection, S, FACTS, [FACT])
    job(old_connection)
    alembic(old_database, "downgrade", "base")
    assert not {FACTS, archived(FACTS)} & shapes(old_database)[S].relations.keys()


def test_an_open_day_is_unknown_to_the_release_before(
    old_database: str, old_connection: psycopg.Connection[Any]
) -> None:
    """Promise 7: its rows stay, and the ledger lacks it until it is computed again; then it may be open again."""
    alembic(old_database, "upgrade", "head")
    rows = [{"action_type_id": 1, "marketplace": "ebay", "date": day, "total_jobs": 1} for day in ("2025-06-01", TODAY)]
    application.insert(old_connection, S, NEW, rows)
    known: dict[str, object] = {"time_zone": "UTC", "run_id": "x", "changed_at": "2025-06-03"}
    known |= dict.fromkeys(("job_count", "task_count", "stored_job_count", "stored_task_count"), 1)
    known |= dict.fromkeys(("unknown_marketplace_count", "bad_duration_count"), 0)
    entries = [{"date": "2025-06-01", "outcome": "computed"} | known, {"date": TODAY, "outcome": "open"} | known]
    application.insert(old_connection, S, LEDGER, entries)
    alembic(old_database, "downgrade", "0001")
    assert old_connection.execute(f"SELECT date::text, outcome FROM {S}.{LEDGER}").fetchall() == [
        ("2025-06-01", "computed")
    ]
    assert old_connection.execute(f"SELECT count(*) FROM {S}.{NEW} WHERE date = '{TODAY}'").fetchall() == [(1,)]
    with pytest.raises(psycopg.errors.CheckViolation):
        application.insert(old_connection, S, LEDGER, entries[1:])
    alembic(old_database, "upgrade", "head")
    application.insert(old_connection, S, LEDGER, entries[1:])
    assert drift_of(old_database) == []
