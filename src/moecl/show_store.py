"""What the command line prints of a store: its tasks and versions, and its audit log."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from moecl._audit import Line
from moecl._sizes import size
from moecl.show import plain_table, show_score, summed


def show_tasks(console: Console, rows: Sequence[Mapping[str, Any]]) -> None:
    table = plain_table("task", "labels", "metric", score="right", size="right", sha256="left")
    for row in rows:
        version = [f"version {row['version']}"] if row["versions"] > 1 or row["version"] > 1 else []
        current = ["current"] if row["current"] and row["versions"] > 1 else []
        marks = [
            *version,
            *current,
            *(f"@{alias}" for alias in row["aliases"]),
            *(["retired"] if row["retired"] else []),
        ]
        labels = summed([*row["labels"]], "labels") if row["labels"] else "-"
        digest = row["parts"].get("task", next(iter(row["parts"].values())))[:12]
        taken = "missing" if row["bytes"] is None else size(row["bytes"])
        cells = (labels, row["metric"], show_score(row["score"]), taken, digest)
        style = "" if row["current"] and not row["retired"] else "dim"
        table.add_row(Text(", ".join([row["task"], *marks])), *map(Text, cells), style=style)
    console.print(table)


def show_log(console: Console, lines: Iterable[tuple[int, Line | None]]) -> None:
    table = plain_table(**dict.fromkeys(("", "when (UTC)", "what", "who", "versions"), "left"))
    for number, line in lines:
        if line is None:
            table.add_row(str(number), "-", "altered", "", "", style="red")
            continue
        what = f"{line.what} {line.detail['alias']}" if "alias" in line.detail else line.what
        when = line.time.replace("T", " ").removesuffix("Z")
        did = Text("\n".join([*told(line), ""])).append(line.command, "dim")
        table.add_row(*map(Text, (str(number), when, what, line.user)), did)
    console.print(table)


def told(line: Line) -> Iterator[str]:
    for change in line.changes:
        before, after = (None if one is None else one.version for one in (change.before, change.after))
        yield (
            f"{change.task}@{after}" if before is None else f"{change.task}@{before} -> {f'@{after}' if after else '-'}"
        )
    if isinstance(moved := line.detail.get("moved"), dict):
        yield f"({', '.join(moved)} moved on)"
    if "files" in line.detail:
        yield f"{line.detail['files']} files"
    if line.note:
        yield f"({line.note})"
