"""Finished runs without a model: predictions written by hand, or drawn, and a result.json beside them."""

import json
import random
from collections.abc import Iterable, Mapping
from pathlib import Path

from moecl.results import Result

LABELS = ("compliant", "violation")
Seen = tuple[str, str, float]  # true label, answer, the answer's share


def row(number: int, true: str, answer: str, share: float) -> dict:
    [other] = [label for label in LABELS if label != answer]
    return {"row": number, "label": true, "answer": answer, "scores": {answer: share, other: round(1 - share, 9)}}


def write_rows(path: Path, rows: Iterable[Mapping]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    return path


def write_seen(path: Path, seen: Iterable[Seen]) -> Path:
    return write_rows(path, [row(number, *one) for number, one in enumerate(seen, 1)])


def drawn(count: int, seed: int, skill: float) -> list[Seen]:
    """Rows whose labels depend on `seed` alone; the answers are right more often the greater `skill` and share."""
    labels, answers = random.Random(seed), random.Random(1000 * seed + round(100 * skill))
    found = []
    for _ in range(count):
        true = labels.choices(LABELS, weights=(3, 1))[0]
        share = round(0.5 + 0.5 * answers.random() ** (1 / (1 + 2 * skill)), 6)
        right = answers.random() < share
        found.append((true, true if right else LABELS[true == LABELS[0]], share))
    return found


def write_run(folder: Path, tasks: Mapping[str, Mapping[str, list[Seen]]]) -> Path:
    """A run whose tasks have the splits' rows."""
    for name, splits in tasks.items():
        for split, seen in splits.items():
            write_seen(folder / "predictions" / f"{name}.{split}.jsonl", seen)
    return write_result(folder, list(tasks))


def write_result(folder: Path, names: list[str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    scores = [[0.5] * len(names)] * (len(names) + 1)
    digests = {name: {"task": "0" * 64} for name in names}
    Result(method="moe-cl", seed=0, tasks=names, R=scores, seconds=1.0, digests=digests).save(folder / "result.json")
    return folder


def write_drawn_run(folder: Path, skill: float, names: Iterable[str] = ("comments", "videos"), rows: int = 400) -> Path:
    return write_run(
        folder,
        {
            name: {"validation": drawn(rows, 2 * place, skill), "test": drawn(rows, 2 * place + 1, skill)}
            for place, name in enumerate(names)
        },
    )
