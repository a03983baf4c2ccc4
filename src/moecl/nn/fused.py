"""The mixture as one autograd function: what `moe_ffn` computes term by term, with less saved and nothing done twice.

For backward it keeps, per token, x [D], the base's gate and up [F each], the rank-r products and the two weights; the
activations of both experts are made again from these. With t_e = dy W_d + dy B_d^e A_d^e, the gradient of b_e h_e:

    db_e = <t_e, h_e>      dh_e = b_e t_e      du_e = dh_e a_e      dg_e = act'(g_e) dh_e u_e
    dx   = (dg_s + dg_t) W_g + (du_s + du_t) W_u + [dg_e B_g^e, du_e B_u^e, d logits] A_in

so backward has three base GEMMs, as forward has. Where the task's expert is nested, what the shared pairs add is in
both: g_t and u_t begin as g_s and u_s, t_t as t_s, the shared pair down reads the mixed h, and dg_t and du_t reach the
shared pairs too; no product more.

Matrices lie as the products read them fastest: lora_A as [r, in], lora_B transposed as [r, out]; the scale c_e of each
expert is multiplied into lora_A.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moecl.nn.call import no_autocast
from moecl.nn.ffn import FFN

BLOCK_BYTES = 5 << 19  # of one [tokens, F] intermediate on a CPU: in its caches, and reused by malloc
FEW = 32  # tokens: a step of decoding


@dataclass(frozen=True)
class Packed:
    """One layer's matrices as the function reads them, with a leading [B] where rows differ.

    The P projections into the FFN are (gate, up) or (up,). Each comes twice, for the shared and the task expert.
    """

    A_in: Tensor  # [.., 2 P r + 2, D]: c_e lora_A of projection by projection, then the gate's rows
    B_in: Tensor  # [.., 2 P, r, F]: lora_B' in the same order
    A_down: Tensor  # [.., 2, r, F]: c_e lora_A
    B_down: Tensor  # [.., 2 r, D]: lora_B'
    nested: bool = False

    @property
    def matrices(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.A_in, self.B_in, self.A_down, self.B_down

    @classmethod
    def stack(cls, rows: Sequence["Packed"]) -> "Packed":
        """One set of matrices a row; all rows nested, or none."""
        A_in, B_in, A_down, B_down = map(torch.stack, zip(*(one.matrices for one in rows), strict=True))
        return cls(A_in, B_in, A_down, B_down, rows[0].nested)


@dataclass(frozen=True)
class Pass:
    """What a forward leaves. `low` are x's rank-r products in the order of `A_in`, the last two the gate's logits."""

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
    y, b, m = _Mixture.apply(ffn, real, x, packed.nested, *packed.matrices)  # type: ignore[no-untyped-call]
    return y, b, m


def run(ffn: FFN, x: Tensor, packed: Packed, real: Tensor | None) -> Pass:
    """Block by block, expert by expert: what a kernel reads is what the last one has written."""
    pre = tuple(one for one in ffn.project(x) if one is not None)
    low = x @ packed.A_in.mT
    b = weights(low)
    lows = low[..., :-2].chunk(2 * len(pre), dim=-1)
    low_d = x.new_empty(*x.shape[:2], packed.B_down.shape[-2])
    h, m = torch.empty_like(pre[-1]), x.new_empty(len(x) if real is not None else 0, 1, pre[-1].shape[-1])
    for rows in blocks(h):
        b_s, b_t = b[rows].chunk(2, dim=-1)
        h_s, h_t = (ffn.hidden(z[0] if len(z) > 1 else None, z[-1]) for z in projections(pre, lows, packed, rows))
        mixed = torch.lerp(h_s, h_t, b_t, out=h[rows])
        A_s, A_t = (of(packed.A_down, expert, rows).mT for expert in (0, 1))
        half(low_d, 0)[rows] = mixed @ A_s if packed.nested else (h_s @ A_s).mul_(b_s)
        torch.mul(h_t @ A_t, b_t, out=half(low_d, 1)[rows])
        if real is not None:
            m[rows] = real[rows] @ h_s
    return Pass(plus(ffn.down(h), low_d, packed.B_down), b, m, pre, low, low_d)


def projections(pre: Sequence[Tensor], lows: Sequence[Tensor], packed: Packed, rows: slice) -> Iterator[list[Tensor]]:
    """The projections [B, T, F] into the FFN of the shared, then of the task's expert, for a block's rows."""
    base = start = [one[rows] for one in pre]
    for expert in (0, 1):
        ways = zip(start, range(expert, len(lows), 2), strict=True)
        z = [plus(one, lows[at][rows], of(packed.B_in, at, rows)) for one, at in ways]
        start = z if packed.nested else base
        yield z


def is_few(x: Tensor) -> bool:
    """Whether x [B, T, D] goes by `run_few`."""
    return not torch.is_grad_enabled() and x.shape[0] * x.shape[1] <= FEW


def few_dtype(base: torch.dtype, device: torch.device) -> torch.dtype:
    """In which the products of `run_few` are formed: kernels for bf16 take longer to start on a CPU than to finish."""
    return torch.promote_types(base, torch.float32) if device.type == "cpu" else base


def run_few(ffn: FFN, x: Tensor, packed: Packed) -> tuple[Tensor, Tensor]:
    """y and b for few tokens, where kernels cost more than what they compute: both experts go through each together.

    The matrices are of `few_dtype`.
    """
    alike = packed.B_in.dim() == 3  # rows of one task: as one row of many tokens
    x_ = x.flatten(0, 1) if alike else x
    pre = [one for one in ffn.project(x_) if one is not None]
    low = x_.to(packed.A_in.dtype) @ packed.A_in.mT
    b = weights(low)
    into = low[..., :-2].view(*low.shape[:-1], *packed.B_in.shape[-3:-1]).transpose(-3, -2)  # (.., 2 P, T, r)
    z = into @ packed.B_in  # (.., 2 P, T, F)
    ways = z.chunk(len(pre), dim=-3)
    for way, one in zip(ways, pre, strict=True):
        if packed.nested:
            way.select(-3, 1).add_(way.select(-3, 0))
        way.add_(one.unsqueeze(-3))
    h = ffn.hidden(ways[0] if len(pre) > 1 else None, ways[-1])  # (.., 2, T, F)
    h_s, h_t = h.select(-3, 0), h.select(-3, 1)
    mixed = torch.lerp(h_s, h_t, b[..., 1:])
    if packed.nested:
        low_s, low_t = mixed @ packed.A_down.select(-3, 0).mT, h_t @ packed.A_down.select(-3, 1).mT
        low_d = torch.cat((low_s, low_t * b[..., 1:]), dim=-1)  # (.., T, 2 r)
    else:
        low_d = (h @ packed.A_down.mT).mul_(b.mT.unsqueeze(-1)).transpose(-3, -2).flatten(-2)
    y = ffn.down(mixed.to(x.dtype)) + (low_d @ packed.B_down).to(x.dtype)
    return y.view_as(x), b.view(*x.shape[:2], 2)


def weights(low: Tensor) -> Tensor:
    """b [.., 2] of the logits, which come last."""
    precise = torch.promote_types(low.dtype, torch.float32)
    return torch.softmax(low[..., -2:], dim=-1, dtype=precise).to(low.dtype)


class _Mixture(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx,
        ffn: FFN,
        real: Tensor | None,
        x: Tensor,
        nested: bool,
        A_in: Tensor,
        B_in: Tensor,
        A_d: Tensor,
        B_d: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        done = run(ffn, x, Packed(A_in, B_in, A_d, B_d, nested), real)
        ctx.ffn, ctx.real, ctx.nested = ffn, real, nested
        ctx.save_for_backward(x, done.low, done.low_d, done.b, A_in, B_in, A_d, B_d, *done.pre)
        ctx.mark_non_differentiable(done.b)
        return done.y, done.b, done.m

    @staticmethod
    @once_differentiable
    @no_autocast()
    def backward(ctx, dy: Tensor, _: Tensor, dm: Tensor) -> tuple[Any, ...]:  # type: ignore[no-untyped-def]
        x, low, low_d, b, A_in, B_in, A_d, B_d, *pre = ctx.saved_tensors
        packed, nested = Packed(A_in, B_in, A_d, B_d, ctx.nested), ctx.nested
        *W_in, W_d = ctx.ffn.matrices()
        dh, dlow_d = dy @ W_d, dy @ B_d.mT  # (B, T, F), (B, T, 2 r)
        dlow, db, dpre = torch.empty_like(low), torch.empty_like(b[..., 0]), [torch.empty_like(one) for one in pre]
        lows, dlows = (one[..., :-2].chunk(len(B_in), dim=-1) for one in (low, dlow))
        dA, dB = torch.zeros_like(A_d), torch.zeros_like(B_in)

        def into(at: int, rows: slice, grad: Tensor) -> None:
            """The gradient of what pair `at` adds, to its lora_B and to its low product."""
            add_outer(dB[at], lows[at][rows], grad)
            dlows[at][rows] = grad @ B_in[at].mT

        for rows in blocks(dh):
            b_s, b_t = b[rows].chunk(2, dim=-1)
            low_s, low_t = dlow_d[rows].chunk(2, dim=-1)
            (h_s, to_s), (h_t, to_t) = (activate(ctx.ffn, z) for z in projections(pre, lows, packed, rows))
            t_s = plus(dh[rows], low_s, A_d[0])
            t_t = plus(t_s if nested else dh[rows], low_t, A_d[1])
            add_outer(dA[0], low_s * b_s, h_s)
            if nested:  # the shared pair down reads the mixed h, which is never formed: two thin products cost less
                add_outer(dA.flatten(0, 1), dlow_d[rows] * b_t, h_t)
            else:
                add_outer(dA[1], low_t * b_t, h_t)
            db[rows] = h_t.mul_(t_t).sub_(h_s.mul_(t_s)).sum(dim=-1)  # 0, not nearly, where both are equal
            dh_s = t_s.mul_(b_s)
            if ctx.real is not None:
                dh_s.baddbmm_(ctx.real[rows].mT, dm[rows])
            grads = zip(to_s(dh_s), to_t(t_t.mul_(b_t)), dpre, strict=True)
            for way, (grad_s, grad_t, total) in enumerate(grads):
                torch.add(grad_s, grad_t, out=total[rows])
                into(2 * way, rows, total[rows] if nested else grad_s)
                into(2 * way + 1, rows, grad_t)
        dlogit = b[..., 0] * b[..., 1] * db
        dlow[..., -2:] = torch.stack((-dlogit, dlogit), dim=-1)
        dx = None
        if ctx.needs_input_grad[2]:
            dx = dlow @ A_in
            for grad, W in zip(dpre, W_in, strict=True):
                dx.flatten(0, 1).addmm_(grad.flatten(0, 1), W)
        return None, None, dx, None, outer(dlow, x), dB, dA, outer(low_d, dy)


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


def blocks(h: Tensor) -> Iterator[slice]:
    """Rows of [B, T, F] by as many as make a block: all at once on a GPU, where a launch costs more than a pass."""
    size = len(h)
    if h.device.type == "cpu":
        size = max(1, BLOCK_BYTES // max(1, h[0].numel() * h.element_size()))
    for start in range(0, len(h), size):
        yield slice(start, start + size)


def of(matrices: Tensor, place: int, rows: slice) -> Tensor:
    """One of a layer's matrices, for a block's rows where rows have their own."""
    one = matrices.select(-3, place)
    return one if one.dim() == 2 else one[rows]


def half(low_d: Tensor, expert: int) -> Tensor:
    return low_d.chunk(2, dim=-1)[expert]


def plus(y: Tensor, low: Tensor, B: Tensor) -> Tensor:
    """`y + low B` for y [B, T, out], low [B, T, r], B [r, out], or [B, r, out] where rows differ."""
    if B.dim() == 3:
        return torch.baddbmm(y, low, B)
    return torch.addmm(y.flatten(0, 1), low.flatten(0, 1), B).view_as(y)


def add_outer(total: Tensor, low: Tensor, y: Tensor) -> None:
    """`total += low' y`, summed over tokens: [r, out]."""
    total.addmm_(low.flatten(0, 1).mT, y.flatten(0, 1))


def outer(low: Tensor, y: Tensor) -> Tensor:
    """`low' y`, summed over tokens: [r, out]."""
    return low.flatten(0, 1).mT @ y.flatten(0, 1)
