"""The sections of one run. What was not recorded has no section."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from moecl import metrics, stats
from moecl._sizes import duration, size
from moecl.report import plots
from moecl.report.page import MISSING, Block, Cell, Facts, Figure, Section, Table, Text
from moecl.report.ranking import items
from moecl.report.read import Run
from moecl.report.words import NUMBERS, between, count, flat, number, score, several, signed
from moecl.results import Items, Result, SplitInfo
from moecl.routing import Point, Routing

MOST_WITH_NUMBERS = 25  # tasks, above which R is an image
MOST_CLASSES = 12  # of a task, above which only the hardest are listed
HARDEST = 5
MOST_LETTERS = 60  # of tasks' names together, above which columns have numbers
MOST_BESIDE = 5  # tasks, above which R needs the width of the page
MOST_OPEN = 30  # rows of a table, above which its section is opened by who wants it

Details = Mapping[str, tuple[str, Callable[[Any], str]]]  # key of the details -> its name, how it is written

MEANING = {
    "average_accuracy": "after the last task",
    "bwt": "change since learned; below 0 is forgetting",
    "fwt": "what earlier tasks brought, before learning",
    "forgetting": "drop from the best score",
    "learning_accuracy": "right after learning",
}


def sections(run: Run, title: str) -> tuple[list[Section], Table]:
    """All that is known of a run, under one title where it has one; and the table that says the most."""
    result, level, tasks = run.result, 3 if title else 2, by_task(run)
    parts: dict[str, list[Block]] = {
        "Scores": [*_scores(result)],
        "Each task's score": [tasks] if result.tasks else [],
        "Without the task's name": [] if run.routing is None else [*_routing(run.routing)],
        "Recall by class": [*_recall(result)],
        "Training": [*_training(result)],
        "Inside the model": [*_inside(result)],
        "Drift of old tasks": [*_drift(result)],
        "Rows": [*_rows(result)],
    }
    shown = [Section(name, blocks, level, folded=_long(blocks)) for name, blocks in parts.items() if blocks]
    last = [*_environment(result)]
    hashes = [Section("Environment and hashes", last, level, folded=True)] if last else []
    notes = [Text(note, "warning") for note in run.notes]
    return [Section(title, [*notes, *_first(result)]), *shown, *hashes], tasks


def _long(blocks: Sequence[Block]) -> bool:
    return any(isinstance(block, Table) and len(block.rows) > MOST_OPEN for block in blocks)


def _first(result: Result) -> Iterator[Block]:
    again = f", started {result.resumed + 1} times" if result.resumed else ""
    yield Text(
        f"{several(len(result.tasks), 'task')} learned with {result.method}, seed {result.seed}, "
        f"in {duration(result.seconds)}{again}."
    )
    sure = items([result])
    more = {"average_accuracy": f"95% interval {between(stats.interval(stats.bootstrap(sure)))}"} if sure else {}
    yield Facts(
        [(name, number(key, result.metrics.get(key)), more.get(key, MEANING[key])) for key, name in NUMBERS.items()]
    )


# Scores


def _scores(result: Result) -> Iterator[Block]:
    if not result.tasks:
        return
    if len(result.tasks) <= MOST_WITH_NUMBERS:
        yield _heat(result)
    else:
        yield Figure(
            plots.image("R", "R as colours", _table(result), "task", "tasks learned"),
            "R: score on each task (column) after so many tasks (row); empty where not measured.",
        )
    if (over_time := _over_time(result)) is not None:
        yield over_time


def _names(tasks: Sequence[str]) -> tuple[list[str], list[str]]:
    """Names of columns and of rows: where the columns' would be too wide they are numbers, which the rows have too."""
    if sum(map(len, tasks)) <= MOST_LETTERS:
        return list(tasks), list(tasks)
    return [str(number) for number in range(1, len(tasks) + 1)], [f"{n} {task}" for n, task in enumerate(tasks, 1)]


def _heat(result: Result) -> Table:
    columns, names = _names(result.tasks)
    rows: list[list[str | Cell]] = []
    for after, row in enumerate(result.R):
        name = names[after - 1] if after else "(before any)"
        rows.append([name, *(_heat_cell(value, after == place + 1) for place, value in enumerate(row))])
    return Table(
        "R: score on each task (column) after each task learned (row)",
        ["after", *columns],
        rows,
        "Framed (bold in Markdown): the task just learned. Hatched: not measured.",
        beside=len(result.tasks) <= MOST_BESIDE,
    )


def _heat_cell(value: float | None, learned: bool) -> Cell:
    if value is None:
        return Cell(MISSING, mark="empty")
    return Cell(score(value), min(max(value, 0.0), 1.0), "learned" if learned else "")


def _table(result: Result) -> Any:
    return np.array(result.R, dtype=np.float64)


def _over_time(result: Result) -> Figure | None:
    table = _table(result)
    series = {}
    for place, task in enumerate(result.tasks):
        known = np.flatnonzero(~np.isnan(table[:, place]))
        if len(known):
            series[task] = ([*map(float, known)], [*map(float, table[known, place])])
    if all(len(xs) < 2 for xs, _ in series.values()):
        return None
    many = len(series) > plots.MOST_LINES
    last = "; ".join(f"{task} ends at {ys[-1]:.3f}" for task, (_, ys) in series.items()) if not many else ""
    return Figure(
        plots.lines("over time", f"Line chart of scores over time. {last}", series, "after learning", "score",
                    ["none", *_names(result.tasks)[0]]),
        "Each task's score as further tasks are learned" + (": the mean over tasks, and their range." if many else "."),
    )  # fmt: skip


def by_task(run: Run) -> Table:
    """What became of each task."""
    result = run.result
    rows = []
    for place, task in enumerate(result.tasks):
        learned, last = result.R[place + 1][place], result.R[-1][place]
        change = None if learned is None or last is None else last - learned
        sure, moved = _interval(result.items.get(task), task), run.moved.get(task)
        lost = MISSING if moved is None else f"{moved.lost} lost, {moved.won} won"
        rows.append(
            [task, _metric(result, task), score(learned), score(last), sure, signed(change), lost]
            + [score(_macro_f1(result, task))]
        )
    columns = ["task", "metric", "when learned", "at the end", "95% interval", "change", "answers changed", "macro-F1"]
    shown = [c for c in range(len(columns)) if c < 4 or any(row[c] != MISSING for row in rows)]
    return Table(
        "Score when learned and after the last task",
        [columns[c] for c in shown],
        [[row[c] for c in shown] for row in rows],
        "Intervals: bootstrap over test rows." if 4 in shown else "",
        words=(1,),
    )


def _metric(result: Result, task: str) -> str:
    return result.items[task].metric if task in result.items else str(result.details.get(task, {}).get("metric", "-"))


def _interval(found: Items | None, task: str) -> str:
    return between(
        stats.interval(stats.bootstrap_task([found], task)) if found and (found.true or found.scores) else None
    )


def _macro_f1(result: Result, task: str) -> float | None:
    recorded = result.details.get(task, {}).get("macro_f1")
    found = result.items.get(task)
    return metrics.macro_f1(found.true, found.given) if recorded is None and found and found.true else recorded


def _recall(result: Result) -> Iterator[Block]:
    rows: list[list[str | Cell]] = []
    short = False
    for task in result.tasks:
        recall = {label: value for label, value in _recall_of(result, task).items() if value is not None}
        hardest = sorted(recall, key=lambda label: recall[label])[:HARDEST]
        few = len(recall) <= MOST_CLASSES
        short |= not few
        for label in recall if few else hardest:
            rows.append([task, label, Cell(score(recall[label]), recall[label])])
    if rows:
        note = f"Of tasks with more than {MOST_CLASSES} classes the {HARDEST} with the lowest recall." if short else ""
        yield Table(
            "Share of each class's rows answered right, after the last task",
            ["task", "class", "recall"],
            rows,
            note,
            (1,),
        )


def _recall_of(result: Result, task: str) -> dict[str, float | None]:
    recorded = result.details.get(task, {}).get("per_class_recall")
    found = result.items.get(task)
    if recorded or not found or not found.true:
        return recorded or {}
    by_place = metrics.per_class_recall(found.true, found.given, range(len(found.labels)))
    return {found.labels[place]: value for place, value in by_place.items()}


# Training


def _training(result: Result) -> Iterator[Block]:
    curves = {}
    for task in result.tasks:
        points = [(step, value) for step, value in result.details.get(task, {}).get("validation") or []]
        if len(points) > 1:
            curves[task] = ([float(step) for step, _ in points], [_nan(value) for _, value in points])
    if curves:
        last = "; ".join(f"{task} ends at {ys[-1]:.3f}" for task, (_, ys) in [*curves.items()][: plots.MOST_LINES])
        yield Figure(
            plots.lines("validation", f"Line chart of validation scores by step. {last}", curves, "step", "score"),
            "Score on validation rows while each task was learned.",
        )
    wanted: Details = {
        "steps": ("steps", count),
        "best_step": ("best step", count),
        "validation_final": ("validation at the end", score),
        "trained_parameters": ("trained parameters", count),
        "bytes": ("stored", size),
        "shared_bytes": ("stored, shared with others", size),
        "seconds": ("time", duration),
    }
    if (table := _details_table(result, wanted, "What each task trained, stored and took")) is not None:
        yield table


def _details_table(result: Result, wanted: Details, caption: str) -> Table | None:
    """The details of `wanted` that any task has."""
    details = [result.details.get(task, {}) for task in result.tasks]
    keys = [key for key in wanted if any(one.get(key) is not None for one in details)]
    rows = [
        [task, *(MISSING if one.get(key) is None else wanted[key][1](one[key]) for key in keys)]
        for task, one in zip(result.tasks, details, strict=True)
    ]
    return Table(caption, ["task", *(wanted[key][0] for key in keys)], rows, beside=len(keys) <= 2) if keys else None


def _nan(value: float | None) -> float:
    return float("nan") if value is None else float(value)


# Inside the model


def _inside(result: Result) -> Iterator[Block]:
    gates = {task: use for task in result.tasks if (use := result.details.get(task, {}).get("gate_use"))}
    if gates:
        layers = list(dict.fromkeys(layer for use in gates.values() for layer in use))
        series = {
            task: ([float(layers.index(layer)) for layer in use], [_nan(value) for value in use.values()])
            for task, use in gates.items()
        }
        mean = {task: float(np.nanmean(ys)) for task, (_, ys) in series.items()}
        told = "; ".join(f"{task} {value:.2f}" for task, value in [*mean.items()][: plots.MOST_LINES])
        yield Figure(
            plots.lines(
                "gate", f"Line chart of gate weights by layer. Means: {told}", series, "layer", "weight", layers
            ),
            "Weight of the task's own expert by layer, mean over test rows; the shared expert counts "
            "whole beside it, or by the rest where nested is false. "
            f"Means over layers: {told}.",
        )
    wanted: Details = {"discriminator_accuracy": ("accuracy", score), "discriminator_loss": ("loss", score)}
    if (table := _details_table(result, wanted, "Discriminator while each task was learned")) is not None:
        yield table


def _drift(result: Result) -> Iterator[Block]:
    drifts = {
        task: moved
        for task in result.tasks
        if (moved := [(i, v) for i, v in result.details.get(task, {}).get("drift") or [] if v is not None])
    }
    if not drifts:
        return
    if not any(value for moved in drifts.values() for _, value in moved):
        yield Text(
            f"None: the answers of {several(len(drifts), 'task')} are what they were when learned, to the last digit."
        )
        return
    series = {task: ([float(row) for row, _ in moved], [float(v) for _, v in moved]) for task, moved in drifts.items()}
    ends = {task: ys[-1] for task, (_, ys) in series.items()}
    told = "; ".join(f"{task} {value:.3f}" for task, value in [*ends.items()][: plots.MOST_LINES])
    yield Figure(
        plots.lines("drift", f"Line chart of drift. At the end: {told}", series, "after learning", "mean change",
                    ["none", *_names(result.tasks)[0]]),
        "How far the labels' log shares have moved since a task was learned, mean over test rows.",
    )  # fmt: skip
    yield Table(
        "At the end: mean absolute change of log shares",
        ["task", "drift"],
        [[task, score(value)] for task, value in ends.items()],
    )


# Without the task's name


def _routing(found: Routing) -> Iterator[Block]:
    rows = [
        [one.task, *map(score, (one.with_task, one.without_task, one.routed, one.unknown, one.left_out))]
        for one in found.tasks
    ]
    yield Table(
        f"Scores on {found.split} rows with the task's name, and where the router finds the task",
        ["task", "with its name", "without", "sent to it", "of no task", "false accepts"],
        rows,
        "False accepts: share of the task's rows that would be taken for another's, had it not been learned; the "
        f"threshold is set for {found.wanted:g}. A row of no task counts as answered wrong.",
    )
    known = [one for one in found.curve if one.score is not None]
    across = [one.coverage for one in known]
    series = {"score": (across, [_nan(one.score) for one in known])}
    if any(one.false_accept is not None for one in known):
        series["false accepts"] = (across, [_nan(one.false_accept) for one in known])
    yield Figure(
        plots.lines(
            "abstention", f"Line chart of the score by coverage. {_at_ends(known)}", series, "coverage", "share"
        ),
        "Abstention: the score of the rows that are accepted as of a task, and the share of rows accepted whose own "
        "task is left out, by the share of rows that are accepted.",
    )


def _at_ends(curve: Sequence[Point]) -> str:
    return "; ".join(f"{score(one.score)} at {one.coverage:.2f}" for one in (curve[0], curve[-1])) if curve else ""


# What it was made from


def _rows(result: Result) -> Iterator[Block]:
    if not result.data:
        return
    splits = list(dict.fromkeys(split for found in result.data.values() for split in found))
    rows = [[task, *(_used(found.get(split)) for split in splits)] for task, found in result.data.items()]
    cut = sum(info.cut for found in result.data.values() for info in found.values())
    note = f"{count(cut)} of all rows were longer than max_length and were cut; none was left out."
    yield Table("Rows that were used of each split", ["task", *splits], rows, note)


def _used(info: SplitInfo | None) -> str:
    return "-" if info is None else count(info.rows) + (f" ({count(info.cut)} cut)" if info.cut else "")


def _environment(result: Result) -> Iterator[Block]:
    if result.environment:
        yield Table("Environment", ["what", "value"], [list(line) for line in flat(result.environment)], words=(1,))
    data = {task: {split: info.sha256 for split, info in found.items()} for task, found in result.data.items()}
    for caption, what, digests in (("the rows", "split", data), ("what was learned", "part", result.digests)):
        rows = [[task, part, digest] for task, parts in digests.items() for part, digest in parts.items()]
        if rows:
            yield Table(f"sha256 of {caption}", ["task", what, "sha256"], rows, words=(1, 2))
