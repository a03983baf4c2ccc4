"""`moecl review`: parse, call, print."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from moecl.cli_options import AsJson, Device, MaybeRun
from moecl.errors import ConfigError
from moecl.terminal import watched

if TYPE_CHECKING:
    from rich.table import Table as RichTable

    from moecl.review import Thresholds
    from moecl.review_measure import Pair, Review
    from moecl.review_tables import Table

EXAMPLES = """moecl review runs/mine
moecl review runs/mine --precision 0.95 --confidence 0.95
moecl review runs/mine --against runs/old
moecl review --validation val.jsonl --test test.jsonl --task comments -o review"""

out, err = Console(), Console(stderr=True)


def review(
    run: MaybeRun = None,
    validation: Annotated[
        Path | None, typer.Option("--validation", metavar="FILE", help="Instead of a run: scored validation rows.")
    ] = None,
    test: Annotated[Path | None, typer.Option("--test", metavar="FILE", help="And scored test rows.")] = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option("--task", metavar="NAME", help="Of a run: only this task; repeatable. Of files: their task."),
    ] = None,
    precision: Annotated[
        float, typer.Option("--precision", metavar="SHARE", help="What each class must reach on validation rows.")
    ] = 0.9,
    confidence: Annotated[
        float | None,
        typer.Option("--confidence", metavar="SHARE", help="Let a lower bound reach it, at this confidence."),
    ] = None,
    against: Annotated[
        Path | None, typer.Option("--against", metavar="RUN", help="A second run on the same rows: reviews saved.")
    ] = None,
    rescore: Annotated[
        bool, typer.Option("--rescore", help="Answer anew the rows of tasks that were rolled back since.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="DIR", help="Where files go; default RUN/review.")
    ] = None,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Decide which answers need no human.

    Draws a threshold a class from validation rows, and says what they come to on test rows: how many are decided,
    how many of them rightly, what slips through. Writes thresholds.json (for `moecl predict --thresholds`),
    review.json, review.md and review.html.
    """
    from moecl.review import Target
    from moecl.review_measure import review as reviewed
    from moecl.show import say

    if device != "auto" and not rescore:
        raise ConfigError("--device: is for --rescore; the rows are scored already")
    target = Target.of(precision, confidence)
    pairs, skipped = gathered(run, validation, test, tasks or [], device if rescore else None)
    second, left_out = (None, {}) if against is None else answers_of(against, list(pairs), device if rescore else None)
    thresholds, found = reviewed(pairs, target, skipped, second, left_out)
    names = [path.resolve().name for path in (run or Path("files"), against) if path is not None]
    folder = output or (run / "review" if run else None)
    missing = [] if folder is None else write(folder, thresholds, found, names)
    if as_json:
        print(found.model_dump_json())
    else:
        show(out, found, names)
    where = "no files written; -o DIR writes them" if folder is None else f"written to {folder}"
    for note in [*missing, where]:
        say(err, note)


def gathered(
    run: Path | None, validation: Path | None, test: Path | None, tasks: list[str], rescore_on: str | None
) -> "tuple[dict[str, Pair], dict[str, str]]":
    from moecl.review_rows import check_names, of_files

    if run is not None:
        if validation or test:
            raise ConfigError(f"--{'validation' if validation else 'test'}: is for rows without a run; leave {run} out")
        if tasks:
            check_names(run, tasks)
        return answers_of(run, tasks, rescore_on)
    if rescore_on is not None:
        raise ConfigError("--rescore: needs a run, whose tasks answer the rows; give its folder")
    if validation is None or test is None:
        lacking = "RUN" if not (validation or test) else "--test" if validation else "--validation"
        raise ConfigError(f"{lacking}: missing; give a run folder, or files with --validation and --test")
    if len(tasks) > 1:
        raise ConfigError(f"--task {tasks[1]}: files hold one task; give one name")
    return of_files(validation, test, tasks[0] if tasks else test.name.partition(".")[0]), {}


def answers_of(run: Path, tasks: list[str], rescore_on: str | None) -> "tuple[dict[str, Pair], dict[str, str]]":
    """The scored rows of a run's tasks, answered anew where the run's own do not say how they answer now."""
    from moecl.eval_run import rescorable
    from moecl.review_rows import of_run
    from moecl.using import not_as_tested

    moved = without_rows(run) | not_as_tested(run)
    known = rescorable(run, moved, ("validation", "test"), ["classification"]) if moved else []
    anew = [name for name in known if not tasks or name in tasks]
    if rescore_on is None:
        moved |= {name: f"{moved[name]}; --rescore answers its rows anew" for name in anew}
        anew = []
    return of_run(run, tasks, moved, answered_anew(run, anew, rescore_on or "auto"))


def without_rows(run: Path) -> dict[str, str]:
    """Tasks with rows that the run has not answered: config.yaml may name them since, or is to."""
    from moecl.review_rows import unanswered
    from moecl.run_folder import RunFolder

    folder = RunFolder(run)
    if not folder.exists() or (result := folder.last_result()) is None:
        return {}
    found = {name: reason for name in result.tasks if (reason := unanswered(run, name))}
    for task in folder.config().tasks if found else []:
        if task.name in found and task.kind == "classification" and not (task.validation and task.test):
            found[task.name] += f"; name its rows in {run / 'config.yaml'}, then --rescore"
    return found


def answered_anew(run: Path, names: list[str], device: str) -> "dict[str, Pair]":
    from moecl.eval_run import rescored

    if not names:
        return {}
    with watched(err) as watching:
        return rescored(run, names, device, watching)


def write(folder: Path, thresholds: "Thresholds", found: "Review", names: list[str]) -> list[str]:
    """The files of a review; why one was not written."""
    from moecl._atomic import atomic_write, one_line
    from moecl.review_tables import markdown

    with one_line(folder):
        folder.mkdir(parents=True, exist_ok=True)
    title = f"Review of {names[0]}"
    thresholds.save(folder / "thresholds.json")
    atomic_write(folder / "review.json", found.model_dump_json(indent=1).encode() + b"\n")
    atomic_write(folder / "review.md", markdown(found, title, *names).encode())
    try:
        from moecl.review_page import page

        atomic_write(folder / "review.html", page(found, title, *names).encode())
    except ImportError:
        return ["review.html not written: its plots need matplotlib; pip install 'moecl[report]'"]
    return []


def show(console: Console, found: "Review", names: list[str]) -> None:
    from moecl.review_tables import asked, notes, tables
    from moecl.show import say

    say(console, asked(found.target))
    for table in tables(found, *names):
        say(console, f"\n{table.title}", style="bold")
        console.print(drawn(table))
    for note in notes(found):
        say(console, note, style="yellow")


def drawn(table: "Table") -> "RichTable":
    from rich.table import Table as RichTable
    from rich.text import Text

    first, *others = table.columns
    shown = RichTable(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    shown.add_column(first, overflow="fold")
    for name in others:
        shown.add_column(name, justify="right", no_wrap=True)
    for line in table.lines:
        name, *cells = line.cells
        shown.add_row(Text("  " * line.inner + name), *map(Text, cells), style="" if line.inner else "bold")
    return shown
