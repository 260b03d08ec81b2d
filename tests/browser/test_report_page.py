"""The report's page as people use it, in a real browser: it is opened from the disk, and asks for nothing outside."""

import csv
import re
import shutil
from collections.abc import Callable, Iterator
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import pytest
from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright

from assets.marketplace_daily_summary.table import COLUMNS
from assets.marketplace_report import page as report
from assets.marketplace_report.read import Material
from assets.sketch import MEASURES, VERSION
from tests.browser.harness import Watched

CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: no `chromium` is on the PATH"),
    pytest.mark.browser,
]

LAST = date(2026, 3, 10)
BAD = LAST - timedelta(3)
"""On this day a fifth of the jobs of eBay's `publish` failed, most of them user_7's."""
INCOMPLETE = LAST - timedelta(9)
FORMULA = '=HYPERLINK("http://evil.test")<img src=x onerror=alert(1)>'


def summary_row(ago: int, marketplace: str, action: str, jobs: int, failed: int, reason: str) -> dict[str, Any]:
    sketch = ([300, 400], [jobs - 1, 1], VERSION, jobs, 9)
    sketches = {
        name: value for one in MEASURES for name, value in zip((*one.sketch, one.count, one.sum), sketch, strict=True)
    }
    return {
        **dict.fromkeys(COLUMNS, 0),
        "date": LAST - timedelta(ago),
        "marketplace": marketplace,
        "action_code": action,
        "total_jobs": jobs,
        "failure_count": failed,
        "success_count": jobs - failed,
        "top_failing": [],
        "top_reasons": [{"reason": reason, "jobs": failed, "tenants": 2}] if failed else [],
        **sketches,
    }


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A page of forty days, one of them bad and one incomplete."""
    rows = [
        summary_row(ago, marketplace, action, 100 + ago, 20 if is_bad else 1, FORMULA if is_bad else "HTTP 429")
        for ago in range(40)
        for marketplace, action in (("vinted", "publish"), ("vinted", "sync"), ("ebay", "publish"), ("etsy", "sync"))
        for is_bad in [(marketplace, LAST - timedelta(ago)) == ("ebay", BAD)]
    ]
    of_day = {"date": BAD, "action_code": "publish"}
    material = Material(
        pd.DataFrame(rows, columns=list(COLUMNS), dtype=object),
        customers=[
            of_day
            | {"tenant": tenant, "marketplace": marketplace, "total_jobs": 30, "failure_count": failed}
            | {"reason": FORMULA, "reason_jobs": failed}
            for tenant, marketplace, failed in (("user_2", "ebay", 4), ("user_7", "ebay", 16), ("user_7", "vinted", 1))
        ],
        changes=[
            of_day
            | {"marketplace": "ebay", "cause": "jobs", "run_id": "run", "tenant": "user_7", "tenants": 3}
            | {"changed_at": datetime(2026, 3, 9, 1, 30, tzinfo=UTC), "total_jobs_before": 100, "total_jobs_after": 103}
            | {"failure_count_before": 21, "failure_count_after": 20, "late_count": 3, "corrected_count": 1}
            | dict.fromkeys(("moved_in_count", "moved_out_count", "forgotten_count"), 0)
        ],
        records={
            LAST - timedelta(ago): {
                "tenants_expected": 5,
                "tenants_computed": 5 - is_gap,
                "tenants_held_back": 0,
                "tenants_open": 0,
                "tenants_counter_only": 0,
                "tenants_missing": int(is_gap),
                "missing_tenants": ["user_10"] * is_gap,
            }
            for ago in range(40)
            for is_gap in [LAST - timedelta(ago) == INCOMPLETE]
        },
    )
    path = tmp_path_factory.mktemp("report") / "page.html"
    report.write(path, report.render(material, LAST, time_zone="UTC", database="shop", made_at=datetime.now(UTC)))
    return path.as_uri()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield browser
        browser.close()


Open = Callable[..., Watched]
ColorScheme = Literal["light", "dark"]


@pytest.fixture
def opened(browser: Browser, address: str) -> Iterator[Open]:
    """Opens the page as it is chosen; no test may leave an error or a warning, or ask for the network."""
    found: list[Watched] = []

    def open_page(choice: str = "", width: int = 1280, colors: ColorScheme = "light") -> Watched:
        context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=colors)
        context.set_default_timeout(20_000)
        watched = Watched(context)
        watched.page.on("console", lambda message: watched.incidents.append(message.text))
        watched.page.goto(address + choice)
        drawn(watched.page)
        found.append(watched)
        return watched

    yield open_page
    for watched in found:
        assert watched.incidents == []
        watched.page.context.close()


def drawn(page: Page) -> None:
    expect(page.locator("#charts")).to_have_attribute("aria-busy", "false")


def lines(table: Locator) -> list[list[str]]:
    """The body of a table, row by row."""
    return [row.locator("th, td").all_inner_texts() for row in table.locator("tbody tr").all()]


def test_what_is_chosen_is_what_is_shown_and_what_is_shared(opened: Open) -> None:
    """The choice changes every number, stands in the address, and comes back from there."""
    watched = opened()
    page = watched.page
    jobs = sum(100 + ago for ago in range(28))
    assert lines(page.locator("#period-table"))[0][:2] == ["jobs", f"{4 * jobs:,}"]
    page.get_by_role("combobox", name="Marketplace").select_option("ebay")
    drawn(page)
    assert lines(page.locator("#period-table"))[0][:2] == ["jobs", f"{jobs:,}"]
    page.get_by_role("combobox", name="Period").select_option("7")
    drawn(page)
    # Seven days against seven; the incomplete one is left out, with its counterpart.
    shown = [ago for ago in range(7) if ago != 2]
    before = [ago + 7 for ago in shown]
    [jobs_row, failed_row, *_] = lines(page.locator("#period-table"))
    assert jobs_row[1:3] == [f"{sum(100 + ago for ago in of):,}" for of in (shown, before)]
    assert failed_row[1:3] == ["25", "6"]
    assert (
        f"Left out as incomplete, with the days that they would be compared with: {INCOMPLETE}, {LAST - timedelta(2)}."
        in (page.locator("#period-about").inner_text())
    )
    assert page.url.endswith("#marketplace=ebay&days=7")
    expect(page.locator("#legend li:visible")).to_have_count(1)
    page.go_back()
    drawn(page)
    expect(page.get_by_role("combobox", name="Period")).to_have_value("28")
    again = opened("#marketplace=ebay&days=7").page
    assert lines(again.locator("#period-table"))[0] == jobs_row
    other = opened("#marketplace=depop&day=1999-01-01").page
    expect(other.get_by_role("status")).to_have_text(
        "Not on this page, so left out: marketplace depop, day 1999-01-01."
    )


def test_a_bad_day_is_found_hovered_over_and_looked_into(opened: Open) -> None:
    """From the chart, or from the list of bad days, to its actions, reasons, customers and changes."""
    watched = opened("#days=7")
    page = watched.page
    assert lines(page.locator("#bad-days")) == [[str(BAD), "ebay", "103", "20", "80.6 %", "99.1 %"]]
    chart = page.locator("#chart-success svg")
    chart.scroll_into_view_if_needed()
    box = chart.bounding_box()
    assert box
    # The fourth of seven days, right of the labels of the axis.
    left = page.locator("#chart-success .background").first.bounding_box()
    assert left
    # Its points stand in the middle of what is marked as its day.
    points = [one.bounding_box() for one in page.locator('#chart-success path[fill="var(--ebay)"]').all()]
    middles = sorted(point["x"] + point["width"] / 2 for point in points if point)
    assert middles[3] == pytest.approx(left["x"] + left["width"] * 3.5 / 7, abs=2)
    page.mouse.move(left["x"] + left["width"] * 3.5 / 7, box["y"] + 60)
    tooltip = page.locator("#vg-tooltip-element")
    expect(tooltip).to_contain_text(f"{BAD}, Saturday")
    expect(tooltip).to_contain_text("ebay: 80.6 %")
    expect(tooltip).to_contain_text("ebay failed: 20 of 103")
    watched.screenshot("report-hover")
    page.mouse.click(left["x"] + left["width"] * 3.5 / 7, box["y"] + 60)
    expect(page.locator("#day-title")).to_have_text(f"Saturday, {BAD}: all marketplaces, all actions")
    expect(page.locator("#day-title")).to_be_focused()
    assert page.url.endswith(f"#days=7&day={BAD}")
    drawn(page)
    assert lines(page.locator("#day-actions"))[0][:5] == ["ebay", "publish", "103", "20", "80.6 %"]
    assert lines(page.locator("#day-reasons"))[0] == [FORMULA, "ebay", "publish", "20", "2"]
    assert lines(page.locator("#day-customers")) == [
        ["user_7", "60", "17", "71.7 %", "ebay publish: 16", FORMULA, "16"],
        ["user_2", "30", "4", "86.7 %", "ebay publish: 4", FORMULA, "4"],
    ]
    [change] = lines(page.locator("#day-changes"))
    assert change[:5] == ["ebay", "publish", "jobs", "2026-03-09 01:30", "user_7 and 2 more"]
    assert change[5:] == ["100", "103", "21", "20", "3", "1", "0", "0", "0", "run"]
    expect(page.locator("#day-about")).to_contain_text("5 of 5 tenants computed.")
    watched.screenshot("report-day")
    page.get_by_role("combobox", name="Marketplace").select_option("vinted")
    drawn(page)
    assert lines(page.locator("#day-customers")) == [["user_7", "30", "1", "96.7 %", "vinted publish: 1", FORMULA, "1"]]
    page.get_by_role("link", name="the day after").click()
    drawn(page)
    expect(page.locator("#day-title")).to_have_text(f"Sunday, {BAD + timedelta(1)}: vinted, all actions")
    page.get_by_role("link", name="Close the day").click()
    expect(page.locator("#day")).to_be_hidden()
    drawn(page)


def test_it_can_be_used_by_the_keyboard_and_read_aloud(opened: Open) -> None:
    """Every table has a caption and headers with a scope, every chart its numbers as a table, from which a day is
    chosen without a mouse."""
    page = opened("#days=7").page
    for details in page.locator("details").all():
        details.locator("summary").focus()
        page.keyboard.press("Enter")
    charts = page.locator("figure")
    assert charts.count() == 5
    for chart in charts.all():
        expect(chart.locator("[role=img]")).to_have_attribute("aria-label", re.compile("^Chart: .* in the table below"))
        expect(chart.locator("table caption")).to_have_count(1)
    assert page.locator("table").count() == page.locator("table > caption").count() >= 9
    expect(page.locator("th:not([scope])")).to_have_count(0)
    expect(page.locator("tbody tr:not(:has(th[scope=row]))")).to_have_count(0)
    assert lines(page.locator("#numbers-success"))[3] == [str(BAD), "99.0 %", "80.6 %", "99.0 %"]
    page.locator("#numbers-success").get_by_role("link", name=str(BAD)).focus()
    page.keyboard.press("Enter")
    expect(page.locator("#day-title")).to_be_focused()
    drawn(page)


def test_what_is_shown_is_saved_as_csv(opened: Open, tmp_path: Path) -> None:
    """With plain numbers, and no text that a spreadsheet would take for a formula."""
    page = opened(f"#marketplace=ebay&days=7&day={BAD}").page

    def saved(button: str) -> list[list[str]]:
        with page.expect_download() as download:
            page.get_by_role("button", name=button).click()
        assert download.value.suggested_filename.endswith(".csv")
        download.value.save_as(tmp_path / "saved.csv")
        with (tmp_path / "saved.csv").open(newline="", encoding="utf-8-sig") as stream:
            return list(csv.reader(stream))

    assert saved(f"Save as CSV: Why jobs failed on {BAD}") == [
        ["reason", "marketplace", "action", "jobs", "customers"],
        ["'" + FORMULA, "ebay", "publish", "20", "2"],
    ]
    page.locator("#numbers-success summary").click()
    header, *rows = saved("Save as CSV: Jobs that succeeded, ebay, all actions")
    assert header == ["day", "ebay"]
    assert [row[0] for row in rows] == [str(LAST - timedelta(ago)) for ago in range(7)]
    assert float(rows[3][1]) == pytest.approx(1 - 20 / 103, abs=0.00001)


@pytest.mark.parametrize("colors", ["light", "dark"])
def test_it_fits_a_phone_in_the_dark_and_on_paper(opened: Open, colors: ColorScheme) -> None:
    """No page is wider than the screen; colours follow the scheme, and are those of the day when it is printed."""
    watched = opened(f"#days=7&day={BAD}", width=360, colors=colors)
    page = watched.page
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    for chart in page.locator(".chart svg").all():
        box = chart.bounding_box()
        assert box and box["x"] >= 0 and box["x"] + box["width"] <= 360
    background = "getComputedStyle(document.body).backgroundColor"
    light, dark = "rgb(255, 255, 255)", "rgb(20, 24, 29)"
    assert page.evaluate(background) == {"light": light, "dark": dark}[colors]
    fill = "getComputedStyle(document.querySelector('#chart-jobs [fill=\"var(--vinted)\"]')).fill"
    assert page.evaluate(fill) == {"light": "rgb(0, 122, 90)", "dark": "rgb(44, 194, 149)"}[colors]
    watched.screenshot(f"report-phone-{colors}")
    page.emulate_media(media="print")
    assert page.evaluate(background) == light
    assert page.evaluate(fill) == "rgb(0, 122, 90)"
    expect(page.get_by_role("button").first).to_be_hidden()
