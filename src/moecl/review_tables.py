"""The tables of a review, as texts: for the terminal, a page and Markdown alike."""

from collections.abc import Iterator
from dataclasses import dataclass

from moecl._markdown import escaped
from moecl.review import Target
from moecl.review_measure import Against, Change, ClassReview, Decided, GroupReview, Review

TOTAL = "all tasks"


@dataclass(frozen=True, slots=True)
class Line:
    """A row of texts; `inner` is one of the lines that the one before is made of."""

    cells: tuple[str, ...]
    inner: bool = False


@dataclass(frozen=True, slots=True)
class Table:
    title: str
    columns: tuple[str, ...]  # a line break where a narrow column may have one
    lines: list[Line]


def tables(review: Review, a: str = "A", b: str = "B") -> list[Table]:
    """What was decided, A against B where there is a B, calibration; `a` and `b` are the runs' names."""
    versus = [] if review.against is None else [against_table(review.against, a, b), slipped_table(review.against)]
    return [decided_table(review), *versus, calibration_table(review)]


def asked(target: Target) -> str:
    sure = "" if target.confidence is None else f" with {target.confidence:.4g} confidence"
    return f"thresholds: precision {target.precision:.4g} of each class on validation rows{sure}"


def notes(review: Review) -> list[str]:
    """What a reader should not miss."""
    missed = [
        f"{name}: {label} {show(found.precision)}"
        for name, task in review.tasks.items()
        for label, found in task.classes.items()
        if found.precision is not None and found.precision < review.target.precision
    ]
    below = [f"below the target on test rows: {', '.join(missed)}"] if missed else []
    if review.seen:
        below.append(f"flattered, as the test rows are the validation rows: {', '.join(review.seen)}")
    if review.against:
        below += [f"not compared: {name}: {reason}" for name, reason in review.against.skipped.items()]
    return below + [f"skipped {name}: {reason}" for name, reason in review.skipped.items()]


def decided_table(review: Review) -> Table:
    columns = ("task and class", "least\nshare", "decided", "stripping\nrate", "precision\n(95 %)", "slipped")
    return Table("Test rows decided without a human", columns, [*_decided_lines(review)])


def _decided_lines(review: Review) -> Iterator[Line]:
    for name, task in review.tasks.items():
        yield _overall(name, task)
        for label, found in task.classes.items():
            level = task.thresholds[label]
            yield _of_class(label, found, "never" if level is None else f"{level:.4g}")
    if len(review.tasks) > 1:
        yield _overall(TOTAL, review.total)
        for label, found in review.total.classes.items():
            yield _of_class(label, found, "")


def _overall(name: str, found: GroupReview) -> Line:
    return Line((name, "", f"{found.decided}/{found.rows}", percent(found.stripping_rate), precision(found), ""))


def _of_class(label: str, found: ClassReview, level: str) -> Line:
    cells = (
        label,
        level,
        str(found.decided),
        percent(found.stripping_rate),
        precision(found),
        percent(found.slip_rate),
    )
    return Line(cells, inner=True)


def against_table(against: Against, a: str, b: str) -> Table:
    columns = ("task", "rate\nA", "rate\nB", "A - B in points\n(95 %)", "saved\nin 1000", "precision\nA, B")
    lines = [_change(name, found) for name, found in _changes(against).items()]
    return Table(f"A {a} against B {b}", columns, lines)


def slipped_table(against: Against) -> Table:
    """Fewer reviews are no gain where more slips: the class of which the greatest share does, on either side."""
    lines = [Line((name, *slipped_most(found))) for name, found in _changes(against).items()]
    return Table("The class that slips most", ("task", "class", "A", "B"), lines)


def _changes(against: Against) -> dict[str, Change]:
    return {**against.tasks, **({TOTAL: against.total} if len(against.tasks) > 1 else {})}


def _change(name: str, found: Change) -> Line:
    middle, low, high = (round(100 * share, 1) + 0.0 for share in (found.difference, *found.interval))  # no -0.0
    difference = f"{middle:+.1f} ({low:+.1f}, {high:+.1f})"
    rates = [percent(one.stripping_rate) for one in (found.a, found.b)]
    precisions = ", ".join(show(one.precision) for one in (found.a, found.b))
    return Line((name, *rates, difference, f"{round(found.saved_per_1000)}", precisions))


def slipped_most(found: Change) -> tuple[str, str, str]:
    """A class, and of its rows the share that is decided as another by A and by B."""
    rates = {
        label: [side.classes[label].slip_rate for side in (found.a, found.b)]
        for label in found.a.classes
        if label in found.b.classes
    }
    worst = max(rates, key=lambda label: max(rate or 0.0 for rate in rates[label]), default=None)
    if worst is None:
        return "-", "-", "-"
    first, second = rates[worst]
    return worst, percent(first), percent(second)


def calibration_table(review: Review) -> Table:
    columns = ("task", "mean\nshare", "accuracy", "calibration\nerror")
    lines = [
        Line((name, show(task.mean_share), show(task.accuracy), show(task.calibration_error)))
        for name, task in review.tasks.items()
    ]
    return Table("Share of probability of all answers, and how many are right", columns, lines)


def precision(found: Decided) -> str:
    if found.interval is None:
        return "-"
    low, high = (f"{end:.3f}".removeprefix("0") for end in found.interval)
    return f"{show(found.precision)} ({low}-{high})"


def show(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def markdown(review: Review, title: str, a: str = "A", b: str = "B") -> str:
    """review.md."""
    parts = [f"# {escaped(title)}", asked(review.target)]
    for table in tables(review, a, b):
        rows = [tuple(escaped(cell) for cell in line.cells) for line in table.lines]
        rows = [
            (f"– {first}" if line.inner else f"**{first}**", *rest)
            for line, (first, *rest) in zip(table.lines, rows, strict=True)
        ]
        columns = tuple(" ".join(name.split()) for name in table.columns)
        sides = ("---", *("---:" for _ in table.columns[1:]))
        parts += [
            f"## {escaped(table.title)}",
            "\n".join(f"| {' | '.join(cells)} |" for cells in (columns, sides, *rows)),
        ]
    parts += [f"- {escaped(note)}" for note in notes(review)]
    return "\n\n".join(parts) + "\n"
