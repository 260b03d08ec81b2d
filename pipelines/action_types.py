"""The names of the actions, which are decoration: without them all numbers are the same."""

import sqlalchemy as sa

from models.sources import MarketplaceActionType

UNKNOWN = "unknown"
"""Code and name of an action that has none."""

_types = MarketplaceActionType.__table__
_id = sa.cast(_types.c.id, sa.BigInteger).label("id")  # In its own type, a text or numeric, it would be no job's.


def action_types(connection: sa.Connection) -> dict[int, tuple[str, str]] | None:
    """Code and name of each action type by its id; None if there is no such table.

    Raises a DBAPIError if it cannot be read just now: that a name is not known is something else.
    """
    with connection.begin():
        if connection.scalar(sa.select(sa.func.to_regclass(_types.fullname))) is None:
            return None
        rows = connection.execute(sa.select(_id, _types.c.code, _types.c.name).where(_types.c.code.is_not(None)))
        return {row.id: (row.code, row.name if row.name is not None else row.code) for row in rows}
