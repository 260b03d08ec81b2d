"""`python -m migrations.drift`: where the tables of the template and the tenants differ from the models.

Prints one line per difference; ends with status 0 if there is none, 1 if there are some. Changes nothing.
"""

import sys
from collections.abc import Iterator

import click

from migrations.converge import is_key
from migrations.shape import NEW, OLD, SESSION, Relation, Shape, plain, read_shapes
from migrations.states import has_legacy_view
from migrations.target import HEAD, SHARED_HEAD, Key, Table, same_default
from migrations.view import defaults, is_good_view, view_columns
from models import SHARED
from pipelines.database import connected, conninfo, create_engine, server_and_database
from pipelines.tenants import find_schemas


def differences(shape: Shape, shared: bool = False) -> Iterator[str]:
    """One sentence per difference between a schema's tables and the models. Extra columns and keys count too, the order
    of columns does not."""
    for name, want in (SHARED_HEAD if shared else HEAD).items():
        table = shape.table(name)
        if table is None:
            yield f"{name} is missing"
        else:
            yield from _compare(table, want, has_legacy_view(shape) is not False)
    if shared:
        return
    view = shape.view(OLD)
    if shape.table(OLD):
        yield f"{OLD} is a table"
    elif view and not _is_right(view, shape.table(NEW)):
        yield f"the view {OLD} selects something else, or lacks a default"
    elif not view and has_legacy_view(shape):
        yield f"the view {OLD} is missing, or the default of {NEW}.marketplace should go with it"


def _is_right(view: Relation, table: Relation | None) -> bool:
    shown = view_columns(None, table, view, set(), set())
    return is_good_view(view, shown, defaults(table, HEAD[NEW].columns, view))


def _compare(table: Relation, expected: Table, legacy_view: bool) -> Iterator[str]:
    if not table.is_logged:
        yield f"{table.name} is unlogged: a crash would empty it"
    if table.replica_identity == "-":
        yield f"{table.name} has a replica identity by an index that is gone"
    for name in sorted(expected.columns.keys() | table.columns.keys()):
        have, want = table.columns.get(name), expected.columns.get(name)
        if have is None:
            yield f"{table.name}.{name} is missing"
        elif want is None:
            if name not in table.met_columns:
                yield f"{table.name}.{name} is not in the models"
        else:
            if have.type != want.type and not (want.default == "serial" and have.type in ("smallint", "bigint")):
                yield f"{table.name}.{name} is {have.type}, not {want.type}"
            if have.not_null != want.not_null:
                yield f"{table.name}.{name} {'refuses' if have.not_null else 'allows'} null"
            is_free = name == "marketplace" and not legacy_view
            if not same_default(have.default, want.default) and not is_free:
                yield f"{table.name}.{name} has the default {have.default}, not {want.default}"
    yield from _compare_keys(table, expected)


def _compare_keys(table: Relation, expected: Table) -> Iterator[str]:
    def has(want: Key) -> bool:
        if want.kind == "x":
            return plain(table.indexes.get(want.name)) == plain(want.definition)
        return any(have.name == want.name and is_key(have, want) for have in table.constraints)

    right = {key.name for key in expected.keys if has(key)}
    for key in expected.keys:
        if key.name not in right:
            yield f"{table.name} has no {key.name} {key.definition}"
    for constraint in table.constraints:
        if constraint.name not in right:
            text = constraint.definition or f"UNIQUE INDEX ({', '.join(constraint.columns)})"
            yield f"{table.name} has {constraint.name} {text}, which is not in the models"
    for name, text in table.indexes.items():
        if name not in right:
            yield f"{table.name} has INDEX {name} {text}, which is not in the models"


@click.command(help=__doc__)
def main() -> None:
    where = conninfo("MIGRATION_DATABASE_URL")
    engine = create_engine(where, is_reader=True, **SESSION)
    count = 0
    with connected(engine, where) as connection:
        click.echo(f"Comparing {server_and_database(connection)}")
        with connection.begin():
            schemas = [*find_schemas(connection), SHARED]
        for start in range(0, len(schemas), 500):
            with connection.begin():
                shapes = read_shapes(connection, schemas[start : start + 500])
            for schema, shape in shapes.items():
                for difference in differences(shape, schema == SHARED):
                    count += 1
                    click.echo(f"{schema}: {difference}")
    click.echo(f"{len(schemas)} schemas compared with the models, {count} differences")
    sys.exit(1 if count else 0)


if __name__ == "__main__":
    main()
