"""What a run leaves to be looked at, beside R: predictions row by row, and figures of the tasks as they are answered.

`predictions/<task>.<which>.jsonl`, which = `test` or `validation` (both after the last task) or `learned` (the test
rows as soon as the task was learned). A row a line, in order: {"row": from 1, "label": the true label or text,
"answer": the one given, "scores": {label: share of the probability}, empty where the answer was written}.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from moecl import metrics
from moecl._atomic import atomic_write, one_line
from moecl.course import Progress
from moecl.evaluate import Answers
from moecl.results import Items
from moecl.run_folder import RunFolder

Which = Literal["test", "validation", "learned"]
Row = dict[str, Any]

LATEST = ("per_class_recall", "macro_f1", "gate_use", "validation_final")  # of the last row of R that was measured
LEAST = 1e-37  # a share below it counts as this much: float32 has no smaller one with all its digits


class Evidence:
    """Keeps the answers of learned tasks in the run's folder, and what they come to in its progress."""

    def __init__(
        self,
        folder: RunFolder,
        progress: Progress,
        tasks: Sequence[str],
        note: Callable[[str], None],
        together: bool = False,
    ) -> None:
        self.folder, self.progress, self.note = folder, progress, note
        self.learned_at = {name: len(tasks) if together else place + 1 for place, name in enumerate(tasks)}

    def tested(self, row: int, name: str, answers: Answers | None) -> None:
        """A learned task's test rows in `row` of R; None where there are none, or none any more."""
        details = self.progress.details[name]
        for key in LATEST:
            details.pop(key, None)
        if answers is not None:
            details |= figures(answers)
        if row == self.learned_at[name]:
            self._write(name, "learned", answers)
        elif answers is not None and answers.task.kind == "classification":
            self._drift(row, name, answers)
        if row == len(self.learned_at):
            self._write(name, "test", answers)
            if answers is not None:
                self.progress.items[name] = items(answers).model_dump()

    def validated(self, name: str, answers: Answers | None) -> None:
        """A task's validation rows after the last task."""
        self._write(name, "validation", answers)
        if answers is not None:
            self.progress.details[name]["validation_final"] = answers.score().score

    def _drift(self, row: int, name: str, answers: Answers) -> None:
        path = predictions(self.folder.path, name, "learned")
        now = as_rows(answers)
        try:
            before = [json.loads(line) for line in path.read_bytes().splitlines()]
            moved = drift(before, now)
        except (OSError, ValueError, LookupError, TypeError) as error:
            reason = (error.strerror if isinstance(error, OSError) else None) or "not what was written there"
            self.note(f"task {name}: its drift is not measured ({path}: {reason})")
            return
        self.progress.details[name].setdefault("drift", []).append([row, moved])

    def _write(self, name: str, which: Which, answers: Answers | None) -> None:
        path = predictions(self.folder.path, name, which)
        with one_line(path):
            if answers is None:
                path.unlink(missing_ok=True)
                return
            path.parent.mkdir(exist_ok=True)
        lines = [json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in as_rows(answers)]
        atomic_write(path, "".join(lines).encode(), tmp=self.folder.path)  # where drafts are looked for


def predictions(run: Path, task: str, which: Which) -> Path:
    return run / "predictions" / f"{task}.{which}.jsonl"


def as_rows(answers: Answers) -> list[Row]:
    pairs = enumerate(zip(answers.true, answers.given, strict=True), start=1)
    return [{"row": n, "label": true, "answer": one.label, "scores": one.scores} for n, (true, one) in pairs]


def figures(answers: Answers) -> dict[str, Any]:
    """What a task's details tell of its test rows."""
    found: dict[str, Any] = {"per_class_recall": answers.score().per_class_recall}
    if answers.task.kind == "classification":
        found["macro_f1"] = metrics.macro_f1(answers.true, answers.labels)
    if answers.gate_use:
        found["gate_use"] = {str(layer): weight for layer, weight in answers.gate_use.items()}
    return found


def items(answers: Answers) -> Items:
    task, given = answers.task, answers.labels
    if task.labels:
        place = {label: n for n, label in enumerate(task.labels)}
        true = [place[label] for label in answers.true]
        return Items(metric=task.metric, labels=list(place), true=true, given=[place[label] for label in given])
    score = metrics.ANSWER_METRICS[task.metric]
    scores = [score([true], [one]) or 0.0 for true, one in zip(answers.true, given, strict=True)]
    return Items(metric=task.metric, scores=scores)


def drift(before: Sequence[Row], now: Sequence[Row]) -> float:
    """Mean over rows of the mean over labels of |log share now - log share before|, in nats.

    Raises ValueError or KeyError where the rows are not the same.

    >>> row = {"row": 1, "label": "a", "answer": "a"}
    >>> drift([row | {"scores": {"a": 0.5, "b": 0.5}}], [row | {"scores": {"a": 0.5, "b": 0.5}}])
    0.0
    """
    if [(one["row"], one["label"]) for one in before] != [(one["row"], one["label"]) for one in now]:
        raise ValueError("other rows")
    labels = list(now[0]["scores"])
    return float(np.abs(log_shares(now, labels) - log_shares(before, labels)).mean())


def log_shares(rows: Sequence[Row], labels: Sequence[str]) -> NDArray[np.float64]:
    """[rows, labels]."""
    return np.log(np.maximum([[float(row["scores"][label]) for label in labels] for row in rows], LEAST))


def without_row(details: dict[str, Any], row: int) -> dict[str, Any]:
    """A task's details as they are when `row` of R is taken out and later ones move up."""
    if "drift" not in details:
        return details
    kept = [[at - (at > row), moved] for at, moved in details["drift"] if at != row]
    return {**details, "drift": kept}
