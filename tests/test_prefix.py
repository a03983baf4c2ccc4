"""The frozen prefix: the same bits from the cache as computed, the same losses and scores as without it, fewer layers
run."""

from collections import Counter
from pathlib import Path

import pytest
import torch

from moecl.backbone import weights_sha256
from moecl.config import MoECLConfig, StreamConfig
from moecl.data import derived
from moecl.engine import Engine
from moecl.model import MoECL
from moecl.nn.inject import Injected
from moecl.prefix import Prefixes
from runs import Recorder, learn, stream
from tiny import FAMILIES, tiny_batch, tiny_model, tiny_tokenizer
from tiny_tasks import CLOSE, labelled, learned, stir, task

ROWS = [[5, 9, 3, 7], [4, 4, 8], [6, 3, 3, 3, 9, 11, 20]]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("MOECL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "prefix"


def prefixes(family: str = "llama", dtype: torch.dtype = torch.float32, base=None, adapt: int = 1, most: int = 10**8):
    model = learned(base or tiny_model(family, layers=3, dtype=dtype), names="a", adapt_layers=adapt)
    notes: list[str] = []
    return Prefixes(model, weights_sha256(model.base), most, notes.append), notes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("side", ["left", "right"])
def test_from_the_cache_or_computed_alone_or_with_others_the_bits_are_the_same(cache, side, dtype):
    fresh, _ = prefixes(dtype=dtype)
    alone = [fresh.batch([row], side)[0] for row in ROWS]
    derived.clear("prefix")
    for _ in range(2):
        for order in ([0, 1, 2], [2, 1], [1, 2, 0]):
            batch = prefixes(dtype=dtype)[0].batch([ROWS[place] for place in order], side)
            longest = max(len(ROWS[place]) for place in order)
            assert batch.shape == (len(order), longest, 32)
            for row, place in zip(batch, order, strict=True):
                gap = longest - len(ROWS[place])
                row, padding = (
                    (row[gap:], row[:gap]) if side == "left" else (row[: longest - gap], row[longest - gap :])
                )
                assert torch.equal(row, alone[place])
                assert not padding.any()
    assert derived.taken("prefix")[1] == len(ROWS)


def test_what_the_bits_depend_on_is_in_the_key():
    one = prefixes()[0]
    keys = [one.key(ROWS[0]), one.key(ROWS[0][:-1]), one.key([59, *ROWS[0][2:]])]
    other = prefixes(base=tiny_model(layers=3, seed=1))[0]
    deeper, fewer = tiny_model(layers=4), prefixes(adapt=2)[0]
    scaled = tiny_model(layers=3)
    scaled.config.rms_norm_eps = 0.1
    for found in (other, fewer, prefixes(base=deeper, adapt=2)[0], prefixes(dtype=torch.bfloat16)[0]):
        keys.append(found.key(ROWS[0]))
    keys.append(prefixes(base=scaled)[0].key(ROWS[0]))
    assert len(set(keys)) == len(keys)
    again = learned(tiny_model(layers=3), names="abc", adapt_layers=1, retention="live")
    assert Prefixes(again, weights_sha256(again.base), 0, print).key(ROWS[0]) == one.key(ROWS[0])


def test_a_damaged_entry_is_computed_again(cache):
    kept, notes = prefixes()
    expected = kept.batch(ROWS)
    for path in cache.rglob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:-1] + b"\0")
    again, _ = prefixes()
    _, missing = again.read(ROWS)
    assert len(missing) == 3
    assert torch.equal(again.batch(ROWS), expected)
    assert again.read(ROWS)[1] == []
    assert notes == []


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_those_of_the_whole_forward(family, checkpointing):
    kept, _ = prefixes(family)
    model = kept.model
    model.add_task(model.bank["a"].task.model_copy(update={"name": "b"}))
    if checkpointing:
        model.gradient_checkpointing_enable()
    batch = labelled(tiny_batch())
    rows = [ids[real.bool()].tolist() for ids, real in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    found = []
    for prefix in (None, kept.batch(rows)):
        output = model.train()(**batch, task="b", features=True, prefix=prefix)
        output.loss.backward()
        found.append({name: p.grad for name, p in model.learner.named_parameters()} | {"loss": output.loss.detach()})
        model.zero_grad()
        model._steps = 0
    assert found[0]["loss"] > 0
    for name, tensor in found[0].items():
        if tensor is not None:
            torch.testing.assert_close(found[1][name], tensor, **CLOSE, msg=lambda m, name=name: f"{name}: {m}")


def test_the_bits_are_the_same_by_any_number_of_threads():
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            derived.clear("prefix")
            found.append(prefixes()[0].batch(ROWS))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


# --- whole runs ---


class Losses(Recorder):
    def __init__(self, run: Path) -> None:
        super().__init__(run)
        self.losses: list[float] = []

    def training(self, task, step, steps, figures):
        if "loss" in figures:
            self.losses.append(figures["loss"])


@pytest.fixture(scope="module")
def three_layers(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("three-layers")
    tokenizer = tiny_tokenizer()
    tiny_model("llama", layers=3, vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def run_of(folder: Path, base: Path, name: str, **train) -> tuple[list, list[float], dict, list[str]]:
    method = {"name": "moe-cl", "rank": 2, "adapt_layers": 1}
    config: StreamConfig = stream(folder / "stream", base, method=method, train={"precision": "fp32", **train})
    watcher = Losses(folder / name)
    result = learn(config, folder / name, watcher)
    return result.R, watcher.losses, result.digests, watcher.notes


def counted(monkeypatch) -> Counter:
    """How often a prefix was computed, by text."""
    seen: Counter = Counter()
    real = Injected.prefix

    def prefix(self, input_ids):
        seen[tuple(input_ids[0].tolist())] += 1
        return real(self, input_ids)

    monkeypatch.setattr(Injected, "prefix", prefix)
    return seen


def test_a_run_with_it_is_the_run_without_it(tmp_path, three_layers, monkeypatch):
    seen = counted(monkeypatch)
    R, losses, digests, notes = run_of(tmp_path, three_layers, "with")
    assert derived.taken("prefix")[1] == len(seen) - 1, "and the one that tries whether it can be used"
    assert set(seen.values()) == {1}
    seen.clear()
    assert run_of(tmp_path, three_layers, "again") == (R, losses, digests, notes), "all of it from the cache"
    assert sum(seen.values()) == 1
    R_without, losses_without, _, _ = run_of(tmp_path, three_layers, "without", prefix_cache=0)
    assert R_without == R
    assert losses == pytest.approx(losses_without, rel=1e-5)
    assert len(losses) > 1


def test_answers_of_one_forward_are_read_above_it(monkeypatch):
    """Words and heads, rows of several tasks, from the cache or computed: bitwise, and within the tolerance without."""
    words = task("word", labels=("g", "b"))
    head = task("head", head="classifier")
    tokenizer = tiny_tokenizer()
    model = MoECL.attach(tiny_model(layers=3, vocab_size=len(tokenizer)), MoECLConfig(rank=4, adapt_layers=1))
    for seed, one in enumerate((words, head)):
        model.add_task(one)
        stir(model, seed)
    model.finish_task()
    rows = ["the movie was great", "bad food", "it is the story of a phone", "love"] * 2
    names = ["word", "head"] * 4
    plain = Engine(model, tokenizer).predict(rows, names)
    seen = counted(monkeypatch)
    kept = Prefixes(model, "", 10**8, print)
    first, again = (Engine(model, tokenizer, prefixes=kept).predict(rows, names) for _ in range(2))
    assert set(seen.values()) == {1}
    assert len(seen) == 4
    assert first == again
    for one, other in zip(first, plain, strict=True):
        assert one.scores == pytest.approx(other.scores, rel=1e-4, abs=1e-5)
        assert one.scores != pytest.approx(dict.fromkeys(one.scores, 0.5), abs=1e-3)


def test_rows_of_the_score_matrix_do_not_move_with_what_is_cached(tmp_path, three_layers, monkeypatch, cache):
    """Contract 4: entries are lost between two rows of R, and the finished task's cells stay."""
    lost = []

    class Losing(Recorder):
        def row(self, after, tasks, scores):
            lost.append(after)
            for place, path in enumerate(sorted(cache.rglob("*.safetensors"))):
                if place % 3 == after % 3:
                    path.unlink()

    probabilities = []
    real = Engine.answer
    monkeypatch.setattr(Engine, "answer", lambda self, *a: probabilities.append(real(self, *a)) or probabilities[-1])
    method = {"name": "moe-cl", "rank": 2, "adapt_layers": 1}
    train = {"precision": "fp32", "epochs": 1, "evals_per_epoch": 0}
    labels = {"good": "s", "bad": "t"}  # a token each
    config = stream(tmp_path / "stream", three_layers, method=method, train=train, evaluate="seen")
    tasks = [one.model_copy(update={"labels": labels, "validation": None}) for one in config.tasks]
    learn(config.model_copy(update={"tasks": tasks}), tmp_path / "run", Losing(tmp_path / "run"))
    assert lost == [0, 1, 2]
    of_the_first = [found for found in probabilities if found[0].task == "task0"]
    assert len(of_the_first) == 2
    assert of_the_first[0] == of_the_first[1]


def test_seed_order_and_method_share_it(tmp_path, three_layers, monkeypatch):
    run_of(tmp_path, three_layers, "one")
    seen = counted(monkeypatch)
    run_of(tmp_path, three_layers, "other", seed=7, epochs=1, batch_size=5)
    assert sum(seen.values()) == 1


def test_without_room_on_disk_a_run_goes_on_with_the_same_bits(tmp_path, three_layers, cache):
    with_it = run_of(tmp_path, three_layers, "with")
    derived.clear("prefix")
    little = run_of(tmp_path, three_layers, "little", prefix_cache=1e-5)
    assert little[:3] == with_it[:3]
    assert [note for note in little[3] if "it is full" in note]
    derived.clear("prefix")
    cache.parent.mkdir(exist_ok=True)
    cache.write_text("no folder")
    blocked = run_of(tmp_path, three_layers, "blocked")
    assert blocked[:3] == with_it[:3]
    assert len([note for note in blocked[3] if "cannot be written" in note]) == 1
