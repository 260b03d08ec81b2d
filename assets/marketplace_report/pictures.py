"""The pictures: for a range of days, the jobs, their success, their durations and their failures, by marketplace."""

import base64
import io
from collections.abc import Sequence
from datetime import date
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.dates import AutoDateLocator, DateFormatter, date2num
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import EngFormatter, MaxNLocator, PercentFormatter

from assets.marketplace_report.numbers import daily, failures_by_action
from models import MARKETPLACES

_UNITS_MS = {"ms": 1, "s": 1000, "min": 60_000, "h": 3_600_000, "d": 86_400_000}
_TICKS_MS = {
    f"{number} {unit}": number * size
    for unit, size in _UNITS_MS.items()
    for number in ((1, 3, 10, 30, 100, 300) if unit == "ms" else (1, 3, 10, 30))
    if (number, unit) != (30, "h")
}
"""The labels of a logarithmic axis of durations."""

LONGEST_LABEL = 20
"""For how many letters of an action's code there is room."""

COLORS = dict(zip(MARKETPLACES, ("#009E73", "#0072B2", "#E69F00"), strict=True))
"""Three of the colours of Okabe and Ito, which people with any colour vision tell apart."""


def draw(frame: pd.DataFrame, days: Sequence[date]) -> Figure:
    """Four panels over these days, from a summary frame: jobs, success rate, p50 and p95, failures by action."""
    figure = Figure(figsize=(12, 7.5), layout="constrained")
    (jobs, success), (durations, failures) = figure.subplots(2, 2)
    rows = daily(frame, days)
    by_marketplace = {name: rows[rows["marketplace"] == name] for name in MARKETPLACES}
    _draw_jobs(jobs, by_marketplace)
    _draw_success(success, by_marketplace)
    _draw_durations(durations, by_marketplace)
    _draw_failures(failures, failures_by_action(frame, days))
    for axes in (jobs, success, durations):
        # The whole period, whatever days have jobs.
        axes.set_xlim(date2num(days[0]) - 0.6, date2num(days[-1]) + 0.6)  # type: ignore[no-untyped-call]
        axes.xaxis.set_major_locator(AutoDateLocator(minticks=3, maxticks=8))  # type: ignore[no-untyped-call]
        axes.xaxis.set_major_formatter(DateFormatter("%-d %b"))  # type: ignore[no-untyped-call]
    handles = [Patch(color=color, label=name) for name, color in COLORS.items()]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), frameon=False)
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_axisbelow(True)
    return figure


def _draw_jobs(axes: Axes, by_marketplace: dict[str, pd.DataFrame]) -> None:
    axes.set_title("Jobs a day")
    below: Any = 0
    for name, rows in by_marketplace.items():
        heights = rows["total_jobs"].to_numpy(dtype=float)
        axes.bar(list(rows["date"]), heights, bottom=below, width=0.85, color=COLORS[name])
        below = below + heights
    _count(axes.yaxis)
    axes.grid(axis="y", alpha=0.3)
    if not below.any():
        _say_nothing(axes, "no jobs")


def _draw_success(axes: Axes, by_marketplace: dict[str, pd.DataFrame]) -> None:
    axes.set_title("Jobs that succeeded")
    for name, rows in by_marketplace.items():
        axes.plot(list(rows["date"]), rows["success_rate"].to_numpy(dtype=float), color=COLORS[name], **_POINTS)
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1))
    axes.grid(axis="y", alpha=0.3)
    low, _ = axes.get_ylim()
    if _has_points(axes):
        axes.set_ylim(max(0.0, min(low, 0.95)), 1.005)
    else:
        _say_nothing(axes, "no jobs")


def _draw_durations(axes: Axes, by_marketplace: dict[str, pd.DataFrame]) -> None:
    axes.set_title("Duration: median (solid), 95th percentile (dashed)")
    for name, rows in by_marketplace.items():
        for column, style in (("p50_duration_ms", "-"), ("p95_duration_ms", "--")):
            # A logarithmic axis has no zero, so what took none stands at 1 ms.
            values = rows[column].astype(float).clip(lower=1).to_numpy()
            axes.plot(list(rows["date"]), values, style, color=COLORS[name], **_POINTS)
    if _has_points(axes):
        axes.set_yscale("log")
        low, high = axes.dataLim.intervaly * (0.5, 2)
        axes.set_ylim(low, high)
        ticks = {ms: label for label, ms in _TICKS_MS.items() if low <= ms <= high}
        axes.set_yticks(list(ticks), list(ticks.values()))
        axes.minorticks_off()
        axes.grid(axis="y", alpha=0.3)
    else:
        _say_nothing(axes, "no durations")


def _draw_failures(axes: Axes, failures: pd.DataFrame) -> None:
    axes.set_title("Failed jobs by action")
    labels = [
        action if len(action) <= LONGEST_LABEL else f"{action[: LONGEST_LABEL - 1]}…" for action in failures.index
    ]
    places = range(len(failures))
    left: Any = 0
    for name in MARKETPLACES:
        widths = failures[name].to_numpy(dtype=float)
        axes.barh(places, widths, left=left, color=COLORS[name], height=0.7)
        left = left + widths
    _count(axes.xaxis)
    axes.grid(axis="x", alpha=0.3)
    # By their place, because shortened codes may be alike; and a dollar sign is no formula.
    axes.set_yticks(places, labels, parse_math=False)
    # From above, and no bar is thicker than with some more below it.
    axes.set_ylim(max(len(failures), 6) - 0.5, -0.5)
    if not len(failures):
        _say_nothing(axes, "no failed jobs")


# A point for each day, so that a single day between two without jobs is seen.
_POINTS: dict[str, Any] = {"marker": "o", "markersize": 3, "linewidth": 1.2}


def _count(axis: Axis) -> None:
    """Whole numbers on this axis: 200, 3 k, 1.5 M."""
    axis.set_major_locator(MaxNLocator(integer=True, nbins=6, min_n_ticks=1))
    axis.set_major_formatter(EngFormatter())


def _has_points(axes: Axes) -> bool:
    return any(np.isfinite(np.asarray(line.get_ydata(), dtype=float)).any() for line in axes.lines)


def _say_nothing(axes: Axes, text: str) -> None:
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color="grey", size="large")
    axes.set_yticks([])


def data_uri(figure: Figure, kind: str) -> str:
    """The picture inside of an address: `png`, of a width that Dagit shows wholly, or `svg`."""
    stream = io.BytesIO()
    if kind == "svg":
        figure.savefig(stream, format="svg", metadata={"Date": None})
    else:
        figure.savefig(stream, format="png", dpi=85, pil_kwargs={"optimize": True})
    media = {"svg": "image/svg+xml", "png": "image/png"}[kind]
    return f"data:{media};base64,{base64.b64encode(stream.getvalue()).decode()}"
