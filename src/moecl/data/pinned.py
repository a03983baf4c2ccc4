"""What a published file is known by, and how a fetch tells how far it is."""

from collections.abc import Callable
from dataclasses import dataclass

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how many bytes are done, and of how many (0: not known)."""


@dataclass(frozen=True)
class PinnedFile:
    """A release's file on the Python package index: the project's name, the file's, its sha256 and size in bytes."""

    project: str
    filename: str
    sha256: str
    bytes: int
