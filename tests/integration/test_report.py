"""The report from end to end: every number on its page equals an independent computation from the source rows."""

import json
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from datetime import date, datetime, time, timedelta
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import dagster as dg
import psycopg
import pytest
from click.testing import CliRunner

from assets.marketplace_report import read
from pipelines import report
from pipelines.definitions import build_defs
from pipelines.settings import Settings
from tests import application
from tests.integration.common import TENANTS, calm_time, failure, job, mean_of, metadata
from tests.reference import (
    JOB_COLUMNS,
    JOB_NUMBERS,
    TASK_COLUMNS,
    TASK_NUMBERS,
    Day,
    exact_percentile,
    frame,
    reference_durations,
    reference_rows,
    reference_waits,
)

pytestmark = pytest.mark.usefixtures("url")

CODES = {1: "publish", 2: "update", 3: "delete", 4: "publish", 7: "publish"}


def run_job(name: str, folder: Path, days: Sequence[date] = (), **environment: str) -> dg.ExecuteInProcessResult:
    """A run of a job, over these days if there are any, in this process."""
    environment = {"STATS_TIMEZONE": str(calm_time().tzinfo), "STATS_REPORT_DIR": str(folder), **environment}
    tags = {f"dagster/asset_partition_range_{end}": f"{days[at]}" for end, at in (("start", 0), ("end", -1)) if days}
    definitions = build_defs(Settings.from_env(environment))
    return definitions.resolve_job_def(name).execute_in_process(tags=tags, raise_on_error=False)


def embedded(page: Path) -> dict[str, Any]:
    """What the page's script shows."""
    [text] = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page.read_text())
    found: dict[str, Any] = json.loads(text)
    return found


ALL = -1


class Expected:
    """What the page must say of any set of the source's rows."""

    def __init__(self, sources: Sequence[tuple[Any, Any]], days: Sequence[Day]) -> None:
        self.sums: defaultdict[Any, Counter[str]] = defaultdict(Counter)
        self.durations: defaultdict[Any, list[int]] = defaultdict(list)
        self.waits: defaultdict[Any, list[int]] = defaultdict(list)
        for jobs, tasks in sources:
            for row in reference_rows(jobs, tasks, days).to_dict("records"):
                self.sums[self._key(row)].update({name: row[name] for name in (*JOB_NUMBERS, *TASK_NUMBERS)})
            for row in reference_durations(jobs, days).to_dict("records"):
                self.durations[self._key(row)].append(row["duration_ms"])
            for row in reference_waits(jobs, days).to_dict("records"):
                self.waits[self._key(row)].append(row["wait_ms"])

    @staticmethod
    def _key(row: dict[Any, Any]) -> tuple[date, str, str]:
        return row["date"], row["marketplace"], CODES.get(row["action_type_id"], "unknown")

    def keys(self, days: Sequence[date], marketplace: str | None, action: str | None) -> list[tuple[date, str, str]]:
        return [
            key for key in self.sums if key[0] in days and marketplace in (None, key[1]) and action in (None, key[2])
        ]

    def check(
        self, found: Mapping[str, Any], days: Sequence[date], marketplace: str | None = None, action: str | None = None
    ) -> None:
        """The numbers of these days, of a marketplace and an action or of all."""
        keys = self.keys(days, marketplace, action)
        sums = sum((self.sums[key] for key in keys), Counter())
        durations = [ms for key in keys for ms in self.durations[key]]
        waits = [ms for key in keys for ms in self.waits[key]]
        for name, value in found.items():
            measure = waits if "wait" in name else durations
            if name == "success_rate":
                jobs = sums["total_jobs"]
                assert value == (pytest.approx(sums["success_count"] / jobs, abs=0.00001) if jobs else None)
            elif name == "avg_duration_ms":
                assert value == mean_of(durations)
            elif name.startswith("p"):
                exact = exact_percentile(measure, Fraction(int(name[1:3]), 100)) if measure else None
                assert value == (None if exact is None else pytest.approx(exact, rel=0, abs=0.01 * exact + 0.5))
            else:
                assert value == sums[name]


@pytest.fixture
def days() -> list[Day]:
    """The last hundred days, today as the last of them: more than the report may show."""
    now = calm_time()
    midnights = [datetime.combine(now.date() - timedelta(ago), time(), now.tzinfo) for ago in range(99, -2, -1)]
    return [Day(start.date(), start, end) for start, end in pairwise(midnights)]


def fill(connection: psycopg.Connection[Any], days: Sequence[Day]) -> Iterator[tuple[Any, Any]]:
    """Random jobs and tasks in each tenant, more in the last weeks; their frames."""
    chance = random.Random(5)
    for tenant in TENANTS:
        jobs, tasks = [], []
        for number in range(1, 401):
            ago = chance.choice((chance.randrange(100), chance.randrange(15)))
            end = days[-1 - ago].start + timedelta(seconds=chance.randrange(86_000))
            start = end - timedelta(milliseconds=chance.randrange(90_000))
            jobs.append(
                job(
                    id=number,
                    marketplace=chance.choice(("vinted", "vinted", "ebay", "etsy", "depop")),
                    action_type_id=chance.choice((1, 1, 2, 4, 7, 77)),
                    status=chance.choice(("completed", "completed", "failed", "cancelled")),
                    retry_count=chance.randrange(3),
                    error_message=None,
                    started_at=None if number % 9 == 0 else start,
                    completed_at=end,
                    created_at=start - timedelta(milliseconds=chance.randrange(1_000_000)),
                )
            )
            task = {"id": number, "job_id": chance.randrange(1, 401), "status": chance.choice(("success", "failed"))}
            tasks.append({**task, "retry_count": number % 2, "completed_at": end})
        application.insert(connection, tenant, "marketplace_jobs", jobs)
        application.insert(connection, tenant, "marketplace_tasks", tasks)
        yield frame(jobs, JOB_COLUMNS), frame(tasks, TASK_COLUMNS)


def test_every_number_equals_the_reference(
    connection: psycopg.Connection[Any], days: list[Day], tmp_path: Path
) -> None:
    """The page's days and periods by marketplace and action, and of all; and the numbers in the Dagster UI."""
    expected = Expected(list(fill(connection, days)), days)
    dates = [day.date for day in days[:-1]]  # Today is not closed, so it is in none of the numbers.
    assert run_job("marketplace_job_stats_job", tmp_path, dates).success
    assert run_job("marketplace_daily_summary_job", tmp_path, dates).success
    result = run_job("marketplace_report_job", tmp_path)
    assert result.success
    page = embedded(tmp_path / "marketplace_report.html")

    assert page["days"] == [str(day) for day in dates]
    names = {ALL: None, **dict(enumerate(page["marketplaces"]))}
    codes = {ALL: None, **dict(enumerate(page["actions"]))}
    cells = {key: (names[int(key.split(",")[0])], codes[int(key.split(",")[1])]) for key in page["daily"]}
    known = {(marketplace, action) for _, marketplace, action in expected.sums}
    known |= {(marketplace, None) for marketplace, _ in known} | {(None, action) for _, action in known}
    assert sorted(cells.values(), key=str) == sorted([*known, (None, None)], key=str)
    for key, of_cell in page["daily"].items():
        for at, day in enumerate(dates):
            expected.check({name: values[at] for name, values in of_cell.items()}, [day], *cells[key])
    assert [(period["days"], period["has_before"]) for period in page["periods"]] == [
        (7, True),
        (28, True),
        (90, False),
    ]
    for period in page["periods"]:
        count = period["days"]
        for key, (now, before, change) in period["cells"].items():
            expected.check(dict(zip(page["shown"], now, strict=True)), dates[-count:], *cells[key])
            if period["has_before"]:
                expected.check(dict(zip(page["shown"], before, strict=True)), dates[-2 * count : -count], *cells[key])
                jobs, jobs_before = now[0], before[0]
                assert change[0] == (pytest.approx(jobs / jobs_before - 1, abs=0.00001) if jobs_before else None)

    [shown] = metadata(result).values()
    week = sum((sums for key, sums in expected.sums.items() if key[0] in dates[-7:]), Counter())
    assert (shown["jobs_of_7_days"], shown["failed_jobs_of_7_days"]) == (week["total_jobs"], week["failure_count"])
    assert shown["success_rate_of_7_days"] == pytest.approx(week["success_count"] / week["total_jobs"])
    assert shown["last_day"] == str(dates[-1])
    assert [len(row) for row in shown["weeks"]] == [9] * 8
    waits = [ms for key, of_key in expected.waits.items() if key[0] in dates[-7:] for ms in of_key]
    assert shown["p95_wait_ms_of_7_days"] == pytest.approx(exact_percentile(waits, Fraction(95, 100)), rel=0.01)
    assert shown["weeks"][0]["p95 wait ms"] == round(shown["p95_wait_ms_of_7_days"])
    assert Path(shown["page"]) == tmp_path / "marketplace_report.html"
    for name in ("success_of_30_days", "last_30_days", "last_90_days"):
        assert re.search(r"!\[[^]]+]\(data:image/svg\+xml;base64,[A-Za-z0-9+/]+=*\)", shown[name])
    assert len(shown["success_of_30_days"]) < 1000  # Longer ones are behind a click.


def failing(day: date, reasons: Mapping[str | None, int], **columns: Any) -> list[dict[str, Any]]:
    """Jobs that ended in the morning of the day, so many with each message: with one they failed, else they did not."""
    end = datetime.combine(day, time(6), calm_time().tzinfo)
    outcomes = [message for message, count in reasons.items() for _ in range(count)]
    return [
        job(error_message=message, status="failed" if message else "completed", completed_at=end, started_at=end)
        | {"created_at": end, **columns}
        for message in outcomes
    ]


def test_a_day_has_its_customers_reasons_and_changes(
    connection: psycopg.Connection[Any], days: list[Day], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who failed, why, and what a later run changed: of all customers, in several batches, and on the page of one."""
    monkeypatch.setattr(read, "BATCH", 1)
    day = days[-4].date
    for tenant, jobs in {
        "user_1": [
            *failing(day, {None: 2, "no answer from 10.0.0.7": 3, "HTTP 429": 1}),
            *failing(day, {None: 4, "=evil()": 1}, marketplace="ebay", action_type_id=4),
        ],
        "user_2": [*failing(day, {None: 9, "HTTP 429": 2}), *failing(days[-3].date, {None: 1})],
        "user_10": failing(day, {None: 5}),
    }.items():
        application.insert(connection, tenant, "marketplace_jobs", jobs)
    dates = [one.date for one in days[-15:-1]]
    assert run_job("marketplace_job_stats_job", tmp_path, dates).success
    connection.execute("UPDATE user_1.marketplace_jobs SET status = 'completed' WHERE error_message = 'HTTP 429'")
    application.insert(connection, "user_1", "marketplace_jobs", failing(day, {None: 1}))
    application.insert(connection, "user_2", "marketplace_jobs", failing(day, {"HTTP 429": 1}))
    again = run_job("marketplace_job_stats_job", tmp_path, dates)
    assert again.success
    assert run_job("marketplace_daily_summary_job", tmp_path, dates).success
    result = run_job("marketplace_report_job", tmp_path, STATS_REPORT_URL="https://stats.test/report/")
    assert result.success
    [shown] = metadata(result).values()
    assert shown["link"] == "https://stats.test/report/marketplace_report.html"
    path = tmp_path / "marketplace_report.html"

    def details(page: Mapping[str, Any], kind: str) -> list[tuple[Any, ...]]:
        texts, place = page["texts"], page["days"].index(str(day))
        names = [(page["marketplaces"][m], page["actions"][a]) for m, a in ((0, 0), (1, 0))]
        assert names == [("vinted", "publish"), ("ebay", "publish")]
        if kind == "reasons":
            return sorted((*names[m], texts[reason], *numbers) for m, _, reason, *numbers in page[kind][str(place)])
        if kind == "customers":
            return sorted(
                (texts[tenant], *names[m], jobs, failed, None if reason is None else texts[reason], most)
                for tenant, m, _, jobs, failed, reason, most in page[kind][str(place)]
            )
        assert {one[0] for one in page["changes"]} == {place}
        return sorted(
            (*names[m], texts[cause], texts[run], texts[tenant], *numbers)
            for _, m, _, cause, _, run, tenant, *numbers in page["changes"]
        )

    page = embedded(path)
    assert details(page, "reasons") == [
        ("ebay", "publish", "=evil()", 1, 1),
        ("vinted", "publish", "HTTP 429", 3, 1),
        ("vinted", "publish", "no answer from #", 3, 1),
    ]
    assert details(page, "customers") == [
        ("user_1", "ebay", "publish", 5, 1, "=evil()", 1),
        ("user_1", "vinted", "publish", 7, 3, "no answer from #", 3),
        ("user_2", "vinted", "publish", 12, 3, "HTTP 429", 3),
    ]
    # Jobs and failures before and after; late, corrected, moved in, moved out, forgotten.
    assert details(page, "changes") == [
        ("vinted", "publish", "jobs", again.run_id, "user_1", 2, 17, 19, 6, 6, 2, 1, 0, 0, 0)
    ]
    assert (page["incomplete"], set(page["completeness"])) == ([], {"3 of 3 tenants computed"})

    output = tmp_path / "user_1.html"
    environment = {"STATS_TIMEZONE": str(calm_time().tzinfo)}
    command = CliRunner().invoke(report.main, ["--tenant", "user_1", "--output", str(output)], env=environment)
    assert command.exit_code == 0, command.output
    page = embedded(output)
    place = page["days"].index(str(day))
    assert [page["daily"][key]["total_jobs"][place] for key in ("-1,-1", "0,0", "1,0")] == [12, 7, 5]
    assert [page["daily"][key]["failure_count"][place] for key in ("-1,-1", "0,0", "1,0")] == [4, 3, 1]
    assert details(page, "reasons") == [
        ("ebay", "publish", "=evil()", 1, 1),
        ("vinted", "publish", "no answer from #", 3, 1),
    ]
    assert details(page, "changes") == [
        ("vinted", "publish", "jobs", again.run_id, "user_1", 1, 6, 7, 4, 3, 1, 1, 0, 0, 0)
    ]
    assert not any(page["customers"].values())
    assert (page["incomplete"], set(page["completeness"])) == ([], {"1 of 1 tenants computed"})
    assert "Customer user_1" in output.read_text()

    connection.execute("DELETE FROM user_1.marketplace_job_stats_days WHERE date = %s", [dates[-1]])
    command = CliRunner().invoke(report.main, ["--tenant", "user_1", "--output", str(output)], env=environment)
    page = embedded(output)
    assert page["incomplete"] == [len(page["days"]) - 1]
    assert page["completeness"][-1] == "0 of 1 tenants computed; 1 missing: user_1"
    assert f"<li>{dates[-1]}: 0 of 1 tenants computed; 1 missing: user_1.</li>" in output.read_text()

    connection.execute("REVOKE SELECT ON user_2.marketplace_job_stats_changes FROM stats")
    result = run_job("marketplace_report_job", tmp_path)
    assert failure(result).startswith(
        "The page lacks the failing customers and the changes of 1 tenant. user_2: permission denied for table"
    )
    assert {one[0] for one in details(embedded(path), "customers")} == {"user_1"}
    assert "lack 1 customer, whose own tables could not" in path.read_text()


def test_an_empty_database_has_a_page_too(tmp_path: Path) -> None:
    """Without a single job there is a page that says so, and one that says that nothing is summarized yet."""
    page = tmp_path / "marketplace_report.html"
    assert run_job("marketplace_report_job", tmp_path).success
    assert "not summarized yet" in page.read_text()
    assert "No job ended" not in page.read_text()
    days = [calm_time().date() - timedelta(ago) for ago in (14, 1)]
    for job_name in ("marketplace_job_stats_job", "marketplace_daily_summary_job"):
        assert run_job(job_name, tmp_path, days).success
    assert run_job("marketplace_report_job", tmp_path).success
    assert "No job ended in the last seven days." in page.read_text()
    command = CliRunner().invoke(report.main, ["--tenant", "user_7", "--output", str(tmp_path / "x")])
    assert command.exit_code == 1
    assert "Error: There is no tenant user_7 in database " in command.output


def test_each_key_prefix_has_its_own_page(tmp_path: Path) -> None:
    """Several databases under one Dagit do not write over each other's page."""
    assert run_job("marketplace_report_job", tmp_path, STATS_KEY_PREFIX="eu").success
    assert [path.relative_to(tmp_path) for path in tmp_path.rglob("*.*")] == [Path("eu/marketplace_report.html")]


def test_what_goes_wrong_is_said_in_a_sentence(connection: psycopg.Connection[Any], tmp_path: Path) -> None:
    """A folder that cannot be written, a summary that cannot be read or is missing; the page from before stays."""
    assert run_job("marketplace_report_job", tmp_path).success
    page = tmp_path / "marketplace_report.html"
    (tmp_path / "file").touch()
    result = run_job("marketplace_report_job", tmp_path / "file")
    assert failure(result).startswith("The page could not be written: [Errno 17] File exists: '")
    assert failure(result).endswith("See to STATS_REPORT_DIR.")
    before = page.stat().st_mtime_ns
    connection.execute("REVOKE SELECT ON marketplace_stats.marketplace_daily_summary FROM stats")
    result = run_job("marketplace_report_job", tmp_path)
    assert failure(result).startswith("The summary could not be read: permission denied for table")
    connection.execute("DROP TABLE marketplace_stats.marketplace_daily_summary")
    result = run_job("marketplace_report_job", tmp_path)
    assert re.fullmatch(
        r"marketplace_stats\.marketplace_daily_summary is missing in database .*: run `alembic upgrade head`\.",
        failure(result),
    )
    assert (page.stat().st_mtime_ns, set(tmp_path.iterdir())) == (before, {tmp_path / "file", page})


def test_the_sensor_asks_once_for_each_run_of_the_summary() -> None:
    """However many days a run of the summary had."""
    key = dg.AssetKey("marketplace_daily_summary")
    sensor = build_defs(Settings.from_env({})).resolve_sensor_def("marketplace_report_sensor")
    with dg.instance_for_test() as instance:

        def ask(cursor: str | None) -> Any:
            repository = build_defs(Settings.from_env({})).get_repository_def()
            context = dg.build_sensor_context(
                instance, sensor_name=sensor.name, repository_def=repository, cursor=cursor
            )
            return sensor.evaluate_tick(context)

        assert ask(None).run_requests == []
        for day in ("2026-01-01", "2026-01-02"):
            instance.report_runless_asset_event(dg.AssetMaterialization(key, partition=day))
        asked = ask(None)
        assert len(asked.run_requests) == 1
        assert ask(asked.cursor).run_requests == []
