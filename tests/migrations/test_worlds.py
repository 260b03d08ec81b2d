"""A hundred worlds at random; thousands by `python -m tests.migrations.worlds`."""

import pytest

from tests.migrations.worlds import create_roles, play_all


def test_nothing_is_lost_in_any_world(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Promises 1, 2, 7, 9: rows, columns, grants and records, before and after each command, by a model of its own."""
    monkeypatch.setenv("STATS_LOCK_TIMEOUT_MS", "50")
    create_roles(server)
    played, refused = play_all(server, range(95))
    assert played == 95
    assert refused < 95 / 10  # A generator that only makes what is refused would show nothing.
