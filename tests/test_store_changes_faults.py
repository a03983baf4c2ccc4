"""Every change, killed or failing anywhere: a reader sees the old model or the new one, and the log is never broken."""

import errno
import os
import random
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch

from moecl.errors import BusyError, StoreError
from moecl.store import Store
from store_changes import CHANGES, versioned
from store_parts import BASE, files, first, part, parts, record
from test_store_faults import FORKS, killing

ANYWHERE = ("open", "close", "write", "pwrite", "ftruncate", "fsync", "replace", "unlink")


def whole(path: Path) -> Store:
    """A reader's store, after every object of every version was read and found to be of that version."""
    store = Store.open(path, readonly=True)
    for task in store.manifest.tasks:
        assert {first(store.read(task.parts[name])) for name in ("task", "gate")} == {task.settings["number"]}
    return store


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy it before changing anything."""
    return versioned(tmp_path_factory.mktemp("origin") / "store").path


def changed(origin: Path, path: Path, name: str) -> Store:
    """A copy with the change made, undisturbed, and what nothing needs removed."""
    shutil.copytree(origin, path)
    store = Store.open(path)
    CHANGES[name](store)
    store.gc()
    return store


def check_settled(path: Path, name: str, done: Store, before: bytes) -> None:
    """The change was made or not; made again, if it was not, it ends as if it had never been disturbed."""
    store = whole(path)
    assert store.verify() == []
    if (path / "manifest.json").read_bytes() == before:
        CHANGES[name](store := Store.open(path))
    assert store.manifest == done.manifest
    Store.open(path).gc()
    assert files(path) == files(done.path)
    assert whole(path).verify() == []
    assert (path / "manifest.json").read_bytes() == (done.path / "manifest.json").read_bytes()


@pytest.mark.parametrize("call", ["open", "write", "fsync", "replace", "unlink", "ftruncate"])
@pytest.mark.parametrize("name", CHANGES)
def test_any_failing_call_loses_nothing(
    origin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, call: str
) -> None:
    done, before = changed(origin, tmp_path / "done", name), (origin / "manifest.json").read_bytes()
    real, at, failed = getattr(os, call), 0, True
    while failed:
        path = tmp_path / str(at)
        shutil.copytree(origin, path)
        store, left, failed = Store.open(path), at, False

        def fail_once(*arguments: Any, **options: Any) -> Any:
            nonlocal left, failed
            left -= 1
            if left == -1:
                failed = True
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(*arguments, **options)

        with monkeypatch.context() as patch, suppress(StoreError):
            patch.setattr(os, call, fail_once)
            CHANGES[name](store)
        check_settled(path, name, done, before)
        at += 1
    assert at > 1 or call in ("unlink", "replace")


def change_until_call(path: Path, name: str, calls: int) -> None:
    """One change, in a process that is killed just before its n-th call that touches the disk."""
    torch.set_num_threads(1)
    store = Store.open(path)
    killing(ANYWHERE, calls)
    CHANGES[name](store)
    os._exit(0)


@pytest.mark.parametrize(
    "name",
    [one if one in ("rollback", "delete", "gc") else pytest.param(one, marks=pytest.mark.slow) for one in CHANGES],
)
def test_a_kill_before_every_single_call(origin: Path, tmp_path: Path, name: str) -> None:
    done, before = changed(origin, tmp_path / "done", name), (origin / "manifest.json").read_bytes()
    calls, exit_code = 0, None
    while exit_code != 0:
        path = tmp_path / str(calls)
        shutil.copytree(origin, path)
        writer = FORKS.Process(target=change_until_call, args=(path, name, calls), daemon=True)
        writer.start()
        writer.join()
        exit_code = writer.exitcode
        check_settled(path, name, done, before)
        calls += 1
    assert calls > 10


# Killed by chance, with a reader beside it


def churn(store: Store) -> None:
    """A round of every change, on whatever a killed one left."""
    if "a" in store.manifest.retired:
        store.unretire("a")
    number = store.manifest.newest()["a"] + 1
    store.commit([(record("a", number=number), parts(number))], training={"memory": part(number)})
    store.promote("a")
    store.rollback("a")
    store.retire("a")
    store.unretire("a")
    store.rollback("a", number)
    for task in store.versions("a")[:-1]:
        store.delete(task.reference)
    store.gc()


def churn_for_ever(path: Path, ready: Connection) -> None:
    torch.set_num_threads(1)
    store = Store.open(path)
    ready.send(True)
    while True:
        churn(store)


def read_beside(path: Path) -> None:
    """Objects of what a reader's manifest names go with `delete` and `gc`; then it has changed, and is read again."""
    while True:
        store = Store.open(path, readonly=True)
        try:
            for task in store.manifest.tasks:
                assert first(store.read(task.parts["task"])) == task.settings["number"]
            return
        except StoreError:
            if not store.refresh():
                raise


def killed_by_chance(path: Path, rounds: int, chance: random.Random) -> int:
    """Kill a writer `rounds` times, reading all along. Returns how many lines of the log the killed wrote."""
    store = Store.create(path, BASE)
    store.commit([(record("a", number=1), parts(1))], training={"memory": part(1)})
    took, written = 0.5, 0
    for round_number in range(rounds):
        ready, theirs = FORKS.Pipe(duplex=False)
        writer = FORKS.Process(target=churn_for_ever, args=(path, theirs), daemon=True)
        writer.start()
        ready.recv()
        until, before = time.monotonic() + chance.uniform(0, 1.5 * took), len(list(store.audit()))
        while time.monotonic() < until or (round_number % 4 == 0 and len(list(store.audit())) == before):
            read_beside(path)
        writer.kill()
        writer.join()
        writer.close()
        whole(path)
        assert Store.open(path).verify() == []
        written += len(list(store.audit())) - before
        begun = time.monotonic()
        with store.lock():
            churn(store)
        took = time.monotonic() - begun
        assert whole(path).verify() == []
        assert [task.version for task in store.manifest.tasks] == [store.manifest.newest()["a"]]
        assert os.listdir(path / "tmp") == []
        assert len(os.listdir(path / "objects")) == 3
    return written


def test_a_kill_at_any_time(tmp_path: Path) -> None:
    assert killed_by_chance(tmp_path / "store", 10, random.Random(0)) >= 3


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_200_kills(tmp_path: Path) -> None:
    assert sum(killed_by_chance(tmp_path / f"{seed}", 20, random.Random(seed)) for seed in range(1, 11)) >= 50


# Folders that cannot be written, or are not all there


def test_a_folder_that_cannot_be_written(origin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may write anywhere, so the refusal is made here."""
    path = tmp_path / "store"
    shutil.copytree(origin, path)
    real = os.open

    def refuse(at: Any, flags: int, *arguments: Any, **options: Any) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), at)
        return real(at, flags, *arguments, **options)

    before = {name: (path / name).read_bytes() for name in files(path)}
    monkeypatch.setattr(os, "open", refuse)
    for change in CHANGES.values():
        with pytest.raises(StoreError, match="not writable"):
            change(Store.open(path))
    assert {name: (path / name).read_bytes() for name in files(path)} == before
    assert Store.open(path).verify() == []


@pytest.mark.parametrize("name", CHANGES)
def test_two_writers(origin: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(origin, tmp_path / "store")
    store, other = Store.open(tmp_path / "store"), Store.open(tmp_path / "store")
    with store.lock(), pytest.raises(BusyError, match="in use by pid"):
        CHANGES[name](other)
    store.promote("a", "seen")
    CHANGES[name](other)  # on top of what it had not seen
    assert whole(store.path).verify() == []
    assert "seen" in other.manifest.aliases.get("a", {}) or name == "delete"


DAMAGES: dict[str, Callable[[Path], object]] = {
    "flipped": lambda path: path.write_bytes(path.read_bytes()[:-1] + b"\x7f"),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-4]),
    "missing": Path.unlink,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_version_is_told_and_can_be_deleted(origin: Path, tmp_path: Path, damage: str) -> None:
    """And is no burden to the other versions."""
    shutil.copytree(origin, tmp_path / "store")
    store = Store.open(tmp_path / "store")
    DAMAGES[damage](store.path / "objects" / f"{store.digests('a@1')['task']}.safetensors")
    [problem] = store.verify()
    assert "needed by part 'task' of task 'a' (version 1)" in problem
    assert first(store.read(store.digests("a")["task"])) == 4
    store.promote("a")
    store.delete("a@1")
    assert store.verify() == []


def test_values_that_are_not_finite(tmp_path: Path) -> None:
    store = Store.create(tmp_path / "store", BASE)
    bad = parts(1)
    bad["task"]["layers.0.up_proj.lora_B"][1, 1] = float("nan")
    store.commit(
        [(record("a"), bad), (record("b"), parts(2))], training={"memory": {"mean": torch.tensor([1, torch.inf])}}
    )
    one, two = store.verify()
    assert "layers.0.up_proj.lora_B has values that are not finite; needed by part 'task' of task 'a'" in one
    assert "mean has values that are not finite; needed by further learning (memory)" in two


def test_a_copy_of_half_a_folder(origin: Path, tmp_path: Path) -> None:
    """Whatever is missing is told, in a line each; a copy without its manifest is no store."""
    whole_store = Store.open(origin)
    half = tmp_path / "half"
    shutil.copytree(origin, half, ignore=lambda folder, names: names[1:] if folder.endswith("objects") else [])
    problems = Store.open(half).verify()
    assert len(problems) == len(whole_store.manifest.digests()) - 1
    (half / "audit.jsonl").write_bytes((origin / "audit.jsonl").read_bytes()[:-300])
    assert "does not end with manifest.json as it is" in Store.open(half).verify()[0]
    (half / "manifest.json").unlink()
    with pytest.raises(StoreError, match=r"a store without its manifest\.json; copy it again"):
        Store.open(half)
