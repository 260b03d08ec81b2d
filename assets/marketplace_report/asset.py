"""The asset: read the summary, make the page, and show its pictures and numbers in the Dagster UI."""

from collections.abc import Iterator, Mapping
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import dagster as dg
import sqlalchemy as sa

from assets.reporting import MOST_ROWS, code_span, counted, explain, first_reasons, table
from pipelines.completeness import Record, is_complete
from pipelines.database import server_and_database
from pipelines.failure import RunFailure
from pipelines.resources import TenantDatabase
from pipelines.settings import UsageError

NAME = "marketplace_report"

PICTURES = (30, 90)
"""The days that are drawn for the Dagster UI."""

DESCRIPTION = """
One HTML page, which needs no network, for people who look for themselves: choose marketplace, action and period, hover
for the numbers, click a bad day to see its actions, reasons and customers; with the period before, what stands out, and
what has changed in settled days. It is at the path `page`, and at the address `link` if `STATS_REPORT_URL` is set; some
pictures and the main numbers are shown here, too.

A day on which tenants are missing, or which is not summarized yet, is named (`days_incomplete`), and left out of the
comparisons, with its weekday in the other period. The numbers `..._of_7_days` are there if all seven days are complete.

It is made from `marketplace_daily_summary`, after each of its runs; the failing customers and the changes come from the
tenants' own tables. The same page for one customer: `python -m pipelines.report --tenant user_7 --output user_7.html`.

*When it is red*, the page of the run before is still there, or, if the error names tenants, the new page without their
failing customers and changes. Fix what the error says, and materialize it again.
"""


def build_marketplace_report(
    partitions: dg.DailyPartitionsDefinition,
    summary: dg.AssetKey,
    report_dir: Path,
    key_prefix: tuple[str, ...] = (),
    report_url: str | None = None,
) -> dg.AssetsDefinition:
    """The asset, from the summary of these days; its page goes into this folder, which is seen at `report_url`."""
    name = "/".join((*key_prefix, f"{NAME}.html"))
    page_path = report_dir / name

    @dg.asset(
        name=NAME,
        key_prefix=list(key_prefix) or None,
        deps=[summary],
        description=DESCRIPTION,
        group_name="marketplace_stats",
        kinds={"postgres", "html"},
        owners=["team:data"],
        tags={"scope": "all-tenants"},
    )
    def marketplace_report(
        context: dg.AssetExecutionContext, tenant_database: TenantDatabase
    ) -> Iterator[dg.MaterializeResult[Any]]:
        # pandas takes a second to import: not for every import.
        from assets.marketplace_report import charts, numbers, page, read

        try:
            window = read.shown_and_before(partitions)
            with tenant_database.connect() as (engine, connection):
                database = server_and_database(connection)
                context.log.info(f"Reporting {window}, of {database}")
                material = read.of_all(tenant_database, engine, connection, window)
            frame, last = material.frame, window.dates[-1]
            made_at = datetime.now(UTC)
            html = page.render(material, last, time_zone=window.time_zone, database=database, made_at=made_at)
            page.write(page_path, html)
        except UsageError as error:
            raise RunFailure(error.message) from None
        except sa.exc.DBAPIError as error:
            raise RunFailure(f"The summary could not be read: {explain(error)}.") from None
        except OSError as error:
            raise RunFailure(f"The page could not be written: {error}. See to STATS_REPORT_DIR.") from None
        records = material.records
        compared = numbers.compare_weeks(frame, numbers.compared_days(last, records))
        sentences = numbers.remarks(frame, last, records, write=code_span)
        incomplete = numbers.incomplete_days(last, numbers.PERIODS[-1], records)
        link = {"link": dg.MetadataValue.url(f"{report_url}/{name}")} if report_url else {}
        yield dg.MaterializeResult(
            metadata={
                **link,
                "page": dg.MetadataValue.path(page_path),
                "what_stands_out": dg.MetadataValue.md("\n".join(f"- {one}" for one in sentences)),
                "days_incomplete": dg.MetadataValue.text("\n".join(incomplete[:MOST_ROWS]) or "none"),
                "success_of_30_days": dg.MetadataValue.md(charts.thumbnail(frame, numbers.last_days(last, 30))),
                **{
                    f"last_{count}_days": dg.MetadataValue.md(
                        f"![The last {count} days]({charts.picture(frame, numbers.last_days(last, count))})"
                    )
                    for count in PICTURES
                },
                "weeks": table(_week_rows(compared)),
                "last_day": last.isoformat(),
                **_of_7_days(numbers, frame, last, records),
            }
        )
        if material.unread:
            raise RunFailure(
                f"The page lacks the failing customers and the changes of {counted(len(material.unread), 'tenant')}. "
                f"{first_reasons(material.unread)}."
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
