"""What the operator sees: progress, the statements of a dry run, and how it ended, for people and as JSON."""

import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

import click

from migrations.tenant import Outcome

T = TypeVar("T")


def progress(items: Iterable[Sequence[T]], total: int) -> Iterator[T]:
    """The items of all batches, one by one: with a bar on a terminal, with a line now and then in a log."""
    if sys.stdout.isatty():
        with click.progressbar(length=total, label="Migrating") as bar:
            for batch in items:
                bar.update(len(batch))
                yield from batch
        return
    done = 0
    for batch in items:
        yield from batch
        if done * 10 // total < (done + len(batch)) * 10 // total and total >= 100:
            click.echo(f"{done + len(batch)} of {total} schemas")
        done += len(batch)


def print_dry_run(outcomes: Iterable[Outcome]) -> None:
    """Per schema its state and the exact statements."""
    for outcome in outcomes:
        if outcome.statements:
            click.echo(f"\n-- {outcome.schema}: {outcome.state}")
            click.echo("BEGIN;")
            for statement in outcome.statements:
                click.echo(f"{statement.strip()};")
            click.echo("COMMIT;")


def print_versions(versions: Mapping[str, Sequence[str] | None], head: str) -> None:
    """Which revisions are recorded, and in how many schemas; the first few by name where it is not the head."""
    schemas: dict[str, list[str]] = {}
    for schema, version in versions.items():
        name = "locked by another session" if version is None else ", ".join(version) or "no record"
        schemas.setdefault(name, []).append(schema)
    for version, names in schemas.items():
        some = "" if version == head else f": {', '.join(names[:5])}{' ...' if len(names) > 5 else ''}"
        click.echo(f"{version}{' (head)' if version == head else ''}, {len(names)} schemas{some}")


def print_summary(shared: Sequence[Outcome], outcomes: Sequence[Outcome], dry_run: bool) -> None:
    """Every schema that failed or is out of the ordinary, then the numbers; those do not count our own schema."""
    for outcome in (*shared, *outcomes):
        if outcome.status == "skipped":
            click.echo(f"{outcome.schema}: skipped, {outcome.error}")
        if outcome.status == "failed":
            sqlstate = f" (SQLSTATE {outcome.sqlstate})" if outcome.sqlstate else ""
            click.echo(
                f"{outcome.schema}: failed, {outcome.state}: {outcome.error}{sqlstate}; {outcome.remedy}", err=True
            )
    counts = Counter(outcome.status for outcome in outcomes)
    numbers = ", ".join(f"{counts[status]} {status}" for status in ("done", "already there", "skipped", "failed"))
    click.echo(f"{'Dry run, nothing was written: ' if dry_run else ''}{len(outcomes)} schemas: {numbers}")


def write_report(path: Path, database: str, shared: Sequence[Outcome], outcomes: Sequence[Outcome]) -> None:
    """The same for machines: the counts, and per schema what `Outcome` has."""
    counts = Counter(outcome.status for outcome in outcomes)
    schemas = [{name: value for name, value in asdict(outcome).items() if value} for outcome in (*shared, *outcomes)]
    path.write_text(json.dumps({"database": database, "counts": counts, "schemas": schemas}, indent=1) + "\n")
