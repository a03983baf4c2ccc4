"""The base: where it comes from, what it runs on and in, and the digest it is recognised by."""

import hashlib
import logging
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from moecl.data import assets
from moecl.errors import BaseError, ConfigError, near


@dataclass(frozen=True)
class Backbone:
    """A base as loaded; `id` is what the user called it."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    id: str


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def load_backbone(name: str, precision: str = "fp32", device: str = "cpu", progress: Any = None) -> Backbone:
    """An asset's name, a hub id or a folder; `precision` is a key of DTYPES. Raises BaseError, AssetError.

    No remote code is run, and no weight is made up: a base that lacks one is refused.
    """
    source = assets.resolve_base(name, progress=progress) if assets.is_asset(name) else os.path.expanduser(name)
    if name.startswith((".", "/", "~")) and not Path(source).is_dir():
        raise BaseError(
            f"base: {name}: no such folder; restore it, or give a hub id or an asset: {', '.join(assets.models())}"
        )
    if source == name and "/" not in name and not Path(name).exists() and (meant := near(name, assets.models())):
        raise BaseError(f"base: no asset {name!r}{meant}")  # without asking the hub, which takes a minute to give up
    if progress:
        progress("loading the base", 0, 0)
    try:
        with quiet():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                source, dtype=DTYPES[precision], trust_remote_code=False, output_loading_info=True
            )
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        known = ", ".join(assets.models())
        raise BaseError(
            f"base: cannot load {name!r} ({reason}); give a hub id, a folder with config.json, or an asset: {known}"
            f"{near(name, assets.models())}"
        ) from error
    model, found = loaded
    if missing := sorted(found["missing_keys"]):
        raise BaseError(
            f"base: {name!r} lacks {len(missing)} of the weights of a {type(model).__name__} ({missing[0]} ...); "
            "give a whole causal language model"
        )
    return Backbone(model.to(device), tokenizer, name)


@contextmanager
def quiet() -> Iterator[None]:
    """No bars and no advice of transformers' own while a base is loaded."""
    shown = transformers.utils.logging.is_progress_bar_enabled()
    level = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    transformers.utils.logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        transformers.utils.logging.set_verbosity(level)
        if shown:
            transformers.utils.logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def resolve_device(device: str) -> str:
    """`auto` is the first of cuda, mps and cpu that is there."""
    if device != "auto":
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            if "device type" in reason:  # torch lists all that it has ever known
                kinds = ("cpu", "cuda", "mps", "xpu")
                raise ConfigError(f"device: {device!r} is none of auto, {', '.join(kinds)}, cuda:1 ...") from error
            raise ConfigError(f"device: {device!r} cannot be used here ({reason}); use auto or cpu") from error
        return device
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def batch_tokens(device: str) -> int:
    """How many tokens, padding included, an answering batch has where nobody says."""
    return {"cpu": 4096, "cuda": 32768}.get(device.partition(":")[0], 8192)


def resolve_precision(precision: str, device: str) -> tuple[str, str]:
    """(fp32 or bf16, why). `auto` asks what the processor can do and never times it."""
    if precision != "auto":
        return precision, "as asked"
    if device.startswith("cuda"):
        major, minor = torch.cuda.get_device_capability(device)
        fast = major >= 8
        return ("bf16" if fast else "fp32"), f"a GPU of compute capability {major}.{minor}"
    if device == "cpu":
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return ("bf16", "the processor has bf16 units") if fast else ("fp32", "the processor has no bf16 units")
    return "fp32", f"bf16 is not measured on {device}"


def weights_sha256(model: nn.Module) -> str:
    """A digest of every weight's name, type, shape and bytes, whatever files they came from."""
    tensors = sorted(model.state_dict().items())

    def digest(item: tuple[str, torch.Tensor]) -> bytes:
        name, tensor = item
        head = f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode()
        flat = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
        return hashlib.sha256(head + hashlib.sha256(flat.numpy().data).digest()).digest()

    with ThreadPoolExecutor() as pool:  # sha256 of a large buffer runs outside the interpreter's lock
        return hashlib.sha256(b"".join(pool.map(digest, tensors))).hexdigest()


def dtype_name(model: nn.Module) -> str:
    return str(next(model.parameters()).dtype).removeprefix("torch.")
