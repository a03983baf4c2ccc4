"""Contract 7: a run killed at any moment and started again with the same command ends as one never killed."""

import gc
import itertools
import multiprocessing
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch

from moecl.config import StreamConfig, TaskConfig, load_stream
from moecl.data import derived
from moecl.data.derived import Derived
from moecl.results import Result
from moecl.store import Store
from moecl.train import ContinualTrainer
from moecl.train import learn as learn_task
from tiny_stream import task, write_stream

# Importing torch takes seconds: one server does it, and what is to be killed is forked from it.
FORKS = multiprocessing.get_context("forkserver")
PRELOADED = ["moecl.train", "moecl.store", "pytest", "transformers.models.llama.modeling_llama"]

SETTINGS: dict[str, dict[str, Any]] = {
    "steps": {"rows": 16},
    "dropout": {
        "method": {"name": "moe-cl", "rank": 2, "dropout": 0.1},
        "train": {"gradient_accumulation_steps": 2, "evals_per_epoch": 2, "early_stopping": 1, "save_steps": 1},
    },
    "live": {"rows": 16, "method": {"name": "moe-cl", "rank": 2, "retention": "live", "gate": "shared"}},
}


@pytest.fixture(scope="module", autouse=True)
def _preload():
    FORKS.set_forkserver_preload(PRELOADED)  # here, since other files set their own when they are imported


def child(work: Callable[..., Result], ready: Connection, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    gc.freeze()
    ready.send(True)
    work(*arguments)
    os._exit(0)


def train(config: StreamConfig, folder: Path) -> Result:
    return ContinualTrainer(config, folder).run()


def learn(folder: Path, new: TaskConfig, replace: bool) -> Result:
    return learn_task(folder, new, replace)


def start(work: Callable[..., Result], *arguments: Any) -> BaseProcess:
    """Run it in a process of its own; back when it is about to begin."""
    ready, theirs = FORKS.Pipe(duplex=False)
    process = FORKS.Process(target=child, args=(work, theirs, arguments), daemon=True)
    process.start()
    assert ready.recv()
    return process


def killed_after(delay: float, work: Callable[..., Result], *arguments: Any) -> bool:
    """Start it and kill it; whether it was not done by then."""
    process = start(work, *arguments)
    process.join(delay)
    process.kill()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


def plain(result: Result) -> dict[str, Any]:
    """A result as its file has it, but for what a kill may change."""
    fields = result.model_dump(mode="json", exclude={"seconds", "resumed", "name"})
    for details in fields["details"].values():
        del details["seconds"]
    return fields


def same(found: Result, expected: Result, run: Path, unkilled: Path) -> None:
    assert plain(found) == plain(expected)
    assert found.seconds >= sum(one["seconds"] for one in found.details.values()) - 1e-6, "a killed task's are lost"
    assert predictions(run) == predictions(unkilled)
    store = Store.open(run / "store")
    assert store.verify() == []
    assert {name: store.digests(name) for name in found.tasks} == expected.digests
    files = {".lock", "stream.yaml", "config.yaml", "result.json"}
    assert {path.name for path in run.iterdir()} == {*files, "predictions", "store"}
    assert os.listdir(run / "store" / "tmp") == []


def predictions(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (run / "predictions").iterdir()}


def unkilled(folder: Path, base: Path, name: str) -> tuple[StreamConfig, Result, float]:
    config = load_stream(write_stream(folder / "stream", base, **SETTINGS[name]))
    begun = time.monotonic()
    expected = train(config, folder / "unkilled")
    return config, expected, time.monotonic() - begun


def check_kills(folder: Path, base: Path, name: str, kills: int, chance: random.Random) -> None:
    """Kill so many processes at any time, in as many runs as that takes, and compare each run with one never killed."""
    config, expected, took = unkilled(folder, base, name)
    killed, number = 0, 0
    while killed < kills:
        run = folder / f"run{number}"
        if killed_after(chance.uniform(0, took), train, config, run):
            killed += 1
        else:
            same(train(config, run), expected, run, folder / "unkilled")
            number += 1
    found = train(config, run)
    assert found.resumed <= kills + 1
    same(found, expected, run, folder / "unkilled")
    training = [Store.open(place / "store").manifest.training for place in (run, folder / "unkilled")]
    assert training[0] == training[1]


@pytest.mark.parametrize("name", SETTINGS)
def test_killed_at_any_time_it_ends_the_same(tmp_path, tiny_folder, name):
    check_kills(tmp_path, tiny_folder, name, 5, random.Random(name))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", range(10))
def test_200_kills_end_the_same(tmp_path, tiny_folder, seed):
    check_kills(tmp_path, tiny_folder, list(SETTINGS)[seed % len(SETTINGS)], 20, random.Random(seed))


def new_task(folder: Path, seed: int = 7) -> TaskConfig:
    data = task(folder, "new", seed)
    return TaskConfig(**{**data, **{split: str(folder / data[split]) for split in ("train", "validation", "test")}})


def test_learning_one_more_task_may_be_killed(tmp_path, tiny_folder):
    """Also within the change that makes a finished run one that has more to learn."""
    _, _, took = unkilled(tmp_path, tiny_folder, "steps")
    finished, new = tmp_path / "unkilled", new_task(tmp_path)
    chance, killed, runs = random.Random(0), 0, []
    while killed < 5:
        if not runs or not killed_after(chance.uniform(0, took / 2), learn, runs[-1], new, False):
            runs.append(tmp_path / f"run{len(runs)}")
            shutil.copytree(finished, runs[-1])
        else:
            killed += 1
    expected = learn(finished, new, False)
    for run in runs:
        result = Result.load(run / "result.json") if (run / "result.json").exists() else None
        done = result is not None and "new" in result.tasks
        same(result if done else learn(run, new, False), expected, run, finished)


# --- kills that no clock decides ---


def until_call(number: int, work: Callable[..., Result], *arguments: Any) -> Result:
    """Do it in a process that is killed just before its `number`-th rename, which is how everything is committed."""
    left = number
    real = os.replace

    def replace(*paths: Any, **options: Any) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        real(*paths, **options)

    os.replace = replace
    return work(*arguments)


def until_entry(number: int, *arguments: Any) -> Result:
    """Train in a process that is killed when its `number`-th text is about to take its place in the prefix cache."""
    left = number
    real = Derived.put

    def put(self: Derived, key: str, tensors: Any) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            os.replace = lambda *paths, **options: os.kill(os.getpid(), signal.SIGKILL)
        real(self, key, tensors)

    Derived.put = put  # type: ignore[method-assign]
    return train(*arguments)


def test_killed_while_the_prefix_cache_is_filled(tmp_path, tiny_folder):
    """Also where what it had kept is then damaged, or removed, in part or all."""
    method = {"name": "moe-cl", "rank": 2, "adapt_layers": 1}
    path = write_stream(tmp_path / "stream", tiny_folder, rows=16, method=method, train={"precision": "fp32"})
    config = load_stream(path)
    derived.clear("prefix")
    expected = train(config, tmp_path / "unkilled")
    folder, texts, _ = derived.taken("prefix")
    assert texts >= 16 + 16
    for number, damage in {0: "none", 5: "none", 20: "altered", 30: "half removed"}.items():
        derived.clear("prefix")
        run = tmp_path / f"run{number}"
        process = start(until_entry, number, config, run)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        kept = sorted(folder.glob("*/*.safetensors"))
        assert len(kept) == number
        for place, entry in enumerate(kept):
            if damage == "altered":
                entry.write_bytes(entry.read_bytes()[: -1 - place])
            elif damage == "half removed" and place % 2:
                entry.unlink()
        same(train(config, run), expected, run, tmp_path / "unkilled")


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_killed_before_every_commit_it_ends_the_same(tmp_path, tiny_folder):
    config, expected, _ = unkilled(tmp_path, tiny_folder, "steps")
    for number in itertools.count():
        run = tmp_path / f"run{number}"
        process = start(until_call, number, train, config, run)
        process.join()
        found = train(config, run)
        same(found, expected, run, tmp_path / "unkilled")
        if process.exitcode == 0:
            break
    assert number > 20
