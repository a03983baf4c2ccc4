"""Keys and values of earlier texts in the place of a prompt's beginning: the same answers, under one expert."""

import pytest
import torch

from moecl.bank import Bank, Entry
from moecl.config import MoECLConfig, Task
from moecl.engine import Engine, GateUse
from moecl.errors import ConfigError
from moecl.generation import Completion, Sampling
from moecl.kv_prefix import KVPrefixes, lasting
from moecl.model import MoECL
from moecl.nn.forms import to_tensors
from moecl.nn.lora import Expert
from moecl.nn.sums import Keys, Mix
from moecl.store import Store, TaskRecord
from tiny import HIDDEN, tiny_model, tiny_tokenizer
from tiny_tasks import stir

CUT = ["llama", "qwen3", "phi3", "gpt2", "opt", "gpt_neox"]
WINDOWS = ["mistral", "gemma2", "gemma3_text"]
TASKS = ["a", "b"]
FIRST = ["the food was terrible and sad", "a great movie with a story I love", "happy phone battery " * 4]
HOW = Sampling(max_new_tokens=6, top_logprobs=1)


def learned(family: str = "llama", seed: int = 0, **settings) -> MoECL:
    tokenizer = tiny_tokenizer()
    base = tiny_model(family, vocab_size=len(tokenizer))
    model = MoECL.attach(base, MoECLConfig(rank=4, lora_alpha=16, **settings), tokenizer=tokenizer)
    for place, name in enumerate(TASKS):
        model.add_task(Task(name=name, kind="generation", instruction="{prompt}"))
        stir(model, 100 * seed + place)
    model.finish_task()
    return model.eval()


def opened(folder, family: str = "llama", **settings) -> Engine:
    """An engine over a store: its experts have digests."""
    if not Store.exists(folder):
        learned(family).save_pretrained(folder)
    tokenizer = tiny_tokenizer()
    return Engine(
        MoECL.from_pretrained(folder, base=tiny_model(family, vocab_size=len(tokenizer))), tokenizer, **settings
    )


@pytest.fixture
def engine(tmp_path):
    return opened(tmp_path / "store")


def ids(found: Engine, prompt: str, name: str = "a") -> list[int]:
    return found.requests([prompt], name, HOW.max_new_tokens)[0].row.input_ids


def same(found: list[Completion], wanted: list[Completion]) -> None:
    for one, other in zip(found, wanted, strict=True):
        assert (one.text, one.reason, one.task) == (other.text, other.reason, other.task)
        assert [token.id for token in one.logprobs] == [token.id for token in other.logprobs]
        assert [t.logprob for t in one.logprobs] == pytest.approx(
            [t.logprob for t in other.logprobs], rel=1e-5, abs=1e-5
        )


def turns(found: Engine, names: list[str]) -> list[str]:
    """A second turn of each chat."""
    return [
        f"{prompt} {answer.text} yes" for prompt, answer in zip(FIRST, found.generate(FIRST, names, HOW), strict=True)
    ]


# --- the same answers ---


@pytest.mark.parametrize("family", [*CUT, *WINDOWS])
def test_answers_are_those_of_whole_prompts(tmp_path, family):
    warm, cold = opened(tmp_path / "store", family), opened(tmp_path / "store", family, kv_memory=0)
    names = ["a", "b", "a"]
    second = turns(warm, names)
    rows, names = [*second, "price of the screen", FIRST[1], second[0]], [*names, "b", "b", "b"]
    same(warm.generate(rows, names, HOW), cold.generate(rows, names, HOW))
    assert cold.kv_tokens_reused == 0
    assert bool(warm.kv_tokens_reused) == (family in CUT), "a window forgets what is before it"
    before = warm.kv_tokens_reused
    for row, name in zip(rows, names, strict=True):
        same(warm.generate([row], name, HOW), cold.generate([row], name, HOW))
    again = sum(len(ids(warm, row, name)) - 1 for row, name in zip(rows, names, strict=True))
    assert warm.kv_tokens_reused - before == (again if family in CUT else 0)


@torch.no_grad()
@pytest.mark.parametrize("family", CUT)
def test_first_tokens_are_those_of_the_model(tmp_path, family):
    warm = opened(tmp_path / "store", family)
    for row, name in zip(turns(warm, ["a", "b", "a"]), "aba", strict=True):
        before = warm.kv_tokens_reused
        [answer] = warm.generate([row], name, HOW)
        assert 0 < warm.kv_tokens_reused - before < len(ids(warm, row, name)) - 1
        logits = warm.model(torch.tensor([ids(warm, row, name)]), task=name).logits[0, -1].log_softmax(-1)
        assert answer.logprobs[0].id == int(logits.argmax())
        assert answer.logprobs[0].logprob == pytest.approx(float(logits.max()), rel=1e-5, abs=1e-5)


def test_only_what_is_new_is_read(engine):
    seen = []
    engine.model.base.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    engine.generate(FIRST[:1], "a", HOW)
    seen.clear()
    engine.generate(FIRST[:1], "a", HOW)
    assert set(seen) == {(1, 1)}
    seen.clear()
    fresh = "screen price " * 9
    engine.generate([FIRST[0], fresh], "a", HOW)
    assert seen[:2] == [(1, 1), (1, len(ids(engine, fresh)))], "a fresh row does not make the others be read whole"


def test_half_known_rows_share_what_all_of_them_have(engine):
    engine.generate([FIRST[0]], "a", HOW)
    prompts = [f"{FIRST[0]} yes", f"{FIRST[0]} I love this price"]
    same(
        engine.generate(prompts, "a", HOW),
        [Engine(engine.model, engine.tokenizer, kv_memory=0).generate([p], "a", HOW)[0] for p in prompts],
    )
    lengths = [len(ids(engine, prompt)) for prompt in prompts]
    shared = len(ids(engine, FIRST[0]))
    assert engine.kv_tokens_reused == sum(lengths) - 2 * (lengths[1] - shared)


def test_a_stream_left_early_leaves_its_prompt(engine):
    decoder = engine.decoder()
    [request] = engine.requests(FIRST[:1], "a")
    row = engine.writing(request, Sampling(max_new_tokens=9))
    decoder.join([row])
    decoder.leave(row)
    engine.generate(FIRST[:1], "a", HOW)
    assert engine.kv_tokens_reused == len(ids(engine, FIRST[0])) - 1


# --- never across experts ---


def test_tasks_do_not_share(engine):
    engine.generate(FIRST, "a", HOW)
    engine.generate(FIRST, "b", HOW)
    assert engine.kv_tokens_reused == 0


def test_a_new_version_reuses_nothing_of_the_old_one(tmp_path, engine):
    old = engine.generate(FIRST, "a", HOW)
    engine.generate(FIRST, "b", HOW)
    store, other = Store.open(tmp_path / "store"), learned(seed=5).bank["a"]
    record = TaskRecord(task=other.task, form="gated", settings=store.record("a").settings)
    store.commit([(record, to_tensors(other.parts))])
    bank: Bank = engine.model.bank.emptied()
    bank.take(Store.open(tmp_path / "store", readonly=True))
    newer = engine.over(bank)
    new = newer.generate(FIRST, "a", HOW)
    assert newer.kv_tokens_reused == engine.kv_tokens_reused == 0
    assert [one.text for one in new] != [one.text for one in old]
    same(new, opened(tmp_path / "store", kv_memory=0).generate(FIRST, "a", HOW))
    assert newer.generate(FIRST, "a@1", HOW)[0].text == old[0].text
    reused = newer.kv_tokens_reused
    assert reused == sum(len(ids(engine, prompt)) - 1 for prompt in FIRST), "the old version's are still its own"
    newer.generate(FIRST, "b", HOW)
    assert newer.kv_tokens_reused == 2 * reused, "what has not changed goes on"


def test_the_digest_is_of_all_that_an_answer_is_made_of(tmp_path, engine):
    bank, store = engine.model.bank, Store.open(tmp_path / "store")
    record = store.record("a")
    assert bank["a"].digest == bank["a@1"].digest != bank["b"].digest
    for change in (
        {"settings": {**record.settings, "scale": 7.0}},
        {"form": "sum"},
        {"parts": {**record.parts, "shared": "0" * 64}},
    ):
        assert bank._digest(record.model_copy(update=change)) != bank["a"].digest


def test_parts_in_memory_have_no_digest_and_reuse_nothing(tmp_path, engine):
    held = Engine(learned(), tiny_tokenizer())
    assert held.bank["a"].digest is None
    held.generate(FIRST, "a", HOW)
    held.generate(FIRST, "a", HOW)
    assert (held.kv_tokens_reused, len(held.kv)) == (0, 0)


def test_shared_parts_that_move_on_have_no_digest(tmp_path):
    learned(retention="live").save_pretrained(tmp_path / "live")
    found = opened(tmp_path / "live")
    assert found.bank["a"].digest is not None
    found.model.add_task(Task(name="c", kind="generation"))
    assert found.bank["a"].digest is None


def test_a_form_that_weighs_a_row_by_its_whole_text_reuses_nothing(engine):
    geometry = engine.model.geometry
    mixed = Mix((Expert(geometry, 2),), (Keys(torch.randn(1, HIDDEN)),), 2.0, 8.0)
    entry = Entry(engine.bank["a"].task, mixed, "mix", lambda: "digest")
    found = engine.over({"mix": entry})
    found.generate(FIRST, "mix", HOW)
    found.generate(FIRST, "mix", HOW)
    assert (found.kv_tokens_reused, len(found.kv)) == (0, 0)


def test_another_dtype_reuses_nothing(engine):
    engine.generate(FIRST, "a", HOW)
    engine.model.to(torch.bfloat16)
    engine.generate(FIRST, "a", HOW)
    assert engine.kv_tokens_reused == 0


def test_keys_that_change_with_the_length_of_a_text_are_not_kept():
    def config(rope):
        found = tiny_model("llama").config
        found.rope_parameters = rope
        return found

    assert lasting(config({"rope_type": "default", "rope_theta": 1e4}))
    assert lasting(tiny_model("gpt2").config)
    assert lasting(tiny_model("gemma3_text").config)
    assert not lasting(config({"rope_type": "dynamic", "factor": 2.0}))
    assert not lasting(config({"rope_type": "longrope"}))
    assert not lasting(config({"full_attention": {"rope_type": "dynamic"}}))


# --- where all of a prompt is read ---


def test_scores_do_not_depend_on_what_was_asked_before(engine):
    before = engine.predict(FIRST, "a")
    engine.generate(FIRST, "a", HOW)
    assert engine.predict(FIRST, "a") == before
    assert engine.kv_tokens_reused == 0


def test_gates_are_watched_over_whole_prompts(engine):
    uses = []
    for _ in range(2):
        uses.append(GateUse())
        engine.watched(uses[-1]).generate(FIRST, "a", HOW)
        engine.generate(FIRST, "a", HOW)
    assert uses[0].tokens == uses[1].tokens == sum(len(ids(engine, prompt)) for prompt in FIRST)
    assert uses[0].means() == uses[1].means()


# --- what is kept ---


def layers(tokens: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(torch.arange(tokens).float()[None, :, None], torch.zeros(1, tokens, 1))]  # 8 bytes a token


def test_the_longest_beginning_is_found():
    kv = KVPrefixes(1000)
    kv.keep("x", [1, 2, 3, 4], layers(4))
    kv.keep("x", [1, 2, 9, 9, 9], layers(5))
    assert kv.find("x", [1, 2, 3, 7, 8]).tokens == 3
    assert kv.find("x", [1, 2, 9, 9, 9, 5]).tokens == 5
    assert kv.find("x", [1, 2, 3, 4]).tokens == 3, "the last token's logits are wanted"
    assert kv.find("x", [1]).tokens == kv.find("x", [8, 2]).tokens == kv.find("y", [1, 2, 3]).tokens == 0


def test_the_least_recently_used_goes_first():
    kv = KVPrefixes(80)
    kv.keep("x", [1, 1, 1, 1], layers(4))
    kv.keep("x", [2, 2, 2, 2], layers(4))
    kv.find("x", [1, 1])
    kv.keep("y", [3, 3, 3, 3], layers(4))
    assert (kv.bytes, len(kv)) == (64, 2)
    assert [kv.find(key, [n] * 3).tokens for key, n in (("x", 1), ("x", 2), ("y", 3))] == [2, 0, 2]


def test_the_beginning_of_what_is_too_large_is_kept():
    kv = KVPrefixes(80)
    kv.keep("x", [1, 2], layers(2))
    kv.keep("x", list(range(1, 13)), layers(12))
    assert (kv.bytes, len(kv)) == (80, 1)
    assert kv.find("x", list(range(1, 20))).tokens == 10
    none = KVPrefixes(0)
    none.keep("x", [1, 2], layers(2))
    assert len(none) == 0


def test_a_text_takes_the_place_of_its_beginnings():
    kv = KVPrefixes(1000)
    kv.keep("x", [1, 2], layers(2))
    kv.keep("y", [1, 2], layers(2))
    kv.keep("x", [1, 2, 3], layers(3))
    assert (kv.bytes, len(kv)) == (40, 2)
    kv.keep("x", [1, 2], layers(2))
    assert (kv.bytes, len(kv)) == (40, 2)


def test_what_is_kept_is_a_copy():
    kv, made = KVPrefixes(1000), layers(3)
    kv.keep("x", [1, 2, 3], made)
    made[0][0].zero_()
    assert kv.find("x", [1, 2, 3]).layers[0][0].sum() == 3


def test_memory_stays_within_its_bound(tmp_path):
    found = opened(tmp_path / "store", kv_memory="40kB")
    for number in range(12):
        found.generate([f"{number} {FIRST[number % 3]}"], "a", HOW)
        assert 0 < found.kv.bytes <= 40_000
    assert len(found.kv) < 12


def test_kv_memory_is_a_size():
    with pytest.raises(ConfigError, match="kv_memory: 'lots' is no size"):
        Engine(learned(), tiny_tokenizer(), kv_memory="lots")
    with pytest.raises(ConfigError, match="kv_memory: -1 is below 0"):
        Engine(learned(), tiny_tokenizer(), kv_memory=-1)
