"""What `moecl check` says of a task's data, before any training."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

import numpy as np

from moecl.config import Task
from moecl.data.encode import Encoded, Encoder
from moecl.data.task import Split, TaskData, inputs, overlaps

_MAJORITY = 1.5  # times an even share: from there on accuracy flatters a model that ignores the text
_MANY_CUT = 0.1


def describe(data: TaskData, encoder: Encoder) -> dict[str, Any]:
    """Counts, label balance, lengths, cuts, duplicates, overlaps and hints, as plain values that JSON can hold.

    `splits`: {name: {source, sha256, rows, labels: {label: rows}, tokens: {p50, p95, max}, cut, tokens_lost,
    duplicates, contradictions}}; tokens are those of whole inputs before any cut. `labels`: {label: {words, tokens}}
    or null. `overlaps`: {"train/test": rows of test that train has too}. Raises `DataError`.
    """
    shared = overlaps(data)
    found: dict[str, Any] = {
        "task": data.task.name,
        "kind": data.task.kind,
        "max_length": encoder.max_length,
        "labels": _labels(data.task, encoder),
        "one_token": all(len(ids) == 1 for ids in encoder.answers) if encoder.answers else None,
        "same_first_token": _same_first_token(data.task, encoder),
        "majority": _majority(data),
        "splits": {
            name: _split(split, data.task, encoder) | {"duplicates": shared.get((name, name), 0)}
            for name, split in data.splits().items()
        },
        "overlaps": {f"{first}/{second}": rows for (first, second), rows in shared.items() if first != second},
    }
    return found | {"hints": _hints(found, data.task)}


def _labels(task: Task, encoder: Encoder) -> dict[str, Any] | None:
    if not task.labels:
        return None
    return {
        label: {"words": words, "tokens": len(ids)}
        for (label, words), ids in zip(task.labels.items(), encoder.answers, strict=True)
    }


def _same_first_token(task: Task, encoder: Encoder) -> list[list[str]]:
    groups: defaultdict[int, list[str]] = defaultdict(list)
    for label, ids in zip(task.labels or {}, encoder.answers, strict=True):
        groups[ids[0]].append(label)
    return [group for group in groups.values() if len(group) > 1]


def _majority(data: TaskData) -> dict[str, Any] | None:
    """The commonest label of the test rows (of the training rows where there are none) and its share."""
    split = data.test or data.train
    counts = Counter(example.label for example in split.examples if example.label is not None)
    if not counts:
        return None
    label, rows = counts.most_common(1)[0]
    return {"label": label, "share": rows / counts.total()}


def _split(split: Split, task: Task, encoder: Encoder) -> dict[str, Any]:
    rows = encoder.encode(split.examples)
    counts = Counter(example.label for example in split.examples)
    return {
        "source": split.source,
        "sha256": split.sha256,
        "rows": len(rows),
        "labels": {label: counts[label] for label in task.labels or {}},
        "tokens": _quantiles(rows),
        "cut": sum(row.cut for row in rows),
        "tokens_lost": sum(row.lost for row in rows),
        "contradictions": _contradictions(split, task),
    }


def _quantiles(rows: list[Encoded]) -> dict[str, int]:
    lengths = [len(row.input_ids) + len(row.answer_ids) + row.lost for row in rows]
    p50, p95 = np.percentile(lengths, [50, 95], method="higher")
    return {"p50": int(p50), "p95": int(p95), "max": max(lengths)}


def _contradictions(split: Split, task: Task) -> int:
    """Rows whose input another row has with another label."""
    labels: defaultdict[tuple[str, ...], Counter[str]] = defaultdict(Counter)
    for key, example in zip(inputs(split, task), split.examples, strict=True):
        if example.label is not None:
            labels[key][example.label] += 1
    return sum(counts.total() for counts in labels.values() if len(counts) > 1)


def _hints(found: dict[str, Any], task: Task) -> list[str]:
    splits: dict[str, dict[str, Any]] = found["splits"]
    hints = [
        f"{rows} rows of {pair.split('/')[1]} are also in {pair.split('/')[0]}"
        for pair, rows in found["overlaps"].items()
    ]
    for name, split in splits.items():
        hints += _split_hints(name, split, found["max_length"])
    for group in found["same_first_token"]:
        if task.head != "classifier":
            hints.append(
                f"labels {', '.join(group)} share their first token: short words that differ in it learn fastest "
                "(labels: {label: word})"
            )
    majority = found["majority"]
    if majority and task.metric == "accuracy" and majority["share"] * len(task.labels or {}) >= _MAJORITY:
        hints.append(
            f"{majority['share']:.0%} of the rows are {majority['label']}, which always said scores as much accuracy: "
            "set metric: macro_f1"
        )
    return hints


def _split_hints(name: str, split: dict[str, Any], max_length: int) -> list[str]:
    hints = []
    if absent := [label for label, rows in split["labels"].items() if not rows]:
        hints.append(f"{name} has no row with the label {', '.join(absent)}")
    if split["duplicates"]:
        hints.append(f"{split['duplicates']} rows of {name} repeat an earlier one")
    if split["contradictions"]:
        hints.append(f"{split['contradictions']} rows of {name} have the same input and different labels")
    if split["cut"] > _MANY_CUT * split["rows"]:
        hints.append(
            f"{split['cut']} of {split['rows']} rows of {name} are cut to max_length {max_length}: "
            f"95 % have {split['tokens']['p95']} tokens or fewer"
        )
    return hints
