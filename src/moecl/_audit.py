"""The audit log of a store: what was changed, when, by whom. A JSON object a line, which is never changed.

A line holds its own sha256, that of the line before, and those of manifest.json before and after the change. It is
written before the manifest is replaced: where the manifest is still what it was before a line, or the next line began
from that, the line's change was cut short and never came to be. A line without an end was cut short itself; the next
writer removes it and says so in the `note` of its own.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import pwd
import re
import shlex
import sys
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError

from moecl._atomic import one_line, sync_folder, write_all
from moecl.errors import StoreError

LOG = "audit.jsonl"
START = "0" * 64  # what the first line says of the line before
SEALED = re.compile(rb'(\{.*), "sha256": "([0-9a-f]{64})"\}\n')
LONGEST = 500  # characters kept of a command


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Version(_Strict):
    version: int
    parts: dict[str, str]


class Change(_Strict):
    """From which version of a task to which; None where there was or is none."""

    task: str
    before: Version | None
    after: Version | None


class Manifests(_Strict):
    """sha256 of manifest.json; None before there was one."""

    before: str | None
    after: str


class Line(_Strict):
    time: str  # UTC
    what: str
    changes: list[Change] = []
    detail: dict[str, JsonValue] = {}
    user: str
    command: str
    note: str | None = None
    manifest: Manifests
    previous: str
    sha256: str | None = None  # of what was read


def append(
    folder: Path, what: str, changes: list[Change], detail: dict[str, JsonValue], before: str | None, after: str
) -> None:
    """Add a line, durably. The caller holds the store's lock. Raises StoreError; the log is then as it was."""
    path = folder / LOG
    with one_line(path, StoreError):
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            end, last, torn = _last_line(file)
            if torn:
                os.ftruncate(file, end)
            line = Line(
                time=datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
                what=what,
                changes=changes,
                detail=detail,
                user=_user(),
                command=_command(),
                note=f"{torn} bytes of a line that was cut short were removed" if torn else None,
                manifest=Manifests(before=before, after=after),
                previous=_sha256_of(last),
            )
            try:
                write_all(file, _sealed(line))
                os.fsync(file)
            except BaseException:
                with suppress(OSError):
                    os.ftruncate(file, end)
                raise
        finally:
            os.close(file)
        if not end:
            sync_folder(folder)


def read(folder: Path) -> Iterator[tuple[int, Line | None]]:
    """Number and content of each whole line; None for one that is none or was altered. Raises StoreError."""
    for number, data in _whole_lines(folder / LOG):
        yield number, _parsed(data)


def problems(folder: Path, manifest: str) -> list[str]:
    """What is wrong with the log, a line each, none where there is no log; `manifest`: sha256 of manifest.json."""
    path, found = folder / LOG, []
    previous: str | None = START
    state: Manifests | None = None
    for number, data in _whole_lines(path):
        line, where = _parsed(data), f"{path}:{number}"
        if line is None:
            found.append(f"{where}: altered: it is not what was written; compare it with a copy of the store")
            previous, state = (_sha256_of(data) if SEALED.fullmatch(data) else None), None
            continue
        if previous is not None and line.previous != previous:
            found.append(f"{where}: does not follow the line before: lines were changed, removed or added here")
        if state is not None and line.manifest.before not in (state.before, state.after):
            found.append(f"{where}: manifest.json was changed before this line by something that keeps no log")
        previous, state = _sha256_of(data), line.manifest
    if state is not None and manifest not in (state.before, state.after):
        found.append(
            f"{path}: does not end with manifest.json as it is: lines are missing at its end, or manifest.json was "
            "changed by something that keeps no log"
        )
    return found


def _whole_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    if not path.exists():
        return
    with one_line(path, StoreError), path.open("rb") as file:
        for number, data in enumerate(file, 1):
            if data.endswith(b"\n"):
                yield number, data


def _last_line(file: int) -> tuple[int, bytes, int]:
    """Where the whole lines end, the last of them, and how many bytes come behind it."""
    size = os.fstat(file).st_size
    if not size:
        return 0, b"", 0
    with mmap.mmap(file, 0, access=mmap.ACCESS_READ) as data:
        end = data.rfind(b"\n") + 1
        return end, data[data.rfind(b"\n", 0, max(0, end - 1)) + 1 : end], size - end


def _sealed(line: Line) -> bytes:
    body = json.dumps(line.model_dump(mode="json", exclude_defaults=True), allow_nan=False)
    return f'{body[:-1]}, "sha256": "{hashlib.sha256(body.encode()).hexdigest()}"}}\n'.encode()


def _parsed(data: bytes) -> Line | None:
    if (found := SEALED.fullmatch(data)) is None:
        return None
    body = found[1] + b"}"
    if hashlib.sha256(body).hexdigest().encode() != found[2]:
        return None
    try:
        return Line.model_validate({**json.loads(body), "sha256": found[2].decode()})
    except (ValueError, ValidationError, RecursionError):
        return None


def _sha256_of(line: bytes) -> str:
    """What a line says is its sha256; START of no line."""
    found = SEALED.fullmatch(line)
    return START if found is None else found[2].decode()


def _user() -> str:
    """The account of this process: the environment could say anything."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())


def _command() -> str:
    program = Path(sys.argv[0])
    name = program.parent.name if program.name == "__main__.py" else program.name
    return shlex.join([name, *sys.argv[1:]])[:LONGEST]
