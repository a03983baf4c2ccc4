"""N-LoRA: https://arxiv.org/abs/2410.10179. Sparse updates seldom change the same weight, and so collide less.

A new LoRA is trained beside the frozen sum of the earlier ones, under an l1 norm of its update:

    y = W x + c sum_k B_k A_k x,    L = L_task + lambda mean over projections of |c B_t A_t|_1 / out

The paper sums the norm over all weights; here it is the mean over rows and projections, so that one lambda serves bases
of any width and depth. Trains: a LoRA a task (rank 16) and the head. Stores: the LoRAs of all tasks, added up, with
which every task answers. Needs no task id. Default: lambda 0.4, to be tuned on validation.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moecl.method_config import NLoRAConfig
from moecl.methods.added_lora import AddedLoRA


def row_norm(lora_B: Tensor, lora_A: Tensor) -> Tensor:
    """The mean over rows of |B A|_1; under `checkpoint`, as every product is as large as a weight."""
    return (lora_B @ lora_A).abs().sum(dim=1).mean()


class NLoRA(AddedLoRA):
    name, config_type = "n-lora", NLoRAConfig
    config: NLoRAConfig

    def penalty(self, features: Mapping[int, Tensor], step: int, query: Tensor | None = None) -> Tensor | None:
        norms = []
        for layer in self.geometry.layers:
            for name in self.geometry.projections:
                pair = self.state.lora.pair(layer, name)
                norms.append(checkpoint(row_norm, pair.lora_B, pair.lora_A, use_reentrant=False))
        return self.config.sparsity * self.scale * torch.stack(norms).mean()
