"""The forms, by name, and their parts as tensors of a store."""

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from moecl.nn.call import Parts
from moecl.nn.lora import Geometry, freeze, load_expert, load_gate
from moecl.nn.moe_ffn import Gated, Nested
from moecl.nn.sums import Keys, Mix, Sum
from moecl.nn.weights import Projections, Weights

FORMS: dict[str, type[Parts]] = {form.form: form for form in (Gated, Nested, Sum, Mix, Weights)}


def frozen_copy(module: Any) -> Any:
    return freeze(copy.deepcopy(module))


def tensors(module: nn.Module) -> dict[str, Tensor]:
    """A module's tensors as the store keeps them: on the CPU, no longer written to."""
    return {name: tensor.detach().cpu().clone() for name, tensor in module.state_dict().items()}


def to_tensors(parts: Parts) -> dict[str, dict[str, Tensor]]:
    """The objects of a task in the store, by part."""
    found = {name: tensors(module) for name, module in parts.modules().items()}
    if "head" in found:
        found["head"] = {"head": found["head"]["weight"]}
    return found


def from_tensors(geometry: Geometry, part: str, tensors: Mapping[str, Tensor]) -> nn.Module:
    """One part of `to_tensors`, a frozen copy; RuntimeError or KeyError where names or shapes are not this geometry's.

    A copy, since how kernels round depends on the alignment of what they read, which a file does not keep.
    """
    if part == "gate":
        return load_gate(geometry, tensors)
    if part == "weights":
        return Projections.load(tensors)
    if part == "keys":
        return freeze(Keys(tensors["keys"].clone()))
    if part != "head":
        return load_expert(geometry, tensors)
    head = nn.Linear(geometry.hidden_size, tensors["head"].shape[0], bias=False)
    head.load_state_dict({"weight": tensors["head"]})
    return freeze(head)
