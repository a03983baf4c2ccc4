"""What a run leaves to be looked at: predictions, items, drift and the other figures of its tasks."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from moecl import metrics
from moecl.config import StreamConfig, Task
from moecl.course import Watcher
from moecl.engine import Engine, Entry, GateUse, Prediction
from moecl.eval_run import answered_splits, splits_of
from moecl.evaluate import Answers
from moecl.evidence import drift, figures, items, without_row
from moecl.model import MoECL
from moecl.results import Result
from moecl.session import Session
from moecl.train import ContinualTrainer
from runs import QUICK, Recorder, learn, stream
from tiny import random_parts, tiny_model, tiny_tokenizer

LIVE = {"name": "moe-cl", "rank": 2, "retention": "live"}
CHOICE = Task(name="choice", kind="classification", labels=["yes", "no"])


@pytest.fixture(scope="module")
def live(tmp_path_factory, tiny_folder) -> tuple[StreamConfig, Result, Path]:
    folder = tmp_path_factory.mktemp("live")
    config = stream(folder / "s", tiny_folder, tasks=3, rows=16, method=LIVE, train=QUICK)
    return config, learn(config, folder / "run"), folder / "run"


def read(run: Path, name: str, which: str) -> list[dict]:
    return [json.loads(line) for line in (run / "predictions" / f"{name}.{which}.jsonl").read_text().splitlines()]


def test_predictions_are_those_that_were_scored(live):
    _, result, run = live
    assert len(list((run / "predictions").iterdir())) == 9
    for place, name in enumerate(result.tasks):
        for which, score in [
            ("test", result.R[-1][place]),
            ("learned", result.R[place + 1][place]),
            ("validation", result.details[name]["validation_final"]),
        ]:
            rows = read(run, name, which)
            assert [row["row"] for row in rows] == list(range(1, 9 if which == "validation" else 13))
            assert all(list(row) == ["row", "label", "answer", "scores"] for row in rows)
            assert all(sum(row["scores"].values()) == pytest.approx(1) for row in rows)
            assert all(row["answer"] == max(row["scores"], key=row["scores"].get) for row in rows)
            assert metrics.accuracy([row["label"] for row in rows], [row["answer"] for row in rows]) == score


def test_items_and_figures(live):
    _, result, run = live
    for place, name in enumerate(result.tasks):
        rows, kept, details = read(run, name, "test"), result.items[name], result.details[name]
        assert (kept.metric, kept.labels, kept.scores) == ("accuracy", ["good", "bad"], [])
        assert [kept.labels[n] for n in kept.true] == [row["label"] for row in rows]
        assert [kept.labels[n] for n in kept.given] == [row["answer"] for row in rows]
        assert details["macro_f1"] == metrics.macro_f1(kept.true, kept.given)
        assert list(details["gate_use"]) == ["0", "1"]
        assert all(0 < weight < 1 for weight in details["gate_use"].values())
        assert [at for at, _ in details.get("drift", [])] == list(range(place + 2, 4))
        assert all(moved > 0 for _, moved in details.get("drift", [])), "live"
    assert "discriminator_loss" not in result.details["task0"], "there was one class"
    assert result.details["task1"]["discriminator_loss"] > 0
    first = result.details["task0"]["drift"][-1][1]
    assert first == drift(read(run, "task0", "learned"), read(run, "task0", "test"))


def test_drift_by_hand():
    def rows(*shares: float) -> list[dict]:
        return [{"row": n, "label": "a", "scores": {"a": a, "b": 1 - a}} for n, a in enumerate(shares, start=1)]

    assert drift(rows(0.5), rows(0.25)) == pytest.approx((torch.tensor([2.0]).log() + torch.tensor([1.5]).log()) / 2)
    assert drift(rows(0.0), rows(0.0)) == 0, "a share of nothing is a number, too"
    with pytest.raises(ValueError, match="other rows"):
        drift(rows(0.5), rows(0.5, 0.5))


def test_texts_have_scores_of_their_own():
    task = Task(name="written", kind="generation", metric="rouge_l")
    given = [Prediction("written", text, {}) for text in ("one two", "four")]
    answers = Answers(task, ["one two three", "four"], given, {})
    assert items(answers).scores == pytest.approx([0.8, 1])
    assert (items(answers).true, items(answers).given, items(answers).labels) == ([], [], [])
    assert figures(answers) == {"per_class_recall": {}}


def test_a_row_that_is_taken_out_moves_drift_up():
    assert without_row({"drift": [[2, 0.1], [3, 0.2], [4, 0.3]]}, 3) == {"drift": [[2, 0.1], [3, 0.3]]}
    assert without_row({}, 3) == {}


def test_a_learned_task_whose_files_are_gone(live, tmp_path, monkeypatch):
    config, expected, _ = live
    run, row = tmp_path / "run", Session._evaluate_row

    def stop(self, number):
        return 1 / 0 if number == 2 else row(self, number)

    copy = tmp_path / "s"
    shutil.copytree(Path(config.tasks[0].train).parent, copy)
    text = config.model_dump_json().replace(str(Path(config.tasks[0].train).parent), str(copy))
    config = StreamConfig.model_validate_json(text)
    monkeypatch.setattr(Session, "_evaluate_row", stop)
    with pytest.raises(ZeroDivisionError):
        learn(config, run)
    monkeypatch.undo()
    (run / "predictions" / "task0.learned.jsonl").unlink()
    (copy / "task0.validation.jsonl").unlink()
    recorder = Recorder(run)
    result = ContinualTrainer(config, run, recorder).run()
    assert any("task0: its drift is not measured" in note and "No such file" in note for note in recorder.notes)
    assert any("task0: not validated any more" in note for note in recorder.notes)
    assert (result.R, result.items) == (expected.R, expected.items)
    assert not result.details["task0"].keys() & {"drift", "validation_final"}
    assert result.details["task1"]["drift"] == expected.details["task1"]["drift"]
    assert not (run / "predictions" / "task0.validation.jsonl").exists()


# --- the gates ---


@pytest.mark.parametrize("task", [CHOICE, Task(name="choice", kind="generation")], ids=lambda one: one.kind)
def test_looking_at_the_gates_changes_no_answer(task):
    tokenizer = tiny_tokenizer()
    model = MoECL.attach(tiny_model(vocab_size=len(tokenizer)), tokenizer=tokenizer)
    model.bank["choice"] = Entry(task, random_parts(model.geometry))
    engine, gates = Engine(model), GateUse()
    texts = ["one day", "the cat had tea at sea, and then some more tea " * 3]
    field = "prompt" if task.kind == "generation" else "text"
    rows = [{field: text} for text in texts]
    assert engine.watched(gates).predict(rows, "choice") == engine.predict(rows, "choice")
    together, tokens = gates.means(), gates.tokens
    single = [GateUse(), GateUse()]
    for row, gate in zip(rows, single, strict=True):
        engine.watched(gate).predict([row], "choice")
    assert tokens == sum(gate.tokens for gate in single)
    assert len({gate.tokens for gate in single}) == 2
    for layer, mean in together.items():
        assert mean == pytest.approx(sum(gate.sums[layer] for gate in single) / tokens, rel=1e-5)
    assert len(together) == 2
    assert engine.gates is None


def test_eval_says_what_the_run_said_in_bf16_too(tmp_path, tiny_folder):
    """The layers below the experts are read as training read them: rounded otherwise, answers would differ."""
    method = {"name": "moe-cl", "rank": 2, "adapt_layers": 1}
    train = {**QUICK, "precision": "bf16"}
    learn(stream(tmp_path, tiny_folder, tasks=1, rows=48, method=method, train=train), tmp_path / "run")
    lines = (tmp_path / "run" / "predictions" / "task0.test.jsonl").read_text().splitlines()
    splits = splits_of(tmp_path / "run", [("task0", "test")])
    [found] = answered_splits(tmp_path / "run", splits, "cpu", "2GB", Watcher()).values()
    assert [one.scores for one in found.given] == [json.loads(line)["scores"] for line in lines]
