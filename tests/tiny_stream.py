"""A stream of tiny tasks on disk, for tests that learn."""

import gc
import json
import random
from pathlib import Path
from typing import Any

import yaml

# The Trainer collects garbage before each task, which takes longer than a tiny one; what is imported by now is none.
gc.freeze()

CLUES = {"good": ("love", "food"), "bad": ("worst", "price")}  # a token each, the last one that is read


def write_rows(path: Path, count: int, seed: int, clues: dict[str, tuple[str, ...]] | None = None) -> Path:
    draw = random.Random(seed)
    clues = clues or CLUES
    labels = list(clues)
    rows = []
    for number in range(count):
        label = labels[number % len(labels)]
        filler = " ".join(draw.choices(("the", "a", "day", "cat", "tea", "sea"), k=draw.randint(2, 9)))
        rows.append({"text": f"{number} {filler} {draw.choice(clues[label])}", "label": label})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_stream(
    folder: Path, base: Path, tasks: int | list[dict[str, Any]] = 2, rows: int = 24, **settings: Any
) -> Path:
    """A stream file and its splits in `folder`; `settings` are keys of the stream, `train` merged into ours."""
    folder.mkdir(parents=True, exist_ok=True)
    train = {"epochs": 2, "batch_size": 8, "lr": 0.02, "max_length": 48, "save_steps": 2, "report_to": []}
    stream = {
        "base": str(base),
        "method": {"name": "moe-cl", "rank": 2},
        **settings,
        "train": {**train, **settings.get("train", {})},
        "tasks": [task(folder, f"task{number}", number, rows) for number in range(tasks)]
        if isinstance(tasks, int)
        else tasks,
    }
    path = folder / "stream.yaml"
    path.write_text(yaml.safe_dump(stream, sort_keys=False))
    return path


def task(folder: Path, name: str, seed: int, rows: int = 24, **settings: Any) -> dict[str, Any]:
    """A task's section, its splits written to `folder`. Odd seeds turn the clues around: tasks contradict."""
    sizes = {"train": rows, "validation": 8, "test": 12}
    clues = dict(zip(CLUES, reversed(CLUES.values()), strict=True)) if seed % 2 else CLUES
    files = {
        split: str(write_rows(folder / f"{name}.{split}.jsonl", size, 1000 * seed + place, clues).name)
        for place, (split, size) in enumerate(sizes.items())
    }
    return {
        "name": name,
        "kind": "classification",
        "instruction": "It is {text}",
        "labels": {"good": "fine", "bad": "sad"},
        **files,
        **settings,
    }
