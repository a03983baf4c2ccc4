"""The mixture of a shared and a task expert in a frozen FFN: MoE-CL, https://arxiv.org/abs/2509.18133, eq. 3-8.

With c = lora_alpha / rank, experts s (shared) and t (task), and the gate b = softmax(G x):

    h_e = act(W_g x + c B_g^e A_g^e x) * (W_u x + c B_u^e A_u^e x)
    y   = W_d (b_s h_s + b_t h_t) + c B_d^s A_d^s (b_s h_s) + c B_d^t A_d^t (b_t h_t)

The weights are scalars per token and sum to 1, so the base's three GEMMs run once for both experts, exactly.
The discriminator reads p = mean(y_s) over real tokens; means commute with linear maps, so only the mean of h_s is
projected down: p = W_d m + bias + c B_d^s A_d^s m, m = mean(h_s).

The module tree of the base is left alone: an FFN's `forward` is replaced by a `MoEFFN`, and what a row is to be
run with comes from the `Call` of the model call under way. There is no active task to forget to reset.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moecl.nn.lora import Expert, Gate


@dataclass(frozen=True)
class Gated:
    """Form `gated`: a task's shared and own expert under a gate. `scale` is c = lora_alpha / rank."""

    shared: Expert
    task: Expert
    gate: Gate
    scale: float
    head: nn.Linear | None = None  # [labels, D]; None where the language model answers


@dataclass
class Call:
    """What one call of the base runs with: which parts for which row, and what to hand back.

    `rows: [B]` indexes `parts`; None gives every row `parts[0]`. A part of None is the bare base.
    """

    parts: tuple[Gated | None, ...]
    rows: Tensor | None = None
    attention_mask: Tensor | None = None  # [B, T], 1 where a token is real; needed for `features`
    answers: Tensor | None = None  # [B, T] bool: the positions that reach the language-model head
    prefix: Tensor | None = None  # [B, T, D], what enters the first adapted layer: those below it are not run
    features: dict[int, Tensor] | None = None  # if given: layer -> p [B, D], the discriminator's input
    gate_use: dict[int, Tensor] | None = None  # if given: layer -> task expert's weight [B, T]
    dropout: float = 0.0
    batch_size: int = 0  # rows of the forward under way, beams included; set by the base's first layer
    cache: dict[int, "LayerParts"] = field(default_factory=dict)  # only without gradients

    def replay(self) -> "Call":
        """The call as seen by a recomputation under gradient checkpointing: same work, nothing handed back twice."""
        return replace(self, features=None if self.features is None else {}, gate_use=None, cache={})


_current: ContextVar[Call | None] = ContextVar("moecl_call", default=None)


def current_call() -> Call | None:
    return _current.get()


@contextmanager
def run_with(call: Call | None) -> Iterator[None]:
    token = _current.set(call)
    try:
        yield
    finally:
        _current.reset(token)


@dataclass(frozen=True)
class LayerParts:
    """One layer's tensors for the rows of a call, with a leading [B] where rows differ.

    Pairs are (lora_A [.., r, in], lora_B [.., out, r]); gate [.., 2, D]; scale a number or [B, 1, 1].
    """

    shared: dict[str, tuple[Tensor, Tensor]]
    task: dict[str, tuple[Tensor, Tensor]]
    gate: Tensor
    scale: float | Tensor
    base_rows: Tensor | None = None  # [B] bool: rows that run the bare base


@dataclass(frozen=True)
class FFN:
    """The frozen base FFN taken apart: `x -> (gate or None, up)`, activation, `h -> y` (bias included)."""

    project: Callable[[Tensor], tuple[Tensor | None, Tensor]]
    activation: Callable[[Tensor], Tensor]
    down: Callable[[Tensor], Tensor]
    projections: tuple[str, ...]
    fused: bool = False  # the base projects gate and up with one matrix

    def __call__(self, x: Tensor) -> Tensor:
        return self.down(self.hidden(*self.project(x)))

    def hidden(self, gate: Tensor | None, up: Tensor) -> Tensor:
        if gate is None:
            return self.activation(up)
        if self.fused:  # side by side as in the base: how an activation rounds depends on the memory layout
            gate, up = torch.cat((gate, up), dim=-1).chunk(2, dim=-1)
        return self.activation(gate) * up


def add_lora(y: Tensor, x: Tensor, pair: tuple[Tensor, Tensor], scale: float | Tensor) -> Tensor:
    """`y + c B A x` for y [B, T, out], x [B, T, in]; one pair for all rows or one a row.

    `scale` may be [B, T, 1]: what weighs x can as well weigh A x, where a token is r numbers. The sum is formed by the
    product itself, not in another pass over y.
    """
    lora_A, lora_B = pair
    low = x @ lora_A.mT * scale  # (B, T, r)
    if lora_B.dim() == 2:
        return torch.addmm(y.flatten(0, 1), low.flatten(0, 1), lora_B.mT).view_as(y)
    return torch.baddbmm(y, low, lora_B.mT)


class MoEFFN:
    """Stands in for one FFN's forward: hidden_states [B, T, D] (or flattened to [B * T, D]) -> the same shape."""

    def __init__(self, ffn: FFN, original: Callable[[Tensor], Tensor], layer: int) -> None:
        self.ffn, self.original, self.layer = ffn, original, layer

    def __call__(self, hidden_states: Tensor) -> Tensor:
        call = _current.get()
        if call is None or all(parts is None for parts in call.parts):
            return self.original(hidden_states)
        x = hidden_states
        if x.dim() == 2:
            x = x.view(call.batch_size, -1, x.shape[-1])
        parts = layer_parts(call, self.layer, self.ffn.projections, x)
        y = self.mix(x, parts, call)
        if parts.base_rows is not None:  # bitwise the base, whatever its neighbours run
            y = torch.where(parts.base_rows[:, None, None], self.original(hidden_states).view_as(y), y)
        return y.view_as(hidden_states)

    def mix(self, x: Tensor, parts: LayerParts, call: Call) -> Tensor:
        gate, up = self.ffn.project(x)  # (B, T, F)
        seen = F.dropout(x, call.dropout) if call.dropout else x
        h_s = self.hidden(gate, up, seen, parts.shared, parts.scale)  # (B, T, F)
        h_t = self.hidden(gate, up, seen, parts.task, parts.scale)  # (B, T, F)
        precise = torch.promote_types(x.dtype, torch.float32)
        b = torch.softmax(x @ parts.gate.mT, dim=-1, dtype=precise).to(x.dtype)  # (B, T, 2)
        b_s, b_t = b[..., :1], b[..., 1:]
        keep = F.dropout(torch.ones_like(h_s), call.dropout) if call.dropout else None
        seen_s, seen_t = (h_s, h_t) if keep is None else (h_s * keep, h_t * keep)
        y = self.ffn.down(torch.lerp(h_s, h_t, b_t))  # (B, T, D)
        y = add_lora(y, seen_s, parts.shared["down_proj"], b_s * parts.scale)
        y = add_lora(y, seen_t, parts.task["down_proj"], b_t * parts.scale)
        if call.features is not None:
            call.features[self.layer] = self.pooled(h_s, seen_s, parts, call)
        if call.gate_use is not None:
            call.gate_use[self.layer] = b_t.detach()[..., 0]
        return y

    def hidden(
        self,
        gate: Tensor | None,
        up: Tensor,
        x: Tensor,
        pairs: dict[str, tuple[Tensor, Tensor]],
        scale: float | Tensor,
    ) -> Tensor:
        if gate is not None:
            gate = add_lora(gate, x, pairs["gate_proj"], scale)
        return self.ffn.hidden(gate, add_lora(up, x, pairs["up_proj"], scale))

    def pooled(self, h_s: Tensor, seen_s: Tensor, parts: LayerParts, call: Call) -> Tensor:
        """p [B, D]: the mean over real tokens of the shared expert's output, never formed per token."""
        assert call.attention_mask is not None, "features need the attention mask"
        real = call.attention_mask.to(h_s.dtype)
        weights = (real / real.sum(dim=1, keepdim=True))[:, None, :]  # (B, 1, T)
        m = weights @ h_s  # (B, 1, F)
        m_seen = m if seen_s is h_s else weights @ seen_s
        return add_lora(self.ffn.down(m), m_seen, parts.shared["down_proj"], parts.scale)[:, 0]


def layer_parts(call: Call, layer: int, projections: tuple[str, ...], x: Tensor) -> LayerParts:
    """The tensors of `layer` for this call's rows, in x's dtype."""
    if torch.is_grad_enabled():
        return _layer_parts(call, layer, projections, x)
    found = call.cache.get(layer)
    if found is None or (call.rows is not None and found.gate.shape[0] != x.shape[0]):
        found = call.cache[layer] = _layer_parts(call, layer, projections, x)
    return found


def _layer_parts(call: Call, layer: int, projections: tuple[str, ...], x: Tensor) -> LayerParts:
    if call.rows is None:
        parts = call.parts[0]
        assert parts is not None
        return LayerParts(
            {name: _pair(parts.shared, layer, name, x) for name in projections},
            {name: _pair(parts.task, layer, name, x) for name in projections},
            parts.gate.weight(layer).to(x.dtype),
            parts.scale,
        )
    rows = call.rows.repeat_interleave(x.shape[0] // call.rows.shape[0])  # beams of a row stand together
    filled = [parts for parts in call.parts if parts is not None]
    stand_in = [parts if parts is not None else filled[0] for parts in call.parts]
    missing = torch.tensor([parts is None for parts in call.parts], device=x.device)
    return LayerParts(
        {name: _stacked([parts.shared for parts in stand_in], layer, name, rows, x) for name in projections},
        {name: _stacked([parts.task for parts in stand_in], layer, name, rows, x) for name in projections},
        torch.stack([parts.gate.weight(layer) for parts in stand_in]).to(x.dtype)[rows],
        torch.tensor([parts.scale for parts in stand_in], device=x.device, dtype=x.dtype)[rows, None, None],
        missing[rows] if len(filled) < len(call.parts) else None,
    )


def _pair(expert: Expert, layer: int, projection: str, x: Tensor) -> tuple[Tensor, Tensor]:
    pair = expert.pair(layer, projection)
    return pair.lora_A.to(x.dtype), pair.lora_B.to(x.dtype)


def _stacked(experts: list[Expert], layer: int, projection: str, rows: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Pairs [B, r, in], [B, out, r]; experts of a lower rank are filled up with zeros, which add nothing."""
    pairs = [_pair(expert, layer, projection, x) for expert in experts]
    rank = max(expert.rank for expert in experts)
    lora_A = torch.stack([F.pad(a, (0, 0, 0, rank - a.shape[0])) for a, _ in pairs])
    lora_B = torch.stack([F.pad(b, (0, rank - b.shape[1])) for _, b in pairs])
    return lora_A[rows], lora_B[rows]
