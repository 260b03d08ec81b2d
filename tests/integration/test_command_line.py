"""The commands of the contract, each in a process of its own: what they do, and how they refuse."""

from typing import Any

import psycopg
import pytest

from tests import application
from tests.conftest import run, run_url, url_of
from tests.integration.common import job

MATERIALIZE = ("dagster", "asset", "materialize", "-m", "pipelines.definitions", "--select", "marketplace_job_stats")
DOWN = "postgresql://root:s3cret@127.0.0.1:1/shop"


def test_a_range_and_its_options_on_a_foreign_database(connection: psycopg.Connection[Any], database: str) -> None:
    """`--partition-range` computes every day in one run; `--config-json` takes the asset's own options."""
    application.insert(connection, "user_2", "marketplace_jobs", [job(id=1), job(id=2)])
    environment = {"DATABASE_URL": run_url(database).replace("postgresql://", "postgresql+psycopg://")}
    result = run(*MATERIALIZE, "--partition-range", "2025-01-01...2026-01-31", environment=environment)
    assert "396 days in UTC, 2025-01-01 to 2026-01-31" in result.stderr
    assert f"3 tenants of database {connection.info.dbname} on" in result.stderr
    assert "3 tenants done, 0 skipped, 0 failed; 1 rows changed" in result.stderr
    days = connection.execute("SELECT count(*), sum(job_count) FROM user_2.marketplace_job_stats_days").fetchone()
    assert days == (396, 2)

    connection.execute("DELETE FROM user_2.marketplace_jobs WHERE id = 2")
    day = (*MATERIALIZE, "--partition", "2026-01-15")
    assert "0 rows changed, 0 days" in run(*day, environment=environment).stderr
    config = '{"ops":{"marketplace_job_stats":{"config":{"tenants":["user_2"],"allow_shrink":true}}}}'
    assert "1 rows changed, 0 days" in run(*day, "--config-json", config, environment=environment).stderr


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        ({"DATABASE_URL": "mysql://root:s3cret@h/shop"}, "DATABASE_URL is not a URL of PostgreSQL: write it as"),
        ({"DATABASE_URL": DOWN}, "Cannot connect to database shop on 127.0.0.1:1: "),
        ({"DATABASE_URL": "no tenants"}, "No schema named user_<number> in database postgres on "),
    ],
)
@pytest.mark.parametrize("command", [(*MATERIALIZE, "--partition", "2026-01-15"), ("alembic", "upgrade", "head")])
def test_a_wrong_database_is_one_sentence(
    server: str, command: tuple[str, ...], variables: dict[str, str], sentence: str
) -> None:
    """A wrong URL, a server that is down, a database without tenants: said once, without stack and password."""
    if variables["DATABASE_URL"] == "no tenants":
        variables = {"DATABASE_URL": url_of(f"{server} dbname=postgres")}
    result = run(*command, environment=variables, check=False)
    assert result.returncode == 1
    output = result.stdout + result.stderr
    assert sentence in output
    assert "Stack Trace" not in output
    assert "Traceback" not in output
    assert "s3cret" not in output
    # Dagster says it twice, for the step and for the run, among its own lines.
    told = [line for line in output.splitlines() if " - DEBUG - " not in line]
    assert len(told) <= (10 if command[0] == "dagster" else 2)


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("STATS_TIMEZONE", "Mars", "Error: STATS_TIMEZONE='Mars' is not a time zone: give a name such as UTC"),
        (
            "STATS_START_DATE",
            "2026-13-01",
            "Error: STATS_START_DATE='2026-13-01' is not a date: write it as YYYY-MM-DD",
        ),
    ],
)
def test_a_wrong_setting_is_one_sentence(name: str, value: str, sentence: str) -> None:
    """It is refused when the definitions are loaded, before anything is connected to."""
    result = run(
        *MATERIALIZE, "--partition", "2026-01-15", environment={name: value, "DATABASE_URL": DOWN}, check=False
    )
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith(sentence)
    assert "Traceback" not in result.stderr


def test_the_definitions_are_valid() -> None:
    """What CI and a deployment check first, with the workspace file."""
    result = run("dagster", "definitions", "validate", "-w", "workspace.yaml", environment={})
    assert "All code locations passed validation" in result.stdout + result.stderr
