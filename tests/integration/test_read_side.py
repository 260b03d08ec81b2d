"""`get_stats` and its command line: what analysts get, and how they are refused."""

import csv
import io
import json
import math
import re
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from random import Random
from typing import Any

import pandas as pd
import psycopg
import pytest
from arro3.core import DataType, Table
from arro3.io import read_parquet
from click.testing import CliRunner

from models.summary import MarketplaceDailySummary
from pipelines.output import BY
from pipelines.settings import UsageError
from pipelines.stats import COLUMNS, get_stats, main
from tests import application
from tests.conftest import ROOT, run, url_of
from tests.integration.common import TENANTS, job, materialize, mean_of
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
    named = (vinted["date"].date(), vinted["action_code"], vinted["action_name"])
    assert named == (YESTERDAY, "publish", "Vinted Publish")
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
    assert list(get_stats(days=8, marketplace="ebay")["date"].dt.date) == [YESTERDAY - timedelta(days=7)]
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
        ({"marketplace": "Ebay"}, "There is no marketplace 'Ebay': did you mean ebay?"),
        ({"action": "publsh"}, "There is no action 'publsh': did you mean publish?"),
        ({"action": "Update"}, "There is no action 'Update': did you mean update?"),
        ({"action": "?"}, "There is no action '?': use one of delete, publish, "),
        ({"tenant": "2"}, r"There is no tenant 2 in database test_\d+ on [^ ]+, PostgreSQL \d+: did you mean user_2\?"),
        ({"tenant": ["user_1", "User_02"]}, r"There is no tenant User_02 in .*: did you mean user_2\?"),
        ({"tenant": "x"}, r"There is no tenant x in .*: there are 3, named user_<number>\."),
        ({"by": "day"}, "--by day is not allowed: use date, marketplace, action, tenant."),
        ({"days": 3, "start": "2026-01-01"}, "--days does not go together with --from and --to: give one of them."),
        ({"end": "2026-01-01"}, "--to needs --from: give the first day, too."),
        ({"start": "2026-01-02", "end": "2026-01-01"}, "--from 2026-01-02 is after --to 2026-01-01: give the earlier"),
        ({"start": "1.1.2026"}, "--from '1.1.2026' is not a date: write it as YYYY-MM-DD, "),
    ],
)
def test_refusals(url: str, arguments: dict[str, Any], sentence: str) -> None:
    """Each says what is wrong, and what there is."""
    with pytest.raises(UsageError) as refusal:
        get_stats(**arguments)
    assert refusal.value.message.startswith(sentence) or re.match(sentence, refusal.value.message)


def test_what_is_not_migrated_is_said(connection: psycopg.Connection[Any], url: str) -> None:
    """A missing table is no empty answer."""
    connection.execute(
        "DROP TABLE marketplace_stats.marketplace_daily_summary; DROP TABLE user_2.marketplace_job_stats CASCADE"
    )
    with pytest.raises(UsageError, match=r"marketplace_daily_summary is missing in .*: run `alembic upgrade head`"):
        get_stats()
    with pytest.raises(UsageError, match="user_2 has no stats: marketplace_job_stats is missing: run `alembic"):
        get_stats(tenant="user_2")


def fleet(connection: psycopg.Connection[Any]) -> pd.DataFrame:
    """Four days of jobs of all marketplaces and actions in user_1 and user_2, computed; user_10 has none.

    Returns the jobs as a frame.
    """
    random = Random(7)
    actions = {"vinted": (1, "publish", 2, "update"), "ebay": (4, "publish", 99, "unknown")}
    jobs = []
    for schema, count in (("user_1", 150), ("user_2", 60)):
        rows = []
        for id_ in range(count):
            marketplace = random.choice(list(actions))
            place = 2 * random.randrange(2)
            times = ran(random.randrange(1, 100_000), random.randrange(5_000))
            status = random.choice(["completed", "completed", "failed", "cancelled"])
            reason = random.choice(["HTTP 429", "HTTP 500", *"abcdef"]) if status == "failed" else None
            back = timedelta(days=random.randrange(4))
            rows.append(
                job(
                    id=id_,
                    marketplace=marketplace,
                    action_type_id=actions[marketplace][place],
                    status=status,
                    retry_count=random.randrange(3),
                    error_message=reason,
                    **{name: at - back for name, at in times.items()},
                )
            )
            jobs.append(rows[-1] | {"tenant": schema, "action_code": actions[marketplace][place + 1]})
        application.insert(connection, schema, "marketplace_jobs", rows)
    first, last = str(YESTERDAY - timedelta(days=6)), str(YESTERDAY)
    assert materialize(first, last).success
    assert summarize(first, last).success
    frame = pd.DataFrame(jobs)
    frame["date"] = pd.to_datetime(frame["completed_at"].dt.date)
    for name, start, end in (("duration", "started_at", "completed_at"), ("wait", "created_at", "started_at")):
        frame[name] = (frame[end] - frame[start]).dt.total_seconds() * 1000
    return frame


def independent(jobs: pd.DataFrame, by: list[str]) -> list[dict[str, Any]]:
    """The same numbers from the jobs themselves, in order."""
    found = []
    key: Any
    for key, rows in jobs.groupby(by):
        ended = rows[rows["status"] != "cancelled"]
        failed = ended[ended["status"] == "failed"]
        reasons: list[dict[str, Any]] = [
            {"reason": reason, "jobs": len(of), "tenants": of["tenant"].nunique()}
            for reason, of in failed.groupby("error_message")
        ]
        found.append(
            dict(zip(by, key, strict=True))
            | {
                "total_jobs": len(ended),
                "failure_count": len(failed),
                "cancelled_count": len(rows) - len(ended),
                "retry_count": ended["retry_count"].sum(),
                "success_rate": 1 - len(failed) / len(ended) if len(ended) else None,
                "avg_duration_ms": mean_of([round(ms) for ms in ended["duration"]]),
                "top_reasons": sorted(reasons, key=lambda one: (-one["jobs"], one["reason"]))[:5],
            }
            | {
                f"p{percent}_{name}_ms": sorted(ended[name])[math.ceil(percent * len(ended) / 100) - 1]
                for name, percent in (("duration", 50), ("duration", 95), ("wait", 50), ("wait", 95))
                if len(ended)
            }
        )
    return found


def same(frame: pd.DataFrame, wanted: list[dict[str, Any]]) -> None:
    """Percentiles within 1 % and half a millisecond, all else exactly."""
    rows = frame.to_dict("records")
    assert len(rows) == len(wanted) > 0
    for row, of in zip(rows, wanted, strict=True):
        for name, value in of.items():
            if name.startswith("p"):
                assert row[name] == pytest.approx(value, rel=0.01, abs=0.5), name
            elif value is None:
                assert pd.isna(row[name])
            elif name != "top_reasons" or row[name] is not None:
                assert row[name] == (pytest.approx(value) if name == "success_rate" else value), name


def test_groups_filters_and_several_tenants(connection: psycopg.Connection[Any], url: str) -> None:
    """Each equals what pandas makes of the jobs; who has no rows is named, and each row says who stands behind it."""
    jobs = fleet(connection)
    last = pd.Timestamp(YESTERDAY)
    choices: list[tuple[dict[str, Any], pd.Series]] = [
        ({}, jobs["date"] > last - pd.Timedelta(days=7)),
        ({"days": 2}, jobs["date"] > last - pd.Timedelta(days=2)),
        (
            {"start": YESTERDAY - timedelta(days=3), "end": str(YESTERDAY - timedelta(days=1))},
            (jobs["date"] >= last - pd.Timedelta(days=3)) & (jobs["date"] < last),
        ),
        ({"action": "publish"}, jobs["action_code"] == "publish"),
        ({"action": "unknown", "marketplace": "ebay"}, jobs["action_code"] == "unknown"),
        ({"tenant": ["user_2"]}, jobs["tenant"] == "user_2"),
        ({"tenant": ["user_2", "user_1"], "marketplace": "vinted"}, jobs["marketplace"] == "vinted"),
    ]
    for choice, is_chosen in choices:
        for by in ((), ("date",), ("marketplace", "action"), ("tenant",), ("tenant", "date"), ("action", "tenant")):
            frame = get_stats(**choice, by=by)
            columns = [BY[name] for name in by] or ["date", "marketplace", "action_code"]
            assert list(frame.columns[: len(columns)]) == columns
            same(frame, independent(jobs[is_chosen], columns))
            if "tenant" in choice or "tenant" in by:
                assert frame["top_reasons"].notna().all(), "all reasons are known"
            names = " of user_10" if "tenant" in by and "tenant" not in choice else None
            absent = [note for note in frame.attrs["notes"] if note.startswith("No rows")]
            assert absent == ([f"No rows{names} in what was asked for."] if names else [])


def test_who_stands_behind_a_group(connection: psycopg.Connection[Any], url: str) -> None:
    """Tenants are added up over the days, are their own for each tenant, and null if a day was not summarized."""
    fleet(connection)
    gap = YESTERDAY - timedelta(days=5)
    connection.execute("DELETE FROM user_2.marketplace_job_stats_days WHERE date = %s", [gap])
    assert summarize(str(gap), str(YESTERDAY)).success

    def counts(frame: pd.DataFrame) -> list[list[Any]]:
        return frame[["tenants_expected", "tenants_computed", "tenants_missing"]].astype(object).to_numpy().tolist()

    note = f"{gap}: 2 of 3 tenants computed; 1 missing: user_2."
    frame = get_stats(by="marketplace")
    assert counts(frame) == [[21, 20, 1]] * 2
    assert frame.attrs["notes"] == [note]
    assert counts(get_stats(by="date")) == [[3, 3, 0]] * 4
    frame = get_stats(by="tenant")
    assert counts(frame) == [[7, 7, 0], [7, 6, 1]]
    assert frame.attrs["notes"] == [note, "No rows of user_10 in what was asked for."]
    frame = get_stats(tenant=["user_1", "user_2"], by=["marketplace"])
    assert counts(frame) == [[14, 13, 1]] * 2
    assert frame.attrs["notes"] == [f"{gap}: 1 of 2 tenants computed; 1 missing: user_2."]
    connection.execute("DELETE FROM marketplace_stats.marketplace_daily_summary_days WHERE date = %s", [gap])
    frame = get_stats(by="marketplace")
    assert frame["tenants_expected"].isna().all()
    assert frame.attrs["notes"] == [f"{gap}: not summarized yet."]
    # One that cannot be read is named, and no reason to show nothing of the others.
    connection.execute("DROP TABLE user_2.marketplace_job_stats CASCADE")
    frame = get_stats(days=1, by="tenant")
    assert list(frame["tenant"]) == ["user_1"]
    assert frame.attrs["notes"][:2] == [
        f"{YESTERDAY}: 2 of 3 tenants computed; 1 missing: user_2.",
        "user_2 could not be read: marketplace_job_stats is missing: run `alembic -x tenant=user_2 upgrade head`.",
    ]


def test_days_that_are_not_there_are_said(stats: str) -> None:
    """Those that have not closed, and those before the first partition."""
    frame = get_stats(start="2024-12-01", end=YESTERDAY + timedelta(days=9), marketplace="ebay")
    assert frame.attrs["notes"][:2] == [
        "Days before 2025-01-01 (STATS_START_DATE) are left out.",
        f"Days after {YESTERDAY} are left out: they have not closed yet.",
    ]
    assert len(frame) == 1
    frame = get_stats(start=YESTERDAY + timedelta(days=1))
    assert frame.attrs["notes"] == [f"Days after {YESTERDAY} are left out: they have not closed yet."]
    assert len(frame) == 0


def test_types_are_the_same_with_and_without_rows(stats: str) -> None:
    """Also of groups."""
    for by in ((), ("tenant", "date")):
        full, empty = get_stats(by=by), get_stats(marketplace="ebay", by=by)
        assert len(full) > 0 == len(empty)
        assert full.dtypes.equals(empty.dtypes)
        types = {name: str(full.dtypes[name]) for name in ("date", "total_jobs", "success_rate", "p95_wait_ms")}
        assert types == {
            "date": "datetime64[us]",
            "total_jobs": "Int64",
            "success_rate": "Float64",
            "p95_wait_ms": "Int64",
        }


def test_files(stats: str, tmp_path: Path) -> None:
    """Every format as a file, in one step, with the frame's rows; a folder that is not there is refused before all."""
    choice = ("--days", "8", "--by", "tenant", "--by", "date", "--by", "marketplace")

    def command(*arguments: str, status: int = 0) -> str:
        result = CliRunner().invoke(main, [*choice, *arguments])
        assert (result.exit_code, result.stdout) == (status, "")
        return result.stderr.splitlines()[0]

    wanted = get_stats(days=8, by=["tenant", "date", "marketplace"])
    assert len(wanted) == 9
    for kind in ("table", "csv", "json", "parquet"):
        file = tmp_path / f"stats.{kind}"
        file.write_text("old")
        said = command("--format", kind, "--output", str(file))
        assert re.fullmatch(r"Reading all tenants, [0-9-]+ to [0-9-]+, from database test_\d+ on .*", said)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"stats.{n}" for n in ("csv", "json", "parquet", "table")
    ]
    assert len((tmp_path / "stats.table").read_text().splitlines()) == 13
    records = json.loads((tmp_path / "stats.json").read_text())
    assert list(records[0]) == list(wanted.columns)
    found = pd.DataFrame(records, dtype=object).astype(wanted.dtypes)
    pd.testing.assert_frame_equal(found, wanted)
    found = pd.read_csv(tmp_path / "stats.csv", dtype=object, keep_default_na=False, na_values=[""])
    assert list(found["total_jobs"].astype(int)) == list(wanted["total_jobs"])
    table = Table.from_arrow(read_parquet(tmp_path / "stats.parquet").read_all())
    found = pd.DataFrame({name: table[name].to_pylist() for name in table.column_names}, dtype=object)
    assert table.schema.field("date").type == DataType.date32()
    found["top_reasons"] = found["top_reasons"].map(json.loads)
    pd.testing.assert_frame_equal(found.astype(wanted.dtypes), wanted)
    assert command("--format", "parquet", status=1) == (
        "Error: --format parquet is not for a terminal: give --output FILE."
    )
    assert command("--output", str(tmp_path / "no" / "file"), status=1) == (
        f"Error: --output {tmp_path}/no/file cannot be written: there is no folder {tmp_path}/no."
    )


def test_the_help_has_examples_that_are_options() -> None:
    """Each parses."""
    text = run("python", "-m", "pipelines.stats", "--help", environment={}).stdout
    examples = [line.split()[3:] for line in text.splitlines() if line.lstrip().startswith("python -m")]
    assert len(examples) == 5
    for example in examples:
        assert main.make_context("stats", list(example)).params


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
        assert result.stderr.splitlines()[1:] == notes


def test_what_is_locked_is_an_error_and_not_waited_for(
    connection: psycopg.Connection[Any], database: str, stats: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lock on the names of actions makes none of them unknown."""
    monkeypatch.setenv("STATS_LOCK_TIMEOUT_MS", "100")
    with psycopg.connect(database) as other:
        other.execute("LOCK TABLE public.marketplace_action_types")
        with pytest.raises(UsageError, match="The stats could not be read: canceling statement due to lock timeout"):
            get_stats(tenant="user_2")


@pytest.mark.parametrize(
    "statement",
    [
        "REVOKE SELECT ON {} FROM stats",
        "ALTER TABLE {} ENABLE ROW LEVEL SECURITY",
        "REVOKE USAGE ON SCHEMA marketplace_stats FROM stats",
        "ALTER ROLE stats IN DATABASE {database} SET role = 'other'",
    ],
)
def test_what_may_not_be_read_is_one_sentence(connection: psycopg.Connection[Any], url: str, statement: str) -> None:
    """Whatever takes the right away; rows that a policy hides are not left out."""
    connection.execute(
        "DO $$ BEGIN CREATE ROLE other; EXCEPTION WHEN duplicate_object THEN END $$; GRANT other TO stats"
    )
    summary = "marketplace_stats.marketplace_daily_summary"
    connection.execute(statement.format(summary, database=connection.info.dbname))
    result = run("python", "-W", "ignore", "-m", "pipelines.stats", environment={"DATABASE_URL": url}, check=False)
    connection.execute(f"ALTER ROLE stats IN DATABASE {connection.info.dbname} RESET ALL")
    assert result.returncode == 1
    assert re.fullmatch(
        r"Reading [^\n]+\nError: The stats could not be read: [^\n]+ \(SQLSTATE 42501\)\. Run `alembic upgrade "
        r"head` with "
        r"MIGRATION_DATABASE_URL set, which grants what is missing; where a policy would hide rows, give the role "
        r"BYPASSRLS, or drop the policy\.\n",
        result.stderr,
    ), result.stderr


def test_ids_of_actions_are_numbers_whatever_their_type(connection: psycopg.Connection[Any], stats: str) -> None:
    """The names are those of before, by tenant and in all."""
    before = [list(get_stats(tenant=tenant)["action_code"]) for tenant in ("user_2", None)]
    connection.execute("ALTER TABLE public.marketplace_action_types ALTER id DROP DEFAULT, ALTER id TYPE text")
    assert summarize(str(YESTERDAY), str(YESTERDAY)).success
    assert [list(get_stats(tenant=tenant)["action_code"]) for tenant in ("user_2", None)] == before


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
