"""LoRA pairs beside an FFN's projections, one set for all rows or one a row: what every form of LoRAs is made of."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from moecl.nn.ffn import FFN
from moecl.nn.lora import Expert

Pairs = dict[str, tuple[Tensor, Tensor]]  # projection -> lora_A [.., r, in], lora_B [.., out, r]


def add_lora(y: Tensor, x: Tensor, pair: tuple[Tensor, Tensor], scale: float | Tensor) -> Tensor:
    """`y + c B A x` for y [B, T, out], x [B, T, in]; one pair for all rows or one a row.

    `scale` may be [B, T, 1]: what weighs x can as well weigh A x, where a token is r numbers. The sum is formed by the
    product itself, not in another pass over y.
    """
    lora_A, lora_B = pair
    low = x @ lora_A.mT * scale  # (B, T, r)
    if lora_B.dim() == 2:
        return torch.addmm(y.flatten(0, 1), low.flatten(0, 1), lora_B.mT).view_as(y)
    return torch.baddbmm(y, low, lora_B.mT)


def moved(
    gate: Tensor | None, up: Tensor, x: Tensor, pairs: Pairs, scale: float | Tensor
) -> tuple[Tensor | None, Tensor]:
    """gate and up [B, T, F] with LoRA on what projects x into the FFN."""
    if gate is not None:
        gate = add_lora(gate, x, pairs["gate_proj"], scale)
    return gate, add_lora(up, x, pairs["up_proj"], scale)


def with_lora(ffn: FFN, gate: Tensor | None, up: Tensor, x: Tensor, pairs: Pairs, scale: float | Tensor) -> Tensor:
    """h [B, T, F] of the FFN with LoRA on what projects x into it."""
    return ffn.hidden(*moved(gate, up, x, pairs, scale))


def cast_pair(expert: Expert, layer: int, projection: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    pair = expert.pair(layer, projection)
    return pair.lora_A.to(dtype), pair.lora_B.to(dtype)


def stacked(experts: Sequence[Expert], layer: int, projection: str, rows: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Pairs [B, r, in], [B, out, r], each row's from the expert that `rows` names."""
    return stack_rows([cast_pair(expert, layer, projection, x.dtype) for expert in experts], rows)


def stack_rows(pairs: Sequence[tuple[Tensor, Tensor]], rows: Tensor) -> tuple[Tensor, Tensor]:
    """Pairs of a row each; those of a lower rank are filled up with zeros, which add nothing."""
    rank = max(len(lora_A) for lora_A, _ in pairs)
    filled = [fill(pair, rank) for pair in pairs]
    return torch.stack([lora_A for lora_A, _ in filled])[rows], torch.stack([lora_B for _, lora_B in filled])[rows]


def scaled(pair: tuple[Tensor, Tensor], c: float) -> tuple[Tensor, Tensor]:
    """The pair that adds c times as much."""
    return pair[0] * c, pair[1]


def fill(pair: tuple[Tensor, Tensor], rank: int) -> tuple[Tensor, Tensor]:
    """A pair of at least `rank`: rows and columns of zeros add nothing."""
    lora_A, lora_B = pair
    if len(lora_A) == rank:
        return pair
    return F.pad(lora_A, (0, 0, 0, rank - len(lora_A))), F.pad(lora_B, (0, rank - lora_B.shape[1]))
