"""Scored predictions with their labels, a JSON object a line, as `moecl train` and `moecl predict` write them."""

import hashlib
import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from moecl.errors import DataError, RunError, TaskError, near
from moecl.results import Result
from moecl.review import REVIEW, Scored, Share, first_fault, rounded
from moecl.review_measure import Pair
from moecl.run_folder import RESULT, RunFolder

PREDICTIONS = "predictions"


def scored_rows(run: Path, task: str) -> list[Path]:
    """Where a run has a task's validation and test rows."""
    return [run / PREDICTIONS / f"{task}.{split}.jsonl" for split in ("validation", "test")]


def unanswered(run: Path, task: str) -> str | None:
    """The first of them that is not there, in words."""
    missing = [path.name for path in scored_rows(run, task) if not path.is_file()]
    return f"no {PREDICTIONS}/{missing[0]}" if missing else None


class Row(BaseModel):
    """A line. A run's: `label` is the true one, `answer` the model's. Of `moecl predict`: `true`, and `label`."""

    model_config = ConfigDict(strict=True, frozen=True)

    row: Annotated[int, Field(ge=1)] | None = None
    label: str
    answer: str | None = None
    true: str | None = None
    scores: dict[str, Share]

    def pair(self, where: str) -> tuple[str, str]:
        """The true label and the answer."""
        if self.answer is not None:
            return self.label, self.answer
        if self.true is None:
            raise DataError(
                f"{where}: the row has no true label; give `moecl predict` rows with a label that the task knows, "
                "or write the true one as label and the model's as answer"
            )
        return self.true, self.label


def read_scored(path: Path) -> Scored | None:
    """The rows of a file, in the order of their numbers; None for a generation task's, which have no scores.

    Raises DataError (`file:line`): no rows, a row twice, without label, with a label or a score that cannot be.
    """
    return _collected(_lines(path), str(path))


def of_rows(rows: Iterable[Mapping[str, Any]], where: str) -> Scored:
    """Rows of a classification as `evidence.as_rows` makes them. Raises DataError (`where number`)."""
    found = _collected(((f"{where} {row['row']}", Row.model_validate(row)) for row in rows), where)
    assert found is not None
    return found


def _collected(lines: Iterable[tuple[str, Row]], file: str) -> Scored | None:
    rows: dict[int, tuple[str, str, float]] = {}
    labels: tuple[str, ...] | None = None
    for place, (where, row) in enumerate(lines, 1):
        number = place if row.row is None else row.row
        if number in rows:
            raise DataError(f"{where}: row: {number} stands in the file twice; remove one")
        if labels is None:
            labels = _labels(row, where)
        elif set(row.scores) != set(labels):
            raise DataError(
                f"{where}: scores: are of {_listed(row.scores)}, those before of {_listed(labels)}; give one task's"
            )
        true, given = row.pair(where)
        if labels:
            _check_label(where, "the true label", true, labels)
            _check_label(where, "the answer", given, labels)
        rows[number] = true, given, rounded(row.scores.get(given, 0.0))
    if labels is None:
        raise DataError(f"{file}: no rows; give a file with some")
    return _scored(labels, dict(sorted(rows.items()))) if labels else None


def _lines(path: Path) -> Iterator[tuple[str, Row]]:
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    where = f"{path}:{number}"
                    yield where, _parse(line, where)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; give a file of predictions, a JSON object a line") from error


def _parse(line: bytes, where: str) -> Row:
    try:
        return Row.model_validate_json(line)
    except ValidationError as error:
        remedy = 'a row is {"row": 1, "label": true label, "answer": the model\'s, "scores": {label: share}}'
        raise DataError(f"{where}: {first_fault(error)}; {remedy}") from None


def _labels(row: Row, where: str) -> tuple[str, ...]:
    if REVIEW in row.scores:
        raise DataError(f"{where}: scores: the label {REVIEW!r} is the decision that asks a human; rename the label")
    return tuple(row.scores)


def _check_label(where: str, what: str, label: str, labels: tuple[str, ...]) -> None:
    if label not in labels:
        raise DataError(
            f"{where}: {what} {label!r} has no score{near(label, labels)}; the labels are {_listed(labels)}: correct it"
        )


def _listed(labels: Iterable[str]) -> str:
    return ", ".join(labels) or "none"


def _scored(labels: tuple[str, ...], rows: dict[int, tuple[str, str, float]]) -> Scored:
    place = {label: number for number, label in enumerate(labels)}
    digest = hashlib.sha256()
    for number, row in rows.items():
        digest.update(json.dumps([number, *row], ensure_ascii=False).encode() + b"\n")
    true, given, share = zip(*rows.values(), strict=True)
    return Scored(
        labels=labels,
        numbers=np.array(list(rows)),
        true=np.array([place[label] for label in true]),
        given=np.array([place[label] for label in given]),
        share=np.array(share),
        sha256=digest.hexdigest(),
    )


# Where they lie


def of_files(validation: Path, test: Path, name: str) -> dict[str, Pair]:
    """The one task whose splits are in two files. Raises DataError."""
    return {name: _pair(name, _classified(validation), _classified(test))}


def _classified(path: Path) -> Scored:
    if (rows := read_scored(path)) is None:
        raise DataError(f"{path}: no scores, as of a generation task; only a classification has thresholds")
    return rows


def result_of(run: Path) -> Result:
    """Raises RunError for what is no finished run."""
    if not run.is_dir():
        raise RunError(f"{run}: no such folder; give one that `moecl train STREAM -o RUN` has made")
    return RunFolder(run).last_result() or Result.load(run / RESULT)


def check_names(run: Path, names: Iterable[str]) -> None:
    """Raise TaskError for a name that is no task of a run."""
    known = result_of(run).tasks
    for name in names:
        if name not in known:
            raise TaskError(f"--task: {run} has no task {name!r}, only {', '.join(known)}{near(name, known)}")


def of_run(
    run: Path,
    names: Collection[str] = (),
    moved: Mapping[str, str] = MappingProxyType({}),
    rescored: Mapping[str, Pair] = MappingProxyType({}),
) -> tuple[dict[str, Pair], dict[str, str]]:
    """The tasks of a run (only those in `names`, where there are some), and why others are skipped.

    `moved`: tasks that do not answer as they were tested, and why; `rescored`: those whose rows were answered anew.

    Raises RunError: not a finished run, no task to review of those there are; DataError: a faulty row.
    """
    result = result_of(run)
    pairs, skipped = {}, {}
    for name in [task for task in result.tasks if not names or task in names]:
        if name in rescored:
            pairs[name] = rescored[name]
            continue
        if name in moved:
            skipped[name] = moved[name]
            continue
        if reason := unanswered(run, name):
            skipped[name] = reason
            continue
        items = result.items.get(name)
        if items is not None and REVIEW in items.labels:
            skipped[name] = f"its label {REVIEW!r} is the decision that asks a human"
            continue
        validation, test = map(read_scored, scored_rows(run, name))
        if validation is None or test is None:
            skipped[name] = "a generation task, which has no thresholds"
        else:
            pairs[name] = _pair(name, validation, test, result.digests.get(name), result.test_rows(name))
    if skipped and not pairs:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in skipped.items())
        raise RunError(
            f"{run}: nothing to review ({reasons}); a review needs classification tasks with validation and test rows"
        )
    return pairs, skipped


def _pair(
    name: str, validation: Scored, test: Scored, parts: Mapping[str, str] | None = None, tested: str | None = None
) -> Pair:
    if set(validation.labels) != set(test.labels):
        validating, testing = (", ".join(rows.labels) for rows in (validation, test))
        raise DataError(
            f"task {name!r}: the validation rows score {validating}, the test rows {testing}; give one model's"
        )
    return Pair(validation, test, parts, tested)
