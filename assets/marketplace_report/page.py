"""The page: one HTML file with the numbers, the charts and what draws them, which needs no network."""

import base64
import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Callable, Mapping
from datetime import date, datetime
from functools import cache
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import jinja2
import numpy as np
import vl_convert

from assets.marketplace_report import charts
from assets.marketplace_report.numbers import (
    ALL,
    PERIODS,
    action_codes,
    bad_days,
    cells,
    compare,
    incomplete_days,
    last_days,
    of_days,
    periods,
    remarks,
)
from assets.marketplace_report.read import MOST_CHANGES, WORST, Material
from assets.reporting import counted, first_reasons
from models import MARKETPLACES
from pipelines.completeness import describe, is_complete

SHOWN = (
    "total_jobs",
    "failure_count",
    "success_rate",
    "avg_duration_ms",
    "p50_duration_ms",
    "p95_duration_ms",
    "p99_duration_ms",
    "p50_wait_ms",
    "p95_wait_ms",
    "cancelled_count",
    "expired_count",
    "retry_count",
    "total_tasks",
    "task_failure_count",
)
"""Those of the NUMBERS that are there for a period."""

DAILY = (
    "total_jobs",
    "failure_count",
    "success_rate",
    "p50_duration_ms",
    "p95_duration_ms",
    "p50_wait_ms",
    "p95_wait_ms",
    "cancelled_count",
)
"""Those of them that are there for each day."""

MOST_CHARACTERS = 2_800_000
"""How long the page may become, with its library: so long the reasons and customers of older days are put on it."""

_FOLDER = Path(__file__).parent


def render(material: Material, last: date, *, time_zone: str, database: str, made_at: datetime) -> str:
    """The page as HTML, of the days up to `last`."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FOLDER),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    shown = data(material, last, time_zone)
    scripts = [_library(), (_FOLDER / "page.js").read_text()]
    return environment.get_template("page.html.j2").render(
        last=last,
        tenant=material.tenant,
        time_zone=time_zone,
        database=database,
        made_at=f"{made_at.astimezone(ZoneInfo(time_zone)):%Y-%m-%d %H:%M %Z}",
        incomplete=incomplete_days(last, len(shown["days"]), material.records),
        most_notes=MOST_NOTES,
        unread=_unread(material),
        remarks=remarks(material.frame, last, material.records),
        marketplaces=MARKETPLACES,
        most_customers=WORST,
        most_changes=MOST_CHANGES,
        style=(_FOLDER / "page.css").read_text(),
        # What is in the file as it was written may run, and nothing that a text could smuggle in.
        scripts=scripts,
        script_hashes=[base64.b64encode(hashlib.sha256(one.encode()).digest()).decode() for one in scripts],
        # No text can end the element that it is in.
        data=_json(shown).replace("<", "\\u003c"),
    )


def write(path: Path, html: str) -> None:
    """Puts the page there in one step: who opens it meanwhile sees the old one. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        draft.write_text(html, encoding="utf-8")
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


@cache
def _library() -> str:
    """Vega, Vega-Lite and Vega-Embed, minified, as the Python package brings them."""
    bundle: Callable[[], str] = vl_convert.javascript_bundle  # type: ignore[assignment] # Its types lack the default.
    return bundle()


MOST_NOTES = 10
"""How many chains of incomplete days are named on top."""


def _unread(material: Material) -> str:
    """What the page lacks because the tables of some customers could not be read; nothing if all could be."""
    if not material.unread:
        return ""
    return (
        f"The failing customers and the changes lack {counted(len(material.unread), 'customer')}, whose own tables "
        f"could not be read. {first_reasons(material.unread)}. All other numbers have them."
    )


def data(material: Material, last: date, time_zone: str) -> dict[str, Any]:
    """What the page's script shows. Days, marketplaces, actions and texts stand for their places in lists of them.

    `daily` and `periods` are by `marketplace,action`, with ALL for all of them together. Of `daily`, each number is a
    list over all days; of a period there are a list of SHOWN now, one before, and one of the changes. Reasons and
    customers are there from `details_from` on: as far back as there is room for them.
    """
    frame = material.frame
    first = min([*frame["date"], *material.records], default=last)
    all_days = last_days(last, max((last - first).days + 1, PERIODS[0]))[-2 * PERIODS[-1] :]
    incomplete = [day for day in all_days if not is_complete(material.records.get(day))]
    offset = max(0, len(all_days) - PERIODS[-1])
    days = all_days[offset:]
    place = {day: at for at, day in enumerate(days)}
    actions = action_codes(frame)
    texts = _Texts()

    of_periods = periods(first, last, incomplete)
    groups = np.array([[day in chosen for day in all_days] for one in of_periods for chosen in (one.now, one.before)])
    daily: dict[str, dict[str, list[Any]]] = {}
    by_period: list[dict[str, Any]] = [{} for _ in of_periods]
    by_marketplace: dict[tuple[date, int], Any] = {}
    for cell, known in cells(frame, all_days, actions):
        by_day = known.numbers()
        daily[_key(*cell)] = {name: [_short(row[name]) for row in by_day[offset:]] for name in DAILY}
        if cell[0] != ALL and cell[1] == ALL:
            by_marketplace |= {(day, cell[0]): row for day, row in zip(all_days, by_day, strict=True)}
        pairs = iter(known.numbers(groups.astype(np.int64)))
        for of_period, now, before in zip(by_period, pairs, pairs, strict=True):
            shown = ([_short(row[name]) for name in SHOWN] for row in (now, before))
            of_period[_key(*cell)] = [*shown, [_short(change) for change in compare(now, before, SHOWN)]]
    bad = bad_days(by_marketplace, [day for day in days if day not in incomplete])

    action_place = {code: at for at, code in enumerate(actions)}

    def who(row: Mapping[Any, Any]) -> tuple[int, int]:
        # A journal or a customer may name an action that no row of the summary has any more.
        if row["action_code"] not in action_place:
            action_place[row["action_code"]] = len(actions)
            actions.append(row["action_code"])
        return MARKETPLACES.index(row["marketplace"]), action_place[row["action_code"]]

    changes = [
        [
            place[row["date"]],
            *who(row),
            texts[row["cause"]],
            texts[f"{row['changed_at'].astimezone(ZoneInfo(time_zone)):%Y-%m-%d %H:%M}"],
            texts[row["run_id"]],
            texts[row["tenant"]],
            row["tenants"],
            *(row[f"{name}_{when}"] for name in ("total_jobs", "failure_count") for when in ("before", "after")),
            *(row[f"{name}_count"] for name in ("late", "corrected", "moved_in", "moved_out", "forgotten")),
        ]
        for row in material.changes
        if row["date"] in place
    ]
    found: dict[str, Any] = {
        "last": str(last),
        "tenant": material.tenant,
        "days": list(map(str, days)),
        "marketplaces": MARKETPLACES,
        "actions": actions,
        "shown": SHOWN,
        "daily": daily,
        "periods": [
            {
                "days": one.days,
                "has_before": bool(one.before),
                "left_out": list(map(str, one.left_out)),
                "cells": of_period,
            }
            for one, of_period in zip(of_periods, by_period, strict=True)
        ],
        "bad_days": [
            [place[one.day], one.marketplace, one.jobs, one.failures, _short(one.success_rate), _short(one.usual)]
            for one in bad
        ],
        "incomplete": [place[day] for day in incomplete if day in place],
        "completeness": [describe(material.records.get(day)) for day in days],
        "changes": changes,
        "charts": charts.for_browser(),
        "texts": texts,
    }
    reasons: defaultdict[date, list[Any]] = defaultdict(list)
    for row in of_days(frame, days)[["date", "marketplace", "action_code", "top_reasons"]].to_dict("records"):
        reasons[row["date"]] += [
            [*who(row), texts[entry["reason"]], entry["jobs"], entry["tenants"]] for entry in row["top_reasons"]
        ]
    customers: defaultdict[date, list[Any]] = defaultdict(list)
    for one in material.customers:
        reason = None if one["reason"] is None else texts[one["reason"]]
        numbers = (one["total_jobs"], one["failure_count"], reason, one["reason_jobs"])
        customers[one["date"]].append([texts[one["tenant"]], *who(one), *numbers])
    room = MOST_CHARACTERS - len(_library()) - len(_json(found | {"texts": list(texts)}))
    details: dict[str, dict[int, list[Any]]] = {"reasons": {}, "customers": {}}
    details_from = last
    for day in reversed(days):
        room -= len(_json([reasons[day], customers[day]]))
        if room < 0:
            break
        details_from = day
        details["reasons"][place[day]], details["customers"][place[day]] = reasons[day], customers[day]
    return found | details | {"details_from": place[details_from], "texts": list(texts)}


def _json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


class _Texts(dict[str, int]):
    """Texts by their place in a list, so that each is in the page once."""

    def __missing__(self, text: str) -> int:
        self[text] = len(self)
        return self[text]


def _key(marketplace: int, action: int) -> str:
    return f"{marketplace},{action}"


def _short(value: float | None) -> float | None:
    """As many digits as are shown: whole numbers and milliseconds, and rates to a thousandth of a percent."""
    if value is None or isinstance(value, int):
        return value
    return round(value, 5) if abs(value) < 10 else round(value)
