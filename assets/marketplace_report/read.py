"""What the report is made from, of all customers or of one: read in the database, and nothing is computed here.

Of all customers, the numbers are those of the summary. The customers that failed most, and the journal of changes, come
from the tenants' own tables, a batch of tenants at a time; only of few customers a day, so that the page stays small.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from datetime import date
from typing import TYPE_CHECKING, Any

import dagster as dg
import sqlalchemy as sa
from psycopg import sql

from assets.marketplace_report.numbers import PERIODS
from assets.reporting import explain
from models.stats import MarketplaceJobFact, MarketplaceJobStats, MarketplaceJobStatsChange, MarketplaceJobStatsDay
from pipelines.action_types import UNKNOWN, action_types
from pipelines.completeness import OUTCOMES, Record
from pipelines.partitions import Window
from pipelines.resources import TenantDatabase
from pipelines.settings import UsageError
from pipelines.tenants import choose_tenants, quoted

if TYPE_CHECKING:
    import pandas as pd

BATCH = 50
"""How many tenants one statement reads."""
WORST = 5
"""How many customers of a day are named, over all marketplaces and for each of them: those that failed most."""
MOST_CHANGES = 2_000
"""How many changes of settled days are on the page, the newest ones."""

_stats, _ledger, _facts, _journal = (
    model.__tablename__
    for model in (MarketplaceJobStats, MarketplaceJobStatsDay, MarketplaceJobFact, MarketplaceJobStatsChange)
)


_Rows = Sequence[Mapping[Any, Any]]


@dataclass(frozen=True)
class Material:
    """What a page is made from.

    `customers`: of some customers and days the rows of their stats, as `date`, `tenant`, `marketplace`, `action_code`,
    `total_jobs`, `failure_count`, `reason` and `reason_jobs`, the most frequent reason and how many jobs failed by it.
    `changes`: what a run changed in settled days, as `date`, `marketplace`, `action_code`, `cause`, `changed_at`,
    `run_id`, how many `tenants`, one of them (`tenant`), and the sums of the journal's numbers.
    `records`: how complete the days are; see `pipelines.completeness`.
    `unread`: the tenants whose customers' numbers or journals are missing, with the reason.
    """

    frame: "pd.DataFrame"
    tenant: str | None = None
    customers: Sequence[Mapping[str, Any]] = ()
    changes: Sequence[Mapping[str, Any]] = ()
    records: Mapping[date, Record] = field(default_factory=dict)
    unread: Mapping[str, str] = field(default_factory=dict)


def shown_and_before(partitions: dg.DailyPartitionsDefinition) -> Window:
    """The closed days that the page shows, and as many before them, to compare with. Raises UsageError without any."""
    return Window.of(partitions, partitions.get_partition_keys()[-2 * PERIODS[-1] :])


def of_all(database: TenantDatabase, engine: sa.Engine, connection: sa.Connection, window: Window) -> Material:
    """All customers together. Raises UsageError, or the summary's DBAPIError."""
    from assets.marketplace_daily_summary.table import read, read_days  # They need pandas: not for every import.

    frame, records = read(connection, window), read_days(connection, window)
    with connection.begin():
        found = choose_tenants(connection)
    named = _worst(frame, window.dates[-PERIODS[-1] :])
    readable = [tenant.schema for tenant in found if not tenant.unreadable]
    batches: list[Sequence[str]] = [readable[start : start + BATCH] for start in range(0, len(readable), BATCH)]
    parameters = _parameters(connection, window)
    customers: list[Mapping[Any, Any]] = []
    changes = _Changes()
    unread: dict[str, str] = {}

    def work(connection: sa.Connection, schemas: Sequence[str]) -> tuple[_Rows, _Rows]:
        of_batch = {schema: named[schema] for schema in schemas if schema in named}
        with connection.begin():
            customers = connection.execute(_customers(of_batch), parameters).mappings().all() if of_batch else []
            return customers, connection.execute(_changes(schemas), parameters).mappings().all()

    # A batch that fails is read tenant by tenant, to know which it was.
    for is_last in (False, True):
        again: list[Sequence[str]] = []
        with closing(database.for_each(engine, batches, work)) as outcomes:
            for batch, outcome in outcomes:
                if not isinstance(outcome, Exception):
                    customers += outcome[0]
                    changes.add(outcome[1])
                elif is_last:
                    unread[batch[0]] = explain(outcome)
                else:
                    again += [[schema] for schema in batch]
        batches = again
    return Material(frame, customers=customers, changes=changes.newest(), records=records, unread=unread)


def of_tenant(connection: sa.Connection, schema: str, window: Window) -> Material:
    """One customer, from its own tables. Raises UsageError, or a DBAPIError."""
    import pandas as pd

    from assets.marketplace_daily_summary.aggregate import batch_query, reasons_query, top_reasons
    from assets.marketplace_daily_summary.table import COLUMNS, KEY

    with connection.begin():
        [tenant] = choose_tenants(connection, [schema])
    if tenant.unreadable:
        raise UsageError(f"{schema} has no stats: {tenant.unreadable}.")
    parameters = _parameters(connection, window)
    changes = _Changes()
    with connection.begin():
        parts = connection.execute(batch_query([schema]), parameters).mappings().all()
        reasons = top_reasons(dict(row) for row in connection.execute(reasons_query([schema]), parameters).mappings())
        changes.add(connection.execute(_changes([schema]), parameters).mappings())
        days = f"SELECT date, outcome FROM {quoted(schema)}.{_ledger} WHERE date BETWEEN :first_date AND :last_date"
        outcomes = {row.date: row.outcome for row in connection.execute(sa.text(days), parameters)}
        first = connection.scalar(sa.text(f"SELECT min(date) FROM {quoted(schema)}.{_ledger}"))
    # There is no other batch to add up, so these are the rows of a summary of this customer alone.
    rows = [dict(row) | {"top_reasons": reasons.get(tuple(row[name] for name in KEY), [])} for row in parts]
    frame = pd.DataFrame(rows, columns=[*COLUMNS], dtype=object)
    records = _of_ledger(schema, outcomes, set(frame["date"]), first, window)
    return Material(frame, schema, changes=changes.newest(), records=records)


def _of_ledger(
    schema: str, outcomes: Mapping[date, str], with_rows: Container[date], first: date | None, window: Window
) -> dict[date, Record]:
    """How complete a customer's days are, by its ledger; before the first entry only days with rows are expected."""
    records: dict[date, Record] = {}
    for day in window.dates:
        outcome = outcomes.get(day, "counter_only" if day in with_rows else "missing")
        is_missing = outcome == "missing" and first is not None and first <= day
        if outcome != "missing" or is_missing:
            records[day] = {
                "tenants_expected": 1,
                "missing_tenants": [schema] * is_missing,
                **{f"tenants_{name}": int(name == outcome) for name in OUTCOMES},
            }
    return records


def _parameters(connection: sa.Connection, window: Window) -> dict[str, Any]:
    """What the statements are given: the window, and the action types as arrays."""
    types = action_types(connection) or {}
    return window.parameters | {
        "action_type_ids": list(types),
        "action_codes": [code for code, _ in types.values()],
        "action_names": [name for _, name in types.values()],
    }


def _worst(frame: "pd.DataFrame", days: Sequence[date]) -> dict[str, list[date]]:
    """The days on which each tenant is one of those that failed most, as far as the summary's rows name them."""
    failures: defaultdict[tuple[date, str | None], Counter[str]] = defaultdict(Counter)
    for row in frame[frame["date"].isin(days)][["date", "marketplace", "top_failing"]].to_dict("records"):
        for entry in row["top_failing"]:
            for marketplace in (None, row["marketplace"]):
                failures[row["date"], marketplace][entry["tenant"]] += entry["failures"]
    found: defaultdict[str, set[date]] = defaultdict(set)
    for (day, _), counts in failures.items():
        for tenant, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:WORST]:
            found[tenant].add(day)
    return {tenant: sorted(of_tenant) for tenant, of_tenant in found.items()}


def _of_each(schemas: Iterable[str], select: Callable[[str], str]) -> str:
    """The same SELECT from each tenant; `select` is given the quoted schema, and its name as a text of SQL."""
    return " UNION ALL ".join(
        select(quoted(schema)).replace(":schema", sql.Literal(schema).as_string()) for schema in schemas
    )


_ACTION = """
    LEFT JOIN unnest(CAST(:action_type_ids AS bigint[]), CAST(:action_codes AS text[])) AS action (id, code)
           ON action.id = action_type_id"""
_CODE = f"coalesce(action.code, '{UNKNOWN}') AS action_code"


def _customers(named: Mapping[str, Sequence[date]]) -> sa.TextClause:
    """What these tenants did on these days, by marketplace and action, and why most of their jobs failed."""
    days = {quoted(schema): f"'{{{','.join(map(str, of_tenant))}}}'" for schema, of_tenant in named.items()}
    key = "date, marketplace, action_type_id"
    stats = _of_each(
        named,
        lambda schema: (
            f"""SELECT :schema AS tenant, {key}, total_jobs, failure_count FROM {schema}.{_stats}
                            WHERE date = ANY (CAST({days[schema]} AS date[])) AND total_jobs > 0"""
        ),
    )
    facts = _of_each(
        named,
        lambda schema: (
            f"""SELECT :schema AS tenant, {key}, failure_reason, count(*) AS jobs FROM {schema}.{_facts}
                            WHERE date = ANY (CAST({days[schema]} AS date[]))
                              AND status = 'failed' AND failure_reason IS NOT NULL
                            GROUP BY {key}, failure_reason"""
        ),
    )
    return sa.text(f"""
        WITH stats AS ({stats}),
             reasons AS (SELECT DISTINCT ON (tenant, {key}) * FROM ({facts}) AS facts
                          ORDER BY tenant, {key}, jobs DESC, failure_reason)
        SELECT date, tenant, marketplace, {_CODE}, total_jobs, failure_count, failure_reason AS reason,
               coalesce(jobs, 0) AS reason_jobs
          FROM stats LEFT JOIN reasons USING (tenant, {key}) {_ACTION}""")


_BEFORE_AND_AFTER = ("total_jobs_before", "total_jobs_after", "failure_count_before", "failure_count_after")
_JOURNAL_SUMS = (
    *_BEFORE_AND_AFTER,
    "late_count",
    "corrected_count",
    "moved_in_count",
    "moved_out_count",
    "forgotten_count",
)


def _changes(schemas: Sequence[str]) -> sa.TextClause:
    """The journals of these tenants added up: one row for each run, cause, and row of the summary."""
    columns = ", ".join(("date", "marketplace", "action_type_id", "cause", "run_id", "changed_at", *_JOURNAL_SUMS))
    journal = _of_each(
        schemas,
        lambda schema: (
            f"""SELECT :schema AS tenant, {columns} FROM {schema}.{_journal}
                            WHERE date BETWEEN :first_date AND :last_date"""
        ),
    )
    # Null is a row that was not there: no jobs.
    sums = ", ".join(f"CAST(coalesce(sum({name}), 0) AS bigint) AS {name}" for name in _JOURNAL_SUMS)
    return sa.text(f"""
        SELECT date, marketplace, {_CODE}, cause, run_id, min(changed_at) AS changed_at,
               count(DISTINCT tenant) AS tenants, min(tenant) AS tenant, {sums}
          FROM ({journal}) AS journal {_ACTION}
         GROUP BY date, marketplace, action_code, cause, run_id""")


class _Changes:
    """The rows of `_changes` of all batches, which share no tenant, added up as they come."""

    def __init__(self) -> None:
        self._rows: dict[tuple[Any, ...], dict[Any, Any]] = {}

    def add(self, rows: Iterable[Mapping[Any, Any]]) -> None:
        for row in rows:
            key = tuple(row[name] for name in ("date", "marketplace", "action_code", "cause", "run_id"))
            known = self._rows.setdefault(key, {**row, **dict.fromkeys(("tenants", *_JOURNAL_SUMS), 0)})
            for name in ("tenants", *_JOURNAL_SUMS):
                known[name] += row[name]
            for name in ("changed_at", "tenant"):
                known[name] = min(known[name], row[name])

    def newest(self) -> list[dict[Any, Any]]:
        order = ("changed_at", "date", "marketplace", "action_code")
        rows = sorted(self._rows.values(), key=lambda row: tuple(row[name] for name in order), reverse=True)
        return rows[:MOST_CHANGES]
