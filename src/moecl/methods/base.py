"""What a continual-learning method is to the rest: it makes a task's parts, says what it trains, and finishes them."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from moecl.config import MethodConfig, Task
from moecl.nn.moe_ffn import Gated

Parts = Gated  # one form so far


@dataclass(frozen=True)
class Finished:
    """A learned task: its tensors by part, what its form needs besides them, and parts that moved under old tasks."""

    form: str
    settings: dict[str, Any]
    tensors: dict[str, dict[str, Tensor]]
    moved: dict[str, dict[str, Tensor]]
    parts: Parts


class Method(ABC):
    """One algorithm. The trainer calls `begin`, then `penalty` once a step, then `finish`, task by task.

    `state` is all that training changes: its state dict is the checkpoint of a step, and a better step is put back
    into it before `finish`.
    """

    name: ClassVar[str]
    reads_features: bool  # whether `penalty` needs the shared expert's pooled output
    config: MethodConfig
    state: nn.Module

    @abstractmethod
    def begin(self, task: Task) -> Parts:
        """Fresh trainable parts for `task`, which must be resolved (labels, head)."""

    @abstractmethod
    def preview(self, task: Task) -> Parts | None:
        """The parts `task` would have before its first step; None where an answer would mean nothing."""

    @abstractmethod
    def groups(self) -> dict[str, list[nn.Parameter]]:
        """What the task under way trains, by group; each is clipped on its own."""

    @abstractmethod
    def penalty(self, features: Mapping[int, Tensor], step: int) -> Tensor:
        """What is added to the task's loss; features: layer -> [B, D]."""

    @abstractmethod
    def finish(self) -> Finished:
        """Freeze the task under way."""

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
