"""Words, sentences and tables that several assets use to say what has happened."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import dagster as dg
import sqlalchemy as sa

from models import TENANT
from models.sources import MarketplaceJob
from models.stats import MarketplaceJobStats
from pipelines.database import SERVER_REMEDIES, error_text
from pipelines.failure import TenantError
from pipelines.tenants import quoted

MOST_ROWS = 20
"""Every row of a table is stored with every event, and Dagit does not page."""

_REMEDIES = {
    "42501": "migrate it with MIGRATION_DATABASE_URL set, which grants what is missing: see `Roles` in the README",
    "22003": "a number is too large for its column: correct the row that holds it",
    "21000": "two jobs have the same id and created_at: delete or correct one of them",
    "2200H": "the ids have used up their sequence: ALTER TABLE ... ALTER id TYPE bigint on our tables that take ids "
    "from it, then ALTER SEQUENCE ... AS bigint NO MAXVALUE",
    "23505": "its sequence lies behind its ids, as after a restore: run `alembic -x tenant=<schema> upgrade head`, "
    "which sets it right",
    "40001": "other sessions were in its way each time: run the tenant again",
    "40P01": "other sessions were in its way each time: run the tenant again",
    "42703": "if it is a column of the application's, that has another shape than is known here: add the column; else "
    "migrate the tenant",
    "42883": "a column of the application has another type than is known here: change it to that of the other tenants",
    "42P01": "if it is not a table of ours: nothing but pg_catalog is searched, so a trigger, or a function of a view, "
    "has to name its schema",
    "55P03": "another session kept a lock for longer than STATS_LOCK_TIMEOUT_MS: find it, and run the tenant again",
    "57014": "it took longer than STATS_STATEMENT_TIMEOUT_MS: raise it, or run fewer days at once",
    **SERVER_REMEDIES,
}


def explain(error: Exception) -> str:
    """An error of a tenant as one sentence: the server's message and detail, the SQLSTATE, and a remedy if known."""
    if isinstance(error, TenantError):
        return str(error)
    if not isinstance(error, sa.exc.DBAPIError):
        return f"{type(error).__name__}: {error}"
    text = error_text(error)
    remedy = _constraint_remedy(error.orig) or _REMEDIES.get(getattr(error.orig, "sqlstate", None) or "")
    if "row-level security" in text:
        remedy = "rows would be hidden: give the role BYPASSRLS, or take the policy away"
    return text + (f": {remedy}" if remedy else "")


def _constraint_remedy(error: Any) -> str | None:
    """What to do about a constraint that refuses a row of ours; None if it is another error, or one of our own keys."""
    sqlstate, diagnosis = getattr(error, "sqlstate", None), getattr(error, "diag", None)
    if diagnosis is None or sqlstate not in ("23502", "23503", "23505", "23514", "23P01"):
        return None
    column, constraint = diagnosis.column_name, diagnosis.constraint_name or ""
    table = f"{diagnosis.schema_name}.{diagnosis.table_name}"
    if sqlstate != "23502":
        is_ours = constraint.endswith("_pkey") or constraint.startswith("ck_marketplace_")
        return None if is_ours else f"{quoted(constraint)} of {table} is none of ours: drop it"
    ours = MarketplaceJobStats.metadata.tables.get(f"{TENANT}.{diagnosis.table_name}")
    if ours is not None and column not in ours.columns:
        return (
            f"it is none of our columns, and has no default: ALTER TABLE {table} ALTER {quoted(column)} DROP NOT NULL, "
            "or drop it"
        )
    return (
        f"SELECT * FROM {diagnosis.schema_name}.{MarketplaceJob.__tablename__} WHERE {column} IS NULL shows the rows "
        "of the application: correct them"
    )


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """`1 day`, `2 days`."""
    return f"{number} {noun if number == 1 else plural or noun + 's'}"


def first_reasons(tenants: Mapping[str, str]) -> str:
    """The first few of the tenants with their reason."""
    first = "; ".join(f"{schema}: {reason}" for schema, reason in list(tenants.items())[:3])
    return first + (f"; and {len(tenants) - 3} more" if len(tenants) > 3 else "")


def code_span(text: str) -> str:
    """A text from outside within Markdown, as it is: no link, picture or emphasis is made of it."""
    shown = "".join(one if one.isprintable() else "\N{REPLACEMENT CHARACTER}" for one in text)
    fence = "`" * (max(map(len, re.findall("`+", shown)), default=0) + 1)
    space = " " if shown[:1] in ("`", " ", "") or shown[-1:] in ("`", " ") else ""
    return f"{fence}{space}{shown}{space}{fence}"


def table(rows: Iterable[Mapping[str, Any]]) -> dg.MetadataValue[Any]:
    records = [dg.TableRecord(dict(row)) for row in list(rows)[:MOST_ROWS]]
    if not records:
        return dg.MetadataValue.text("no rows")
    return dg.MetadataValue.table(records)
