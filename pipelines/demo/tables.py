"""What the demo prints: what changed against the old counters, and last week by marketplace."""

from collections.abc import Sequence
from datetime import date, timedelta

import pandas as pd
import psycopg
from psycopg import sql
from rich import box
from rich.console import Console
from rich.table import Table


def old_counters(connection: psycopg.Connection, schema: str) -> pd.DataFrame:
    """The old counter's rows, to be kept before the migration takes the table over.

    Columns: code, date, total_jobs, failure_count, avg_duration_ms.
    """
    cursor = connection.execute(
        sql.SQL(
            """
            SELECT coalesce(action.code, 'unknown') AS code, date, total_jobs, failure_count, avg_duration_ms
              FROM {} AS stats
              LEFT JOIN public.marketplace_action_types AS action ON action.id = stats.action_type_id
             ORDER BY date, code
            """
        ).format(sql.Identifier(schema, "vinted_job_stats"))
    )
    columns = ["code", "date", "total_jobs", "failure_count", "avg_duration_ms"]
    return pd.DataFrame(cursor.fetchall(), columns=columns)


def print_drift(connection: psycopg.Connection, schema: str, old: pd.DataFrame, console: Console | None = None) -> None:
    """What the old counter said of one tenant beside what its job rows say, over the days that the counter knew.

    `old` is from `old_counters`. Its mean over the days can only be a mean of means weighted with jobs; the exact one
    comes from `duration_sum_ms` and `duration_count`.
    """
    # Rolled up by code: the last row, without a code, is the sum.
    exact = connection.execute(
        sql.SQL(
            """
            SELECT coalesce(action.code, 'unknown') AS code,
                   coalesce(sum(total_jobs) FILTER (WHERE stats.marketplace = 'vinted'), 0),
                   coalesce(sum(total_jobs) FILTER (WHERE stats.marketplace = 'ebay'), 0),
                   coalesce(sum(total_jobs) FILTER (WHERE stats.marketplace = 'etsy'), 0),
                   sum(failure_count), sum(duration_sum_ms), sum(duration_count)
              FROM {} AS stats
              LEFT JOIN public.marketplace_action_types AS action ON action.id = stats.action_type_id
             WHERE date BETWEEN %s AND %s
             GROUP BY ROLLUP (coalesce(action.code, 'unknown'))
             ORDER BY grouping(coalesce(action.code, 'unknown')), sum(total_jobs) DESC
            """
        ).format(sql.Identifier(schema, "marketplace_job_stats")),
        [old["date"].min(), old["date"].max()],
    ).fetchall()

    table = Table(
        title=f"{schema}, {old['date'].min()} to {old['date'].max()}: the old counter, and what the jobs say",
        caption="The old counter booked every marketplace as vinted.",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 0, 0, 1),  # Fits into 80 columns with seven-digit sums.
    )
    table.add_column("\naction", no_wrap=True)
    numbers = (
        "old jobs",
        "old failed",
        "old mean ms",
        "now vinted",
        "now ebay",
        "now etsy",
        "now failed",
        "exact mean ms",
    )
    for header in numbers:
        table.add_column(header.replace(" ", "\n", 1), justify="right", no_wrap=True)
    for code, vinted, ebay, etsy, failed, duration_sum, duration_count in exact:
        rows = old if code is None else old[old["code"] == code]
        if code is None:
            table.add_section()
        table.add_row(
            "all" if code is None else code,
            f"{rows['total_jobs'].sum():,}",
            f"{rows['failure_count'].sum():,}",
            _mean(int((rows["avg_duration_ms"] * rows["total_jobs"]).sum()), int(rows["total_jobs"].sum())),
            *(f"{number or 0:,}" for number in (vinted, ebay, etsy, failed)),
            _mean(duration_sum, duration_count),
        )
    (console or Console()).print(table)


def print_last_week(
    connection: psycopg.Connection, schemas: Sequence[str], today: date, console: Console | None = None
) -> None:
    """The last seven closed days by marketplace, over all the tenants named in `schemas` (at least one)."""
    week = sql.SQL(" UNION ALL ").join(
        sql.SQL("SELECT * FROM {} WHERE date >= %(first)s AND date < %(today)s").format(
            sql.Identifier(schema, "marketplace_job_stats")
        )
        for schema in schemas
    )
    first = today - timedelta(days=7)
    found = connection.execute(
        sql.SQL(
            """
            SELECT marketplace, sum(total_jobs), sum(success_count), sum(failure_count), sum(duration_sum_ms),
                   sum(duration_count), sum(total_tasks), sum(retry_count), sum(task_retry_count)
              FROM ({}) AS week
             GROUP BY ROLLUP (marketplace)
             ORDER BY grouping(marketplace), sum(total_jobs) DESC
            """
        ).format(week),
        {"first": first, "today": today},
    ).fetchall()

    table = Table(
        title=f"Last week, {first} to {today - timedelta(days=1)}, all {len(schemas)} tenants",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("\nmarketplace")
    for header in ("\njobs", "\nfailed", "success\nrate", "mean\nms", "\ntasks", "job\nretries", "task\nretries"):
        table.add_column(header, justify="right", no_wrap=True)
    for marketplace, jobs, succeeded, failed, duration_sum, duration_count, *others in found:
        if marketplace is None:
            table.add_section()
        table.add_row(
            marketplace or "all",
            f"{jobs or 0:,}",
            f"{failed or 0:,}",
            f"{succeeded / jobs:.1%}" if jobs else "-",
            _mean(duration_sum, duration_count),
            *(f"{number or 0:,}" for number in others),
        )
    (console or Console()).print(table)


def _mean(total: int | None, count: int | None) -> str:
    """The rounded mean of numbers that are not negative, halves upwards; a dash if there are none."""
    if not total or not count:
        return "0" if count else "-"
    return f"{(2 * int(total) + int(count)) // (2 * int(count)):,}"
