"""The benchmarks' machinery on a tiny model; their sides compute the same where they should. No time is asserted."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("peft", reason="benchmarks need moecl[bench,osft]")

import floor
import generate
import measure
import predict
import serve
import sides
import table
import train_step
import train_stream
from moecl import Engine, MoECL, MoECLConfig
from moecl.backbone import Backbone, load_backbone
from moecl.config import TrainConfig
from moecl.task_trainer import Learner
from tiny import LAYERS, tiny_model
from tiny_stream import write_rows
from tiny_tasks import CLOSE

ROOT = Path(train_step.__file__).parent
KEYS = {"benchmark", "ratios", "targets", "figures", "environment"}


@pytest.fixture
def data(tmp_path) -> Path:
    """Two tasks as `train_stream --data` takes them."""
    for seed, name in enumerate(("first", "second")):
        folder = tmp_path / "data" / name
        folder.mkdir(parents=True)
        write_rows(folder / "train.jsonl", 8, seed)
        (folder / "task.json").write_text(json.dumps({"labels": ["good", "bad"]}))
    return tmp_path / "data"


@pytest.fixture
def batch(tiny_llama):
    return train_step.make_batch(tiny_llama, rows=3, length=8)


def result(main, capsys, folder: Path, *options: str) -> dict:
    """What a benchmark says: its last line, which --json must repeat."""
    main([*options, "--base", str(folder), "--rounds", "2"])
    *_, last = capsys.readouterr().out.splitlines()
    found = json.loads(last)
    assert set(found) == KEYS
    assert found["ratios"]
    assert all(math.isfinite(value) for value in found["ratios"].values())
    assert set(found["targets"]) <= set(found["ratios"])
    assert set(found["figures"]["spread"]) == set(found["ratios"])
    return found


# --- each one runs, and says what it must ---


def test_train_step(tiny_folder, capsys, monkeypatch):
    monkeypatch.setattr(train_step, "ALONE_ROUNDS", 1)
    found = result(train_step.main, capsys, tiny_folder, "--rows", "2", "--length", "8")
    assert set(found["targets"]) == set(train_step.TARGETS)
    assert found["figures"]["saved_bytes_fp32"].keys() == train_step.LEARNING.keys()
    for precision in ("bf16", "fp32"):
        assert found["figures"][f"floor_{precision}"]["moecl_seconds"] > 0


def test_predict(tiny_folder, capsys, tmp_path):
    options = "--rows", "4", "--tasks", "1,100", "--scratch", str(tmp_path), "--precision", "fp32"
    found = result(predict.main, capsys, tiny_folder, *options)
    assert set(found["targets"]) == set(predict.TARGETS)
    assert not list(tmp_path.iterdir())


def test_generate(tiny_folder, capsys):
    options = "--batches", "1,2", "--tokens", "3", "--length", "4", "--precision", "fp32"
    found = result(generate.main, capsys, tiny_folder, *options)
    assert set(found["targets"]) == set(generate.TARGETS)
    assert found["ratios"]["decode_vs_base"] == min(found["ratios"][f"decode_vs_base_{rows}"] for rows in (1, 2))


def test_serve(tiny_folder, capsys, tmp_path):
    """A server as it is served: nothing is lost, whatever the times are."""
    counts = "--clients", "1,3", "--tasks", "1,2", "--layers", "2", "--requests", "6", "--threads", "1"
    times = "--seconds", "1", "--minutes", "0.02", "--every", "0.4"
    found = result(serve.main, capsys, tiny_folder, *counts, *times, "--scratch", str(tmp_path))
    assert set(found["targets"]) == set(serve.TARGETS)
    assert found["ratios"]["lost"] == 0
    assert found["figures"]["reloads"] >= 2
    assert set(found["figures"]["overload_statuses"]) <= {"200", "429"}
    assert not list(tmp_path.iterdir())


def test_train_stream(tiny_folder, capsys, data, tmp_path):
    options = "--data", str(data), "--rows", "6", "--batch-size", "4", "--max-length", "48", "--precision", "fp32"
    found = result(train_stream.main, capsys, tiny_folder, *options, "--json", str(tmp_path / "new" / "one.json"))
    assert set(found["targets"]) == set(train_stream.TARGETS)
    assert json.loads((tmp_path / "new" / "one.json").read_text()) == found
    tokens = found["figures"]["tokens"]
    assert tokens["real"] <= tokens["moecl"] <= tokens["published_task_longest"] <= tokens["published"]
    assert tokens["published"] == 2 * 6 * tokens["longest"]


@pytest.mark.parametrize("module", [train_step, train_stream, predict, generate, serve, table])
def test_help_says_what_is_measured(module, capsys):
    with pytest.raises(SystemExit) as ended:
        module.main(["--help"])
    assert ended.value.code == 0
    assert module.__doc__.splitlines()[0] in capsys.readouterr().out


def test_an_error_is_one_line(tmp_path):
    command = [sys.executable, ROOT / "train_stream.py", "--data", tmp_path, "--base", tmp_path / "nothing"]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 1
    assert ran.stdout == ""
    assert len(ran.stderr.splitlines()) == 1
    assert ran.stderr.startswith("error: base:")


def test_no_task_in_data_is_an_error(tiny_folder, tmp_path):
    with pytest.raises(ValueError, match=r"--data .*: no task in it"):
        train_stream.main(["--data", str(tmp_path), "--base", str(tiny_folder), "--precision", "fp32"])


# --- the harness ---


def test_sides_take_turns():
    seen = []
    sides = {name: lambda name=name: seen.append(name) for name in "abc"}
    times = measure.alternate(sides, rounds=4, warmup=1)
    rounds = [tuple(seen[begin : begin + 3]) for begin in range(0, len(seen), 3)]
    assert all(sorted(one) == ["a", "b", "c"] for one in rounds)
    assert len(rounds) == 5
    assert len(set(rounds)) > 2
    assert {name: len(values) for name, values in times.items()} == {"a": 4, "b": 4, "c": 4}


def test_a_ratio_is_the_median_of_its_rounds():
    report = measure.Report("one", {"x": {"<=": 2.0}, "worst": {">=": 1.0}})
    report.ratio("x", measure.over([1.0, 4.0, 30.0], [1.0, 2.0, 10.0]))
    report.ratio("y", [0.5])
    report.worst("worst", ["x", "y"])
    assert report.ratios == {"x": 2.0, "y": 0.5, "worst": 0.5}
    assert report.figures["spread"]["x"] == {"median": 2.0, "q1": 1.5, "q3": 2.5, "min": 1.0, "max": 3.0}
    assert report.targets == {"x": {"<=": 2.0}, "worst": {">=": 1.0}}


# --- sides that must agree ---


def test_peft_starts_as_the_base(tiny_llama, batch):
    base = sides.twin(tiny_llama)
    plain = sides.answer_loss(base, sides.AnswersOnly(base), batch)
    torch.testing.assert_close(train_step.peft(tiny_llama, batch).loss(), plain, **CLOSE)
    torch.testing.assert_close(train_step.without_adversary(tiny_llama, batch).loss(), plain, **CLOSE)


def test_the_head_sees_answers_alone_on_every_side(tiny_llama, batch):
    for name, make in train_step.LEARNING.items():
        side, seen = make(tiny_llama, batch), []
        base = side.model.base if isinstance(side.model, MoECL) else side.model.get_base_model()
        base.get_output_embeddings().register_forward_hook(lambda _, args, out, seen=seen: seen.append(out.shape[0]))
        side.loss()
        assert seen == [3 * train_step.ANSWER], name


@pytest.mark.parametrize("make", [sides.reference_ffn, sides.published_ffn])
def test_other_ways_have_the_same_loss_and_gradients(tiny_llama, batch, make):
    batch["attention_mask"][1, :3] = 0
    nested = make is sides.reference_ffn  # the published way knows experts that stand apart alone
    ours, other = (train_step.moecl(tiny_llama, batch, nested=nested) for _ in range(2))
    sides.replace_ffns(other.model, make)
    found = []
    for side in (ours, other):
        sides.stir(side.model.learner)
        loss = side.loss()
        found.append([loss, *torch.autograd.grad(loss, side.trained)])
    for one, another in zip(*found, strict=True):
        torch.testing.assert_close(one, another, **CLOSE)


def test_weights_are_shared_but_no_module_is(tiny_llama):
    own = sides.twin(tiny_llama)
    assert own is not tiny_llama
    assert not {id(module) for module in own.modules()} & {id(module) for module in tiny_llama.modules()}
    assert {p.data_ptr() for p in own.parameters()} == {p.data_ptr() for p in tiny_llama.parameters()}


def test_the_published_way_pads_and_loses_nothing(tiny_folder, data):
    """Every row is learned once; padded on, a batch has the loss of moecl's on the same rows."""
    backbone = load_backbone(str(tiny_folder), "fp32")
    train = TrainConfig(epochs=1, batch_size=4, max_length=48)
    courses = train_stream.read_courses(data, 6, backbone, 48)
    ours, published = train_stream.Student(backbone, train, nested=False), train_stream.Published(backbone, train, 40)
    batches = published.batches(courses[0])
    assert [tuple(one["input_ids"].shape) for one in batches] == [(4, 40), (2, 40)]
    assert sum(int(one["attention_mask"].sum()) for one in batches) == sum(courses[0].lengths)
    narrow = train_stream.Published(backbone, train, None).batches(courses[0])
    losses = []
    for student, one in ((ours, narrow[0]), (published, batches[0])):
        for course in courses:
            student.model.bank[course.task.name] = train_stream.Entry(course.task, student.method.begin(course.task))
            sides.stir(student.method.state)
            learner = Learner(student.model, student.method, course.task).train()
            loss = learner(**one)["loss"]
            student.method.finish()
        losses.append(loss)
    torch.testing.assert_close(*losses, **CLOSE)


@pytest.fixture
def engine(tiny_folder, tmp_path):
    loaded = load_backbone(str(tiny_folder), "fp32")
    base = loaded.model.requires_grad_(False)
    model = MoECL(Backbone(sides.twin(base), loaded.tokenizer, loaded.id), MoECLConfig(rank=4)).eval()
    model.load_tasks(predict.write_store(model, tmp_path / "store", 5))
    for entry in model.bank.values():  # far enough from the base for tasks to differ
        for expert in (entry.parts.shared, entry.parts.task):
            for parameter in expert.parameters():
                parameter.mul_(20)
    return Engine(model), base


def test_a_mixed_batch_answers_as_one_task_at_a_time(engine):
    own, base = engine
    rows = predict.make_rows(base.config.vocab_size, 7)
    names = predict.choose_tasks(7, 5)
    assert len(set(names)) > 2
    given = predict.requests(own, rows, names)
    mixed, apart = own.answer(given), predict.task_by_task(own, given)
    swapped = own.answer(predict.requests(own, rows, names[1:] + names[:1]))
    assert [one.task for one in mixed] == names
    for one, another in zip(mixed, apart, strict=True):
        assert one.scores == pytest.approx(another.scores, abs=1e-5)
    assert any(abs(one.scores["love"] - two.scores["love"]) > 1e-3 for one, two in zip(mixed, swapped, strict=True))


def test_the_base_runs_the_batches_that_the_engine_forms(engine):
    own, base = engine
    rows = predict.make_rows(base.config.vocab_size, 7)
    own.batch_tokens = 150
    seen = []
    hook = own.model.base.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    own.answer(predict.requests(own, rows, predict.choose_tasks(7, 5)))
    hook.remove()
    formed = predict.batches(own, rows)
    assert len(formed) > 1
    for (_, inputs), given in zip(formed, seen, strict=True):
        for name, tensor in inputs.items():
            assert torch.equal(tensor, given[name]), name


def test_adapters_answer_rows_with_their_own(tiny_llama):
    """PEFT's mixed batch is its rows one by one, so that what is timed is what it says."""
    adapters = predict.Adapters(tiny_llama, MoECLConfig(rank=2), 3)
    sides.stir(adapters.model, seed=1, only="lora_")
    ids = torch.randint(3, 90, (3, 6), generator=torch.Generator().manual_seed(0))
    names = ["task2", "task0", "task1"]

    def batch(rows: list[int]):
        ours = ids[rows]
        return rows, predict.with_positions({"input_ids": ours, "attention_mask": torch.ones_like(ours)})

    together = adapters.answer(batch([0, 1, 2]), names)
    apart = torch.cat([adapters.answer(batch([row]), names) for row in range(3)])
    torch.testing.assert_close(together, apart, **CLOSE)


def test_generation_differs_by_side_and_has_its_length(tiny_llama):
    decoding = generate.Sides(tiny_llama, tasks=2, tokens=5)
    prompt = generate.prompts(tiny_llama.config.vocab_size, 2, 4)
    for name, side in decoding.of(prompt).items():
        assert tuple(side().shape) == (2, 4 + 5), name


# --- the floor ---


def test_the_floor_counts_what_torch_counts():
    """A forward of the base by torch's own counter, which counts attention uncausal."""
    from torch.utils.flop_counter import FlopCounterMode

    base, rows, length = tiny_model(), 3, 8
    batch = train_step.make_batch(base, rows, length)
    head = sides.AnswersOnly(base)
    base.config._attn_implementation = "sdpa"
    with FlopCounterMode(display=False) as counter:
        sides.answer_loss(base, head, batch)
    work = floor.work_of(base, rows, length, rows * train_step.ANSWER)
    matrices = sum(count for op, count in counter.get_flop_counts()["Global"].items() if "attention" not in str(op))
    causal = 2 * work.tokens * work.layers * work.length * work.queries
    assert floor.forward_flops(work) - causal <= matrices <= floor.forward_flops(work) + causal
    assert work.layers == LAYERS


# --- the table ---


def test_the_page_says_what_was_measured():
    page = table.PAGE.read_text()
    assert page == table.whole(page), "run: python benchmarks/table.py --write"


def test_a_table_of_results(tmp_path):
    report = {
        "benchmark": "one",
        "ratios": {"free": 3.0, "good": 0.5, "bad": 2.0},
        "targets": {"good": {"<=": 0.9}, "bad": {">=": 0.9, "<=": 1.1}},
        "figures": {"spread": {"good": {"q1": 0.4, "q3": 0.6}}},
        "environment": {
            "date": "today",
            "processor": "fast",
            "threads": 2,
            "versions": {"torch": "2"},
            "commit": "abc",
        },
    }
    (tmp_path / "one.json").write_text(json.dumps(report))
    lines = table.render(table.read_results(tmp_path)).splitlines()
    assert lines[2:5] == [
        "| one | `good` | <= 0.9 | 0.500 | 0.400 to 0.600 | met |",
        "| one | `bad` | >= 0.9 and <= 1.1 | 2.000 |  | **missed** |",
        "| one | `free` |  | 3.000 |  |  |",
    ]
    assert lines[-1] == "- one: today, fast, 2 threads, torch 2, commit abc"
