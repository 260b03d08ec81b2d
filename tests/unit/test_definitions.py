"""What Dagster loads: names of the contract, the schedule's ticks, the days."""

from datetime import timedelta
from itertools import pairwise

import dagster as dg
import pytest

from models.stats import MarketplaceJobStats
from pipelines.definitions import build_defs
from pipelines.partitions import Window, day_partitions
from pipelines.settings import Settings, UsageError

KEY = dg.AssetKey(["marketplace_job_stats"])


def test_the_definitions_have_the_names_of_the_contract() -> None:
    """Asset, job and schedule are found under their names, and everything loads."""
    definitions = build_defs(Settings.from_env({}))
    dg.Definitions.validate_loadable(definitions)
    assert definitions.resolve_job_def("marketplace_job_stats_job")
    schedule = definitions.resolve_schedule_def("marketplace_job_stats_schedule")
    assert schedule.default_status == dg.DefaultScheduleStatus.STOPPED
    assert definitions.resolve_assets_def(KEY).backfill_policy == dg.BackfillPolicy.single_run()


def test_the_columns_are_described() -> None:
    """Every column of the table has its type and its meaning in Dagit."""
    asset = build_defs(Settings.from_env({})).resolve_assets_def(KEY)
    schema = asset.metadata_by_key[KEY]["dagster/column_schema"]
    assert isinstance(schema, dg.TableSchema)
    assert [column.name for column in schema.columns] == [c.name for c in MarketplaceJobStats.__table__.columns]
    assert all(column.description for column in schema.columns)


def test_a_prefix_is_put_before_all_keys() -> None:
    """STATS_KEY_PREFIX=eu keeps several databases apart under one Dagit, sources included."""
    definitions = build_defs(Settings.from_env({"STATS_KEY_PREFIX": "eu"}))
    keys = {key for asset in definitions.resolve_all_asset_specs() for key in [asset.key]}
    assert {key.path[0] for key in keys} == {"eu"}
    assert dg.AssetKey(["eu", "marketplace_job_stats"]) in keys


@pytest.mark.parametrize("zone", ["UTC", "Europe/Paris", "America/Havana", "Atlantic/Azores", "Australia/Lord_Howe"])
def test_the_days_of_a_window_leave_no_instant_out(zone: str) -> None:
    """A year of partitions is a chain of half-open windows of 23 to 25 hours."""
    partitions = day_partitions(Settings.from_env({"STATS_TIMEZONE": zone}))
    keys = [f"2025-{month:02}-{day:02}" for month in range(1, 13) for day in range(1, 29)]
    whole = partitions.get_partition_keys_in_range(dg.PartitionKeyRange("2025-01-01", "2025-12-31"))
    window = Window.of(partitions, whole)
    assert len(window.dates) == 365
    lengths = {after - before for before, after in pairwise((*window.starts, window.end))}
    assert timedelta(hours=23) <= min(lengths) <= max(lengths) <= timedelta(hours=25)
    with pytest.raises(UsageError, match="do not follow each other"):
        Window.of(partitions, keys)
