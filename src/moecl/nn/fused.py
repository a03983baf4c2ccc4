"""The mixture as one autograd function: what `moe_ffn` computes term by term, with less saved and nothing done twice.

For backward it keeps, per token, x [D], the base's gate and up [F each], the rank-r products and the two weights; the
activations of both experts are made again from these. With t_e = dy W_d + dy B_d^e A_d^e, the gradient of b_e h_e:

    db_e = <t_e, h_e>      dh_e = b_e t_e      du_e = dh_e a_e      dg_e = act'(g_e) dh_e u_e
    dx   = (dg_s + dg_t) W_g + (du_s + du_t) W_u + [dg_e B_g^e, du_e B_u^e, d logits] A_in

so backward has three base GEMMs, as forward has. Matrices lie as the products read them fastest: lora_A as [r, in],
lora_B transposed as [r, out]; c = lora_alpha / r is multiplied into lora_A.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moecl.nn.ffn import FFN

BLOCK_BYTES = 8 << 20  # of one [tokens, F] intermediate on a CPU: in the caches, and below malloc's mmap threshold


@dataclass(frozen=True)
class Packed:
    """One layer's matrices as the function reads them, with a leading [B] where rows differ.

    The P projections into the FFN are (gate, up) or (up,); experts come in the order (shared, task).
    """

    A_in: Tensor  # [.., 2 P r + 2, D]: c lora_A of each expert's projections, then the gate's rows
    B_in: tuple[Tensor, ...]  # [.., r, F] each: lora_B' of each expert's projections
    A_down: tuple[Tensor, Tensor]  # [.., r, F] each: c lora_A
    B_down: Tensor  # [.., 2 r, D]

    @classmethod
    def stack(cls, rows: Sequence["Packed"]) -> "Packed":
        """One set of matrices a row."""
        return cls(
            torch.stack([one.A_in for one in rows]),
            tuple(torch.stack(B) for B in zip(*(one.B_in for one in rows), strict=True)),
            (torch.stack([one.A_down[0] for one in rows]), torch.stack([one.A_down[1] for one in rows])),
            torch.stack([one.B_down for one in rows]),
        )


@dataclass(frozen=True)
class Pass:
    """What a forward leaves; `low` are x's rank-r products by expert and projection, the last the gate's logits."""

    y: Tensor  # [B, T, D]
    b: Tensor  # [B, T, 2]
    m: Tensor  # [B, 1, F], the mean of h_s; [0, 1, F] where none is wanted
    pre: tuple[Tensor, ...]  # [B, T, F] each: the base's projections
    low: Tensor  # [B, T, 2 P r + 2]
    low_d: Tensor  # [B, T, 2 r], weighted


def mixture(ffn: FFN, x: Tensor, packed: Packed, real: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """x [B, T, D] -> y [B, T, D], weights b [B, T, 2] (constants to autograd), m [B, 1, F].

    real [B, 1, T] holds each token's share in m, the mean of h_s; None where none is wanted.
    """
    if not torch.is_grad_enabled():
        found = run(ffn, x, packed, real)
        return found.y, found.b, found.m
    matrices = (packed.A_in, *packed.A_down, packed.B_down, *packed.B_in)
    y, b, m = _Mixture.apply(ffn, real, x, *matrices)  # type: ignore[no-untyped-call]
    return y, b, m


def run(ffn: FFN, x: Tensor, packed: Packed, real: Tensor | None) -> Pass:
    pre = tuple(one for one in ffn.project(x) if one is not None)
    low = x @ packed.A_in.mT
    precise = torch.promote_types(x.dtype, torch.float32)
    b = torch.softmax(low[..., -2:], dim=-1, dtype=precise).to(x.dtype)
    low_d = x.new_empty(*x.shape[:2], packed.B_down.shape[-2])
    h, m = torch.empty_like(pre[-1]), x.new_empty(len(x) if real is not None else 0, 1, pre[-1].shape[-1])
    lows = split(low, packed.B_in)
    for rows in blocks(h):
        z_s, z_t = (moved(pre, lows, packed.B_in, expert, rows) for expert in (0, 1))
        h_s, h_t = (ffn.hidden(z[0] if len(z) > 1 else None, z[-1]) for z in (z_s, z_t))
        low_d[rows] = torch.cat([h_s @ of(packed.A_down[0], rows).mT, h_t @ of(packed.A_down[1], rows).mT], dim=-1)
        torch.lerp(h_s, h_t, b[rows, :, 1:], out=h[rows])
        if real is not None:
            m[rows] = real[rows] @ h_s
    low_d *= spread(b, low_d)
    return Pass(plus(ffn.down(h), low_d, packed.B_down), b, m, pre, low, low_d)


class _Mixture(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, ffn: FFN, real: Tensor | None, x: Tensor, A_in: Tensor, A_s: Tensor, A_t: Tensor, B_d: Tensor, *B_in
    ) -> tuple[Tensor, Tensor, Tensor]:
        done = run(ffn, x, Packed(A_in, B_in, (A_s, A_t), B_d), real)
        ctx.ffn, ctx.real, ctx.width = ffn, real, len(done.pre)
        ctx.save_for_backward(x, done.low, done.low_d, done.b, A_in, A_s, A_t, B_d, *B_in, *done.pre)
        ctx.mark_non_differentiable(done.b)
        return done.y, done.b, done.m

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor, _: Tensor, dm: Tensor) -> tuple[Any, ...]:  # type: ignore[no-untyped-def]
        x, low, low_d, b, A_in, A_s, A_t, B_d, *rest = ctx.saved_tensors
        B_in, pre = rest[: -ctx.width], rest[-ctx.width :]
        *W_in, W_d = ctx.ffn.matrices()
        dh, dlow_d = dy @ W_d, dy @ B_d.mT  # (B, T, F), (B, T, 2 r)
        dlow, db = torch.empty_like(low), torch.empty_like(b[..., 0])
        lows, dlows, dlow_ds = split(low, B_in), split(dlow, B_in), dlow_d.chunk(2, dim=-1)
        dpre = [torch.empty_like(one) for one in pre]
        dA, dB = [torch.zeros_like(A_s), torch.zeros_like(A_t)], [torch.zeros_like(B) for B in B_in]
        for rows in blocks(dh):
            products = []
            for expert, A_e in enumerate((A_s, A_t)):
                h_e, through = activate(ctx.ffn, moved(pre, lows, B_in, expert, rows))
                t = plus(dh[rows], dlow_ds[expert][rows], A_e)
                weight = b[rows, :, expert, None]
                dA[expert] += outer(dlow_ds[expert][rows] * weight, h_e)
                products.append(h_e.mul_(t))
                dh_e = t.mul_(weight)
                if expert == 0 and ctx.real is not None:
                    dh_e.baddbmm_(ctx.real[rows].mT, dm[rows])
                for place, grad in enumerate(through(dh_e)):
                    at = expert * len(pre) + place
                    dB[at] += outer(lows[at][rows], grad)
                    dlows[at][rows] = grad @ B_in[at].mT
                    dpre[place][rows] = grad if expert == 0 else grad.add_(dpre[place][rows])
            db[rows] = products[1].sub_(products[0]).sum(dim=-1)
        dlogit = b[..., 0] * b[..., 1] * db
        dlow[..., -2:] = torch.stack((-dlogit, dlogit), dim=-1)
        dx = None
        if ctx.needs_input_grad[2]:
            dx = dlow @ A_in
            for grad, W in zip(dpre, W_in, strict=True):
                dx.flatten(0, 1).addmm_(grad.flatten(0, 1), W)
        return None, None, dx, outer(dlow, x), *dA, outer(low_d, dy), *dB


def activate(ffn: FFN, z: list[Tensor]) -> tuple[Tensor, Callable[[Tensor], list[Tensor]]]:
    """h of an expert's projections z, and what takes dh to dz, once: it works in the memory of both."""
    with torch.enable_grad():
        a = ffn.activation(z[0].requires_grad_())
    value = a.detach()

    def through(dh: Tensor) -> list[Tensor]:
        if len(z) == 1:
            return list(torch.autograd.grad(a, z[0], dh))
        return [*torch.autograd.grad(a, z[0], z[1].mul_(dh)), dh.mul_(value)]

    return value.clone() if len(z) == 1 else value * z[1], through


def moved(
    pre: Sequence[Tensor], lows: Sequence[Tensor], B_in: Sequence[Tensor], expert: int, rows: slice
) -> list[Tensor]:
    """An expert's projections: the base's, moved by its LoRAs."""
    first = expert * len(pre)
    return [plus(one[rows], lows[at][rows], of(B_in[at], rows)) for at, one in enumerate(pre, first)]


def blocks(h: Tensor) -> Iterator[slice]:
    """Rows of [B, T, F] by as many as make a block: all at once on a GPU, where a launch costs more than a pass."""
    size = len(h)
    if h.device.type == "cpu":
        size = max(1, BLOCK_BYTES // max(1, h[0].numel() * h.element_size()))
    for start in range(0, len(h), size):
        yield slice(start, start + size)


def split(low: Tensor, B_in: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Rank-r products by expert and projection, without the gate's logits behind them."""
    return torch.split(low, [*(B.shape[-2] for B in B_in), 2], dim=-1)[:-1]


def of(matrix: Tensor, rows: slice) -> Tensor:
    return matrix if matrix.dim() == 2 else matrix[rows]


def plus(y: Tensor, low: Tensor, B: Tensor) -> Tensor:
    """`y + low B` for y [B, T, out], low [B, T, r], B [r, out], or [B, r, out] where rows differ."""
    if B.dim() == 3:
        return torch.baddbmm(y, low, B)
    return torch.addmm(y.flatten(0, 1), low.flatten(0, 1), B).view_as(y)


def outer(low: Tensor, y: Tensor) -> Tensor:
    """`low' y`, summed over tokens: [r, out]."""
    return low.flatten(0, 1).mT @ y.flatten(0, 1)


def spread(b: Tensor, low_d: Tensor) -> Tensor:
    """The weights [B, T, 2] over each expert's half of [B, T, 2 r]."""
    return b.repeat_interleave(low_d.shape[-1] // 2, dim=-1)
