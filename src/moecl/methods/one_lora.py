"""What the methods of plain LoRAs have in common: a LoRA under training, and a head of the task's own."""

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from moecl.config import Task
from moecl.method_config import LoRAConfig
from moecl.methods.base import Finished, Method, labels
from moecl.nn.call import Parts
from moecl.nn.forms import frozen_copy, tensors
from moecl.nn.gated import new_head, seeded
from moecl.nn.inject import Injected
from moecl.nn.lora import Expert, Geometry
from moecl.nn.sums import Sum


class LoRAState(nn.Module):
    """`lora`, and the head of the task under way."""

    lora: Expert
    head: nn.Linear | None

    def __init__(self, geometry: Geometry, rank: int) -> None:
        super().__init__()
        self.lora, self.head = Expert(geometry, rank), None


class LoRAMethod(Method):
    """One LoRA at a time. `shared`: the same for all tasks, so that it moves on under the finished ones."""

    shared: ClassVar[bool]
    config: LoRAConfig
    state: LoRAState

    def __init__(self, config: Any, geometry: Geometry, seed: int, base: Injected | None = None) -> None:
        super().__init__(config, geometry, seed, base)
        self.state = LoRAState(geometry, config.rank)
        self.state.lora.reset(seeded(seed, "lora"))

    @property
    def scale(self) -> float:
        return self.config.lora_alpha / self.config.rank

    @property
    def device(self) -> Any:
        return next(self.state.lora.parameters()).device

    def fresh(self, name: str) -> Expert:
        return Expert(self.geometry, self.config.rank).reset(seeded(self.seed, name, "lora")).to(self.device)

    def begin(self, task: Task, start: Parts | None = None) -> Parts:
        device, self.task = self.device, task.name
        if not self.shared:
            self.state.lora = self.fresh(task.name)
        draw = seeded(self.seed, task.name, "head")
        self.state.head = new_head(labels(task), self.geometry.hidden_size, draw).to(device) if labels(task) else None
        self.state.requires_grad_(True)
        return self.form(self.state.lora, self.state.head)

    def form(self, lora: Expert, head: nn.Linear | None) -> Parts:
        return Sum(lora, self.scale, head)

    def preview(self, task: Task) -> Parts | None:
        if task.head == "classifier":
            return None
        return self.form(self.state.lora if self.shared else self.fresh(task.name), None)

    def groups(self) -> dict[str, list[nn.Parameter]]:
        own = dict(self.state.named_parameters())
        if self.config.lora_A_lr == 1:  # then clipped as one
            return {"lora": list(own.values())}
        slow = [name for name in own if name.endswith("lora_A")]
        return {"lora_A": [own.pop(name) for name in slow], "lora": list(own.values())}

    def rates(self) -> dict[str, float]:
        return {"lora_A": self.config.lora_A_lr}

    def finish(self) -> Finished:
        lora = self.state.lora if self.shared else frozen_copy(self.state.lora)
        return self.finished(Sum(lora, self.scale, self.take_head()), scale=self.scale)

    def take_head(self) -> nn.Linear | None:
        """The head of the task under way, frozen; the next one has its own."""
        head: nn.Linear | None = None if self.state.head is None else frozen_copy(self.state.head)
        self.state.head = None
        return head

    def moving(self) -> dict[str, nn.Module]:
        return {"lora": self.state.lora} if self.shared else {}

    def export(self) -> dict[str, dict[str, Tensor]]:
        return {"lora": tensors(self.state.lora)} if self.shared else {}

    def restore(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        if self.shared:
            self.state.lora.load_state_dict(dict(state["lora"]))
