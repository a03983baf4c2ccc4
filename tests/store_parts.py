"""Small parts to store, and ways to compare them."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moecl.config import Task
from moecl.store import BaseInfo, TaskRecord

BASE = BaseInfo(id="user/tiny", sha256="0" * 64, dtype="float32", model_type="llama")
Parts = dict[str, dict[str, Tensor]]


def record(name: str = "a", retention: str = "exact", **more: Any) -> TaskRecord:
    task = Task(name=name, kind="classification", labels={"p": "good", "n": "bad"})
    return TaskRecord(task=task, form="gated", settings={"rank": 2, "retention": retention, **more})


def part(value: float, width: int = 4) -> dict[str, Tensor]:
    return {
        "layers.0.up_proj.lora_A": torch.full((2, width), value),
        "layers.0.up_proj.lora_B": torch.full((width, 2), value, dtype=torch.bfloat16),
    }


def parts(value: float, shared: float = 0.5) -> Parts:
    return {"task": part(value), "shared": part(shared), "gate": {"layers.0.gate": torch.full((2, 4), value)}}


def first(tensors: dict[str, Tensor]) -> float:
    values = {float(tensor.flatten()[0]) for tensor in tensors.values()}
    assert len(values) == 1
    return values.pop()


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def bits(tensor: Tensor) -> Tensor:
    return tensor.flatten().clone(memory_format=torch.contiguous_format).view(torch.uint8)


def same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype
        and one[name].shape == other[name].shape
        and one[name].is_contiguous() == other[name].is_contiguous() is True
        and bits(one[name]).equal(bits(other[name]))
        for name in one
    )
