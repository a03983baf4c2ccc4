"""Whose row is this? A Gaussian a task over features [D], all of one covariance: in closed form, and no row is kept.

    d_t(x) = w_t (x - c) - w_t (m_t - c) / 2,   w_t = C^-1 (m_t - c),   P(t | x) = softmax(d(x) / temperature)

m_t is the mean of task t's training rows, c the mean of these means, C the covariance within tasks. C is what the
scatters of all tasks come to, shrunk towards its diagonal by the oracle-approximating amount (Chen, Wiesel, Eldar and
Hero 2010, arXiv 0907.4698), taken of correlations, so that a feature's unit does not matter. How familiar a row is says
the cosine, under C^-1, of x - c with the nearest m_t - c: rows of no task have no reason to point at one. And a row
whose squared distance from its likeliest task's mean is MARGIN times what one in a thousand of its rows has is of none.

Temperature and threshold need rows that the means were not taken of, and rows of no task. The first are drawn: around
the mean of each task's validation rows, scattered as all of these are, as far away and as unevenly as its own are. The
second are these, seen by a discriminant that lacks their own task.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Tensors = dict[str, NDArray[np.float32]]

DRAWN = 4096  # rows drawn to calibrate with, all tasks together; at least LEAST_DRAWN of each
LEAST_DRAWN = 16
TEMPERATURES = np.geomspace(0.25, 64.0, 49)
LEAST_TASKS = 3  # below which leaving one out leaves nothing to tell apart
FAR = 3.1  # standard deviations of the logarithms of a task's distances: one normal draw in a thousand is above
MARGIN = 1.5  # times that squared distance: no task scatters quite as all together do


@dataclass
class Moments:
    """Rows of many tasks: of each the mean [D], of all one scatter [D, D], and its degrees of freedom.

    `powers`: how far a task's rows lie from its mean, squared, on average; `spreads`: the variance of that from row to
    row, over its squared mean (texts of all lengths lie at all distances). Sums alone, so the order of the tasks does
    not matter. They are rounded as they are stored, after each task, so that what goes on from a store ends with the
    same bits.
    """

    width: int
    means: dict[str, Floats] = field(default_factory=dict)
    powers: dict[str, float] = field(default_factory=dict)
    spreads: dict[str, float] = field(default_factory=dict)
    freedom: int = 0

    def __post_init__(self) -> None:
        self.scatter: Floats = np.zeros((self.width, self.width))

    def add(self, task: str, rows: NDArray[np.floating]) -> None:
        """rows [n, D], n from 1 on."""
        assert task not in self.means, f"{task} is there already"
        rows = rows.astype(np.float64)
        mean = rows.mean(axis=0)
        away = ((rows - mean) ** 2).sum(axis=1)
        self.means[task] = as_stored(mean)
        self.powers[task] = float(np.float32(away.sum() / max(len(rows) - 1, 1)))
        self.spreads[task] = float(np.float32(away.var() / away.mean() ** 2 if away.any() else 0.0))
        self.scatter = as_stored(self.scatter + (rows - mean).T @ (rows - mean))
        self.freedom += len(rows) - 1

    def keep(self, tasks: Iterable[str]) -> None:
        """Forget the other tasks; how their rows scattered stays, for it cannot be told apart."""
        for task in self.means.keys() - set(tasks):
            del self.means[task], self.powers[task], self.spreads[task]

    def correlations(self) -> tuple[Floats, Floats]:
        """(C's correlations, shrunk [D, D]; deviations [D])."""
        deviations = np.sqrt(np.diag(self.scatter) / max(self.freedom, 1))
        deviations = np.where(deviations > 0, deviations, 1.0)  # of a feature that never varies
        found = self.scatter / max(self.freedom, 1) / np.outer(deviations, deviations)
        shrinkage = oracle_shrinkage(found, self.freedom)
        found = (1 - shrinkage) * found
        np.fill_diagonal(found, 1.0)
        return found, deviations

    def tensors(self, prefix: str) -> Tensors:
        upper = np.triu_indices(self.width)
        found = {f"{prefix}.scatter": self.scatter[upper], f"{prefix}.freedom": np.array([self.freedom])}
        for task, mean in self.means.items():
            shape = np.array([self.powers[task], self.spreads[task]])
            found |= {f"{prefix}.{task}.mean": mean, f"{prefix}.{task}.shape": shape}
        return {name: one.astype(np.float32) for name, one in found.items()}

    @classmethod
    def of(cls, tensors: Mapping[str, NDArray[np.floating]], prefix: str) -> Self:
        """The inverse of `tensors`. KeyError where these are of something else."""
        upper = tensors[f"{prefix}.scatter"]
        made = cls(int((8 * len(upper) + 1) ** 0.5 - 1) // 2)
        made.scatter[np.triu_indices(made.width)] = upper
        made.scatter += np.triu(made.scatter, 1).T
        made.freedom = int(tensors[f"{prefix}.freedom"][0])
        for name, tensor in tensors.items():
            if name.startswith(f"{prefix}.") and name.endswith(".mean"):
                task = name.removeprefix(f"{prefix}.").removesuffix(".mean")
                made.means[task] = tensor.astype(np.float64)
                made.powers[task], made.spreads[task] = map(float, tensors[f"{prefix}.{task}.shape"])
        return made


def as_stored(numbers: Floats) -> Floats:
    return numbers.astype(np.float32).astype(np.float64)


def oracle_shrinkage(covariance: Floats, freedom: int) -> float:
    """How much of a covariance of trace D is noise beside the identity, as so many rows tell it; 1 without rows.

    >>> oracle_shrinkage(np.eye(3), 100), round(oracle_shrinkage(np.full((3, 3), 0.9) + np.eye(3) * 0.1, 100), 3)
    (1.0, 0.024)
    """
    width = len(covariance)
    squares, most = float((covariance**2).sum()), float(width**2)
    if freedom < 1 or squares <= width:
        return 1.0
    noise = (1 - 2 / width) * squares + most
    return min(1.0, noise / ((freedom + 1 - 2 / width) * (squares - most / width)))


class Whitener:
    """Rows [n, D] in coordinates in which the covariance within tasks is the identity."""

    def __init__(self, moments: Moments) -> None:
        correlations, self.deviations = moments.correlations()
        self.inverse = np.linalg.inv(np.linalg.cholesky(correlations))

    def __call__(self, rows: NDArray[np.floating]) -> Floats:
        found: Floats = (rows / self.deviations) @ self.inverse.T
        return found

    def scatter(self, moments: Moments) -> Floats:
        """How the rows behind `moments` scatter, in these coordinates [D, D]."""
        found: Floats = self.inverse @ (moments.scatter / np.outer(self.deviations, self.deviations)) @ self.inverse.T
        return found


class Discriminant:
    """Tells `tasks` apart: their means, white [tasks, D], as they are seen from the centre of them."""

    def __init__(self, tasks: Sequence[str], means: Floats) -> None:
        self.tasks, self.means = tuple(tasks), means
        self.centre = means.mean(axis=0)
        self.towards = means - self.centre
        self.lengths = np.sqrt((self.towards**2).sum(axis=1))

    def without(self, task: str) -> "Discriminant":
        kept = [place for place, one in enumerate(self.tasks) if one != task]
        return Discriminant([self.tasks[place] for place in kept], self.means[kept])

    def see(self, white: Floats) -> tuple[Floats, Floats]:
        """Of white rows [n, D] the scores d_t [n, tasks], and how familiar each is [n], from -1 to 1."""
        rows = white - self.centre
        along = rows @ self.towards.T
        lengths = np.sqrt((rows**2).sum(axis=1, keepdims=True)) * self.lengths
        cosines = np.divide(along, lengths, out=np.zeros_like(along), where=lengths > 0)
        return along - self.lengths**2 / 2, cosines.max(axis=1)

    def away(self, white: Floats, places: NDArray[np.intp]) -> Floats:
        """Of white rows [n, D] the squared distance [n] from the mean of the task at each one's place [n]."""
        found: Floats = ((white - self.means[places]) ** 2).sum(axis=1)
        return found


@dataclass(frozen=True)
class Calibration:
    """How scores become probabilities, and below which familiarity a row is of no task; None: every row is of one.

    `reach` [tasks]: the squared distance from a task's mean beyond which a row is not the task's.
    """

    temperature: float
    threshold: float | None
    reach: Floats


def calibrate(found: Discriminant, drawn: Sequence[Floats], false_accept: float) -> Calibration:
    """drawn: white rows [n, D] of each task, in order, that its mean was not taken of.

    The temperature makes their own tasks likeliest. The threshold is the familiarity that the share `false_accept` of
    them reaches when their own task is left out, every task counting alike.
    """
    scores = [found.see(rows)[0] for rows in drawn]
    temperature = float(min(TEMPERATURES, key=lambda one: surprise(scores, one)))
    away = [found.away(rows, np.full(len(rows), place)) for place, rows in enumerate(drawn)]
    reach = np.array([reach_of(one) for one in away])
    if len(found.tasks) < LEAST_TASKS:
        return Calibration(temperature, None, reach)
    strange = [found.without(task).see(rows)[1] for task, rows in zip(found.tasks, drawn, strict=True)]
    return Calibration(temperature, float(np.quantile(np.concatenate(strange), 1 - false_accept)), reach)


def reach_of(away: Floats) -> float:
    """MARGIN times what almost no squared distance [n] of a task exceeds: they are log-normal. Infinite for one."""
    if len(away) < 2 or not away.all():
        return float("inf")
    logs = np.log(away)
    return float(MARGIN * np.exp(logs.mean() + FAR * logs.std()))


def surprise(scores: Sequence[Floats], temperature: float) -> float:
    """Mean -log P of a row's own task, for each task's rows in turn."""
    own = [log_shares(rows, temperature)[:, place] for place, rows in enumerate(scores)]
    return -float(np.mean(np.concatenate(own)))


def log_shares(scores: Floats, temperature: float) -> Floats:
    """[n, tasks] -> [n, tasks]."""
    scaled = scores / temperature
    scaled -= scaled.max(axis=1, keepdims=True)
    found: Floats = scaled - np.log(np.exp(scaled).sum(axis=1, keepdims=True))
    return found


class Drawn:
    """White rows around 0 [n, D], scattered as the rows behind `moments`; a task's do not depend on the others.

    Shrunk in white coordinates, where what few rows cannot tell is that all directions are alike. Towards a diagonal in
    the features' own coordinates, few rows would look as if they scattered most where training rows hardly do.
    """

    def __init__(self, moments: Moments, white: Whitener, tasks: int) -> None:
        draws, freedom = np.random.default_rng(0), max(moments.freedom, 1)
        count = max(LEAST_DRAWN, DRAWN // tasks)
        covariance = white.scatter(moments) / freedom
        size = float(np.trace(covariance)) / moments.width or 1.0
        shrinkage = oracle_shrinkage(covariance / size, moments.freedom)
        covariance = (1 - shrinkage) * covariance + shrinkage * size * np.eye(moments.width)
        self.rows: Floats = draws.standard_normal((count, moments.width)) @ np.linalg.cholesky(covariance).T
        self.sizes, self.moments = draws.standard_normal(count), moments
        self.pooled = float(np.trace(moments.scatter)) / freedom
        squares = float((moments.scatter**2).sum()) / freedom**2 - self.pooled**2 / freedom  # less the noise in them
        self.gaussian = 2 * max(squares, 0.0) / self.pooled**2 if self.pooled else 0.0  # what normal rows spread anyway

    def factors(self, task: str) -> Floats:
        """[n, 1]: what makes the rows lie as far away as the task's own, and as unevenly (log-normal)."""
        if self.pooled == 0:
            return np.ones((len(self.sizes), 1))
        width = max(np.log1p(self.moments.spreads[task]) - np.log1p(self.gaussian), 0.0)
        scale = self.moments.powers[task] / self.pooled
        found: Floats = np.sqrt(scale * np.exp(self.sizes * np.sqrt(width) - width / 2))
        return found[:, None]
