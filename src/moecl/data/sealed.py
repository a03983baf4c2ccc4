"""A folder with a record of what is in it, so that it can be trusted later, also after it was copied elsewhere."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moecl._atomic import sync_folder

RECORD = "asset.json"


def seal(folder: Path, about: Mapping[str, Any]) -> None:
    """Write the record, `about` and every file's size and sha256, and put all of it on the disk for good."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    files = {str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in paths}
    (folder / RECORD).write_text(json.dumps({**about, "files": files}, indent=2) + "\n", encoding="utf-8")
    for path in [*paths, folder / RECORD]:
        with path.open("rb") as file:
            os.fsync(file.fileno())
    for path in [folder, *(path for path in folder.rglob("*") if path.is_dir())]:
        sync_folder(path)


def fault(folder: Path, digests: bool = False) -> str | None:
    """Say what keeps a folder from being whole, or None: sizes always, every byte (seconds a GB) with `digests`."""
    try:
        if not folder.exists():
            return f"{folder} is not there"
        for name, said in record(folder)["files"].items():
            path = folder / name
            if not path.is_file() or path.stat().st_size != said["bytes"]:
                return f"{path} is missing or cut short"
            if digests and sha256(path) != said["sha256"]:
                return f"{path} was altered"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{folder / RECORD} cannot be read ({error})"
    return None


def record(folder: Path) -> Any:
    """Read what `seal` wrote. Raises `OSError`, `ValueError`."""
    return json.loads((folder / RECORD).read_text(encoding="utf-8"))


def sha256(path: Path) -> str:
    """Digest a file, in hexadecimal."""
    with path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
