"""The sections of a bench: which method is ahead, how sure that is, and what it cost."""

from collections.abc import Iterator, Sequence
from typing import Any

from moecl._sizes import duration, size
from moecl.method_config import METHODS
from moecl.report import plots, ranking
from moecl.report.headline import beside, headline, unfinished
from moecl.report.page import MISSING, Block, Cell, Figure, Section, Table, Text
from moecl.report.protocol import environment, protocol, tuning
from moecl.report.ranking import BOUND, KEEPS_DATA, OURS, Comparison, Standing, best_rival, compare, standings
from moecl.report.read import Bench
from moecl.report.words import between, count, listed, number, p_value, score, signed

ABOUT = (
    "Intervals and p: bootstrap over test rows, 2,000 draws, paired between methods; they do not count how results "
    "vary with the seed, which the standard deviation (SD) shows."
)


def sections(bench: Bench, title: str) -> tuple[list[Section], list[str], Table | None]:
    """The sections, what stands at the top in words, and the table of methods and orders."""
    found, level = standings(bench), 3 if title else 2
    said = headline(found)
    warnings = [Text(line, "warning") for line in unfinished(bench)]
    first = Section(title, [*warnings, Text(said, "headline"), *beside(found)])
    words = [*(line.text for line in warnings), said]
    if not found:
        return [first, *protocol(bench, level)], words, None
    table = by_order(bench, found)
    parts: dict[str, list[Block]] = {
        "Methods": [*_dots(found), table, transfer(found)],
        "Who is ahead": [*_significance(found)],
        "By task": [by_task(bench, found)],
        "Cost against accuracy": [*_cost(found)],
        "What was tuned": [*tuning(bench)],
    }
    shown = [Section(name, blocks, level) for name, blocks in parts.items() if blocks]
    return [first, *shown, *protocol(bench, level), *environment(found, level)], words, table


# Tables


def name_of(one: Standing) -> str:
    if one.rehearsal_free:
        return one.label
    return f"{one.label} ({'bound' if one.method == BOUND else 'keeps data'})"


def by_order(bench: Bench, found: Sequence[Standing]) -> Table:
    """Methods x orders: mean and SD over seeds, and the interval of the whole."""
    first = ranking.leader(found)
    orders = [order for order in bench.orders if any(cell.order == order for cell in bench.cells)]
    planned = {label: sum(cell.method == label for cell in bench.cells) for label in bench.methods}
    rows = []
    for one in found:
        mark: Any = "strong" if one is first else "" if one.rehearsal_free else "muted"
        cells = [_mean_sd(one.of_order(order)) for order in orders]
        done = f"{len(one.results)} of {planned[one.label]}"
        whole = [score(one.mean), between(one.interval()), _sd(one)]
        rows.append([Cell(text, mark=mark) for text in [name_of(one), *whole, *cells, done]])
    return Table(
        "Average accuracy after the last task, by order (mean ± SD over seeds)",
        ["method", "all orders", "95% interval", "SD over seeds", *orders, "cells"],
        rows,
        " ".join([ABOUT, *_grey(found)]),
    )


def _grey(found: Sequence[Standing]) -> list[str]:
    keep = [f"{one.label} {KEEPS_DATA[one.method]}" for one in found if not one.rehearsal_free]
    return [f"In grey, as not rehearsal-free: {listed(keep)}."] if keep else []


def _mean_sd(one: Standing | None) -> str:
    if one is None:
        return MISSING
    spread = one.spread()
    return score(one.mean) + (f" ± {spread:.3f}" if spread is not None else "")


def _sd(one: Standing) -> str:
    value, seeds = one.spread(), {seed for _, seed in one.results}
    return f"{value:.3f}" if value is not None else "one seed" if len(seeds) == 1 else MISSING


def transfer(found: Sequence[Standing]) -> Table:
    names = {"bwt": "BWT", "fwt": "FWT", "forgetting": "forgetting", "learning_accuracy": "learning accuracy"}
    rows = [[name_of(one), *(number(key, one.number(key)) for key in names), _told_the_task(one)] for one in found]
    note = (
        "BWT below 0: old tasks were forgotten. FWT above 0: earlier tasks helped new ones. Told the task: whether an "
        "answer depends on being told which task it is for; the others answer all tasks with the same weights."
    )
    return Table("Transfer and forgetting, means over cells", ["method", *names.values(), "told the task"], rows, note)


def _told_the_task(one: Standing) -> str:
    known = METHODS.get(one.method)
    return MISSING if known is None else "yes" if known.needs_task else "no"


def _significance(found: Sequence[Standing]) -> Iterator[Block]:
    first = ranking.leader(found)
    others = [
        compared
        for one in found
        if first and one is not first and one.method != BOUND and (compared := compare(first, one))
    ]
    if first and others:
        yield _compared(f"{first.label}, the leader, less each other method", others)
    ours = max((one for one in found if one.method == OURS), key=lambda one: len(one.results), default=None)
    rival = best_rival(ours, found) if ours else None
    if ours and ours is not first and rival and rival.other.method != ours.method:
        yield _compared(f"{ours.label} less its best rival", [rival])


def _compared(caption: str, others: Sequence[Comparison]) -> Table:
    known = [one.p for one in others if one.p is not None]
    adjusted = iter(ranking.holm(known))
    rows = []
    for one in others:
        sure = between((one.sure.low, one.sure.high), signed) if one.sure else MISSING
        corrected = p_value(next(adjusted)) if one.p is not None else MISSING
        rows.append([name_of(one.other), str(one.cells), signed(one.mean), sure, p_value(one.p), corrected])
    return Table(
        caption,
        ["method", "cells in common", "difference", "95% interval", "p", "p, Holm"],
        rows,
        "On the cells that both have. p is two-sided; Holm's allows for how many comparisons the table makes.",
    )


def by_task(bench: Bench, found: Sequence[Standing]) -> Table:
    tasks = bench.tasks()
    best = {
        task: max((v for one in found if one.rehearsal_free and (v := _task_mean(one, task)) is not None), default=None)
        for task in tasks
    }
    rows: list[list[str | Cell]] = []
    for one in found:
        cells: list[str | Cell] = [name_of(one)]
        for task in tasks:
            value = _task_mean(one, task)
            strong = value is not None and value == best[task] and one.rehearsal_free
            cells.append(Cell(score(value), mark="strong" if strong else ""))
        rows.append(cells)
    return Table(
        "Each task's score after the last task, means over cells", ["method", *tasks], rows,
        "Bold: the best rehearsal-free method of a task.",
    )  # fmt: skip


def _task_mean(one: Standing, task: str) -> float | None:
    return ranking.mean(
        [result.R[-1][result.tasks.index(task)] for result in one.results.values() if task in result.tasks]
    )


# Plots and cost


def _dots(found: Sequence[Standing]) -> Iterator[Figure]:
    first = ranking.leader(found)
    bound = next((one.mean for one in found if one.method == BOUND), None)
    rows = []
    for one in found:
        if one.mean is not None and one.method != BOUND:
            low, high = one.interval() or (one.mean, one.mean)
            rows.append((name_of(one), one.mean, low, high, one is first))
    if rows:
        told = "; ".join(f"{label} {value:.3f}" for label, value, *_ in rows)
        yield Figure(
            plots.intervals("methods", f"Dot plot of average accuracy. {told}", rows, "average accuracy", bound),
            "Average accuracy and its 95% interval over test rows, the leader with a diamond."
            + (" Dashed: joint training, the bound." if bound is not None else ""),
        )


def _cost(found: Sequence[Standing]) -> Iterator[Block]:
    first = ranking.leader(found)
    costs = {one.label: _costs(one) for one in found}
    shown = [
        (name_of(one), costs[one.label]["seconds"] / 60, one.mean, one is first)
        for one in found
        if one.mean is not None
    ]
    told = "; ".join(f"{label} {value:.3f} in {minutes:.1f} min" for label, minutes, value, _ in shown)
    if shown:
        yield Figure(
            plots.points(
                "time", f"Scatter plot of accuracy by time. {told}", shown, "minutes a run", "average accuracy"
            ),
            "Time of a run against average accuracy: up and left is better.",
        )
    stored = [(label, costs[one.label]["kept"], one.mean, one is first) for one in found
              if one.mean is not None and costs[one.label]["kept"] for label in [name_of(one)]]  # fmt: skip
    if len({kept for _, kept, *_ in stored}) > 1:
        scaled = [(label, kept / 1e6, value, strong) for label, kept, value, strong in stored]
        told = "; ".join(f"{label} {value:.3f} with {mega:.1f} MB" for label, mega, value, _ in scaled)
        yield Figure(
            plots.points(
                "stored", f"Scatter plot of accuracy by storage. {told}", scaled, "MB stored a task", "average accuracy"
            ),
            "What a task leaves on disk against average accuracy.",
        )
    rows = []
    for one in found:
        cost = costs[one.label]
        sizes = [MISSING if cost[key] is None else size(cost[key]) for key in ("bytes", "shared_bytes")]
        rows.append([name_of(one), duration(cost["seconds"]), count(cost["trained_parameters"]), *sizes])
    yield Table(
        "What a run and a task cost, means over cells",
        ["method", "time of a run", "trained parameters a task", "stored a task", "stored, shared"],
        rows,
        "Times are wall clock, on the machine named below; other work on it counts.",
    )


def _costs(one: Standing) -> dict[str, Any]:
    details = [result.details.get(task, {}) for result in one.results.values() for task in result.tasks]
    found: dict[str, Any] = {
        key: ranking.mean([each.get(key) for each in details])
        for key in ("trained_parameters", "bytes", "shared_bytes")
    }
    found["kept"] = None if found["bytes"] is None else found["bytes"] + (found["shared_bytes"] or 0)
    found["seconds"] = ranking.mean([result.seconds for result in one.results.values()])
    return found
