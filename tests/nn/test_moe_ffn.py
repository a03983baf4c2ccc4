"""The mixture against its oracle, mixed batches against single rows, and what a call costs."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from moecl.nn.call import Call, current_call, run_with
from moecl.nn.inject import Injected, decoder_layers
from moecl.nn.moe_ffn import Gated, MoEFFN, Nested
from moecl.nn.reference import delta, reference, terms
from tiny import FAMILIES, HIDDEN, UNGATED, WIDE, parameters, random_parts, tiny_batch, tiny_model

TOLERANCE = {torch.float32: {"rtol": 1e-5, "atol": 1e-5}, torch.float64: {"rtol": 1e-9, "atol": 1e-9}}
LAYER = 1
FORMS = pytest.mark.parametrize("form", [Gated, Nested], ids=["apart", "nested"])


def moe_ffn(injected: Injected, index: int = LAYER) -> MoEFFN:
    layer = injected.layers[index]
    block = layer.fc1 if injected.base.config.model_type == "opt" else layer.mlp
    return block.forward


def cast(parts: Gated, dtype: torch.dtype) -> Gated:
    for module in (parts.shared, parts.task, parts.gate):
        module.to(dtype)
    return parts


def inputs(dtype: torch.dtype = torch.float32, side: str = "right") -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(3, 9, HIDDEN, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * 0.5
    return x.to(dtype), tiny_batch(side=side)["attention_mask"]


# --- contract 2: the oracle ---


@FORMS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_reference_forward_and_backward(family, dtype, form):
    injected = Injected(tiny_model(family, dtype=dtype), "all")
    ffn = moe_ffn(injected)
    parts = cast(random_parts(injected.geometry, form=form), dtype)
    x, mask = inputs(dtype)
    leaves = {name: p for name, p in parameters(parts).items() if f"layers.{LAYER}." in name}
    draw = torch.Generator().manual_seed(5)
    for_y = torch.randn(x.shape, generator=draw, dtype=torch.float64).to(dtype) / x.shape[1]
    for_p = torch.randn(x.shape[0], HIDDEN, generator=draw, dtype=torch.float64).to(dtype)

    def run(fast: bool) -> list[torch.Tensor]:
        leaf = x.clone().requires_grad_()
        if fast:
            call = Call((parts,), attention_mask=mask, features={}, gate_use={})
            with run_with(call):
                y = ffn(leaf)
            p, b_t = call.features[LAYER], call.gate_use[LAYER]
        else:
            mixed = reference(leaf, mask, ffn.ffn, parts, LAYER)
            y, p, b_t = mixed.y, mixed.p, mixed.b[..., 1]
        wanted = (leaf, *leaves.values())
        of_y = torch.autograd.grad((y * for_y).sum(), wanted, retain_graph=True)
        of_p = torch.autograd.grad((p * for_p).sum(), wanted, allow_unused=True)
        return [y.detach(), p.detach(), b_t.detach(), *of_y, *of_p]

    labels = ["y", "p", "b_t", *(f"d{out}/d {name}" for out in "yp" for name in ("x", *leaves))]
    for label, ours, oracle in zip(labels, run(True), run(False), strict=True):
        if oracle is None:  # p knows nothing of the task expert and the gate
            assert ours is None or not ours.any(), label
            assert "task" in label or "gate" in label
            continue
        assert oracle.abs().max() > 1e-3, f"{label} is trivial"
        torch.testing.assert_close(ours, oracle, **TOLERANCE[dtype], msg=lambda m, label=label: f"{label}: {m}")


@FORMS
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_gradcheck(family, form):
    injected = Injected(tiny_model(family, dtype=torch.float64), 1)
    ffn = moe_ffn(injected)
    parts = cast(random_parts(injected.geometry, rank=2, form=form), torch.float64)
    x, mask = inputs(torch.float64)
    x, mask = x[:2, :3].contiguous().requires_grad_(), mask[:2, :3].clone()
    mask[1, 2] = 0
    gate = parts.gate.weight(LAYER)
    lora_B = parts.shared.pair(LAYER, "down_proj").lora_B

    def run(x, *_):
        call = Call((parts,), attention_mask=mask, features={})
        with run_with(call):
            return ffn(x), call.features[LAYER]

    assert torch.autograd.gradcheck(run, (x, gate, lora_B), fast_mode=True)


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_stays_out_of_the_features(side):
    injected = Injected(tiny_model(), "all")
    parts = random_parts(injected.geometry)
    x, mask = inputs(side=side)
    assert not mask.all()

    def features(x):
        call = Call((parts,), attention_mask=mask, features={})
        with run_with(call):
            moe_ffn(injected)(x)
        return call.features[LAYER]

    noise = torch.where(mask[..., None].bool(), x, 3.0)
    assert torch.equal(features(x), features(noise))
    assert not torch.allclose(features(x), features(x + 1))


def oracle_model(family: str, parts: Gated, mask: torch.Tensor) -> nn.Module:
    """A base whose FFNs are `reference`, wired up without `Injected`."""
    ffns = {index: moe_ffn(Injected(tiny_model(family, dtype=torch.float64), "all"), index).ffn for index in (0, 1)}
    base = tiny_model(family, dtype=torch.float64)
    for index, layer in enumerate(decoder_layers(base)):

        def forward(x, index=index):
            rows = x.view(*mask.shape, -1)
            return reference(rows, mask, ffns[index], parts, index).y.view_as(x)

        if family == "opt":
            layer.fc1.forward, layer.activation_fn.forward, layer.fc2.forward = forward, lambda x: x, lambda x: x
        else:
            layer.mlp.forward = forward
    return base


@FORMS
@pytest.mark.parametrize("family", FAMILIES)
def test_whole_model_equals_the_reference(family, form):
    batch = tiny_batch()
    injected = Injected(tiny_model(family, dtype=torch.float64), "all")
    parts = cast(random_parts(injected.geometry, form=form), torch.float64)
    bare = injected.base(**batch).logits
    with run_with(Call((parts,), attention_mask=batch["attention_mask"])):
        ours = injected.base(**batch).logits
    oracle = oracle_model(family, parts, batch["attention_mask"])(**batch).logits
    assert (oracle - bare).abs().max() > 0.1
    # Not 1e-9: the base's own norms and softmaxes round to fp32.
    torch.testing.assert_close(ours, oracle, **TOLERANCE[torch.float32])


# --- contract 3: rows of different tasks in one batch ---


def three_tasks(
    injected: Injected, form: type[Gated] = Gated, other: type[Gated] | None = None
) -> tuple[Gated | None, ...]:
    of = injected.geometry
    second = random_parts(of, 2, 2, scale=0.5, form=other or form)
    return random_parts(of, 1, 4, scale=2.0, form=form), None, second, random_parts(of, 3, 8, form=form)


@pytest.mark.parametrize("forms", [(Gated, Gated), (Nested, Nested), (Nested, Gated)], ids=["apart", "nested", "both"])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", FAMILIES)
def test_mixed_batch_equals_rows_one_by_one(family, side, forms):
    injected = Injected(tiny_model(family), "all")
    base, parts = injected.base, three_tasks(injected, *forms)
    batch = tiny_batch(rows=4, side=side)
    real = batch["attention_mask"].bool()
    same = {key: value[:1].expand(4, -1) for key, value in tiny_batch(rows=1).items()}
    rows = torch.tensor([3, 1, 0, 2])
    with torch.no_grad():
        with run_with(Call(parts, torch.arange(4))):
            apart = base(**same).logits
        for one in range(4):
            for other in range(one):
                assert (apart[one] - apart[other]).abs().max() > 0.01, "the tasks do not differ"
        bare = base(**batch).logits
        with run_with(Call(parts, rows)):
            mixed = base(**batch).logits
        for row, task in enumerate(rows.tolist()):
            with run_with(Call((parts[task],))):
                alone = base(**{key: value[row : row + 1] for key, value in batch.items()}).logits
            torch.testing.assert_close(mixed[row][real[row]], alone[0][real[row]], **TOLERANCE[torch.float32])
        with run_with(Call(parts, rows).of(torch.tensor([0]))):  # of one form alone
            some = base(**{key: value[:1] for key, value in batch.items()}).logits
        torch.testing.assert_close(some[0][real[0]], mixed[0][real[0]], **TOLERANCE[torch.float32])
    assert torch.equal(mixed[1], bare[1]), "a row of no task is the base, bitwise"
    assert not torch.equal(mixed[0], bare[0])


@FORMS
def test_mixed_batch_has_gradients(form):
    injected = Injected(tiny_model(dtype=torch.float64), "all")
    parts = three_tasks(injected, form)
    for part in parts:
        if part is not None:
            cast(part, torch.float64)
    batch = tiny_batch(rows=4)
    leaves = parameters(parts[2])

    def grads(call, rows):
        with run_with(call):
            logits = injected.base(**{key: value[rows] for key, value in batch.items()}).logits
        return torch.autograd.grad(logits.square().sum(), list(leaves.values()))

    call = Call(parts, torch.tensor([0, 1, 2, 2]))
    with torch.no_grad(), run_with(call):
        injected.base(**batch)  # leaves nothing behind that a step of learning would reuse
    mixed = grads(call, slice(None))
    alone = grads(Call((parts[2],)), slice(2, 4))
    for ours, oracle in zip(mixed, alone, strict=True):
        torch.testing.assert_close(ours, oracle, **TOLERANCE[torch.float64])


@FORMS
def test_mixed_rows_hand_back_what_rows_one_by_one_do(form):
    injected = Injected(tiny_model(), "all")
    parts, (x, mask) = three_tasks(injected, form), inputs()

    def handed_back(call, x):
        with torch.no_grad(), run_with(call):
            moe_ffn(injected)(x)
        return call.features[LAYER], call.gate_use[LAYER]

    mixed = handed_back(Call(parts, torch.tensor([3, 0, 2]), mask, features={}, gate_use={}), x)
    for row, task in enumerate((3, 0, 2)):
        one = slice(row, row + 1)
        alone = handed_back(Call((parts[task],), None, mask[one], features={}, gate_use={}), x[one])
        for ours, oracle in zip(mixed, alone, strict=True):
            torch.testing.assert_close(ours[one], oracle, **TOLERANCE[torch.float32])


def test_a_batch_of_bare_rows_is_the_base():
    injected = Injected(tiny_model(), "all")
    batch = tiny_batch()
    bare = injected.base(**batch).logits
    one, two = torch.tensor([0, 0, 0]), torch.tensor([0, 1, 0])
    for call in (Call((None,)), Call((None,), one), Call((None, None), two)):
        with run_with(call):
            assert torch.equal(injected.base(**batch).logits, bare)


def generate(injected: Injected, call: Call, batch: dict[str, torch.Tensor], **options) -> torch.Tensor:
    torch.manual_seed(0)
    with torch.no_grad(), run_with(call):
        return injected.base.generate(**batch, max_new_tokens=6, min_new_tokens=6, **options)


@FORMS
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "opt"])
@pytest.mark.parametrize("beams", [1, 2])
def test_generation_of_mixed_rows_equals_row_by_row(family, beams, form):
    injected = Injected(tiny_model(family), "all")
    parts = three_tasks(injected, form)
    batch = tiny_batch(rows=4, side="left")
    rows = torch.tensor([3, 1, 0, 2])
    options = {"num_beams": beams, "num_return_sequences": beams, "do_sample": False}
    mixed = generate(injected, Call(parts, rows), batch, **options)
    assert not torch.equal(mixed, generate(injected, Call((None,)), batch, **options))
    for row, task in enumerate(rows.tolist()):
        one = {key: value[row : row + 1] for key, value in batch.items()}
        alone = generate(injected, Call((parts[task],)), one, **options)
        assert torch.equal(mixed[row * beams : (row + 1) * beams], alone)


@pytest.mark.parametrize("options", [{"do_sample": False}, {"do_sample": True}, {"num_beams": 3, "do_sample": True}])
def test_generation_with_and_without_cache_agree(options):
    injected = Injected(tiny_model(), "all")
    call = lambda: Call(three_tasks(injected), torch.tensor([3, 1, 0, 2]))  # noqa: E731
    batch = tiny_batch(rows=4, side="left")
    cached = generate(injected, call(), batch, use_cache=True, **options)
    assert torch.equal(cached, generate(injected, call(), batch, use_cache=False, **options))


def test_a_call_takes_batches_of_any_number_of_beams():
    injected = Injected(tiny_model(), "all")
    batch = tiny_batch()
    call = Call((random_parts(injected.geometry), random_parts(injected.geometry, 1)), torch.tensor([0, 1, 0]))
    with torch.no_grad(), run_with(call):
        one = injected.base(**batch).logits
        two = injected.base(**{key: value.repeat_interleave(2, dim=0) for key, value in batch.items()}).logits
    torch.testing.assert_close(two, one.repeat_interleave(2, dim=0), **TOLERANCE[torch.float32])


def test_calls_nest_and_leave_nothing_behind():
    outer, inner = Call((None,)), Call((None,))
    with run_with(outer):
        with run_with(inner):
            assert current_call() is inner
        assert current_call() is outer
        with run_with(None):
            assert current_call() is None
        with pytest.raises(KeyError), run_with(inner):
            raise KeyError
        assert current_call() is outer
    assert current_call() is None


# --- LoRA dropout ---


def test_dropout_masks_what_lora_a_sees_and_nothing_else():
    injected = Injected(tiny_model(), "all")
    parts = random_parts(injected.geometry)
    x, mask = inputs()

    def run(dropout, parts=parts):
        call = Call((parts,), attention_mask=mask, features={}, gate_use={}, dropout=dropout)
        with run_with(call):
            return moe_ffn(injected)(x), call

    torch.manual_seed(0)
    dropped, call = run(0.5)
    kept, plain = run(0.0)
    assert not torch.allclose(dropped, kept)
    # Not bitwise: without dropout the gate's product is part of a larger one.
    torch.testing.assert_close(call.gate_use[LAYER], plain.gate_use[LAYER], msg="the gate sees x whole")
    torch.manual_seed(0)
    again, repeated = run(0.5)
    assert torch.equal(again, dropped)
    assert torch.equal(repeated.features[LAYER], call.features[LAYER])
    twins = Gated(parts.shared, parts.shared, parts.gate, parts.scale)
    mean_y, with_twins = run(0.5, twins)
    real = mask[..., None] / mask.sum(dim=1)[:, None, None]
    # One mask for both experts: equal experts stay equal, so y is y_s and p is its mean, whatever the gate says.
    torch.testing.assert_close((mean_y * real).sum(dim=1), with_twins.features[LAYER], **TOLERANCE[torch.float32])


@FORMS
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_dropout_term_by_term(family, form):
    """One mask of x in front of every first lora_A, one of h in front of every last; base terms and gate see all."""
    injected = Injected(tiny_model(family, dtype=torch.float64), "all")
    ffn, parts = moe_ffn(injected), cast(random_parts(injected.geometry, form=form), torch.float64)
    x, mask = inputs(torch.float64)
    call = Call((parts,), attention_mask=mask, features={}, dropout=0.5)
    torch.manual_seed(0)
    with run_with(call):
        y = ffn(x)
    torch.manual_seed(0)
    seen = x * F.dropout(torch.ones_like(x), 0.5)
    keep = F.dropout(torch.ones(*x.shape[:2], WIDE, dtype=x.dtype), 0.5)
    gate, up = ffn.ffn.project(x)
    outputs = []
    for experts in terms(parts):

        def added(seen, name, experts=experts):
            return sum(delta(seen, expert, LAYER, name, scale) for expert, scale in experts)

        h = ffn.ffn.hidden(None if gate is None else gate + added(seen, "gate_proj"), up + added(seen, "up_proj"))
        outputs.append(ffn.ffn.down(h) + added(h * keep, "down_proj"))
    b = torch.softmax(x @ parts.gate.weight(LAYER).T, dim=-1)
    torch.testing.assert_close(y, b[..., :1] * outputs[0] + b[..., 1:] * outputs[1], **TOLERANCE[torch.float64])
    real = (mask / mask.sum(dim=1, keepdim=True, dtype=torch.float64))[..., None]
    torch.testing.assert_close(call.features[LAYER], (outputs[0] * real).sum(dim=1), **TOLERANCE[torch.float64])


# --- bf16, memory and counts ---


@FORMS
@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_base_with_fp32_experts(family, form):
    injected = Injected(tiny_model(family, dtype=torch.bfloat16), "all")
    parts = random_parts(injected.geometry, form=form)
    batch = tiny_batch()
    call = Call((parts,), attention_mask=batch["attention_mask"], features={})
    with run_with(call):
        logits = injected.base(**batch).logits
    assert logits.dtype == torch.bfloat16
    (logits.float().square().mean() + sum(p.float().square().mean() for p in call.features.values())).backward()
    for name, parameter in parameters(parts).items():
        assert parameter.dtype == parameter.grad.dtype == torch.float32
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name
    exact = Injected(tiny_model(family), "all")
    with torch.no_grad(), run_with(Call((parts,))):
        expected = exact.base(**batch).logits
        with run_with(Call((parts,), torch.zeros(3, dtype=torch.long))):
            mixed = injected.base(**batch).logits
    real = batch["attention_mask"].bool()
    for rough in (logits, mixed):
        assert (rough.float() - expected)[real].abs().max() < 0.1 * expected.abs().max()


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_saves_nothing_large_in_fp32_for_backward(family, dropout):
    injected = Injected(tiny_model(family, dtype=torch.bfloat16), "all")
    parts = random_parts(injected.geometry)
    x, mask = inputs(torch.bfloat16)
    call = Call((parts,), attention_mask=mask, features={}, dropout=dropout)
    saved: list[torch.Tensor] = []

    def pack(tensor):
        saved.append(tensor)
        return tensor

    with run_with(call), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = moe_ffn(injected)(x.requires_grad_())
    assert y.dtype == call.features[LAYER].dtype == torch.bfloat16
    tokens = x.shape[0] * x.shape[1]
    wide = [tensor for tensor in saved if tensor.dtype == torch.float32 and tensor.numel() >= tokens * HIDDEN]
    assert not wide, [tuple(tensor.shape) for tensor in wide]
    assert any(tensor.numel() == tokens * WIDE for tensor in saved), "the hook saw nothing"


@FORMS
@pytest.mark.parametrize("family", FAMILIES)
def test_both_experts_share_the_base_gemms(family, form):
    base = tiny_model(family)
    rows: dict[str, list[int]] = {}
    layer = decoder_layers(base)[LAYER]
    for name, module in (layer if family == "opt" else layer.mlp).named_children():
        if getattr(module, "weight", torch.empty(0)).dim() == 2:

            def counted(x, name=name, forward=module.forward):
                rows.setdefault(name, []).append(x.shape[-2])
                return forward(x)

            module.forward = counted
    injected = Injected(base, "all")
    parts = random_parts(injected.geometry, form=form)
    x, mask = inputs()

    def gemms(call):
        rows.clear()
        with run_with(call):
            moe_ffn(injected)(x)
        return [length for lengths in rows.values() for length in lengths]

    once = 2 if family in (*UNGATED, "phi3") else 3  # Phi-3's gate and up are one matrix
    assert gemms(Call((parts,))) == [9] * once
    assert sorted(gemms(Call((parts,), attention_mask=mask, features={}))) == [1] + [9] * once
    assert gemms(Call((parts, random_parts(injected.geometry, 1, form=form)), torch.tensor([0, 1, 0]))) == [9] * once
