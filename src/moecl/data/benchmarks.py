"""Bundled benchmarks: what `asset:vader4/tweets/train` in a stream file stands for."""

from __future__ import annotations

from pathlib import Path

from moecl.data.assets import fetch
from moecl.data.pinned import Progress
from moecl.data.vader import SIZES, SOURCES
from moecl.errors import DataError, near

PREFIX = "asset:"
BENCHMARKS: dict[str, tuple[str, ...]] = {"vader4": tuple(SOURCES)}  # name -> its tasks, in the order of the stream
SPLITS = tuple(sorted(SIZES))


def resolve_source(source: str, progress: Progress | None = None, offline: bool = False) -> Path:
    """Find the JSONL file of `asset:BENCHMARK/TASK/SPLIT`, fetched if it is not in the cache.

    Raises `DataError` when there is no such split, `AssetError` when it cannot be fetched.
    """
    benchmark, task, split, *rest = [*source.removeprefix(PREFIX).split("/"), "", ""]
    _among(source, "benchmark", benchmark, tuple(BENCHMARKS))
    _among(source, "task", task, BENCHMARKS[benchmark])
    _among(source, "split", split, SPLITS)
    if any(rest):
        raise DataError(f"{source}: nothing goes after the split; write {PREFIX}{benchmark}/{task}/{split}")
    return fetch(benchmark, progress, offline) / task / f"{split}.jsonl"


def _among(source: str, what: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise DataError(f"{source}: no {what} {value!r}{near(value, known)}; there are: {', '.join(known)}")
