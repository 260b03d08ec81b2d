"""The names of the actions, which are decoration: without them all numbers are the same."""

from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa

from models.sources import MarketplaceActionType

UNKNOWN = "unknown"
"""Code and name of an action that has none."""

_types = MarketplaceActionType.__table__


def action_types(connection: sa.Connection) -> Sequence[sa.Row[Any, Any, Any]]:
    """Id, code and name of each action type; none if the table is missing or may not be read."""
    try:
        with connection.begin():
            query = sa.select(_types.c.id, _types.c.code, _types.c.name).where(_types.c.code.is_not(None))
            return connection.execute(query).all()
    except sa.exc.DBAPIError:
        return []
