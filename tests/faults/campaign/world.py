"""A case of the campaign: its database, its commands, and what is made of their answers."""

import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
from psycopg import sql

from tests import application
from tests.conftest import ROOT, RUN_ROLE, create_database
from tests.faults.campaign.cases import Case
from tests.reference import JOB_COLUMNS, NUMBERS, Day, Source, aggregate, first_facts

TODAY = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
DAYS = [
    Day((TODAY - timedelta(back)).date(), TODAY - timedelta(back), TODAY - timedelta(back - 1)) for back in (3, 2, 1)
]
TENANTS = ("user_1", "user_2", "user_10")
OWNER = "owner"
DEADLINE_S = 90
LOCK_TIMEOUT_MS, STATEMENT_TIMEOUT_MS = 1000, 20_000

Rows = dict[tuple[Any, ...], tuple[Any, ...]]
"""Numbers by what they are about."""

_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(
    ["pipelines.definitions", "pandas", "matplotlib.pyplot", "alembic.config", "pipelines.stats"]
)


@dataclass
class Answer:
    """How a command has ended, and what it said."""

    command: str
    status: int | None
    output: str

    @property
    def sentence(self) -> str:
        """The line that says why it is red."""
        lines = [line.strip() for line in self.output.splitlines() if line.strip()]
        lines = [line for line in lines if not re.match(r"[{\[]|\d+ schemas: |.*Warning: |return Path", line)]
        telling = [line for line in lines if re.search(r"failed|Error|[Rr]efused|not |cannot", line)]
        return (telling or lines or [""])[0 if self.command == "migration" else -1]

    @property
    def has_stack(self) -> bool:
        return "Traceback (most recent" in self.output or (self.status != 0 and len(self.sentence) < 20)


def _execute(command: str, environment: dict[str, str], output: str) -> None:
    """A command in a process that has everything loaded; what Dagster runs, as Dagster executes it."""
    for stream in (sys.stdout, sys.stderr):
        os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream.fileno())
    os.chdir(ROOT)
    os.environ.update(environment)
    if command == "migration":
        from alembic.config import main

        main(argv=["upgrade", "head"])
        sys.exit()
    if command.startswith("stats"):
        from pipelines.stats import main as stats

        tenant = command.split()[1:]
        stats(["--days", "7", "--format", "json", *(["--tenant", *tenant] if tenant else [])])
    from pipelines.definitions import build_defs
    from pipelines.settings import Settings

    name = {"run": "job_stats", "summary": "daily_summary", "report": "report"}[command]
    first, last = DAYS[0].date.isoformat(), DAYS[-1].date.isoformat()
    tags = {"dagster/asset_partition_range_start": first, "dagster/asset_partition_range_end": last}
    job = build_defs(Settings.from_env()).resolve_job_def(f"marketplace_{name}_job")
    result = job.execute_in_process(tags={} if command == "report" else tags, raise_on_error=False)
    print()
    for event in result.all_events:
        if event.is_step_failure and (error := event.step_failure_data.error):
            cause = error.cause.message if error.cause else ""
            stack = ("Traceback (most recent", *error.stack, cause) if error.stack else ()
            print("Error:", error.message, "".join(stack))
    sys.exit(0 if result.success else 1)


def execute(command: str, environment: dict[str, str], deadline_s: float = DEADLINE_S) -> Answer:
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "output"
        output.touch()
        process = _processes.Process(target=_execute, args=(command, environment, str(output)))
        process.start()
        process.join(deadline_s)
        if (status := process.exitcode) is None:
            process.kill()
            process.join()
        return Answer(command, status, output.read_text(errors="replace"))


@contextmanager
def pooler(host: str, mode: str, **settings: str) -> Iterator[str]:
    """The folder of the socket of a PgBouncer before the server on that host; its port is 6543."""
    given = "\n".join(f"{name} = {value}" for name, value in settings.items())
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        Path(folder).chmod(0o777)
        (Path(folder) / "users").write_text("".join(f'"{role}" ""\n' for role in (RUN_ROLE, OWNER)))
        (Path(folder) / "ini").write_text(
            f"[databases]\n* = host={host}\n[pgbouncer]\nlisten_port = 6543\nunix_socket_dir = {folder}\n"
            f"auth_type = trust\nauth_file = {folder}/users\npool_mode = {mode}\nlogfile = {folder}/log\n{given}\n"
        )
        user = Path(host).owner() if os.geteuid() == 0 else None
        with subprocess.Popen(
            ["/usr/sbin/pgbouncer", f"{folder}/ini"], user=user, stderr=subprocess.DEVNULL
        ) as process:
            try:
                deadline = time.monotonic() + 10
                while not (Path(folder) / ".s.PGSQL.6543").exists():
                    assert time.monotonic() < deadline, "PgBouncer does not start"
                    time.sleep(0.05)
                yield folder
            finally:
                process.kill()


class World:
    """The database of a case, seen by a superuser, whom its settings do not reach."""

    def __init__(self, server: str, name: str, template: str | None) -> None:
        self.server, self.name = server, name
        self.conninfo = create_database(server, name, template)
        with self.connect() as connection:
            connection.execute(f"ALTER DATABASE {name} OWNER TO {OWNER}".encode())

    def connect(self) -> psycopg.Connection[Any]:
        options = "-c timezone=UTC -c row_security=off -c lock_timeout=5s"
        return psycopg.connect(self.conninfo, autocommit=True, options=options)

    def fill(self) -> None:
        """Three tenants before the migration, with jobs and tasks on every day, and what the old counter said."""
        with self.connect() as connection:
            connection.execute(f"GRANT CREATE ON SCHEMA public TO {OWNER}; SET ROLE {OWNER}".encode())
            application.create_action_types(connection)
            application.create_tenant(connection, application.TEMPLATE)
            application.create_tenant(connection, "user_1", enums=True)
            for schema in TENANTS[1:]:
                application.clone_tenant(connection, schema)
            for number, schema in enumerate(TENANTS, start=1):
                statuses = "ARRAY['completed', 'failed', 'cancelled', 'completed', 'pending']"
                cast = f"::{schema}.jobstatus" if schema == "user_1" else ""
                tasks = f"::{schema}.taskstatus" if schema == "user_1" else ""
                connection.execute(
                    f"""
                    INSERT INTO {schema}.marketplace_jobs
                           (id, marketplace, action_type_id, status, retry_count, error_message,
                            created_at, started_at, completed_at)
                    SELECT n, (ARRAY['vinted', 'ebay', 'etsy'])[1 + n %% 3], 1 + n %% 7, ({statuses})[1 + n %% 5]{cast},
                           n %% 2, 'HTTP 500', at - interval '1 minute', at - n * interval '1.5 s', at
                      FROM generate_series(1, {90 + number}) n,
                           LATERAL (SELECT %s::timestamptz + n * interval '47 min') a (at);
                    """.encode(),
                    [DAYS[0].start],
                )
                connection.execute(
                    f"""
                    INSERT INTO {schema}.marketplace_tasks (job_id, status, retry_count)
                    SELECT id, (ARRAY['success', 'failed', 'pending'])[1 + (id + k) % 3]{tasks}, k
                      FROM {schema}.marketplace_jobs, generate_series(0, 1) k""".encode()
                )
                connection.execute(
                    f"INSERT INTO {schema}.vinted_job_stats (action_type_id, date, total_jobs) VALUES (1, %s, 1)",
                    [DAYS[0].date],
                )
                connection.execute(
                    f"SELECT setval(pg_get_serial_sequence('{schema}.marketplace_jobs', 'id'), 1000)".encode()
                )

    def schemas(self) -> list[str]:
        with self.connect() as connection:
            query = "SELECT nspname FROM pg_namespace WHERE nspname ~ '^user_[0-9]+$'"
            return [name for [name] in connection.execute(query)]

    def has_jobs(self, schema: str) -> bool:
        """Whether there is anything to read jobs from; a tenant without is skipped, which a check shows."""
        query = "SELECT FROM pg_class WHERE oid = to_regclass(%s) AND relkind IN ('r', 'p', 'v', 'm', 'f')"
        with self.connect() as connection:
            return bool(connection.execute(query, [f"{schema}.marketplace_jobs"]).fetchall())

    def expected(self, schema: str) -> Rows | None:
        """What the reference makes of the tenant's sources; None where they cannot be understood."""
        with self.connect() as connection:

            def read(table: str, columns: tuple[str, ...]) -> list[dict[str, Any]]:
                texts = {"status", "marketplace", "error_message"}
                names = ", ".join(f"{name}::text" if name in texts else name for name in columns)
                rows = connection.execute(f"SELECT {names} FROM {schema}.{table}".encode()).fetchall()
                return [dict(zip(columns, row, strict=True)) for row in rows]

            try:
                has_tasks = connection.execute(
                    "SELECT to_regclass(%s)", [f"{schema}.marketplace_tasks"]
                ).fetchone() != (None,)
                tasks = read("marketplace_tasks", ("job_id", "status", "retry_count")) if has_tasks else None
                source = Source(read("marketplace_jobs", JOB_COLUMNS), tasks)
                rows = aggregate(first_facts(source, DAYS))
            except (psycopg.Error, TypeError, ValueError, AttributeError, ArithmeticError):
                return None
        return {key: tuple(numbers[name] for name in NUMBERS) for key, numbers in rows.items()}

    def stored(self, schema: str, computed: bool = True) -> Rows:
        """What the tenant's table says of these days, by the batch or at all; nothing where there is none."""
        columns = ", ".join(("action_type_id", "marketplace", "date", *NUMBERS))
        with self.connect() as connection, suppress(psycopg.errors.UndefinedTable, psycopg.errors.UndefinedColumn):
            rows = connection.execute(
                f"SELECT {columns} FROM {schema}.marketplace_job_stats "
                "WHERE (computed_at IS NOT NULL OR NOT %s) AND date BETWEEN %s AND %s".encode(),
                [computed, DAYS[0].date, DAYS[-1].date],
            ).fetchall()
            return {tuple(row[:3]): tuple(row[3:]) for row in rows}
        return {}

    def sums(self, rows: list[Rows]) -> Rows:
        """Jobs, failures and tasks by day, marketplace and action id, as the summary adds them up."""
        found: Rows = {}
        names = ("total_jobs", "failure_count", "task_failure_count", "duration_sum_ms")
        for one in rows:
            for (action, marketplace, day), numbers in one.items():
                values = dict(zip(NUMBERS, numbers, strict=True))
                before = found.get((day, marketplace, action), (0,) * len(names))
                found[(day, marketplace, action)] = tuple(
                    old + (values[name] or 0) for old, name in zip(before, names, strict=True)
                )
        return found


def judge(world: World, case: Case, environment: dict[str, str]) -> tuple[str, str]:
    """The outcome of a case, and the sentence for it."""
    with world.connect() as connection:
        connection.execute(f"SET ROLE {OWNER}".encode())
        try:
            for statement in case.before:
                connection.execute(statement.encode())
        except psycopg.Error as error:
            return "(absent)", str(error).splitlines()[0]
        connection.execute("RESET ROLE")
        for name, value in case.settings.items():
            for role in (RUN_ROLE, OWNER):
                setting = sql.SQL("ALTER ROLE {} IN DATABASE {} SET {} = {}").format(
                    sql.Identifier(role),
                    sql.Identifier(world.name),
                    sql.SQL(name),
                    sql.SQL(", ").join(map(sql.Literal, value.split(", "))),
                )
                try:
                    connection.execute(setting)
                except psycopg.Error as error:
                    return "(absent)", str(error).splitlines()[0]

    red: list[Answer] = []
    is_held = case.hold_migration
    for command in case.commands:
        if command == "run":
            with world.connect() as connection:
                connection.execute(f"SET ROLE {OWNER}".encode())
                for statement in case.after:
                    try:
                        connection.execute(statement.encode())
                    except psycopg.Error as error:
                        if not red:
                            return "(absent)", str(error).splitlines()[0]
            is_held = True
        with ExitStack() as holders:  # Not for longer: the reference reads the same tables.
            for statement in case.hold if is_held else ():
                holders.enter_context(psycopg.connect(world.conninfo)).execute(statement.encode())
            answer = execute(command, environment)
        if answer.status is None:
            return "HANG", f"{command}: {answer.output[-300:]}"
        if answer.has_stack:
            return "STACK", f"{command}: {answer.output[-600:]}"
        if answer.status:
            red.append(answer)
        if wrong := mistake(world, command, answer, red):
            return "WRONG", f"{command}: {wrong}"
    if not red:
        return "right", ""
    return "refused", "; ".join(f"{answer.command}: {answer.sentence}" for answer in red[:1]) + (
        f" (+ {', '.join(answer.command for answer in red[1:])})" if red[1:] else ""
    )


def mistake(world: World, command: str, answer: Answer, red: list[Answer]) -> str | None:
    """What is wrong with the numbers after a command, if anything is."""
    said = "\n".join(one.output for one in red)
    schemas = world.schemas()
    if command == "migration":
        return None
    if command == "run":
        for schema in schemas:
            expected, stored = world.expected(schema), world.stored(schema)
            if expected is None and answer.status == 0 and schema not in said and world.has_jobs(schema):
                return f"{schema} cannot be understood by the reference, and the run is green with {len(stored)} rows"
            if expected is not None and stored != expected:
                if stored and answer.status == 0:
                    return f"{schema} has {len(stored)} rows, {differences(stored, expected)} differ"
                if stored:
                    return f"{schema} has {differences(stored, expected)} wrong rows, though the run is red"
                if answer.status == 0:
                    return f"{schema} has no rows on a green run; it should have {len(expected)}"
                if schema not in said and re.search(r"user_\d", said) and len(schemas) > 1:
                    return f"{schema} has no rows, and nothing names it: {answer.sentence}"
        return None
    if answer.status:
        return None
    codes = "SELECT id::bigint, code FROM public.marketplace_action_types WHERE code IS NOT NULL"
    with world.connect() as connection:
        try:
            actions: dict[int, str] = dict(connection.execute(codes).fetchall())
        except psycopg.Error:
            actions = {}

    def by_code(rows: Rows) -> dict[tuple[Any, ...], tuple[int, ...]]:
        found: dict[tuple[Any, ...], tuple[int, ...]] = {}
        for (day, marketplace, action), numbers in rows.items():
            key = (day.isoformat(), marketplace, actions.get(action, "unknown"))
            found[key] = tuple(a + b for a, b in zip(found.get(key, (0, 0, 0)), numbers, strict=False))
        return {key: numbers for key, numbers in found.items() if any(numbers)}

    wanted = by_code(world.sums([world.stored(schema, computed=False) for schema in schemas]))
    if command == "summary":
        with world.connect() as connection:
            rows = connection.execute(
                "SELECT date::text, marketplace, action_code, "
                "total_jobs, failure_count, coalesce(task_failure_count, 0) "
                "FROM marketplace_stats.marketplace_daily_summary WHERE total_jobs > 0"
            ).fetchall()
        found = {tuple(row[:3]): tuple(row[3:]) for row in rows}
    elif command.startswith("stats"):
        if command == "stats user_2":
            wanted = by_code(world.sums([world.stored("user_2", computed=False)]))
        found = {}
        # The sentences on stderr stand before and after the records.
        records = re.sub(r"\A[^\[][^\n]*\n", "", answer.output)
        for row in json.JSONDecoder().raw_decode(records)[0]:
            key = (row["date"], row["marketplace"], row["action_code"])
            if row["date"] >= DAYS[0].date.isoformat() and row["total_jobs"]:
                numbers = (row["total_jobs"], row["failure_count"], row["task_failure_count"] or 0)
                found[key] = tuple(a + b for a, b in zip(found.get(key, (0, 0, 0)), numbers, strict=True))
    else:
        return None
    wanted = {key: numbers for key, numbers in wanted.items() if numbers[0]}
    if found == wanted or (any(one.command == "summary" for one in red) and command == "stats"):
        return None
    return f"{differences(found, wanted)} of {len(wanted)} sums differ from what the tenants' tables say"


def differences(found: dict[Any, Any], wanted: dict[Any, Any]) -> int:
    return sum(found.get(key) != wanted.get(key) for key in found.keys() | wanted.keys())


def environment_of(database: str, folder: str, port: str = "5432", more: str = "") -> dict[str, str]:
    """How the commands reach a database: by the role of the runs, and by that which migrates."""
    url = f"postgresql://{{}}@/{database}?host={folder}&port={port}{more}"
    return {
        "DATABASE_URL": url.format(RUN_ROLE),
        "MIGRATION_DATABASE_URL": url.format(OWNER),
        "STATS_LOCK_TIMEOUT_MS": str(LOCK_TIMEOUT_MS),
        "STATS_STATEMENT_TIMEOUT_MS": str(STATEMENT_TIMEOUT_MS),
    }


def templates(server: str) -> None:
    """The databases that cases begin with: before the migration, and after it."""
    World(server, "campaign", None).fill()
    world = World(server, "migrated", "campaign")
    answer = execute("migration", environment_of(world.name, str(psycopg.conninfo.conninfo_to_dict(server)["host"])))
    assert answer.status == 0, answer.output


def carry_out(server: str, number: int, case: Case) -> tuple[str, str]:
    host = str(psycopg.conninfo.conninfo_to_dict(server)["host"])
    world = World(server, f"case_{number}", "migrated" if case.begins_migrated else "campaign")
    with ExitStack() as stack:
        folder, port = host, "5432"
        if case.pooler:
            folder, port = stack.enter_context(pooler(host, **case.pooler)), "6543"
        report = stack.enter_context(tempfile.TemporaryDirectory())
        environment = environment_of(world.name, folder, port, case.url) | {"STATS_REPORT_DIR": report}
        outcome = judge(world, case, environment)
    with psycopg.connect(f"{server} dbname=postgres", autocommit=True) as connection, suppress(psycopg.Error):
        connection.execute(f"DROP DATABASE {world.name} WITH (FORCE)".encode())
    return outcome
