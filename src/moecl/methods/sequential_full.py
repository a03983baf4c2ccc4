"""Sequential full fine-tuning of the adapted FFNs, task after task; the MoE-CL paper's FT-F trains all weights.

`y = W_d' act(W_g' x) * (W_u' x)`, W' from the base's W. It has the most freedom to learn, and to forget. Trains: every
weight of the adapted FFNs, and the head. Stores: one set of weights for all tasks, as it is after the last. Needs no
task id.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from moecl.config import Task
from moecl.method_config import SequentialFullConfig
from moecl.methods.base import Finished, Method, fresh_head
from moecl.nn.call import Parts
from moecl.nn.forms import frozen_copy, tensors
from moecl.nn.inject import Injected
from moecl.nn.lora import Geometry
from moecl.nn.weights import Projections, Weights


class WeightsState(nn.Module):
    """The FFNs' weights, and the head of the task under way."""

    head: nn.Linear | None

    def __init__(self, weights: Projections) -> None:
        super().__init__()
        self.weights, self.head = weights, None


class SequentialFull(Method):
    name, config_type = "sequential-full", SequentialFullConfig
    state: WeightsState

    def __init__(self, config: Any, geometry: Geometry, seed: int, base: Injected | None = None) -> None:
        super().__init__(config, geometry, seed, base)
        self.state = WeightsState(self.base.projections())

    def begin(self, task: Task, start: Parts | None = None) -> Parts:
        self.state.head = fresh_head(self, task)
        self.state.requires_grad_(True)
        return Weights(self.state.weights, self.state.head)

    def preview(self, task: Task) -> Parts | None:
        return None if task.head == "classifier" else Weights(self.state.weights)

    def groups(self) -> dict[str, list[nn.Parameter]]:
        return {"weights": list(self.state.parameters())}

    def finish(self) -> Finished:
        head = None if self.state.head is None else frozen_copy(self.state.head)
        self.state.head = None
        return self.finished(Weights(self.state.weights, head))

    def moving(self) -> dict[str, nn.Module]:
        return {"weights": self.state.weights}

    def export(self) -> dict[str, dict[str, Tensor]]:
        return {"weights": tensors(self.state.weights)}

    def restore(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        self.state.weights.load_state_dict(dict(state["weights"]))
