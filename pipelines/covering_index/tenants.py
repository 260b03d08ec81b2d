"""The index in the template and in every tenant, one schema after the other: what is there, what to do, what failed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

import sqlalchemy as sa

from pipelines.covering_index.index import LACKING, SESSION, TABLE, Found, build, drop, look
from pipelines.database import SERVER_REMEDIES, connected, conninfo, create_engine, error_text, server_and_database
from pipelines.settings import Settings, UsageError
from pipelines.tenants import TEMPLATE_SCHEMA, find_schemas, superuser_warning

_REMEDIES = {
    "42501": "work as the owner of the tables: set MIGRATION_DATABASE_URL",
    "42P07": "something else has the index's name: rename or drop that, then build again",
    "55P03": "another session has kept a transaction open for longer than STATS_LOCK_TIMEOUT_MS: end it, or wait, "
    "then give the same command again",
    "57014": "it was cancelled, or took longer than STATS_STATEMENT_TIMEOUT_MS: then raise that, and build again",
    **SERVER_REMEDIES,
}
# The key of the session's lock that keeps a second command out; any number that nothing else uses.
_LOCK = 7_229_101_114


class Action(StrEnum):
    """What is to be done. Lower-case names, because Dagster shows the names."""

    build = "build"
    drop = "drop"
    show = "show"


@dataclass
class Report:
    """What was found in each schema beforehand, how many were worked on, and which failed, with the reason."""

    database: str
    found: dict[str, Found] = field(default_factory=dict)
    changed: int = 0
    failed: dict[str, str] = field(default_factory=dict)

    def count(self) -> int:
        """How many schemas were looked at."""
        return len({*self.found, *self.failed})

    def numbers(self) -> dict[str, int]:
        """Numbers of schemas, and bytes."""
        tables = [one for one in self.found.values() if one.has_table]
        missing = [one for one in tables if one.is_missing]
        return {
            "with_the_index": len(tables) - len(missing),
            "without": len(missing),
            "of_older_shape": sum(bool(one.older) for one in tables),
            "interrupted_builds": sum(bool(one.left_over) for one in tables),
            "without_table": len(self.found) - len(tables),
            "size_bytes": sum(one.size_bytes for one in tables),
            "estimate_bytes": sum(one.estimate_bytes or 0 for one in missing),
            "never_analyzed": sum(one.estimate_bytes is None for one in missing),
        }

    def sentences(self) -> list[str]:
        """The same for people."""
        numbers = self.numbers()
        lines = [
            f"{len(self.found)} schemas: {numbers['with_the_index']} have the index, {numbers['without']} do not, "
            f"{numbers['without_table']} have no {TABLE}",
            f"It takes {_megabytes(numbers['size_bytes'])} now",
        ]
        if count := numbers["of_older_shape"]:
            names = [f"{schema}.{name}" for schema, one in self.found.items() for name in one.older]
            more = f", and {len(names) - 3} more" if len(names) > 3 else ""
            lines.append(
                f"{count} have one of an older shape: lacks {LACKING} ({', '.join(names[:3])}{more}); "
                "a build replaces it"
            )
        if count := numbers["interrupted_builds"]:
            lines.append(f"{count} have what an interrupted build or drop has left; a build replaces it")
        if numbers["without"]:
            lines.append(f"Where it is missing, it would take about {_megabytes(numbers['estimate_bytes'])}")
        if count := numbers["never_analyzed"]:
            lines.append(f"But {count} tables were never analyzed, and are not in that: ANALYZE them")
        return lines


def carry_out(
    action: Action, tenants: Sequence[str], say: Callable[[str], None], agree: Callable[[], None] = lambda: None
) -> Report:
    """Looks at all schemas, or those named, says what is there, and does it, one schema after the other.

    `agree` is called before the first build, and raises to stop it. Raises UsageError.
    """
    settings = Settings.from_env()
    where = conninfo("MIGRATION_DATABASE_URL")
    # Outside of transactions, which concurrent builds demand.
    engine = create_engine(
        where,
        lock_timeout=settings.lock_timeout_ms,
        statement_timeout=settings.statement_timeout_ms,
        idle_session_timeout=0,  # It waits for an answer.
        **SESSION,
    ).execution_options(isolation_level="AUTOCOMMIT")
    with connected(engine, where) as connection:
        report = Report(server_and_database(connection))
        say(f"{action.capitalize()}: the covering index in {report.database}")
        if warning := superuser_warning(connection):
            say(f"Warning: {warning}")
        schemas = _schemas(connection, tenants, report.database)
        _each(connection, schemas, report, lambda schema: report.found.update({schema: look(connection, schema)}))
        for sentence in report.sentences():
            say(sentence)
        work = build if action == Action.build else drop
        schemas = [name for name, one in report.found.items() if _has_work(action, one)]
        if schemas:
            if action == Action.build:
                agree()
            # Only tried, never waited for: who waits holds a snapshot, and a concurrent build waits for all of those.
            if not connection.scalar(sa.text("SELECT pg_try_advisory_lock(:key)"), {"key": _LOCK}):
                raise UsageError(f"Another build or drop goes on in {report.database}: wait for it to end.")

            def change(schema: str) -> None:
                work(connection, schema)
                report.changed += 1

            # One after the other: builds of partial indexes wait for each other's snapshots, and for everybody's.
            _each(connection, schemas, report, change, say)
            say(f"{report.changed} schemas changed, {len(report.failed)} failed")
        for schema, reason in report.failed.items():
            say(f"{schema}: failed: {reason}")
    return report


def _has_work(action: Action, one: Found) -> bool:
    if action == Action.build:
        return one.is_missing or bool(one.obsolete)
    return action == Action.drop and bool(one.current or one.obsolete)


def _each(
    connection: sa.Connection,
    schemas: Sequence[str],
    report: Report,
    work: Callable[[str], None],
    say: Callable[[str], None] = lambda _: None,
) -> None:
    """Calls `work` for each schema; one that fails is noted with the reason, and stops no other. Raises UsageError."""
    for number, schema in enumerate(schemas, start=1):
        try:
            work(schema)
        except sa.exc.DBAPIError as error:
            reason = error_text(error)
            if connection.invalidated:
                raise UsageError(
                    f"The connection to {report.database} was lost at {schema}, number {number} of {len(schemas)}: "
                    f"{reason}. Give the same command again; what is done is done."
                ) from None
            sqlstate = getattr(error.orig, "sqlstate", None) or ""
            remedy = _REMEDIES.get(sqlstate, "correct what the message says, then give the same command again")
            report.failed[schema] = f"{reason}: {remedy}"
        if (number - 1) * 10 // len(schemas) < number * 10 // len(schemas):
            say(f"{number} of {len(schemas)} schemas")


def _schemas(connection: sa.Connection, names: Sequence[str], database: str) -> list[str]:
    """The template, if there is one, and the tenants; or those that are named. Raises UsageError."""
    schemas = find_schemas(connection)
    if missing := sorted(set(names) - set(schemas)):
        raise UsageError(f"There is no tenant {', '.join(missing)} in {database}.")
    if schemas in ([], [TEMPLATE_SCHEMA]):
        raise UsageError(f"No schema named user_<number> in {database}: is DATABASE_URL the right one?")
    return [schema for schema in schemas if not names or schema in names]


def _megabytes(count: int) -> str:
    return f"{count / 1_000_000:,.1f} MB"
