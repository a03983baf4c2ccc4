"""A task's labels as paths of tokens, where they are more than one each."""

from collections.abc import Sequence

import torch
from torch import Tensor

from moecl.data.encode import Encoder


class Trie:
    """The labels of a task as token paths: each ends where only its last token is left to be scored."""

    def __init__(self, encoder: Encoder) -> None:
        self.labels = [(*tokens, encoder.end) for tokens in encoder.answers]
        ways = [label[:-1] for label in self.labels]
        self.paths = sorted(way for way in ways if not any(other != way and other[: len(way)] == way for other in ways))
        self.path_of = [next(k for k, path in enumerate(self.paths) if path[: len(way)] == way) for way in ways]
        # What is read of each path: (how many of its tokens are before, the token that is scored then).
        self.reads: list[dict[tuple[int, int], int]] = [{} for _ in self.paths]
        for label, path in zip(self.labels, self.path_of, strict=True):
            for read in enumerate(label[1:]):
                self.reads[path].setdefault(read, len(self.reads[path]))

    def scores(self, first: Tensor, followed: Sequence[Tensor]) -> Tensor:
        """[labels]: first [V] is log p after the prompt, followed[k] that of all that is read of path k."""
        totals = []
        for label, path in zip(self.labels, self.path_of, strict=True):
            rest = [followed[path][self.reads[path][read]] for read in enumerate(label[1:])]
            totals.append(first[label[0]] + torch.stack(rest).sum())
        return torch.stack(totals)


def padded_paths(paths: Sequence[tuple[int, ...]]) -> Tensor:
    """[paths, longest]: shorter ones repeat their last token, whose outputs are not read."""
    longest = max(map(len, paths))
    return torch.tensor([[*path, *[path[-1]] * (longest - len(path))] for path in paths])
