"""Metrics for people on call: `python -m pipelines.metrics`, and `STATS_METRICS_FILE` for node_exporter.

All are gauges, and what ages is a point in time: so its age grows by itself, also when nothing writes the file any
more. They come from the tenants' ledgers and from Dagster's records; if one cannot be read, the other is there all the
same.
"""

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

import click
import dagster as dg
import sqlalchemy as sa
from dagster._core.errors import DagsterHomeNotSetError
from dagster._core.storage.asset_check_execution_record import COMPLETED_ASSET_CHECK_EXECUTION_RECORD_STATUSES
from prometheus_client import generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics
from prometheus_client.registry import Collector

from pipelines.ledgers import OUTCOMES, read_ledgers
from pipelines.partitions import Window, day_partitions
from pipelines.resources import TenantDatabase
from pipelines.settings import Settings, UsageError

KEY_PREFIX_TAG = "marketplace_stats/key_prefix"
"""The tag by which a run knows its database, where several share Dagster's records."""

TIMEOUT_S = 30
"""How long the ledgers may take; Dagster gives a sensor a minute."""
FRESH_S = 3600
"""How old the file may become when no run has ended."""
_LOCK_TIMEOUT_MS, _STATEMENT_TIMEOUT_MS = 2_000, 20_000
# They are read beside the runs, whose connections they should not take.
_WORKERS = 2

_ENDED = [dg.DagsterRunStatus.SUCCESS, dg.DagsterRunStatus.FAILURE, dg.DagsterRunStatus.CANCELED]
_ROWS_WRITTEN = ("run_rows_inserted", "run_rows_updated", "run_rows_deleted")

# Not `job`: Prometheus itself names the scraped service so, and would rename ours.
GAUGES: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "up": ("1 if the tenants' ledgers could be read, else 0.", ()),
    "dagster_up": ("1 if Dagster's records could be read, else 0.", ()),
    "collected_timestamp_seconds": ("When these metrics were collected.", ()),
    "tenants": (
        "Tenants by what the last closed day is for them: "
        + "; ".join(f"{name}, {meaning}" for name, meaning in OUTCOMES.items())
        + ".",
        ("outcome",),
    ),
    "days_due": ("Closed days that some tenant lacks, of those that the nightly run looks at.", ()),
    "newest_due_day_timestamp_seconds": ("When the newest of these days began; 0 if there is none.", ()),
    "complete_until_timestamp_seconds": (
        "Up to when all days that the nightly run looks at are computed for all tenants.",
        (),
    ),
    "last_success_timestamp_seconds": ("When the last successful run of this job ended; 0 if never.", ("dagster_job",)),
    "last_run_succeeded": ("1 if the last run of this job that has ended succeeded, else 0.", ("dagster_job",)),
    "last_run_duration_seconds": ("How long that run took.", ("dagster_job",)),
    "last_run_rows_written": (
        "Rows of the stats or the summary that it inserted, updated or deleted.",
        ("dagster_job",),
    ),
    "check_failing": (
        "1 if the asset check failed when it was last evaluated, else 0.",
        ("asset", "check", "severity"),
    ),
}
"""The metrics, by name without `marketplace_stats_`: what each means, and its labels."""


class Metrics(Collector):
    """The values, in the order of GAUGES; with a label `database` if there is a key prefix."""

    def __init__(self, key_prefix: tuple[str, ...]) -> None:
        self._database = {"database": "/".join(key_prefix)} if key_prefix else {}
        self._families = {
            name: GaugeMetricFamily(f"marketplace_stats_{name}", meaning) for name, (meaning, _) in GAUGES.items()
        }

    def set(self, name: str, value: float, **labels: str) -> None:
        family = self._families[name]
        assert set(labels) == set(GAUGES[name][1])  # noqa: S101 One metric, one set of labels.
        family.add_sample(family.name, labels | self._database, float(value))

    def collect(self) -> Iterable[GaugeMetricFamily]:
        return [family for family in self._families.values() if family.samples]


def collect(
    settings: Settings,
    repository: dg.RepositoryDefinition,
    instance: dg.DagsterInstance | None,
    warn: Callable[[str], object],
) -> Metrics:
    """The metrics of now. What cannot be read is missing, its `up` is 0, and `warn` gets the reason in a sentence."""
    metrics = Metrics(settings.key_prefix)
    metrics.set("collected_timestamp_seconds", time.time())
    try:
        _add_ledgers(metrics, settings)
        metrics.set("up", 1)
    except (UsageError, sa.exc.DBAPIError, TimeoutError) as error:
        metrics.set("up", 0)
        warn(f"The ledgers could not be read: {_reason(error)}.")
    if instance is None:
        metrics.set("dagster_up", 0)
        return metrics
    try:
        _add_runs(metrics, settings, repository, instance)
        _add_checks(metrics, repository, instance)
        metrics.set("dagster_up", 1)
    except Exception as error:  # Whatever the storage of dagster.yaml raises.
        metrics.set("dagster_up", 0)
        warn(f"Dagster's records could not be read: {_reason(error)}.")
    return metrics


def _reason(error: BaseException) -> str:
    """In one sentence, without its full stop."""
    if isinstance(error, UsageError):
        return error.message.removesuffix(".")
    if isinstance(error, TimeoutError):
        return f"the database has not answered within {TIMEOUT_S} seconds"
    while error.__cause__:
        error = error.__cause__
    return next(iter(str(error).strip().splitlines()), type(error).__name__).removesuffix(".")


def _add_ledgers(metrics: Metrics, settings: Settings) -> None:
    """What the tenants' ledgers say. Raises UsageError, a DBAPIError or TimeoutError."""
    partitions = day_partitions(settings)
    keys = partitions.get_partition_keys(current_time=datetime.now(UTC))
    window = Window.of(partitions, keys[-max(settings.lookback_days, settings.sweep_days) :])
    database = TenantDatabase(
        workers=min(settings.workers, _WORKERS),
        lock_timeout_ms=min(settings.lock_timeout_ms, _LOCK_TIMEOUT_MS),
        statement_timeout_ms=min(settings.statement_timeout_ms, _STATEMENT_TIMEOUT_MS),
    )
    ledgers = read_ledgers(database, window, TIMEOUT_S)
    for outcome, count in ledgers.outcomes.items():
        metrics.set("tenants", count, outcome=outcome)
    starts = dict(zip(window.dates, window.starts, strict=True))
    due = ledgers.due
    metrics.set("days_due", len(due))
    metrics.set("newest_due_day_timestamp_seconds", starts[due[-1]].timestamp() if due else 0)
    metrics.set("complete_until_timestamp_seconds", (starts[due[0]] if due else window.end).timestamp())


def _add_runs(
    metrics: Metrics, settings: Settings, repository: dg.RepositoryDefinition, instance: dg.DagsterInstance
) -> None:
    """How the jobs that start by themselves have ended."""
    tags = key_prefix_tags(settings)

    def last(job: str, statuses: list[dg.DagsterRunStatus]) -> dg.RunRecord | None:
        found = instance.get_run_records(dg.RunsFilter(job_name=job, statuses=statuses, tags=tags), limit=1)
        return found[0] if found else None

    names = {schedule.job_name for schedule in repository.schedule_defs}
    names |= {target.job_name for sensor in repository.sensor_defs for target in sensor.targets}
    for job in sorted(names):
        success = last(job, [dg.DagsterRunStatus.SUCCESS])
        metrics.set("last_success_timestamp_seconds", (success and success.end_time) or 0, dagster_job=job)
        if run := last(job, _ENDED):
            is_success = run.dagster_run.status == dg.DagsterRunStatus.SUCCESS
            metrics.set("last_run_succeeded", is_success, dagster_job=job)
            if run.start_time and run.end_time:
                metrics.set("last_run_duration_seconds", run.end_time - run.start_time, dagster_job=job)
            written = _rows_written(instance, run.dagster_run.run_id)
            if written is not None:
                metrics.set("last_run_rows_written", written, dagster_job=job)


def _rows_written(instance: dg.DagsterInstance, run_id: str) -> int | None:
    """What the run says that it wrote, over all its days; None if it says nothing of it."""
    written = [
        value.value
        for event in instance.all_logs(run_id, of_type=dg.DagsterEventType.ASSET_MATERIALIZATION)
        for name, value in (event.asset_materialization.metadata.items() if event.asset_materialization else ())
        if name in _ROWS_WRITTEN and isinstance(value, dg.IntMetadataValue) and value.value is not None
    ]
    return sum(written) if written else None


def _add_checks(metrics: Metrics, repository: dg.RepositoryDefinition, instance: dg.DagsterInstance) -> None:
    """What each asset check said when it was last evaluated."""
    for key in sorted(repository.asset_graph.asset_check_keys, key=str):
        # What is planned, or was and never came to it, says nothing.
        records = instance.event_log_storage.get_asset_check_execution_history(
            key, limit=1, status=COMPLETED_ASSET_CHECK_EXECUTION_RECORD_STATUSES
        )
        evaluation = records[0].event.asset_check_evaluation if records and records[0].event else None
        if evaluation:
            metrics.set(
                "check_failing",
                not evaluation.passed,
                asset=key.asset_key.path[-1],
                check=key.name,
                severity=evaluation.severity.value.lower(),
            )


def key_prefix_tags(settings: Settings) -> dict[str, str]:
    """The tags of the runs of this database."""
    return {KEY_PREFIX_TAG: "/".join(settings.key_prefix)} if settings.key_prefix else {}


def write(path: Path, metrics: Metrics) -> None:
    """Puts the file there in one step, readable for all: it holds no secret, and node_exporter is another user.

    Raises UsageError if that is not possible.
    """
    # The collector reads only what ends in .prom.
    draft = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        draft.write_bytes(generate_latest(metrics))
        draft.chmod(0o644)
        draft.replace(path)
    except OSError as error:
        raise UsageError(f"STATS_METRICS_FILE={str(path)!r} cannot be written: {error.strerror}.") from None
    finally:
        with suppress(OSError):
            draft.unlink(missing_ok=True)


DESCRIPTION = f"""
Writes `STATS_METRICS_FILE` after each run that has ended, however it ended, and at least every {FRESH_S // 60} minutes:
so it is right also when a run was killed, or when none was started. Off if the variable is not set.

When its tick has failed, the file is as it was, and `marketplace_stats_collected_timestamp_seconds` in it gets old.
"""


def build_metrics_sensor(settings: Settings) -> dg.SensorDefinition:
    """The sensor; it runs if there is a file to write. It starts no runs."""

    @dg.sensor(
        name="metrics_file_sensor",
        description=DESCRIPTION,
        minimum_interval_seconds=60,
        default_status=dg.DefaultSensorStatus.RUNNING if settings.metrics_file else dg.DefaultSensorStatus.STOPPED,
    )
    def metrics_file_sensor(context: dg.SensorEvaluationContext) -> dg.SkipReason:
        path = settings.metrics_file
        if path is None:
            return dg.SkipReason("STATS_METRICS_FILE is not set, so there is nothing to write.")
        assert context.repository_def is not None  # noqa: S101 Dagster gives it to every tick.
        newest = context.instance.get_run_records(dg.RunsFilter(statuses=_ENDED), limit=1, order_by="update_timestamp")
        seen = f"{newest[0].dagster_run.run_id} {newest[0].update_timestamp}" if newest else "no run"
        if seen == context.cursor and path.exists() and time.time() < path.stat().st_mtime + FRESH_S:
            return dg.SkipReason("No run has ended since the file was written.")
        reasons: list[str] = []
        write(path, collect(settings, context.repository_def, context.instance, reasons.append))
        context.update_cursor("" if reasons else seen)  # What could not be read is tried again a minute later.
        return dg.SkipReason(" ".join([f"{path} is written.", *reasons]))

    return metrics_file_sensor


@contextmanager
def _instance(warn: Callable[[str], object]) -> Iterator[dg.DagsterInstance | None]:
    """Where Dagster keeps its records; None, and the reason for `warn`, if there is no such place."""
    try:
        instance = dg.DagsterInstance.get()
    except DagsterHomeNotSetError:
        warn("DAGSTER_HOME is not set, so Dagster's records are not read: set it as the services have it.")
        yield None
    except Exception as error:  # Whatever the storage of dagster.yaml raises.
        warn(f"Dagster's records could not be read: {_reason(error)}.")
        yield None
    else:
        with instance:
            yield instance


@click.command()
def main() -> None:
    """Prints metrics of the stats and of the runs, as OpenMetrics text.

    What cannot be read is left out: its `up` is 0, and the reason is on standard error.
    """
    from pipelines.definitions import defs  # Which loads this module.

    def warn(sentence: str) -> None:
        click.echo(sentence, err=True)

    settings = Settings.from_env()
    with _instance(warn) as instance:
        metrics = collect(settings, defs().get_repository_def(), instance, warn)
    click.echo(generate_openmetrics(metrics).decode(), nl=False)  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    main()
