"""What the report says and draws, from rows of the summary alone."""

import random
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, date, datetime, timedelta
from typing import Any

import pandas as pd
import pytest
from matplotlib.figure import Figure

from assets.marketplace_daily_summary.table import COLUMNS
from assets.marketplace_report import numbers, page
from assets.marketplace_report.pictures import data_uri, draw
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
        **others,
    }


def frame(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=list(COLUMNS), dtype=object)


def record(expected: int = 3, **others: Any) -> dict[str, Any]:
    """A day of the summary for which every tenant is computed, unless said otherwise."""
    nobody = {"tenants_held_back": 0, "tenants_counter_only": 0, "tenants_missing": 0, "missing_tenants": []}
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
    html = page.render(frame(rows), LAST, records, time_zone="UTC", database="shop", made_at=datetime.now(UTC))
    assert f"<li>{day}: 2 of 3 tenants computed; 1 missing: user_7.</li>" in html
    assert 'id="incomplete"' not in page.render(
        frame(rows), LAST, RECORDS, time_zone="UTC", database="shop", made_at=datetime.now(UTC)
    )


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
    """Pages without jobs, with one, and with very many are made without a warning, and need nothing from outside."""
    html = page.render(
        frame(rows), LAST, RECORDS, time_zone="UTC", database="shop <on> host", made_at=datetime.now(UTC)
    )
    assert html.count("<img") == 2
    assert "shop &lt;on&gt; host" in html
    assert "<script" not in html
    assert "http" not in html
    assert html.count('src="data:') == html.count("src=") == 2


def test_codes_that_look_alike_have_bars_of_their_own() -> None:
    """Also if they are too long to be told apart, or look like a formula."""
    codes = ["a_very_long_action_code_1", "a_very_long_action_code_2", "$\\nonsense$", "<b>"]
    rows = [row(0, 9, failed, action_code=code) for failed, code in enumerate(codes, start=1)]
    figure = draw(frame(rows), numbers.last_days(LAST, 30))
    assert [bar.get_y() + bar.get_height() / 2 for bar in figure.axes[3].containers[0]] == [0, 1, 2, 3]
    assert heights(figure, 3)[0] == [4, 3, 2, 1]
    assert data_uri(figure, "png").startswith("data:image/png;base64,")


def heights(figure: Figure, panel: int) -> list[list[float]]:
    """The lengths of the bars of a panel, for each marketplace."""
    bars = figure.axes[panel].containers
    return [[max(bar.get_height(), 0) if panel == 0 else bar.get_width() for bar in container] for container in bars]


def test_the_pictures_show_the_numbers() -> None:
    """Bars and lines have the length and place of what they stand for; a day without jobs is a gap, not a zero."""
    rows = [
        row(0, 10, 4, {300: 10}),
        row(0, 5, 5, action_code="sync", marketplace="ebay"),
        row(29, 9, 2, marketplace="ebay"),
        row(2, 20, 1, {200: 20}, action_code="sync"),
        row(45, 7, 7, marketplace="etsy"),
    ]
    figure = draw(frame(rows), numbers.last_days(LAST, 30))
    vinted, ebay, etsy = heights(figure, 0)
    assert (vinted[-3:], ebay[-3:], sum(etsy)) == ([20, 0, 10], [0, 0, 5], 0)
    assert [bar.get_y() for bar in figure.axes[0].containers[1]][-1] == 10
    success = [list(line.get_ydata())[-3:] for line in figure.axes[1].lines]  # type: ignore[arg-type]
    assert success[0] == pytest.approx([0.95, float("nan"), 0.6], nan_ok=True)
    assert success[1] == pytest.approx([float("nan"), float("nan"), 0], nan_ok=True)
    p50, p95 = (list(line.get_ydata())[-3:] for line in figure.axes[2].lines[:2])  # type: ignore[arg-type]
    expected = [GAMMA**200, float("nan"), GAMMA**300]
    assert p50 == pytest.approx(expected, rel=0.011, nan_ok=True)
    assert p95 == pytest.approx(expected, rel=0.011, nan_ok=True)
    labels = [label.get_text() for label in figure.axes[3].get_yticklabels()]
    assert dict(zip(labels, zip(*heights(figure, 3), strict=True), strict=True)) == {
        "sync": (1, 5, 0),
        "publish": (4, 2, 0),
    }
    starts = [bar.get_x() for bar in figure.axes[3].containers[1]]
    assert dict(zip(labels, starts, strict=True)) == {"sync": 1, "publish": 4}
    low, high = figure.axes[1].get_ylim()
    assert low <= 0 and high >= 1
