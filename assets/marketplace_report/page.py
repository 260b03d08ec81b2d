"""The page: one HTML file with the sentences, the pictures and all numbers behind them, which needs no network."""

import os
from collections.abc import Mapping
from datetime import date, datetime
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd

from assets.marketplace_report.numbers import (
    compare_weeks,
    compared_days,
    daily,
    failures_by_action,
    incomplete_days,
    last_days,
    remarks,
)
from assets.marketplace_report.pictures import data_uri, draw
from models import MARKETPLACES
from pipelines.completeness import Record

PERIODS = (30, 90)
"""The periods that are drawn, in days; the last one is as much as the report reads."""


NOTHING = "\N{EN DASH}"


def render(
    frame: pd.DataFrame,
    last: date,
    records: Mapping[date, Record],
    *,
    time_zone: str,
    database: str,
    made_at: datetime,
) -> str:
    """The page as HTML: `frame` is the summary of the days up to `last`, PERIODS[-1] of them; `records` its days."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"number": number, "percent": percent}
    days = last_days(last, PERIODS[-1])
    return environment.get_template("page.html.j2").render(
        last=last,
        time_zone=time_zone,
        database=database,
        made_at=f"{made_at:%Y-%m-%d %H:%M %Z}",
        incomplete=incomplete_days(last, PERIODS[-1], records),
        remarks=remarks(frame, last, records),
        weeks=compare_weeks(frame, compared_days(last, records)),
        pictures={count: data_uri(draw(frame, last_days(last, count)), "svg") for count in PERIODS},
        marketplaces=MARKETPLACES,
        failures=failures_by_action(frame, days),
        daily=[row for row in daily(frame, days).to_dict("records")[::-1] if has_jobs(row)],
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


def has_jobs(row: dict[Any, Any]) -> bool:
    """Whether anything ended in these rows."""
    return bool(row["total_jobs"] + row["cancelled_count"] + row["expired_count"])


def number(value: float | None) -> str:
    """`12,345`; a dash for nothing."""
    return NOTHING if value is None else f"{value:,.0f}"


def percent(value: float | None) -> str:
    """`97.3 %`; a dash for nothing."""
    return NOTHING if value is None else f"{100 * value:.1f} %"
