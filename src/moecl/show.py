"""What the command line prints: tables of results, tasks and checks, legible in 80 columns."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from moecl._sizes import duration, size
from moecl.results import Result

METRICS = {
    "average_accuracy": "average accuracy",
    "bwt": "backward transfer",
    "fwt": "forward transfer",
    "forgetting": "forgetting",
    "learning_accuracy": "learning accuracy",
}
SIGNED = ("bwt", "fwt")
MANY = 6  # classes, more than which are summed up
WIDEST = 24  # characters of a row's name beside numbered columns


def show_result(console: Console, result: Result, folder: str) -> None:
    """R as a table (a row after each task learned), the numbers drawn from it, time and place."""
    console.print("R: score on each task (column) after each task learned (row)")
    for table in score_tables(result, console.width):
        console.print(table)
    for key, name in METRICS.items():
        value = result.metrics.get(key)
        say(console, f"{name:18} {'-' if value is None else f'{value:+.3f}' if key in SIGNED else f'{value:.3f}'}")
    for task, items in result.items.items():
        if len(set(items.given)) == 1 < len(set(items.true)):
            answer = items.labels[items.given[0]]
            say(console, f"{task}: {answer!r} to all {len(items.given)} test rows; try more epochs or another lr")
    again = f", started {result.resumed + 1} times" if result.resumed else ""
    say(console, f"{'time':18} {duration(result.seconds)}{again}")
    say(console, f"{'run folder':18} {folder}")


def score_tables(result: Result, width: int) -> Iterator[Table]:
    """R under the tasks' names where they fit, else under their numbers, in as many tables as it takes."""
    names, before = result.tasks, "(before any)"
    if 3 + max(map(len, [before, *names])) + sum(3 + max(5, len(name)) for name in names) <= width:
        yield score_table(result, [before, *names], names, 0)
        return
    numbered = [f"{number} {name}" for number, name in enumerate(names, 1)]
    fit = max(1, (width - 3 - WIDEST) // 8)
    for start in range(0, len(names), fit):
        columns = [str(number + 1) for number in range(start, min(start + fit, len(names)))]
        yield score_table(result, [before, *numbered], columns, start)


def score_table(result: Result, rows: Sequence[str], columns: Sequence[str], start: int) -> Table:
    """R's columns from `start` on, as many as have a name in `columns`."""
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("after", no_wrap=True, overflow="ellipsis", max_width=None if rows[-1] in result.tasks else WIDEST)
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    for number, (name, scores) in enumerate(zip(rows, result.R, strict=True)):
        shown = range(start, start + len(columns))
        table.add_row(name, *(score_cell(scores[place], learned=place < number) for place in shown))
    return table


def score_cell(score: float | None, learned: bool) -> Text:
    return Text(show_score(score), style="bold" if learned and score is not None else "dim")


def show_methods(console: Console, rows: Sequence[Mapping[str, str]]) -> None:
    table = plain_table("method", "trains", "stores", "needs to answer or learn")
    for row in rows:
        table.add_row(row["name"], row["trains"], row["stores"], row["needs"])
    console.print(table)


def show_method(console: Console, row: Mapping[str, str]) -> None:
    """One method, with the keys of a stream file that are its own."""
    from moecl.config import describe_settings

    say(console, row["summary"])
    for what in ("trains", "stores", "needs"):
        say(console, f"{what:7} {row[what]}")
    table = plain_table("key", "type", "default", "meaning")
    for key, kind, default, text in describe_settings(row["name"]):
        if key.startswith("method."):
            table.add_row(key, kind, default, text)
    console.print()
    console.print(table)


def show_scores(console: Console, rows: Sequence[Mapping[str, Any]]) -> None:
    table = plain_table("task", "metric", score="right", rows="right", recall="left")
    for row in rows:
        table.add_row(
            row["task"],
            row["metric"],
            show_score(row["score"]),
            str(row["rows"]),
            Text(recalls(row["per_class_recall"])),
        )
    console.print(table)


def recalls(recall: Mapping[str, float | None]) -> str:
    """The recall of each class, of many classes the lowest."""
    found = sorted(((value, label) for label, value in recall.items() if value is not None))
    if len(recall) <= MANY:
        return ", ".join(f"{label} {show_score(value)}" for label, value in recall.items()) or "-"
    lowest = ", ".join(f"{label} {value:.3f}" for value, label in found[:3])
    return f"lowest of {len(recall)}: {lowest}"


def show_check(console: Console, found: Sequence[Mapping[str, Any]], cost: Mapping[str, Any]) -> None:
    """What `moecl check` found, a table a task, then the hints and the estimate."""
    for task in found:
        labels = task["labels"] or {}
        words = [label if label == it["words"] else f"{label} = {it['words']!r}" for label, it in labels.items()]
        say(console, f"{task['task']} ({task['kind']}{': ' if words else ''}{summed(words, 'labels')})")
        table = plain_table(
            "  split", rows="right", median="right", p95="right", max="right", cut="right", balance="left"
        )
        for name, split in task["splits"].items():
            lengths = [str(split["tokens"][key]) for key in ("p50", "p95", "max")]
            table.add_row(f"  {name}", str(split["rows"]), *lengths, str(split["cut"]), Text(balance(split["labels"])))
        console.print(table)
        hints = Table.grid(padding=(0, 1))
        for hint in task["hints"]:
            hints.add_row("  -", Text(hint))
        console.print(hints)
        console.print()
    say(console, "median, p95, max: tokens of whole inputs, of which train.max_length are kept\n")
    training, testing = cost["training_seconds"], cost["evaluation_seconds"]
    say(console, f"time    {duration(training + testing)}: {duration(training)} training, {duration(testing)} testing")
    say(console, f"memory  {size(cost['peak_bytes'])}")
    say(console, f"disk    {size(cost['task_bytes'])} a task")
    if (prefix := cost.get("prefix")) is not None:
        say(console, f"prefix  {show_prefix(prefix)}")
    say(console, f"({cost['how']})")


def show_prefix(prefix: Mapping[str, Any]) -> str:
    spared = prefix["training_seconds"] + prefix["evaluation_seconds"]
    return (
        f"{size(prefix['bytes'])} of cache: {prefix['share']:.0%} of the layers run once a text, "
        f"{duration(prefix['filling_seconds'])}; spares {duration(spared)}"
    )


def balance(labels: Mapping[str, int]) -> str:
    if len(labels) > MANY:
        return f"{len(labels)} labels, {min(labels.values())} to {max(labels.values())} rows each"
    return ", ".join(f"{label} {count}" for label, count in labels.items()) or "-"


def summed(words: Sequence[str], what: str) -> str:
    return ", ".join(words) if len(words) <= MANY else f"{len(words)} {what}"


def plain_table(*left: str, **columns: str) -> Table:
    """A table without lines: `left` columns may wrap; of `columns`, name to side, only the last may."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for name in left:
        table.add_column(name, overflow="fold", no_wrap=name == "metric")
    for place, (name, side) in enumerate(columns.items(), 1):
        last = place == len(columns)
        table.add_column(name, justify="right" if side == "right" else "left", overflow="fold", no_wrap=not last)
    return table


def say(console: Console, line: str, style: str | None = None) -> None:
    console.print(line, highlight=False, markup=False, soft_wrap=True, style=style)


def show_score(score: float | None) -> str:
    return "-" if score is None else f"{score:.3f}"
