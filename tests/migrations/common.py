"""What the tests of the migration share: the command, the catalog, and the comparison with the models."""

import io
from contextlib import redirect_stderr, redirect_stdout
from typing import Any

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.config import CommandLine
from alembic.migration import MigrationContext
from click.testing import CliRunner

from migrations import drift
from migrations.shape import NEW, SESSION, Shape, read_shapes
from migrations.target import HEAD
from models.stats import StatsBase
from pipelines.database import create_engine
from tests.conftest import ROOT, url_of

SCHEMAS = ("template_tenant", "user_1", "user_2", "user_10")


def shapes(conninfo: str, *schemas: str) -> dict[str, Shape]:
    """What the catalog says of these schemas, by default of those that every database here has."""
    engine = create_engine(conninfo, **SESSION)
    with engine.connect() as connection:
        found = read_shapes(connection, schemas or SCHEMAS)
    engine.dispose()
    return found


def alembic(conninfo: str, *arguments: str, status: int | None = 0) -> str:
    """What the command line prints; asserts its exit status, if one is given. In this process: much quicker."""
    output = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(output), redirect_stderr(output):
        patch.setenv("DATABASE_URL", url_of(conninfo))
        try:
            CommandLine().main(["-c", str(ROOT / "alembic.ini"), *arguments])
            code: Any = 0
        except SystemExit as end:
            code = end.code
    assert code == status or status is None, output.getvalue()
    return output.getvalue()


def drift_of(conninfo: str) -> list[str]:
    """The lines of `python -m migrations.drift` but its first and its last."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DATABASE_URL", url_of(conninfo))
        result = CliRunner().invoke(drift.main)
    assert result.exit_code in (0, 1), result.output
    return result.output.splitlines()[1:-1]


def differences(conninfo: str, schema: str) -> list[Any]:
    """What Alembic's autogenerate finds between a tenant and the models, constraints by name included."""
    metadata = sa.MetaData()
    for table in StatsBase.metadata.tables.values():
        table.to_metadata(metadata, schema=schema)
    engine = create_engine(conninfo)

    def ours(name: str | None, kind: str, parents: Any) -> bool:
        return kind != "schema" or name == schema

    def owned(item: Any, name: str | None, kind: str, reflected: bool, compared: Any) -> bool:
        return kind != "table" or name in HEAD

    with engine.connect() as connection:
        context = MigrationContext.configure(
            connection,
            opts={
                "include_schemas": True,
                "include_name": ours,
                "include_object": owned,
                "compare_server_default": True,
            },
        )
        found = compare_metadata(context, metadata)
    engine.dispose()
    # A tenant keeps where its ids come from: a shared sequence, one of its own, or an identity.
    return [
        difference
        for difference in found
        if not str(difference).startswith(f"[('modify_default', '{schema}', '{NEW}', 'id'")
    ]
