"""What a bench is made of and what is known of it: cells, trials, and bench.json. Free of torch."""

import copy
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from moecl._atomic import atomic_write
from moecl.config import StreamConfig, fill_unrecorded
from moecl.errors import RunError
from moecl.results import Result
from moecl.run_folder import BENCH, CONFIG, RESULT, RunFolder, differences

SCHEMA = 1
Status = Literal["waiting", "running", "done", "failed"]


@dataclass
class Job:
    """One run of the bench. `stream` is None while its method's settings are still to be chosen."""

    id: str
    label: str
    folder: Path
    stream: StreamConfig | None = None
    status: Status = "waiting"
    reason: str | None = None
    kind: str | None = None  # of the error, where there was one
    result: Result | None = None
    begun: float = 0.0

    def started(self) -> bool:
        """Whether there is anything on disk that belongs to certain settings."""
        return any((self.folder / name).is_file() for name in (RESULT, CONFIG))

    def look(self) -> None:
        """Take up a result that is there; one that cannot be this job's makes it a failed one."""
        assert self.stream is not None
        try:
            self.result = RunFolder(self.folder).finished()
            if self.result is not None:
                _check_belongs(self.result, self.stream)
                self.status, self.reason = "done", None
        except RunError as error:
            self.result = None
            self.fail(f"{error} (or remove {self.folder}, and it is run anew)")

    def fail(self, reason: str, kind: str | None = None) -> None:
        self.status, self.reason, self.kind = "failed", reason, kind


@dataclass
class Cell(Job):
    """A method on an order with a seed."""

    order: str = ""
    seed: int = 0


@dataclass
class Trial(Job):
    """A method with settings that may be chosen."""

    settings: Mapping[str, Any] | None = None
    score: float | None = None


def _check_belongs(result: Result, stream: StreamConfig) -> None:
    found = {"method": result.method, "seed": result.seed, "tasks": result.tasks}
    wanted = {
        "method": stream.method.name,
        "seed": stream.train.seed,
        "tasks": [task.name for task in stream.tasks],
    }
    for key, value in found.items():
        if value != wanted[key]:
            raise RunError(f"its result.json is another's: {key} is {value}, not {wanted[key]}; restore it")


def read_record(out: Path) -> dict[str, Any]:
    """bench.json; nothing where there is none yet.

    Raises:
        RunError: it is damaged, or of another schema version.
    """
    path = out / BENCH
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: cannot be read ({error}); restore it, or remove it: finished cells are kept") from None
    if not isinstance(found, dict) or found.get("schema") != SCHEMA:
        raise RunError(f"{path}: schema: is not {SCHEMA}, which this moecl reads; choose another folder with -o")
    return found


def write_record(out: Path, record: Mapping[str, Any]) -> None:
    text = json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False)
    atomic_write(out / BENCH, text.encode() + b"\n")


def changes_under(cell: Cell, record: Mapping[str, Any], stream: Mapping[str, Any], tasks: Sequence[str]) -> list[str]:
    """What differs between the settings that a started cell was run with and those of now, a line a setting.

    Raises RunError where the record does not tell, but its run folder does.
    """
    method, order = record.get("methods", {}).get(cell.label), record.get("orders", {}).get(cell.order)
    if method is not None and order is not None:
        found = differences(filled(method["stream"]), dict(stream), f"methods.{cell.label}")
        return found + differences(order, list(tasks), f"orders.{cell.order}")
    if not RunFolder(cell.folder).exists():
        return [f"{BENCH} does not tell with which settings {cell.id} was run"]
    assert cell.stream is not None
    RunFolder(cell.folder).check_same(cell.stream)
    return []


def filled(recorded: dict[str, Any]) -> dict[str, Any]:
    """Settings that this moecl knows and the one that wrote the record did not, as they were in effect."""
    recorded = copy.deepcopy(recorded)
    fill_unrecorded(recorded)
    try:
        return StreamConfig.model_validate(recorded).model_dump(mode="json")
    except ValueError:  # or one that is gone: it will show among the differences
        return recorded


def refuse(out: Path, changes: Sequence[str], of: Iterable[Job]) -> RunError:
    """The error for settings that changed under runs that were started with others."""
    more = f" and {len(changes) - 3} more" if len(changes) > 3 else ""
    names = ", ".join(str(job.folder.relative_to(out)) for job in of)
    shown = names if len(names) < 200 else f"{names[:200]}..."
    return RunError(
        f"{out}: was started with other settings: {'; '.join(changes[:3])}{more}; undo the change, choose another "
        f"folder with -o, or remove what was run so: {shown}"
    )


def protocol(streams: Mapping[str, Mapping[str, Any]], cells: Sequence[Cell]) -> dict[str, Any]:
    """What all methods have in common, and where they differ by label; rows a split as they were used."""
    plain = [{"head": one["head"], "evaluate": one["evaluate"], **one["train"]} for one in streams.values()]
    common = {key: value for key, value in plain[0].items() if all(one[key] == value for one in plain)}
    del common["seed"]  # each cell has its own
    depths = {
        label: stream["method"]["adapt_layers"]
        for label, stream in streams.items()
        if "adapt_layers" in stream["method"]
    }
    rows = {
        task: {split: info.rows for split, info in splits.items()}
        for cell in cells
        if cell.result is not None
        for task, splits in cell.result.data.items()
    }
    return {
        "train": {key: value for key, value in common.items() if key not in ("head", "evaluate")},
        **{key: common[key] for key in ("head", "evaluate") if key in common},
        "adapt_layers": depths,
        "rows": rows,
    }
