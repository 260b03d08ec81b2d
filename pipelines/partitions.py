"""The days: Dagster's day partitions in the reporting time zone, and a range of them as a window of instants.

A day is never computed from a timestamp's date: PostgreSQL and Python disagree about midnight on some days of some
zones. The instants of the partitions are the only truth, and SQL compares with them.
"""

from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from functools import cached_property, lru_cache
from itertools import groupby, pairwise
from typing import Any
from zoneinfo import ZoneInfo

import dagster as dg

from pipelines.settings import Settings, UsageError


def day_partitions(settings: Settings) -> dg.DailyPartitionsDefinition:
    """One partition a day from `STATS_START_DATE` up to yesterday, in `STATS_TIMEZONE`; keys `YYYY-MM-DD`."""
    return dg.DailyPartitionsDefinition(start_date=settings.start_date.isoformat(), timezone=settings.time_zone)


@dataclass(frozen=True)
class Window:
    """Consecutive days: their dates, the instant at which each begins, and the instant at which the last one ends.

    Every instant from the first start to the end belongs to exactly one of the days.
    """

    dates: tuple[date, ...]
    starts: tuple[datetime, ...]
    end: datetime
    time_zone: str

    @classmethod
    def of(cls, partitions: dg.DailyPartitionsDefinition, keys: Sequence[str]) -> "Window":
        """The window of these partition keys, in order. Raises UsageError if there is none, or one is missing."""
        days = [partitions.time_window_for_partition_key(key) for key in keys]
        if any(day.end != following.start for day, following in pairwise(days)):
            raise UsageError(f"The days from {keys[0]} to {keys[-1]} do not follow each other: run them one by one.")
        if not days:
            raise UsageError("There is no day to compute: give a range from an earlier to a later day.")
        return cls(
            dates=tuple(date.fromisoformat(key) for key in keys),
            starts=tuple(day.start.astimezone(UTC) for day in days),
            end=days[-1].end.astimezone(UTC),
            time_zone=partitions.timezone,
        )

    def parts(self, dates: Container[date]) -> list["Window"]:
        """Those of its days that are among `dates`, as windows: one for each unbroken chain of days."""
        if all(day in dates for day in self.dates):
            return [self]
        days = zip(self.dates, self.starts, (*self.starts[1:], self.end), strict=True)
        windows: list[Window] = []
        for is_chosen, chain in groupby(days, key=lambda day: day[0] in dates):
            if is_chosen:
                chosen, starts, ends = zip(*chain, strict=True)
                windows.append(Window(chosen, starts, ends[-1], self.time_zone))
        return windows

    @cached_property
    def parameters(self) -> dict[str, Any]:
        """The values of the bound parameters that every statement over a window takes.

        The arrays are text, as PostgreSQL reads it: to write hundreds of dates anew for each statement of each tenant
        takes the driver longer than it takes the server to read them.
        """
        return {
            "dates": f"{{{','.join(day.isoformat() for day in self.dates)}}}",
            "starts": f"{{{','.join(start.isoformat() for start in self.starts)}}}",
            "window_start": self.starts[0],
            "window_end": self.end,
            "first_date": self.dates[0],
            "last_date": self.dates[-1],
            "time_zone": self.time_zone,
        }

    def __str__(self) -> str:
        return (
            f"{len(self.dates)} day{'s' if len(self.dates) > 1 else ''} in {self.time_zone}, "
            f"{self.dates[0]} to {self.dates[-1]}: "
            f"from {self.starts[0].isoformat()} to before {self.end.isoformat()}"
        )


@dataclass(frozen=True)
class Days:
    """All days there are, also those before the first partition and after the last one."""

    partitions: dg.DailyPartitionsDefinition

    def of(self, window: Window, instants: Iterable[datetime]) -> dict[str, str]:
        """The parameters `dates` and `starts` of the days of a window and those to which these instants belong.

        Where a day does not follow the one before, null stands for the days between.
        """
        days = dict(zip(window.starts, window.dates, strict=True))
        ends = {window.end}
        for instant in instants:
            start, end, day = self._day_of(instant)
            days[start] = day
            ends.add(end)
        bounds = sorted(days.keys() | ends)
        return {
            "dates": f"{{{','.join(days[bound].isoformat() if bound in days else 'NULL' for bound in bounds)}}}",
            "starts": f"{{{','.join(bound.isoformat() for bound in bounds)}}}",
        }

    def window_at(self, instant: datetime) -> Window:
        """The day to which an instant belongs, as a window: whether it is over or not."""
        start, end, day = self._day_of(instant)
        return Window((day,), (start,), end, self.partitions.timezone)

    def _day_of(self, instant: datetime) -> tuple[datetime, datetime, date]:
        """Start, end and date of the day that an instant belongs to. Its date by the clock may be the next or the one
        before."""
        by_clock = instant.astimezone(ZoneInfo(self.partitions.timezone)).date()
        for shift in (0, -1, 1):
            day = by_clock + timedelta(days=shift)
            start, end = _bounds(self.partitions, day.isoformat())
            if start <= instant < end:
                return start, end, day
        raise ValueError(f"{instant} belongs to no day.")


@lru_cache(maxsize=10_000)
def _bounds(partitions: dg.DailyPartitionsDefinition, key: str) -> tuple[datetime, datetime]:
    window = partitions.time_window_for_partition_key(key)
    return window.start.astimezone(UTC), window.end.astimezone(UTC)
