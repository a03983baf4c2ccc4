"""Parts on disk: bitwise, versioned; readers and writers beside each other."""

import hashlib
import json
import os
import random
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from moecl.config import Task, TaskConfig
from moecl.errors import BusyError, StoreError, TaskError
from moecl.store import Store, TaskRecord, encode
from store_parts import BASE, files, first, part, parts, record, same_bits


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.create(tmp_path / "store", BASE)


def test_commit_and_read(store: Store) -> None:
    store.commit([(record("a"), parts(1)), (record("b"), parts(2))], training={"discriminator": part(7)})
    again = Store.open(store.path, readonly=True)
    assert again.manifest == store.manifest
    assert again.manifest.base == BASE
    assert [(task.name, task.version) for task in again.tasks()] == [("a", 1), ("b", 1)]
    digests = again.digests("b")
    assert {name: first(again.read(digest)) for name, digest in digests.items()} == {
        "gate": 2,
        "shared": 0.5,
        "task": 2,
    }
    assert same_bits(again.training()["discriminator"], part(7))
    expected = {f"objects/{digest}.safetensors" for name in "ab" for digest in again.digests(name).values()}
    expected |= {
        "manifest.json",
        "audit.jsonl",
        ".lock",
        f"training/discriminator-{again.manifest.training['discriminator']}.safetensors",
    }
    assert files(store.path) == expected
    assert again.verify() == []


DTYPES = [
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
]


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """Any bits, NaN and negative zero too, in any shape and layout."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    count = torch.Size(shape).numel() * dtype.itemsize
    bits = torch.frombuffer(bytearray(draw(st.binary(min_size=count, max_size=count)) + b"\0"), dtype=torch.uint8)[
        :count
    ]
    values = (bits % 2).view(torch.bool) if dtype == torch.bool else bits.clone().view(dtype)
    tensor = values.reshape(shape)
    layout = draw(st.sampled_from(["plain", "transposed", "sliced"]))
    if layout == "sliced" and tensor.dim():
        return tensor[::2]
    return tensor.mT if layout == "transposed" and tensor.dim() > 1 else tensor


NAMES = st.one_of(
    st.sampled_from(["head", "layers.0.gate", "layers.12.down_proj.lora_B"]), st.text(min_size=1, max_size=8)
).filter(lambda name: name != "__metadata__")


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(NAMES, tensors(), max_size=5), st.randoms())
def test_any_tensors_survive_bitwise(store: Store, given_tensors: dict[str, Tensor], shuffle: random.Random) -> None:
    store.commit([(record(), {"task": given_tensors})])
    digest = store.digests("a")["task"]
    shapes = {name: tensor.shape for name, tensor in given_tensors.items()}
    wanted = {name: tensor.contiguous() for name, tensor in given_tensors.items()}
    assert same_bits(store.read(digest, expect=shapes), wanted)
    names = list(given_tensors)
    shuffle.shuffle(names)
    again = encode({name: given_tensors[name] for name in names})
    assert hashlib.sha256(again).hexdigest() == digest


def test_tensors_that_share_memory_or_need_grad(store: Store) -> None:
    whole = torch.arange(12.0, requires_grad=True)
    shared = {"head": whole, "layers.0.gate": whole[2:6].view(2, 2), "tied": whole}
    store.commit([(record(), {"task": shared})])
    read = store.read(store.digests("a")["task"])
    assert same_bits(read, {name: tensor.detach().contiguous() for name, tensor in shared.items()})
    read["head"][0] = -1.0  # what was read may be changed, without changing the others or the store
    assert read["tied"][0] == 0
    assert store.verify() == []


def test_an_object_holds_nothing_but_tensors(store: Store) -> None:
    store.commit([(record(), parts(1))])
    data = (store.path / "objects" / f"{store.digests('a')['task']}.safetensors").read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert sorted(header) == sorted(part(1))


def test_a_streams_task_leaves_its_files_behind(store: Store, tmp_path: Path) -> None:
    config = TaskConfig(name="a", kind="generation", train=str(tmp_path / "train.jsonl"))
    store.commit([(TaskRecord(task=config, form="sum"), {})])
    assert type(store.record("a").task) is Task
    assert str(tmp_path) not in (store.path / "manifest.json").read_text()


def test_learning_again_makes_a_version_and_keeps_the_old(store: Store) -> None:
    store.commit([(record("a"), parts(1)), (record("b"), parts(2))])
    store.commit([(record("a"), parts(3))])
    versions = [(task.name, task.version, task.superseded) for task in store.manifest.tasks]
    assert versions == [("a", 1, True), ("b", 1, False), ("a", 2, False)]
    assert [task.name for task in store.tasks()] == ["b", "a"]
    assert [task.version for task in store.versions("a")] == [1, 2]
    assert first(store.read(store.record("a", version=1).parts["task"])) == 1
    assert first(store.read(store.digests("a")["task"])) == 3
    assert store.gc() == (0, 0)
    assert store.verify() == []


def test_an_object_is_written_once(store: Store) -> None:
    store.commit([(record("a"), parts(1))], training={"discriminator": part(7)})
    before = {path: path.stat().st_mtime_ns for path in store.path.rglob("*.safetensors")}
    store.commit([(record("a"), parts(1)), (record("b"), parts(1))], training={"discriminator": part(7)})
    assert {path: path.stat().st_mtime_ns for path in store.path.rglob("*.safetensors")} == before
    assert [(task.name, task.version) for task in store.tasks()] == [("a", 2), ("b", 1)]


def test_a_damaged_object_is_written_again(store: Store) -> None:
    store.commit([(record("a"), parts(1))])
    path = store.path / "objects" / f"{store.digests('a')['shared']}.safetensors"
    path.write_bytes(bytes(len(path.read_bytes())))
    store.commit([(record("b"), parts(2))])  # has the same shared part
    assert store.verify() == []


def test_live_tasks_move_with_the_shared_expert(store: Store) -> None:
    store.commit([(record("a", "live"), parts(1)), (record("b", "exact"), parts(2)), (record("c", "live"), parts(3))])
    store.commit([(record("a", "live"), parts(4))])
    store.commit([(record("d", "live"), parts(5, shared=0.75))], moved={"shared": part(0.75)})
    shared = {task.name: first(store.read(task.parts["shared"])) for task in store.tasks()}
    assert shared == {"a": 0.75, "b": 0.5, "c": 0.75, "d": 0.75}
    assert {task.name: first(store.read(task.parts["task"])) for task in store.tasks()} == {
        "a": 4,
        "b": 2,
        "c": 3,
        "d": 5,
    }
    assert first(store.read(store.record("a", version=1).parts["shared"])) == 0.5  # for rollback: as it was
    assert [task.version for task in store.tasks()] == [1, 1, 2, 1]


def test_only_the_newest_training_state_stays(store: Store) -> None:
    store.commit([(record("a"), parts(1))], training={"discriminator": part(1), "memory": part(2)})
    store.commit([(record("b"), parts(1))])
    assert first(store.training()["memory"]) == 2
    store.commit(training={"discriminator": part(3)})
    assert {name: first(state) for name, state in store.training().items()} == {"discriminator": 3}
    assert len(os.listdir(store.path / "training")) == 1


def test_bytes_of_its_own_and_shared(store: Store) -> None:
    store.commit([(record("a"), parts(1)), (record("b"), parts(2))])
    assert store.bytes()["a"].shared == len(encode(part(0.5)))
    assert store.bytes()["a"].own == len(encode(part(1))) + len(encode(parts(1)["gate"]))


def test_an_unknown_task_lists_the_known(store: Store) -> None:
    with pytest.raises(TaskError, match="no task 'a'; the tasks are: none yet"):
        store.digests("a")
    store.commit([(record("agnews"), parts(1)), (record("imdb"), parts(2))])
    with pytest.raises(TaskError, match=r"no task 'agnew'; the tasks are: agnews, imdb \(did you mean 'agnews'\?\)"):
        store.digests("agnew")
    with pytest.raises(TaskError, match="task 'imdb' has no version 3; it has 1"):
        store.record("imdb", version=3)


def test_gc_removes_only_what_no_version_needs(store: Store) -> None:
    store.commit([(record("a", "live"), parts(1))], training={"discriminator": part(1)})
    moved = store.digests("a")["shared"]
    store.commit(moved={"shared": part(0.75)})
    foreign = store.path / "objects" / "notes.txt"
    foreign.touch()
    stale = store.path / "training" / f"discriminator-{moved}.safetensors"
    stale.write_bytes(b"1234")
    before = files(store.path)
    removed = store.gc()
    assert removed == (2, len(encode(part(0.5))) + 4)
    assert before - files(store.path) == {f"objects/{moved}.safetensors", str(stale.relative_to(store.path))}
    assert store.verify() == []


def test_the_manifest_has_a_task_a_line(store: Store) -> None:
    assert Store.open(store.path).tasks() == []
    store.commit([(record(name), parts(1)) for name in "abc"])
    lines = (store.path / "manifest.json").read_text().splitlines()
    assert [json.loads(line.strip().rstrip(","))["task"]["name"] for line in lines if '"form"' in line] == list("abc")


def test_card(store: Store) -> None:
    task = Task(name="x", kind="classification", labels={"a|b": "one", "c": "two"})
    store.commit([(TaskRecord(task=task, form="gated"), parts(1))])
    store.write_card("| R |\n|---|\n| .9 |\n")
    card = (store.path / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: moecl\nbase_model: user/tiny\n")
    assert "| x | classification | a\\|b, c | accuracy | gated | 1 |" in card
    assert "## Result\n\n<!-- result -->\n\n| R |\n|---|\n| .9 |\n\n<!-- result end -->\n\n## Use" in card
    store.write_card()
    assert (store.path / "README.md").read_text() == card, "a result stays"
    here = Store.create(store.path.parent / "other", BASE.model_copy(update={"id": "/models/tiny"}))
    here.write_card()
    card = (here.path / "README.md").read_text()
    assert "base_model" not in card
    assert "## Result" not in card


def test_a_reader_keeps_its_model_until_gc(store: Store) -> None:
    store.commit([(record("a", "live"), parts(1))], training={"memory": part(1)})
    reader = Store.open(store.path, readonly=True)
    store.commit([(record("a", "live"), parts(2))], training={"memory": part(2)})
    store.commit(moved={"shared": part(0.75)})
    store.commit(moved={"shared": part(0.875)})
    assert {name: first(reader.read(digest)) for name, digest in reader.digests("a").items()} == {
        "gate": 1,
        "shared": 0.5,
        "task": 1,
    }
    middle = Store.open(store.path, readonly=True)
    store.commit(moved={"shared": part(1)})
    store.gc()
    with pytest.raises(StoreError, match="missing"):
        middle.read(middle.digests("a")["shared"])
    assert middle.refresh()
    assert not middle.refresh()
    assert first(middle.read(middle.digests("a")["shared"])) == 1
    assert first(reader.training()["memory"]) == 2  # only the newest is kept, so only the newest is read
    assert reader.verify() == []


def test_readonly_readers_write_nothing(store: Store) -> None:
    reader = Store.open(store.path, readonly=True)
    changes = {"promote": "a", "rollback": "a", "retire": "a", "unretire": "a", "delete": "a", "remove_alias": "a"}
    for change, name in {"commit": None, "gc": None, "write_card": None, **changes}.items():
        with pytest.raises(StoreError, match="opened read-only"):
            getattr(reader, change)(*([] if name is None else [name]))
    assert files(store.path) == {"manifest.json", "audit.jsonl", ".lock"}


def test_two_writers_are_kept_apart(store: Store) -> None:
    other = Store.open(store.path)
    with store.lock():
        with pytest.raises(BusyError, match=f"in use by pid {os.getpid()} on "):
            other.commit([(record("b"), parts(2))])
        with store.lock():  # nested
            store.commit([(record("a"), parts(1))])
        with pytest.raises(BusyError):
            other.gc()
        assert first(other.read(store.digests("a")["task"])) == 1  # reading needs no lock
    other.commit([(record("b"), parts(2))])  # on top of what it had not seen
    assert [task.name for task in other.tasks()] == ["a", "b"]


def test_the_next_writer_removes_what_a_killed_one_left(store: Store) -> None:
    leftover = store.path / "tmp" / f".manifest.json.{'0' * 16}.tmp"
    foreign = store.path / "tmp" / "notes.txt"
    for path in (leftover, foreign):
        path.write_text("half")
    Store.open(store.path, readonly=True)
    assert leftover.exists()
    with store.lock():
        assert not leftover.exists()
    assert foreign.exists()
