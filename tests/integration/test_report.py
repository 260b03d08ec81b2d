"""The report from end to end: every number on its page equals an independent computation from the source rows."""

import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from datetime import date, datetime, time, timedelta
from fractions import Fraction
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import dagster as dg
import psycopg
import pytest

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
NOTHING = "\N{EN DASH}"
MARKETPLACES = ("vinted", "ebay", "etsy")


def run_job(name: str, folder: Path, days: Sequence[date] = (), **environment: str) -> dg.ExecuteInProcessResult:
    """A run of a job, over these days if there are any, in this process."""
    environment = {"STATS_TIMEZONE": str(calm_time().tzinfo), "STATS_REPORT_DIR": str(folder), **environment}
    tags = {f"dagster/asset_partition_range_{end}": f"{days[at]}" for end, at in (("start", 0), ("end", -1)) if days}
    definitions = build_defs(Settings.from_env(environment))
    return definitions.resolve_job_def(name).execute_in_process(tags=tags, raise_on_error=False)


class Tables(HTMLParser):
    """The rows of each table with an id, as lists of their cells' text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: dict[str, list[list[str]]] = {}
        self._rows: list[list[str]] = []
        self._is_cell = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "table":
            self._rows = self.found[str(dict(attrs)["id"])] = []
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("td", "th"):
            self._rows[-1].append("")
        self._is_cell = tag in ("td", "th")

    def handle_endtag(self, tag: str) -> None:
        self._is_cell = False

    def handle_data(self, data: str) -> None:
        if self._is_cell:
            self._rows[-1][-1] += data


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

    def check(self, cells: Sequence[str], days: Sequence[date], marketplace: str, action: str = "all") -> None:
        """Jobs, failed, success; mean, p50, p95 and p99 of the durations; p50 and p95 of the waits; tasks, retries."""
        keys = [
            key for key in self.sums if key[0] in days and marketplace in ("all", key[1]) and action in ("all", key[2])
        ]
        sums = sum((self.sums[key] for key in keys), Counter())
        durations = [ms for key in keys for ms in self.durations[key]]
        waits = [ms for key in keys for ms in self.waits[key]]
        jobs, failed, success, mean, p50, p95, p99, p50_wait, p95_wait, tasks, retries = cells
        assert [jobs, failed, tasks, retries] == [
            f"{sums[name]:,}" for name in ("total_jobs", "failure_count", "total_tasks", "retry_count")
        ]
        if not sums["total_jobs"]:
            assert success == NOTHING
        else:
            assert success == f"{100 * sums['success_count'] / sums['total_jobs']:.1f} %"
        exact_mean = mean_of(durations)
        assert mean == (NOTHING if exact_mean is None else f"{exact_mean:,}")
        for shown, exact, percent in (
            (p50, durations, 50),
            (p95, durations, 95),
            (p99, durations, 99),
            (p50_wait, waits, 50),
            (p95_wait, waits, 95),
        ):
            if exact:
                value = exact_percentile(exact, Fraction(percent, 100))
                assert abs(int(shown.replace(",", "")) - value) <= 0.01 * value + 0.5
            else:
                assert shown == NOTHING

    def failed(self, days: Sequence[date], action: str, marketplace: str) -> int:
        return sum(self.sums[day, marketplace, action]["failure_count"] for day in days)


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
    """The page's tables: both weeks by marketplace and action, each day, and the failed jobs; and Dagit's numbers."""
    expected = Expected(list(fill(connection, days)), days)
    dates = [day.date for day in days[:-1]]  # Today is not closed, so it is in none of the numbers.
    assert run_job("marketplace_job_stats_job", tmp_path, dates).success
    assert run_job("marketplace_daily_summary_job", tmp_path, dates).success
    result = run_job("marketplace_report_job", tmp_path)
    assert result.success
    tables = Tables((tmp_path / "marketplace_report.html").read_text()).found

    now, before, drawn = dates[-7:], dates[-14:-7], dates[-90:]
    header, *weeks = tables["weeks"]
    assert header[3:] == ["jobs", "failed", "success", "mean ms", "p50 ms", "p95 ms", *header[9:12], "tasks", "retries"]
    assert header[9:12] == ["p99 ms", "p50 wait ms", "p95 wait ms"]
    seen = []
    for of_now, of_before in zip(weeks[::2], weeks[1::2], strict=True):
        marketplace, action = of_now[:2]
        seen.append((marketplace, action))
        assert (of_now[2], of_before[2]) == ("this", "before")
        expected.check(of_now[3:], now, marketplace, action)
        expected.check(of_before[3:], before, marketplace, action)
    actions = {(key[1], key[2]) for key in expected.sums if key[0] in (*now, *before)}
    assert sorted(seen) == sorted({("all", "all"), *((name, "all") for name in MARKETPLACES), *actions})

    _, *daily = tables["daily"]
    for day, marketplace, *cells in daily:
        expected.check(cells, [date.fromisoformat(day)], marketplace)
    assert {(row[0], row[1]) for row in daily} == {(str(key[0]), key[1]) for key in expected.sums if key[0] in drawn}
    assert len(daily) == len({(row[0], row[1]) for row in daily}) > 100

    header, *failures = tables["failures"]
    assert tuple(header[1:]) == MARKETPLACES
    for action, *numbers in failures:
        assert list(map(int, numbers)) == [expected.failed(drawn, action, name) for name in MARKETPLACES]
    assert {row[0] for row in failures} == {"publish", "update", "unknown"}

    [shown] = metadata(result).values()
    week = sum((sums for key, sums in expected.sums.items() if key[0] in now), Counter())
    assert (shown["jobs_of_7_days"], shown["failed_jobs_of_7_days"]) == (week["total_jobs"], week["failure_count"])
    assert shown["success_rate_of_7_days"] == pytest.approx(week["success_count"] / week["total_jobs"])
    assert shown["last_day"] == str(dates[-1])
    assert [len(row) for row in shown["weeks"]] == [9] * 8
    waits = [ms for key, of_key in expected.waits.items() if key[0] in now for ms in of_key]
    assert shown["p95_wait_ms_of_7_days"] == pytest.approx(exact_percentile(waits, Fraction(95, 100)), rel=0.01)
    assert shown["weeks"][0]["p95 wait ms"] == round(shown["p95_wait_ms_of_7_days"])
    assert Path(shown["page"]) == tmp_path / "marketplace_report.html"
    for name in ("last_30_days", "last_90_days"):
        assert re.match(r"!\[The last .. days]\(data:image/png;base64,iVBOR", shown[name])


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
