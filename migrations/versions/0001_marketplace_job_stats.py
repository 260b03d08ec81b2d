"""From `vinted_job_stats` to `marketplace_job_stats`, and its ledger; and the summary in our own schema.

This first revision meets tenants in many shapes, so it converges from the one that it is given (`migrations.stats`).
Later revisions can rely on what it makes, and are plain.
"""

from collections.abc import Iterable

from alembic import op

from migrations import stats
from migrations.first import FIRST, SHARED_FIRST
from migrations.plan import Given, converge

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade(target: str) -> None:
    globals()[f"upgrade_{target}"]()


def downgrade(target: str) -> None:
    globals()[f"downgrade_{target}"]()


def upgrade_tenant() -> None:
    """Brings one tenant to the new table."""
    _execute(converge(_given(), FIRST, shared=False))


def downgrade_tenant() -> None:
    """Brings one tenant back to the old table; fails if rows of other marketplaces would be lost."""
    given = _given()
    _execute(stats.downgrade(given.shape, given.archive))


def upgrade_shared() -> None:
    """Creates the summary."""
    _execute(converge(_given(), SHARED_FIRST, shared=True))


def downgrade_shared() -> None:
    """Drops the summary: all of it can be computed again."""
    _execute(f"DROP TABLE IF EXISTS {table}" for table in SHARED_FIRST)


def _given() -> Given:
    given: Given = op.get_context().opts["given"]
    return given


def _execute(statements: Iterable[str]) -> None:
    for statement in statements:
        # As it is: `op.execute` would change a tab in the name of a column.
        op.get_context().impl.static_output(f"{statement};")
