"""The parts of a model on disk: content-addressed, versioned, written so that a reader never sees half a change.

    manifest.json                  what the model is; replaced in one rename, after everything it names is on disk
    objects/<sha256>.safetensors   one part each (an expert, a gate, a head); written once, removed by `gc` only
    training/<name>-<sha256>...    what only further learning needs; the newest copy
    tmp/                           files being written; what a killed writer left is removed by the next one
    .lock                          held by the one writer; readers need none

Safetensors only: nothing in a store is ever executed.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor, contiguous_format

from moecl._atomic import atomic_write, lock_file, one_line, remove_drafts, sync_folder
from moecl._card import model_card
from moecl._manifest import FORMAT, HEX, BaseInfo, Manifest, TaskRecord, parse_manifest
from moecl.errors import StoreError

__all__ = ["FORMAT", "BaseInfo", "Manifest", "ObjectBytes", "Removed", "Store", "TaskRecord", "encode"]

MANIFEST, LOCK = "manifest.json", ".lock"
FOLDERS = ("objects", "training", "tmp")
REMEDY = "restore it from a copy of the store, or learn the task again"


class ObjectBytes(NamedTuple):
    """Sizes of the objects that only one task needs, and of those that other tasks need too."""

    own: int
    shared: int


class Removed(NamedTuple):
    """What `gc` removed."""

    files: int
    bytes: int


def encode(tensors: Mapping[str, Tensor]) -> bytes:
    """Canonical safetensors bytes: equal tensors, in whatever order, layout or device, give equal bytes."""
    # Clones, because safetensors refuses tensors that share memory; it sorts by dtype and name itself.
    return safetensors.torch.save(
        {name: tensor.detach().cpu().clone(memory_format=contiguous_format) for name, tensor in tensors.items()}
    )


class Store:
    """A store folder, open. `manifest` is the model as it was when last read: `refresh` reads it again.

    Several processes may read while one writes; what a reader's manifest names stays until `gc`.
    """

    manifest: Manifest

    def __init__(self, path: str | Path, *, readonly: bool = False) -> None:
        self.path = Path(path)
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
        path = Path(path)
        with one_line(path, StoreError):
            _refuse_occupied(path)
            path.mkdir(parents=True, exist_ok=True)
        with lock_file(path / LOCK, error=StoreError), one_line(path, StoreError):
            _refuse_occupied(path)  # another may have been faster
            _make_folders(path)
            sync_folder(path.parent)
            atomic_write(path / MANIFEST, Manifest(base=base).dump(), tmp=path / "tmp", error=StoreError)
        return cls(path)

    @staticmethod
    def exists(path: str | Path) -> bool:
        return (Path(path) / MANIFEST).is_file()

    def refresh(self) -> bool:
        """Read the manifest again; whether it changed. Raises `StoreError`."""
        path = self.path / MANIFEST
        try:
            manifest = parse_manifest(path, path.read_bytes())
        except (FileNotFoundError, NotADirectoryError) as cause:
            raise StoreError(f"{self.path}: not a store: {_found(self.path)}") from cause
        except OSError as cause:
            raise StoreError(f"{path}: not readable ({cause.strerror}); change its permissions") from cause
        changed = manifest != getattr(self, "manifest", None)
        self.manifest = manifest
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
        """The current version of each task, in order."""
        return self.manifest.current()

    def versions(self, name: str) -> list[TaskRecord]:
        """Every version of a task, the oldest first; empty for an unknown one."""
        return [record for record in self.manifest.tasks if record.name == name]

    def record(self, name: str, version: int | None = None) -> TaskRecord:
        """A task's current version, or the one given. Raises `TaskError`."""
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
            _compare(self._object(digest), tensors, expect)
        return tensors

    def read_again(self, digest: str) -> dict[str, Tensor]:
        """As `read`, but an object that this `Store` has hashed before is not hashed again."""
        return self._mapped(digest, again=False)

    def _mapped(self, digest: str, again: bool) -> dict[str, Tensor]:
        if not HEX.fullmatch(digest):  # nothing else may reach the file system
            raise StoreError(f"{self.path}: {digest!r:.80} is not a sha256 in hexadecimal")
        known = digest in self._whole and not again
        tensors = _read(self._object(digest), None if known else digest, lambda: _in_words(self.manifest.users(digest)))
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
                    name: _read(self._training(name, digest), digest, partial("further learning ({})".format, name))
                    for name, digest in digests.items()
                    if not names or name in names
                }
            except StoreError:  # a writer may have replaced it under this reader
                self.refresh()
                if self.manifest.training == digests:
                    raise

    def verify(self) -> list[str]:
        """Hash everything the newest manifest names: one line a problem, none when the store is whole."""
        self.refresh()
        digests = dict.fromkeys(digest for record in self.manifest.tasks for digest in record.parts.values())
        checks: list[Callable[[], object]] = [partial(self.read, digest) for digest in digests]
        problems = []
        for check in [*checks, self.training]:
            try:
                check()
            except StoreError as problem:
                problems.append(str(problem))
        return problems

    # Writing

    def commit(
        self,
        records: Iterable[tuple[TaskRecord, Mapping[str, Mapping[str, Tensor]]]] = (),
        training: Mapping[str, Mapping[str, Tensor]] | None = None,
        moved: Mapping[str, Mapping[str, Tensor]] | None = None,
    ) -> Manifest:
        """Add versions of tasks (a record's `version` and `parts` are set here), all in one change.

        `moved` replaces these parts in the current version of every task with retention live; `training` replaces all
        of the state for further learning, None keeps it. Raises `StoreError` (disk full, not writable) and `BusyError`;
        the old model is then intact.
        """
        with self.lock(), one_line(self.path, StoreError):
            manifest = self.manifest
            for record, parts in records:
                manifest = manifest.with_version(record, {part: self._add(parts[part]) for part in sorted(parts)})
            if moved:
                manifest = manifest.with_moved({part: self._add(tensors) for part, tensors in moved.items()})
            if training is not None:
                digests = {name: self._add(training[name], name) for name in sorted(training)}
                manifest = manifest.model_copy(update={"training": digests})
            self._replace_manifest(manifest)
            with suppress(OSError):  # the change is done; gc tries again
                self._sweep_training()
            return self.manifest

    def gc(self) -> Removed:
        """Remove what no version of any task needs. Readers that opened the store before a change must refresh."""
        with self.lock(), one_line(self.path, StoreError):
            needed = {digest for record in self.manifest.tasks for digest in record.parts.values()}
            objects = _sweep(self.path / "objects", {self._object(digest).name for digest in needed})
            training = self._sweep_training()
            return Removed(objects.files + training.files, objects.bytes + training.bytes)

    def write_card(self, result_markdown: str = "") -> None:
        """README.md, a model card for people and for the hub; `result_markdown` goes under its heading Result."""
        with self.lock():
            sizes = {name: sum(found) for name, found in self.bytes().items()}
            card = model_card(self.manifest, sizes, result_markdown)
            atomic_write(self.path / "README.md", card.encode(), tmp=self.path / "tmp", error=StoreError)

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

    def _replace_manifest(self, manifest: Manifest) -> None:
        data = manifest.dump()
        manifest = parse_manifest(self.path / MANIFEST, data)  # never write what could not be read
        sync_folder(self.path / "objects")  # what was found there may be a killed writer's
        sync_folder(self.path / "training")
        atomic_write(self.path / MANIFEST, data, tmp=self.path / "tmp", error=StoreError)
        self.manifest = manifest

    def _sweep_training(self) -> Removed:
        keep = {self._training(name, digest).name for name, digest in self.manifest.training.items()}
        return _sweep(self.path / "training", keep)


def _sweep(folder: Path, keep: set[str]) -> Removed:
    """Remove a folder's objects but those in `keep`; files that no store wrote stay."""
    found = [entry for entry in os.scandir(folder) if re.fullmatch(r"(.+-)?[0-9a-f]{64}\.safetensors", entry.name)]
    sizes = []
    for entry in found:
        if entry.name not in keep:
            sizes.append(entry.stat(follow_symlinks=False).st_size)
            os.unlink(entry)
    return Removed(len(sizes), sum(sizes))


def _make_folders(path: Path) -> None:
    for folder in FOLDERS:  # tools that copy may drop empty folders
        (path / folder).mkdir(exist_ok=True)


def _refuse_occupied(path: Path) -> None:
    if Store.exists(path):
        raise StoreError(f"{path}: already a store; open it, or choose another folder")
    if path.exists() and not (path.is_dir() and set(os.listdir(path)) <= {*FOLDERS, LOCK}):
        raise StoreError(f"{path}: {_found(path)}; a store needs a new or empty folder")


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
    if set(names) <= {*FOLDERS, LOCK}:
        return "it is a store without its manifest.json; copy it again, or start again what was making it"
    return f"it is a folder with {', '.join(names[:5])}{' ...' if len(names) > 5 else ''}"


def _in_words(users: list[str]) -> str:
    more = f" and {len(users) - 2} more" if len(users) > 2 else ""
    return ", ".join(users[:2]) + more if users else "no task"


def _read(path: Path, digest: str | None, users: Callable[[], str]) -> dict[str, Tensor]:
    """The tensors of the file `path`, mapped; its sha256 must be `digest`, if given. Raises `StoreError`."""
    try:
        if digest is not None:
            _check(path, digest, users)
        return safetensors.torch.load_file(path)
    except (OSError, RuntimeError) as cause:  # RuntimeError: how torch says that it cannot map
        if not path.exists():
            raise StoreError(f"{path}: missing; needed by {users()}; {REMEDY}") from cause
        reason = getattr(cause, "strerror", None) or str(cause).partition("\n")[0]
        raise StoreError(f"{path}: not readable ({reason}); needed by {users()}; change its permissions") from cause
    except (SafetensorError, KeyError) as cause:
        raise StoreError(f"{path}: not a safetensors file ({cause}); needed by {users()}; {REMEDY}") from cause


def _check(path: Path, digest: str, users: Callable[[], str]) -> None:
    with path.open("rb") as file:
        empty = os.fstat(file.fileno()).st_size == 0
        with nullcontext(b"") if empty else mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            found = hashlib.sha256(data).hexdigest()
            if found != digest:
                what = f"{_damage(data)}: its sha256 is {found}, not {digest}"
                raise StoreError(f"{path}: {what}; needed by {users()}; {REMEDY}")


def _damage(data: bytes | mmap.mmap) -> str:
    """Truncated or altered, judged by the length that the header tells."""
    try:
        start = 8 + int.from_bytes(data[:8], "little")
        whole = start + max(end for tensor in json.loads(data[8:start]).values() for end in tensor["data_offsets"])
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return "truncated or altered"
    return f"truncated ({len(data)} of {whole} bytes)" if len(data) < whole else "altered"


def _compare(path: Path, tensors: Mapping[str, Tensor], expect: Mapping[str, Sequence[int]]) -> None:
    missing, unexpected = sorted(expect.keys() - tensors.keys()), sorted(tensors.keys() - expect.keys())
    what = [f"no tensor {name!r}" for name in missing[:1]] + [
        f"an unexpected tensor {name!r}" for name in unexpected[:1]
    ]
    if what:
        count = len(missing) + len(unexpected)
        raise StoreError(f"{path}: has {' and '.join(what)} ({count} names differ); is it another model's? {REMEDY}")
    for name, shape in expect.items():
        if tuple(tensors[name].shape) != tuple(shape):
            found = list(tensors[name].shape)
            raise StoreError(
                f"{path}: {name} has shape {found}, expected {list(shape)}; is it another model's? {REMEDY}"
            )
