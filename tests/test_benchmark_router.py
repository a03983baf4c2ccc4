"""The router's benchmark on a tiny model: it measures what moecl's own router reads, and says what it should."""

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("measure", reason="benchmarks/ is not on the path")

import pooled
import router
import table
from moecl.backbone import load_backbone
from moecl.model import MoECL
from moecl.router import TOKENS, Features
from tiny_stream import write_rows


@pytest.fixture
def stream(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(pooled, "BENCHMARKS", {})
    for seed, name in enumerate(("one", "other", "third")):
        folder = tmp_path / "data" / name
        folder.mkdir(parents=True)
        for place, split in enumerate(pooled.SPLITS):
            write_rows(folder / f"{split}.jsonl", 9, 10 * seed + place, {"a": (f"clue{seed}",), "b": (f"clue{seed}",)})
    return tmp_path / "data"


def test_it_says_what_it_should(stream, tiny_folder, tmp_path, capsys):
    (tmp_path / "kept").mkdir()
    words = ["--data", str(stream), "--base", str(tiny_folder), "--precision", "fp32", "--rows", "6"]
    router.main([*words, "--scratch", str(tmp_path / "kept")])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(found["ratios"]) == {
        "routed_right_data",
        *(f"{what}_at_{rate}_data" for what in ("false_accepts", "coverage") for rate in (0.05, 0.1)),
    }
    assert set(found["figures"]["spread"]) == set(found["ratios"])
    figures = found["figures"]
    assert len(figures["streams"]["data"]["validation"]) == len(pooled.POOLINGS) * len(set(figures["layers"]))
    assert figures["bytes"]["a_task"] == 2 * 4 * (32 + 2), "of training and of validation rows a mean and two numbers"
    assert set(figures["right_by_tasks"]) == {"2", "3"}
    lines = table.render([found]).splitlines()
    assert any(line.startswith("| mean of directions, 1 layers | ") for line in lines)
    assert any(line.startswith("| data | 0.05 | ") for line in lines)


def test_what_is_measured_is_what_the_router_reads(tiny_folder, tmp_path):
    reader = pooled.Reader(str(tiny_folder), "fp32", [1], TOKENS, tmp_path)
    backbone = load_backbone(str(tiny_folder))
    features = Features(MoECL.attach(backbone.model), backbone.tokenizer, 1)
    place = list(pooled.POOLINGS).index(router.OURS)
    np.testing.assert_allclose(reader._read("great movie")[0, place], features(["great movie"])[0], atol=1e-6)
