"""Dagit as operators and analysts have it: real processes, on real rows, in a real browser."""

import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple
from zoneinfo import ZoneInfo

import dagster as dg
import psycopg
import pytest
from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright

from pipelines.definitions import build_defs
from pipelines.schedules import RANGE_END, RANGE_START
from pipelines.settings import Settings
from tests.browser.harness import LOOPBACK, Watched, running_dagit
from tests.conftest import create_database, run, run_url
from tests.integration.common import TENANTS
from tests.integration.test_command_line import MATERIALIZE

CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: no `chromium` is on the PATH"),
]

TIMEOUT_MS = 60_000
STATS, SUMMARY, REPORT = "marketplace_job_stats", "marketplace_daily_summary", "marketplace_report"
LINEAGE = (("marketplace_jobs", "marketplace_tasks", "marketplace_action_types"), (STATS,), (SUMMARY,), (REPORT,))
"""The assets in the order in which they are made: each is to the right of those before it."""

REPORT_URL = f"http://{LOOPBACK}/report"
DAYS = 10
HELD_BACK = 4
"""The last day that is computed beforehand. A tenant then deletes jobs of it: held back, also in the backfill."""


class Shop(NamedTuple):
    """Dagit's address, what Dagster keeps, the application's database, its days in order, the settings, the page."""

    url: str
    instance: dg.DagsterInstance
    connection: psycopg.Connection[Any]
    days: list[date]
    settings: Settings
    report: Path

    def counted(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        """What a query says of `jobs`: the jobs of all tenants, with their day, the code of the action, and tasks."""
        jobs = " UNION ALL ".join(
            f"""SELECT '{schema}' AS tenant, j.marketplace, a.code AS action, j.status::text,
                       j.completed_at::date AS day,
                       (SELECT count(*) FROM {schema}.marketplace_tasks WHERE job_id = j.id) AS tasks
                  FROM {schema}.marketplace_jobs j JOIN public.marketplace_action_types a ON a.id = j.action_type_id"""
            for schema in TENANTS
        )
        return self.connection.execute(f"WITH jobs AS ({jobs}) {query}", values).fetchall()


def insert_jobs(connection: psycopg.Connection[Any], schema: str, days: list[date]) -> None:
    """Jobs around noon of each day, of all marketplaces and results, in other numbers on each day, with some tasks."""
    connection.execute(
        f"""INSERT INTO {schema}.marketplace_jobs (marketplace, action_type_id, status, started_at, completed_at)
            SELECT (ARRAY['vinted', 'ebay', 'etsy'])[1 + n / 3 %% 3], 1 + n %% 9, ({{}}),
                   day + time '12:00' - n * interval '0.7 s', day + time '12:00' + n * interval '1 s'
              FROM generate_series(%s::timestamp, %s::timestamp, '1 day') AS day,
                   generate_series(0, 11 + day::date - %s) AS n""".format(
            # Of an enum type in one of the tenants.
            "CASE WHEN n % 7 = 5 THEN 'failed' WHEN n % 11 = 3 THEN 'cancelled' ELSE 'completed' END".replace("%", "%%")
            + ("::user_1.jobstatus" if schema == "user_1" else "")
        ),
        [days[0], days[-1], days[0]],
    )
    connection.execute(
        f"""INSERT INTO {schema}.marketplace_tasks (job_id, status)
            SELECT id, 'success' FROM {schema}.marketplace_jobs, generate_series(1, id % 3)"""
    )


@pytest.fixture(scope="module")
def shop(server: str, migrated_template: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    """Days of three tenants; the first half computed by the command line, one day held back, the rest never run."""
    database, folder = create_database(server, "browser", migrated_template), tmp_path_factory.mktemp("dagit")
    home = folder / "home"
    home.mkdir()
    (home / "dagster.yaml").write_text("telemetry: {enabled: false}\nnux: {enabled: false}\n")
    # A zone in which no day closes while the tests run; noon in UTC is on the same day in both.
    clocks = (datetime.now(ZoneInfo(zone)) for zone in ("UTC", "Asia/Tokyo"))
    today = next(clock for clock in clocks if clock.hour < 23)
    days = [today.date() - timedelta(number) for number in range(DAYS, 0, -1)]
    environment = {
        "DAGSTER_HOME": str(home),
        "DATABASE_URL": run_url(database),
        "STATS_START_DATE": str(days[0]),
        "STATS_TIMEZONE": str(today.tzinfo),
        "STATS_REPORT_DIR": str(folder),
        "STATS_REPORT_URL": REPORT_URL,
    }
    with ExitStack() as stack:
        connection = stack.enter_context(psycopg.connect(database, autocommit=True))
        connection.execute("SET timezone = 'UTC'")
        for schema in TENANTS:
            insert_jobs(connection, schema, days)
        run(*MATERIALIZE, "--partition-range", f"{days[0]}...{days[1]}", environment=environment)
        run(*MATERIALIZE, "--partition-range", f"{days[2]}...{days[HELD_BACK]}", environment=environment)
        deleted = "DELETE FROM user_2.marketplace_jobs WHERE status = 'failed' AND completed_at::date = %s"
        assert connection.execute(deleted, [days[HELD_BACK]]).rowcount == 2
        connection.execute("DELETE FROM user_2.marketplace_job_facts WHERE date = %s", [days[HELD_BACK]])
        run(*MATERIALIZE, "--partition", f"{days[HELD_BACK]}", environment=environment)
        run(*MATERIALIZE[:-1], SUMMARY, "--partition-range", f"{days[0]}...{days[1]}", environment=environment)
        run(*MATERIALIZE[:-1], REPORT, environment=environment)
        url = stack.enter_context(running_dagit(environment, folder))
        instance = stack.enter_context(dg.DagsterInstance.from_config(str(home)))
        yield Shop(url, instance, connection, days, Settings.from_env(environment), folder / f"{REPORT}.html")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        # Debian's browser may not make its sandbox as root, and has nothing to fetch for itself.
        arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield browser
        browser.close()


@pytest.fixture
def watched(shop: Shop, browser: Browser) -> Iterator[Watched]:
    """A fresh page. No test may leave an error in its console, a failed request, or one that leaves this machine."""
    expect.set_options(timeout=TIMEOUT_MS)
    with browser.new_context(base_url=shop.url, viewport={"width": 1400, "height": 900}) as context:
        context.set_default_timeout(TIMEOUT_MS)
        watched = Watched(context)
        yield watched
        assert watched.incidents == []
        expect(watched.page.get_by_role("dialog")).to_have_count(0)
        expect(watched.page.get_by_text(re.compile("unexpected error|something went wrong", re.I))).to_have_count(0)


def metadata(page: Page, name: str) -> Locator:
    """The value of a metadata entry."""
    name_cell = page.get_by_role("cell", name=name, exact=True)
    return page.get_by_role("row").filter(has=name_cell).get_by_role("cell").nth(1)


def rows(value: Locator, *columns: str) -> list[tuple[str, ...]]:
    """These columns of the table in a metadata entry, row by row."""
    expect(value.get_by_role("table")).to_be_visible()
    header, *lines = (
        row.get_by_role("columnheader").or_(row.get_by_role("cell")).all_inner_texts()
        for row in value.get_by_role("table").get_by_role("row").all()
    )
    return [tuple(line[header.index(column)] for column in columns) for line in lines]


def test_the_lineage_runs_from_left_to_right(watched: Watched) -> None:
    """Every asset is on the lineage page, to the right of those that it is made from."""
    page = watched.page
    page.goto("/asset-groups")
    expect(page.get_by_text("Global asset lineage")).to_be_visible()
    watched.screenshot("lineage-groups")
    page.goto("/locations/pipelines.definitions/asset-groups/marketplace_stats/lineage")
    previous_end = 0.0
    for step in LINEAGE:
        # The graph is drawn as SVG; the names stand in the list beside it as well.
        boxes = [page.locator("svg").get_by_text(name, exact=True).bounding_box() for name in step]
        assert all(box and box["x"] > previous_end for box in boxes), (step, boxes, previous_end)
        previous_end = max(box["x"] + box["width"] for box in boxes if box)
    watched.screenshot("lineage")


def test_a_day_of_the_stats_shows_what_the_source_says(watched: Watched, shop: Shop) -> None:
    """The numbers of a day, and the table of the run that computed it, are those of the application's own rows."""
    page, day = watched.page, shop.days[1]
    page.goto(f"/assets/{STATS}")
    expect(page.get_by_text("is recomputed whole from")).to_be_visible()
    watched.screenshot("stats")
    page.goto(f"/assets/{STATS}?view=partitions&partition={day}")
    [numbers] = shop.counted(
        """SELECT count(*) FILTER (WHERE status <> 'cancelled'), count(*) FILTER (WHERE status = 'failed'),
                  count(*) FILTER (WHERE status = 'cancelled'), sum(tasks) FILTER (WHERE status <> 'cancelled'),
                  count(DISTINCT (tenant, marketplace, action))
             FROM jobs WHERE day = %s""",
        day,
    )
    names = ("jobs", "failed_jobs", "cancelled_or_expired_jobs", "tasks", "dagster/row_count")
    for name, number in zip(names, numbers, strict=True):
        expect(metadata(page, name)).to_have_text(str(number))
    expect(metadata(page, "run_tenants_done")).to_have_text(str(len(TENANTS)))
    watched.screenshot("stats-day")
    preview = metadata(page, "run_preview")
    expected = shop.counted(
        """SELECT marketplace, action, count(*)::text, count(*) FILTER (WHERE status = 'failed')::text, sum(tasks)::text
             FROM jobs WHERE day = ANY (%s) AND status <> 'cancelled' GROUP BY 1, 2""",
        shop.days[:2],
    )
    preview.scroll_into_view_if_needed()
    watched.screenshot("stats-preview")
    assert sorted(rows(preview, "marketplace", "action", "jobs", "failed", "tasks")) == sorted(expected)


def test_a_day_of_the_summary_shows_its_table(watched: Watched, shop: Shop) -> None:
    """The table over all customers, by day, marketplace and action, is what the application's own rows add up to."""
    page = watched.page
    page.goto(f"/assets/{SUMMARY}?view=partitions&partition={shop.days[1]}")
    expected = shop.counted(
        """SELECT day::text, marketplace, action, count(DISTINCT tenant)::text,
                  count(*) FILTER (WHERE status <> 'cancelled')::text, count(*) FILTER (WHERE status = 'failed')::text
             FROM jobs WHERE day = ANY (%s) GROUP BY 1, 2, 3""",
        shop.days[:2],
    )
    found = rows(metadata(page, "run_preview"), "date", "marketplace", "action", "tenants", "jobs", "failed")
    watched.screenshot("summary-day")
    assert sorted(found) == sorted(expected)


def test_the_report_shows_its_pictures(watched: Watched, shop: Shop) -> None:
    """In the Dagster UI, one at once, and others a click away and not cut off; and it links to the page."""
    page = watched.page
    page.goto(f"/assets/{REPORT}?view=events")
    expect(page.get_by_text("This week").or_(metadata(page, "what_stands_out")).first).to_be_visible()
    watched.screenshot("report")
    metadata(page, "last_30_days").get_by_text("[Show Markdown]").click()
    dialog = page.get_by_role("dialog")
    picture = dialog.get_by_role("img", name="The last 30 days")
    assert picture.evaluate("image => image.decode().then(() => image.naturalWidth)") > 500
    box, frame = picture.bounding_box(), dialog.bounding_box()
    assert box and frame and box["x"] + box["width"] < frame["x"] + frame["width"]
    watched.screenshot("report-picture")
    dialog.get_by_role("button", name="Close").click()
    expect(dialog).to_have_count(0)

    thumbnail = page.get_by_role("img", name="Success, 30 days")
    expect(thumbnail).to_be_visible()
    expect(page.get_by_role("link", name=f"{REPORT_URL}/{REPORT}.html")).to_be_visible()

    page.goto(f"{shop.report.as_uri()}#day={shop.days[1]}")
    expect(page.get_by_role("heading", name=f"Marketplace jobs up to {shop.days[-1]}")).to_be_visible()
    [(jobs, failed)] = shop.counted(
        """SELECT count(*) FILTER (WHERE status <> 'cancelled'), count(*) FILTER (WHERE status = 'failed')
             FROM jobs WHERE day = %s""",
        shop.days[1],
    )
    expect(page.locator("#day-about")).to_contain_text(f"{jobs} jobs, {failed} failed;")
    watched.screenshot("report-page")


def test_a_red_check_says_what_is_wrong(watched: Watched, shop: Shop) -> None:
    """The check of the held-back day is red, says what that means and what to do, and names the tenant and the day."""
    page = watched.page
    page.goto(f"/assets/{STATS}")
    page.get_by_role("tab", name="Checks").click()
    page.get_by_text("no_day_is_held_back").first.click()
    expect(page.get_by_text("Warns of days that were left as they were")).to_be_visible()
    expect(page.get_by_text("When it is red: nothing is lost.")).to_be_visible()
    expect(page.get_by_text("1 day held back; ")).to_be_visible()
    watched.screenshot("red-check")
    expect(page.get_by_text("Evaluation resultFailed")).to_be_visible()
    columns = ("tenant", "date", "stored jobs", "jobs in the facts")
    [(tenant, day, stored, left)] = rows(metadata(page, "tenants"), *columns)
    assert (tenant, day) == ("user_2", str(shop.days[HELD_BACK]))
    assert int(stored) == int(left) + 2


def test_the_automation_page_says_what_runs_when(watched: Watched, shop: Shop) -> None:
    """Every schedule and sensor is listed, and says what it does."""
    page = watched.page
    definitions = build_defs(shop.settings)
    automations = [*(definitions.schedules or []), *(definitions.sensors or [])]
    assert len(automations) > 5
    for automation in automations:
        assert isinstance(automation, dg.ScheduleDefinition | dg.SensorDefinition) and automation.description
        # Opened anew for each, because the text that is shown covers the next name, and stays for a while.
        page.goto("/automation")
        link = page.get_by_role("link").filter(has=page.get_by_text(automation.name, exact=True))
        link.get_by_role("img", name="info").hover()
        expect(page.get_by_role("tooltip")).to_contain_text(automation.description)
    watched.screenshot("automation")


def test_a_range_to_the_end_is_backfilled_in_one_run(watched: Watched, shop: Shop) -> None:
    """Launched from the asset's page and finished there as success; the rows of every day are there, from one run."""
    page, days = watched.page, shop.days[HELD_BACK:]
    page.goto(f"/assets/{STATS}")
    page.get_by_role("button", name="Materialize…").click()
    dialog = page.get_by_role("dialog")
    expect(dialog.get_by_text("Backfills all partitions in a single run.")).to_be_visible()
    choice = dialog.get_by_role("textbox").first
    choice.fill(f"[{days[0]}...{days[-1]}]")
    choice.press("Enter")
    expect(dialog.get_by_text(f"{len(days)} partitions", exact=True)).to_be_visible()
    watched.screenshot("backfill-dialog")
    dialog.get_by_role("button", name="Launch backfill").click()
    page.get_by_role("button", name="View", exact=True).or_(page.get_by_role("link", name="View", exact=True)).click()
    # The daemon looks every 30 s, once to launch the run and once more to see that it is finished.
    expect(page.get_by_text("100% completed")).to_be_visible(timeout=2 * TIMEOUT_MS)
    expect(page.get_by_text("StatusSucceeded")).to_be_visible(timeout=2 * TIMEOUT_MS)
    watched.screenshot("backfill")

    backfill_id = page.url.rsplit("/", 1)[-1].split("?")[0]
    [run] = shop.instance.get_runs(dg.RunsFilter.for_backfill(backfill_id))
    assert run.status == dg.DagsterRunStatus.SUCCESS
    assert (run.tags[RANGE_START], run.tags[RANGE_END]) == (str(days[0]), str(days[-1]))
    expected = shop.counted(
        "SELECT tenant, day, count(*) FROM jobs WHERE status <> 'cancelled' AND day >= %s GROUP BY 1, 2", days[1]
    )
    assert len(expected) == len(TENANTS) * len(days[1:])
    for schema in TENANTS:
        found = shop.connection.execute(
            f"""SELECT date, sum(total_jobs)::int, run_id FROM {schema}.marketplace_job_stats
                  JOIN {schema}.marketplace_job_stats_days USING (date) WHERE date >= %s GROUP BY date, run_id""",
            [days[1]],
        ).fetchall()
        assert sorted(found) == sorted((day, jobs, run.run_id) for tenant, day, jobs in expected if tenant == schema)


def test_each_page_of_the_menu_opens_quietly(watched: Watched) -> None:
    """It opens without an error, and asks for nothing outside; the fixture looks."""
    page = watched.page
    page.goto("/")
    for name in ("Overview", "Runs", "Catalog", "Jobs", "Automation", "Lineage", "Deployment"):
        link = page.get_by_role("navigation").get_by_role("link").filter(has_text=re.compile(f"^{name}$"))
        link.click()
        page.wait_for_url(f"**{link.get_attribute('href')}**")
        page.wait_for_load_state("networkidle")
        watched.screenshot(f"menu-{name.lower()}")
