"""The check for what is unusual, on real databases: it reads what the jobs say, and what it finds is posted once."""

import json
from collections.abc import Iterator
from datetime import date, datetime, timedelta
from fractions import Fraction
from typing import Any

import dagster as dg
import psycopg
import pytest
import sqlalchemy as sa

from assets.unusual_numbers import reading
from pipelines import alerts
from pipelines.definitions import build_defs
from pipelines.settings import Settings
from tests import application
from tests.integration.common import TENANTS, calm_time, job, materialize
from tests.integration.test_alerts import Receiver, receiver
from tests.integration.test_summary import summarize
from tests.reference import exact_percentile

__all__ = ["receiver"]
pytestmark = pytest.mark.usefixtures("url")

CHECK = "nothing_is_unusual"


@pytest.fixture
def day(monkeypatch: pytest.MonkeyPatch) -> date:
    """Yesterday, where no day ends while the test runs."""
    now = calm_time()
    monkeypatch.setenv("STATS_TIMEZONE", str(now.tzinfo))
    return now.date() - timedelta(days=1)


def dates_of(day: date) -> list[date]:
    return [day - timedelta(weeks=week) for week in range(8, -1, -1)]


def fill(connection: psycopg.Connection[Any], day: date) -> dict[str, list[dict[str, Any]]]:
    """Sixty jobs of each tenant on the day and its baseline days, of which two fail; of user_2, all of the day."""
    zone, made = calm_time().tzinfo, {}
    for tenant in TENANTS:
        rows = []
        for one in dates_of(day):
            for number in range(60):
                is_cut_off = tenant == "user_2" and one == day
                fails = is_cut_off or number in (7, 31)
                end = datetime(one.year, one.month, one.day, 12, number, tzinfo=zone)
                start = end - timedelta(milliseconds=1000 + 37 * number)
                message = "HTTP 401: the connection has expired" if is_cut_off else f"HTTP {500 + number % 2}"
                rows.append(
                    job(
                        status="failed" if fails else "completed",
                        error_message=message if fails else None,
                        started_at=start,
                        completed_at=end,
                        created_at=start - timedelta(milliseconds=500 + 11 * number),
                    )
                )
        application.insert(connection, tenant, "marketplace_jobs", rows)
        made[tenant] = rows
    environment = {"STATS_TIMEZONE": str(zone)}
    assert materialize(str(dates_of(day)[0]), str(day), environment=environment).success
    return made


def check(instance: dg.DagsterInstance | None = None) -> dg.AssetCheckEvaluation:
    job = build_defs(Settings.from_env()).resolve_job_def("unusual_numbers_job")
    [evaluation] = job.execute_in_process(instance=instance).get_asset_check_evaluations()
    assert evaluation.check_name == CHECK and evaluation.severity == dg.AssetCheckSeverity.WARN
    return evaluation


def findings(evaluation: dg.AssetCheckEvaluation) -> list[dict[str, Any]]:
    found = evaluation.metadata["findings"]
    assert isinstance(found, dg.TableMetadataValue)
    return [dict(record.data) for record in found.records]


def test_what_is_read_is_what_the_jobs_say(
    connection: psycopg.Connection[Any], engine: sa.Engine, day: date, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Jobs, failures, and the times above the p95 of the baseline days; a day that a ledger lacks has no row, and one
    without jobs has zeros."""
    made = fill(connection, day)
    dates = dates_of(day)
    connection.execute("DELETE FROM user_1.marketplace_job_stats_days WHERE date = %s", [dates[2]])
    connection.execute("DELETE FROM user_10.marketplace_job_stats WHERE date = %s", [dates[3]])
    with engine.connect() as reader:
        rows = reader.execute(reading.tenants_query(TENANTS), {"dates": dates, "day": day}).mappings().all()
        ledgers = reader.execute(reading.ledgers_query(TENANTS), {"dates": dates}).mappings().all()
    frame = reading.tenants_frame(rows, TENANTS)
    found = {(row["tenant"], row["date"]): row for row in frame.to_dict("records")}
    assert len(found) == len(frame) == 3 * 9 - 1
    assert ("user_1", dates[2]) not in found
    empty = found["user_10", dates[3]]
    assert [empty[name] for name in ("jobs", "failures", "durations", "long_waits")] == [0] * 4
    share = reading.missing_share(ledgers, 0, dates)
    assert share == {one: (1 / 3 if one == dates[2] else 0.0) for one in dates}
    durations = [
        round((one["completed_at"] - one["started_at"]).total_seconds() * 1000) for one in made["user_2"][: 8 * 60]
    ]
    usual = exact_percentile(durations, Fraction(19, 20))
    row = found["user_2", day]
    assert row["usual_p95_duration_ms"] == pytest.approx(usual, rel=0.01)
    assert (row["jobs"], row["failures"], row["durations"], row["waits"]) == (60, 60, 60, 60)
    assert row["long_durations"] == pytest.approx(sum(one > usual for one in durations[:60]), abs=1)


def test_who_is_cut_off_is_named_with_the_reason(connection: psycopg.Connection[Any], day: date) -> None:
    """The tenant, what was expected and seen, and why; all tenants together too, of whom it is a third."""
    fill(connection, day)
    assert summarize(str(dates_of(day)[0]), str(day)).success
    evaluation = check()
    assert not evaluation.passed
    of_tenant = next(row for row in findings(evaluation) if row["who"] != "all tenants")
    assert (of_tenant["who"], of_tenant["marketplace"], of_tenant["what"]) == ("user_2", "vinted", "success rate")
    assert (of_tenant["seen"], of_tenant["jobs"]) == ("0.0%", 60)
    assert float(of_tenant["expected"].rstrip("%")) == pytest.approx(96.7, abs=1)
    assert of_tenant["reasons that grew most"] == "HTTP 401: the connection has expired (+60)"
    assert {row["who"] for row in findings(evaluation)} == {"user_2", "all tenants"}
    # Incomplete: what all did is not compared, each tenant still is.
    connection.execute("DELETE FROM user_1.marketplace_job_stats_days WHERE date = %s", [day])
    evaluation = check()
    assert {row["who"] for row in findings(evaluation)} == {"user_2"}
    assert "all tenants together are not looked at" in str(evaluation.description)
    # A tenant that cannot be read is named, and hides nobody.
    connection.execute("REVOKE SELECT ON user_10.marketplace_job_stats FROM stats")
    evaluation = check()
    assert {row["who"] for row in findings(evaluation)} == {"user_2"}
    assert "1 tenant could not be read. user_10: permission denied" in str(evaluation.description)


def test_without_history_nothing_is_said(connection: psycopg.Connection[Any], day: date) -> None:
    """A database without a job is no surprise."""
    evaluation = check()
    assert evaluation.passed
    assert str(evaluation.description).startswith(f"0 findings in 0 tests; {day}")


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    with dg.instance_for_test() as instance:
        yield instance


def test_each_finding_is_posted_once(
    receiver: Receiver,
    instance: dg.DagsterInstance,
    connection: psycopg.Connection[Any],
    day: date,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With a link; again neither by the next tick, nor after another evaluation; after a receiver that refused, yes."""
    monkeypatch.setenv("STATS_DAGSTER_URL", "https://dagster.example.com/")
    fill(connection, day)
    sensor = build_defs(Settings.from_env()).resolve_sensor_def("alert_on_unusual")
    cursor = None

    def tick() -> list[str]:
        nonlocal cursor
        before = len(receiver.received)
        context = dg.build_sensor_context(instance, cursor=cursor, sensor_name=sensor.name)
        cursor = sensor.evaluate_tick(context).cursor
        return [message["text"] for _, message in receiver.received[before:]]

    assert tick() == []
    check(instance)
    receiver.status = 500
    with pytest.raises(Exception, match="did not take the alert"):
        tick()
    receiver.status = 200
    [text] = tick()
    link = f"https://dagster.example.com/assets/marketplace_daily_summary?view=checks&checkDetail={CHECK}"
    assert text.splitlines()[0] == f"Unusual on {day}: {link}"
    assert "- user_2, vinted: success rate 0.0%, expected 9" in text
    assert text.endswith("(60 jobs); HTTP 401: the connection has expired (+60)")
    assert tick() == []
    check(instance)
    assert tick() == []
    # Now there is something to say of all tenants, too.
    assert summarize(str(dates_of(day)[0]), str(day)).success
    check(instance)
    [text] = tick()
    assert "all tenants" in text and "user_2" not in text
    assert json.loads(str(cursor))["day"] == str(day)


def test_the_alert_is_cut_where_a_chat_would(day: date) -> None:
    """The link comes first, and what does not fit is counted."""
    settings = Settings.from_env({"STATS_DAGSTER_URL": "https://h", "STATS_KEY_PREFIX": "eu"})
    key = dg.AssetCheckKey(dg.AssetKey(["eu", "marketplace_daily_summary"]), CHECK)
    row = {"who": "user_7", "marketplace": "ebay", "action": "publish", "what": "number of jobs", "expected": "10"}
    row |= {"seen": "90", "jobs": "90", "reasons that grew most": "none"}
    text = alerts._message(settings, key, str(day), [row] * 2, 3)
    assert text.startswith(f"Unusual on {day} (eu): https://h/assets/eu/marketplace_daily_summary?view=checks")
    assert text.endswith("and 3 more")
    assert len(alerts._message(settings, key, str(day), [row] * 100, 0)) <= alerts.MOST_CHARACTERS
