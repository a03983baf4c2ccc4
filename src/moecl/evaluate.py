"""One cell of R: a task's score on a split, as the engine answers it."""

from collections.abc import Sequence
from dataclasses import dataclass

from moecl import metrics
from moecl.config import Task
from moecl.data.derived import Derived
from moecl.data.encode import Encoded
from moecl.data.task import Split
from moecl.data.tokens import encode_split
from moecl.engine import Engine, Entry, Request

SPARE_TOKENS = 8  # that an answer may be longer than the longest reference, before it is cut


@dataclass(frozen=True)
class Score:
    """A task's score by its metric, in [0, 1], and the recall of each class."""

    score: float
    metric: str
    rows: int
    per_class_recall: dict[str, float | None]


def prompts(engine: Engine, task: Task, split: Split, kept: Derived | None = None) -> list[Encoded]:
    """A split's rows as `evaluate_task` takes them: without answers, with room for those that are written."""
    reserve = engine.reserve(task, longest_answer(engine, task, split))
    return encode_split(engine.encoder(task), split, kept, answers=False, reserve=reserve)


def evaluate_task(engine: Engine, entry: Entry, split: Split, rows: Sequence[Encoded]) -> Score:
    """Score `entry` on a split, whose encoded rows are `rows`."""
    encoder = engine.encoder(entry.task)
    requests = [Request(entry, encoder, row) for row in rows]
    found = engine.answer(requests, longest_answer(engine, entry.task, split))
    given = [prediction.label for prediction in found]
    true = references(entry.task, split)
    score = metrics.ANSWER_METRICS[entry.task.metric](true, given)
    assert score is not None, "a split has at least one row"
    recall = metrics.per_class_recall(true, given, list(entry.task.labels)) if entry.task.labels else {}
    return Score(score, entry.task.metric, len(true), recall)


def references(task: Task, split: Split) -> list[str]:
    if task.kind == "classification":
        return [example.label or "" for example in split.examples]
    return [(example.completion or "").strip() for example in split.examples]


def longest_answer(engine: Engine, task: Task, split: Split) -> int:
    """Tokens a generated answer may have: those of the longest reference and a few."""
    if task.kind == "classification":
        return 1
    key = (task.name, split.sha256)
    if key not in engine.longest:
        lengths = engine.tokenizer(references(task, split), add_special_tokens=False, verbose=False)["input_ids"]
        engine.longest[key] = max(map(len, lengths)) + SPARE_TOKENS
    return engine.longest[key]
