"""A store's README.md: a model card for people and for the hub."""

import re
from collections.abc import Mapping
from pathlib import Path

from moecl._manifest import Manifest
from moecl.data.assets import is_asset

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
RESULT = "<!-- result{} -->"  # around what a run has measured, so that a later card keeps it


def result_in(card: str) -> str:
    """What stands under a card's heading Result."""
    _, _, rest = card.partition(RESULT.format(""))
    return rest.partition(RESULT.format(" end"))[0].strip()


def public_id(base: str) -> str:
    """A base's name without where it lies on this machine: of a folder its own name.

    >>> public_id("user/tiny"), public_id("/models/tiny"), public_id("smollm2-135m-instruct")
    ('user/tiny', 'tiny', 'smollm2-135m-instruct')
    """
    elsewhere = not Path(base).is_dir() and (HUB_ID.fullmatch(base) or "/" not in base)
    return base if elsewhere else Path(base).resolve().name


def model_card(manifest: Manifest, sizes: Mapping[str, int], result_markdown: str, address: str | None) -> str:
    """`sizes`: bytes of each task; `result_markdown` goes under its heading Result; `address`: where to load it."""
    result = result_markdown.strip()
    versions = [
        f"- {record.reference}{''.join(f', @{alias}' for alias in manifest.aliases_of(record))}"
        for record in manifest.tasks
        if record.superseded or manifest.aliases_of(record)
    ]
    base, name = manifest.base, public_id(manifest.base.id)
    hub_id = HUB_ID.fullmatch(name)  # the hub takes no other as a link
    elsewhere = "" if hub_id or is_asset(name) else f', base="path/to/{name}"'
    rows = [
        f"| {record.name} | {record.task.kind} | {', '.join(record.task.labels or ()).replace('|', chr(92) + '|')} "
        f"| {record.task.metric} | {record.form} | {record.version} | {sizes[record.name]:,} |"
        for record in manifest.current()
    ]
    return "\n".join(
        [
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
            "| task | kind | labels | metric | form | version | bytes |",
            "|---|---|---|---|---|---|---|",
            *rows,
            *(["", "Older versions, and versions with an alias:", "", *versions] if versions else []),
            *(["", "## Result", "", RESULT.format(""), "", result, "", RESULT.format(" end")] if result else []),
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
    )
