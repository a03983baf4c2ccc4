"""Form `weights`: FFNs whose own weights were trained, in the place of the base's."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from moecl.nn.call import Call, Parts
from moecl.nn.ffn import FFN

ADAPTER = "default"  # the one adapter of a tuner's layer, by PEFT's name for it


class Projections(nn.Module):
    """The adapted FFNs' projections, float32: layer -> projection -> nn.Linear, or a PEFT layer around it."""

    def __init__(self, linears: Mapping[int, Mapping[str, nn.Module]]) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({str(index): nn.ModuleDict(dict(found)) for index, found in linears.items()})

    @classmethod
    def load(cls, tensors: Mapping[str, Tensor]) -> "Projections":
        """A frozen copy of a state dict. KeyError where names are not those of projections."""
        linears: dict[int, dict[str, nn.Module]] = {}
        for name, weight in tensors.items():
            if name.endswith(".bias"):
                continue
            _, index, projection, _ = name.split(".")
            out_features, in_features = weight.shape
            bias = f"layers.{index}.{projection}.bias" in tensors
            linears.setdefault(int(index), {})[projection] = nn.Linear(in_features, out_features, bias)
        found = cls(linears)
        found.load_state_dict(dict(tensors))
        return found.requires_grad_(False)

    def project(self, layer: int, projection: str, x: Tensor) -> Tensor:
        """In x's dtype: what is trained beside a weight is added to it first, or rounding would lose it at the end."""
        module: Any = self.layers[str(layer)][projection]  # type: ignore[index]
        linear: nn.Linear = getattr(module, "base_layer", module)
        weight = linear.weight if linear is module else linear.weight + module.get_delta_weight(ADAPTER)
        bias = None if linear.bias is None else linear.bias.to(x.dtype)
        return F.linear(x, weight.to(x.dtype), bias)


@dataclass(frozen=True)
class Weights(Parts):
    """Form `weights`: `y = W_d' act(W_g' x) * (W_u' x)`, with trained W'."""

    form: ClassVar[str] = "weights"
    needs: ClassVar[frozenset[str]] = frozenset({"weights"})

    weights: Projections
    head: nn.Linear | None = None

    def modules(self) -> dict[str, nn.Module]:
        return self.with_head({"weights": self.weights})

    @classmethod
    def build(cls, modules: dict[str, Any], settings: Mapping[str, Any]) -> "Weights":
        return cls(**modules)

    @staticmethod
    def run(ffn: FFN, layer: int, x: Tensor, call: Call) -> Tensor:
        return call.part_by_part(x, lambda parts, rows, _: parts.run_own(ffn, layer, rows))

    def run_own(self, ffn: FFN, layer: int, x: Tensor) -> Tensor:
        gate = self.weights.project(layer, "gate_proj", x) if "gate_proj" in ffn.projections else None
        h = ffn.hidden(gate, self.weights.project(layer, "up_proj", x))  # (B, T, F)
        return self.weights.project(layer, "down_proj", h)
