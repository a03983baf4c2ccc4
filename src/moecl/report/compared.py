"""Several runs side by side."""

from collections.abc import Sequence

from moecl import stats
from moecl._sizes import duration
from moecl.errors import UserError
from moecl.report.page import Table
from moecl.report.ranking import items, last_row
from moecl.report.read import Run
from moecl.report.words import between, number, p_value, score, signed

OTHER_ROWS = ["other test rows", "-", "-"]


def table(runs: Sequence[Run]) -> Table:
    """A run a row; differences to the first, where both were tested on the same rows."""
    rows = [
        [run.name, run.result.method, str(run.result.seed), *_numbers(run), *_difference(runs[0], run)] for run in runs
    ]
    return Table(
        "Runs",
        ["run", "method", "seed", "average accuracy", "95% interval", "BWT", "FWT", "forgetting", "time",
         f"difference to {runs[0].name}", "its 95% interval", "p"],
        rows,
        "Intervals and p: bootstrap over test rows, paired. They do not count how results vary with the seed.",
        words=(1,),
    )  # fmt: skip


def _numbers(run: Run) -> list[str]:
    result = run.result
    cells = items([result])
    sure = stats.interval(stats.bootstrap(cells)) if cells else None
    others = [number(name, result.metrics.get(name)) for name in ("bwt", "fwt", "forgetting")]
    return [score(last_row(result)), between(sure), *others, duration(result.seconds)]


def _difference(first: Run, run: Run) -> list[str]:
    cells = [items([one.result]) for one in (run, first)]
    if run is first or not cells[0] or not cells[1]:
        return ["-", "-", "-"]
    if not all(run.result.tested_as(first.result, task) for task in run.result.tasks):
        return OTHER_ROWS
    try:
        found = stats.paired(cells[0], cells[1])
    except UserError:  # other tasks, or other rows of them: each run stands for itself
        return OTHER_ROWS
    return [signed(found.mean), between((found.low, found.high), signed), p_value(found.p)]
