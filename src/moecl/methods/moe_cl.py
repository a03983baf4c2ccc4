"""MoE-CL: https://arxiv.org/abs/2509.18133.

Each task trains an expert of its own beside one that all tasks share; a gate mixes the two per token; a discriminator
guesses the task from the shared expert's output, and the shared expert is trained to fool it:

    experts, gate, head minimise L_SFT - alpha L_GAN; the discriminator minimises L_GAN.

Trains: shared expert, the task's expert, gate and head, discriminator. Stores: a task's expert, gate and head, and with
retention `exact` its copy of the shared expert; for further learning the shared expert, the discriminators and a mean
and a variance a layer and task. Needs the task id to answer. Defaults: DESIGN section 2; `MoECLConfig.paper()` is the
published setting.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from moecl.config import Task
from moecl.method_config import MoECLConfig
from moecl.methods.base import Finished, Method, labels
from moecl.nn.call import Parts
from moecl.nn.gated import GatedLearner
from moecl.nn.inject import Injected
from moecl.nn.lora import Geometry


class MoECLMethod(Method):
    name, config_type = "moe-cl", MoECLConfig
    config: MoECLConfig
    state: GatedLearner

    def __init__(self, config: Any, geometry: Geometry, seed: int, base: Injected | None = None) -> None:
        super().__init__(config, geometry, seed, base)
        self.state = GatedLearner(geometry, config, seed)
        self.reads_features = self.state.adversary is not None

    def begin(self, task: Task) -> Parts:
        return self.state.begin(task.name, labels(task))

    def preview(self, task: Task) -> Parts | None:
        return None if task.head == "classifier" else self.state.preview(task.name)

    def groups(self) -> dict[str, list[nn.Parameter]]:
        return self.state.groups()

    def penalty(self, features: Mapping[int, Tensor], step: int, query: Tensor | None = None) -> Tensor | None:
        return self.state.loss(features, step) if self.reads_features else None

    def finish(self) -> Finished:
        return self.finished(self.state.finish(), scale=self.state.scale)

    def export(self) -> dict[str, dict[str, Tensor]]:
        return self.state.export()

    def restore(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        self.state.restore(state)

    def moving(self) -> dict[str, nn.Module]:
        return self.state.moving()

    def log(self) -> dict[str, float]:
        adversary = self.state.adversary
        if adversary is None or adversary.accuracy is None or adversary.real_loss is None:
            return {}
        return {"discriminator_accuracy": float(adversary.accuracy), "discriminator_loss": float(adversary.real_loss)}
