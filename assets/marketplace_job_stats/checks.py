"""The asset checks: what each asks, why, and what to do when it is red.

Only one blocks. The others warn: the numbers that are there are right, but somebody should look. They speak of the last
run over all tenants, and are evaluated in its own step, because nothing after it executes when tenants have failed.
"""

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import dagster as dg
import sqlalchemy as sa

from assets.marketplace_job_stats.report import RunReport
from assets.marketplace_job_stats.transaction import REASONS
from assets.reporting import counted, explain, table
from models.sources import MarketplaceJob
from models.stats import MarketplaceJobStatsDay
from pipelines.failure import RunFailure
from pipelines.partitions import Window
from pipelines.resources import TenantDatabase
from pipelines.settings import UsageError
from pipelines.tenants import Tenant, choose_tenants, on_tenant

MOST_UNCOUNTED = 0.01
"""The share of the finished jobs that may be left out, wholly or from the durations, before it is worth a warning."""

PROOF, TENANTS, HELD_BACK, COUNTED, YESTERDAY = (
    "stored_counts_are_the_counted",
    "every_tenant_is_computed",
    "no_day_is_held_back",
    "few_jobs_are_uncounted",
    "yesterday_is_there",
)

_DESCRIPTIONS = {
    PROOF: """
**Blocks.** Before a tenant's transaction commits, its stored rows are read back: every count of every day must be
what was counted in the source. Otherwise nothing of that tenant is written.

*When it is red:* something on that tenant's `marketplace_job_stats` changes what is written. Look for a trigger or a
rule, remove it, and run the days again.
""",
    TENANTS: """
**Warns** of tenants that could not be computed: not migrated, locked, without a privilege, or broken in another way.
The others are done, and nothing of these was changed.

*When it is red:* each is named with its SQLSTATE and what to do. Then run the days again. Days that a tenant never had
are also taken along by the next nightly run.
""",
    HELD_BACK: """
**Warns** of days that were left as they were: no facts stand behind their numbers (they are the old counter's, or were
computed before there were facts, or somebody has pruned the facts), a number would fall, and the source is not
evidently complete.

*When it is red:* nothing is lost. If the stored numbers are the right ones, leave it so. If the smaller ones are, run
the days with `allow_shrink: true`, for these `tenants`.
""",
    COUNTED: f"""
**Warns** if more than {MOST_UNCOUNTED:.0%} of the finished jobs are left out: of an unknown marketplace (not counted),
without a start, or with one that makes no sense (counted, but not in the durations).

*When it is red:* the application writes something new or wrong. The tenants are named, the most first.
""",
    YESTERDAY: """
**Warns** if a tenant's ledger lacks yesterday, or still has it open, by its own schedule in the morning: whatever the
runs have said. Tenants without a job that ended before today are left out: they are new.

*When it is red:* look whether the nightly run was started, waits in the queue, or has failed. The next one takes
missing days along; to have them now, materialize them with `only_missing: true`.
""",
}


def check_specs(key: dg.AssetKey) -> list[dg.AssetCheckSpec]:
    """The checks that a run evaluates in its own step."""
    return [
        dg.AssetCheckSpec(name, asset=key, blocking=name == PROOF, description=_DESCRIPTIONS[name])
        for name in (PROOF, TENANTS, HELD_BACK, COUNTED)
    ]


def check_results(report: RunReport, key: dg.AssetKey) -> Iterator[dg.AssetCheckResult]:
    """What a run over all tenants found. Where none was computed, nothing is said of what only a computed one tells."""

    def result(
        name: str, passed: bool, sentence: str, rows: list[dict[str, Any]], **numbers: float
    ) -> dg.AssetCheckResult:
        return dg.AssetCheckResult(
            asset_key=key,
            check_name=name,
            passed=passed,
            severity=dg.AssetCheckSeverity.ERROR if name == PROOF else dg.AssetCheckSeverity.WARN,
            description=f"{sentence}; {report.spec.window}",
            metadata={**numbers, **({"tenants": table(rows)} if rows else {})},
        )

    failed = [{"tenant": schema, "reason": reason} for schema, reason in report.failed.items()]
    sentence = f"{report.done} tenants computed, {len(failed)} failed"
    yield result(TENANTS, not failed, sentence, failed, tenants_failed=len(failed))
    unproved = [row for row in failed if row["tenant"] in report.unproved]
    if report.done or unproved:
        sentence = f"{report.done} tenants proved, {len(unproved)} not"
        yield result(PROOF, not unproved, sentence, unproved, tenants_not_proved=len(unproved))
    if report.done:
        count = report.held_back_count
        yield result(HELD_BACK, not count, f"{counted(count, 'day')} held back", report.held_back, days_held_back=count)
        # Jobs that have no day are of all times, so they have no share in these days; they are only reported.
        uncounted = sum(report.uncounted[reason] for reason in REASONS)
        finished = report.finished_jobs + report.uncounted["unknown_marketplace"]
        share = uncounted / max(1, finished)
        sentence = f"{uncounted} of {finished} finished jobs left out ({share:.1%})"
        percent = round(100 * share, 2)
        yield result(COUNTED, share <= MOST_UNCOUNTED, sentence, report.uncounted_rows(), percent_uncounted=percent)


def build_yesterday_check(
    partitions: dg.DailyPartitionsDefinition, ledger_key: dg.AssetKey
) -> dg.AssetChecksDefinition:
    """The check that asks the ledgers themselves. It is the ledger's, so that materializing the stats does not run it.

    Dagster's freshness policies do not serve: they take any day's materialization for fresh.
    """
    ledger, jobs = MarketplaceJobStatsDay.__table__, MarketplaceJob.__table__
    entry = sa.select(sa.literal(1)).where(ledger.c.date == sa.bindparam("date"))
    is_there = entry.where(ledger.c.outcome.cast(sa.Text) != "open").exists()
    is_new = ~sa.select(sa.literal(1)).where(jobs.c.completed_at < sa.bindparam("end")).exists()

    @dg.asset_check(asset=ledger_key, name=YESTERDAY, description=_DESCRIPTIONS[YESTERDAY])
    def yesterday_is_there(
        context: dg.AssetCheckExecutionContext, tenant_database: TenantDatabase
    ) -> dg.AssetCheckResult:
        keys = partitions.get_partition_keys(current_time=datetime.now(UTC))
        if not keys:
            return dg.AssetCheckResult(passed=True, description="No day has closed yet.")
        yesterday = Window.of(partitions, keys[-1:])

        def work(connection: sa.Connection, tenant: Tenant) -> str | None:
            if tenant.skipped or tenant.unreadable:
                return None if tenant.skipped else tenant.unreadable
            with on_tenant(connection, tenant.schema).begin():
                # The source is asked only where the ledger has nothing: it may be locked, or refuse to be read.
                if connection.scalar(sa.select(is_there), {"date": yesterday.dates[0]}):
                    return None
                is_new_tenant = connection.scalar(sa.select(is_new), {"end": yesterday.end})
                return None if is_new_tenant else "is not in the ledger, or still open"

        try:
            with tenant_database.connect() as (engine, connection):
                with connection.begin():
                    tenants = choose_tenants(connection)
                found = list(tenant_database.for_each(engine, tenants, work))
        except UsageError as error:
            raise RunFailure(error.message) from None
        missing = {
            tenant.schema: explain(reason) if isinstance(reason, Exception) else reason
            for tenant, reason in found
            if reason is not None
        }
        sentence = f"{yesterday.dates[0]} is there for {len(found) - len(missing)} of {len(found)} tenants"
        context.log.info(sentence)
        return dg.AssetCheckResult(
            passed=not missing,
            severity=dg.AssetCheckSeverity.WARN,
            description=sentence,
            metadata={
                "tenants": table({"tenant": schema, "reason": reason} for schema, reason in sorted(missing.items()))
            }
            if missing
            else {},
        )

    return yesterday_is_there
