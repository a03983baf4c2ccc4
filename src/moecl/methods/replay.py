"""Experience replay: sequential LoRA on a task's rows and some of earlier tasks' (https://arxiv.org/abs/1902.10486).

After a task `share` (5 %) of its training rows, drawn with the run's seed, are kept for good; every later task is
trained on its own rows and all kept ones, shuffled: once an epoch, where the paper adds some to every step. Trains: one
LoRA (rank 16). Stores: one LoRA for all tasks, and, as token ids in training/, the kept rows: raw data, which a user
may not be allowed to keep. Needs no task id.
"""

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from moecl.data.encode import Encoded
from moecl.method_config import ReplayConfig
from moecl.methods.base import Finished, in_order
from moecl.methods.one_lora import LoRAMethod
from moecl.nn.gated import seeded
from moecl.nn.inject import Injected
from moecl.nn.lora import Geometry


class Replay(LoRAMethod):
    name, config_type = "replay", ReplayConfig
    shared: ClassVar[bool] = True
    config: ReplayConfig

    def __init__(self, config: Any, geometry: Geometry, seed: int, base: Injected | None = None) -> None:
        super().__init__(config, geometry, seed, base)
        self.memory: dict[str, list[Encoded]] = {}  # by the task that they are from
        self.rows: Sequence[Encoded] = ()

    def forget(self, task: str) -> None:
        self.memory.pop(task, None)

    def rehearse(self, rows: Sequence[Encoded]) -> Sequence[Encoded]:
        self.rows = rows
        return [*rows, *chain.from_iterable(self.memory.values())]

    def finish(self) -> Finished:
        count, kept = max(1, round(self.config.share * len(self.rows))), sum(map(len, self.memory.values()))
        drawn = torch.randperm(len(self.rows), generator=seeded(self.seed, kept, "memory"))[:count]
        self.memory[self.task] = [self.rows[place] for place in sorted(drawn.tolist())]
        return super().finish()

    def export(self) -> dict[str, dict[str, Tensor]]:
        kept = {}
        for number, (task, rows) in enumerate(self.memory.items()):
            ids = [torch.tensor([*row.input_ids, *row.answer_ids]) for row in rows]
            kept[f"{number}.{task}.ids"] = pad_sequence(ids, batch_first=True)
            kept[f"{number}.{task}.lengths"] = torch.tensor([[len(one.input_ids), len(one.answer_ids)] for one in rows])
        return super().export() | {"memory": kept}

    def restore(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        super().restore(state)
        kept = state["memory"]
        self.memory = {
            task: as_rows(kept[f"{name}.ids"].tolist(), kept[f"{name}.lengths"].tolist())
            for name, task in in_order(name.removesuffix(".ids") for name in kept if name.endswith(".ids"))
        }


def as_rows(ids: Sequence[list[int]], lengths: Sequence[tuple[int, int]]) -> list[Encoded]:
    pairs = zip(ids, lengths, strict=True)
    return [Encoded(one[:given], one[given : given + answer], -1, False) for one, (given, answer) in pairs]
