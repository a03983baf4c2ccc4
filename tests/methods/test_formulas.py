"""What each rival adds to a task's loss, and what it keeps, against its formula by hand."""

import pytest
import torch
import torch.nn.functional as F

from moecl.config import Task
from moecl.data.encode import Encoded
from moecl.method_config import (
    EWCConfig,
    MoCLConfig,
    NLoRAConfig,
    OLoRAConfig,
    OSFTConfig,
    ReplayConfig,
    SequentialLoRAConfig,
)
from moecl.methods import make_method
from moecl.nn.call import Call, run_with
from moecl.nn.inject import Injected
from tiny import HIDDEN, tiny_batch, tiny_model

A, B, C = (Task(name=name, kind="classification", labels=["x", "y"], head="lm") for name in "abc")
ROWS = [Encoded([5 + n, 6, 7 + n], [8, 9], n % 2, False) for n in range(40)]


@pytest.fixture
def injected() -> Injected:
    return Injected(tiny_model(), "all")


def make(config, injected: Injected):
    return make_method(config, injected.geometry, 0, injected)


def stir(module: torch.nn.Module, seed: int = 0, std: float = 0.2) -> None:
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(std * torch.randn(p.shape, generator=draw))


def test_the_first_matrices_have_a_rate_of_their_own_where_it_is_asked_for(injected):
    plain, slow = (make(SequentialLoRAConfig(rank=2, lora_A_lr=rate), injected) for rate in (1.0, 0.1))
    for one in (plain, slow):
        one.begin(A.model_copy(update={"head": "classifier"}))
    assert list(plain.groups()) == ["lora"], "clipped as one"
    own = dict(slow.state.named_parameters())
    rates = {id(p): slow.rates().get(group, 1.0) for group, ps in slow.groups().items() for p in ps}
    assert rates == {id(p): 0.1 if name.endswith("lora_A") else 1.0 for name, p in own.items()}


def test_ewc_holds_what_mattered(injected):
    one = make(EWCConfig(rank=2, strength=3.0, decay=0.5, fisher_rows=2), injected)
    one.rehearse(ROWS)
    one.begin(A)
    assert one.penalty({}, 1) is None
    named = dict(one.state.lora.named_parameters())

    def losses():
        for factor in (1.0, 2.0, 100.0):  # the third is more than fisher_rows
            yield factor * sum(p.sum() for p in named.values())

    one.learned(losses())
    anchor = {name: p.detach().clone() for name, p in named.items()}
    one.finish()
    one.begin(B)
    assert float(one.penalty({}, 1).detach()) == 0
    stir(one.state.lora)
    moved = sum(float((p.detach() - anchor[name]).square().sum()) for name, p in one.state.lora.named_parameters())
    fisher = (1.0**2 + 2.0**2) / 2
    assert float(one.penalty({}, 1).detach()) == pytest.approx(3.0 / 2 * fisher * moved, rel=1e-5)
    one.learned(losses())
    again = next(iter(one.fisher.values()))
    torch.testing.assert_close(again, torch.full_like(again, 0.5 * fisher + fisher))


def test_o_lora_pays_for_the_overlap(injected):
    one = make(OLoRAConfig(rank=2, orthogonality=0.7), injected)
    one.begin(A)
    assert one.penalty({}, 1) is None
    first = one.state.lora
    stir(first)
    one.finish()
    one.begin(B)
    by_hand = sum(
        float(torch.dot(a, b).detach().abs())
        for layer in injected.geometry.layers
        for name in injected.geometry.projections
        for a in first.pair(layer, name).lora_A
        for b in one.state.lora.pair(layer, name).lora_A
    )
    assert float(one.penalty({}, 1).detach()) == pytest.approx(0.7 * by_hand, rel=1e-5)
    one.penalty({}, 1).backward()
    assert one.past is not None
    assert all(p.grad is None for p in one.past.parameters())


def test_n_lora_pays_for_the_size_of_the_update(injected):
    one = make(NLoRAConfig(rank=2, lora_alpha=6.0, sparsity=0.7), injected)
    one.begin(A)
    stir(one.state.lora)
    geometry = injected.geometry
    norms = []
    for layer in geometry.layers:
        for name in geometry.projections:
            pair = one.state.lora.pair(layer, name)
            delta = 3.0 * pair.lora_B @ pair.lora_A
            norms.append(float(delta.detach().abs().sum()) / len(delta))
    assert float(one.penalty({}, 1).detach()) == pytest.approx(0.7 * sum(norms) / len(norms), rel=1e-5)


def test_mocl_draws_its_key_to_the_texts(injected):
    one = make(MoCLConfig(rank=2), injected)
    one.rehearse(ROWS)
    parts = one.begin(A)
    embedded = injected.base.get_input_embeddings().weight
    means = torch.stack([embedded[row.input_ids].mean(dim=0) for row in ROWS])
    expected = F.normalize(F.normalize(means, dim=-1).mean(dim=0), dim=-1)
    torch.testing.assert_close(parts.keys[0].keys[0].detach(), expected)
    query = torch.randn(4, HIDDEN, generator=torch.Generator().manual_seed(0))
    by_hand = -sum(float(torch.cosine_similarity(row, expected, dim=0)) for row in query) / 4
    assert float(one.penalty({}, 1, query).detach()) == pytest.approx(by_hand, rel=1e-4)
    finished = one.finish()
    assert {"lora-0", "keys"} == finished.tensors.keys()


def test_replay_keeps_a_share_and_trains_on_it(injected):
    one = make(ReplayConfig(rank=2, share=0.1), injected)
    assert [*one.rehearse(ROWS)] == ROWS
    one.begin(A)
    one.finish()
    [kept] = one.memory.values()
    assert len(kept) == 4
    assert all(row in ROWS for row in kept)
    assert [*one.rehearse(ROWS[:3])] == [*ROWS[:3], *kept]
    again = make(ReplayConfig(rank=2, share=0.1), injected)
    again.restore(one.export())
    [restored] = again.memory.values()
    assert [(row.input_ids, row.answer_ids) for row in restored] == [(row.input_ids, row.answer_ids) for row in kept]


def test_a_task_learned_anew_leaves_no_rows_of_its_old_version(injected):
    one = make(ReplayConfig(rank=2, share=0.1), injected)
    for task in (A, B):
        one.rehearse(ROWS)
        one.begin(task)
        one.finish()
    again = make(ReplayConfig(rank=2, share=0.1), injected)
    again.restore(one.export())
    assert list(again.memory) == [A.name, B.name]
    again.forget(A.name)
    assert len(again.rehearse(ROWS)) == len(ROWS) + len(again.memory[B.name])


def test_a_task_learned_anew_is_not_composed_with_its_old_version(injected):
    one = make(MoCLConfig(rank=2), injected)
    for task in (A, B):
        one.rehearse(ROWS)
        one.begin(task)
        one.finish()
    again = make(MoCLConfig(rank=2), injected)
    again.restore(one.export())
    again.forget(A.name)
    again.rehearse(ROWS)
    parts = again.begin(A)
    assert len(parts.loras) == 2
    for name, tensor in parts.loras[0].state_dict().items():
        torch.testing.assert_close(tensor, one.past[B.name][0].state_dict()[name], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_osft_answers_after_the_task_as_in_it(dtype):
    """The step that was chosen is the one that is kept, also where the base is bf16."""
    injected = Injected(tiny_model().to(dtype), "all")
    one = make(OSFTConfig(), injected)
    parts = one.begin(A)
    for p in one.state.parameters():
        assert p.dtype == torch.float32
    stir(one.state, std=0.01)
    batch = tiny_batch()

    def logits(of) -> torch.Tensor:
        with torch.no_grad(), run_with(Call((of,), attention_mask=batch["attention_mask"])):
            return injected.base(**batch).logits

    before = logits(parts)
    torch.testing.assert_close(logits(one.finish().parts), before, rtol=1e-5, atol=1e-5)


def test_osft_keeps_the_high_directions(injected):
    """Gradients of the low directions are orthogonal to the high ones, through our FFN as through PEFT's layer."""
    one = make(OSFTConfig(preserved=0.5), injected)
    parts = one.begin(A)
    batch = tiny_batch()
    with run_with(Call((parts,), attention_mask=batch["attention_mask"])):
        injected.base(**batch).logits.square().mean().backward()
    weight = one.weights.layers["0"]["down_proj"].weight
    high = torch.linalg.svd(weight, full_matrices=False).U[:, : min(weight.shape) // 2]
    gradient = one.tuned.layers["0"]["down_proj"].osf_svd_params["default"]["U_low"].grad
    assert float(gradient.norm()) > 0
    assert float((high.mT @ gradient).norm()) < 1e-5 * float(gradient.norm())
    kept = [one.preserved()]
    for task in (B, C):
        one.finish()
        one.begin(task)
        kept.append(one.preserved())
    assert kept == pytest.approx([0.5, 0.75, 0.5 + 0.5 * 2 / 3])
