"""What a continual-learning method is to the rest: it makes a task's parts, says what it trains, and finishes them."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from moecl.config import Task
from moecl.data.encode import Encoded
from moecl.method_config import MethodConfig
from moecl.nn.call import Parts
from moecl.nn.forms import tensors, to_tensors
from moecl.nn.gated import new_head, seeded
from moecl.nn.inject import Injected
from moecl.nn.lora import Geometry


@dataclass(frozen=True)
class Finished:
    """A learned task: its tensors by part, what its form needs besides them, and parts that moved under old tasks."""

    form: str
    settings: dict[str, Any]
    tensors: dict[str, dict[str, Tensor]]
    moved: dict[str, dict[str, Tensor]]
    parts: Parts


class Method(ABC):
    """One algorithm. The trainer calls `rehearse`, `begin`, `penalty` once a step, `learned`, `finish`, task by task;
    before them `forget` where a task is learned anew.

    `state` is all that training changes: its state dict is the checkpoint of a step, and a better step is put back
    into it before `learned`. `base` is the base with its adapted FFNs, for methods that need more of it than its
    geometry.
    """

    name: ClassVar[str]
    config_type: ClassVar[type[MethodConfig]]
    reads_features: bool = False  # whether `penalty` needs the pooled output of what all tasks share
    config: MethodConfig
    state: nn.Module

    def __init__(self, config: Any, geometry: Geometry, seed: int, base: Injected | None = None) -> None:
        self.config, self.geometry, self.seed, self._base = config, geometry, seed, base

    @property
    def base(self) -> Injected:
        assert self._base is not None, f"{self.name} needs the base: make_method(..., base=model.injected)"
        return self._base

    def forget(self, task: str) -> None:  # noqa: B027 - most methods keep nothing
        """The rules of `task` have changed: what was kept of it for later tasks' sake is no longer true. Sums stay."""

    def rehearse(self, rows: Sequence[Encoded]) -> Sequence[Encoded]:
        """What a task whose training rows are `rows` is trained on. Called before `begin`."""
        return rows

    def starts(self, task: Task, rows: Sequence[Encoded], old: Mapping[str, Callable[[], Parts]]) -> dict[str, Parts]:
        """What `task`, whose training rows are `rows`, may start from, if not afresh, by the old task that it is from.

        The trainer gives `begin` the one that fits some of the rows best, if it does so better than a fresh start.
        """
        return {}

    def tried(self, task: Task, old: int, known: int) -> int:
        """How many starts of `task` are compared at most: the fresh one and those from `old` tasks.

        `known` of them were there when it was done before. 0 where nothing is offered.
        """
        return 0

    @abstractmethod
    def begin(self, task: Task, start: Parts | None = None) -> Parts:
        """Trainable parts for `task`, which must be resolved (labels, head): fresh ones, or a copy of `start`."""

    @abstractmethod
    def preview(self, task: Task) -> Parts | None:
        """The parts `task` would have before its first step; None where an answer would mean nothing."""

    @abstractmethod
    def groups(self) -> dict[str, list[nn.Parameter]]:
        """What the task under way trains, by group; each is clipped on its own."""

    def rates(self) -> dict[str, float]:
        """Group -> its learning rate, as a share of the stream's; 1 where it is not said."""
        return {}

    def penalty(self, features: Mapping[int, Tensor], step: int, query: Tensor | None = None) -> Tensor | None:
        """What is added to the task's loss; features: layer -> [B, D], query [B, D] where the form reads it."""
        return None

    def learned(self, losses: Iterable[Tensor]) -> None:  # noqa: B027 - most methods have nothing to do
        """After the last step: the loss of each training row, with its graph, computed when it is asked for."""

    @abstractmethod
    def finish(self) -> Finished:
        """Freeze the task under way."""

    def finished(self, parts: Parts, **settings: Any) -> Finished:
        moving = self.moving()
        moved = {name: tensors(module) for name, module in moving.items()}
        retention = {"retention": "live"} if moving else {}
        kept = self.config.model_dump(exclude={"name"}) | {"method": self.name} | retention | settings
        return Finished(parts.form, kept, to_tensors(parts), moved, parts)

    @abstractmethod
    def export(self) -> dict[str, dict[str, Tensor]]:
        """What only further learning needs, between two tasks."""

    @abstractmethod
    def restore(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """The inverse of `export`."""

    def moving(self) -> dict[str, nn.Module]:
        """Parts that move on under finished tasks, by their names in the store: what answers is these as they are."""
        return {}

    def log(self) -> dict[str, float]:
        """Figures of the last step worth watching."""
        return {}


def labels(task: Task) -> int:
    """Rows of the task's classifier head; 0 where the language model answers."""
    return len(task.labels or ()) if task.head == "classifier" else 0


def in_order(names: Iterable[str]) -> list[tuple[str, str]]:
    """(NUMBER.TASK, TASK) of such names, in the order of the numbers: a store sorts the tensors of a file.

    >>> in_order(["10.b", "2.a.c"])
    [('2.a.c', 'a.c'), ('10.b', 'b')]
    """
    ordered = sorted(names, key=lambda name: int(name.partition(".")[0]))
    return [(name, name.partition(".")[2]) for name in ordered]


def fresh_head(method: Method, task: Task) -> nn.Linear | None:
    draw = seeded(method.seed, task.name, "head")
    device = next(method.base.base.parameters()).device
    return new_head(labels(task), method.geometry.hidden_size, draw).to(device) if labels(task) else None
