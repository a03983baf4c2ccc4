"""What the router might see of a text: hidden states of the frozen base, by layer and pooling; kept in a folder.

Each text runs alone, without padding, so that its numbers do not depend on its neighbours.
"""

from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from measure import say
from moecl.backbone import Backbone, load_backbone
from moecl.data.benchmarks import BENCHMARKS, PREFIX
from moecl.data.rows import read_rows
from moecl.errors import DataError

SPLITS = ("train", "validation", "test")
POOLINGS: dict[str, Callable[[Tensor], Tensor]] = {  # (T, D) -> (D,)
    "mean": lambda states: states.mean(dim=0),
    "mean_but_first": lambda states: states[min(1, len(states) - 1) :].mean(dim=0),
    "mean_of_directions": lambda states: (states / states.norm(dim=1, keepdim=True)).mean(dim=0),
    "last": lambda states: states[-1],
}

Pooled = dict[str, NDArray[np.float32]]  # split -> (texts, layers, poolings, D)


def sources(folders: list[Path]) -> dict[str, dict[str, dict[str, str]]]:
    """stream -> task -> split -> where its rows are; the bundled streams, then a stream a folder."""
    found = {
        stream: {task: {split: f"{PREFIX}{stream}/{task}/{split}" for split in SPLITS} for task in tasks}
        for stream, tasks in BENCHMARKS.items()
    }
    for folder in folders:
        tasks = sorted(path.parent for path in folder.glob("*/train.jsonl"))
        if not tasks:
            raise DataError(f"--data {folder}: no task in it; give a folder of folders with train.jsonl")
        found[folder.name] = {one.name: {split: str(one / f"{split}.jsonl") for split in SPLITS} for one in tasks}
    return found


class Reader:
    """Reads texts with a base, loaded where something is not in `scratch` yet."""

    def __init__(self, base: str, precision: str, layers: list[int], tokens: int, scratch: Path) -> None:
        self.base, self.precision, self.layers, self.tokens, self.scratch = base, precision, layers, tokens, scratch
        self._backbone: Backbone | None = None

    def pooled(self, name: str, splits: Mapping[str, str], rows: Mapping[str, int]) -> Pooled:
        """The first rows of each split of a task."""
        return {split: self._split(f"{name}.{split}", split, source, rows[split]) for split, source in splits.items()}

    def _split(self, name: str, split: str, source: str, rows: int) -> NDArray[np.float32]:
        settings = [self.base.replace("/", "_"), self.precision, *map(str, self.layers), str(self.tokens), str(rows)]
        path = self.scratch / f"{name}.{'-'.join(settings)}.npy"
        if not path.is_file():
            say(f"reading {name}")
            texts = [str(row["text"]) for _, row in islice(read_rows(source, split), rows)]
            np.save(path, np.stack([self._read(text) for text in texts]))
        found: NDArray[np.float32] = np.load(path)
        return found

    @torch.inference_mode()
    def _read(self, text: str) -> NDArray[np.float32]:
        if self._backbone is None:
            self._backbone = load_backbone(self.base, self.precision)
        assert self._backbone.tokenizer is not None
        ids = self._backbone.tokenizer(text, verbose=False)["input_ids"][: self.tokens]
        return np.stack([[pool(states).numpy() for pool in POOLINGS.values()] for states in self._states(ids)])

    def _states(self, ids: list[int]) -> Iterator[Tensor]:
        """What enters each of the layers: (T, D)."""
        assert self._backbone is not None
        states = self._backbone.model.base_model(torch.tensor([ids]), output_hidden_states=True).hidden_states
        return (states[layer][0].float() for layer in self.layers)
