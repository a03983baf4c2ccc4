"""The mixture of a shared and a task expert in a frozen FFN: MoE-CL, https://arxiv.org/abs/2509.18133, eq. 3-8.

With c_s = c_t = lora_alpha / rank, experts s (shared) and t (task), and the gate b = softmax(G x):

    h_e = act(W_g x + c_e B_g^e A_g^e x) * (W_u x + c_e B_u^e A_u^e x)
    y   = W_d (b_s h_s + b_t h_t) + c_s B_d^s A_d^s (b_s h_s) + c_t B_d^t A_d^t (b_t h_t)

The weights are scalars per token and sum to 1, so the base's three GEMMs run once for both experts, exactly. A nested
task's expert adds to what the shared one adds: c_t B_g^t A_g^t becomes c_s B_g^s A_g^s + c_t B_g^t A_g^t, so for up and
down; and c_s = c_t / 2, as the gate lets the shared expert through whole and a new task's by half.
The discriminator reads p = mean(y_s) over real tokens; means commute with linear maps, so only the mean of h_s is
projected down: p = W_d m + bias + c_s B_d^s A_d^s m, m = mean(h_s).
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moecl.nn.call import Call, Parts, current_call, token_shares
from moecl.nn.ffn import FFN
from moecl.nn.fused import Packed, few_dtype, is_few, mixture, plus, run_few
from moecl.nn.lora import Expert, Gate
from moecl.nn.low_rank import add_lora, cast_pair, fill, moved, scaled, stacked


@dataclass(frozen=True)
class Gated(Parts):
    """Form `gated`: a task's shared and own expert under a gate. `scale` is c_t = lora_alpha / rank."""

    form: ClassVar[str] = "gated"
    nested: ClassVar[bool] = False  # whether the task's expert adds to what the shared one adds
    needs: ClassVar[frozenset[str]] = frozenset({"shared", "task", "gate"})
    shared: Expert
    task: Expert
    gate: Gate
    scale: float
    head: nn.Linear | None = None
    packs: dict[Hashable, Packed] = field(init=False, repr=False, compare=False, default_factory=dict)

    def keeping(self, packs: dict[Hashable, Packed]) -> "Gated":
        """The same parts, whose packed matrices are kept in `packs`, by who loaded them."""
        object.__setattr__(self, "packs", packs)
        return self

    def modules(self) -> dict[str, nn.Module]:
        return self.with_head({"shared": self.shared, "task": self.task, "gate": self.gate})

    @classmethod
    def build(cls, modules: dict[str, Any], settings: Mapping[str, Any]) -> "Gated":
        return cls(scale=float(settings["scale"]), **modules)

    @property
    def shared_scale(self) -> float:
        """c_s"""
        return self.scale / 2 if self.nested else self.scale

    @staticmethod
    def run(ffn: FFN, layer: int, x: Tensor, call: Call) -> Tensor:
        return mix(ffn, layer, x, call)

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


@dataclass(frozen=True)
class Nested(Gated):
    """Form `nested`: a gate decides for each token how much of its own a task adds to the shared expert.

    Beyond the paper, whose task expert stands beside the shared one: a fresh one then halves what the shared one knows.
    """

    form: ClassVar[str] = "nested"
    nested: ClassVar[bool] = True


@dataclass(frozen=True)
class LayerParts:
    """One layer's tensors for the rows of a call, with a leading [B] where rows differ.

    Pairs are (lora_A [.., r, in], lora_B [.., out, r]); gate [.., 2, D]; scales are numbers or [B, 1, 1].
    """

    shared: dict[str, tuple[Tensor, Tensor]]
    task: dict[str, tuple[Tensor, Tensor]]
    gate: Tensor
    shared_scale: float | Tensor
    scale: float | Tensor
    nested: bool


class MoEFFN:
    """Stands in for one FFN's forward: hidden_states [B, T, D] (or flattened to [B * T, D]) -> the same shape."""

    def __init__(self, ffn: FFN, original: Callable[[Tensor], Tensor], layer: int) -> None:
        self.ffn, self.original, self.layer = ffn, original, layer

    def __call__(self, hidden_states: Tensor) -> Tensor:
        call = current_call()
        if call is None or all(parts is None for parts in call.parts):
            return self.original(hidden_states)
        x = hidden_states
        if x.dim() == 2:
            x = x.view(call.batch_size, -1, x.shape[-1])
        y = self.run(x, call)
        if (bare := call.bare_rows(len(x))) is not None:  # bitwise the base, whatever its neighbours run
            y = torch.where(bare[:, None, None], self.original(hidden_states).view_as(y), y)
        return y.view_as(hidden_states)

    def run(self, x: Tensor, call: Call) -> Tensor:
        """Each row with its form. Rows of several forms are run form by form."""
        forms = list({type(parts): None for parts in call.parts if parts is not None})
        if len(forms) == 1:
            return forms[0].run(self.ffn, self.layer, x, call)
        y = torch.zeros_like(x)
        for form in forms:
            chosen, some = call.only(len(x), lambda parts, form=form: type(parts) is form, form)  # type: ignore[misc]
            if len(chosen):  # a part of the batch may have no row of this form
                y[chosen] = form.run(self.ffn, self.layer, x[chosen], some)
        return y


def mix(ffn: FFN, layer: int, x: Tensor, call: Call) -> Tensor:
    fast = ffn.matrices is not None and not call.dropout and (call.rows is None or not torch.is_grad_enabled())
    return mix_fast(ffn, layer, x, call) if fast else mix_plainly(ffn, layer, x, call)


def mix_fast(ffn: FFN, layer: int, x: Tensor, call: Call) -> Tensor:
    """One autograd function for all of it (nn/fused.py); rows of different tasks without gradients only."""
    few = call.features is None and is_few(x)
    dtype = few_dtype(x.dtype, x.device) if few else x.dtype
    packed = packed_rows(call, layer, ffn.projections, x, dtype)
    if few:
        y, b = run_few(ffn, x, packed)
    else:
        y, b, m = mixture(ffn, x, packed, None if call.features is None else token_shares(call, x))
    if call.features is not None:
        A_s = packed.A_down.select(-3, 0)
        B_s = packed.B_down.narrow(-2, 0, A_s.shape[-2])
        call.features[layer] = plus(ffn.down(m), m @ A_s.mT, B_s)[:, 0]
    if call.gate_use is not None:
        call.gate_use[layer] = b[..., 1]
    return y


def mix_plainly(ffn: FFN, layer: int, x: Tensor, call: Call) -> Tensor:
    """Term by term under autograd: the readable form, and the one for dropout and mixed rows with gradients."""
    parts = layer_parts(call, layer, ffn.projections, x)
    gate, up = ffn.project(x)  # (B, T, F)
    seen = F.dropout(x, call.dropout) if call.dropout else x
    shared = moved(gate, up, seen, parts.shared, parts.shared_scale)
    task = moved(*(shared if parts.nested else (gate, up)), seen, parts.task, parts.scale)
    h_s, h_t = ffn.hidden(*shared), ffn.hidden(*task)  # (B, T, F)
    precise = torch.promote_types(x.dtype, torch.float32)
    b = torch.softmax(x @ parts.gate.mT, dim=-1, dtype=precise).to(x.dtype)  # (B, T, 2)
    b_s, b_t = b[..., :1], b[..., 1:]
    keep = F.dropout(torch.ones_like(h_s), call.dropout) if call.dropout else None
    seen_s, seen_t = (h_s, h_t) if keep is None else (h_s * keep, h_t * keep)
    y = ffn.down(torch.lerp(h_s, h_t, b_t))  # (B, T, D)
    if parts.nested:
        y = add_lora(y, torch.lerp(seen_s, seen_t, b_t), parts.shared["down_proj"], parts.shared_scale)
    else:
        y = add_lora(y, seen_s, parts.shared["down_proj"], b_s * parts.shared_scale)
    y = add_lora(y, seen_t, parts.task["down_proj"], b_t * parts.scale)
    if call.features is not None:
        shares = token_shares(call, x)
        m = shares @ h_s  # (B, 1, F)
        m_seen = m if seen_s is h_s else shares @ seen_s
        call.features[layer] = add_lora(ffn.down(m), m_seen, parts.shared["down_proj"], parts.shared_scale)[:, 0]
    if call.gate_use is not None:
        call.gate_use[layer] = b_t.detach()[..., 0]
    return y


def pack_bytes(base: torch.dtype, device: torch.device) -> int:
    """What the packed copies of a number can come to."""
    return sum(dtype.itemsize for dtype in {base, few_dtype(base, device)})


def pack(parts: Gated, layer: int, projections: Sequence[str], dtype: torch.dtype, rank: int) -> Packed:
    """The matrices of a layer as the fast path reads them; lower ranks are filled up with zeros, which add nothing."""
    experts = (parts.shared, parts.shared_scale), (parts.task, parts.scale)
    pairs = [
        scaled(fill(cast_pair(expert, layer, name, dtype), rank), c) for name in projections for expert, c in experts
    ]
    into, down = pairs[:-2], pairs[-2:]  # down_proj is the last
    return Packed(
        torch.cat([*(lora_A for lora_A, _ in into), parts.gate.weight(layer).to(dtype)]),
        torch.stack([lora_B.mT for _, lora_B in into]),
        torch.stack([lora_A for lora_A, _ in down]),
        torch.cat([lora_B for _, lora_B in down], dim=1).mT.contiguous(),
        parts.nested,
    )


def experts(call: Call) -> list[Gated]:
    """The parts of a call whose rows are all gated; where a part is the bare base another one's, which is not used."""
    some = next(parts for parts in call.parts if isinstance(parts, Gated))
    return [parts if isinstance(parts, Gated) else some for parts in call.parts]


def packed_rows(call: Call, layer: int, projections: Sequence[str], x: Tensor, dtype: torch.dtype) -> Packed:
    """The matrices of `layer` for this call: one set for all rows, or one a row."""
    if call.rows is None:
        [parts] = experts(call)
        return parts.packed(layer, projections, dtype)
    found = call.packs.get(layer)
    if found is None or len(found.A_in) != len(x) or found.A_in.dtype != dtype:
        own = experts(call)
        rank = max(max(parts.shared.rank, parts.task.rank) for parts in own)
        packed = [parts.packed(layer, projections, dtype, rank) for parts in own]
        found = Packed.stack([packed[place] for place in call.spread(len(x)).tolist()])
        if x.shape[1] == 1:  # more steps of decoding will follow; a whole text comes once
            call.packs[layer] = found
    return found


def layer_parts(call: Call, layer: int, projections: Sequence[str], x: Tensor) -> LayerParts:
    """The tensors of `layer` for this call's rows, in x's dtype."""
    if call.rows is None:
        [parts] = experts(call)
        return LayerParts(
            {name: cast_pair(parts.shared, layer, name, x.dtype) for name in projections},
            {name: cast_pair(parts.task, layer, name, x.dtype) for name in projections},
            parts.gate.weight(layer).to(x.dtype),
            parts.shared_scale,
            parts.scale,
            parts.nested,
        )
    rows, own = call.spread(len(x)), experts(call)

    def scales(of_each: list[float]) -> Tensor:
        return torch.tensor(of_each, device=x.device, dtype=x.dtype)[rows, None, None]

    return LayerParts(
        {name: stacked([parts.shared for parts in own], layer, name, rows, x) for name in projections},
        {name: stacked([parts.task for parts in own], layer, name, rows, x) for name in projections},
        torch.stack([parts.gate.weight(layer) for parts in own]).to(x.dtype)[rows],
        scales([parts.shared_scale for parts in own]),
        scales([parts.scale for parts in own]),
        own[0].nested,
    )
