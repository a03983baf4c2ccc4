"""What learning one more task takes: the same after 1 task and after 40. Counts, since times are the machine's."""

import shutil
from pathlib import Path

import pytest

from moecl import _atomic, run_folder
from moecl import store as store_module
from moecl.config import StreamConfig, TaskConfig
from moecl.methods.moe_cl import STARTS
from moecl.model import MoECL
from moecl.results import Result
from moecl.run_folder import RunFolder
from moecl.store import Store
from moecl.task_trainer import TaskTrainer
from moecl.train import ContinualTrainer, Watcher, learn
from runs import QUICK, stream
from tiny_stream import task


@pytest.fixture(scope="module")
def one(tmp_path_factory, tiny_folder) -> Path:
    """A finished run of one task without rows that score it."""
    folder = tmp_path_factory.mktemp("one")
    train = {**QUICK, "evals_per_epoch": 0, "precision": "fp32"}
    config = stream(
        folder, tiny_folder, tasks=1, rows=8, train=train, method={"name": "moe-cl", "rank": 2, "warm_start": "nearest"}
    )
    config = config.model_copy(
        update={"tasks": [config.tasks[0].model_copy(update={"test": None, "validation": None})]}
    )
    ContinualTrainer(config, folder / "run").run()
    return folder / "run"


def grown(run: Path, folder: Path, count: int, **train: object) -> Path:
    """A copy of a run with `count` tasks more, each with experts as they start; `train` changes settings."""
    shutil.copytree(run, folder)
    model = MoECL.from_pretrained(run)
    known = Store.open(run / "store").tasks()[0].task
    names = [known.name, *(f"more{number}" for number in range(count))]
    for name in names[1:]:
        model.add_task(known.model_copy(update={"name": name}))
    model.finish_task()
    shutil.rmtree(folder / "store")
    model.save_pretrained(folder / "store")
    place, before = RunFolder(folder), Result.load(run / "result.json")
    config = place.config()
    tasks = [config.tasks[0].model_copy(update={"name": name}) for name in names]
    fields = {name: getattr(config, name) for name in StreamConfig.model_fields}
    more = StreamConfig(**{**fields, "tasks": tasks, "train": config.train.model_copy(update=train)})
    place.start(more, more, before.environment)
    of_first = {"data": before.data[known.name], "details": before.details[known.name]}
    cells = [[None] * len(names) for _ in range(len(names) + 1)]
    every = {key: dict.fromkeys(names, value) for key, value in of_first.items()}
    place.finish(Result(method=before.method, seed=0, tasks=names, R=cells, seconds=0.0, **every))
    return folder


def counted(run: Path, new: TaskConfig, monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """What learning `new` reads, writes and trains."""
    found: dict[str, object] = {"read": [], "written": 0, "progress": 0}
    real_read, real_write, real_optimizer = store_module.read_file, _atomic.atomic_write, TaskTrainer.create_optimizer
    real_progress = RunFolder.save_progress

    def read(path, digest, users):
        found["read"].append(path.parent.name)
        return real_read(path, digest, users)

    def write(*arguments, **options):
        found["written"] += 1
        return real_write(*arguments, **options)

    def optimizer(self, model=None):
        made = real_optimizer(self, model)
        found["trained"] = [len(group["params"]) for group in made.param_groups]
        return made

    def progress(self, values):
        found["progress"] += 1
        return real_progress(self, values)

    with monkeypatch.context() as patch:
        patch.setattr(store_module, "read_file", read)
        patch.setattr(store_module, "atomic_write", write)
        patch.setattr(run_folder, "atomic_write", write)
        patch.setattr(TaskTrainer, "create_optimizer", optimizer)
        patch.setattr(RunFolder, "save_progress", progress)
        learn(run, new)
    return found


@pytest.fixture
def new(tmp_path) -> TaskConfig:
    data = task(tmp_path, "new", 7, rows=8)
    files = {split: str(tmp_path / data[split]) for split in ("train", "test")}
    return TaskConfig(**{**data, **files, "validation": None})


def test_learning_one_more_task_takes_the_same_after_40(one, new, tmp_path, monkeypatch):
    few = counted(grown(one, tmp_path / "few", STARTS - 1), new, monkeypatch)
    many = counted(grown(one, tmp_path / "many", 39), new, monkeypatch)
    assert many == few
    own, offered = 3, 3 + 3 * (STARTS - 1)
    assert few["read"].count("training") == 5, "shared, discriminator, memory, keys, router"
    assert own < few["read"].count("objects") <= own + offered, "to test the new task, and what it might start from"
    assert few["progress"] == 4
    store = Store.open(tmp_path / "many" / "store")
    assert len(store.tasks()) == 41
    assert store.verify() == []
    assert store.training()["discriminator"]["layers.0.discriminator"].shape[0] == 41


def test_stopped_among_many_tasks_it_ends_the_same(one, new, tmp_path):
    """Contract 7 where only some of the discriminator's rows are trained."""

    class Stopping(Watcher):
        def training(self, task, step, steps, figures):
            if step == 3:
                raise KeyboardInterrupt

    whole = grown(one, tmp_path / "whole", 39, epochs=4, save_steps=1)
    stopped = Path(shutil.copytree(whole, tmp_path / "stopped"))
    expected = learn(whole, new)
    with pytest.raises(KeyboardInterrupt):
        learn(stopped, new, watcher=Stopping())
    assert [path.name for path in (stopped / "checkpoints" / "new").iterdir()] == ["checkpoint-2"]
    found = learn(stopped, new)
    assert found.resumed == 1
    assert (found.R, found.digests) == (expected.R, expected.digests)
    manifests = [Store.open(run / "store").manifest for run in (whole, stopped)]
    assert manifests[0] == manifests[1]
