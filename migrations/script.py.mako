"""${message}"""

from alembic import op

from migrations.converge import Plan

revision = ${repr(up_revision)}
down_revision = ${repr(down_revision)}
branch_labels = ${repr(branch_labels)}
depends_on = ${repr(depends_on)}


def upgrade(plan: Plan) -> None:
    """Changes one tenant, `plan.schema`; name it, quoted, in every statement."""


def downgrade(plan: Plan) -> None:
    """Takes it back."""
