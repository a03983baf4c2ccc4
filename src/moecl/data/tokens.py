"""The token ids of whole splits, kept in the cache: a split is tokenised once, whatever is then done with it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from moecl.data.derived import Derived
from moecl.data.encode import Encoded, Encoder
from moecl.data.task import Split

MOST_BYTES = 10**9


def encode_split(
    encoder: Encoder, split: Split, kept: Derived | None = None, answers: bool = True, reserve: int = 0
) -> list[Encoded]:
    """`encoder.encode` of a split's examples, from `kept` where it has them. Raises as `encode`."""
    if kept is None:
        return encoder.encode(split.examples, answers, reserve)
    key = hashlib.sha256(json.dumps([encoder.digest(split.sha256), answers, reserve]).encode()).hexdigest()
    if (found := kept.get(key)) is not None:
        return unpacked(found)
    rows = encoder.encode(split.examples, answers, reserve)
    kept.put(key, packed(rows))
    return rows


def packed(rows: Sequence[Encoded]) -> dict[str, Tensor]:
    """Rows one after another, and where each ends."""
    tensors = {name: torch.tensor([int(getattr(row, name)) for row in rows]) for name in ("label", "cut", "lost")}
    for name in ("input_ids", "answer_ids"):
        lists: list[list[int]] = [getattr(row, name) for row in rows]
        tensors[name] = torch.tensor([token for ids in lists for token in ids], dtype=torch.int32)
        tensors[f"{name}_ends"] = torch.tensor([len(ids) for ids in lists]).cumsum(0)
    return tensors


def unpacked(tensors: dict[str, Tensor]) -> list[Encoded]:
    lists = {}
    for name in ("input_ids", "answer_ids"):
        flat, ends = tensors[name].tolist(), tensors[f"{name}_ends"].tolist()
        lists[name] = [flat[start:end] for start, end in pairwise([0, *ends])]
    numbers = zip(*(tensors[name].tolist() for name in ("label", "cut", "lost")), strict=True)
    return [
        Encoded(prompt, answer, label, bool(cut), lost)
        for prompt, answer, (label, cut, lost) in zip(lists["input_ids"], lists["answer_ids"], numbers, strict=True)
    ]
