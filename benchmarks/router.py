"""Which task is this text for: how often the router is right, by layer and pooling, and what it takes for none's.

Of each task 300 training, 200 validation and 200 test rows are read, without instructions. Layer and pooling are
compared on validation rows alone (there the validation rows also calibrate); what moecl uses is then measured on test
rows. Streams: the bundled one and a folder each of --data, whose folders are tasks with train, validation and
test.jsonl; `all` is every task of every stream. False accepts: each task is left out in turn, and its texts are asked.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from measure import Report, add_base, add_precision, parser, positive, run, start
from moecl.backbone import resolve_precision
from moecl.discriminant import LEAST_TASKS
from moecl.model import MoECL
from moecl.router import TOKENS, Features, Router, Statistics
from pooled import POOLINGS, SPLITS, Pooled, Reader, sources

RATES = (0.01, 0.05, 0.1, 0.2)
OURS = "mean_of_directions"  # what router.py has
Rows = dict[str, dict[str, NDArray[np.float32]]]  # task -> split -> [texts, D]


class Numbers(Features):
    """In the place of a base: features that are there already."""

    def __init__(self) -> None:
        pass


def router(rows: Rows, false_accept: float = 0.1) -> Router:
    """Of the training rows, calibrated by the validation rows."""
    width = next(iter(rows.values()))["train"].shape[1]
    statistics = Statistics.empty(width, 1)
    statistics.false_accept = false_accept
    for task, splits in rows.items():
        statistics.train.add(task, splits["train"])
        statistics.held.add(task, splits["validation"])
    return Router(Numbers(), statistics, {task: task for task in rows})


def right(found: Router, rows: Rows, split: str) -> float:
    """Mean over tasks of the share of rows whose likeliest task is their own; nothing is unknown here."""
    shares = [found.see(splits[split])[0].argmax(axis=1) == found.tasks.index(task) for task, splits in rows.items()]
    return float(np.mean([one.mean() for one in shares]))


def apart(found: Router, rows: Rows, split: str) -> float:
    """Mean over tasks left out: the chance that a row of a known task is more familiar than one of that task."""
    areas = []
    for task, splits in rows.items():
        strange = np.sort(found.familiar_without(task, splits[split]))
        known = np.concatenate(
            [found.familiar_without(task, other[split]) for name, other in rows.items() if name != task]
        )
        areas.append(float((np.searchsorted(strange, known) / len(strange)).mean()))
    return float(np.mean(areas))


def abstention(rows: Rows, split: str) -> list[dict[str, float]]:
    """What a wanted false-accept rate comes to."""
    points = []
    for rate in RATES:
        found = router(rows, rate)
        seen = {task: found.see(splits[split]) for task, splits in rows.items()}
        accepted = {task: found.accepts(familiar) for task, (_, familiar) in seen.items()}
        own = {task: (shares.argmax(axis=1) == found.tasks.index(task)) for task, (shares, _) in seen.items()}
        taken = sum(accepted[task].mean() for task in rows)
        false = [found.accepts(found.familiar_without(task, splits[split])).mean() for task, splits in rows.items()]
        points.append(
            {
                "wanted": rate,
                "false_accepts": float(np.mean(false)),
                "coverage": float(taken / len(rows)),
                "right_of_accepted": float(sum((own[task] & accepted[task]).mean() for task in rows) / taken),
            }
        )
    return points


def calibration(found: Router, rows: Rows, split: str) -> dict[str, float]:
    """-log P of the own task, and the calibration error: |share - right|, mean over 15 bins of the greatest share."""
    shares = [found.see(splits[split])[0] for splits in rows.values()]
    own = [one[:, found.tasks.index(task)] for task, one in zip(rows, shares, strict=True)]
    best = np.concatenate([one.max(axis=1) for one in shares])
    hits = np.concatenate(
        [one.argmax(axis=1) == found.tasks.index(task) for task, one in zip(rows, shares, strict=True)]
    )
    bins = np.minimum((best * 15).astype(int), 14)
    error = sum(abs(best[bins == one].sum() - hits[bins == one].sum()) for one in range(15)) / len(best)
    surprise = -np.log(np.maximum(np.concatenate(own), 1e-12)).mean()
    return {"temperature": found.calibration.temperature, "nll": float(surprise), "error": float(error)}


def picked(pooled: Mapping[str, Pooled], layer: int, pooling: int) -> Rows:
    return {task: {split: x[:, layer, pooling] for split, x in splits.items()} for task, splits in pooled.items()}


def growth(rows: Rows) -> dict[str, float]:
    """Test rows sent to their own task, by how many tasks there are, added in the order of the streams."""
    names = list(rows)
    some = {count: {name: rows[name] for name in names[:count]} for count in range(2, len(names) + 1)}
    return {str(count): right(router(one), one, "test") for count, one in some.items()}


def task_bytes(rows: Rows) -> dict[str, int]:
    """What a store keeps: once, and a task."""
    one, two = ({name: rows[name] for name in list(rows)[:count]} for count in (1, 2))
    sizes = [
        sum(tensor.numel() * tensor.element_size() for tensor in router(some).statistics.tensors().values())
        for some in (one, two)
    ]
    return {"a_task": sizes[1] - sizes[0], "once": 2 * sizes[0] - sizes[1]}


def measure_stream(report: Report, name: str, pooled: Mapping[str, Pooled], layers: list[int]) -> None:
    compared = {}
    for place, layer in enumerate(layers):
        for which, pooling in enumerate(POOLINGS):
            rows = picked(pooled, place, which)
            found = router(rows)
            compared[f"{pooling}, {layer} layers"] = {"right": right(found, rows, "validation")} | (
                {"apart": apart(found, rows, "validation")} if len(rows) >= LEAST_TASKS else {}
            )
    rows = picked(pooled, 0, list(POOLINGS).index(OURS))
    found = router(rows)
    report.ratio(f"routed_right_{name}", [right(found, rows, "test")])
    report.figures["streams"][name] = {"validation": compared, "calibration": calibration(found, rows, "test")}
    if len(rows) >= LEAST_TASKS:
        points = abstention(rows, "test")
        report.figures["streams"][name] |= {"abstention": points}
        for point in points:
            if point["wanted"] in (0.05, 0.1):
                report.ratio(f"false_accepts_at_{point['wanted']:g}_{name}", [point["false_accepts"]])
                report.ratio(f"coverage_at_{point['wanted']:g}_{name}", [point["coverage"]])


def layers_of(base: str, precision: str) -> list[int]:
    """A quarter of the base's layers, which is what router.py reads, a half and three quarters."""
    model = MoECL.attach(base, precision=precision, device="cpu")
    count = model.geometry.num_layers
    return [Statistics.empty(1, count).layer, count // 2, 3 * count // 4]


def main(argv: Sequence[str] | None = None) -> None:
    options = arguments().parse_args(argv)
    start(options)
    precision = resolve_precision(options.precision, "cpu")[0]
    report = Report("router", {})
    counts = dict(zip(SPLITS, (options.rows, *[-(-2 * options.rows // 3)] * 2), strict=True))
    with TemporaryDirectory() as scratch, torch.inference_mode():
        layers = layers_of(options.base, precision)
        reader = Reader(options.base, precision, layers, TOKENS, options.scratch or Path(scratch))
        streams: dict[str, dict[str, Any]] = {
            stream: {
                f"{stream}.{task}": reader.pooled(f"{stream}.{task}", splits, counts) for task, splits in tasks.items()
            }
            for stream, tasks in sources(options.data).items()
        }
    if len(streams) > 1:
        streams["all"] = {task: found for tasks in streams.values() for task, found in tasks.items()}
    report.figures["streams"] = {}
    for name, pooled in streams.items():
        measure_stream(report, name, pooled, layers)
    rows = picked(pooled, 0, list(POOLINGS).index(OURS))
    report.figures |= {"right_by_tasks": growth(rows), "bytes": task_bytes(rows), "layers": layers}
    report.close(options, precision=precision)


def arguments() -> argparse.ArgumentParser:
    made = parser(__doc__ or "", rounds=1)
    add_base(made)
    add_precision(made)
    made.add_argument("--data", type=Path, nargs="*", default=[], metavar="DIR", help="further streams, a folder each")
    made.add_argument("--rows", type=positive, default=300, help="training rows of a task (%(default)s)")
    made.add_argument("--scratch", type=Path, metavar="DIR", help="where what was read of texts is kept")
    return made


if __name__ == "__main__":
    run(main)
