"""O-LoRA: https://arxiv.org/abs/2310.14152. Each task learns in a subspace orthogonal to those of the earlier tasks.

A new LoRA is trained beside the frozen sum of the earlier ones, and pays for the overlap of their lora_A (eq. 7):

    y = W x + c sum_k B_k A_k x,    L = L_task + lambda_1 sum over projections, k < t of |A_k A_t^T|_1

Trains: a LoRA a task (rank 16) and the head. Stores: the LoRAs of all tasks, added up, with which every task answers:
old tasks move as new ones are added. Needs no task id. Defaults: the published code, lambda_1 0.5 and absolute
values where the paper has squares.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from moecl.method_config import OLoRAConfig
from moecl.methods.added_lora import AddedLoRA


class OLoRA(AddedLoRA):
    name, config_type = "o-lora", OLoRAConfig
    config: OLoRAConfig

    def penalty(self, features: Mapping[int, Tensor], step: int, query: Tensor | None = None) -> Tensor | None:
        if self.past is None:
            return None
        overlaps = [
            (self.past.pair(layer, name).lora_A @ self.state.lora.pair(layer, name).lora_A.mT).abs().sum()
            for layer in self.geometry.layers
            for name in self.geometry.projections
        ]
        return self.config.orthogonality * torch.stack(overlaps).sum()
