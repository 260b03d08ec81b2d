"""${message}"""

from alembic import op

from migrations.shape import Shape

revision = ${repr(up_revision)}
down_revision = ${repr(down_revision)}
branch_labels = ${repr(branch_labels)}
depends_on = ${repr(depends_on)}


def upgrade(shape: Shape) -> None:
    """Changes one tenant, `shape.schema`; name it, quoted, in every statement."""


def downgrade(shape: Shape) -> None:
    """Takes it back."""
