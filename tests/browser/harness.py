"""Real processes for a real browser: Dagit and its daemon, and a page that notes what should not happen."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, suppress
from http import HTTPStatus
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import BrowserContext, ConsoleMessage, Page, Response, Route, WebSocket

from tests.conftest import ROOT

LOOPBACK = "127.0.0.1"
HARMLESS: dict[str, str] = {}
"""Parts of errors on the console that may be there, each with the reason; there is none with this version of Dagit."""


def free_port() -> int:
    with socket.create_server((LOOPBACK, 0)) as listener:
        return int(listener.getsockname()[1])


@contextmanager
def running(*command: str, environment: Mapping[str, str], output: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A command of Dagster that goes on until it is left; then it and its children are gone."""
    binaries = Path(sys.executable).parent
    with output.open("ab") as stream:
        process = subprocess.Popen(
            [binaries / command[0], *command[1:]],
            cwd=ROOT,
            env={"PATH": f"{binaries}:/usr/bin:/bin", "HOME": "/tmp", **environment},
            stdout=stream,
            stderr=stream,
            start_new_session=True,
            # Where the shell ignores the signal, its children would.
            preexec_fn=lambda: signal.signal(signal.SIGTERM, signal.SIG_DFL),
        )
    try:
        yield process
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=20)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def answers(port: int) -> bool:
    connection = HTTPConnection(LOOPBACK, port, timeout=5)
    with suppress(OSError), closing(connection):
        connection.request("GET", "/server_info")
        return connection.getresponse().status == HTTPStatus.OK
    return False


@contextmanager
def running_dagit(environment: Mapping[str, str], folder: Path) -> Iterator[str]:
    """The address of Dagit, once it answers; with the daemon, which launches backfills. Both write into the folder."""
    port = free_port()
    output = folder / "webserver"
    webserver = ("dagster-webserver", "-w", "workspace.yaml", "-h", LOOPBACK, "-p", str(port))
    daemon = ("dagster-daemon", "run", "-w", "workspace.yaml")
    with ExitStack() as stack:
        process = stack.enter_context(running(*webserver, environment=environment, output=output))
        stack.enter_context(running(*daemon, environment=environment, output=folder / "daemon"))
        deadline = time.monotonic() + 120
        while not answers(port):
            if process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"Dagit does not answer, status {process.poll()}:\n{output.read_text()[-9000:]}")
            time.sleep(0.1)
        yield f"http://{LOOPBACK}:{port}"


class Watched:
    """A page of Dagit, and what should not have happened on it."""

    def __init__(self, context: BrowserContext) -> None:
        self.incidents: list[str] = []
        context.route("**/*", self._let_through)
        self.page: Page = context.new_page()
        self.page.on("console", self._read)
        self.page.on("pageerror", lambda error: self._note(f"uncaught: {error}"))
        self.page.on("websocket", self._look_at_socket)
        self.page.on("response", self._look_at_answer)

    def _note(self, incident: str) -> None:
        self.incidents.append(incident)

    def _is_local(self, url: str) -> bool:
        is_local = urlsplit(url).hostname == LOOPBACK or urlsplit(url).scheme == "file"
        if not is_local:
            self._note(f"asked for {url}")
        return is_local

    def _let_through(self, route: Route) -> None:
        if self._is_local(route.request.url):
            route.continue_()
        else:
            route.abort()

    def _look_at_socket(self, socket: WebSocket) -> None:
        self._is_local(socket.url)

    def _look_at_answer(self, answer: Response) -> None:
        if answer.status >= HTTPStatus.BAD_REQUEST:
            self._note(f"{answer.status} {answer.url}")

    def _read(self, message: ConsoleMessage) -> None:
        if message.type == "error" and not any(part in message.text for part in HARMLESS):
            self._note(f"console: {message.text}")

    def screenshot(self, name: str) -> None:
        """Keeps a picture of the page in the folder that `SCREENSHOTS` names; where it names none, of nothing."""
        if folder := os.environ.get("SCREENSHOTS"):
            # Dagit draws some things a moment after their data are there.
            self.page.wait_for_load_state("networkidle")
            self.page.screenshot(path=Path(folder) / f"{name}.png", animations="disabled")
