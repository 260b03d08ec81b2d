"""`get_stats` and its command line: what analysts get, and how they are refused."""

import csv
import io
import json
import re
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import pandas as pd
import psycopg
import pytest

from models.summary import MarketplaceDailySummary
from pipelines.settings import UsageError
from pipelines.stats import COLUMNS, get_stats
from tests import application
from tests.conftest import ROOT, run, url_of
from tests.integration.common import TENANTS, job, materialize
from tests.integration.test_summary import summarize

NOON = datetime.now(UTC).replace(hour=12, minute=0, second=0, microsecond=0) - timedelta(days=1)
YESTERDAY = NOON.date()


def ran(duration_ms: int, wait_ms: int) -> dict[str, datetime]:
    """The times of a job that ended yesterday at noon."""
    start = NOON - timedelta(milliseconds=duration_ms)
    return {"completed_at": NOON, "started_at": start, "created_at": start - timedelta(milliseconds=wait_ms)}


@pytest.fixture
def stats(connection: psycopg.Connection[Any], url: str) -> str:
    """In each tenant: yesterday three Vinted jobs of 1, 2 and 9 s, one failed; eight days ago an eBay job; computed.

    The Vinted jobs have waited for 100, 200 and 900 ms.
    """
    for schema in TENANTS:
        rows = [
            job(id=1, **ran(1_000, 100)),
            job(id=2, **ran(2_000, 200), retry_count=2),
            job(id=3, **ran(9_000, 900), status="failed"),
            job(id=4, completed_at=NOON, marketplace="etsy", action_type_id=99, status="cancelled"),
            job(id=5, completed_at=NOON - timedelta(days=7), marketplace="ebay", action_type_id=5),
        ]
        application.insert(connection, schema, "marketplace_jobs", rows)
        application.insert(connection, schema, "marketplace_tasks", [{"job_id": 1, "status": "success"}])
    first, last = (YESTERDAY - timedelta(days=7)).isoformat(), YESTERDAY.isoformat()
    assert materialize(first, last).success
    assert summarize(first, last).success
    return url


@pytest.mark.parametrize(("tenant", "factor"), [("user_2", 1), (None, 3)])
def test_the_frame(stats: str, tenant: str | None, factor: int) -> None:
    """The last seven closed days, of one tenant or the sums over all; means and percentiles are those of all jobs."""
    frame = get_stats(tenant=tenant)
    assert tuple(frame.columns) == COLUMNS
    assert list(frame["marketplace"]) == ["etsy", "vinted"]
    etsy, vinted = frame.to_dict("records")
    assert (vinted["date"], vinted["action_code"], vinted["action_name"]) == (YESTERDAY, "publish", "Vinted Publish")
    assert (vinted["total_jobs"], vinted["failure_count"], vinted["retry_count"]) == (3 * factor, factor, 2 * factor)
    assert vinted["success_rate"] == pytest.approx(2 / 3)
    assert vinted["total_tasks"] == factor
    assert vinted["avg_duration_ms"] == 4000
    assert vinted["p50_duration_ms"] == pytest.approx(2000, rel=0.01)
    assert vinted["p95_duration_ms"] == pytest.approx(9000, rel=0.01)
    assert vinted["p99_duration_ms"] == pytest.approx(9000, rel=0.01)
    assert vinted["avg_wait_ms"] == 400
    assert vinted["p50_wait_ms"] == pytest.approx(200, rel=0.01)
    assert vinted["p95_wait_ms"] == pytest.approx(900, rel=0.01)
    # Nothing ran here: there is nothing to divide by.
    assert (etsy["action_code"], etsy["cancelled_count"], etsy["total_jobs"]) == ("unknown", factor, 0)
    assert all(pd.isna(etsy[name]) for name in ("success_rate", "avg_duration_ms", "p50_duration_ms", "p50_wait_ms"))


def test_days_and_marketplace(stats: str) -> None:
    """Only closed days of the window, and only the marketplace that was asked for."""
    assert list(get_stats(days=7)["marketplace"].unique()) == ["etsy", "vinted"]
    assert list(get_stats(days=8)["marketplace"].unique()) == ["ebay", "etsy", "vinted"]
    assert list(get_stats(days=8, marketplace="ebay")["date"]) == [YESTERDAY - timedelta(days=7)]
    assert len(get_stats(days=7, marketplace="ebay")) == 0
    assert len(get_stats(days=7, marketplace="ebay", tenant="user_2")) == 0


def test_what_is_stored_is_read_whatever_has_become_of_the_source(
    connection: psycopg.Connection[Any], stats: str
) -> None:
    """A tenant whose jobs the application has dropped has its stats still."""
    before = get_stats(tenant="user_2")
    connection.execute("DROP TABLE user_2.marketplace_jobs")
    assert get_stats(tenant="user_2").equals(before)
    assert len(before) == 2


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"marketplace": "amazon"}, "There is no marketplace 'amazon': use one of vinted, ebay, etsy."),
        ({"tenant": "user_99"}, "There is no tenant user_99 in database test_"),
        ({"tenant": "public"}, "There is no tenant public in database test_"),
        ({"days": 0}, "--days 0 is not allowed: give 1 or more."),
    ],
)
def test_refusals(url: str, arguments: dict[str, Any], sentence: str) -> None:
    """Each says what is wrong, and what there is."""
    with pytest.raises(UsageError) as refusal:
        get_stats(**arguments)
    assert refusal.value.message.startswith(sentence)


def test_what_is_not_migrated_is_said(connection: psycopg.Connection[Any], url: str) -> None:
    """A missing table is no empty answer."""
    connection.execute(
        "DROP TABLE marketplace_stats.marketplace_daily_summary; DROP TABLE user_2.marketplace_job_stats CASCADE"
    )
    with pytest.raises(UsageError, match=r"marketplace_daily_summary is missing in .*: run `alembic upgrade head`"):
        get_stats()
    with pytest.raises(UsageError, match="user_2 has no stats: marketplace_job_stats is missing: run `alembic"):
        get_stats(tenant="user_2")


def test_the_command_line(stats: str) -> None:
    """A table for people, CSV and JSON for programs: the same rows in each."""

    def command(*arguments: str) -> str:
        return run(
            "python", "-W", "ignore", "-m", "pipelines.stats", *arguments, environment={"DATABASE_URL": stats}
        ).stdout

    records = json.loads(command("--days", "8", "--format", "json"))
    assert [record["marketplace"] for record in records] == ["ebay", "etsy", "vinted"]
    assert tuple(records[0]) == COLUMNS
    assert (records[2]["date"], records[2]["total_jobs"], records[2]["avg_duration_ms"]) == (str(YESTERDAY), 9, 4000)
    assert records[1]["success_rate"] is None
    rows = list(csv.DictReader(io.StringIO(command("--days", "8", "--format", "csv"))))
    assert [(row["marketplace"], row["total_jobs"]) for row in rows] == [("ebay", "3"), ("etsy", "0"), ("vinted", "9")]
    table = command("--days", "1", "--tenant", "user_2", "--marketplace", "vinted").splitlines()
    header = "date marketplace action jobs failed success mean ms p50 ms p95 ms p99 ms p95 wait ms tasks retries"
    assert " ".join(table[1].split()) == header
    cells = table[3].split()
    assert cells[1:7] == ["vinted", "publish", "3", "1", "66.7%", "4,000"]
    assert int(cells[10]) == pytest.approx(900, rel=0.01)
    assert cells[11:] == ["1", "2"]


def test_the_command_line_refuses_in_a_sentence(server: str) -> None:
    """Without stack: a wrong marketplace, and a server that is down."""
    environment = {"DATABASE_URL": url_of(f"{server} dbname=postgres")}
    result = run("python", "-m", "pipelines.stats", "--marketplace", "amazon", environment=environment, check=False)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.splitlines()[-1] == "Error: There is no marketplace 'amazon': use one of vinted, ebay, etsy."
    down = {"DATABASE_URL": "postgresql://root:s3cret@127.0.0.1:1/shop"}
    result = run("python", "-m", "pipelines.stats", environment=down, check=False)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith("Error: Cannot connect to database shop on 127.0.0.1:1: ")
    assert "s3cret" not in result.stderr


def test_the_analysts_page_is_true(connection: psycopg.Connection[Any], stats: str) -> None:
    """Its questions run as they stand there, for another customer, and it explains every column of the summary."""
    page = (ROOT / "docs" / "analysts.md").read_text()
    for column in MarketplaceDailySummary.__table__.columns:
        assert f"| `{column.name}` | {column.doc} |" in page
    questions = re.findall(r"^```sql\n(.*?)```", page, flags=re.DOTALL | re.MULTILINE)
    connection.execute("SET timezone = 'UTC'")
    found = [connection.execute(question.replace("user_7.", "user_2.").encode()).fetchall() for question in questions]
    whole_days, *answers = found
    assert whole_days[0] == (YESTERDAY, 9)
    assert len(answers) == 10
    # There is no eBay job in the last seven days.
    assert [number for number, rows in enumerate(answers, start=1) if not rows] == [5]
    assert answers[0][0] == ("vinted", 9, 3, Decimal("66.7"))
    merged = {q: ms for ms, q in answers[2]}
    assert merged[Decimal("0.5")] == pytest.approx(2000, rel=0.01)
    assert merged[Decimal("0.95")] == pytest.approx(9000, rel=0.01)


def test_every_number_says_how_many_tenants_stand_behind_it(connection: psycopg.Connection[Any], stats: str) -> None:
    """In the frame, of all tenants and of one, and beside the command's output: who is missing on which day."""
    gap = YESTERDAY - timedelta(days=3)
    connection.execute("DELETE FROM user_2.marketplace_job_stats_days WHERE date = %s", [gap])
    connection.execute("UPDATE user_2.marketplace_job_stats_days SET definition = 1 WHERE date = %s", [YESTERDAY])
    connection.execute("UPDATE user_2.marketplace_job_facts SET failure_reason = 'HTTP 429' WHERE status = 'failed'")
    assert summarize(str(gap), str(YESTERDAY)).success
    connection.execute("DELETE FROM marketplace_stats.marketplace_daily_summary_days WHERE date = %s", [YESTERDAY])
    for tenant, expected, note in ((None, None, "not summarized yet"), ("user_2", 1, None)):
        frame = get_stats(tenant=tenant)
        vinted = frame.to_dict("records")[1]
        assert (vinted["tenants_expected"] if expected else None) == expected
        assert vinted["tenants_older_definition"] == 1
        assert vinted["top_reasons"] == [{"reason": "HTTP 429", "jobs": 1, "tenants": 1}]
        count = "2 of 3 tenants" if tenant is None else "0 of 1 tenants"
        notes = [f"{gap}: {count} computed; 1 missing: user_2.", *([f"{YESTERDAY}: {note}."] if note else [])]
        assert frame.attrs["notes"] == notes
        arguments = ["--tenant", tenant] if tenant else []
        environment = {"DATABASE_URL": stats}
        result = run("python", "-W", "ignore", "-m", "pipelines.stats", *arguments, environment=environment)
        assert result.stderr.splitlines() == notes


def test_what_is_locked_is_an_error_and_not_waited_for(
    connection: psycopg.Connection[Any], database: str, stats: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lock on the names of actions makes none of them unknown."""
    monkeypatch.setenv("STATS_LOCK_TIMEOUT_MS", "100")
    with psycopg.connect(database) as other:
        other.execute("LOCK TABLE public.marketplace_action_types")
        with pytest.raises(UsageError, match="The stats could not be read: canceling statement due to lock timeout"):
            get_stats(tenant="user_2")


def test_codes_are_written_as_they_are(connection: psycopg.Connection[Any], stats: str) -> None:
    """Markup, formulas and what a terminal obeys are text wherever they are shown."""
    codes = {1: f"[/red]x\x1b[2J{'y' * 30}", 5: "=1+1"}
    for id_, code in codes.items():
        connection.execute("UPDATE public.marketplace_action_types SET code = %s WHERE id = %s", [code, id_])
    first = str(YESTERDAY - timedelta(days=7))
    assert summarize(first, str(YESTERDAY)).success

    def command(kind: str) -> str:
        arguments = ("-m", "pipelines.stats", "--days", "8", "--format", kind)
        return run("python", "-W", "ignore", *arguments, environment={"DATABASE_URL": stats}).stdout

    table = command("table")
    assert f"[/red]x\N{REPLACEMENT CHARACTER}[2J{'y' * 30}" in table
    assert str(YESTERDAY) in table, "what is long makes nothing else shorter"
    assert "\x1b[2J" not in table
    cells = [row["action_code"] for row in csv.DictReader(io.StringIO(command("csv")))]
    assert cells == ["'=1+1", "unknown", codes[1]]
    assert [row["action_code"] for row in json.loads(command("json"))] == ["=1+1", "unknown", codes[1]]
