"""The charts, as Vega-Lite: the same specifications for the page, which fills them in the browser, and for pictures.

Each takes the datasets `points` (one for each day and marketplace), `failures` (one for each action and marketplace),
`days` (one for each day: what a click chooses, and the text that is shown on hovering), and `marked` (days with a
background: `chosen` or `incomplete`). Colours are variables of the page's style sheet, so that they follow the dark
mode and the printer.
"""

import base64
import json
import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from datetime import date
from typing import Any

import pandas as pd
import vl_convert

from assets.marketplace_report.numbers import daily, failures_by_action
from models import MARKETPLACES

COLORS = dict(zip(MARKETPLACES, ("#007a5a", "#0068a8", "#b84a00"), strict=True))
"""By daylight; the style sheet has them, too, and others for the dark. At least 3:1 against the background."""
SHAPES = ("circle", "square", "triangle-up")
"""So that the marketplaces can be distinguished without colours, too."""

_TICKS_MS = [
    number * size
    for size, numbers in ((1, (1, 10, 100)), (1000, (1, 10)), (60_000, (1, 10)), (3_600_000, (1, 10, 100)))
    for number in numbers
]
_DURATION = " : ".join(
    [f"datum.value >= {size} ? datum.value / {size} + ' {unit}'" for unit, size in (("h", 3_600_000), ("min", 60_000))]
    + ["datum.value >= 1000 ? datum.value / 1000 + ' s' : datum.value + ' ms'"]
)
_X = {
    "field": "date",
    "type": "temporal",
    "timeUnit": "utcyearmonthdate",
    "scale": {"type": "utc"},
    "axis": {"title": None, "format": "%-d %b", "grid": False, "tickCount": 6, "labelOverlap": True},
}
_SIZE = {"expr": "data('days').length > 40 ? 6 : 22"}
_MARKETPLACE = {
    "field": "marketplace",
    "type": "nominal",
    "scale": {"domain": list(MARKETPLACES), "range": [f"var(--{name})" for name in MARKETPLACES]},
    "legend": None,
}
_SHAPE = _MARKETPLACE | {"scale": {"domain": list(MARKETPLACES), "range": list(SHAPES)}}
_CONFIG = {
    "background": "transparent",
    "font": "system-ui, sans-serif",
    "view": {"stroke": None},
    "axis": {
        "labelColor": "currentColor",
        "titleColor": "currentColor",
        "labelFontSize": 12,
        "gridColor": "var(--line)",
        "domainColor": "var(--frame)",
        "tickColor": "var(--frame)",
    },
    # The tables beside them are what a screen reader reads.
    "aria": False,
}


def _y(**others: Any) -> dict[str, Any]:
    return {"type": "quantitative", "axis": {"title": None, **others.pop("axis", {})}, **others}


def _over_days(*marks: Mapping[str, Any]) -> dict[str, Any]:
    """A chart with a place for each day: a background, the marks, and in front what is hovered over and clicked."""
    place = {"x": _X}
    return {
        "layer": [
            {
                "data": {"name": "marked"},
                "mark": "rect",
                "encoding": place
                | {
                    "fill": {
                        "field": "why",
                        "type": "nominal",
                        "scale": {
                            "domain": ["chosen", "incomplete"],
                            "range": ["var(--chosen)", "var(--incomplete)"],
                        },
                        "legend": None,
                    }
                },
            },
            *({"data": {"name": "points"}, **mark, "encoding": {**place, **mark["encoding"]}} for mark in marks),
            {
                "data": {"name": "days"},
                "mark": {"type": "rect", "fill": "transparent", "cursor": "pointer"},
                "encoding": place | {"tooltip": {"field": "text"}},
            },
        ]
    }


def _lines(field: str, y: Mapping[str, Any], dash: Sequence[int] = (1, 0), filled: bool = True) -> list[dict[str, Any]]:
    """A line and points, so that a single day between two without a value is seen."""
    encoding = {"x": _X | {"bandPosition": 0.5}, "y": {"field": field, **y}}
    return [
        {
            "mark": {
                "type": "line",
                "strokeWidth": 1.6,
                "strokeDash": list(dash),
                "invalid": "break-paths-show-domains",
            },
            "encoding": encoding | {"stroke": _MARKETPLACE},
        },
        {
            "mark": {"type": "point", "size": _SIZE, "opacity": 1, "filled": filled, "invalid": "filter"},
            "encoding": encoding | {"color": _MARKETPLACE, "shape": _SHAPE},
        },
    ]


def _times(**styles: str) -> dict[str, Any]:
    """A median and a 95th percentile, on a logarithmic axis, which has no zero: what took none stands at 1 ms."""
    y = _y(scale={"type": "log"}, axis={"values": _TICKS_MS, "labelExpr": _DURATION})
    return _over_days(*_lines(styles["p50"], y), *_lines(styles["p95"], y | {"title": None}, dash=(4, 3), filled=False))


CHARTS: dict[str, dict[str, Any]] = {
    "jobs": _over_days(
        {
            "mark": {"type": "bar", "stroke": "var(--paper)", "strokeWidth": 0.5},
            "encoding": {
                "y": _y(field="total_jobs", axis={"format": "~s", "tickMinStep": 1}),
                "color": _MARKETPLACE,
                "order": {"field": "marketplace_order", "type": "quantitative"},
            },
        }
    ),
    "success": _over_days(
        *_lines("success_rate", _y(scale={"zero": False, "nice": True}, axis={"format": ".0%", "tickCount": 5}))
    ),
    "duration": _times(p50="p50_duration_ms", p95="p95_duration_ms"),
    "wait": _times(p50="p50_wait_ms", p95="p95_wait_ms"),
    "failures": {
        "data": {"name": "failures"},
        "mark": {"type": "bar", "stroke": "var(--paper)", "strokeWidth": 0.5, "cursor": "pointer"},
        "encoding": {
            "y": {
                "field": "action",
                "type": "nominal",
                "sort": {"field": "failure_count", "op": "sum", "order": "descending"},
                "axis": {"title": None, "labelLimit": 140, "ticks": False},
            },
            "x": _y(field="failure_count", axis={"format": "~s", "tickMinStep": 1, "tickCount": 5}),
            "color": _MARKETPLACE,
            "order": {"field": "marketplace_order", "type": "quantitative"},
            "tooltip": {"field": "text"},
        },
    },
}
"""The charts by name."""


def for_browser() -> dict[str, dict[str, Any]]:
    """The charts as wide as their place; their datasets are empty."""
    size = {"width": "container", "height": 200, "autosize": {"type": "fit", "contains": "padding"}}
    return {name: {**size, "config": _CONFIG, **chart} for name, chart in CHARTS.items()}


# Pictures, for the Dagster UI -----------------------------------------------------------------------------------------

_FIXED = {f"var(--{name})": color for name, color in COLORS.items()} | {
    "var(--paper)": "white",
    "var(--line)": "#e1e6ea",
    "var(--frame)": "#7b8794",
    "var(--chosen)": "white",
    "var(--incomplete)": "white",
    "currentColor": "#1f2933",
    "system-ui, sans-serif": "sans-serif",
    '"background": "transparent"': '"background": "white"',
}
_TITLES = {
    "jobs": "Jobs a day",
    "success": "Jobs that succeeded",
    "duration": "Duration: median (solid), 95th percentile (dashed)",
    "failures": "Failed jobs by action",
}
MOST_INLINE = 1_000
"""The Dagster UI shows a Markdown text at once if it has fewer characters, else after a click."""


def picture(frame: pd.DataFrame, days: Sequence[date]) -> str:
    """Four of the charts over these days, from a summary frame, as the address of an SVG that has them inside."""
    parts = [deepcopy(CHARTS[name]) | {"title": title, "width": 400, "height": 170} for name, title in _TITLES.items()]
    for part in parts:
        if "layer" in part:  # Nothing can be chosen or hovered over.
            part["layer"] = part["layer"][1:-1]
    parts[0]["layer"][0]["encoding"]["color"]["legend"] = {"orient": "top", "title": None}
    spec = {
        "$schema": "https://vega.github.io/schema/vega-lite/v6.json",
        "datasets": datasets(frame, days),
        "concat": parts,
        "columns": 2,
        "config": _CONFIG,
    }
    text = json.dumps(spec)
    for variable, fixed in _FIXED.items():
        text = text.replace(variable, fixed)
    # Dagster keeps it with each run: a tenth of a pixel is enough, and so are the marks without their roles.
    svg = re.sub("<[^>]*>", _shortened, vl_convert.vegalite_to_svg(text))
    return f"data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}"


def _shortened(tag: re.Match[str]) -> str:
    return re.sub(r"(\d\.\d)\d+", r"\1", re.sub(r' (role|aria-[a-z]+)="[^"]*"', "", tag[0]))


def datasets(frame: pd.DataFrame, days: Sequence[date]) -> dict[str, list[dict[str, Any]]]:
    """What the charts show of these days, from a summary frame."""
    names = ("total_jobs", "success_rate")
    times = ("p50_duration_ms", "p95_duration_ms", "p50_wait_ms", "p95_wait_ms")
    return {
        "points": [
            {
                "date": str(row["date"]),
                "marketplace": row["marketplace"],
                "marketplace_order": MARKETPLACES.index(row["marketplace"]),
                **{name: row[name] for name in names},
                **{name: None if row[name] is None else max(row[name], 1) for name in times},
            }
            for row in daily(frame, days).to_dict("records")
        ],
        "failures": [
            {
                "action": action,
                "marketplace": marketplace,
                "marketplace_order": MARKETPLACES.index(marketplace),
                "failure_count": int(row[marketplace]),
            }
            for action, row in failures_by_action(frame, days).iterrows()
            for marketplace in MARKETPLACES
        ],
        "days": [{"date": str(day), "text": str(day)} for day in days],
        "marked": [],
    }


def thumbnail(frame: pd.DataFrame, days: Sequence[date]) -> str:
    """The success rates of these days as a Markdown text with a small picture, short enough to be shown at once."""
    rows = daily(frame, days)
    rates = {name: list(rows.loc[rows["marketplace"] == name, "success_rate"]) for name in MARKETPLACES}
    lowest = min([rate for of_one in rates.values() for rate in of_one if rate is not None], default=0.0)
    bottom = min(lowest, 0.95)
    paths = ""
    for name, of_one in rates.items():
        path, previous = "", None
        for at, rate in enumerate(of_one):
            height = None if rate is None else round(24 * (1 - rate) / (1 - bottom))
            if height is not None:
                # A line from the day before, and where there is none, a point.
                path += f"l3 {height - previous}" if previous is not None else f"M{3 * at} {height}h0"
            previous = height
        paths += f"<path stroke='{COLORS[name]}' d='{path}'/>"
    width = 3 * len(days)
    size = f"viewBox='-1 -1 {width} 26' width='{4 * width}' stroke-width='.5'"
    svg = f"<svg xmlns='http://www.w3.org/2000/svg' {size} fill='none'>{paths}</svg>"
    key = ", ".join(f"{name} {color}" for name, color in zip(MARKETPLACES, ("green", "blue", "orange"), strict=True))
    text, name = f"{key}; lowest {lowest:.1%}", f"Success, {len(days)} days"
    shown = f"{text}\n\n![{name}](data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()})"
    return shown if len(shown) < MOST_INLINE else text
