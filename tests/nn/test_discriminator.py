"""The adversary: one place where a sign turns, classes that grow, and a memory that keeps old classes alive."""

import copy

import pytest
import torch
import torch.nn.functional as F

from moecl.nn.call import Call, run_with
from moecl.nn.discriminator import MAX_DRAWN, Adversary, gradient_reversal
from moecl.nn.inject import Injected
from moecl.nn.lora import Geometry
from tiny import parameters, random_parts, tiny_batch, tiny_model

D = 32
LAYERS = (1, 3)
GEOMETRY = Geometry(layers=LAYERS, hidden_size=D, intermediate_sizes=(48, 48), gated=True, num_layers=4)


def adversary(classes: int, alpha: float = 0.3, memory: bool = False, geometry: Geometry = GEOMETRY) -> Adversary:
    """With `classes` classes and weights that are not zero."""
    ours = Adversary(geometry, alpha, memory)
    for _ in range(classes):
        ours.grow(seeded())
    torch.nn.init.normal_(ours.weight, generator=seeded(11))
    return ours


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def features(rows: int = 5, seed: int = 0, center: float = 0.0) -> dict[int, torch.Tensor]:
    return {layer: torch.randn(rows, D, generator=seeded(seed + layer)) + center for layer in LAYERS}


# --- the sign ---


def test_gradient_reversal_is_the_identity_forward_and_minus_alpha_backward():
    x = torch.randn(3, 4, requires_grad=True)
    y = gradient_reversal(x, 0.1)
    assert torch.equal(y, x)
    weights = torch.randn(3, 4)
    (y * weights).sum().backward()
    assert torch.equal(x.grad, -0.1 * weights)


def test_one_backward_trains_both_sides():
    """The discriminator's gradient is dL_GAN, the experts' d(L_SFT - alpha L_GAN)."""
    injected = Injected(tiny_model(dtype=torch.float64), "all")
    parts = random_parts(injected.geometry)
    ours = adversary(3, geometry=injected.geometry)
    batch = tiny_batch()
    experts = parameters(parts)

    def forward() -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
        call = Call((parts,), attention_mask=batch["attention_mask"], features={})
        with run_with(call):
            logits = injected.base(**batch).logits
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["input_ids"][:, 1:].flatten()), call.features

    sft, p = forward()
    loss = ours.loss(p, seeded())
    (sft + loss).backward()

    sft, p = forward()
    true = torch.full((3,), 2)
    gan = torch.stack([F.cross_entropy(p[i].float() @ ours.weight[i].T, true) for i in (0, 1)]).mean()
    torch.testing.assert_close(loss, gan)
    (of_weight,) = torch.autograd.grad(gan, ours.weight, retain_graph=True)
    torch.testing.assert_close(ours.weight.grad, of_weight)
    of_sft = torch.autograd.grad(sft, list(experts.values()), retain_graph=True)
    of_gan = torch.autograd.grad(gan, list(experts.values()), allow_unused=True)
    moved = 0
    for (name, parameter), g_sft, g_gan in zip(experts.items(), of_sft, of_gan, strict=True):
        expected = g_sft if g_gan is None else g_sft - 0.3 * g_gan
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
        moved += g_gan is not None and bool(g_gan.abs().max() > 1e-4)
        if name.endswith(("layers.1.gate", "layers.1.up_proj.lora_A")) and not name.startswith("shared"):
            assert g_gan is None or not g_gan.any(), (
                f"{name}: the last layer's gate and task expert are not in its features"
            )
    assert moved >= 12


# --- the loss ---


def test_loss_is_the_cross_entropy_of_raw_logits():
    ours, p = adversary(3), features()
    expected = sum(F.cross_entropy(p[i] @ ours.weight[n].T, torch.full((5,), 2)) for n, i in enumerate(LAYERS)) / 2
    torch.testing.assert_close(ours.loss(p, seeded()), expected)
    with torch.no_grad():
        guesses = torch.stack([(p[i] @ ours.weight[n].T).argmax(-1) for n, i in enumerate(LAYERS)])
    assert ours.accuracy == (guesses == 2).float().mean()


def test_a_confident_discriminator_has_no_loss():
    """Softmax applied twice could not get below 0.55 with two classes."""
    ours = adversary(2)
    with torch.no_grad():
        ours.weight.zero_()
        ours.weight[:, 1, 0] = 100.0
    p = {layer: F.one_hot(torch.zeros(4, dtype=torch.long), D).float() for layer in LAYERS}
    assert ours.loss(p, seeded()) < 1e-6


def test_no_loss_while_there_is_one_class():
    ours = adversary(1, memory=True)
    loss = ours.loss(features(), seeded())
    assert loss == 0
    assert not loss.requires_grad


def test_bf16_features_are_judged_in_fp32():
    ours = adversary(2)
    p = {layer: x.bfloat16().requires_grad_() for layer, x in features().items()}
    loss = ours.loss(p, seeded())
    loss.backward()
    assert loss.dtype == ours.weight.grad.dtype == torch.float32
    assert p[1].grad.dtype == torch.bfloat16


def test_grow_keeps_the_old_rows():
    ours = adversary(2)
    before = ours.weight.detach().clone()
    ours.grow(seeded())
    assert ours.classes == 3
    assert torch.equal(ours.weight[:, :2], before)
    assert not ours.weight[:, 2].any()
    assert ours.weight.requires_grad
    assert dict(ours.named_parameters())["weight"] is ours.weight


# --- the memory ---


def remembered(ours: Adversary, tasks: int, batches: int = 200) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Show `ours` tasks of known mean and deviation; what it should have kept of each, [L, D]."""
    known = []
    for task in range(tasks):
        ours.grow(seeded())
        draw = seeded(task)
        mean = torch.randn(len(LAYERS), D, generator=draw) * 2
        deviation = torch.rand(len(LAYERS), D, generator=draw) + 0.5
        for _ in range(batches):
            p = mean[:, None] + deviation[:, None] * torch.randn(len(LAYERS), 64, D, generator=draw)
            ours.loss(dict(zip(LAYERS, p, strict=True)), draw)
        ours.remember()
        known.append((mean, deviation))
    return known


def test_remembers_mean_and_variance_and_draws_from_them():
    ours = Adversary(GEOMETRY, 0.1, memory=True)
    known = remembered(ours, 2)
    ours.grow(seeded())
    drawn, tasks = ours.draw(20_000, seeded(5))
    assert drawn.shape == (2, 20_000, D)
    assert torch.bincount(tasks).tolist() == [10_000, 10_000]
    for task, (mean, deviation) in enumerate(known):
        assert (ours.mean[:, task] - mean).abs().max() < 0.2
        assert (ours.variance[:, task].sqrt() / deviation - 1).abs().max() < 0.2
        rows = drawn[:, tasks == task]
        assert (rows.mean(dim=1) - ours.mean[:, task]).abs().max() < 0.1
        assert (rows.var(dim=1) / ours.variance[:, task] - 1).abs().max() < 0.1


def test_a_short_task_is_remembered_without_bias():
    """One batch is enough: the running moments do not start from zero."""
    ours = Adversary(GEOMETRY, 0.1, memory=True)
    ours.grow(seeded())
    p = features(rows=400, center=3.0)
    ours.loss(p, seeded())
    ours.remember()
    for n, layer in enumerate(LAYERS):
        torch.testing.assert_close(ours.mean[n, 0], p[layer].mean(dim=0))
        torch.testing.assert_close(ours.variance[n, 0], p[layer].var(dim=0, correction=0), rtol=1e-3, atol=1e-3)


def test_a_new_task_forgets_the_running_moments():
    ours = Adversary(GEOMETRY, 0.1, memory=True)
    for center in (50.0, -1.0):
        ours.grow(seeded())
        ours.loss(features(rows=100, center=center), seeded())
        ours.remember()
    assert (ours.mean[:, 0] - 50).abs().max() < 0.5
    assert (ours.mean[:, 1] + 1).abs().max() < 0.5


def test_draws_are_the_generators():
    ours = Adversary(GEOMETRY, 0.1, memory=True)
    remembered(ours, 3, batches=2)
    ours.grow(seeded())
    first, again, other = (ours.draw(8, seeded(seed)) for seed in (1, 1, 2))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])
    torch.manual_seed(0)
    before = torch.get_rng_state()
    ours.draw(8, seeded())
    assert torch.equal(torch.get_rng_state(), before), "the global generator is the model's"


# --- many tasks ---


def test_a_new_task_is_told_apart_from_at_most_32_old_ones_and_in_time_from_all():
    ours = Adversary(GEOMETRY, 0.1, memory=True)
    remembered(ours, 40, batches=1)
    seen = set()
    for seed in range(20):
        one = copy.deepcopy(ours)
        one.grow(seeded(seed))
        *old, newest = one.active.tolist()
        assert newest == 40
        assert old == sorted(set(old))
        assert len(old) == MAX_DRAWN
        assert one.weight.shape == (2, MAX_DRAWN + 1, D)
        assert torch.equal(one.weight[:, :-1], ours.rows[:, old])
        assert torch.equal(one.moments[0], ours.mean[:, old])
        assert torch.equal(one.moments[1], ours.variance[:, old])
        places = one.draw(64, seeded(seed))[1]
        assert sorted(set(places.tolist())) == list(range(MAX_DRAWN))
        assert len(one.draw(3, seeded())[1]) == 3, "no more rows than the batch has"
        seen |= set(old)
    assert seen == set(range(40))


def test_what_a_step_needs_is_as_much_for_40_tasks_as_for_400():
    shapes = []
    for tasks in (40, 400):
        ours = Adversary(GEOMETRY, 0.1, memory=True)
        remembered(ours, tasks, batches=1)
        ours.grow(seeded())
        tensors = {**ours.state_dict(), **dict(ours.named_buffers()), **dict(ours.named_parameters())}
        shapes.append({name: tensor.shape for name, tensor in tensors.items()})
    assert shapes[0] == shapes[1]


def test_only_the_rows_in_use_are_trained_and_put_back():
    ours = Adversary(GEOMETRY, 0.1, memory=True)
    remembered(ours, 40, batches=1)
    ours.rows = torch.randn(ours.rows.shape, generator=seeded(1))
    before = ours.rows.clone()
    ours.grow(seeded())
    used = ours.active.tolist()
    optimizer = torch.optim.AdamW(ours.parameters(), lr=0.1, weight_decay=0.1)
    for step in range(3):
        optimizer.zero_grad()
        ours.loss(features(64), seeded(step)).backward()
        optimizer.step()
    trained = ours.weight.detach().clone()
    ours.remember()
    assert torch.equal(ours.rows[:, used], trained)
    rest = [task for task in range(40) if task not in used]
    assert torch.equal(ours.rows[:, rest], before[:, rest])
    assert not (ours.rows[:, used[:-1]] == before[:, used[:-1]]).any()
    assert (ours.weight.shape[1], ours.moments.shape[2]) == (0, 0), "nothing is in use between two tasks"


class Dense:
    """All rows trained and told apart, as is right for few tasks: what the adversary was before it chose among many."""

    def __init__(self) -> None:
        self.weight = torch.zeros(len(LAYERS), 0, D)
        self.memory: list[tuple[torch.Tensor, torch.Tensor]] = []

    def grow(self) -> None:
        row = torch.zeros(len(LAYERS), 1, D)
        self.weight = torch.cat([self.weight.detach(), row], dim=1).requires_grad_()

    def loss(self, p: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        guesses = p @ self.weight.mT
        true = torch.full(guesses.shape[:2], self.weight.shape[1] - 1)
        loss = F.cross_entropy(guesses.flatten(0, 1), true.flatten())
        count, known = p.shape[1], len(self.memory)
        chosen = torch.randperm(known, generator=generator)[:32]
        tasks = chosen.repeat(-(-count // len(chosen)))[:count]
        noise = torch.randn(len(LAYERS), count, D, generator=generator)
        mean, variance = (torch.stack(one, dim=1) for one in zip(*self.memory, strict=True))
        drawn = mean[:, tasks] + variance[:, tasks].sqrt() * noise
        return loss + F.cross_entropy((drawn @ self.weight.mT).flatten(0, 1), tasks.expand(len(drawn), -1).flatten())


def test_up_to_33_tasks_all_rows_are_in_use_bitwise():
    ours, dense = Adversary(GEOMETRY, 0.1, memory=True), Dense()
    for task in range(MAX_DRAWN + 1):
        ours.grow(seeded(task))
        dense.grow()
        both = [(ours, torch.optim.AdamW(ours.parameters(), lr=0.05, weight_decay=0.1))]
        both += [(dense, torch.optim.AdamW([dense.weight], lr=0.05, weight_decay=0.1))]
        for step in range(2):
            p = features(48, seed=100 * task + 10 * step)
            given = p, torch.stack([p[layer] for layer in LAYERS])
            for (one, optimizer), x in zip(both, given, strict=True):
                if task:
                    optimizer.zero_grad()
                    one.loss(x, seeded(step)).backward()
                    optimizer.step()
                elif one is ours:
                    one.loss(x, seeded(step))
        assert torch.equal(ours.weight, dense.weight)
        ours.remember()
        dense.memory.append((ours.mean[:, -1], ours.variance[:, -1]))
    assert torch.equal(ours.rows, dense.weight)


def test_pseudo_rows_train_the_discriminator_alone():
    ours = adversary(2, memory=True)
    ours.loss(features(rows=64), seeded())
    ours.remember()
    ours.grow(seeded())
    p = {layer: x.requires_grad_() for layer, x in features(seed=9).items()}
    with_memory = torch.autograd.grad(ours.loss(p, seeded()), [*p.values(), ours.weight])
    ours.memory = False
    without = torch.autograd.grad(ours.loss(p, seeded()), [*p.values(), ours.weight])
    for ours_p, plain in zip(with_memory[:-1], without[:-1], strict=True):
        assert torch.equal(ours_p, plain)
    assert not torch.allclose(with_memory[-1], without[-1])


def learn(memory: bool) -> torch.Tensor:
    """Accuracy on each of three tasks, learned one after another from the rows of the newest alone."""
    ours = Adversary(GEOMETRY, 0.1, memory)
    common = torch.randn(len(LAYERS), D, generator=seeded(3))  # what the tasks share outweighs what tells them apart
    centers = common + 0.5 * torch.randn(3, len(LAYERS), D, generator=seeded(4))
    for task in range(3):
        ours.grow(seeded())
        optimizer = torch.optim.Adam(ours.parameters(), lr=0.02)
        draw = seeded(task)
        for _ in range(100):
            p = centers[task][:, None] + 0.5 * torch.randn(len(LAYERS), 16, D, generator=draw)
            loss = ours.loss(dict(zip(LAYERS, p, strict=True)), draw)
            if loss.requires_grad:
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        ours.remember()
    rows = centers[:, :, None] + 0.5 * torch.randn(3, len(LAYERS), 200, D, generator=seeded(8))
    guesses = (rows @ ours.rows.mT).argmax(-1)  # (task, L, 200)
    return (guesses == torch.arange(3)[:, None, None]).float().mean(dim=(1, 2))


def test_memory_keeps_old_classes_recognised():
    assert learn(memory=True).min() > 0.95


def test_without_memory_the_discriminator_learns_a_constant():
    """The published code's fault, which the memory repairs."""
    accuracy = learn(memory=False)
    assert accuracy[2] > 0.95
    assert accuracy[:2].max() < 0.5


# --- on disk ---


@pytest.mark.parametrize("tasks", [0, 1, 3, 40])
def test_state_dict_in_the_middle_of_a_task(tasks):
    """It is put into one that was taken up where the last task ended, and has begun the same task."""
    ours = Adversary(GEOMETRY, 0.1, memory=True)
    remembered(ours, tasks, batches=3)
    other = Adversary(GEOMETRY, 0.1, memory=True)
    other.restore(ours.rows.clone(), ours.mean.clone(), ours.variance.clone())
    for one in (ours, other):
        one.grow(seeded(7))
    torch.nn.init.normal_(ours.weight)
    ours.loss(features(), seeded())
    other.load_state_dict(ours.state_dict())
    assert other.classes == tasks + 1
    for name, tensor in ours.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor), name
        assert other.state_dict()[name].data_ptr() != tensor.data_ptr() or not tensor.numel()
    assert other.weight.requires_grad
    assert torch.equal(other.loss(features(seed=4), seeded(1)), ours.loss(features(seed=4), seeded(1)))
    for one in (ours, other):
        one.remember()
    for name in ("rows", "mean", "variance"):
        assert torch.equal(getattr(ours, name), getattr(other, name))


def test_load_is_strict():
    ours = adversary(2)
    state = ours.state_dict()
    del state["running"]
    with pytest.raises(RuntimeError, match="running"):
        adversary(2).load_state_dict(state)
    with pytest.raises(RuntimeError, match="size mismatch"):
        adversary(3).load_state_dict(ours.state_dict())


@pytest.mark.parametrize("shape", [(2, 4, D), (1, 3, D), (2, 3, D + 1)])
def test_restore_is_strict(shape):
    whole = torch.zeros(2, 3, D)
    with pytest.raises(RuntimeError, match="size mismatch"):
        Adversary(GEOMETRY, 0.1, memory=True).restore(torch.zeros(shape), whole, whole)
