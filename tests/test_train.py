"""Streams learned end to end: contracts 4, 5 and 8, what R holds, what a run leaves behind, and what stops it."""

import json
import logging
import random
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from moecl import session as session_module
from moecl import settled as settled_module
from moecl.config import StreamConfig, load_stream
from moecl.data.encode import Encoder
from moecl.engine import Engine
from moecl.model import MoECL
from moecl.results import Result
from moecl.session import Session
from moecl.store import Store
from runs import NAMES, QUICK, Recorder, contents, learn, logits, stream


def edited(config: StreamConfig, folder: Path, name: str = "task0", **changes) -> StreamConfig:
    """The stream with a task's keys changed."""
    data = yaml.safe_load((folder / "stream.yaml").read_text())
    for one in data["tasks"]:
        if one["name"] == name:
            one.update(changes)
    (folder / "stream.yaml").write_text(yaml.safe_dump(data))
    return load_stream(folder / "stream.yaml")


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_folder):
    """A stream of three tasks that contradict each other, learned with validation."""
    folder = tmp_path_factory.mktemp("finished")
    method, train = {"name": "moe-cl", "rank": 8}, {"epochs": 3, "save_steps": 50, "lr": 0.02}
    config = stream(folder, tiny_folder, tasks=3, rows=48, method=method, train=train)
    recorder = Recorder(folder / "run")
    return config, folder, learn(config, folder / "run", recorder), recorder


# --- learning, and contract 4 ---


def test_a_stream_is_learned(finished):
    _, _, result, recorder = finished
    assert all(score >= 0.75 for score in (result.R[i + 1][i] for i in range(3)))
    assert result.R[1][0] + result.R[1][1] < 1.1, "the tasks contradict each other"
    assert result.metrics["learning_accuracy"] == result.metrics["average_accuracy"] >= 0.75
    assert result.metrics["fwt"] is not None
    assert recorder.rows == list(enumerate(result.R))
    assert {(name, steps) for name, _, steps in recorder.steps} == {(name, 18) for name in NAMES}


def test_a_finished_task_never_changes(finished):
    """Contract 4: the same digests, logits bitwise, and its column of R."""
    _, folder, result, recorder = finished
    for digests in recorder.digests[1:]:
        assert digests["task0"] == recorder.digests[0]["task0"]
    assert recorder.digests[2]["task1"] == recorder.digests[1]["task1"]
    assert all(torch.equal(one, recorder.logits[0]) for one in recorder.logits)
    for j in range(3):
        assert len({result.R[i][j] for i in range(j + 1, 4)}) == 1
    assert result.metrics["bwt"] == result.metrics["forgetting"] == 0
    assert Store.open(folder / "run" / "store").verify() == []


def test_weight_decay_does_not_reach_a_finished_task(tmp_path, tiny_folder):
    config = stream(tmp_path / "s", tiny_folder, train={**QUICK, "weight_decay": 0.5})
    recorder = Recorder(tmp_path / "run")
    learn(config, tmp_path / "run", recorder)
    assert recorder.digests[0]["task0"] == recorder.digests[1]["task0"]
    assert torch.equal(recorder.logits[0], recorder.logits[1])


def test_what_a_result_tells(finished):
    config, folder, result, _ = finished
    assert (result.method, result.seed, result.tasks, result.resumed) == ("moe-cl", 0, NAMES, 0)
    assert result.data["task0"]["train"].rows == 48
    assert result.data["task0"].keys() == {"train", "validation", "test"}
    store = Store.open(folder / "run" / "store")
    assert result.digests == {name: store.digests(name) for name in NAMES}
    details = result.details["task1"]
    assert details["steps"] == 18
    curve = details["validation"]
    assert [step for step, _ in curve] == [6, 12, 18]
    best = max(score for _, score in curve)
    assert details["best_step"] == max(step for step, score in curve if score == best)
    assert details["per_class_recall"].keys() == {"good", "bad"}
    assert 0 <= details["discriminator_accuracy"] <= 1
    assert details["bytes"] > 0
    assert result.environment["precision"] == config.train.precision.replace("auto", result.environment["precision"])
    assert result.environment["base"]["sha256"] == store.manifest.base.sha256
    assert Result.load(folder / "run" / "result.json") == result


def test_the_next_run_tokenises_no_row(finished, tmp_path, monkeypatch):
    config, _, result, _ = finished
    calls = []
    real = Encoder._tokenise
    monkeypatch.setattr(Encoder, "_tokenise", lambda self, *a: calls.append(len(a[0])) or real(self, *a))
    again = config.model_copy(update={"train": config.train.model_copy(update={"seed": 3, "epochs": 1})})
    assert learn(again, tmp_path / "run").data == result.data
    assert calls == []


@pytest.mark.parametrize(("evaluate", "cells"), [("all", [3, 3, 3, 3]), ("seen", [0, 1, 2, 3]), ("next", [3, 2, 3, 3])])
def test_only_cells_that_are_asked_for_are_run(tmp_path, tiny_folder, monkeypatch, evaluate, cells):
    """Counted in rows that the engine answers, and in forwards that take a gradient: one a step, and none besides."""
    answered, rows = [], []
    forwards = {True: 0, False: 0}
    real_answer, real_forward = Engine.answer, MoECL.forward

    def answer(self, requests, *arguments):
        answered.append(len(requests))
        return real_answer(self, requests, *arguments)

    def forward(self, *arguments, **options):
        forwards[torch.is_grad_enabled()] += 1
        return real_forward(self, *arguments, **options)

    monkeypatch.setattr(Engine, "answer", answer)
    monkeypatch.setattr(MoECL, "forward", forward)

    class Rows(Recorder):
        def row(self, after, tasks, scores):
            rows.append(sum(answered))
            answered.clear()

    train = {**QUICK, "evals_per_epoch": 0}
    method = {"name": "moe-cl", "rank": 2, "warm_start": "zero"}  # which measures nothing to find a start
    config = stream(tmp_path / "s", tiny_folder, tasks=3, evaluate=evaluate, train=train, method=method)
    learn(config, tmp_path / "run", Rows(tmp_path / "run"))
    cells_rows = [12 * count for count in cells]
    cells_rows[-1] += 3 * 8  # the validation rows, once more after the last task
    assert rows == cells_rows
    assert forwards == {True: 3 * 3, False: 0}


def test_what_a_run_leaves_behind(finished):
    config, folder, result, _ = finished
    run = folder / "run"
    assert {path.name for path in run.iterdir()} == {
        ".lock",
        "stream.yaml",
        "config.yaml",
        "result.json",
        "store",
        "predictions",
    }
    assert load_stream(run / "stream.yaml") == config
    resolved = load_stream(run / "config.yaml")
    assert resolved.tasks == config.tasks
    assert resolved.train.threads == torch.get_num_threads()
    assert resolved.train.eval_batch_tokens == 4096
    assert resolved.train.device == "cpu"
    head = (run / "config.yaml").read_text().partition("\nbase:")[0]
    assert result.environment["base"]["sha256"] in head
    assert f"torch: {torch.__version__}" in head


def test_the_same_command_again_shows_the_result(finished, monkeypatch):
    config, folder, result, _ = finished
    before = contents(folder / "run")
    monkeypatch.setattr(Session, "__init__", None)
    assert learn(config, folder / "run") == result
    before.pop(".lock")
    after = contents(folder / "run")
    after.pop(".lock")
    assert after == before


def test_same_seed_same_result_and_another_seed_another(tmp_path, tiny_folder):
    """Contract 8."""
    config = stream(tmp_path / "s", tiny_folder, rows=16, train=QUICK)
    one = learn(config, tmp_path / "one")
    torch.manual_seed(1)  # what the caller drew before has no say
    two = learn(config, tmp_path / "two")
    assert (one.R, one.digests) == (two.R, two.digests)
    seeded = config.model_copy(update={"train": config.train.model_copy(update={"seed": 1})})
    other = learn(seeded, tmp_path / "other")
    for name in one.tasks:
        assert not set(one.digests[name].values()) & set(other.digests[name].values())


# --- retention live, and the paper's setting ---


def test_live_retention_moves_on_under_old_tasks(tmp_path, tiny_folder):
    config = stream(tmp_path, tiny_folder, tasks=3, method={"name": "moe-cl", "rank": 2, "retention": "live"})
    recorder = Recorder(tmp_path / "run")
    result = learn(config, tmp_path / "run", recorder)
    shared = []
    for after, digests in enumerate(recorder.digests, start=1):
        assert len(digests) == after
        assert len({parts["shared"] for parts in digests.values()}) == 1, "one for all that are live"
        shared.append(digests["task0"]["shared"])
        assert digests["task0"]["task"] == recorder.digests[0]["task0"]["task"]
    assert len(set(shared)) == 3
    assert not torch.equal(recorder.logits[0], recorder.logits[2])
    assert result.digests == recorder.digests[-1]


def test_the_papers_setting(tmp_path, tiny_folder):
    config = stream(tmp_path, tiny_folder, tasks=3, method={}, preset="paper", train={"lr": 0.01, "epochs": 2})
    result = learn(config, tmp_path / "run")
    assert result.metrics["fwt"] is None, "a head that saw nothing means nothing"
    assert result.metrics["bwt"] is not None
    assert result.R[0] == [None] * 3
    assert [[score is None for score in row] for row in result.R[1:]] == [
        [False, True, True],
        [False, False, True],
        [False, False, False],
    ]
    store = Store.open(tmp_path / "run" / "store")
    parts = [store.digests(name) for name in NAMES]
    assert all(found.keys() == {"shared", "task", "gate", "head"} for found in parts)
    assert len({found["gate"] for found in parts}) == len({found["shared"] for found in parts}) == 1
    settings = store.record("task0").settings
    assert settings == {"method": "moe-cl", "seed": 0, "scale": 2.0, **config.method.model_dump(exclude={"name"})}
    assert store.training().keys() == {"shared", "gate", "discriminator", "memory", "router"}
    loaded = MoECL.from_pretrained(tmp_path / "run")
    assert loaded.config == config.method
    assert loaded.bank["task0"].parts.shared is loaded.bank["task2"].parts.shared
    assert loaded.bank["task0"].parts.gate is loaded.bank["task2"].parts.gate


# --- what is in R ---


@pytest.mark.parametrize(
    ("evaluate", "measured"),
    [
        ("all", ["xxx", "xxx", "xxx", "xxx"]),
        ("seen", ["...", "x..", "xx.", "xxx"]),
        ("next", ["xxx", "xx.", "xxx", "xxx"]),
    ],
)
def test_which_cells_are_measured(tmp_path, tiny_folder, evaluate, measured):
    config = stream(tmp_path, tiny_folder, tasks=3, rows=8, evaluate=evaluate, train={**QUICK, "evals_per_epoch": 0})
    result = learn(config, tmp_path / "run")
    assert ["".join("." if score is None else "x" for score in row) for row in result.R] == measured
    assert (result.metrics["fwt"] is None) == (evaluate == "seen")


def test_tasks_without_test_or_validation(tmp_path, tiny_folder):
    config = stream(tmp_path, tiny_folder, rows=8, train=QUICK)
    edited(config, tmp_path, "task0", validation=None)
    config = edited(config, tmp_path, "task1", test=None, metric="macro_f1")
    recorder = Recorder(tmp_path / "run")
    result = learn(config, tmp_path / "run", recorder)
    assert [row[1] for row in result.R] == [None] * 3
    assert [row[0] is None for row in result.R] == [False] * 3
    assert result.data["task0"].keys() == {"train", "test"}
    assert result.data["task1"].keys() == {"train", "validation"}
    assert (result.details["task0"]["best_step"], result.details["task0"]["validation"]) == (None, [])
    assert result.details["task1"]["best_step"] == 1
    assert "per_class_recall" not in result.details["task1"]


def test_cut_rows_are_counted(tmp_path, tiny_folder):
    config = stream(tmp_path, tiny_folder, tasks=1, rows=8, train={**QUICK, "max_length": 24})
    result = learn(config, tmp_path / "run")
    assert 0 < result.data["task0"]["train"].cut < 8


def write_copies(folder: Path, row, sizes: dict[str, int]) -> dict[str, str]:
    words = [
        "the",
        "a",
        "of",
        "to",
        "was",
        "it",
        "in",
        "I",
        "we",
        "they",
        "this",
        "that",
        "food",
        "price",
        "fine",
        "no",
    ]
    files = {}
    for split, size in sizes.items():
        rows = [row(words[number * 7 % len(words)]) for number in range(size)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
        files[split] = f"{split}.jsonl"
    return files


def test_a_text_to_copy(tmp_path, tiny_folder):
    """Kind generation, end to end: a word is read and written again."""
    sizes = {"train": 32, "validation": 8, "test": 16}
    files = write_copies(tmp_path, lambda word: {"prompt": word, "completion": word}, sizes)
    tasks = [
        {"name": "copy", "kind": "generation", **files},
        {"name": "again", "kind": "generation", "metric": "rouge_l", **files, "limit": {"train": 8, "test": 4}},
    ]
    method = {"name": "moe-cl", "rank": 8}
    config = stream(tmp_path, tiny_folder, tasks=tasks, method=method, train={"epochs": 10, "save_steps": 500})
    result = learn(config, tmp_path / "run")
    assert result.R[0][0] == 0
    assert result.R[1][0] > 0.5
    assert result.R[2][0] == result.R[1][0]
    assert result.R[2][1] is not None


TEMPLATE = (
    "{% for turn in messages %}<{{ turn['role'] }}>{{ turn['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_dialogues_use_the_chat_template(tmp_path, tiny_folder):
    base = tmp_path / "base"
    shutil.copytree(tiny_folder, base)
    (base / "chat_template.jinja").write_text(TEMPLATE)

    def row(word):
        return {"messages": [{"role": "user", "content": word}, {"role": "assistant", "content": word}]}

    files = write_copies(tmp_path, row, {"train": 16, "validation": 4, "test": 6})
    tasks = [{"name": "chat", "kind": "generation", **files}]
    result = learn(stream(tmp_path, base, tasks=tasks, train={**QUICK, "epochs": 4}), tmp_path / "run")
    assert result.R[1][0] is not None
    assert result.data["chat"]["train"].rows == 16


# --- contract 5: evaluation changes no state ---


def state(session: Session) -> tuple[list[torch.Tensor], list[object]]:
    """Every tensor that evaluation must leave alone, the random state among them, and every flag."""
    learned = [*session.method.state.state_dict().values(), *session.model.state_dict().values()]
    grads = [p.grad for p in session.method.state.parameters() if p.grad is not None]
    flags = [p.requires_grad for p in session.model.parameters()] + [m.training for m in session.model.modules()]
    tensors = [tensor.clone() for tensor in (*learned, *grads, torch.random.get_rng_state())]
    return tensors, [*flags, random.getstate(), session.method.log()]


def test_a_validation_pass_changes_nothing(tmp_path, tiny_folder, monkeypatch):
    seen: list[str] = []

    def unchanged(name: str):
        original = getattr(Session, name)

        def checked(self, *arguments):
            tensors, flags = state(self)
            score = original(self, *arguments)
            after, flags_after = state(self)
            assert flags == flags_after
            assert all(torch.equal(one, other) for one, other in zip(tensors, after, strict=True))
            seen.append(name)
            return score

        return checked

    for name in ("_validate", "_answers"):
        monkeypatch.setattr(Session, name, unchanged(name))
    method = {"name": "moe-cl", "rank": 2, "dropout": 0.1}
    learn(stream(tmp_path, tiny_folder, method=method, train={**QUICK, "evals_per_epoch": 3}), tmp_path / "run")
    assert (seen.count("_validate"), seen.count("_answers")) == (2 * 3, 2 * 3 + 3 * 2 + 2)


# --- what is said ---


def test_nothing_else_is_said_or_written(tmp_path, tiny_folder, capfd, monkeypatch):
    """No advice from the libraries underneath, no progress bars, no stray files (pytest makes warnings errors)."""
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())
    monkeypatch.chdir(tmp_path)
    for library in ("transformers", "accelerate", "huggingface_hub", "torch", "tensorboard", "datasets"):
        logging.getLogger(library).addHandler(handler)
    config = stream(tmp_path / "s", tiny_folder, train={**QUICK, "report_to": ["tensorboard"]})
    try:
        learn(config, tmp_path / "run")
    finally:
        for library in ("transformers", "accelerate", "huggingface_hub", "torch", "tensorboard", "datasets"):
            logging.getLogger(library).removeHandler(handler)
    assert said == []
    assert capfd.readouterr() == ("", "")
    assert {path.name for path in tmp_path.iterdir()} == {"s", "run"}
    assert {path.parent.name for path in (tmp_path / "run" / "tensorboard").rglob("events*")} == {"task0", "task1"}


def test_without_tensorboard_there_is_a_note(tmp_path, tiny_folder, monkeypatch):
    monkeypatch.setattr(settled_module, "find_spec", lambda name: None)
    config = stream(tmp_path, tiny_folder, tasks=1, rows=8, train={**QUICK, "report_to": ["tensorboard"]})
    recorder = Recorder(tmp_path / "run")
    learn(config, tmp_path / "run", recorder)
    assert any("no TensorBoard" in note for note in recorder.notes)
    assert not (tmp_path / "run" / "tensorboard").exists()


def test_stopping_early_without_validation_rows_there_is_a_note(tmp_path, tiny_folder):
    config = stream(tmp_path, tiny_folder, tasks=1, rows=8, train={**QUICK, "early_stopping": 1})
    config = edited(config, tmp_path, validation=None)
    recorder = Recorder(tmp_path / "run")
    learn(config, tmp_path / "run", recorder)
    assert "task task0: never stopped early, for it has no validation rows" in recorder.notes


# --- settings that must not change what is learned ---


def test_gradient_checkpointing_learns_the_same(tmp_path, tiny_folder):
    results = []
    for on in (False, True):
        train = {**QUICK, "gradient_checkpointing": on}
        results.append(learn(stream(tmp_path / "s", tiny_folder, tasks=1, rows=16, train=train), tmp_path / f"run{on}"))
    assert results[0].R == results[1].R
    one, other = (logits(tmp_path / f"run{on}", "task0") for on in (False, True))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_precision_is_settled_once_and_says_why(tmp_path, tiny_folder):
    config = stream(tmp_path / "s", tiny_folder, tasks=1, rows=8, train={**QUICK, "precision": "bf16"})
    assert learn(config, tmp_path / "run").environment["base"]["dtype"] == "bfloat16"
    recorder = Recorder(tmp_path)
    settled = session_module.resolve(stream(tmp_path / "s", tiny_folder), recorder)
    assert [note.startswith(f"precision {settled.train.precision}: the processor") for note in recorder.notes] == [True]
    assert session_module.resolve(settled, recorder) == settled
    assert len(recorder.notes) == 1
