"""How a bench is drawn: a grid of methods by orders and seeds, live in a terminal, plain lines elsewhere."""

import time
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any, Self

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from moecl._sizes import duration
from moecl.bench import Bench, BenchWatcher
from moecl.bench_record import Cell, Job, Trial
from moecl.show import WIDEST, say, show_score

WAITING = "·"
COLUMN, GAP = 6, 3  # characters that a cell takes, and those beside it


class PlainBench(BenchWatcher):
    """A line whenever a cell begins or ends."""

    def __init__(self, console: Console) -> None:
        self.console, self.begun = console, time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing to take off the screen."""

    def happened(self, bench: Bench, job: Job) -> None:
        if job.status == "running":
            say(self.console, f"{job.id}: started")
        else:
            say(self.console, f"{job.id}: {outcome(job)} ({progress(bench)})")


class LiveBench(PlainBench):
    """The grid, drawn again and again; above it stays what failed."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self.live = Live(console=console, auto_refresh=False, transient=True, vertical_overflow="ellipsis")

    def __enter__(self) -> Self:
        self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.live.stop()

    def happened(self, bench: Bench, job: Job) -> None:
        if job.status == "failed":
            say(self.console, f"{job.id}: {outcome(job)}")
        self.tick(bench)

    def tick(self, bench: Bench) -> None:
        elapsed = duration(time.monotonic() - self.begun)
        lines = [Text(under_way(bench, job), overflow="ellipsis", no_wrap=True) for job in bench.running()]
        self.live.update(Group(Grid(bench), *lines, Text(f"{progress(bench)}, {elapsed} so far")), refresh=True)


class Grid:
    """Methods (rows) by orders and seeds (columns), in as many tables as the width takes."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        bench, config = self.bench, self.bench.config
        columns = [(order, seed) for order in config.orders for seed in config.seeds]
        tuned = config.tune is not None
        name = min(WIDEST, max(len("method"), *map(len, config.methods)))
        fit = max(1, (options.max_width - name - GAP - tuned * (COLUMN + GAP)) // (widest(columns) + GAP))
        for start in range(0, len(columns), fit):
            yield table(bench, columns[start : start + fit], trials=tuned and start == 0)


def widest(columns: list[tuple[str, int]]) -> int:
    return max(max(COLUMN, len(shortened(order)), len(f"seed {seed}")) for order, seed in columns)


def shortened(order: str) -> str:
    return order if len(order) <= 12 else f"{order[:11]}…"


def table(bench: Bench, columns: list[tuple[str, int]], trials: bool) -> Table:
    found = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    found.add_column("method", no_wrap=True, overflow="ellipsis", max_width=WIDEST)
    if trials:
        found.add_column("trials", justify="right", no_wrap=True)
    for order, seed in columns:
        found.add_column(f"{shortened(order)}\nseed {seed}", justify="right", no_wrap=True, min_width=COLUMN)
    cells = {(cell.label, cell.order, cell.seed): cell for cell in bench.cells}
    for label in bench.config.methods:
        row = [show_cell(bench, cells[label, order, seed]) for order, seed in columns]
        found.add_row(Text(label), *([show_trials(bench, label)] if trials else []), *row)
    return found


def show_cell(bench: Bench, cell: Cell) -> Text:
    if cell.status == "done":
        assert cell.result is not None
        return Text(show_score(cell.result.metrics.get("average_accuracy")), "bold")
    if cell.status == "failed":
        return Text("failed", "bold red")
    if cell.status == "running":
        return Text(share(cell, bench.news(cell)), "cyan")
    return Text(WAITING, "dim")


def share(cell: Cell, news: Mapping[str, Any]) -> str:
    """The task under way, of how many: "2/4"."""
    assert cell.stream is not None
    names = [task.name for task in cell.stream.tasks]
    doing = str(news.get("task", ""))
    return f"{names.index(doing) + 1}/{len(names)}" if doing in names else "…"


def show_trials(bench: Bench, label: str) -> Text:
    trials = bench.trials[label]
    if bench.tuned.get(label):
        return Text("chosen", "bold")
    if any(trial.status == "failed" for trial in trials):
        return Text("failed", "bold red")
    done = sum(trial.status == "done" for trial in trials)
    running = any(trial.status == "running" for trial in trials)
    return Text(f"{done}/{len(trials)}", "cyan" if running else "dim")


def under_way(bench: Bench, job: Job) -> str:
    news = bench.news(job)
    what = f"{news['doing']}, step {news['step']} of {news['steps']}" if news.get("doing") else "starting"
    return f"{job.id}: {what}"


def outcome(job: Job) -> str:
    if job.result is None or job.status == "failed":
        return f"failed: {job.reason}"
    if isinstance(job, Trial):
        return f"validation {show_score(job.score)}, {duration(job.result.seconds)}"
    return f"average accuracy {show_score(job.result.metrics.get('average_accuracy'))}, {duration(job.result.seconds)}"


def progress(bench: Bench) -> str:
    jobs, failed = bench.jobs(), len(bench.failed())
    done = sum(job.status == "done" for job in jobs)
    left = bench.seconds_left()
    words = [f"{done} of {len(jobs)} done"]
    if failed:
        words.append(f"{failed} failed")
    if left and done < len(jobs):
        words.append(f"about {duration(left)} left")
    return ", ".join(words)


def show_bench(console: Console, bench: Bench) -> None:
    """The grid, what failed and why, and what was chosen."""
    console.print(Grid(bench))
    for label, tuned in bench.tuned.items():
        if tuned:
            values = ", ".join(f"{key}={value}" for key, value in tuned["chosen"].items()) or "its plain settings"
            say(console, f"{label}: {values}, best of {len(tuned['trials'])} trials on validation rows")
    for job in bench.failed():
        say(console, f"{job.id}: failed: {job.reason}")
    say(console, f"{progress(bench)}; {bench.out / 'bench.json'}")


def bench_watcher(console: Console) -> PlainBench:
    live = console.is_terminal and not console.is_dumb_terminal
    return LiveBench(console) if live else PlainBench(console)
