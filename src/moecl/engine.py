"""Prediction and generation: the one path from a text to an answer, rows of many tasks in one batch.

It runs parts under a form and never asks which method learned them.
"""

import copy
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from moecl.bank import Entry, find
from moecl.config import Task
from moecl.data.encode import Encoded, Encoder, collate, token_batches
from moecl.data.task import Example, example
from moecl.errors import BaseError, TaskError
from moecl.model import MoECL, TaskNames
from moecl.nn.call import Call, run_with
from moecl.prefix import Prefixes

__all__ = ["Engine", "Entry", "Prediction", "Request"]

BATCH_TOKENS = 4096  # padding included, where nothing else was resolved
MAX_ROWS = 128
MAX_LENGTH = 512
MAX_NEW_TOKENS = 64
# A base's own settings are for chatting; those that would bend a greedy answer are put back to what does nothing.
GREEDY: dict[str, Any] = {
    "do_sample": False,
    "num_beams": 1,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "max_new_tokens": None,
    "min_new_tokens": None,
    "min_length": 0,
}


@dataclass(frozen=True)
class Prediction:
    """An answer. `scores` are the labels' shares of the probability, summing to 1; empty for a generated answer.

    `task` is the name of the task that answered, with its version (`NAME@3`) where one, or an alias, was asked for.
    """

    task: str
    label: str
    scores: dict[str, float]


@dataclass(frozen=True)
class Request:
    """One encoded row on its way through the engine."""

    entry: Entry
    encoder: Encoder
    row: Encoded


class Prompts(dict[int, Tensor]):
    """A layer's tensor for the prompt: those of the tokens that are then written are left out."""

    def __setitem__(self, layer: int, found: Tensor) -> None:
        self.setdefault(layer, found)


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
    ) -> None:
        found = tokenizer or model.tokenizer
        if found is None:
            raise BaseError("base: no tokenizer; give Engine(model, tokenizer=...)")
        self.model, self.tokenizer = model, found
        self.bank = model.bank if bank is None else bank
        self.batch_tokens = batch_tokens or BATCH_TOKENS
        self.prefixes = prefixes  # for answers of one forward; a KV cache needs every layer
        self.longest: dict[tuple[str, str], int] = {}  # tokens of a split's longest answer, which evaluation asks for
        self.gates: GateUse | None = None  # if given, told of every batch
        self._encoders: dict[str, Encoder] = {}
        self._tries: dict[Encoder, Trie] = {}

    def over(self, bank: Mapping[str, Entry]) -> "Engine":
        """This engine over another bank; what it has encoded of tasks is shared."""
        other = copy.copy(self)
        other.bank = bank
        return other

    def watched(self, gates: GateUse) -> "Engine":
        """This engine telling `gates` of what it answers; the answers are the same."""
        other = copy.copy(self)
        other.gates = gates
        return other

    def encoder(self, task: Task) -> Encoder:
        key = task.model_dump_json()
        if key not in self._encoders:
            self._encoders[key] = Encoder(self.tokenizer, task, task.max_length or MAX_LENGTH)
        return self._encoders[key]

    def trie(self, encoder: Encoder) -> "Trie":
        if encoder not in self._tries:
            self._tries[encoder] = Trie(encoder)
        return self._tries[encoder]

    def prompts(self, task: Task, examples: Sequence[Example], max_new_tokens: int = MAX_NEW_TOKENS) -> list[Encoded]:
        """Rows without their answers; a text to be written keeps room, a quarter of `max_length` at most."""
        return self.encoder(task).encode(examples, answers=False, reserve=self.reserve(task, max_new_tokens))

    def reserve(self, task: Task, max_new_tokens: int) -> int:
        return min(max_new_tokens, self.encoder(task).max_length // 4)

    def predict(
        self,
        rows: Iterable[str | Mapping[str, Any] | Example],
        tasks: TaskNames,
        max_new_tokens: int = MAX_NEW_TOKENS,
    ) -> list[Prediction]:
        """Answers in the order of `rows` (texts, or mappings with the row's fields); one task, or one a row.

        Raises TaskError for an unknown task, DataError for a row that lacks a field.
        """
        rows = list(rows)
        names = [tasks] * len(rows) if tasks is None or isinstance(tasks, str) else list(tasks)
        if len(names) != len(rows):
            raise TaskError(f"task: {len(names)} names for {len(rows)} rows; give one name, or one a row")
        requests: dict[int, Request] = {}
        for name in dict.fromkeys(names):
            if name is None:
                raise TaskError("task: the bare base answers no task; give a task's name")
            entry = find(self.bank, name)
            places = [place for place, one in enumerate(names) if one == name]
            examples = [as_example(rows[place], entry.task, f"row {place + 1}") for place in places]
            encoded = self.prompts(entry.task, examples, max_new_tokens)
            encoder = self.encoder(entry.task)
            requests |= {place: Request(entry, encoder, row) for place, row in zip(places, encoded, strict=True)}
        return self.answer([requests[place] for place in range(len(rows))], max_new_tokens)

    def answer(self, requests: Sequence[Request], max_new_tokens: int = MAX_NEW_TOKENS) -> list[Prediction]:
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
        for (kind, *_), places in kinds.items():
            sizes = [self._size(kind, requests[place], max_new_tokens) for place in places]
            for batch in token_batches(sizes, self.batch_tokens, MAX_ROWS):
                chosen = [places[member] for member in batch]
                with torch.inference_mode():
                    found = readers[kind]([requests[place] for place in chosen])
                answers |= zip(chosen, found, strict=True)
        return [answers[place] for place in range(len(requests))]

    def reads_once(self, task: Task) -> bool:
        """Whether an answer takes one forward."""
        return task.kind == "classification" and (task.head == "classifier" or self.encoder(task).single_tokens)

    def _reading(self, request: Request) -> tuple[str | int, ...]:
        """How a row's answer is read; rows with a head of their own, or with as many paths, are batched together."""
        task = request.entry.task
        if task.kind == "generation":
            return ("text",)
        if task.head == "classifier":
            return ("head", request.entry.name)
        if request.encoder.single_tokens:
            return ("word",)
        return "words", len(self.trie(request.encoder).paths)

    def _size(self, kind: str, request: Request, max_new_tokens: int) -> int:
        """Tokens that a row comes to in its batch, with all that follows its prompt."""
        length = len(request.row.input_ids)
        if kind == "words":
            paths = self.trie(request.encoder).paths
            return len(paths) * (length + max(map(len, paths)))
        return length + (max_new_tokens if kind == "text" else 0)

    # One batch, by the way its answers are read

    def _read_words(self, batch: Sequence[Request]) -> list[Prediction]:
        """Every label is one token: one forward, and the share of each label's token among the labels'."""
        inputs, call = self._inputs(batch, one_forward=True)
        call.answers = last_only(inputs["input_ids"])
        with self._run(call):
            logits = self.model.base(**inputs, use_cache=False).logits.float()  # (B, V)
        return [
            choose(request, row[[tokens[0] for tokens in request.encoder.answers]])
            for request, row in zip(batch, logits, strict=True)
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
        call.answers = last_only(inputs["input_ids"])
        with self._run(call):
            output = self.model.base(**inputs, use_cache=True)
        first = output.logits.float().log_softmax(-1)  # (B, V)
        paths = [self.trie(request.encoder).paths for request in batch]
        pairs = [(row, path) for row, own in enumerate(paths) for path in own]
        followed = iter(self._follow(call, inputs["attention_mask"], output.past_key_values, pairs))
        return [
            choose(request, self.trie(request.encoder).scores(first[row], [next(followed) for _ in paths[row]]))
            for row, request in enumerate(batch)
        ]

    def _follow(
        self, call: Call, prompts: Tensor, cache: Any, pairs: Sequence[tuple[int, tuple[int, ...]]]
    ) -> list[Tensor]:
        """For each (row, path): log p after each token of the path [len(path), V], run on the row's cached prompt.

        prompts [B, T] is the attention mask of what `cache` holds.
        """
        found: list[Tensor] = []
        step = max(1, self.batch_tokens // (prompts.shape[1] + max(len(path) for _, path in pairs)))
        for start in range(0, len(pairs), step):
            some, last = pairs[start : start + step], start + step >= len(pairs)
            paths = [path for _, path in some]
            rows = torch.tensor([row for row, _ in some], device=prompts.device)
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
            found += [one[: len(path)].float().log_softmax(-1) for one, path in zip(logits, paths, strict=True)]
        return found

    def _write(self, batch: Sequence[Request], max_new_tokens: int) -> list[Prediction]:
        inputs, call = self._inputs(batch)
        del inputs["position_ids"]  # generate counts them itself
        end, width = batch[0].encoder.end, inputs["input_ids"].shape[1]
        settings = {**GREEDY, "eos_token_id": end, "pad_token_id": self.pad_id, "max_length": width + max_new_tokens}
        with self._run(call):
            tokens = self.model.base.generate(**inputs, **settings)  # type: ignore[operator]
        answers = [before(end, ids) for ids in tokens[:, width:].tolist()]
        texts = self.tokenizer.batch_decode(answers, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return [Prediction(one.entry.name, text.strip(), {}) for one, text in zip(batch, texts, strict=True)]

    @property
    def pad_id(self) -> int:
        pad = self.tokenizer.pad_token_id
        return int(self.tokenizer.eos_token_id or 0) if pad is None else int(pad)

    def _inputs(self, batch: Sequence[Request], one_forward: bool = False) -> tuple[dict[str, Tensor], Call]:
        """Left-padded ids, mask and positions, and the call that runs each row with its task's parts."""
        padded = collate([request.row for request in batch], self.pad_id, side="left", answers=False)
        ids, mask = padded["input_ids"].to(self.model.device), padded["attention_mask"].to(self.model.device)
        call = self.model.call([request.entry.name for request in batch], len(batch), self.bank)
        call.attention_mask = mask
        if one_forward and self.prefixes is not None:
            call.prefix = self.prefixes.batch([request.row.input_ids for request in batch], "left")
        positions = (mask.cumsum(dim=1) - 1).clamp_min(0)
        return {"input_ids": ids, "attention_mask": mask, "position_ids": positions}, call

    @contextmanager
    def _run(self, call: Call) -> Iterator[None]:
        if self.gates is not None:
            call.gate_use = Prompts()
        with run_with(call):
            yield
        if self.gates is not None:
            self.gates.add(call)


class Trie:
    """The labels of a task as token paths: each ends where only its last token is left to be scored."""

    def __init__(self, encoder: Encoder) -> None:
        self.labels = [(*tokens, encoder.end) for tokens in encoder.answers]
        ways = [label[:-1] for label in self.labels]
        self.paths = sorted(way for way in ways if not any(other != way and other[: len(way)] == way for other in ways))
        self.path_of = [next(k for k, path in enumerate(self.paths) if path[: len(way)] == way) for way in ways]

    def scores(self, first: Tensor, followed: Sequence[Tensor]) -> Tensor:
        """[labels]: first [V] is log p after the prompt, followed[k] [len, V] that after each token of path k."""
        totals = []
        for label, path in zip(self.labels, self.path_of, strict=True):
            rest = [followed[path][depth, token] for depth, token in enumerate(label[1:])]
            totals.append(first[label[0]] + torch.stack(rest).sum())
        return torch.stack(totals)


def choose(request: Request, scores: Tensor) -> Prediction:
    """The label with the greatest score (a log of an unnormalised probability), and every label's share."""
    task = request.entry.task
    shares = scores.float().softmax(dim=0).tolist()
    best = int(scores.argmax())
    labels = list(task.labels or ())
    return Prediction(request.entry.name, labels[best], dict(zip(labels, shares, strict=True)))


def last_only(input_ids: Tensor) -> Tensor:
    """[B, T] bool: the last position, where a left-padded prompt ends."""
    wanted = torch.zeros_like(input_ids, dtype=torch.bool)
    wanted[:, -1] = True
    return wanted


def before(end: int, ids: list[int]) -> list[int]:
    return ids[: ids.index(end)] if end in ids else ids


def padded_paths(paths: Sequence[tuple[int, ...]]) -> Tensor:
    """[paths, longest]: shorter ones repeat their last token, whose outputs are not read."""
    longest = max(map(len, paths))
    return torch.tensor([[*path, *[path[-1]] * (longest - len(path))] for path in paths])


def as_example(row: str | Mapping[str, Any] | Example, task: Task, where: str) -> Example:
    return row if isinstance(row, Example) else example(row, task, where)
