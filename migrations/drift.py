"""`python -m migrations.drift`: where the tables of the template and the tenants differ from the models.

Prints one line per difference; ends with status 0 if there is none, 1 if there are some. Changes nothing: what the
models mean is asked of PostgreSQL itself, with temporary tables.
"""

import re
import sys
from collections.abc import Iterator

import click
import sqlalchemy as sa

from migrations.canonical import VIEW_READ_BACK
from migrations.converge import has_legacy_view
from migrations.shape import LEDGER, NEW, OLD, SUMMARY, Relation, Shape, read_shapes
from models import SHARED
from models.summary import MarketplaceDailySummary
from pipelines.database import connected, conninfo, create_engine, server_and_database
from pipelines.tenants import find_schemas


def differences(shape: Shape, expected: Shape) -> Iterator[str]:
    """One sentence per difference between a tenant's tables and the expected ones. Extra columns and keys count too."""
    for name in (SUMMARY,) if shape.schema == SHARED else (NEW, LEDGER):
        table = shape.table(name)
        if table is None:
            yield f"{name} is missing"
        else:
            yield from _compare(table, expected.relations[name], has_legacy_view(shape))
    view = shape.view(OLD)
    if shape.table(OLD):
        yield f"{OLD} is a table"
    elif view and view.view != VIEW_READ_BACK:
        yield f"the view {OLD} selects something else"
    elif not view and has_legacy_view(shape):
        yield f"the view {OLD} is missing, or the default of {NEW}.marketplace should go with it"


def _compare(table: Relation, expected: Relation, legacy_view: bool) -> Iterator[str]:
    for name in sorted(expected.columns.keys() | table.columns.keys()):
        have, want = table.columns.get(name), expected.columns.get(name)
        if have is None or want is None:
            yield f"{table.name}.{name} is {'missing' if have is None else 'not in the models'}"
            continue
        if have.type != want.type and not (name == "id" and have.type in ("smallint", "bigint")):
            yield f"{table.name}.{name} is {have.type}, not {want.type}"
        if have.not_null != want.not_null:
            yield f"{table.name}.{name} {'refuses' if have.not_null else 'allows'} null"
        # Ids come from a sequence of the tenant's own, or from the template's.
        is_free = name == "id" or (name == "marketplace" and not legacy_view)
        if have.default != want.default and not is_free:
            yield f"{table.name}.{name} has the default {have.default}, not {want.default}"
    have_keys, want_keys = _keys(table), _keys(expected)
    for key in sorted(want_keys - have_keys):
        yield f"{table.name} has no {' '.join(key)}"
    for key in sorted(have_keys - want_keys):
        yield f"{table.name} has {' '.join(key)}, which is not in the models"


def _keys(table: Relation) -> set[tuple[str, str]]:
    """Constraints and indexes: name, and what they are in PostgreSQL's words."""
    constraints = {(key.name, re.sub(r"::\w+( varying)?(\[\])?", "", key.definition)) for key in table.constraints}
    return constraints | {(name, f"INDEX ({', '.join(columns)})") for name, columns in table.indexes.items()}


def expected_shape(connection: sa.Connection) -> Shape:
    """The models as PostgreSQL understands them: created as temporary tables, read, and rolled back."""
    metadata = sa.MetaData()
    for table in MarketplaceDailySummary.metadata.tables.values():
        table.to_metadata(metadata, schema="pg_temp")
    with connection.begin() as transaction:
        metadata.create_all(connection, checkfirst=False)
        schema = connection.scalar(sa.text("SELECT nspname FROM pg_namespace WHERE oid = pg_my_temp_schema()"))
        shape = read_shapes(connection, [str(schema)])[str(schema)]
        transaction.rollback()
    return shape


@click.command(help=__doc__)
def main() -> None:
    where = conninfo("MIGRATION_DATABASE_URL")
    engine = create_engine(where)
    count = 0
    with connected(engine, where) as connection:
        click.echo(f"Comparing {server_and_database(connection)}")
        expected = expected_shape(connection)
        with connection.begin():
            schemas = [*find_schemas(connection), SHARED]
        for start in range(0, len(schemas), 500):
            with connection.begin():
                shapes = read_shapes(connection, schemas[start : start + 500])
            for schema, shape in shapes.items():
                for difference in differences(shape, expected):
                    count += 1
                    click.echo(f"{schema}: {difference}")
    click.echo(f"{len(schemas)} schemas compared with the models, {count} differences")
    sys.exit(1 if count else 0)


if __name__ == "__main__":
    main()
