"""Worlds in which three releases take turns. They are apart from the others, so that both run side by side."""

from collections.abc import Callable

import pytest

from tests.migrations.releases import Release
from tests.migrations.worlds import create_roles, play_all


def test_nothing_is_lost_while_releases_take_turns(
    server: str, releases: list[Release], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Promises 1, 2, 7, 9 and 10, as in the worlds of one release."""
    monkeypatch.setenv("STATS_LOCK_TIMEOUT_MS", "50")
    create_roles(server)

    def by(release: Release) -> Callable[..., str]:
        return lambda conninfo, *arguments: release.alembic(conninfo, *arguments, status=None)

    assert play_all(server, range(95, 100), [by(release) for release in releases])[0] == 5
