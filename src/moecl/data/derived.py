"""What is computed from users' texts, kept on disk so that it is computed once.

    CACHE/KIND/ab/ab12....safetensors    one entry, named by its key: its tensors, and a digest of key and tensors

An entry is a function of its key and of our code, whose number is in the digest: processes may share a folder.
Whatever is wrong with an entry or with the disk, it is computed again, and nothing else changes. One entry a file: a
file is a text's hidden states (some 100 kB), so that opening it costs little beside reading it, and each can be removed
on its own.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from moecl.data.assets import cache_dir

if TYPE_CHECKING:  # listing and clearing need no torch
    from torch import Tensor

KINDS = {"features": 1, "prefix": 1, "tokens": 1}  # raised when our code computes something else of the same key
DIGEST = "sha256"
SLACK = 20  # a twentieth of the bound is freed at once, and written before the folder is looked through again
STALE = 3600.0  # seconds after which a file being written was left by a dead process


class Derived:
    """The entries of one kind, at most `most_bytes` of them; the oldest-used go first. `note` is told what fails, once.

    What was used since `begin` is not removed: where a pass over the rows takes more than there is room for, each
    would drive out the one that the next pass needs first.
    """

    def __init__(self, kind: str, most_bytes: int, note: Callable[[str], None]) -> None:
        assert kind in KINDS
        self.kind, self.most_bytes, self.note = kind, most_bytes, note
        self.folder = cache_dir() / kind
        self._noted = False
        self.begin()

    def begin(self) -> None:
        self._since, self._free, self._full = time.time(), 0, False

    def get(self, key: str) -> dict[str, Tensor] | None:
        """The entry, if it is there and whole. May be called from any thread."""
        from safetensors.torch import load

        path = self._path(key)
        try:
            tensors = load(path.read_bytes())
            if tensors.pop(DIGEST).numpy().tobytes() != digest(self._made_as(key), tensors):
                return None
        except (OSError, SafetensorError, KeyError, ValueError, RuntimeError):  # not there, cut short or altered
            return None
        with suppress(OSError):
            touch(path)
        return tensors

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep an entry where there is room; without fsync, since a file that did not reach the disk is found out."""
        import torch
        from safetensors.torch import save

        if self._full:
            return
        sealed = torch.frombuffer(bytearray(digest(self._made_as(key), tensors)), dtype=torch.uint8)
        data, path = save({**tensors, DIGEST: sealed}), self._path(key)
        draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
        try:
            if not self._make_room(len(data)):
                self._stop(f"it is full ({self.most_bytes / 1e9:g} GB)")
                return
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # texts may be private
            path.parent.mkdir(exist_ok=True)
            draft.write_bytes(data)
            touch(draft)
            os.replace(draft, path)
        except FileNotFoundError:  # the folder was cleared just now
            pass
        except OSError as error:
            with suppress(OSError):
                draft.unlink(missing_ok=True)
            self._stop(f"it cannot be written ({error.strerror or error})")

    def _stop(self, why: str) -> None:
        self._full = True
        if not self._noted:
            self._noted = True
            self.note(f"{self.kind} cache {self.folder}: {why}; what is not in it is computed each time")

    def _made_as(self, key: str) -> str:
        return f"{self.kind} {KINDS[self.kind]} {key}"

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"

    def _make_room(self, size: int) -> bool:
        if self._free < size:
            self._free = self._look_through(size)
        self._free -= size
        return self._free >= 0

    def _look_through(self, size: int) -> int:
        """Remove the oldest-used entries if `size` more bytes are too many; the bytes that may be written until then
        next look, fewer than are free, for other processes write too."""
        if size > self.most_bytes:
            return 0
        files = sorted((found.st_mtime, found.st_size, path) for path, found in entries(self.folder))
        slack = max(size, self.most_bytes // SLACK)
        taken = sum(bytes_ for _, bytes_, _ in files)
        wanted = self.most_bytes if taken + size <= self.most_bytes else self.most_bytes - slack
        for used, bytes_, path in files:
            draft = path.suffix == ".tmp"
            if used < time.time() - STALE if draft else taken > wanted and used < self._since:
                with suppress(FileNotFoundError):
                    path.unlink()
                taken -= bytes_
        return min(slack, self.most_bytes - taken)


def touch(path: Path) -> None:
    """Used now: by the clock that `begin` reads, which may be ahead of what files are stamped with by themselves."""
    now = time.time_ns()
    os.utime(path, ns=(now, now))


def digest(key: str, tensors: Mapping[str, Tensor]) -> bytes:
    import torch

    found = hashlib.sha256(key.encode())
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return found.digest()


def entries(folder: Path) -> list[tuple[Path, os.stat_result]]:
    """Every file of a kind, those being written too."""
    found = []
    for path in folder.glob("*/*"):
        with suppress(OSError):
            found.append((path, path.stat()))
    return found


def taken(kind: str) -> tuple[Path, int, int]:
    """(folder, entries, bytes) of a kind."""
    folder = cache_dir() / kind
    found = entries(folder)
    return folder, len(found), sum(stat.st_size for _, stat in found)


def clear(kind: str) -> None:
    """Remove all of a kind; a run that is under way computes what it misses again."""
    shutil.rmtree(cache_dir() / kind, ignore_errors=True)
