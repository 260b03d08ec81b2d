"""What was read, as people and programs take it: a table on a terminal, CSV, JSON and Parquet.

rich and arro3 are imported where they are used, since most calls need only one of them.
"""

import csv
import io
import json
import os
from datetime import date
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

import click

from assets.sketch import MEASURES
from pipelines.settings import UsageError

if TYPE_CHECKING:
    from rich.text import Text

BY = {"date": "date", "marketplace": "marketplace", "action": "action_code", "tenant": "tenant"}
"""What rows may be grouped by, each with its column."""

DTYPES = {"date": "datetime64[us]", "success_rate": "Float64", "top_reasons": "object"}
DTYPES |= dict.fromkeys(("marketplace", "action_code", "action_name", "tenant"), "string")
"""Of a frame's columns; all others are Int64."""

_PERCENTILES = tuple(name for measure in MEASURES for name in measure.percentiles)


class Found(NamedTuple):
    """The rows, in order, each by column, and a sentence for each day that is not complete."""

    columns: tuple[str, ...]
    rows: list[dict[str, Any]]
    notes: list[str]


def print_rows(found: Found, kind: str, file: IO[str]) -> None:
    if kind == "csv":
        writer = csv.DictWriter(file, found.columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: _cell(value) for name, value in row.items()} for row in found.rows)
    elif kind == "json":
        click.echo(json.dumps(found.rows, default=str, indent=1), file)
    else:
        _print_table(found, file)


def write_rows(found: Found, kind: str, path: Path) -> None:
    """Puts the file there in one step: who opens it meanwhile sees the old one."""
    if kind == "parquet":
        content = _parquet(found)
    else:
        text = io.StringIO()
        print_rows(found, kind, text)
        content = text.getvalue().encode()
    draft = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        draft.write_bytes(content)
        draft.replace(path)
    except OSError as error:
        raise UsageError(f"--output {path} cannot be written: {error.strerror}.") from None
    finally:
        draft.unlink(missing_ok=True)


def _parquet(found: Found) -> bytes:
    """The rows as Parquet: `date` is a DATE, `top_reasons` text with JSON; the other types as in the frame."""
    from arro3.core import Array, DataType, Table
    from arro3.io import write_parquet

    types = {"string": DataType.utf8(), "object": DataType.utf8(), "Float64": DataType.float64()}
    arrays: dict[str, Any] = {}
    for name in found.columns:
        values: list[Any] = [row[name] for row in found.rows]
        if name == "date":
            epoch = date(1970, 1, 1)
            arrays[name] = Array([(day - epoch).days for day in values], DataType.int32()).cast(DataType.date32())
            continue
        if name == "top_reasons":
            values = [None if value is None else json.dumps(value) for value in values]
        arrays[name] = Array(values, types.get(DTYPES.get(name, ""), DataType.int64()))
    file = io.BytesIO()
    write_parquet(Table.from_pydict(arrays), file)
    return file.getvalue()


def _cell(value: Any) -> Any:
    """A value as a cell of CSV. A spreadsheet takes a text for a formula by its first character, so it gets another."""
    if isinstance(value, list):
        return json.dumps(value)
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")) else value


def _text(value: str) -> "Text":
    """A text on a terminal as it is: neither markup, nor characters that a terminal obeys."""
    from rich.text import Text

    return Text("".join(one if one.isprintable() else "\N{REPLACEMENT CHARACTER}" for one in value))


_TIMES = {
    "mean ms": "avg_duration_ms",
    "p50 ms": "p50_duration_ms",
    "p95 ms": "p95_duration_ms",
    "p99 ms": "p99_duration_ms",
    "p95 wait ms": "p95_wait_ms",
}


def _print_table(found: Found, file: IO[str]) -> None:
    """The columns that fit on a line, for people."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    headers = {BY["action"]: "action", **{name: name for name in (BY["date"], BY["marketplace"], BY["tenant"])}}
    keys = [name for name in found.columns if name in headers]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in keys:
        table.add_column(headers[name], no_wrap=True)
    for header in ("jobs", "failed", "success", *_TIMES, "tasks", "retries"):
        table.add_column(header, justify="right", no_wrap=True)
    for row in found.rows:
        table.add_row(
            *(_text(str(row[name])) for name in keys),
            _number(row["total_jobs"]),
            _number(row["failure_count"]),
            "-" if row["success_rate"] is None else f"{row['success_rate']:.1%}",
            *(_number(_significant(row[name]) if name in _PERCENTILES else row[name]) for name in _TIMES.values()),
            _number(row["total_tasks"]),
            _number(row["retry_count"]),
        )
    console = Console(file=file)
    console.width = 10_000  # As wide as it needs: rather wrapped by a narrow terminal than cut.
    console.print(table if found.rows else "no rows")


def _significant(ms: int | None) -> int | None:
    """Three significant digits: more would look more exact than a percentile is."""
    return None if ms is None else int(float(f"{ms:.3g}"))


def _number(value: Any) -> str:
    return "-" if value is None else f"{value:,.0f}"
