"""What is tried again: what may pass, and nothing else."""

import psycopg
import pytest
import sqlalchemy as sa

from pipelines.database import ATTEMPTS, may_pass, pause_s

PASSING = ("40001", "40P01", "55P03", "57P01", "57P02", "57P03", "08006", "53300", "XX000")
STAYING = ("57014", "42501", "42P01", "23505", "22003", "28P01", "0A000")


def database_error(sqlstate: str | None, kind: type[sa.exc.DBAPIError] = sa.exc.OperationalError) -> sa.exc.DBAPIError:
    original = psycopg.errors.lookup(sqlstate)("told") if sqlstate else psycopg.OperationalError("connection lost")
    return kind("SELECT", {}, original)


@pytest.mark.parametrize("sqlstate", [*PASSING, None])
def test_what_may_pass(sqlstate: str | None) -> None:
    """Serialization, deadlocks, locks, lost connections, a server that restarts or is full."""
    assert may_pass(database_error(sqlstate))


@pytest.mark.parametrize("sqlstate", STAYING)
def test_what_stays(sqlstate: str) -> None:
    """Time-outs of the statement itself, privileges, missing tables, keys, numbers, passwords."""
    assert not may_pass(database_error(sqlstate))


def test_what_is_no_error_of_the_server_stays() -> None:
    """What the client refuses, or a mistake of ours, is the same a second later."""
    assert not may_pass(database_error(None, sa.exc.DataError))
    assert not may_pass(database_error(None, sa.exc.ProgrammingError))
    assert not may_pass(MemoryError())


def test_pauses_grow_and_end() -> None:
    """A few seconds in all, and never in step."""
    pauses = [[pause_s(attempt) for attempt in range(1, ATTEMPTS)] for _ in range(100)]
    assert all(first < 0.7 and 0.7 < last < 2.5 for first, *_, last in pauses)
    assert len({tuple(each) for each in pauses}) == 100
