"""SmolLM2's GGUF file as a Hugging Face folder: fp32 weights, a clean config, the tokenizer.

`gguf` reads and unpacks it; here is what it leaves open. `from_pretrained(gguf_file=...)` is not called because its
tokenizer ignores the file's `smollm` pre-tokenizer (37 of vader4's 23,703 texts become other tokens) and because it
takes 48 s on 2 cores; this takes 15 s of one core's time. A test holds both to the same weights, bit for bit.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import MODEL_ARCH, GGUFReader, TokenType, dequantize, get_tensor_name_map
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

from moecl.data.pinned import Progress
from moecl.errors import AssetError

Array = NDArray[np.float32]
Metadata = Mapping[str, Any]


def convert(path: Path, folder: Path, progress: Progress | None = None) -> None:
    """Write the model at `path` and its tokenizer into `folder`, in the files that `from_pretrained` reads.

    Raises `AssetError` (not a whole GGUF file of a Llama), `OSError` (disk full ...).
    """
    try:
        reader = GGUFReader(path)
        metadata = {name: field.contents() for name, field in reader.fields.items()}
        config = _config(metadata, tied=all(tensor.name != "output.weight" for tensor in reader.tensors))
        files = {
            "config.json": config,
            "generation_config.json": _special_ids(metadata),
            "tokenizer.json": _tokenizer(metadata),
            "tokenizer_config.json": _tokenizer_config(metadata),
        }
        chat_template = metadata["tokenizer.chat_template"]
        state = _weights(reader, config, progress)
    except (ValueError, LookupError) as error:
        raise AssetError(f"{path}: not a whole GGUF file of a Llama ({error!r}); fetch it again") from error
    for name, value in files.items():
        (folder / name).write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    (folder / "chat_template.jinja").write_text(chat_template, encoding="utf-8")
    _save(state, folder / "model.safetensors")
    shutil.copymode(folder / "config.json", folder / "model.safetensors")  # safetensors makes it 0600


def _config(metadata: Metadata, tied: bool) -> dict[str, Any]:
    """What `LlamaConfig` reads, with nothing left of the quantisation."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "float32",
        "vocab_size": len(metadata["tokenizer.ggml.tokens"]),
        "hidden_size": metadata["llama.embedding_length"],
        "intermediate_size": metadata["llama.feed_forward_length"],
        "num_hidden_layers": metadata["llama.block_count"],
        "num_attention_heads": metadata["llama.attention.head_count"],
        "num_key_value_heads": metadata["llama.attention.head_count_kv"],
        "head_dim": metadata["llama.rope.dimension_count"],
        "max_position_embeddings": metadata["llama.context_length"],
        # The shortest number that is this float: 1e-05, not 9.999999747378752e-06.
        "rms_norm_eps": float(str(np.float32(metadata["llama.attention.layer_norm_rms_epsilon"]))),
        "rope_parameters": {"rope_type": "default", "rope_theta": metadata["llama.rope.freq_base"]},
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": tied,
        **_special_ids(metadata),
    }


def _special_ids(metadata: Metadata) -> dict[str, int]:
    names = {"bos": "bos", "eos": "eos", "padding": "pad"}
    return {f"{hf}_token_id": metadata[f"tokenizer.ggml.{name}_token_id"] for name, hf in names.items()}


def _tokenizer(metadata: Metadata) -> Any:
    """What `tokenizer.json` holds: byte-level BPE, digits one by one (`tokenizer.ggml.pre` is `smollm`)."""
    tokens, kinds = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    merges = [(left, right) for left, right in (merge.split(" ") for merge in metadata["tokenizer.ggml.merges"])]
    made = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    digits, byte_level = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    made.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == TokenType.CONTROL]
    made.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    said = json.loads(made.to_str())
    said["decoder"]["add_prefix_space"] = False  # as the pre-tokenizer has it; decoding does not look at it
    return said


def _tokenizer_config(metadata: Metadata) -> dict[str, Any]:
    names = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
    tokens = metadata["tokenizer.ggml.tokens"]
    special = {f"{hf}_token": tokens[metadata[f"tokenizer.ggml.{name}_token_id"]] for name, hf in names.items()}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": metadata["llama.context_length"],
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
        **special,
    }


def _weights(reader: GGUFReader, config: dict[str, Any], progress: Progress | None) -> dict[str, Array]:
    """The state dict of `LlamaForCausalLM`, fp32; a tied output layer is left out."""
    with torch.device("meta"):
        parameters = dict(LlamaForCausalLM(LlamaConfig(**config)).named_parameters())
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    packed = {tensor.name: tensor for tensor in reader.tensors}
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    total = sum(parameter.nbytes for parameter in parameters.values())
    state, done = {}, 0
    for name, parameter in parameters.items():
        tensor = packed[names[name.removesuffix(".weight")] + ".weight"]
        weight = dequantize(tensor.data, tensor.tensor_type)
        module = name.split(".")[-2]
        state[name] = _split_halves(weight, heads[module]) if module in heads else weight
        done += parameter.nbytes
        if progress:
            progress("converting", done, total)
    return state


def _split_halves(weight: Array, heads: int) -> Array:
    """Undo GGUF's order of q and k rows: rotary pairs side by side there, in two halves in transformers."""
    rows, width = weight.shape
    return np.ascontiguousarray(weight.reshape(heads, rows // heads // 2, 2, width).swapaxes(1, 2).reshape(rows, width))


def _save(state: dict[str, Array], path: Path) -> None:
    try:
        save_file(state, path, metadata={"format": "pt"})
    except SafetensorError as error:  # it has the system's errors, a full disk say, in words only
        if code := re.search(r"os error (\d+)", str(error)):
            raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from error
        raise
