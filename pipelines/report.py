"""`python -m pipelines.report`: the report's page as a file, of one customer or of all. The database is only read."""

from datetime import UTC, datetime
from pathlib import Path

import click
import sqlalchemy as sa

from assets.marketplace_report import page, read
from assets.reporting import explain
from pipelines.database import server_and_database
from pipelines.partitions import day_partitions
from pipelines.resources import TenantDatabase
from pipelines.settings import Settings, UsageError


@click.command(
    help="Writes the report's page, one HTML file that needs no network: of one customer, from its own tables, or of "
    "all customers together.\n\nExample: python -m pipelines.report --tenant user_7 --output user_7.html"
)
@click.option("--tenant", help="A schema, for instance user_7; default all customers together.")
@click.option("--output", required=True, type=click.Path(dir_okay=False, path_type=Path), help="The file.")
def main(tenant: str | None, output: Path) -> None:
    settings = Settings.from_env()
    database = TenantDatabase(
        workers=settings.workers,
        lock_timeout_ms=settings.lock_timeout_ms,
        statement_timeout_ms=settings.statement_timeout_ms,
    )
    try:
        window = read.shown_and_before(day_partitions(settings))
        with database.connect() as (engine, connection):
            where = server_and_database(connection)
            click.echo(f"Reading {tenant or 'all customers'} from {where}", err=True)
            material = (
                read.of_tenant(connection, tenant, window)
                if tenant
                else read.of_all(database, engine, connection, window)
            )
        html = page.render(
            material, window.dates[-1], time_zone=window.time_zone, database=where, made_at=datetime.now(UTC)
        )
        page.write(output, html)
    except sa.exc.DBAPIError as error:
        raise UsageError(f"The stats could not be read: {explain(error)}.") from None
    except OSError as error:
        raise UsageError(f"The page could not be written: {error}. Check --output.") from None
    click.echo(f"{output} has {window.dates[0]} to {window.dates[-1]}, {len(html) / 1e6:.1f} MB.", err=True)


if __name__ == "__main__":
    main()
