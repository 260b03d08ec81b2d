"""What the tests of runs have in common: rows of three tenants, runs in this process, and what these reported."""

import math
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from fractions import Fraction
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import dagster as dg
import psycopg
import pytest

from assets.marketplace_job_stats.asset import SCHEDULE_TAG
from pipelines.definitions import build_defs
from pipelines.settings import Settings
from tests import application

NOON = datetime(2026, 1, 15, 12, tzinfo=UTC)
DAY = NOON.date().isoformat()
TENANTS = ("user_1", "user_2", "user_10")


def calm_time() -> datetime:
    """Now, in a zone, neither UTC nor the server's, in which no day ends and no schedule ticks now or soon."""
    clocks = (datetime.now(ZoneInfo(zone)) for zone in ("America/Bogota", "Asia/Tokyo"))
    return next(clock for clock in clocks if 7 <= clock.hour < 22)


def job(**columns: Any) -> dict[str, Any]:
    """A completed Vinted job of 1.5 s at noon of the 15th, unless said otherwise."""
    job = {"marketplace": "vinted", "action_type_id": 1, "status": "completed", "completed_at": NOON}
    return job | {"started_at": NOON - timedelta(milliseconds=1500)} | columns


def facts(
    connection: psycopg.Connection[Any], schema: str, numbers: Mapping[Any, int], first_id: int = 0, **columns: Any
) -> None:
    """So many facts of Vinted jobs that failed on the 15th, for each reason, unless said otherwise; of new ids."""
    fact = {"created_at": NOON, "completed_at": NOON, "date": NOON.date(), "marketplace": "vinted"}
    fact |= {"action_type_id": 1, "status": "failed", "retry_count": 0} | columns
    reasons = Counter(numbers).elements()
    rows = [{**fact, "job_id": first_id + n, "failure_reason": reason} for n, reason in enumerate(reasons, start=1)]
    application.insert(connection, schema, "marketplace_job_facts", rows)


def mean_of(values: Sequence[int]) -> int | None:
    """The mean of whole numbers, halves away from zero; none of none."""
    return math.floor(Fraction(sum(values), len(values)) + Fraction(1, 2)) if values else None


def materialize(
    first: str = DAY,
    last: str | None = None,
    *,
    schedule: str | None = None,
    environment: Mapping[str, str] | None = None,
    **config: Any,
) -> dg.ExecuteInProcessResult:
    """A run of the asset over a range of days, with this run config, in this process; as one of a schedule's."""
    definitions = build_defs(Settings.from_env({"STATS_LOCK_TIMEOUT_MS": "300", **(environment or {})}))
    return definitions.resolve_job_def("marketplace_job_stats_job").execute_in_process(
        run_config={"ops": {"marketplace_job_stats": {"config": config}}},
        tags={
            "dagster/asset_partition_range_start": first,
            "dagster/asset_partition_range_end": last or first,
            **({SCHEDULE_TAG: schedule} if schedule else {}),
        },
        raise_on_error=False,
    )


def metadata(result: dg.ExecuteInProcessResult, observed: bool = False) -> dict[str, dict[str, Any]]:
    """What was reported, by day; as plain values."""
    kind = dg.DagsterEventType.ASSET_OBSERVATION if observed else dg.DagsterEventType.ASSET_MATERIALIZATION
    events = [event for event in result.all_events if event.event_type == kind]
    data = [
        event.asset_observation_data.asset_observation if observed else event.step_materialization_data.materialization
        for event in events
    ]
    days = {str(one.partition): {name: plain(value) for name, value in one.metadata.items()} for one in data}
    assert len(days) == len(data), "a day was reported twice"
    return days


def plain(value: dg.MetadataValue[Any]) -> Any:
    """A table as a list of its rows, anything else as it is."""
    return [dict(record.data) for record in value.records] if isinstance(value, dg.TableMetadataValue) else value.value


def failure(result: dg.ExecuteInProcessResult) -> str:
    """The sentence that a failed run ends with."""
    [event] = [event for event in result.all_events if event.is_step_failure]
    error = event.step_failure_data.error
    assert error is not None
    assert error.stack == []
    return error.message


def checks(result: dg.ExecuteInProcessResult) -> dict[str, dg.AssetCheckEvaluation]:
    """The asset checks that a run evaluated, by name."""
    found = result.get_asset_check_evaluations()
    assert len({check.check_name for check in found}) == len(found)
    return {check.check_name: check for check in found}


def create_extension(connection: psycopg.Connection[Any], name: str, script: str = "") -> None:
    """An extension of this name that does what the script says. Skips the test before PostgreSQL 18."""
    if connection.info.server_version < 180_000:
        pytest.skip("An extension from another folder needs PostgreSQL 18.")
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        files = Path(folder) / "extension"
        files.mkdir()
        (files / f"{name}.control").write_text("default_version = '1'\n")
        (files / f"{name}--1.sql").write_text(script)
        for path in (files.parent, files):
            path.chmod(0o755)
        connection.execute(f"SET extension_control_path = '$system:{folder}'")
        connection.execute(f"CREATE EXTENSION {name}")


def total_jobs(connection: psycopg.Connection[Any], schema: str) -> int:
    row = connection.execute(f"SELECT coalesce(sum(total_jobs), 0)::int FROM {schema}.marketplace_job_stats").fetchone()
    assert row
    return int(row[0])
