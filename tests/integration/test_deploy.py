"""The units of `deploy/`, their commands as they are written: only folders, ports and addresses are the test's."""

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest

from tests.conftest import ROOT, create_database, run_url, url_of
from tests.integration.common import TENANTS

pytestmark = pytest.mark.deployment

CODE, DAEMON, WEB, VIEW, HEALTH = "code", "daemon", "web", "view", "health"
REFUSAL = "Error: DATABASE_URL is empty: set it to postgresql://..., or unset it to use the embedded server."
# As the asset's page does it: a range of days, which is one run.
LAUNCH = """
mutation($days: [String!]) {
  launchPartitionBackfill(
    backfillParams: {assetSelection: [{path: ["marketplace_job_stats"]}], partitionNames: $days}
  ) { __typename }
}"""
RUNS = "{ runsOrError { ... on Runs { results { status } } } }"
LOCATION = "{ workspaceOrError { ... on Workspace { locationEntries { locationOrLoadError { __typename } } } } }"


def settings(unit: str) -> dict[str, list[str]]:
    """What a unit's service says, each setting with all its values; code@eu is an instance of code@."""
    template, at, instance = unit.partition("@")
    text = (ROOT / "deploy" / f"marketplace-stats-{template}{at}.service").read_text()
    text = text.replace("\\\n", " ").replace("%i", instance)
    found: dict[str, list[str]] = {}
    for line in text.partition("[Service]")[2].splitlines():
        if re.match("[A-Z]", line):
            name, _, value = line.partition("=")
            found.setdefault(name, []).append(value)
    return found


def example(name: str) -> dict[str, str]:
    """What an example of an environment file sets."""
    lines = (ROOT / "deploy" / name).read_text().splitlines()
    return {name: value.strip("'") for name, _, value in (line.partition("=") for line in lines if line[:1].isalpha())}


def free_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return str(listener.getsockname()[1])


@dataclass
class Deployment:
    """The guide's folders in a folder of the test, its environment file, and the processes of the units."""

    folder: Path
    variables: dict[str, str]
    ports: dict[str, str] = field(default_factory=lambda: {port: free_port() for port in ("3000", "3001", "4000")})
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    databases: dict[str, dict[str, str]] = field(default_factory=dict)  # Each one's own environment file, by its name.

    def __post_init__(self) -> None:
        self.checkout = self.folder / "checkout"
        self.state = self.folder / "state"
        for path in (self.checkout / ".venv" / "bin", self.state):
            path.mkdir(parents=True)
        for name in ("pipelines", "assets", "models", "migrations"):
            shutil.copytree(ROOT / name, self.checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
        for path in Path(sys.executable).parent.glob("[dp][ay]*"):
            (self.checkout / ".venv" / "bin" / path.name).symlink_to(path)
        (self.checkout / "deploy").mkdir()
        for path in (ROOT / "deploy").iterdir():
            (self.checkout / "deploy" / path.name).write_text(self.placed(path.read_text()))
        (self.checkout / "deploy" / "health").chmod(0o755)
        # The example is complete: the test fills in what it leaves empty or has to be changed, and adds nothing.
        given = example("environment.example")
        assert self.variables.keys() <= given.keys()
        self.variables = {name: self.placed(value) for name, value in given.items()} | self.variables

    def placed(self, text: str) -> str:
        """What stands in a file, with the folders and ports of this test."""
        text = text.replace("/opt/marketplace-stats", str(self.checkout))
        text = text.replace("/var/lib/marketplace-stats", str(self.state))
        return re.sub(rf"\b({'|'.join(self.ports)})\b", lambda match: self.ports[match[0]], text)

    def start(self, unit: str, *without: str) -> subprocess.Popen[bytes]:
        """The unit's commands in its folder, with its environment: the file wins over what the unit says itself.

        The last process is returned: the unit's own, or the one before it that has failed.
        """
        found = settings(unit)
        own = dict(value.split("=", 1) for value in found.get("Environment", []))
        given = self.variables | self.databases.get(unit.partition("@")[2], {})
        environment = {
            "PATH": "/usr/bin:/bin",
            "HOME": str(self.state),
            **own,
            **{name: value for name, value in given.items() if name not in without},
        }
        for name in " ".join(found.get("UnsetEnvironment", [])).split():
            environment.pop(name, None)
        before = found.get("ExecStartPre", [])
        for command in (*before, *found["ExecStart"]):
            with self.output(unit).open("ab") as stream:
                process = self.processes[unit] = subprocess.Popen(
                    shlex.split(re.sub(r"\$\{(\w+)\}", lambda match: environment[match[1]], self.placed(command))),
                    cwd=self.placed(found["WorkingDirectory"][0]),
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=stream,
                    stderr=stream,
                    start_new_session=True,
                    # Where the shell ignores the signal, its children would.
                    preexec_fn=lambda: signal.signal(signal.SIGTERM, signal.SIG_DFL),
                )
            if command in before and process.wait(timeout=60):
                break
        return process

    def output(self, unit: str) -> Path:
        return self.folder / unit

    def stop(self, unit: str) -> None:
        """As systemd does: the signal, and after a while the other one, for all that is left."""
        process = self.processes.pop(unit)
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=30)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def stop_all(self) -> None:
        for unit in sorted(self.processes, key=(DAEMON, WEB, HEALTH).__contains__, reverse=True):
            self.stop(unit)

    def health(self) -> tuple[int, list[str]]:
        """The status of the health check, and what it says."""
        self.output(HEALTH).write_bytes(b"")
        status = self.start(HEALTH).wait(timeout=60)
        del self.processes[HEALTH]
        return status, self.output(HEALTH).read_text().splitlines()

    def ask(self, query: str, **variables: object) -> Any:
        """The web server's answer, or None while it has none."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.ports['3000']}/graphql",
            json.dumps({"query": query, "variables": variables}).encode(),
            {"Content-Type": "application/json"},
        )
        with suppress(OSError), urllib.request.urlopen(request, timeout=30) as answer:  # noqa: S310
            return next(iter(json.load(answer)["data"].values()))

    def until(self, is_so: Callable[[], Any], seconds: float = 90) -> Any:
        """What it returns, as soon as that is true; fails with what the units have said otherwise."""
        deadline = time.monotonic() + seconds
        while not (value := is_so()):
            if time.monotonic() > deadline:
                pytest.fail("\n".join(self.output(unit).read_text()[-4000:] for unit in self.processes))
            time.sleep(0.2)
        return value


def dagster_url(server: str, name: str) -> str:
    """A new database for Dagster's own records, as the guide has it made."""
    conninfo = create_database(server, name)
    with psycopg.connect(f"{server} dbname=postgres", autocommit=True) as connection:
        if not connection.execute("SELECT 1 FROM pg_roles WHERE rolname = 'dagster'").fetchone():
            connection.execute("CREATE ROLE dagster LOGIN")
        connection.execute(f'ALTER DATABASE "{name}" OWNER TO dagster'.encode())
    return url_of(conninfo, "dagster").replace("://", "+psycopg2://")


@pytest.fixture
def deployment(server: str, database: str, tmp_path: Path) -> Iterator[Deployment]:
    """Set up and not yet started; two jobs at noon of yesterday in each tenant, and a database of Dagster's own."""
    with psycopg.connect(database, autocommit=True) as connection:
        for schema in TENANTS:
            connection.execute(
                f"""INSERT INTO {schema}.marketplace_jobs (marketplace, action_type_id, status, completed_at)
                    SELECT 'vinted', 1, 'completed', %s FROM generate_series(1, 2)""",
                [datetime.now(UTC).replace(hour=12) - timedelta(1)],
            )
    deployment = Deployment(
        tmp_path / "deployment",
        {
            "DATABASE_URL": run_url(database),
            "DAGSTER_POSTGRES_URL": dagster_url(server, f"dagster_{tmp_path.name}"),
        },
    )
    with ExitStack() as stack:
        stack.callback(deployment.stop_all)
        yield deployment


def tables(database: str) -> set[str]:
    with psycopg.connect(database) as connection:
        return {name for [name] in connection.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")}


def test_the_units_run_a_range(deployment: Deployment, database: str) -> None:
    """A range that Dagit is asked for is queued and run, Dagster's tables are apart, and the health check tells."""
    for unit in (CODE, DAEMON, WEB):
        deployment.start(unit)
    loaded = {"locationEntries": [{"locationOrLoadError": {"__typename": "RepositoryLocation"}}]}
    deployment.until(lambda: deployment.ask(LOCATION) == loaded)
    yesterday = datetime.now(UTC).date() - timedelta(1)
    days = [(yesterday - timedelta(back)).isoformat() for back in (2, 1, 0)]
    assert deployment.ask(LAUNCH, days=days) == {"__typename": "LaunchBackfillSuccess"}
    deployment.until(lambda: deployment.ask(RUNS) == {"results": [{"status": "SUCCESS"}]})

    with psycopg.connect(database) as connection:
        for schema in TENANTS:
            rows = connection.execute(f"SELECT date, job_count FROM {schema}.marketplace_job_stats_days ORDER BY date")
            assert rows.fetchall() == [(date.fromisoformat(day), 2 * (day == days[-1])) for day in days]
    own = deployment.variables["DAGSTER_POSTGRES_URL"].replace("+psycopg2", "")
    assert "event_logs" in tables(own)
    assert not tables(own) & tables(database) and "marketplace_action_types" in tables(database)

    alive = ["web server: alive", "daemon: alive", f"code server {deployment.ports['4000']}: alive"]
    assert deployment.health() == (0, alive)
    for number, unit in enumerate((WEB, DAEMON, CODE)):
        deployment.stop(unit)
        if unit == DAEMON:  # As if some minutes had passed since its last sign of life.
            with psycopg.connect(own) as connection:
                connection.execute("""
                    UPDATE daemon_heartbeats SET body = jsonb_set(
                        body::jsonb, '{timestamp}', to_jsonb((body::jsonb ->> 'timestamp')::float8 - 360))""")
        status, told = deployment.health()
        assert status == 1
        assert [line.partition(". ")[0] for line in told] == [
            line.replace("alive", "dead") if place <= number else line for place, line in enumerate(alive)
        ]


def test_without_a_database_nothing_starts(deployment: Deployment) -> None:
    """A forgotten DATABASE_URL is one sentence when the code server is started, and no embedded server."""
    assert deployment.start(CODE, "DATABASE_URL").wait(timeout=60) == 1
    assert deployment.output(CODE).read_text() == f"{REFUSAL}\n"
    assert not (deployment.checkout / ".local").exists()


def test_a_command_says_which_database_it_means(deployment: Deployment) -> None:
    """`deploy/run` reads the database's own file after the one for all; without a name, nothing is meant."""
    files = {
        "environment": {**deployment.variables, "DATABASE_URL": ""},
        "eu.environment": {**example("eu.environment.example"), "DATABASE_URL": deployment.variables["DATABASE_URL"]},
    }
    for name, variables in files.items():
        (deployment.folder / name).write_text("".join(f"{key}='{value}'\n" for key, value in variables.items()))
    command = ["sh", str(deployment.checkout / "deploy" / "run")]
    environment = {"PATH": "/usr/bin:/bin", "MARKETPLACE_STATS_ENVIRONMENT": str(deployment.folder / "environment")}

    def said(*arguments: str, **more: str) -> str:
        ended = subprocess.run(
            [*command, *arguments], env=environment | more, capture_output=True, text=True, timeout=60
        )
        return ended.stderr

    assert said("python", "-m", "pipelines.settings") == f"{REFUSAL}\n"
    assert said("python", "-m", "pipelines.settings", MARKETPLACE_STATS_DATABASE="eu") == ""
    assert "us.environment" in said("true", MARKETPLACE_STATS_DATABASE="us")


def test_one_code_server_of_several_is_like_the_only_one() -> None:
    """Their units differ in nothing but the environment and the command."""
    only, one = (settings(unit) for unit in ("code", "code@eu"))
    assert {name for name in only | one if only.get(name) != one.get(name)} == {
        "Environment",
        "EnvironmentFile",
        "ExecStart",
    }


def test_the_read_only_web_server_is_like_the_other() -> None:
    """Their units differ in nothing but the port and the option."""
    [[web], [view]] = (settings(unit).pop("ExecStart") for unit in (WEB, VIEW))
    assert view.split() == web.replace("3000", "3001 --read-only").split()
    assert {**settings(WEB), "ExecStart": [view]} == settings(VIEW)


@pytest.mark.parametrize("unit", [DAEMON, WEB, VIEW])
def test_who_does_not_work_with_the_tenants_cannot_connect_to_them(unit: str) -> None:
    """Neither the variables nor the file that holds them."""
    [names], [hidden] = settings(unit)["UnsetEnvironment"], settings(unit)["InaccessiblePaths"]
    urls = {name for name in example("environment.example") if name.endswith("_URL")} - {"DAGSTER_POSTGRES_URL"}
    assert set(names.split()) == urls
    assert settings(unit)["EnvironmentFile"] == [f"{hidden}/environment"]


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="There is no systemd here.")
def test_the_units_are_understood(deployment: Deployment) -> None:
    """systemd finds nothing wrong in any of them."""
    units = sorted((deployment.checkout / "deploy").glob("*.service"))
    units += (deployment.checkout / "deploy").glob("*.timer")
    verified = subprocess.run(
        ["systemd-analyze", "verify", *units],  # noqa: S607 It is where the system has it.
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (verified.returncode, verified.stderr) == (0, "")
    assert len(units) == 7
