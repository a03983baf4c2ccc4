"""`moecl report`: where the files are, and the tables that say the most."""

from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table as Grid
from rich.text import Text

from moecl.report import make
from moecl.report.page import Table
from moecl.show import say


def report(folders: Sequence[Path], output: Path | None, console: Console) -> None:
    """Write a report and show where it is. Raises as `moecl.report.make` does."""
    written = make(folders, output, moved)
    for line in written.headlines:
        console.print(Text(line))
        console.print()
    for table in written.tables:
        console.print(grid(table, console.width))
    say(console, f"report    {written.html}")
    say(console, f"markdown  {written.markdown}")


def moved(folder: Path) -> list[str]:
    """What a run's tasks answer otherwise than its result says."""
    from moecl.using import not_as_tested

    found = not_as_tested(folder)
    return [f"{task}: {why}; its scores are those of the end of the run." for task, why in found.items()]


def grid(table: Table, width: int) -> Grid:
    """The table's first columns and rows, as many as there is room for; the report has all."""
    cells = [row[: len(table.columns)] for row in table.cells()[:MOST_ROWS]]
    wide = [max(cell_len(text) for text in (name, *(row[place].text for row in cells))) + GAP
            for place, name in enumerate(table.columns)]  # fmt: skip
    fit = max(2, sum(total <= width for total in accumulate(wide)))
    left_out = [f"{len(table.rows) - MOST_ROWS} rows"] if len(table.rows) > MOST_ROWS else []
    left_out += [", ".join(table.columns[fit:])] if fit < len(wide) else []
    found = Grid(
        box=box.SIMPLE_HEAD, title=Text(table.caption), title_justify="left", title_style="",
        caption=Text(f"in the report also: {'; '.join(left_out)}") if left_out else None, caption_justify="left",
    )  # fmt: skip
    for place, name in enumerate(table.columns[:fit]):
        words = place == 0 or place in table.words
        found.add_column(Text(name), justify="left" if words else "right", no_wrap=True)
    for row in cells:
        found.add_row(*(Text(cell.text, style=STYLES[cell.mark]) for cell in row[:fit]))
    return found


MOST_ROWS, GAP = 20, 3
STYLES = {"": "", "learned": "bold", "strong": "bold", "muted": "dim", "empty": "dim"}
