"""The check: what is unusual about the last closed day, of whom, and why. It warns, and blocks nothing."""

from collections.abc import Iterator, Sequence
from contextlib import closing
from datetime import UTC, date, datetime
from typing import TYPE_CHECKING, Any

import dagster as dg
import sqlalchemy as sa

from assets.reporting import MOST_ROWS, counted, explain, first_reasons, table
from models.summary import MarketplaceDailySummary
from pipelines.database import require_table
from pipelines.failure import RunFailure
from pipelines.resources import TenantDatabase
from pipelines.settings import UsageError
from pipelines.tenants import choose_tenants

if TYPE_CHECKING:
    import pandas as pd

    from assets.unusual_numbers.statistics import Finding

UNUSUAL = "nothing_is_unusual"
BATCH = 50
"""How many tenants one statement reads."""
FINDINGS = "findings"
"""The metadata that holds the findings: a table with the columns of `_row`."""

DESCRIPTION = """
**Warns** of what was unusual on the last closed day, against the same weekdays of the eight weeks before: a success
rate, a 95th percentile of durations or waits, or a number of jobs; of each marketplace and action over all tenants, and
of each tenant on each marketplace. It runs after the summary, and stops nothing.

A number is named if chance and the usual variation from day to day would hardly make it, and if it is large enough to
matter; about one in fifty that are named is a false alarm. What a whole marketplace does is said of the marketplace,
not of each of its tenants. Series with fewer than four days of history, or ten jobs a day, are not looked at. How, and
how much is found: `docs/unusual.md`.

*When it is red:* the table says who, what, what was expected and seen, and which reasons of failures grew most. If a
marketplace is named, look at its status page; if a tenant, at its connection.
"""


def build_unusual_check(partitions: dg.DailyPartitionsDefinition, summary: dg.AssetKey) -> dg.AssetChecksDefinition:
    """The check of the summary. Unpartitioned: in the run of a range, Dagster shows a partitioned one as skipped."""

    @dg.asset_check(asset=summary, name=UNUSUAL, description=DESCRIPTION, blocking=False)
    def nothing_is_unusual(
        context: dg.AssetCheckExecutionContext, tenant_database: TenantDatabase
    ) -> dg.AssetCheckResult:
        keys = partitions.get_partition_keys(current_time=datetime.now(UTC))
        if not keys:
            return dg.AssetCheckResult(passed=True, description="No day has closed yet.")
        try:
            with tenant_database.connect() as (engine, connection):
                result = _look(tenant_database, engine, connection, date.fromisoformat(keys[-1]))
        except UsageError as error:
            raise RunFailure(error.message) from None
        except sa.exc.DBAPIError as error:
            raise RunFailure(f"The numbers could not be read: {explain(error)}.") from None
        context.log.info(str(result.description))
        return result

    return nothing_is_unusual


def _look(database: TenantDatabase, engine: sa.Engine, connection: sa.Connection, day: date) -> dg.AssetCheckResult:
    """The result for this day. Raises UsageError."""
    import pandas as pd  # It takes a second: not for every import.

    from assets.unusual_numbers import reading
    from assets.unusual_numbers.statistics import Baseline, baseline_days

    dates = [*baseline_days(day), day]
    with connection.begin():
        require_table(connection, MarketplaceDailySummary.__table__)
        found = choose_tenants(connection)
    schemas = [tenant.schema for tenant in found if not tenant.unreadable]
    failed = {tenant.schema: tenant.unreadable for tenant in found if tenant.unreadable and not tenant.skipped}
    ledgers: list[Any] = []
    frames = []
    for batch, rows, of_batch in _read(database, engine, schemas, day, dates, failed):
        frames.append(reading.tenants_frame(rows, batch))
        ledgers += of_batch
    missing = reading.missing_share(ledgers, len(failed), dates)
    complete = [one for one in dates if missing[one] <= reading.MOST_MISSING]
    summary = reading.summary_rows(connection, complete)
    known = [one for one in complete if len(summary) and one in set(summary["date"])]
    if day in known:
        frames.insert(0, reading.fleet_frame(summary, day, known))
    frame = pd.concat([one for one in frames if len(one)], ignore_index=True) if any(map(len, frames)) else None
    findings: list[Finding] = []
    tests, rows = 0, []
    if frame is not None:
        today = frame[frame["date"] == day].reset_index(drop=True)
        findings, tests = Baseline(frame, day).judge(today)
        rows = [
            _row(finding, _reasons(connection, finding, summary, frame, day, known)) for finding in findings[:MOST_ROWS]
        ]
    sentence = f"{counted(len(findings), 'finding')} in {counted(tests, 'test')}; {day}"
    if day not in known:
        sentence += "; all tenants together are not looked at: the day is not there, or not complete"
    if failed:
        sentence += f"; {counted(len(failed), 'tenant')} could not be read. {first_reasons(failed)}"
    return dg.AssetCheckResult(
        passed=not findings,
        severity=dg.AssetCheckSeverity.WARN,
        description=sentence,
        metadata={
            "day": day.isoformat(),
            "tests": tests,
            "findings_count": len(findings),
            "baseline_days_of_all_tenants": ", ".join(str(one) for one in known if one != day) or "none",
            **({FINDINGS: table(rows)} if rows else {}),
        },
    )


def _read(
    database: TenantDatabase,
    engine: sa.Engine,
    schemas: Sequence[str],
    day: date,
    dates: Sequence[date],
    failed: dict[str, str],
) -> Iterator[tuple[Sequence[str], Sequence[Any], Sequence[Any]]]:
    """Of each batch of tenants the rows of their numbers and ledgers. A batch that fails is read tenant by tenant; who
    still fails goes into `failed`."""
    from assets.unusual_numbers.reading import ledgers_query, tenants_query

    def work(connection: sa.Connection, batch: Sequence[str]) -> tuple[Sequence[Any], Sequence[Any]]:
        with connection.begin():
            # Several batches are read at once anyway.
            connection.exec_driver_sql("SET LOCAL max_parallel_workers_per_gather = 0")
            # The planner knows nothing of the sizes of the statement's parts, and takes them for tiny.
            connection.exec_driver_sql("SET LOCAL enable_nestloop = off")
            parameters = {"dates": list(dates)}
            ledgers = connection.execute(ledgers_query(batch), parameters).mappings().all()
            return connection.execute(tenants_query(batch), parameters | {"day": day}).mappings().all(), ledgers

    for size in (BATCH, 1):
        batches = [schemas[start : start + size] for start in range(0, len(schemas), size)]
        schemas = []
        with closing(database.for_each(engine, batches, work)) as outcomes:
            for batch, outcome in outcomes:
                if not isinstance(outcome, Exception):
                    yield batch, *outcome
                elif size > 1:
                    schemas = [*schemas, *batch]
                else:
                    failed[batch[0]] = explain(outcome)


def _reasons(
    connection: sa.Connection,
    finding: "Finding",
    summary: "pd.DataFrame",
    frame: "pd.DataFrame",
    day: date,
    known: Sequence[date],
) -> str:
    """The reasons that grew most, as a text; empty if none has, or if they cannot be read."""
    from assets.unusual_numbers import reading

    if not finding.tenant:
        reasons = reading.fleet_reasons(summary, finding.marketplace, finding.action)
        return _named(reading.grown(reasons, day, len(known) - 1))
    of_tenant = frame[(frame["tenant"] == finding.tenant) & (frame["marketplace"] == finding.marketplace)]
    dates = list(of_tenant["date"])
    try:
        rows = reading.tenant_reasons(connection, finding.tenant, finding.marketplace, day, dates)
    except sa.exc.DBAPIError as error:
        return f"not known: {explain(error)}"
    return _named(reading.grown(rows, day, len(dates) - 1))


def _named(reasons: Sequence[tuple[str, float]]) -> str:
    return "; ".join(f"{reason} (+{jobs:.0f})" for reason, jobs in reasons)


def _row(finding: "Finding", reasons: str) -> dict[str, Any]:
    """A finding for people, each number with its unit."""

    def shown(value: float) -> str:
        if finding.number == "success rate":
            return f"{value:.1%}"
        return f"{value:,.0f}" if finding.number == "number of jobs" else f"{value / 1000:,.1f} s"

    return {
        "who": finding.tenant or "all tenants",
        "marketplace": finding.marketplace,
        "action": finding.action,
        "what": finding.number,
        "expected": shown(finding.expected),
        "seen": shown(finding.seen),
        "jobs": finding.jobs,
        "reasons that grew most": reasons or "none",
        "chance of a false alarm": f"{finding.q:.1g}",
    }
