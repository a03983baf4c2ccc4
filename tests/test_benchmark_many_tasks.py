"""The benchmark of many tasks on few: what it makes are real runs, and it says what it should. No time is asserted."""

import json

import pytest

pytest.importorskip("measure", reason="benchmarks/ is not on the path")

import many_tasks


def test_many_tasks(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(many_tasks, "resident", lambda store: len(store.tasks()))
    few = ["--tasks", "1,3", "--rows", "16", "--epochs", "1", "--answers", "4", "--rounds", "1"]
    many_tasks.main([*few, "--scratch", str(tmp_path)])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(found["ratios"]) == {"learn_3_vs_1", "predict_3_vs_1"}
    figures = found["figures"]
    assert figures["task_bytes"]["1"] == figures["task_bytes"]["3"]
    assert figures["training_bytes_a_task"] == pytest.approx(figures["a_row_a_layer_of_three_tables"], rel=0.05)
