"""One server and one world for all faults, and the figures at the end."""

from collections.abc import Iterator

import pytest

from tests.conftest import create_run_role
from tests.faults.harness import FIGURES, SEED, World
from tests.server import server_to_control


@pytest.fixture(scope="session")
def world() -> Iterator[World]:
    with server_to_control() as server:
        create_run_role(server.conninfo)
        yield World(server)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The suite's figures, if it was run."""
    if FIGURES.total():
        terminalreporter.write_sep("=", f"faults, seed {SEED}")
        for name in ("wrong rows", "tenants mixed", "lies"):
            FIGURES[name] += 0  # What did not happen is a figure, too.
        for name, count in sorted(FIGURES.items()):
            terminalreporter.write_line(f"{count:6} {name}")
