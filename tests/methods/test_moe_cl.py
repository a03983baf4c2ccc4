"""MoE-CL as a method: what it makes, trains, hands over and takes up again."""

import pytest
import torch

from moecl.config import Task
from moecl.method_config import METHODS, MoECLConfig
from moecl.methods import REGISTRY, make_method
from moecl.methods.moe_cl import MoECLMethod
from moecl.model import MoECL
from moecl.nn.lora import Geometry
from tiny import HIDDEN, random_parts, tiny_model

GEOMETRY = Geometry((0, 1), HIDDEN, (48, 48), gated=True, num_layers=2)
A, B, C = (Task(name=name, kind="classification", labels=["x", "y"], head="lm") for name in "abc")


def method(**settings) -> MoECLMethod:
    made = make_method(MoECLConfig(rank=2, **settings), GEOMETRY, seed=0)
    assert isinstance(made, MoECLMethod)
    return made


def features(seed: int = 0) -> dict[int, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {layer: torch.randn(4, HIDDEN, generator=draw) for layer in GEOMETRY.layers}


def stir(one: MoECLMethod, seed: int = 0) -> None:
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in one.state.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw))


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_the_registry_knows_what_the_config_knows():
    assert REGISTRY.keys() == METHODS.keys()
    assert all(made.name == name for name, made in REGISTRY.items())


def test_what_is_trained():
    """Contract 5: shared expert, task expert, gate and head on one side, the discriminator on the other."""
    for gate, head in (("task", "lm"), ("shared", "classifier")):
        one = method(gate=gate)
        task = A.model_copy(update={"head": head})
        parts = one.begin(task)
        groups = one.groups()
        modules = [parts.shared, parts.task, parts.gate, *([parts.head] if head == "classifier" else [])]
        expected = {id(p) for module in modules for p in module.parameters()}
        assert {id(p) for p in (*groups["lora_A"], *groups["experts"])} == expected
        assert [p.shape for p in groups["discriminator"]] == [(2, 1, HIDDEN)]
        assert all(p.requires_grad for group in groups.values() for p in group)
        assert {id(p) for group in groups.values() for p in group} == {id(p) for p in one.state.parameters()}
    assert method(alpha=0.0).groups()["discriminator"] == []


def test_the_penalty_turns_one_side_against_the_other():
    one = method(alpha=0.5)
    one.begin(A)
    assert one.penalty(features(), 1).item() == 0, "one class has nothing to guess"
    one.finish()
    one.begin(B)
    stir(one)
    given = {layer: p.requires_grad_(True) for layer, p in features().items()}
    loss = one.penalty(given, 1)
    loss.backward()
    discriminator = one.state.adversary.weight
    with torch.no_grad():
        weight = discriminator - 1e-2 * discriminator.grad
        fooled = {layer: p - 1e-2 * p.grad for layer, p in given.items()}
        guess = lambda w, p: torch.stack(  # noqa: E731
            [torch.nn.functional.cross_entropy(p[i] @ w[i].T, torch.ones(4, dtype=torch.long)) for i in (0, 1)]
        ).mean()
        before = guess(discriminator, features())
        assert guess(discriminator, fooled) > before, "experts make the guess worse"
        one.state.adversary.memory = False
        assert guess(weight, features()) != before


def test_draws_depend_on_the_step_alone():
    one = method()
    one.begin(A)
    one.penalty(features(), 1)
    one.finish()
    one.begin(B)
    stir(one)
    first, second = one.penalty(features(), 1), one.penalty(features(), 2)
    torch.randn(10)
    assert one.penalty(features(), 1).item() == first.item() != second.item()
    assert 0 <= one.log()["discriminator_accuracy"] <= 1


def test_before_its_first_step_a_task_changes_nothing():
    one = method()
    preview = one.preview(A)
    parts = one.begin(A)
    assert same(preview.task.state_dict(), parts.task.state_dict())
    assert all(p.abs().sum() == 0 for name, p in parts.task.named_parameters() if name.endswith("lora_B"))
    assert one.preview(A.model_copy(update={"head": "classifier"})) is None


@pytest.mark.parametrize("gate", ["task", "shared"])
def test_exact_retention_hands_over_copies(gate):
    one = method(gate=gate)
    one.begin(A)
    stir(one)
    finished = one.finish()
    assert finished.form == "nested"
    assert finished.moved == {}
    assert finished.settings == {
        "method": "moe-cl",
        "scale": one.state.scale,
        **one.config.model_dump(exclude={"name"}),
    }
    assert finished.tensors.keys() == {"shared", "task", "gate"}
    before = {name: {k: t.clone() for k, t in part.items()} for name, part in finished.tensors.items()}
    one.begin(B)
    stir(one, 1)
    one.finish()
    assert one.moving() == {}
    for name, module in (
        ("shared", finished.parts.shared),
        ("task", finished.parts.task),
        ("gate", finished.parts.gate),
    ):
        assert same(before[name], module.state_dict())
        assert same(before[name], finished.tensors[name])
        assert not any(p.requires_grad for p in module.parameters())


@pytest.mark.parametrize("gate", ["task", "shared"])
def test_live_retention_hands_over_what_moves(gate):
    one = method(gate=gate, retention="live")
    one.begin(A)
    stir(one)
    first = one.finish()
    one.begin(B)
    stir(one, 1)
    second = one.finish()
    assert second.moved.keys() == ({"shared", "gate"} if gate == "shared" else {"shared"})
    assert same(second.moved["shared"], one.state.shared.state_dict())
    assert one.moving()["shared"] is one.state.shared
    assert one.moving().get("gate") is one.state.gate
    assert one.moving().keys() == second.moved.keys()
    assert not same(first.tensors["shared"], second.tensors["shared"])


@pytest.mark.parametrize(
    "settings",
    [{}, {"gate": "shared", "retention": "live"}, {"alpha": 0.0}, {"nested": False, "warm_start": "shared"}],
)
def test_it_is_taken_up_where_it_was_left(settings):
    one = method(**settings)
    for number, task in enumerate((A, B)):
        one.begin(task)
        stir(one, number)
        if one.reads_features:
            one.penalty(features(number), 1)
        one.finish()
    other = method(**settings)
    other.restore(one.export())
    states = []
    for each in (one, other):
        each.begin(C)
        if each.reads_features:
            each.penalty(features(5), 1).backward()
        states.append(
            {
                **each.state.state_dict(),
                **{f"{n}.grad": p.grad for n, p in each.state.named_parameters() if p.grad is not None},
            }
        )
    assert same(*states)


def test_a_state_that_is_not_its_own_is_refused():
    one = method(gate="shared")
    one.begin(A)
    one.finish()
    state = one.export()
    with pytest.raises(RuntimeError):
        make_method(MoECLConfig(rank=4, gate="shared"), GEOMETRY, 0).restore(state)
    with pytest.raises(KeyError):
        one.restore({name: part for name, part in state.items() if name != "gate"})


def test_its_parts_answer_for_any_model_of_the_geometry():
    model = MoECL.attach(tiny_model())
    assert model.geometry == GEOMETRY
    assert random_parts(GEOMETRY).shared.state_dict().keys() == method().state.shared.state_dict().keys()
