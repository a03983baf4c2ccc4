"""A store's manifest: what the model consists of, and which bytes each task's answers depend on."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    StringConstraints,
    ValidationError,
    field_validator,
    model_validator,
)

from moecl.config import Task
from moecl.errors import StoreError, TaskError, near

FORMAT = 2  # 1 had no aliases, no retired and no deleted tasks
HEX = re.compile("[0-9a-f]{64}")
ALIAS = "[a-z][a-z0-9_-]{0,31}"  # begins with a letter, so that it is never a version
REFERENCE = re.compile(rf"(?P<name>[^@]*)(?:@(?:(?P<version>[1-9][0-9]{{0,8}})|(?P<alias>{ALIAS})))?")
Digest = Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$")]
Name = Annotated[str, StringConstraints(pattern="^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
Alias = Annotated[str, StringConstraints(pattern=f"^{ALIAS}$")]


class Reference(NamedTuple):
    """How a task is named: `NAME`, `NAME@VERSION` or `NAME@ALIAS`."""

    name: str
    version: int | None = None
    alias: str | None = None


def parse_reference(text: str) -> Reference:
    """Raises TaskError for what has an @ and is none.

    >>> parse_reference("reviews"), parse_reference("reviews@12").version, parse_reference("reviews@prod").alias
    (Reference(name='reviews', version=None, alias=None), 12, 'prod')
    """
    if (found := REFERENCE.fullmatch(text)) is None:
        raise TaskError(
            f"task {text!r:.100}: behind @ stands a version (reviews@2) or an alias (reviews@prod: small letters, "
            "digits, - and _)"
        )
    version = found["version"]
    return Reference(found["name"], None if version is None else int(version), found["alias"])


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class BaseInfo(_Strict):
    """The base that the parts belong to."""

    id: str
    sha256: Digest
    dtype: str
    model_type: str


class TaskRecord(_Strict):
    """One version of a task. `settings` is what its form needs besides tensors; `parts` maps a part to its digest."""

    task: Task
    form: str
    settings: dict[str, JsonValue] = {}
    version: int = Field(default=1, ge=1)
    parts: dict[Name, Digest] = {}
    superseded: bool = False
    pinned: bool = False  # brought back by a rollback: shared parts do not move on under it

    @field_validator("task")
    @classmethod
    def _task_only(cls, task: Task) -> Task:
        """A stream's task also names files; a store's does not."""
        return task if type(task) is Task else Task(**{field: getattr(task, field) for field in Task.model_fields})

    @property
    def name(self) -> str:
        return self.task.name

    @property
    def live(self) -> bool:
        """Whether shared parts move on under this task."""
        return self.settings.get("retention") == "live" and not self.superseded and not self.pinned

    @property
    def reference(self) -> str:
        return f"{self.name}@{self.version}"


class Manifest(_Strict):
    """All versions of all tasks, in the order in which they were learned."""

    format: int = FORMAT
    base: BaseInfo
    tasks: list[TaskRecord] = []
    training: dict[Name, Digest] = {}
    aliases: dict[Name, dict[Alias, int]] = {}  # task -> alias -> version
    retired: list[Name] = []
    deleted: dict[Name, int] = {}  # task -> its newest version that is gone, whose number is never given again

    @model_validator(mode="after")
    def _one_current_version(self) -> Manifest:
        versions = {(record.name, record.version) for record in self.tasks}
        current = [record.name for record in self.tasks if not record.superseded]
        if sorted(current) != sorted({record.name for record in self.tasks}) or len(versions) < len(self.tasks):
            raise ValueError("a task has two current versions or none, or one version twice")
        named = {(name, version) for name, own in self.aliases.items() for version in own.values()}
        if not named <= versions or not set(self.retired) <= set(current):
            raise ValueError("an alias or a retired task names a version that is not there")
        return self

    @property
    def begun(self) -> bool:
        """Whether a task was ever learned."""
        return bool(self.tasks or self.deleted)

    def current(self) -> list[TaskRecord]:
        """The tasks, in order, without the versions kept for rollback and without retired tasks."""
        return [record for record in self.tasks if not record.superseded and record.name not in self.retired]

    def versions(self, name: str) -> list[TaskRecord]:
        """The oldest first; empty for an unknown task."""
        return [record for record in self.tasks if record.name == name]

    def newest(self) -> dict[str, int]:
        """The greatest number that a version ever had, of every task that was ever learned."""
        found = dict(self.deleted)
        for record in self.tasks:
            found[record.name] = max(record.version, found.get(record.name, 0))
        return found

    def next_version(self, name: str) -> int:
        """The number that the next version of a task gets."""
        return self.newest().get(name, 0) + 1

    def aliases_of(self, record: TaskRecord) -> list[str]:
        return [alias for alias, version in self.aliases.get(record.name, {}).items() if version == record.version]

    def record(self, name: str, version: int | None = None) -> TaskRecord:
        """What `name` names: the current version of a task, `NAME@VERSION`, `NAME@ALIAS`; or the version given.

        Raises TaskError, for a retired task too, unless its version is named.
        """
        reference = parse_reference(name) if version is None else Reference(name, version)
        name, versions = reference.name, {record.version: record for record in self.versions(reference.name)}
        if not versions:
            known = [record.name for record in self.current()]
            raise TaskError(f"no task {name!r}; the tasks are: {', '.join(known) or 'none yet'}{near(name, known)}")
        if reference.version is not None:
            if reference.version not in versions:
                known = [str(one) for one in versions]
                raise TaskError(f"task {name!r} has no version {reference.version}; it has {', '.join(known)}")
            return versions[reference.version]
        current = next(record for record in versions.values() if not record.superseded)
        if name in self.retired:
            raise TaskError(
                f"task {name!r} is retired; name its version ({current.reference}), or bring it back with "
                f"`moecl retire RUN {name} --undo`"
            )
        if reference.alias is None:
            return current
        aliases = self.aliases.get(name, {})
        if reference.alias not in aliases:
            raise TaskError(
                f"task {name!r} has no alias {reference.alias!r}; its aliases are: "
                f"{', '.join(aliases) or 'none yet, `moecl promote` makes one'}{near(reference.alias, aliases)}"
            )
        return versions[aliases[reference.alias]]

    def with_version(self, record: TaskRecord, parts: dict[str, str]) -> Manifest:
        """`record` with `parts` as the newest version of its task, which becomes the last one learned."""
        changes = {
            "version": self.next_version(record.name),
            "parts": parts,
            "superseded": False,
            "pinned": False,
        }
        new = record.model_copy(update=changes)
        tasks = [
            known.model_copy(update={"superseded": True}) if known.name == record.name else known
            for known in self.tasks
        ]
        retired = [name for name in self.retired if name != record.name]
        return self.model_copy(update={"tasks": [*tasks, new], "retired": retired})

    def with_moved(self, moved: dict[str, str]) -> Manifest:
        """The parts in `moved` with their new digests, in every record under which they move on."""
        tasks = [
            record.model_copy(update={"parts": {part: moved.get(part, old) for part, old in record.parts.items()}})
            if record.live
            else record
            for record in self.tasks
        ]
        return self.model_copy(update={"tasks": tasks})

    def moves(self, moved: dict[str, str]) -> dict[str, JsonValue]:
        """What `with_moved` changes, by part: from which digests to which."""
        live = [record.parts for record in self.tasks if record.live]
        return {
            part: {"before": list[JsonValue](sorted({parts[part] for parts in live if part in parts})), "after": digest}
            for part, digest in moved.items()
        }

    def digests(self) -> set[str]:
        """The objects that some version of some task needs."""
        return {digest for record in self.tasks for digest in record.parts.values()}

    def users(self, digest: str) -> list[str]:
        """Which parts of which tasks are the object `digest`, in words."""
        return [
            f"part {part!r} of task {record.name!r} (version {record.version})"
            for record in self.tasks
            for part, used in record.parts.items()
            if used == digest
        ]

    def dump(self) -> bytes:
        """JSON with a task a line, which is written in no time and shows in a diff what was learned."""
        fields = self.model_dump(mode="json")
        tasks = ",\n  ".join(_json(task) for task in fields["tasks"])
        written = {key: _json(value) for key, value in fields.items()} | {
            "tasks": f"[\n  {tasks}\n ]" if tasks else "[]"
        }
        return ("{\n" + ",\n".join(f" {_json(key)}: {value}" for key, value in written.items()) + "\n}\n").encode()


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def parse_manifest(path: Path, data: bytes) -> Manifest:
    """The manifest in the bytes of file `path`. Raises `StoreError` that says where it is broken, or to upgrade."""
    remedy = "restore it from a copy of the store"
    try:
        raw = json.loads(data.decode())
    except json.JSONDecodeError as cause:
        raise StoreError(f"{path}:{cause.lineno}: broken JSON ({cause.msg}); {remedy}") from cause
    except UnicodeDecodeError as cause:
        raise StoreError(f"{path}: not UTF-8 (byte {cause.start}); {remedy}") from cause
    except (ValueError, RecursionError) as cause:
        raise StoreError(f"{path}: broken JSON ({cause}); {remedy}") from cause
    version = raw.get("format") if isinstance(raw, dict) else None
    if isinstance(version, int) and version > FORMAT:
        raise StoreError(f"{path}: has format {version}, this moecl reads formats up to {FORMAT}; upgrade moecl")
    try:
        return Manifest.model_validate(raw)
    except ValidationError as cause:
        first: Any = cause.errors(include_url=False)[0]
        field = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in first["loc"]).lstrip(".")
        value = "" if isinstance(first["input"], dict | list) else f", found {first['input']!r:.80}"
        raise StoreError(f"{path}: {field or 'manifest'}: {first['msg']}{value}; {remedy}") from cause
