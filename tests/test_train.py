"""Streams learned end to end: contracts 4, 5 and 8, what R holds, what a run leaves behind, and what stops it."""

import errno
import fcntl
import json
import logging
import os
import random
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from moecl import session as session_module
from moecl.config import StreamConfig, load_stream
from moecl.errors import BaseError, BusyError, ConfigError, DataError, RunError, StoreError, TrainingError
from moecl.methods.moe_cl import MoECLMethod
from moecl.model import MoECL
from moecl.results import Result
from moecl.run_folder import RunFolder
from moecl.session import Session
from moecl.store import Store
from moecl.train import ContinualTrainer, Watcher
from tiny import tiny_batch
from tiny_stream import write_rows, write_stream

NAMES = ["task0", "task1", "task2"]
QUICK = {"epochs": 1, "save_steps": 100}  # for tests of what is around the training


def stream(folder: Path, base: Path, **settings) -> StreamConfig:
    return load_stream(write_stream(folder, base, **settings))


def edited(config: StreamConfig, folder: Path, name: str = "task0", **changes) -> StreamConfig:
    """The stream with a task's keys changed."""
    data = yaml.safe_load((folder / "stream.yaml").read_text())
    for one in data["tasks"]:
        if one["name"] == name:
            one.update(changes)
    (folder / "stream.yaml").write_text(yaml.safe_dump(data))
    return load_stream(folder / "stream.yaml")


def learn(config: StreamConfig, folder: Path, watcher: Watcher | None = None) -> Result:
    return ContinualTrainer(config, folder, watcher).run()


def logits(run: Path, name: str) -> torch.Tensor:
    with torch.no_grad():
        return MoECL.from_pretrained(run)(**tiny_batch(), task=name).logits


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {
        str(p.relative_to(folder)): (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file()
    }


class Recorder(Watcher):
    """What the store and its first task look like after each task."""

    def __init__(self, run: Path) -> None:
        self.run, self.digests, self.logits, self.notes, self.rows = run, [], [], [], []
        self.steps: list[tuple[str, int, int]] = []

    def note(self, message):
        self.notes.append(message)

    def training(self, task, step, steps, figures):
        self.steps.append((task, step, steps))

    def row(self, after, tasks, scores):
        self.rows.append((after, list(scores)))
        if after:
            store = Store.open(self.run / "store", readonly=True)
            self.digests.append({record.name: store.digests(record.name) for record in store.tasks()})
            self.logits.append(logits(self.run, "task0"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_folder):
    """A stream of three tasks that contradict each other, learned with validation."""
    folder = tmp_path_factory.mktemp("finished")
    method = {"name": "moe-cl", "rank": 8}
    config = stream(folder, tiny_folder, tasks=3, rows=48, method=method, train={"epochs": 3, "save_steps": 50})
    recorder = Recorder(folder / "run")
    return config, folder, learn(config, folder / "run", recorder), recorder


@pytest.fixture(scope="module")
def plain(tmp_path_factory, tiny_folder) -> tuple[StreamConfig, Result]:
    """A stream of two tasks, and what it leads to."""
    folder = tmp_path_factory.mktemp("plain")
    config = stream(folder, tiny_folder, rows=16)
    return config, learn(config, folder / "run")


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


def test_what_a_run_leaves_behind(finished):
    config, folder, result, _ = finished
    run = folder / "run"
    assert {path.name for path in run.iterdir()} == {".lock", "stream.yaml", "config.yaml", "result.json", "store"}
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


def test_same_seed_same_result_and_another_seed_another(tmp_path, plain):
    """Contract 8."""
    config, one = plain
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
    assert settings == {"adapt_layers": "all", "seed": 0, "scale": 2.0, **config.method.model_dump(exclude={"name"})}
    assert store.training().keys() == {"shared", "gate", "discriminator", "memory"}
    loaded = MoECL.from_pretrained(tmp_path / "run")
    assert loaded.config == config.method
    assert loaded.bank["task0"].parts.shared is loaded.bank["task2"].parts.shared
    assert loaded.bank["task0"].parts.gate is loaded.learner.gate


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

    for name in ("_validate", "_score"):
        monkeypatch.setattr(Session, name, unchanged(name))
    method = {"name": "moe-cl", "rank": 2, "dropout": 0.1}
    learn(stream(tmp_path, tiny_folder, method=method, train={**QUICK, "evals_per_epoch": 3}), tmp_path / "run")
    assert (seen.count("_validate"), seen.count("_score")) == (2 * 3, 3 * 2)


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
    monkeypatch.setattr(session_module, "find_spec", lambda name: None)
    config = stream(tmp_path, tiny_folder, tasks=1, rows=8, train={**QUICK, "report_to": ["tensorboard"]})
    recorder = Recorder(tmp_path / "run")
    learn(config, tmp_path / "run", recorder)
    assert any("no TensorBoard" in note for note in recorder.notes)
    assert not (tmp_path / "run" / "tensorboard").exists()


# --- what stops a run ---


def nan_at(task_number: int, step: int):
    original = MoECLMethod.penalty

    def penalty(self, features, count):
        loss = original(self, features, count)
        return loss * float("nan") if self.state.adversary.classes == task_number and count == step else loss

    return penalty


def test_a_loss_that_is_no_number_stops_the_run_and_loses_nothing(tmp_path, plain, monkeypatch):
    config, expected = plain
    with monkeypatch.context() as patch:
        patch.setattr(MoECLMethod, "penalty", nan_at(2, 4))
        for _ in range(2):  # the second time from a checkpoint
            with pytest.raises(TrainingError, match=r"task 'task1': the loss is not finite at step 4") as caught:
                learn(config, tmp_path / "run")
            assert "\n" not in str(caught.value)
            store = Store.open(tmp_path / "run" / "store")
            assert [record.name for record in store.tasks()] == ["task0"]
            assert store.verify() == []
    result = learn(config, tmp_path / "run")
    assert (result.R, result.digests, result.resumed) == (expected.R, expected.digests, 2)


@pytest.mark.parametrize("evals", [0, 1])
@pytest.mark.parametrize("rows", [16, 24])
def test_a_learning_rate_that_ruins_everything(tmp_path, tiny_folder, evals, rows):
    """With 16 rows there are 2 steps, and no step follows the one that ruins the state."""
    config = stream(tmp_path, tiny_folder, rows=rows, train={**QUICK, "lr": 1e30, "evals_per_epoch": evals})
    with pytest.raises(TrainingError, match=r"task 'task0': the loss is not finite.*lower train.lr"):
        learn(config, tmp_path / "run")
    assert Store.open(tmp_path / "run" / "store").tasks() == []


def test_a_changed_stream_is_named(finished):
    config, folder, _, _ = finished
    before = contents(folder / "run")
    changed = config.model_copy(update={"train": config.train.model_copy(update={"lr": 0.5, "epochs": 9})})
    with pytest.raises(RunError, match=r"train\.epochs is 9, it was 3; train\.lr is 0\.5, it was 0\.02") as caught:
        learn(changed, folder / "run")
    assert "\n" not in str(caught.value)
    with pytest.raises(RunError, match="tasks has 2 entries, it had 3"):
        learn(config.model_copy(update={"tasks": config.tasks[:2]}), folder / "run")
    after = contents(folder / "run")
    assert {k: v for k, v in before.items() if k != ".lock"} == {k: v for k, v in after.items() if k != ".lock"}


def test_a_run_in_use(finished):
    config, folder, _, _ = finished
    with RunFolder(folder / "run").lock(), pytest.raises(BusyError, match=r"in use by pid \d+"):
        learn(config, folder / "run")


def test_a_folder_that_is_no_run(tmp_path, tiny_folder):
    config = stream(tmp_path / "s", tiny_folder)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    with pytest.raises(RunError, match=r"not empty and not a run \(thesis.tex\)"):
        learn(config, tmp_path / "full")
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="file"):
        learn(config, tmp_path / "file")


def test_a_store_whose_run_is_lost(finished, tmp_path):
    config, folder, _, _ = finished
    shutil.copytree(folder / "run" / "store", tmp_path / "run" / "store")
    with pytest.raises(RunError, match=r"a store with tasks, but no config.yaml"):
        learn(config, tmp_path / "run")


def test_a_first_start_that_was_cut_short(tmp_path, tiny_folder, monkeypatch):
    """Whatever it left, another stream may be started in its place."""
    config = stream(tmp_path / "s", tiny_folder, tasks=1, rows=8, train=QUICK)
    other = write_other_base(tmp_path / "other", tiny_folder)
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "start", lambda *arguments: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            learn(stream(tmp_path / "t", other), tmp_path / "run")
    (tmp_path / "run" / ".stream.yaml.0123456789abcdef.tmp").write_text("half")
    assert learn(config, tmp_path / "run").resumed == 0


def write_other_base(folder: Path, tiny_folder: Path) -> Path:
    from tiny import tiny_model

    shutil.copytree(tiny_folder, folder)
    tiny_model("llama", vocab_size=384, seed=5).save_pretrained(folder)
    return folder


def interrupted(config: StreamConfig, run: Path, monkeypatch, at=(2, 3)) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(MoECLMethod, "penalty", nan_at(*at))
        with pytest.raises(TrainingError):
            learn(config, run)


def test_another_base_on_the_way(tmp_path, tiny_folder, monkeypatch):
    base = tmp_path / "base"
    shutil.copytree(tiny_folder, base)
    config = stream(tmp_path / "s", base, train=QUICK)
    interrupted(config, tmp_path / "run", monkeypatch)
    shutil.rmtree(base)
    write_other_base(base, tiny_folder)
    with pytest.raises(BaseError, match="not on this one"):
        learn(config, tmp_path / "run")


def test_rows_that_change_on_the_way(tmp_path, tiny_folder, monkeypatch):
    config = stream(tmp_path / "s", tiny_folder, train=QUICK)
    interrupted(config, tmp_path / "run", monkeypatch)
    rows = (tmp_path / "s" / "task1.train.jsonl").read_text()
    write_rows(tmp_path / "s" / "task1.train.jsonl", 24, 99)
    with pytest.raises(RunError, match="the train rows of task 'task1' changed since the run began"):
        learn(config, tmp_path / "run")
    (tmp_path / "s" / "task1.train.jsonl").write_text(rows)
    write_rows(tmp_path / "s" / "task0.train.jsonl", 24, 99)  # of a task that is learned, they are not needed
    write_rows(tmp_path / "s" / "task0.test.jsonl", 12, 99)
    recorder = Recorder(tmp_path / "run")
    result = learn(config, tmp_path / "run", recorder)
    assert any("task0: not tested any more (its test rows changed)" in note for note in recorder.notes)
    assert [row[0] is None for row in result.R] == [False, False, True]


@pytest.mark.parametrize("damage", ["progress", "training"])
def test_a_damaged_run(tmp_path, tiny_folder, monkeypatch, damage):
    config = stream(tmp_path / "s", tiny_folder, train=QUICK)
    interrupted(config, tmp_path / "run", monkeypatch)
    if damage == "progress":
        (tmp_path / "run" / "progress.json").write_text('{"R": [')
    else:
        store = Store.open(tmp_path / "run" / "store")
        store.commit(training={"shared": {"x": torch.zeros(1)}})
    with pytest.raises(RunError if damage == "progress" else StoreError, match=r"progress.json|further learning"):
        learn(config, tmp_path / "run")


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"train": {"max_length": 300}}, ConfigError, r"max_length: 300 is more than the base's 256 positions"),
        ({"train": {"report_to": ["tensorbord"]}}, ConfigError, r"train.report_to: tensorbord is not supported"),
        ({"train": {"device": "cuda:9"}}, ConfigError, "train.device: 'cuda:9' cannot be used here"),
        ({"method": {"name": "moe-cl", "adapt_layers": 3}}, BaseError, "more than the base's 2 layers"),
    ],
)
def test_settings_that_do_not_fit(tmp_path, tiny_folder, settings, error, message):
    config = stream(tmp_path / "s", tiny_folder, **settings)
    with pytest.raises(error, match=message) as caught:
        learn(config, tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not RunFolder(tmp_path / "run").exists(), "nothing was begun"


def test_faulty_rows_show_before_the_base_is_loaded(tmp_path, tiny_folder, monkeypatch):
    config = stream(tmp_path / "s", tiny_folder)
    (tmp_path / "s" / "task1.test.jsonl").write_text('{"text": "x", "label": "godo"}\n')
    monkeypatch.setattr(session_module, "load_backbone", None)
    with pytest.raises(DataError, match=r"task1.test.jsonl:1: label: 'godo'.*did you mean 'good'"):
        learn(config, tmp_path / "run")


@pytest.mark.parametrize("how", ["torch.save", "write"])
def test_a_full_disk_under_a_checkpoint(tmp_path, plain, monkeypatch, how):
    config, expected = plain

    def full(*arguments, **options):
        if how == "torch.save":
            raise RuntimeError("[enforce fail at inline_container.cc] PytorchStreamWriter failed writing file\nmore")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(*((torch, "save") if how == "torch.save" else (Path, "write_bytes")), full)
        with pytest.raises(RunError, match="disk") as caught:
            learn(config, tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert learn(config, tmp_path / "run").digests == expected.digests


# --- settings that must not change what is learned ---


def test_gradient_checkpointing_learns_the_same(tmp_path, tiny_folder):
    results = []
    for on in (False, True):
        config = stream(tmp_path / "s", tiny_folder, rows=16, train={**QUICK, "gradient_checkpointing": on})
        results.append(learn(config, tmp_path / f"run{on}"))
    assert results[0].R == results[1].R
    one, other = (logits(tmp_path / f"run{on}", "task1") for on in (False, True))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_bf16_says_why(tmp_path, tiny_folder):
    config = stream(tmp_path / "s", tiny_folder, tasks=1, rows=16, train={**QUICK, "precision": "bf16"})
    result = learn(config, tmp_path / "run")
    assert result.environment["base"]["dtype"] == "bfloat16"
    recorder = Recorder(tmp_path / "auto")
    learn(stream(tmp_path / "s", tiny_folder, tasks=1, rows=8, train=QUICK), tmp_path / "auto", recorder)
    assert any(note.startswith("precision ") and "processor" in note for note in recorder.notes)


def test_the_lock_is_the_systems(tmp_path):
    """A killed run's lock file keeps no one out."""
    run = RunFolder(tmp_path / "run")
    with run.lock():
        pass
    (tmp_path / "run" / ".lock").write_text('{"pid": 1, "host": "x", "since": "y", "command": "z"}')
    with run.lock(), (tmp_path / "run" / ".lock").open() as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
