"""${message}"""

import sqlalchemy as sa
from alembic import op

revision = ${repr(up_revision)}
down_revision = ${repr(down_revision)}
branch_labels = ${repr(branch_labels)}
depends_on = ${repr(depends_on)}


def upgrade(target: str) -> None:
    globals()[f"upgrade_{target}"]()


def downgrade(target: str) -> None:
    globals()[f"downgrade_{target}"]()


def upgrade_tenant() -> None:
    """Changes the template and every tenant; name no schema."""


def downgrade_tenant() -> None:
    """Takes it back."""


def upgrade_shared() -> None:
    """Changes our own schema, `marketplace_stats`; name no schema."""


def downgrade_shared() -> None:
    """Takes it back."""
