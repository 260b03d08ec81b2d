"""What Dagster loads: names of the contract, the schedule's ticks, the days."""

import re
from datetime import date, timedelta
from itertools import pairwise
from pathlib import Path

import dagster as dg
import pytest

from models.stats import MarketplaceJobStats
from pipelines.definitions import build_defs, defs
from pipelines.partitions import Window, day_partitions
from pipelines.settings import Settings, UsageError
from pipelines.stats import closed_days
from tests.conftest import ROOT

KEY = dg.AssetKey(["marketplace_job_stats"])


def test_the_definitions_have_the_names_of_the_contract() -> None:
    """Asset, job and schedule are found under their names, and everything loads."""
    definitions = build_defs(Settings.from_env({}))
    dg.Definitions.validate_loadable(definitions)
    assert definitions.resolve_job_def("marketplace_job_stats_job")
    schedule = definitions.resolve_schedule_def("marketplace_job_stats_schedule")
    assert schedule.default_status == dg.DefaultScheduleStatus.STOPPED
    assert definitions.resolve_assets_def(KEY).backfill_policy == dg.BackfillPolicy.single_run()


def test_the_definitions_are_built_once() -> None:
    """Dagster asks for them several times in a process, and gets the same ones."""
    assert defs() is defs()


def test_the_columns_are_described() -> None:
    """Every column of the table has its type and its meaning in Dagit."""
    asset = build_defs(Settings.from_env({})).resolve_assets_def(KEY)
    schema = asset.metadata_by_key[KEY]["dagster/column_schema"]
    assert isinstance(schema, dg.TableSchema)
    assert [column.name for column in schema.columns] == [c.name for c in MarketplaceJobStats.__table__.columns]
    assert all(column.description for column in schema.columns)


def test_every_column_says_where_it_comes_from() -> None:
    """The lineage names columns that exist, for every column but the technical ones."""
    definitions = build_defs(Settings.from_env({"STATS_KEY_PREFIX": "eu"}))
    specs = {spec.key.path[-1]: spec for spec in definitions.resolve_all_asset_specs()}
    schemas = {
        name: spec.metadata["dagster/column_schema"] for name, spec in specs.items() if name != "marketplace_report"
    }
    columns = {name: {column.name for column in schema.columns} for name, schema in schemas.items()}
    technical: dict[str, set[str]] = {
        "marketplace_job_facts": set(),
        "marketplace_job_stats": {"id", "created_at", "computed_at"},
        "marketplace_job_stats_days": {"outcome", "time_zone", "definition", "row_versions", "run_id", "changed_at"},
        "marketplace_job_stats_changes": {"changed_at", "run_id", "cause"},
        "marketplace_daily_summary": {"computed_at"},
    }
    for name, unexplained in technical.items():
        lineage = specs[name].metadata["dagster/column_lineage"]
        assert columns[name] - set(lineage.deps_by_column) == unexplained
        assert set(lineage.deps_by_column) <= columns[name]
        for dependency in (dep for deps in lineage.deps_by_column.values() for dep in deps):
            assert dependency.asset_key.path[0] == "eu"
            assert dependency.column_name in columns[dependency.asset_key.path[-1]]


def test_the_stats_stand_between_the_facts_and_what_says_what_they_are() -> None:
    """In the graph, the facts come from the sources, and ledger and journal after the stats."""
    definitions = build_defs(Settings.from_env({}))
    parents = {
        spec.key.path[-1]: {dep.asset_key.path[-1] for dep in spec.deps}
        for spec in definitions.resolve_all_asset_specs()
    }
    sources = {"marketplace_jobs", "marketplace_tasks", "marketplace_action_types"}
    assert parents["marketplace_job_facts"] == sources
    for name in ("marketplace_job_stats_days", "marketplace_job_stats_changes", "marketplace_daily_summary"):
        assert parents[name] == {"marketplace_job_stats"}


def test_everything_is_described() -> None:
    """Every asset, check, job, schedule and sensor says what it is; what can go wrong also says what to do then."""
    definitions = build_defs(Settings.from_env({}))
    repository = definitions.get_repository_def()
    graph = definitions.resolve_asset_graph()
    described = {
        **{spec.key.to_user_string(): spec.description for spec in definitions.resolve_all_asset_specs()},
        **{key.name: graph.get_check_spec(key).description for key in graph.asset_check_keys},
        **{job.name: job.description for job in repository.get_all_jobs() if not job.name.startswith("__")},
        **{schedule.name: schedule.description for schedule in repository.schedule_defs},
        **{sensor.name: sensor.description for sensor in repository.sensor_defs},
    }
    assert len(described) > 20
    assert [name for name, description in described.items() if not description] == []
    nothing_runs = {"marketplace_jobs", "marketplace_tasks", "marketplace_action_types", "marketplace_job_facts"}
    nothing_runs |= {"marketplace_job_stats_days", "marketplace_job_stats_changes"}
    without_help = [
        name for name, text in described.items() if not re.search(r"\bWhen (it|its|a tick|days)\b", str(text))
    ]
    assert set(without_help) == nothing_runs


def test_assets_can_be_found() -> None:
    """By group, owner, kind and tag; and those made here lead to their code."""
    for spec in build_defs(Settings.from_env({})).resolve_all_asset_specs():
        assert spec.group_name
        assert spec.owners
        assert spec.kinds
        assert spec.tags["scope"] in ("tenant", "all-tenants")
        if spec.key.path[-1] in ("marketplace_job_stats", "marketplace_daily_summary", "marketplace_report"):
            [code] = spec.metadata["dagster/code_references"].code_references
            assert Path(code.file_path).is_relative_to(ROOT / "assets")
            lines = Path(code.file_path).read_text().splitlines()[code.line_number - 1 :]
            assert any(f"def {spec.key.path[-1]}(" in line for line in lines[:40])


@pytest.mark.parametrize(("prefix", "pool"), [("", "marketplace_job_stats"), ("eu", "eu__marketplace_job_stats")])
def test_runs_of_the_stats_share_a_pool(prefix: str, pool: str) -> None:
    """Of one database: those of another are not waited for."""
    definitions = build_defs(Settings.from_env({"STATS_KEY_PREFIX": prefix}))
    assert definitions.resolve_assets_def(dg.AssetKey([*filter(None, [prefix]), *KEY.path])).op.pool == pool


def test_a_prefix_is_put_before_all_keys() -> None:
    """STATS_KEY_PREFIX=eu keeps several databases apart under one Dagit, sources included."""
    definitions = build_defs(Settings.from_env({"STATS_KEY_PREFIX": "eu"}))
    keys = {key for asset in definitions.resolve_all_asset_specs() for key in [asset.key]}
    assert {key.path[0] for key in keys} == {"eu"}
    assert dg.AssetKey(["eu", "marketplace_job_stats"]) in keys


ZONES = ["UTC", "Europe/Paris", "America/Havana", "Atlantic/Azores", "Australia/Lord_Howe"]


@pytest.mark.parametrize("zone", ZONES)
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


@pytest.mark.parametrize("zone", ZONES)
def test_the_read_side_has_the_same_days(zone: str) -> None:
    """It does without Dagster, but a day closes at the instant at which its partition ends, to the second."""
    settings = Settings.from_env({"STATS_TIMEZONE": zone, "STATS_START_DATE": "2025-01-01"})
    partitions = day_partitions(settings)
    whole = partitions.get_partition_keys_in_range(dg.PartitionKeyRange("2025-01-01", "2025-12-31"))
    window = Window.of(partitions, whole)
    second, ends = timedelta(seconds=1), (*window.starts[1:], window.end)
    for day, end in zip(window.dates, ends, strict=True):
        assert closed_days(settings, 1, end) == (day, day)
        assert closed_days(settings, 1, end - second)[1] == day - timedelta(days=1)
    assert closed_days(settings, 7, window.end) == (date(2025, 12, 25), date(2025, 12, 31))
    assert closed_days(settings, 10**9, window.end) == (date(2025, 1, 1), date(2025, 12, 31))
    first, last = closed_days(settings, 7, ends[0] - second)
    assert first > last
