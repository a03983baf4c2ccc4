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

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moecl.nn.ffn import FFN
from moecl.nn.fused import Packed, few_dtype, is_few, mixture, plus, run_few
from moecl.nn.lora import Expert, Gate


@dataclass(frozen=True)
class Gated:
    """Form `gated`: a task's shared and own expert under a gate. `scale` is c = lora_alpha / rank."""

    shared: Expert
    task: Expert
    gate: Gate
    scale: float
    head: nn.Linear | None = None  # [labels, D]; None where the language model answers
    packs: dict[Hashable, Packed] = field(init=False, repr=False, compare=False, default_factory=dict)

    def keeping(self, packs: dict[Hashable, Packed]) -> "Gated":
        """The same parts, whose packed matrices are kept in `packs`, by who loaded them."""
        object.__setattr__(self, "packs", packs)
        return self

    @cached_property
    def frozen(self) -> bool:
        return not any(p.requires_grad for part in (self.shared, self.task, self.gate) for p in part.parameters())

    def packed(self, layer: int, projections: Sequence[str], dtype: torch.dtype, rank: int = 0) -> Packed:
        """The matrices of `layer` for the fast path, filled up to `rank`.

        What is frozen is packed once; what is being trained anew at each call, so that gradients reach it.
        """
        rank = max(rank, self.shared.rank, self.task.rank)
        if not self.frozen:
            return pack(self, layer, projections, dtype, rank)
        key = layer, dtype, rank
        if key not in self.packs:
            with torch.inference_mode(False), torch.no_grad():  # a later call may want gradients of its inputs
                self.packs[key] = pack(self, layer, projections, dtype, rank)
        return self.packs[key]


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
    packs: dict[int, Packed] = field(default_factory=dict)  # layer -> matrices of rows that differ

    def replay(self) -> "Call":
        """The call as seen by a recomputation under gradient checkpointing: same work, nothing handed back twice."""
        return replace(self, features=None if self.features is None else {}, gate_use=None)

    def spread(self, count: int) -> Tensor:
        """`rows` for a batch of `count`: beams of a row stand together."""
        assert self.rows is not None
        return self.rows.repeat_interleave(count // len(self.rows))

    def bare_rows(self, count: int) -> Tensor | None:
        """[count] bool: the rows that run the bare base; None where there are none."""
        if self.rows is None or None not in self.parts:
            return None
        return torch.tensor([parts is None for parts in self.parts], device=self.rows.device)[self.spread(count)]


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
        y = self.mix(x, call)
        if (bare := call.bare_rows(len(x))) is not None:  # bitwise the base, whatever its neighbours run
            y = torch.where(bare[:, None, None], self.original(hidden_states).view_as(y), y)
        return y.view_as(hidden_states)

    def mix(self, x: Tensor, call: Call) -> Tensor:
        fast = self.ffn.matrices is not None and not call.dropout and (call.rows is None or not torch.is_grad_enabled())
        return self.mix_fast(x, call) if fast else self.mix_plainly(x, call)

    def mix_fast(self, x: Tensor, call: Call) -> Tensor:
        """One autograd function for all of it (nn/fused.py); rows of different tasks without gradients only."""
        few = call.features is None and is_few(x)
        dtype = few_dtype(x.dtype, x.device) if few else x.dtype
        packed = packed_rows(call, self.layer, self.ffn.projections, x, dtype)
        if few:
            y, b = run_few(self.ffn, x, packed)
        else:
            y, b, m = mixture(self.ffn, x, packed, None if call.features is None else token_shares(call, x))
        if call.features is not None:
            A_s = packed.A_down.select(-3, 0)
            B_s = packed.B_down.narrow(-2, 0, A_s.shape[-2])
            call.features[self.layer] = plus(self.ffn.down(m), m @ A_s.mT, B_s)[:, 0]
        if call.gate_use is not None:
            call.gate_use[self.layer] = b[..., 1]
        return y

    def mix_plainly(self, x: Tensor, call: Call) -> Tensor:
        """Term by term under autograd: the readable form, and the one for dropout and mixed rows with gradients."""
        parts = layer_parts(call, self.layer, self.ffn.projections, x)
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
            shares = token_shares(call, x)
            m = shares @ h_s  # (B, 1, F)
            m_seen = m if seen_s is h_s else shares @ seen_s
            call.features[self.layer] = add_lora(self.ffn.down(m), m_seen, parts.shared["down_proj"], parts.scale)[:, 0]
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


def token_shares(call: Call, x: Tensor) -> Tensor:
    """[B, 1, T]: the share of each token in its row's mean."""
    assert call.attention_mask is not None, "features need the attention mask"
    real = call.attention_mask.to(x.dtype)
    return (real / real.sum(dim=1, keepdim=True))[:, None, :]


def pack_bytes(base: torch.dtype, device: torch.device) -> int:
    """What the packed copies of a number can come to."""
    return sum(dtype.itemsize for dtype in {base, few_dtype(base, device)})


def pack(parts: Gated, layer: int, projections: Sequence[str], dtype: torch.dtype, rank: int) -> Packed:
    """The matrices of a layer as the fast path reads them; lower ranks are filled up with zeros, which add nothing."""
    experts = parts.shared, parts.task
    pairs = [fill(_pair(expert, layer, name, dtype), rank) for name in projections for expert in experts]
    into, down = pairs[:-2], pairs[-2:]  # down_proj is the last
    c = parts.scale
    return Packed(
        torch.cat([torch.cat([lora_A for lora_A, _ in into]) * c, parts.gate.weight(layer).to(dtype)]),
        torch.stack([lora_B.mT for _, lora_B in into]),
        torch.stack([lora_A for lora_A, _ in down]) * c,
        torch.cat([lora_B for _, lora_B in down], dim=1).mT.contiguous(),
    )


def packed_rows(call: Call, layer: int, projections: Sequence[str], x: Tensor, dtype: torch.dtype) -> Packed:
    """The matrices of `layer` for this call: one set for all rows, or one a row."""
    if call.rows is None:
        parts = call.parts[0]
        assert parts is not None
        return parts.packed(layer, projections, dtype)
    found = call.packs.get(layer)
    if found is None or len(found.A_in) != len(x) or found.A_in.dtype != dtype:
        rank = max(max(parts.shared.rank, parts.task.rank) for parts in call.parts if parts is not None)
        own = [None if p is None else p.packed(layer, projections, dtype, rank) for p in call.parts]
        some = next(one for one in own if one is not None)
        found = Packed.stack([own[place] or some for place in call.spread(len(x)).tolist()])
        if x.shape[1] == 1:  # more steps of decoding will follow; a whole text comes once
            call.packs[layer] = found
    return found


def layer_parts(call: Call, layer: int, projections: Sequence[str], x: Tensor) -> LayerParts:
    """The tensors of `layer` for this call's rows, in x's dtype."""
    if call.rows is None:
        parts = call.parts[0]
        assert parts is not None
        return LayerParts(
            {name: _pair(parts.shared, layer, name, x.dtype) for name in projections},
            {name: _pair(parts.task, layer, name, x.dtype) for name in projections},
            parts.gate.weight(layer).to(x.dtype),
            parts.scale,
        )
    rows, some = call.spread(len(x)), next(parts for parts in call.parts if parts is not None)
    own = [some if parts is None else parts for parts in call.parts]
    return LayerParts(
        {name: _stacked([parts.shared for parts in own], layer, name, rows, x) for name in projections},
        {name: _stacked([parts.task for parts in own], layer, name, rows, x) for name in projections},
        torch.stack([parts.gate.weight(layer) for parts in own]).to(x.dtype)[rows],
        torch.tensor([parts.scale for parts in own], device=x.device, dtype=x.dtype)[rows, None, None],
    )


def _pair(expert: Expert, layer: int, projection: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    pair = expert.pair(layer, projection)
    return pair.lora_A.to(dtype), pair.lora_B.to(dtype)


def _stacked(experts: list[Expert], layer: int, projection: str, rows: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Pairs [B, r, in], [B, out, r]; experts of a lower rank are filled up with zeros, which add nothing."""
    pairs = [_pair(expert, layer, projection, x.dtype) for expert in experts]
    rank = max(expert.rank for expert in experts)
    filled = [fill(pair, rank) for pair in pairs]
    return torch.stack([lora_A for lora_A, _ in filled])[rows], torch.stack([lora_B for _, lora_B in filled])[rows]


def fill(pair: tuple[Tensor, Tensor], rank: int) -> tuple[Tensor, Tensor]:
    """A pair of at least `rank`: rows and columns of zeros add nothing."""
    lora_A, lora_B = pair
    if len(lora_A) == rank:
        return pair
    return F.pad(lora_A, (0, 0, 0, rank - len(lora_A))), F.pad(lora_B, (0, rank - lora_B.shape[1]))
