"""From the shape that a tenant has to the statements that make it canonical, and back. Pure: no connection.

`upgrade` and `downgrade` name the state and return the statements, in order, to be run in one transaction.
"""

from collections.abc import Iterator

from migrations.shape import LEDGER, NEW, OLD, Relation, Shape
from pipelines.tenants import quoted

UNIQUE = "uq_marketplace_job_stats_action_marketplace_date"
CHECK = "ck_marketplace_job_stats_marketplace"
INDEX = "ix_marketplace_job_stats_marketplace_created_at"
OLD_KEY = ("action_type_id", "date")
NEW_KEY = ("action_type_id", "marketplace", "date")

CHECK_SQL = "CHECK (marketplace IN ('vinted', 'ebay', 'etsy'))"

# The columns that the old table has, and those that the batch adds; in the order of the table.
OLD_COLUMNS = {
    "action_type_id": "integer NOT NULL",
    "date": "date NOT NULL",
    "total_jobs": "integer NOT NULL DEFAULT 0",
    "success_count": "integer NOT NULL DEFAULT 0",
    "failure_count": "integer NOT NULL DEFAULT 0",
    "avg_duration_ms": "integer",
    "created_at": "timestamp with time zone NOT NULL DEFAULT now()",
}
ADDED_COLUMNS = {
    # A constant default rewrites nothing; it is what makes the rows from before the rename 'vinted'.
    "marketplace": "character varying(20) NOT NULL DEFAULT 'vinted'",
    "cancelled_count": "integer",
    "expired_count": "integer",
    "retry_count": "bigint",
    "duration_count": "integer",
    "duration_sum_ms": "bigint",
    "total_tasks": "integer",
    "task_success_count": "integer",
    "task_failure_count": "integer",
    "task_retry_count": "bigint",
    "computed_at": "timestamp with time zone",
}
LEDGER_SQL = """(
    date date NOT NULL,
    outcome character varying(20) NOT NULL,
    time_zone text NOT NULL,
    job_count integer NOT NULL,
    task_count integer NOT NULL,
    stored_job_count integer NOT NULL,
    stored_task_count integer NOT NULL,
    unknown_marketplace_count integer NOT NULL,
    bad_duration_count integer NOT NULL,
    run_id text NOT NULL,
    changed_at timestamp with time zone NOT NULL,
    CONSTRAINT marketplace_job_stats_days_pkey PRIMARY KEY (date),
    CONSTRAINT ck_marketplace_job_stats_days_outcome CHECK (outcome IN ('computed', 'held_back'))
)"""


class Refusal(Exception):
    """The tenant is in a state that must not be changed without a person; says why, and what to do."""


def upgrade(shape: Shape) -> Iterator[str]:
    """The statements that bring a tenant to the canonical new shape. Raises Refusal."""
    old, new = shape.relations.get(OLD), shape.relations.get(NEW)
    schema = quoted(shape.schema)
    for relation in (old, new):
        if relation and relation.kind != "r":
            raise Refusal(f"{relation.name} is not a plain table: drop or rename it, then run this tenant again")
    if old and new:
        raise Refusal(f"{OLD} and {NEW} both exist: merge one into the other and drop it, then run this tenant again")
    if old:
        yield f"ALTER TABLE {schema}.{OLD} RENAME TO {NEW}"
    if table := old or new:
        yield from _converge(schema, table)
    else:
        columns = {"id": "serial", **OLD_COLUMNS, **ADDED_COLUMNS}
        body = ", ".join(f"{name} {definition}" for name, definition in columns.items())
        yield (
            f"CREATE TABLE {schema}.{NEW} ({body}, CONSTRAINT {NEW}_pkey PRIMARY KEY (id), "
            f"CONSTRAINT {CHECK} {CHECK_SQL}, CONSTRAINT {UNIQUE} UNIQUE ({', '.join(NEW_KEY)}))"
        )
    if not table or ("marketplace", "created_at") not in table.indexes.values():
        yield f"CREATE INDEX {INDEX} ON {schema}.{NEW} (marketplace, created_at)"
    if LEDGER not in shape.relations:
        yield f"CREATE TABLE {schema}.{LEDGER} {LEDGER_SQL}"


def _converge(schema: str, table: Relation) -> Iterator[str]:
    """Columns, constraints and names of a table that is there already."""
    changes = [
        f"ADD COLUMN {name} {definition}" for name, definition in ADDED_COLUMNS.items() if name not in table.columns
    ]
    foreign = [key for key in table.of_kind("f") if key.columns == ("action_type_id",)]
    old_keys = [key for key in table.unique_on(*OLD_KEY) if key.kind == "u"]
    changes += [f"DROP CONSTRAINT {quoted(key.name)}" for key in (*foreign, *old_keys)]
    checks = [check for check in table.of_kind("c") if check.columns == ("marketplace",)]
    changes += [f"DROP CONSTRAINT {quoted(check.name)}" for check in checks if check.name != CHECK]
    if not any(check.name == CHECK for check in checks):
        changes.append(f"ADD CONSTRAINT {CHECK} {CHECK_SQL}")
    keys = table.unique_on(*NEW_KEY)
    if not keys:
        changes.append(f"ADD CONSTRAINT {UNIQUE} UNIQUE ({', '.join(NEW_KEY)})")
    if changes:
        yield f"ALTER TABLE {schema}.{NEW} {', '.join(changes)}"
    for index in table.unique_on(*OLD_KEY):
        if index.kind == "i":
            yield f"DROP INDEX {schema}.{quoted(index.name)}"
    primary = [(key, f"{NEW}_pkey") for key in table.of_kind("p")]
    for constraint, name in (*((key, UNIQUE) for key in keys[:1]), *primary):
        if constraint.name != name:
            yield _rename(schema, constraint.kind, constraint.name, name)
    for found, columns in table.indexes.items():
        if columns == ("marketplace", "created_at") and found != INDEX:
            yield _rename(schema, "i", found, INDEX)


def downgrade(shape: Shape) -> Iterator[str]:
    """The statements that bring a tenant back to the canonical old shape, with its vinted rows. Raises Refusal."""
    table = shape.relations.get(NEW)
    if table is None or OLD in shape.relations:
        raise Refusal(f"there is no {NEW} to take back, or {OLD} is there already")
    schema = quoted(shape.schema)
    # The rows of other marketplaces have no place in the old table: the statement fails rather than lose them.
    yield (
        f"ALTER TABLE {schema}.{NEW} DROP CONSTRAINT {CHECK}, "
        f"ADD CONSTRAINT only_vinted_rows CHECK (marketplace = 'vinted')"
    )
    yield f"DROP INDEX {schema}.{INDEX}"
    drops = ", ".join(f"DROP COLUMN {name}" for name in ADDED_COLUMNS)
    yield (
        f"ALTER TABLE {schema}.{NEW} DROP CONSTRAINT {UNIQUE}, {drops}, "
        f"ADD CONSTRAINT uq_{OLD}_action_date UNIQUE ({', '.join(OLD_KEY)})"
    )
    yield f"ALTER TABLE {schema}.{NEW} RENAME TO {OLD}"
    yield _rename(schema, "p", f"{NEW}_pkey", f"{OLD}_pkey", OLD)
    yield f"DROP TABLE {schema}.{LEDGER}"


def _rename(schema: str, kind: str, old: str, new: str, table: str = NEW) -> str:
    if kind == "i":
        return f"ALTER INDEX {schema}.{quoted(old)} RENAME TO {new}"
    return f"ALTER TABLE {schema}.{table} RENAME CONSTRAINT {quoted(old)} TO {new}"
