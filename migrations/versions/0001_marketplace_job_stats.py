"""From `vinted_job_stats` to `marketplace_job_stats`, and its ledger.

This first revision meets tenants in many shapes, so it converges (`migrations.converge`): what is missing is added,
what is there is kept. Later revisions can rely on the canonical shape, and are plain.
"""

from alembic import op

from migrations import converge
from migrations.shape import Shape

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade(shape: Shape) -> None:
    """Brings one tenant to the new table."""
    for statement in converge.upgrade(shape):
        op.execute(statement)


def downgrade(shape: Shape) -> None:
    """Brings one tenant back to the old table; fails if rows of other marketplaces would be lost."""
    for statement in converge.downgrade(shape):
        op.execute(statement)
