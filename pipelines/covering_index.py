"""An optional index on the application's jobs, by which a run finds a day without reading the table: build, drop, show.

    python -m pipelines.covering_index build|drop|show [--tenant user_7 ...] [--yes]

It is never part of the migration history: the table is the application's, and so is the choice. The template gets it
too, so that new customers are cloned with it. Works as the role of `MIGRATION_DATABASE_URL`, which must own the tables.
Exit status: 0 all done, 3 some schemas failed, 1 nothing done. See `docs/covering-index.md`.
"""

import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum

import click
import dagster as dg
import sqlalchemy as sa
from pydantic import Field

from models.sources import MarketplaceJob
from pipelines.database import connected, conninfo, create_engine, server_and_database
from pipelines.failure import RunFailure
from pipelines.settings import Settings, UsageError
from pipelines.tenants import TEMPLATE_SCHEMA, find_schemas, quoted

TABLE = MarketplaceJob.__tablename__
NAME = "ix_marketplace_jobs_completed_at_covering"
KEY = "completed_at"
# All that the aggregate reads of a job, in the order that leaves no gaps between the values: 8 bytes, 4 bytes, text.
INCLUDED = ("started_at", "id", "action_type_id", "retry_count", "status", "marketplace")
# Any comparison of the key implies this condition, whatever type the status has; one on the status would not be proven.
CONDITION = f"{KEY} IS NOT NULL"

_REMEDIES = {
    "42501": "work as the owner of the tables: set MIGRATION_DATABASE_URL",
    "42P07": "something else has the index's name: rename or drop that, then build again",
    "55P03": "another session has kept a transaction open for longer than STATS_LOCK_TIMEOUT_MS: end it, or wait, "
    "then give the same command again",
    "57014": "it was cancelled, or took longer than STATS_STATEMENT_TIMEOUT_MS: then raise that, and build again",
}
# The key of the session's lock that keeps a second command out; any number that nothing else uses.
_LOCK = 7_229_101_114


class Action(StrEnum):
    """What is to be done. Lower-case names, because Dagster shows the names."""

    build = "build"
    drop = "drop"
    show = "show"


@dataclass(frozen=True)
class Found:
    """What a schema has: the names of the indexes that are this one, whole or left by a build that did not end.

    `size_bytes` is that of all of them; `estimate_bytes` that of a new one, None if nobody has analyzed the table.
    """

    has_table: bool = True
    whole: tuple[str, ...] = ()
    left_over: tuple[str, ...] = ()
    size_bytes: int = 0
    estimate_bytes: int | None = None


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
        missing = [one for one in tables if not one.whole]
        return {
            "with_the_index": len(tables) - len(missing),
            "without": len(missing),
            "interrupted_builds": sum(bool(one.left_over) for one in tables),
            "without_table": len(self.found) - len(tables),
            "size_bytes": sum(one.size_bytes for one in tables),
            "estimate_bytes": sum(one.estimate_bytes or 0 for one in missing),
            "never_analyzed": sum(one.estimate_bytes is None for one in missing),
        }

    def sentences(self) -> list[str]:
        """The same for people."""
        told = self.numbers()
        lines = [
            f"{len(self.found)} schemas: {told['with_the_index']} have the index, {told['without']} do not, "
            f"{told['without_table']} have no {TABLE}",
            f"It takes {_megabytes(told['size_bytes'])} now",
        ]
        if told["interrupted_builds"]:
            lines.append(f"{told['interrupted_builds']} have what an interrupted build has left; a build replaces it")
        if told["without"]:
            lines.append(f"Where it is missing, it would take about {_megabytes(told['estimate_bytes'])}")
        if told["never_analyzed"]:
            lines.append(f"But {told['never_analyzed']} tables were never analyzed, and are not in that: ANALYZE them")
        return lines


# The table, if it is one, and how large the index on it would be: entries of 8 bytes and their values, in steps of 8,
# with a pointer of 4; pages less 40 bytes of their own, filled to nine tenths; and a first page. The rows are those
# that the planner would expect: as many on each page as when it was analyzed last.
_TABLE = sa.text("""
    SELECT c.oid,
           CASE WHEN size.pages = 0 THEN size.page
                WHEN stats.known = :count AND c.reltuples >= 0 AND c.relpages > 0
                THEN size.page * (1 + ceil(c.reltuples / c.relpages * size.pages * stats.filled
                                           * (4 + 8 * ceil((8 + stats.width) / 8.0)) / ((size.page - 40) * 0.9)))
           END::bigint AS estimate_bytes
      FROM pg_class c
      JOIN pg_namespace n ON n.oid = c.relnamespace
     CROSS JOIN LATERAL (SELECT page, pg_relation_size(c.oid) / page AS pages
                           FROM (SELECT current_setting('block_size')::bigint) AS setting (page)) AS size
     CROSS JOIN LATERAL (SELECT count(*) AS known, sum(avg_width) AS width,
                                min(1 - null_frac) FILTER (WHERE attname = :key) AS filled
                           FROM pg_stats
                          WHERE schemaname = n.nspname AND tablename = c.relname AND NOT inherited
                            AND attname = ANY (:columns)) AS stats
     WHERE n.nspname = :schema AND c.relname = :table AND c.relkind IN ('r', 'p')
""").bindparams(table=TABLE, key=KEY, columns=[KEY, *INCLUDED], count=1 + len(INCLUDED))

# Its indexes that are this one. A clone's has a name of PostgreSQL's choice, so only what they are is looked at.
_INDEXES = sa.text("""
    SELECT c.relname AS name, i.indisvalid AS is_whole, pg_relation_size(c.oid) AS size_bytes
      FROM pg_index i
      JOIN pg_class c ON c.oid = i.indexrelid
      JOIN pg_am am ON am.oid = c.relam AND am.amname = 'btree'
     WHERE i.indrelid = :oid AND NOT i.indisunique AND i.indnkeyatts = 1
       AND pg_get_expr(i.indpred, i.indrelid) = :condition
       AND (SELECT array_agg(a.attname::text ORDER BY a.attnum <> i.indkey[0], a.attname) FROM pg_attribute a
             WHERE a.attrelid = i.indrelid AND a.attnum = ANY (i.indkey)) = :columns
     ORDER BY c.relname
""").bindparams(condition=f"({CONDITION})", columns=[KEY, *sorted(INCLUDED)])


def look(connection: sa.Connection, schema: str) -> Found:
    """What a schema has. One at a time, because PostgreSQL waits for whoever keeps the table locked."""
    table = connection.execute(_TABLE, {"schema": schema}).one_or_none()
    if table is None:
        return Found(has_table=False)
    indexes = connection.execute(_INDEXES, {"oid": table.oid}).all()
    return Found(
        has_table=True,
        whole=tuple(index.name for index in indexes if index.is_whole),
        left_over=tuple(index.name for index in indexes if not index.is_whole),
        size_bytes=sum(index.size_bytes for index in indexes),
        estimate_bytes=table.estimate_bytes,
    )


def build(connection: sa.Connection, schema: str) -> bool:
    """Builds it where it is missing, after what an interrupted build has left is gone; whether there was a need to."""
    found = look(connection, schema)
    _drop(connection, schema, found.left_over)
    if not found.has_table or found.whole:
        return bool(found.left_over)
    try:
        connection.exec_driver_sql(
            f"CREATE INDEX CONCURRENTLY {NAME} ON {quoted(schema)}.{TABLE} ({KEY}) "
            f"INCLUDE ({', '.join(INCLUDED)}) WHERE {CONDITION}"
        )
    except sa.exc.DBAPIError:
        # What failed halfway may cost every write something. If it cannot be dropped now, the next build does it.
        with suppress(sa.exc.SQLAlchemyError):
            _drop(connection, schema, look(connection, schema).left_over)
        raise
    return True


def drop(connection: sa.Connection, schema: str) -> bool:
    """Drops it, under whatever name and whether whole or not; whether there was one."""
    found = look(connection, schema)
    _drop(connection, schema, (*found.whole, *found.left_over))
    return bool(found.whole or found.left_over)


def _drop(connection: sa.Connection, schema: str, names: Sequence[str]) -> None:
    for name in names:
        connection.exec_driver_sql(f"DROP INDEX CONCURRENTLY IF EXISTS {quoted(schema)}.{quoted(name)}")


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
    ).execution_options(isolation_level="AUTOCOMMIT")
    with connected(engine, where) as connection:
        report = Report(server_and_database(connection))
        say(f"{action.capitalize()}: the covering index in {report.database}")
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
                report.changed += work(connection, schema)

            # One after the other: builds of partial indexes wait for each other's snapshots, and for everybody's.
            _each(connection, schemas, report, change, say)
            say(f"{report.changed} schemas changed, {len(report.failed)} failed")
        for schema, reason in report.failed.items():
            say(f"{schema}: failed: {reason}")
    return report


def _has_work(action: Action, one: Found) -> bool:
    if action == Action.build:
        return one.has_table and bool(one.left_over or not one.whole)
    return action == Action.drop and bool(one.whole or one.left_over)


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
            reason = (str(error.orig).splitlines() or ["the connection was lost"])[0]
            if connection.invalidated:
                raise UsageError(
                    f"The connection to {report.database} was lost at {schema}, number {number} of {len(schemas)}: "
                    f"{reason}. Give the same command again; what is done is done."
                ) from None
            sqlstate = getattr(error.orig, "sqlstate", None) or ""
            remedy = _REMEDIES.get(sqlstate, "mend what the message says, then give the same command again")
            report.failed[schema] = f"{reason} (SQLSTATE {sqlstate}): {remedy}"
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


DESCRIPTION = f"""
Builds, drops or shows the optional index `{NAME}` on the application's jobs, in the template and in every tenant, as
the role of `MIGRATION_DATABASE_URL`. With it, a day is read from the index alone. Start it with `show`: it tells how
large the index would be. Then with `build`, when no long transaction is open, such as a dump or the nightly run.

*When it is red*, some schemas failed: each is named with the reason and the remedy. The others are done. Mend what it
says, and run it again: it goes on where it was, and replaces what an interrupted build has left.
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


@click.command(help=__doc__)
@click.argument("action", type=click.Choice([action.value for action in Action]))
@click.option("--tenant", "tenants", multiple=True, help="A schema, for instance user_7; may be repeated; default all.")
@click.option("--yes", is_flag=True, help="Build without asking.")
def main(action: str, tenants: tuple[str, ...], yes: bool) -> None:
    def agree() -> None:
        if not yes and not sys.stdin.isatty():
            raise UsageError("A build asks before it begins, and nobody is here to answer: add --yes.")
        if not yes:
            click.confirm("Build it?", abort=True)

    try:
        report = carry_out(Action(action), tenants, click.echo, agree)
    except KeyboardInterrupt:
        click.echo("Interrupted. Give the same command again: it replaces what this one has left.", err=True)
        sys.exit(3)
    if report.failed:
        sys.exit(1 if len(report.failed) == report.count() else 3)


if __name__ == "__main__":
    main()
