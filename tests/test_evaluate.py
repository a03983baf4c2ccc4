"""Scores: by each metric, from answers that the engine is made to give."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from moecl import metrics
from moecl.config import Task
from moecl.data.task import Split, read_split
from moecl.engine import Engine, Entry, Prediction
from moecl.evaluate import SPARE_TOKENS, evaluate_task, longest_answer, prompts, references
from moecl.metrics import ANSWER_METRICS as METRICS
from moecl.model import MoECL
from tiny import random_parts, tiny_model, tiny_tokenizer

CHOICE = Task(name="choice", kind="classification", labels=["yes", "no"], metric="macro_f1")
WRITTEN = Task(name="written", kind="generation", metric="rouge_l")


@pytest.fixture
def split(tmp_path):
    def read(task: Task, rows: str) -> Split:
        (tmp_path / "rows.jsonl").write_text(rows)
        return read_split(str(Path(tmp_path / "rows.jsonl")), task, None, "test")

    return read


@pytest.fixture
def engine() -> Engine:
    tokenizer = tiny_tokenizer()
    model = MoECL.attach(tiny_model(vocab_size=len(tokenizer)), tokenizer=tokenizer)
    for task in (CHOICE, WRITTEN):
        model.bank[task.name] = Entry(task, random_parts(model.geometry))
    return Engine(model)


def answering(engine: Engine, answers: Sequence[str], monkeypatch) -> list[int]:
    """Make the engine give these answers; the tokens it was allowed to write."""
    allowed: list[int] = []

    def answer(requests, max_new_tokens):
        allowed.append(max_new_tokens)
        assert len(requests) == len(answers)
        return [Prediction(one.entry.task.name, text, {}) for one, text in zip(requests, answers, strict=True)]

    monkeypatch.setattr(engine, "answer", answer)
    return allowed


CHOICES = "".join(f'{{"text": "x {n}", "label": "{label}"}}\n' for n, label in enumerate(["yes", "no", "no", "no"]))
TEXTS = '{"prompt": "a", "completion": " one two three "}\n{"prompt": "b", "completion": "four"}\n'


@pytest.mark.parametrize("metric", ["accuracy", "macro_f1"])
def test_a_classification(engine, split, monkeypatch, metric):
    task = CHOICE.model_copy(update={"metric": metric})
    rows = split(task, CHOICES)
    answering(engine, ["no", "no", "no", "no"], monkeypatch)
    score = evaluate_task(engine, Entry(task, engine.bank["choice"].parts), rows, prompts(engine, task, rows))
    true = ["yes", "no", "no", "no"]
    expected = {"accuracy": 0.75, "macro_f1": metrics.macro_f1(true, ["no"] * 4)}[metric]
    assert (score.score, score.metric, score.rows) == (expected, metric, 4)
    assert score.per_class_recall == {"yes": 0.0, "no": 1.0}


@pytest.mark.parametrize(("metric", "expected"), [("exact_match", 0.5), ("rouge_l", (0.8 + 1) / 2)])
def test_a_written_answer(engine, split, monkeypatch, metric, expected):
    task = WRITTEN.model_copy(update={"metric": metric})
    rows = split(task, TEXTS)
    assert references(task, rows) == ["one two three", "four"]
    allowed = answering(engine, ["one two", "four"], monkeypatch)
    score = evaluate_task(engine, Entry(task, engine.bank["written"].parts), rows, prompts(engine, task, rows))
    assert score.score == pytest.approx(expected)
    assert score.per_class_recall == {}
    longest = len(engine.tokenizer("one two three")["input_ids"])
    assert allowed == [longest + SPARE_TOKENS]
    again = engine.over({})
    again.tokenizer = None  # is not asked again, whatever the bank
    assert longest_answer(again, task, rows) == longest + SPARE_TOKENS
    assert again.encoder(task) is engine.encoder(task)


def test_every_metric_can_be_computed():
    from moecl.config import TASK_METRICS

    assert METRICS.keys() == {metric for group in TASK_METRICS.values() for metric in group}


def test_the_engine_gives_the_answers(engine, split):
    rows = split(CHOICE, CHOICES)
    entry = engine.bank["choice"]
    score = evaluate_task(engine, entry, rows, prompts(engine, CHOICE, rows))
    given = [one.label for one in engine.predict(rows.examples, "choice")]
    assert score.score == metrics.macro_f1(["yes", "no", "no", "no"], given)
