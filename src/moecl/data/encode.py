"""Examples -> token ids -> batches.

The answer follows the prompt after one space: spaces at the end of the instruction are dropped, and after a line break
or a tab the answer follows at once. In `messages` rows the chat template alone decides. Tokens of an answer are those
that it has behind its prompt, never those that it has on its own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import takewhile
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from moecl.config import Task
from moecl.data.task import Example, template
from moecl.errors import BaseError, ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MIN_TEXT = 16
"""Tokens that a cut must leave of the text."""

IGNORED = -100
"""The label of a token that has no loss."""

WINDOW = 50
JITTER = 0.05


@dataclass(frozen=True, slots=True)
class Encoded:
    """One row: `input_ids` of the prompt; `answer_ids` with the end token, empty where there is no answer.

    `label` is the index of the class, -1 where there is none. `lost` counts the tokens that a cut took.
    """

    input_ids: list[int]
    answer_ids: list[int]
    label: int
    cut: bool
    lost: int = 0


@dataclass(slots=True)
class _Draft:
    """A row on its way: `texts` may be cut, the first before the second, each from its end."""

    example: Example
    texts: list[str]
    ends: list[list[int]] = field(default_factory=list)  # of each text: the characters at which its tokens end
    uncut: int = 0  # tokens of the whole input before any cut

    def drop(self, tokens: int) -> int:
        """Cut so many tokens off the texts; how many could not be cut."""
        for index, ends in enumerate(self.ends):
            least = MIN_TEXT if index == len(self.ends) - 1 else 0
            gone = min(tokens, max(len(ends) - least, 0))
            tokens -= gone
            del ends[len(ends) - gone :]
            self.texts[index] = self.texts[index][: ends[-1] if ends else 0]
        return tokens


class Encoder:
    """Turns the examples of one task into token ids, with one tokenizer and one limit on the whole input.

    `answers` are the tokens of each label's words, in the order of `task.labels` and without `end`, the end token.
    Raises `BaseError` where the tokenizer cannot serve, `ConfigError` and `DataError` where the task cannot.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, task: Task, max_length: int) -> None:
        if not tokenizer.is_fast:
            raise BaseError(f"{tokenizer.name_or_path}: its tokenizer has no tokenizer.json; use a base that has one")
        if tokenizer.eos_token_id is None:
            raise BaseError(
                f"{tokenizer.name_or_path}: its tokenizer has no eos_token; set one in its tokenizer config"
            )
        self.tokenizer, self.task, self.max_length = tokenizer, task, max_length
        self.end = int(tokenizer.eos_token_id)
        self._template = template(task.instruction)
        self._prefix = self._leading_specials()
        self._label_ids = {label: index for index, label in enumerate(task.labels or {})}
        self.answers = self._label_answers()
        self._check_room()

    def encode(self, examples: Sequence[Example], answers: bool = True, reserve: int = 0) -> list[Encoded]:
        """Encode rows in order. Without `answers` the prompts alone, the same as with them for a classification.

        `reserve` tokens stay free for the answer of a generation row whose answer is not encoded. A row longer than
        the limit loses whole tokens from the end of its text, a dialogue from its oldest turns on (never from the
        system's or the answer). Raises `DataError` where fewer than 16 tokens of the text would be left.
        """
        done: dict[int, Encoded] = {}
        pending = {index: _Draft(example, _texts(example)) for index, example in enumerate(examples)}
        while pending:
            excess: dict[int, int] = {}
            tokenised = self._tokenise(list(pending.values()), answers)
            for (index, draft), (prompt, answer) in zip(pending.items(), tokenised, strict=True):
                length = len(prompt) + self._answer_room(len(answer), reserve)
                draft.uncut = draft.uncut or length
                if length > self.max_length:
                    excess[index] = length - self.max_length
                else:
                    lost = draft.uncut - length
                    label = self._label_ids.get(draft.example.label or "", -1)
                    done[index] = Encoded(prompt, answer, label, bool(draft.ends), lost)
            pending = {index: pending[index] for index in excess}
            self._shorten(list(pending.values()), list(excess.values()))
        return [done[index] for index in range(len(examples))]

    def digest(self, content: str = "") -> str:
        """sha256 of all that `encode` depends on; `content` stands for the rows (a split's sha256)."""
        task = self.task.model_dump(include={"kind", "instruction", "labels", "head"})
        state = [self._tokenizer_state, list(task.items()), self.end, self._prefix, self.max_length, content]
        return hashlib.sha256(json.dumps(state).encode()).hexdigest()

    @property
    def single_tokens(self) -> bool:
        """Whether every label is one token."""
        return all(len(tokens) == 1 for tokens in self.answers)

    @cached_property
    def _tokenizer_state(self) -> str:
        state = self.tokenizer.backend_tokenizer.to_str()
        state = state[state.index('"added_tokens"') :]  # truncation and padding come first: the last caller's
        return hashlib.sha256(json.dumps([state, self.tokenizer.chat_template]).encode()).hexdigest()

    def _leading_specials(self) -> list[int]:
        """What the tokenizer puts in front of a text (BOS); what it puts behind (EOS) has no place before an answer."""
        probe: Mapping[str, list[int]] = self.tokenizer("a", return_special_tokens_mask=True)
        return probe["input_ids"][: len(list(takewhile(bool, probe["special_tokens_mask"])))]

    def _label_answers(self) -> list[list[int]]:
        if self.task.kind != "classification":
            return []
        if not self.task.labels:
            raise ConfigError(f"task {self.task.name!r}: labels: not known yet; give them, or load its training rows")
        prompt = self._prompt_text(self._template.fill(dict.fromkeys(self._template.names, "x")))
        words = [_joined(prompt, word.strip()) for word in self.task.labels.values()]
        answers = self._answer_tokens([prompt] * len(words), self._tokens([prompt]) * len(words), words)
        label_of: dict[tuple[int, ...], str] = {}
        for label, ids in zip(self.task.labels, answers, strict=True):
            twin = label_of.setdefault(tuple(ids), label)
            if not ids or twin != label:
                problem = f"has the same tokens as {twin!r}" if ids else "has no tokens"
                raise DataError(f"task {self.task.name!r}: labels: {label!r} {problem} here; give it other words")
        return answers

    def _check_room(self) -> None:
        bare = self._prefix + self._tokens([self._template.fill(dict.fromkeys(self._template.names, ""))])[0]
        taken = len(bare) + self._answer_room(0, 1)
        if self.max_length - taken < MIN_TEXT:
            raise DataError(
                f"task {self.task.name!r}: max_length: {self.max_length} leaves fewer than {MIN_TEXT} tokens "
                f"for the text; instruction and answer take {taken}: set it to {taken + MIN_TEXT} or more"
            )

    def _answer_room(self, length: int, reserve: int) -> int:
        """Tokens to keep for the answer. A class must not show in how much of the text is left: the longest counts."""
        if self.task.kind == "generation":
            return length or reserve
        return 0 if self.task.head == "classifier" else 1 + max(map(len, self.answers))

    def _tokens(self, texts: list[str]) -> list[list[int]]:
        ids: list[list[int]] = self._call(texts)["input_ids"] if texts else []
        return ids

    def _call(self, texts: list[str], offsets: bool = False) -> Mapping[str, Any]:
        found: Mapping[str, Any] = self.tokenizer(
            texts,
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            return_offsets_mapping=offsets,
            verbose=False,  # a text longer than the model takes will be cut
        )
        return found

    def _tokenise(self, drafts: list[_Draft], answers: bool) -> list[tuple[list[int], list[int]]]:
        """Prompt and answer tokens of each row as it is cut by now."""
        prompts = [self._prompt(draft) for draft in drafts]
        bare = self._tokens(prompts)
        if not answers:
            found: list[list[int]] = [[] for _ in drafts]
        elif self.task.kind == "classification":
            found = [self._label_answer(draft.example.label) for draft in drafts]
        else:
            found = self._completions(drafts, prompts, bare)
        return [
            (ids if draft.example.messages or ids[: len(self._prefix)] == self._prefix else self._prefix + ids, answer)
            for draft, ids, answer in zip(drafts, bare, found, strict=True)
        ]

    def _label_answer(self, label: str | None) -> list[int]:
        if label is None or self.task.head == "classifier":
            return []
        return [*self.answers[self._label_ids[label]], self.end]

    def _completions(self, drafts: list[_Draft], prompts: list[str], bare: list[list[int]]) -> list[list[int]]:
        known = [index for index, draft in enumerate(drafts) if draft.example.completion is not None]
        texts = [
            completion if drafts[index].example.messages else _joined(prompts[index], completion)
            for index in known
            if (completion := drafts[index].example.completion) is not None
        ]
        answers = self._answer_tokens([prompts[index] for index in known], [bare[index] for index in known], texts)
        by_row = {index: [*answer, self.end] for index, answer in zip(known, answers, strict=True)}
        return [by_row.get(index, []) for index in range(len(drafts))]

    def _answer_tokens(self, prompts: list[str], bare: list[list[int]], answers: list[str]) -> list[list[int]]:
        whole = self._tokens([prompt + answer for prompt, answer in zip(prompts, answers, strict=True)])
        return [
            ids[len(before) :] if ids[: len(before)] == before else self._tokens_apart(answer)
            for before, ids, answer in zip(bare, whole, answers, strict=True)
        ]

    def _tokens_apart(self, answer: str) -> list[int]:
        """For a tokenizer that joins the end of the prompt and the answer in one token: behind another text."""
        for context in ("a", "\n", "."):
            before, whole = self._tokens([context, context + answer])
            if before and whole[: len(before)] == before:
                return whole[len(before) :]
        return self._tokens([answer])[0]

    def _prompt(self, draft: _Draft) -> str:
        if draft.example.messages is not None:
            return self._chat(draft, draft.example.messages)
        return self._prompt_text(self._template.fill(draft.example.fields | {self._template.cut: draft.texts[0]}))

    def _prompt_text(self, filled: str) -> str:
        """Without the spaces at its end: tokenizers keep a space with the word behind it, here the answer's first."""
        if self.task.kind == "classification" and not self._template.literals[-1].strip(" "):
            return filled.rstrip()  # ends in the text itself: what that ends in must not change the answer's tokens
        return filled.rstrip(" ")

    def _chat(self, draft: _Draft, messages: tuple[dict[str, str], ...]) -> str:
        kept = iter(draft.texts)
        turns = [turn if turn["role"] == "system" else turn | {"content": next(kept)} for turn in messages]
        try:
            return str(self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
        except Exception as error:  # the template is a program that came with the base
            where = draft.example.where
            raise DataError(f"{where}: messages: not what the base's chat template takes: {error}") from error

    def _shorten(self, drafts: list[_Draft], excess: list[int]) -> None:
        fresh = [draft for draft in drafts if not draft.ends]
        texts = [text for draft in fresh for text in draft.texts]
        offsets = iter(self._call(texts, offsets=True)["offset_mapping"] if texts else [])
        for draft in fresh:
            draft.ends = [[end for _, end in next(offsets)] for _ in draft.texts]
        for draft, tokens in zip(drafts, excess, strict=True):
            if draft.drop(tokens):
                raise DataError(
                    f"{draft.example.where}: {draft.uncut} tokens are cut to max_length {self.max_length}, which would "
                    f"leave fewer than {MIN_TEXT} of the text; raise max_length, or shorten what is not the text"
                )


def _texts(example: Example) -> list[str]:
    if example.messages is not None:
        return [turn["content"] for turn in example.messages if turn["role"] != "system"]
    return [example.text or ""]


def _joined(prompt: str, answer: str) -> str:
    """The answer with the space before it that it needs behind this prompt."""
    return answer if prompt[-1:].isspace() or answer[:1].isspace() else f" {answer}"


def collate(
    batch: Sequence[Encoded], pad_id: int, side: Literal["right", "left"] = "right", answers: bool = True
) -> dict[str, torch.Tensor]:
    """`input_ids`, `attention_mask`, with `answers` also `labels` (all (B, T) to the longest row), and `label` (B,).

    `labels` is -100 but at answer tokens; without `answers` the inputs are the prompts alone.
    """
    rows = [row.input_ids + row.answer_ids if answers else row.input_ids for row in batch]
    longest = max(map(len, rows))

    def padded(values: Iterable[list[int]], fill: int) -> torch.Tensor:
        gaps = ((row, [fill] * (longest - len(row))) for row in values)
        return torch.tensor([row + gap if side == "right" else gap + row for row, gap in gaps], dtype=torch.long)

    tensors = {"input_ids": padded(rows, pad_id), "attention_mask": padded(([1] * len(row) for row in rows), 0)}
    if answers:
        tensors["labels"] = padded(([IGNORED] * len(row.input_ids) + row.answer_ids for row in batch), IGNORED)
    return tensors | {"label": torch.tensor([row.label for row in batch], dtype=torch.long)}


def plan_batches(lengths: Sequence[int], batch_size: int, epochs: int, seed: int) -> list[list[int]]:
    """The batches of all epochs, one after another: rows of like length together, each row once an epoch.

    Rows are shuffled, sorted within windows of 50 batches, and the batches shuffled; one batch an epoch may be short.
    Lengths are blurred by 5 % for sorting, so that rows meet others in the next epoch. A function of its arguments:
    an epoch's batches do not depend on how many epochs there are.
    """
    sizes = np.asarray(lengths, dtype=np.float64)
    plan: list[list[int]] = []
    for epoch in range(epochs):
        generator = np.random.default_rng([seed, epoch])
        order = generator.permutation(len(sizes))
        blurred = sizes * generator.uniform(1 - JITTER, 1 + JITTER, len(sizes))
        batches: list[list[int]] = []
        for start in range(0, len(order), WINDOW * batch_size):
            window = order[start : start + WINDOW * batch_size]
            window = window[np.argsort(blurred[window], kind="stable")]
            batches += [window[at : at + batch_size].tolist() for at in range(0, len(window), batch_size)]
        plan += [batches[index] for index in generator.permutation(len(batches))]
    return plan


def token_batches(lengths: Sequence[int], max_tokens: int, max_rows: int | None = None) -> list[list[int]]:
    """Batches of at most `max_tokens`, padding included, longest rows first, so that what is too large fails at once.

    A row that is longer than `max_tokens` is a batch of its own.
    """
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    batches: list[list[int]] = []
    start = 0
    while start < len(order):
        rows = max(1, max_tokens // max(1, lengths[order[start]]))
        batches.append(order[start : start + min(rows, max_rows or rows)])
        start += len(batches[-1])
    return batches
