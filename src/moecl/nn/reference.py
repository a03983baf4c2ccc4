"""The oracle: the mixture term by term as the paper writes it (arXiv 2509.18133, eq. 3-8) or nested, nothing shared.

Each expert runs the whole FFN, six base GEMMs for three, and the discriminator's input is the mean of a full y_s.
Slow on purpose; `moe_ffn` must equal it, forward and gradients.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moecl.nn.ffn import FFN
from moecl.nn.lora import Expert
from moecl.nn.moe_ffn import Gated


@dataclass(frozen=True)
class Mixed:
    y: Tensor  # [B, T, D]
    p: Tensor  # [B, D], the mean of y_s over real tokens
    b: Tensor  # [B, T, 2], weights of (shared, task)


def delta(x: Tensor, expert: Expert, layer: int, projection: str, scale: float) -> Tensor:
    pair = expert.pair(layer, projection)
    return scale * torch.einsum("or,ri,...i->...o", pair.lora_B.to(x.dtype), pair.lora_A.to(x.dtype), x)


def expert_output(x: Tensor, ffn: FFN, experts: Sequence[tuple[Expert, float]], layer: int) -> Tensor:
    """y_e [..., D] of x [..., D]: of one expert with its scale, or of one that adds to another."""
    gate, up = ffn.project(x)
    for expert, scale in experts:
        up = up + delta(x, expert, layer, "up_proj", scale)
        if gate is not None:
            gate = gate + delta(x, expert, layer, "gate_proj", scale)
    h = ffn.activation(up) if gate is None else ffn.activation(gate) * up
    y = ffn.down(h)
    for expert, scale in experts:
        y = y + delta(h, expert, layer, "down_proj", scale)
    return y


def terms(parts: Gated) -> tuple[list[tuple[Expert, float]], list[tuple[Expert, float]]]:
    """The experts with their scales that y_s and y_t are of."""
    shared, task = (parts.shared, parts.scale / 2 if parts.nested else parts.scale), (parts.task, parts.scale)
    return [shared], [shared, task] if parts.nested else [task]


def reference(x: Tensor, attention_mask: Tensor, ffn: FFN, parts: Gated, layer: int) -> Mixed:
    """One FFN for rows x [B, T, D] that all have `parts`; attention_mask [B, T]."""
    y_s, y_t = (expert_output(x, ffn, experts, layer) for experts in terms(parts))
    logits = torch.einsum("btd,kd->btk", x, parts.gate.weight(layer).to(x.dtype))
    b = torch.exp(logits) / torch.exp(logits).sum(dim=-1, keepdim=True)
    y = b[..., 0:1] * y_s + b[..., 1:2] * y_t
    rows = [y_s[row, attention_mask[row].bool()].mean(dim=0) for row in range(len(x))]
    return Mixed(y, torch.stack(rows), b)
