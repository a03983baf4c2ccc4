"""R -> numbers, and answers -> numbers. Pure NumPy.

R has T + 1 rows and T columns: R[i, j] is the score on the j-th task after learning i tasks, so that row 0 is before
any. nan (or None) stands for a cell that was not measured. A number that needs such a cell is None, never 0; a task
that was never tested, a column without scores, is in no number.
"""

from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moecl.errors import UserError

Floats = NDArray[np.float64]
Label = TypeVar("Label", bound=Hashable)


def _scores(R: ArrayLike) -> Floats:
    """R as an array of floats, its shape checked: (T + 1, T)."""
    try:
        scores = np.asarray(R, dtype=np.float64)
    except (TypeError, ValueError):
        raise UserError("R: is not a table of numbers; give T + 1 rows of T scores") from None
    if scores.ndim != 2 or len(scores) != scores.shape[1] + 1:
        raise UserError(f"R: has the shape {scores.shape}; give T + 1 rows (the first before any task) of T scores")
    return scores


def _mean(values: Floats) -> float | None:
    """The mean, or None where there is nothing to average or a value is missing."""
    return None if values.size == 0 or np.isnan(values).any() else float(values.mean())


def _tested(scores: Floats) -> NDArray[np.bool_]:
    """Of each task, whether it was tested at all: [T]."""
    return np.logical_not(np.isnan(scores).all(axis=0))


def average_accuracy(R: ArrayLike) -> float | None:
    """Mean score over all tasks after the last: mean_j R[T, j].

    >>> average_accuracy([[0.5, 0.5], [0.75, 0.5], [0.5, 1.0]])
    0.75
    """
    scores = _scores(R)
    return _mean(scores[-1, _tested(scores)])


def bwt(R: ArrayLike) -> float | None:
    """Backward transfer, below 0 if tasks were forgotten: mean_{j<T} (R[T, j] - R[j, j]); None for one task.

    >>> bwt([[0.5, 0.5], [0.75, 0.5], [0.5, 1.0]])
    -0.25
    """
    scores = _scores(R)
    return _mean((scores[-1, :-1] - np.diag(scores[1:])[:-1])[_tested(scores)[:-1]])


def fwt(R: ArrayLike, again: Collection[int] = ()) -> float | None:
    """Forward transfer, what earlier tasks brought an unseen one: mean_{j>1} (R[j-1, j] - R[0, j]); None for one task.

    `again` are places of tasks, from 0, that are not unseen when they are learned, as they were learned before.

    >>> fwt([[0.5, 0.25], [0.75, 0.5], [0.5, 1.0]])
    0.25
    """
    scores = _scores(R)
    counts = _tested(scores)
    counts[list(again)] = False
    return _mean((np.diag(scores[:-1]) - scores[0])[1:][counts[1:]])


def forgetting(R: ArrayLike) -> float | None:
    """Drop from a task's best score: mean_{j<T} (max_{j<=i<T} R[i, j] - R[T, j]); None for one task.

    >>> forgetting([[0.5, 0.5, 0.5], [0.5, 0.5, 0.5], [0.75, 1.0, 0.5], [0.5, 0.5, 1.0]])
    0.375
    """
    scores = _scores(R)
    tasks = scores.shape[1]
    best = np.array([scores[j + 1 : tasks, j].max() for j in range(tasks - 1)], dtype=np.float64)
    return _mean((best - scores[-1, : tasks - 1])[_tested(scores)[:-1]]) if tasks > 1 else None


def learning_accuracy(R: ArrayLike) -> float | None:
    """Mean score on each task right after learning it: mean_j R[j, j].

    >>> learning_accuracy([[0.5, 0.5], [0.75, 0.5], [0.5, 1.0]])
    0.875
    """
    scores = _scores(R)
    return _mean(np.diag(scores[1:])[_tested(scores)])


def summary(R: ArrayLike, again: Collection[int] = ()) -> dict[str, float | None]:
    """All five numbers, in the order of a result; `again` as for `fwt`.

    >>> summary([[0.5], [0.75]])
    {'average_accuracy': 0.75, 'bwt': None, 'fwt': None, 'forgetting': None, 'learning_accuracy': 0.75}
    """
    return {
        "average_accuracy": average_accuracy(R),
        "bwt": bwt(R),
        "fwt": fwt(R, again),
        "forgetting": forgetting(R),
        "learning_accuracy": learning_accuracy(R),
    }


def _check_pairs(true: Sequence[Any], pred: Sequence[Any]) -> None:
    if len(true) != len(pred):
        raise UserError(f"answers: {len(pred)} predictions for {len(true)} rows; give one each")


def accuracy(true: Sequence[Hashable], pred: Sequence[Hashable]) -> float | None:
    """Share of rows answered right; None without rows.

    >>> accuracy(["a", "b", "b", "a"], ["a", "b", "a", "a"])
    0.75
    """
    _check_pairs(true, pred)
    return float(np.mean([wanted == given for wanted, given in zip(true, pred, strict=True)])) if len(true) else None


def macro_f1(true: Sequence[Hashable], pred: Sequence[Hashable]) -> float | None:
    """Unweighted mean of the F1 of every label that is true or predicted somewhere; None without rows.

    >>> macro_f1(["a", "a", "a", "b"], ["a", "a", "b", "b"])  # a: 4/5, b: 2/3
    0.7333333333333334
    """
    _check_pairs(true, pred)
    labels = list(dict.fromkeys([*true, *pred]))
    table = confusion(true, pred, labels)
    # F1 = 2 TP / (rows with the label + rows given the label); the denominator is never 0 for these labels.
    return _mean(2 * np.diag(table) / (table.sum(axis=0) + table.sum(axis=1)))


def per_class_recall(
    true: Sequence[Label], pred: Sequence[Label], labels: Sequence[Label]
) -> dict[Label, float | None]:
    """Share of each label's rows answered right; None for a label without rows.

    >>> per_class_recall(["a", "a", "b"], ["a", "b", "b"], ["a", "b", "c"])
    {'a': 0.5, 'b': 1.0, 'c': None}
    """
    table = confusion(true, pred, labels)
    rows = table.sum(axis=1)
    return {label: float(table[i, i] / rows[i]) if rows[i] else None for i, label in enumerate(labels)}


def confusion(true: Sequence[Label], pred: Sequence[Label], labels: Sequence[Label]) -> NDArray[np.int64]:
    """Counts, [labels, labels]: rows are the true labels, columns the predicted.

    >>> confusion(["a", "a", "b"], ["a", "b", "b"], ["a", "b"]).tolist()
    [[1, 1], [0, 1]]
    """
    _check_pairs(true, pred)
    index = {label: i for i, label in enumerate(labels)}
    if unknown := [label for label in [*true, *pred] if label not in index]:
        raise UserError(f"answers: {unknown[0]!r} is not one of the labels {list(labels)}; give only those")
    table = np.zeros((len(labels), len(labels)), dtype=np.int64)
    np.add.at(table, ([index[label] for label in true], [index[label] for label in pred]), 1)
    return table


def exact_match(true: Sequence[str], pred: Sequence[str]) -> float | None:
    r"""Share of texts that are the same but for white space around them; None without rows.

    >>> exact_match(["yes", "no"], [" yes\n", "No"])
    0.5
    """
    return accuracy([text.strip() for text in true], [text.strip() for text in pred])


def rouge_l(true: Sequence[str], pred: Sequence[str]) -> float | None:
    """Mean F1 of the longest common subsequence of words (Lin 2004, with equal weight for precision and recall).

    Words are what stands between white space, in lower case; there is no stemming. Two empty texts count 1. None
    without rows.

    >>> rouge_l(["the cat sat on the mat"], ["The cat on a mat"])  # "the cat on mat": 2 * 4 / (6 + 5)
    0.7272727272727273
    """
    _check_pairs(true, pred)
    return _mean(np.array([_lcs_f1(a.lower().split(), b.lower().split()) for a, b in zip(true, pred, strict=True)]))


def _lcs_f1(a: list[str], b: list[str]) -> float:
    return 2 * _lcs_length(a, b) / (len(a) + len(b)) if a or b else 1.0


def _lcs_length(a: list[str], b: Iterable[str]) -> int:
    """Length of the longest common subsequence.

    One addition of whole numbers per word of `b` does a column of the usual table (Hyyrö 2004): bit i of `column` is
    0 where the length grows at a[i].
    """
    places: dict[str, int] = {}
    for i, word in enumerate(a):
        places[word] = places.get(word, 0) | 1 << i
    everywhere = (1 << len(a)) - 1
    column = everywhere
    for word in b:
        matches = column & places.get(word, 0)
        column = ((column + matches) | (column - matches)) & everywhere
    return len(a) - column.bit_count()


ANSWER_METRICS: dict[str, Callable[[Sequence[str], Sequence[str]], float | None]] = {
    "accuracy": accuracy,
    "macro_f1": macro_f1,
    "exact_match": exact_match,
    "rouge_l": rouge_l,
}
