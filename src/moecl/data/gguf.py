"""SmolLM2's GGUF file as a Hugging Face folder: fp32 weights bit for bit, a clean config, the tokenizer.

transformers reads GGUF too (`gguf_file=`), but takes 48 s for this file on 2 cores, where this reader takes 3, and
refuses to save what it read. A test holds both to the same weights. Read is what the pinned file holds and no more:
GGUF 3, Llama, F32, Q8_0 and Q4_1.
Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import save_file

from moecl.data.pinned import Progress

Array = NDArray[Any]

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_CONTROL = 3  # the token type of `<|im_end|>` and its like

_MODULES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


@dataclass(frozen=True)
class Gguf:
    """A GGUF file's metadata and its tensors, still packed: name -> (shape, type, bytes)."""

    metadata: Mapping[str, Any]
    tensors: Mapping[str, tuple[tuple[int, ...], int, memoryview]]


class _Reader:
    def __init__(self, data: memoryview) -> None:
        self.data, self.at = data, 0

    def scalars(self, code: str, count: int = 1) -> tuple[Any, ...]:
        layout = f"<{count}{code}"
        values = struct.unpack_from(layout, self.data, self.at)
        self.at += struct.calcsize(layout)
        return values

    def scalar(self, code: str) -> Any:
        return self.scalars(code)[0]

    def string(self) -> str:
        start = self.at + 8
        self.at = start + self.scalar("Q")
        return str(self.data[start : self.at], "utf-8")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            return self.scalar(_SCALARS[kind])
        item, count = self.scalar("I"), self.scalar("Q")
        if item == _STRING:
            return [self.string() for _ in range(count)]
        return list(self.scalars(_SCALARS[item], count))


def read_gguf(content: bytes) -> Gguf:
    """Parse a whole file held in memory; `content` is trusted (its digest was checked)."""
    reader = _Reader(memoryview(content))
    assert reader.scalars("I", 2) == (0x46554747, 3), "not a GGUF 3 file"
    n_tensors, n_fields = reader.scalars("Q", 2)
    metadata = {}
    for _ in range(n_fields):
        key = reader.string()
        metadata[key] = reader.value(reader.scalar("I"))
    infos = []
    for _ in range(n_tensors):
        name = reader.string()
        shape = reader.scalars("Q", reader.scalar("I"))[::-1]  # GGUF lists the fastest axis first
        infos.append((name, shape, reader.scalar("I"), reader.scalar("Q")))
    alignment = metadata.get("general.alignment", 32)
    start = -(-reader.at // alignment) * alignment
    return Gguf(metadata, {name: (shape, kind, reader.data[start + at :]) for name, shape, kind, at in infos})


def dequantize(shape: tuple[int, ...], kind: int, data: memoryview) -> Array:
    """Unpack the fp32 values of a packed tensor: `q` (F32), `d q` (Q8_0) or `d q + m` (Q4_1), in blocks of 32."""
    size = math.prod(shape)
    if kind == 0:
        return np.frombuffer(data, "<f4", size).reshape(shape)
    if kind == 8:
        blocks = np.frombuffer(data, [("d", "<f2"), ("q", "i1", 32)], size // 32)
        values = blocks["q"].astype(np.float32)
    else:
        assert kind == 3, f"GGUF tensor type {kind}"
        blocks = np.frombuffer(data, [("d", "<f2"), ("m", "<f2"), ("q", "u1", 16)], size // 32)
        values = np.concatenate([blocks["q"] & 15, blocks["q"] >> 4], axis=1).astype(np.float32)
    values *= blocks["d"].astype(np.float32)[:, None]
    if kind == 3:
        values += blocks["m"].astype(np.float32)[:, None]
    return values.reshape(shape)


def _hf_name(name: str) -> str:
    parts = name.split(".")  # blk.3.attn_q.weight
    layer = f"model.layers.{parts[1]}." if parts[0] == "blk" else ""
    return f"{layer}{_MODULES[parts[-2]]}.{parts[-1]}"


def _split_halves(weight: Array, heads: int) -> Array:
    """Undo GGUF's order of q and k rows: rotary pairs side by side there, in two halves in transformers."""
    rows, width = weight.shape
    return np.ascontiguousarray(weight.reshape(heads, rows // heads // 2, 2, width).swapaxes(1, 2).reshape(rows, width))


def weights(gguf: Gguf, progress: Progress | None = None) -> dict[str, Array]:
    """Build the state dict of `LlamaForCausalLM`, fp32; a tied output layer is left out."""
    heads = {
        "attn_q": gguf.metadata["llama.attention.head_count"],
        "attn_k": gguf.metadata["llama.attention.head_count_kv"],
    }
    total = 4 * sum(math.prod(shape) for shape, _, _ in gguf.tensors.values())
    state, done = {}, 0
    for name, packed in gguf.tensors.items():
        weight = dequantize(*packed)
        done += weight.nbytes
        module = name.split(".")[-2]
        state[_hf_name(name)] = _split_halves(weight, heads[module]) if module in heads else weight
        if progress:
            progress("converting", done, total)
    return state


def config(gguf: Gguf) -> dict[str, Any]:
    """Build what `LlamaConfig` reads, with nothing left of the quantisation."""
    llama = {key.removeprefix("llama."): value for key, value in gguf.metadata.items() if key.startswith("llama.")}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "float32",
        "vocab_size": len(gguf.metadata["tokenizer.ggml.tokens"]),
        "hidden_size": llama["embedding_length"],
        "intermediate_size": llama["feed_forward_length"],
        "num_hidden_layers": llama["block_count"],
        "num_attention_heads": llama["attention.head_count"],
        "num_key_value_heads": llama["attention.head_count_kv"],
        "head_dim": llama["rope.dimension_count"],
        "max_position_embeddings": llama["context_length"],
        # The shortest number that is this float: 1e-05, not 9.999999747378752e-06.
        "rms_norm_eps": float(str(np.float32(llama["attention.layer_norm_rms_epsilon"]))),
        "rope_parameters": {"rope_type": "default", "rope_theta": llama["rope.freq_base"]},
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": "output.weight" not in gguf.tensors,
        **_special_ids(gguf),
    }


def _special_ids(gguf: Gguf) -> dict[str, int]:
    names = {"bos": "bos", "eos": "eos", "padding": "pad"}
    return {f"{hf}_token_id": gguf.metadata[f"tokenizer.ggml.{name}_token_id"] for name, hf in names.items()}


def tokenizer(gguf: Gguf) -> dict[str, Any]:
    """Build `tokenizer.json`: byte-level BPE, digits one by one (`tokenizer.ggml.pre` is `smollm`)."""
    tokens = gguf.metadata["tokenizer.ggml.tokens"]
    kinds = gguf.metadata["tokenizer.ggml.token_type"]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    digits = {"type": "Digits", "individual_digits": True}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": token, **flags}
            for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
            if kind == _CONTROL
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [digits, byte_level]},
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": [merge.split(" ") for merge in gguf.metadata["tokenizer.ggml.merges"]],
        },
    }


def tokenizer_config(gguf: Gguf) -> dict[str, Any]:
    """Build `tokenizer_config.json`: the special tokens by name."""
    tokens = gguf.metadata["tokenizer.ggml.tokens"]
    names = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
    special = {f"{hf}_token": tokens[gguf.metadata[f"tokenizer.ggml.{name}_token_id"]] for name, hf in names.items()}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": gguf.metadata["llama.context_length"],
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
        **special,
    }


def convert(content: bytes, folder: Path, progress: Progress | None = None) -> None:
    """Write the model and its tokenizer into `folder`, in the files that `from_pretrained` reads. Raises `OSError`."""
    gguf = read_gguf(content)
    files = {
        "config.json": config(gguf),
        "generation_config.json": _special_ids(gguf),
        "tokenizer.json": tokenizer(gguf),
        "tokenizer_config.json": tokenizer_config(gguf),
    }
    for name, value in files.items():
        (folder / name).write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    (folder / "chat_template.jinja").write_text(gguf.metadata["tokenizer.chat_template"], encoding="utf-8")
    _save(weights(gguf, progress), folder / "model.safetensors")
    shutil.copymode(folder / "config.json", folder / "model.safetensors")  # safetensors makes it 0600


def _save(state: dict[str, Array], path: Path) -> None:
    try:
        save_file(state, path, metadata={"format": "pt"})
    except SafetensorError as error:  # it has the system's errors, a full disk say, in words only
        if code := re.search(r"os error (\d+)", str(error)):
            raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from error
        raise
