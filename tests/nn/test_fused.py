"""The mixture as one autograd function: against the plain path, and what it costs."""

from dataclasses import replace

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from moecl.nn import fused
from moecl.nn.call import Call, run_with
from moecl.nn.inject import Injected
from moecl.nn.moe_ffn import Gated, MoEFFN, Nested
from tiny import FAMILIES, HIDDEN, UNGATED, WIDE, parameters, random_parts, tiny_batch, tiny_model

LAYER, RANK, ROWS, LENGTH = 1, 4, 3, 9
TOKENS = ROWS * LENGTH
FORMS = pytest.mark.parametrize("form", [Gated, Nested], ids=["apart", "nested"])


def setting(
    family: str = "llama", dtype: torch.dtype = torch.float64, form: type[Gated] = Gated
) -> tuple[MoEFFN, Gated, torch.Tensor]:
    injected = Injected(tiny_model(family, dtype=dtype), "all")
    layer = injected.layers[LAYER]
    ffn = (layer.fc1 if family == "opt" else layer.mlp).forward
    parts = random_parts(injected.geometry, rank=RANK, form=form)
    for module in (parts.shared, parts.task, parts.gate):
        module.to(torch.float32 if dtype == torch.bfloat16 else dtype)
    x = torch.randn(ROWS, LENGTH, HIDDEN, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * 0.5
    return ffn, parts, x.to(dtype).requires_grad_()


def call(parts: Gated, **settings) -> Call:
    return Call((parts,), attention_mask=tiny_batch(ROWS, LENGTH)["attention_mask"], features={}, **settings)


def output(ffn: MoEFFN, of: Call, x: torch.Tensor, plainly: bool) -> torch.Tensor:
    was, ffn.ffn = ffn.ffn, replace(ffn.ffn, matrices=None) if plainly else ffn.ffn
    with run_with(of):
        y = ffn(x)
    ffn.ffn = was
    return y


def gradients(ffn: MoEFFN, parts: Gated, x: torch.Tensor, plainly: bool = False) -> list[torch.Tensor]:
    """y, p and their gradients to x and to every matrix of the layer."""
    of = call(parts)
    y = output(ffn, of, x, plainly)
    p = of.features[LAYER]
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    leaves = [x, *(leaf for name, leaf in parameters(parts).items() if f"layers.{LAYER}." in name)]
    return [y, p, *torch.autograd.grad((y * weights).sum() + (p * weights[:, 0]).sum(), leaves)]


@FORMS
@pytest.mark.parametrize("rows_a_block", [1, 2, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_of_any_size_equal_the_plain_path(family, rows_a_block, form, monkeypatch):
    monkeypatch.setattr(fused, "BLOCK_BYTES", rows_a_block * LENGTH * WIDE * 8)
    ffn, parts, x = setting(family, form=form)
    for ours, plain in zip(gradients(ffn, parts, x), gradients(ffn, parts, x, plainly=True), strict=True):
        assert plain.abs().max() > 1e-3
        torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-9)


@FORMS
@pytest.mark.parametrize("few", [0, TOKENS], ids=["many tokens", "few tokens"])
@pytest.mark.parametrize("family", FAMILIES)
def test_without_gradients_both_ways_equal_the_plain_path(family, few, form, monkeypatch):
    monkeypatch.setattr(fused, "FEW", few)
    ffn, parts, x = setting(family, form=form)
    other = random_parts(Injected(tiny_model(family), "all").geometry, 1, rank=2, scale=0.5, form=form)
    calls = (lambda: Call((parts,), gate_use={}), lambda: Call((parts, other), torch.tensor([1, 0, 1]), gate_use={}))
    with torch.no_grad():
        for make in calls:
            ours, plain = make(), make()
            torch.testing.assert_close(
                output(ffn, ours, x, plainly=False), output(ffn, plain, x, plainly=True), rtol=1e-9, atol=1e-9
            )
            torch.testing.assert_close(ours.gate_use[LAYER], plain.gate_use[LAYER], rtol=1e-9, atol=1e-9)


@FORMS
@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3", "gpt2", "opt"])
def test_gradcheck_of_every_matrix(family, form):
    ffn, parts, x = setting(family, form=form)
    leaves = [leaf for name, leaf in parameters(parts).items() if f"layers.{LAYER}." in name]

    def run(*_):
        of = call(parts)
        with run_with(of):
            return ffn(x), of.features[LAYER]

    assert torch.autograd.gradcheck(run, (x, *leaves), fast_mode=True)


@FORMS
def test_experts_of_different_rank(form):
    ffn, parts, x = setting()
    other = random_parts(Injected(tiny_model(), "all").geometry, 1, rank=2)
    odd = form(parts.shared, other.task.double(), parts.gate, parts.scale)
    for ours, plain in zip(gradients(ffn, odd, x), gradients(ffn, odd, x, plainly=True), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-9)


def saved_bytes(ffn: MoEFFN, parts: Gated, x: torch.Tensor) -> int:
    """Bytes kept for backward, each storage once, without parameters and x."""
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with run_with(call(parts)), saved_tensors_hooks(keep, lambda tensor: tensor):
        ffn(x * 1)
    own = {p.untyped_storage().data_ptr() for p in (*parameters(parts).values(), *ffn.ffn.matrices())}
    return sum(t.untyped_storage().nbytes() for at, t in kept.items() if at not in own)


@FORMS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2"])
def test_what_is_saved_for_backward(family, dtype, form):
    """Per token: x, the base's projections, rank-r products, two weights. Less than one plain LoRA keeps (4 F)."""
    ways = 1 if family in UNGATED else 2
    ffn, parts, x = setting(family, dtype, form)
    a_token = HIDDEN + ways * WIDE + (2 * ways + 2) * RANK + 2 + 2
    packed = parts.packed(LAYER, ffn.ffn.projections, x.dtype)
    matrices = sum(m.numel() for m in packed.matrices)
    of_mean = ROWS * (WIDE + LENGTH + 3 * RANK)  # m, its low product and the tokens' shares
    assert saved_bytes(ffn, parts, x) <= (TOKENS * a_token + matrices + of_mean) * x.element_size()


class Products(TorchDispatchMode):
    """Counts products with a wide matrix on both sides: the base's GEMMs."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket.__name__ in ("mm", "addmm", "addmm_", "bmm"):
            one, two = [arg for arg in args if isinstance(arg, torch.Tensor)][-2:]
            self.count += len(one) == TOKENS and min(two.shape[-2:]) >= HIDDEN
        return function(*args, **(kwargs or {}))


@FORMS
@pytest.mark.parametrize("trains_below", [True, False])
def test_base_gemms_of_a_step(trains_below, form):
    """Three forward, three backward; one backward where nothing below is trained: dx is not formed."""
    ffn, parts, x = setting(form=form)
    x = x.detach().requires_grad_(trains_below)
    of = Call((parts,))
    with Products() as forward, run_with(of):
        y = ffn(x)
    with Products() as backward:
        y.sum().backward()
    assert (forward.count, backward.count) == (3, 3 if trains_below else 1)


def test_frozen_parts_are_packed_once_and_trained_ones_never():
    ffn, parts, x = setting()
    with torch.no_grad(), run_with(Call((parts,))):
        ffn(x)
    assert not parts.packs
    for module in (parts.shared, parts.task, parts.gate):
        module.requires_grad_(False)
    finished = Gated(parts.shared, parts.task, parts.gate, parts.scale)
    with torch.inference_mode(), run_with(Call((finished,))):
        first = ffn(x.detach())
    [packed] = finished.packs.values()
    with run_with(Call((finished,))):
        y = ffn(x)
        (dx,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(y, first)  # few tokens without gradients have kernels of their own
    assert dx.abs().max() > 0
    assert list(finished.packs.values()) == [packed]
    assert not replace(finished, scale=1.0).packs, "other parts have packs of their own"
