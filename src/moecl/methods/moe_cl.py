"""MoE-CL: https://arxiv.org/abs/2509.18133.

Each task trains an expert of its own beside one that all tasks share; a gate mixes the two per token; a discriminator
guesses the task from the shared expert's output, and the shared expert is trained to fool it:

    experts, gate, head minimise L_SFT - alpha L_GAN; the discriminator minimises L_GAN.

Beyond the paper:

- The task's expert is nested in the shared one (`nested`): it adds to what that one adds, so a new task starts as what
  the shared expert knows, where one that stands beside it starts with half of that.
- lora_A learns at a tenth of the rate (`lora_A_lr`), as in LoRA+ (arXiv 2402.12354): at the full one a shared expert
  that was trained before is ruined by a high lr.
- A new task may start as that old task which fits its training rows best (`warm_start: nearest`): of a fresh start and
  of the few old tasks whose texts are nearest, what has the least loss.

Trains: shared expert, the task's expert, gate and head, discriminator. Stores: a task's expert, gate and head, and with
retention `exact` its copy of the shared expert; for further learning the shared expert, the discriminators and a mean
and a variance a layer and task. Needs the task id to answer. Defaults: measured, docs/log.md; `MoECLConfig.paper()`
is the published setting.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from moecl.config import Task
from moecl.data.encode import Encoded
from moecl.method_config import MoECLConfig
from moecl.methods.base import Finished, Method, labels
from moecl.nn.call import Parts
from moecl.nn.gated import GatedLearner
from moecl.nn.inject import Injected
from moecl.nn.lora import Geometry

STARTS = 4  # old tasks whose experts are tried as a start, the nearest ones: learning costs the same at task 1000
KEY_ROWS = 256


class MoECLMethod(Method):
    name, config_type = "moe-cl", MoECLConfig
    config: MoECLConfig
    state: GatedLearner

    def __init__(self, config: Any, geometry: Geometry, seed: int, base: Injected | None = None) -> None:
        super().__init__(config, geometry, seed, base)
        self.state = GatedLearner(geometry, config, seed)
        self.reads_features = self.state.adversary is not None
        self.keys: dict[str, Tensor] = {}  # of finished tasks
        self._asked: dict[str, Tensor] = {}  # of tasks to come, whose rows stay the same from one row of R to the next
        self.key: Tensor | None = None  # of the one under way

    def rehearse(self, rows: Sequence[Encoded]) -> Sequence[Encoded]:
        self.key = self._key(rows) if self.config.warm_start == "nearest" else None
        return rows

    def _key(self, rows: Sequence[Encoded]) -> Tensor:
        """[D]: where a task's texts lie, to find the old tasks that are near."""
        return self.base.queries([row.input_ids for row in rows[:KEY_ROWS]]).mean(dim=0).cpu()

    def starts(self, task: Task, rows: Sequence[Encoded], old: Mapping[str, Callable[[], Parts]]) -> dict[str, Parts]:
        if not self._offers(task) or not old:
            return {}
        if task.name not in self._asked:
            self._asked[task.name] = self._key(rows)
        key = self._asked[task.name]
        near = {name: float(F.cosine_similarity(key, self.keys.get(name, -key), dim=0)) for name in old}
        names = sorted(near, key=near.__getitem__, reverse=True)[:STARTS]
        found = {name: self.state.like(old[name]()) for name in names}
        return {name: parts for name, parts in found.items() if parts is not None}

    def tried(self, task: Task, old: int, known: int) -> int:
        never_change = self.config.experts == "task" or (self.config.retention, self.config.gate) == ("exact", "task")
        return 1 + min(old - known if never_change else old, STARTS) if self._offers(task) and old else 0

    def _offers(self, task: Task) -> bool:
        config = self.config
        return config.warm_start == "nearest" and config.experts != "shared" and task.head != "classifier"

    def begin(self, task: Task, start: Parts | None = None) -> Parts:
        self.task = task.name
        return self.state.begin(task.name, labels(task), start)

    def preview(self, task: Task) -> Parts | None:
        return None if task.head == "classifier" else self.state.preview(task.name)

    def groups(self) -> dict[str, list[nn.Parameter]]:
        return self.state.groups()

    def rates(self) -> dict[str, float]:
        return self.state.rates()

    def penalty(self, features: Mapping[int, Tensor], step: int, query: Tensor | None = None) -> Tensor | None:
        return self.state.loss(features, step) if self.reads_features else None

    def finish(self) -> Finished:
        if self.key is not None:
            self.keys[self.task] = self.key
        return self.finished(self.state.finish(), scale=self.state.scale)

    def export(self) -> dict[str, dict[str, Tensor]]:
        return self.state.export() | ({"keys": self.keys} if self.keys else {})

    def restore(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        self.state.restore(state)
        self.keys = dict(state.get("keys", {}))

    def moving(self) -> dict[str, nn.Module]:
        return self.state.moving()

    def log(self) -> dict[str, float]:
        adversary = self.state.adversary
        if adversary is None or adversary.accuracy is None or adversary.real_loss is None:
            return {}
        return {"discriminator_accuracy": float(adversary.accuracy), "discriminator_loss": float(adversary.real_loss)}
