"""A report's parts, and how they are written: as one HTML page that loads nothing, and as Markdown.

Both are written from the same blocks, so they have the same numbers. HTML escapes whatever comes from data.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any, Literal

from moecl._markdown import escaped
from moecl.errors import UserError

MISSING = "not measured"


@dataclass(frozen=True)
class Cell:
    """A cell that is more than its text: `heat` from 0 to 1 colours it, `mark` names what it is."""

    text: str
    heat: float | None = None
    mark: Literal["", "learned", "empty", "strong", "muted"] = ""


@dataclass(frozen=True)
class Table:
    """The first column heads its rows; columns are numbers but for those in `words`."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str | Cell]]
    note: str = ""
    words: Collection[int] = ()
    beside: bool = False  # narrow enough to stand beside a figure

    def cells(self) -> list[list[Cell]]:
        return [[one if isinstance(one, Cell) else Cell(one) for one in row] for row in self.rows]


@dataclass(frozen=True)
class Figure:
    """A drawing; the SVG itself says what is to be seen, for who does not see it."""

    svg: str
    caption: str


@dataclass(frozen=True)
class Text:
    text: str
    kind: Literal["plain", "headline", "warning", "code", "note"] = "plain"


@dataclass(frozen=True)
class Facts:
    """Numbers to be seen first: (name, value, what more there is to say)."""

    facts: Sequence[tuple[str, str, str]]


Block = Table | Figure | Text | Facts


@dataclass(frozen=True)
class Section:
    """`folded` sections are opened by who wants them."""

    title: str
    blocks: Sequence[Block]
    level: int = 2
    folded: bool = False


@dataclass(frozen=True)
class Page:
    title: str
    sections: Sequence[Section]


def html(page: Page) -> str:
    """The page as HTML that opens offline.

    Raises:
        UserError: Jinja is not installed.
    """
    try:
        import jinja2
    except ImportError:
        raise UserError("report: needs Jinja, which is not installed; pip install 'moecl[report]'") from None
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    template = (resources.files("moecl.report") / "page.html.j2").read_text(encoding="utf-8")
    return environment.from_string(template).render(page=page, groups=_groups, kind=lambda one: type(one).__name__)


def markdown(page: Page) -> str:
    """The page as Markdown; of figures the caption."""
    lines = [f"# {escaped(page.title)}", ""]
    for section in page.sections:
        lines += [f"{'#' * section.level} {escaped(section.title)}", ""] if section.title else []
        for block in section.blocks:
            lines += [*_markdown(block), ""]
    return "\n".join(lines)


def _markdown(block: Block) -> list[str]:
    if isinstance(block, Text):
        if block.kind == "code":
            return ["```", block.text.replace("```", ""), "```"]
        around = {"headline": "**", "note": "_"}.get(block.kind, "")
        return [f"{'> ' if block.kind == 'warning' else ''}{around}{escaped(block.text)}{around}"]
    if isinstance(block, Facts):
        return [
            f"- {escaped(name)}: {escaped(value)}{f' ({escaped(more)})' if more else ''}"
            for name, value, more in block.facts
        ]
    if isinstance(block, Figure):
        return [f"_Plot, in the HTML page: {escaped(block.caption)}_"]
    rule = [":--" if place == 0 or place in block.words else "--:" for place in range(len(block.columns))]
    rows = [[_mark(cell) for cell in row] for row in block.cells()]
    lines = [escaped(block.caption), "", *map(_row, [[*map(escaped, block.columns)], rule, *rows])]
    return [*lines, "", f"_{escaped(block.note)}_"] if block.note else lines


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _mark(cell: Cell) -> str:
    text = escaped(cell.text)
    return f"**{text}**" if cell.mark in ("strong", "learned") and text else text


def _groups(blocks: Sequence[Block]) -> list[tuple[str, list[Any]]]:
    """Figures, and narrow tables, that follow each other stand side by side where there is room."""
    found: list[tuple[str, list[Any]]] = []
    for block in blocks:
        beside = isinstance(block, Figure) or (isinstance(block, Table) and block.beside)
        kind = "figures" if beside else "block"
        if found and found[-1][0] == kind == "figures":
            found[-1][1].append(block)
        else:
            found.append((kind, [block]))
    return found
