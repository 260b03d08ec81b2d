"""What stands between us and the database, and what it is: each works, or is refused in one sentence."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psycopg
import pytest

from pipelines.covering_index.tenants import Action, carry_out
from pipelines.definitions import build_defs
from pipelines.settings import Settings, UsageError
from pipelines.stats import get_stats
from tests.conftest import run_url, url_of
from tests.integration.common import DAY, failure, materialize, metadata
from tests.pooler import needs_pgbouncer, running_pooler

TRANSACTION_MODE = "The settings of a session do not last: is there a pooler in transaction mode?"


def summarise() -> str:
    """The summary of the day; its failure, if it has failed."""
    run = (
        build_defs(Settings.from_env({}))
        .resolve_job_def("marketplace_daily_summary_job")
        .execute_in_process(partition_key=DAY, raise_on_error=False)
    )
    return "" if run.success else failure(run)


def refusals(writers_only: bool = False) -> list[str]:
    """What each of our programs says, run in turn: the run, the summary, the index tool, the reader."""
    said = [failure(materialize()), summarise()]
    readers: list[Callable[[], Any]] = [lambda: carry_out(Action.show, [], lambda _: None)]
    if not writers_only:
        readers.append(lambda: get_stats(days=9999))
    for work in readers:
        with pytest.raises(UsageError) as error:
            work()
        said.append(error.value.message)
    return said


# ---- poolers ----


def backend(where: str) -> Any:
    with psycopg.connect(where, autocommit=True) as connection:
        return connection.execute("SELECT pg_backend_pid() FROM pg_sleep(0.3)").fetchone()


@needs_pgbouncer
@pytest.mark.parametrize("mode", ["transaction", "statement"])
@pytest.mark.parametrize("settings", [{}, {"default_pool_size": 1}, {"server_round_robin": 1}])
def test_a_pooler_that_keeps_no_sessions_is_refused(
    database: str, monkeypatch: pytest.MonkeyPatch, mode: str, settings: dict[str, Any]
) -> None:
    """Also where nobody else uses it, so that it looks like a session; several backends are lent in turn."""
    with running_pooler(database, mode, **settings) as where:
        if "default_pool_size" not in settings:
            with ThreadPoolExecutor(3) as at_once:  # Which leaves as many backends to be lent.
                assert len(set(at_once.map(backend, [where] * 3))) == 3
        for name in ("DATABASE_URL", "MIGRATION_DATABASE_URL"):
            monkeypatch.setenv(name, url_of(where))
        said = refusals()
    assert len(said) == 4
    assert [sentence for sentence in said if not sentence.startswith(TRANSACTION_MODE)] == []


@needs_pgbouncer
@pytest.mark.usefixtures("source_rows")
def test_a_pooler_in_session_mode_serves(
    database: str, connection: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All programs; a lock is not waited for without end, and a policy hides no rows on a green run."""
    connection.execute("ALTER TABLE user_10.marketplace_jobs ENABLE ROW LEVEL SECURITY")
    with running_pooler(database, "session") as where:
        monkeypatch.setenv("DATABASE_URL", run_url(where))
        monkeypatch.setenv("MIGRATION_DATABASE_URL", url_of(where))
        with psycopg.connect(database) as other:
            other.execute("LOCK TABLE user_2.marketplace_job_stats IN SHARE MODE")
            outcome = materialize()
        assert metadata(outcome)[DAY]["tenants_done"] == 1
        assert "user_2: canceling statement due to lock timeout (SQLSTATE 55P03)" in failure(outcome)
        assert "user_10: query would be affected by row-level security policy" in failure(outcome)
        assert summarise() == ""
        assert get_stats(days=9999)["total_jobs"].sum() == 2
        assert carry_out(Action.build, [], lambda _: None).failed == {}


@needs_pgbouncer
def test_a_session_of_its_own_may_be_the_only_one(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pooler in session mode with one backend: the reader, which needs no more, has it."""
    with running_pooler(database, "session", default_pool_size=1) as where:
        monkeypatch.setenv("DATABASE_URL", run_url(where))
        assert len(get_stats(days=9999)) == 0
