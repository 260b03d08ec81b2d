"""What revision 0001 means: the old table, and the tables that it makes of it. Frozen.

It must not follow the models: a later revision would find its column there already. It is used by 0001 alone, and to
repair a tenant that is recorded at 0001 before later revisions run.

Names are compared as texts, here and wherever rows are chosen: an owner's operator for the very type of a column would
be preferred to PostgreSQL's own, for any text, and run with the rights of whoever writes.
"""

from migrations.shape import LEDGER, NEW, SUMMARY, Column
from migrations.target import Key, Table, Target

REVISION = "0001"

UNIQUE = "uq_marketplace_job_stats_action_marketplace_date"
CHECK = "ck_marketplace_job_stats_marketplace"
INDEX = "ix_marketplace_job_stats_marketplace_created_at"
OLD_UNIQUE = "uq_vinted_job_stats_action_date"
LOSSLESS = "ck_vinted_job_stats_lossless_downgrade"
OLD_KEY = ("action_type_id", "date")
NEW_KEY = ("action_type_id", "marketplace", "date")

INTEGER, BIGINT, DOUBLE = "integer", "bigint", "double precision"
TIMESTAMP, MARKETPLACE = "timestamp with time zone", "character varying(20)"
# The columns of the old table in the order of a new one: type, whether null is refused, and the default.
OLD_COLUMNS = {
    "id": Column(INTEGER, True, "serial"),
    "action_type_id": Column(INTEGER, True, None),
    "date": Column("date", True, None),
    "total_jobs": Column(INTEGER, True, "0"),
    "success_count": Column(INTEGER, True, "0"),
    "failure_count": Column(INTEGER, True, "0"),
    "avg_duration_ms": Column(INTEGER, False, None),
    "created_at": Column(TIMESTAMP, True, "now()"),
}
ADDED_COLUMNS = {
    "marketplace": Column(MARKETPLACE, True, "'vinted'"),
    "cancelled_count": Column(INTEGER, False, None),
    "expired_count": Column(INTEGER, False, None),
    "retry_count": Column(BIGINT, False, None),
    "duration_count": Column(INTEGER, False, None),
    "duration_sum_ms": Column(BIGINT, False, None),
    "p50_duration_ms": Column(DOUBLE, False, None),
    "p95_duration_ms": Column(DOUBLE, False, None),
    "duration_sketch_keys": Column("integer[]", False, None),
    "duration_sketch_counts": Column("bigint[]", False, None),
    "duration_sketch_version": Column("smallint", False, None),
    "total_tasks": Column(INTEGER, False, None),
    "task_success_count": Column(INTEGER, False, None),
    "task_failure_count": Column(INTEGER, False, None),
    "task_retry_count": Column(BIGINT, False, None),
    "computed_at": Column(TIMESTAMP, False, None),
}
LEDGER_COLUMNS = {
    "date": Column("date", True, None),
    "outcome": Column("character varying(20)", True, None),
    "time_zone": Column("text", True, None),
    "job_count": Column(INTEGER, True, None),
    "task_count": Column(INTEGER, True, None),
    "stored_job_count": Column(INTEGER, True, None),
    "stored_task_count": Column(INTEGER, True, None),
    "unknown_marketplace_count": Column(INTEGER, True, None),
    "bad_duration_count": Column(INTEGER, True, None),
    "run_id": Column("text", True, None),
    "changed_at": Column(TIMESTAMP, True, None),
}
SUMMARY_COLUMNS = {
    "date": Column("date", True, None),
    "marketplace": Column(MARKETPLACE, True, None),
    "action_code": Column("text", True, None),
    "action_name": Column("text", True, None),
    "tenants_active": Column(INTEGER, True, None),
    "total_jobs": Column(BIGINT, True, None),
    "success_count": Column(BIGINT, True, None),
    "failure_count": Column(BIGINT, True, None),
    "success_rate": Column(DOUBLE, False, None),
    "cancelled_count": Column(BIGINT, True, None),
    "expired_count": Column(BIGINT, True, None),
    "retry_count": Column(BIGINT, True, None),
    "duration_count": Column(BIGINT, True, None),
    "duration_sum_ms": Column(BIGINT, True, None),
    "avg_duration_ms": Column(INTEGER, False, None),
    "p50_duration_ms": Column(DOUBLE, False, None),
    "p95_duration_ms": Column(DOUBLE, False, None),
    "duration_sketch_keys": Column("integer[]", False, None),
    "duration_sketch_counts": Column("bigint[]", False, None),
    "duration_sketch_version": Column("smallint", False, None),
    "total_tasks": Column(BIGINT, True, None),
    "task_success_count": Column(BIGINT, True, None),
    "task_failure_count": Column(BIGINT, True, None),
    "task_retry_count": Column(BIGINT, True, None),
    "top_failing": Column("jsonb", True, None),
    "computed_at": Column(TIMESTAMP, True, None),
}


def _primary_key(table: str, *columns: str) -> Key:
    return Key("p", f"{table}_pkey", columns, f"PRIMARY KEY ({', '.join(columns)})")


STATS = Table(
    NEW,
    OLD_COLUMNS | ADDED_COLUMNS,
    (
        _primary_key(NEW, "id"),
        Key("c", CHECK, ("marketplace",), "CHECK (marketplace::text IN ('vinted', 'ebay', 'etsy'))"),
        Key("u", UNIQUE, NEW_KEY, f"UNIQUE ({', '.join(NEW_KEY)})"),
        Key("x", INDEX, ("marketplace", "created_at"), "btree (marketplace, created_at)"),
    ),
)
_OUTCOME = Key("c", f"ck_{LEDGER}_outcome", ("outcome",), "CHECK (outcome::text IN ('computed', 'held_back'))")
FIRST: Target = {NEW: STATS, LEDGER: Table(LEDGER, LEDGER_COLUMNS, (_primary_key(LEDGER, "date"), _OUTCOME))}
SHARED_FIRST: Target = {
    SUMMARY: Table(SUMMARY, SUMMARY_COLUMNS, (_primary_key(SUMMARY, "date", "marketplace", "action_code"),))
}
