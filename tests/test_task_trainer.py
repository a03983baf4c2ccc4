"""One task's training: its best step, its stop, its checkpoints, and going on from any of them."""

import gc
import json
import math
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import TrainerControl, TrainerState

from moecl.backbone import Backbone
from moecl.config import MoECLConfig, Task, TrainConfig
from moecl.data.encode import Encoder
from moecl.data.task import example
from moecl.methods import make_method
from moecl.model import Entry, MoECL
from moecl.nn.discriminator import DECAY
from moecl.task_trainer import (
    BEST,
    DIGESTS,
    PASSES,
    STATE,
    Guard,
    Learned,
    Learner,
    OneDevice,
    Passes,
    last_checkpoint,
    learn_task,
    pass_steps,
    whole,
)
from tiny import tiny_model, tiny_tokenizer

gc.freeze()  # the Trainer collects garbage before each task: what is imported by now is none

TEXTS = ["a great movie", "the food was bad", "love it", "sad story of a phone", "in the price", "no"] * 2
STEPS = 6  # of two epochs in batches of 4


class StopError(Exception):
    """In place of a kill."""


class Trial:
    """A model with one finished task and a second one to be trained."""

    def __init__(self, method: MoECLConfig | None = None, **train) -> None:
        tokenizer = tiny_tokenizer()
        config = method or MoECLConfig(rank=2)
        self.model = MoECL(Backbone(tiny_model(vocab_size=len(tokenizer)), tokenizer, "tiny"), config)
        self.method = make_method(config, self.model.geometry, 0)
        self.task = Task(name="b", kind="classification", labels=["fine", "sad"], head="lm")
        self.method.begin(self.task.model_copy(update={"name": "a"}))
        self.method.finish()
        self.model.bank["b"] = Entry(self.task, self.method.begin(self.task))
        examples = [
            replace(example(text, self.task), label=("fine", "sad")[number % 2]) for number, text in enumerate(TEXTS)
        ]
        self.rows = Encoder(tokenizer, self.task, 64).encode(examples)
        self.train = TrainConfig(**{"epochs": 2, "batch_size": 4, "lr": 0.01, "save_steps": 2, **train})

    def learn(
        self, folder: Path, score: Callable[[], float] | None = None, stop_at: int = 0, told: list | None = None
    ) -> Learned:
        def tell(step, steps, figures):
            if told is not None:
                told.append((step, figures))
            if step == stop_at:
                raise StopError

        self.model.train()
        return learn_task(
            self.model, self.method, self.task, self.rows, self.train, folder, pad_id=0, score=score, tell=tell
        )

    def state(self) -> dict[str, torch.Tensor]:
        return {name: tensor.clone() for name, tensor in self.method.state.state_dict().items()}

    def score(self) -> float:
        """Like a real score a function of the state, which tells how many batches it has seen."""
        seen = math.log(1 - self.method.state.adversary.running_weight) / math.log(DECAY)
        return (0.1, 0.4, 0.2, 0.9, 0.3, 0.5)[round(seen) - 1]


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# --- when to validate, what is best, when to stop ---


@pytest.mark.parametrize(
    ("steps", "epochs", "an_epoch", "expected"),
    [(9, 3, 1, [3, 6, 9]), (10, 2, 2, [2, 5, 8, 10]), (1, 3, 2, [1]), (7, 2, 0, []), (5, 1, 1, [5])],
)
def test_validation_ends_with_the_last_step(steps, epochs, an_epoch, expected):
    assert pass_steps(steps, epochs, an_epoch) == expected


def passes(scores: list[float], patience: int | None) -> tuple[Passes, int]:
    """The passes over a course of scores, and how many there were until it was stopped."""
    module = torch.nn.Linear(1, 1)
    given = iter(scores)
    found = Passes(lambda: next(given), range(1, len(scores) + 1), patience, module)
    for step in range(1, len(scores) + 1):
        torch.nn.init.constant_(module.weight, step)
        control = TrainerControl(should_save=True)
        found.on_step_end(None, TrainerState(global_step=step), control)
        assert control.should_save != control.should_training_stop, "nothing can go on from a checkpoint of the stop"
        if control.should_training_stop:
            break
    found.restore_best()
    assert module.weight.item() == found.best_step
    return found, step


@pytest.mark.parametrize(
    ("scores", "patience", "best", "stop"),
    [
        ([0.1, 0.3, 0.2], None, 2, 3),
        ([0.1, 0.3, 0.3], None, 3, 3),
        ([0.3, 0.1, 0.2, 0.9], 2, 1, 3),
        ([0.3, 0.3, 0.3, 0.9], 2, 3, 3),  # equally good is not better
        ([0.3, 0.1, 0.4, 0.1, 0.1, 0.9], 2, 3, 5),
        ([0.1, 0.2, 0.3], 1, 3, 3),
    ],
)
def test_the_best_step_and_the_stop(scores, patience, best, stop):
    found, stopped = passes(scores, patience)
    assert (found.best_step, stopped) == (best, stop)


def test_without_a_score_the_last_state_is_kept():
    found = Passes(None, [1], None, torch.nn.Linear(1, 1))
    found.on_step_end(None, TrainerState(global_step=1), TrainerControl())
    found.restore_best()
    assert found.curve == []


def test_groups_are_clipped_apart():
    trial = Trial()
    groups = trial.method.groups()
    for name, group in groups.items():
        for parameter in group:
            parameter.grad = torch.full_like(parameter, 1e-3 if name == "discriminator" else 10.0)
    learner = Learner(trial.model, trial.method, trial.task)
    Guard(learner, 1.0).on_pre_optimizer_step(None, TrainerState(), TrainerControl())
    norms = {name: torch.stack([p.grad.norm() for p in group]).norm().item() for name, group in groups.items()}
    assert [norms["lora_A"], norms["experts"]] == pytest.approx([1, 1], rel=1e-4)
    assert groups["discriminator"][0].grad.flatten()[0].item() == pytest.approx(1e-3)
    Guard(learner, 0.0).on_pre_optimizer_step(None, TrainerState(), TrainerControl())


def test_each_group_has_its_rate(tmp_path, monkeypatch):
    made, real = [], torch.optim.AdamW
    monkeypatch.setattr(torch.optim, "AdamW", lambda groups, **how: made.append(groups) or real(groups, **how))
    trial = Trial(MoECLConfig(rank=2, lora_A_lr=0.2), epochs=1, discriminator_lr=0.03)
    trial.learn(tmp_path)
    rates = [group["lr"] for group in made[0]]
    assert rates == pytest.approx([0.002, 0.01, 0.03])


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_every_schedule_warms_up(tmp_path, monkeypatch, schedule):
    rates, real = [], torch.optim.AdamW.step
    monkeypatch.setattr(
        torch.optim.AdamW, "step", lambda self, *args: rates.append(self.param_groups[-1]["lr"]) or real(self, *args)
    )
    Trial(MoECLConfig(rank=2, lora_A_lr=1), epochs=4, schedule=schedule, warmup_ratio=0.5).learn(tmp_path)
    assert rates[0] == 0
    assert rates[1] < max(rates) == pytest.approx(0.01)
    assert rates == sorted(rates) or schedule != "constant"


def test_several_gpus_are_not_used_at_once(tmp_path, monkeypatch):
    """Rows spread over replicas would lose the call that says which task they are of."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    arguments = OneDevice(output_dir=str(tmp_path), base_device="meta")
    assert (arguments.device.type, arguments.n_gpu, arguments.train_batch_size) == ("meta", 1, 8)


def test_precision_is_what_the_stream_says(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert OneDevice(output_dir=str(tmp_path)).mixed_precision == "no"


def test_only_what_the_method_trains_moves(tmp_path):
    trial = Trial(weight_decay=0.5)
    before = {name: tensor.clone() for name, tensor in trial.model.base.state_dict().items()}
    start = trial.state()
    learned = trial.learn(tmp_path)
    assert same(before, trial.model.base.state_dict())
    assert not any(torch.equal(start[name], p) for name, p in trial.method.state.named_parameters())
    assert learned.trained_parameters == sum(p.numel() for p in trial.method.state.parameters())
    assert (learned.steps, learned.best_step, learned.curve) == (STEPS, None, [])


# --- contract 7, step by step ---


@pytest.mark.parametrize(
    ("method", "train", "steps"),
    [
        ({"dropout": 0.2}, {"gradient_accumulation_steps": 2, "evals_per_epoch": 2, "save_steps": 1}, 3),
        ({"dropout": 0.2}, {"early_stopping": 1, "evals_per_epoch": 3, "save_steps": 1}, 3),
        ({"gate": "shared", "retention": "live"}, {"schedule": "cosine", "evals_per_epoch": 0, "save_steps": 4}, 6),
    ],
)
def test_stopped_at_any_step_it_ends_the_same(tmp_path, method, train, steps):
    def trial() -> tuple[Trial, Callable[[], float] | None]:
        found = Trial(MoECLConfig(rank=2, **method), **train)
        return found, found.score if found.train.evals_per_epoch else None

    unstopped, score = trial()
    expected = unstopped.learn(tmp_path / "unstopped", score)
    assert expected.steps == steps
    for step in range(1, expected.steps + 1):
        stopped, score = trial()
        with pytest.raises(StopError):
            stopped.learn(tmp_path / f"{step}", score, stop_at=step)
        torch.manual_seed(step)
        resumed, score = trial()
        found = resumed.learn(tmp_path / f"{step}", score)
        assert same(resumed.state(), unstopped.state())
        assert (found.steps, found.best_step, found.curve) == (expected.steps, expected.best_step, expected.curve)


def test_no_thread_outlives_a_training(tmp_path):
    Trial().learn(tmp_path / "done")
    with pytest.raises(StopError):
        Trial().learn(tmp_path / "stopped", stop_at=2)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("feed")]


def test_from_its_last_checkpoint_nothing_is_left_to_do(tmp_path):
    trial, told = Trial(), []
    first = trial.learn(tmp_path, told=told)
    assert first.earlier == 0
    assert told[-2][0] == STEPS
    assert told[-2][1]["task_loss"] > 0, "the last step's own loss"
    again, told = Trial(), []
    found = again.learn(tmp_path, told=told)
    assert found.steps == STEPS
    assert found.earlier > 0
    assert same(again.state(), trial.state())
    assert not any("task_loss" in figures for _, figures in told), "no step was run"


# --- checkpoints ---


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> Path:
    """Two checkpoints of one training, steps 2 and 4, as a damaged disk may leave them."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for stop in (3, 5):
        with pytest.raises(StopError):
            Trial().learn(folder / "one", lambda: 0.5, stop_at=stop)
        [made] = (folder / "one").glob("checkpoint-*")
        shutil.copytree(made, folder / "both" / made.name)
    return folder


def test_one_checkpoint_at_a_time(checkpoints):
    assert [path.name for path in (checkpoints / "one").iterdir()] == ["checkpoint-4"]
    assert last_checkpoint(checkpoints / "both").name == "checkpoint-4"
    assert last_checkpoint(checkpoints / "nothing") is None


def test_a_checkpoint_holds_what_training_changes_and_no_more(tmp_path):
    trial = Trial()
    with pytest.raises(StopError):
        trial.learn(tmp_path, trial.score, stop_at=5)
    [folder] = tmp_path.iterdir()
    names = {path.name for path in folder.iterdir()}
    kept = {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"}
    assert names == {STATE, BEST, PASSES, DIGESTS, *kept}
    state = sum(tensor.numel() * tensor.element_size() for tensor in trial.state().values())
    trained = 4 * sum(p.numel() for p in trial.method.state.parameters())
    size = sum(path.stat().st_size for path in folder.iterdir())
    assert size < 2 * state + 2 * trained + 60_000, "the state, the best one, two moments, and what does not grow"
    bare = trial.model.base
    assert 4 * sum(p.numel() for p in bare.parameters()) > 4 * trained


@pytest.mark.parametrize("damage", ["truncate", "alter", "remove", "add"])
def test_a_damaged_checkpoint_is_never_trusted(checkpoints, tmp_path, damage):
    files = sorted(path.name for path in (checkpoints / "both" / "checkpoint-4").iterdir())
    for name in files[:1] if damage == "add" else files:
        folder = tmp_path / name
        shutil.copytree(checkpoints / "both", folder)
        path = folder / "checkpoint-4" / name
        data = path.read_bytes()
        if damage == "truncate":
            path.write_bytes(data[: len(data) // 2])
        elif damage == "alter":
            path.write_bytes(data[:-1] + bytes([data[-1] ^ 32]))
        elif damage == "remove":
            path.unlink()
        else:
            (folder / "checkpoint-4" / "more.safetensors").write_bytes(b"")
        assert not whole(folder / "checkpoint-4")
        assert last_checkpoint(folder).name == "checkpoint-2"


def test_damage_ends_as_no_damage(checkpoints, tmp_path):
    trial = Trial()
    expected = trial.learn(tmp_path / "expected")
    for broken in (["checkpoint-4"], ["checkpoint-4", "checkpoint-2"]):
        folder = tmp_path / f"{len(broken)}"
        for name in ("checkpoint-2", "checkpoint-4"):
            with pytest.raises(StopError):
                Trial().learn(tmp_path / "again", stop_at=int(name[-1]) + 1)
            shutil.copytree(tmp_path / "again" / name, folder / name)
        shutil.rmtree(tmp_path / "again")
        for name in broken:
            (folder / name / STATE).write_bytes(b"")
        (folder / "draft" / "checkpoint-6").mkdir(parents=True)
        again = Trial()
        assert again.learn(folder).steps == expected.steps
        assert same(again.state(), trial.state())


def test_nothing_in_a_checkpoint_is_executed(checkpoints, tmp_path, monkeypatch):
    shutil.copytree(checkpoints / "one", tmp_path / "c")
    loads = []
    original = torch.load

    def load(*arguments, **options):
        loads.append(options.get("weights_only"))
        return original(*arguments, **options)

    monkeypatch.setattr(torch, "load", load)
    Trial().learn(tmp_path / "c", lambda: 0.5)
    assert loads == [True] * 3


def test_digests_are_of_every_file(checkpoints):
    folder = checkpoints / "both" / "checkpoint-4"
    assert json.loads((folder / DIGESTS).read_text()).keys() == {path.name for path in folder.iterdir()} - {DIGESTS}
