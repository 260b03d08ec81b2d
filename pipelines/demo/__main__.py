"""The demo from end to end: make the data, migrate them, compute every day, and print what came out."""

import os
import sys
from datetime import UTC, datetime, timedelta

import click
import psycopg

from pipelines.database import cannot_connect, conninfo
from pipelines.demo import data, home, session, tables
from pipelines.install import taking_turns
from pipelines.settings import Settings, UsageError

COMPARED = "user_7"
"""The tenant whose old counters are compared with what the batch computes."""


@click.command()
def main() -> None:
    """Makes the demo's data in DATABASE_URL, by default the embedded server, and computes them."""
    with taking_turns():
        home.prepare()
        make()


def make(*, once: bool = False) -> None:
    """The demo; with `once` nothing if the database already has tenants."""
    today = datetime.now(UTC).date()
    with _connect() as connection:
        where = f"database {connection.info.dbname} on {connection.info.host}"
        if once and connection.execute("SELECT 1 FROM pg_namespace WHERE nspname ~ '^user_[0-9]+$'").fetchone():
            click.echo(f"There are tenants already in {where}.")
            return
        click.echo(f"Making the demo's customers in {where}")
        data.create(connection, today)
        old = tables.old_counters(connection, COMPARED)

    click.echo("\nMigrating vinted_job_stats to marketplace_job_stats")
    _run("alembic", "upgrade", "head")

    first, last = today - timedelta(days=data.DAY_COUNT), today - timedelta(days=1)
    click.echo(f"\nComputing {first} to {last}")
    days = ("--partition-range", f"{first}...{last}")
    _materialize("marketplace_job_stats", *days)
    with _connect() as connection:
        corrected = data.correct(connection, today)
    click.echo(f"\nThe application has corrected jobs of {corrected}: computing it again, then the sums and the report")
    _materialize("marketplace_job_stats", "--partition", str(corrected))
    _materialize("marketplace_daily_summary", *days)
    _materialize("marketplace_report")

    with _connect() as connection:
        tables.print_drift(connection, COMPARED, old)
        tables.print_last_week(connection, list(data.TENANTS), today)
    click.echo("Look around in Dagit with `make dev`. `make stop` stops the embedded server.")
    click.echo(f"The report, for any browser: {Settings.from_env({}).report_dir / 'marketplace_report.html'}")


def _connect() -> psycopg.Connection[tuple[object, ...]]:
    where = conninfo()
    try:
        return psycopg.connect(where)
    except psycopg.OperationalError as error:
        raise UsageError(cannot_connect(where, error)) from None


def _materialize(asset: str, *days: str) -> None:
    _run("dagster", "asset", "materialize", "-m", "pipelines.definitions", "--select", asset, *days)


def _run(*command: str) -> None:
    """One of the real commands, as a user would give it. Ends the demo with its exit status if it fails."""
    # The demo works on its own database with the default settings, whatever else is configured. And Dagster's command
    # line announces its successor at each call, which is no news for the user of a demo.
    foreign = ("MIGRATION_DATABASE_URL", "STATS_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    environment["PYTHONWARNINGS"] = "ignore"
    status = session.run(command, environment)
    if status:
        sys.exit(status)


if __name__ == "__main__":
    main()
