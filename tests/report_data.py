"""Runs and benches as a report finds them, made up: plausible numbers, test items that agree with R."""

import json
from pathlib import Path

import numpy as np

from moecl.metrics import accuracy, macro_f1, per_class_recall
from moecl.results import Items, Result

TASKS = {"dbpedia": 14, "amazon": 5, "yelp": 5, "agnews": 4}
ENVIRONMENT = {
    "versions": {"moecl": "0.1.0", "torch": "2.13.0"}, "device": "cpu", "precision": "fp32", "threads": 2,
    "base": {"id": "smollm2-135m-instruct", "sha256": "4" * 64, "dtype": "float32", "model_type": "llama"},
}  # fmt: skip


def answers(task: str, right: float, seed: int, rows: int = 200, metric: str = "accuracy") -> Items:
    """Rows of which about a share of `right` is answered right; what is hard is so for every seed."""
    classes = TASKS.get(task, 3)
    fixed = np.random.default_rng(len(task))
    true, hard = fixed.integers(classes, size=rows), fixed.random(rows)
    draw = np.random.default_rng(seed)
    wrong = (true + draw.integers(1, classes, size=rows)) % classes
    given = np.where(0.75 * hard + 0.25 * draw.random(rows) < right, true, wrong)
    return Items(
        metric=metric, labels=[f"{task} {n}" for n in range(classes)], true=true.tolist(), given=given.tolist()
    )


def result(
    tasks=tuple(TASKS), method="moe-cl", seed=0, level=0.75, loss=0.0, bound=False, name="run", **fields
) -> Result:
    """A run that reaches about `level` on each task and loses `loss` of it with each task after."""
    draw, count = np.random.default_rng(seed), len(tasks)
    top = np.clip(level + draw.normal(0, 0.03, count), 0, 1)
    last = {task: answers(task, top[j] - loss * (count - 1 - j), 7 * seed + j) for j, task in enumerate(tasks)}
    score = [accuracy(one.true, one.given) for one in last.values()]
    R = [
        [0.2 + 0.02 * min(i, 5) if i <= j else min(1, score[j] + loss * (count - i)) for j in range(count)]
        for i in range(count + 1)
    ]
    if bound:
        R = [*[[None] * count for _ in range(count)], score]
    details = {task: detail(j, task, last[task], loss, count, R) for j, task in enumerate(tasks)}
    data = {t: {s: {"sha256": s[0] * 64, "rows": n, "cut": n // 50} for s, n in ROWS.items()} for t in tasks}
    sides = {"items": last, "details": details, "environment": ENVIRONMENT, "seconds": 200 + 20 * seed + 100 * level}
    return Result.model_validate(
        {"name": name, "method": method, "seed": seed, "tasks": list(tasks), "R": R, "data": data,
         "digests": {task: {"task": "a" * 64} for task in tasks}, **sides, **fields}
    )  # fmt: skip


ROWS = {"train": 320, "validation": 100, "test": 200}


def detail(place: int, task: str, last: Items, loss: float, count: int, R: list) -> dict:
    named = per_class_recall(last.true, last.given, range(len(last.labels)))
    return {
        "steps": 40, "best_step": 30, "validation": [[s, 0.7 - 0.4 * 0.9**s - 0.01 * place] for s in (10, 20, 30, 40)],
        "trained_parameters": 1_300_000, "bytes": 5_200_000, "shared_bytes": 2_600_000, "seconds": 61.5 + place,
        "validation_final": 0.7, "macro_f1": macro_f1(last.true, last.given),
        "per_class_recall": {last.labels[n]: value for n, value in named.items()},
        "discriminator_accuracy": 0.9 - 0.1 * place, "discriminator_loss": 0.3 + 0.2 * place,
        "gate_use": {str(layer): 0.5 + 0.02 * place + 0.01 * (layer - 15) for layer in range(15, 30)},
        "drift": [[i, loss * (i - place - 1)] for i in range(place + 1, count + 1)],
    }  # fmt: skip


def write_run(folder: Path, learned=False, **fields) -> Path:
    folder.mkdir(parents=True)
    made = result(**fields)
    made.save(folder / "result.json")
    if learned:
        for task, items in made.items.items():
            write_predictions(folder / "predictions" / f"{task}.test.jsonl", items, items.given)
            write_predictions(folder / "predictions" / f"{task}.learned.jsonl", items, items.true)
    return folder


def write_predictions(path: Path, items: Items, given: list[int]) -> None:
    path.parent.mkdir(exist_ok=True)
    rows = [
        {"row": n, "label": items.labels[t], "answer": items.labels[g], "scores": {}}
        for n, (t, g) in enumerate(zip(items.true, given, strict=True), 1)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


METHODS = {
    "moe-cl": ("moe-cl", 0.78, 0.0), "per-task-lora": ("per-task-lora", 0.74, 0.0), "o-lora": ("o-lora", 0.73, 0.03),
    "sequential-lora": ("sequential-lora", 0.74, 0.09), "ewc": ("ewc", 0.72, 0.07), "replay": ("replay", 0.77, 0.02),
    "joint": ("joint", 0.80, 0.0),
}  # fmt: skip
ORDERS = {
    "order1": ["dbpedia", "amazon", "yelp", "agnews"],
    "order2": ["dbpedia", "amazon", "agnews", "yelp"],
    "order3": ["yelp", "amazon", "agnews", "dbpedia"],
}


def write_bench(
    folder: Path, methods=tuple(METHODS), orders=tuple(ORDERS), seeds=(0, 1), troubles=(), base="smollm2-135m-instruct"
) -> Path:
    """`troubles`: (method, order, seed, status, reason) of cells that have no result."""
    trouble = {tuple(one[:3]): one[3:] for one in troubles}
    cells = []
    for label in methods:
        method, level, loss = METHODS[label]
        for order in orders:
            for seed in seeds:
                status, reason = trouble.get((label, order, seed), ("done", None))
                id = f"{label}.{order}.s{seed}"
                cells.append(
                    {"id": id, "method": label, "order": order, "seed": seed, "status": status, "reason": reason}
                )
                if status == "done":
                    write_run(
                        folder / "cells" / id, tasks=ORDERS[order], method=method, seed=seed, level=level, loss=loss,
                        bound=label == "joint", name=id,
                    )  # fmt: skip
    trials = [{"settings": {"train.lr": lr}, "score": 0.7 - lr} for lr in (1e-3, 2e-3)]
    record = {
        "schema": 1, "name": "mtl5", "base": base, "orders": {name: ORDERS[name] for name in orders},
        "seeds": list(seeds),
        "methods": {
            label: {"method": METHODS[label][0], "settings": {"rank": 8}, "stream": {},
                    "tuned": {"trials": trials, "chosen": {"train.lr": 1e-3}}}
            for label in methods
        },
        "protocol": {"train": {"epochs": 2, "lr": 2e-3}, "head": "lm", "rows": dict.fromkeys(TASKS, ROWS)},
        "cells": cells,
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "bench.json").write_text(json.dumps(record))
    return folder
