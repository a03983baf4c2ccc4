"""From which of a method's offers a new task starts: the one that fits its training rows best as it is."""

import math
from collections.abc import Mapping
from functools import partial
from operator import attrgetter
from typing import NamedTuple

import torch

from moecl.bank import Entry
from moecl.course import Course
from moecl.data.encode import collate
from moecl.engine import Engine, Request
from moecl.methods.base import Method
from moecl.nn.call import Parts

ROWS, BATCH = 64, 16  # training rows on which offers are compared, and texts at once where answers are texts
LEAST_SHARE = 1e-6  # so that one row cannot outweigh all the others


class Start(NamedTuple):
    """The old task that a new one starts from, and what it starts as."""

    name: str
    parts: Parts


def best_start(engine: Engine, method: Method, course: Course, old: Mapping[str, Entry]) -> Start | None:
    """Of what `method` offers for a task not yet learned the start that fits its first rows best.

    None where a fresh one does. `old` are the tasks learned so far; those that are offered alone are loaded.
    """
    parts_of = {name: partial(attrgetter("parts"), entry) for name, entry in old.items()}
    offers = method.starts(course.task, course.train, parts_of)
    fresh = method.preview(course.task) if offers else None
    if fresh is None:
        return None
    starts = [Start("", fresh), *(Start(name, parts) for name, parts in offers)]
    best = min(starts, key=lambda start: loss(engine, Entry(course.task, start.parts), course))
    return best if best.name else None


def loss(engine: Engine, entry: Entry, course: Course) -> float:
    """The mean of -log p of the right answers to the task's first rows: among its labels, or for texts a token."""
    of = label_loss if entry.task.kind == "classification" else text_loss
    return of(engine.over({entry.task.name: entry}), entry, course)


def label_loss(engine: Engine, entry: Entry, course: Course) -> float:
    assert course.data is not None
    examples, encoder = course.data.train.examples[:ROWS], engine.encoder(entry.task)
    given = engine.answer([Request(entry, encoder, row) for row in engine.prompts(entry.task, examples)])
    shares = [answer.scores[example.label or ""] for answer, example in zip(given, examples, strict=True)]
    return -sum(math.log(max(share, LEAST_SHARE)) for share in shares) / len(shares)


@torch.no_grad()
def text_loss(engine: Engine, entry: Entry, course: Course) -> float:
    model, rows = engine.model, course.train[:ROWS]
    training, losses = model.training, []
    model.eval()
    for first in range(0, len(rows), BATCH):
        some = rows[first : first + BATCH]
        batch = {name: tensor.to(model.device) for name, tensor in collate(some, engine.pad_id).items()}
        inputs = (batch["input_ids"], batch["attention_mask"], batch["labels"])
        losses += [float(model(*inputs, task=entry.task.name, bank=engine.bank).loss)] * len(some)
    model.train(training)
    return sum(losses) / len(losses)
