"""Experts and gates: how they start, what they are called, and that loading is strict."""

import math

import pytest
import torch

from moecl.nn.lora import Expert, Gate, Geometry, count, load_expert, load_gate
from tiny import random_parts

GATED = Geometry(layers=(1, 2), hidden_size=8, intermediate_sizes=(12, 16), gated=True, num_layers=3)
UNGATED = Geometry(layers=(0,), hidden_size=8, intermediate_sizes=(12,), gated=False, num_layers=1)


def test_names_and_shapes_are_those_of_the_store():
    shapes = {name: tuple(tensor.shape) for name, tensor in Expert(GATED, 4).state_dict().items()}
    assert shapes["layers.1.gate_proj.lora_A"] == (4, 8)
    assert shapes["layers.1.up_proj.lora_B"] == (12, 4)
    assert shapes["layers.2.down_proj.lora_A"] == (4, 16)
    assert shapes["layers.2.down_proj.lora_B"] == (8, 4)
    assert len(shapes) == 2 * 3 * 2
    assert len(Expert(UNGATED, 4).state_dict()) == 1 * 2 * 2
    assert {name: tuple(t.shape) for name, t in Gate(GATED).state_dict().items()} == {
        "layers.1.gate": (2, 8),
        "layers.2.gate": (2, 8),
    }
    assert count(Expert(UNGATED, 4).parameters()) == 4 * (8 + 12) * 2


def test_reset_draws_lora_a_within_its_bound_and_leaves_lora_b_zero():
    expert = Expert(GATED, 64).reset(torch.Generator().manual_seed(0))
    for name, parameter in expert.named_parameters():
        if name.endswith("lora_B"):
            assert not parameter.any()
        else:
            bound = 1 / math.sqrt(parameter.shape[1])
            assert parameter.abs().max() <= bound
            assert torch.isclose(parameter.std(), torch.tensor(bound / math.sqrt(3)), rtol=0.1)
    again = Expert(GATED, 64).reset(torch.Generator().manual_seed(0))
    assert all(torch.equal(a, b) for a, b in zip(expert.parameters(), again.parameters(), strict=True))


def test_gate_std():
    assert not any(p.any() for p in Gate(GATED).reset(torch.Generator(), 0.0).parameters())
    wide = Geometry(layers=(0,), hidden_size=4096, intermediate_sizes=(1,), gated=True, num_layers=1)
    gate = Gate(wide).reset(torch.Generator().manual_seed(0), 0.02)
    assert abs(gate.weight(0).std().item() - 0.02) < 1e-3


def test_load_takes_the_rank_from_the_tensors_and_freezes():
    parts = random_parts(GATED, rank=5)
    expert = load_expert(GATED, parts.task.state_dict())
    assert expert.rank == 5
    assert not any(p.requires_grad for p in expert.parameters())
    assert all(torch.equal(t, expert.state_dict()[name]) for name, t in parts.task.state_dict().items())
    gate = load_gate(GATED, parts.gate.state_dict())
    assert torch.equal(gate.weight(2), parts.gate.weight(2))
    assert not gate.weight(2).requires_grad


@pytest.mark.parametrize("damage", ["missing", "unexpected", "shape", "empty"])
def test_load_is_strict(damage):
    tensors = random_parts(GATED).task.state_dict()
    if damage == "missing":
        del tensors["layers.2.up_proj.lora_B"]
    elif damage == "unexpected":
        tensors["layers.0.up_proj.lora_A"] = torch.zeros(4, 8)
    elif damage == "shape":
        tensors["layers.2.up_proj.lora_B"] = torch.zeros(12, 4)
    else:
        tensors = {}
    with pytest.raises(RuntimeError, match="state_dict"):
        load_expert(GATED, tensors)


def test_load_gate_is_strict():
    with pytest.raises(RuntimeError, match=r"layers\.2\.gate"):
        load_gate(GATED, {"layers.1.gate": torch.zeros(2, 8)})
