"""Tables that 80 columns hold, whatever the names and however many the tasks."""

import io

import pytest
from rich.console import Console

from moecl.results import Result
from moecl.show import show_check, show_result, show_scores
from moecl.show_store import show_tasks

LONG = "a-task-name-as-long-as-a-file-name-may-be-sixty-four-characters-1"[:64]


def shown(show, *arguments, width: int = 80) -> list[str]:
    file = io.StringIO()
    show(Console(file=file, width=width), *arguments)
    lines = file.getvalue().splitlines()
    assert not [line for line in lines if len(line.rstrip()) > width]
    return [line.rstrip() for line in lines if line.strip()]


def result(names: list[str], **fields) -> Result:
    count = len(names)
    R = [[round(0.1 + 0.005 * (i + j), 3) for j in range(count)] for i in range(count + 1)]
    sides = {"metrics": {"average_accuracy": 0.5, "bwt": -0.25, "fwt": None}, "seconds": 372.4, **fields}
    return Result.model_validate(
        {"name": "run", "method": "moe-cl", "seed": 0, "tasks": names, "R": R, "data": {}, "details": {},
         "environment": {}, "digests": {}, "resumed": 0, **sides}
    )  # fmt: skip


def test_labels_are_no_markup():
    row = {"task": "a", "metric": "accuracy", "score": 0.5, "rows": 2, "per_class_recall": {"[spam]": 0.5, "[/b]": 1.0}}
    assert "[spam] 0.500, [/b] 1.000" in shown(show_scores, [row])[-1]


def test_a_result_that_fits():
    lines = shown(show_result, result(["news", "reviews"], resumed=1), "runs/x")
    assert lines[1].split() == ["after", "news", "reviews"]
    assert lines[3].split() == ["(before", "any)", "0.100", "0.105"]
    assert lines[4].split() == ["news", "0.105", "0.110"]
    assert lines[-3].split() == ["forgetting", "-"] or "time" in lines[-2]
    told = {line[:18].strip(): line[19:] for line in lines[6:]}
    assert told["backward transfer"] == "-0.250"
    assert told["forward transfer"] == "-"
    assert told["time"] == "6 min 12 s, started 2 times"
    assert told["run folder"] == "runs/x"


def test_one_answer_to_all_rows_is_told():
    found = {"metric": "accuracy", "labels": ["good", "bad"], "true": [0, 1, 1], "given": [1, 1, 1]}
    items = {"news": found, "reviews": {**found, "given": [1, 1, 0]}}
    lines = shown(show_result, result(["news", "reviews"], items=items), "runs/x")
    [told] = [line for line in lines if "test rows" in line]
    assert told == "news: 'bad' to all 3 test rows; try more epochs or another lr"


@pytest.mark.parametrize("count", [5, 12, 15, 40])
@pytest.mark.parametrize("length", [9, 64])
def test_many_tasks_are_numbered(count, length):
    names = [f"{number}-{LONG}"[:length] for number in range(count)]
    found = result(names)
    lines = shown(show_result, found, "runs/x")
    headers = [line.split()[1:] for line in lines if line.strip().startswith("after")]
    cells = [cell for line in lines if line.strip().startswith(f"{count} ") for cell in line.split()[2:]]
    if length == 9 and count == 5:
        assert headers == [names]
        return
    assert [number for header in headers for number in header] == [str(number + 1) for number in range(count)]
    assert cells == [f"{score:.3f}" for score in found.R[-1]], "no score is cut or wrapped"


def test_tasks():
    state = {"version": 1, "versions": 1, "current": True, "retired": False, "aliases": []}
    row = {**state, "kind": "classification", "metric": "exact_match", "score": None, "bytes": 4.9e6}
    rows = [
        {**row, "task": "news", "labels": ["World", "Sports"], "parts": {"task": "0123456789abcdef" * 4}},
        {**row, "task": LONG, "version": 2, "labels": list("abcdefgh"), "parts": {"weights": "f" * 64}},
    ]
    lines = shown(show_tasks, rows)
    assert lines[1].split() == ["news", "World,", "Sports", "exact_match", "-", "4.9", "MB", "0123456789ab"]
    rest = "".join(line.split("  ")[0] for line in lines[2:])
    assert rest.replace(" ", "") == f"{LONG},version2"
    assert lines[2].split()[-1] == "f" * 12
    assert "8 labels" in lines[2]


def test_scores():
    row = {"task": "news", "metric": "macro_f1", "score": 0.5, "rows": 200}
    few = {"a": 0.25, "b": None}
    many = {f"label {number}": number / 100 for number in range(77)}
    lines = shown(show_scores, [{**row, "per_class_recall": few}, {**row, "per_class_recall": many}])
    assert lines[1].split() == ["news", "macro_f1", "0.500", "200", "a", "0.250,", "b", "-"]
    assert "lowest of 77: label 0 0.000, label 1 0.010" in " ".join(line.strip() for line in lines[2:])
    assert shown(show_scores, [{**row, "per_class_recall": {}}])[1].endswith("-")


def test_check():
    split = {"rows": 100_000, "labels": {"yes": 50_000, "no": 50_000}, "tokens": {"p50": 1, "p95": 22, "max": 4096},
             "cut": 12}  # fmt: skip
    many = {**split, "labels": {f"l{number}": number for number in range(77)}}
    words = {"yes": {"words": "good"}, "no": {"words": "no"}}
    task = {
        "task": "t",
        "kind": "classification",
        "labels": words,
        "splits": {"validation": split},
        "hints": ["take care"],
    }
    other = {
        **task,
        "task": "u",
        "labels": {name: {"words": name} for name in many["labels"]},
        "splits": {"train": many},
    }
    cost = {
        "training_seconds": 30,
        "evaluation_seconds": 45,
        "peak_bytes": 1.3e9,
        "task_bytes": 4.9e6,
        "prefix": {
            "bytes": 69e6,
            "share": 0.8,
            "filling_seconds": 20,
            "training_seconds": 30,
            "evaluation_seconds": 10,
        },
        "how": "measured",
    }
    lines = shown(show_check, [task, other, {**task, "kind": "generation", "labels": None}], cost)
    assert lines[0] == "t (classification: yes = 'good', no)"
    assert lines[2].split() == ["validation", "100000", "1", "22", "4096", "12", "yes", "50000,", "no", "50000"]
    assert lines[3] == "  - take care"
    assert lines[4] == "u (classification: 77 labels)"
    assert lines[6].endswith("77 labels, 0 to 76 rows each")
    assert "t (generation)" in lines
    assert lines[-5:] == [
        "time    1 min 15 s: 30 s training, 45 s testing",
        "memory  1.3 GB",
        "disk    4.9 MB a task",
        "prefix  69 MB of cache: 80% of the layers run once a text, 20 s; spares 40 s",
        "(measured)",
    ]
