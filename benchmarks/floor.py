"""The counted floor of a training step: operations and bytes that no implementation can do without.

Counted for a frozen base with LoRA of rank r on its FFNs' projections. Every base GEMM runs once forward and once
backward (for the gradient of its input; the weights are frozen), below the first expert forward only. A [tokens, F]
tensor is written and read where a GEMM makes or takes it; what is done element by element is taken as done on the way.
"""

import time
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from moecl.nn.inject import decoder_layers

FORWARD_WIDE, BACKWARD_WIDE = (
    6,
    8,
)  # [tokens, F]: gate, up, h written and read; dh, d gate, d up too, gate, up read again
FORWARD_NARROW, BACKWARD_NARROW = 2, 3  # [tokens, D]: x read, y written; dy and x read, dx written
LORA_BACKWARD = 2  # products backward for one forward


@dataclass(frozen=True)
class Work:
    """What one batch asks of a base. Products count multiply-adds of one token."""

    rows: int
    length: int
    answers: int  # tokens that reach the head
    layers: int
    attention: int  # products of one layer's attention projections
    queries: int  # width of the queries
    hidden_size: int  # D
    intermediate_size: int  # F
    head: int  # products of the head

    @property
    def tokens(self) -> int:
        return self.rows * self.length

    @property
    def ffn(self) -> int:
        return 3 * self.hidden_size * self.intermediate_size


def work_of(base: PreTrainedModel, rows: int, length: int, answers: int) -> Work:
    layers: Any = decoder_layers(base)
    head: Any = base.get_output_embeddings()  # type: ignore[no-untyped-call]
    mlp, attention = layers[0].mlp, layers[0].self_attn
    wide, narrow = mlp.up_proj.weight.shape
    return Work(
        rows,
        length,
        answers,
        len(layers),
        sum(module.weight.numel() for module in attention.modules() if isinstance(module, nn.Linear)),
        attention.q_proj.weight.shape[0],
        narrow,
        wide,
        head.weight.numel(),
    )


def forward_flops(work: Work, ffn: float = 1.0) -> int:
    """Of the base; `ffn`: how often each of an FFN's GEMMs runs."""
    scores = work.length * work.queries  # both products of causal attention: half of 2 T a query and channel
    a_token = work.layers * (work.attention + scores + ffn * work.ffn)
    return int(2 * (work.tokens * a_token + work.answers * work.head))


def backward_flops(work: Work, ffn: float = 1.0) -> int:
    """Of the base, for the gradients of inputs. Nothing is wanted below the first layer's gate and up."""
    scores = 2 * work.length * work.queries
    whole = (work.layers - 1) * (work.attention + scores + ffn * work.ffn) + ffn * work.ffn / 3
    return int(2 * (work.tokens * whole + work.answers * work.head))


def lora_flops(work: Work, rank: int, experts: int) -> int:
    """Forward and backward of `experts` LoRA pairs on the three projections."""
    a_layer = 3 * rank * (work.hidden_size + work.intermediate_size)
    return 2 * (1 + LORA_BACKWARD) * work.tokens * work.layers * experts * a_layer


def mixture_flops(work: Work) -> int:
    """The gate's two rows, and the discriminator's input, which is projected down once a row of the batch."""
    gate = 2 * work.tokens * 2 * work.hidden_size
    pooled = work.rows * work.hidden_size * work.intermediate_size + work.tokens * work.intermediate_size
    return 2 * work.layers * (gate // 2 * (1 + LORA_BACKWARD) + pooled * 2)


def moved_bytes(work: Work, size: int) -> int:
    """Of [tokens, F] and [tokens, D] tensors in the FFNs, forward and backward; `size` bytes a number."""
    wide = (FORWARD_WIDE + BACKWARD_WIDE) * work.intermediate_size
    narrow = (FORWARD_NARROW + BACKWARD_NARROW) * work.hidden_size
    return size * work.tokens * work.layers * (wide + narrow)


def floor(work: Work, rank: int, size: int) -> dict[str, Any]:
    """FLOPs of each side, and bytes, which are the same for one expert and for two that are formed together."""
    base = forward_flops(work) + backward_flops(work)
    return {
        "forward_flops": forward_flops(work),
        "base_flops": {
            "moecl": base,
            "peft": base,
            "published": forward_flops(work, 4 / 3) + backward_flops(work, 4 / 3),
            "reference": forward_flops(work, 2) + backward_flops(work, 2),
        },
        "lora_flops": {"moecl": lora_flops(work, rank, 2) + mixture_flops(work), "peft": lora_flops(work, rank, 1)},
        "ffn_bytes": moved_bytes(work, size),
    }


def rates(work: Work, dtype: torch.dtype, times: int = 5) -> dict[str, float]:
    """What this machine does a second: FLOPs of the up projection's GEMM, bytes of a copy (read and written)."""
    x = torch.randn(work.tokens, work.hidden_size).to(dtype)
    weight = torch.randn(work.intermediate_size, work.hidden_size).to(dtype)
    source = torch.randn(work.tokens, work.intermediate_size).to(dtype)
    copied = torch.empty_like(source)
    gemm, copy = [], []
    for _ in range(times + 1):
        begun = time.perf_counter()
        F.linear(x, weight)
        between = time.perf_counter()
        copied.copy_(source)
        gemm.append(between - begun)
        copy.append(time.perf_counter() - between)
    flops, moved = 2 * x.numel() * work.intermediate_size, 2 * source.numel() * source.element_size()
    return {"flops_a_second": flops / median(gemm[1:]), "bytes_a_second": moved / median(copy[1:])}


def seconds(found: dict[str, Any], rate: dict[str, float], side: str) -> float:
    """The floor of a side's step at this machine's rates."""
    flops = found["base_flops"][side] + found["lora_flops"][side]
    return float(flops / rate["flops_a_second"] + found["ffn_bytes"] / rate["bytes_a_second"])
