"""What one call of the base runs with, and what the forms have in common.

The module tree of the base is left alone: an FFN's `forward` is replaced, and what a row is to be run with comes from
the `Call` of the model call under way. There is no active task to forget to reset.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from moecl.nn.ffn import FFN


class Parts(ABC):
    """What answers for a task: modules of one form, and how an adapted FFN runs with them."""

    form: ClassVar[str]
    needs: ClassVar[frozenset[str]]  # the parts in the store that there must be, beside a head
    reads_query: ClassVar[bool] = False  # whether rows are weighed by their texts' embeddings
    head: nn.Linear | None  # [labels, D]; None where the language model answers

    @abstractmethod
    def modules(self) -> dict[str, nn.Module]:
        """By their names in the store; a head is `head`."""

    def own_modules(self) -> list[nn.Module]:
        """What is moved where the model is moved."""
        return list(self.modules().values())

    @classmethod
    @abstractmethod
    def build(cls, modules: dict[str, Any], settings: Mapping[str, Any]) -> "Parts":
        """Of `modules`, and of what the task's record keeps beside them. KeyError, TypeError where they do not fit."""

    @staticmethod
    @abstractmethod
    def run(ffn: FFN, layer: int, x: Tensor, call: "Call") -> Tensor:
        """x [B, T, D] -> [B, T, D]. Every row's parts are of this form."""

    @cached_property
    def frozen(self) -> bool:
        return not any(p.requires_grad for module in self.own_modules() for p in module.parameters())

    def with_head(self, modules: dict[str, nn.Module]) -> dict[str, nn.Module]:
        return modules if self.head is None else {**modules, "head": self.head}


@dataclass
class Call:
    """What one call of the base runs with: which parts for which row, and what to hand back.

    `rows: [B]` indexes `parts`; None gives every row `parts[0]`. A part of None is the bare base.
    """

    parts: tuple[Parts | None, ...]
    rows: Tensor | None = None
    attention_mask: Tensor | None = None  # [B, T], 1 where a token is real; needed for `features` and `query`
    answers: Tensor | None = None  # [B, T] bool: the positions that reach the language-model head
    tokens: Tensor | slice | None = None  # ids whose logits are read, in float32; None reads all as the base has them
    prefix: Tensor | None = None  # [B, T, D], what enters the first adapted layer: those below it are not run
    features: dict[int, Tensor] | None = None  # if given: layer -> p [B, D], the discriminator's input
    gate_use: dict[int, Tensor] | None = None  # if given: layer -> task expert's weight [B, T]
    dropout: float = 0.0
    query: Tensor | None = None  # [B, D]: the mean embedding of each row's text, taken where a form reads it
    batch_size: int = 0  # rows of the forward under way, beams included; set by the base's first layer
    packs: dict[int, Any] = field(default_factory=dict)  # layer -> matrices of rows that differ
    split: dict[Hashable, tuple[Tensor, "Call"]] = field(default_factory=dict)  # see `only`

    def replay(self) -> "Call":
        """The call as seen by a recomputation under gradient checkpointing: same work, nothing handed back twice."""
        return replace(self, features=None if self.features is None else {}, gate_use=None)

    def spread(self, count: int) -> Tensor:
        """`rows` for a batch of `count`: beams of a row stand together."""
        assert self.rows is not None
        return self.rows.repeat_interleave(count // len(self.rows))

    def of(self, rows: Tensor) -> "Call":
        """The call of these rows of this one's, for a forward on what their cache holds."""
        query = None if self.query is None else self.query[rows]
        return Call(self.parts, None if self.rows is None else self.rows[rows], tokens=self.tokens, query=query)

    def only(self, count: int, wanted: Callable[["Parts"], bool], key: Hashable) -> tuple[Tensor, "Call"]:
        """The places among `count` rows whose parts are `wanted`, and the call of those; kept under `key`."""
        key = key, count
        if key not in self.split:
            rows, own = self.spread(count), [None if p is None or not wanted(p) else p for p in self.parts]
            chosen = torch.tensor([p is not None for p in own], device=rows.device)[rows].nonzero()[:, 0]
            mask, query = (
                None if found is None else found.repeat_interleave(count // len(found), dim=0)[chosen]
                for found in (self.attention_mask, self.query)
            )
            some = replace(
                self,
                parts=tuple(own),
                rows=rows[chosen],
                attention_mask=mask,
                query=query,
                features=None,
                gate_use=None,
            )
            some.packs, some.split = {}, {}
            self.split[key] = chosen, some
        return self.split[key]

    def part_by_part(self, x: Tensor, run: Callable[[Any, Tensor, "Call"], Tensor]) -> Tensor:
        """x [B, T, D] -> [B, T, D]: `run(parts, rows of x, their call)` for each part in turn."""
        if self.rows is None:
            return run(self.parts[0], x, self)
        y = torch.zeros_like(x)
        for key, parts in {id(parts): parts for parts in self.parts if parts is not None}.items():
            places, some = self.only(len(x), lambda one, parts=parts: one is parts, key)  # type: ignore[misc]
            if len(places):
                y[places] = run(parts, x[places], some)
        return y

    def bare_rows(self, count: int) -> Tensor | None:
        """[count] bool: the rows that run the bare base; None where there are none."""
        if self.rows is None or None not in self.parts:
            return None
        return torch.tensor([parts is None for parts in self.parts], device=self.rows.device)[self.spread(count)]


@contextmanager
def no_autocast() -> Iterator[None]:
    """Outside of torch.autocast: the base is in the dtype that it was loaded in, what is trained in float32."""
    with ExitStack() as stack:
        for kind in ("cpu", "cuda", "mps", "xpu"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


_current: ContextVar[Call | None] = ContextVar("moecl_call", default=None)


def current_call() -> Call | None:
    return _current.get()


@contextmanager
def run_with(call: Call | None) -> Iterator[None]:
    token = _current.set(call)
    try:
        with no_autocast():
            yield
    finally:
        _current.reset(token)


def token_shares(call: Call, x: Tensor) -> Tensor:
    """[B, 1, T]: the share of each token in its row's mean."""
    assert call.attention_mask is not None, "a mean over real tokens needs the attention mask"
    real = call.attention_mask.to(x.dtype)
    real = real.repeat_interleave(len(x) // len(real), dim=0)  # beams of a row stand together
    return (real / real.sum(dim=1, keepdim=True))[:, None, :]
