"""Files that are whole or absent, and a lock that says who holds it.

A killed writer leaves the old file or the new one, never half. POSIX only (`fcntl`).
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import secrets
import shlex
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from moecl.errors import BusyError, RunError, UserError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}
_DRAFT = re.compile(r"\..+\.[0-9a-f]{16}\.tmp")


@contextmanager
def one_line(path: Path, error: type[UserError] = RunError) -> Iterator[None]:
    """Turn an `OSError` raised by a write inside into `error`: one line that names `path` and what to do."""
    try:
        yield
    except OSError as cause:
        raise error(_explain(cause, path)) from cause


def _explain(cause: OSError, path: Path) -> str:
    if cause.errno in _FULL:
        return f"{path}: the disk is full; what was saved before is intact: free some space and run it again"
    if cause.errno in _FORBIDDEN:
        return f"{path}: not writable ({cause.strerror}); change its permissions or choose another folder"
    return f"{path}: {cause.strerror or cause}; choose another folder"


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable: a file's own fsync does not. Raises `OSError`."""
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    except OSError as cause:
        if cause.errno not in {errno.EINVAL, errno.ENOTSUP}:  # some network file systems cannot, and need not
            raise
    finally:
        os.close(folder)


def atomic_write(path: Path, data: bytes, *, tmp: Path | None = None, error: type[UserError] = RunError) -> None:
    """Write `data` beside `path` (or in `tmp`, on the same file system), fsync, rename, fsync the folder.

    Raises `error` (disk full, not writable ...); what was at `path` before is then intact.
    """
    # Not tempfile: its 0600 would hide a store from the colleagues whom the umask lets read.
    draft = (tmp or path.parent) / f".{path.name}.{secrets.token_hex(8)}.tmp"
    with one_line(path, error):
        try:
            write_synced(draft, data)
            os.replace(draft, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(draft)
            raise
        sync_folder(path.parent)


def remove_drafts(folder: Path) -> None:
    """Remove what killed writers left; call it where no other can be writing. Raises `OSError`."""
    for entry in os.scandir(folder):
        if _DRAFT.fullmatch(entry.name):  # and nothing else: the folder may be a link to elsewhere
            os.unlink(entry)


def write_synced(path: Path, data: bytes) -> None:
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        write_all(file, data)
        os.fsync(file)
    finally:
        os.close(file)


def write_all(file: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:  # one write takes 2 GiB at most
        rest = rest[os.write(file, rest) :]


@contextmanager
def lock_file(path: Path, *, error: type[UserError] = RunError) -> Iterator[None]:
    """Hold the one lock at `path`; the system frees it when the process dies, so it is never stale.

    Raises `BusyError` (pid, host, since, command of the holder) at once when another holds it, also within
    this process; `error` when the file cannot be made.
    """
    with one_line(path, error):
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as cause:
            raise BusyError(f"{path.parent}: in use by {_holder(file)}; wait for it to end, or stop it") from cause
        with suppress(OSError):  # a full disk must not keep gc from freeing it
            _write_holder(file)
        try:
            yield
        finally:
            with suppress(OSError):
                os.ftruncate(file, 0)
    finally:
        os.close(file)


def is_locked(path: Path) -> bool:
    """Whether some process holds the lock at `path`."""
    try:
        file = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(file)
    return False


def _write_holder(file: int) -> None:
    since = datetime.now().astimezone().isoformat(timespec="seconds")
    holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": since, "command": shlex.join(sys.argv)}
    os.ftruncate(file, 0)
    os.pwrite(file, json.dumps(holder).encode(), 0)


def _holder(file: int) -> str:
    try:
        holder = json.loads(os.pread(file, 1 << 16, 0))
        command = " ".join(str(holder["command"]).split())[:200]
        return f"pid {holder['pid']} on {holder['host']} since {holder['since']} ({command})"
    except (ValueError, KeyError, TypeError):  # it has the lock but has not written its name yet
        return "another process"
