"""Keys and values of texts that were read before, for prompts that begin like one of them under the same expert.

What a token leaves in a full-attention layer depends on the expert, the token and those before it. So it serves any
text that begins alike, and none under another expert. SGLang (https://arxiv.org/abs/2312.07104) keeps a tree; here it
is a list, for a budget holds so few texts that looking through them costs nothing beside a forward.
"""

import threading
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer

Layers = Sequence[tuple[Tensor, Tensor]]  # keys and values [heads, T, d] of each layer


@dataclass(frozen=True)
class Known:
    """The first `tokens` of a prompt are the first of a text whose layers are kept."""

    tokens: int = 0
    layers: Layers = ()


class KVPrefixes:
    """`limit` bytes at most; the least recently used text is dropped first. `reused` counts tokens not read again."""

    def __init__(self, limit: int) -> None:
        self.limit, self.bytes, self.reused = limit, 0, 0
        self._kept: OrderedDict[tuple[Hashable, tuple[int, ...]], Layers] = OrderedDict()
        self._lock = threading.Lock()  # an engine may be asked by several threads

    def __len__(self) -> int:
        return len(self._kept)

    def find(self, key: Hashable, ids: Sequence[int]) -> Known:
        """The longest beginning of `ids` kept under `key`, less than all of it: the last token's logits are wanted."""
        prompt, best, most = tuple(ids), None, 0
        with self._lock:
            for one in self._kept:
                if one[0] == key and one[1][: most + 1] == prompt[: most + 1]:
                    best, most = one, alike(one[1], prompt)
            if best is None or not (tokens := min(most, len(prompt) - 1)):
                return Known()
            self._kept.move_to_end(best)
            return Known(tokens, self._kept[best])

    def keep(self, key: Hashable, ids: Sequence[int], layers: Layers) -> None:
        """Copies of `layers`, made of `ids` under `key`, in the place of the texts that `ids` goes on from.

        Of what is larger than the limit the beginning is kept.
        """
        each = size(layers) // len(ids)
        if not (text := tuple(ids)[: self.limit // each]):
            return
        with self._lock:
            for one in [one for one in self._kept if one[0] == key]:
                if one[1][: len(text)] == text:
                    self._kept.move_to_end(one)
                    return
                if one[1] == text[: len(one[1])]:
                    self._drop(one)
            while self.bytes + each * len(text) > self.limit:
                self._drop(next(iter(self._kept)))
            self._kept[key, text] = [(k[:, : len(text)].clone(), v[:, : len(text)].clone()) for k, v in layers]
            self.bytes += each * len(text)

    def _drop(self, one: tuple[Hashable, tuple[int, ...]]) -> None:
        self.bytes -= size(self._kept.pop(one))


def size(layers: Layers) -> int:
    return sum(tensor.numel() * tensor.element_size() for pair in layers for tensor in pair)


def alike(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two texts begin with alike.

    >>> alike([1, 2, 3], [1, 2, 4, 5]), alike([1], [1, 2]), alike([], [1])
    (2, 1, 0)
    """
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))


def padded_cache(known: Sequence[Known], tokens: Sequence[int], width: int) -> DynamicCache:
    """A cache [B, heads, width, d] of the first `tokens` of each row, padded on the left. One row at least has some."""
    some = next(one.layers for one in known if one.layers)
    found: list[tuple[Tensor, ...]] = []
    for layer, pair in enumerate(some):
        batch = tuple(one.new_zeros(len(known), one.shape[0], width, one.shape[2]) for one in pair)
        for row, (own, count) in enumerate(zip(known, tokens, strict=True)):
            if count:
                for place, kept in zip(batch, own.layers[layer], strict=True):
                    place[row, :, width - count :] = kept[:, :count]
        found.append(batch)
    return DynamicCache(found)


def row_layers(cache: Any, row: int, tokens: int) -> Layers:
    """Views of the last `tokens` that a row of a batch has in a `plain` cache."""
    return [(one.keys[row, :, -tokens:], one.values[row, :, -tokens:]) for one in cache.layers]


def plain(cache: Any) -> bool:
    """Whether every layer holds all keys and values, so that they can be cut, and padded to others' length."""
    return all(type(layer) is DynamicLayer for layer in cache.layers)


def lasting(config: PreTrainedConfig) -> bool:
    """Whether a token's keys stay as they are while its text grows: some rotary embeddings are scaled by its length."""
    rotary = getattr(config.get_text_config(decoder=True), "rope_parameters", None) or {}
    kinds = [str(one.get("rope_type")) for one in (rotary, *rotary.values()) if isinstance(one, dict)]
    return not any("dynamic" in kind or kind == "longrope" for kind in kinds)
