"""A task or an expert as a PEFT adapter: PEFT makes of the base what we make of it; a stand-in is measured first."""

import json
import os
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load
from torch import nn

from moecl.adapter import CONFIG, WEIGHTS, adapter, write_folder
from moecl.backbone import Backbone
from moecl.bank import Entry
from moecl.config import Task
from moecl.data.task import example
from moecl.engine import Engine
from moecl.errors import BaseError, ConfigError, RunError, TaskError
from moecl.export import averaged, one_expert, one_lora
from moecl.method_config import MoECLConfig
from moecl.model import MoECL
from moecl.nn.call import run_with
from moecl.nn.moe_ffn import Gated, Nested
from moecl.nn.sums import Keys, Mix, Sum
from moecl.nn.weights import Weights
from tiny import FAMILIES, LAYERS, random_parts, tiny_batch, tiny_model, tiny_tokenizer

peft = pytest.importorskip("peft")

TASK = Task(name="a", kind="classification", instruction="It is {text}", labels={"good": "fine", "bad": "sad"})
TEXTS = [("a day food", "good"), ("the sea price", "bad"), ("tea", "good")] * 3
ROWS = [example({"text": text, "label": label}, TASK, "row") for text, label in TEXTS]


def attached(family: str = "llama", layers: int | str = "all") -> MoECL:
    return MoECL(Backbone(tiny_model(family), None, family), MoECLConfig(rank=4, adapt_layers=layers))


def logits(model: MoECL, parts: object) -> torch.Tensor:
    model.bank["a"] = Entry(TASK, parts)
    with torch.no_grad():
        return model(**tiny_batch(), task="a").logits


def by_peft(folder: Path, family: str) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)  # PEFT's own
        loaded = peft.PeftModel.from_pretrained(tiny_model(family), folder)
        with torch.no_grad():
            return loaded(**tiny_batch()).logits


@pytest.mark.parametrize("layers", ["all", 1])
@pytest.mark.parametrize("form", [Gated, Nested], ids=["apart", "nested"])
@pytest.mark.parametrize("family", FAMILIES)
def test_peft_runs_an_expert_as_we_do(tmp_path, family, layers, form):
    model = attached(family, layers)
    parts = random_parts(model.geometry, form=form)
    for which in ("task", "shared"):
        lora = one_expert(Entry(TASK, parts), which)
        write_folder(tmp_path / which, adapter(model, lora))
        found = by_peft(tmp_path / which, family)
        assert torch.allclose(found, logits(model, lora), rtol=1e-5, atol=1e-5)
        assert not torch.allclose(found, bare(model), atol=1e-2)
    assert not torch.allclose(by_peft(tmp_path / "task", family), by_peft(tmp_path / "shared", family), atol=1e-2)


def bare(model: MoECL) -> torch.Tensor:
    with torch.no_grad():
        return model(**tiny_batch()).logits


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2"])
def test_the_tensors_are_those_of_the_store(family):
    """Under the base's names; where the base has gate and up in one matrix, side by side."""
    model = attached(family)
    parts = random_parts(model.geometry)
    found = load(adapter(model, one_expert(Entry(TASK, parts)))[WEIGHTS])
    pair = {name: parts.task.pair(0, name) for name in model.geometry.projections}
    layer = {"gpt2": "transformer.h.0.mlp"}.get(family, "model.layers.0.mlp")
    names = {"llama": ("up_proj", "down_proj"), "gpt2": ("c_fc", "c_proj"), "phi3": ("gate_up_proj", "down_proj")}[
        family
    ]
    up, down = (found[f"base_model.model.{layer}.{name}.lora_B.weight"] for name in names)
    rank, wide = parts.task.rank, pair["up_proj"].lora_B.shape[0]
    if family == "phi3":
        assert torch.equal(up[:wide, :rank], pair["gate_proj"].lora_B)
        assert torch.equal(up[wide:, rank:], pair["up_proj"].lora_B)
        assert not up[:wide, rank:].any()
        assert not up[wide:, :rank].any()
    else:
        assert torch.equal(up, pair["up_proj"].lora_B)
    assert torch.equal(down[:, :rank], pair["down_proj"].lora_B)


def test_the_configuration():
    model = attached("gpt2", 1)
    config = json.loads(adapter(model, one_expert(Entry(TASK, random_parts(model.geometry))))[CONFIG])
    assert config["target_modules"] == ["c_fc", "mlp.c_proj"], "attention has a c_proj, too"
    assert (config["r"], config["lora_alpha"], config["fan_in_fan_out"]) == (4, 8, True)
    assert config["layers_to_transform"] == [LAYERS - 1]
    config = json.loads(adapter(attached(), one_expert(Entry(TASK, random_parts(attached().geometry))))[CONFIG])
    assert config["target_modules"] == ["gate_proj", "up_proj", "down_proj"]
    assert "layers_to_transform" not in config


def answering(parts: object, task: Task = TASK) -> tuple[Engine, Entry]:
    tokenizer = tiny_tokenizer()
    base = tiny_model(vocab_size=len(tokenizer))
    model = MoECL(Backbone(base, tokenizer, "tiny"), MoECLConfig(rank=4))
    model.bank["a"] = entry = Entry(task, parts)
    return Engine(model), entry


def test_a_whole_task_as_one_lora():
    """Of both ranks; exact where both experts are the same, near where they are small, off where they are not."""
    geometry = attached().geometry
    parts = random_parts(geometry)
    lora, parity = one_lora(*answering(parts), ROWS)
    assert lora.lora.rank == 8
    assert set(parity.task_weight) == set(range(LAYERS))
    assert all(0 < weight < 1 for weight in parity.task_weight.values())
    assert parity.rows == len(ROWS)
    assert parity.largest_logit_gap > 0.1
    assert parity.exact_score is not None
    same = Gated(parts.shared, parts.shared, parts.gate, parts.scale)
    _, exact = one_lora(*answering(same), ROWS)
    assert (exact.agreement, exact.score) == (1, exact.exact_score)
    assert exact.largest_logit_gap < 1e-4
    gaps = [one_lora(*answering(random_parts(geometry, std=std)), ROWS)[1].largest_logit_gap for std in (0.1, 0.02)]
    assert parity.largest_logit_gap > gaps[0] > gaps[1]


def test_a_nested_task_as_one_lora():
    """Exact where nothing stands in for the gate: with a task's expert that adds nothing."""
    parts = random_parts(attached().geometry, form=Nested)
    lora, parity = one_lora(*answering(parts), ROWS)
    assert (lora.lora.rank, parity.largest_logit_gap > 0.1) == (8, True)
    with torch.no_grad():
        for name, p in parts.task.named_parameters():
            p.mul_(not name.endswith("lora_B"))
    _, exact = one_lora(*answering(parts), ROWS)
    assert exact.agreement == 1
    assert exact.largest_logit_gap < 1e-4


def test_the_gates_mean_is_that_of_the_rows():
    """Weighed by hand: with one layer adapted, its gate reads what the base gives."""
    parts = random_parts(attached().geometry)
    engine, entry = answering(parts)
    _, parity = one_lora(engine, entry, ROWS)
    sums, tokens = 0.0, 0
    for row in engine.prompts(TASK, ROWS):
        call = engine.model.call("a", 1, engine.bank)
        call.attention_mask, call.gate_use = torch.ones(1, len(row.input_ids)), {}
        with run_with(call), torch.no_grad():
            engine.model.base(torch.tensor([row.input_ids]))
        sums, tokens = sums + float(call.gate_use[0].sum()), tokens + len(row.input_ids)
    assert parity.task_weight[0] == pytest.approx(sums / tokens, abs=1e-5)


def test_a_written_text_is_compared_whole():
    task = Task(name="a", kind="generation", instruction="It is {text}")
    written = [("a day", "fine food"), ("the sea", "sad")]
    rows = [replace(example(text, task), completion=answer) for text, answer in written]
    parts = random_parts(attached().geometry)
    _, parity = one_lora(*answering(Gated(parts.shared, parts.shared, parts.gate, parts.scale), task), rows)
    assert (parity.rows, parity.agreement) == (2, 1)
    assert parity.largest_logit_gap < 1e-4


def test_a_written_text_is_compared_to_its_end(monkeypatch):
    task, seen, write = Task(name="a", kind="generation", max_length=80), [], Engine.write
    monkeypatch.setattr(Engine, "write", lambda self, rows, how: seen.extend(how) or write(self, rows, how))
    one_lora(*answering(random_parts(attached().geometry), task), [replace(example("x", task), completion="fine food")])
    assert [how.max_new_tokens for how in seen] == [80, 80]


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_peft_runs_the_stand_in_as_we_do(tmp_path, family):
    model = attached(family)
    lora = averaged(random_parts(model.geometry), {0: 0.25, 1: 0.625})
    write_folder(tmp_path / "a", adapter(model, lora))
    assert torch.allclose(by_peft(tmp_path / "a", family), logits(model, lora), rtol=1e-5, atol=1e-5)


def test_a_sum_is_one_lora_already():
    geometry = attached().geometry
    parts = Sum(random_parts(geometry).task, 2.0)
    engine, entry = answering(parts)
    lora, parity = one_lora(engine, entry, ROWS)
    assert (parity.agreement, parity.largest_logit_gap, parity.task_weight) == (1, 0, {})
    assert lora.lora is one_expert(entry).lora is parts.lora
    with pytest.raises(ConfigError, match="--expert: task 'a' has one LoRA and no experts to choose from"):
        one_expert(entry, "shared")


def test_what_no_lora_can_hold():
    engine, entry = answering(random_parts(attached().geometry))
    loras = (random_parts(engine.model.geometry).task,)
    mix = Mix(loras, (Keys(torch.ones(1, 32)),), 1.0, 1.0)
    weights = Weights(engine.model.injected.projections())
    for parts, why in (
        (mix, "form mix cannot be one LoRA: its LoRAs are weighed by"),
        (weights, "form weights cannot"),
    ):
        for make in (lambda one: one_expert(one), lambda one: one_lora(engine, one, ROWS)):
            with pytest.raises(TaskError, match=why):
                make(Entry(TASK, parts))
    headed = random_parts(engine.model.geometry)
    headed = Gated(headed.shared, headed.task, headed.gate, headed.scale, nn.Linear(32, 2, bias=False))
    with pytest.raises(TaskError, match="'a': answers with a classifier head, which no LoRA holds"):
        one_lora(engine, Entry(TASK, headed), ROWS)
    with pytest.raises(TaskError, match="'a': answers with a classifier head, which no LoRA holds"):
        one_expert(Entry(TASK, headed))
    assert one_expert(Entry(TASK, headed), "shared").lora is headed.shared, "which is no task's"
    with pytest.raises(ConfigError, match="--expert: 'both' is none of task, shared"):
        one_expert(entry, "both")


def test_a_projection_that_peft_does_not_know():
    model = attached()
    model.base.model.layers[0].mlp.up_proj = nn.Bilinear(2, 2, 2)
    with pytest.raises(BaseError, match="a Bilinear in its FFN; PEFT has LoRA for Linear and Conv1D"):
        adapter(model, one_expert(Entry(TASK, random_parts(model.geometry))))


def test_a_folder_is_whole_or_not_there(tmp_path, monkeypatch):
    files = {"one": b"1", "two": b"2"}
    write_folder(tmp_path / "new" / "deep", files)
    assert {path.name: path.read_bytes() for path in (tmp_path / "new" / "deep").iterdir()} == files
    (tmp_path / "empty").mkdir()
    write_folder(tmp_path / "empty", files)
    with pytest.raises(RunError, match="is there already"):
        write_folder(tmp_path / "empty", files)
    real, left = os.write, 1

    def write(*arguments):
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(28, "No space left on device")
        return real(*arguments)

    monkeypatch.setattr(os, "write", write)
    with pytest.raises(RunError, match="the disk is full"):
        write_folder(tmp_path / "full", files)
    assert {path.name for path in tmp_path.iterdir()} == {"new", "empty"}
