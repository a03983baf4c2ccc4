"""What is kept of users' texts: whole or not used, bounded, and never a reason to stop."""

import os
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from moecl.data import derived
from moecl.data.derived import Derived


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("MOECL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "prefix"


def entry(seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    return {"hidden_states": torch.randn(5, 8, generator=torch.Generator().manual_seed(seed)).to(dtype)}


def key(number: int) -> str:
    return f"{number:064x}"[::-1]


def made(most: int = 10**6) -> tuple[Derived, list[str]]:
    notes: list[str] = []
    return Derived("prefix", most, notes.append), notes


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def equal(found, expected) -> bool:
    return found is not None and all(torch.equal(found[name], tensor) for name, tensor in expected.items())


SIZE = len(save({**entry(), "sha256": torch.zeros(32, dtype=torch.uint8)}))  # of an entry's file


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int32])
def test_what_is_put_comes_back(dtype):
    kept, notes = made()
    assert kept.get(key(0)) is None
    kept.put(key(0), entry(dtype=dtype))
    assert equal(made()[0].get(key(0)), entry(dtype=dtype))
    assert notes == []


def test_what_other_code_computed_is_not_used(monkeypatch):
    made()[0].put(key(0), entry())
    monkeypatch.setitem(derived.KINDS, "prefix", derived.KINDS["prefix"] + 1)
    assert made()[0].get(key(0)) is None
    made()[0].put(key(0), entry(1))
    assert equal(made()[0].get(key(0)), entry(1))


def test_a_damaged_entry_is_not_used_and_written_again(cache):
    kept, notes = made()
    kept.put(key(1), entry())
    [path] = files(cache)
    good = path.read_bytes()
    for place in range(len(good)):
        path.write_bytes(good[:place])
        assert kept.get(key(1)) is None
        path.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
        found = kept.get(key(1))
        assert found is None or equal(found, entry()), "a byte that says nothing may be any"
    kept.put(key(1), entry())
    assert path.read_bytes() == good
    assert notes == []


def test_an_entry_under_anothers_name_is_not_used(cache):
    kept, _ = made()
    kept.put(key(1), entry())
    [path] = files(cache)
    other = cache / key(2)[:2] / f"{key(2)}.safetensors"
    other.parent.mkdir(exist_ok=True)
    os.rename(path, other)
    assert kept.get(key(2)) is None


def test_the_oldest_used_go_first(cache):
    kept, notes = made(10 * SIZE)
    for number in range(8):
        kept.put(key(number), entry(number))
    for number in range(8):
        os.utime(next(cache.rglob(f"{key(number)}*")), (number, number))
    later, _ = made(10 * SIZE)
    later.get(key(0))  # used again
    for number in range(8, 14):
        later.put(key(number), entry(number))
    there = {number for number in range(14) if later.get(key(number)) is not None}
    assert {0, *range(8, 14)} <= there
    assert there.isdisjoint(range(1, 4))
    assert sum(path.stat().st_size for path in files(cache)) <= 10 * SIZE
    assert notes == []


def test_what_this_pass_used_is_not_removed_for_what_comes_after(cache):
    kept, notes = made(4 * SIZE)
    for number in range(20):
        kept.put(key(number), entry(number))
    there = [number for number in range(20) if kept.get(key(number)) is not None]
    assert len(there) == 4
    assert there == list(range(len(there)))
    assert len(notes) == 1
    assert notes[0].startswith(f"prefix cache {cache}: it is full (")
    time.sleep(0.01)
    kept.begin()
    kept.put(key(30), entry(30))
    assert kept.get(key(30)) is not None
    assert kept.get(key(0)) is None


def test_an_entry_above_the_bound_drives_nothing_out(cache):
    made()[0].put(key(0), entry())
    small, notes = made(SIZE // 2)
    small.put(key(1), entry(1))
    assert small.get(key(0)) is not None
    assert len(notes) == 1


@pytest.mark.parametrize("fault", ["a file in its place", "disk full", "read-only"])
def test_what_cannot_be_written_is_told_once(cache, monkeypatch, fault):
    kept, notes = made()
    if fault == "a file in its place":
        cache.parent.mkdir()
        cache.write_text("")
    else:

        def write_bytes(self, data):
            with self.open("wb") as file:
                file.write(data[:10])
            raise OSError(28 if fault == "disk full" else 30, fault)

        monkeypatch.setattr(Path, "write_bytes", write_bytes)
    for number in range(3):
        kept.put(key(number), entry(number))
        assert kept.get(key(number)) is None
    assert len(notes) == 1
    assert "cannot be written" in notes[0]
    assert "\n" not in notes[0]
    monkeypatch.undo()
    assert not cache.is_dir() or files(cache) == [], "no half file is left"


def test_what_dead_processes_left_is_removed(cache):
    kept, _ = made()
    kept.put(key(0), entry())
    [path] = files(cache)
    for name, age in {"old": derived.STALE + 60, "new": 0}.items():
        draft = path.with_name(f".{name}.tmp")
        draft.write_bytes(b"half")
        os.utime(draft, (time.time() - age, time.time() - age))
    made()[0].put(key(1), entry(1))
    assert [one.name for one in files(cache) if one.suffix == ".tmp"] == [".new.tmp"]


def test_many_at_once():
    """Writers, readers and removers of the same few entries: what is got is right."""
    wrong = []

    def work(seed: int) -> None:
        kept, notes = made(6 * SIZE)
        for turn in range(150):
            number = (seed * 31 + turn * 7) % 12
            found = kept.get(key(number))
            if found is None:
                kept.put(key(number), entry(number))
            elif not equal(found, entry(number)):
                wrong.append(number)
            if turn % 20 == 0:
                kept.begin()
        wrong.extend(note for note in notes if "written" in note)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_counted_and_cleared(cache):
    assert derived.taken("prefix") == (cache, 0, 0)
    derived.clear("prefix")
    kept, _ = made()
    for number in range(3):
        kept.put(key(number), entry(number))
    assert derived.taken("prefix") == (cache, 3, sum(path.stat().st_size for path in files(cache)))
    assert cache.stat().st_mode & 0o077 == 0, "texts may be private"
    derived.clear("prefix")
    assert not cache.exists()
    kept.put(key(0), entry())
    assert kept.get(key(0)) is not None
