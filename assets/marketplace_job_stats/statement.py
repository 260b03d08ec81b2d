"""Statements over the tables of one tenant: texts that are composed once, into which each tenant's schema is put.

Nothing but `pg_catalog` is on the search path when they run, so no function, operator or type that a tenant's owner has
made can be found by one of their names: every table is named with its schema.
"""

from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa
from psycopg import sql


class Statement:
    """A statement with named parameters, and `{schema}` wherever a table of the tenant is named.

    `parts` are pieces of SQL that it shares with others, by the names that stand for them in its text.
    """

    def __init__(self, text: str, **parts: str) -> None:
        pieces: dict[str, sql.Composable] = {name: sql.SQL(part) for name, part in parts.items()}
        composed = sql.SQL(text).format(schema=sql.SQL("{schema}"), **pieces)
        self._template = sql.SQL(composed.as_string())

    def text(self, schema: str) -> str:
        """The statement for this tenant."""
        return self._template.format(schema=sql.Identifier(schema)).as_string()

    def run(self, connection: sa.Connection, schema: str, parameters: dict[str, Any]) -> Sequence[Any]:
        """Its rows. Raises what SQLAlchemy makes of the database's errors."""
        result = connection.exec_driver_sql(self.text(schema), parameters)
        return result.all() if result.returns_rows else []
