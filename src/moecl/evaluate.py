"""One cell of R: a split as the engine answers it, and what the answers score."""

from collections.abc import Sequence
from dataclasses import dataclass

from moecl import metrics
from moecl.config import Task
from moecl.data.derived import Derived
from moecl.data.encode import Encoded
from moecl.data.task import Split
from moecl.data.tokens import encode_split
from moecl.engine import Engine, Entry, GateUse, Prediction, Request

SPARE_TOKENS = 8  # that an answer may be longer than the longest reference, before it is cut


@dataclass(frozen=True)
class Score:
    """A task's score by its metric, in [0, 1], and the recall of each class."""

    score: float
    metric: str
    rows: int
    per_class_recall: dict[str, float | None]


@dataclass(frozen=True)
class Answers:
    """A split's rows in order: the true label or text of each, and what was given.

    `gate_use`: layer -> the task expert's mean weight over the prompts' tokens; empty for a form without gates.
    """

    task: Task
    true: list[str]
    given: list[Prediction]
    gate_use: dict[int, float]

    @property
    def labels(self) -> list[str]:
        """What was given, without shares."""
        return [prediction.label for prediction in self.given]

    def score(self) -> Score:
        score = metrics.ANSWER_METRICS[self.task.metric](self.true, self.labels)
        assert score is not None, "a split has at least one row"
        recall = metrics.per_class_recall(self.true, self.labels, list(self.task.labels)) if self.task.labels else {}
        return Score(score, self.task.metric, len(self.true), recall)


def prompts(engine: Engine, task: Task, split: Split, kept: Derived | None = None) -> list[Encoded]:
    """A split's rows as `evaluate_task` takes them: without answers, with room for those that are written."""
    reserve = engine.reserve(task, longest_answer(engine, task, split))
    return encode_split(engine.encoder(task), split, kept, answers=False, reserve=reserve)


def answer_task(engine: Engine, entry: Entry, split: Split, rows: Sequence[Encoded]) -> Answers:
    """What `entry` answers on a split, whose encoded rows are `rows`."""
    encoder, gates = engine.encoder(entry.task), GateUse()
    requests = [Request(entry, encoder, row) for row in rows]
    given = engine.watched(gates).answer(requests, longest_answer(engine, entry.task, split))
    return Answers(entry.task, references(entry.task, split), given, gates.means())


def evaluate_task(engine: Engine, entry: Entry, split: Split, rows: Sequence[Encoded]) -> Score:
    """Score `entry` on a split, whose encoded rows are `rows`."""
    return answer_task(engine, entry, split, rows).score()


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
