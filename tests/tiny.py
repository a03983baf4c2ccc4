"""Tiny random models and a tokenizer to test with. Everything is drawn from a seed and cached; callers get copies.

Weights are far larger than transformers would draw them, biases and norms included: a term that is lost shows.
"""

import copy
from functools import cache

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from moecl.nn.lora import Expert, Gate, Geometry
from moecl.nn.moe_ffn import Gated

torch.set_num_threads(1)  # what is this small gains nothing from a second thread

LAYERS, HIDDEN, WIDE, VOCAB = 2, 32, 48, 96
PAD, BOS, EOS = 0, 1, 2

_WIDTHS = {"hidden_size": HIDDEN, "intermediate_size": WIDE, "num_hidden_layers": LAYERS}
_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
_GEMMA = {**_WIDTHS, **_HEADS, "head_dim": 8, "sliding_window": 64}

# Every family the adapter supports, by transformers' model_type.
FAMILIES = {
    "llama": {**_WIDTHS, **_HEADS},
    "mistral": {**_WIDTHS, **_HEADS, "sliding_window": 64},
    "qwen2": {**_WIDTHS, **_HEADS},
    "qwen3": {**_WIDTHS, **_HEADS, "head_dim": 8},
    "gemma2": {**_GEMMA, "final_logit_softcapping": 2.0},
    "gemma3_text": _GEMMA,
    "olmo2": {**_WIDTHS, **_HEADS},
    "smollm3": {**_WIDTHS, **_HEADS},
    "phi3": {**_WIDTHS, **_HEADS},
    "gpt2": {"n_embd": HIDDEN, "n_inner": WIDE, "n_layer": LAYERS, "n_head": 4, "n_positions": 256},
    "gpt_neox": {**_WIDTHS, "num_attention_heads": 4, "max_position_embeddings": 256},
    "opt": {
        "hidden_size": HIDDEN,
        "ffn_dim": WIDE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
        "word_embed_proj_dim": HIDDEN,
    },
    "phi": {**_WIDTHS, **_HEADS},
}
UNGATED = ("gpt2", "gpt_neox", "opt", "phi")


def tiny_model(
    family: str = "llama",
    *,
    layers: int | None = None,
    vocab_size: int = VOCAB,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> PreTrainedModel:
    """A random causal LM of a family, frozen and in eval mode; a copy of its own for every caller."""
    return copy.deepcopy(_drawn(family, layers or LAYERS, vocab_size, seed)).to(dtype)


@cache
def _drawn(family: str, layers: int, vocab_size: int, seed: int) -> PreTrainedModel:
    depth = {"n_layer" if family == "gpt2" else "num_hidden_layers": layers}
    special = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
    config = AutoConfig.for_model(family, **{**FAMILIES[family], **depth}, vocab_size=vocab_size, **special)
    model = AutoModelForCausalLM.from_config(config)
    redraw(model, seed)
    return model.eval().requires_grad_(False)


@torch.no_grad()
def redraw(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() > 1:
            parameter.copy_(noise * 0.2)
        else:  # around what the family starts from: 1 or 0 for norms, 0 for biases
            parameter.add_(noise * 0.1)


def tiny_batch(rows: int = 3, length: int = 9, side: str = "right", vocab_size: int = VOCAB) -> dict[str, Tensor]:
    """Random ids [rows, length] with padding on one side; row i has `length - 2 * i` real tokens."""
    generator = torch.Generator().manual_seed(7)
    input_ids = torch.randint(3, vocab_size, (rows, length), generator=generator)
    place = torch.arange(length)[None]
    padded = 2 * torch.arange(rows)[:, None]
    real = place < length - padded if side == "right" else place >= padded
    return {"input_ids": input_ids.where(real, PAD), "attention_mask": real.long()}


@torch.no_grad()
def random_parts(
    geometry: Geometry,
    seed: int = 0,
    rank: int = 4,
    scale: float = 2.0,
    std: float = 0.3,
    form: type[Gated] = Gated,
) -> Gated:
    """A task's parts with nothing at its start value: lora_A, lora_B and the gate drawn from N(0, std)."""
    generator = torch.Generator().manual_seed(1000 + seed)
    parts = form(Expert(geometry, rank), Expert(geometry, rank), Gate(geometry), scale)
    for module in (parts.shared, parts.task, parts.gate):
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return parts


def parameters(parts: Gated) -> dict[str, nn.Parameter]:
    """Every trainable tensor of a task's parts, by part and name."""
    modules = {"shared": parts.shared, "task": parts.task, "gate": parts.gate, "head": parts.head}
    return {f"{part}.{name}": p for part, m in modules.items() if m is not None for name, p in m.named_parameters()}


WORDS = (
    "the a an of to and is was it in I you we they this that movie phone service food price story battery screen "
    "great good fine lovely superb happy best love bad poor awful terrible sad worst hate boring positive negative "
    "yes no World Sports Business Science Answer: What is the sentiment? News about\n"
)


@cache
def _trained_tokenizer(vocab_size: int) -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "<s>", "</s>"],  # ids PAD, BOS, EOS
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([WORDS] * 4 + [f" {word}" for word in WORDS.split()] * 8, trainer)
    return tokenizer.to_str()


def tiny_tokenizer(vocab_size: int = 384) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on a few words: any text encodes, and decodes to itself. At least 259 tokens."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained_tokenizer(vocab_size)),
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
    )
