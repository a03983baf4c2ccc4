"""`moecl report`: where the files are, and the tables that say the most."""

from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table as Grid
from rich.text import Text

from moecl.report import Written, make
from moecl.report.page import Table
from moecl.show import say


def report(folders: Sequence[Path], output: Path | None, console: Console) -> None:
    """Write a report and show where it is. Raises as `moecl.report.make` does."""
    written = make(folders, output)
    for line in written.headlines:
        console.print(Text(line))
        console.print()
    for table in written.tables:
        console.print(grid(table))
    say(console, f"report    {written.html}")
    say(console, f"markdown  {written.markdown}")


def grid(table: Table) -> Grid:
    found = Grid(box=box.SIMPLE_HEAD, title=Text(table.caption), title_justify="left", title_style="")
    for place, name in enumerate(table.columns):
        found.add_column(Text(name), justify="left" if place == 0 or place in table.words else "right")
    for row in table.cells():
        found.add_row(*(Text("-" if cell.mark == "empty" else cell.text, style=STYLES[cell.mark]) for cell in row))
    return found


STYLES = {"": "", "learned": "bold", "strong": "bold", "muted": "dim", "empty": "dim"}
