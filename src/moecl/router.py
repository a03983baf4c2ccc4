"""Which task is this text for? Or for none of them: `task="auto"`.

The frozen base reads the text alone, without an instruction, up to a quarter of its layers. What it then knows of the
text is the mean, over tokens, of the directions of their hidden states: lengths are left out, for the first token's is
thousands of times the others' (Xiao et al. 2023, arXiv 2309.17453). discriminant.py says whose such a vector is.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from moecl.bank import fitting
from moecl.data.derived import Derived
from moecl.data.task import listed
from moecl.discriminant import Calibration, Discriminant, Drawn, Moments, Whitener, calibrate, log_shares
from moecl.errors import BaseError, StoreError
from moecl.model import MoECL
from moecl.prefix import each_alone, space
from moecl.store import ROUTER, Store, TaskRecord

TOKENS = 128  # of a text, from its start, that are read
MOST_ROWS = 2000  # of a split that the statistics are taken of
FALSE_ACCEPT = 0.1
NOWHERE = -2.0  # how familiar a text is that lies beyond all tasks; a cosine is -1 at least
MOST_BYTES = 10**9  # of what the cache keeps of splits

Floats32 = NDArray[np.float32]


@dataclass(frozen=True)
class Route:
    """The task a text is for, None where it is for none.

    `shares`: each task's probability if it is for one of them, summing to 1; `familiar`: how like their texts it is,
    from -1 to 1, -2 beyond all of them. Below the router's threshold it is for none.
    """

    task: str | None
    shares: dict[str, float]
    familiar: float

    def rounded(self) -> tuple[dict[str, float], float]:
        """Shares and familiarity as they are told."""
        return {name: round(share, 6) for name, share in self.shares.items()}, round(self.familiar, 6)


@dataclass
class Statistics:
    """What a store keeps so as to route: sums over the features of each task's rows, by its record's `reference`.

    `train` is of training rows, `held` of validation rows, which the means of `train` know nothing of.
    """

    train: Moments
    held: Moments
    layer: int
    false_accept: float = FALSE_ACCEPT

    @classmethod
    def empty(cls, width: int, layers: int) -> Self:
        return cls(Moments(width), Moments(width), min(-(-layers // 4), layers - 1))

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Self:
        """The inverse of `tensors`. Raises KeyError where these are something else."""
        arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
        train, held = (Moments.of(arrays, name) for name in ("train", "held"))
        return cls(train, held, int(arrays["layer"][0]), round(float(arrays["false_accept"][0]), 6))

    def tensors(self) -> dict[str, Tensor]:
        own = {"layer": np.array([self.layer], np.float32), "false_accept": np.array([self.false_accept], np.float32)}
        arrays = {**self.train.tensors("train"), **self.held.tensors("held"), **own}
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def learn(self, features: "Features", key: str, train: Sequence[str], held: Sequence[str]) -> None:
        """Add the texts of a task, whose record has this reference."""
        self.train.add(key, features(_some(train)))
        if held:
            self.held.add(key, features(_some(held)))

    def keep(self, records: Iterable[TaskRecord]) -> None:
        """Forget the versions that a store has no more."""
        for moments in (self.train, self.held):
            moments.keep(record.reference for record in records)

    def known(self, records: Iterable[TaskRecord]) -> dict[str, str]:
        """Task -> key, of those that there are statistics of."""
        return {record.name: found for record in records if (found := record.reference) in self.train.means}


class Features:
    """What the base knows of texts [n, D]. A text's numbers do not depend on its neighbours: each runs alone."""

    def __init__(self, model: MoECL, tokenizer: PreTrainedTokenizerBase, layer: int) -> None:
        self.model, self.tokenizer, self.layer = model, tokenizer, layer
        self.most = min(TOKENS, getattr(model.base.config, "max_position_embeddings", None) or TOKENS)

    def __call__(self, texts: Sequence[str]) -> Floats32:
        rows = self._tokens(texts)
        found = np.zeros((len(rows), self.model.geometry.hidden_size), np.float32)
        real = [place for place, ids in enumerate(rows) if ids]  # not every base puts a token before an empty text
        alone = each_alone(self._read, [rows[place] for place in real], self.model.device)
        for place, features in zip(real, alone, strict=True):
            found[place] = features.numpy()
        return found

    def _tokens(self, texts: Sequence[str]) -> list[list[int]]:
        return [ids[: self.most] for ids in self.tokenizer(list(texts), verbose=False)["input_ids"]] if texts else []

    @torch.no_grad()
    def _read(self, ids: Sequence[int]) -> Tensor:
        states = self.model.injected.entering(self.layer, torch.tensor([ids], device=self.model.device))[0].float()
        return torch.nn.functional.normalize(states, dim=-1).mean(dim=0).cpu()  # (D,)


class KeptFeatures(Features):
    """Those of whole splits, kept in the cache: methods, orders and seeds share them."""

    def __init__(
        self,
        model: MoECL,
        tokenizer: PreTrainedTokenizerBase,
        layer: int,
        base_sha256: str,
        note: Callable[[str], None] = lambda message: None,
    ) -> None:
        super().__init__(model, tokenizer, layer)
        self.kept = Derived("features", MOST_BYTES, note)
        self.space = space(model, base_sha256, layer)

    def __call__(self, texts: Sequence[str]) -> Floats32:
        name = hashlib.sha256(self.space + json.dumps(self._tokens(texts)).encode()).hexdigest()
        if (found := self.kept.get(name)) is not None:
            return np.asarray(found["features"].numpy())
        features = super().__call__(texts)
        self.kept.put(name, {"features": torch.from_numpy(features)})
        return features


def _some(texts: Sequence[str]) -> Sequence[str]:
    """At most MOST_ROWS of them, evenly spread."""
    return texts[:: -(-len(texts) // MOST_ROWS)]


class Router:
    """Tells which of a store's tasks a text is for. Make one with `load`; a task without statistics is never chosen."""

    def __init__(self, features: Features, statistics: Statistics, tasks: Mapping[str, str]) -> None:
        self.features, self.statistics = features, statistics
        self.whitener = Whitener(statistics.train)
        names = sorted(tasks)
        self.keys = [tasks[name] for name in names]
        means = np.stack([statistics.train.means[one] for one in self.keys])
        self.origin = means.mean(axis=0)  # so that what is white has no large number that all share
        self.discriminant = Discriminant(names, self.white(means))
        self.calibration = self._calibrate(statistics.false_accept)

    @classmethod
    def load(cls, model: MoECL, store: Store | None = None) -> "Router | None":
        """The router of the tasks that `store` has, over its base `model`; None where it has no statistics.

        `store` is by default that which the model was loaded from.

        Raises StoreError where these are damaged or of another base.
        """
        if (store := store or model.bank.store) is None:
            return None
        records = store.tasks()  # as of now: reading may take the store to a newer manifest
        statistics = read(store)
        if statistics is None or not (tasks := statistics.known(records)):
            return None
        if statistics.train.width != model.geometry.hidden_size:
            raise StoreError(f"{store.path}: its router statistics are another base's; restore the store from a copy")
        if model.tokenizer is None:
            raise BaseError("base: no tokenizer; load the model with MoECL.from_pretrained, which finds it")
        return cls(Features(model, model.tokenizer, statistics.layer), statistics, tasks)

    @property
    def tasks(self) -> tuple[str, ...]:
        return self.discriminant.tasks

    def route(self, texts: Sequence[str]) -> list[Route]:
        """For each text its task, or None where its like has not been learned. Raises DataError for a text alone."""
        return self.routes(self.features(listed(texts, "texts")))

    def routes(self, features: Floats32) -> list[Route]:
        """Of features [n, D]."""
        shares, familiar = self.see(features)
        return [
            Route(
                self.tasks[int(own.argmax())] if known else None,
                dict(zip(self.tasks, own.tolist(), strict=True)),
                float(like),
            )
            for own, known, like in zip(shares, self.accepts(familiar), familiar, strict=True)
        ]

    def see(self, features: Floats32) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Of features [n, D] the shares [n, tasks], and how familiar each text is [n]."""
        scores, familiar = self._within(self.discriminant, self.white(features), self.calibration.reach)
        return np.exp(log_shares(scores, self.calibration.temperature)), familiar

    def _within(
        self, found: Discriminant, white: NDArray[np.float64], reach: NDArray[np.float64]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Scores, and how familiar, which is NOWHERE beyond the reach [tasks] of the likeliest task."""
        scores, familiar = found.see(white)
        nearest = scores.argmax(axis=1)
        return scores, np.where(found.away(white, nearest) > reach[nearest], NOWHERE, familiar)

    def familiar_without(self, task: str, features: Floats32) -> NDArray[np.float64]:
        """[n]: how familiar texts would be, had `task` not been learned. For three tasks and more."""
        white, others = self.white(features), [place for place, one in enumerate(self.tasks) if one != task]
        return self._within(self.discriminant.without(task), white, self.calibration.reach[others])[1]

    def accepts(self, familiar: NDArray[np.float64]) -> NDArray[np.bool_]:
        """[n]: whether a text is taken to be for one of the tasks."""
        least = self.calibration.threshold
        return familiar >= (-1.0 if least is None else least)

    def white(self, features: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
        return self.whitener(features.astype(np.float64) - self.origin)

    def _calibrate(self, false_accept: float) -> Calibration:
        """By rows drawn as its validation rows lie around their means; where there are none, as its training rows."""
        train, held = self.statistics.train, self.statistics.held
        drawn = {id(one): Drawn(one, self.whitener, len(self.keys)) for one in (train, held) if one.freedom}
        found = []
        for key in self.keys:
            moments = held if key in held.means and held.freedom else train
            mean = self.white(moments.means[key][None])
            rows = drawn.get(id(moments))
            found.append(mean if rows is None else mean + rows.rows * rows.factors(key))
        return calibrate(self.discriminant, found, false_accept)


def read(store: Store) -> Statistics | None:
    """A store's statistics, where it has any. Raises StoreError."""
    tensors = store.training(ROUTER).get(ROUTER)
    if tensors is None:
        return None
    with fitting(f"{store.path}: its router statistics"):
        return Statistics.of(tensors)
