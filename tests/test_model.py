"""`MoECL`, as a user calls it: contracts 1, 3, 5 and 6, generation, and what is refused."""

import copy

import pytest
import torch
import torch.nn.functional as F

from moecl import model as model_module
from moecl.config import MoECLConfig, Task
from moecl.errors import BaseError, ConfigError, TaskError
from moecl.model import MoECL
from tiny import PAD, VOCAB, tiny_batch, tiny_model
from tiny_tasks import CLOSE, labelled, learned, rows_of, stir, task

# --- the base ---


def test_the_bare_base_is_bitwise_the_base():
    base = tiny_model()
    batch = tiny_batch(4)
    before = base(**batch).logits
    model = learned(base)
    assert torch.equal(model(**batch).logits, before)
    mixed = model(**batch, task=["a", None, "b", None]).logits
    assert torch.equal(mixed[[1, 3]], before[[1, 3]])
    assert not torch.allclose(mixed[[0, 2]], before[[0, 2]])


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_dropout_of_the_base_never_runs(family):
    base = tiny_model(family)
    assert [
        module for module in base.modules() if isinstance(module, torch.nn.Dropout) and module.p
    ] or base.config.dropout
    model = MoECL.attach(base.train())
    model.add_task(task())
    batch = labelled(tiny_batch())
    before = model.eval()(**batch, task="a").loss
    for mode in (True, False, True):
        model.train(mode)
        assert not any(module.training for module in base.modules())
        assert torch.equal(model(**batch, task="a").loss, before)
    assert model.training


def test_a_fresh_task_is_the_base():
    base = tiny_model()
    batch = tiny_batch()
    before = base(**batch).logits
    model = MoECL.attach(base)
    model.add_task(task())
    torch.testing.assert_close(model(**batch, task="a").logits, before, **CLOSE)


def test_attaching_copies_nothing(monkeypatch):
    base = tiny_model()
    monkeypatch.setattr(copy, "deepcopy", None)
    model = MoECL.attach(base)
    assert model.base is base


def test_detach_gives_the_base_back():
    base = tiny_model().train()
    first = next(base.parameters()).requires_grad_(True)
    batch = tiny_batch()
    before = base.eval()(**batch).logits
    model = learned(base.train())
    assert not base.training
    assert model.detach() is base
    assert base.training
    assert [p for p in base.parameters() if p.requires_grad] == [first]
    assert torch.equal(base.eval()(**batch).logits, before)
    with pytest.raises(BaseError, match="attach it again"):
        model(**batch, task="a")
    with pytest.raises(BaseError, match="more than the base's 2 layers"):
        MoECL.attach(base.train(), MoECLConfig(adapt_layers=3))
    assert base.training
    assert first.requires_grad
    MoECL.attach(base)


# --- contract 3: tasks in one batch ---


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_a_batch_of_tasks_equals_the_rows_one_by_one(family):
    model = learned(tiny_model(family), "abc")
    batch = tiny_batch(5)
    names = ["b", None, "a", "c", "b"]
    together = model(**batch, task=names).logits
    everyone = torch.stack([model(**batch, task=name).logits for name in ("a", "b", "c", None)])
    assert (everyone[:, None] - everyone[None]).abs().flatten(2).amax(2).fill_diagonal_(1).min() > 0.1, "tasks differ"
    for row, name in enumerate(names):
        alone = model(**rows_of(batch, row), task=name).logits[0]
        real = batch["attention_mask"][row].bool()
        torch.testing.assert_close(together[row, real], alone[real], **CLOSE)


def test_one_name_is_as_good_as_one_a_row():
    model = learned()
    batch = tiny_batch()
    assert torch.equal(model(**batch, task="a").logits, model(**batch, task=["a"] * 3).logits)
    assert torch.equal(model(**batch, task=None).logits, model(**batch, task=[None] * 3).logits)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("c", r"no task 'c'; the tasks are: a, b"),
        (["a", "c", None], r"no task 'c'; the tasks are: a, b"),
        (["a", "b"], "2 names for 3 rows"),
    ],
)
def test_unknown_tasks(names, message):
    with pytest.raises(TaskError, match=message) as caught:
        learned()(**tiny_batch(), task=names)
    assert "\n" not in str(caught.value)


def test_a_near_name_is_suggested():
    model = learned(names=["reviews"])
    with pytest.raises(TaskError, match=r"did you mean 'reviews'\?"):
        model(**tiny_batch(), task="review")


def test_names_are_taken_once():
    model = learned()
    with pytest.raises(TaskError, match="'a' is there already"):
        model.add_task(task("a"))
    with pytest.raises(TaskError, match="labels are needed"):
        model.add_task(Task(name="c", kind="classification"))
    assert list(model.bank) == ["a", "b"]


# --- loss and gradients ---


@pytest.mark.parametrize("names", ["a", ["a", None, "b"], None])
def test_the_loss_is_that_of_all_logits(names):
    model = learned()
    batch = labelled(tiny_batch())
    output = model(**batch, task=names)
    logits = model(batch["input_ids"], batch["attention_mask"], task=names).logits
    wanted = batch["labels"][:, 1:]
    assert output.logits.shape == (int((wanted != -100).sum()), VOCAB)
    torch.testing.assert_close(output.loss, F.cross_entropy(logits[:, :-1].flatten(0, 1), wanted.flatten()), **CLOSE)
    torch.testing.assert_close(output.logits, logits[:, :-1][wanted != -100], **CLOSE)


def test_embeddings_may_stand_for_ids():
    model = learned()
    batch = labelled(tiny_batch())
    embedded = {"inputs_embeds": model.base.get_input_embeddings()(batch["input_ids"])}
    expected = model(**batch, task="a", features=True)
    found = model(**embedded, labels=batch["labels"], attention_mask=batch["attention_mask"], task="a", features=True)
    torch.testing.assert_close(found.loss, expected.loss, **CLOSE)
    assert model(**embedded, labels=batch["labels"], task="a", features=True).features.keys() == {0, 1}


@pytest.mark.parametrize("head", ["lm", "classifier"])
def test_only_the_open_tasks_parts_get_a_gradient(head):
    """Contract 5, by name; what is finished keeps its bytes."""
    model = MoECL.attach(tiny_model(), MoECLConfig(rank=4))
    for name in "ab":
        model.add_task(task(name, head))
        stir(model)
    a = model.bank["a"].parts
    before = {name: p.clone() for part in (a.shared, a.task, a.gate) for name, p in part.named_parameters()}
    model.train()
    trainable = [p for p in model.parameters() if p.requires_grad]
    batch = labelled(tiny_batch())
    labels = torch.tensor([0, 1, 0]) if head == "classifier" else batch["labels"]
    optimizer = torch.optim.AdamW(trainable, lr=0.1, weight_decay=0.1)
    model(batch["input_ids"], batch["attention_mask"], labels, task="b").loss.backward()
    moved = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    loras = [f"layers.{i}.{p}.lora_{x}" for i in (0, 1) for p in ("gate_proj", "up_proj", "down_proj") for x in "AB"]
    expected = {f"learner.{part}.{name}" for part in ("shared", "task") for name in loras}
    expected |= {f"learner.own_gate.layers.{i}.gate" for i in (0, 1)} | {"learner.adversary.weight"}
    assert moved == expected | ({"learner.head.weight"} if head == "classifier" else set())
    assert {name for name, p in model.named_parameters() if p.requires_grad} == moved
    optimizer.step()
    after = {name: p for part in (a.shared, a.task, a.gate) for name, p in part.named_parameters()}
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(p.grad is None for p in after.values())


def test_optimizer_groups_are_what_the_open_task_trains():
    model = MoECL.attach(tiny_model(), MoECLConfig(rank=4, lora_A_lr=0.5))
    with pytest.raises(TaskError, match="add_task"):
        model.optimizer_groups(0.01)
    model.add_task(task("a"))
    rates = {id(p): group["lr"] for group in model.optimizer_groups(0.01) for p in group["params"]}
    names = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    assert rates == {p: 0.005 if name.endswith("lora_A") else 0.01 for p, name in names.items()}
    model.finish_task()
    with pytest.raises(TaskError, match="add_task"):
        model.optimizer_groups(0.01)


def test_a_plain_loop_learns():
    model = MoECL.attach(tiny_model(), MoECLConfig(rank=4))
    batch = labelled(tiny_batch(4))
    losses = {}
    for name in "ab":
        model.add_task(task(name))
        before = float(model.eval()(**batch, task=name).loss.detach())
        optimizer = torch.optim.AdamW(model.optimizer_groups(lr=0.005))
        model.train()
        for _ in range(25):
            model(**batch, task=name).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        losses[name] = model.eval()(**batch, task=name).loss.detach()
        model.finish_task()
        assert losses[name] < before / 2
    assert torch.equal(model(**batch, task="a").loss, losses["a"]), "retention is exact"


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_autocast_changes_nothing(dropout):
    model = learned(dropout=dropout)
    model.add_task(task("c"))
    batch, autocast = labelled(tiny_batch()), torch.autocast("cpu", dtype=torch.bfloat16)
    expected = model.eval()(**batch, task="c")
    with autocast:
        found = model(**batch, task="c")
        few = model(**{key: value[:1, -3:] for key, value in batch.items() if key != "labels"}, task="c").logits
    assert (found.logits.dtype, few.dtype) == (torch.float32, torch.float32)
    assert torch.equal(found.loss, expected.loss)
    expected.loss.backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    with autocast:
        found.loss.backward()
        model.train()(**batch, task="c").loss.backward()  # with its adversary
    model.zero_grad()
    model.eval()(**batch, task="c").loss.backward()
    assert all(map(torch.equal, gradients, [p.grad for p in model.parameters() if p.grad is not None]))


def test_the_adversary_takes_part_in_training_alone():
    model = MoECL.attach(tiny_model(), MoECLConfig(rank=4))
    for name in "ab":
        model.add_task(task(name))
        stir(model)
    batch = labelled(tiny_batch())

    def state() -> bytes:
        return b"".join(t.numpy().tobytes() for t in model.learner.state_dict().values())

    before = state()
    plain = model.eval()(**batch, task="b").loss
    with torch.no_grad():
        assert torch.equal(model.train()(**batch, task="b").loss, plain)
    assert torch.equal(model(**batch, task=["b", "a", "b"]).loss, model.eval()(**batch, task=["b", "a", "b"]).loss)
    model.train()(**batch, task="a")
    assert state() == before
    trained = model(**batch, task="b").loss
    assert trained > plain
    assert state() != before
    assert model(**batch, task=["b"] * 3).loss > plain


def test_checkpointing_changes_no_gradient():
    found = []
    for on in (False, True):
        model = MoECL.attach(tiny_model(), MoECLConfig(rank=4, dropout=0.1))
        for name in "ab":
            model.add_task(task(name))
            stir(model)
        if on:
            model.gradient_checkpointing_enable()
        torch.manual_seed(3)
        model.train()(**labelled(tiny_batch()), task="b").loss.backward()
        found.append({name: p.grad for name, p in model.learner.named_parameters()})
        model.gradient_checkpointing_disable()
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad, **CLOSE)


def test_dropout_runs_in_training_alone():
    model = learned(dropout=0.5)
    batch = tiny_batch()
    assert torch.equal(model(**batch, task="a").logits, model(**batch, task="a").logits)
    model.train()
    assert not torch.equal(model(**batch, task="a").logits, model(**batch, task="a").logits)
    answers = [model.generate(**batch, task="a", max_new_tokens=3, do_sample=False, eos_token_id=None) for _ in "ab"]
    assert torch.equal(*answers)


# --- classifier heads ---


def classifier(base=None) -> MoECL:
    model = MoECL.attach(base or tiny_model(), MoECLConfig(rank=4))
    model.add_task(task("a", "classifier", ("x", "y", "z")))
    stir(model)
    model.add_task(task("b"))
    stir(model, 1)
    model.finish_task()
    return model.eval()


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_a_classifier_reads_the_last_real_token(family):
    model = classifier(tiny_model(family))
    head = model.bank["a"].parts.head.weight
    labels = torch.tensor([2, 0, 1])
    logits = {}
    for side in ("right", "left"):
        batch = tiny_batch(side=side)
        output = model(**batch, labels=labels, task="a")
        logits[side] = output.logits
        assert output.logits.shape == (3, 3)
        torch.testing.assert_close(output.loss, F.cross_entropy(output.logits, labels))
    assert model(**tiny_batch(), task="a").loss is None
    whole = tiny_batch(1)
    hidden = model.base.base_model
    with model_module.run_with(model.call("a", 1, model.bank)):
        last = hidden(**whole).last_hidden_state[:, -1]
    torch.testing.assert_close(model(**whole, task="a").logits, last @ head.mT, **CLOSE)
    for row in range(3):
        one = tiny_batch()
        short = one["input_ids"][row : row + 1, : int(one["attention_mask"][row].sum())]
        torch.testing.assert_close(model(short, task="a").logits[0], logits["right"][row], **CLOSE)


@pytest.mark.parametrize("names", [["a", "b", "a"], ["a", None, "a"]])
def test_heads_do_not_mix(names):
    with pytest.raises(TaskError, match="batch of their own"):
        classifier()(**tiny_batch(), task=names)


def test_what_a_base_cannot_serve_is_refused():
    base = tiny_model("opt")
    model = MoECL.attach(base)
    with pytest.raises(ConfigError, match="300 is more than the base's 256 positions"):
        model.add_task(task().model_copy(update={"max_length": 300}))
    base.get_output_embeddings().weight.data = torch.zeros(VOCAB, 16)  # as in opt-350m, which projects its last layer
    with pytest.raises(ConfigError, match=r"gives 16 numbers and not 32; use head: lm") as caught:
        model.add_task(task("a", "classifier"))
    assert "\n" not in str(caught.value)
    assert model.bank == {}


# --- generation ---

GREEDY = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": PAD}


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gemma2"])
def test_generation_of_tasks_in_one_batch(family, beams):
    model = learned(tiny_model(family), "ab", lora_alpha=32)
    batch = tiny_batch(4, side="left")
    names = ["a", None, "b", "a"]
    settings = {**GREEDY, "num_beams": beams}
    together = model.generate(**batch, task=names, **settings)[:, 9:]
    for row, name in enumerate(names):
        ids = batch["input_ids"][row : row + 1, 2 * row :]
        alone = model.generate(ids, attention_mask=torch.ones_like(ids), task=name, **settings)
        assert alone[0, ids.shape[1] :].tolist() == together[row].tolist()
    others = model.generate(**batch, task=["b", "a", None, "b"], **settings)[:, 9:]
    assert sum(torch.equal(one, other) for one, other in zip(together, others, strict=True)) <= 1, "tasks differ"


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gemma2"])
def test_samples_of_a_row_keep_its_task(family):
    """Each sampled token's logits are those that a plain forward gives under the row's task."""
    model = learned(tiny_model(family), "ab")
    batch = tiny_batch(3, side="left")
    names = ["b", None, "a"]
    torch.manual_seed(0)
    out = model.generate(
        **batch,
        task=names,
        **{**GREEDY, "do_sample": True, "num_return_sequences": 2},
        top_k=0,
        return_dict_in_generate=True,
        output_logits=True,
    )
    logits = torch.stack(out.logits, dim=1)  # (6, 6, V)
    for row, sequence in enumerate(out.sequences):
        whole = sequence[None, 2 * (row // 2) :]
        expected = model(whole, torch.ones_like(whole), task=names[row // 2]).logits[0, -7:-1]
        torch.testing.assert_close(logits[row], expected, rtol=1e-4, atol=1e-4)


# --- moving ---


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_bank_moves_along(dtype):
    """The base alone changes its dtype: what was learned would be rounded for good."""
    model = learned()
    model.add_task(task("c"))
    batch = tiny_batch()
    single = model(**batch, task="a").logits
    before = {name: copy.deepcopy(entry.parts.modules()) for name, entry in model.bank.items()}
    found = model.to(dtype)(**batch, task="a").logits
    assert found.dtype == dtype
    if dtype is torch.float64:
        torch.testing.assert_close(found, single.double(), **CLOSE)
    for name, entry in model.bank.items():
        for part, module in entry.parts.modules().items():
            for one, other in zip(module.parameters(), before[name][part].parameters(), strict=True):
                assert one.dtype == torch.float32
                assert torch.equal(one, other)
    model.train()(**labelled(batch), task="c").loss.backward()
    model.to("meta")
    for entry in model.bank.values():
        assert all(p.is_meta for part in entry.parts.modules().values() for p in part.parameters())
