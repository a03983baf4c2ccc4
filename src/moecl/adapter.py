"""A LoRA as a PEFT adapter: adapter_config.json and adapter_model.safetensors, under the base's own names.

Where a base has gate and up in one matrix (Phi-3), so has the adapter: their A one above the other, their B on the
diagonal, of twice the rank. A name that other modules of the base share (GPT-2's c_proj) is given with its block's.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from moecl._atomic import one_line, sync_folder, write_synced
from moecl.errors import BaseError, RunError
from moecl.model import MoECL
from moecl.nn.inject import Injected
from moecl.nn.low_rank import fill
from moecl.nn.sums import Sum
from moecl.store import encode

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def adapter(model: MoECL, lora: Sum) -> dict[str, bytes]:
    """The files of an adapter that makes PEFT's model of the base what `lora` makes of it. Raises BaseError."""
    injected = model.injected
    modules = {name: module for name, module in injected.base.named_modules() if name}
    names = {id(module): name for name, module in modules.items()}
    rank = lora.lora.rank * (2 if injected.names.fused else 1)
    adapted = {
        names[id(module)]: pair
        for index, layer in injected.layers.items()
        for module, pair in of_layer(injected, layer, lora, index).items()
    }
    tensors = {
        f"base_model.model.{name}.lora_{letter}.weight": matrix
        for name, pair in adapted.items()
        for letter, matrix in zip("AB", pair, strict=True)
    }
    alpha = lora.scale * rank
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model.base_id,
        "r": rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": targets(injected, modules),
        "fan_in_fan_out": any(isinstance(modules[name], Conv1D) for name in adapted),
        "inference_mode": True,
    }
    if injected.below:
        config["layers_to_transform"] = list(injected.layers)
    return {CONFIG: json.dumps(config, indent=2).encode() + b"\n", WEIGHTS: encode(tensors)}


def of_layer(injected: Injected, layer: nn.Module, lora: Sum, index: int) -> dict[nn.Module, tuple[Tensor, Tensor]]:
    """The pair of each of a layer's projections, as the base has them."""
    pairs = [lora.pair(index, name, torch.float32) for name in injected.geometry.projections]
    if injected.names.fused:
        (gate_A, gate_B), (up_A, up_B), down = pairs
        diagonal = torch.cat([F.pad(gate_B, (0, len(up_A))), F.pad(up_B, (len(gate_A), 0))])
        pairs = [(torch.cat([gate_A, up_A]), diagonal), fill(down, 2 * len(up_A))]
    return dict(zip(projections(injected, layer), pairs, strict=True))


def projections(injected: Injected, layer: nn.Module) -> list[nn.Module]:
    """A layer's projections in the order of ours. Raises BaseError for one that PEFT would not take."""
    names = injected.names
    block = getattr(layer, names.block) if names.block else layer
    found = [getattr(block, name) for name in (names.gate, names.up, names.down) if name]
    for module in found:
        if not isinstance(module, nn.Linear | Conv1D):
            raise BaseError(f"base: a {type(module).__name__} in its FFN; PEFT has LoRA for Linear and Conv1D")
    return found


def targets(injected: Injected, modules: Mapping[str, nn.Module]) -> list[str]:
    names = injected.names
    inside = f"{names.block}." if names.block else ""
    found = []
    for name in (name for name in (names.gate, names.up, names.down) if name):
        alone = all(one.endswith(f".{inside}{name}") for one in modules if one.endswith(f".{name}"))
        found.append(name if alone else inside + name)
    return found


def check_free(folder: Path) -> None:
    """Raises RunError for a folder that is there and not empty."""
    if folder.exists() and not (folder.is_dir() and not os.listdir(folder)):
        raise RunError(f"-o {folder}: is there already; give another name")


def write_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    """Make a folder with these files: whole, or not at all. Raises RunError: it is there, disk full, not writable."""
    check_free(folder)
    draft = folder.parent / f".{folder.name}.{secrets.token_hex(8)}.tmp"
    with one_line(folder):
        try:
            draft.mkdir(parents=True)
            for name, data in files.items():
                write_synced(draft / name, data)
            sync_folder(draft)
            os.rename(draft, folder)
        except BaseException:
            shutil.rmtree(draft, ignore_errors=True)
            raise
        sync_folder(folder.parent)
