"""result.json: what is written is read back, nothing that JSON does not know, errors of one line."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from moecl import metrics
from moecl.errors import RunError
from moecl.results import Result

NAN = float("nan")


def a_result(**changes: Any) -> Result:
    fields: dict[str, Any] = {
        "name": "demo",
        "method": "moe-cl",
        "seed": 0,
        "tasks": ["tweets", "amazon"],
        "R": np.array([[0.5, 0.5], [0.9, NAN], [0.9, 1 / 3]]),
        "seconds": 12.5,
        "data": {"tweets": {"train": {"sha256": "ab" * 32, "rows": 256, "cut": 3}}},
        "details": {"tweets": {"validation": [(16, np.float64(0.8)), (32, NAN)], "steps": np.int64(32)}},
        "environment": {"torch": "2.13.0", "threads": 2},
        "digests": {"tweets": {"shared": "cd" * 32}},
        "resumed": 1,
    }
    return Result(**(fields | changes))


def test_save_and_load_give_an_equal_result(tmp_path: Path) -> None:
    result = a_result()
    result.save(tmp_path / "result.json")
    assert Result.load(tmp_path / "result.json") == result


def test_the_file_is_as_the_design_has_it(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    a_result().save(path)
    data = json.loads(path.read_text(encoding="utf-8"))
    assert list(data) == [
        *("schema", "name", "method", "seed", "tasks", "R", "metrics", "seconds", "data", "details"),
        *("items", "environment", "digests", "superseded", "resumed"),
    ]
    assert data["schema"] == 1
    assert data["R"] == [[0.5, 0.5], [0.9, None], [0.9, 1 / 3]]
    assert list(data["metrics"]) == ["average_accuracy", "bwt", "fwt", "forgetting", "learning_accuracy"]
    assert data["metrics"]["bwt"] == 0
    assert data["metrics"]["fwt"] is None
    assert data["details"]["tweets"] == {"validation": [[16, 0.8], [32, None]], "steps": 32}


def test_as_markdown() -> None:
    assert a_result().markdown().splitlines()[-4:] == [
        "|---|---|---|",
        "| (before any) | 0.500 | 0.500 |",
        "| tweets | 0.900 | - |",
        "| amazon | 0.900 | 0.333 |",
    ]
    many = [f"task{number}" for number in range(26)]
    assert "|" not in Result(method="m", seed=0, tasks=many, R=[[None] * 26] * 27, seconds=1).markdown()


def test_not_a_number_is_never_written(tmp_path: Path) -> None:
    changes = {"metrics": {"bwt": NAN}, "environment": {"a": [NAN, {"b": float("inf")}]}}
    a_result(**changes).save(tmp_path / "r.json")
    text = (tmp_path / "r.json").read_text(encoding="utf-8")
    assert "NaN" not in text
    assert "Infinity" not in text
    assert Result.load(tmp_path / "r.json").metrics == {"bwt": None}


def test_metrics_are_those_of_r_unless_given() -> None:
    result = a_result()
    assert result.metrics == metrics.summary(result.R)
    assert a_result(metrics={"fwt": None}).metrics == {"fwt": None}


def test_a_number_keeps_all_its_digits(tmp_path: Path) -> None:
    scores = [[0.1 + 0.2], [2 / 3]]
    a_result(tasks=["a"], R=scores).save(tmp_path / "r.json")
    loaded = Result.load(tmp_path / "r.json")
    assert scores == loaded.R


@pytest.mark.parametrize("scores", [[[0.5, 0.5]], [[0.5], [0.5], [0.5]], [[0.5, 0.5], [0.5, 0.5], [0.5]]])
def test_r_must_fit_the_tasks(scores: list[list[float]]) -> None:
    with pytest.raises(ValidationError, match="R"):
        a_result(R=scores, metrics={"bwt": None})


def test_an_unknown_field_is_refused() -> None:
    with pytest.raises(ValidationError, match="secnds"):
        a_result(secnds=1)


def test_saving_replaces_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    a_result().save(path)
    a_result(seed=7).save(path)
    assert Result.load(path).seed == 7
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(RunError) as caught:
        a_result().save(tmp_path / "gone" / "result.json")
    assert "gone" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"r.json:1: is not JSON .*; run again or restore the file"),
        (b'{"schema": 1,\n "R": [[', r"r.json:2: is not JSON"),
        (b"\xff\xfe", "r.json: is not UTF-8 text"),
        (b"[1]", "r.json: holds no result"),
        (b"{}", r"r.json: schema: None is not 1, which this moecl reads; run again"),
        (b'{"schema": 2}', r"r.json: schema: 2 is not 1, which this moecl reads; upgrade moecl"),
        (b'{"schema": 1}', r"r.json: method: Field required; the file was altered"),
        (b'{"schema": 1, "R": {}}', "r.json: .*R: is not a table of numbers.*; the file was altered"),
    ],
)
def test_a_bad_file_is_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "r.json"
    path.write_bytes(content)
    with pytest.raises(RunError, match=message) as caught:
        Result.load(path)
    assert "\n" not in str(caught.value)


def test_a_missing_file_or_a_folder_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no such file"):
        Result.load(tmp_path / "result.json")
    with pytest.raises(RunError, match="cannot be read"):
        Result.load(tmp_path)


def test_an_altered_value_names_its_place(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    a_result().save(path)
    data = json.loads(path.read_text(encoding="utf-8"))
    data["data"]["tweets"]["train"]["rows"] = -1
    path.write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(RunError, match=r"r\.json: data\.tweets\.train\.rows: "):
        Result.load(path)
