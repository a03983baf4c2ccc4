"""What stops a run: one line that says why, and nothing that was learned is lost."""

import errno
import fcntl
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moecl import session as session_module
from moecl.config import StreamConfig
from moecl.errors import BaseError, BusyError, ConfigError, DataError, RunError, StoreError, TrainingError
from moecl.methods.moe_cl import MoECLMethod
from moecl.results import Result
from moecl.run_folder import RunFolder
from moecl.store import Store
from runs import QUICK, Recorder, contents, learn, stream
from tiny import tiny_model
from tiny_stream import write_rows


@pytest.fixture(scope="module")
def plain(tmp_path_factory, tiny_folder) -> tuple[StreamConfig, Result, Path]:
    """A stream of two tasks, what it leads to, and its run's folder."""
    folder = tmp_path_factory.mktemp("plain")
    config = stream(folder, tiny_folder, rows=16)
    return config, learn(config, folder / "run"), folder / "run"


def nan_at(task_number: int, step: int):
    original = MoECLMethod.penalty

    def penalty(self, features, count, query):
        loss = original(self, features, count)
        return loss * float("nan") if self.state.adversary.classes == task_number and count == step else loss

    return penalty


def test_a_loss_that_is_no_number_stops_the_run_and_loses_nothing(tmp_path, plain, monkeypatch):
    config, expected, _ = plain
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


def test_a_changed_stream_is_named(plain):
    config, _, run = plain
    before = contents(run)
    changed = config.model_copy(update={"train": config.train.model_copy(update={"lr": 0.5, "epochs": 9})})
    with pytest.raises(RunError, match=r"train\.epochs is 9, it was 2; train\.lr is 0\.5, it was 0\.02") as caught:
        learn(changed, run)
    assert "\n" not in str(caught.value)
    with pytest.raises(RunError, match="tasks has 1 entries, it had 2"):
        learn(config.model_copy(update={"tasks": config.tasks[:1]}), run)
    after = contents(run)
    assert {k: v for k, v in before.items() if k != ".lock"} == {k: v for k, v in after.items() if k != ".lock"}


def test_a_run_in_use(plain):
    config, _, run = plain
    with RunFolder(run).lock(), pytest.raises(BusyError, match=r"in use by pid \d+"):
        learn(config, run)


def test_a_folder_that_is_no_run(tmp_path, tiny_folder):
    config = stream(tmp_path / "s", tiny_folder)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    with pytest.raises(RunError, match=r"not empty and not a run \(thesis.tex\)"):
        learn(config, tmp_path / "full")
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="file"):
        learn(config, tmp_path / "file")


def test_a_store_whose_run_is_lost(plain, tmp_path):
    config, _, run = plain
    shutil.copytree(run / "store", tmp_path / "run" / "store")
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


def test_a_run_that_was_begun_on_another_device(tmp_path, tiny_folder, monkeypatch):
    config = stream(tmp_path / "s", tiny_folder, train=QUICK)
    interrupted(config, tmp_path / "run", monkeypatch)
    settled = tmp_path / "run" / "config.yaml"
    settled.write_text(settled.read_text().replace("device: cpu", "device: cuda:9"))
    with pytest.raises(
        ConfigError, match=r"config.yaml: train.device: 'cuda:9' .*; use auto or cpu there: the run was"
    ):
        learn(config, tmp_path / "run")
    settled.write_text(settled.read_text().replace("cuda:9", "auto"))
    assert learn(config, tmp_path / "run").resumed == 1


def test_a_training_that_was_over_when_it_was_killed_counts_once(tmp_path, tiny_folder, monkeypatch):
    config = stream(tmp_path / "s", tiny_folder, tasks=1, rows=8, train=QUICK)
    trained = session_module.learn_task
    monkeypatch.setattr(session_module, "learn_task", lambda *of, **more: replace(trained(*of, **more), earlier=1e6))
    with monkeypatch.context() as patch:
        patch.setattr(MoECLMethod, "finish", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            learn(config, tmp_path / "run")
    assert 1e6 < learn(config, tmp_path / "run").seconds < 2e6


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
        ({"train": {"device": "cuda:9"}}, ConfigError, "device: 'cuda:9' cannot be used here"),
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
    config, expected, _ = plain

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


def test_the_lock_is_the_systems(tmp_path):
    """A killed run's lock file keeps no one out."""
    run = RunFolder(tmp_path / "run")
    with run.lock():
        pass
    (tmp_path / "run" / ".lock").write_text('{"pid": 1, "host": "x", "since": "y", "command": "z"}')
    with run.lock(), (tmp_path / "run" / ".lock").open() as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_run_without_its_result_says_so(tmp_path, plain):
    config, _, folder = plain
    shutil.copytree(folder, tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()
    with pytest.raises(RunError, match=r"its store has task 'task0', but neither result.json nor progress.json"):
        learn(config, tmp_path / "run")
