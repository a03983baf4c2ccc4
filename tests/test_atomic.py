"""Files that are whole or absent, and the lock."""

import errno
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from moecl._atomic import atomic_write, is_locked, lock_file, remove_drafts, sync_folder
from moecl.errors import BusyError, RunError, StoreError

HOLDER = """
import sys
from pathlib import Path
from moecl._atomic import lock_file
with lock_file(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_writes_and_replaces(tmp_path: Path) -> None:
    path = tmp_path / "file"
    atomic_write(path, b"old")
    atomic_write(path, b"new")
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["file"]


def test_is_as_readable_as_the_umask_says(tmp_path: Path) -> None:
    old = os.umask(0o022)
    try:
        atomic_write(tmp_path / "file", b"")
    finally:
        os.umask(old)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o644


def test_order_makes_it_durable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bytes reach the disk before the name does, and the name before the call returns."""
    calls = []
    for name in ("write", "fsync", "replace"):

        def spy(*arguments: object, name: str = name, real: object = getattr(os, name)) -> object:
            calls.append(name)
            return real(*arguments)  # type: ignore[operator]

        monkeypatch.setattr(os, name, spy)
    atomic_write(tmp_path / "file", b"data")
    assert calls == ["write", "fsync", "replace", "fsync"]


def test_goes_on_after_a_short_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda file, data: real(file, bytes(data[:3])))
    atomic_write(tmp_path / "file", b"0123456789")
    assert (tmp_path / "file").read_bytes() == b"0123456789"


@pytest.mark.parametrize("call", ["open", "write", "fsync", "replace"])
@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "disk is full"),
        (errno.EACCES, "not writable"),
        (errno.EROFS, "not writable"),
        (errno.EIO, "Input/output error"),
    ],
)
def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int, words: str
) -> None:
    path = tmp_path / "file"
    atomic_write(path, b"old")

    def fail(*arguments: object, **options: object) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(StoreError, match=f"^{re.escape(str(path))}: .*{words}") as caught:
            atomic_write(path, b"new", error=StoreError)
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_missing_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="No such file or directory"):
        atomic_write(tmp_path / "no" / "file", b"")


def test_remove_drafts_removes_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drafts, target = tmp_path / "tmp", tmp_path / "file"
    drafts.mkdir()
    (drafts / "someone's.tmp").touch()
    with monkeypatch.context() as patch:  # as a kill would: no clean-up runs
        patch.setattr(os, "replace", lambda *paths: None)
        atomic_write(target, b"data", tmp=drafts)
    assert len(os.listdir(drafts)) == 2
    remove_drafts(drafts)
    assert os.listdir(drafts) == ["someone's.tmp"]


def test_sync_folder_bears_file_systems_that_cannot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail_with(number: int) -> None:
        def fail(file: int) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(os, "fsync", fail)

    fail_with(errno.EINVAL)
    sync_folder(tmp_path)
    fail_with(errno.EIO)
    with pytest.raises(OSError, match="Input/output"):
        sync_folder(tmp_path)


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_lock_says_who_holds_it(tmp_path: Path, holder: "subprocess.Popen[str]") -> None:
    with pytest.raises(BusyError) as caught, lock_file(tmp_path / "lock"):
        pass
    message = str(caught.value)
    assert message.startswith(f"{tmp_path}: in use by pid {holder.pid} on {socket.gethostname()} since 20")
    assert f"(-c {tmp_path / 'lock'})" in message


def test_lock_is_free_when_its_holder_was_killed(tmp_path: Path, holder: "subprocess.Popen[str]") -> None:
    holder.kill()
    holder.wait()
    with lock_file(tmp_path / "lock"):
        pass


def test_lock_is_held_within_a_process_and_free_after(tmp_path: Path) -> None:
    with (
        lock_file(tmp_path / "lock"),
        pytest.raises(BusyError, match=f"pid {os.getpid()}"),
        lock_file(tmp_path / "lock"),
    ):
        pass
    with lock_file(tmp_path / "lock"):
        (tmp_path / "lock").write_text("{")  # it has the lock but has not said who it is
        with pytest.raises(BusyError, match="another process"), lock_file(tmp_path / "lock"):
            pass


def test_whether_a_lock_is_held(tmp_path: Path) -> None:
    assert not is_locked(tmp_path / "lock"), "there is none"
    with lock_file(tmp_path / "lock"):
        assert is_locked(tmp_path / "lock")
    assert not is_locked(tmp_path / "lock")


def test_lock_in_an_unwritable_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(os, "open", fail)
    with pytest.raises(RunError, match="not writable"), lock_file(tmp_path / "lock"):
        pass
