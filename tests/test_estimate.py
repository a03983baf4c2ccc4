"""`survey`: what is counted is exact, what is measured is of the right size, and nothing is left behind."""

import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from moecl.config import StreamConfig, load_stream
from moecl.course import Course, Watcher
from moecl.data import derived
from moecl.data.encode import Encoded
from moecl.data.task import load_task_data
from moecl.errors import ConfigError
from moecl.estimate import (
    COPIES,
    cells_tested,
    kept_bytes,
    padded,
    passes,
    rows_tested,
    scratch_batch,
    starts_tried,
    survey,
)
from moecl.method_config import JointConfig, MoECLConfig
from moecl.methods import make_method
from moecl.nn.lora import Geometry
from moecl.router import Features
from moecl.start import Starts
from moecl.train import ContinualTrainer
from tiny_stream import write_stream


def row(length: int, answer: int = 1) -> Encoded:
    return Encoded(list(range(3, 3 + length - answer)), [1] * answer, 0, False)


def stream(tasks: int = 1, **train) -> StreamConfig:
    section = {"kind": "classification", "labels": ["a", "b"], "train": "x.jsonl"}
    return StreamConfig(base="x", train=train, tasks=[{"name": f"t{n}", **section} for n in range(tasks)])


def test_kept_bytes_of_a_graph_counted_by_hand():
    weight = torch.randn(4, 5, requires_grad=True)
    x = torch.randn(3, 4)
    loss, kept = kept_bytes(lambda: (x @ weight).relu().sum(), owned=[weight])
    assert kept == 4 * (3 * 4 + 3 * 5), "x for the weight's gradient, relu's output; the weight is not ours to count"
    loss.backward()
    assert weight.grad is not None
    assert kept_bytes(lambda: (x @ weight).relu().sum(), owned=[weight, x])[1] == 4 * 3 * 5


def test_a_storage_that_is_kept_twice_counts_once():
    x = torch.randn(8, 8, requires_grad=True)

    def forward() -> torch.Tensor:
        y = x * 2
        return (y.sin() + y.cos() + y.t().exp().detach()).sum()

    assert kept_bytes(forward)[1] == 8 * 8 * 4


def test_what_no_graph_holds_any_more_does_not_count():
    x = torch.randn(8, 8, requires_grad=True)
    assert kept_bytes(lambda: (x.exp().detach() * (x * 2).sin()).sum())[1] == 2 * 8 * 8 * 4, "a factor and sin's input"


def test_memory_that_is_freed_and_used_again_does_not_count():
    x = torch.randn(16, 16, requires_grad=True)

    def forward() -> torch.Tensor:
        for size in range(1, 16):
            (x[:size] * 2).sin().sum()  # its graph is gone at once, its memory free for the next
        return (x * 2).sin().sum()

    assert kept_bytes(forward)[1] == 16 * 16 * 4


def test_padding_is_counted():
    rows = [row(10), row(4), row(4), row(9), row(7)]
    total, largest = padded(rows, stream(batch_size=5, epochs=3))
    assert (total, largest) == (150, 50)
    total, largest = padded(rows, stream(batch_size=2, epochs=1))
    assert total >= 34
    assert largest in (20, 18, 14)
    batch = scratch_batch(rows, stream(batch_size=5), pad_id=0, device=torch.device("cpu"))
    assert batch["input_ids"].shape == (5, 10)


@pytest.mark.parametrize(("evaluate", "cells"), [("all", [4, 4, 4]), ("seen", [3, 2, 1]), ("next", [4, 4, 3])])
def test_rows_tested(evaluate, cells):
    config = stream(3).model_copy(update={"evaluate": evaluate})
    course = Course(config.tasks[0], test=(None, [row(5)] * 10))
    assert [rows_tested(config, place, course) for place in range(3)] == [10 * count for count in cells]
    assert rows_tested(config, 0, replace(course, test=None)) == 0


def test_what_is_not_answered_is_not_counted():
    task = stream(3).tasks[0]
    joint = stream(3).model_copy(update={"method": JointConfig()})
    assert [cells_tested(joint, place, task) for place in range(3)] == [2, 2, 2]
    head = task.model_copy(update={"head": "classifier"})
    assert [cells_tested(stream(3), place, head) for place in range(3)] == [3, 2, 1]


def test_check_refuses_what_training_refuses(tmp_path, tiny_folder):
    path = write_stream(tmp_path, tiny_folder, rows=8, method={"name": "replay"})
    with pytest.raises(ConfigError, match="replay trains on rows of several tasks at once"):
        survey(load_stream(path, ["head=classifier"]), Watcher())
    with pytest.raises(ConfigError, match="is more than the base's 256 positions"):
        survey(load_stream(path, ["train.max_length=100000"]), Watcher())


def test_passes():
    assert passes(stream(epochs=3, evals_per_epoch=2)) == 7
    assert passes(stream(evals_per_epoch=0)) == 1


VARIANTS = {
    "exact": {},
    "live, one layer": {"method": {"name": "moe-cl", "rank": 3, "retention": "live", "adapt_layers": 1}},
    "paper, checkpointed": {"preset": "paper", "train": {"gradient_checkpointing": True}},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_survey_counts_what_a_run_then_takes(variant, tiny_folder, tmp_path):
    path = write_stream(tmp_path / "data", tiny_folder, rows=16, **VARIANTS[variant])
    config = load_stream(path, ["train.epochs=1", "train.precision=fp32"])
    before = sorted(tmp_path.rglob("*"))
    found = survey(config, Watcher())
    assert sorted(tmp_path.rglob("*")) == before
    assert json.loads(json.dumps(found)) == found
    cost, memory = found["estimate"], found["estimate"]["memory_bytes"]
    result = ContinualTrainer(config, tmp_path / "run").run()
    details = result.details["task0"]
    assert cost["task_bytes"] == details["bytes"]
    assert memory["learned"] == details["bytes"] * (len(result.tasks) - 1)
    assert memory["trained"] == 4 * COPIES * details["trained_parameters"]
    base = AutoModelForCausalLM.from_pretrained(tiny_folder)
    assert memory["base"] == sum(t.numel() * t.element_size() for t in [*base.parameters(), *base.buffers()])
    assert memory["activations"] > 0
    assert memory["process"] > 10e6, "Python and torch"
    assert cost["peak_bytes"] == sum(memory.values())
    assert cost["training_seconds"] > 0
    assert cost["evaluation_seconds"] > 0


@pytest.mark.parametrize("router", [True, False])
def test_the_routers_reading_is_tried_where_there_is_a_router(router, tiny_folder, tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr(Features, "__call__", lambda features, texts: read.append(len(texts)))
    path = write_stream(tmp_path / "data", tiny_folder, rows=16, router=router)
    survey(load_stream(path, ["train.epochs=1"]), Watcher())
    assert bool(read) == router


def test_survey_tells_what_the_prefix_cache_takes(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("MOECL_CACHE", str(tmp_path / "cache"))
    path = write_stream(tmp_path / "data", tiny_folder, rows=16, method={"name": "moe-cl", "rank": 2})
    words = [f"tasks.task{n}.labels={{good: s, bad: t}}" for n in range(2)]  # of a token: one forward answers
    config = load_stream(path, [*words, "method.adapt_layers=1", "evaluate=seen"])
    found = survey(config, Watcher())["estimate"]["prefix"]
    assert not (tmp_path / "cache" / "prefix").exists()
    assert found["share"] == 0.5
    assert found["training_seconds"] == found["filling_seconds"] > 0, "of two epochs one is spared"
    assert found["evaluation_seconds"] > 0
    ContinualTrainer(config, tmp_path / "run").run()
    _, entries, taken = derived.taken("prefix")
    assert found["bytes"] < taken < found["bytes"] + 300 * entries, "the tensors, and a header each"
    for setting in ("train.prefix_cache=0", "method.adapt_layers=all"):
        assert survey(load_stream(path, ["method.adapt_layers=1", setting]), Watcher())["estimate"]["prefix"] is None


@pytest.mark.parametrize("retention", ["exact", "live"])
@pytest.mark.parametrize("evaluate", ["all", "seen"])
def test_survey_counts_the_starts(retention, evaluate, tiny_folder, tmp_path, monkeypatch):
    """As often as a run then tries rows."""
    method = {"name": "moe-cl", "rank": 2, "warm_start": "nearest", "retention": retention}
    path = write_stream(tmp_path / "data", tiny_folder, tasks=3, rows=16, method=method, evaluate=evaluate)
    config = load_stream(path, ["train.epochs=1", "train.precision=fp32"])
    survey(config, Watcher())
    losses, real = [], Starts.loss
    monkeypatch.setattr(Starts, "loss", lambda self, course, parts: losses.append(1) or real(self, course, parts))
    ContinualTrainer(config, tmp_path / "run").run()
    courses = [Course(load_task_data(task).task, test=((), ())) for task in config.tasks]
    assert len(losses) == sum(tried(config, place, one) for place, one in enumerate(courses))


def tried(config, place, course):
    geometry = Geometry((0,), 8, (16,), gated=True, num_layers=1)
    return starts_tried(make_method(config.method, geometry, 0), config, place, course)


def test_starts_tried_of_many_tasks():
    """Of finished tasks that never change each once, at most four at a time; none where none can be offered."""
    method = {"name": "moe-cl", "warm_start": "nearest"}
    config = stream(8).model_copy(update={"method": MoECLConfig(**method), "evaluate": "seen"})
    course = Course(config.tasks[0], test=((), ()))
    assert [tried(config, place, course) for place in (0, 1, 7)] == [0, 2, 5]
    every = config.model_copy(update={"evaluate": "all"})
    assert tried(every, 7, course) == 7 * 2 + 1
    live = every.model_copy(update={"method": MoECLConfig(**method, retention="live")})
    assert tried(live, 7, course) == 8 + (1 + 2 + 3 + 4 * 4) + 4
    head = Course(config.tasks[0].model_copy(update={"head": "classifier"}), test=((), ()))
    assert tried(every, 7, head) == 0
    assert tried(stream(8), 7, course) == 0


def test_survey_tells_a_heads_labels_as_training_sees_them(tiny_folder, tmp_path):
    path = write_stream(tmp_path, tiny_folder, tasks=1, rows=16)
    [lm] = survey(load_stream(path, ["tasks.task0.labels={good: fine it, bad: fine was}"]), Watcher())["tasks"]
    assert any("share their first token" in hint for hint in lm["hints"])
    classifier = load_stream(path, ["tasks.task0.labels={good: fine it, bad: fine was}", "head=classifier"])
    [head] = survey(classifier, Watcher())["tasks"]
    assert not any("share their first token" in hint for hint in head["hints"])
    assert head["splits"]["train"]["rows"] == len(load_task_data(classifier.tasks[0]).train.examples)
