"""The statements for the stats table, its old name and its rows: from any of the states to a target, and back.

What is the same for every table of ours is in `migrations.converge`. No row is lost: what must give way goes to the
archive. No column of theirs is lost either: one that has the name of one of ours is set aside under another name, and
keeps its own in the view under the table's old name.
"""

import re
from collections.abc import Iterator
from dataclasses import replace

from psycopg import sql

from migrations import rows
from migrations.converge import (
    Refusal,
    added_columns,
    changed_columns,
    found_key,
    identity_before,
    indexes,
    logged,
    plain_table,
    rename_constraint,
)
from migrations.first import (
    ADDED_COLUMNS,
    CHECK,
    FIRST,
    INDEX,
    LOSSLESS,
    MARKETPLACE,
    NEW_KEY,
    OLD_COLUMNS,
    OLD_KEY,
    OLD_UNIQUE,
    UNIQUE,
)
from migrations.shape import ARCHIVE, LEDGER, MET, NEW, OLD, Column, Relation, Shape
from migrations.target import HEAD, Table, Target
from migrations.view import (
    ASIDE,
    ID_SEQUENCE,
    create_view,
    defaults,
    granted,
    is_disturbed_by,
    is_good_view,
    view_columns,
)
from pipelines.tenants import quoted


def _our_names(target: Target) -> set[str]:
    """The columns that the old table never had; a later revision's too, since theirs would be in its way."""
    return (set(target[NEW].columns) | set(HEAD[NEW].columns) | set(ADDED_COLUMNS)) - set(OLD_COLUMNS)


def upgrade(shape: Shape, target: Target, legacy_view: bool, is_ours: bool, from_base: bool) -> Iterator[str]:
    """The way to the target, with or without the view under the old name. Raises Refusal.

    `is_ours`: the new table's columns with the names of ours are ours. `from_base`: rows that a downgrade put away come
    back.
    """
    old, new, view, forerunner = shape.table(OLD), shape.table(NEW), shape.view(OLD), shape.view(NEW)
    theirs = _our_names(target) - {"marketplace"}
    if forerunner:
        yield f"DROP VIEW {NEW}"
    met: tuple[str, ...] = ("marketplace",) if old and "marketplace" in old.columns else ()
    aside: set[str] = set()
    former = old
    if old:
        aside |= theirs & set(old.columns)
        yield from _set_aside(old, theirs)
        old = _with_set_aside(old, theirs)
    if new and not is_ours:
        aside |= theirs & set(new.columns)
        yield from _set_aside(new, theirs)
        new = _with_set_aside(new, theirs)
    shown = view_columns(former, new, view, _our_names(target) - set(met), aside)

    # Whether the table changes is known only when its statements are made, and the view has to go before them.
    table = new or old
    changes: list[str] = []
    if table is None:
        changes += target[NEW].create()
        if not legacy_view:
            changes.append(f"ALTER TABLE {NEW} ALTER marketplace DROP DEFAULT")
        archived = shape.table(ARCHIVE)
        if archived and from_base:
            unique = next(key for key in target[NEW].keys if key.name == UNIQUE)
            changes.append(f"ALTER TABLE {NEW} DROP CONSTRAINT {UNIQUE}")
            changes += _moves(shape, target, replace(archived, columns={}, comments={}), None, True)
            changes.append(f"ALTER TABLE {NEW} ADD CONSTRAINT {UNIQUE} {unique.definition}")
    else:
        changes += _converge(shape, target, table, old if new else None, legacy_view, from_base)
    changes += _remember(old, met)
    wanted = defaults(table, target[NEW].columns, view)
    keep_view = (
        view is not None
        and legacy_view
        and is_good_view(view, shown, wanted)
        and not (aside or is_disturbed_by(changes))
    )
    if view and not keep_view:
        yield f"DROP VIEW {OLD}"
    if old and not new:
        yield f"ALTER TABLE {OLD} RENAME TO {NEW}"
    yield from granted(forerunner, NEW)
    yield from changes
    ledger = shape.table(LEDGER)
    others = [text for want in target.values() if want.name != NEW for text in plain_table(shape, want)]
    yield from others
    if ledger and (changes or old) and f"DROP TABLE {LEDGER}" not in others:
        yield _missing_days(table, target[NEW])
    if legacy_view and not keep_view:
        yield from create_view(shown, wanted, old or view or table)


def _set_aside(table: Relation, ours: set[str]) -> Iterator[str]:
    """Columns of theirs get another name than ours, and a comment that a downgrade knows them by."""
    for name in table.columns:
        if name in ours:
            yield f"ALTER TABLE {table.name} RENAME COLUMN {name} TO {ASIDE}{name}"
            yield f"COMMENT ON COLUMN {table.name}.{ASIDE}{name} IS {_met_comment(table.comments.get(name))}"


def _with_set_aside(table: Relation, ours: set[str]) -> Relation:
    """The table as it is then."""
    columns = {ASIDE + name if name in ours else name: column for name, column in table.columns.items()}
    comments = table.comments | {ASIDE + name: MET for name in table.columns if name in ours}
    return replace(table, columns=columns, comments=comments)


def _met_comment(comment: str | None) -> str:
    return _literal(f"{MET}: {comment}" if comment else MET)


def _converge(
    shape: Shape, target: Target, table: Relation, merged: Relation | None, legacy_view: bool, from_base: bool
) -> Iterator[str]:
    """Columns, rows, keys and names of a table that is there already, and has its new name by now."""
    want = target[NEW]
    wanted = dict(want.columns)
    if not legacy_view:
        wanted["marketplace"] = replace(wanted["marketplace"], default=None)
    unique, check = (next(key for key in want.keys if key.name == name) for name in (UNIQUE, CHECK))
    foreign = [key for key in table.of_kind("f") if key.columns == ("action_type_id",)]
    checks = [key for key in table.of_kind("c") if key.columns == ("marketplace",)]
    good_check, good_key = found_key(table, check), found_key(table, unique)
    marketplace = table.columns.get("marketplace")
    is_certain = (
        good_check is not None and marketplace and (marketplace.type, marketplace.not_null) == (MARKETPLACE, True)
    )
    # Without a unique key two rows may have met, and a corrected marketplace may let two rows meet.
    has_old_key = any(sorted(key.columns) == sorted(OLD_KEY) for key in table.constraints if key.kind in "pui")
    is_unique = any(
        key.kind == "i" or key.definition == f"UNIQUE ({', '.join(key.columns)})" for key in table.unique_on(*NEW_KEY)
    )
    take_back = from_base and shape.table(ARCHIVE) is not None
    dedupe = merged is not None or take_back or not (has_old_key or (is_unique and is_certain))
    if dedupe:
        good_key = None

    dropped = [key for key in (*table.unique_on(*OLD_KEY), *table.unique_on(*NEW_KEY)) if key is not good_key]
    # Over some of the rows only, or left by an interrupted build, or as an exclusion, a key would still refuse rows.
    others = (*table.of_kind("w"), *table.of_kind("x"))
    dropped += [key for key in others if sorted(key.columns) in (sorted(OLD_KEY), sorted(NEW_KEY))]
    dropped += [key for key in table.of_kind("p") if key.columns != ("id",)]
    has_primary = any(key.columns == ("id",) for key in table.of_kind("p"))
    new_identity = identity_before(table, tuple(key.name for key in dropped), ("id",))

    yield from logged(table, NEW)
    if new_identity:
        yield f"ALTER TABLE {NEW} REPLICA IDENTITY FULL"
    changes = [f"DROP CONSTRAINT {quoted(key.name)}" for key in foreign]
    changes += [f"DROP CONSTRAINT {quoted(key.name)}" for key in checks if key is not good_check]
    changes += [f"DROP CONSTRAINT {quoted(key.name)}" for key in dropped if key.kind in "upx"]
    changes += added_columns(table, {name: column for name, column in want.columns.items() if name != "id"})
    if changes:
        yield f"ALTER TABLE {NEW} {', '.join(changes)}"
    if marketplace is None and not legacy_view:
        yield f"ALTER TABLE {NEW} ALTER marketplace DROP DEFAULT"
    for index in dropped:
        if index.kind in "iw":
            yield f"DROP INDEX {quoted(index.name)}"

    yield from changed_columns(table, wanted, NEW, is_spelled=bool(is_certain))
    yield from _ids(table, has_primary)
    if dedupe:
        yield from _moves(shape, target, table, merged, take_back)
    if merged:
        yield f"DROP TABLE {OLD}"

    changes = [] if good_check else [f"ADD CONSTRAINT {check.name} {check.definition}"]
    if good_key is None:
        changes.append(f"ADD CONSTRAINT {unique.name} {unique.definition}")
    if not has_primary:
        changes.append(f"ADD CONSTRAINT {want.primary_key.name} {want.primary_key.definition}")
    for key in want.keys:
        if key.kind in "uc" and key not in (unique, check) and found_key(table, key) is None:
            changes.append(f"ADD CONSTRAINT {key.name} {key.definition}")
    if changes:
        yield f"ALTER TABLE {NEW} {', '.join(changes)}"
    if new_identity:
        identity = "DEFAULT" if table.replica_identity == "d" else f"USING INDEX {UNIQUE}"
        yield f"ALTER TABLE {NEW} REPLICA IDENTITY {identity}"
    for have, key in ((found_key(table, want.primary_key), want.primary_key), (good_check, check), (good_key, unique)):
        yield from rename_constraint(NEW, have, key)
    yield from indexes(table, want)


def _ids(table: Relation, has_primary: bool) -> Iterator[str]:
    """A default for the ids, and ids for rows that have none; the sequence that is there stays."""
    column = table.columns.get("id")
    if column is None:
        yield f"ALTER TABLE {NEW} ADD COLUMN id serial"
        return
    if column.default is None:
        yield f"CREATE SEQUENCE {ID_SEQUENCE}"
        yield f"ALTER SEQUENCE {ID_SEQUENCE} OWNER TO {table.owner}"
        yield f"ALTER SEQUENCE {ID_SEQUENCE} OWNED BY {NEW}.id"
        yield f"SELECT pg_catalog.setval('{ID_SEQUENCE}', coalesce(max(id), 0)::bigint + 1, false) FROM {NEW}"
        yield f"ALTER TABLE {NEW} ALTER id SET DEFAULT nextval('{ID_SEQUENCE}'::regclass)"
    if not has_primary:
        # Without a key, ids may be null or twice there; nothing refers to them.
        yield f"ALTER TABLE {NEW} ALTER id TYPE {column.type} USING pg_catalog.nextval({_sequence(table)}::regclass)"


def _sequence(table: Relation) -> str:
    """The sequence of the ids, as a literal; of a table that is made, its own."""
    default = table.columns["id"].default if "id" in table.columns else None
    if default == "identity":
        return _literal(table.owned_sequences[0])
    found = re.fullmatch(r"nextval\(('.*')::regclass\)", default or "")
    return found[1] if found else f"'{ID_SEQUENCE}'"


def _moves(shape: Shape, target: Target, table: Relation, merged: Relation | None, take_back: bool) -> Iterator[str]:
    """The rows of the old table and of the archive come in, and of those with one key one stays. Raises Refusal."""
    archive = shape.table(ARCHIVE)
    # What of theirs is only in the table that goes, or in the archive, gets a place in the new one.
    added: dict[str, str] = {}
    following: list[str] = []
    for other in filter(None, (merged, archive if take_back else None)):
        for name, column in other.columns.items():
            have = table.columns.get(name)
            if have and name not in target[NEW].columns:
                if have.type != column.type:
                    raise Refusal(f"column {name} has two types, {have.type} and {column.type}: change one of them")
                if _is_generated(have) and not _is_generated(column):
                    raise Refusal(f"column {name} is generated in {NEW}, and not in {OLD}: rename one of them")
            elif not have and name not in (*_our_names(target), *OLD_COLUMNS, "reason", "archived_at"):
                added[name] = column.type
                if other is merged and column.default and not _is_generated(column):
                    following.append(f"ALTER TABLE {NEW} ALTER {quoted(name)} SET DEFAULT {column.default}")
                if other is merged and (comment := other.comments.get(name)):
                    following.append(f"COMMENT ON COLUMN {NEW}.{quoted(name)} IS {_literal(comment)}")
    if added:
        yield f"ALTER TABLE {NEW} {', '.join(f'ADD COLUMN {quoted(name)} {type_}' for name, type_ in added.items())}"
    yield from following
    columns = _columns(table, target[NEW]) | added
    names = [quoted(name) for name in columns]
    yield from rows.archive(archive, columns)
    if "id" in table.columns:
        yield from rows.catch_up(_sequence(table), NEW)
    before = dict.fromkeys((NEW, ARCHIVE), ", ".join(rows.filled(names)))
    moves: list[str] = []
    if merged:
        before[OLD], moves = rows.merge(merged, target[NEW].columns, columns)
    if take_back:
        moves.append(rows.take_back(names))
    moves.append(rows.archive_losers(names))
    yield from rows.counted(names, before, moves, (NEW, ARCHIVE))


def _is_generated(column: Column) -> bool:
    return bool(column.default) and str(column.default).startswith("generated ")


def _columns(table: Relation, want: Table) -> dict[str, str]:
    """The columns of the converged table that have a value of their own, with their types; without the ids."""
    columns = {name: column.type for name, column in want.columns.items()}
    for name, column in table.columns.items():
        if name not in columns and not _is_generated(column):
            columns[name] = column.type
    del columns["id"]
    return columns


def _remember(old: Relation | None, met: tuple[str, ...]) -> Iterator[str]:
    """Comments on what a downgrade has to bring back: a clone has them, too, and so does a dump."""
    if old is None:
        return
    for name in met:
        yield f"COMMENT ON COLUMN {NEW}.{name} IS {_met_comment(old.comments.get(name))}"
    primary = next((key for key in old.of_kind("p") if key.columns == ("id",)), None)
    if primary and primary.name not in (f"{OLD}_pkey", f"{NEW}_pkey"):
        yield f"COMMENT ON CONSTRAINT {NEW}_pkey ON {NEW} IS {_literal(f'{MET}: {primary.name}')}"
    key = next(iter(old.unique_on(*OLD_KEY)), None)
    if key and (key.kind, key.name) != ("u", OLD_UNIQUE):
        kind = "index" if key.kind == "i" else "constraint"
        yield f"COMMENT ON CONSTRAINT {UNIQUE} ON {NEW} IS {_literal(f'{MET}: {kind} {key.name}')}"


def _literal(text: str) -> str:
    return sql.Literal(text).as_string()


def _missing_days(table: Relation | None, want: Table) -> str:
    """The ledger must not claim what the stats no longer hold: the next run computes these days again."""
    if table is None or set(want.columns) - set(table.columns):
        return f"DELETE FROM {LEDGER} WHERE stored_job_count > 0 OR date IN (SELECT date FROM {NEW})"
    return f"DELETE FROM {LEDGER} WHERE stored_job_count > 0 AND date NOT IN (SELECT date FROM {NEW})"


def downgrade(shape: Shape, archive: bool) -> Iterator[str]:
    """From the shape of revision 0001 to the old table, with every vinted row and every column and name that was met.

    Rows of eBay and Etsy have no place in the old table: with `archive` they go to the archive, from which the next
    upgrade takes them back; without, their presence makes a constraint fail.
    """
    new, view = shape.relations[NEW], shape.view(OLD)
    yield f"DROP VIEW IF EXISTS {OLD}"
    if archive:
        later = set(HEAD[NEW].columns) - set(OLD_COLUMNS) - set(ADDED_COLUMNS)
        kept = {name: type_ for name, type_ in _columns(new, FIRST[NEW]).items() if name not in later}
        names = [quoted(name) for name in kept]
        yield from rows.archive(shape.table(ARCHIVE), kept)
        before = dict.fromkeys((NEW, ARCHIVE), ", ".join(rows.filled(names)))
        yield from rows.counted(names, before, [rows.put_away(names)], (NEW, ARCHIVE))
    yield f"ALTER TABLE {NEW} ADD CONSTRAINT {LOSSLESS} CHECK (marketplace::text = 'vinted')"
    follows_key = new.replica_identity == "i" and any(key.name == new.identity_index for key in new.unique_on(*NEW_KEY))
    if follows_key:
        yield f"ALTER TABLE {NEW} REPLICA IDENTITY FULL"

    # With the column go the constraints and the index that it is part of.
    changes = [f"DROP COLUMN {name}" for name in ADDED_COLUMNS if name not in new.met_columns]
    if "marketplace" in new.met_columns:
        yield f"DROP INDEX IF EXISTS {INDEX}"
        changes += [f"DROP CONSTRAINT {name}" for name in (UNIQUE, CHECK, LOSSLESS)]
    kind, _, name = _met(new, "u", f"constraint {OLD_UNIQUE}").partition(" ")
    if kind not in ("constraint", "index") or not name:  # Somebody else's comment.
        kind, name = "constraint", OLD_UNIQUE
    if kind == "constraint":
        changes.append(f"ADD CONSTRAINT {quoted(name)} UNIQUE ({', '.join(OLD_KEY)})")
    # A default of theirs on one of our columns is kept in the view alone.
    theirs = defaults(None, {}, view)
    changes += [
        f"ALTER {name} SET DEFAULT {theirs[name]}"
        for name, column in OLD_COLUMNS.items()
        if column.default is None and name in theirs
    ]
    yield f"ALTER TABLE {NEW} {', '.join(changes)}"
    if kind == "index":
        yield f"CREATE UNIQUE INDEX {quoted(name)} ON {NEW} ({', '.join(OLD_KEY)})"
    if follows_key:
        yield f"ALTER TABLE {NEW} REPLICA IDENTITY USING INDEX {quoted(name)}"
    for column in new.met_columns:
        comment = new.comments[column].removeprefix(MET).removeprefix(": ")
        yield f"COMMENT ON COLUMN {NEW}.{quoted(column)} IS {_literal(comment) if comment else 'NULL'}"
        if column.startswith(ASIDE):
            yield f"ALTER TABLE {NEW} RENAME COLUMN {quoted(column)} TO {quoted(column.removeprefix(ASIDE))}"
    primary = _met(new, "p", f"{OLD}_pkey")
    yield f"COMMENT ON CONSTRAINT {NEW}_pkey ON {NEW} IS NULL"
    yield f"ALTER TABLE {NEW} RENAME CONSTRAINT {NEW}_pkey TO {quoted(primary)}"
    yield f"ALTER TABLE {NEW} RENAME TO {OLD}"
    yield f"DROP TABLE {LEDGER}"
    yield from granted(view, OLD)  # Given after the table had become a view.


def _met(table: Relation, kind: str, default: str) -> str:
    """What the comment on the key of this kind remembers."""
    remembered = next((key.met for key in table.of_kind(kind) if key.met), None)
    return remembered.removeprefix(f"{MET}: ") if remembered else default
