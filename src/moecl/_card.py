"""A store's README.md: a model card for people and for the hub."""

import re
from collections.abc import Mapping

from moecl._manifest import Manifest

RESULT = "<!-- result{} -->"  # around what a run has measured, so that a later card keeps it


def result_in(card: str) -> str:
    """What stands under a card's heading Result."""
    _, _, rest = card.partition(RESULT.format(""))
    return rest.partition(RESULT.format(" end"))[0].strip()


def model_card(manifest: Manifest, sizes: Mapping[str, int], result_markdown: str) -> str:
    """`sizes`: bytes of each task; `result_markdown` goes under its heading Result."""
    result = result_markdown.strip()
    versions = [
        f"- {record.reference}{''.join(f', @{alias}' for alias in manifest.aliases_of(record))}"
        for record in manifest.tasks
        if record.superseded or manifest.aliases_of(record)
    ]
    base = manifest.base
    # The hub takes ids only; a folder's name would be an invalid link.
    hub_id = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", base.id)
    rows = [
        f"| {record.name} | {record.task.kind} | {', '.join(record.task.labels or ()).replace('|', chr(92) + '|')} "
        f"| {record.task.metric} | {record.form} | {record.version} | {sizes[record.name]:,} |"
        for record in manifest.current()
    ]
    return "\n".join(
        [
            "---",
            "library_name: moecl",
            *([f"base_model: {base.id}"] if hub_id else []),
            "tags: [continual-learning, mixture-of-experts, lora]",
            "---",
            "# A model that learned one task after another",
            "",
            f"Base: `{base.id}` ({base.model_type}, {base.dtype}, sha256 `{base.sha256}`), frozen. "
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
            'model = MoECL.from_pretrained("path/to/this/folder")',
            "```",
            "",
        ]
    )
