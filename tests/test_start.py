"""Where a new task starts from: the old task that answers its training rows best, or nowhere."""

import pytest
import torch

from moecl.nn.forms import to_tensors
from moecl.session import Session
from moecl.start import Starts
from moecl.store import Store
from runs import Recorder, learn, stream
from tiny_stream import task as section


def tasks(folder):
    """One with other words for its labels, two that contradict each other, one with the clues of the first of these."""
    other = section(folder, "other", 4, rows=48, labels={"good": "day", "bad": "cat"})
    return [other, *(section(folder, name, seed, rows=48) for name, seed in (("one", 0), ("two", 1), ("three", 2)))]


def settings(**method):
    return {
        "method": {"name": "moe-cl", "rank": 8, "warm_start": "nearest", **method},
        "train": {"epochs": 3, "save_steps": 50},
    }


@pytest.fixture(scope="module", params=[{}, {"gate": "shared", "retention": "live"}, {"experts": "task"}], ids=str)
def run(request, tmp_path_factory, tiny_folder):
    folder = tmp_path_factory.mktemp("start")
    folder.joinpath("data").mkdir()
    config = stream(folder / "data", tiny_folder, tasks=tasks(folder / "data"), **settings(**request.param))
    return learn(config, folder / "run"), folder / "run", config


def test_a_task_starts_from_the_one_that_fits(run):
    result, _, config = run
    if config.method.retention == "exact":
        assert [result.details[name]["start"] for name in ("other", "three")] == [None, "one"]
        assert result.R[3][3] > result.R[0][3] + 0.2, "before its first step it answers as that one does"
        assert result.R[4][3] >= 0.75


def test_old_tasks_stay_as_they_are(run):
    result, _, config = run
    if config.method.retention == "exact":
        assert len({row[0] for row in result.R[1:]}) == len({row[1] for row in result.R[2:]}) == 1


def test_a_run_of_one_step_at_a_time_starts_alike(run, tmp_path):
    """What chooses a start is kept with the store: a session that takes it up chooses the same."""
    result, folder, config = run
    copied = Store.open(folder / "store").training()
    assert copied["keys"].keys() == set(result.tasks)
    session = Session(config, *fresh_folder(tmp_path))
    method = session.method
    method.restore(copied)
    assert method.keys.keys() == set(result.tasks)


def fresh_folder(tmp_path):
    from moecl.run_folder import RunFolder

    return RunFolder(tmp_path / "other"), Recorder(tmp_path / "other")


def test_offers_are_few_and_the_nearest(run, tmp_path):
    """Of ten old tasks those are tried whose texts are nearest; looking at the others loads nothing."""
    _, _, config = run
    session = Session(config, *fresh_folder(tmp_path))
    method, course = session.method, session.courses[0]
    method.begin(course.task)
    method.rehearse(course.train)
    finished = method.finish().parts
    loaded = []
    noise = torch.randn(9, len(method.key), generator=torch.Generator().manual_seed(0))
    method.keys |= {f"far{k}": -method.key + 1e-3 * noise[k] for k in range(5)}
    method.keys |= {f"near{k}": method.key + 1e-3 * noise[5 + k] for k in range(4)}
    old = {name: lambda name=name: loaded.append(name) or finished for name in method.keys if name != course.name}
    offers = method.starts(course.task, course.train, old)
    assert set(offers) == set(loaded) == {f"near{k}" for k in range(4)}
    assert method.starts(course.task, course.train, {}) == {}
    assert method.starts(course.task.model_copy(update={"head": "classifier"}), course.train, old) == {}


def test_a_start_is_copied_not_shared(run, tmp_path):
    _, _, config = run
    session = Session(config, *fresh_folder(tmp_path))
    method, course = session.method, session.courses[0]
    method.begin(course.task)
    with torch.no_grad():
        for parameter in method.state.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) / 10)
    old = method.finish().parts
    kept = {part: {n: t.clone() for n, t in found.items()} for part, found in to_tensors(old).items()}
    [start] = method.starts(session.courses[1].task, course.train, {"one": lambda: old}).values()
    with torch.no_grad():
        for parameter in method.state.shared.parameters():
            parameter.mul_(0.5 if method.config.retention == "exact" else 1)
    parts = method.begin(session.courses[1].task, start)
    second = session.courses[1]
    before, after = (session.starts.loss(second, one) for one in (start, parts))
    assert before == after
    with torch.no_grad():
        for group in method.groups().values():
            for parameter in group:
                parameter.zero_()
    for part, found in to_tensors(old).items():
        if part not in method.moving():
            assert all(torch.equal(found[name], tensor) for name, tensor in kept[part].items())


def test_what_never_changes_is_measured_once(tmp_path, tiny_folder, monkeypatch):
    """Each unlearned task against each finished one, however many rows of R ask; a fresh start anew each time."""
    measured = []
    real = Starts.loss
    monkeypatch.setattr(
        Starts,
        "loss",
        lambda self, course, parts: measured.append((course.name, parts.frozen)) or real(self, course, parts),
    )
    config = stream(tmp_path, tiny_folder, tasks=3, evaluate="all", **settings())
    learn(config, tmp_path / "run")
    assert measured.count(("task1", True)) == 1
    assert measured.count(("task2", True)) == 2
    assert not any(name == "task0" for name, _ in measured)
