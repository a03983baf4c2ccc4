"""What answering without a task costs: routing.json, which `moecl eval RUN --task auto` writes and a report shows."""

from pathlib import Path
from typing import Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from moecl._atomic import atomic_write
from moecl._yaml import dotted
from moecl.errors import RunError

ROUTING: Final = "routing.json"


class _Strict(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, validate_by_name=True, validate_by_alias=True
    )


class TaskRouting(_Strict):
    """A task's rows, answered with and without its name; shares of its rows."""

    task: str
    metric: str
    rows: int
    with_task: float = Field(description="the score where the task is given")
    without_task: float = Field(description="where the router finds it; a row of no task counts as answered wrong")
    routed: float = Field(description="share sent to this task")
    unknown: float = Field(description="share taken to be of no task")
    left_out: float | None = Field(
        default=None, description="share accepted where this task is left out: false accepts"
    )


class Point(_Strict):
    """What a threshold of familiarity would do."""

    threshold: float
    coverage: float = Field(description="share of the tasks' own rows that is accepted, each task counting alike")
    score: float | None = Field(default=None, description="mean score of the rows that are accepted")
    false_accept: float | None = Field(default=None, description="share of rows accepted whose task is left out")


class Routing(_Strict):
    """`digests`: task -> part -> sha256 of what was measured, as in result.json."""

    schema_version: Literal[1] = Field(default=1, alias="schema")
    split: str
    wanted: float = Field(description="the false-accept rate that the threshold is set for")
    threshold: float | None = Field(default=None, description="null: only what lies far from all tasks is unknown")
    tasks: list[TaskRouting]
    curve: list[Point]
    digests: dict[str, dict[str, str]]

    def save(self, run: Path) -> None:
        atomic_write(run / ROUTING, self.model_dump_json(by_alias=True, indent=1).encode() + b"\n")

    @classmethod
    def load(cls, run: Path) -> Self | None:
        """None where it was not measured. Raises RunError for a damaged file."""
        path = run / ROUTING
        if not path.is_file():
            return None
        try:
            return cls.model_validate_json(path.read_bytes())
        except ValidationError as error:
            first = error.errors()[0]
            place = ": ".join(part for part in (str(path), dotted(first["loc"]), first["msg"]) if part)
            raise RunError(f"{place}; measure it again with `moecl eval {run} --task auto`") from None
