"""Watchers that draw a run: a live bar in a terminal, plain lines elsewhere."""

import time
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Self

from rich.console import Console, ConsoleOptions, RenderableType
from rich.constrain import Constrain
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Column

from moecl.show import say, show_score
from moecl.train import Watcher


class PlainWatcher(Watcher):
    """A line at a time; of what repeats, one every `every` seconds and the last."""

    def __init__(self, console: Console, every: float = 10.0) -> None:
        self.console, self.every = console, every
        self._said = time.monotonic()
        self._last: tuple[str, int] | None = None
        self._losses: dict[str, str] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing to take off the screen."""

    def say(self, message: str) -> None:
        self._said = time.monotonic()
        say(self.console, message)

    def _due(self, what: str, done: int, last: bool) -> bool:
        """Whether a repeated message is to be said now; it is said once."""
        if self._last == (what, done) or not (last or time.monotonic() - self._said > self.every):
            return False
        self._last = what, done
        return True

    def note(self, message: str) -> None:
        self.say(message)

    def fetching(self, what: str, done: int, total: int) -> None:
        if self._due(what, done, last=self._last is None or self._last[0] != what):
            self.say(f"{what}: {done / 1e6:.0f} of {total / 1e6:.0f} MB" if total > 0 else what)

    def training(self, task: str, step: int, steps: int, figures: Mapping[str, float]) -> None:
        loss = self._loss(task, figures)
        if self._due(task, step, last=step == steps):
            self.say(f"learning {task}: step {step} of {steps}{loss and ', '}{loss}")

    def _loss(self, task: str, figures: Mapping[str, float]) -> str:
        """The newest loss of a task, without the adversary's: not every step tells one."""
        if "task_loss" in figures:
            self._losses[task] = f"loss {figures['task_loss']:.4g}"
        return self._losses.get(task, "")

    def validated(self, task: str, score: float) -> None:
        self.say(f"learning {task}: validation {score:.3f}")

    def evaluating(self, after: int, task: str, done: int, total: int) -> None:
        if self._due(f"testing {task}", done, last=False):
            self.say(f"testing {task}: {done + 1} of {total} tasks")

    def row(self, after: int, tasks: Sequence[str], scores: Sequence[float | None]) -> None:
        cells = ", ".join(f"{task} {show_score(score)}" for task, score in zip(tasks, scores, strict=True))
        self.say(f"{'before any task' if after == 0 else f'after {tasks[after - 1]}'}: {cells}")


class Bar(Progress):
    """Narrower than the screen: behind a full line the echo of ^C would start another, and the bar stay for good."""

    def get_renderable(self) -> RenderableType:
        return Narrowed(super().get_renderable())


class Narrowed:
    def __init__(self, inside: RenderableType) -> None:
        self.inside = inside

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        yield Constrain(self.inside, max(1, options.max_width - 3))


class LiveWatcher(PlainWatcher):
    """One bar for what is under way; what is worth keeping is printed above it."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self.progress = Bar(
            TextColumn("{task.description}", markup=False, table_column=cut_at(24)),
            BarColumn(bar_width=16),
            TextColumn("{task.fields[count]}"),
            TextColumn("{task.fields[figures]}", "dim", markup=False, table_column=cut_at(16)),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        self._bar: TaskID | None = None
        self._shown = ""

    def __enter__(self) -> Self:
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()

    def _show(self, what: str, done: int, total: int, count: str, figures: str = "") -> None:
        """Move the bar; one that is for something else starts anew, and one without a total only moves."""
        if what != self._shown or self._bar is None:
            if self._bar is not None:
                self.progress.remove_task(self._bar)
            self._bar = self.progress.add_task(what, total=total or None, count=count, figures=figures)
            self._shown = what
        self.progress.update(self._bar, completed=done, total=total or None, count=count, figures=figures)

    def fetching(self, what: str, done: int, total: int) -> None:
        self._show(what, done, total, f"{done / 1e6:.0f}/{total / 1e6:.0f} MB" if total > 0 else "")

    def training(self, task: str, step: int, steps: int, figures: Mapping[str, float]) -> None:
        self._show(f"learning {task}", step, steps, f"{step}/{steps}", self._loss(task, figures))

    def evaluating(self, after: int, task: str, done: int, total: int) -> None:
        self._show("testing", done, total, f"{done}/{total}", task)


def cut_at(width: int) -> Column:
    return Column(no_wrap=True, overflow="ellipsis", max_width=width)


def watcher(console: Console) -> PlainWatcher:
    live = console.is_terminal and not console.is_dumb_terminal
    return LiveWatcher(console) if live else PlainWatcher(console)
