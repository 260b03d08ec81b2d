"""Builds, drops or shows an optional index on the application's jobs, by which a run finds a day without reading the
table.

    python -m pipelines.covering_index build|drop|show [--tenant user_7 ...] [--yes]

Works as the role of `MIGRATION_DATABASE_URL`, which must own the tables. The template gets the index too, so that new
customers are cloned with it. Exit status: 0 all done, 3 some schemas failed, 1 nothing done. See
`docs/covering-index.md`.
"""

import sys

import click

from pipelines.covering_index.tenants import Action, carry_out
from pipelines.settings import UsageError


@click.command(help=__doc__)
@click.argument("action", type=click.Choice([action.value for action in Action]))
@click.option("--tenant", "tenants", multiple=True, help="A schema, for instance user_7; may be repeated; default all.")
@click.option("--yes", is_flag=True, help="Build without asking.")
def main(action: str, tenants: tuple[str, ...], yes: bool) -> None:
    def agree() -> None:
        if not yes and not sys.stdin.isatty():
            raise UsageError("A build asks before it begins, and nobody is here to answer: add --yes.")
        if not yes:
            click.confirm("Build it?", abort=True)

    try:
        report = carry_out(Action(action), tenants, click.echo, agree)
    except KeyboardInterrupt:
        click.echo("Interrupted. Give the same command again: it replaces what this one has left.", err=True)
        sys.exit(3)
    if report.failed:
        sys.exit(1 if len(report.failed) == report.count() else 3)


if __name__ == "__main__":
    main()
