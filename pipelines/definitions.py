"""Start here: everything that Dagster loads, put together by `build_defs`."""

import warnings
from functools import cache

import dagster as dg

from assets.marketplace_daily_summary.asset import build_marketplace_daily_summary
from assets.marketplace_daily_summary.table import SummaryTable
from assets.marketplace_daily_summary.today import build_marketplace_daily_summary_today
from assets.marketplace_job_stats.asset import build_marketplace_job_stats
from assets.marketplace_job_stats.checks import build_yesterday_check
from assets.marketplace_job_stats.today import build_marketplace_job_stats_today
from assets.marketplace_report.asset import build_marketplace_report
from assets.sources import build_sources
from assets.tenant_tables import build_tenant_tables, table_key
from assets.unusual_numbers.check import build_unusual_check
from models.stats import MarketplaceJobStatsDay
from pipelines.alerts import build_alert_sensor, build_unusual_alert_sensor
from pipelines.covering_index.job import covering_index_job
from pipelines.metrics import build_metrics_sensor, key_prefix_tags
from pipelines.migration import build_migration_job, build_migration_schedule
from pipelines.partitions import day_partitions
from pipelines.resources import TenantDatabase
from pipelines.schedules import build_schedules, build_today_schedule
from pipelines.sensors import build_report_sensor, build_summary_sensor, build_unusual_sensor
from pipelines.settings import Settings

# Dagster calls code references beta. Without them, only the links to the code would be missing.
warnings.filterwarnings("ignore", message=".*CodeReference|.*code_references", category=dg.BetaWarning)


# Goes before the stats in the queue. Dagster counts runs that wait for their pool as if they were at work, so three
# backfills that wait would use up what deploy/dagster.yaml allows a database, and hold back what waits for no pool.
SOON = {"dagster/priority": "1"}


def build_defs(settings: Settings) -> dg.Definitions:
    """The definitions for one database; the same for production and for tests. Connects to nothing."""
    partitions = day_partitions(settings)
    stats = build_marketplace_job_stats(
        partitions, settings.sweep_days, settings.key_prefix, failure_reasons=settings.failure_reasons
    )
    yesterday_check = build_yesterday_check(partitions, table_key(MarketplaceJobStatsDay, settings.key_prefix))
    tags = key_prefix_tags(settings)
    job = dg.define_asset_job(
        "marketplace_job_stats_job",
        selection=[stats],
        tags=tags,
        description="Computes `marketplace_job_stats` for a range of days; its two schedules start it, at night and on "
        "Sundays. For a backfill use the asset's page: it does a whole range in one run, a job's backfill takes a run "
        "for each day.\n\n*When it is red*, the error names the tenants that were not computed, and what to do; the "
        "others are done. Then start it again.",
    )
    today = build_marketplace_job_stats_today(partitions, settings.key_prefix, failure_reasons=settings.failure_reasons)
    summary_today = build_marketplace_daily_summary_today(partitions, settings.key_prefix)
    today_job = dg.define_asset_job(
        "marketplace_job_stats_today_job",
        selection=[today, summary_today],
        tags=tags | SOON,
        description="Computes today so far, and adds it up over all tenants. Its schedule starts it every few minutes."
        "\n\n*When it is red*, no tenant could be computed, for the reason that the error says; the next run tries "
        "again. Its check names single tenants that could not be computed.",
    )
    summary = build_marketplace_daily_summary(partitions, settings.key_prefix)
    unusual_check = build_unusual_check(partitions, summary.key)
    summary_job = dg.define_asset_job(
        "marketplace_daily_summary_job",
        # Its check has a run of its own: a run in which single tenants failed would leave it out.
        selection=dg.AssetSelection.assets(summary) - dg.AssetSelection.checks(unusual_check),
        tags=tags | SOON,
        description="Adds up the stats of all tenants, for a range of days. Its sensor starts it, after the stats have "
        "changed.\n\n*When it is red*, the error names the tenants that could not be read. Fix what it says; "
        "the sensor "
        "starts it again within hours, or start it by hand.",
    )
    report = build_marketplace_report(
        partitions, summary.key, settings.report_dir, settings.key_prefix, settings.report_url
    )
    report_job = dg.define_asset_job(
        "marketplace_report_job",
        selection=[report],
        tags=tags | SOON,
        description="Makes the report page. Its sensor starts it, after each run of the summary.\n\n*When it is red*, "
        "the page from before is still there. Fix what the error says, and start it again.",
    )
    check_job = dg.define_asset_job(
        "yesterday_is_there_job",
        selection=dg.AssetSelection.checks(yesterday_check),
        tags=tags | SOON,
        description="Warns if yesterday is not in the ledger of every tenant. Its schedule starts it in the morning."
        "\n\n*When it is red*, the check could not be made, for the reason that the error says. If only the check is "
        "red, it tells what to do.",
    )
    migration_job = build_migration_job(tags)
    unusual_job = dg.define_asset_job(
        "unusual_numbers_job",
        selection=dg.AssetSelection.checks(unusual_check),
        tags=tags | SOON,
        description="Looks for what is unusual about the last closed day. Its sensor starts it, after each run of the "
        "summary.\n\n*When it is red*, the check could not be made, for the reason that the error says. If only the "
        "check is red, it says what is unusual.",
    )
    schedules = build_schedules(settings, partitions, stats.key, job.name, check_job.name)
    database = TenantDatabase(
        workers=settings.workers,
        lock_timeout_ms=settings.lock_timeout_ms,
        statement_timeout_ms=settings.statement_timeout_ms,
    )
    return dg.Definitions(
        assets=[
            *build_sources(settings.key_prefix),
            *build_tenant_tables(settings.key_prefix),
            *dg.with_source_code_references([stats, today, summary, summary_today, report]),
        ],
        asset_checks=[yesterday_check, unusual_check],
        jobs=[job, today_job, summary_job, report_job, check_job, unusual_job, migration_job, covering_index_job],
        schedules=[
            *schedules,
            build_today_schedule(settings, partitions, today_job.name, tags),
            build_migration_schedule(settings, migration_job),
        ],
        sensors=[
            build_summary_sensor(partitions, [stats.key], summary.key, summary_job.name),
            build_report_sensor(summary.key, report_job.name),
            build_unusual_sensor(summary.key, unusual_job.name),
            build_alert_sensor(settings, tags),
            build_metrics_sensor(settings),
            build_unusual_alert_sensor(settings, unusual_check.check_key),
        ],
        resources={"tenant_database": database, "summary_table": SummaryTable(database)},
        # A tenant is never a step, so there is nothing that a process per step could run at once.
        executor=dg.in_process_executor,
    )


# Dagster asks for them half a dozen times for one command, and would have everything built again each time.
@dg.definitions
@cache
def defs() -> dg.Definitions:
    """What Dagster loads. Raises UsageError where the environment holds a value that is not allowed."""
    return build_defs(Settings.from_env())
