"""What the command line prints: tables of results, tasks and checks."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from moecl.results import Result
from moecl.watch import show_score

METRICS = {
    "average_accuracy": "average accuracy",
    "bwt": "backward transfer",
    "fwt": "forward transfer",
    "forgetting": "forgetting",
    "learning_accuracy": "learning accuracy",
}


def show_result(console: Console, result: Result, folder: str) -> None:
    """R as a table (a row after each task learned), the numbers drawn from it, time and place."""
    console.print("R: score on each task (column) after each task learned (row)")
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("after")
    for name in result.tasks:
        table.add_column(name, justify="right", overflow="fold")
    for number, row in enumerate(result.R):
        cells = [score_cell(score, learned=place < number) for place, score in enumerate(row)]
        table.add_row("(before any)" if number == 0 else result.tasks[number - 1], *cells)
    console.print(table)
    for key, name in METRICS.items():
        value = result.metrics.get(key)
        console.print(f"{name:18} {'-' if value is None else f'{value:+.3f}' if key in ('bwt', 'fwt') else f'{value:.3f}'}")
    minutes, seconds = divmod(round(result.seconds), 60)
    again = f", started {result.resumed + 1} times" if result.resumed else ""
    console.print(f"{'time':18} {minutes} min {seconds} s{again}")
    console.print(f"{'run folder':18} {folder}", soft_wrap=True)


def score_cell(score: float | None, learned: bool) -> Text:
    return Text(show_score(score), style="bold" if learned and score is not None else "dim")


def show_tasks(console: Console, rows: Sequence[Mapping[str, Any]]) -> None:
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("task", "version", "kind", "labels", "metric", "score", "KiB", "sha256"):
        table.add_column(name, justify="right" if name in ("version", "score", "KiB") else "left", overflow="fold")
    for row in rows:
        labels = ", ".join(row["labels"]) or "-"
        digest = row["parts"].get("task", next(iter(row["parts"].values())))[:12]
        table.add_row(
            row["task"],
            str(row["version"]),
            row["kind"],
            labels,
            row["metric"],
            show_score(row["score"]),
            f"{row['bytes'] / 1024:.0f}",
            digest,
        )
    console.print(table)


def show_scores(console: Console, rows: Sequence[Mapping[str, Any]]) -> None:
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("task", "metric", "score", "rows", "recall of each class"):
        table.add_column(name, justify="right" if name in ("score", "rows") else "left", overflow="fold")
    for row in rows:
        recall = ", ".join(f"{label} {show_score(value)}" for label, value in row["per_class_recall"].items())
        table.add_row(row["task"], row["metric"], show_score(row["score"]), str(row["rows"]), recall or "-")
    console.print(table)


def show_check(console: Console, found: Sequence[Mapping[str, Any]], cost: Mapping[str, Any]) -> None:
    """What `moecl check` found, a table a task, then the hints and the estimate."""
    for task in found:
        labels = task["labels"] or {}
        words = ", ".join(f"{label} = {it['words']!r}" if label != it["words"] else label for label, it in labels.items())
        console.print(f"{task['task']} ({task['kind']}{': ' + words if words else ''})", highlight=False, markup=False)
        table = Table(box=box.SIMPLE_HEAD)
        for name in ("split", "rows", "labels", "tokens p50", "p95", "max", "cut", "repeated"):
            table.add_column(name, justify="left" if name in ("split", "labels") else "right", overflow="fold")
        for name, split in task["splits"].items():
            balance = ", ".join(f"{label} {count}" for label, count in split["labels"].items()) or "-"
            lengths = [str(split["tokens"][key]) for key in ("p50", "p95", "max")]
            table.add_row(
                name, str(split["rows"]), balance, *lengths, str(split["cut"]), str(split["duplicates"])
            )
        console.print(table)
        for hint in task["hints"]:
            console.print(f"  - {hint}", highlight=False, markup=False)
    console.print(
        f"about {minutes(cost['training_seconds'] + cost['evaluation_seconds'])} "
        f"({minutes(cost['training_seconds'])} training, {minutes(cost['evaluation_seconds'])} testing), "
        f"{cost['peak_bytes'] / 2**30:.1f} GiB of memory, {cost['task_bytes'] / 2**20:.1f} MiB of disk a task "
        f"({cost['how']})",
        highlight=False,
    )


def minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
