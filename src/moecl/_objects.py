"""A store's objects: tensors as bytes that are named by their sha256, checked whenever they are read."""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor, contiguous_format

from moecl.errors import StoreError

OBJECT = re.compile(r"(.+-)?[0-9a-f]{64}\.safetensors")
REMEDY = "restore it from a copy of the store, or learn the task again"


class Removed(NamedTuple):
    """What `gc` or `delete` removed."""

    files: int
    bytes: int


def encode(tensors: Mapping[str, Tensor]) -> bytes:
    """Canonical safetensors bytes: equal tensors, in whatever order, layout or device, give equal bytes."""
    # Clones, because safetensors refuses tensors that share memory; it sorts by dtype and name itself.
    return safetensors.torch.save(
        {name: tensor.detach().cpu().clone(memory_format=contiguous_format) for name, tensor in tensors.items()}
    )


def others(folder: Path, keep: Collection[str]) -> list[Path]:
    """A folder's objects but those in `keep`; files that no store wrote are none."""
    names = [entry.name for entry in os.scandir(folder) if OBJECT.fullmatch(entry.name)]
    return [folder / name for name in sorted(names) if name not in keep]


def remove(paths: Iterable[Path]) -> Removed:
    sizes = []
    for path in paths:
        sizes.append(os.stat(path, follow_symlinks=False).st_size)
        os.unlink(path)
    return Removed(len(sizes), sum(sizes))


def in_words(users: list[str]) -> str:
    more = f" and {len(users) - 2} more" if len(users) > 2 else ""
    return ", ".join(users[:2]) + more if users else "no task"


def read_file(path: Path, digest: str | None, users: Callable[[], str]) -> dict[str, Tensor]:
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


def compare(path: Path, tensors: Mapping[str, Tensor], expect: Mapping[str, Sequence[int]]) -> None:
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


def check_finite(path: Path, tensors: Mapping[str, Tensor], users: str) -> None:
    """Raises StoreError for a NaN or an infinity, which no whole training leaves."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise StoreError(f"{path}: {name} has values that are not finite; needed by {users}; {REMEDY}")
