"""Into the base and out again: contract 1, answer positions, checkpointing, and what is refused."""

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForSequenceClassification, LlamaModel

from moecl.errors import BaseError
from moecl.nn.call import Call, run_with
from moecl.nn.inject import SUPPORTED, Injected, decoder_layers
from moecl.nn.lora import Expert, Gate
from moecl.nn.moe_ffn import Gated
from tiny import FAMILIES, HIDDEN, WIDE, parameters, random_parts, redraw, tiny_batch, tiny_model


def fresh(injected: Injected, std: float = 0.0) -> Gated:
    g = injected.geometry
    draw = torch.Generator().manual_seed(0)
    return Gated(Expert(g, 4).reset(draw), Expert(g, 4).reset(draw), Gate(g).reset(draw, std), 2.0)


def modules(base: nn.Module) -> list[tuple[str, type]]:
    return [(name, type(module)) for name, module in base.named_modules()]


# --- contract 1 and detach ---


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_fresh_task_is_the_base_and_detach_gives_it_back(family, side):
    base = tiny_model(family)
    batch = tiny_batch(side=side)
    bare = base(**batch).logits
    tree, keys = modules(base), list(base.state_dict())
    instance = [sorted(module.__dict__) for module in base.modules()]
    injected = Injected(base, "all")
    assert modules(base) == tree
    assert list(base.state_dict()) == keys
    assert torch.equal(base(**batch).logits, bare), "no call"
    for parts in (None, fresh(injected)):
        with run_with(Call((parts,))):
            assert torch.equal(base(**batch).logits, bare)
    with run_with(Call((fresh(injected), None), torch.tensor([0, 1, 0]))):
        assert torch.equal(base(**batch).logits, bare)
    random = random_parts(injected.geometry)
    with run_with(Call((random,))):
        assert not torch.allclose(base(**batch).logits, bare)
    assert injected.detach() is base
    with run_with(Call((random,))):
        assert torch.equal(base(**batch).logits, bare)
    assert modules(base) == tree
    assert [sorted(module.__dict__) for module in base.modules()] == instance
    assert not any(module._forward_pre_hooks for module in base.modules())


def test_a_fresh_task_is_the_base_whatever_the_gate():
    injected = Injected(tiny_model(), "all")
    batch = tiny_batch()
    bare = injected.base(**batch).logits
    with run_with(Call((fresh(injected, std=0.5),))):
        assert torch.equal(injected.base(**batch).logits, bare)


def test_detach_twice_with_checkpointing_and_attach_again():
    base = tiny_model()
    batch = tiny_batch()
    bare = base(**batch).logits
    injected = Injected(base, "all")
    injected.checkpoint(True)
    injected.detach()
    injected.detach()
    injected.checkpoint(False)
    assert not any("forward" in module.__dict__ for module in base.modules())
    again = Injected(base, 1)
    with run_with(Call((random_parts(again.geometry),))):
        assert not torch.allclose(base(**batch).logits, bare)
    again.detach()
    assert torch.equal(base(**batch).logits, bare)


def test_a_forward_replaced_before_is_put_back():
    base = tiny_model()
    mlp = base.model.layers[0].mlp
    mine = mlp.forward
    mlp.forward = mine
    Injected(base, "all").detach()
    assert mlp.__dict__["forward"] is mine


@pytest.mark.parametrize("family", FAMILIES)
def test_geometry(family):
    geometry = Injected(tiny_model(family, layers=3), 2).geometry
    assert geometry.layers == (1, 2)
    assert geometry.num_layers == 3
    assert geometry.hidden_size == HIDDEN
    assert geometry.intermediate_sizes == (WIDE, WIDE)
    assert geometry.gated == (family not in ("gpt2", "gpt_neox", "opt", "phi"))


def test_adapt_layers_leaves_the_first_layers_alone():
    base = tiny_model(layers=3)
    injected = Injected(base, 1)
    batch = tiny_batch()
    bare = base(**batch, output_hidden_states=True).hidden_states
    features: dict[int, torch.Tensor] = {}
    call = Call((random_parts(injected.geometry),), attention_mask=batch["attention_mask"], features=features)
    with run_with(call):
        ours = base(**batch, output_hidden_states=True).hidden_states
    assert [torch.equal(a, b) for a, b in zip(ours, bare, strict=True)] == [True, True, True, False]
    assert list(features) == [2]


# --- the frozen prefix ---


def below(base: nn.Module) -> list[nn.Module]:
    return list(decoder_layers(base))[:-1]


@pytest.mark.parametrize("layers", [3, 2])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_forward_above_its_prefix_is_the_whole_one(family, side, layers):
    """At every real token, whichever side is padded; rows run alone, their paddings zeros."""
    injected = Injected(tiny_model(family, layers=layers), 1)
    assert injected.takes_prefix()
    batch = tiny_batch(side=side)
    mask = batch["attention_mask"]
    positions = (mask.cumsum(dim=1) - 1).clamp_min(0)
    parts = random_parts(injected.geometry)
    runs = [0]
    for layer in below(injected.base):
        block = layer.fc1 if family == "opt" else layer.mlp
        block.register_forward_hook(lambda *_: runs.__setitem__(0, runs[0] + 1))
    prefix = torch.zeros(*mask.shape, HIDDEN)
    for row, (ids, real) in enumerate(zip(batch["input_ids"], mask.bool(), strict=True)):
        prefix[row, real] = injected.prefix(ids[real][None])[0]
    assert runs[0] == 3 * (layers - 1), "and the layers above are not run"
    logits = {}
    for name, given in {"whole": None, "above": prefix}.items():
        runs[0] = 0
        with run_with(Call((parts,), prefix=given)):
            logits[name] = injected.base(**batch, position_ids=positions, use_cache=False).logits[mask.bool()]
        assert runs[0] == (layers - 1 if given is None else 0)
    torch.testing.assert_close(logits["above"], logits["whole"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_detach_takes_the_prefix_out(family):
    base = tiny_model(family, layers=3)
    instance = [sorted(module.__dict__) for module in base.modules()]
    bare = base(**tiny_batch()).logits
    injected = Injected(base, 1)
    injected.takes_prefix()
    injected.checkpoint(True)
    assert torch.equal(base(**tiny_batch()).logits, bare), "no call"
    injected.detach()
    assert [sorted(module.__dict__) for module in base.modules()] == instance
    with run_with(Call((None,), prefix=torch.zeros(3, 9, HIDDEN))):
        assert torch.equal(base(**tiny_batch()).logits, bare)


def test_a_prefix_is_never_used_with_a_kv_cache():
    injected = Injected(tiny_model(layers=3), 1)
    with run_with(Call((None,), prefix=torch.zeros(3, 9, HIDDEN))), pytest.raises(AssertionError, match="KV cache"):
        injected.base(**tiny_batch(), use_cache=True)


def test_where_every_layer_is_adapted_there_is_no_prefix():
    assert not Injected(tiny_model(), "all").takes_prefix()


def test_a_base_whose_layers_pass_on_more_takes_no_prefix():
    base = tiny_model(layers=3)
    first, _, last = base.model.layers
    carried = []
    first.register_forward_hook(lambda module, args, out: carried.append(out.mean() + len(carried)))
    last.register_forward_hook(lambda module, args, out: out + carried[-1])
    injected = Injected(base, 1)
    assert injected.below == 2
    assert not injected.takes_prefix()


# --- answer positions ---


@pytest.mark.parametrize("family", FAMILIES)
def test_only_answer_positions_reach_the_head(family):
    injected = Injected(tiny_model(family), "all")
    base, batch = injected.base, tiny_batch()
    parts = random_parts(injected.geometry)
    answers = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
    answers[0, 3:5] = answers[2, 1] = True
    with run_with(Call((parts,))):
        full = base(**batch).logits
    seen: list[tuple[int, ...]] = []
    hook = base.get_output_embeddings().register_forward_hook(lambda module, args, out: seen.append(args[0].shape))
    with run_with(Call((parts,), answers=answers)):
        few = base(**batch).logits
    hook.remove()
    assert seen == [(3, HIDDEN)]
    torch.testing.assert_close(few, full[answers], rtol=1e-5, atol=1e-5)
    if family == "gemma2":
        assert base.config.final_logit_softcapping > few.abs().max() > 1, "the cap is at work"


# --- gradient checkpointing ---


class Counted(dict):
    sets = 0

    def __setitem__(self, key, value):
        self.sets += 1
        super().__setitem__(key, value)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointing_changes_no_gradient(family, dropout):
    injected = Injected(tiny_model(family, layers=3), 2)
    parts = random_parts(injected.geometry, std=0.1)
    batch = tiny_batch()
    critic = nn.Parameter(torch.randn(HIDDEN, generator=torch.Generator().manual_seed(0)))
    runs = [0]
    for layer in injected.layers.values():
        moe_ffn = (layer.fc1 if family == "opt" else layer.mlp).forward
        moe_ffn.run = counting(moe_ffn.run, runs)

    def run():
        runs[0] = 0
        torch.manual_seed(0)
        call = Call((parts,), attention_mask=batch["attention_mask"], features=Counted(), gate_use=Counted())
        call.dropout = dropout
        with run_with(call):
            logits = injected.base(**batch).logits
        adversarial = sum((p @ critic).square().mean() for p in call.features.values())
        loss = logits.log_softmax(-1)[..., 5].mean() + adversarial
        assert runs[0] == call.features.sets == call.gate_use.sets == 2
        leaves = {**parameters(parts), "critic": critic}
        loss.backward()
        assert call.features.sets == call.gate_use.sets == 2, "recomputation hands nothing back"
        grads = {name: leaf.grad for name, leaf in leaves.items()}
        for leaf in leaves.values():
            leaf.grad = None
        return loss.detach(), grads, runs[0]

    loss, grads, without = run()
    injected.checkpoint(True)
    injected.checkpoint(True)
    loss_checkpointed, grads_checkpointed, with_recomputation = run()
    injected.checkpoint(False)
    loss_after, _, after = run()
    assert (without, with_recomputation, after) == (2, 4, 2)
    assert loss == loss_checkpointed == loss_after
    assert grads["critic"].abs().max() > 1e-3
    for name, grad in grads.items():
        torch.testing.assert_close(grads_checkpointed[name], grad, msg=lambda m, name=name: f"{name}: {m}")


def counting(function, runs):
    def counted(*args):
        runs[0] += 1
        return function(*args)

    return counted


def test_checkpointing_keeps_less():
    kept = {}
    for on in (False, True):
        injected = Injected(tiny_model(), "all")
        injected.checkpoint(on)
        parts = random_parts(injected.geometry)
        saved = []
        pack = lambda tensor, saved=saved: saved.append(tensor.numel()) or tensor  # noqa: E731
        with run_with(Call((parts,))), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            injected.base(**tiny_batch(), use_cache=False)
        kept[on] = sum(saved)
    assert kept[True] < kept[False] / 4


def test_generation_under_checkpointing_is_plain():
    injected = Injected(tiny_model(), "all")
    batch = tiny_batch(side="left")
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    call = Call((random_parts(injected.geometry),))
    with run_with(call):
        plain = injected.base.generate(**batch, **options)
    injected.checkpoint(True)
    with run_with(call):
        assert torch.equal(injected.base.generate(**batch, **options), plain)


_VISION = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}

# --- refusals: before anything is changed ---


def refused(base: nn.Module, match: str, adapt_layers: int | str = "all") -> str:
    before = [sorted(module.__dict__) for module in base.modules()]
    with pytest.raises(BaseError, match=match) as caught:
        Injected(base, adapt_layers)
    assert before == [sorted(module.__dict__) for module in base.modules()]
    assert "\n" not in str(caught.value)
    return str(caught.value)


def other(model_type: str, **overrides) -> nn.Module:
    config = AutoConfig.for_model(model_type, **{**FAMILIES["llama"], "vocab_size": 96, **overrides})
    return AutoModelForCausalLM.from_config(config).eval()


def test_refuses_a_quantised_base():
    base = tiny_model()
    base.config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    assert "float32 or bfloat16" in refused(base, "quantised")


def test_refuses_integer_weights():
    base = tiny_model()
    packed = torch.zeros(WIDE, HIDDEN, dtype=torch.int8)
    base.model.layers[0].mlp.up_proj.weight = nn.Parameter(packed, requires_grad=False)
    refused(base, "int8")


def test_refuses_a_mixture_of_experts():
    base = other("mixtral", num_local_experts=2, pad_token_id=0)
    assert SUPPORTED in refused(base, r"MixtralForCausalLM's layer 0 \(.*MixtralSparseMoeBlock")


def test_refuses_a_mixture_of_experts_behind_a_dense_first_layer():
    base = other("qwen3_moe", mlp_only_layers=[0], num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8)
    assert SUPPORTED in refused(base, r"layer 1 \(.*Qwen3MoeSparseMoeBlock")


class Louder(nn.Module):
    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj
        self.act_fn, self.inner = mlp.act_fn, mlp.forward

    def forward(self, x):
        return 1.5 * self.inner(x)


def test_refuses_an_ffn_that_does_more_than_its_projections():
    base = tiny_model()
    base.model.layers[1].mlp = Louder(base.model.layers[1].mlp)
    assert SUPPORTED in refused(base, r"layer 1 \(Louder\) does more")


def test_refuses_too_many_layers():
    refused(tiny_model(), r"adapt_layers: 3 .* 2 layers", adapt_layers=3)


def test_adapts_the_text_model_of_one_that_also_sees():
    text = {**FAMILIES["gemma3_text"], "vocab_size": 96}
    vision = {**_VISION, "num_hidden_layers": 3, "image_size": 8, "patch_size": 4}
    base = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("gemma3", text_config=text, vision_config=vision, mm_tokens_per_image=4)
    ).eval()
    redraw(base, 0)
    injected = Injected(base, "all")
    assert injected.geometry.hidden_size == HIDDEN
    batch = tiny_batch()
    bare = base(**batch).logits
    with run_with(Call((random_parts(injected.geometry),))):
        assert not torch.allclose(base(**batch).logits, bare)


def test_refuses_several_devices():
    base = tiny_model()
    base.lm_head.weight = nn.Parameter(base.lm_head.weight.to("meta"))
    refused(base, "spread over cpu, meta")


def test_refuses_what_is_no_causal_language_model():
    config = tiny_model().config
    refused(nn.Sequential(nn.ModuleList([nn.Linear(2, 2)])), "Sequential is no")
    refused(LlamaModel(config), "LlamaModel is no")
    refused(LlamaForSequenceClassification(config), "LlamaForSequenceClassification is no")


def test_refuses_a_base_that_has_an_adapter():
    base = tiny_model()
    injected = Injected(base, "all")
    refused(base, "detach")
    injected.detach()
    Injected(base, "all").detach()
