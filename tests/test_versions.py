"""Versions and aliases where a task is named: model, engine and further learning, after everything a store may see."""

import getpass
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects

from moecl import store as store_module
from moecl.bank import find
from moecl.config import StreamConfig, load_stream
from moecl.engine import Engine
from moecl.errors import StoreError, TaskError
from moecl.model import MoECL
from moecl.results import Result
from moecl.router import Router
from moecl.session import Session
from moecl.store import Store
from moecl.train import ContinualTrainer, learn
from moecl.using import learned
from test_learn import TRAIN, Notes, logits, new
from tiny import tiny_batch
from tiny_stream import write_stream
from tiny_tasks import task


@pytest.fixture(scope="module")
def original(tmp_path_factory, tiny_folder) -> tuple[Path, StreamConfig, Result, Result]:
    """A run of two tasks, the first learned twice: its stream, its results before and after. Copy it."""
    folder = tmp_path_factory.mktemp("versions")
    config = load_stream(write_stream(folder / "stream", tiny_folder, rows=16, train={**TRAIN, "precision": "fp32"}))
    first = ContinualTrainer(config, folder / "once").run()
    shutil.copytree(folder / "once", folder / "run")
    second = learn(folder / "run", new(folder / "n", "task0", seed=1), replace=True)
    Store.open(folder / "run" / "store").promote("task0@1")
    return folder, config, first, second


@pytest.fixture
def run(original, tmp_path) -> Path:
    shutil.copytree(original[0] / "run", tmp_path / "run")
    return tmp_path / "run"


def test_a_version_answers_as_it_did(original, run):
    """Bitwise, alone and beside rows of others, by number and by alias."""
    folder, *_ = original
    model, batch = MoECL.from_pretrained(run), tiny_batch()
    old, now, other = logits(folder / "once", "task0"), logits(folder / "run", "task0"), logits(run, "task1")
    assert not torch.equal(old, now)
    with torch.no_grad():
        for name in ("task0@1", "task0@prod"):
            assert torch.equal(model(**batch, task=name).logits, old)
        assert torch.equal(model(**batch, task="task0@2").logits, now)
        mixed = model(**batch, task=["task0@prod", "task0", "task1"]).logits
    for row, alone in enumerate((old, now, other)):
        real = batch["attention_mask"][row].bool()
        assert torch.allclose(mixed[row][real], alone[row][real], rtol=1e-5, atol=1e-5)
    assert list(model.bank) == ["task1", "task0"], "versions are found, not listed"
    assert "task0@prod" in model.bank
    assert "task0@9" not in model.bank


def test_the_engine_tells_which_version_answered(original, run):
    engine = Engine(MoECL.from_pretrained(run))
    rows = ["a day food", "a cat price"] * 2
    names = ["task0", "task0@prod", "task0@2", "task1"]
    mixed = engine.predict(rows, names)
    assert [one.task for one in mixed] == ["task0", "task0@1", "task0@2", "task1"]
    for row, name, found in zip(rows, names, mixed, strict=True):
        [alone] = engine.predict([row], name)
        assert found.label == alone.label
        assert found.scores == pytest.approx(alone.scores, abs=1e-5)
    assert mixed[0].scores == pytest.approx(engine.predict(rows[:1], "task0@2")[0].scores, abs=1e-6)
    assert engine.predict(rows[:1], "task0@1") != engine.predict(rows[:1], "task0@2")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("task0@3", "has no version 3; it has 1, 2"),
        ("task0@beta", "has no alias 'beta'; its aliases are: prod"),
        ("task0@", "behind @ stands a version"),
        ("nothing@1", "no task 'nothing'"),
        ("nothing", "no task 'nothing'; the tasks are: task1, task0"),
    ],
)
def test_a_name_that_names_nothing(run, name, said):
    model = MoECL.from_pretrained(run)
    with pytest.raises(TaskError, match=said):
        model(**tiny_batch(), task=name)


def test_a_model_without_a_store_has_no_versions(tiny_folder):
    model = MoECL.attach(str(tiny_folder), precision="fp32")
    with pytest.raises(TaskError, match="'a@1': versions and aliases are a store's"):
        find(model.bank, "a@1")


def test_a_retired_task_answers_by_version_alone(run):
    store = Store.open(run / "store")
    store.retire("task0")
    model = MoECL.from_pretrained(run)
    assert list(model.bank) == ["task1"]
    for name in ("task0", "task0@prod"):
        with pytest.raises(TaskError, match=r"'task0' is retired; name its version \(task0@2\)"):
            model(**tiny_batch(), task=name)
    with torch.no_grad():
        model(**tiny_batch(), task="task0@2")
    store.unretire("task0")
    model.load_tasks(store)
    assert set(model.bank) == {"task0", "task1"}
    store.delete("task0")
    model.load_tasks(store)
    assert list(model.bank) == ["task1"]


def test_a_damaged_old_version_is_no_burden_to_the_others(run):
    store = Store.open(run / "store")
    (store.path / "objects" / f"{store.digests('task0@1')['task']}.safetensors").unlink()
    model = MoECL.from_pretrained(run)
    with torch.no_grad():
        model(**tiny_batch(), task="task0")
    with pytest.raises(StoreError, match=r"missing; needed by part 'task' of task 'task0' \(version 1\)"):
        model(**tiny_batch(), task="task0@prod")


# Learning on


def test_learning_on_after_a_rollback(original, run, tmp_path):
    """The old version is tested and kept; what is learned next does not know of the rollback."""
    folder, _, _, before = original
    plain = tmp_path / "plain"
    shutil.copytree(folder / "run", plain)
    store = Store.open(run / "store")
    store.rollback("task0")
    old = logits(run, "task0")
    assert torch.equal(old, logits(folder / "once", "task0"))
    result, expected = learn(run, new(tmp_path / "n")), learn(plain, new(tmp_path / "n"))
    assert result.tasks == ["task1", "task0", "new"]
    assert [row[:2] for row in result.R[:2]] == before.R[:2]
    assert result.R[2][:2] == [before.R[2][0], None], "what version 2 scored says nothing of version 1"
    assert torch.equal(logits(run, "task0"), old)
    assert result.digests["task0"] == store.record("task0@1").parts
    assert result.digests["new"] == expected.digests["new"], "the state for further learning is not rolled back"
    again = learn(run, new(tmp_path / "n", "task0", seed=3), replace=True)
    assert store.refresh()
    assert store.record("task0").version == 3
    assert again.digests["task0"] == store.record("task0").parts
    assert store.verify() == []


@pytest.mark.parametrize("what", ["retire", "delete"])
def test_learning_on_without_a_task(original, run, tmp_path, what):
    """It is not learned once more, only not measured any more; its cells of the past stay."""
    *_, before = original
    store = Store.open(run / "store")
    getattr(store, what)("task0")
    watcher = Notes()
    result = learn(run, new(tmp_path / "n"), watcher=watcher)
    assert any("task0: not tested any more (it was retired or deleted)" in note for note in watcher.notes)
    assert [row[:2] for row in result.R[:3]] == before.R
    assert result.R[3][0] == before.R[2][0], "task1"
    assert result.R[3][1] is None
    assert result.R[3][2] is not None
    assert "task0" not in result.digests
    assert store.refresh()
    assert [task.name for task in store.tasks()] == ["task1", "new"]
    back = learn(run, new(tmp_path / "n", "task0", seed=3), replace=True)
    assert back.tasks == ["task1", "new", "task0"]
    assert store.refresh()
    assert store.record("task0").version == 3


def test_learning_on_with_no_task_left(run, tmp_path):
    """What was learned is still in the shared expert and in the discriminator."""
    store = Store.open(run / "store")
    for name in ("task0", "task1"):
        store.delete(name)
    assert learn(run, new(tmp_path / "n")).R[3][2] is not None
    assert store.refresh()
    memory = store.training()["discriminator"]
    assert {rows.shape[0] for rows in memory.values()} == {4}, "a row for each that was ever learned"


def test_an_unfinished_run_does_not_learn_a_deleted_task_again(original, tmp_path, monkeypatch):
    _, config, *_ = original
    run = tmp_path / "run"
    real = Session._evaluate_row
    with monkeypatch.context() as patch:
        patch.setattr(Session, "_evaluate_row", lambda self, number: real(self, number) if number != 1 else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            ContinualTrainer(config, run).run()
    Store.open(run / "store").delete("task0")
    result = ContinualTrainer(config, run).run()
    assert result.R[1][0] is None
    assert result.R[2][1] is not None
    assert [task.name for task in Store.open(run / "store").tasks()] == ["task1"]


def test_a_rolled_back_live_version_stays_while_others_move(tmp_path, tiny_folder):
    method = {"name": "moe-cl", "rank": 2, "retention": "live"}
    config = load_stream(write_stream(tmp_path / "s", tiny_folder, rows=16, method=method, train=TRAIN))
    run = tmp_path / "run"
    ContinualTrainer(config, run).run()
    learn(run, new(tmp_path / "n", "task0", seed=1), replace=True)
    store = Store.open(run / "store")
    store.rollback("task0")
    old, moving = logits(run, "task0"), logits(run, "task1")
    learn(run, new(tmp_path / "n"))
    assert torch.equal(logits(run, "task0"), old)
    assert not torch.equal(logits(run, "task1"), moving)


# The hub


def test_a_store_on_the_hub_keeps_its_names(original, run, tmp_path, monkeypatch):
    """A store's folder, uploaded as it is, answers by version and alias."""
    monkeypatch.setattr("moecl.model.snapshot_download", lambda name, **options: str(run / "store"))
    model = MoECL.from_pretrained("user/model")
    with torch.no_grad():
        assert torch.equal(model(**tiny_batch(), task="task0@prod").logits, logits(original[0] / "once", "task0"))


def test_a_published_store_tells_nothing_of_its_machine(run, tmp_path, monkeypatch):
    pushed = tmp_path / "pushed"
    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", lambda token=None: Api(pushed))
    MoECL.from_pretrained(run).push_to_hub("user/model", ignore_patterns="*.tmp")
    names = {path.name for path in pushed.rglob("*") if path.is_file()}
    assert not {"audit.jsonl", ".lock", "result.json", "config.yaml"} & names
    manifest, card = (pushed / "manifest.json").read_text(), (pushed / "README.md").read_text()
    store = Store.open(run / "store")
    folder = Path(store.manifest.base.id)
    for text in (manifest, card):
        assert str(folder.parent) not in text
        assert getpass.getuser() not in text
    assert f'MoECL.from_pretrained("user/model", base="path/to/{folder.name}")' in card
    assert "- task0@1, @prod" in card
    assert "| (before any) | " in card
    published = Store.open(pushed)
    assert published.manifest.tasks == store.manifest.tasks
    assert published.manifest.training == store.manifest.training
    model = MoECL.from_pretrained(pushed, base=str(folder))
    assert Router.load(model).tasks == ("task0", "task1")


class Api:
    """The hub, as far as a push asks it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def create_repo(self, repo_id, **kwargs):
        return type("Repo", (), {"repo_id": repo_id})

    def upload_folder(self, *, folder_path, ignore_patterns, delete_patterns, **kwargs):
        assert "*.tmp" in ignore_patterns
        assert delete_patterns == ["objects/*", "training/*", "tmp/*"]
        files = [str(path.relative_to(folder_path)) for path in folder_path.rglob("*") if path.is_file()]
        for name in filter_repo_objects(files, ignore_patterns=ignore_patterns):
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder_path / name, self.folder / name)


def test_what_was_deleted_is_not_published(run, tmp_path, monkeypatch):
    source, pushed = Store.open(run / "store"), tmp_path / "pushed"
    source.delete("task1")
    assert "train.task1@1.mean" in source.training()["router"]
    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", lambda token=None: Api(pushed))
    MoECL.from_pretrained(run).push_to_hub("user/model", ignore_patterns="*.tmp")
    saved = Store.open(pushed)
    whose = {name.split(".")[1] for name in saved.training()["router"] if "@" in name}
    assert whose == {"task0@1", "task0@2"}
    assert saved.manifest.tasks == source.manifest.tasks


def test_rows_that_a_method_keeps_stay_at_home(tmp_path, tiny_folder, monkeypatch):
    method = {"name": "replay", "rank": 2}
    config = load_stream(write_stream(tmp_path / "s", tiny_folder, rows=16, method=method, train=TRAIN))
    ContinualTrainer(config, tmp_path / "run").run()
    assert "0.task0.ids" in Store.open(tmp_path / "run" / "store").training()["memory"], "texts, as tokens"
    pushed = tmp_path / "pushed"
    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", lambda token=None: Api(pushed))
    MoECL.from_pretrained(tmp_path / "run").push_to_hub("user/model", ignore_patterns="*.tmp")
    assert {path.name.partition("-")[0] for path in (pushed / "training").iterdir()} == {"router"}
    model = MoECL.from_pretrained(pushed, base=str(tiny_folder))
    with torch.no_grad():
        assert torch.equal(model(**tiny_batch(), task="task1").logits, logits(tmp_path / "run", "task1"))


# --- a copy ---


def test_a_loaded_model_is_saved_with_all_its_versions(original, run, tmp_path):
    *_, second = original
    model = MoECL.from_pretrained(run)
    model.save_pretrained(tmp_path / "copy")
    store, copy = Store.open(run / "store"), Store.open(tmp_path / "copy")
    assert copy.manifest == store.manifest
    assert copy.verify() == []
    assert [line.what for _, line in copy.audit()] == ["create", "save"], "whoever changed the original is not told"
    card = (tmp_path / "copy" / "README.md").read_text()
    assert "- task0@1, @prod" in card
    assert all(f"{score:.3f}" in card for score in second.R[-1])
    batch = tiny_batch()
    again = MoECL.from_pretrained(tmp_path / "copy")
    for name in ("task0", "task0@prod", "task1"):
        assert torch.equal(again(**batch, task=name).logits, model(**batch, task=name).logits)


def test_a_copy_that_is_cut_short_is_no_store_and_may_be_made_again(run, tmp_path, monkeypatch):
    """At each of its writes, in the same folder."""
    model, path, real = MoECL.from_pretrained(run), tmp_path / "copy", store_module.atomic_write
    model.add_task(task("later"))

    def save(writes: int) -> bool:
        left = iter(range(writes))

        def full(*given, **how):
            if next(left, None) is None:
                raise StoreError("the disk is full")
            real(*given, **how)

        monkeypatch.setattr(store_module, "atomic_write", full)
        try:
            model.save_pretrained(path)
        except StoreError:
            assert not Store.exists(path)
            return False
        return True

    writes = next(writes for writes in range(100) if save(writes))
    assert writes > 10
    copy = Store.open(path)
    assert copy.verify() == []
    assert [record.reference for record in copy.tasks()] == ["task1@1", "task0@2", "later@1"]
    assert [line.what for _, line in copy.audit()] == ["create", "save", "save"]
    assert not (path / store_module.DRAFT).exists()


def test_what_is_learned_in_memory_joins_the_copy(run, tmp_path):
    model = MoECL.from_pretrained(run)
    model.add_task(task("later"))
    model.finish_task()
    model.save_pretrained(tmp_path / "copy")
    store, copy = Store.open(run / "store"), Store.open(tmp_path / "copy")
    assert copy.manifest.tasks[:-1] == store.manifest.tasks
    assert copy.manifest.tasks[-1].reference == "later@1"
    assert copy.manifest.aliases == store.manifest.aliases
    assert copy.manifest.training.keys() == store.manifest.training.keys()
    MoECL.from_pretrained(tmp_path / "copy").add_task(task("and_on"))


def test_a_copy_of_what_is_damaged_is_refused(run, tmp_path):
    model, store = MoECL.from_pretrained(run), Store.open(run / "store")
    damaged = store.path / "objects" / f"{store.digests('task1')['task']}.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    with pytest.raises(StoreError, match=r"altered: .*needed by part 'task' of task 'task1'"):
        model.save_pretrained(tmp_path / "copy")


def test_an_older_version_keeps_its_score(original, run):
    _, _, first, second = original
    scores = {(row["task"], row["version"]): row["score"] for row in learned(run, everything=True)}
    assert scores["task0", 1] == first.R[-1][0]
    assert scores["task0", 2] == second.R[-1][second.tasks.index("task0")]
