"""Forms of LoRAs added to the base's projections: with constant weights, or weighed per row by keys."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moecl.nn.call import Call, Parts, token_shares
from moecl.nn.ffn import FFN
from moecl.nn.lora import Expert
from moecl.nn.low_rank import Pairs, add_lora, cast_pair, stack_rows, with_lora


@dataclass(frozen=True)
class Sum(Parts):
    """Form `sum`: `y = W x + c (B A + B_past A_past) x` at each projection, c = lora_alpha / rank."""

    form: ClassVar[str] = "sum"
    needs: ClassVar[frozenset[str]] = frozenset({"lora"})

    lora: Expert
    scale: float
    head: nn.Linear | None = None
    past: Expert | None = None  # frozen, while `lora` is trained beside it; a finished task has them in one

    def modules(self) -> dict[str, nn.Module]:
        past: dict[str, nn.Module] = {} if self.past is None else {"past": self.past}
        return self.with_head({"lora": self.lora, **past})

    @classmethod
    def build(cls, modules: dict[str, Any], settings: Mapping[str, Any]) -> "Sum":
        return cls(scale=float(settings["scale"]), **modules)

    def pair(self, layer: int, projection: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return _joined([self.lora] if self.past is None else [self.lora, self.past], layer, projection, dtype)

    @staticmethod
    def run(ffn: FFN, layer: int, x: Tensor, call: Call) -> Tensor:
        some = next(parts for parts in call.parts if isinstance(parts, Sum))
        own = [parts if isinstance(parts, Sum) else some for parts in call.parts]
        if call.rows is None:
            pairs = {name: some.pair(layer, name, x.dtype) for name in ffn.projections}
            return run_pairs(ffn, layer, x, call, pairs, some.scale)
        rows = call.spread(len(x))
        scale = torch.tensor([parts.scale for parts in own], device=x.device, dtype=x.dtype)[rows, None, None]
        pairs = {
            name: stack_rows([parts.pair(layer, name, x.dtype) for parts in own], rows) for name in ffn.projections
        }
        return run_pairs(ffn, layer, x, call, pairs, scale)


class Keys(nn.Module):
    """`keys: [tasks, D]`, what the text of each task is like."""

    def __init__(self, keys: Tensor) -> None:
        super().__init__()
        self.keys = nn.Parameter(keys)


@dataclass(frozen=True)
class Mix(Parts):
    """Form `mix`: `y = W x + c sum_k w_k B_k A_k x`, w = softmax over k of s cos(mean embedding of the text, key k).

    MoCL, https://arxiv.org/abs/2404.00790, section 3; s (`sharpness`) and the softmax as in its published code.
    """

    form: ClassVar[str] = "mix"
    needs: ClassVar[frozenset[str]] = frozenset({"keys"})
    reads_query: ClassVar[bool] = True

    loras: tuple[Expert, ...]
    keys: tuple[Keys, ...]  # together [len(loras), D]
    scale: float
    sharpness: float
    head: nn.Linear | None = None

    def own_modules(self) -> list[nn.Module]:
        return [*self.loras, *self.keys, *([] if self.head is None else [self.head])]

    def modules(self) -> dict[str, nn.Module]:
        joined = Keys(torch.cat([one.keys.detach() for one in self.keys])).requires_grad_(False)
        keys = self.keys[0] if len(self.keys) == 1 else joined
        return self.with_head({"keys": keys, **{f"lora-{k}": lora for k, lora in enumerate(self.loras)}})

    @classmethod
    def build(cls, modules: dict[str, Any], settings: Mapping[str, Any]) -> "Mix":
        loras = tuple(modules[f"lora-{k}"] for k in range(len(modules["keys"].keys)))
        scale, sharpness = float(settings["scale"]), float(settings["sharpness"])
        return cls(loras, (modules["keys"],), scale, sharpness, modules.get("head"))

    def weights(self, query: Tensor) -> Tensor:
        """query [B, D] -> [B, loras]"""
        keys = torch.cat([one.keys for one in self.keys])
        return torch.softmax(self.sharpness * F.cosine_similarity(query[:, None].float(), keys[None], dim=-1), dim=-1)

    @staticmethod
    def run(ffn: FFN, layer: int, x: Tensor, call: Call) -> Tensor:
        return call.part_by_part(x, lambda parts, rows, some: parts.run_own(ffn, layer, rows, some))

    def run_own(self, ffn: FFN, layer: int, x: Tensor, call: Call) -> Tensor:
        assert call.query is not None
        pairs = {name: _joined(self.loras, layer, name, x.dtype) for name in ffn.projections}
        ranks = torch.tensor([lora.rank for lora in self.loras], device=x.device)
        scale = self.scale * self.weights(call.query).to(x.dtype).repeat_interleave(ranks, dim=1)[:, None]  # (B, 1, r)
        return run_pairs(ffn, layer, x, call, pairs, scale)


def run_pairs(ffn: FFN, layer: int, x: Tensor, call: Call, pairs: Pairs, scale: float | Tensor) -> Tensor:
    """The FFN with LoRA at every projection; `scale` a number, [B, 1, 1], or [B, 1, r] that weighs each direction."""
    seen = F.dropout(x, call.dropout) if call.dropout else x
    h = with_lora(ffn, *ffn.project(x), seen, pairs, scale)  # (B, T, F)
    kept = F.dropout(h, call.dropout) if call.dropout else h
    y = add_lora(ffn.down(h), kept, pairs["down_proj"], scale)  # (B, T, D)
    if call.features is not None:
        call.features[layer] = (token_shares(call, x) @ y)[:, 0]
    return y


def _joined(loras: Sequence[Expert], layer: int, projection: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    found = [cast_pair(lora, layer, projection, dtype) for lora in loras]
    return torch.cat([lora_A for lora_A, _ in found]), torch.cat([lora_B for _, lora_B in found], dim=1)


def merge(loras: Sequence[Expert]) -> Expert:
    """The LoRAs as one, of the sum of their ranks, frozen; on the device of the first."""
    [first, *_] = loras
    merged = Expert(first.geometry, sum(lora.rank for lora in loras)).to(next(first.parameters()).device)
    with torch.no_grad():
        for index in first.geometry.layers:
            for name in first.geometry.projections:
                lora_A, lora_B = _joined(loras, index, name, torch.float32)
                merged.pair(index, name).lora_A.copy_(lora_A)
                merged.pair(index, name).lora_B.copy_(lora_B)
    return merged.requires_grad_(False)
