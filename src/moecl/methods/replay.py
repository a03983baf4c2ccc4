"""Experience replay: sequential LoRA on a task's rows and some of earlier tasks' (https://arxiv.org/abs/1902.10486).

After a task `share` (5 %) of its training rows, drawn with the run's seed, are kept for good; every later task is
trained on its own rows and all kept ones, shuffled: once an epoch, where the paper adds some to every step. Trains: one
LoRA (rank 16). Stores: one LoRA for all tasks, and, as token ids in training/, the kept rows: raw data, which a user
may not be allowed to keep. Needs no task id.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from moecl.data.encode import Encoded
from moecl.method_config import ReplayConfig
from moecl.methods.base import Finished
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
        self.memory: list[Encoded] = []
        self.rows: Sequence[Encoded] = ()

    def rehearse(self, rows: Sequence[Encoded]) -> Sequence[Encoded]:
        self.rows = rows
        return [*rows, *self.memory]

    def finish(self) -> Finished:
        count = max(1, round(self.config.share * len(self.rows)))
        drawn = torch.randperm(len(self.rows), generator=seeded(self.seed, len(self.memory), "memory"))[:count]
        self.memory += [self.rows[place] for place in sorted(drawn.tolist())]
        return super().finish()

    def export(self) -> dict[str, dict[str, Tensor]]:
        lengths = torch.tensor([[len(row.input_ids), len(row.answer_ids)] for row in self.memory])
        ids = [torch.tensor([*row.input_ids, *row.answer_ids]) for row in self.memory]
        return super().export() | {"memory": {"ids": pad_sequence(ids, batch_first=True), "lengths": lengths}}

    def restore(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        super().restore(state)
        kept = zip(state["memory"]["ids"].tolist(), state["memory"]["lengths"].tolist(), strict=True)
        self.memory = [Encoded(ids[:given], ids[given : given + answer], -1, False) for ids, (given, answer) in kept]
