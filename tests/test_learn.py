"""`learn`: one more task for a finished run, or a known one again, without the old data."""

import shutil
from pathlib import Path

import pytest
import torch

from moecl.config import StreamConfig, Task, TaskConfig, load_stream, load_task
from moecl.errors import BusyError, ConfigError, DataError, RunError, StoreError, TaskError, TrainingError
from moecl.methods.moe_cl import MoECLMethod
from moecl.model import MoECL
from moecl.results import Result
from moecl.run_folder import RunFolder
from moecl.session import Session
from moecl.store import Store
from moecl.train import ContinualTrainer, Watcher, learn
from runs import contents
from tiny import tiny_batch
from tiny_stream import task, write_rows, write_stream

FILES = {".lock", "stream.yaml", "config.yaml", "result.json"}
TRAIN = {"epochs": 1, "save_steps": 100}


@pytest.fixture(scope="module")
def original(tmp_path_factory, tiny_folder) -> tuple[Path, StreamConfig, Result]:
    """A folder with a stream of two tasks in `stream` and its finished run in `run`; copy it, never write to it."""
    folder = tmp_path_factory.mktemp("learn")
    config = load_stream(write_stream(folder / "stream", tiny_folder, rows=16, train=TRAIN))
    return folder, config, ContinualTrainer(config, folder / "run").run()


@pytest.fixture
def run(original, tmp_path) -> Path:
    shutil.copytree(original[0] / "run", tmp_path / "run")
    return tmp_path / "run"


def new(folder: Path, name: str = "new", seed: int = 7, **settings) -> TaskConfig:
    folder.mkdir(exist_ok=True)
    data = task(folder, name, seed, rows=16, **settings)
    return TaskConfig(**{**data, **{split: str(folder / data[split]) for split in ("train", "validation", "test")}})


class Notes(Watcher):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, message):
        self.notes.append(message)


def logits(run: Path, name: str) -> torch.Tensor:
    with torch.no_grad():
        return MoECL.from_pretrained(run)(**tiny_batch(), task=name).logits


def test_a_task_is_added_without_the_old_training_rows(original, run, tmp_path, monkeypatch):
    folder, config, before = original
    old = {name: logits(run, name) for name in before.tasks}
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    for split in ("train", "validation"):
        for name in before.tasks:
            shutil.move(folder / "stream" / f"{name}.{split}.jsonl", hidden)
    try:
        result = learn(run, new(tmp_path / "n"))
    finally:
        for path in hidden.iterdir():
            shutil.move(path, folder / "stream")
    assert result.tasks == ["task0", "task1", "new"]
    assert [row[:2] for row in result.R[:3]] == before.R
    assert result.R[3][:2] == before.R[2], "retention is exact"
    assert [row[2] is None for row in result.R] == [False, True, False, False]
    assert {name: result.digests[name] for name in before.tasks} == before.digests
    assert result.data["task0"] == before.data["task0"]
    changed = {
        key for key in before.details["task0"] if result.details["task0"].get(key) != before.details["task0"][key]
    }
    assert changed == {"drift", "validation_final"}, "its validation rows are gone"
    assert result.details["task0"]["drift"] == [[2, 0.0], [3, 0.0]], "retention is exact"
    assert "validation_final" not in result.details["task0"]
    assert result.seconds > before.seconds
    assert all(torch.equal(logits(run, name), old[name]) for name in old)
    assert {path.name for path in run.iterdir()} == {*FILES, "predictions", "store"}
    assert RunFolder(run).config().tasks[-1] == new(tmp_path / "n")
    assert "sha256" in (run / "config.yaml").read_text(), "what it was resolved on stays in the head"
    # The command that made the run still shows it, and another task can follow.
    monkeypatch.setattr(Session, "learn_all", None)
    assert ContinualTrainer(config, run).run() == result
    monkeypatch.undo()
    assert learn(run, new(tmp_path / "n", "newer", seed=8)).tasks == ["task0", "task1", "new", "newer"]


def test_it_ends_as_if_it_had_been_in_the_stream(original, run, tmp_path, tiny_folder):
    """What was learned before is taken up from the store alone."""
    _, config, _ = original
    added = new(tmp_path / "n")
    longer = config.model_copy(update={"tasks": [*config.tasks, added]})
    expected = ContinualTrainer(longer, tmp_path / "longer").run()
    result = learn(run, added)
    assert result.digests == expected.digests
    assert result.R[3] == expected.R[3]
    assert (result.R[0][2], result.R[2][2]) == (expected.R[0][2], expected.R[2][2])
    training = [Store.open(place / "store").manifest.training for place in (run, tmp_path / "longer")]
    assert training[0] == training[1]


def test_old_test_rows_that_are_gone_or_changed(original, run, tmp_path):
    folder, _, before = original
    copy = tmp_path / "stream"
    shutil.copytree(folder / "stream", copy)
    text = (run / "config.yaml").read_text().replace(str(folder / "stream"), str(copy))
    (run / "config.yaml").write_text(text)
    (copy / "task0.test.jsonl").unlink()
    write_rows(copy / "task1.test.jsonl", 12, seed=99)
    watcher = Notes()
    result = learn(run, new(tmp_path / "n"), watcher=watcher)
    assert any("task0: not tested any more" in note and "no such file" in note for note in watcher.notes)
    assert any("task1: not tested any more (its test rows changed)" in note for note in watcher.notes)
    assert result.R[3][:2] == [None, None]
    assert result.R[3][2] is not None
    assert [row[:2] for row in result.R[:3]] == before.R
    assert result.metrics["bwt"] is None


def test_a_task_is_learned_again(original, run, tmp_path):
    _, _, before = original
    old = logits(run, "task0")
    changed = new(tmp_path / "n", "task0", seed=1)
    result = learn(run, changed, replace=True)
    assert result.tasks == ["task1", "task0"]
    row0, _, row2 = before.R
    assert [row[0] for row in result.R] == [row0[1], row2[1], row2[1]], "task1 as it was, but for the row of old task0"
    assert all(row[1] is not None for row in result.R)
    assert result.metrics["fwt"] is None, "task1 is the first now, and task0 was not unseen"
    assert result.metrics["average_accuracy"] is not None
    store = Store.open(run / "store")
    assert [(one.version, one.superseded) for one in store.versions("task0")] == [(1, True), (2, False)]
    assert store.record("task0", 1).parts == before.digests["task0"]
    assert store.verify() == []
    assert result.digests["task0"] != before.digests["task0"]
    assert result.digests["task1"] == before.digests["task1"]
    assert not torch.equal(logits(run, "task0"), old)
    assert [one.name for one in RunFolder(run).config().tasks] == ["task1", "task0"]
    third = learn(run, new(tmp_path / "n", "task0", seed=2), replace=True)
    assert third.tasks == ["task1", "task0"]
    assert store.refresh()
    assert store.record("task0").version == 3


def test_r_never_mixes_two_versions(run, tmp_path):
    learn(run, new(tmp_path / "n", "task0", seed=1), replace=True)
    Store.open(run / "store").rollback("task0")
    result = learn(run, new(tmp_path / "m"))
    place = result.tasks.index("task0")
    column = [row[place] for row in result.R]
    assert column[place + 1 : -1] == [None] * (len(column) - place - 2), "of version 2"
    assert column[-1] is not None, "of version 1"
    assert "drift" not in result.details["task0"], "from version 2 to version 1"


def test_live_tasks_go_on_moving(tmp_path, tiny_folder):
    method = {"name": "moe-cl", "rank": 2, "retention": "live"}
    config = load_stream(write_stream(tmp_path / "s", tiny_folder, rows=16, method=method, train=TRAIN))
    before = ContinualTrainer(config, tmp_path / "run").run()
    old = logits(tmp_path / "run", "task0")
    result = learn(tmp_path / "run", new(tmp_path / "n"))
    assert len({result.digests[name]["shared"] for name in result.tasks}) == 1
    assert result.digests["task0"]["shared"] != before.digests["task0"]["shared"]
    assert result.digests["task0"]["task"] == before.digests["task0"]["task"]
    assert not torch.equal(logits(tmp_path / "run", "task0"), old)


@pytest.mark.parametrize(
    ("name", "replace", "message"),
    [
        ("task0", False, "'task0' is learned already; rename it, or learn it again with --replace"),
        ("tsak0", True, r"no task 'tsak0' to replace; the tasks are: task0, task1 \(did you mean 'task0'\?\)"),
    ],
)
def test_names_that_do_not_fit(run, tmp_path, name, replace, message):
    before = (run / "result.json").read_bytes()
    with pytest.raises(TaskError, match=message):
        learn(run, new(tmp_path / "n", name), replace)
    assert (run / "result.json").read_bytes() == before


def test_paths_of_python_are_from_where_it_was_started(run, tmp_path, tiny_folder, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = new(Path("n"))
    assert not Path(made.train).is_absolute()
    learn(run, made)
    config = load_stream(write_stream(tmp_path / "s", tiny_folder, tasks=1, rows=16, train=TRAIN))
    tasks = [one.model_copy(update={"train": "s/task0.train.jsonl"}) for one in config.tasks]
    ContinualTrainer(config.model_copy(update={"tasks": tasks}), "first").run()
    monkeypatch.chdir(tmp_path / "n")
    assert RunFolder(run).config().tasks[-1].train == str(tmp_path / "n" / "new.train.jsonl")
    assert RunFolder(tmp_path / "first").config().tasks[0].train == str(tmp_path / "s" / "task0.train.jsonl")


def test_names_that_differ_in_case_only(run, tmp_path):
    with pytest.raises(ConfigError, match="differs in case only"):
        learn(run, new(tmp_path / "n", "TASK0"))


def test_no_run_no_folder(tmp_path):
    with pytest.raises(RunError, match="not a run folder"):
        learn(tmp_path / "typo", new(tmp_path / "n"))
    assert not (tmp_path / "typo").exists()


def test_joint_learns_no_more_and_stays_finished(tmp_path, tiny_folder):
    path = write_stream(tmp_path / "stream", tiny_folder, rows=16, train=TRAIN, method={"name": "joint", "rank": 4})
    ContinualTrainer(load_stream(path), tmp_path / "run").run()
    before = contents(tmp_path / "run")
    with pytest.raises(RunError, match="joint learns all tasks at once; run the stream again elsewhere"):
        learn(tmp_path / "run", new(tmp_path / "n"))
    assert contents(tmp_path / "run").items() - before.items() == {(".lock", contents(tmp_path / "run")[".lock"])}


def test_each_method_goes_on_with_its_own(tmp_path, tiny_folder):
    for router in (True, False):
        method = {"name": "per-task-lora", "rank": 2}
        path = write_stream(tmp_path / f"s{router}", tiny_folder, tasks=1, rows=16, method=method, train=TRAIN)
        config = load_stream(path, [f"router={router}"])
        ContinualTrainer(config, tmp_path / f"run{router}").run()
        model = MoECL.from_pretrained(tmp_path / f"run{router}")
        with pytest.raises(StoreError, match="was learned by per-task-lora; `moecl learn` goes on with that"):
            model.add_task(Task(name="more", kind="classification", labels=["a", "b"]))


def test_joint_tells_of_no_drift(tmp_path, tiny_folder):
    path = write_stream(tmp_path / "s", tiny_folder, rows=16, method={"name": "joint", "rank": 2}, train=TRAIN)
    notes = Notes()
    ContinualTrainer(load_stream(path), tmp_path / "run", notes).run()
    assert not [note for note in notes.notes if "drift" in note]
    assert {path.name for path in (tmp_path / "run" / "predictions").glob("*.learned.jsonl")} == {
        "task0.learned.jsonl",
        "task1.learned.jsonl",
    }


def test_a_run_in_use(run, tmp_path):
    with RunFolder(run).lock(), pytest.raises(BusyError):
        learn(run, new(tmp_path / "n"))


def test_faults_of_the_new_task_leave_the_run_finished(original, run, tmp_path, monkeypatch):
    _, config, before = original
    unread = new(tmp_path / "n")
    (tmp_path / "n" / "new.test.jsonl").write_text('{"text": "x"}\n')
    with pytest.raises(DataError, match="label: the row has no such field"):
        learn(run, unread)
    tight = new(tmp_path / "n", instruction="very long " * 20 + "{text}")
    with pytest.raises(DataError, match="max_length"):
        learn(run, tight)
    far = new(tmp_path / "n", max_length=1000)
    with pytest.raises(ConfigError, match="256 positions"):
        learn(run, far)
    with monkeypatch.context() as patch:
        patch.setattr(MoECLMethod, "penalty", lambda self, features, step, query: features[0].sum() * float("nan"))
        with pytest.raises(TrainingError, match="'new'"):
            learn(run, new(tmp_path / "n"))
    assert RunFolder(run).finished() == before
    assert RunFolder(run).config() == RunFolder(original[0] / "run").config()
    assert ContinualTrainer(config, run).run() == before
    assert learn(run, new(tmp_path / "n")).tasks == ["task0", "task1", "new"]


def cut_short(run: Path, added: TaskConfig, monkeypatch, replace: bool = False, call: str = "_evaluate_row") -> None:
    """As killed: in the middle of it, nothing tidied up."""
    with monkeypatch.context() as patch:
        patch.setattr(Session, call, lambda *arguments: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            learn(run, added, replace)
    assert RunFolder(run).finished() is None


@pytest.fixture(scope="module")
def added(original, tmp_path_factory) -> dict[str, Result]:
    """The results of learning a new task, and task1 again, from seed 7."""
    folder, found = tmp_path_factory.mktemp("added"), {}
    for name in ("new", "task1"):
        shutil.copytree(original[0] / "run", folder / name)
        found[name] = learn(folder / name, new(folder / "n", name), replace=name == "task1")
    return found


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("new", "_look_ahead"),
        ("new", "_learn"),
        ("new", "_evaluate_row"),
        ("new", "_finish"),
        ("task1", "_learn"),
    ],
)
def test_cut_short_and_started_again(original, run, tmp_path, monkeypatch, added, name, call):
    wanted = new(tmp_path / "n", name)
    cut_short(run, wanted, monkeypatch, name == "task1", call)
    goes_on = call == "_look_ahead"  # the command that made the run may do it, too
    result = ContinualTrainer(original[1], run).run() if goes_on else learn(run, wanted, name == "task1")
    assert (result.R, result.digests, result.resumed) == (added[name].R, added[name].digests, 1)
    assert {task: found["steps"] for task, found in result.details.items()} == dict.fromkeys(result.tasks, 2)


def test_cut_short_and_started_over_with_something_else(run, tmp_path, monkeypatch):
    cut_short(run, new(tmp_path / "n"), monkeypatch, call="_learn")
    assert learn(run, new(tmp_path / "n", "newer")).tasks == ["task0", "task1", "newer"]


def test_cut_short_and_started_over_with_other_rows(run, tmp_path, monkeypatch):
    cut_short(run, new(tmp_path / "n"), monkeypatch, call="_learn")
    changed = new(tmp_path / "n", seed=8)
    result = learn(run, changed)
    assert result.tasks == ["task0", "task1", "new"]
    assert result.resumed == 0
    assert Store.open(run / "store").verify() == []


def test_cut_short_after_the_commit_nothing_is_undone(run, tmp_path, monkeypatch):
    cut_short(run, new(tmp_path / "n"), monkeypatch)
    with pytest.raises(RunError, match="not finished; go on with the command that started it"):
        learn(run, new(tmp_path / "n", "newer"))
    assert learn(run, new(tmp_path / "n")).tasks == ["task0", "task1", "new"]


def test_an_unfinished_run_is_finished_first(original, tmp_path, monkeypatch):
    _, config, _ = original
    with monkeypatch.context() as patch:
        patch.setattr(Session, "_evaluate_row", lambda *arguments: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            ContinualTrainer(config, tmp_path / "run").run()
    with pytest.raises(RunError, match="not finished"):
        learn(tmp_path / "run", new(tmp_path / "n"))


def test_a_task_from_its_file(run, tmp_path):
    """What `load_task` reads is what the run's config says it learned, so that a second start recognises it."""
    folder = tmp_path / "n"
    folder.mkdir()
    data = task(folder, "new", 7, rows=16)
    lines = [f"{key}: {value!r}" for key, value in data.items() if key != "labels"]
    (folder / "new.yaml").write_text("\n".join([*lines, "labels: [fine, sad]"]).replace("good", "fine"))
    for path in folder.glob("*.jsonl"):
        path.write_text(path.read_text().replace('"good"', '"fine"').replace('"bad"', '"sad"'))
    loaded = load_task(folder / "new.yaml")
    learn(run, loaded)
    assert RunFolder(run).config().tasks[-1] == loaded
