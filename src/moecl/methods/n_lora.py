"""N-LoRA: https://arxiv.org/abs/2410.10179. Sparse updates seldom change the same weight, and so collide less.

A new LoRA is trained beside the frozen sum of the earlier ones, under an l1 norm of its update:

    y = W x + c sum_k B_k A_k x,    L = L_task + lambda mean over projections of |c B_t A_t|_1 / out

The paper sums the norm over all weights; here it is a mean row's (divided by the rows of B), so that one lambda serves
bases of any width. Trains: a LoRA a task (rank 16) and the head. Stores: the LoRAs of all tasks, added up, with which
every task answers. Needs no task id. Default: lambda 0.4, as the paper's; tune it on validation.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from moecl.method_config import NLoRAConfig
from moecl.methods.added_lora import AddedLoRA


class NLoRA(AddedLoRA):
    name, config_type = "n-lora", NLoRAConfig
    config: NLoRAConfig

    def penalty(self, features: Mapping[int, Tensor], step: int, query: Tensor | None = None) -> Tensor | None:
        norms = []
        for layer in self.geometry.layers:
            for name in self.geometry.projections:
                pair = self.state.lora.pair(layer, name)
                norms.append((pair.lora_B @ pair.lora_A).abs().sum(dim=1).mean())
        return self.config.sparsity * self.scale * torch.stack(norms).mean()
