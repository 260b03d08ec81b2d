"""The same as the command, as a job of Dagster."""

import dagster as dg
from pydantic import Field

from pipelines.covering_index.index import NAME
from pipelines.covering_index.tenants import Action, carry_out
from pipelines.failure import RunFailure
from pipelines.settings import UsageError

DESCRIPTION = f"""
Builds, drops or shows the optional index `{NAME}` on the application's jobs, in the template and in every tenant, as
the role of `MIGRATION_DATABASE_URL`. With it, a day is read from the index alone. Start it with `show`: it says how
large the index would be. Then with `build`, when no long transaction is open, such as a dump or the nightly run.

*When it is red*, some schemas failed: each is named with the reason and the remedy. The others are done. Correct what
it says, and run it again: it goes on where it was. A build replaces an index that an earlier release built, and what an
interrupted build or drop has left.
"""


class CoveringIndexConfig(dg.Config):
    """What a run may be told."""

    action: Action = Field(default=Action.show, description="build, drop, or only show what is there.")
    tenants: list[str] = Field(default=[], description="Schema names, for instance user_7; default all.")


@dg.op(description=DESCRIPTION)
def covering_index(context: dg.OpExecutionContext, config: CoveringIndexConfig) -> None:
    """The same as the command, without the question: who starts `build` here has said yes."""
    try:
        report = carry_out(config.action, config.tenants, context.log.info)
    except UsageError as error:
        raise RunFailure(error.message) from None
    context.add_output_metadata(
        {"database": report.database, **report.numbers(), "changed": report.changed, "failed": len(report.failed)}
    )
    if report.failed:
        first = "; ".join(f"{schema}: {reason}" for schema, reason in list(report.failed.items())[:3])
        more = f"; and {len(report.failed) - 3} more" if len(report.failed) > 3 else ""
        raise RunFailure(
            f"{config.action.capitalize()} failed in {len(report.failed)} of {report.count()} schemas. {first}{more}."
        )


@dg.job(name="covering_index_job", description=DESCRIPTION)
def covering_index_job() -> None:
    """The op alone."""
    covering_index()
