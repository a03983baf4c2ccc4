"""Online elastic weight consolidation of one LoRA: https://arxiv.org/abs/1612.00796, https://arxiv.org/abs/1805.06370.

What mattered to earlier tasks is held near where it was:

    L = L_task + lambda / 2 sum_i F_i (theta_i - theta*_i)^2
    F = decay F_before + mean over rows of (dL_row/dtheta_i)^2

with theta* the LoRA after the last task and F the diagonal of the empirical Fisher information, from `fisher_rows`
training rows of each task. Trains: one LoRA (rank 16). Stores: one LoRA for all tasks; for further learning F and
theta*. Needs no task id. Defaults: decay 0.9 as online EWC, lambda to be tuned on validation.
"""

from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any, ClassVar

import torch
from torch import Tensor

from moecl.method_config import EWCConfig
from moecl.methods.one_lora import LoRAMethod
from moecl.nn.forms import tensors
from moecl.nn.inject import Injected
from moecl.nn.lora import Geometry


class EWC(LoRAMethod):
    name, config_type = "ewc", EWCConfig
    shared: ClassVar[bool] = True
    config: EWCConfig

    def __init__(self, config: Any, geometry: Geometry, seed: int, base: Injected | None = None) -> None:
        super().__init__(config, geometry, seed, base)
        self.fisher: dict[str, Tensor] = {}
        self.anchor: dict[str, Tensor] = {}

    def penalty(self, features: Mapping[int, Tensor], step: int, query: Tensor | None = None) -> Tensor | None:
        if not self.fisher:
            return None
        moved = [
            (self.fisher[name] * (p - self.anchor[name]).square()).sum()
            for name, p in self.state.lora.named_parameters()
        ]
        return self.config.strength / 2 * torch.stack(moved).sum()

    def learned(self, losses: Iterable[Tensor]) -> None:
        named = dict(self.state.lora.named_parameters())
        squares = {name: torch.zeros_like(p) for name, p in named.items()}
        count = 0
        for loss in islice(losses, self.config.fisher_rows):
            for name, gradient in zip(named, torch.autograd.grad(loss, list(named.values())), strict=True):
                squares[name] += gradient.square()
            count += 1
        for name, p in named.items():
            before = self.fisher.get(name, torch.zeros_like(p))
            self.fisher[name] = self.config.decay * before + squares[name] / max(count, 1)
            self.anchor[name] = p.detach().clone()

    def export(self) -> dict[str, dict[str, Tensor]]:
        return super().export() | {"fisher": {name: tensor.cpu() for name, tensor in self.fisher.items()}}

    def restore(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        super().restore(state)
        self.fisher = {name: tensor.to(self.device) for name, tensor in state["fisher"].items()}
        self.anchor = {name: tensor.to(self.device) for name, tensor in tensors(self.state.lora).items()}
