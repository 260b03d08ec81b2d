"""What is to be done to a schema: from the command, its version record and its shape to a state and statements.

A schema at the newest revision, or a clone of one, is brought to the head, which the models say. Any other goes from
revision to revision, as the files in `versions` say, rendered by Alembic's offline mode. Nothing is read or written
here: plans are made once for all schemas of a kind.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any

from alembic import context
from alembic.util import CommandError

from migrations import stats, view
from migrations.converge import Refusal, owners, plain_table
from migrations.first import FIRST, REVISION, SHARED_FIRST
from migrations.grants import new_grants
from migrations.shape import NEW, OLD, VERSION, Shape
from migrations.states import has_all_later_parts, has_legacy_view, is_later_clone, is_ours, state_of
from migrations.target import HEAD, SHARED_HEAD, Target, common
from models import SHARED
from pipelines.settings import UsageError


@dataclass(frozen=True)
class Plan:
    """The state that a schema was met in, and what is to be done; nothing if all is as it should be."""

    state: str
    statements: tuple[str, ...]
    locks: tuple[str, ...] = ()  # The relations to lock first.
    is_repair: bool = False  # The way back comes afterwards, and is planned for what is there then.


@dataclass(frozen=True)
class Command:
    """What is to be done to every schema."""

    name: str  # Alembic's: upgrade or downgrade.
    head: str
    revisions: frozenset[str]
    role: str  # The one that migrates, quoted.
    # As the operator said; None: a migrated tenant keeps what it has, and a new one gets what the template has.
    legacy_view: bool | None
    archive: bool
    dry_run: bool
    run_role: str | None = None  # What is granted to, if the migration has a role of its own.
    template_has_view: bool = True
    shared_owner: str | None = None  # Whom our own schema is given to, quoted, if a superuser migrates.
    newer: str | None = None  # A revision of a newer release that the template or our own schema is at.

    def require_known(self, record: Sequence[str]) -> str | None:
        """The revision that is recorded, None if there is none. Raises Refusal if this code does not know it."""
        unknown = sorted(set(record) - self.revisions)
        if len(record) > 1 and not unknown:
            raise Refusal(f"the version record names {' and '.join(record)}: leave the one in {VERSION} that is true")
        if unknown or (not record and self.newer):
            name = unknown[0] if unknown else self.newer
            whose = (
                "the version record" if unknown else "it has no record, and that of the template or of our own schema"
            )
            raise Refusal(
                f"{whose} names revision {name}, which this release does not have: if a newer one wrote it, use that "
                f"one, also to go back; if none did, DELETE FROM {VERSION} and repeat"
            )
        return record[0] if record else None


@dataclass(frozen=True)
class Given:
    """What a revision may need to know of the schema that it is rendered for; only 0001 does."""

    shape: Shape
    legacy_view: bool = True
    archive: bool = False
    record: str | None = None


class Plans:
    """The plans of a command by kind of schema. Alembic's context is one per process, so they are made one by one."""

    def __init__(self, command: Command) -> None:
        self._command = command
        self._made: dict[Any, Plan | Refusal] = {}
        self._lock = Lock()

    def known(self, kind: Any, shared: bool, is_done: bool) -> Plan | None:
        """The plan for this kind, if it was made. Raises Refusal if that was the answer."""
        plan = self._made.get((kind, shared, is_done))
        if isinstance(plan, Refusal):
            raise plan
        return plan

    def make(self, kind: Any, record: Sequence[str], shape: Shape, shared: bool, is_done: bool) -> Plan:
        """The plan for a schema of this kind; `is_done`: it has gone through the revisions. Raises Refusal."""
        with self._lock:
            if (kind, shared, is_done) not in self._made:
                try:
                    self._made[kind, shared, is_done] = _make(self._command, record, shape, shared, is_done)
                except Refusal as refusal:
                    self._made[kind, shared, is_done] = refusal
        plan = self.known(kind, shared, is_done)
        assert plan is not None  # noqa: S101 It was made above.
        return plan


def _make(command: Command, record: Sequence[str], shape: Shape, shared: bool, is_done: bool) -> Plan:
    """Raises Refusal."""
    current = command.require_known(record)
    if is_done and command.name == "downgrade":
        return Plan("taken back", ())
    head, first = (SHARED_HEAD, SHARED_FIRST) if shared else (HEAD, FIRST)
    state = ("canonical" if shape.owner else "missing") if shared else state_of(shape)
    goes_up = command.name == "upgrade"
    has_view = command.legacy_view
    if has_view is None and (current is not None or not goes_up):
        has_view = has_legacy_view(shape)
    given = Given(shape, command.template_has_view if has_view is None else has_view, command.archive, current)

    statements: list[str] = []
    if not shape.owner:
        authorization = f" AUTHORIZATION {command.shared_owner}" if command.shared_owner else ""
        statements.append(f"CREATE SCHEMA {SHARED}{authorization}")
    elif shared and command.shared_owner and shape.owner == command.role != command.shared_owner:
        statements.append(f"ALTER SCHEMA {SHARED} OWNER TO {command.shared_owner}")

    # A record of 0001 over all that the head has was written by an older release; over a part of it, that is theirs.
    is_clone = (
        is_later_clone(shape, head, first)
        if current is None
        else current == REVISION and has_all_later_parts(shape, head, first)
    )
    if not goes_up and current is None and not is_clone and (shared or not is_ours(shape, False)):
        return Plan("not migrated", ())
    reached = current
    if current == command.head or is_clone or (current is None and not goes_up):
        # What is there already is completed, whatever revision made it.
        statements += converge(given, head, shared)
        if current != command.head:
            statements += _record(command.head, VERSION in shape.relations)
            reached = command.head
    elif current is not None:
        # Of a revision between, only what it shares with the first and the last is known.
        statements += converge(given, first if current == REVISION else common(first, head), shared)
    # The way back to the old table follows what is there, so a repair has a transaction of its own.
    is_repair = not goes_up and bool(statements)
    if not (is_done or is_repair) and (not goes_up or reached != command.head):
        if VERSION in shape.relations and reached is None:
            statements.append(f"DROP TABLE {VERSION}")  # It is empty, and Alembic makes it.
        rendered, reached = _render(reached, shared, given)
        statements = view.made_last([*statements, *rendered], shape.view(OLD))
    if state == "renamed" and all(VERSION in text for text in statements):
        state = "canonical"
    elif current not in (None, command.head):
        state = f"at {current}"
    table = shape.table(NEW) or shape.table(OLD)
    owner = (shared and command.shared_owner) or (table.owner if table else shape.owner) or command.role
    statements += owners(shape, owner, command.role, statements)
    if statements and command.run_role and reached == command.head:
        statements += new_grants(list(head), statements, command.run_role)
    # The old name first: it may be the view, which its readers lock before the table behind it. A view of somebody
    # else's could not be locked: PostgreSQL asks whether its owner may lock the table.
    names = [name for name in (OLD, NEW, *sorted(shape.relations)) if name in shape.relations]
    locks = dict.fromkeys(name for name in names if name != OLD or shape.relations[name].owner == owner)
    return Plan(state, tuple(statements), tuple(locks), is_repair)


def converge(given: Given, target: Target, shared: bool) -> Iterator[str]:
    """From a shape to a target. Raises Refusal."""
    if shared:
        for table in target.values():
            yield from plain_table(given.shape, table)
        return
    yield from stats.upgrade(
        given.shape, target, given.legacy_view, is_ours(given.shape, given.record is not None), given.record is None
    )


def _record(revision: str, has_table: bool) -> Iterator[str]:
    """The record, for a schema that goes through no revision."""
    if has_table:
        yield f"DELETE FROM {VERSION}"
    else:
        key = f"CONSTRAINT {VERSION}_pkc PRIMARY KEY (version_num)"
        yield f"CREATE TABLE {VERSION} (version_num character varying(32) NOT NULL, {key})"
    yield f"INSERT INTO {VERSION} (version_num) VALUES ('{revision}')"


class _Statements:
    """What Alembic writes its offline statements to, one at a time."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self._comment = ""

    def write(self, text: str) -> None:
        text = text.strip().removesuffix(";")
        if text in ("BEGIN", "COMMIT"):
            raise UsageError("A revision leaves its transaction: a tenant must be as before or after it, not between.")
        if text.startswith("-- "):
            self._comment = text + "\n"
        else:
            # Compared as texts, as everything here: see `migrations.first`.
            self.texts.append(self._comment + text.replace(f"{VERSION}.version_num =", "version_num::text ="))
            self._comment = ""

    def flush(self) -> None:
        """Nothing waits."""


def _render(current: str | None, shared: bool, given: Given) -> tuple[list[str], str | None]:
    """The statements of the revisions from here to where the command goes, with those of the record; and where it ends.

    Empty where it goes no further: one step up from the newest, or back to where a schema is before.
    """
    statements = _Statements()
    reached = current

    def applied(*, heads: Collection[str], **_: Any) -> None:
        nonlocal reached
        reached = next(iter(heads), None)

    context.configure(
        dialect_name="postgresql",
        dialect_opts={"paramstyle": "named"},  # Percent signs stay single.
        as_sql=True,
        literal_binds=True,
        starting_rev=current or "base",
        output_buffer=statements,  # type: ignore[arg-type]
        version_table=VERSION,
        on_version_apply=applied,  # type: ignore[arg-type]
        given=given,
    )
    try:
        context.run_migrations(target="shared" if shared else "tenant")
    except CommandError as error:
        if "not a valid" not in str(error) and "didn't produce" not in str(error):
            raise
        return [], current
    return statements.texts, reached
