"""Each form against the formula it stands for, on every FFN family, and rows of all forms in one batch."""

import pytest
import torch
from torch import nn

from moecl.nn.call import Call, Parts, run_with
from moecl.nn.forms import FORMS, from_tensors, to_tensors
from moecl.nn.inject import Injected
from moecl.nn.lora import Expert
from moecl.nn.moe_ffn import Nested
from moecl.nn.sums import Keys, Mix, Sum, merge
from moecl.nn.weights import Weights
from tiny import FAMILIES, HIDDEN, random_parts, tiny_batch, tiny_model


def expert(injected: Injected, seed: int, rank: int = 3) -> Expert:
    draw = torch.Generator().manual_seed(seed)
    made = Expert(injected.geometry, rank)
    with torch.no_grad():
        for p in made.parameters():
            p.copy_(0.3 * torch.randn(p.shape, generator=draw))
    return made.requires_grad_(False)


def stirred(injected: Injected, seed: int = 0) -> Weights:
    weights = injected.projections().requires_grad_(False)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in weights.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=draw))
    return Weights(weights)


def some_of_each(injected: Injected) -> dict[str, Parts]:
    keys = torch.randn(2, HIDDEN, generator=torch.Generator().manual_seed(5))
    return {
        "gated": random_parts(injected.geometry),
        "nested": random_parts(injected.geometry, 4, form=Nested),
        "sum": Sum(expert(injected, 1), 2.0),
        "mix": Mix((expert(injected, 2), expert(injected, 3, 2)), (Keys(keys),), 2.0, 8.0),
        "weights": stirred(injected),
    }


def logits(injected: Injected, call: Call, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    call.attention_mask = batch["attention_mask"]
    with torch.no_grad(), run_with(call):
        return injected.base(**batch).logits


def as_weights(injected: Injected, deltas: list[tuple[float, Expert]]) -> Weights:
    """Weights that are the base's with LoRAs added: W + c B A, the formula itself."""
    weights = injected.projections().requires_grad_(False)
    with torch.no_grad():
        for scale, lora in deltas:
            for layer in injected.geometry.layers:
                for name in injected.geometry.projections:
                    pair = lora.pair(layer, name)
                    weights.layers[str(layer)][name].weight += scale * pair.lora_B @ pair.lora_A
    return Weights(weights)


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_that_are_the_bases_are_the_base(family):
    injected = Injected(tiny_model(family), "all")
    batch = tiny_batch()
    base = logits(injected, Call((None,)), batch)
    torch.testing.assert_close(logits(injected, Call((as_weights(injected, []),)), batch), base, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sum_is_loras_added_to_the_weights(family):
    injected = Injected(tiny_model(family), "all")
    batch, one, past = tiny_batch(), expert(injected, 1), expert(injected, 2, 5)
    expected = logits(injected, Call((as_weights(injected, [(2.0, one), (2.0, past)]),)), batch)
    assert not torch.allclose(expected, logits(injected, Call((None,)), batch), atol=1e-2)
    for parts in (Sum(one, 2.0, past=past), Sum(merge([past, one]), 2.0)):
        torch.testing.assert_close(logits(injected, Call((parts,)), batch), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_mix_weighs_loras_by_the_likeness_of_text_and_key(family):
    injected = Injected(tiny_model(family), "all")
    batch, loras = tiny_batch(), (expert(injected, 1), expert(injected, 2))
    keys = torch.randn(2, HIDDEN, generator=torch.Generator().manual_seed(5))
    got = logits(injected, Call((Mix(loras, (Keys(keys),), 2.0, 8.0),)), batch)
    seen: list[torch.Tensor] = []
    first = next(m for m in injected.base.get_decoder().modules() if isinstance(m, nn.ModuleList))[0]
    look = first.register_forward_pre_hook(lambda _, args, kwargs: seen.append(args[0]), with_kwargs=True)
    base = logits(injected, Call((None,)), batch)
    look.remove()
    for row, mask in enumerate(batch["attention_mask"].bool()):
        query = seen[0][row][mask].mean(dim=0)
        weights = torch.softmax(8.0 * torch.stack([torch.cosine_similarity(query, key, dim=0) for key in keys]), dim=0)
        assert abs(weights[0] - weights[1]) > 1e-3
        same = as_weights(injected, [(2.0 * float(w), lora) for w, lora in zip(weights, loras, strict=True)])
        torch.testing.assert_close(got[row], logits(injected, Call((same,)), batch)[row], rtol=1e-5, atol=1e-5)
        assert not torch.allclose(got[row], base[row], atol=1e-3)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_all_forms_in_one_batch_are_the_rows_alone(family, side):
    """Contract 3, over forms; the bare base among them is bitwise the base in the same batch."""
    injected = Injected(tiny_model(family), "all")
    forms = some_of_each(injected)
    assert forms.keys() == FORMS.keys()
    another = Sum(expert(injected, 7, 5), 1.0)
    parts = (*forms.values(), None, another, forms["mix"])
    batch = tiny_batch(rows=len(parts), length=20, side=side)
    got = logits(injected, Call(parts, torch.arange(len(parts))), batch)
    base = logits(injected, Call((None,)), batch)
    real = batch["attention_mask"].bool()
    for row, own in enumerate(parts):
        alone = logits(injected, Call((own,)), batch)
        torch.testing.assert_close(got[row][real[row]], alone[row][real[row]], rtol=1e-5, atol=1e-5)
        if own is not None:
            assert not torch.allclose(alone[row][real[row]], base[row][real[row]], atol=1e-3)
    bare = parts.index(None)
    assert torch.equal(got[bare], base[bare])


@pytest.mark.parametrize("beams", [1, 2])
def test_generation_of_mixed_forms_is_each_row_alone(beams):
    injected = Injected(tiny_model("llama"), "all")
    parts = tuple(some_of_each(injected).values())
    batch = tiny_batch(rows=len(parts), side="left")

    def write(call: Call) -> torch.Tensor:
        call.attention_mask = batch["attention_mask"]
        with torch.no_grad(), run_with(call):
            return injected.base.generate(**batch, max_new_tokens=5, min_new_tokens=5, num_beams=beams, do_sample=False)

    got = write(Call(parts, torch.arange(len(parts))))
    for row, own in enumerate(parts):
        assert torch.equal(got[row], write(Call((own,)))[row])


def test_parts_out_of_their_tensors_are_the_same():
    injected = Injected(tiny_model("llama"), "all")
    batch = tiny_batch()
    for name, parts in some_of_each(injected).items():
        modules = {part: from_tensors(injected.geometry, part, found) for part, found in to_tensors(parts).items()}
        assert parts.needs <= modules.keys()
        again = FORMS[name].build(modules, {"scale": getattr(parts, "scale", 1.0), "sharpness": 8.0})
        assert again.frozen
        assert torch.equal(logits(injected, Call((parts,)), batch), logits(injected, Call((again,)), batch))
