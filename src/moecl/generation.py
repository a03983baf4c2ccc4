"""Writing texts token by token: rows of many tasks in one batch, which they join and leave between any two steps.

Each row is sampled with a generator of its own, so that its text does not depend on its neighbours. What is kept of the
keys and values of earlier texts (`kv_prefix.py`) is read in the place of a prompt's beginning.
"""

import copy
import secrets
from bisect import bisect_left
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from moecl.errors import ConfigError
from moecl.kv_prefix import Known, KVPrefixes, lasting, padded_cache, plain, row_layers
from moecl.model import MoECL
from moecl.nn.call import Call, Parts, run_with
from moecl.request import Request, last_only, left_padded, parts_of

Reason = Literal["stop", "length"]
UNFINISHED = "\ufffd"  # what the bytes of half a character decode to


@dataclass(frozen=True)
class Sampling:
    """How a row is written: greedily, unless `temperature` is above 0. Raises ConfigError.

    `seed`: the same row with the same seed gives the same text; None draws one. `stop`: strings that end the text and
    are no part of it. `top_logprobs`: how many of the likeliest tokens are told beside each token's own log p.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    top_logprobs: int | None = None

    def __post_init__(self) -> None:
        checks = {
            "max_new_tokens": (self.max_new_tokens >= 1, "1 or more"),
            "temperature": (0 <= self.temperature < float("inf"), "0 (greedy) or more"),
            "top_p": (0 < self.top_p <= 1, "a share above 0, at most 1"),
            "stop": (not isinstance(self.stop, str) and all(self.stop), "a tuple of texts, none of them empty"),
        }
        for name, (fine, wanted) in checks.items():
            if not fine:
                raise ConfigError(f"{name}: {getattr(self, name)!r:.60} is out of range; give {wanted}")


@dataclass(frozen=True)
class Token:
    """A token that was written, its log p before temperature and top_p, and the likeliest ones in its place."""

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Completion:
    """A written text without white space around it; `reason`: "stop" (its end, or a stop string) or "length".

    `tokens` are those written, without the end token; `logprobs` theirs where they were asked for.
    """

    task: str
    text: str
    reason: Reason
    prompt_tokens: int
    tokens: int
    logprobs: tuple[Token, ...] = ()


@dataclass(frozen=True)
class Piece:
    """What came to a text, and the tokens that were written since the last piece, where their log p is asked for."""

    text: str
    logprobs: tuple[Token, ...] = ()


class Writing:
    """One row and what is written of it so far."""

    def __init__(self, request: Request, sampling: Sampling, tokenizer: PreTrainedTokenizerBase, most: int) -> None:
        """At most `most` tokens fit behind the prompt."""
        self.request, self.sampling, self.tokenizer = request, sampling, tokenizer
        self.limit = min(sampling.max_new_tokens, most)
        self.parts: Parts | None = None  # from the first step on the same ones, whatever becomes of the task
        self.kept_as: Hashable = None  # whose keys and values its own are; None for those that serve no other row
        self._seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
        self.begin()

    def begin(self) -> None:
        """As where nothing is written."""
        self.ids: list[int] = []
        self.logprobs: list[Token] = []
        self._starts: list[int] = []  # where in the text each of these begins
        self.reason: Reason | None = None
        self.text = ""
        self._told = self._listed = 0
        self._draws = torch.Generator().manual_seed(self._seed)

    @property
    def prompt(self) -> list[int]:
        return self.request.row.input_ids

    @property
    def length(self) -> int:
        """Tokens, at most."""
        return len(self.prompt) + self.limit

    def take(self, logits: Tensor, best: int) -> None:
        """One more token by its logits [V], of which `best` has the greatest."""
        token = best if self.sampling.temperature == 0 else draw(logits, self.sampling, self._draws)
        if token == self.request.encoder.end:
            self._end("stop")
            return
        self.ids.append(token)
        if self.sampling.top_logprobs is not None:
            self.logprobs.append(told(logits, token, self.sampling.top_logprobs))
            self._starts.append(len(self.text))
        text = self.tokenizer.decode(self.ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        self.text = str(text).removeprefix(" ")  # which only joins an answer to its prompt
        found = [place for stop in self.sampling.stop if (place := self.text.find(stop)) >= 0]
        if found:
            self.text = self.text[: min(found)]
            del self.logprobs[self._within(len(self.text)) :]
            self._end("stop")
        elif len(self.ids) >= self.limit:
            self._end("length")

    def _end(self, reason: Reason) -> None:
        self.reason, self.text = reason, self.text.rstrip()

    def _within(self, length: int) -> int:
        """How many tokens begin within the first characters of the text."""
        return bisect_left(self._starts, length)

    def news(self) -> Piece | None:
        """What is certain to stay of the text and was not told before; None where that is nothing."""
        text = self.text if self.reason else settled(self.text, self.sampling.stop)
        known = self._within(len(text))
        text = text.lstrip()
        if not (fresh := text[self._told :]):
            return None
        logprobs = tuple(self.logprobs[self._listed : known])
        self._told, self._listed = len(text), max(known, self._listed)
        return Piece(fresh, logprobs)

    def completion(self) -> Completion:
        assert self.reason is not None
        name = self.request.entry.name
        return Completion(name, self.text.strip(), self.reason, len(self.prompt), len(self.ids), tuple(self.logprobs))


def draw(logits: Tensor, sampling: Sampling, draws: torch.Generator) -> int:
    """A token of the smallest set of likeliest ones that has `top_p` of the probability (Holtzman et al. 2020).

    By the inverse of the cumulated probability in the order of the vocabulary: rounding, which depends on the batch,
    changes the choice only where the draw falls on an edge.
    """
    logits = logits.cpu().double()  # in this order: an Apple GPU has no doubles
    p = ((logits - logits.max()) / sampling.temperature).softmax(0)  # no temperature is so low that these overflow
    if sampling.top_p < 1:
        ranked, order = p.sort(descending=True, stable=True)
        kept = ranked.cumsum(0) - ranked < sampling.top_p
        p = torch.zeros_like(p).scatter(0, order[kept], ranked[kept])
    edges = p.cumsum(0)
    drawn = torch.rand((), generator=draws, dtype=torch.float64) * edges[-1]
    return min(int(torch.searchsorted(edges, drawn, right=True)), int(p.nonzero()[-1]))


def told(logits: Tensor, token: int, top: int) -> Token:
    logprobs = logits.float().log_softmax(0)
    values, ids = logprobs.topk(top)
    return Token(token, float(logprobs[token]), tuple(zip(ids.tolist(), values.tolist(), strict=True)))


def settled(text: str, stops: Sequence[str]) -> str:
    """The start of a text that what is written next cannot change.

    >>> settled("one two EN", ["END"]), settled("caf\\ufffd", [])
    ('one two', 'caf')
    """
    most = max(map(len, stops), default=1) - 1
    begun = (size for size in range(min(most, len(text)), 0, -1) if any(s.startswith(text[-size:]) for s in stops))
    text = text[: len(text) - next(begun, 0)]
    return text.rstrip(UNFINISHED).rstrip()


@dataclass
class Cohort:
    """Rows that are stepped together: their call, the mask [B, T] of what `cache` holds."""

    rows: list[Writing]
    call: Call
    mask: Tensor
    cache: Any


class Decoder:
    """The rows being written. `join` reads prompts and writes a first token of each, `step` one more of all."""

    def __init__(self, model: MoECL, pad_id: int, batch_tokens: int, max_rows: int, kv: KVPrefixes) -> None:
        self.model, self.pad_id, self.kv = model, pad_id, kv
        self.batch_tokens, self.max_rows = batch_tokens, max_rows
        self.lasting = lasting(model.base.config)
        self.cohorts: list[Cohort] = []

    @property
    def rows(self) -> list[Writing]:
        return [row for cohort in self.cohorts for row in cohort.rows]

    def has_room(self, rows: Sequence[Writing]) -> bool:
        """Whether these could join; any row can where there is no other."""
        every = [*self.rows, *rows]
        fit = len(every) <= self.max_rows and len(every) * max(row.length for row in every) <= self.batch_tokens
        return fit or len(every) == 1

    @torch.inference_mode()
    def join(
        self, rows: Sequence[Writing], run: Callable[[Call], AbstractContextManager[None]] = run_with
    ) -> list[Writing]:
        """The rows, each with its first token. Raises StoreError where parts cannot be loaded.

        Where anything is raised none has joined: rows and decoder are as they were.
        """
        for row, parts in zip(rows, parts_of([row.request for row in rows]), strict=True):
            row.parts, row.kept_as = parts, self._kept_as(row.request, parts)
        known = [self.kv.find(row.kept_as, row.prompt) for row in rows]
        read = [self._read(some, run) for some in apart(rows, known)]
        before = self.cohorts
        try:
            for cohort, logits in read:
                take(cohort.rows, logits)
            self.cohorts = [*before, *(cohort for cohort, _ in read)]
            self._settle()
        except BaseException:
            self.cohorts = before
            for row in rows:
                row.begin()
            raise
        return list(rows)

    def _kept_as(self, request: Request, parts: Parts) -> Hashable:
        """All that a token's keys and values depend on beside the tokens up to it; None where on more."""
        digest = request.entry.digest
        if digest is None or parts.reads_query or not self.lasting:
            return None
        return digest, str(self.model.device), self.model.base.dtype

    def _read(
        self, rows: Sequence[tuple[Writing, Known]], run: Callable[[Call], AbstractContextManager[None]]
    ) -> tuple[Cohort, Tensor]:
        """Prompts in one forward; the logits [B, V] behind them.

        All are read from the same place before their ends, so that their left padding stays in one piece.
        """
        own, known = [row for row, _ in rows], [one for _, one in rows]
        parts = [row.parts for row in own if row.parts is not None]
        inputs, call = left_padded(self.model, [row.request for row in own], parts, self.pad_id)
        mask, cache = inputs["attention_mask"], None
        last = max(len(row.prompt) - one.tokens for row, one in rows)
        if (before := mask.shape[1] - last) > 0:
            tokens = [max(0, len(row.prompt) - last) for row in own]
            cache = padded_cache(known, tokens, before)
            inputs |= {name: inputs[name][:, before:] for name in ("input_ids", "position_ids")}
            call.attention_mask = mask[:, before:]
        call.answers = last_only(inputs["input_ids"])
        with run(call):
            output = self.model.base(**inputs, past_key_values=cache, use_cache=True)
        if cache is not None:
            self.kv.reused += sum(tokens)
        call.answers = call.gate_use = None
        return Cohort(own, call, mask, output.past_key_values), output.logits

    @torch.inference_mode()
    def step(self) -> list[Writing]:
        """One more token of every row; those rows. A row that has ended takes part no more."""
        stepped = self.rows
        for cohort in self.cohorts:
            mask = F.pad(cohort.mask, (0, 1), value=1)
            ids = torch.tensor([[row.ids[-1]] for row in cohort.rows], device=mask.device)
            with run_with(cohort.call):
                output = self.model.base(
                    input_ids=ids,
                    attention_mask=mask,
                    position_ids=mask.sum(dim=1, keepdim=True) - 1,
                    past_key_values=cohort.cache,
                    use_cache=True,
                )
            cohort.mask = mask
            take(cohort.rows, output.logits[:, -1])
        self._settle()
        return stepped

    def leave(self, gone: Writing) -> None:
        """A row whose text nobody waits for any more."""
        gone.reason = gone.reason or "stop"
        self._settle()

    def _settle(self) -> None:
        """Let those that have ended go, and step as many as can be together."""
        kept: list[Cohort] = []
        for cohort in self.cohorts:
            places = [place for place, row in enumerate(cohort.rows) if row.reason is None]
            if plain(cohort.cache):
                self._remember(cohort)
            if not places:
                continue
            if len(places) < len(cohort.rows):
                self._keep(cohort, places)
            if kept and alike(kept[-1], cohort):
                kept[-1] = self._together(kept[-1], cohort)
            else:
                kept.append(cohort)
        self.cohorts = kept

    def _remember(self, cohort: Cohort) -> None:
        """What was read of the rows that have ended."""
        for place, row in enumerate(cohort.rows):
            if row.reason is not None and row.kept_as is not None:
                tokens = int(cohort.mask[place].sum())
                text = [*row.prompt, *row.ids][:tokens]  # the last one written may not have been read
                self.kv.keep(row.kept_as, text, row_layers(cohort.cache, place, tokens))

    def _keep(self, cohort: Cohort, places: list[int]) -> None:
        chosen = torch.tensor(places, device=cohort.mask.device)
        cohort.rows = [cohort.rows[place] for place in places]
        cohort.cache.batch_select_indices(chosen)
        cohort.mask = cohort.mask[chosen]
        query = cohort.call.query
        cohort.call = self._call(cohort.rows, None if query is None else query[chosen])
        if plain(cohort.cache):  # columns in which nothing is left
            gap = int(cohort.mask.any(dim=0).int().argmax())
            cohort.mask = cohort.mask[:, gap:]
            for layer in cohort.cache.layers:
                layer.keys, layer.values = layer.keys[:, :, gap:], layer.values[:, :, gap:]

    def _call(self, rows: Sequence[Writing], query: Tensor | None) -> Call:
        call = self.model.call_with([row.parts for row in rows])
        call.query = query
        return call

    def _together(self, first: Cohort, second: Cohort) -> Cohort:
        """Both in one, padded on the left to the longer one's width; they stay whole, for a `join` that is undone."""
        width = max(first.mask.shape[1], second.mask.shape[1])
        cache = copy.copy(first.cache)
        cache.layers = [copy.copy(layer) for layer in first.cache.layers]
        for one, other in zip(cache.layers, second.cache.layers, strict=True):
            one.keys, one.values = (
                torch.cat([F.pad(found, (0, 0, width - found.shape[2], 0)) for found in pair])
                for pair in ((one.keys, other.keys), (one.values, other.values))
            )
        masks = [F.pad(cohort.mask, (width - cohort.mask.shape[1], 0)) for cohort in (first, second)]
        rows = [*first.rows, *second.rows]
        return Cohort(rows, self._call(rows, None), torch.cat(masks), cache)


def take(rows: Sequence[Writing], logits: Tensor) -> None:
    """logits [B, V]"""
    for row, own, best in zip(rows, logits.float(), logits.argmax(dim=-1).tolist(), strict=True):
        row.take(own, best)


def apart(rows: Sequence[Writing], known: Sequence[Known]) -> list[list[tuple[Writing, Known]]]:
    """Rows of which half or more is known, and the others: in one forward those would be read as far as these."""
    halves: tuple[list[tuple[Writing, Known]], list[tuple[Writing, Known]]] = ([], [])
    for row, one in zip(rows, known, strict=True):
        halves[2 * one.tokens < len(row.prompt)].append((row, one))
    return [half for half in halves if half]


def alike(first: Cohort, second: Cohort) -> bool:
    return plain(first.cache) and plain(second.cache) and first.call.query is None and second.call.query is None
