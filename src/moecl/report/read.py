"""What a report is made of: run folders and bench folders, as they lie on disk."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from moecl._atomic import is_locked
from moecl._yaml import dotted
from moecl.errors import RunError
from moecl.method_config import fill_settings
from moecl.results import Result
from moecl.routing import Routing
from moecl.run_folder import BENCH, LOCK, RESULT, RunFolder

SCHEMA = 1

ASKED = ("kind", "instruction", "labels", "metric", "head", "max_length")  # of a task: how it is read and scored


@dataclass(frozen=True)
class Moved:
    """Test rows that were right when the task was learned and are now wrong, and the other way round."""

    lost: int
    won: int


@dataclass(frozen=True)
class Run:
    name: str
    result: Result
    moved: Mapping[str, Moved] = field(default_factory=dict)  # task -> rows, where both were written down
    routing: Routing | None = None  # of the tasks as they are in `result`
    notes: Sequence[str] = ()  # what has changed since


class _Open(BaseModel):
    """A bench may say more than a report needs."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class Trial(_Open):
    settings: dict[str, Any] = Field(default_factory=dict)
    score: float | None = None


class Tuned(_Open):
    trials: list[Trial]
    chosen: dict[str, Any] = Field(default_factory=dict)


class MethodOfBench(_Open):
    method: str
    settings: dict[str, Any] = Field(default_factory=dict)
    tuned: Tuned | None = None
    stream: dict[str, Any] = Field(default_factory=dict)


class CellOfBench(_Open):
    id: str
    method: str
    order: str
    seed: int
    status: Literal["done", "failed", "waiting", "running"]
    reason: str | None = None


class Bench(_Open):
    """bench.json, and the results of its finished cells by id."""

    name: str | None = None
    base: str
    orders: dict[str, list[str]]
    seeds: list[int] = Field(default_factory=list)
    methods: dict[str, MethodOfBench]
    protocol: dict[str, Any] = Field(default_factory=dict)
    cells: list[CellOfBench]
    results: dict[str, Result] = Field(default_factory=dict)

    def tasks(self) -> list[str]:
        """Those of any order, as the first has them."""
        return list(dict.fromkeys(task for order in self.orders.values() for task in order))


def read(folder: Path) -> Run | Bench:
    """A run or a bench, whichever the folder holds.

    Raises:
        RunError: neither, or a file in it is missing or damaged.
    """
    if folder.is_file():
        raise RunError(f"{folder}: a file; give the folder that `moecl train` or `moecl bench` wrote")
    if (folder / BENCH).is_file():
        return _read_bench(folder)
    run = RunFolder(folder)
    if (result := run.last_result()) is not None:
        moved = {task: found for task in result.tasks if (found := _moved(folder / "predictions", task)) is not None}
        routing = Routing.load(folder)
        if routing is not None and routing.digests != result.digests:
            routing = None  # measured before the tasks were what they are
        notes = [f"{name}: learned in part; the numbers are from before it."] if (name := run.learning()) else []
        return Run(folder.resolve().name, result, moved, routing, notes)
    if (folder / "config.yaml").is_file():
        raise RunError(f"{folder}: the run is not finished; the command that started it goes on")
    raise RunError(
        f"{folder}: neither a run folder (no {RESULT}) nor a bench's (no {BENCH}); "
        "give what `moecl train` or `moecl bench` wrote"
    )


def _moved(folder: Path, task: str) -> Moved | None:
    learned, last = folder / f"{task}.learned.jsonl", folder / f"{task}.test.jsonl"
    if not (learned.is_file() and last.is_file()):
        return None
    before, now = _right(learned), _right(last)
    if len(before) != len(now):
        return None  # the task's rows were replaced since
    pairs = list(zip(before, now, strict=True))
    return Moved(lost=pairs.count((True, False)), won=pairs.count((False, True)))


def _right(path: Path) -> list[bool]:
    """Whether each row of a file of predictions was answered right."""
    found = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            row = json.loads(line)
            found.append(row["label"].strip() == row["answer"].strip())
        except (ValueError, KeyError, TypeError, AttributeError):
            raise RunError(f"{path}:{number}: is no prediction; restore the file, or remove it") from None
    return found


def _read_bench(folder: Path) -> Bench:
    path = folder / BENCH
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: cannot be read ({error}); restore it, or run the bench again") from None
    if not isinstance(found, dict) or found.get("schema") != SCHEMA:
        raise RunError(f"{path}: schema: is not {SCHEMA}, which this moecl reads; upgrade moecl or run the bench again")
    try:
        bench = Bench.model_validate(found)
    except ValidationError as error:
        first = error.errors()[0]
        place = ": ".join(part for part in (str(path), dotted(first["loc"]), first["msg"]) if part)
        raise RunError(f"{place}; the file was altered, run the bench again or restore it") from None
    for method in bench.methods.values():
        fill_settings(method.method, method.settings)
    if strange := [c for c in bench.cells if c.method not in bench.methods or c.order not in bench.orders]:
        raise RunError(f"{path}: cells: {strange[0].id} is of no method and order of the bench; restore the file")
    results, cells = {}, []
    stopped = any(cell.status == "running" for cell in bench.cells) and not is_locked(folder / LOCK)
    for cell in bench.cells:
        file = folder / "cells" / cell.id / RESULT
        if cell.status == "running" and stopped:
            cell = cell.model_copy(update={"status": "done" if file.is_file() else "waiting"})
        if cell.status == "done" and not file.is_file():
            cell = cell.model_copy(update={"status": "waiting", "reason": f"its {RESULT} is missing"})
        if cell.status == "done":
            results[cell.id] = Result.load(file)
        cells.append(cell)
    return bench.model_copy(update={"cells": cells, "results": results})


def merged(benches: Sequence[Bench]) -> list[Bench]:
    """Benches of the same base, tasks, rows and training as one; the others stay as they are."""
    groups: list[list[Bench]] = []
    for bench in benches:
        group = next((group for group in groups if all(_alike(bench, other) for other in group)), None)
        groups.append([bench]) if group is None else group.append(bench)
    return [_merge(group) if len(group) > 1 else group[0] for group in groups]


def _alike(a: Bench, b: Bench) -> bool:
    """Whether their cells may stand in one table; what only some methods of a bench have is no protocol of it."""
    if a.base != b.base or len({*_bases(a), *_bases(b)}) > 1 or {*a.tasks()} != {*b.tasks()}:
        return False
    trains = [bench.protocol.get("train", {}) for bench in (a, b)]
    if any(trains[0][key] != trains[1][key] for key in trains[0].keys() & trains[1].keys()):
        return False
    both = [(a.methods[label], b.methods[label]) for label in a.methods.keys() & b.methods.keys()]
    if any(_learns(one) != _learns(other) for one, other in both if one.stream and other.stream):
        return False
    rows = [_rows(bench) for bench in (a, b)]
    return all(rows[0][key] == rows[1][key] for key in rows[0].keys() & rows[1].keys())


def _bases(bench: Bench) -> set[str]:
    """The digests of the bases that its cells learned on; folders of one name may hold two."""
    bases = [result.environment.get("base") for result in bench.results.values()]
    return {base["sha256"] for base in bases if isinstance(base, Mapping) and "sha256" in base}


def _learns(method: MethodOfBench) -> dict[str, Any]:
    """How a method's cells are trained and read, beside its own settings."""
    stream = method.stream
    train = {key: value for key, value in stream.get("train", {}).items() if key not in ("seed", "threads")}
    read_as = {task["name"]: [task.get(key) for key in ASKED] for task in stream.get("tasks", [])}
    return {"train": train, "head": stream.get("head"), "tasks": read_as}


def _rows(bench: Bench) -> dict[tuple[str, str], str]:
    """(task, split) -> the sha256 of its rows, as the first finished cell of the task has them."""
    found: dict[tuple[str, str], str] = {}
    for result in bench.results.values():
        for task, splits in result.data.items():
            for name, split in splits.items():
                found.setdefault((task, name), split.sha256)
    return found


def _merge(benches: Sequence[Bench]) -> Bench:
    """All cells once: of those with the same id the first that is done."""
    orders: dict[str, list[str]] = {}
    methods: dict[str, MethodOfBench] = {}
    for bench in benches:
        _add(orders, bench.orders, "order")
        _add(methods, bench.methods, "method")
        methods |= {label: method for label, method in bench.methods.items() if methods[label].tuned is None}
    places: dict[str, CellOfBench] = {}
    for cell in (cell for bench in benches for cell in bench.cells):
        first = places.setdefault(cell.id, cell)
        if (first.method, first.order) != (cell.method, cell.order):
            raise RunError(
                f"cell {cell.id} is of {first.method}, {first.order} in one bench and of {cell.method}, {cell.order} "
                "in another; give it another name in one, or report apart"
            )
    results = {id: result for bench in reversed(benches) for id, result in bench.results.items()}
    cells = {cell.id: cell for bench in reversed(benches) for cell in bench.cells if cell.id not in results}
    done = {cell.id: cell for bench in reversed(benches) for cell in bench.cells if cell.status == "done"}
    ids = list(dict.fromkeys(cell.id for bench in benches for cell in bench.cells))
    return Bench(
        name=" + ".join(dict.fromkeys(bench.name for bench in benches if bench.name)) or None,
        base=benches[0].base,
        orders=orders,
        seeds=sorted({seed for bench in benches for seed in bench.seeds}),
        methods=methods,
        protocol=_protocol([bench.protocol for bench in benches]),
        cells=[(cells | done)[id] for id in ids],
        results=results,
    )


def _protocol(of: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What all have in common; rows and adapted layers of any."""
    found = _common(of) | {"train": _common([one.get("train", {}) for one in of])}
    for key in ("adapt_layers", "rows"):
        if united := {name: value for one in reversed(of) for name, value in one.get(key, {}).items()}:
            found[key] = united
    return found


def _common(of: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {key: value for key, value in of[0].items() if all(key in one and one[key] == value for one in of)}


def _add(found: dict[str, Any], more: Mapping[str, Any], what: str) -> None:
    for name, value in more.items():
        first = found.setdefault(name, value)
        if _settled(first) != _settled(value):
            raise RunError(
                f"{what} {name} is not the same in the benches; give it another name in one, or report apart"
            )


def _settled(value: Any) -> Any:
    """What a method ran with: how it was chosen may be known to one bench alone."""
    return value.model_copy(update={"tuned": None, "stream": {}}) if isinstance(value, MethodOfBench) else value
