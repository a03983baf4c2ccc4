"""Rows on their way through the engine: each with the task that answers it, padded into one batch."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moecl.bank import Entry
from moecl.config import Task
from moecl.data.encode import Encoded, Encoder, collate
from moecl.data.task import Example, example
from moecl.errors import DataError, TaskError
from moecl.model import MoECL, TaskNames
from moecl.nn.call import Call, Parts

Row = str | Mapping[str, Any] | Example


@dataclass(frozen=True)
class Prediction:
    """An answer. `scores` are the labels' shares of the probability, summing to 1; empty for a generated answer."""

    task: str
    label: str
    scores: dict[str, float]


@dataclass(frozen=True)
class Request:
    """One encoded row."""

    entry: Entry
    encoder: Encoder
    row: Encoded


def names_of(tasks: TaskNames, rows: int) -> list[str]:
    """A name a row. Raises TaskError for another number of them, and for the bare base."""
    names = [tasks] * rows if tasks is None or isinstance(tasks, str) else list(tasks)
    if len(names) != rows:
        raise TaskError(f"task: {len(names)} names for {rows} rows; give one name, or one a row")
    if None in names:
        raise TaskError("task: the bare base answers no task; give a task's name")
    return [name for name in names if name is not None]


def places(names: Iterable[str]) -> dict[str, list[int]]:
    """Where each name stands."""
    found: dict[str, list[int]] = {}
    for place, name in enumerate(names):
        found.setdefault(name, []).append(place)
    return found


def as_example(row: Row, task: Task, where: str) -> Example:
    return row if isinstance(row, Example) else example(row, task, where)


def readable(row: Row, task: Task, where: str) -> Example | None:
    """The same of a task that was found for a row: None where it cannot read it."""
    try:
        return as_example(row, task, where)
    except DataError:
        return None


def left_padded(
    model: MoECL, batch: Sequence[Request], parts: Sequence[Parts], pad_id: int
) -> tuple[dict[str, Tensor], Call]:
    """Ids, mask and positions of the prompts, and the call that runs each row with its parts."""
    padded = collate([request.row for request in batch], pad_id, side="left", answers=False)
    ids, mask = padded["input_ids"].to(model.device), padded["attention_mask"].to(model.device)
    call = model.call_with(parts)
    call.attention_mask = mask
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions(mask)}, call


def parts_of(batch: Sequence[Request]) -> list[Parts]:
    """The parts of each row, those of an entry loaded once."""
    found = {id(request.entry): request.entry.parts for request in {id(one.entry): one for one in batch}.values()}
    return [found[id(request.entry)] for request in batch]


def positions(mask: Tensor) -> Tensor:
    return (mask.cumsum(dim=1) - 1).clamp_min(0)


def last_only(input_ids: Tensor) -> Tensor:
    """[B, T] bool: the last position, where a left-padded prompt ends."""
    wanted = torch.zeros_like(input_ids, dtype=torch.bool)
    wanted[:, -1] = True
    return wanted
