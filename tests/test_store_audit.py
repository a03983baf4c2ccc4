"""The audit log: who changed what, bound line to line and to the manifest."""

import getpass
import json
import os
import pwd
import re
import sys
from pathlib import Path

import pytest

from moecl import _audit
from moecl.errors import StoreError
from moecl.store import Store, encode
from store_changes import versioned
from store_parts import part, parts, record


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return versioned(tmp_path / "store")


def lines(store: Store) -> list[_audit.Line]:
    found = [line for _, line in store.audit()]
    assert None not in found
    return found


def log(store: Store) -> Path:
    return store.path / "audit.jsonl"


@pytest.mark.parametrize("program", ["/somewhere/bin/moecl", "/somewhere/moecl/__main__.py"])
def test_what_a_line_tells(store, monkeypatch, program):
    old, new = store.record("a"), store.record("a@1")
    monkeypatch.setattr(sys, "argv", [program, "rollback", "runs/x y", "a"])
    monkeypatch.setenv("LOGNAME", "somebody-else")
    assert getpass.getuser() == "somebody-else"
    store.rollback("a")
    line = lines(store)[-1]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", line.time)
    assert (line.what, line.command) == ("rollback", "moecl rollback 'runs/x y' a")
    assert line.user == pwd.getpwuid(os.getuid()).pw_name, "the account, whatever the environment says"
    [change] = line.changes
    assert (change.task, change.before.version, change.after.version) == ("a", 2, 1)
    assert (change.before.parts, change.after.parts) == (old.parts, new.parts)


def test_every_change_has_its_line(store):
    store.unretire("c")
    store.remove_alias("a")
    store.delete("a")
    store.gc()
    assert [line.what for line in lines(store)] == [
        *("create", "learn", "learn", "learn", "learn", "learn", "learn", "promote", "retire"),
        *("unretire", "promote", "delete", "gc"),
    ]
    moved = lines(store)[6]
    assert moved.changes == []
    assert [*moved.detail["moved"]] == ["shared"]
    assert len(moved.detail["moved"]["shared"]["before"]) == 1
    assert [(one.task, one.before and one.before.version) for one in lines(store)[4].changes] == [("a", 1)]
    deleted = lines(store)[11]
    assert [(one.before.version, one.after) for one in deleted.changes] == [(1, None), (2, None)]
    assert lines(store)[12].detail == {"files": 1, "bytes": len(encode(part(0.75)))}
    store.gc()
    assert len(lines(store)) == 13, "nothing was removed"


def test_each_line_is_bound_to_the_one_before_and_to_the_manifest(store):
    raw = [json.loads(line) for line in log(store).read_text().splitlines()]
    assert raw[0]["previous"] == "0" * 64
    assert [line["previous"] for line in raw[1:]] == [line["sha256"] for line in raw[:-1]]
    assert [line["manifest"]["before"] for line in raw[1:]] == [line["manifest"]["after"] for line in raw[:-1]]
    assert raw[0]["manifest"]["before"] is None


def edit(store: Store, number: int, change) -> None:
    found = log(store).read_bytes().splitlines(keepends=True)
    found[number - 1] = change(found[number - 1])
    log(store).write_bytes(b"".join(found))


@pytest.mark.parametrize("number", [1, 5, 9])
def test_an_edit_is_found(store, number):
    """Of any line, the last one too, in any place."""
    whole = log(store).read_bytes()
    name = pwd.getpwuid(os.getuid()).pw_name.encode()
    edit(store, number, lambda line: line.replace(b'"user": "' + name, b'"user": "nobody'))
    assert store.verify() == [
        f"{log(store)}:{number}: altered: it is not what was written; compare it with a copy of the store"
    ]
    assert [n for n, line in store.audit() if line is None] == [number]
    log(store).write_bytes(whole)
    for at in range(0, len(whole) - 1, 97):
        log(store).write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        assert store.verify(), at


@pytest.mark.parametrize("kept", [slice(1, None), slice(0, -1), slice(0, -2)])
def test_missing_lines_are_found(store, kept):
    found = log(store).read_bytes().splitlines(keepends=True)
    log(store).write_bytes(b"".join(found[kept]))
    assert len(store.verify()) == 1


def test_a_line_left_out_or_twice_is_found(store):
    found = log(store).read_bytes().splitlines(keepends=True)
    log(store).write_bytes(b"".join(found[:4] + found[5:]))
    assert any(":5: does not follow the line before" in one for one in store.verify())
    log(store).write_bytes(b"".join(found[:4] + found[3:]))
    assert any(":5: does not follow the line before" in one for one in store.verify())


def test_a_manifest_that_something_else_wrote_is_found_for_good(store):
    path = store.path / "manifest.json"
    path.write_text(path.read_text().replace('"prod": 1', '"prod": 2'))
    assert store.refresh()
    [problem] = store.verify()
    assert "does not end with manifest.json as it is" in problem
    store.promote("a", "beta")
    [problem] = store.verify()
    assert ":10: manifest.json was changed before this line by something that keeps no log" in problem


def test_a_line_cut_short_anywhere_is_removed_and_told(store):
    before, manifest = log(store).read_bytes(), (store.path / "manifest.json").read_bytes()
    store.promote("a", "beta")
    after = log(store).read_bytes()
    for size in (1, 17, len(after) - len(before) - 1):
        log(store).write_bytes(after[: len(before) + size])
        (store.path / "manifest.json").write_bytes(manifest)  # which comes after the line
        assert Store.open(store.path).verify() == [], "a reader leaves it alone"
        store.promote("a", "gamma")
        assert lines(store)[-1].note == f"{size} bytes of a line that was cut short were removed"
        assert len(lines(store)) == 10
        assert store.verify() == []


def test_a_change_cut_short_after_its_line(store, monkeypatch):
    """The manifest stays what it was; the log tells that the change was begun, and goes on from the old manifest."""

    def fail(*arguments, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("moecl.store.atomic_write", fail)
        with pytest.raises(KeyboardInterrupt):
            store.rollback("a")
    assert Store.open(store.path).record("a").version == 2
    assert store.verify() == []
    store.retire("b")
    assert store.verify() == []
    begun, after = lines(store)[-2:]
    assert (begun.what, after.what) == ("rollback", "retire")
    assert after.manifest.before == begun.manifest.before != begun.manifest.after


def test_a_log_that_cannot_be_written_refuses_the_change(store, monkeypatch):
    before = log(store).read_bytes()
    real = os.write

    def write(file, data):
        if os.readlink(f"/proc/self/fd/{file}").endswith("audit.jsonl"):
            real(file, bytes(data)[:50])
            raise OSError(28, "No space left on device")
        return real(file, data)

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", write)
        with pytest.raises(StoreError, match=r"audit\.jsonl: the disk is full"):
            store.commit([(record("d"), parts(5))], training={"memory": part(5)})
    assert log(store).read_bytes() == before
    assert [task.name for task in Store.open(store.path).tasks()] == ["b", "a"]
    assert store.verify() == []


def test_a_command_that_no_encoding_knows(store, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["moecl", "x\udcff\n" + "y" * 1000])
    store.promote("a")
    assert len(lines(store)[-1].command) == 500
    assert store.verify() == []


def test_no_log_is_no_problem(store):
    """As in a store of an older moecl, or one from the hub."""
    log(store).unlink()
    assert store.verify() == []
    assert list(store.audit()) == []
    store.promote("a")
    [line] = lines(store)
    assert line.previous == "0" * 64
    assert line.manifest.before is not None
    assert store.verify() == []
