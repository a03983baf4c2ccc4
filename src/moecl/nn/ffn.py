"""A base's frozen FFN, taken apart."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class FFN:
    """The frozen base FFN taken apart: `x -> (gate or None, up)`, activation, `h -> y` (bias included)."""

    project: Callable[[Tensor], tuple[Tensor | None, Tensor]]
    activation: Callable[[Tensor], Tensor]
    down: Callable[[Tensor], Tensor]
    projections: tuple[str, ...]
    fused: bool = False  # the base projects gate and up with one matrix
    matrices: Callable[[], tuple[Tensor, ...]] | None = None  # (gate,) up [F, D], down [D, F]; None if not plain

    def __call__(self, x: Tensor) -> Tensor:
        return self.down(self.hidden(*self.project(x)))

    def hidden(self, gate: Tensor | None, up: Tensor) -> Tensor:
        if gate is None:
            return self.activation(up)
        if self.fused:  # side by side as in the base: how an activation rounds depends on the memory layout
            gate, up = torch.cat((gate, up), dim=-1).chunk(2, dim=-1)
        return self.activation(gate) * up
