"""A run's folder: what was asked, how far it is, what came out. Every file in it is whole or absent."""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from moecl._atomic import atomic_write, lock_file, one_line, remove_drafts
from moecl.config import StreamConfig, dump_stream, load_stream
from moecl.errors import RunError
from moecl.results import Result

LOCK, STREAM, CONFIG, RESULT, PROGRESS = ".lock", "stream.yaml", "config.yaml", "result.json", "progress.json"
BENCH = "bench.json"  # makes a folder a bench's
REOPENED = "reopened"  # the key of progress.json that makes a finished run one that has more to learn


def refuse_bench(path: Path) -> None:
    """Raises RunError where a folder is a bench's, whose cells are runs."""
    cells = path / "cells"
    if (path / BENCH).is_file() or cells.is_dir():
        found = sorted(cells.iterdir()) if cells.is_dir() else []
        which = f"such as {found[0]}" if found else f"a folder in {cells}"
        raise RunError(f"{path}: a bench; give one of its cells, {which}")


class RunFolder:
    """Paths and files of one run. Raises RunError for a folder that is another run's or no run's."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.store = self.path / "store"
        self.checkpoints = self.path / "checkpoints"
        self.tensorboard = self.path / "tensorboard"

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Be the one process that works in this folder, made where it is new; BusyError says who else does."""
        new = not self.path.exists()
        if self.path.is_file():
            raise RunError(f"{self.path}: a file; give a folder with -o")
        with one_line(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        try:
            with lock_file(self.path / LOCK):
                with one_line(self.path):
                    remove_drafts(self.path)
                self._settle()
                yield
        except BaseException:
            if new and [entry.name for entry in self.path.iterdir()] == [LOCK]:  # refused before anything was done
                shutil.rmtree(self.path, ignore_errors=True)
            raise

    def exists(self) -> bool:
        return (self.path / CONFIG).is_file()

    def config(self) -> StreamConfig:
        """The stream as resolved at the first start."""
        if not self.exists():
            raise RunError(
                f"{self.path}: not a run folder (no {CONFIG}); make one with `moecl train stream.yaml -o RUN`"
            )
        return load_stream(self.path / CONFIG, recorded=True)

    def check_free(self) -> None:
        """A first start needs a folder that holds nothing but what an earlier first start may have left."""
        known = {LOCK, STREAM, "store"}
        if others := sorted({entry.name for entry in self.path.iterdir()} - known):
            raise RunError(f"{self.path}: not empty and not a run ({others[0]}); choose another folder with -o")

    def start(self, asked: StreamConfig, config: StreamConfig, environment: Mapping[str, Any]) -> None:
        """Write down what was asked and how it was resolved; config.yaml last, since it makes the folder a run."""
        atomic_write(self.path / STREAM, dump_stream(asked).encode())
        atomic_write(self.path / CONFIG, described(config, environment).encode())

    def check_same(self, asked: StreamConfig) -> None:
        """The run must have been started with what is asked now."""
        path = self.path / STREAM
        if path.is_file() and path.read_bytes() == dump_stream(asked).encode():
            return  # most often, and sooner seen than two streams of many tasks are compared
        before = load_stream(path, recorded=True)
        changes = differences(before.model_dump(mode="json"), asked.model_dump(mode="json"))
        if changes:
            more = f" and {len(changes) - 3} more" if len(changes) > 3 else ""
            raise RunError(
                f"{self.path}: this run was started with another stream: {'; '.join(changes[:3])}{more}; "
                "undo the change, or give another folder with -o (a new task is added with `moecl learn`)"
            )

    def progress(self) -> dict[str, Any]:
        """What `save_progress` wrote last; nothing before the first time."""
        path = self.path / PROGRESS
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise RunError(f"{path}: cannot be read ({error}); restore it from a copy of the run") from error
        if not isinstance(found, dict):
            raise RunError(f"{path}: holds no progress; restore it from a copy of the run")
        return found

    def save_progress(self, progress: Mapping[str, Any]) -> None:
        text = json.dumps(progress, ensure_ascii=False)  # no indent, which takes seconds for the R of many tasks
        atomic_write(self.path / PROGRESS, text.encode() + b"\n")

    def finished(self) -> Result | None:
        return Result.load(self.path / RESULT) if (self.path / RESULT).is_file() else None

    def last_result(self) -> Result | None:
        """The result; of a run that is learning one more task that from before it."""
        if (found := self.finished()) is None and (reopened := self.progress().get(REOPENED)) is not None:
            return Result.model_validate(reopened["result"])
        return found

    def learning(self) -> str | None:
        """The task that was added to a finished run and is not learned yet, whether it is under way or was stopped."""
        return self.config().tasks[-1].name if self.is_reopened() else None

    def finish(self, result: Result) -> None:
        """The result is written first: a kill in between leaves a finished run with some files too many."""
        result.save(self.path / RESULT)
        self.clear()

    def clear(self) -> None:
        shutil.rmtree(self.checkpoints, ignore_errors=True)
        (self.path / PROGRESS).unlink(missing_ok=True)

    # A finished run that learns one more task

    def reopen(self, config: StreamConfig, progress: Mapping[str, Any], result: Result) -> None:
        """Make a finished run one that has more to learn: in one file, from which a killed change is completed."""
        self.clear()
        reopened = {
            "now": described(config, result.environment),
            "before": (self.path / CONFIG).read_text(encoding="utf-8"),
            "result": result.model_dump(mode="json", by_alias=True),
        }
        self.save_progress({**progress, REOPENED: reopened})
        self._settle()

    def is_reopened(self) -> bool:
        return self.progress().get(REOPENED) is not None

    def undo_reopen(self) -> None:
        """Make a reopened run again the finished one that it was; the store is left as it is."""
        if (reopened := self.progress().get(REOPENED)) is not None:
            # In this order: until progress.json is gone, the next start completes the reopening once more.
            atomic_write(self.path / CONFIG, reopened["before"].encode())
            self.finish(Result.model_validate(reopened["result"]))

    def _settle(self) -> None:
        """Complete a reopening that may have been killed halfway."""
        if (reopened := self.progress().get(REOPENED)) is not None:
            atomic_write(self.path / CONFIG, reopened["now"].encode())
            (self.path / RESULT).unlink(missing_ok=True)


def described(config: StreamConfig, environment: Mapping[str, Any]) -> str:
    """config.yaml: the stream, below what it was resolved on."""
    facts = yaml.safe_dump(dict(environment), sort_keys=False, allow_unicode=True).splitlines()
    return "".join(f"# {line}\n" for line in ["resolved at the first start", *facts]) + dump_stream(config)


def differences(before: Any, now: Any, place: str = "") -> list[str]:
    """What changed between two plain values, a line a leaf."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = [*before, *(key for key in now if key not in before)]
        return [
            line for key in keys for line in differences(before.get(key), now.get(key), f"{place}.{key}".lstrip("."))
        ]
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        pairs = enumerate(zip(before, now, strict=True))
        return [line for n, (old, new) in pairs for line in differences(old, new, f"{place}[{n}]")]
    if before == now:
        return []
    if isinstance(before, list) and isinstance(now, list):
        return [f"{place} has {len(now)} entries, it had {len(before)}"]
    return [f"{place} is {short(now)}, it was {short(before)}"]


def short(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True).removesuffix("...\n").strip()
    return text if len(text) <= 60 else text[:57] + "..."
