"""A store's manifest: what the model consists of, and which bytes each task's answers depend on."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any

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

FORMAT = 1
HEX = re.compile("[0-9a-f]{64}")
Digest = Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$")]
Name = Annotated[str, StringConstraints(pattern="^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]


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
        return self.settings.get("retention") == "live" and not self.superseded


class Manifest(_Strict):
    """All versions of all tasks, in the order in which they were learned."""

    format: int = FORMAT
    base: BaseInfo
    tasks: list[TaskRecord] = []
    training: dict[Name, Digest] = {}

    @model_validator(mode="after")
    def _one_current_version(self) -> Manifest:
        current = [record.name for record in self.current()]
        versions = [(record.name, record.version) for record in self.tasks]
        if len(set(current)) < len(current) or len(set(versions)) < len(versions):
            raise ValueError("a task has two current versions, or one version twice")
        return self

    def current(self) -> list[TaskRecord]:
        """The tasks, in order, without the versions kept for rollback."""
        return [record for record in self.tasks if not record.superseded]

    def record(self, name: str, version: int | None = None) -> TaskRecord:
        """A task's current version, or the one given. Raises `TaskError`."""
        versions = {record.version: record for record in self.tasks if record.name == name}
        found = (
            versions.get(version)
            if version is not None
            else next((record for record in versions.values() if not record.superseded), None)
        )
        if found is not None:
            return found
        if version is not None and versions:
            raise TaskError(f"task {name!r} has no version {version}; it has {', '.join(map(str, versions))}")
        known = [record.name for record in self.current()]
        raise TaskError(f"no task {name!r}; the tasks are: {', '.join(known) or 'none yet'}{near(name, known)}")

    def with_version(self, record: TaskRecord, parts: dict[str, str]) -> Manifest:
        """`record` with `parts` as the newest version of its task, which becomes the last one learned."""
        latest = max((known.version for known in self.tasks if known.name == record.name), default=0)
        new = record.model_copy(update={"version": latest + 1, "parts": parts, "superseded": False})
        tasks = [
            known.model_copy(update={"superseded": True}) if known.name == record.name else known
            for known in self.tasks
        ]
        return self.model_copy(update={"tasks": [*tasks, new]})

    def with_moved(self, moved: dict[str, str]) -> Manifest:
        """The parts in `moved` with their new digests, in every record under which they move on."""
        tasks = [
            record.model_copy(update={"parts": {part: moved.get(part, old) for part, old in record.parts.items()}})
            if record.live
            else record
            for record in self.tasks
        ]
        return self.model_copy(update={"tasks": tasks})

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
