"""The migration from Dagit: the same `alembic upgrade head` as an operator runs, as a job and on a schedule.

New customers appear every day, cloned by an application that may not know of our tables.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import dagster as dg

from pipelines.failure import RunFailure
from pipelines.local import ROOT
from pipelines.settings import Settings

MOST_ROWS = 20

DESCRIPTION = """
Brings the template and every tenant to the newest shape of our tables, as the role of `MIGRATION_DATABASE_URL`, and
grants the run's role what it needs. Tenants that are there already cost next to nothing.

When it is red, some tenants could not be migrated: each is named with its state, the error and the remedy. The
others are done. Fix the reported cause, and run it again.
"""

SCHEDULE_DESCRIPTION = """
At 00:10 in {time_zone}, before the nightly run: new customers get their tables.

When a tick was missed, the nightly run names the customers without tables, and computes the others. Start
`migrate_tenants_job` by hand, or wait for the next night: it takes their missing days along.
"""


@dg.op(description=DESCRIPTION)
def migrate_tenants(context: dg.OpExecutionContext) -> None:
    """Runs the command in a process of its own, shows its lines, and fails as it did."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "alembic", "-c", str(ROOT / "alembic.ini"), "-x", f"report={report}"]
        lines: list[str] = []
        with subprocess.Popen(
            [*command, "upgrade", "head"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process:
            try:
                for line in process.stdout or ():
                    lines.append(line.rstrip())
                    context.log.info(lines[-1])
            except BaseException:  # The run is terminated, and so is what it has started; it ends with its report.
                process.terminate()
                raise
        if not report.exists():
            raise RunFailure(lines[-1] if lines else "alembic ended without a word")
        told = json.loads(report.read_text())
    counts = told["counts"]
    context.add_output_metadata(
        {"database": told["database"], **{status.replace(" ", "_"): count for status, count in counts.items()}}
    )
    failed = [schema for schema in told["schemas"] if schema["status"] == "failed"]
    if failed:
        rows = [
            dg.TableRecord({name: str(schema.get(name, "")) for name in ("schema", "state", "error", "remedy")})
            for schema in failed[:MOST_ROWS]
        ]
        first = "; ".join(f"{schema['schema']}: {schema['error']}: {schema['remedy']}" for schema in failed[:3])
        more = f"; and {len(failed) - 3} more" if len(failed) > 3 else ""
        raise RunFailure(
            f"{len(failed)} of {sum(counts.values())} schemas were not migrated. {first}{more}.",
            {"failed": dg.MetadataValue.table(rows)},
        )


def build_migration_job(tags: Mapping[str, str]) -> dg.JobDefinition:
    """The op alone; its runs have these tags."""

    @dg.job(name="migrate_tenants_job", description=DESCRIPTION, tags=tags)
    def migrate_tenants_job() -> None:
        migrate_tenants()

    return migrate_tenants_job


def build_migration_schedule(settings: Settings, job: dg.JobDefinition) -> dg.ScheduleDefinition:
    """Every night at 00:10, before the stats are computed, so that yesterday's new customers are counted."""
    return dg.ScheduleDefinition(
        name="migrate_tenants_schedule",
        job=job,
        cron_schedule="10 0 * * *",
        execution_timezone=settings.time_zone,
        description=SCHEDULE_DESCRIPTION.format(time_zone=settings.time_zone),
    )
