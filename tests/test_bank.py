"""The bank: what is loaded when, how much of it stays, and that none of it shows in an answer."""

import threading
from pathlib import Path

import pytest
import torch

from moecl import store as store_module
from moecl.bank import Entry, Loaded, Packs, size
from moecl.config import MoECLConfig
from moecl.errors import ConfigError, StoreError
from moecl.model import MoECL
from moecl.store import Store
from tiny import random_parts, tiny_batch, tiny_model
from tiny_tasks import CLOSE, learned, task

NAMES = "abcdef"
BATCH = tiny_batch(6)


def stored(folder: Path, **settings) -> Path:
    learned(names=NAMES, **settings).save_pretrained(folder / "store")
    return folder / "store"


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    """A store of six tasks that differ. Read it, never write to it."""
    return stored(tmp_path_factory.mktemp("bank"))


def load(path: Path, memory: int | str = "1GB") -> MoECL:
    return MoECL.from_pretrained(path, base=tiny_model(), expert_memory=memory)


def task_bytes(model: MoECL) -> int:
    parts = model.bank["a"].parts
    return sum(size(part) for part in [*parts.modules().values(), parts.packs])


@pytest.fixture
def reads(monkeypatch) -> list[tuple[str, bool]]:
    """(file, whether it was hashed) of each object that is read."""
    found: list[tuple[str, bool]] = []
    real = store_module.read_file

    def read(path, digest, users):
        found.append((path.name, digest is not None))
        return real(path, digest, users)

    monkeypatch.setattr(store_module, "read_file", read)
    return found


# --- what is loaded when ---


def test_opening_and_looking_read_no_object(path, reads):
    model = load(path)
    assert list(model.bank) == list(NAMES)
    assert len(model.bank) == 6
    assert "f" in model.bank
    assert [entry.task.name for entry in model.bank.values()] == list(NAMES)
    assert {name: entry.task for name, entry in model.bank.items()}["a"] == task("a")
    model(**BATCH, task=None)
    assert reads == []
    model(**BATCH, task="c")
    assert len(reads) == 3, "its shared and own expert and its gate"
    model(**BATCH, task="c")
    assert len(reads) == 3


def test_an_object_is_hashed_once(path, reads):
    model = load(path, 1)
    for _ in range(3):
        model(**BATCH, task="a")
    assert [hashed for _, hashed in reads] == [True] * 3 + [False] * 6


def test_bytes_loads_and_evictions_are_counted(path):
    whole = load(path)
    assert whole.bank.loaded.bytes == 0
    one = task_bytes(whole)
    assert whole.bank.loaded.bytes == one
    model = load(path, 2 * one)
    found = model.bank.loaded
    for name in "ab":
        model(**BATCH, task=name)
    assert (found.bytes, found.loads, found.evictions) == (2 * one, 6, 0)
    model(**BATCH, task="a")  # now b is what was not used for longest
    model(**BATCH, task="c")
    assert (found.bytes, found.loads, found.evictions) == (2 * one, 9, 4)
    model(**BATCH, task="a")
    assert found.loads == 9
    model(**BATCH, task="b")
    assert (found.bytes, found.loads, found.evictions) == (2 * one, 12, 8)


def test_what_a_call_holds_is_not_loaded_twice():
    found, loads = Loaded(1), []

    def load() -> torch.nn.Module:
        loads.append(1)
        return torch.nn.Linear(2, 2)

    held = found.get(("gate", "x"), load)
    assert (found.bytes, found.evictions) == (0, 1)
    assert found.get(("gate", "x"), load) is held
    assert len(loads) == found.loads == 1
    del held
    found.get(("gate", "x"), load)
    assert len(loads) == found.loads == 2
    found.get(("head", "x"), load)
    assert len(loads) == 3, "what it is read as makes the difference"


# --- none of it shows ---


@pytest.mark.parametrize("memory", [1, "20kB", "1GB"])
def test_answers_do_not_depend_on_the_memory(path, memory):
    expected = load(path)
    model = load(path, memory)
    mixed = ["a", "f", None, "b", "d", "c"]
    for _ in range(2):
        assert torch.equal(model(**BATCH, task=mixed).logits, expected(**BATCH, task=mixed).logits)
        for name in NAMES:
            assert torch.equal(model(**BATCH, task=name).logits, expected(**BATCH, task=name).logits)
    assert (model.bank.loaded.evictions > 0) == (memory != "1GB")
    assert model.bank.loaded.bytes <= model.bank.loaded.limit


def test_a_batch_may_need_more_than_the_memory(path):
    model = load(path, "1kB")
    call = model.call(list(NAMES), 6, model.bank)
    assert len({id(parts.task) for parts in call.parts}) == 6
    assert model.bank.loaded.bytes <= 1000
    again = model.call(list(NAMES), 6, model.bank)
    assert all(one.task is other.task for one, other in zip(call.parts, again.parts, strict=True))
    assert model.bank.loaded.loads == 18


def test_threads_share_it(path):
    expected = {name: load(path)(**BATCH, task=name).logits for name in NAMES}
    model = load(path, "20kB")
    wrong: list[str] = []

    def ask(shift: int) -> None:
        with torch.inference_mode():
            for place in range(24):
                name = NAMES[(place * (shift + 1)) % 6]
                if not torch.equal(model(**BATCH, task=name).logits, expected[name]):
                    wrong.append(name)

    threads = [threading.Thread(target=ask, args=(shift,)) for shift in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert model.bank.loaded.bytes == sum(size(module) for module in model.bank.loaded._kept.values())


def test_parts_follow_the_model(path):
    model = load(path)
    single = model(**BATCH, task="a").logits
    model.double()
    assert {p.dtype for part in model.bank["a"].parts.modules().values() for p in part.parameters()} == {torch.float32}
    torch.testing.assert_close(model(**BATCH, task="a").logits, single.double(), **CLOSE)
    model.float()
    assert torch.equal(model(**BATCH, task="a").logits, single)


def test_saving_goes_task_by_task(path, tmp_path):
    model = load(path, 1)
    model.save_pretrained(tmp_path / "copy")
    ours, copy = Store.open(path), Store.open(tmp_path / "copy")
    assert [copy.digests(name) for name in NAMES] == [ours.digests(name) for name in NAMES]
    assert copy.manifest.training == ours.manifest.training
    assert model.bank.loaded.bytes == 0


def test_entries_of_tasks_under_way_are_kept_as_they_are(path):
    model = load(path, 1)
    model.add_task(task("new"))
    parts = model.bank["new"].parts
    assert model.bank["new"].parts is parts
    model.finish_task()
    model.bank["x"] = Entry(task("x"), random_parts(model.geometry))
    assert list(model.bank) == [*NAMES, "new", "x"]
    assert model.bank["x"].held is model.bank["x"].parts
    assert model.bank["a"].held is None
    del model.bank["a"]
    assert "a" not in model.bank


# --- retention live ---


@pytest.mark.parametrize("gate", ["task", "shared"])
def test_what_tasks_share_is_held_once(tmp_path, reads, gate):
    model = load(stored(tmp_path, retention="live", gate=gate))
    parts = [model.bank[name].parts for name in NAMES]
    assert len({id(one.shared) for one in parts}) == 1
    assert len({id(one.gate) for one in parts}) == (1 if gate == "shared" else 6)
    assert len(reads) == 1 + 6 + (1 if gate == "shared" else 6)
    distinct = {id(module): size(module) for one in parts for module in one.modules().values()}
    packs = {id(one.packs): size(one.packs) for one in parts if isinstance(one.packs, Packs)}
    assert model.bank.loaded.bytes == sum(distinct.values()) + sum(packs.values())


def test_what_moves_on_takes_the_stored_ones_place(tmp_path, reads):
    model = load(stored(tmp_path, retention="live", gate="shared"))
    before = model(**BATCH, task="a").logits
    model.add_task(task("new"))
    assert torch.equal(model(**BATCH, task="a").logits, before)
    reads.clear()
    assert model.bank["b"].parts.shared is model.learner.shared
    assert model.bank["b"].parts.gate is model.learner.gate
    assert len(reads) == 1, "its own expert"
    with torch.no_grad():
        for parameter in model.learner.shared.parameters():
            parameter.add_(1.0)
    assert not torch.equal(model(**BATCH, task="a").logits, before)


# --- strictness ---


def damaged(path: Path, damage: str) -> Path:
    found = path / "objects" / f"{Store.open(path).digests('b')['task']}.safetensors"
    data = found.read_bytes()
    if damage == "missing":
        found.unlink()
    else:
        found.write_bytes({"truncated": data[:-8], "altered": data[:-1] + bytes([data[-1] ^ 1])}[damage])
    return found


@pytest.mark.parametrize("damage", ["missing", "truncated", "altered"])
def test_damage_after_opening_is_one_line(tmp_path, damage):
    model = load(stored(tmp_path))
    found = damaged(tmp_path / "store", damage)
    model(**BATCH, task="a")
    for _ in range(2):
        with pytest.raises(StoreError, match=damage) as caught:
            model(**BATCH, task="b")
        assert str(caught.value).startswith(f"{found}: ")
        assert "part 'task' of task 'b' (version 1)" in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("damage", ["missing", "truncated", "altered"])
def test_damage_before_opening_fails_its_task_alone(tmp_path, reads, damage):
    damaged(stored(tmp_path), damage)
    model = load(tmp_path / "store")
    assert not reads
    model(**BATCH, task="a")
    with pytest.raises(StoreError, match=damage):
        model(**BATCH, task="b")


def test_a_task_without_all_its_parts_is_refused_at_once(tmp_path):
    store = Store.open(stored(tmp_path))
    record = store.record("b")
    tensors = {part: store.read(digest) for part, digest in record.parts.items() if part != "gate"}
    store.commit([(record, tensors)])
    with pytest.raises(StoreError, match=r"task 'b' has the parts shared, task, not gate, shared, task and a scale"):
        load(store.path)


def test_further_learning_needs_the_store_as_it_was_loaded(tmp_path):
    path = stored(tmp_path)
    first, second = load(path), Store.open(path)
    state = second.training()
    second.commit(training=state | {"shared": {name: tensor + 1 for name, tensor in state["shared"].items()}})
    assert torch.isfinite(first(**BATCH, task="a").logits).all()
    with pytest.raises(StoreError, match="was changed after this model was loaded; load it again to learn on"):
        first.add_task(task("new"))


def test_memory_must_be_a_size(path):
    with pytest.raises(ConfigError, match="expert_memory: 'lots' is no size"):
        load(path, "lots")
    config = MoECLConfig(rank=4)
    assert MoECL.attach(tiny_model(), config).bank.loaded.limit == 2 * 10**9
