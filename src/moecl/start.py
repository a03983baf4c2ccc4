"""From which of a method's offers a new task starts: the one that fits its training rows best as it is."""

from collections.abc import Mapping
from functools import partial
from operator import attrgetter
from typing import NamedTuple

import torch

from moecl.bank import Entry
from moecl.course import Course
from moecl.data.encode import collate
from moecl.engine import Engine
from moecl.methods.base import Method
from moecl.nn.call import Parts

ROWS, BATCH = 32, 16  # training rows on which offers are compared, and how many at once


class Start(NamedTuple):
    """The old task that a new one starts from, and what it starts as."""

    name: str
    parts: Parts


class Starts:
    """Chooses where tasks start from. What a finished task that never changes is worth to another is measured once."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._known: dict[tuple[str, str], float] = {}

    def best(self, method: Method, course: Course, old: Mapping[str, Entry]) -> Start | None:
        """Of what `method` offers for a task not yet learned the start that fits its first rows best.

        None where a fresh one does. `old` are the tasks learned so far; those that are offered alone are loaded.
        """
        parts_of = {name: partial(attrgetter("parts"), entry) for name, entry in old.items()}
        offers = method.starts(course.task, course.train, parts_of)
        fresh = method.preview(course.task) if offers else None
        if fresh is None:
            return None
        least, best = self.loss(course, fresh), None
        for name, parts in offers.items():
            if (loss := self._loss_once(course, name, parts)) < least:
                least, best = loss, Start(name, parts)
        return best

    def _loss_once(self, course: Course, name: str, parts: Parts) -> float:
        if not parts.frozen:
            return self.loss(course, parts)
        if (course.name, name) not in self._known:
            self._known[course.name, name] = self.loss(course, parts)
        return self._known[course.name, name]

    @torch.no_grad()
    def loss(self, course: Course, parts: Parts) -> float:
        """What training would start with: the mean of -log p of the first rows' answers, a token."""
        model, rows = self.engine.model, course.train[:ROWS]
        bank, training, losses = {course.name: Entry(course.task, parts)}, model.training, []
        model.eval()
        for first in range(0, len(rows), BATCH):
            some = rows[first : first + BATCH]
            batch = {name: tensor.to(model.device) for name, tensor in collate(some, self.engine.pad_id).items()}
            inputs = (batch["input_ids"], batch["attention_mask"], batch["labels"])
            losses += [float(model(*inputs, task=course.name, bank=bank).loss)] * len(some)
        model.train(training)
        return sum(losses) / len(losses)
