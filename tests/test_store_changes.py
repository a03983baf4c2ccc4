"""Versions: what answers, under which name, and what is kept."""

import json
import shutil
from pathlib import Path

import pytest

from moecl._manifest import Reference, parse_manifest, parse_reference
from moecl.errors import StoreError, TaskError
from moecl.store import Store, encode
from store_changes import CHANGES, versioned
from store_parts import BASE, files, first, part, parts, record


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return versioned(tmp_path / "store")


def current(store: Store) -> dict[str, int]:
    return {task.name: task.version for task in Store.open(store.path).tasks()}


@pytest.mark.parametrize(
    "bad", ["a@", "a@0", "a@01", "a@Prod", "a@prod@2", "a@-x", "a@a b", "a@1.0", "a@9999999999", "@\n"]
)
def test_what_is_no_reference(store, bad):
    with pytest.raises(TaskError, match="behind @ stands a version"):
        store.record(bad)


def test_references():
    assert parse_reference("a.b-c_d") == Reference("a.b-c_d")
    assert parse_reference("a@7") == Reference("a", version=7)
    assert parse_reference("a@x-1_y") == Reference("a", alias="x-1_y")
    assert parse_reference("a@" + "x" * 32).alias == "x" * 32
    with pytest.raises(TaskError):
        parse_reference("a@" + "x" * 33)


def test_a_task_is_named_by_version_and_alias(store):
    assert store.record("a").version == 2
    assert store.record("a@1") == store.record("a@prod") == store.record("a", version=1)
    assert store.digests("a@prod") == store.record("a@1").parts
    with pytest.raises(TaskError, match="'a' has no version 3; it has 1, 2"):
        store.record("a@3")
    with pytest.raises(TaskError, match=r"'a' has no alias 'prd'; its aliases are: prod \(did you mean 'prod'\?\)"):
        store.record("a@prd")
    with pytest.raises(TaskError, match="'b' has no alias 'prod'; its aliases are: none yet"):
        store.record("b@prod")
    with pytest.raises(TaskError, match="no task 'x'; the tasks are: b, a"):
        store.record("x@prod")


def test_promote(store):
    assert store.promote("a").version == 2
    assert store.record("a@prod").version == 2
    assert store.promote("a@1", "beta").version == 1
    assert store.manifest.aliases == {"a": {"beta": 1, "prod": 2}}
    store.promote("a@prod", "beta")
    assert store.manifest.aliases_of(store.record("a")) == ["beta", "prod"]
    store.remove_alias("a", "beta")
    with pytest.raises(TaskError, match="no alias 'beta'"):
        store.remove_alias("a", "beta")
    store.remove_alias("a")
    assert Store.open(store.path).manifest.aliases == {}
    with pytest.raises(TaskError, match="'7': is no alias but a version"):
        store.promote("a", "7")
    with pytest.raises(TaskError, match="behind @ stands"):
        store.promote("a", "../x")
    with pytest.raises(TaskError, match="no version 9"):
        store.promote("a@9")


def test_rollback_and_forward(store):
    before = store.digests("a")
    assert store.rollback("a").version == 1
    assert current(store) == {"a": 1, "b": 1}
    assert first(store.read(store.digests("a")["task"])) == 1
    with pytest.raises(TaskError, match="'a' has no version older than its current one, 1"):
        store.rollback("a")
    with pytest.raises(TaskError, match="version 1 of task 'a' is the current one already"):
        store.rollback("a", 1)
    with pytest.raises(TaskError, match="give the task's name alone, 'a'"):
        store.rollback("a@1")
    assert store.rollback("a", 2).parts == before
    store.rollback("a")
    store.commit([(record("a"), parts(6))])
    assert [(one.version, one.superseded) for one in store.versions("a")] == [(1, True), (2, True), (3, False)]
    assert store.rollback("a").version == 2
    assert store.verify() == []


def test_what_a_rollback_brings_back_stays_as_it_was(tmp_path):
    """With retention live a version moves while it is the newest, and never again once it was replaced."""
    store = Store.create(tmp_path / "s", BASE)
    store.commit([(record("a", "live"), parts(1)), (record("b", "live"), parts(2))])
    store.commit([(record("a", "live"), parts(3, 0.75))], moved={"shared": part(0.75)})
    store.rollback("a")
    store.commit(moved={"shared": part(0.875)})
    assert {one.name: first(store.read(one.parts["shared"])) for one in store.tasks()} == {"a": 0.5, "b": 0.875}
    store.rollback("a", 2)
    store.commit(moved={"shared": part(1)})
    assert {one.name: first(store.read(one.parts["shared"])) for one in store.tasks()} == {"a": 0.75, "b": 1}


def test_retire(store):
    assert current(store) == {"b": 1, "a": 2}
    with pytest.raises(TaskError, match=r"'c' is retired; name its version \(c@1\), or bring it back with"):
        store.record("c")
    with pytest.raises(TaskError, match="'c' is retired"):
        store.promote("c")
    assert first(store.read(store.record("c@1").parts["task"])) == 3
    store.gc()
    assert first(store.read(store.record("c@1").parts["task"])) == 3
    with pytest.raises(TaskError, match="'c' is retired"):
        store.retire("c")
    with pytest.raises(TaskError, match="'a' is not retired"):
        store.unretire("a")
    assert store.unretire("c").version == 1
    assert current(store) == {"b": 1, "c": 1, "a": 2}
    store.promote("c")
    store.retire("c")
    with pytest.raises(TaskError, match="'c' is retired"):
        store.record("c@prod")


def test_a_retired_task_that_is_learned_again_is_back(store):
    store.commit([(record("c"), parts(9))])
    assert current(store) == {"b": 1, "a": 2, "c": 2}
    assert store.manifest.retired == []


def test_delete_a_version(store):
    with pytest.raises(StoreError, match="a@2: is the task's current version; let another answer first"):
        store.delete("a@2")
    with pytest.raises(StoreError, match="a@1: is also a@prod; promote another version to it first"):
        store.delete("a@1")
    with pytest.raises(TaskError, match=r"'a@prod': name a version to delete it \(a@2\), or the whole task \(a\)"):
        store.delete("a@prod")
    store.promote("a")
    own = {store.record("a@1").parts[name] for name in ("task", "gate")}
    assert [one.reference for one in store.would_delete("a@1")] == ["a@1"]
    assert store.delete("a@1") == (2, len(encode(part(1))) + len(encode(parts(1)["gate"])))
    assert not any((store.path / "objects" / f"{digest}.safetensors").exists() for digest in own)
    assert store.verify() == [], "the shared part, which others have too, is there"
    with pytest.raises(TaskError, match="no version 1; it has 2"):
        store.record("a@1")


def test_delete_a_task(store):
    kept = {digest for name in ("b", "c@1") for digest in store.digests(name).values()}
    store.delete("a")
    assert current(store) == {"b": 1}
    assert store.manifest.aliases == {}
    assert kept <= {path.stem for path in (store.path / "objects").iterdir()}
    assert store.verify() == []
    with pytest.raises(TaskError, match="no task 'a'"):
        store.delete("a")
    store.delete("c")
    assert store.manifest.retired == []
    assert first(store.training()["memory"]) == 4, "what further learning needs is left"


def test_a_number_is_never_given_again(store):
    """Or the log, an alias or a user's note could mean another version than it did."""
    store.rollback("a")
    store.delete("a@2")
    store.commit([(record("a"), parts(7))])
    assert store.record("a").version == 3
    store.delete("a")
    store.commit([(record("a"), parts(8))])
    assert store.record("a").version == 4


def test_a_store_of_format_1_is_read_and_raised(store):
    raw = json.loads((store.path / "manifest.json").read_text())
    old = {key: raw[key] for key in ("base", "training")} | {"format": 1, "tasks": []}
    for task in raw["tasks"]:
        old["tasks"].append({key: value for key, value in task.items() if key != "pinned"})
    (store.path / "manifest.json").write_text(json.dumps(old))
    (store.path / "audit.jsonl").unlink()
    again = Store.open(store.path)
    assert again.manifest.format == 1
    assert again.verify() == []
    again.promote("c")
    raised = parse_manifest(Path("m"), (store.path / "manifest.json").read_bytes())
    assert (raised.format, raised.aliases) == (2, {"c": {"prod": 1}})
    assert again.verify() == []


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_that_changes_nothing_else(store, tmp_path, name):
    """No change but `delete` and `gc` loses a file, and after each the store is whole and its log tells of it."""
    before, lines = files(store.path), len(list(store.audit()))
    CHANGES[name](store)
    lost = before - files(store.path)
    assert not lost or name in ("delete", "gc", "learn")
    assert not lost or name != "learn" or {path.split("/")[0] for path in lost} == {"training"}
    assert store.verify() == []
    [*_, (number, line)] = store.audit()
    assert number == lines + 1
    assert line.what == {"remove_alias": "promote"}.get(name, name)


def test_a_copy_answers_to_the_same_names(store, tmp_path):
    shutil.copytree(store.path, tmp_path / "copy")
    assert Store.open(tmp_path / "copy").record("a@prod") == store.record("a@1")
