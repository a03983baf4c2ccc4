"""`moecl predict`: the rows of a file or of standard input, answered in order. Torch is imported where it is needed."""

import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moecl._yaml import TABLES
from moecl.config import AUTO
from moecl.errors import DataError, MoECLError, TaskError
from moecl.review import REVIEW, TaskThresholds, Thresholds, decide, rounded
from moecl.using import load, open_store, router_of, served_levels

if TYPE_CHECKING:
    from moecl.engine import Engine, Prediction
    from moecl.routed import Routed
    from moecl.store import Store, TaskRecord

STEP = 64  # rows that are answered at once
Placed = tuple[str, str | Mapping[str, Any]]  # (`file:line`, a text or a row)


def answers(
    run: Path,
    file: Path | None,
    task: str | None,
    device: str,
    expert_memory: str,
    thresholds: Path | None = None,
    max_tokens: int | None = None,
) -> Iterator[list[dict[str, Any]]]:
    """Labels and scores of the rows of a file or of standard input, in order, some rows at a time.

    With a thresholds file also the decisions. Raises RunError, TaskError and DataError before the base is loaded where
    it can.
    """
    store = open_store(run)
    if task == AUTO:
        yield from routed_answers(store, file, device, expert_memory, thresholds, max_tokens)
        return
    asked = task or only_task(store)
    record = store.record(asked)
    levels = (
        None
        if thresholds is None
        else Thresholds.load(thresholds).of(record.name, record.task.labels or (), record.parts, thresholds)
    )
    with rows_of(file) as rows:
        first = next(rows, None)
        if first is None:
            return
        from moecl.data.task import example
        from moecl.engine import Engine

        engine = Engine(load(store, device, expert_memory))
        examples = (example(row, record.task, place) for place, row in chain([first], rows))
        for chunk in chunks(examples, 1 if file is None and sys.stdin.isatty() else STEP):
            found = engine.predict(chunk, asked, max_tokens)
            yield [answer(one, record, row.label, levels) for one, row in zip(found, chunk, strict=True)]


def routed_answers(
    store: "Store",
    file: Path | None,
    device: str,
    expert_memory: str,
    thresholds: Path | None,
    max_tokens: int | None,
) -> Iterator[list[dict[str, Any]]]:
    """The same where nobody says which task: lines also have the task that answered, and what decided it."""
    records = {one.name: one for one in store.tasks()}
    levels = None if thresholds is None else served_levels(store, thresholds)
    with rows_of(file) as rows:
        first = next(rows, None)
        if first is None:
            return
        from moecl.engine import Engine
        from moecl.routed import predict

        model = load(store, device, expert_memory)
        engine, router = Engine(model), router_of(model, store)
        for chunk in chunks(chain([first], rows), 1 if file is None and sys.stdin.isatty() else STEP):
            yield [
                routed_answer(one, records, true_label(row, engine, one), levels)
                for one, (_, row) in zip(predict(engine, router, chunk, max_tokens), chunk, strict=True)
            ]


def routed_answer(
    found: "Routed", records: Mapping[str, "TaskRecord"], true: str | None, levels: Mapping[str, TaskThresholds] | None
) -> dict[str, Any]:
    """A line of `moecl predict --task auto`; with thresholds what they do not decide is left to a human.

    No label where no task is found, or where the one that is cannot read the row.
    """
    task = found.route.task
    if task is None or found.prediction is None:
        version = None if task is None else records[task].version
        line: dict[str, Any] = {"label": None, "scores": {}, "task": task, "version": version}
    else:
        line = answer(found.prediction, records[task], true, (levels or {}).get(task))
    if levels is not None:
        line.setdefault("decision", REVIEW)
    shares, familiar = found.route.rounded()
    return {**line, "route": shares, "familiar": familiar}


def true_label(row: str | Mapping[str, Any], engine: "Engine", found: "Routed") -> str | None:
    """A row's own label, where it is one of its task's."""
    if found.route.task is None or found.prediction is None or isinstance(row, str):
        return None
    from moecl.data.task import example

    return example(row, engine.bank[found.route.task].task).label


def answer(
    found: "Prediction", record: "TaskRecord", true: str | None, levels: TaskThresholds | None
) -> dict[str, Any]:
    """A line of `moecl predict`: what answered is named as the server names it."""
    scores = {label: rounded(score) for label, score in found.scores.items()}
    line = {"label": found.label, "scores": scores, "task": record.name, "version": record.version}
    if levels is not None:
        line["decision"] = decide(levels, found.label, scores)
    return line if true is None else {**line, "true": true}


def only_task(store: "Store") -> str:
    names = [record.name for record in store.tasks()]
    if len(names) != 1:
        raise TaskError(f"--task: which one? the tasks are: {', '.join(names) or 'none yet'}")
    return names[0]


def chunks(rows: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Rows by the `size`; those before a faulty one still come, then its error."""
    chunk: list[Any] = []
    try:
        for row in rows:
            chunk.append(row)
            if len(chunk) == size:
                yield chunk
                chunk = []
    except MoECLError:
        if chunk:
            yield chunk
        raise
    if chunk:
        yield chunk


@contextmanager
def rows_of(file: Path | None) -> Iterator[Iterator[Placed]]:
    """The rows of a table or of lines, JSON objects or plain texts, in order and with their places."""
    from moecl.data.rows import read_rows
    from moecl.data.task import plain_rows

    if file is None:
        yield plain_rows(sys.stdin.buffer)
        return
    if file.suffix.lower() in (*TABLES, ".gz"):
        yield read_rows(str(file))
        return
    try:
        opened = file.open("rb")
    except OSError as error:
        raise DataError(f"{file}: {error.strerror}; give a file of rows, or of plain lines") from error
    with opened:
        yield plain_rows(opened, str(file))
