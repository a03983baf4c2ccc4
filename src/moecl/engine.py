"""Prediction and generation: the one path from a text to an answer, rows of many tasks in one batch.

It runs parts under a form and never asks which method learned them.
"""

import copy
import math
import sys
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from moecl._sizes import KV_MEMORY, parse_size
from moecl.backbone import batch_tokens as default_batch_tokens
from moecl.bank import Entry, find
from moecl.config import Task
from moecl.data.encode import Encoded, Encoder, token_batches
from moecl.data.task import Example, listed
from moecl.errors import BaseError, DataError, TaskError
from moecl.generation import Completion, Decoder, Sampling, Writing
from moecl.kv_prefix import KVPrefixes
from moecl.labels import Trie, padded_paths
from moecl.model import MoECL, TaskNames
from moecl.nn.call import Call, run_with
from moecl.prefix import Prefixes
from moecl.request import Prediction, Request, Row, as_example, last_only, left_padded, names_of, parts_of, places
from moecl.scoring import Likelihood, answered, token_logprobs

__all__ = ["Engine", "Entry", "GateUse", "Prediction", "Request", "Trie"]

MAX_ROWS = 128
MAX_LENGTH = 512
ANSWER_ROOM = 32  # tokens kept free for an answer; what is longer is written beyond max_length


class GateUse:
    """The task expert's mean weight by layer, over the real tokens of all prompts answered; none without gates."""

    def __init__(self) -> None:
        self.sums: dict[int, float] = defaultdict(float)
        self.tokens = 0

    def add(self, call: Call) -> None:
        if not call.gate_use:
            return
        assert call.attention_mask is not None
        sums = torch.stack([(call.attention_mask * b.float()).sum() for b in call.gate_use.values()]).tolist()
        for layer, total in zip(call.gate_use, sums, strict=True):
            self.sums[layer] += total
        self.tokens += int(call.attention_mask.sum())

    def means(self) -> dict[int, float]:
        return {layer: total / self.tokens for layer, total in sorted(self.sums.items())}


class Engine:
    """Answers rows with the tasks of `bank` (a model's own by default)."""

    def __init__(
        self,
        model: MoECL,
        tokenizer: PreTrainedTokenizerBase | None = None,
        bank: Mapping[str, Entry] | None = None,
        batch_tokens: int | None = None,
        prefixes: Prefixes | None = None,
        kv_memory: int | str = KV_MEMORY,
    ) -> None:
        """`batch_tokens`: of a batch, padding included; by default what suits the device. `kv_memory`: bytes, or
        "256MiB", for keys and values of texts that were written; 0 keeps none.

        A prompt that begins like one of them under the same expert of a store is read from there on: the same text but
        for rounding, which then depends on what was asked before.
        """
        found = tokenizer or model.tokenizer
        if found is None:
            raise BaseError("base: no tokenizer; give Engine(model, tokenizer=...)")
        self.model, self.tokenizer = model, found
        self.bank = model.bank if bank is None else bank
        self.batch_tokens = batch_tokens or default_batch_tokens(model.device.type)
        self.prefixes = prefixes  # for answers of one forward; a KV cache needs every layer
        self.kv = KVPrefixes(parse_size(kv_memory, "kv_memory", zero=True))
        self.longest: dict[tuple[str, str], int] = {}  # tokens of a split's longest answer, which evaluation asks for
        self.gates: GateUse | None = None  # if given, told of every batch
        self._encoders: dict[str, Encoder] = {}
        self._tries: dict[Encoder, Trie] = {}

    def over(self, bank: Mapping[str, Entry]) -> "Engine":
        """This engine over another bank; what it has encoded of tasks and kept of texts is shared."""
        other = copy.copy(self)
        other.bank = bank
        return other

    def watched(self, gates: GateUse) -> "Engine":
        """This engine telling `gates` of what it answers; the answers are the same."""
        other = copy.copy(self)
        other.gates, other.kv = gates, KVPrefixes(0)  # gates are seen where a token is read
        return other

    @property
    def kv_tokens_reused(self) -> int:
        """Tokens of prompts that were not read again, so far."""
        return self.kv.reused

    def encoder(self, task: Task) -> Encoder:
        key = task.model_dump_json()
        if key not in self._encoders:
            self._encoders[key] = Encoder(self.tokenizer, task, task.max_length or MAX_LENGTH)
        return self._encoders[key]

    def trie(self, encoder: Encoder) -> "Trie":
        if encoder not in self._tries:
            self._tries[encoder] = Trie(encoder)
        return self._tries[encoder]

    def prompts(self, task: Task, examples: Sequence[Example], max_new_tokens: int | None = None) -> list[Encoded]:
        """Rows without answers, which a text keeps ANSWER_ROOM for; more only where the base ends at `max_length`."""
        limit = self.encoder(task).max_length
        most = limit if max_new_tokens is None else max_new_tokens
        room = min(most, max(ANSWER_ROOM, limit + most - self.positions))
        return self.encoder(task).encode(examples, answers=False, reserve=self.reserve(task, room))

    def reserve(self, task: Task, answer: int) -> int:
        """Tokens that are kept free for an answer of so many: a quarter of `max_length` at most."""
        return min(answer, self.encoder(task).max_length // 4)

    @property
    def positions(self) -> int:
        """Tokens that the base can have, the answer's too."""
        return getattr(self.model.base.config, "max_position_embeddings", None) or sys.maxsize

    def predict(self, rows: Iterable[Row], tasks: TaskNames, max_new_tokens: int | None = None) -> list[Prediction]:
        """Answers in the order of `rows` (texts, or mappings with the row's fields); one task, or one a row.

        A text that is written has at most `max_new_tokens`, by default its task's `max_length`. Raises TaskError for an
        unknown task, DataError for a row that lacks a field.
        """
        requests = self.requests(rows, tasks, max_new_tokens)
        return self.answer(requests, max_new_tokens)

    def requests(self, rows: Iterable[Row], tasks: TaskNames, max_new_tokens: int | None = None) -> list[Request]:
        """Rows encoded, as `answer` and `write` take them. Raises as `predict`."""
        rows = listed(rows)
        names = names_of(tasks, len(rows))
        found: dict[int, Request] = {}
        for name, own in places(names).items():
            entry = find(self.bank, name)
            examples = [as_example(rows[place], entry.task, f"row {place + 1}") for place in own]
            encoded = self.prompts(entry.task, examples, max_new_tokens)
            encoder = self.encoder(entry.task)
            found |= {place: Request(entry, encoder, row) for place, row in zip(own, encoded, strict=True)}
        return [found[place] for place in range(len(rows))]

    def answer(self, requests: Sequence[Request], max_new_tokens: int | None = None) -> list[Prediction]:
        """Predictions in the order of `requests`. Batches are formed by length, among rows that are read alike."""
        kinds: dict[Any, list[int]] = defaultdict(list)
        for place, request in enumerate(requests):
            kinds[self._reading(request)].append(place)
        answers: dict[int, Prediction] = {}
        readers: dict[str, Callable[[Sequence[Request]], list[Prediction]]] = {
            "word": self._read_words,
            "words": self._read_paths,
            "head": self._read_head,
            "text": lambda batch: self._write(batch, max_new_tokens),
        }
        for (kind, *_), own in kinds.items():
            sizes = [self._size(kind, requests[place], max_new_tokens) for place in own]
            for batch in token_batches(sizes, self.batch_tokens, MAX_ROWS):
                chosen = [own[member] for member in batch]
                with torch.inference_mode():
                    found = readers[kind]([requests[place] for place in chosen])
                answers |= zip(chosen, found, strict=True)
        return [answers[place] for place in range(len(requests))]

    # Texts that are written

    def generate(
        self, prompts: Iterable[Row], tasks: TaskNames, sampling: Sampling | Sequence[Sampling] | None = None
    ) -> list[Completion]:
        """Texts written behind `prompts`, in their order; one task, and one sampling, or one a row.

        Raises TaskError for a task that does not write, and as `predict`.
        """
        rows = listed(prompts, "prompts")
        found = dict(piece for piece in self.stream(rows, tasks, sampling) if isinstance(piece[1], Completion))
        return [found[place] for place in range(len(rows))]  # type: ignore[misc]

    def stream(
        self, prompts: Iterable[Row], tasks: TaskNames, sampling: Sampling | Sequence[Sampling] | None = None
    ) -> Iterator[tuple[int, str | Completion]]:
        """As `generate`, while it is written: (row, text that came to it), and at last (row, its Completion)."""
        rows = listed(prompts, "prompts")
        each = [sampling or Sampling()] * len(rows) if isinstance(sampling, Sampling | None) else list(sampling)
        if len(each) != len(rows):
            raise TaskError(f"sampling: {len(each)} for {len(rows)} rows; give one, or one a row")
        writings = []
        for place, (row, name, how) in enumerate(zip(rows, names_of(tasks, len(rows)), each, strict=True)):
            entry = find(self.bank, name)
            one = as_example(row, entry.task, f"row {place + 1}")
            [request] = self.requests([one], name, how.max_new_tokens)
            writings.append(self.writing(request, how))
        yield from self._written(writings, self.decoder())

    def write(self, requests: Sequence[Request], sampling: Sequence[Sampling]) -> list[Completion]:
        """Each read whole: what a score is made of does not depend on what was asked before."""
        writings = [self.writing(*pair) for pair in zip(requests, sampling, strict=True)]
        for _ in self._written(writings, self.decoder(KVPrefixes(0))):
            pass
        return [writing.completion() for writing in writings]

    def writing(self, request: Request, sampling: Sampling) -> Writing:
        """A row for a `decoder`. Raises TaskError where its task answers with a label."""
        task = request.entry.task
        if task.kind != "generation":
            raise TaskError(f"task {task.name!r} answers with a label and writes no text; use predict")
        return Writing(request, sampling, self.tokenizer, self.positions - len(request.row.input_ids))

    def decoder(self, kv: KVPrefixes | None = None) -> Decoder:
        return Decoder(self.model, self.pad_id, self.batch_tokens, MAX_ROWS, self.kv if kv is None else kv)

    def _written(self, writings: Sequence[Writing], decoder: Decoder) -> Iterator[tuple[int, str | Completion]]:
        """Rows in turn, the longest first; one that ends makes room for the next."""
        place_of = {id(writing): place for place, writing in enumerate(writings)}
        waiting = deque(sorted(writings, key=lambda one: -one.length))
        while waiting or decoder.cohorts:
            joining: list[Writing] = []
            while waiting and decoder.has_room([*joining, waiting[0]]):
                joining.append(waiting.popleft())
            moved = decoder.join(joining, self._run) if joining else decoder.step()
            for writing in moved:
                if news := writing.news():
                    yield place_of[id(writing)], news.text
                if writing.reason is not None:
                    yield place_of[id(writing)], writing.completion()

    # Answers that are given

    def score(
        self, rows: Iterable[Row], tasks: TaskNames, completions: Sequence[str] | None = None
    ) -> list[Likelihood]:
        """log p of an answer to each row: a label, or a text that could be written.

        Without `completions` that of the row's own `label` or `completion`. Raises DataError for a row without one, or
        with one that is no label; TaskError as `predict`.
        """
        rows = listed(rows)
        answers = [None] * len(rows) if completions is None else listed(completions, "completions")
        if len(answers) != len(rows):
            raise DataError(f"completions: {len(answers)} for {len(rows)} rows; give one a row")
        requests = []
        for place, (row, name, answer) in enumerate(zip(rows, names_of(tasks, len(rows)), answers, strict=True)):
            entry = find(self.bank, name)
            one = answered(row, entry.task, answer, f"row {place + 1}")
            requests.append((one, Request(entry, self.encoder(entry.task), self.encoder(entry.task).encode([one])[0])))
        return self._score(requests)

    def _score(self, rows: Sequence[tuple[Example, Request]]) -> list[Likelihood]:
        found: dict[int, Likelihood] = {}
        heads = [place for place, (_, request) in enumerate(rows) if request.entry.task.head == "classifier"]
        for place, given in zip(heads, self.answer([rows[place][1] for place in heads]), strict=True):
            label = rows[place][0].label or ""
            found[place] = Likelihood(given.task, label, math.log(max(given.scores[label], sys.float_info.min)))
        others = [place for place in range(len(rows)) if place not in found]
        sizes = [len(row.input_ids) + len(row.answer_ids) for row in (rows[place][1].row for place in others)]
        for batch in token_batches(sizes, self.batch_tokens, MAX_ROWS):
            chosen = [others[member] for member in batch]
            logprobs = token_logprobs(self.model, [rows[place][1] for place in chosen], self.pad_id)
            for place, own in zip(chosen, logprobs, strict=True):
                example, request = rows[place]
                answer = example.label or example.completion or ""
                found[place] = Likelihood(request.entry.name, answer, sum(own), own)
        return [found[place] for place in range(len(rows))]

    # Answers by label

    def reads_once(self, task: Task) -> bool:
        """Whether an answer takes one forward."""
        return task.kind == "classification" and (task.head == "classifier" or self.encoder(task).single_tokens)

    def _reading(self, request: Request) -> tuple[str | int, ...]:
        """How a row's answer is read; rows with a head of their own, or with as many paths, are batched together."""
        task = request.entry.task
        if task.kind == "generation":
            return ("text",)
        if task.head == "classifier":
            return "head", id(request.entry)
        if request.encoder.single_tokens:
            return ("word",)
        return "words", len(self.trie(request.encoder).paths)

    def _size(self, kind: str, request: Request, max_new_tokens: int | None) -> int:
        """Tokens that a row comes to in its batch, with all that follows its prompt."""
        length = len(request.row.input_ids)
        if kind == "words":
            paths = self.trie(request.encoder).paths
            return len(paths) * (length + max(map(len, paths)))
        return length + (written(request, max_new_tokens) if kind == "text" else 0)

    # One batch, by the way its answers are read

    def _read_words(self, batch: Sequence[Request]) -> list[Prediction]:
        """Every label is one token: one forward, and the share of each label's token among the labels'."""
        inputs, call = self._inputs(batch, one_forward=True)
        call.answers = last_only(inputs["input_ids"])
        labels = [[tokens[0] for tokens in request.encoder.answers] for request in batch]
        tokens = sorted(set().union(*labels))
        call.tokens = torch.tensor(tokens, device=self.model.device)
        with self._run(call):
            logits = self.model.base(**inputs, use_cache=False).logits  # (B, tokens)
        column = {token: place for place, token in enumerate(tokens)}
        return [
            choose(request, row[[column[token] for token in own]])
            for request, own, row in zip(batch, labels, logits, strict=True)
        ]

    def _read_head(self, batch: Sequence[Request]) -> list[Prediction]:
        inputs, call = self._inputs(batch, one_forward=True)
        parts = call.parts[0]
        assert parts is not None
        assert parts.head is not None
        with self._run(call):
            hidden = self.model.base.base_model(**inputs, use_cache=False).last_hidden_state[:, -1]
        return [choose(request, row) for request, row in zip(batch, parts.head(hidden.float()), strict=True)]

    def _read_paths(self, batch: Sequence[Request]) -> list[Prediction]:
        """Labels of several tokens: the prompt once, then each path of the labels' trie over its cache.

        A label's score is the sum of log p over its tokens and the end of the answer.
        """
        inputs, call = self._inputs(batch)
        call.answers, call.tokens = last_only(inputs["input_ids"]), slice(None)
        with self._run(call):
            output = self.model.base(**inputs, use_cache=True)
        first = output.logits.log_softmax(-1)  # (B, V)
        tries = [self.trie(request.encoder) for request in batch]
        pairs = [(row, *pair) for row, trie in enumerate(tries) for pair in zip(trie.paths, trie.reads, strict=True)]
        followed = iter(self._follow(call, inputs["attention_mask"], output.past_key_values, pairs))
        return [
            choose(request, trie.scores(first[row], [next(followed) for _ in trie.paths]))
            for row, (request, trie) in enumerate(zip(batch, tries, strict=True))
        ]

    def _follow(
        self,
        call: Call,
        prompts: Tensor,
        cache: Any,
        pairs: Sequence[tuple[int, tuple[int, ...], Iterable[tuple[int, int]]]],
    ) -> list[Tensor]:
        """For each (row, path, reads): log p of each (depth, token) of `reads`, run on the row's cached prompt.

        prompts [B, T] is the attention mask of what `cache` holds.
        """
        found: list[Tensor] = []
        step = max(1, self.batch_tokens // (prompts.shape[1] + max(len(path) for _, path, _ in pairs)))
        for start in range(0, len(pairs), step):
            some, last = pairs[start : start + step], start + step >= len(pairs)
            paths = [path for _, path, _ in some]
            rows = torch.tensor([row for row, _, _ in some], device=prompts.device)
            prompt, ids = prompts[rows], padded_paths(paths).to(prompts.device)
            positions = prompt.sum(dim=1, keepdim=True) + torch.arange(ids.shape[1], device=prompts.device)
            own = cache if last else copy.deepcopy(cache)
            own.batch_select_indices(rows)
            with run_with(call.of(rows)):
                logits = self.model.base(
                    input_ids=ids,
                    attention_mask=torch.cat([prompt, torch.ones_like(ids)], dim=1),
                    position_ids=positions,
                    past_key_values=own,
                    use_cache=True,
                ).logits
            for one, (_, path, reads) in zip(logits, some, strict=True):
                depths, tokens = torch.tensor([*reads], device=one.device).T
                found.append(one[: len(path)].log_softmax(-1)[depths, tokens])
        return found

    def _write(self, batch: Sequence[Request], max_new_tokens: int | None) -> list[Prediction]:
        found = self.write(batch, [Sampling(written(request, max_new_tokens)) for request in batch])
        return [Prediction(one.task, one.text, {}) for one in found]

    @property
    def pad_id(self) -> int:
        pad = self.tokenizer.pad_token_id
        return int(self.tokenizer.eos_token_id or 0) if pad is None else int(pad)

    def _inputs(self, batch: Sequence[Request], one_forward: bool = False) -> tuple[dict[str, Tensor], Call]:
        inputs, call = left_padded(self.model, batch, parts_of(batch), self.pad_id)
        if one_forward and self.prefixes is not None:
            call.prefix = self.prefixes.batch([request.row.input_ids for request in batch], "left")
        return inputs, call

    @contextmanager
    def _run(self, call: Call) -> Iterator[None]:
        if self.gates is not None:
            call.gate_use = {}
        with run_with(call):
            yield
        if self.gates is not None:
            self.gates.add(call)


def written(request: Request, max_new_tokens: int | None) -> int:
    """Tokens that a text may have: a longer answer than `max_length` was never learned."""
    return request.encoder.max_length if max_new_tokens is None else max_new_tokens


def choose(request: Request, scores: Tensor) -> Prediction:
    """The label with the greatest score (a log of an unnormalised probability), and every label's share."""
    task = request.entry.task
    shares = scores.float().softmax(dim=0).tolist()
    best = int(scores.argmax())
    labels = list(task.labels or ())
    return Prediction(request.entry.name, labels[best], dict(zip(labels, shares, strict=True)))
