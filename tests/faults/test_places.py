"""The campaign of `tests.faults.places`, a small one."""

from pathlib import Path

from tests.faults.places import campaign


def test_the_same_world_on_one_server_and_spread_over_several(tmp_path: Path) -> None:
    """Whoever moves, and whatever is killed: the same global summary and the same stats of each customer."""
    figures = campaign(server_count=2, customer_count=5, jobs=600, steps=2, seed=20260115, folder=tmp_path)
    print(dict(figures))
    assert figures["rows in the global summary"] > 50
    assert figures["moves"] == 8 and figures["runs killed"] + figures["servers crashed"] == 6
    assert figures["rows compared"] > 1000
