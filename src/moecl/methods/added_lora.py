"""What O-LoRA and N-LoRA have in common: each task's LoRA is added to those of all earlier tasks, which are frozen."""

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from moecl.methods.base import Finished
from moecl.methods.one_lora import LoRAMethod
from moecl.nn.call import Parts
from moecl.nn.forms import tensors
from moecl.nn.inject import Injected
from moecl.nn.lora import Expert, Geometry, load_expert
from moecl.nn.sums import Sum, merge


class AddedLoRA(LoRAMethod):
    """`past` is the LoRAs of all finished tasks in one, of the sum of their ranks: what each of them is run with."""

    shared: ClassVar[bool] = False

    def __init__(self, config: Any, geometry: Geometry, seed: int, base: Injected | None = None) -> None:
        super().__init__(config, geometry, seed, base)
        self.past: Expert | None = None

    def form(self, lora: Expert, head: nn.Linear | None) -> Parts:
        return Sum(lora, self.scale, head, self.past)

    def finish(self) -> Finished:
        own = [self.state.lora] if self.past is None else [self.past, self.state.lora]
        self.past = merge(own)
        return self.finished(Sum(self.past, self.scale, self.take_head()), scale=self.scale, rank=None)

    def moving(self) -> dict[str, nn.Module]:
        return {} if self.past is None else {"lora": self.past}

    def export(self) -> dict[str, dict[str, Tensor]]:
        return {} if self.past is None else {"lora": tensors(self.past)}

    def restore(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        self.past = load_expert(self.geometry, state["lora"]).to(self.device)
