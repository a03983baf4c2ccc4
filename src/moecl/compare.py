"""Two runs task by task: did the newer one lose anything? A gate for a job that guards old tasks.

The difference of a task is paired over its test rows (stats.py), which both runs must have been tested on.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from moecl.errors import RunError, UserError, near
from moecl.results import Result
from moecl.run_folder import CONFIG, RESULT, RunFolder, refuse_bench
from moecl.stats import interval, paired_task

Decides = Literal["point", "strict", "confident"]
Verdict = Literal["pass", "fail"]
DRAWS = 2000


class Lines(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TaskChange(Lines):
    """One task in both runs; `difference` is new less old, `low` and `high` its 95% interval over test rows."""

    task: str
    metric: str
    rows: int
    old: float | None = None
    new: float | None = None
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    verdict: Verdict | None = Field(default=None, description="null where there is nothing to lose")
    reason: str | None = Field(default=None, description="why a task has no difference")


class TextChange(Lines):
    """Texts of no task: mean log p a token, and by what share of the old loss the new one is higher."""

    texts: int
    tokens: int
    cut: int
    old: float
    new: float
    increase: float
    low: float
    high: float
    verdict: Verdict


class Comparison(Lines):
    """What `moecl compare` found; `failed` names what fell, the texts as `--general`."""

    schema_version: Literal[1] = Field(default=1, serialization_alias="schema")
    old: str
    new: str
    max_drop: float
    decides: Decides
    tasks: list[TaskChange]
    general: TextChange | None = None
    failed: list[str]


class TextLosses(Lines):
    """How well texts are predicted, a text each: -log p summed over its tokens, and how many these are."""

    losses: list[float]
    tokens: list[int]
    cut: int = Field(default=0, description="texts that were longer than what is read of one")


def read_result(path: Path) -> Result:
    """The result of a run folder, a bench's cell or a result.json. Raises RunError for anything else."""
    if path.is_dir():
        if (found := RunFolder(path).last_result()) is not None:
            return found
        refuse_bench(path)
        if (path / CONFIG).is_file():
            raise RunError(f"{path}: has no result yet; go on with the command that started it")
        raise RunError(f"{path}: not a run folder (no {RESULT}); give one that `moecl train STREAM -o RUN` has made")
    if not path.exists():
        siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        raise RunError(f"{path}: no such file or folder{near(path.name, siblings)}; give a run folder or a {RESULT}")
    return Result.load(path)


def compare_tasks(
    old: Result,
    new: Result,
    max_drop: float,
    decides: Decides,
    gone: Mapping[str, str] = MappingProxyType({}),
    passed: Mapping[str, str] = MappingProxyType({}),
) -> list[TaskChange]:
    """Every task of OLD, then those that NEW added.

    `gone`: tasks that fail as NEW does not answer as it was tested, and why; `passed`: the same of OLD.

    Raises RunError where items are missing, or are of other rows.
    """
    _check(max_drop)
    for side, result in (("OLD", old), ("NEW", new)):
        _check_items(result, side)
    why = {task: f"in OLD {one}" for task, one in passed.items()} | {t: f"in NEW {one}" for t, one in gone.items()}
    return [
        *(
            _only(old, task, "fail", why[task])
            if task in why and task in old.items
            else _change(old, new, task, max_drop, decides)
            for task in old.tasks
        ),
        *(_only(new, task, None, "not in OLD") for task in new.tasks if task not in old.tasks),
    ]


def compare_texts(old: TextLosses, new: TextLosses, max_drop: float, decides: Decides, seed: int = 0) -> TextChange:
    """The relative increase in loss a token, over texts drawn with repetition, the same on both sides.

    Raises UserError where the texts have no token to predict, or were split into other tokens.
    """
    _check(max_drop)
    if old.tokens != new.tokens:
        raise UserError(
            "--general: the bases of OLD and NEW split the texts into other tokens, so a loss a token says nothing; "
            "compare runs on one base"
        )
    tokens, before, after = np.array(old.tokens), np.array(old.losses), np.array(new.losses)
    for side, losses in (("OLD", before), ("NEW", after)):
        if not np.isfinite(losses).all():
            text = int(np.isfinite(losses).argmin()) + 1
            raise UserError(f"--general: {side} gives text {text} a loss that is not finite; learn it again (lower lr)")
    if not before.sum() > 0:
        raise UserError("--general: the texts have no token to predict; give longer ones")
    draw = np.random.default_rng(seed)
    drawn = (_some(draw, tokens) for _ in range(DRAWS))
    low, high = interval(np.array([_increase(before[rows], after[rows]) for rows in drawn]))
    increase = _increase(before, after)
    return TextChange(
        texts=len(tokens),
        tokens=int(tokens.sum()),
        cut=max(old.cut, new.cut),
        old=-float(before.sum() / tokens.sum()),
        new=-float(after.sum() / tokens.sum()),
        increase=increase,
        low=low,
        high=high,
        verdict=decide(-increase, -high, -low, max_drop, decides),
    )


def decide(difference: float, low: float, high: float, max_drop: float, decides: Decides) -> Verdict:
    """`point`: the difference must not be below -max_drop; `strict`: nor its interval's low end; `confident`: the high.

    >>> decide(-0.02, -0.05, 0.01, max_drop=0.01, decides="point")
    'fail'
    >>> decide(-0.02, -0.05, 0.01, max_drop=0.01, decides="confident")
    'pass'
    >>> decide(0.0, -0.03, 0.03, max_drop=0.01, decides="strict")
    'fail'
    """
    bound = {"point": difference, "strict": low, "confident": high}[decides]
    return "pass" if bound >= -max_drop - 1e-12 else "fail"  # nan fails


def failed(tasks: Sequence[TaskChange], general: TextChange | None) -> list[str]:
    texts = ["--general"] if general is not None and general.verdict == "fail" else []
    return [one.task for one in tasks if one.verdict == "fail"] + texts


def to_json(found: Comparison) -> str:
    return json.dumps(found.model_dump(mode="json", by_alias=True), indent=1, ensure_ascii=False, allow_nan=False)


def _check(max_drop: float) -> None:
    if not 0 <= max_drop <= 1:  # nor nan, with which nothing would ever fail
        raise UserError(f"--max-drop: {max_drop} is out of range; give a share of 1, such as 0.01")


def _check_items(result: Result, side: str) -> None:
    for task, score in zip(result.tasks, result.R[-1], strict=True):
        if score is not None and task not in result.items:
            raise RunError(
                f"{side}: its result has a score of task {task!r} but not the rows behind it: an older moecl wrote it; "
                "train the stream again into another folder (-o)"
            )


def _change(old: Result, new: Result, task: str, max_drop: float, decides: Decides) -> TaskChange:
    if task not in old.items:
        return _only(new, task, None, "no score in OLD")
    if task not in new.items:
        return _only(old, task, "fail", "not tested in NEW" if task in new.tasks else "not in NEW")
    _check_same_data(old, new, task)
    before, after = old.items[task], new.items[task]
    found = paired_task(after, before, task, DRAWS)
    return TaskChange(
        task=task,
        metric=before.metric,
        rows=_rows(old, task),
        old=_score(old, task),
        new=_score(new, task),
        difference=found.mean,
        low=found.low,
        high=found.high,
        verdict=decide(found.mean, found.low, found.high, max_drop, decides),
    )


def _only(result: Result, task: str, verdict: Verdict | None, reason: str) -> TaskChange:
    """A task that one side alone has scored: OLD's, where there is a verdict."""
    items = result.items.get(task)
    side = {"new" if verdict is None else "old": None if items is None else _score(result, task)}
    metric, rows = ("-", 0) if items is None else (items.metric, _rows(result, task))
    return TaskChange(task=task, metric=metric, rows=rows, verdict=verdict, reason=reason, **side)


def _check_same_data(old: Result, new: Result, task: str) -> None:
    before, after = (result.data.get(task, {}).get("test") for result in (old, new))
    if before and after and not old.tested_as(new, task):
        raise UserError(
            f"task {task!r}: the test rows differ: OLD has {before.rows} (sha256 {before.sha256[:12]}), NEW "
            f"{after.rows} (sha256 {after.sha256[:12]}); compare runs that were tested on the same rows"
        )


def _score(result: Result, task: str) -> float | None:
    return result.R[-1][result.tasks.index(task)]


def _rows(result: Result, task: str) -> int:
    items = result.items[task]
    return len(items.true) or len(items.scores)


def _some(draw: np.random.Generator, tokens: NDArray[np.int64]) -> NDArray[np.int64]:
    """As many texts as there are, with repetition, at least one of them with a token to predict."""
    while True:
        rows = draw.integers(len(tokens), size=len(tokens))
        if tokens[rows].any():
            return rows


def _increase(before: NDArray[np.float64], after: NDArray[np.float64]) -> float:
    return float((after.sum() - before.sum()) / before.sum())
