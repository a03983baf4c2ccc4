"""Plots as inline SVG: text stays text, colours are the page's (light and dark), the same data give the same bytes.

Series differ by colour (Okabe-Ito), marker and line style, and are named where they end.
"""

import io
import re
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from html import escape
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np

from moecl.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
MARKERS, DASHES = "osD^vPX*", ("-", "--", "-.", ":")
INK, MUTED, LINE = "#010203", "#040506", "#070809"  # stand for the page's own, which know light from dark
THEME = {INK: "currentColor", MUTED: "var(--muted)", LINE: "var(--line)"} | {
    colour: f"var(--c{place})" for place, colour in enumerate(SERIES)
}
LOOK: dict[Any, Any] = {
    "svg.fonttype": "none", "font.size": 10, "text.color": INK, "axes.labelcolor": MUTED, "axes.edgecolor": LINE,
    "xtick.color": MUTED, "ytick.color": MUTED, "xtick.labelcolor": MUTED, "ytick.labelcolor": MUTED,
    "axes.grid": True, "grid.color": LINE, "grid.linewidth": 0.7, "axes.spines.top": False, "axes.spines.right": False,
    "axes.axisbelow": True, "text.parse_math": False, "lines.linewidth": 1.8, "lines.markersize": 5,
}  # fmt: skip
MOST_LINES = 8
HEIGHT = 2.8  # of a figure, inches
POINTS = 190  # that its axes are high then, about
MOST_LINEAR = 20  # between the least and the most, above which an axis is logarithmic
LABEL = 11  # points between the names of two series

Series = Mapping[str, tuple[Sequence[float], Sequence[float]]]
Plot = TypeVar("Plot", bound=Callable[..., str])


def drawn(plot: Plot) -> Plot:
    """`plot`, drawn in the look of the page. Raises UserError where Matplotlib is not installed."""

    @wraps(plot)
    def call(name: str, *arguments: Any, **more: Any) -> str:
        try:
            import matplotlib as mpl
        except ImportError:
            raise UserError("report: needs Matplotlib, which is not installed; pip install 'moecl[report]'") from None
        with mpl.rc_context({**LOOK, "svg.hashsalt": name}):
            return plot(name, *arguments, **more)

    return cast(Plot, call)


@drawn
def lines(name: str, alt: str, series: Series, x: str, y: str, ticks: Sequence[str] = ()) -> str:
    """Each series (x values, y values; nan leaves a gap) under its name; of many the mean and the range."""
    figure, axes = _start()
    if len(series) <= MOST_LINES:
        for place, (xs, ys) in enumerate(series.values()):
            axes.plot(xs, ys, MARKERS[place % 8] + DASHES[place % 4], color=SERIES[place % 6])
        _name_ends(axes, {label: _end(xs, ys) for label, (xs, ys) in series.items()})
    else:
        _band(axes, series)
    axes.set(xlabel=x, ylabel=y)
    if ticks:
        step = -(-len(ticks) // 6)
        axes.set_xticks(range(0, len(ticks), step), [_short(one, 10) for one in ticks[::step]])
    return _finish(figure, alt)


@drawn
def intervals(
    name: str, alt: str, rows: Sequence[tuple[str, float, float, float, bool]], x: str, bound: float | None
) -> str:
    """A dot and its interval a row (label, value, low, high, whether it stands out), the first on top."""
    figure, axes = _start(0.9 + 0.27 * len(rows))
    for place, (_, value, low, high, strong) in enumerate(rows):
        colour = SERIES[1] if strong else SERIES[0]
        axes.plot([low, high], [place, place], color=colour, linewidth=3 if strong else 1.8, solid_capstyle="butt")
        axes.plot([value], [place], marker="D" if strong else "o", color=colour)
    axes.set_yticks(range(len(rows)), [_short(row[0], 24) for row in rows], color=INK)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    if bound is not None:
        axes.axvline(bound, color=INK, linestyle="--", linewidth=1)
        axes.annotate(
            "joint bound", (bound, 1), (0, 3), ("data", "axes fraction"), textcoords="offset points", ha="right"
        )
    axes.set(xlabel=x)
    return _finish(figure, alt)


@drawn
def points(name: str, alt: str, found: Sequence[tuple[str, float, float, bool]], x: str, y: str) -> str:
    """A named point each (label, x, y, whether it stands out)."""
    figure, axes = _start(height := max(HEIGHT, 0.17 * len(found)))  # names need room
    for _, right, up, strong in found:
        axes.plot([right], [up], marker="D" if strong else "o", color=SERIES[1] if strong else SERIES[0])
    axes.set(xlabel=x, ylabel=y)
    axes.margins(0.12)
    across = [one[1] for one in found]
    if max(across) > MOST_LINEAR * min(across) > 0:
        axes.set_xscale("log")
    _name_points(axes, {label: (right, up) for label, right, up, _ in found}, height)
    return _finish(figure, alt)


@drawn
def image(name: str, alt: str, values: np.ndarray[Any, Any], x: str, y: str) -> str:
    """A large matrix as colours, without numbers; cells without a value stay empty."""
    figure, axes = _start(4.2)
    shown = axes.imshow(values, cmap="cividis", vmin=0, vmax=1, interpolation="nearest", aspect="auto")
    axes.grid(visible=False)
    axes.set(xlabel=x, ylabel=y)
    figure.colorbar(shown, ax=axes, shrink=0.7).outline.set_visible(False)
    return _finish(figure, alt)


def _start(height: float = HEIGHT) -> "tuple[Figure, Axes]":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, height), layout="constrained")
    return figure, figure.add_subplot()


def _end(xs: Sequence[float], ys: Sequence[float]) -> tuple[float, float] | None:
    known = [(a, b) for a, b in zip(xs, ys, strict=True) if b is not None and np.isfinite(b)]
    return known[-1] if known else None


def _name_ends(axes: "Axes", series: Mapping[str, tuple[float, float] | None]) -> None:
    """Names in the margin, in the colours of their lines, pushed apart where two end side by side."""
    colours = {label: SERIES[place % 6] for place, label in enumerate(series)}
    ends = {label: end for label, end in series.items() if end}
    right = max((x for x, _ in ends.values()), default=0)
    low, high = axes.get_ylim()
    scale = POINTS / (high - low)  # points a unit
    heights = _apart({label: y * scale for label, (_, y) in ends.items()})
    for label, (x, y) in ends.items():
        offset = (10 if x == right else 6, heights[label] - y * scale)
        axes.annotate(
            _short(label, 18), (x, y), offset, textcoords="offset points", va="center", color=colours[label],
            annotation_clip=False,
        )  # fmt: skip


def _name_points(axes: "Axes", found: Mapping[str, tuple[float, float]], height: float) -> None:
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    scale = POINTS * height / HEIGHT / (high - low)
    heights = _apart({label: y * scale for label, (_, y) in found.items()})
    for label, (x, y) in found.items():
        inward = x > left + 0.6 * (right - left)
        axes.annotate(
            _short(label, 22), (x, y), (-9 if inward else 9, heights[label] - y * scale), textcoords="offset points",
            ha="right" if inward else "left", va="center",
        )  # fmt: skip


def _apart(heights: Mapping[str, float]) -> dict[str, float]:
    """Heights at least a label apart, moved as little as a pass up and its mirror allow.

    >>> _apart({"a": 0.0, "b": 1.0, "c": 50.0})
    {'a': -5.0, 'b': 6.0, 'c': 50.0}
    """
    order = sorted(heights, key=lambda label: heights[label])
    groups: list[tuple[float, list[str]]] = []  # the middle of a block of labels that stand close, and they
    for label in order:
        groups.append((heights[label], [label]))
        while len(groups) > 1 and _gap(groups[-2], groups[-1]) < LABEL:
            (_, first), (_, second) = groups[-2:]
            both = first + second
            groups[-2:] = [(sum(heights[one] for one in both) / len(both), both)]
    return {
        label: middle + LABEL * (place - (len(block) - 1) / 2)
        for middle, block in groups
        for place, label in enumerate(block)
    }


def _gap(below: tuple[float, list[str]], above: tuple[float, list[str]]) -> float:
    return (above[0] - LABEL * (len(above[1]) - 1) / 2) - (below[0] + LABEL * (len(below[1]) - 1) / 2)


def _band(axes: "Axes", series: Series) -> None:
    places = sorted({x for xs, _ in series.values() for x in xs})
    table = np.full((len(series), len(places)), np.nan)
    column = {x: place for place, x in enumerate(places)}
    for row, (xs, ys) in enumerate(series.values()):
        table[row, [column[x] for x in xs]] = np.asarray(ys, dtype=np.float64)
    known = ~np.isnan(table).all(axis=0)
    table, at = table[:, known], np.asarray(places)[known]
    axes.fill_between(at, np.nanmin(table, axis=0), np.nanmax(table, axis=0), color=SERIES[0], alpha=0.15, linewidth=0)
    axes.plot(at, np.nanmean(table, axis=0), color=SERIES[0])
    if len(at):
        _name_ends(axes, {"mean": (at[-1], float(np.nanmean(table[:, -1])))})


def _finish(figure: "Figure", alt: str) -> str:
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    used = set(re.findall(r"(?:url\(|href=\")#([^)\"]+)", svg))
    svg = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in used else "", svg)
    for colour, theirs in THEME.items():
        svg = svg.replace(colour, theirs)
    svg = re.sub(r"<!--.*?-->\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r'^(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'^(<svg[^>]*?) height="[^"]*"', r"\1", svg))
    return svg.replace("<svg", f'<svg role="img" aria-label="{escape(alt)}"', 1).rstrip()


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"
