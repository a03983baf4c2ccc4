"""A LoRA pair, an expert (a pair on every projection of every adapted FFN) and a gate.

LoRA: https://arxiv.org/abs/2106.09685. The state-dict names of these modules are the tensor names of the store.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)

GATED = ("gate_proj", "up_proj", "down_proj")
UNGATED = ("up_proj", "down_proj")


@dataclass(frozen=True)
class Geometry:
    """The adapted FFNs of one base: their layer indices, widths and projections."""

    layers: tuple[int, ...]
    hidden_size: int  # D
    intermediate_sizes: tuple[int, ...]  # F of each adapted layer
    gated: bool  # a gate projection beside the up projection
    num_layers: int  # of the base, adapted or not

    @property
    def projections(self) -> tuple[str, ...]:
        return GATED if self.gated else UNGATED

    def features(self, position: int, projection: str) -> tuple[int, int]:
        """(in, out) features of a projection of the `position`-th adapted layer."""
        wide = self.intermediate_sizes[position]
        return (wide, self.hidden_size) if projection == "down_proj" else (self.hidden_size, wide)


class LoRA(nn.Module):
    """`x -> B A x`, unscaled; `lora_A: [rank, in]` and `lora_B: [out, rank]`, float32 whatever the base is."""

    def __init__(self, in_features: int, out_features: int, rank: int) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(torch.zeros(rank, in_features))
        self.lora_B = nn.Parameter(torch.zeros(out_features, rank))


class Expert(nn.Module):
    """One low-rank variant of the base's FFNs. Made as zeros; `reset` draws lora_A, which leaves it a no-op."""

    def __init__(self, geometry: Geometry, rank: int) -> None:
        super().__init__()
        self.geometry, self.rank = geometry, rank
        self.layers = nn.ModuleDict(
            {
                str(index): nn.ModuleDict(
                    {name: LoRA(*geometry.features(position, name), rank) for name in geometry.projections}
                )
                for position, index in enumerate(geometry.layers)
            }
        )

    def reset(self, generator: torch.Generator) -> "Expert":
        """Draw lora_A uniformly as PEFT does (bound 1/sqrt(in)), lora_B = 0."""
        for name, parameter in self.named_parameters():
            with torch.no_grad():
                if name.endswith("lora_A"):
                    bound = 1 / math.sqrt(parameter.shape[1])
                    drawn = torch.rand(parameter.shape, generator=generator) * (2 * bound) - bound
                    parameter.copy_(drawn)
                else:
                    parameter.zero_()
        return self

    def pair(self, layer: int, projection: str) -> LoRA:
        return self.layers[str(layer)][projection]  # type: ignore[index,no-any-return]


class Gate(nn.Module):
    """Per layer `G: [2, D]`, rows (shared, task); zeros are b = (1/2, 1/2)."""

    def __init__(self, geometry: Geometry) -> None:
        super().__init__()
        self.layers = nn.ModuleDict()
        for index in geometry.layers:
            layer = nn.Module()
            layer.gate = nn.Parameter(torch.zeros(2, geometry.hidden_size))
            self.layers[str(index)] = layer

    def reset(self, generator: torch.Generator, std: float) -> "Gate":
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
        return self

    def weight(self, layer: int) -> Tensor:
        return self.layers[str(layer)].gate  # type: ignore[return-value]


def freeze(module: Module) -> Module:
    module.requires_grad_(False)
    return module


def load_expert(geometry: Geometry, tensors: Mapping[str, Tensor]) -> Expert:
    """An expert from its stored tensors; strict about their names and shapes (RuntimeError)."""
    rank = next((tensor.shape[0] for name, tensor in tensors.items() if name.endswith("lora_A")), 1)
    expert = Expert(geometry, rank)
    expert.load_state_dict(dict(tensors), strict=True)
    return freeze(expert)


def load_gate(geometry: Geometry, tensors: Mapping[str, Tensor]) -> Gate:
    gate = Gate(geometry)
    gate.load_state_dict(dict(tensors), strict=True)
    return freeze(gate)


def count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)
