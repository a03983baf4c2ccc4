"""The parts of a model on disk: content-addressed, versioned, written so that a reader never sees half a change.

    manifest.json                  what the model is; replaced in one rename, after everything it names is on disk
    audit.jsonl                    every change (_audit.py), a line before each new manifest
    objects/<sha256>.safetensors   one part each (an expert, a gate, a head); written once, removed by `gc` and `delete`
    training/<name>-<sha256>...    what only further learning needs; the newest copy
    tmp/                           files being written; what a killed writer left is removed by the next one
    .lock                          held by the one writer; readers need none

Safetensors only: nothing in a store is ever executed.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

from pydantic import JsonValue
from torch import Tensor

from moecl import _audit, _versions
from moecl._atomic import atomic_write, lock_file, one_line, remove_drafts, sync_folder
from moecl._audit import LOG, Change
from moecl._card import model_card, result_in
from moecl._manifest import FORMAT, HEX, BaseInfo, Manifest, TaskRecord, parse_manifest
from moecl._objects import Removed, check_finite, compare, encode, in_words, others, read_file, remove
from moecl._versions import PRODUCTION, Edit
from moecl.errors import StoreError

__all__ = ["FORMAT", "LOG", "BaseInfo", "Manifest", "ObjectBytes", "Removed", "Store", "TaskRecord", "encode"]

MANIFEST, LOCK, CARD = "manifest.json", ".lock", "README.md"
DRAFT = ".manifest.json"  # of a store in the making
FOLDERS = ("objects", "training", "tmp")
ROUTER = "router"  # what the state for further learning calls the router's statistics


class ObjectBytes(NamedTuple):
    """Sizes of the objects that only one task needs, and of those that other tasks need too."""

    own: int
    shared: int


class Store:
    """A store folder, open. `manifest` is the model as it was when last read: `refresh` reads it again.

    Several processes may read while one writes; what a reader's manifest names stays until `gc` or `delete`. A task is
    named `NAME`, `NAME@VERSION` or `NAME@ALIAS`.
    """

    manifest: Manifest

    def __init__(self, path: str | Path, *, readonly: bool = False, manifest: str = MANIFEST) -> None:
        self.path = Path(path)
        self._manifest = self.path / manifest
        self.readonly = readonly
        self._threads = threading.RLock()
        self._locked = False
        self._whole: set[str] = set()  # objects that were hashed
        self.refresh()

    @classmethod
    def open(cls, path: str | Path, *, readonly: bool = False) -> Store:
        """Raises `StoreError`: no store (and what is there), broken, or made by a newer moecl."""
        return cls(path, readonly=readonly)

    @classmethod
    def create(cls, path: str | Path, base: BaseInfo) -> Store:
        """A store without tasks, in a new or empty folder. Raises `StoreError`, `BusyError`."""
        return cls._create(Path(path), base, MANIFEST)

    @classmethod
    @contextmanager
    def making(cls, path: str | Path, base: BaseInfo) -> Iterator[Store]:
        """As `create`, but the folder is a store only once all that is done here is done; else it may be made again."""
        made = cls._create(Path(path), base, DRAFT)
        with made.lock():
            yield made
            with one_line(made.path, StoreError):
                os.replace(made._manifest, made.path / MANIFEST)
                sync_folder(made.path)
            made._manifest = made.path / MANIFEST

    @classmethod
    def _create(cls, path: Path, base: BaseInfo, manifest: str) -> Store:
        with one_line(path, StoreError):
            _refuse_occupied(path)
            path.mkdir(parents=True, exist_ok=True)
        with lock_file(path / LOCK, error=StoreError), one_line(path, StoreError):
            _refuse_occupied(path)  # another may have been faster
            _make_folders(path)
            if (path / DRAFT).exists():  # the log tells of what came to nothing
                (path / LOG).unlink(missing_ok=True)
                (path / DRAFT).unlink()
            sync_folder(path.parent)
            data = Manifest(base=base).dump()
            _audit.append(path, "create", [], {"base": base.model_dump()}, None, _sha256(data))
            atomic_write(path / manifest, data, tmp=path / "tmp", error=StoreError)
        return cls(path, manifest=manifest)

    @staticmethod
    def exists(path: str | Path) -> bool:
        return (Path(path) / MANIFEST).is_file()

    def refresh(self) -> bool:
        """Read the manifest again; whether it changed. Raises `StoreError`."""
        path = self._manifest
        try:
            data = path.read_bytes()
            manifest = parse_manifest(path, data)
        except (FileNotFoundError, NotADirectoryError) as cause:
            raise StoreError(f"{self.path}: not a store: {_found(self.path)}") from cause
        except OSError as cause:
            raise StoreError(f"{path}: not readable ({cause.strerror}); change its permissions") from cause
        changed = manifest != getattr(self, "manifest", None)
        self.manifest, self._sha256 = manifest, _sha256(data)
        return changed

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Be the one writer; may be nested. Reads the manifest again and removes what a killed writer left.

        Raises `BusyError` where another process, or another `Store` of this one, writes.
        """
        if self.readonly:
            raise StoreError(f"{self.path}: opened read-only; open it without readonly to change it")
        with self._threads:
            if self._locked:
                yield
                return
            with lock_file(self.path / LOCK, error=StoreError):
                self.refresh()
                with one_line(self.path, StoreError):
                    _make_folders(self.path)
                    remove_drafts(self.path / "tmp")
                self._locked = True
                try:
                    yield
                finally:
                    self._locked = False

    # Reading

    def tasks(self) -> list[TaskRecord]:
        """The current version of each task that is not retired, in order."""
        return self.manifest.current()

    def versions(self, name: str) -> list[TaskRecord]:
        """Every version of a task, the oldest first; empty for an unknown one."""
        return self.manifest.versions(name)

    def record(self, name: str, version: int | None = None) -> TaskRecord:
        """What `name` names, or the version given. Raises `TaskError`."""
        return self.manifest.record(name, version)

    def digests(self, name: str) -> dict[str, str]:
        """The sha256 of each part that the task's answers depend on. Raises `TaskError`."""
        return dict(self.record(name).parts)

    def bytes(self) -> dict[str, ObjectBytes]:
        """For each task, bytes of the objects that it needs of its own, and together with other tasks."""
        needed = {record.name: set(record.parts.values()) for record in self.tasks()}
        users = Counter(digest for digests in needed.values() for digest in digests)
        return {
            name: ObjectBytes(
                own=self._size(digest for digest in digests if users[digest] == 1),
                shared=self._size(digest for digest in digests if users[digest] > 1),
            )
            for name, digests in needed.items()
        }

    def bytes_of(self, record: TaskRecord) -> int | None:
        """Bytes of a version's objects; None where one is missing."""
        sizes = [self.size(digest) for digest in set(record.parts.values())]
        return None if None in sizes else sum(size or 0 for size in sizes)

    def audit(self) -> Iterator[tuple[int, _audit.Line | None]]:
        """The lines of the audit log with their numbers; None for one that was altered."""
        return _audit.read(self.path)

    def size(self, digest: str) -> int | None:
        """Bytes of an object, which is not read; None where it is missing."""
        try:
            return os.stat(f"{self.path}/objects/{digest}.safetensors").st_size
        except OSError:
            return None

    def read(self, digest: str, expect: Mapping[str, Sequence[int]] | None = None) -> dict[str, Tensor]:
        """The tensors of an object, on the CPU, after its bytes were hashed; memory-mapped: copy what is to stay.

        `expect`: the names and shapes it must have. Raises `StoreError` for a missing, truncated or altered object,
        and for a missing or unexpected tensor.
        """
        tensors = self._mapped(digest, again=True)
        if expect is not None:
            compare(self._object(digest), tensors, expect)
        return tensors

    def read_again(self, digest: str) -> dict[str, Tensor]:
        """As `read`, but an object that this `Store` has hashed before is not hashed again."""
        return self._mapped(digest, again=False)

    def _mapped(self, digest: str, again: bool) -> dict[str, Tensor]:
        if not HEX.fullmatch(digest):  # nothing else may reach the file system
            raise StoreError(f"{self.path}: {digest!r:.80} is not a sha256 in hexadecimal")
        known = digest in self._whole and not again
        tensors = read_file(
            self._object(digest), None if known else digest, lambda: in_words(self.manifest.users(digest))
        )
        self._whole.add(digest)
        return tensors

    def training(self, *names: str) -> dict[str, dict[str, Tensor]]:
        """The newest state for further learning, by name, or only these of it; memory-mapped as in `read`.

        Raises `StoreError`.
        """
        while True:
            digests = self.manifest.training
            try:
                return {
                    name: read_file(self._training(name, digest), digest, partial("further learning ({})".format, name))
                    for name, digest in digests.items()
                    if not names or name in names
                }
            except StoreError:  # a writer may have replaced it under this reader
                self.refresh()
                if self.manifest.training == digests:
                    raise

    def verify(self) -> list[str]:
        """Read everything the newest manifest names: one line a problem, none when the store is whole.

        What is missing, damaged or not finite, and where the audit log does not tell how the store came to be.
        """
        while True:
            self.refresh()
            problems = _audit.problems(self.path, self._sha256)
            if not self.refresh():  # else a writer wrote between the two
                break
        checks: list[Callable[[], object]] = [
            partial(self._verify_object, digest) for digest in sorted(self.manifest.digests())
        ]
        for check in [*checks, self._verify_training]:
            try:
                check()
            except StoreError as problem:
                problems.append(str(problem))
        return problems

    def _verify_object(self, digest: str) -> None:
        check_finite(self._object(digest), self.read(digest), in_words(self.manifest.users(digest)))

    def _verify_training(self) -> None:
        for name, tensors in self.training().items():
            check_finite(self.path / "training", tensors, f"further learning ({name})")

    # Writing

    def commit(
        self,
        records: Iterable[tuple[TaskRecord, Mapping[str, Mapping[str, Tensor]]]] = (),
        training: Mapping[str, Mapping[str, Tensor]] | None = None,
        moved: Mapping[str, Mapping[str, Tensor]] | None = None,
        what: str = "learn",
    ) -> Manifest:
        """Add versions of tasks (a record's `version` and `parts` are set here), all in one change.

        `moved` replaces these parts in the current version of every task with retention live; `training` replaces all
        of the state for further learning, None keeps it; `what` is the log's word for the change. Raises `StoreError`
        (disk full, not writable) and `BusyError`; the old model is then intact.
        """
        with self.lock(), one_line(self.path, StoreError):
            manifest, detail = self.manifest, dict[str, JsonValue]()
            for record, parts in records:
                manifest = manifest.with_version(record, {part: self._add(parts[part]) for part in sorted(parts)})
            if moved:
                digests = {part: self._add(tensors) for part, tensors in moved.items()}
                detail["moved"] = manifest.moves(digests)
                manifest = manifest.with_moved(digests)
            if training is not None:
                digests = {name: self._add(training[name], name) for name in sorted(training)}
                manifest = manifest.model_copy(update={"training": digests})
            self._replace_manifest(what, Edit(manifest, _versions.changes(self.manifest, manifest), detail))
            with suppress(OSError):  # the change is done; gc tries again
                remove(self._old_training())
            return self.manifest

    def promote(self, reference: str, alias: str = PRODUCTION) -> TaskRecord:
        """Let `NAME@alias` mean what `reference` names. Raises TaskError, StoreError, BusyError, as all that follow."""
        self._edit("promote", lambda before: _versions.promoted(before, reference, alias))
        return self.record(reference)

    def remove_alias(self, name: str, alias: str = PRODUCTION) -> None:
        self._edit("promote", lambda before: _versions.unpromoted(before, name, alias))

    def rollback(self, name: str, to: int | None = None) -> TaskRecord:
        """Make an older version the current one (that before the current one, or `to`), with the answers it had."""
        self._edit("rollback", lambda before: _versions.rolled_back(before, name, to))
        return self.record(name)

    def retire(self, name: str) -> None:
        """Hide a task: it answers only where its version is named."""
        self._edit("retire", lambda before: _versions.retired(before, name))

    def unretire(self, name: str) -> TaskRecord:
        self._edit("unretire", lambda before: _versions.unretired(before, name))
        return self.record(name)

    def delete(self, reference: str) -> Removed:
        """Remove a version that is not in use, or a task whole, and the objects that nothing else needs."""
        with self.lock(), one_line(self.path, StoreError):
            before = self.manifest.digests()
            self._edit("delete", lambda manifest: _versions.deleted(manifest, reference))
            return remove(filter(Path.exists, map(self._object, sorted(before - self.manifest.digests()))))

    def would_delete(self, reference: str) -> list[TaskRecord]:
        """The versions that `delete` would remove."""
        return _versions.to_delete(self.manifest, reference)

    def gc(self) -> Removed:
        """Remove what no version of any task needs. Readers that opened the store before a change must refresh."""
        with self.lock(), one_line(self.path, StoreError):
            needed = {self._object(digest).name for digest in self.manifest.digests()}
            spare = [*others(self.path / "objects", needed), *self._old_training()]
            if not spare:
                return Removed(0, 0)
            detail: dict[str, JsonValue] = {"files": len(spare), "bytes": sum(path.stat().st_size for path in spare)}
            try:
                self.log("gc", [], detail)
            except StoreError:  # a full disk is freed first
                removed = remove(spare)
                self.log("gc", [], detail)
                return removed
            return remove(spare)

    def log_export(self, record: TaskRecord, kind: str) -> None:
        self.log("export", [_versions.change(record.name, record, record)], {"as": kind})

    def log(self, what: str, changes: Sequence[Change], detail: Mapping[str, JsonValue]) -> None:
        """Write down in the audit log what leaves the model as it is."""
        with self.lock():
            _audit.append(self.path, what, [*changes], dict(detail), self._sha256, self._sha256)

    def _edit(self, what: str, make: Callable[[Manifest], Edit]) -> None:
        with self.lock(), one_line(self.path, StoreError):
            self._replace_manifest(what, make(self.manifest))

    def write_card(self, result_markdown: str | None = None, address: str | None = None) -> None:
        """README.md, a model card for people and for the hub.

        `result_markdown` goes under its heading Result; None keeps what stands there. `address`: where the store is to
        be loaded from.
        """
        with self.lock(), one_line(self.path, StoreError):
            sizes = {name: sum(found) for name, found in self.bytes().items()}
            path = self.path / CARD
            if result_markdown is None:
                result_markdown = result_in(path.read_text()) if path.is_file() else ""
            card = model_card(self.manifest, sizes, result_markdown, address)
            atomic_write(path, card.encode(), tmp=self.path / "tmp", error=StoreError)

    def copy_into(self, made: Store, manifest: Manifest) -> None:
        """Put all versions, aliases and training state of `manifest` into a store without tasks; objects are hashed.

        Raises `StoreError`, where something was removed meanwhile too.
        """
        manifest = manifest.model_copy(update={"base": made.manifest.base})
        with made.lock(), one_line(made.path, StoreError):
            for digest in sorted(manifest.digests()):
                made._take(self._object(digest), made._object(digest), digest, manifest.users(digest))
            for name, digest in manifest.training.items():
                made._take(self._training(name, digest), made._training(name, digest), digest, ["further learning"])
            if (card := self.path / CARD).is_file():
                atomic_write(made.path / CARD, card.read_bytes(), tmp=made.path / "tmp", error=StoreError)
            made._replace_manifest("save", Edit(manifest, _versions.changes(made.manifest, manifest), {}))

    def _take(self, source: Path, target: Path, digest: str, users: list[str]) -> None:
        read_file(source, digest, lambda: in_words(users))
        atomic_write(target, source.read_bytes(), tmp=self.path / "tmp", error=StoreError)

    def _object(self, digest: str) -> Path:
        return self.path / "objects" / f"{digest}.safetensors"

    def _training(self, name: str, digest: str) -> Path:
        return self.path / "training" / f"{name}-{digest}.safetensors"

    def _size(self, digests: Iterable[str]) -> int:
        size = 0
        for path in map(self._object, digests):
            with one_line(path, StoreError):
                size += path.stat().st_size
        return size

    def _add(self, tensors: Mapping[str, Tensor], name: str | None = None) -> str:
        """Write an object, or training state `name`, unless it is there and whole. Returns its digest."""
        data = encode(tensors)
        digest = hashlib.sha256(data).hexdigest()
        path = self._object(digest) if name is None else self._training(name, digest)
        if not (path.is_file() and path.read_bytes() == data):
            atomic_write(path, data, tmp=self.path / "tmp", error=StoreError)
        return digest

    def _replace_manifest(self, what: str, edit: Edit) -> None:
        manifest = edit.manifest.model_copy(update={"format": FORMAT})
        data = manifest.dump()
        manifest = parse_manifest(self._manifest, data)  # never write what could not be read
        sync_folder(self.path / "objects")  # what was found there may be a killed writer's
        sync_folder(self.path / "training")
        _audit.append(self.path, what, edit.changes, edit.detail, self._sha256, _sha256(data))
        atomic_write(self._manifest, data, tmp=self.path / "tmp", error=StoreError)
        self.manifest, self._sha256 = manifest, _sha256(data)

    def _old_training(self) -> list[Path]:
        keep = {self._training(name, digest).name for name, digest in self.manifest.training.items()}
        return others(self.path / "training", keep)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _make_folders(path: Path) -> None:
    for folder in FOLDERS:  # tools that copy may drop empty folders
        (path / folder).mkdir(exist_ok=True)


def _refuse_occupied(path: Path) -> None:
    if Store.exists(path):
        raise StoreError(f"{path}: already a store; open it, or choose another folder")
    if path.exists() and not (path.is_dir() and _unfinished(os.listdir(path))):
        raise StoreError(f"{path}: {_found(path)}; a store needs a new or empty folder")


def _unfinished(names: Iterable[str]) -> bool:
    """Whether a folder has nothing but what a killed maker of a store leaves."""
    found = set(names)
    return found <= {*FOLDERS, LOCK, LOG, *((DRAFT, CARD) if DRAFT in found else ())}


def _found(path: Path) -> str:
    """What is there instead of a store, in words."""
    if not path.exists():
        return "there is no such folder"
    if not path.is_dir():
        return "it is a file"
    if Store.exists(path / "store"):
        return f"it is a run folder, its store is {path / 'store'}"
    names = sorted(os.listdir(path))
    if not names:
        return "it is an empty folder"
    if _unfinished(names):
        return "it is a store without its manifest.json; copy it again, or start again what was making it"
    return f"it is a folder with {', '.join(names[:5])}{' ...' if len(names) > 5 else ''}"
