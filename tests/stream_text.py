"""A small stream file, which the tests of the config read and spoil, in the test's own folder."""

from collections.abc import Iterable
from pathlib import Path

import pytest

from moecl.config import load_stream
from moecl.errors import ConfigError

STREAM = """\
base: smollm2-135m-instruct
method: {name: moe-cl, rank: 8}
train:
  epochs: 2
  lr: 1e-3
tasks:
  - name: agnews
    kind: classification
    labels: [World, Sports]
    train: data/agnews/train.jsonl
    limit: {train: 30}
  - name: v1.2
    kind: generation
    train: some-user/some-data
"""

# The same with `preset: paper` in the place of method and training, and two classifications.
PAPER = STREAM.replace("    kind: generation\n", "    kind: classification\n").replace(
    "method: {name: moe-cl, rank: 8}\ntrain:\n  epochs: 2\n  lr: 1e-3\n", "preset: paper\n"
)


def write(content: str | bytes, name: str = "stream.yaml") -> str:
    """Write a file in the current folder, so that messages show its name alone."""
    Path(name).write_bytes(content.encode() if isinstance(content, str) else content)
    return name


def refusal(path: str, overrides: Iterable[str] = ()) -> str:
    """The one line that `load_stream` refuses a file with."""
    with pytest.raises(ConfigError) as caught:
        load_stream(path, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message
