"""A store's scores.json: R at the end of its run, and what each version of a task scored when it was learned.

Names, numbers and nothing else of the run: it goes wherever the store goes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from moecl.errors import StoreError
from moecl.results import Result

SCORES = "scores.json"
MOST_IN_R = 25  # tasks, above which R is no table to read, and larger than all else: result.json has it


class Scores(BaseModel):
    """R and metrics as in a result; R is None above MOST_IN_R tasks. `learned`: task -> version -> test score."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1] = 1
    method: str
    seed: int
    tasks: list[str]
    R: list[list[float | None]] | None
    metrics: dict[str, float | None]
    learned: dict[str, dict[int, float | None]]

    @classmethod
    def of(cls, result: Result, newest: Mapping[str, int], before: Scores | None = None) -> Scores:
        """A run's, whose rows and columns are of the `newest` versions; `before` tells of older ones."""
        learned = {} if before is None else {name: dict(own) for name, own in before.learned.items()}
        for place, name in enumerate(result.tasks):
            score = result.R[place + 1][place]
            if score is None:  # methods that learn all tasks together do so in the last row
                score = result.R[-1][place]
            if name in newest and score is not None:
                learned.setdefault(name, {})[newest[name]] = score
        return cls(
            method=result.method,
            seed=result.seed,
            tasks=result.tasks,
            R=result.R if len(result.tasks) <= MOST_IN_R else None,
            metrics=result.metrics,
            learned=learned,
        )

    def only(self, versions: Mapping[str, set[int]]) -> Scores:
        """Without the versions that a store has no more."""
        learned = {
            name: {version: score for version, score in own.items() if version in versions[name]}
            for name, own in self.learned.items()
            if name in versions
        }
        return self.model_copy(update={"learned": learned})

    def score(self, name: str, version: int) -> float | None:
        return self.learned.get(name, {}).get(version)

    def dump(self) -> bytes:
        return self.model_dump_json(indent=1).encode() + b"\n"

    @classmethod
    def load(cls, path: Path) -> Scores:
        """Raises StoreError."""
        remedy = "restore it from a copy of the store, or remove it"
        try:
            return cls.model_validate_json(path.read_bytes())
        except OSError as cause:
            raise StoreError(f"{path}: not readable ({cause.strerror}); change its permissions") from cause
        except ValidationError as cause:
            first = cause.errors(include_url=False)[0]
            field = ".".join(map(str, first["loc"]))
            raise StoreError(f"{path}: {field + ': ' if field else ''}{first['msg']}; {remedy}") from cause
