"""A hundred worlds at random; thousands by `python -m tests.migrations.worlds`."""

from collections.abc import Callable

import pytest

from tests.migrations.releases import Release
from tests.migrations.worlds import create_roles, play_all

CASES, OF_RELEASES = 95, 5


def test_nothing_is_lost_in_any_world(server: str, releases: list[Release], monkeypatch: pytest.MonkeyPatch) -> None:
    """Promises 1, 2, 7, 9: rows, columns, grants and records, before and after each command, by a model of its own.

    In some of the cases three releases take turns.
    """
    monkeypatch.setenv("STATS_LOCK_TIMEOUT_MS", "50")
    create_roles(server)
    played, refused = play_all(server, range(CASES))

    def by(release: Release) -> Callable[..., str]:
        return lambda conninfo, *arguments: release.alembic(conninfo, *arguments, status=None)

    assert play_all(server, range(CASES, CASES + OF_RELEASES), [by(release) for release in releases])[0] == OF_RELEASES
    assert played == CASES
    assert refused < CASES / 10  # A generator that only makes what is refused would show nothing.
