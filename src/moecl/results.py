"""What a run leaves behind: result.json, with a schema version.

JSON has no NaN: what was not measured is null, in R and everywhere else.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

import numpy as np
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from moecl import metrics
from moecl._atomic import atomic_write
from moecl._yaml import dotted
from moecl.errors import RunError

SCHEMA: Final = 1
MOST_SHOWN = 25  # tasks: a larger R is no table to read, and larger than all else of a model card


def _plain(value: Any) -> Any:
    """`value` as JSON can hold it: arrays as lists, NaN and infinities as None."""
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        # R has a million cells after a thousand tasks: what is plain already is not looked at twice.
        return [one if one is None or (type(one) is float and math.isfinite(one)) else _plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


Plain = BeforeValidator(_plain)
Details = Annotated[dict[str, Any], Plain]


class SplitInfo(BaseModel):
    """The rows of a split that a run used."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sha256: str = Field(description="of the rows that were used")
    rows: int = Field(ge=0, description="how many")
    cut: int = Field(default=0, ge=0, description="how many of them were longer than max_length")


class Items(BaseModel):
    """What a task's last row of R was computed from, a test row each: a stream's methods are compared item by item."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    metric: str = Field(description="the task's metric")
    labels: list[str] = Field(default_factory=list, description="a classification's labels")
    true: list[int] = Field(default_factory=list, description="each row's label, as its place in `labels`")
    given: list[int] = Field(default_factory=list, description="each row's answer, likewise")
    scores: list[float] = Field(default_factory=list, description="each row's own score, where the answer is a text")


class Result(BaseModel):
    """One run: a stream learned by one method with one seed.

    R: (T + 1) x T scores, row 0 before any task, None where not measured; nan is taken for None.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, validate_by_name=True, validate_by_alias=True)

    # pydantic's own `schema` keeps the attribute from being called what the file calls it.
    schema_version: Literal[1] = Field(default=SCHEMA, alias="schema", description="version of this format")
    name: str | None = Field(default=None, description="the run's name")
    method: str = Field(description="the method's name in the registry")
    seed: int = Field(description="the seed")
    tasks: list[str] = Field(description="names, in the order in which they were learned")
    R: Annotated[list[list[float | None]], Plain] = Field(description="the score matrix")
    metrics: Annotated[dict[str, float | None], Plain] = Field(
        default_factory=dict, description="the numbers of metrics.summary; computed from R where not given"
    )
    seconds: float = Field(ge=0, description="wall-clock time of the whole run, resumptions added up")
    data: dict[str, dict[str, SplitInfo]] = Field(default_factory=dict, description="task -> split -> its rows")
    details: Annotated[dict[str, Details], Plain] = Field(
        default_factory=dict, description="task -> what else is known"
    )
    items: dict[str, Items] = Field(default_factory=dict, description="task -> its test rows after the last task")
    environment: Details = Field(default_factory=dict, description="versions, device, dtype, threads")
    digests: dict[str, dict[str, str]] = Field(default_factory=dict, description="task -> part -> sha256")
    superseded: dict[str, float | None] = Field(
        default_factory=dict, description="NAME@VERSION of a task that was learned again -> its last score"
    )
    resumed: int = Field(default=0, ge=0, description="how often the run was started again")

    @model_validator(mode="before")
    @classmethod
    def _compute_metrics(cls, data: Any) -> Any:
        if isinstance(data, dict) and not data.get("metrics") and "R" in data:
            names, old = data.get("tasks", []), data.get("superseded", {})
            before = {reference.rpartition("@")[0] for reference in old} if isinstance(old, dict) else set()
            again = [place for place, name in enumerate(names) if name in before]
            return {**data, "metrics": metrics.summary(data["R"], again)}
        return data

    @model_validator(mode="after")
    def _shapes_agree(self) -> Self:
        rows, columns = len(self.tasks) + 1, len(self.tasks)
        if len(self.R) != rows or any(len(row) != columns for row in self.R):
            raise ValueError(f"R must have {rows} rows of {columns} scores, for {columns} tasks")
        return self

    def save(self, path: str | Path) -> None:
        """Write the file as a whole or not at all.

        Raises:
            RunError: it cannot be written.
        """
        fields = self.model_dump(mode="json", by_alias=True)
        written = {
            key: json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False)
            for key, value in fields.items()
            if key != "R"
        }
        written["R"] = "[\n" + ",\n".join(json.dumps(row, allow_nan=False) for row in self.R) + "\n]"
        text = ",\n".join(f"{json.dumps(key)}: {written[key]}" for key in fields)
        atomic_write(Path(path), f"{{\n{text}\n}}\n".encode())

    def tested_as(self, other: "Result", task: str) -> bool:
        """Whether both were tested on the same rows of a task, as far as their digests tell."""
        return len({one.test_rows(task) for one in (self, other)} - {None}) < 2

    def test_rows(self, task: str) -> str | None:
        """The sha256 of the rows that a task was tested on, where it is known."""
        tested = self.data.get(task, {}).get("test")
        return None if tested is None else tested.sha256

    def is_about(self, name: str, parts: Mapping[str, str]) -> bool | None:
        """Whether a task that is made of these parts is the one that was tested last; None where it is not known."""
        return None if name not in self.digests else self.digests[name] == dict(parts)

    def score_of(self, name: str, version: int, parts: Mapping[str, str]) -> float | None:
        """What a version scored: after the last task where R is about it, else before it was learned again."""
        if self.is_about(name, parts):
            return self.R[-1][self.tasks.index(name)]
        return self.superseded.get(f"{name}@{version}")

    def markdown(self) -> str:
        """The numbers computed from R, and R as a table where it has at most MOST_SHOWN tasks, for a model card."""

        def shown(value: float | None) -> str:
            return "-" if value is None else f"{value:.3f}"

        numbers = ", ".join(f"{name.replace('_', ' ')} {shown(value)}" for name, value in self.metrics.items())
        told = f"Learned by {self.method}, seed {self.seed}: {numbers}."
        if len(self.tasks) > MOST_SHOWN:
            return told
        rows = zip(("(before any)", *self.tasks), self.R, strict=True)
        table = [
            f"| after | {' | '.join(self.tasks)} |",
            f"|---|{'---|' * len(self.tasks)}",
            *(f"| {after} | {' | '.join(map(shown, row))} |" for after, row in rows),
        ]
        return "\n".join([told, "", "A row a task learned, a column a task tested:", "", *table])

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote.

        Raises:
            RunError: the file is missing, damaged or of another schema version.
        """
        data = _read_json(path)
        version = data.get("schema")
        if version != SCHEMA:
            remedy = "upgrade moecl" if isinstance(version, int) and version > SCHEMA else "run again"
            raise RunError(f"{path}: schema: {version!r} is not {SCHEMA}, which this moecl reads; {remedy}")
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            first = error.errors()[0]
            place = ": ".join(part for part in (str(path), dotted(first["loc"]), first["msg"]) if part)
            raise RunError(f"{place}; the file was altered, run again or restore it") from None


def _read_json(path: str | Path) -> dict[str, Any]:
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunError(f"{path}: no such file; the run has no result yet, or this is no run folder") from None
    except OSError as error:
        raise RunError(f"{path}: cannot be read ({error.strerror}); check the path and its permissions") from None
    except json.JSONDecodeError as error:
        raise RunError(f"{path}:{error.lineno}: is not JSON ({error.msg}); run again or restore the file") from None
    except UnicodeDecodeError:
        raise RunError(f"{path}: is not UTF-8 text; run again or restore the file") from None
    if not isinstance(data, dict):
        raise RunError(f"{path}: holds no result; run again or restore the file")
    return data
