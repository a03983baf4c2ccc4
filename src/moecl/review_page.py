"""review.html: one file that opens offline, its plots inline SVG, light or dark as the reader's system is.

Needs matplotlib (extra `report`), imported where it is used.
"""

import io
from html import escape
from typing import TYPE_CHECKING

from moecl.review_measure import Review, TaskReview
from moecl.review_tables import Line, Table, asked, notes, tables

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Colours that a plot is drawn in, and the style sheet's names that take their place in the SVG.
INK, GRID, SERIES = "#010101", "#020202", "#030303"
VARIABLES = {INK: "var(--ink)", GRID: "var(--grid)", SERIES: "var(--series)"}

STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --paper: #ffffff; --grid: #8c959f; --series: #0060a8; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --paper: #0d1117; --grid: #6e7681; --series: #7cc4ff; }
}
body { margin: 2rem auto; max-width: 62rem; padding: 0 1rem; color: var(--ink); background: var(--paper);
  font: 16px/1.5 system-ui, sans-serif; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .75rem; text-align: right; border-bottom: 1px solid var(--grid); white-space: nowrap; }
th { white-space: normal; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; white-space: normal; overflow-wrap: anywhere; min-width: 8rem; }
tr:not(.inner) td:first-child { font-weight: 600; }
tr.inner td:first-child { padding-left: 2rem; }
.plots { display: flex; flex-wrap: wrap; gap: 1.5rem; }
figure { margin: 0; } figure svg { max-width: 100%; height: auto; }
"""

WORDS = """
A row is decided without a human where its answer's share of probability reaches the least share asked of the class that
was answered. The stripping rate is the share of test rows that are decided. Precision is the share of decided rows that
are right, with the 95 % interval of Clopper and Pearson. Slipped: rows of a class that were decided as another one. The
calibration error is the mean over rows of how far an answer's share is from the accuracy in its bin of ten.
"""


def page(review: Review, title: str, a: str = "A", b: str = "B") -> str:
    """The whole page. Raises ImportError without matplotlib."""
    plots = "".join(_figure(name, task) for name, task in review.tasks.items())
    body = [
        f"<h1>{escape(title)}</h1>",
        f"<p>{escape(asked(review.target))}</p>",
        *(f"<p>{escape(note)}</p>" for note in notes(review)),
        *(_table(table) for table in tables(review, a, b)),
        f'<h2>Reliability</h2><div class="plots">{plots}</div>',
        f"<h2>Words</h2><p>{escape(WORDS.strip())}</p>",
    ]
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style>"
    )
    text = "\n".join(body)
    return f'<!doctype html>\n<html lang="en">\n<head>{head}</head>\n<body>\n{text}\n</body>\n</html>\n'


def _table(table: Table) -> str:
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in table.columns)
    rows = "\n".join(map(_row, table.lines))
    return (
        f'<h2>{escape(table.title)}</h2>\n<div class="wide"><table><thead><tr>{head}</tr></thead>\n'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _row(line: Line) -> str:
    cells = "".join(f"<td>{escape(cell)}</td>" for cell in line.cells)
    return f'<tr class="inner">{cells}</tr>' if line.inner else f"<tr>{cells}</tr>"


def _figure(name: str, task: TaskReview) -> str:
    said = f"{name}: accuracy against share of probability, calibration error {task.calibration_error:.3f}"
    return f'<figure role="img" aria-label="{escape(said)}">{svg(reliability(name, task))}</figure>'


def reliability(name: str, task: TaskReview) -> "Figure":
    """Accuracy of the answers in each bin of their share of probability, and how many there are."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4, 4.4), layout="constrained")
    curve, counts = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    filled = [one for one in task.reliability if one.rows]
    curve.plot([0, 1], [0, 1], color=GRID, linestyle="--", linewidth=1)
    curve.plot([one.share or 0.0 for one in filled], [one.accuracy or 0.0 for one in filled], "o-", color=SERIES)
    curve.set(xlim=(0, 1.02), ylim=(0, 1.03), ylabel="accuracy")
    curve.set_title(f"{name}: error {task.calibration_error:.3f}", color=INK, parse_math=False)
    edges = [one.low for one in task.reliability]
    counts.bar(edges, [one.rows for one in task.reliability], width=0.1, align="edge", color=SERIES, edgecolor=GRID)
    counts.set(xlabel="share of probability of the answer", ylabel="rows")
    for axes in (curve, counts):
        axes.patch.set_visible(False)
        axes.tick_params(colors=INK)
        axes.xaxis.label.set_color(INK)
        axes.yaxis.label.set_color(INK)
        for name_of, spine in axes.spines.items():
            spine.set(color=GRID, visible=name_of in ("left", "bottom"))
    return figure


def svg(figure: "Figure") -> str:
    """The figure as an element of a page: text as text, colours from the style sheet, the same bytes each time."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "moecl", "font.family": "sans-serif"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, variable)
    return text
