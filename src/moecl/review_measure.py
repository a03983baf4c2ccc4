"""What thresholds come to on test rows: stripping rate, precision, what slips through, calibration, A against B."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from moecl.errors import DataError, TaskError
from moecl.review import (
    LEVEL,
    Count,
    Flags,
    Floats,
    Scored,
    Share,
    Strict,
    Target,
    TaskThresholds,
    Thresholds,
    decided,
    fit,
    interval,
)

SCHEMA: Final = 1
BINS = 10  # of the reliability curve
DRAWS = 10_000  # of the bootstrap


@dataclass(frozen=True, slots=True)
class Pair:
    """A task's two splits; where they are known the parts that answered them, and the sha256 of the test split."""

    validation: Scored
    test: Scored
    parts: Mapping[str, str] | None = None
    tested: str | None = None


class Decided(Strict):
    """Rows, of which some were decided without a human, and of those some rightly."""

    rows: Count
    decided: Count
    right: Count
    stripping_rate: Share | None = Field(description="decided / rows")
    precision: Share | None = Field(description="right / decided")
    interval: tuple[float, float] | None = Field(description="95 % interval of the precision")


class ClassReview(Decided):
    """The rows decided as one class, and those of the class that were decided as another: they slip through."""

    true: Count = Field(description="rows that have this label")
    slipped: Count = Field(description="of them, those decided as another label")
    slip_rate: Share | None = Field(description="slipped / true")


class Bin(Strict):
    """Rows whose answer has a share of probability in (low, high]."""

    low: float
    high: float
    rows: Count
    share: float | None = Field(description="mean share of the answers")
    accuracy: Share | None = Field(description="how many of the answers are right")


class GroupReview(Decided):
    """One task, or the rows of all."""

    classes: dict[str, ClassReview]


class TaskReview(GroupReview):
    thresholds: dict[str, Share | None]
    mean_share: float = Field(description="of all answers, decided or not")
    accuracy: Share = Field(description="how many of them are right")
    calibration_error: float = Field(description="expected calibration error (Guo et al. 2017), in ten bins")
    reliability: list[Bin]


def ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def counted(rows: int, decided: int, right: int) -> Decided:
    return Decided(
        rows=rows,
        decided=decided,
        right=right,
        stripping_rate=ratio(decided, rows),
        precision=ratio(right, decided),
        interval=interval(right, decided),
    )


def class_review(decided: Decided, true: int, slipped: int) -> ClassReview:
    return ClassReview(**dict(decided), true=true, slipped=slipped, slip_rate=ratio(slipped, true))


def measure(thresholds: TaskThresholds, rows: Scored) -> TaskReview:
    """What the thresholds come to on a task's test rows."""
    done, right = decided(thresholds, rows), rows.right()
    classes = {}
    for label in thresholds.labels:
        place = rows.labels.index(label)
        given, true = done & (rows.given == place), rows.true == place
        found = counted(len(done), int(given.sum()), int((given & right).sum()))
        classes[label] = class_review(found, int(true.sum()), int((true & done & ~right).sum()))
    error, bins = calibration(rows.share, right)
    return TaskReview(
        **dict(counted(len(done), int(done.sum()), int((done & right).sum()))),
        classes=classes,
        thresholds={label: found.threshold for label, found in thresholds.labels.items()},
        mean_share=float(rows.share.mean()),
        accuracy=float(right.mean()),
        calibration_error=error,
        reliability=bins,
    )


def calibration(share: Floats, right: Flags) -> tuple[float, list[Bin]]:
    """Expected calibration error and reliability curve: `share` [rows] in ten bins of equal width.

    The error is the mean over rows of |share - accuracy| of the row's bin (Guo et al. 2017, arXiv 1706.04599).
    """
    edges = np.arange(BINS + 1) / BINS
    place = np.clip(np.searchsorted(edges, share, side="left") - 1, 0, BINS - 1)
    error, bins = 0.0, []
    for number in range(BINS):
        inside = place == number
        count = int(inside.sum())
        mean = float(share[inside].mean()) if count else None
        accuracy = float(right[inside].mean()) if count else None
        if mean is not None and accuracy is not None:
            error += count / len(share) * abs(mean - accuracy)
        bins.append(Bin(low=edges[number], high=edges[number + 1], rows=count, share=mean, accuracy=accuracy))
    return error, bins


def total(reviews: Sequence[TaskReview]) -> GroupReview:
    """All rows of all tasks as one; classes are those that every task has."""
    shared = [label for label in reviews[0].classes if all(label in one.classes for one in reviews)]
    rows = sum(one.rows for one in reviews)
    classes = {}
    for label in shared:
        found = [one.classes[label] for one in reviews]
        summed = counted(rows, sum(one.decided for one in found), sum(one.right for one in found))
        classes[label] = class_review(summed, sum(one.true for one in found), sum(one.slipped for one in found))
    overall = counted(rows, sum(one.decided for one in reviews), sum(one.right for one in reviews))
    return GroupReview(**dict(overall), classes=classes)


# Against a second run


class Change(Strict):
    """What run A decides more than run B, on the same test rows."""

    a: GroupReview
    b: GroupReview
    difference: float = Field(description="stripping rate of A less that of B")
    interval: tuple[float, float] = Field(description="95 % of it: paired bootstrap over test rows, per task")
    saved_per_1000: float = Field(description="human reviews that A saves over B in 1000 texts")


class Against(Strict):
    """Run A against run B: the tasks that both have, and their rows as one."""

    tasks: dict[str, Change]
    total: Change
    skipped: dict[str, str] = Field(default_factory=dict, description="task of A -> why B does not answer for it")


TaskReviews = Mapping[str, TaskReview]


def compare(a: Mapping[str, Flags], b: Mapping[str, Flags], of_a: TaskReviews, of_b: TaskReviews) -> Against:
    """What A's rows that need no human ([rows] a task) are against B's, on the same rows of the same tasks."""
    generator = np.random.default_rng(0)
    draws, tasks = {}, {}
    for name in a:
        draws[name] = resampled(a[name].astype(int) - b[name].astype(int), generator)
        tasks[name] = change(of_a[name], of_b[name], draws[name])
    all_a, all_b = (total([of[name] for name in a]) for of in (of_a, of_b))
    drawn = np.sum([draws[name] for name in a], axis=0)
    return Against(tasks=tasks, total=change(all_a, all_b, drawn))


def resampled(difference: NDArray[np.int_], generator: np.random.Generator) -> NDArray[np.int64]:
    """Sums of the paired differences (-1, 0 or 1) of rows drawn with repetition, [draws].

    Drawing rows is drawing how many have each of the three values: a multinomial, and the same bootstrap.
    """
    parts = np.array([(difference == value).mean() for value in (-1, 0, 1)])
    return np.asarray(generator.multinomial(len(difference), parts, size=DRAWS) @ np.array([-1, 0, 1]))


def change(a: GroupReview, b: GroupReview, drawn: NDArray[np.int64]) -> Change:
    low, high = np.quantile(drawn / a.rows, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    difference = (a.decided - b.decided) / a.rows
    sides = {
        name: GroupReview(**dict(counted(one.rows, one.decided, one.right)), classes=one.classes)
        for name, one in (("a", a), ("b", b))
    }
    return Change(**sides, difference=difference, interval=(low, high), saved_per_1000=1000 * difference)


class Review(Strict):
    """review.json: everything that `moecl review` measured."""

    schema_version: Literal[1] = Field(default=SCHEMA, alias="schema", description="version of this format")
    target: Target
    tasks: dict[str, TaskReview]
    total: GroupReview
    skipped: dict[str, str] = Field(default_factory=dict, description="task -> why it is not in here")
    seen: list[str] = Field(default_factory=list, description="tasks tested on the rows that set their thresholds")
    against: Against | None = Field(default=None, description="this run as A, the second as B")


def review(
    pairs: Mapping[str, Pair],
    target: Target,
    skipped: Mapping[str, str] | None = None,
    against: Mapping[str, Pair] | None = None,
    left_out: Mapping[str, str] = MappingProxyType({}),
) -> tuple[Thresholds, Review]:
    """Thresholds from the validation rows of every task, and what they come to on its test rows.

    `against` is a second run, reviewed with the same target; `left_out` its tasks that are not, and why.

    Raises DataError where its test rows are others.
    """
    fitted = {name: fit(pair.validation, target, pair.parts) for name, pair in pairs.items()}
    measured = {name: measure(fitted[name], pair.test) for name, pair in pairs.items()}
    found = Review(
        target=target,
        tasks=measured,
        total=total([*measured.values()]),
        skipped=dict(skipped or {}),
        seen=[name for name, pair in pairs.items() if pair.validation.sha256 == pair.test.sha256],
        against=None if against is None else paired(pairs, fitted, measured, against, target, left_out),
    )
    return Thresholds(target=target, tasks=fitted), found


def paired(
    pairs: Mapping[str, Pair],
    fitted: Mapping[str, TaskThresholds],
    measured: TaskReviews,
    against: Mapping[str, Pair],
    target: Target,
    left_out: Mapping[str, str],
) -> Against:
    names = [name for name in pairs if name in against]
    if not names:
        raise TaskError(f"--against: has none of the tasks {', '.join(pairs)}; give a run of the same stream")
    for name in names:
        one, other = pairs[name].test, against[name].test
        digests = {pair.tested for pair in (pairs[name], against[name])} - {None}
        if named_rows(one) != named_rows(other) or len(digests) > 1:
            raise DataError(
                f"--against: task {name!r}: its test rows or their labels are others; give a run on the same"
            )
    second = {name: fit(against[name].validation, target) for name in names}
    found = compare(
        {name: decided(fitted[name], pairs[name].test) for name in names},
        {name: decided(second[name], against[name].test) for name in names},
        measured,
        {name: measure(second[name], against[name].test) for name in names},
    )
    missing = {name: left_out.get(name, "B has not learned it") for name in pairs if name not in against}
    return found.model_copy(update={"skipped": missing})


def named_rows(rows: Scored) -> list[tuple[int, str]]:
    """Each row's number and true label."""
    return [(number, rows.labels[place]) for number, place in zip(rows.numbers.tolist(), rows.true, strict=True)]
