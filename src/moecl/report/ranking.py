"""Who is ahead in a bench, and how sure that is.

A method's score is the mean over its finished cells (orders x seeds) of the average accuracy. Two methods are compared
on the cells that both have, on the same drawn test rows (moecl.stats).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from moecl import stats
from moecl.method_config import METHODS, MoECLConfig
from moecl.metrics import average_accuracy
from moecl.report.read import Bench
from moecl.results import Items, Result

KEEPS_DATA = {name: config.keeps_rows for name, config in METHODS.items() if config.keeps_rows}
BOUND = next(name for name, config in METHODS.items() if config.learns_together)  # no rival
OURS = str(MoECLConfig.model_fields["name"].default)
Place = tuple[str, int]  # order, seed


@dataclass(frozen=True)
class Standing:
    """A method's finished cells, one at least."""

    label: str
    method: str
    results: Mapping[Place, Result]

    @property
    def rehearsal_free(self) -> bool:
        return self.method not in KEEPS_DATA

    @cached_property
    def mean(self) -> float | None:
        return mean([last_row(result) for result in self.results.values()])

    def of_order(self, order: str) -> "Standing | None":
        found = {place: result for place, result in self.results.items() if place[0] == order}
        return Standing(self.label, self.method, found) if found else None

    def spread(self) -> float | None:
        """Standard deviation over seeds, of the mean over the orders that all seeds have; None for one seed."""
        seeds = sorted({seed for _, seed in self.results})
        orders = [
            order for order in {order for order, _ in self.results} if all((order, s) in self.results for s in seeds)
        ]
        each = [mean([last_row(self.results[order, seed]) for order in sorted(orders)]) for seed in seeds]
        known = [one for one in each if one is not None]
        return float(np.std(known, ddof=1)) if len(known) == len(seeds) > 1 else None

    def interval(self) -> tuple[float, float] | None:
        """Bootstrap 95% interval over test rows; None where a cell has no items or other tasks than the rest."""
        cells = items(list(self.results.values()))
        return stats.interval(stats.bootstrap(cells)) if cells else None

    def number(self, name: str) -> float | None:
        return mean([result.metrics.get(name) for result in self.results.values()])


@dataclass(frozen=True)
class Comparison:
    """How far one method is ahead of another; `sure` is None where a cell has no items or other tasks than the rest."""

    other: Standing
    cells: int
    mean: float
    sure: stats.Difference | None
    by_seed: Mapping[int, float]  # seed -> how far ahead on its cells

    @property
    def p(self) -> float | None:
        return self.sure.p if self.sure else None


def last_row(result: Result) -> float | None:
    return average_accuracy(np.asarray(result.R, dtype=float))


def mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known and len(known) == len(values) else None


def items(results: Sequence[Result]) -> list[Mapping[str, Items]] | None:
    """Each result's test items, where all have them, for the same tasks."""
    tasks = {frozenset(result.tasks) for result in results}
    complete = all(result.items.keys() == set(result.tasks) for result in results)
    return [result.items for result in results] if complete and len(tasks) == 1 and frozenset() not in tasks else None


def standings(bench: Bench) -> list[Standing]:
    """Methods with a finished cell, the best first."""
    found: dict[str, dict[Place, Result]] = {}
    for cell in bench.cells:
        if cell.id in bench.results:
            found.setdefault(cell.method, {})[cell.order, cell.seed] = bench.results[cell.id]
    all_of_them = [Standing(label, bench.methods[label].method, results) for label, results in found.items()]
    return sorted(all_of_them, key=lambda one: -1.0 if one.mean is None else one.mean, reverse=True)


def gap(a: Standing, b: Standing, seed: int | None = None) -> float | None:
    """How far `a` is ahead of `b` on the cells that both have, or on those of one seed; None where there is none."""
    common = sorted(place for place in a.results.keys() & b.results.keys() if seed in (None, place[1]))
    means = [mean([last_row(one.results[place]) for place in common]) for one in (a, b)]
    return None if means[0] is None or means[1] is None else round(means[0] - means[1], 12)


def compare(a: Standing, b: Standing) -> Comparison | None:
    """a less b on the cells that both have; None where there is none."""
    if (ahead := gap(a, b)) is None:
        return None
    common = sorted(a.results.keys() & b.results.keys())
    cells = [items([one.results[place] for place in common]) for one in (a, b)]
    sure = stats.paired(cells[0], cells[1]) if cells[0] and cells[1] else None
    gaps = {seed: gap(a, b, seed) for seed in sorted({seed for _, seed in common})}
    return Comparison(b, len(common), ahead, sure, {seed: own for seed, own in gaps.items() if own is not None})


def leader(found: Sequence[Standing]) -> Standing | None:
    """The rehearsal-free method that is behind no other on their common cells, of those with half of the most cells.

    Where each is behind some other, the best of those with the most cells.
    """
    free = [one for one in found if one.rehearsal_free and one.mean is not None]
    most = max((len(one.results) for one in free), default=0)
    contenders = sorted((one for one in free if 2 * len(one.results) >= most), key=lambda one: -len(one.results))
    for one in contenders:
        gaps = [ahead for other in contenders if other is not one and (ahead := gap(one, other)) is not None]
        if gaps and min(gaps) >= 0:
            return one
    return next(iter(contenders), None)


def best_rival(of: Standing, found: Sequence[Standing]) -> Comparison | None:
    """The rehearsal-free method that comes closest, of another registry name where there is one.

    Of those with the most cells in common with it: what a method reaches on few may be luck.
    """
    free = [one for one in found if one.rehearsal_free and one.label != of.label]
    others = [one for one in free if one.method != of.method] or free
    compared = [comparison for one in others if (comparison := compare(of, one))]
    most = max((comparison.cells for comparison in compared), default=0)
    return min((one for one in compared if one.cells == most), key=lambda one: one.mean, default=None)


def holm(p: Sequence[float]) -> list[float]:
    """p-values for as many comparisons at once (Holm 1979).

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    found, highest = [0.0] * len(p), 0.0
    for rank, place in enumerate(sorted(range(len(p)), key=lambda place: p[place])):
        highest = max(highest, min(1.0, (len(p) - rank) * p[place]))
        found[place] = round(highest, 12)
    return found
