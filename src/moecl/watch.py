"""Watchers that draw a run: live bars in a terminal, plain lines elsewhere."""

import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from moecl.train import Watcher


class PlainWatcher(Watcher):
    """A line at a time, none more often than `every` seconds for what repeats."""

    def __init__(self, console: Console, every: float = 10.0) -> None:
        self.console, self.every = console, every
        self._said = time.monotonic()
        self._loss = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        pass

    def say(self, message: str) -> None:
        self.console.print(message, highlight=False, markup=False, soft_wrap=True)

    def note(self, message: str) -> None:
        self.say(message)

    def fetching(self, what: str, done: int, total: int) -> None:
        if done and done == total:
            self.say(f"{what}: {total / 1e6:.0f} MB")

    def training(self, task: str, step: int, steps: int, figures: Mapping[str, float]) -> None:
        if "loss" in figures:
            self._loss = f", loss {figures['loss']:.3f}"
        if step == steps or time.monotonic() - self._said > self.every:
            self._said = time.monotonic()
            self.say(f"learning {task}: step {step} of {steps}{self._loss}")

    def validated(self, task: str, score: float) -> None:
        self.say(f"learning {task}: validation {score:.3f}")

    def evaluating(self, after: int, task: str, done: int, total: int) -> None:
        pass

    def row(self, after: int, tasks: Sequence[str], scores: Sequence[float | None]) -> None:
        cells = ", ".join(f"{task} {show_score(score)}" for task, score in zip(tasks, scores, strict=True))
        self.say(f"{'before any task' if after == 0 else f'after {tasks[after - 1]}'}: {cells}")


class LiveWatcher(PlainWatcher):
    """One bar for what is under way; what is worth keeping is printed above it."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TextColumn("{task.fields[figures]}", style="dim"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        self._bar: TaskID | None = None
        self._shown = ""

    def __enter__(self) -> Self:
        self.progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.progress.stop()

    def _show(self, what: str, done: int, total: int, figures: str = "") -> None:
        if what != self._shown:
            if self._bar is not None:
                self.progress.remove_task(self._bar)
            self._bar, self._shown = self.progress.add_task(what, total=total or None, figures=""), what
        assert self._bar is not None
        self.progress.update(self._bar, completed=done, total=total or None, figures=figures)

    def fetching(self, what: str, done: int, total: int) -> None:
        self._show(what, done // 1_000_000, total // 1_000_000, "MB")
        super().fetching(what, done, total)

    def training(self, task: str, step: int, steps: int, figures: Mapping[str, float]) -> None:
        if "loss" in figures:
            self._loss = f"loss {figures['loss']:.3f}"
        self._show(f"learning {task}", step, steps, self._loss)

    def evaluating(self, after: int, task: str, done: int, total: int) -> None:
        self._show("testing", done, total, task)


def watcher(console: Console) -> LiveWatcher | PlainWatcher:
    return LiveWatcher(console) if console.is_terminal else PlainWatcher(console)


def show_score(score: float | None) -> str:
    return "-" if score is None else f"{score:.3f}"
