"""What may be done to the versions of a task: each function gives the manifest after it, and what changed, in words."""

from __future__ import annotations

from typing import NamedTuple

from pydantic import JsonValue

from moecl._audit import Change, Version
from moecl._manifest import Manifest, TaskRecord, parse_reference
from moecl.errors import StoreError, TaskError

PRODUCTION = "prod"


class Edit(NamedTuple):
    """`detail` is what the log tells beside the versions."""

    manifest: Manifest
    changes: list[Change]
    detail: dict[str, JsonValue]


def version_of(record: TaskRecord | None) -> Version | None:
    return None if record is None else Version(version=record.version, parts=record.parts)


def change(name: str, before: TaskRecord | None, after: TaskRecord | None) -> Change:
    return Change(task=name, before=version_of(before), after=version_of(after))


def changes(before: Manifest, after: Manifest) -> list[Change]:
    """From which version to which the tasks went that have another one now; versions that moved in place are none."""
    old = {record.name: record for record in before.tasks if not record.superseded}
    return [
        change(record.name, old.get(record.name), record)
        for record in after.tasks
        if not record.superseded and (record.name not in old or old[record.name].version != record.version)
    ]


def promoted(manifest: Manifest, reference: str, alias: str) -> Edit:
    """`NAME@alias` means the version that `reference` names. Raises TaskError."""
    record = manifest.record(reference)
    _check_alias(record.name, alias)
    aliases = dict(manifest.aliases.get(record.name, {}))
    before = manifest.record(record.name, aliases[alias]) if alias in aliases else None
    aliases[alias] = record.version
    return Edit(_with_aliases(manifest, record.name, aliases), [change(record.name, before, record)], {"alias": alias})


def unpromoted(manifest: Manifest, name: str, alias: str) -> Edit:
    """Take an alias away. Raises TaskError where there is none."""
    _check_alias(name, alias)
    record = manifest.record(f"{name}@{alias}")
    aliases = {key: version for key, version in manifest.aliases[name].items() if key != alias}
    return Edit(_with_aliases(manifest, name, aliases), [change(name, record, None)], {"alias": alias})


def rolled_back(manifest: Manifest, name: str, to: int | None) -> Edit:
    """Make `to` the current version, or the newest one older than the current. Raises TaskError."""
    current = manifest.record(_bare(name))
    if to is None:
        older = [record.version for record in manifest.versions(name) if record.version < current.version]
        if not older:
            newer = [record.version for record in manifest.versions(name) if record.version > current.version]
            hint = f"; --to {max(newer)} goes forward" if newer else ""
            raise TaskError(f"task {name!r} has no version older than its current one, {current.version}{hint}")
        to = max(older)
    target = manifest.record(name, to)
    if to == current.version:
        raise TaskError(f"version {to} of task {name!r} is the current one already")
    after = target.model_copy(update={"superseded": False, "pinned": True})
    tasks = [
        after if record is target else record.model_copy(update={"superseded": True}) if record is current else record
        for record in manifest.tasks
    ]
    return Edit(manifest.model_copy(update={"tasks": tasks}), [change(name, current, after)], {})


def retired(manifest: Manifest, name: str) -> Edit:
    current = manifest.record(_bare(name))
    hidden = sorted([*manifest.retired, name])
    return Edit(manifest.model_copy(update={"retired": hidden}), [change(name, current, None)], {})


def unretired(manifest: Manifest, name: str) -> Edit:
    if _bare(name) not in manifest.retired:
        manifest.record(name)
        raise TaskError(f"task {name!r} is not retired")
    shown = manifest.model_copy(update={"retired": [one for one in manifest.retired if one != name]})
    return Edit(shown, [change(name, None, shown.record(name))], {})


def deleted(manifest: Manifest, reference: str) -> Edit:
    """Without a version (`NAME@VERSION`), or without a task and all its versions and aliases (`NAME`).

    Raises TaskError; StoreError for a version that is in use: the current one, or one with an alias.
    """
    gone = to_delete(manifest, reference)
    name = gone[0].name
    kept = [record for record in manifest.tasks if record not in gone]
    whole = not any(record.name == name for record in kept)
    newest = max(manifest.deleted.get(name, 0), *(record.version for record in gone))
    after = manifest.model_copy(
        update={"tasks": kept, "deleted": dict(sorted({**manifest.deleted, name: newest}.items()))}
    )
    if whole:
        hidden = [one for one in manifest.retired if one != name]
        after = _with_aliases(after, name, {}).model_copy(update={"retired": hidden})
    return Edit(after, [change(name, record, None) for record in gone], {})


def to_delete(manifest: Manifest, reference: str) -> list[TaskRecord]:
    """The versions that `deleted` would take away."""
    name, version, alias = parse_reference(reference)
    if alias is not None:
        raise TaskError(f"task {reference!r}: name a version to delete it ({name}@2), or the whole task ({name})")
    if version is None:
        return manifest.versions(name) or [manifest.record(name)]
    record = manifest.record(name, version)
    if not record.superseded:
        others = [one.version for one in manifest.versions(name) if one is not record]
        first = f"let another answer first (`moecl rollback RUN {name} --to {max(others)}`), or " if others else ""
        raise StoreError(f"{reference}: is the task's current version; {first}delete the whole task ({name})")
    if aliases := manifest.aliases_of(record):
        raise StoreError(
            f"{reference}: is also {name}@{aliases[0]}; promote another version to it first, or take the alias away "
            f"(`moecl promote RUN {name} --as {aliases[0]} --remove`)"
        )
    return [record]


def _check_alias(name: str, alias: str) -> None:
    if parse_reference(f"{name}@{alias}").alias is None:
        raise TaskError(f"alias {alias!r:.100}: is no alias but a version; begin it with a letter")


def _bare(name: str) -> str:
    if "@" in name:
        raise TaskError(f"task {name!r:.100}: give the task's name alone, {name.partition('@')[0]!r:.100}")
    return name


def _with_aliases(manifest: Manifest, name: str, own: dict[str, int]) -> Manifest:
    aliases = {**manifest.aliases, name: dict(sorted(own.items()))}
    return manifest.model_copy(update={"aliases": {key: aliases[key] for key in sorted(aliases) if aliases[key]}})
