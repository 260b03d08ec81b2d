"""What the report says and draws, from rows of the summary alone."""

import base64
import json
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, date, datetime, timedelta
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from assets.marketplace_daily_summary.table import COLUMNS
from assets.marketplace_report import charts, numbers, page
from assets.marketplace_report.numbers import ALL
from assets.marketplace_report.read import Material
from assets.reporting import code_span
from assets.sketch import DURATION, GAMMA, VERSION, WAIT

LAST = date(2026, 3, 10)


def row(
    ago: int, jobs: int, failed: int = 0, sketch_keys: Mapping[int, int] | None = None, **others: Any
) -> dict[str, Any]:
    """A row of the summary, so many days before the last one."""
    durations = dict(sorted((sketch_keys or {}).items()))
    return {
        **dict.fromkeys(COLUMNS, 0),
        "date": LAST - timedelta(ago),
        "marketplace": "vinted",
        "action_code": "publish",
        "total_jobs": jobs,
        "failure_count": failed,
        "success_count": jobs - failed,
        **dict.fromkeys((*DURATION.sketch, *WAIT.sketch)),
        DURATION.keys: list(durations) or None,
        DURATION.counts: list(durations.values()) or None,
        DURATION.version: VERSION if durations else None,
        "top_failing": [],
        "top_reasons": [],
        **others,
    }


def frame(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=list(COLUMNS), dtype=object)


def record(expected: int = 3, **others: Any) -> dict[str, Any]:
    """A day of the summary for which every tenant is computed, unless said otherwise."""
    nobody = {
        "tenants_held_back": 0,
        "tenants_open": 0,
        "tenants_counter_only": 0,
        "tenants_missing": 0,
        "missing_tenants": [],
    }
    return {"tenants_expected": expected, "tenants_computed": expected, **nobody, **others}


RECORDS = {LAST - timedelta(ago): record() for ago in range(90)}


def missing(*tenants: str) -> dict[str, Any]:
    """A day of three tenants that lacks some."""
    count = len(tenants)
    return record(tenants_computed=3 - count, tenants_missing=count, missing_tenants=list(tenants))


def said(*rows: Mapping[str, Any]) -> list[str]:
    return numbers.remarks(frame(rows), LAST, RECORDS)


def weeks(now: tuple[Any, ...], before: tuple[Any, ...], **others: Any) -> list[dict[str, Any]]:
    """The same row on each day of either week: jobs, failed jobs, buckets."""
    return [row(ago, *(now if ago < 7 else before), **others) for ago in range(14)]


@pytest.mark.parametrize(
    ("now", "before", "expected"),
    [
        ((100, 2), (100, 2), None),
        ((100, 3), (100, 2), None),  # A point, but it may be chance.
        ((100_000, 2500), (100_000, 2000), None),  # No chance, but half a point.
        (
            (1000, 60),
            (900, 18),
            "vinted, publish: 94.0% of the jobs succeeded (420 of 7,000 failed), 98.0% the week before (126 of 6,300).",
        ),
        (
            (1000, 20),
            (1000, 60),
            "vinted, publish: 98.0% of the jobs succeeded (140 of 7,000 failed), 94.0% the week before (420 of 7,000).",
        ),
        ((130, 0), (100, 0), "vinted: 910 jobs, 700 the week before (+30%)."),
        ((120, 0), (100, 0), None),  # No chance, but less than a quarter.
        ((5, 0), (3, 0), None),  # Chance.
        ((60, 0), (100, 0), "vinted: 420 jobs, 700 the week before (-40%)."),
        ((0, 0), (100, 0), "vinted: 0 jobs, 700 the week before (-100%)."),
        (
            (100, 0, {200: 90, 400: 10}),
            (100, 0, {200: 90, 300: 10}),
            "vinted, publish: one job in twenty took longer than 3.0 s, 399 ms the week before (+639%).",
        ),
        ((5, 0, {200: 4, 400: 1}), (5, 0, {200: 4, 300: 1}), None),  # Too few jobs to know.
    ],
)
def test_what_stands_out_is_said_with_its_numbers(now: Any, before: Any, expected: str | None) -> None:
    """A change is named if it is neither chance nor small; else that nothing stands out is said."""
    sentences = said(*weeks(now, before))
    if expected is None:
        assert sentences == ["Nothing stands out: what has changed is small, or may be chance."]
    else:
        assert expected in sentences


def test_chance_alone_is_seldom_named() -> None:
    """In two hundred pairs of weeks that differ by chance only, hardly a thing is said to stand out."""
    chance = random.Random(1)

    def rows() -> Iterator[dict[str, Any]]:
        for ago in range(14):
            outcomes = [chance.random() < 0.05 for _ in range(60)]
            keys = [chance.randrange(200, 500) for _ in outcomes]
            yield row(ago, len(outcomes), sum(outcomes), {key: keys.count(key) for key in set(keys)})

    quiet = sum(said(*rows())[0].startswith("Nothing stands out") for _ in range(200))
    assert quiet >= 195


def test_bad_news_first_and_the_larger_first() -> None:
    """Failures come before what became better, and ten sentences are enough."""
    rows = [
        *weeks((1000, 20), (1000, 60), marketplace="etsy"),
        *weeks((1000, 60), (1000, 20), marketplace="ebay"),
    ]
    sentences = said(*rows)
    assert [sentence.split(",")[0].split(":")[0] for sentence in sentences] == ["ebay", "ebay", "etsy", "etsy"]
    many = [one for n in range(20) for one in weeks((1000, 60), (1000, 20), action_code=f"action_{n:02}")]
    sentences = said(*many)
    assert (len(sentences), sentences[-1]) == (11, "And 11 more: see the table.")


def test_missing_days_are_named() -> None:
    """A night that was not run must not look like a fall; without a week before there is nothing to compare with."""
    full = weeks((100, 1), (100, 1))
    assert said(*full[:2], *full[3:])[0] == f"No job ended on {LAST - timedelta(2)}."
    assert said(*full[:1], *full[3:])[0] == f"No job ended on {LAST - timedelta(2)} and {LAST - timedelta(1)}."
    assert said(*full[:7]) == ["There are no jobs in the week before to compare with."]
    assert said() == ["No job ended in the last seven days.", "There are no jobs in the week before to compare with."]


def test_incomplete_days_are_left_out_of_the_comparison() -> None:
    """With their weekday in the other week: what a missing tenant would have run is no fall. The page names them."""
    rows = [
        *(row(ago, 100 if ago != 2 else 40, 1) for ago in range(14)),
        *(row(ago, 10, action_code="sync") for ago in (2, 9)),
    ]
    day = LAST - timedelta(2)
    records = RECORDS | {day: missing("user_7")}
    compared = numbers.compared_days(LAST, records)
    assert compared.incomplete == [day]
    assert compared.now == [LAST - timedelta(ago) for ago in (6, 5, 4, 3, 1, 0)]
    assert compared.before == [LAST - timedelta(7 + ago) for ago in (6, 5, 4, 3, 1, 0)]
    weeks = numbers.compare_weeks(frame(rows), compared)
    assert [(one.now["total_jobs"], one.before["total_jobs"]) for one in weeks[:2]] == [(600, 600), (600, 600)]
    sentences = numbers.remarks(frame(rows), LAST, records)
    assert sentences == [
        "Only Wed, Thu, Fri, Sat, Mon, Tue are compared: the other days are not complete in both weeks."
    ]
    html = render(Material(frame(rows), records=records))
    assert f"<li>{day}: 2 of 3 tenants computed; 1 missing: user_7.</li>" in html
    assert 'id="incomplete"' not in render(Material(frame(rows), records=RECORDS))


def test_a_day_that_is_not_summarized_is_not_one_without_jobs() -> None:
    """Nor is one that was computed for nobody: neither is compared, and nothing is said to have fallen."""
    full = weeks((100, 1), (100, 1))
    records = {day: one for day, one in RECORDS.items() if day != LAST} | {LAST - timedelta(1): record(0)}
    sentences = numbers.remarks(frame(full[2:]), LAST, records)
    assert sentences == ["Only Wed, Thu, Fri, Sat, Sun are compared: the other days are not complete in both weeks."]
    assert numbers.incomplete_days(LAST, 90, records) == [
        f"{LAST}: not summarized yet.",
        f"{LAST - timedelta(1)}: no tenant computed.",
    ]
    nothing = numbers.remarks(frame([]), LAST, {})
    assert nothing == ["No day of this week can be compared with its weekday in the week before."]


def test_numbers_of_the_old_counter_are_not_compared() -> None:
    """They count a job twice now and then. What is held back was judged, so it is compared, and named."""
    records = RECORDS | {LAST: record(tenants_computed=2, tenants_counter_only=1)}
    records |= {LAST - timedelta(1): record(tenants_computed=2, tenants_held_back=1)}
    assert numbers.compared_days(LAST, records).incomplete == [LAST]
    assert numbers.incomplete_days(LAST, 90, records) == [
        f"{LAST}: 2 of 3 tenants computed; 1 from the old counter only.",
        f"{LAST - timedelta(1)}: 2 of 3 tenants computed; 1 held back.",
    ]


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("publish", "`publish`"),
        ("![x](http://example.com/a.png)", "`![x](http://example.com/a.png)`"),
        ("a`b``c", "```a`b``c```"),
        ("`a", "`` `a ``"),
        ("<img src=x>\n# h\x1b", "`<img src=x>\N{REPLACEMENT CHARACTER}# h\N{REPLACEMENT CHARACTER}`"),
    ],
)
def test_codes_are_text_in_markdown(code: str, expected: str) -> None:
    """Whatever they look like, nothing is loaded, linked or set in another form."""
    rows = weeks((1000, 60), (1000, 20), action_code=code)
    sentences = numbers.remarks(frame(rows), LAST, RECORDS, write=code_span)
    assert [one for one in sentences if one.startswith(f"vinted, {expected}: 94.0% of the jobs succeeded")]


@pytest.mark.parametrize(
    ("ms", "text"), [(0, "0 ms"), (850.4, "850 ms"), (12_400, "12.4 s"), (210_000, "3.5 min"), (7_200_000, "2.0 h")]
)
def test_durations_are_readable(ms: float, text: str) -> None:
    """In the unit that a person would use."""
    assert numbers.duration(ms) == text


BUSY = [
    row(
        ago,
        jobs,
        jobs // 20,
        {300: jobs, 400: 1},
        marketplace=marketplace,
        action_code=f"action_{number:02}_of_many_letters",
    )
    for ago in range(90)
    for marketplace in ("vinted", "ebay", "etsy")
    for number in range(14)
    for jobs in [100_000 * (number + 1) + ago]
]


@pytest.mark.parametrize(
    "rows",
    [[], [row(0, 1, 1)], [row(0, 1, 0, {-1: 1})], [row(0, 0, cancelled_count=3)], [row(60, 7, 1, {250: 7})], BUSY],
    ids=["empty", "one failure", "no duration", "only cancelled", "long ago", "a thousand tenants"],
)
def test_odd_data_make_a_page_too(rows: list[dict[str, Any]]) -> None:
    """Pages without jobs, with one, and with very many are made without a warning, and ask for nothing from outside."""
    html = render(Material(frame(rows), records=RECORDS))
    assert "shop &lt;on&gt; host" in html
    assert not re.findall(r"<link|<img|src=|@import|url\(", html.split('<script type="module">')[0])
    assert len(html) < 3_000_000
    days = numbers.last_days(LAST, 30)
    assert charts.picture(frame(rows), days).startswith("data:image/svg+xml;base64,")
    assert len(charts.thumbnail(frame(rows), days)) < charts.MOST_INLINE


def render(material: Material) -> str:
    return page.render(material, LAST, time_zone="UTC", database="shop <on> host", made_at=datetime.now(UTC))


def test_texts_of_others_stay_texts() -> None:
    """Neither an action's code nor a reason, which are free texts, can end the element that it is in."""
    evil = "</script><script>alert(1)</script><!--"
    reasons = [{"reason": evil, "jobs": 1, "tenants": 1}]
    rows = [row(ago, 99, 9 * (ago < 7), action_code=evil, top_reasons=reasons) for ago in range(14)]
    html = render(Material(frame(rows), records=RECORDS))
    assert html.count("<script") == html.count("</script>") == 3
    assert "alert(1)</script>" not in html
    assert "&lt;script&gt;alert(1)" in html  # In a sentence of what stands out.
    embedded = json.loads(html.split('<script type="application/json" id="data">')[1].split("</script>")[0])
    assert embedded["actions"] == [evil] and evil in embedded["texts"]


def test_the_numbers_of_each_cell_are_the_totals_of_its_rows() -> None:
    """For each marketplace and action, and for all, by day and by groups of days, whatever the sketches look like."""
    chance = random.Random(2)
    codes = ["delete", "publish", "sync"]
    days = numbers.last_days(LAST, 12)
    rows = frame(
        [
            row(
                ago,
                chance.randrange(40),
                0,
                {chance.randrange(-1, 40): chance.randrange(1, 9) for _ in range(chance.randrange(5))},
                marketplace=marketplace,
                action_code=code,
                wait_count=3,
                wait_sum_ms=chance.randrange(999),
                duration_count=chance.randrange(3),
                duration_sum_ms=chance.randrange(999),
            )
            for ago, marketplace, code in product(range(14), ("vinted", "ebay"), codes)
            if chance.random() < 0.7
        ]
    )
    found = dict(numbers.cells(rows, days, codes))
    assert found.keys() == set(product((ALL, 0, 1), (ALL, 0, 1, 2)))
    halves = np.repeat([[1, 0], [0, 1]], 6, axis=1)
    for (marketplace, action), cell in found.items():
        of_cell = rows[
            rows["marketplace"].isin([("vinted", "ebay")[marketplace]] if marketplace != ALL else ["vinted", "ebay"])
            & rows["action_code"].isin([codes[action]] if action != ALL else codes)
        ]
        assert cell.numbers() == [numbers.totals(numbers.of_days(of_cell, [day])) for day in days]
        assert cell.numbers(halves) == [numbers.totals(numbers.of_days(of_cell, half)) for half in (days[:6], days[6:])]


def test_periods_are_compared_only_where_both_are_whole() -> None:
    """A period needs data as far back as the one before goes, and an incomplete day goes with its counterparts."""
    first = LAST - timedelta(40)
    assert [(one.days, bool(one.before)) for one in numbers.periods(first, LAST)] == [(7, True), (28, False)]
    assert [(one.days, bool(one.before)) for one in numbers.periods(LAST, LAST)] == [(7, False)]
    [week, _] = numbers.periods(first, LAST, [LAST - timedelta(8)])
    assert week.left_out == [LAST - timedelta(8), LAST - timedelta(1)]
    assert (len(week.now), len(week.before)) == (6, 6)
    assert not {*week.now, *week.before}.intersection(week.left_out)


@pytest.mark.parametrize(
    ("jobs", "failed", "is_bad"), [(100, 20, True), (100, 5, False), (20, 10, False), (40, 4, False), (900, 60, True)]
)
def test_a_bad_day_is_one_that_chance_would_hardly_make(jobs: int, failed: int, is_bad: bool) -> None:
    """Against the 28 days before, with 1 % of failures; a few jobs, a few failures or a few points are not enough."""
    rows = [row(0, jobs, failed), *(row(ago, 100, 1) for ago in range(1, 40))]
    material = Material(frame(rows), records=RECORDS)
    found = page.data(material, LAST, "UTC")
    assert [(one[0], one[1]) for one in found["bad_days"]] == [(len(found["days"]) - 1, 0)] * is_bad
    found = page.data(Material(material.frame, records=RECORDS | {LAST: missing("user_7")}), LAST, "UTC")
    assert (found["bad_days"], found["incomplete"]) == ([], [len(found["days"]) - 1])
    assert found["completeness"][-1] == "2 of 3 tenants computed; 1 missing: user_7"


def test_what_a_year_of_ten_thousand_tenants_says_fits_on_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reasons and customers of the oldest days give way, and the page says from when on they are there."""
    reasons = [{"reason": f"a long reason, number {n}", "jobs": 9, "tenants": 9} for n in range(5)]
    rows = [row(ago, 9, 9, action_code=f"a{n}", top_reasons=reasons) for ago in range(60) for n in range(9)]
    monkeypatch.setattr(page, "MOST_CHARACTERS", len(page._library()) + 110_000)
    html = render(Material(frame(rows), records=RECORDS))
    assert 90_000 < len(html.split('id="data">')[1].split("</script>")[0]) < 111_000
    found = page.data(Material(frame(rows), records=RECORDS), LAST, "UTC")
    assert 30 < found["details_from"] < 89
    assert found["reasons"].keys() == set(range(found["details_from"], 90))


def luminance(color: str) -> float:
    """The relative luminance of WCAG 2."""
    parts = [int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_the_colours_have_contrast() -> None:
    """4.5:1 for text and 3:1 for marks, by day and in the dark, on each background that they are on."""
    style = (Path(page.__file__).parent / "page.css").read_text()
    themes = [dict(re.findall(r"--(\w+): (#\w{6});", part)) for part in style.split("@media screen")]
    assert len(themes) == 2 and themes[0].keys() == themes[1].keys()

    def contrast(theme: dict[str, str], one: str, other: str) -> float:
        dark, light = sorted((luminance(theme[one]), luminance(theme[other])))
        return (light + 0.05) / (dark + 0.05)

    for theme in themes:
        for text in ("ink", "muted", "link", "bad", "good"):
            assert contrast(theme, text, "paper") >= 4.5, text
        assert contrast(theme, "ink", "notice") >= 4.5
        for mark, background in product(("vinted", "ebay", "etsy", "frame"), ("paper", "chosen", "incomplete")):
            assert contrast(theme, mark, background) >= 3 or mark == "frame" != background, (mark, background)
    assert {name: themes[0][name] for name in charts.COLORS} == charts.COLORS


def test_the_charts_show_the_numbers() -> None:
    """What is drawn for the Dagster UI; a day without jobs is a gap, not a zero, and codes are texts."""
    rows = [
        row(0, 10, 4, {300: 10}),
        row(0, 5, 5, {-1: 5}, action_code="a_very_long_action_code_<1>$", marketplace="ebay"),
        row(2, 20, 1, {200: 20}, action_code="sync"),
        row(45, 7, 7, marketplace="etsy"),
    ]
    found = charts.datasets(frame(rows), numbers.last_days(LAST, 30))
    vinted, ebay, _ = (found["points"][at::3] for at in range(3))
    assert [(point["total_jobs"], point["success_rate"]) for point in vinted[-3:]] == [(20, 0.95), (0, None), (10, 0.6)]
    assert ebay[-1]["p95_duration_ms"] == 1  # A logarithmic axis has no zero.
    assert vinted[-1]["p50_duration_ms"] == pytest.approx(GAMMA**300, rel=0.01)
    assert [(bar["action"], bar["failure_count"]) for bar in found["failures"] if bar["failure_count"]] == [
        ("a_very_long_action_code_<1>$", 5),
        ("publish", 4),
        ("sync", 1),
    ]
    rows.append(row(1, 9, 3, action_code="v1.2345"))
    picture = base64.b64decode(charts.picture(frame(rows), numbers.last_days(LAST, 30)).split(",")[1]).decode()
    assert picture.count("<svg") == 1 and "var(" not in picture and ">v1.2345<" in picture
    thumbnail = charts.thumbnail(frame(rows), numbers.last_days(LAST, 30))
    assert "lowest 0.0%" in thumbnail and "\n\n![Success, 30 days](data:image/svg+xml;base64," in thumbnail
