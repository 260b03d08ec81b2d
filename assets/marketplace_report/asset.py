"""The asset: read the summary, make the page, and show its pictures and numbers in Dagit."""

from collections.abc import Mapping
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import dagster as dg
import sqlalchemy as sa

from assets.marketplace_daily_summary.table import read, read_days
from assets.reporting import MOST_ROWS, code_span, explain, table
from pipelines.completeness import Record, is_complete
from pipelines.database import server_and_database
from pipelines.failure import RunFailure
from pipelines.partitions import Window
from pipelines.resources import TenantDatabase
from pipelines.settings import UsageError

NAME = "marketplace_report"

DESCRIPTION = """
The last 30 and 90 closed days of all customers together, by marketplace: jobs, success rate, p50 and p95, failures by
action; and this week against the one before, with what stands out.

The pictures and the main numbers are shown here;
the whole is one HTML page, at the path `page`, which needs no network.

A day on which tenants are missing, or which is not summarized yet, is named (`days_incomplete`), and left out of the
comparison with its weekday in the other week. The numbers `..._of_7_days` are there if all seven days are complete.

It is made from `marketplace_daily_summary`, after each of its runs.

*When it is red*, the page of the run before is still there. Mend what the error says, and materialize it again.
"""


def build_marketplace_report(
    partitions: dg.DailyPartitionsDefinition, summary: dg.AssetKey, report_dir: Path, key_prefix: tuple[str, ...] = ()
) -> dg.AssetsDefinition:
    """The asset, from the summary of these days; its page goes into this folder."""
    page_path = Path(report_dir, *key_prefix, f"{NAME}.html")

    @dg.asset(
        name=NAME,
        key_prefix=list(key_prefix) or None,
        deps=[summary],
        description=DESCRIPTION,
        group_name="marketplace_stats",
        kinds={"matplotlib", "html"},
        owners=["team:data"],
        tags={"scope": "all-tenants"},
    )
    def marketplace_report(
        context: dg.AssetExecutionContext, tenant_database: TenantDatabase
    ) -> dg.MaterializeResult[Any]:
        # Pictures take a second to import, and pandas another one: not for every import.
        from assets.marketplace_report import numbers, page, pictures

        try:
            keys = partitions.get_partition_keys()[-page.PERIODS[-1] :]
            window = Window.of(partitions, keys)
            with tenant_database.connect() as (_, connection):
                database = server_and_database(connection)
                context.log.info(f"Reporting {window}, of {database}")
                frame, records = read(connection, window), read_days(connection, window)
            last = window.dates[-1]
            made_at = datetime.now(UTC)
            html = page.render(frame, last, records, time_zone=window.time_zone, database=database, made_at=made_at)
            page.write(page_path, html)
        except UsageError as error:
            raise RunFailure(error.message) from None
        except sa.exc.DBAPIError as error:
            raise RunFailure(f"The summary could not be read: {explain(error)}.") from None
        except OSError as error:
            raise RunFailure(f"The page could not be written: {error}. See to STATS_REPORT_DIR.") from None
        compared = numbers.compare_weeks(frame, numbers.compared_days(last, records))
        sentences = numbers.remarks(frame, last, records, write=code_span)
        incomplete = numbers.incomplete_days(last, page.PERIODS[-1], records)
        return dg.MaterializeResult(
            metadata={
                "page": dg.MetadataValue.path(page_path),
                "what_stands_out": dg.MetadataValue.md("\n".join(f"- {one}" for one in sentences)),
                "days_incomplete": dg.MetadataValue.text("\n".join(incomplete[:MOST_ROWS]) or "none"),
                **{
                    f"last_{count}_days": dg.MetadataValue.md(
                        f"![The last {count} days]"
                        f"({pictures.data_uri(pictures.draw(frame, numbers.last_days(last, count)), 'png')})"
                    )
                    for count in page.PERIODS
                },
                "weeks": table(_week_rows(compared)),
                "last_day": last.isoformat(),
                **_of_7_days(numbers, frame, last, records),
            }
        )

    return marketplace_report


def _of_7_days(numbers: Any, frame: Any, last: date, records: Mapping[date, Record]) -> dict[str, Any]:
    """The main numbers of the last seven days, which Dagit plots; none where a day is not complete: they would dip."""
    week = numbers.last_days(last, numbers.WEEK)
    if not all(is_complete(records.get(day)) for day in week):
        return {}
    totals = numbers.totals(numbers.of_days(frame, week))
    times = ("success_rate", "p50_duration_ms", "p95_duration_ms", "p99_duration_ms", "p95_wait_ms")
    return {
        "jobs_of_7_days": totals["total_jobs"],
        "failed_jobs_of_7_days": totals["failure_count"],
        **{f"{name}_of_7_days": totals[name] for name in times if totals[name] is not None},
    }


def _week_rows(compared: Any) -> list[dict[str, Any]]:
    """This week against the one before, for each marketplace."""
    return [
        {
            "marketplace": weeks.marketplace,
            "week": week,
            "jobs": of_week["total_jobs"],
            "failed": of_week["failure_count"],
            "success %": None if of_week["success_rate"] is None else round(100 * of_week["success_rate"], 1),
            **{
                header: None if of_week[name] is None else round(of_week[name])
                for header, name in (
                    ("p50 ms", "p50_duration_ms"),
                    ("p95 ms", "p95_duration_ms"),
                    ("p99 ms", "p99_duration_ms"),
                    ("p95 wait ms", "p95_wait_ms"),
                )
            },
        }
        for weeks in compared
        if weeks.action == "all"
        for week, of_week in (("this", weeks.now), ("before", weeks.before))
    ]
