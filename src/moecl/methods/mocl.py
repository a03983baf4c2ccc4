"""MoCL: https://arxiv.org/abs/2404.00790. A new task composes its own LoRA with the frozen ones of earlier tasks.

Each task k has a LoRA and a key v_k [D]. A text whose mean input embedding is x is run with

    y = W x + c sum_{k <= t} w_k B_k A_k x,    w = softmax_k (s cos(x, v_k)),    L = L_task - mean cos(x, v_t)

with s = 8 and the softmax as in the published code. The key starts as the mean of the training texts' embeddings,
normalised, near the optimum of the second term, and is trained on. Trains: a LoRA a task (rank 16), its key and head.
Stores: each task's LoRA and the keys up to it, frozen; a finished task never changes, later ones are not mixed into it.
Needs the task id to answer (the paper's task-incremental setting).
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moecl.config import Task
from moecl.data.encode import Encoded
from moecl.method_config import MoCLConfig
from moecl.methods.base import Finished, in_order
from moecl.methods.one_lora import LoRAMethod
from moecl.nn.call import Parts
from moecl.nn.forms import frozen_copy, tensors
from moecl.nn.inject import Injected
from moecl.nn.lora import Expert, Geometry, load_expert
from moecl.nn.sums import Keys, Mix


class MoCL(LoRAMethod):
    name, config_type = "mocl", MoCLConfig
    config: MoCLConfig
    shared: ClassVar[bool] = False

    def __init__(self, config: Any, geometry: Geometry, seed: int, base: Injected | None = None) -> None:
        super().__init__(config, geometry, seed, base)
        self.past: dict[str, tuple[Expert, Keys]] = {}  # of finished tasks
        self.state.key = Keys(torch.zeros(1, geometry.hidden_size))

    @property
    def loras(self) -> tuple[Expert, ...]:
        return tuple(lora for lora, _ in self.past.values())

    @property
    def keys(self) -> tuple[Keys, ...]:
        return tuple(key for _, key in self.past.values())

    def forget(self, task: str) -> None:
        self.past.pop(task, None)

    def rehearse(self, rows: Sequence[Encoded]) -> Sequence[Encoded]:
        queries = F.normalize(self.base.queries([row.input_ids for row in rows]), dim=-1)
        self.state.key = Keys(F.normalize(queries.mean(dim=0, keepdim=True), dim=-1).to(self.device))
        return rows

    def form(self, lora: Expert, head: nn.Linear | None) -> Parts:
        key: Any = self.state.key
        return Mix((*self.loras, lora), (*self.keys, key), self.scale, self.config.sharpness, head)

    def preview(self, task: Task) -> Parts | None:
        """What came before, composed; there is no key yet, and a fresh LoRA adds nothing."""
        if task.head == "classifier":
            return None
        fresh = self.fresh(task.name)
        keys = self.keys or (Keys(torch.ones(1, self.geometry.hidden_size, device=self.device)),)
        return Mix(self.loras or (fresh,), keys, self.scale, self.config.sharpness)

    def penalty(self, features: Mapping[int, Tensor], step: int, query: Tensor | None = None) -> Tensor | None:
        assert query is not None
        key: Any = self.state.key
        return -F.cosine_similarity(query.float(), key.keys).mean()

    def finish(self) -> Finished:
        self.past[self.task] = frozen_copy(self.state.lora), frozen_copy(self.state.key)
        parts = Mix(self.loras, self.keys, self.scale, self.config.sharpness, self.take_head())
        return self.finished(parts, scale=self.scale)

    def export(self) -> dict[str, dict[str, Tensor]]:
        state = {f"lora-{k}": tensors(lora) for k, lora in enumerate(self.loras)}
        keys = {f"{k}.{task}": key.keys.detach().cpu() for k, (task, (_, key)) in enumerate(self.past.items())}
        return state | {"keys": keys}

    def restore(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        self.past = {}
        for k, (name, task) in enumerate(in_order(state["keys"])):
            lora = load_expert(self.geometry, state[f"lora-{k}"]).to(self.device)
            self.past[task] = lora, Keys(state["keys"][name].to(self.device).clone()).requires_grad_(False)
