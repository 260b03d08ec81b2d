"""From `vinted_job_stats` to `marketplace_job_stats`, and its ledger; and the summary in our own schema.

This first revision meets tenants in many shapes, so it converges: what is to be done was planned from the tenant's real
shape (`migrations.converge`). Later revisions can rely on the canonical shape, and are plain.
"""

from alembic import op

from migrations.converge import Plan
from models import SHARED

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade(plan: Plan) -> None:
    (upgrade_shared if plan.schema == SHARED else upgrade_tenant)(plan)


def downgrade(plan: Plan) -> None:
    (downgrade_shared if plan.schema == SHARED else downgrade_tenant)(plan)


def upgrade_tenant(plan: Plan) -> None:
    """Brings one tenant to the new table."""
    plan.execute(op.get_bind())


def downgrade_tenant(plan: Plan) -> None:
    """Brings one tenant back to the old table; fails if rows of other marketplaces would be lost."""
    plan.execute(op.get_bind())


def upgrade_shared(plan: Plan) -> None:
    """Creates the summary."""
    plan.execute(op.get_bind())


def downgrade_shared(plan: Plan) -> None:
    """Drops the summary: all of it can be computed again."""
    plan.execute(op.get_bind())
