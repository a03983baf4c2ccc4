"""Prediction and generation: the one path from a text to an answer, rows of many tasks in one batch.

It runs parts under a form and never asks which method learned them.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from moecl.config import Task
from moecl.data.encode import Encoded, Encoder, collate, token_batches
from moecl.data.task import Example, rows_from_lines
from moecl.errors import BaseError, TaskError
from moecl.model import Entry, MoECL, TaskNames, find
from moecl.nn.moe_ffn import Call, run_with

BATCH_TOKENS = 4096  # padding included, where nothing else was resolved
MAX_ROWS = 128
MAX_LENGTH = 512
MAX_NEW_TOKENS = 64


@dataclass(frozen=True)
class Prediction:
    """An answer. `scores` are the labels' shares of the probability, summing to 1; empty for a generated answer."""

    task: str
    label: str
    scores: dict[str, float]


@dataclass(frozen=True)
class Request:
    """One encoded row on its way through the engine."""

    entry: Entry
    encoder: Encoder
    row: Encoded


class Engine:
    """Answers rows with the tasks of `bank` (a model's own by default)."""

    def __init__(
        self,
        model: MoECL,
        tokenizer: PreTrainedTokenizerBase | None = None,
        bank: Mapping[str, Entry] | None = None,
        batch_tokens: int | None = None,
    ) -> None:
        found = tokenizer or model.tokenizer
        if found is None:
            raise BaseError("base: no tokenizer; give Engine(model, tokenizer=...)")
        self.model, self.tokenizer = model, found
        self.bank = model.bank if bank is None else bank
        self.batch_tokens = batch_tokens or BATCH_TOKENS
        self._encoders: dict[tuple[str, int], Encoder] = {}

    def encoder(self, task: Task) -> Encoder:
        key = task.model_dump_json(), id(self.tokenizer)
        if key not in self._encoders:
            self._encoders[key] = Encoder(self.tokenizer, task, task.max_length or MAX_LENGTH)
        return self._encoders[key]

    def predict(self, rows: Iterable[str | Mapping[str, Any] | Example], tasks: TaskNames) -> list[Prediction]:
        """Answers in the order of `rows` (texts, or mappings with the row's fields); one task, or one a row.

        Raises TaskError for an unknown task, DataError for a row that lacks a field.
        """
        rows = list(rows)
        names = [tasks] * len(rows) if tasks is None or isinstance(tasks, str) else list(tasks)
        if len(names) != len(rows):
            raise TaskError(f"task: {len(names)} names for {len(rows)} rows; give one name, or one a row")
        requests: list[Request | None] = [None] * len(rows)
        for name in dict.fromkeys(names):
            if name is None:
                raise TaskError("task: the bare base answers no task; give a task's name")
            entry = find(self.bank, name)
            places = [place for place, one in enumerate(names) if one == name]
            examples = as_examples([rows[place] for place in places], entry.task)
            encoder = self.encoder(entry.task)
            for place, row in zip(places, encoder.encode(examples, answers=False), strict=True):
                requests[place] = Request(entry, encoder, row)
        return self.answer([request for request in requests if request is not None])

    def answer(self, requests: Sequence[Request], max_new_tokens: int = MAX_NEW_TOKENS) -> list[Prediction]:
        """Predictions in the order of `requests`. Batches are formed by length, among rows that are read alike."""
        kinds: dict[Any, list[int]] = defaultdict(list)
        for place, request in enumerate(requests):
            kinds[reading(request)].append(place)
        answers: list[Prediction | None] = [None] * len(requests)
        readers: dict[str, Callable[[Sequence[Request]], list[Prediction]]] = {
            "word": self._read_words,
            "words": self._read_paths,
            "head": self._read_head,
            "text": lambda batch: self._write(batch, max_new_tokens),
        }
        for (kind, *_), places in kinds.items():
            lengths = [len(requests[place].row.input_ids) for place in places]
            for batch in token_batches(lengths, self.batch_tokens, MAX_ROWS):
                chosen = [places[member] for member in batch]
                with torch.inference_mode():
                    found = readers[kind]([requests[place] for place in chosen])
                for place, prediction in zip(chosen, found, strict=True):
                    answers[place] = prediction
        return [answer for answer in answers if answer is not None]

    # One batch, by the way its answers are read

    def _read_words(self, batch: Sequence[Request]) -> list[Prediction]:
        """Every label is one token: one forward, and the share of each label's token among the labels'."""
        inputs, call = self._inputs(batch)
        call.answers = last_only(inputs["input_ids"])
        with run_with(call):
            logits = self.model.base(**inputs, use_cache=False).logits.float()  # (B, V)
        return [
            choose(request, row[[tokens[0] for tokens in request.encoder.answers]])
            for request, row in zip(batch, logits, strict=True)
        ]

    def _read_head(self, batch: Sequence[Request]) -> list[Prediction]:
        inputs, call = self._inputs(batch)
        parts = call.parts[0]
        assert parts is not None and parts.head is not None
        with run_with(call):
            hidden = self.model.base.base_model(**inputs, use_cache=False).last_hidden_state[:, -1]
        return [choose(request, row) for request, row in zip(batch, parts.head(hidden.float()), strict=True)]

    def _read_paths(self, batch: Sequence[Request]) -> list[Prediction]:
        """Labels of several tokens: the prompt once, then each path of the labels' trie over its cache.

        A label's score is the sum of log p over its tokens and the end of the answer.
        """
        inputs, call = self._inputs(batch)
        call.answers = last_only(inputs["input_ids"])
        with run_with(call):
            output = self.model.base(**inputs, use_cache=True)
        first = output.logits.float().log_softmax(-1)  # (B, V)
        tries = [Trie(request.encoder) for request in batch]
        owners = [row for row, trie in enumerate(tries) for _ in trie.paths]
        paths = [path for trie in tries for path in trie.paths]
        followed = self._follow(call, inputs, output.past_key_values, owners, paths)
        scores, start = [], 0
        for row, (request, trie) in enumerate(zip(batch, tries, strict=True)):
            own = followed[start : start + len(trie.paths)]
            start += len(trie.paths)
            scores.append(choose(request, trie.scores(first[row], own)))
        return scores

    def _follow(
        self, call: Call, inputs: Mapping[str, Tensor], cache: Any, owners: list[int], paths: list[tuple[int, ...]]
    ) -> list[Tensor]:
        """log p after each token of each path [len(path), V], a path running on its owner's cached prompt."""
        rows = torch.tensor(owners, device=self.model.device)
        longest = max(map(len, paths))
        ids = torch.tensor([[*path, *[path[-1]] * (longest - len(path))] for path in paths], device=rows.device)
        prompt = inputs["attention_mask"][rows]
        mask = torch.cat([prompt, torch.ones_like(ids)], dim=1)
        positions = prompt.sum(dim=1, keepdim=True) + torch.arange(longest, device=rows.device)
        cache.batch_select_indices(rows)
        of_rows = None if call.rows is None else call.rows[rows]
        with run_with(Call(call.parts, of_rows)):
            logits = self.model.base(
                input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
            ).logits
        return [one[: len(path)].float().log_softmax(-1) for one, path in zip(logits, paths, strict=True)]

    def _write(self, batch: Sequence[Request], max_new_tokens: int) -> list[Prediction]:
        texts = self._generate(batch, {"max_new_tokens": max_new_tokens, "do_sample": False})
        return [
            Prediction(request.entry.task.name, text, {}) for request, text in zip(batch, texts, strict=True)
        ]

    def _generate(self, batch: Sequence[Request], settings: Mapping[str, Any]) -> list[str]:
        inputs, call = self._inputs(batch)
        del inputs["position_ids"]  # generate counts them itself
        width = inputs["input_ids"].shape[1]
        with run_with(call):
            tokens = self.model.base.generate(**inputs, pad_token_id=self.pad_id, **settings)
        decoded = self.tokenizer.batch_decode(tokens[:, width:], skip_special_tokens=True)
        return [text.strip() for text in decoded]

    @property
    def pad_id(self) -> int:
        pad = self.tokenizer.pad_token_id
        return int(self.tokenizer.eos_token_id or 0) if pad is None else int(pad)

    def _inputs(self, batch: Sequence[Request]) -> tuple[dict[str, Tensor], Call]:
        """Left-padded ids, mask and positions, and the call that runs each row with its task's parts."""
        padded = collate([request.row for request in batch], self.pad_id, side="left", answers=False)
        ids, mask = padded["input_ids"].to(self.model.device), padded["attention_mask"].to(self.model.device)
        call = self.model.call([request.entry.task.name for request in batch], len(batch), self.bank)
        positions = (mask.cumsum(dim=1) - 1).clamp_min(0)
        return {"input_ids": ids, "attention_mask": mask, "position_ids": positions}, call


class Trie:
    """The labels of a task as token paths: each ends where only its last token is left to be scored."""

    def __init__(self, encoder: Encoder) -> None:
        self.labels = [(*tokens, encoder.end) for tokens in encoder.answers]
        inner = {label[:-1] for label in self.labels}
        self.paths = sorted(
            path for path in inner if not any(other != path and other[: len(path)] == path for other in inner)
        )

    def scores(self, first: Tensor, followed: Sequence[Tensor]) -> Tensor:
        """[labels]: first [V] is log p after the prompt, followed[k] [len, V] that after each token of path k."""
        totals = []
        for label in self.labels:
            path = next(k for k, path in enumerate(self.paths) if path[: len(label) - 1] == label[:-1])
            rest = [followed[path][depth, token] for depth, token in enumerate(label[1:])]
            totals.append(first[label[0]] + torch.stack(rest).sum())
        return torch.stack(totals)


def reading(request: Request) -> tuple[str, ...]:
    """How a row's answer is read; rows with a head of their own are batched by task."""
    task = request.entry.task
    if task.kind == "generation":
        return ("text",)
    if request.entry.parts.head is not None:
        return ("head", task.name)
    return ("word",) if all(len(tokens) == 1 for tokens in request.encoder.answers) else ("words",)


def choose(request: Request, scores: Tensor) -> Prediction:
    """The label with the greatest score (a log of an unnormalised probability), and every label's share."""
    task = request.entry.task
    shares = scores.float().softmax(dim=0).tolist()
    best = int(scores.argmax())
    labels = list(task.labels or ())
    return Prediction(task.name, labels[best], dict(zip(labels, shares, strict=True)))


def last_only(input_ids: Tensor) -> Tensor:
    """[B, T] bool: the last position, where a left-padded prompt ends."""
    wanted = torch.zeros_like(input_ids, dtype=torch.bool)
    wanted[:, -1] = True
    return wanted


def as_examples(rows: Sequence[str | Mapping[str, Any] | Example], task: Task) -> list[Example]:
    ready = [row for row in rows if isinstance(row, Example)]
    if len(ready) == len(rows):
        return ready
    return list(rows_from_lines(lines(rows), task, "row"))


def lines(rows: Iterable[Any]) -> Iterator[str]:
    for row in rows:
        yield json.dumps(row if isinstance(row, Mapping) else {"text": row})
