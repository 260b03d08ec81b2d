"""`deploy/nginx.conf`: a real nginx before the web servers of the units, asked as browsers ask for foreign pages.

Only folders, ports and addresses are the test's.
"""

import base64
import json
import os
import shutil
import socket
import ssl
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import urlencode

import pytest
from playwright.sync_api import Response, expect, sync_playwright
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from tests.integration.test_deploy import VIEW, WEB, Deployment, dagster_url, free_port

pytestmark = [
    pytest.mark.skipif(not shutil.which("nginx", path="/usr/sbin:/usr/bin"), reason="There is no nginx here."),
    pytest.mark.deployment,
]

OPERATORS, ANALYSTS = "stats.example.com", "stats-view.example.com"
PASSWORD = "a word of this test"  # noqa: S105
COMMAND = 'mutation { setConcurrencyLimit(concurrencyKey: "%s", limit: 1) }'
LIMITS = "{ instance { concurrencyLimits { concurrencyKey } } }"
SUBSCRIPTION = 'subscription { pipelineRunLogs(runId: "none") { __typename } }'


@dataclass
class Proxy:
    """nginx and what stands behind it."""

    deployment: Deployment
    port: str
    tls: ssl.SSLContext

    def origin(self, name: str) -> str:
        return f"https://{name}:{self.port}"

    def connect(self, server_name: str) -> ssl.SSLSocket:
        return self.tls.wrap_socket(
            socket.create_connection(("127.0.0.1", int(self.port))), server_hostname=server_name
        )

    def ask(
        self, method: str, path: str, name: str = OPERATORS, body: str | None = None, **headers: str
    ) -> tuple[int, str]:
        """Status and text of the answer to somebody who has the password; `Content_Type` is the header Content-Type."""
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        connection = HTTPConnection(name)
        connection.sock = self.connect(name)
        with closing(connection):
            default = {"Host": f"{name}:{self.port}", "Authorization": basic()}
            connection.request(method, path, body, default | given)
            answer = connection.getresponse()
            return answer.status, answer.read().decode()

    def command(self, key: str, name: str = OPERATORS, **headers: str) -> tuple[int, str]:
        """A mutation, as the web server's own page sends it unless headers say otherwise."""
        own = {"Origin": self.origin(name), "Sec_Fetch_Site": "same-origin", "Content_Type": "application/json"}
        return self.ask("POST", "/graphql", name, json.dumps({"query": COMMAND % key}), **own | headers)

    def limits(self) -> set[str]:
        """The keys for which a mutation has been executed."""
        return {limit["concurrencyKey"] for limit in self.deployment.ask(LIMITS)["concurrencyLimits"]}


def basic(password: str = PASSWORD) -> str:
    return "Basic " + base64.b64encode(f"me:{password}".encode()).decode()


@pytest.fixture(scope="module")
def proxy(server: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    folder = tmp_path_factory.mktemp("proxy")
    deployment = Deployment(folder / "deployment", {"DAGSTER_POSTGRES_URL": dagster_url(server, "dagster_proxy")})
    port, key, certificate = free_port(), folder / "marketplace-stats.key", folder / "marketplace-stats.crt"
    names = f"subjectAltName=DNS:{OPERATORS},DNS:{ANALYSTS}"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"),
            *("-subj", "/CN=stats", "-addext", names, "-keyout", str(key), "-out", str(certificate)),
        ],
        check=True,
        capture_output=True,
    )
    for group in ("operators", "analysts"):
        (folder / f"marketplace-stats.{group}").write_text(f"me:{{PLAIN}}{PASSWORD}\n")
    site = (deployment.checkout / "deploy" / "nginx.conf").read_text()
    site = site.replace("/etc/nginx", str(folder)).replace("listen 443", f"listen 127.0.0.1:{port}")
    (folder / "site.conf").write_text(site)
    spools = "".join(
        f"{kind}_temp_path spool/{kind};\n" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    (folder / "nginx.conf").write_text(
        f"{'user root;' if os.geteuid() == 0 else ''}\ndaemon off;\nmaster_process off;\npid nginx.pid;\n"
        f"error_log error.log;\nevents {{}}\nhttp {{\naccess_log off;\n{spools}include site.conf;\n}}\n"
    )
    (folder / "spool").mkdir()
    with ExitStack() as stack:
        stack.callback(deployment.stop_all)
        for unit in (WEB, VIEW):
            deployment.start(unit)
        nginx = subprocess.Popen(
            ["/usr/sbin/nginx", "-p", str(folder), "-c", "nginx.conf", "-e", "error.log"],
            stdin=subprocess.DEVNULL,
        )
        stack.callback(nginx.wait)
        stack.callback(nginx.terminate)
        proxy = Proxy(deployment, port, ssl.create_default_context(cafile=certificate))

        def is_up() -> bool:
            try:
                return {proxy.ask("GET", "/server_info", name)[0] for name in (OPERATORS, ANALYSTS)} == {200}
            except OSError:
                return False

        deployment.until(is_up)
        yield proxy


def test_without_the_proxy_any_page_commands(proxy: Proxy) -> None:
    """The test's own proof: the web server executes what a page of another site sends by GET."""
    connection = HTTPConnection("127.0.0.1", int(proxy.deployment.ports["3000"]))
    foreign = {"Host": "rebound.example.net", "Origin": "https://example.net", "Sec-Fetch-Site": "cross-site"}
    with closing(connection):
        connection.request("GET", "/graphql?" + urlencode({"query": COMMAND % "bare"}), headers=foreign)
        assert connection.getresponse().status == 200
    assert "bare" in proxy.limits()


def test_the_own_page_commands(proxy: Proxy) -> None:
    """As the browser sends it, and as a script does, which names no origin; each only with the password."""
    assert proxy.command("page")[0] == 200
    json_type = {"Content_Type": "application/json; charset=utf-8"}
    body = json.dumps({"query": COMMAND % "script"})
    assert proxy.ask("POST", "/graphql", body=body, **json_type)[0] == 200
    assert proxy.command("nobody", Authorization=basic("guessed"))[0] == 401
    assert {"page", "script"} <= proxy.limits()
    assert "nobody" not in proxy.limits()


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://example.net", "Sec_Fetch_Site": "cross-site"},
        {"Origin": "https://example.net", "Sec_Fetch_Site": ""},
        {"Origin": "null"},
        {"Origin": f"https://{OPERATORS}"},  # Another port is another origin.
        {"Origin": f"https://{OPERATORS}.example.net"},
        {"Origin": "", "Sec_Fetch_Site": "cross-site"},
        {"Sec_Fetch_Site": "same-site"},
        {"Host": "rebound.example.net", "Origin": "https://rebound.example.net"},
        {"Host": "127.0.0.1"},
        # What a form or a fetch can send without asking before.
        {"Content_Type": "text/plain"},
        {"Content_Type": "text/plain; application/json"},
        {"Content_Type": "application/x-www-form-urlencoded"},
        {"Content_Type": "application/graphql"},
        {"Content_Type": ""},
    ],
    ids=str,
)
def test_a_foreign_command_is_refused(proxy: Proxy, headers: dict[str, str]) -> None:
    """It gets an answer that says why, and nothing is executed; the password, which the browser adds, does not help."""
    status, text = proxy.command("foreign", **headers)
    assert status in (403, 405, 421)
    assert text.startswith(("Refused: ", "This server is not known by that name."))
    assert "foreign" not in proxy.limits()


@pytest.mark.parametrize("path", ["/graphql", "/%67raphql", "//graphql", "/x/../graphql", "/./graphql"])
@pytest.mark.parametrize("site", ["same-origin", "none", "cross-site", ""])
def test_a_command_by_get_is_refused(proxy: Proxy, path: str, site: str) -> None:
    """By whatever way of writing the path, from whatever page, followed as a link or not."""
    query = "?" + urlencode({"query": COMMAND % "get"})
    for headers in ({}, {"Sec_Fetch_Mode": "navigate", "Sec_Fetch_Dest": "document", "Accept": "text/html"}):
        for method in ("GET", "HEAD", "PUT"):
            assert proxy.ask(method, path + query, Sec_Fetch_Site=site, **headers)[0] in (400, 403, 405)
    assert "get" not in proxy.limits()


def test_links_from_elsewhere_open_the_page(proxy: Proxy) -> None:
    """A link in a message to a run's page works; to show the page inside another one does not."""
    link = {"Sec_Fetch_Site": "cross-site", "Sec_Fetch_Mode": "navigate", "Sec_Fetch_Dest": "document"}
    status, text = proxy.ask("GET", "/runs/1234", **link)
    assert (status, "<html" in text) == (200, True)
    assert proxy.ask("GET", "/runs/1234", **link | {"Sec_Fetch_Dest": "iframe"})[0] == 403
    assert (
        proxy.ask("GET", "/server_info", **link | {"Sec_Fetch_Mode": "no-cors", "Sec_Fetch_Dest": "script"})[0] == 403
    )


def test_analysts_only_look(proxy: Proxy) -> None:
    """The read-only server answers queries and executes no mutation; nor does it take reports of assets."""
    own = {"Origin": proxy.origin(ANALYSTS), "Content_Type": "application/json"}
    assert proxy.ask("POST", "/graphql", ANALYSTS, json.dumps({"query": LIMITS}), **own)[0] == 200
    assert "UnauthorizedError" in proxy.command("analyst", ANALYSTS)[1]
    assert "analyst" not in proxy.limits()
    assert proxy.ask("POST", "/report_asset_materialization/a", ANALYSTS, "{}", **own)[0] in (401, 403)
    assert proxy.command("crossed", ANALYSTS, Origin=proxy.origin(OPERATORS))[0] == 403


def test_subscriptions_of_the_own_origin_only(proxy: Proxy) -> None:
    """What the page shows live comes over a WebSocket, which another page cannot open."""

    def subscribe(origin: str | None) -> str:
        with connect(
            f"wss://{OPERATORS}:{proxy.port}/graphql",
            sock=socket.create_connection(("127.0.0.1", int(proxy.port))),
            ssl=proxy.tls,
            origin=origin,  # type: ignore[arg-type]
            subprotocols=["graphql-ws"],  # type: ignore[list-item]
            additional_headers={"Authorization": basic()},
        ) as websocket:
            websocket.send(json.dumps({"type": "connection_init"}))
            assert json.loads(websocket.recv(timeout=10)) == {"type": "connection_ack"}
            websocket.send(json.dumps({"id": "1", "type": "start", "payload": {"query": SUBSCRIPTION}}))
            return str(json.loads(websocket.recv(timeout=10))["payload"]["data"])

    assert "PipelineRunLogsSubscriptionFailure" in subscribe(proxy.origin(OPERATORS))
    for foreign in ("https://example.net", "null", proxy.origin(ANALYSTS)):
        with pytest.raises(InvalidStatus) as refused:
            subscribe(foreign)
        assert refused.value.response.status_code == 403


@pytest.mark.skipif(not shutil.which("chromium"), reason="There is no Chromium here.")
def test_in_a_browser(proxy: Proxy) -> None:
    """The pages work, with all that they load and their WebSocket; what a foreign page sends is refused."""
    # A form is a navigation, with which every browser sends the password that it has kept.
    command = "/graphql?" + urlencode({"query": COMMAND % "attack"})
    attack = f'<form method="post" action="{proxy.origin(OPERATORS)}{command}"><button>Win a prize</button></form>'
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"),
            args=["--no-sandbox", "--disable-gpu", "--host-resolver-rules=MAP *.example.com 127.0.0.1"],
        )
        context = browser.new_context(
            ignore_https_errors=True, http_credentials={"username": "me", "password": PASSWORD}
        )
        page = context.new_page()
        answers: list[Response] = []
        page.on("response", lambda answer: answers.append(answer))
        for name in (OPERATORS, ANALYSTS):
            with page.expect_websocket():
                page.goto(f"{proxy.origin(name)}/deployment/locations")
            expect(page.get_by_text("marketplace_stats").first).to_be_visible(timeout=30_000)
            page.wait_for_load_state("networkidle")
            if folder := os.environ.get("SCREENSHOTS"):
                page.screenshot(path=Path(folder) / f"proxy-{name}.png")
        assert [answer.url for answer in answers if answer.status >= 400] == []
        page.route("https://example.net/", lambda route: route.fulfill(body=attack, content_type="text/html"))
        page.goto("https://example.net/")
        page.get_by_role("button").click()
        expect(page.get_by_text("Refused: sent by a page of another origin.")).to_be_visible()
        browser.close()
    assert "attack" not in proxy.limits()
