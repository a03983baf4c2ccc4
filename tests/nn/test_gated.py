"""What MoE-CL trains, from the first task to the last: begin, finish, retention, and what the store gets."""

import hashlib

import pytest
import torch
import torch.nn.functional as F

from moecl.config import MoECLConfig
from moecl.nn.call import Call, run_with
from moecl.nn.forms import from_tensors, to_tensors
from moecl.nn.gated import GatedLearner, seeded
from moecl.nn.inject import Injected
from moecl.nn.moe_ffn import Gated
from moecl.nn.sums import Sum
from tiny import HIDDEN, LAYERS, parameters, tiny_batch, tiny_model

CONFIGS = {
    "default": MoECLConfig(rank=4),
    "live": MoECLConfig(rank=4, retention="live"),
    "live, shared gate": MoECLConfig(rank=4, retention="live", gate="shared"),
    "exact, shared gate": MoECLConfig(rank=4, gate="shared"),
    "paper": MoECLConfig.paper(),
    "no adversary": MoECLConfig(rank=4, alpha=0.0),
    "apart": MoECLConfig(rank=4, nested=False),
}
BATCH = tiny_batch()


@pytest.fixture
def injected(tiny_llama):
    return Injected(tiny_llama, "all")


def forward(injected: Injected, parts: Gated, dropout: float = 0.0) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
    call = Call((parts,), attention_mask=BATCH["attention_mask"], features={}, dropout=dropout)
    with run_with(call):
        return injected.base(**BATCH).logits, call.features


@torch.no_grad()
def logits(injected: Injected, parts: Gated) -> torch.Tensor:
    return forward(injected, parts)[0]


def train(injected: Injected, learner: GatedLearner, steps: int = 3) -> None:
    groups = learner.groups()
    optimizer = torch.optim.AdamW(
        [{"params": params} for params in groups.values() if params], lr=0.01, weight_decay=0.1
    )
    torch.manual_seed(learner.adversary.classes if learner.adversary else 0)
    for step in range(steps):
        out, features = forward(injected, learner.parts(), learner.config.dropout)
        loss = F.cross_entropy(out[:, :-1].flatten(0, 1), BATCH["input_ids"][:, 1:].flatten())
        if learner.head is not None:
            loss = loss + learner.head(features[LAYERS - 1]).square().mean()
        if learner.adversary is not None:
            loss = loss + learner.loss(features, step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def learn(injected: Injected, learner: GatedLearner, name: str, labels: int = 0) -> Gated:
    learner.begin(name, labels)
    train(injected, learner)
    return learner.finish()


def digest(parts: Gated) -> dict[str, str]:
    return {
        name: hashlib.sha256(b"".join(t.numpy().tobytes() for _, t in sorted(found.items()))).hexdigest()
        for name, found in to_tensors(parts).items()
    }


# --- a task's beginning ---


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_first_task_starts_as_the_base(injected, config):
    learner = GatedLearner(injected.geometry, config)
    bare = injected.base(**BATCH).logits
    preview = learner.preview("one")
    assert torch.equal(logits(injected, preview), bare)
    begun = learner.begin("one")
    assert digest(begun) == digest(preview)
    assert torch.equal(logits(injected, begun), bare)


def test_a_later_task_starts_with_what_the_shared_expert_knows(injected):
    learner = GatedLearner(injected.geometry, MoECLConfig(rank=4))
    learn(injected, learner, "one")
    two = learner.begin("two")
    assert two.shared is learner.shared
    assert not any(p.any() for n, p in two.task.named_parameters() if n.endswith("lora_B"))
    assert not torch.equal(logits(injected, two), injected.base(**BATCH).logits)


def test_a_fresh_nested_expert_leaves_the_shared_one_as_it_is_and_one_apart_halves_it(injected):
    started = {}
    for nested in (True, False):
        learner = GatedLearner(injected.geometry, MoECLConfig(rank=4, nested=nested))
        learn(injected, learner, "one")
        two = learner.begin("two")
        started[nested] = logits(injected, two)
        alone = logits(injected, Sum(learner.shared, two.shared_scale))
        assert torch.allclose(started[nested], alone, rtol=1e-5, atol=1e-5) == nested


def test_warm_start_copies_the_shared_expert(injected):
    learner = GatedLearner(injected.geometry, MoECLConfig(rank=4, nested=False, warm_start="shared"))
    learn(injected, learner, "one")
    two = learner.begin("two")
    for name, tensor in learner.shared.state_dict().items():
        assert torch.equal(two.task.state_dict()[name], tensor)
    train(injected, learner)
    assert not torch.equal(two.task.pair(0, "up_proj").lora_B, learner.shared.pair(0, "up_proj").lora_B), (
        "a copy, not the same tensors: the adversary moves the shared expert alone"
    )


def test_what_is_drawn_depends_on_seed_and_name_alone(injected):
    fresh = GatedLearner(injected.geometry, MoECLConfig(rank=4), seed=1)
    later = GatedLearner(injected.geometry, MoECLConfig(rank=4), seed=1)
    learn(injected, later, "one")
    other = GatedLearner(injected.geometry, MoECLConfig(rank=4), seed=2)
    two, two_later, two_other = (digest(learner.preview("two", 3)) for learner in (fresh, later, other))
    assert two["task"] == two_later["task"] != two_other["task"]
    assert two["head"] == two_later["head"] != two_other["head"]
    assert two["task"] != digest(fresh.preview("three"))["task"]
    draws = [torch.rand(1, generator=seeded(*words)).item() for words in ((1, "a"), (1, "b"), (2, "a"), (1, "a", 1))]
    assert len(set(draws)) == 4


def test_classifier_head(injected):
    learner = GatedLearner(injected.geometry, MoECLConfig(rank=4))
    parts = learner.begin("one", labels=5)
    assert parts.head.weight.shape == (5, HIDDEN)
    assert parts.head.bias is None
    assert 0.01 < parts.head.weight.std() < 0.03
    before = parts.head.weight.detach().clone()
    train(injected, learner)
    assert not torch.equal(parts.head.weight, before)
    finished = learner.finish()
    assert not finished.head.weight.requires_grad
    assert learner.begin("two").head is None


def test_one_task_at_a_time(injected):
    learner = GatedLearner(injected.geometry, MoECLConfig(rank=4))
    with pytest.raises(AssertionError, match="no task"):
        learner.parts()
    learner.begin("one")
    with pytest.raises(AssertionError, match="finish"):
        learner.begin("two")


# --- contract 5: what gets a gradient ---


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_only_the_groups_get_a_gradient(injected, config):
    learner = GatedLearner(injected.geometry, config)
    one = learn(injected, learner, "one")
    parts = learner.begin("two", labels=2)
    train(injected, learner, steps=2)
    names = {id(p): name for name, p in learner.named_parameters()}
    groups = {group: {names[id(p)] for p in params} for group, params in learner.groups().items()}
    layers = [f"layers.{i}" for i in range(LAYERS)]
    projections = [f"{p}.{ab}" for p in ("gate_proj", "up_proj", "down_proj") for ab in ("lora_A", "lora_B")]
    gate = "gate" if config.gate == "shared" else "own_gate"
    both = [f"{expert}.{layer}.{p}" for expert in ("shared", "task") for layer in layers for p in projections]
    assert groups["lora_A"] == {name for name in both if name.endswith("lora_A")}
    assert groups["experts"] == {
        *(name for name in both if name.endswith("lora_B")),
        *(f"{gate}.{layer}.gate" for layer in layers),
        "head.weight",
    }
    assert groups["discriminator"] == ({"adversary.weight"} if config.alpha else set())
    trained = {name for name, p in learner.named_parameters() if p.grad is not None and p.grad.any()}
    assert trained == set().union(*groups.values())
    assert {id(p) for p in parameters(parts).values()} == {id(p) for ps in learner.groups().values() for p in ps} - {
        id(p) for p in learner.groups()["discriminator"]
    }
    assert not any(p.grad is not None for p in injected.base.parameters())
    frozen = {id(p): name for name, p in parameters(one).items() if id(p) not in names}
    assert not [
        name for name, p in parameters(one).items() if id(p) in frozen and (p.grad is not None or p.requires_grad)
    ]


# --- retention ---


def test_exact_a_finished_task_never_moves(injected):
    for gate in ("task", "shared"):
        learner = GatedLearner(injected.geometry, MoECLConfig(rank=4, gate=gate))
        learner.begin("one")
        train(injected, learner)
        under_way = logits(injected, learner.parts())
        one = learner.finish()
        before, digests = logits(injected, one), digest(one)
        assert torch.equal(before, under_way), "finishing changes nothing"
        for name in ("two", "three"):
            learn(injected, learner, name)
        assert torch.equal(logits(injected, one), before)
        assert digest(one) == digests


@pytest.mark.parametrize("gate", ["task", "shared"])
def test_live_a_finished_task_follows_the_shared_expert(injected, gate):
    learner = GatedLearner(injected.geometry, MoECLConfig(rank=4, retention="live", gate=gate))
    one = learn(injected, learner, "one")
    assert one.shared is learner.shared
    before, digests = logits(injected, one), digest(one)
    learn(injected, learner, "two")
    assert not torch.allclose(logits(injected, one), before)
    after = digest(one)
    assert after["shared"] != digests["shared"]
    assert after["task"] == digests["task"]
    assert (after["gate"] != digests["gate"]) == (gate == "shared")


def test_a_shared_gate_is_one_for_all_tasks(injected):
    learner = GatedLearner(injected.geometry, MoECLConfig(rank=4, retention="live", gate="shared", gate_std=0.02))
    one = learn(injected, learner, "one")
    two = learner.begin("two")
    assert one.gate is two.gate is learner.gate
    own = GatedLearner(injected.geometry, MoECLConfig(rank=4))
    one = learn(injected, own, "one")
    two = own.begin("two")
    assert not any(p.any() for p in two.gate.parameters())
    assert any(p.any() for p in one.gate.parameters())


def test_no_adversary_with_alpha_0(injected):
    learner = GatedLearner(injected.geometry, MoECLConfig(rank=4, alpha=0.0))
    assert learner.adversary is None
    learn(injected, learner, "one")
    assert set(learner.export()) == {"shared"}


def test_the_adversary_grows_and_remembers_with_the_tasks(injected):
    learner = GatedLearner(injected.geometry, MoECLConfig(rank=4))
    for tasks, name in enumerate(("one", "two"), start=1):
        learner.begin(name)
        assert learner.adversary.classes == tasks
        train(injected, learner)
        learner.finish()
        assert learner.adversary.mean.shape == learner.adversary.variance.shape == (LAYERS, tasks, HIDDEN)


# --- on disk ---


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_export_and_restore_go_on_as_if_never_stopped(injected, config):
    learner = GatedLearner(injected.geometry, config, seed=3)
    learn(injected, learner, "one")
    learn(injected, learner, "two")
    exported = learner.export()
    kept = {part: {name: t.clone() for name, t in found.items()} for part, found in exported.items()}
    again = GatedLearner(injected.geometry, config, seed=3)
    again.restore(kept)
    assert {n: tuple(t.shape) for n, t in again.state_dict().items()} == {
        n: tuple(t.shape) for n, t in learner.state_dict().items()
    }
    ours, theirs = learn(injected, learner, "three", 2), learn(injected, again, "three", 2)
    assert digest(ours) == digest(theirs)
    for part, found in exported.items():
        for name, tensor in found.items():
            assert torch.equal(tensor, kept[part][name]), f"training wrote to the exported {part} {name}"
    finals = learner.export(), again.export()
    assert all(torch.equal(finals[0][p][n], finals[1][p][n]) for p in finals[0] for n in finals[0][p])
    if config.alpha:
        weight = finals[0]["discriminator"][f"layers.{LAYERS - 1}.discriminator"]
        assert weight.shape == (3, HIDDEN)
        assert finals[0]["memory"]["layers.0.mean"].shape == (3, HIDDEN)


def test_restore_refuses_another_configuration(injected):
    state = GatedLearner(injected.geometry, MoECLConfig(rank=4, alpha=0.0)).export()
    with pytest.raises(KeyError, match="discriminator"):
        GatedLearner(injected.geometry, MoECLConfig(rank=4)).restore(state)
    with pytest.raises(RuntimeError, match="size mismatch"):
        GatedLearner(injected.geometry, MoECLConfig(rank=8, alpha=0.0)).restore(state)


def test_a_checkpoint_in_the_middle_of_a_task_goes_on(injected):
    learner = GatedLearner(injected.geometry, MoECLConfig(rank=4))
    learn(injected, learner, "one")
    between = learner.export()
    learner.begin("two", 3)
    train(injected, learner)
    state = {name: tensor.clone() for name, tensor in learner.state_dict().items()}
    again = GatedLearner(injected.geometry, MoECLConfig(rank=4))
    again.restore(between)
    again.begin("two", 3)
    again.load_state_dict(state)
    assert torch.equal(logits(injected, again.parts()), logits(injected, learner.parts()))
    for each in (learner, again):
        train(injected, each)
    assert digest(learner.finish()) == digest(again.finish())


@pytest.mark.parametrize("labels", [0, 4])
def test_tensors_round_trip(injected, labels):
    learner = GatedLearner(injected.geometry, MoECLConfig(rank=4))
    one = learn(injected, learner, "one", labels)
    stored = to_tensors(one)
    assert set(stored) == {"shared", "task", "gate", *(["head"] if labels else [])}
    assert not labels or set(stored["head"]) == {"head"}
    assert set(stored["gate"]) == {f"layers.{i}.gate" for i in range(LAYERS)}
    read = {part: from_tensors(injected.geometry, part, tensors) for part, tensors in stored.items()}
    again = type(one)(scale=one.scale, **read)
    assert torch.equal(logits(injected, again), logits(injected, one))
    assert digest(again) == digest(one)
    assert not any(p.requires_grad for p in parameters(again).values())
    written = [t for found in stored.values() for t in found.values()]
    assert not {t.data_ptr() for t in written} & {p.data_ptr() for p in parameters(again).values()}, "copies"
    if labels:
        assert torch.equal(again.head.weight, one.head.weight)
    for part in stored:
        with pytest.raises((RuntimeError, KeyError)):
            from_tensors(injected.geometry, part, {})
    shallow = Injected(tiny_model(), 1).geometry
    with pytest.raises(RuntimeError, match=r"layers\.0"):
        from_tensors(shallow, "task", stored["task"])


def test_the_number_of_tasks_changes_nothing_that_is_trained(injected):
    """Counts behind the cost of a step, and what a resumed task takes up: the same for 40 tasks and for 80."""
    learner = GatedLearner(injected.geometry, MoECLConfig(rank=4))
    counts = []
    for number in range(81):
        learner.begin(f"t{number}")
        if number in (40, 80):
            trained = [p.numel() for group in learner.groups().values() for p in group]
            counts.append((trained, {name: tensor.shape for name, tensor in learner.state_dict().items()}))
        learner.finish()
    assert counts[0] == counts[1]
    assert learner.export()["discriminator"]["layers.0.discriminator"].shape == (81, HIDDEN)


def test_a_checkpoint_among_many_tasks_goes_on(injected):
    learner = GatedLearner(injected.geometry, MoECLConfig(rank=4))
    for number in range(40):
        learner.begin(f"t{number}")
        train(injected, learner, steps=1)
        learner.finish()
    between = {part: {name: t.clone() for name, t in found.items()} for part, found in learner.export().items()}
    learner.begin("new")
    train(injected, learner)
    state = {name: tensor.clone() for name, tensor in learner.state_dict().items()}
    again = GatedLearner(injected.geometry, MoECLConfig(rank=4))
    again.restore(between)
    again.begin("new")
    again.load_state_dict(state)
    for each in (learner, again):
        train(injected, each)
    assert digest(learner.finish()) == digest(again.finish())
    ours, theirs = learner.export(), again.export()
    assert all(torch.equal(ours[part][name], theirs[part][name]) for part in ours for name in ours[part])
    old = between["discriminator"]["layers.0.discriminator"]
    moved = (ours["discriminator"]["layers.0.discriminator"][:40] != old).any(dim=1)
    assert moved.sum() == 32
