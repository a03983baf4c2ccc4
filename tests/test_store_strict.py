"""What is damaged, foreign or of another version is refused, in one line that says what it is."""

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moecl.errors import StoreError
from moecl.store import Store, encode
from store_parts import BASE, files, first, part, parts, record


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.create(tmp_path / "store", BASE)


def damage_flip(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


def damage_header(data: bytes) -> bytes:
    return b"\xff" * 8 + data[8:]


def damage_truncate(data: bytes) -> bytes:
    return data[:-5]


def damage_empty(data: bytes) -> bytes:
    return b""


def damage_append(data: bytes) -> bytes:
    return data + b"\0"


def damage_add_a_tensor(data: bytes) -> bytes:
    return safetensors.torch.save(safetensors.torch.load(data) | {"extra": torch.ones(1)})


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (damage_flip, "altered"),
        (damage_header, "truncated"),
        (damage_truncate, r"truncated \(\d+ of \d+ bytes\)"),
        (damage_empty, "truncated or altered"),
        (damage_append, "altered"),
        (damage_add_a_tensor, "altered"),
    ],
)
def test_a_damaged_object_is_refused(store: Store, damage: Callable[[bytes], bytes], words: str) -> None:
    store.commit([(record("a"), parts(1)), (record("b"), parts(2)), (record("c"), parts(3))])
    digest = store.digests("b")["shared"]
    path = store.path / "objects" / f"{digest}.safetensors"
    data = damage(path.read_bytes())
    path.write_bytes(data)
    with pytest.raises(StoreError, match=words) as caught:
        store.read(digest)
    message = str(caught.value)
    assert f"its sha256 is {hashlib.sha256(data).hexdigest()}, not {digest}" in message
    assert "part 'shared' of task 'a' (version 1), part 'shared' of task 'b' (version 1) and 1 more" in message
    assert store.verify() == [message]
    assert first(store.read(store.digests("b")["task"])) == 2


@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_flipped_byte_and_any_cut_is_noticed(store: Store, data: st.DataObject) -> None:
    store.commit([(record(), parts(1))])
    digest = store.digests("a")["task"]
    path = store.path / "objects" / f"{digest}.safetensors"
    whole = encode(part(1))
    at = data.draw(st.integers(0, len(whole) - 1))
    flipped = whole[:at] + bytes([whole[at] ^ data.draw(st.integers(1, 255))]) + whole[at + 1 :]
    for damaged in (flipped, whole[:at]):
        path.write_bytes(damaged)
        with pytest.raises(StoreError, match="needed by part 'task' of task 'a'"):
            store.read(digest)
    path.write_bytes(whole)


def test_a_missing_object_says_who_needs_it(store: Store) -> None:
    store.commit([(record("a"), parts(1))], training={"discriminator": part(9)})
    path = store.path / "objects" / f"{store.digests('a')['gate']}.safetensors"
    path.unlink()
    (store.path / "training" / f"discriminator-{store.manifest.training['discriminator']}.safetensors").unlink()
    with pytest.raises(StoreError, match=r"missing; needed by part 'gate' of task 'a' \(version 1\); restore"):
        store.read(store.digests("a")["gate"])
    with pytest.raises(StoreError, match=r"missing; needed by further learning \(discriminator\)"):
        store.training()
    with pytest.raises(StoreError, match=f"{path.name}: No such file"):
        store.bytes()
    assert len(store.verify()) == 2


def test_a_pickle_is_never_loaded(store: Store, tmp_path: Path) -> None:
    torch.save(part(1), tmp_path / "pickle")
    data = (tmp_path / "pickle").read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    (store.path / "objects" / f"{digest}.safetensors").write_bytes(data)
    with pytest.raises(StoreError, match="not a safetensors file"):
        store.read(digest)


@pytest.mark.parametrize(
    ("expect", "words"),
    [
        ({"head": [3, 2]}, r"head has shape \[2, 3\], expected \[3, 2\]"),
        ({"head": [2, 3], "layers.0.gate": [2, 4]}, "has no tensor 'layers.0.gate'"),
        ({}, "has an unexpected tensor 'head'"),
        ({"tail": [2, 3]}, "has no tensor 'tail' and an unexpected tensor 'head' .2 names differ"),
    ],
)
def test_other_tensors_than_expected_are_refused(store: Store, expect: dict[str, list[int]], words: str) -> None:
    store.commit([(record(), {"head": {"head": torch.zeros(2, 3)}})])
    digest = store.digests("a")["head"]
    store.read(digest, expect={"head": torch.Size([2, 3])})
    with pytest.raises(StoreError, match=words):
        store.read(digest, expect=expect)


BAD_DIGESTS = ["../../secret", "A" * 64, "0" * 63, "0" * 65, "0" * 64 + "\n", "/" + "0" * 63, "", "０" * 64]


@pytest.mark.parametrize("digest", BAD_DIGESTS)
def test_a_digest_is_never_a_path(store: Store, digest: str) -> None:
    with pytest.raises(StoreError, match="not a sha256"):
        store.read(digest)
    store.commit([(record(), parts(1))], training={"memory": part(1)})
    raw = json.loads((store.path / "manifest.json").read_text())
    for keys in (("tasks", 0, "parts", "task"), ("training", "memory"), ("base", "sha256")):
        with pytest.raises(StoreError, match=re.escape(".".join(map(str, keys)).replace(".0", "[0]"))):
            open_with(store, changed(raw, keys, digest))
    for name in ("../memory", "a/b", ""):
        with pytest.raises(StoreError, match="training"):
            open_with(store, changed(raw, ("training",), {name: "0" * 64}))


def changed(raw: Any, keys: tuple[str | int, ...], value: Any) -> Any:
    raw = json.loads(json.dumps(raw))
    at = raw
    for key in keys[:-1]:
        at = at[key]
    at[keys[-1]] = value
    return raw


def open_with(store: Store, raw: Any) -> Store:
    text = raw if isinstance(raw, bytes) else json.dumps(raw).encode()
    (store.path / "manifest.json").write_bytes(text)
    return Store.open(store.path)


@pytest.mark.parametrize(
    ("keys", "value", "words"),
    [
        (("format",), 3, "has format 3, this moecl reads formats up to 2; upgrade moecl"),
        (("aliases",), {"a": {"prod": 2}}, "an alias or a retired task names a version that is not there"),
        (("aliases",), {"a": {"2": 1}}, r"aliases\.a\.2"),
        (("retired",), ["b"], "an alias or a retired task names a version that is not there"),
        (("tasks", 0, "superseded"), True, "two current versions or none"),
        (("format",), "1", "format: "),
        (("colour",), "red", "colour: Extra inputs are not permitted"),
        (("tasks", 0, "version"), 0, r"tasks\[0\].version: .* found 0"),
        (("tasks", 0, "task", "kind"), "guess", r"tasks\[0\].task.kind"),
        (("tasks",), {}, "tasks: "),
        (("base",), None, "base: "),
    ],
)
def test_a_wrong_manifest_is_one_line(store: Store, keys: tuple[str | int, ...], value: Any, words: str) -> None:
    store.commit([(record(), parts(1))])
    raw = json.loads((store.path / "manifest.json").read_text())
    with pytest.raises(StoreError, match=words) as caught:
        open_with(store, changed(raw, keys, value))
    assert str(store.path / "manifest.json") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_two_current_versions_are_refused(store: Store) -> None:
    store.commit([(record(), parts(1))])
    raw = json.loads((store.path / "manifest.json").read_text())
    with pytest.raises(StoreError, match="two current versions"):
        open_with(store, raw | {"tasks": raw["tasks"] * 2})


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b'{\n"format": 1,\n"base": oops}', "manifest.json:3: broken JSON"),
        (b"", "manifest.json:1: broken JSON"),
        (b"\xff\xfe", "not UTF-8"),
        (b"[" * 100_000, "broken JSON"),
        (b"9" * 5000, "broken JSON"),
        (b"[]", "manifest: "),
    ],
)
def test_a_broken_manifest_is_one_line(store: Store, data: bytes, words: str) -> None:
    with pytest.raises(StoreError, match=words):
        open_with(store, data)


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_damage_to_a_manifest_is_a_store_error_or_a_manifest(store: Store, data: st.DataObject) -> None:
    whole = store.manifest.with_version(record(), {"task": "0" * 64}).dump()
    at = data.draw(st.integers(0, len(whole) - 1))
    cut = data.draw(st.integers(0, 8))
    try:
        open_with(store, whole[:at] + data.draw(st.binary(max_size=4)) + whole[at + cut :])
    except StoreError as error:
        assert "\n" not in str(error)  # noqa: PT017
    open_with(store, whole)


def test_what_is_no_store_says_what_it_is(tmp_path: Path) -> None:
    def message(path: Path) -> str:
        with pytest.raises(StoreError) as caught:
            Store.open(path)
        assert str(caught.value).startswith(f"{path}: not a store: ")
        return str(caught.value).removeprefix(f"{path}: not a store: ")

    assert message(tmp_path / "nothing") == "there is no such folder"
    assert message(tmp_path) == "it is an empty folder"
    run = tmp_path / "run"
    Store.create(run / "store", BASE)
    assert message(run) == f"it is a run folder, its store is {run / 'store'}"
    assert message(tmp_path) == "it is a folder with run"
    (run / "store" / "manifest.json").unlink()
    assert "without its manifest.json" in message(run / "store")
    assert message(run / "store" / ".lock") == "it is a file"
    assert message(run / "store" / ".lock" / "x") == "there is no such folder"


def test_create_refuses_a_folder_in_use_and_mends_one_that_a_kill_left(tmp_path: Path) -> None:
    path = tmp_path / "store"
    assert not Store.exists(path)
    Store.create(path, BASE)
    assert Store.exists(path)
    with pytest.raises(StoreError, match="already a store"):
        Store.create(path, BASE)
    with pytest.raises(StoreError, match=r"a run folder, its store is .*; a store needs a new or empty folder"):
        Store.create(tmp_path, BASE)
    with pytest.raises(StoreError, match=r"manifest\.json: it is a file; a store needs"):
        Store.create(path / "manifest.json", BASE)
    assert files(tmp_path) == {"store/manifest.json", "store/audit.jsonl", "store/.lock"}
    (path / "manifest.json").unlink()
    assert Store.create(path, BASE).tasks() == []


def test_a_copy_without_empty_folders_works(store: Store) -> None:
    store.commit([(record(), parts(1))])
    shutil.rmtree(store.path / "tmp")
    shutil.rmtree(store.path / "training")
    assert Store.open(store.path).training() == {}
    store.commit([(record("b"), parts(2))])
    assert store.verify() == []


def test_a_half_copied_store_says_what_is_missing(store: Store, tmp_path: Path) -> None:
    store.commit([(record("a"), parts(1)), (record("b"), parts(2))])
    half = tmp_path / "half"
    shutil.copytree(store.path, half, ignore=lambda folder, names: names[1:] if folder.endswith("objects") else [])
    problems = Store.open(half, readonly=True).verify()
    assert len(problems) == 4
    assert all("missing; needed by part" in problem for problem in problems)
