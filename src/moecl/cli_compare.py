"""`moecl compare`: parse, call, print."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from moecl.cli_options import AsJson, Device
from moecl.errors import ConfigError, DataError, RunError
from moecl.terminal import quietly, watched

if TYPE_CHECKING:
    from moecl.compare import Comparison, Decides, TaskChange, TextLosses
    from moecl.results import Result
    from moecl.store import Store

EXAMPLES = """moecl compare runs/released runs/candidate
moecl compare runs/released runs/candidate --max-drop 0.02 --confident -o compare.json
moecl compare runs/released runs/candidate --general texts.txt
moecl compare runs/released runs/candidate --general texts.txt --route auto"""
FAILED = 3

out, err = Console(), Console(stderr=True)


def compare(
    old: Annotated[
        Path, typer.Argument(metavar="OLD", help="What must not be lost: a run folder, a bench's cell, a result.json.")
    ],
    new: Annotated[Path, typer.Argument(metavar="NEW", help="What is to take its place, likewise.")],
    max_drop: Annotated[
        float, typer.Option("--max-drop", metavar="SHARE", help="By how much a score may fall; 0.01 is a point.")
    ] = 0.01,
    strict: Annotated[
        bool, typer.Option("--strict", help="Fail where the interval reaches below -SHARE: a drop is not ruled out.")
    ] = False,
    confident: Annotated[
        bool, typer.Option("--confident", help="Fail only where the whole interval is below it: a drop is certain.")
    ] = False,
    general: Annotated[
        Path | None,
        typer.Option("--general", metavar="FILE", help='Texts of no task too: JSONL with "text", or one a line.'),
    ] = None,
    route: Annotated[
        str | None,
        typer.Option(
            "--route", metavar="auto", help="For --general: as each text's own task has it; default the base."
        ),
    ] = None,
    rescore: Annotated[
        bool, typer.Option("--rescore", help="Answer anew the test rows of tasks that were rolled back since.")
    ] = False,
    device: Device = "auto",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write the JSON there, too.")
    ] = None,
    as_json: AsJson = False,
) -> int:
    """Check that a newer run lost no task.

    Exit 0, or 3 where one failed. A task fails if its score in NEW is more than SHARE below OLD's: the difference
    itself decides, unless --strict or --confident lets its 95% interval (bootstrap over test rows, paired) do so. A
    task fails too that NEW lacks, or that does not answer as it was tested (see --rescore); a new one is shown. Both
    runs must have been tested on the same rows, else exit 2.

    --general: mean log p a token under the base of each run, read on --device; it fails where the loss rises by more
    than that share.
    With --route auto under the task that each run's router finds a text to be for, and under the base for none.
    """
    from moecl.compare import Comparison, compare_tasks, compare_texts, failed, read_result, to_json
    from moecl.config import AUTO

    if strict and confident:
        raise ConfigError("--strict, --confident: they contradict each other; give one")
    if output is not None and not output.absolute().parent.is_dir():
        raise RunError(f"-o {output}: no folder {output.parent}; make it first")
    if route is not None and (route != AUTO or general is None):
        raise ConfigError("--route: it is auto or not given, and needs --general FILE")
    decides: Decides = "strict" if strict else "confident" if confident else "point"
    if device != "auto" and general is None and not rescore:
        raise ConfigError("--device: is for --general FILE and --rescore; the results are scored already")
    (before, passed), (after, gone) = (tested(path, read_result(path), rescore, device) for path in (old, new))
    tasks = compare_tasks(before, after, max_drop, decides, gone, passed)
    texts = None
    if general is not None:
        texts = compare_texts(*predicted(general, old, new, device, route), max_drop, decides)
    found = Comparison(
        old=str(old),
        new=str(new),
        max_drop=max_drop,
        decides=decides,
        tasks=tasks,
        general=texts,
        failed=failed(tasks, texts),
    )
    if output is not None:
        from moecl._atomic import atomic_write

        atomic_write(output, to_json(found).encode() + b"\n")
    print(to_json(found)) if as_json else show(out, found)
    if not found.failed:
        return 0
    from moecl.show import say

    say(err, f"moecl: failed: {', '.join(found.failed)}{swapped(tasks)}")
    return FAILED


def tested(path: Path, result: "Result", rescore: bool, device: str) -> "tuple[Result, dict[str, str]]":
    """A result, and why tasks do not answer as it says; with `rescore` as they answer now, where they do."""
    from moecl.config import TASK_METRICS
    from moecl.eval_run import rescorable, retested
    from moecl.using import not_as_tested

    run = path if path.is_dir() else path.parent
    if not (moved := not_as_tested(run, result)):
        return result, {}
    anew = rescorable(run, moved, ["test"], TASK_METRICS)
    if not rescore:
        return result, moved | {name: f"{moved[name]} (--rescore answers its rows anew)" for name in anew}
    if not anew:
        return result, moved
    with watched(err) as watching:
        result = retested(run, result, anew, device, watching)
    return result, {name: why for name, why in moved.items() if name not in anew}


def swapped(tasks: "list[TaskChange]") -> str:
    """A question, where OLD has learned more than NEW and all else is in both."""
    reasons = {one.reason for one in tasks}
    return " (are OLD and NEW the right way round?)" if "not in NEW" in reasons and "not in OLD" not in reasons else ""


def predicted(file: Path, old: Path, new: Path, device: str, route: str | None) -> "tuple[TextLosses, TextLosses]":
    """The texts' losses under the base of each run, or under the task that its router finds."""
    from moecl.using import open_store

    texts = read_texts(file)
    stores = [open_store(path if path.is_dir() else path.parent) for path in (old, new)]
    with quietly(), err.status("reading the texts"):
        before, after = (losses_of(texts, store, device, route) for store in stores)
    return before, after


def losses_of(texts: list[str], store: "Store", device: str, route: str | None) -> "TextLosses":
    from moecl.engine import Engine
    from moecl.general import text_losses
    from moecl.using import load, router_of

    model = load(store, device)
    try:
        names = [one.task for one in router_of(model, store).route(texts)] if route else None
        return text_losses(Engine(model), texts, names)
    finally:
        model.detach()  # hooks hold the model in a cycle, and there may be no room for two


def read_texts(file: Path) -> list[str]:
    from moecl.config import Task
    from moecl.data.task import example
    from moecl.predict_lines import rows_of

    task = Task(name="general", kind="classification", instruction="{text}")
    with rows_of(file) as rows:
        texts = [example(row, task, place).text or "" for place, row in rows]
    if not texts:
        raise DataError(f"--general {file}: the file is empty; give texts, one a line")
    return texts


def show(console: Console, found: "Comparison") -> None:
    from moecl.show import plain_table, say, show_score

    sides = dict.fromkeys(("rows", "old", "new", "change"), "right") | dict.fromkeys(
        ("95% interval", "verdict"), "left"
    )
    table = plain_table("task", **sides)
    for one in found.tasks:
        verdict = one.verdict or "-"
        table.add_row(
            one.task,
            str(one.rows),
            show_score(one.old),
            show_score(one.new),
            signed(one.difference),
            within(one.low, one.high),
            f"{verdict}: {one.reason}" if one.reason else verdict,
            style="red" if verdict == "fail" else "",
        )
    console.print(table)
    if (texts := found.general) is not None:
        cut = f", {texts.cut} of them cut" if texts.cut else ""
        read = f"{texts.texts} texts, {texts.tokens} tokens{cut}"
        say(
            console,
            f"general: log p a token {texts.new:.4f}, was {texts.old:.4f}; loss {texts.increase:+.2%} "
            f"({texts.low:+.2%} to {texts.high:+.2%}), {texts.verdict}: {read}",
        )
    rule = {"point": "the change", "strict": "the interval's low end", "confident": "the interval's high end"}
    say(console, f"allowed: a drop of {found.max_drop:g}; what decides is {rule[found.decides]}")


def signed(value: float | None) -> str:
    return "-" if value is None else f"{round(value, 3) + 0.0:+.3f}"


def within(low: float | None, high: float | None) -> str:
    return "-" if low is None or high is None else f"{signed(low)} to {signed(high)}"
