"""A hundred worlds at random, in parts that run side by side; thousands by `python -m tests.migrations.worlds`."""

from collections.abc import Callable

import pytest

from tests.migrations.releases import Release
from tests.migrations.worlds import create_roles, play_all

pytestmark = pytest.mark.usefixtures("roles", "short_locks")


@pytest.fixture(scope="module")
def roles(server: str) -> None:
    create_roles(server)


@pytest.fixture
def short_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STATS_LOCK_TIMEOUT_MS", "50")


@pytest.mark.parametrize("seeds", [range(48), range(48, 95)], ids=str)
def test_nothing_is_lost_in_any_world(server: str, seeds: range) -> None:
    """Promises 1, 2, 7, 9: rows, columns, grants and records, before and after each command, by a model of its own."""
    played, refused = play_all(server, seeds)
    assert played == len(seeds)
    assert refused < len(seeds) / 10  # A generator that only makes what is refused would show nothing.


@pytest.mark.parametrize("seed", range(95, 100))
def test_nothing_is_lost_while_releases_take_turns(server: str, releases: list[Release], seed: int) -> None:
    """The same with three releases that take turns."""

    def by(release: Release) -> Callable[..., str]:
        return lambda conninfo, *arguments: release.alembic(conninfo, *arguments, status=None)

    assert play_all(server, [seed], [by(release) for release in releases])[0] == 1
