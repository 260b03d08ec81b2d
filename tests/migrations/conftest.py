"""A database before the migration, with a row of the old counter in each tenant."""

from collections.abc import Iterator
from datetime import date
from typing import Any

import psycopg
import pytest

from migrations.shape import OLD
from tests import application
from tests.migrations.common import SCHEMAS
from tests.migrations.releases import Release, make_releases

OLD_ROW = {"action_type_id": 1, "date": date(2025, 6, 1), "total_jobs": 3, "success_count": 2, "failure_count": 1}


@pytest.fixture(scope="session")
def releases(tmp_path_factory: pytest.TempPathFactory) -> list[Release]:
    """The project and two releases that follow it."""
    return make_releases(tmp_path_factory.mktemp("releases"))


@pytest.fixture
def old_connection(old_database: str) -> Iterator[psycopg.Connection[Any]]:
    """A connection to it."""
    with psycopg.connect(old_database, autocommit=True) as connection:
        for schema in SCHEMAS[1:]:
            application.insert(connection, schema, OLD, [OLD_ROW | {"avg_duration_ms": 1234}])
        yield connection
