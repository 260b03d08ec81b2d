"""The facts, the journal, the columns that are made of them, and what the ledger says of them.

Facts of jobs that the application has deleted, and the journal, cannot be computed again. So the way back is refused
where there are any, unless they are to be archived: then the tables get another name, and the next upgrade takes them
back.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

from migrations.shape import CHANGES, FACTS, FACTS_ARE_LOST, NEW, archived
from migrations.shape import LEDGER as DAYS

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

SUMMARY = "marketplace_daily_summary"
SUMMARY_DAYS = "marketplace_daily_summary_days"
GLOBAL_SUMMARY = "marketplace_global_summary"
# Name and type; one statement adds them all, which takes a tenant a tenth of the time.
STATS_COLUMNS = {
    "p99_duration_ms": "double precision",
    "wait_count": "integer",
    "wait_sum_ms": "bigint",
    "avg_wait_ms": "integer",
    "p50_wait_ms": "double precision",
    "p95_wait_ms": "double precision",
    "wait_sketch_keys": "integer[]",
    "wait_sketch_counts": "bigint[]",
    "wait_sketch_version": "smallint",
}
DAY_COLUMNS = {
    "definition": "smallint NOT NULL DEFAULT 1",
    "no_start_count": "integer NOT NULL DEFAULT 0",
    "row_count": "integer",
    "row_versions": "bigint",
}
SUMMARY_COLUMNS = STATS_COLUMNS | {
    "wait_count": "bigint NOT NULL DEFAULT 0",
    "wait_sum_ms": "bigint NOT NULL DEFAULT 0",
    "top_reasons": "jsonb NOT NULL DEFAULT '[]'",
    "failure_reasons": "jsonb NOT NULL DEFAULT '[]'",
    "tenants_older_definition": "integer NOT NULL DEFAULT 0",
}


def upgrade(target: str) -> None:
    globals()[f"upgrade_{target}"]()


def downgrade(target: str) -> None:
    globals()[f"downgrade_{target}"]()


def upgrade_tenant() -> None:
    """Makes the facts and the journal, or takes those back that a downgrade has put away."""
    given = op.get_context().opts["given"]
    if given.shape.table(archived(FACTS)):
        op.rename_table(archived(FACTS), FACTS)
    else:
        _create_facts()
    if given.shape.table(archived(CHANGES)):
        op.rename_table(archived(CHANGES), CHANGES)
    else:
        _create_changes()
    _add(NEW, STATS_COLUMNS)
    _add(DAYS, DAY_COLUMNS, _outcomes("computed", "held_back", "open"))
    op.create_index(f"ix_{NEW}_date", NEW, ["date"])


def _create_facts() -> None:
    op.create_table(
        FACTS,
        sa.Column("job_id", sa.BigInteger, nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("completed_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("task_retry_count", sa.BigInteger),
        sa.Column("deleted_at", sa.DateTime(timezone=True)),
        sa.Column("date", sa.Date, nullable=False),
        sa.Column("action_type_id", sa.Integer, nullable=False),
        sa.Column("retry_count", sa.Integer, nullable=False),
        sa.Column("duration_ms", sa.Integer),
        sa.Column("wait_ms", sa.Integer),
        sa.Column("task_count", sa.Integer),
        sa.Column("task_success_count", sa.Integer),
        sa.Column("task_failure_count", sa.Integer),
        sa.Column("marketplace", sa.Text, nullable=False),
        sa.Column("status", sa.Text, nullable=False),
        sa.Column("failure_reason", sa.Text),
        sa.PrimaryKeyConstraint("job_id", "created_at", name=f"{FACTS}_pkey"),
    )
    op.create_index(f"ix_{FACTS}_date", FACTS, ["date"])


def _create_changes() -> None:
    op.create_table(
        CHANGES,
        sa.Column("date", sa.Date, nullable=False),
        sa.Column("action_type_id", sa.Integer, nullable=False),
        sa.Column("marketplace", sa.Text, nullable=False),
        sa.Column("changed_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("run_id", sa.Text, nullable=False),
        sa.Column("cause", sa.Text, nullable=False),
        sa.Column("total_jobs_before", sa.Integer),
        sa.Column("total_jobs_after", sa.Integer),
        sa.Column("failure_count_before", sa.Integer),
        sa.Column("failure_count_after", sa.Integer),
        sa.Column("late_count", sa.Integer, nullable=False),
        sa.Column("corrected_count", sa.Integer, nullable=False),
        sa.Column("moved_in_count", sa.Integer, nullable=False),
        sa.Column("moved_out_count", sa.Integer, nullable=False),
        sa.Column("forgotten_count", sa.Integer, nullable=False),
        sa.PrimaryKeyConstraint("date", "action_type_id", "marketplace", "changed_at", name=f"{CHANGES}_pkey"),
        sa.CheckConstraint("cause IN ('jobs', 'forgotten', 'definition', 'overwritten')", name=f"ck_{CHANGES}_cause"),
    )


def downgrade_tenant() -> None:
    """Puts the facts and the journal away, if that was said; else drops them where nothing is lost with them."""
    if op.get_context().opts["given"].archive:
        op.rename_table(FACTS, archived(FACTS))
        op.rename_table(CHANGES, archived(CHANGES))
    else:
        op.execute(_NOTHING_IS_LOST)
        op.drop_table(FACTS)
        op.drop_table(CHANGES)
    op.drop_index(f"ix_{NEW}_date", NEW)
    _drop(NEW, STATS_COLUMNS)
    # A day that is not over is not in the ledger that the release before knows; its rows stay.
    op.execute(f"DELETE FROM {DAYS} WHERE outcome::text = 'open'")
    _drop(DAYS, DAY_COLUMNS, _outcomes("computed", "held_back"))


def _outcomes(*names: str) -> str:
    """The clauses by which the ledger takes these outcomes and no others."""
    constraint, allowed = f"ck_{DAYS}_outcome", ", ".join(f"'{name}'" for name in names)
    return f"DROP CONSTRAINT {constraint}, ADD CONSTRAINT {constraint} CHECK (outcome::text IN ({allowed}))"


# The jobs may have been dropped as a whole, or may not be read, so what is asked of them is not even parsed then.
_NOTHING_IS_LOST = f"""
    DO $body$
    DECLARE is_lost boolean;
    BEGIN
        SELECT EXISTS (SELECT FROM {CHANGES}) OR EXISTS (SELECT FROM {FACTS} WHERE deleted_at IS NOT NULL) INTO is_lost;
        IF NOT is_lost AND pg_catalog.has_table_privilege(
            pg_catalog.to_regclass('marketplace_jobs')::oid, 'SELECT'::text) IS NOT TRUE THEN
            SELECT EXISTS (SELECT FROM {FACTS}) INTO is_lost;
        ELSIF NOT is_lost THEN
            SELECT EXISTS (SELECT FROM {FACTS} AS fact WHERE NOT EXISTS (
                SELECT FROM marketplace_jobs AS job
                 WHERE job.id::bigint = fact.job_id AND job.created_at = fact.created_at)) INTO is_lost;
        END IF;
        IF is_lost THEN
            RAISE EXCEPTION 'facts of jobs that are gone, or the journal, would be lost'
                USING ERRCODE = 'P0004', CONSTRAINT = '{FACTS_ARE_LOST}';
        END IF;
    END $body$"""


def upgrade_shared() -> None:
    """What the summary says besides, and what stands behind each of its days."""
    _add(SUMMARY, SUMMARY_COLUMNS)
    _create_days(
        SUMMARY_DAYS,
        sa.Column("ledger_state", sa.BigInteger, nullable=False),
        sa.Column("action_types", JSONB, nullable=False),
        sa.Column("time_zone", sa.Text, nullable=False),
        sa.Column("active_tenants", sa.ARRAY(sa.Text), nullable=False),
        sa.Column("first_written", sa.ARRAY(sa.DateTime(timezone=True)), nullable=False),
    )
    key = f"CONSTRAINT {GLOBAL_SUMMARY}_pkey PRIMARY KEY (date, marketplace, action_code)"
    op.execute(f"CREATE TABLE {GLOBAL_SUMMARY} (LIKE {SUMMARY} INCLUDING DEFAULTS, {key})")
    _create_days(
        f"{GLOBAL_SUMMARY}_days",
        *(
            sa.Column(name, sa.ARRAY(sa.Text), nullable=False)
            for name in ("missing_databases", "old_databases", "tenants_twice")
        ),
    )
    op.create_table(
        f"{GLOBAL_SUMMARY}_parts",
        sa.Column("date", sa.Date, nullable=False),
        sa.Column("database", sa.Text, nullable=False),
        sa.Column("version", sa.Text, nullable=False),
        sa.Column("rows", JSONB, nullable=False),
        sa.Column("day", JSONB, nullable=False),
        sa.Column("computed_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("date", "database", name=f"{GLOBAL_SUMMARY}_parts_pkey"),
    )


def _create_days(table: str, *columns: sa.Column[Any]) -> None:
    """A table of days: how complete each is, and these columns."""
    op.create_table(
        table,
        sa.Column("date", sa.Date, nullable=False),
        *(
            sa.Column(f"tenants_{name}", sa.Integer, nullable=False)
            for name in ("expected", "computed", "held_back", "open", "counter_only", "missing")
        ),
        sa.Column("missing_tenants", sa.ARRAY(sa.Text), nullable=False),
        sa.Column("job_count", sa.BigInteger, nullable=False),
        *columns,
        sa.Column("computed_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("date", name=f"{table}_pkey"),
    )


def downgrade_shared() -> None:
    """Takes it back: the summaries can be made again at any time."""
    for table in (f"{GLOBAL_SUMMARY}_parts", f"{GLOBAL_SUMMARY}_days", GLOBAL_SUMMARY):
        op.drop_table(table)
    op.drop_table(SUMMARY_DAYS)
    _drop(SUMMARY, SUMMARY_COLUMNS)


def _add(table: str, columns: Mapping[str, str], *clauses: str) -> None:
    added = (f"ADD COLUMN {name} {type_}" for name, type_ in columns.items())
    op.execute(f"ALTER TABLE {table} {', '.join([*added, *clauses])}")


def _drop(table: str, columns: Iterable[str], *clauses: str) -> None:
    op.execute(f"ALTER TABLE {table} {', '.join([*(f'DROP COLUMN {name}' for name in columns), *clauses])}")
