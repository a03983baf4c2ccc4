"""Which answers need no human: thresholds drawn from validation rows, and decisions by them.

A row is *decided* as the class that the model gave it where that class's share of probability reaches the class's
threshold; every other row goes to *review*, to a human. The *stripping rate* is the share of rows that are decided.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from moecl._atomic import atomic_write
from moecl._yaml import dotted
from moecl.errors import ConfigError, DataError, near

SCHEMA: Final = 1
REVIEW: Final = "review"  # the decision that leaves a row to a human
LEVEL = 0.95  # of every interval that is reported

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0)]


class Strict(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, validate_by_name=True, validate_by_alias=True, serialize_by_alias=True
    )


@dataclass(frozen=True, slots=True)
class Scored:
    """A task's rows with their answers: `true` and `given` are places in `labels`, `share` the answer's, rounded.

    All arrays are [rows], `numbers` (which row of the split it is) in ascending order without repetition.
    """

    labels: tuple[str, ...]
    numbers: NDArray[np.int64]
    true: NDArray[np.int64]
    given: NDArray[np.int64]
    share: Floats
    sha256: str

    def right(self) -> Flags:
        return np.asarray(self.true == self.given)


# Bounds on a precision that was seen


def tail(right: int, rows: int, precision: float) -> float:
    """The chance of `right` or more right answers of `rows`, where each is right with probability `precision`.

    >>> round(tail(9, 10, 0.5) * 1024)  # all ten, or one of ten wrong
    11
    """
    if precision in (0.0, 1.0):
        return float(right == 0 or precision == 1)
    wrong = np.arange(1, rows - right + 1, dtype=np.float64)
    ways = np.concatenate([[0.0], np.cumsum(np.log((rows - wrong + 1) / wrong))])  # log C(rows, wrong)
    wrong = np.concatenate([[0.0], wrong])
    terms = np.exp(ways + wrong * math.log1p(-precision) + (rows - wrong) * math.log(precision))
    return min(1.0, float(terms.sum()))


def lower_bound(right: int, rows: int, confidence: float) -> float:
    """What the true precision is not below, with `confidence` (one-sided; Clopper and Pearson 1934); 0 without rows.

    >>> round(lower_bound(28, 28, 0.95), 4)  # 0.05 ** (1 / 28)
    0.8985
    """
    low, high = 0.0, 1.0
    if right == 0:
        return low
    while low < (middle := (low + high) / 2) < high:
        if tail(right, rows, middle) <= 1 - confidence:
            low = middle
        else:
            high = middle
    return low


def interval(right: int, rows: int) -> tuple[float, float] | None:
    """The two-sided 95 % interval of Clopper and Pearson, None without rows.

    >>> [round(end, 3) for end in interval(8, 10)]
    [0.444, 0.975]
    """
    if not rows:
        return None
    side = (1 + LEVEL) / 2
    return lower_bound(right, rows, side), 1 - lower_bound(rows - right, rows, side)


# Thresholds


class Target(Strict):
    """What is asked of a threshold."""

    precision: Share = Field(description="share of decided validation rows that must be right, per class")
    confidence: Share | None = Field(default=None, description="with which a lower bound must say so, or null")

    @classmethod
    def of(cls, precision: float, confidence: float | None) -> Target:
        """Raises ConfigError for what no threshold can reach or mean."""
        if not 0 < precision <= 1:
            raise ConfigError(f"--precision: {precision} is not above 0 and at most 1; give a share such as 0.9")
        if confidence is not None and not 0.5 <= confidence < 1:
            raise ConfigError(f"--confidence: {confidence} is not from 0.5 to below 1; give a share such as 0.95")
        if confidence is not None and precision == 1:
            raise ConfigError("--precision: no number of rows shows with --confidence that it is 1; give less, as 0.99")
        return cls(precision=precision, confidence=confidence)

    def reached(self, right: int, rows: int) -> bool:
        """The lower bound reaches the target just where so many right answers would be too unlikely below it."""
        if not rows or right / rows < self.precision:
            return False
        return self.confidence is None or tail(right, rows, self.precision) <= 1 - self.confidence


class ClassThreshold(Strict):
    """When an answer is taken for decided, and the validation rows that say so."""

    threshold: Share | None = Field(description="lowest share of a decided answer; null: never decided")
    answered: Count = Field(description="validation rows that were given this label")
    decided: Count = Field(description="of them, those whose share reaches the threshold")
    right: Count = Field(description="of those, the ones that have this label")


class TaskThresholds(Strict):
    """The thresholds of a task, one a label, and what they were made from."""

    labels: dict[str, ClassThreshold] = Field(description="each label's threshold")
    rows: Count = Field(description="validation rows")
    sha256: str = Field(description="of the validation rows with their answers")
    parts: dict[str, str] | None = Field(
        default=None, description="part -> sha256 of the learned task that answered; null: not known"
    )


def rounded(share: float) -> float:
    """A share as it is printed and compared: six significant digits, as finer ones depend on a row's batch.

    >>> rounded(0.123456789), rounded(0.99999987)
    (0.123457, 1.0)
    """
    return float(f"{share:.6g}")


def decide(thresholds: TaskThresholds, label: str, scores: Mapping[str, float]) -> str:
    """The label, where its share of probability reaches its threshold, else "review".

    `label` is the answer, `scores` the share of every label.
    """
    threshold = thresholds.labels[label].threshold
    return label if threshold is not None and rounded(scores[label]) >= threshold else REVIEW


def loosest(share: Floats, right: Flags, target: Target) -> float | None:
    """The lowest threshold on `share` [rows] at which enough of the rows that reach it are right, or None.

    It is the share of some row: rows that tie are decided together. Looser thresholds are asked first, and a
    precision may rise again below a threshold that misses the target, so all of them are.
    """
    order = np.argsort(-share, kind="stable")
    ranked, correct = share[order], np.cumsum(right[order])
    for last in np.flatnonzero(np.diff(ranked, append=-1.0))[::-1]:  # the last row of each tie
        if target.reached(int(correct[last]), int(last) + 1):
            return float(ranked[last])
    return None


def fit(rows: Scored, target: Target, parts: Mapping[str, str] | None = None) -> TaskThresholds:
    """The thresholds that validation rows call for, label by label."""
    right = rows.right()
    labels = {}
    for place, label in enumerate(rows.labels):
        answered = rows.given == place
        threshold = loosest(rows.share[answered], right[answered], target)
        decided = answered & (rows.share >= threshold) if threshold is not None else np.zeros_like(answered)
        labels[label] = ClassThreshold(
            threshold=threshold,
            answered=int(answered.sum()),
            decided=int(decided.sum()),
            right=int((decided & right).sum()),
        )
    return TaskThresholds(
        labels=labels, rows=len(right), sha256=rows.sha256, parts=None if parts is None else dict(parts)
    )


def decided(thresholds: TaskThresholds, rows: Scored) -> Flags:
    """Which rows need no human, [rows]."""
    levels = [thresholds.labels[label].threshold for label in rows.labels]
    return np.asarray(rows.share >= np.array([np.inf if level is None else level for level in levels])[rows.given])


class Thresholds(Strict):
    """A thresholds file: what `moecl review` writes, and what prediction and the server decide by."""

    schema_version: Literal[1] = Field(default=SCHEMA, alias="schema", description="version of this format")
    target: Target = Field(description="what was asked of the thresholds")
    tasks: dict[str, TaskThresholds] = Field(description="a task's thresholds, by its name")

    def save(self, path: str | Path) -> None:
        """Write the file as a whole or not at all. Raises RunError."""
        atomic_write(Path(path), self.model_dump_json(indent=1).encode() + b"\n")

    @classmethod
    def load(cls, path: str | Path) -> Thresholds:
        """Read what `save` wrote. Raises DataError: missing, altered, or of another schema version."""
        try:
            return cls.model_validate_json(Path(path).read_bytes())
        except OSError as error:
            raise DataError(f"{path}: {error.strerror}; give the thresholds.json that `moecl review` wrote") from error
        except ValidationError as error:
            raise DataError(f"{path}: {first_fault(error)}; make it again with `moecl review`") from None

    def of(self, task: str, labels: Iterable[str], parts: Mapping[str, str] | None, path: str | Path) -> TaskThresholds:
        """Those of a task with these labels, answered by these parts. Raises DataError where `path` has no such."""
        again = "make it again with `moecl review`"
        if (found := self.tasks.get(task)) is None:
            known = ", ".join(self.tasks) or "none"
            raise DataError(f"{path}: has no task {task!r}, only {known}{near(task, self.tasks)}; {again}")
        if set(found.labels) != set(labels):
            was, now = ", ".join(found.labels), ", ".join(labels) or "none"
            raise DataError(f"{path}: task {task!r}: is for the labels {was}, the run's are {now}; {again}")
        if found.parts is not None and parts is not None and found.parts != dict(parts):
            raise DataError(f"{path}: task {task!r}: was made before the task or its experts changed; {again}")
        return found


def first_fault(error: ValidationError) -> str:
    """The first thing that is wrong, in a few words."""
    first = error.errors(include_url=False)[0]
    value = first["input"]
    seen = "" if isinstance(value, dict | list | bytes) or first["type"] == "json_invalid" else f", found {value!r:.60}"
    place = dotted(first["loc"])
    return f"{place}: {first['msg']}{seen}" if place else first["msg"]
