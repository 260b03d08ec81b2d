"""What a migrated tenant looks like: names, columns, keys, and the view under the old name.

The one place of the DDL. `migrations.drift` and the tests compare it with `models.stats`, which it must not import:
what a revision means may not change with the models.
"""

from migrations.shape import LEDGER, NEW, SUMMARY, Column

UNIQUE = "uq_marketplace_job_stats_action_marketplace_date"
CHECK = "ck_marketplace_job_stats_marketplace"
INDEX = "ix_marketplace_job_stats_marketplace_created_at"
OLD_UNIQUE = "uq_vinted_job_stats_action_date"
LOSSLESS = "ck_vinted_job_stats_lossless_downgrade"
OLD_KEY = ("action_type_id", "date")
NEW_KEY = ("action_type_id", "marketplace", "date")
MARKETPLACES = ("vinted", "ebay", "etsy")

CHECK_SQL = "CHECK (marketplace IN ({}))".format(", ".join(f"'{name}'" for name in MARKETPLACES))

INTEGER, BIGINT, TIMESTAMP = "integer", "bigint", "timestamp with time zone"
MARKETPLACE = "character varying(20)"
# Our columns in the order of a new table: type, whether null is refused, and the default.
OLD_COLUMNS = {
    "action_type_id": Column(INTEGER, True, None),
    "date": Column("date", True, None),
    "total_jobs": Column(INTEGER, True, "0"),
    "success_count": Column(INTEGER, True, "0"),
    "failure_count": Column(INTEGER, True, "0"),
    "avg_duration_ms": Column(INTEGER, False, None),
    "created_at": Column(TIMESTAMP, True, "now()"),
}
ADDED_COLUMNS = {
    "marketplace": Column(MARKETPLACE, True, "'vinted'::character varying"),
    "cancelled_count": Column(INTEGER, False, None),
    "expired_count": Column(INTEGER, False, None),
    "retry_count": Column(BIGINT, False, None),
    "duration_count": Column(INTEGER, False, None),
    "duration_sum_ms": Column(BIGINT, False, None),
    "p50_duration_ms": Column("double precision", False, None),
    "p95_duration_ms": Column("double precision", False, None),
    "duration_sketch_keys": Column("integer[]", False, None),
    "duration_sketch_counts": Column("bigint[]", False, None),
    "duration_sketch_version": Column("smallint", False, None),
    "total_tasks": Column(INTEGER, False, None),
    "task_success_count": Column(INTEGER, False, None),
    "task_failure_count": Column(INTEGER, False, None),
    "task_retry_count": Column(BIGINT, False, None),
    "computed_at": Column(TIMESTAMP, False, None),
}
COLUMNS = OLD_COLUMNS | ADDED_COLUMNS
SUMMARY_COLUMNS = {
    "date": Column("date", True, None),
    "marketplace": Column(MARKETPLACE, True, None),
    "action_code": Column("text", True, None),
    "action_name": Column("text", True, None),
    "tenants_active": Column(INTEGER, True, None),
    "total_jobs": Column(BIGINT, True, None),
    "success_count": Column(BIGINT, True, None),
    "failure_count": Column(BIGINT, True, None),
    "success_rate": Column("double precision", False, None),
    "cancelled_count": Column(BIGINT, True, None),
    "expired_count": Column(BIGINT, True, None),
    "retry_count": Column(BIGINT, True, None),
    "duration_count": Column(BIGINT, True, None),
    "duration_sum_ms": Column(BIGINT, True, None),
    "avg_duration_ms": Column(INTEGER, False, None),
    "p50_duration_ms": Column("double precision", False, None),
    "p95_duration_ms": Column("double precision", False, None),
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

# What stands in for a null of the old table where there must be none.
FILLED = {
    "total_jobs": "0",
    "success_count": "0",
    "failure_count": "0",
    "created_at": "date",
    "marketplace": "'vinted'",
}

# What the old readers and writers see under the old name. PostgreSQL lets them write through it.
_VIEW_COLUMNS = ("id", *OLD_COLUMNS)
VIEW_SQL = f"SELECT {', '.join(_VIEW_COLUMNS)} FROM {{table}} WHERE marketplace = 'vinted'"
VIEW_READ_BACK = f"SELECT {', '.join(_VIEW_COLUMNS)} FROM {NEW} WHERE ((marketplace)::text = 'vinted'::text)"


def definition(column: Column) -> str:
    """A column's type, null and default as SQL."""
    null = " NOT NULL" if column.not_null else ""
    return f"{column.type}{null}" + (f" DEFAULT {column.default}" if column.default else "")


def _definitions(columns: dict[str, Column]) -> str:
    return ", ".join(f"{name} {definition(column)}" for name, column in columns.items())


# What follows CREATE TABLE.
NEW_TABLE_SQL = (
    f"(id serial, {_definitions(COLUMNS)}, CONSTRAINT {NEW}_pkey PRIMARY KEY (id), "
    f"CONSTRAINT {CHECK} {CHECK_SQL}, CONSTRAINT {UNIQUE} UNIQUE ({', '.join(NEW_KEY)}))"
)
LEDGER_SQL = (
    f"({_definitions(LEDGER_COLUMNS)}, CONSTRAINT {LEDGER}_pkey PRIMARY KEY (date), "
    f"CONSTRAINT ck_{LEDGER}_outcome CHECK (outcome IN ('computed', 'held_back')))"
)
SUMMARY_SQL = (
    f"({_definitions(SUMMARY_COLUMNS)}, CONSTRAINT {SUMMARY}_pkey PRIMARY KEY (date, marketplace, action_code))"
)
