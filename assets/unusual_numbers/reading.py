"""The numbers of a day and of its baseline days: of all tenants from the summary, of each tenant from its own stats.

The database adds up the tenants' rows and counts what is above a percentile, some tenants at a time, so that no sketch
of a tenant travels, and the rest is small: a row for each tenant, marketplace and day.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from typing import Any

import pandas as pd
import sqlalchemy as sa
from psycopg import sql

from assets.marketplace_daily_summary.table import summary
from assets.sketch import DURATION, GAMMA, MEASURES, VERSION, WAIT, ZERO_KEY, percentile
from assets.unusual_numbers.statistics import ALL
from models.stats import MarketplaceJobFact, MarketplaceJobStats, MarketplaceJobStatsDay
from pipelines.tenants import quoted

MOST_MISSING = 0.01
"""The share of tenants that may be missing on a day which all tenants together are compared on."""

_stats, _ledger, _facts = (
    model.__tablename__ for model in (MarketplaceJobStats, MarketplaceJobStatsDay, MarketplaceJobFact)
)
_PLURALS = {DURATION.name: "durations", WAIT.name: "waits"}
COLUMNS = (
    "tenant",
    "marketplace",
    "action",
    "date",
    "jobs",
    "failures",
    *(f"{long}{plural}" for plural in _PLURALS.values() for long in ("", "long_")),
    *(f"{usual}p95_{name}_ms" for name in _PLURALS for usual in ("", "usual_")),
)


def tenants_query(schemas: Sequence[str]) -> sa.TextClause:
    """What these tenants did: a row for each tenant, marketplace that it uses, and day that its ledger has as computed,
    with the COLUMNS but `action`; tenants as their places among the schemas, percentiles as keys of sketches.

    Parameters: `day`, and `dates`, an array with the day and its baseline days.
    """
    # Whole numbers, and no collation: to sort the buckets by texts would take longer than all the rest.
    read = 'date, marketplace::text COLLATE "C" AS marketplace, total_jobs, failure_count, ' + ", ".join(
        name for measure in MEASURES for name in measure.sketch
    )
    unnested = " UNION ALL ".join(
        f"SELECT {place}, key, number FROM unnest({one.keys}, {one.counts}) AS b (key, number) "
        f"WHERE {one.version} = {VERSION}"
        for place, one in enumerate(MEASURES)
    )
    joined = "\n".join(
        f"LEFT JOIN above AS {name} ON ({name}.tenant, {name}.marketplace, {name}.date, {name}.measure) "
        f"= (series.tenant, series.marketplace, ledger.date, {place})\n"
        f"LEFT JOIN p95 AS p95_{name} ON (p95_{name}.tenant, p95_{name}.marketplace, p95_{name}.measure) "
        f"= (series.tenant, series.marketplace, {place})"
        for place, name in enumerate(_PLURALS)
    )
    numbers = ", ".join(
        f"coalesce({name}.times, 0) AS {plural}, coalesce({name}.long_times, 0) AS long_{plural}, "
        f"p95_{name}.today AS p95_{name}_ms, p95_{name}.usual AS usual_p95_{name}_ms"
        for name, plural in _PLURALS.items()
    )
    return sa.text(f"""
        WITH stored AS ({_of_each(schemas, _stats, read)}),
        ledger AS ({_of_each(schemas, _ledger, "date", "AND outcome = 'computed'")}),
        -- Only days that were computed: else it is not known what is in their rows.
        days AS (SELECT stored.* FROM stored JOIN ledger USING (tenant, date)),
        series AS (SELECT DISTINCT tenant, marketplace FROM days),
        sums AS (SELECT tenant, marketplace, date, sum(total_jobs)::bigint AS jobs,
                        sum(failure_count)::bigint AS failures
                   FROM days GROUP BY tenant, marketplace, date),
        -- The buckets of the sketches, all actions together.
        buckets AS (SELECT tenant, marketplace, date, measure, key, sum(number)::bigint AS number
                      FROM days, LATERAL ({unnested}) AS bucket (measure, key, number)
                     GROUP BY tenant, marketplace, date, measure, key),
        running AS (SELECT tenant, marketplace, measure, date = :day AS is_today, key,
                           sum(sum(number)) OVER up_to AS up_to, sum(sum(number)) OVER whole AS whole
                      FROM buckets
                     GROUP BY tenant, marketplace, measure, date = :day, key
                    WINDOW whole AS (PARTITION BY tenant, marketplace, measure, date = :day),
                           up_to AS (whole ORDER BY key)),
        -- The keys of the 95th percentiles of the day, and of the baseline days together.
        p95 AS (SELECT tenant, marketplace, measure, min(key) FILTER (WHERE is_today) AS today,
                       min(key) FILTER (WHERE NOT is_today) AS usual
                  FROM running WHERE 20 * up_to >= 19 * whole
                 GROUP BY tenant, marketplace, measure),
        above AS (SELECT tenant, marketplace, date, measure, sum(number)::bigint AS times,
                         (sum(number) FILTER (WHERE key > usual))::bigint AS long_times
                    FROM buckets JOIN p95 USING (tenant, marketplace, measure)
                   GROUP BY tenant, marketplace, date, measure)
        SELECT series.tenant, series.marketplace, ledger.date, coalesce(jobs, 0) AS jobs,
               coalesce(failures, 0) AS failures, {numbers}
          FROM series JOIN ledger USING (tenant)
          LEFT JOIN sums ON (sums.tenant, sums.marketplace, sums.date) =
                            (series.tenant, series.marketplace, ledger.date)
          {joined}
    """)


def ledgers_query(schemas: Sequence[str]) -> sa.TextClause:
    """Of each of these tenants: `tenant`, its `first_date` in the ledger, and which of the `dates` it has, computed."""
    return sa.text(
        " UNION ALL ".join(
            f"SELECT {sql.Literal(schema).as_string()} AS tenant, min(date) AS first_date, "
            "array_agg(date) FILTER (WHERE date = ANY (CAST(:dates AS date[])) AND outcome = 'computed') AS computed "
            f"FROM {quoted(schema)}.{_ledger}"
            for schema in schemas
        )
    )


def _of_each(schemas: Sequence[str], table: str, columns: str, condition: str = "") -> str:
    return " UNION ALL ".join(
        f"SELECT {place} AS tenant, {columns} FROM {quoted(schema)}.{table} "
        f"WHERE date = ANY (CAST(:dates AS date[])) {condition}"
        for place, schema in enumerate(schemas)
    )


def tenants_frame(rows: Sequence[Mapping[Any, Any]], schemas: Sequence[str]) -> pd.DataFrame:
    """The rows of `tenants_query` of a batch as a frame with the COLUMNS."""
    frame = pd.DataFrame([dict(row) for row in rows], columns=[name for name in COLUMNS if name != "action"])
    frame["action"] = ALL
    frame["tenant"] = frame["tenant"].map(dict(enumerate(schemas))).astype(object)
    for name in COLUMNS:
        if name.endswith("_ms"):
            key = frame[name].astype(float)
            frame[name] = (2 / (GAMMA + 1) * GAMMA**key).mask(key == ZERO_KEY, 0.0)
    return frame[list(COLUMNS)]


def missing_share(ledgers: Iterable[Mapping[Any, Any]], failed: int, dates: Sequence[date]) -> dict[date, float]:
    """The share of tenants that are missing on each of the dates; those that failed to be read, on all.

    A tenant is expected from its first day in the ledger on.
    """
    missing: Counter[date] = Counter()
    expected: Counter[date] = Counter()
    for ledger in ledgers:
        known = [day for day in dates if ledger["first_date"] and day >= ledger["first_date"]]
        expected.update(known)
        missing.update(set(known) - set(ledger["computed"] or ()))
    return {day: (missing[day] + failed) / max(1, expected[day] + failed) for day in dates}


def summary_rows(connection: sa.Connection, dates: Sequence[date]) -> pd.DataFrame:
    """The rows of the summary of these days, with what is needed here."""
    names = ("date", "marketplace", "action_code", "total_jobs", "failure_count", "top_reasons")
    query = sa.select(
        *(summary.c[name] for name in names), *(summary.c[name] for one in MEASURES for name in one.sketch)
    ).where(summary.c.date.in_(list(dates)))
    with connection.begin():
        return pd.DataFrame([dict(row) for row in connection.execute(query).mappings()], dtype=object)


def fleet_frame(rows: pd.DataFrame, day: date, dates: Sequence[date]) -> pd.DataFrame:
    """All tenants together as a frame with the COLUMNS: a row for each marketplace and action, and for all, on each of
    the dates, which are the complete ones."""
    rows = rows[rows["date"].isin(list(dates))]
    series = [(ALL, ALL, rows)]
    series += [(str(key[0]), str(key[1]), group) for key, group in rows.groupby(["marketplace", "action_code"])]
    records = []
    for marketplace, action, group in series:
        of_day = {one: group[group["date"] == one] for one in dates}
        usual = {one.name: _p95(one.merge(group[group["date"] != day])) for one in MEASURES}
        for one, part in of_day.items():
            record: dict[str, Any] = {"tenant": "", "marketplace": marketplace, "action": action, "date": one}
            record |= {"jobs": int(part["total_jobs"].sum()), "failures": int(part["failure_count"].sum())}
            for measure in MEASURES:
                merged, limit = measure.merge(part), usual[measure.name]
                plural = _PLURALS[measure.name]
                record[plural] = sum(merged.values())
                record[f"long_{plural}"] = sum(
                    number for key, number in merged.items() if limit is not None and _ms(key) > limit
                )
                record[f"p95_{measure.name}_ms"] = _p95(merged)
                record[f"usual_p95_{measure.name}_ms"] = limit
            records.append(record)
    return pd.DataFrame(records, columns=list(COLUMNS))


def _ms(key: int) -> float:
    return 0.0 if key == ZERO_KEY else 2 / (GAMMA + 1) * GAMMA**key


def _p95(sketch: Mapping[int, int]) -> float | None:
    return percentile(sketch, 19, 20)


def tenant_reasons(
    connection: sa.Connection, schema: str, marketplace: str, day: date, dates: Sequence[date]
) -> list[tuple[date, str, int]]:
    """Why the tenant's jobs failed on these dates: date, reason, and how many."""
    query = sa.text(f"""
        SELECT date, failure_reason, count(*) FROM {quoted(schema)}.{_facts}
         WHERE date = ANY (CAST(:dates AS date[])) AND marketplace = :marketplace
           AND status = 'failed' AND failure_reason IS NOT NULL
         GROUP BY date, failure_reason
    """)
    parameters = {"dates": list(dates), "marketplace": marketplace}
    with connection.begin():
        return [(row[0], row[1], row[2]) for row in connection.execute(query, parameters)]


def fleet_reasons(rows: pd.DataFrame, marketplace: str, action: str) -> list[tuple[date, str, int]]:
    """The same of all tenants, of the most frequent reasons that the summary's rows name."""
    if marketplace != ALL:
        rows = rows[(rows["marketplace"] == marketplace) & (rows["action_code"] == action)]
    return [
        (day, entry["reason"], entry["jobs"])
        for day, entries in zip(rows["date"], rows["top_reasons"], strict=True)
        for entry in entries
    ]


def grown(reasons: Iterable[tuple[date, str, int]], day: date, before: int) -> list[tuple[str, float]]:
    """The five reasons that grew most: by how many jobs more than on average on so many days before."""
    growth: Counter[str] = Counter()
    for of, reason, jobs in reasons:
        growth[reason] += jobs if of == day else -jobs / max(1, before)  # type: ignore[assignment]
    return [(reason, jobs) for reason, jobs in growth.most_common(5) if jobs >= 1]
