"""What a task's training is fed with: planned batches, the next one prepared by a thread while a step runs."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from moecl.data.encode import Encoded, collate
from moecl.prefix import Prefixes


class Feed(Dataset[dict[str, Tensor]]):
    """The batches of `plan` by their number, so that going on after a kill is an index. Close it.

    The thread reads and pads; what runs the base runs in the caller's, or the two would share the processors.
    """

    def __init__(
        self, rows: Sequence[Encoded], plan: Sequence[Sequence[int]], pad_id: int, prefixes: Prefixes | None = None
    ) -> None:
        self.rows, self.plan, self.pad_id, self.prefixes = rows, plan, pad_id, prefixes
        if prefixes is not None:
            prefixes.kept.begin()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="feed")
        self._ahead: dict[int, Future[tuple[dict[str, Tensor], list[int]]]] = {}

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        """`collate`'s tensors, and with prefixes `prefix` [B, T, D]."""
        under_way = self._ahead.pop(number, None) or self._thread.submit(self._prepare, number)
        batch, missing = under_way.result()
        if self.prefixes is not None:
            self.prefixes.fill(batch["prefix"], missing, self._texts(number))
        if number + 1 < len(self.plan):
            self._ahead = {number + 1: self._thread.submit(self._prepare, number + 1)}
        return batch

    def _prepare(self, number: int) -> tuple[dict[str, Tensor], list[int]]:
        batch = collate([self.rows[place] for place in self.plan[number]], self.pad_id)
        if self.prefixes is None:
            return batch, []
        prefix, missing = self.prefixes.read(self._texts(number))
        return batch | {"prefix": prefix}, missing

    def _texts(self, number: int) -> list[list[int]]:
        return [self.rows[place].input_ids + self.rows[place].answer_ids for place in self.plan[number]]

    def close(self) -> None:
        self._thread.shutdown(cancel_futures=True)

    def __enter__(self) -> "Feed":
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()
