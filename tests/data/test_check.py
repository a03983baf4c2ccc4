"""`describe` counts what a user should know of a task's data before training on it."""

import json

import pytest

from moecl.config import TaskConfig
from moecl.data.check import describe
from moecl.data.encode import Encoder
from moecl.data.task import load_task_data
from tiny import tiny_tokenizer


def described(tmp_path, rows, test=(), max_length=64, **more):
    sources = {}
    for name, split in (("train", rows), ("test", test)):
        if split:
            sources[name] = str(tmp_path / f"{name}.jsonl")
            (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in split))
    data = load_task_data(TaskConfig(name="t", **({"kind": "classification"} | more), **sources))
    encoder = Encoder(tiny_tokenizer(700), data.task, max_length)
    found = describe(data, encoder)
    assert json.loads(json.dumps(found)) == found, "plain values only"
    return found, data, encoder


def labelled(*pairs):
    return [{"text": text, "label": label} for text, label in pairs]


TRAIN = labelled(("good food", "yes"), ("bad food", "no"), ("good  food", "no"), ("the best price ever", "yes"))


def test_counts_balance_and_overlaps(tmp_path):
    test = labelled(("bad food", "no"), ("new", "yes"))
    found, data, encoder = described(tmp_path, TRAIN, test, labels={"yes": "yes", "no": "no", "maybe": "news"})
    train = found["splits"]["train"]
    assert train["sha256"] == data.train.sha256
    assert train["source"] == data.train.source
    assert (train["rows"], train["labels"]) == (4, {"yes": 2, "no": 2, "maybe": 0})
    assert (train["duplicates"], train["contradictions"]) == (1, 2)
    assert (train["cut"], train["tokens_lost"]) == (0, 0)
    rows = encoder.encode(data.train.examples)
    whole = sorted(len(row.input_ids) + len(row.answer_ids) for row in rows)
    assert train["tokens"] == {"p50": whole[2], "p95": whole[3], "max": whole[3]}
    assert found["overlaps"] == {"train/test": 1}
    assert found["majority"] == {"label": "no", "share": 0.5}
    assert [hint for hint in found["hints"] if "first token" not in hint] == [
        "1 rows of test are also in train",
        "train has no row with the label maybe",
        "1 rows of train repeat an earlier one",
        "2 rows of train have the same input and different labels",
        "test has no row with the label maybe",
        "50% of the rows are no, which always said scores as much accuracy: set metric: macro_f1",
    ]


def test_labels_and_their_tokens(tmp_path):
    rows = labelled(("a", "very good"), ("b", "very bad"), ("c", "fine"))
    found, _, encoder = described(tmp_path, rows, labels=["very good", "very bad", "fine"])
    assert found["labels"]["fine"] == {"words": "fine", "tokens": len(encoder.answers[2])}
    assert found["same_first_token"] == [["very good", "very bad"]]
    assert found["one_token"] is False
    assert found["hints"] == [
        "labels very good, very bad share their first token: short words that differ in it learn fastest "
        "(labels: {label: word})"
    ]
    found, _, _ = described(tmp_path, TRAIN)
    assert (found["one_token"], found["same_first_token"]) == (True, [])


def test_cuts_are_counted(tmp_path):
    rows = labelled(("good food " * 40, "yes"), ("bad", "no"), ("awful price " * 30, "no"))
    found, data, encoder = described(tmp_path, rows, max_length=40)
    train = found["splits"]["train"]
    long, _, other = (len(encoder.tokenizer(f"{row['text']}\nAnswer:")["input_ids"]) + 2 for row in rows)
    kept = [len(row.input_ids) + len(row.answer_ids) for row in encoder.encode(data.train.examples)]
    assert train["cut"] == 2
    assert train["tokens_lost"] == long - kept[0] + other - kept[2]
    assert train["tokens"]["max"] == long
    assert found["hints"][-1] == f"2 of 3 rows of train are cut to max_length 40: 95 % have {long} tokens or fewer"


@pytest.mark.parametrize(("metric", "hinted"), [("accuracy", True), ("macro_f1", False)])
def test_unbalanced_labels_get_a_hint(tmp_path, metric, hinted):
    rows = labelled(*((f"food {n}", "yes" if n else "no") for n in range(10)))
    found, _, _ = described(tmp_path, rows, metric=metric)
    assert found["majority"] == {"label": "yes", "share": 0.9}
    said = "90% of the rows are yes, which always said scores as much accuracy: set metric: macro_f1"
    assert (said in found["hints"]) is hinted


def test_generation(tmp_path):
    rows = [{"prompt": f"good {n}", "completion": "yes"} for n in range(3)]
    found, _, _ = described(tmp_path, rows, kind="generation")
    assert (found["labels"], found["one_token"], found["majority"]) == (None, None, None)
    assert found["splits"]["train"]["labels"] == {}
    assert (found["same_first_token"], found["hints"]) == ([], [])
