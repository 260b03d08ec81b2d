"""Settings, poolers and oddities of the catalog against migration, run, summary, report and command line.

    python -m tests.faults.campaign [NAME ...]

Not part of the test run: it takes half an hour or more. Each case has a database of its own
with three tenants; every command has a deadline. What is stored and shown is compared with the independent reference,
which reads the sources as a superuser. A case ends as

    right     all commands are green, and all numbers are right
    refused   some command is red and says which tenant or setting and why; what is stored is right nevertheless
    WRONG     a number is wrong or missing on a green command, or in a tenant that no red command has named
    STACK     a command shows a stack, or is red without a sentence
    HANG      a command does not end
    (absent)  the server here cannot be set up for the case

Exit status 1 if there is a WRONG, STACK or HANG.
"""

import sys
import time
from concurrent.futures import ThreadPoolExecutor

import click
import psycopg

from tests.conftest import RUN_ROLE, create_run_role
from tests.faults.campaign.cases import CASES, Case
from tests.faults.campaign.world import OWNER, carry_out, templates
from tests.server import running_server


@click.command(help=__doc__)
@click.argument("names", nargs=-1)
def main(names: tuple[str, ...]) -> None:
    cases = [case for case in CASES if not names or any(name in case.name for name in names)]
    started, outcomes = time.monotonic(), list[str]()
    with running_server(max_prepared_transactions="5", wal_level="logical", allow_in_place_tablespaces="on") as server:
        create_run_role(server)
        with psycopg.connect(f"{server} dbname=postgres", autocommit=True) as connection:
            connection.execute(
                f"CREATE ROLE {OWNER} LOGIN; CREATE ROLE other NOLOGIN; GRANT other TO {RUN_ROLE}".encode()
            )
        templates(server)

        def attempt(numbered: tuple[int, Case]) -> tuple[Case, str, str]:
            number, case = numbered
            try:
                return (case, *carry_out(server, number, case))
            except Exception as error:
                return case, "BROKEN", f"the campaign itself: {type(error).__name__}: {error}"

        with ThreadPoolExecutor(2) as pool:
            for case, outcome, sentence in pool.map(attempt, enumerate(cases)):
                outcomes.append(outcome)
                click.echo(f"{case.name:<52} {outcome:<9} {' '.join(sentence.split())[:900]}")
    counts = ", ".join(f"{outcomes.count(name)} {name}" for name in dict.fromkeys(outcomes))
    click.echo(f"\n{len(cases)} cases in {time.monotonic() - started:.0f} s: {counts}")
    sys.exit(any(outcome not in ("right", "refused", "(absent)") for outcome in outcomes))


if __name__ == "__main__":
    main()
