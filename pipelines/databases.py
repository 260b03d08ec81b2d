"""The databases whose summaries are added up: their names and URLs, from the environment, and connections to read them.

A URL is read when a connection is made, and is held by no object that Dagster shows or stores.
"""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import dagster as dg
import sqlalchemy as sa

from pipelines.database import connected, conninfo, create_engine
from pipelines.settings import UsageError

NAMES = "STATS_DATABASES"


def url_variable(name: str) -> str:
    """The variable that holds the URL of this database."""
    return f"STATS_DATABASE_URL_{name}"


def database_names(env: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """The databases in `STATS_DATABASES`, each by its key prefix. Raises UsageError, which repeats no URL."""
    names = tuple(env.get(NAMES, "").replace(",", " ").split())
    if not names or len(set(names)) < len(names) or not all(re.fullmatch(r"[A-Za-z0-9_]+", name) for name in names):
        raise UsageError(
            f"{NAMES} has to name the databases by their STATS_KEY_PREFIX, each once: for instance {NAMES}='eu us'."
        )
    for name in names:
        if not env.get(url_variable(name), "").strip():
            raise UsageError(f"{url_variable(name)} is not set: it says where the summary of {name} is read.")
    return names


class OtherDatabases(dg.ConfigurableResource):  # type: ignore[type-arg]
    """The databases of these names, to be read only."""

    names: list[str]
    lock_timeout_ms: int
    statement_timeout_ms: int

    @contextmanager
    def connect(self, name: str) -> Iterator[sa.Connection]:
        """A connection to one of them. Raises UsageError if there is none to be had."""
        where = conninfo(url_variable(name))
        engine = create_engine(
            where,
            is_reader=True,
            lock_timeout=self.lock_timeout_ms,
            statement_timeout=self.statement_timeout_ms,
            row_security="off",  # A policy that hides rows is an error: they would be missing in the numbers.
            default_transaction_read_only="on",
        )
        with connected(engine, where) as connection:
            yield connection
