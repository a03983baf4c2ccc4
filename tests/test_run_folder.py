"""A run's folder: whole files, one process, and a finished run that is made to have more to learn."""

import json
from contextlib import suppress
from pathlib import Path

import pytest

from moecl import run_folder
from moecl.config import StreamConfig, load_stream
from moecl.errors import BusyError, RunError
from moecl.results import Result
from moecl.run_folder import PROGRESS, REOPENED, RunFolder, differences, short
from stream_text import STREAM


@pytest.fixture
def config(tmp_path) -> StreamConfig:
    path = tmp_path / "stream.yaml"
    path.write_text(STREAM)
    return load_stream(path)


@pytest.fixture
def run(tmp_path, config) -> RunFolder:
    folder = RunFolder(tmp_path / "run")
    with folder.lock():
        folder.start(config, longer(config, epochs=9), {"versions": {"torch": "2"}, "device": "cpu"})
    return folder


def longer(config: StreamConfig, **train) -> StreamConfig:
    return config.model_copy(update={"train": config.train.model_copy(update=train)})


def result(*tasks: str) -> Result:
    R = [[0.5] * len(tasks)] * (len(tasks) + 1)
    return Result(method="moe-cl", seed=0, tasks=list(tasks), R=R, seconds=1, environment={"device": "cpu"})


def test_a_started_run(run, config):
    assert run.exists()
    assert run.config() == longer(config, epochs=9)
    text = (run.path / "config.yaml").read_text()
    assert text.startswith("# resolved at the first start\n# versions:\n#   torch: '2'\n# device: cpu\n")
    run.check_same(config)
    assert run.finished() is None
    assert run.progress() == {}


def test_a_run_from_before_a_setting_goes_on_as_it_was_begun(run, config):
    for name in ("config.yaml", "stream.yaml"):
        path = run.path / name
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join(line for line in lines if "lora_A_lr" not in line))
        assert len(lines) == len(path.read_text().splitlines()) + 1
    assert run.config().method.lora_A_lr == 1
    with pytest.raises(RunError, match=r"method.lora_A_lr is 0.1, it was 1.0"):
        run.check_same(config)


def test_no_run(tmp_path):
    with pytest.raises(RunError, match=r"not a run folder \(no config.yaml\)"):
        RunFolder(tmp_path / "nothing").config()
    assert not RunFolder(tmp_path / "nothing").exists()


def test_a_folder_with_something_else(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(RunError, match=r"not empty and not a run \(notes.txt\)"):
        RunFolder(tmp_path).check_free()


def test_what_a_killed_first_start_leaves_is_free(tmp_path):
    run = RunFolder(tmp_path / "run")
    with run.lock():
        (run.path / ".stream.yaml.0123456789abcdef.tmp").touch()
        (run.path / "stream.yaml").touch()
        run.store.mkdir()
    with run.lock():
        run.check_free()


def test_what_is_refused_leaves_no_folder(tmp_path):
    with pytest.raises(RunError), RunFolder(tmp_path / "new").lock():
        raise RunError("refused")
    assert not (tmp_path / "new").exists()
    begun = RunFolder(tmp_path / "begun")
    with suppress(RunError), begun.lock():
        (begun.path / "stream.yaml").touch()
        raise RunError("refused")
    assert (begun.path / "stream.yaml").exists()


def test_one_process_at_a_time(run):
    with run.lock(), pytest.raises(BusyError, match=r"in use by pid \d+ on .* since"), RunFolder(run.path).lock():
        pass


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="file"), RunFolder(tmp_path / "file").lock():
        pass
    with pytest.raises(RunError, match="file"), RunFolder(tmp_path / "file" / "in").lock():
        pass


@pytest.mark.parametrize("text", ["{", "[]", "\xff"])
def test_damaged_progress(run, text):
    (run.path / PROGRESS).write_bytes(text.encode("latin1"))
    with pytest.raises(RunError, match=r"progress.json: .*restore it") as caught, run.lock():
        pass
    assert "\n" not in str(caught.value)


def test_finishing_leaves_no_progress(run):
    run.save_progress({"R": [[None]]})
    run.checkpoints.mkdir()
    run.finish(result("a"))
    assert run.finished() == result("a")
    assert not run.checkpoints.exists()
    assert run.progress() == {}


# --- more to learn ---


def reopen(run: RunFolder, config: StreamConfig) -> None:
    run.finish(result("a"))
    run.reopen(longer(config, epochs=3), {"R": []}, result("a"))


def test_a_run_that_learns_more_has_the_result_from_before(run, config):
    assert (run.last_result(), run.learning()) == (None, None)
    reopen(run, config)
    assert run.finished() is None
    assert run.last_result() == result("a")
    assert run.learning() == config.tasks[-1].name


def test_a_reopened_run(run, config):
    reopen(run, config)
    assert run.is_reopened()
    assert run.finished() is None
    assert run.config() == longer(config, epochs=3)
    run.save_progress({**run.progress(), "R": [[0.5]]})
    assert run.is_reopened(), "until it is finished again"
    run.finish(result("a", "b"))
    assert not run.is_reopened()
    assert run.finished() == result("a", "b")


def test_reopening_undone(run, config):
    before = (run.path / "config.yaml").read_bytes()
    run.undo_reopen()  # nothing to undo
    reopen(run, config)
    run.checkpoints.mkdir()
    run.undo_reopen()
    assert (run.path / "config.yaml").read_bytes() == before
    assert run.finished() == result("a")
    assert not run.checkpoints.exists()
    assert not run.is_reopened()


@pytest.mark.parametrize("done", range(4))
def test_a_reopening_cut_short_is_all_or_nothing(run, config, monkeypatch, done):
    """After `done` of its changes to files: it has not begun, or the next start completes it."""
    run.finish(result("a"))
    before = run.config()
    changes = 0

    def counted(real):
        def change(*arguments, **options):
            nonlocal changes
            if changes == done:
                raise KeyboardInterrupt
            changes += 1
            return real(*arguments, **options)

        return change

    with monkeypatch.context() as patch:
        patch.setattr(run_folder, "atomic_write", counted(run_folder.atomic_write))
        patch.setattr(Path, "unlink", counted(Path.unlink))
        with pytest.raises(KeyboardInterrupt):
            run.reopen(longer(config, epochs=3), {"R": []}, result("a"))
    with run.lock():
        begun = run.is_reopened()
        assert run.config() == (longer(config, epochs=3) if begun else before)
        assert run.finished() == (None if begun else result("a"))
    assert begun == (done >= 2)
    assert (REOPENED in json.loads((run.path / PROGRESS).read_text())) if begun else True


# --- what changed ---


def test_changes_are_named(run, config):
    changed = longer(config, lr=0.5, epochs=7, seed=3, batch_size=1)
    with pytest.raises(
        RunError, match=r"train\.epochs is 7, it was .*; train\.batch_size is 1.* and 1 more; undo"
    ) as caught:
        run.check_same(changed)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("before", "now", "lines"),
    [
        ({"a": 1}, {"a": 1}, []),
        ({"a": {"b": 1}}, {"a": {"b": 2}}, ["a.b is 2, it was 1"]),
        ({"a": [1, {"b": None}]}, {"a": [1, {"b": "x"}]}, ["a[1].b is x, it was null"]),
        ({"a": [1]}, {"a": [1, 2]}, ["a has 2 entries, it had 1"]),
        ({}, {"a": True}, ["a is true, it was null"]),
        ({"a": {"b": 1}}, {"a": None}, ["a is null, it was {b: 1}"]),
    ],
)
def test_differences(before, now, lines):
    assert differences(before, now) == lines


def test_long_values_are_cut():
    assert len(short("x" * 1000)) == 60
