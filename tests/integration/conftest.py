"""Rows in three tenants, and the URL by which a run reaches them."""

from datetime import timedelta
from typing import Any

import psycopg
import pytest

from tests import application
from tests.conftest import run_url
from tests.integration.common import NOON, TENANTS, job


@pytest.fixture
def source_rows(connection: psycopg.Connection[Any]) -> None:
    """In each of the three tenants: two jobs on the 15th, one failed, with a task; and an eBay job on the 17th."""
    for schema in TENANTS:
        rows = [
            job(id=1),
            job(id=2, status="failed", retry_count=2),
            job(id=3, marketplace="ebay", action_type_id=5, completed_at=NOON + timedelta(days=2)),
        ]
        application.insert(connection, schema, "marketplace_jobs", rows)
        application.insert(connection, schema, "marketplace_tasks", [{"job_id": 2, "status": "timeout"}])


@pytest.fixture
def url(database: str, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("DATABASE_URL", run_url(database))
    return run_url(database)
