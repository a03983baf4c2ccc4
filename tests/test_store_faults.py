"""Full and unwritable disks, and writers killed at any moment: the model stays whole."""

import errno
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch

from moecl.errors import StoreError
from moecl.store import Store
from store_parts import BASE, files, first, part, parts, record

# Torch takes seconds to import: one server imports it, and children are forked from it.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["moecl.store", "pytest"])


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.create(tmp_path / "store", BASE)


def full(monkeypatch: pytest.MonkeyPatch) -> Callable[[], AbstractContextManager[None]]:
    """A full disk for systems that let us mount none: nothing can be written until an object is removed."""
    real = {name: getattr(os, name) for name in ("write", "pwrite", "unlink")}
    freed = False

    def write(name: str, *arguments: Any) -> int:
        if not freed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return int(real[name](*arguments))

    def unlink(path: Any) -> None:
        nonlocal freed
        freed |= str(path).endswith(".safetensors")
        real["unlink"](path)

    @contextmanager
    def filled() -> Iterator[None]:
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", partial(write, "write"))
            patch.setattr(os, "pwrite", partial(write, "pwrite"))
            patch.setattr(os, "unlink", unlink)
            yield

    return filled


@pytest.fixture
def small_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Path, Callable[[], AbstractContextManager[None]]]]:
    """A folder, and a context in which its disk is full: a real one of 256 KiB where we may mount it."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "moecl-test", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        yield disk, full(monkeypatch)
        return

    def fill() -> None:
        with (disk / "junk").open("wb", buffering=0) as junk:
            while True:
                junk.write(bytes(4096))

    @contextmanager
    def filled() -> Iterator[None]:
        with pytest.raises(OSError, match="No space"):
            fill()
        yield
        (disk / "junk").unlink()

    try:
        yield disk, filled
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_loses_nothing(small_disk: tuple[Path, Callable[[], AbstractContextManager[None]]]) -> None:
    disk, filled = small_disk
    store = Store.create(disk / "store", BASE)
    store.commit([(record("a", "live"), parts(1))])
    store.commit(moved={"shared": part(0.75)})
    before = store.manifest
    with filled():
        with pytest.raises(StoreError, match="the disk is full; what was saved before is intact") as caught:
            store.commit([(record("b"), {"task": part(2, width=4096)})], training={"memory": part(1)})
        assert "\n" not in str(caught.value)
        with pytest.raises(StoreError, match="the disk is full"):
            store.write_card()
        assert store.manifest == before
        assert Store.open(store.path, readonly=True).manifest == before
        assert store.verify() == []
        assert os.listdir(store.path / "tmp") == []
        assert store.gc().files == 1  # frees the disk although it is full
    store.commit([(record("b"), parts(2))])
    assert store.verify() == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EIO])
@pytest.mark.parametrize("call", ["open", "write", "fsync", "replace"])
def test_any_failing_call_loses_nothing(store: Store, monkeypatch: pytest.MonkeyPatch, call: str, number: int) -> None:
    """Each call of a commit fails in turn, until one gets through: the model is always the old or the new one."""
    store.commit([(record("a"), parts(1))], training={"memory": part(1)})
    real = getattr(os, call)
    failures = 0
    while Store.open(store.path).record("a").version == 1:
        left = failures

        def fail_once(*arguments: Any, **options: Any) -> Any:
            nonlocal left
            left -= 1
            if left == -1:
                raise OSError(number, os.strerror(number))
            return real(*arguments, **options)

        with monkeypatch.context() as patch, suppress(StoreError):
            patch.setattr(os, call, fail_once)
            store.commit([(record("a"), parts(2))], training={"memory": part(2)})
        seen = Store.open(store.path, readonly=True)
        value = first(seen.training()["memory"])
        assert {first(seen.read(seen.digests("a")[name])) for name in ("task", "gate")} == {value}
        assert seen.record("a").version == value
        failures += left < 0
    assert failures >= 3
    with store.lock():
        assert os.listdir(store.path / "tmp") == []


def test_an_unwritable_folder_is_one_line(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may write anywhere, so the refusal is made here."""
    real = os.open

    def refuse(path: Any, flags: int, *arguments: Any, **options: Any) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return real(path, flags, *arguments, **options)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(StoreError, match="not writable"):
        store.commit([(record(), parts(1))])
    with pytest.raises(StoreError, match="not writable"):
        Store.create(store.path.parent / "other", BASE)
    assert Store.open(store.path).tasks() == []  # opening writes nothing


# A model is whole when all that one change wrote has that change's number in it.


def advance(store: Store) -> None:
    """One change: moves the shared part of both tasks and the training state, and every third makes a version."""
    with store.lock():
        number = number_of(store) + 1
        records = [(record("b", "live", number=number), parts(number, number))] if number % 3 == 0 else []
        store.commit(records, training={"memory": part(number)}, moved={"shared": part(number)})


def number_of(store: Store) -> int:
    """The number of the last change, after everything that can be read was read and fits together."""
    number = first(store.training()["memory"])  # may refresh, so it comes first
    for task in store.tasks():
        assert first(store.read(task.parts["shared"])) == number
    version = store.record("b")
    assert first(store.read(version.parts["task"])) == version.settings["number"] == number // 3 * 3
    assert version.version == number // 3 + 1
    return int(number)


def start(path: Path) -> Store:
    store = Store.create(path, BASE)
    records = [(record(name, "live", number=0), parts(0, 0)) for name in "ab"]
    store.commit(records, training={"memory": part(0)})
    return store


def advance_for_ever(path: Path, ready: Connection) -> None:
    torch.set_num_threads(1)
    store = Store.open(path)
    ready.send(True)
    while True:
        advance(store)


def killed_by_chance(path: Path, rounds: int, chance: random.Random) -> int:
    """Kill a writer `rounds` times, reading all along. Returns how many changes the killed made."""
    store = start(path)
    last = made = 0
    took = 0.1
    for round_number in range(rounds):
        ready, theirs = FORKS.Pipe(duplex=False)
        writer = FORKS.Process(target=advance_for_ever, args=(path, theirs), daemon=True)
        writer.start()
        ready.recv()
        # A kill falls within the writer's first changes; every fourth writer gets at least one through.
        until, before = time.monotonic() + chance.uniform(0, 4 * took), last
        while time.monotonic() < until or (round_number % 4 == 0 and last == before):
            number = number_of(Store.open(path, readonly=True))
            assert number >= last
            last = number
        writer.kill()
        writer.join()
        writer.close()
        number = number_of(Store.open(path, readonly=True))
        assert number >= last
        made += number - before
        begun = time.monotonic()
        advance(store)
        took = time.monotonic() - begun
        last = number + 1
        assert number_of(store) == last
        assert store.verify() == []
        assert os.listdir(path / "tmp") == []
        store.gc()
    return made


def test_a_kill_at_any_time_leaves_a_whole_model(tmp_path: Path) -> None:
    assert killed_by_chance(tmp_path / "store", 20, random.Random(0)) >= 5


@pytest.mark.slow
def test_200_kills_leave_whole_models(tmp_path: Path) -> None:
    assert sum(killed_by_chance(tmp_path / f"store{seed}", 20, random.Random(seed)) for seed in range(1, 11)) >= 50


def killing(names: Sequence[str], calls: int) -> None:
    """Have this process killed just before its n-th call of these functions of `os`."""
    left = calls

    def killed(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal left
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1
            return real(*arguments, **options)

        return call

    for name in names:
        setattr(os, name, killed(getattr(os, name)))


def advance_until_call(path: Path, calls: int) -> None:
    """One change, in a process that is killed just before its n-th call that touches the disk."""
    torch.set_num_threads(1)
    store = Store.open(path)
    killing(("open", "close", "write", "pwrite", "ftruncate", "fsync", "replace", "unlink"), calls)
    advance(store)
    os._exit(0)


def test_a_kill_before_every_single_call_ends_with_the_same_objects(tmp_path: Path) -> None:
    """Contract 7: killed anywhere and done again, a change leaves what it leaves when never killed."""
    origin = start(tmp_path / "origin")
    for _ in range(2):
        advance(origin)
    unkilled = tmp_path / "unkilled"
    shutil.copytree(origin.path, unkilled)
    advance(Store.open(unkilled))
    Store.open(unkilled).gc()
    calls, exit_code = 0, None
    while exit_code != 0:
        path = tmp_path / f"killed{calls}"
        shutil.copytree(origin.path, path)
        writer = FORKS.Process(target=advance_until_call, args=(path, calls), daemon=True)
        writer.start()
        writer.join()
        exit_code = writer.exitcode
        assert exit_code in (0, -signal.SIGKILL)
        store = Store.open(path)
        if number_of(store) == 2:
            advance(store)
        store.gc()
        assert number_of(store) == 3
        assert files(path) == files(unkilled)
        assert (path / "manifest.json").read_bytes() == (unkilled / "manifest.json").read_bytes()
        calls += 1
    assert calls > 30
