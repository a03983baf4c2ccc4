"""How sure a score is: bootstrap over test rows (Efron 1979), paired where two methods answered the same rows.

A draw takes as many rows of a task's test split as there are, with repetition, and scores them again. Which rows a draw
takes depends on the seed, the task's name and the number of its rows alone, so they are the same in all cells of all
methods: what is hard about a row is hard for both sides and leaves their difference. What a draw does not vary is the
training: that is for the spread over seeds to say.
"""

import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moecl.errors import UserError
from moecl.results import Items

Floats = NDArray[np.float64]
Index = NDArray[np.int64]
Cell = Mapping[str, Items]  # task -> its rows, of one run

_BLOCK = 2_000_000  # counts of rows held at once, 16 MB


class Difference(NamedTuple):
    """How far one side is ahead of the other on the same rows."""

    mean: float  # score of the first less score of the second
    low: float
    high: float
    p: float  # two-sided, of no difference; never 0


def score(items: Items, index: Index | None = None) -> float | None:
    """The task's metric, over all rows or over those at `index`; None without rows.

    >>> items = Items(metric="accuracy", labels=["a", "b"], true=[0, 1, 1, 0], given=[0, 1, 0, 0])
    >>> score(items), score(items, np.array([0, 2, 2, 2]))
    (0.75, 0.25)
    """
    columns = _columns(items)
    rows = columns if index is None else columns[index]
    return float(_score(items, rows.sum(axis=0), len(rows))) if len(rows) else None


def bootstrap(cells: Sequence[Cell], draws: int = 2000, seed: int = 0) -> Floats:
    """Draws of the mean over cells (orders x seeds) of the mean over tasks, [draws].

    Raises:
        UserError: there is no cell, or the cells are not about the same test rows.

    >>> half = Items(metric="accuracy", labels=["a", "b"], true=[0] * 100, given=[0, 1] * 50)
    >>> error = bootstrap([{"t": half}]).std()
    >>> bool(abs(error - (0.5 * 0.5 / 100) ** 0.5) < 0.002)  # as theory has it
    True
    """
    tasks = _same_tasks(cells)
    found = [bootstrap_task([cell[task] for cell in cells], task, draws, seed) for task in tasks]
    return np.asarray(np.mean(found, axis=0))


def bootstrap_task(sides: Sequence[Items], task: str = "", draws: int = 2000, seed: int = 0) -> Floats:
    """Draws of one task's score, the mean over `sides`, [draws]; errors as of `bootstrap`."""
    check_same_rows(sides, task)
    rows = _rows(sides[0])
    columns = [_columns(side) for side in sides]
    found = [
        np.mean([_score(side, counts @ one, rows) for side, one in zip(sides, columns, strict=True)], axis=0)
        for counts in _counts(rows, task, draws, seed)
    ]
    return np.concatenate(found)


def interval(draws: Floats, level: float = 0.95) -> tuple[float, float]:
    """The percentile interval that holds `level` of the draws.

    >>> interval(np.arange(101.0), level=0.5)
    (25.0, 75.0)
    """
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def paired(a: Sequence[Cell], b: Sequence[Cell], draws: int = 2000, seed: int = 0, level: float = 0.95) -> Difference:
    """How far the cells `a` are ahead of the cells `b`, the same rows drawn on both sides.

    Raises:
        UserError: a side has no cell, or the cells are not about the same test rows.

    >>> items = Items(metric="accuracy", labels=["a", "b"], true=[0, 1], given=[0, 0])
    >>> paired([{"t": items}], [{"t": items}])
    Difference(mean=0.0, low=0.0, high=0.0, p=1.0)
    """
    if not a or not b:
        raise UserError("bootstrap: a side has no cell; give one at least")
    for task in _same_tasks([a[0], b[0]]):
        check_same_rows([a[0][task], b[0][task]], task)
    return _difference(_mean(a) - _mean(b), bootstrap(a, draws, seed) - bootstrap(b, draws, seed), level)


def paired_task(
    a: Items, b: Items, task: str = "", draws: int = 2000, seed: int = 0, level: float = 0.95
) -> Difference:
    """`paired` for one task.

    >>> right = Items(metric="accuracy", labels=["a", "b"], true=[0] * 50, given=[0] * 50)
    >>> paired_task(right, right.model_copy(update={"given": [1] * 50}))  # p: 2 (0 + 1) / (2000 + 1)
    Difference(mean=1.0, low=1.0, high=1.0, p=0.0009995002498750624)
    """
    return paired([{task: a}], [{task: b}], draws, seed, level)


def _same_tasks(cells: Sequence[Cell]) -> list[str]:
    """The names, sorted, so that sums are the same to the last bit whatever the order in which tasks were learned."""
    if not cells:
        raise UserError("bootstrap: there is no cell; give one at least")
    tasks = sorted(cells[0])
    for other in map(sorted, cells):
        if other != tasks:
            raise UserError(
                f"bootstrap: one cell has the tasks {', '.join(tasks)}, another {', '.join(other)}; "
                "compare runs of the same tasks"
            )
    return tasks


def check_same_rows(sides: Sequence[Items], task: str) -> None:
    """Raise UserError where the sides were not tested on the same rows, as far as can be seen."""
    first = sides[0]
    for side in sides:
        if (rows := _rows(side)) == 0:
            raise UserError(f"{task}: has no test rows; leave the task out")
        if rows != _rows(first):
            raise UserError(
                f"{task}: one run was tested on {_rows(first)} rows, another on {rows}; compare runs on the same rows"
            )
        if side.metric != first.metric:
            raise UserError(f"{task}: one run has the metric {first.metric}, another {side.metric}; choose one")
        if _named(side) != _named(first):
            raise UserError(f"{task}: the runs disagree on the true labels of the rows; compare runs on the same rows")


def _rows(items: Items) -> int:
    return len(items.scores) or len(items.true)


def _named(items: Items) -> list[str]:
    return [items.labels[place] for place in items.true]


def _columns(items: Items) -> Floats:
    """What a row adds to the sums that the metric is computed from, [rows, columns]."""
    if items.scores:
        return np.asarray(items.scores, dtype=np.float64)[:, None]
    true, given = np.asarray(items.true, dtype=np.int64), np.asarray(items.given, dtype=np.int64)
    if items.metric != "macro_f1":
        return np.asarray(true == given, dtype=np.float64)[:, None]
    each = np.eye(len(items.labels))
    return np.hstack([each[true] * (true == given)[:, None], each[true] + each[given]])


def _score(items: Items, sums: Floats, rows: int) -> Floats:
    """The metric from sums of `_columns` over as many rows, [..., columns] -> [...]."""
    if items.scores or items.metric != "macro_f1":
        return np.asarray(sums[..., 0] / rows)
    right, seen = np.split(sums, 2, axis=-1)  # as metrics.macro_f1: of labels that are true or given somewhere
    return np.asarray((2 * right / np.maximum(seen, 1)).sum(axis=-1) / (seen > 0).sum(axis=-1))


def _counts(rows: int, task: str, draws: int, seed: int) -> Iterator[Floats]:
    """How often each draw takes each row, in blocks [some draws, rows]."""
    generator = np.random.default_rng([seed, zlib.crc32(task.encode())])
    at_once = max(1, _BLOCK // rows)
    for start in range(0, draws, at_once):
        block = min(at_once, draws - start)
        taken = generator.integers(rows, size=(block, rows)) + rows * np.arange(block)[:, None]
        yield np.bincount(taken.ravel(), minlength=block * rows).reshape(block, rows).astype(np.float64)


def _mean(cells: Sequence[Cell]) -> float:
    return float(np.mean([[score(cell[task]) for task in sorted(cell)] for cell in cells]))


def _difference(mean: float, draws: Floats, level: float) -> Difference:
    draws = draws.round(12)  # sums in another order are no difference
    beyond = min((draws <= 0).sum(), (draws >= 0).sum())
    low, high = interval(draws, level)
    return Difference(round(mean, 12), low, high, min(1.0, 2 * float(beyond + 1) / (len(draws) + 1)))
