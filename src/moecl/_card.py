"""A store's README.md: a model card for people and for the hub."""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from moecl._manifest import Manifest
from moecl._scores import Scores
from moecl.data.assets import is_asset
from moecl.metrics import NAMES, SIGNED

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")


def public_id(base: str) -> str:
    """A base's name without where it lies on this machine: of a folder its own name.

    >>> public_id("user/tiny"), public_id("/models/tiny"), public_id("smollm2-135m-instruct")
    ('user/tiny', 'tiny', 'smollm2-135m-instruct')
    """
    elsewhere = not Path(base).is_dir() and (HUB_ID.fullmatch(base) or "/" not in base)
    return base if elsewhere else Path(base).resolve().name


def model_card(manifest: Manifest, sizes: Mapping[str, int], scores: Scores | None, address: str | None) -> str:
    """`sizes`: bytes of each task; `address`: where the store is to be loaded from, if that is known."""
    base, name = manifest.base, public_id(manifest.base.id)
    hub_id = HUB_ID.fullmatch(name)  # the hub takes no other as a link
    elsewhere = "" if hub_id or is_asset(name) else f', base="path/to/{name}"'
    rows = [
        [
            record.name,
            record.task.kind,
            ", ".join(record.task.labels or ()).replace("|", r"\|"),
            record.task.metric,
            record.form,
            str(record.version),
            f"{sizes[record.name]:,}",
        ]
        for record in manifest.current()
    ]
    lines = [
        "---",
        "library_name: moecl",
        *([f"base_model: {name}"] if hub_id else []),
        "tags: [continual-learning, mixture-of-experts, lora]",
        "---",
        "# A model that learned one task after another",
        "",
        f"Base: `{name}` ({base.model_type}, {base.dtype}, sha256 `{base.sha256}`), frozen. "
        "This folder holds what was learned; it needs that base.",
        "",
        *table(["task", "kind", "labels", "metric", "form", "version", "bytes"], rows),
        *versions(manifest),
        *([] if scores is None else result(scores)),
        "",
        "## Use",
        "",
        "```python",
        "from moecl import MoECL",
        "",
        f'model = MoECL.from_pretrained("{address or "path/to/this/folder"}"{elsewhere})',
        "```",
        "",
    ]
    return "\n".join(lines)


def versions(manifest: Manifest) -> Iterator[str]:
    """Names beside those of the tasks: older versions, and aliases."""
    shown = [name for name in dict.fromkeys(one.name for one in manifest.tasks) if name not in manifest.retired]
    lines = []
    for record in (record for name in shown for record in manifest.versions(name)):
        aliases = [f"`{record.name}@{alias}`" for alias in manifest.aliases_of(record)]
        if aliases or record.superseded:
            lines.append(f"- `{record.reference}`{' is ' + ', '.join(aliases) if aliases else ''}")
    if lines:
        yield from ["", "Other versions and aliases:", "", *lines]


def result(scores: Scores) -> Iterator[str]:
    """R and what is drawn from it; without R the score of each task when it was learned."""
    yield from ["", "## Result", "", f"Learned with `{scores.method}`, seed {scores.seed}.", ""]
    if scores.R is not None:
        yield from ["R: score on each task (column) after each task learned (row).", ""]
        names = ["(before any)", *scores.tasks]
        yield from table(
            ["after", *scores.tasks],
            [[name, *map(written, row)] for name, row in zip(names, scores.R, strict=True)],
        )
        yield ""
    found = {key: value for key in NAMES if (value := scores.metrics.get(key)) is not None}
    numbers = [
        [f"{NAMES[key]} ({key.upper()})", f"{value:+.3f}"] if key in SIGNED else [NAMES[key], written(value)]
        for key, value in found.items()
    ]
    yield from table(["number", "value"], numbers)


def written(score: float | None) -> str:
    return "-" if score is None else f"{score:.3f}"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(columns)} |"
    yield "|---" * len(columns) + "|"
    yield from (f"| {' | '.join(cells)} |" for cells in rows)
