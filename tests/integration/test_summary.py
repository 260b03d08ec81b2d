"""The cross-tenant summary: every number equals an independent computation from the source rows."""

import random
import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import asdict
from datetime import date, datetime, timedelta, tzinfo
from fractions import Fraction
from typing import Any

import dagster as dg
import pandas as pd
import psycopg
import pytest
import sqlalchemy as sa

from assets.marketplace_daily_summary import asset
from assets.marketplace_daily_summary.aggregate import reasons_query
from pipelines import sensors
from pipelines.definitions import build_defs
from pipelines.settings import Settings
from tests import application
from tests.integration.common import (
    DAY,
    NOON,
    TENANTS,
    facts,
    failure,
    job,
    materialize,
    mean_of,
    metadata,
)
from tests.reference import (
    JOB_COLUMNS,
    JOB_NUMBERS,
    TASK_COLUMNS,
    TASK_NUMBERS,
    Day,
    exact_percentile,
    first_facts,
    frame,
    reference_durations,
    reference_rows,
    reference_waits,
    source_of,
)

pytestmark = pytest.mark.usefixtures("url")

SUMMARY = "marketplace_stats.marketplace_daily_summary"
FIRST, LAST = "2026-01-14", "2026-01-16"
CODES = {number: ("publish", "update", "delete")[(number - 1) % 3] for number in range(1, 10)}


def summarize(first: str = FIRST, last: str = LAST) -> dg.ExecuteInProcessResult:
    """A run of the summary over a range of days, in this process."""
    definitions = build_defs(Settings.from_env({"STATS_LOCK_TIMEOUT_MS": "300"}))
    summary_job = definitions.resolve_job_def("marketplace_daily_summary_job")
    tags = {"dagster/asset_partition_range_start": first, "dagster/asset_partition_range_end": last}
    return summary_job.execute_in_process(tags=tags, raise_on_error=False)


def rows(connection: psycopg.Connection[Any]) -> dict[tuple[Any, ...], dict[str, Any]]:
    """The table, by key."""
    with connection.cursor(row_factory=psycopg.rows.dict_row) as cursor:
        found = cursor.execute(f"SELECT * FROM {SUMMARY}").fetchall()
    return {(row["date"], row["marketplace"], row["action_code"]): row for row in found}


def key_of(row: Mapping[Any, Any]) -> tuple[Any, ...]:
    return row["date"], row["marketplace"], CODES.get(row["action_type_id"], "unknown")


def fill(connection: psycopg.Connection[Any], seed: int) -> dict[str, tuple[pd.DataFrame, pd.DataFrame]]:
    """Random jobs and tasks in each tenant, over the three days; their frames."""
    chance = random.Random(seed)
    frames = {}
    for tenant in TENANTS:
        jobs, tasks = [], []
        for number in range(1, 121):
            end = NOON + timedelta(hours=chance.randrange(-36, 36))
            start = end - timedelta(milliseconds=chance.randrange(90_000))
            jobs.append(
                job(
                    id=number,
                    marketplace=chance.choice(("vinted", "vinted", "ebay", "etsy", "depop")),
                    action_type_id=chance.choice((1, 1, 1, 2, 4, 7, 77, 78)),
                    status=chance.choice(("completed", "failed", "failed", "cancelled")),
                    retry_count=chance.randrange(3),
                    error_message=chance.choice((None, *(f"HTTP {500 + number}" for number in range(8)))),
                    started_at=None if number % 9 == 0 else start,
                    completed_at=end,
                    created_at=start - timedelta(milliseconds=chance.randrange(chance.choice((2, 90_000)))),
                )
            )
            status = chance.choice(("success", "failed", "timeout"))
            task = {"id": number, "job_id": chance.randrange(1, 121), "status": status}
            tasks.append({**task, "retry_count": number % 2, "completed_at": end})
        for table, found in (("marketplace_jobs", jobs), ("marketplace_tasks", tasks)):
            connection.execute(f"DELETE FROM {tenant}.{table}")
            application.insert(connection, tenant, table, found)
        frames[tenant] = (frame(jobs, JOB_COLUMNS), frame(tasks, TASK_COLUMNS))
    return frames


def set_definitions(connection: psycopg.Connection[Any], days: list[date]) -> set[tuple[str, date]]:
    """Makes all days of the newest definition, but three; those."""
    for tenant in TENANTS:
        connection.execute(f"UPDATE {tenant}.marketplace_job_stats_days SET definition = 2")
    ledgers = [(f"{tenant}.marketplace_job_stats_days", day) for tenant, day in zip(TENANTS, days, strict=True)]
    (old, held_back, unknown) = ledgers
    connection.execute(f"UPDATE {old[0]} SET definition = 1 WHERE date = %s", [old[1]])
    connection.execute(f"UPDATE {held_back[0]} SET outcome = 'held_back' WHERE date = %s", [held_back[1]])
    connection.execute(f"DELETE FROM {unknown[0]} WHERE date = %s", [unknown[1]])
    return set(zip(TENANTS, days, strict=True))


def test_every_number_equals_the_reference(connection: psycopg.Connection[Any]) -> None:
    """Sums, tenants, percentiles, who fails most and why, from the source rows; replay writes nothing."""
    sources = fill(connection, seed=1)
    materialize(FIRST, LAST)
    start = NOON.replace(hour=0) - timedelta(days=1)
    days = [Day((start + timedelta(n)).date(), start + timedelta(n), start + timedelta(n + 1)) for n in range(3)]
    sums: defaultdict[Any, Counter[str]] = defaultdict(Counter)
    tenants: defaultdict[Any, set[str]] = defaultdict(set)
    failures: defaultdict[Any, Counter[str]] = defaultdict(Counter)
    durations: defaultdict[Any, list[int]] = defaultdict(list)
    waits: defaultdict[Any, list[int]] = defaultdict(list)
    reasons: defaultdict[Any, defaultdict[str, Counter[str]]] = defaultdict(lambda: defaultdict(Counter))
    for tenant, (jobs, tasks) in sources.items():
        for of_tenant in reference_rows(jobs, tasks, days).to_dict("records"):
            key = key_of(of_tenant)
            sums[key].update({name: of_tenant[name] for name in (*JOB_NUMBERS, *TASK_NUMBERS)})
            tenants[key].add(tenant)
            failures[key][tenant] += of_tenant["failure_count"]
        for duration in reference_durations(jobs, days).to_dict("records"):
            durations[key_of(duration)].append(duration["duration_ms"])
        for wait in reference_waits(jobs, days).to_dict("records"):
            waits[key_of(wait)].append(wait["wait_ms"])
        for fact in first_facts(source_of(jobs, tasks), days):
            if fact.failure_reason:
                reasons[key_of(asdict(fact))][fact.failure_reason][tenant] += 1
    older = set_definitions(connection, [day.date for day in days])
    result = summarize()
    assert result.success

    found = rows(connection)
    assert found.keys() == sums.keys()
    assert len(found) > 20
    for key, row in found.items():
        assert {name: row[name] for name in sums[key]} == dict(sums[key])
        assert row["tenants_active"] == len(tenants[key])
        ran = sums[key]["total_jobs"]
        assert row["success_rate"] == (pytest.approx(sums[key]["success_count"] / ran) if ran else None)
        worst = sorted((-n, tenant) for tenant, n in failures[key].items() if n)
        assert row["top_failing"] == [{"tenant": tenant, "failures": -n} for n, tenant in worst]
        for measure, exact in (("duration", durations[key]), ("wait", waits[key])):
            assert row[f"avg_{measure}_ms"] == mean_of(exact)
            for percent in (50, 95, 99) if measure == "duration" else (50, 95):
                q = Fraction(percent, 100)
                expected = pytest.approx(exact_percentile(exact, q), rel=0.01) if exact else None
                assert row[f"p{percent}_{measure}_ms"] == expected
        assert (row["wait_count"], row["wait_sum_ms"]) == (len(waits[key]), sum(waits[key]))
        assert sum(row["wait_sketch_counts"] or ()) == len(waits[key])
        most = sorted((-of_tenants.total(), reason) for reason, of_tenants in reasons[key].items())[:5]
        assert row["top_reasons"] == [
            {"reason": reason, "jobs": -number, "tenants": len(reasons[key][reason])} for number, reason in most
        ]
        assert row["tenants_older_definition"] == sum((tenant, key[0]) in older for tenant in tenants[key])
    assert max(len(of_key) for of_key in reasons.values()) > 5
    assert {row["tenants_older_definition"] for row in found.values()} == {0, 1}

    # The asset can be loaded as a frame.
    with dg.instance_for_test() as instance:
        definitions = build_defs(Settings.from_env({}))
        loaded: Any = definitions.load_asset_value("marketplace_daily_summary", partition_key=DAY, instance=instance)
    assert len(loaded) == sum(key[0] == NOON.date() for key in found)
    assert all(
        found[row["date"], row["marketplace"], row["action_code"]].items() >= row.items()
        for row in loaded.to_dict("records")
    )

    reported = metadata(result)
    assert {day: values["jobs"] for day, values in reported.items()} == {
        str(day.date): sum(n["total_jobs"] for key, n in sums.items() if key[0] == day.date) for day in days
    }
    assert [values["tenants_older_definition"] for values in reported.values()] == [1, 1, 1]
    names = ("expected", "computed", "held_back", "open", "counter_only", "missing")
    assert [[values[f"tenants_{name}"] for name in names] for values in reported.values()] == [
        [3, 3, 0, 0, 0, 0],
        [3, 2, 1, 0, 0, 0],
        [3, 2, 0, 0, 1, 0],
    ]
    assert len(reported[LAST]["run_preview"]) == 20
    first = reported[LAST]["run_preview"][0]
    busiest = found[date.fromisoformat(first["date"]), first["marketplace"], first["action"]]
    [most, *_] = busiest["top_reasons"]
    assert first["top reason"] == f"{most['reason']} ({most['jobs']})"
    assert first["p95 wait ms"] == round(busiest["p95_wait_ms"])

    states = [f"SELECT ctid, xmin, * FROM {table} ORDER BY ctid" for table in (SUMMARY, f"{SUMMARY}_days")]
    before = [connection.execute(state).fetchall() for state in states]
    assert summarize().success
    assert [connection.execute(state).fetchall() for state in states] == before


def test_what_changed_is_changed_alone(connection: psycopg.Connection[Any]) -> None:
    """Rows come, change and go with the stats; other days are left alone."""
    fill(connection, seed=2)
    materialize(FIRST, LAST)
    summarize()
    before = rows(connection)
    fill(connection, seed=3)
    materialize(DAY, DAY)
    changes = metadata(summarize(DAY, DAY))[DAY]
    after = rows(connection)
    assert {key: row for key, row in after.items() if str(key[0]) != DAY} == {
        key: row for key, row in before.items() if str(key[0]) != DAY
    }
    changed = [key for key, row in after.items() if key in before and row != before[key]]
    assert (changes["run_rows_inserted"], changes["run_rows_updated"], changes["run_rows_deleted"]) == (
        len(after.keys() - before.keys()),
        len(changed),
        len(before.keys() - after.keys()),
    )
    assert changed


def test_tenants_that_cannot_be_read_are_named(connection: psycopg.Connection[Any]) -> None:
    """The others are added up and written; the run has failed, and says who is not in it."""
    for tenant in TENANTS:
        application.insert(connection, tenant, "marketplace_jobs", [job(id=1)])
    materialize()
    for tenant in TENANTS:
        facts(connection, tenant, {"HTTP 429": 1}, first_id=100)
    connection.execute("""
        DROP TABLE user_1.marketplace_job_stats_days;
        REVOKE SELECT ON user_10.marketplace_job_stats FROM stats""")
    result = summarize(DAY, DAY)
    assert failure(result).startswith("2 tenants could not be read. user_1: marketplace_job_stats_days is missing")
    assert "user_10: permission denied for table marketplace_job_stats (SQLSTATE 42501)" in failure(result)
    [row] = rows(connection).values()
    assert (row["total_jobs"], row["tenants_active"]) == (1, 1)
    assert row["top_reasons"] == [{"reason": "HTTP 429", "jobs": 1, "tenants": 1}]


def test_a_row_in_which_nothing_ran_is_of_no_definition(connection: psycopg.Connection[Any]) -> None:
    """What the old live counter has left with zeros counts neither as active nor as older; with jobs, as both."""
    for tenant, jobs in zip(TENANTS, (0, 2, 3), strict=True):
        left = {"action_type_id": 1, "marketplace": "vinted", "date": DAY, "total_jobs": jobs, "success_count": jobs}
        application.insert(connection, tenant, "marketplace_job_stats", [left])
    reported = metadata(summarize(DAY, DAY))[DAY]
    [row] = rows(connection).values()
    assert (row["total_jobs"], row["tenants_active"], row["tenants_older_definition"]) == (5, 2, 2)
    assert (row["wait_count"], row["p95_wait_ms"]) == (0, None)
    assert reported["tenants_older_definition"] == 2


def test_a_reason_that_is_rare_in_each_batch_may_be_the_first_of_all(
    connection: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The batches are added up before the most frequent reasons are chosen. Equal ones are in order of their text, and
    only those of failed jobs of the row's own day count.
    """
    monkeypatch.setattr(asset, "BATCH", 1)
    for tenant in TENANTS:
        application.insert(connection, tenant, "marketplace_jobs", [job(id=1, status="failed")])
    materialize()
    for number, tenant in enumerate(TENANTS):
        numbers = {f"only here, {tenant}: {letter}": 3 for letter in "ABCDE"} | {"everywhere": 2}
        facts(connection, tenant, numbers, first_id=100)
        facts(connection, tenant, {"another day": 9}, 200, date=NOON.date() + timedelta(days=1 + number))
        facts(connection, tenant, {"not failed": 9}, 300, status="cancelled")
        facts(connection, tenant, {None: 9}, 400)
    assert summarize(DAY, DAY).success
    [row] = rows(connection).values()
    others = [{"reason": f"only here, user_10: {letter}", "jobs": 3, "tenants": 1} for letter in "ABCD"]
    assert row["top_reasons"] == [{"reason": "everywhere", "jobs": 6, "tenants": 3}, *others]


def test_a_tenant_whose_facts_cannot_be_read_keeps_its_numbers(connection: psycopg.Connection[Any]) -> None:
    """Its jobs are in the sums; the run has failed, and says whose reasons are missing."""
    for tenant in TENANTS:
        application.insert(connection, tenant, "marketplace_jobs", [job(id=1, status="failed")])
    materialize()
    for tenant in TENANTS:
        facts(connection, tenant, {"HTTP 429": 1}, first_id=100)
    connection.execute("""
        DROP TABLE user_1.marketplace_job_facts;
        REVOKE SELECT ON user_10.marketplace_job_facts FROM stats""")
    result = summarize(DAY, DAY)
    assert failure(result).startswith("2 tenants could not be read for the failure reasons. user_")
    assert re.search("user_1: relation .*marketplace_job_facts.* does not exist", failure(result))
    assert "user_10: permission denied for table marketplace_job_facts" in failure(result)
    [row] = rows(connection).values()
    assert (row["failure_count"], row["tenants_active"]) == (3, 3)
    assert row["top_reasons"] == [{"reason": "HTTP 429", "jobs": 1, "tenants": 1}]
    assert metadata(result)[DAY]["run_tenants_without_reasons"] == 2


def test_a_tenant_whose_jobs_are_gone_keeps_its_numbers(connection: psycopg.Connection[Any]) -> None:
    """What is stored is added up, whatever has become of the source; a schema that never had anything is no failure."""
    for tenant in TENANTS:
        application.insert(connection, tenant, "marketplace_jobs", [job(id=1)])
    materialize()
    connection.execute("DROP TABLE user_1.marketplace_jobs; CREATE SCHEMA user_3")
    assert summarize(DAY, DAY).success
    [row] = rows(connection).values()
    assert (row["total_jobs"], row["tenants_active"]) == (3, 3)


def test_the_facts_of_a_day_are_found_by_their_index(connection: psycopg.Connection[Any], engine: sa.Engine) -> None:
    """Whatever a tenant has of other days is not read."""
    connection.execute("""
        INSERT INTO user_1.marketplace_job_facts
            (job_id, created_at, completed_at, date, action_type_id, retry_count, marketplace, status, failure_reason)
        SELECT n, now(), now(), date '2025-01-01' + n % 365, 1, 0, 'vinted', 'failed', 'HTTP 429'
          FROM generate_series(1, 20000) n;
        ANALYZE user_1.marketplace_job_facts""")
    parameters: dict[str, Any] = {"first_date": date(2025, 7, 1), "last_date": date(2025, 7, 3)}
    parameters |= {name: [] for name in ("action_type_ids", "action_codes", "action_names")}
    query = reasons_query(["user_1"])
    with engine.connect() as reader:
        jobs = [row.jobs for row in reader.execute(query, parameters)]
        compiled = query.compile(reader, compile_kwargs={"render_postcompile": True})
        explained = reader.exec_driver_sql(f"EXPLAIN {compiled}", compiled.construct_params(parameters))
        plan = "\n".join(explained.scalars())
    assert jobs == [55] * 3
    assert "Index Cond: ((date >= '2025-07-01'::date) AND (date <= '2025-07-03'::date))" in plan
    assert "Seq Scan" not in plan


def test_where_nobody_can_be_read_nothing_is_changed(connection: psycopg.Connection[Any]) -> None:
    """The rows that are there stay: that no tenant answers does not mean that there were no jobs."""
    fill(connection, seed=4)
    materialize(FIRST, LAST)
    summarize()
    before = rows(connection)
    for tenant in TENANTS:
        connection.execute(f"REVOKE SELECT ON {tenant}.marketplace_job_stats FROM stats")
    assert failure(summarize()).startswith("No tenant could be read in database test_")
    assert rows(connection) == before != {}


def test_days_without_jobs_have_no_rows(connection: psycopg.Connection[Any]) -> None:
    """An empty database is a summary without rows, and a success."""
    assert summarize().success
    assert rows(connection) == {}


class Tomorrow(datetime):
    """The clock of the next day."""

    @classmethod
    def now(cls, tz: tzinfo | None = None) -> datetime:  # type: ignore[override]
        return datetime.now(tz) + timedelta(days=1)


def test_the_sensor_asks_for_what_is_newer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Days whose stats were materialized after their summary, one run for each chain, and asked for once a day."""
    stats, summary = dg.AssetKey(["marketplace_job_stats"]), dg.AssetKey(["marketplace_daily_summary"])
    sensor = build_defs(Settings.from_env({})).resolve_sensor_def("marketplace_daily_summary_sensor")

    def ask(instance: dg.DagsterInstance) -> list[tuple[str, str, str | None]]:
        data = sensor.evaluate_tick(dg.build_sensor_context(instance, sensor_name=sensor.name))
        return [
            (
                request.tags["dagster/asset_partition_range_start"],
                request.tags["dagster/asset_partition_range_end"],
                request.run_key,
            )
            for request in data.run_requests or ()
        ]

    def materialized(instance: dg.DagsterInstance, key: dg.AssetKey, *days: int) -> None:
        for day in days:
            instance.report_runless_asset_event(dg.AssetMaterialization(key, partition=f"2026-01-{day:02}"))

    with dg.instance_for_test() as instance:
        assert ask(instance) == []
        materialized(instance, stats, 3, 4, 5, 9)
        first = ask(instance)
        assert [request[:2] for request in first] == [("2026-01-03", "2026-01-05"), ("2026-01-09", "2026-01-09")]
        assert ask(instance) == first
        with monkeypatch.context() as tomorrow:
            tomorrow.setattr(sensors, "datetime", Tomorrow)
            again_tomorrow = ask(instance)
            assert [request[:2] for request in again_tomorrow] == [request[:2] for request in first]
            assert not {request[2] for request in again_tomorrow} & {request[2] for request in first}
        materialized(instance, summary, 3, 4, 5, 9)
        assert ask(instance) == []
        materialized(instance, stats, 4)
        [again] = ask(instance)
        assert again[:2] == ("2026-01-04", "2026-01-04")
        assert again[2] not in [request[2] for request in first]
