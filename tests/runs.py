"""Tiny streams learned from end to end, for tests of what a run does and leaves behind."""

from pathlib import Path

import torch

from moecl.config import StreamConfig, load_stream
from moecl.model import MoECL
from moecl.results import Result
from moecl.store import Store
from moecl.train import ContinualTrainer, Watcher
from tiny import tiny_batch
from tiny_stream import write_stream

NAMES = ["task0", "task1", "task2"]
QUICK = {"epochs": 1, "save_steps": 100}  # for tests of what is around the training


def stream(folder: Path, base: Path, **settings) -> StreamConfig:
    return load_stream(write_stream(folder, base, **settings))


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
