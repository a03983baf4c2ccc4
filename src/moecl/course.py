"""What a run is made of while it is under way: its tasks, how far it is, and who is told."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from moecl.config import Task
from moecl.data.encode import Encoded
from moecl.data.task import Split, TaskData

Scored = tuple[Split, list[Encoded]]


class Watcher:
    """Told what happens; draws nothing. The command line has ones that do."""

    def note(self, message: str) -> None: ...

    def fetching(self, what: str, done: int, total: int) -> None: ...

    def training(self, task: str, step: int, steps: int, figures: Mapping[str, float]) -> None: ...

    def validated(self, task: str, score: float) -> None: ...

    def evaluating(self, after: int, task: str, done: int, total: int) -> None: ...

    def row(self, after: int, tasks: Sequence[str], scores: Sequence[float | None]) -> None: ...


@dataclass
class Course:
    """One task as the run sees it. A learned task keeps only what scores it: splits, with their rows encoded."""

    task: Task
    data: TaskData | None = None  # None once learned
    train: list[Encoded] = field(default_factory=list)
    validation: Scored | None = None
    test: Scored | None = None

    @property
    def name(self) -> str:
        return self.task.name


@dataclass
class Progress:
    """How far a run is, beside what its store tells. `versions`: those of tasks that are learned again."""

    R: list[list[float | None]] = field(default_factory=list)
    data: dict[str, dict[str, Any]] = field(default_factory=dict)
    details: dict[str, dict[str, Any]] = field(default_factory=dict)
    versions: dict[str, int] = field(default_factory=dict)
    items: dict[str, dict[str, Any]] = field(default_factory=dict)  # the result's, once the last row is measured
    superseded: dict[str, float | None] = field(default_factory=dict)  # the result's
    seconds: float = 0.0
    resumed: int = 0
    reopened: dict[str, Any] | None = None  # run_folder's: what the run was before it had more to learn
