"""OSFT: https://arxiv.org/abs/2504.07097, through PEFT's OSF tuner (extra `osft`).

Before a task each FFN weight is split by its singular values, W = U_high S_high V_high + U_low S_low V_low. The high
directions, which what was learned lives in, are frozen; the low ones are trained, with gradients projected onto what is
orthogonal to the high ones (AdamW's scaling leaks a little). After the task both are put together again. Of r
directions task t (from 1) keeps

    k_t = r (preserved + (1 - preserved) (t - 1) / t)

so that what may move shrinks as tasks come. The schedule is ours: the paper derives k a layer from how alike its input
and output are, PEFT's tuner takes one number and its documentation advises 0 for the first task, (t - 1) / T later,
which wants to know T. Trains: the low directions of the adapted FFNs, and the head. Stores: one set of weights for all
tasks. Needs no task id.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from moecl.config import Task
from moecl.errors import ConfigError
from moecl.method_config import OSFTConfig
from moecl.methods.base import Finished, Method, fresh_head
from moecl.nn.call import Parts
from moecl.nn.forms import frozen_copy, tensors
from moecl.nn.inject import Injected
from moecl.nn.lora import Geometry
from moecl.nn.weights import ADAPTER, Projections, Weights


class OSFT(Method):
    name, config_type = "osft", OSFTConfig
    config: OSFTConfig
    state: nn.ModuleDict

    def __init__(self, config: Any, geometry: Geometry, seed: int, base: Injected | None = None) -> None:
        super().__init__(config, geometry, seed, base)
        self.weights = self.base.projections().requires_grad_(False)
        self.tasks = 0
        self.state = nn.ModuleDict()  # the trained directions by projection, and the head

    def begin(self, task: Task, start: Parts | None = None) -> Parts:
        tuned = tune(frozen_copy(self.weights), self.preserved())
        trained = {
            name.replace(".", "-"): layer.osf_svd_params[ADAPTER]
            for name, layer in tuned.named_modules()
            if hasattr(layer, "osf_svd_params")
        }
        self.tuned = tuned
        head = fresh_head(self, task)
        self.state = nn.ModuleDict(trained | ({} if head is None else {"head": head}))
        self.state.requires_grad_(True)
        return Weights(tuned, head)

    def preserved(self) -> float:
        return self.config.preserved + (1 - self.config.preserved) * self.tasks / (self.tasks + 1)

    def preview(self, task: Task) -> Parts | None:
        return None if task.head == "classifier" else Weights(self.weights)

    def groups(self) -> dict[str, list[nn.Parameter]]:
        return {"directions": list(self.state.parameters())}

    def finish(self) -> Finished:
        head = frozen_copy(self.state["head"]) if "head" in self.state else None
        merged = {}
        for name, layer in self.tuned.named_modules():
            if hasattr(layer, "osf_svd_params"):
                layer.merge()
                merged[name] = layer.get_base_layer()
        self.weights.load_state_dict(
            {
                f"{name}.{kind}": tensor
                for name, linear in merged.items()
                for kind, tensor in linear.state_dict().items()
            }
        )
        self.tasks, self.state = self.tasks + 1, nn.ModuleDict()
        del self.tuned
        return self.finished(Weights(self.weights, head), tasks=self.tasks)

    def moving(self) -> dict[str, nn.Module]:
        return {"weights": self.weights}

    def export(self) -> dict[str, dict[str, Tensor]]:
        return {"weights": tensors(self.weights), f"after-{self.tasks}": {}}

    def restore(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        self.weights.load_state_dict(dict(state["weights"]))
        [after] = [name for name in state if name.startswith("after-")]
        self.tasks = int(after.removeprefix("after-"))


def tune(weights: Projections, preserved: float) -> Projections:
    """The projections with OSF layers in the place of their nn.Linear, `preserved` of each one's directions frozen."""
    try:
        from peft import OSFConfig, inject_adapter_in_model
    except ImportError:
        raise ConfigError("method osft: PEFT is not installed; pip install 'moecl[osft]'") from None
    linears = {name: module for name, module in weights.named_modules() if isinstance(module, nn.Linear)}
    ranks: dict[str, int | float] = {
        name: min(min(one.weight.shape) - 1, max(1, round(preserved * min(one.weight.shape))))
        for name, one in linears.items()
    }
    config = OSFConfig(target_modules=list(linears), effective_rank=1, rank_pattern=ranks)
    inject_adapter_in_model(config, weights, ADAPTER)
    return weights
