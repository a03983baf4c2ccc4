"""`moecl predict` over tasks that write, named and found by a router."""

import json
from types import SimpleNamespace

import pytest

from live import make_store
from moecl import predict_lines
from moecl.engine import Engine
from moecl.generation import Sampling
from moecl.model import MoECL
from moecl.review import ClassThreshold, Target, TaskThresholds, Thresholds
from moecl.router import Route

ROUTES = {
    "happy": Route("mood", {"mood": 0.9, "write": 0.1}, 0.5),
    "tell": Route("write", {"mood": 0.2, "write": 0.8}, 0.5),
}


@pytest.fixture(scope="module")
def store(tmp_path_factory, tiny_folder):
    return make_store(tmp_path_factory.mktemp("store"), tiny_folder, "mood write")


@pytest.fixture
def by_word(monkeypatch):
    """Stands in for a router that was fitted."""
    unknown = Route(None, {"mood": 0.5, "write": 0.5}, 0.5)
    found = SimpleNamespace(tasks=["mood", "write"], route=lambda texts: [ROUTES.get(text, unknown) for text in texts])
    monkeypatch.setattr(predict_lines, "router_of", lambda model, store: found)


def lines(done) -> list[dict]:
    assert done.status == 0, done.err
    return [json.loads(line) for line in done.out.splitlines()]


def test_a_text_ends_where_its_task_or_the_user_says(store, moecl, refuses, by_word):
    engine = Engine(MoECL.from_pretrained(store, device="cpu"))
    whole, five = (engine.generate(["tell"], "write", Sampling(tokens)) for tokens in (512, 5))
    assert whole[0].tokens > 64
    for name in ("write", "auto"):
        assert lines(moecl("predict", store, "--task", name, stdin=b"tell"))[0]["label"] == whole[0].text
        asked = ("predict", store, "--task", name, "--max-tokens", "5")
        assert lines(moecl(*asked, stdin=b"tell"))[0]["label"] == five[0].text
    said = "--max-tokens: 0 is out of range; give 1 or more tokens"
    assert refuses("predict", store, "--max-tokens", "0") == said


def test_what_thresholds_do_not_decide_is_for_a_human(store, moecl, tmp_path, by_word):
    level = ClassThreshold(threshold=0.0, answered=1, decided=1, right=1)
    mood = TaskThresholds(labels={"good": level, "bad": level}, rows=2, sha256="0" * 64)
    Thresholds(target=Target.of(0.9, None), tasks={"mood": mood}).save(tmp_path / "levels.json")
    asked = ("predict", store, "--task", "auto", "--max-tokens", "3")
    plain = lines(moecl(*asked, stdin=b"happy\ntell\nwhat\n"))
    assert not any("decision" in one for one in plain)
    found = lines(moecl(*asked, "--thresholds", tmp_path / "levels.json", stdin=b"happy\ntell\nwhat\n"))
    assert [one["task"] for one in found] == ["mood", "write", None]
    assert [one.pop("decision") for one in found] == [plain[0]["label"], "review", "review"]
    assert found == plain
    Thresholds(target=Target.of(0.9, None), tasks={}).save(tmp_path / "none.json")
    found = lines(moecl(*asked, "--thresholds", tmp_path / "none.json", stdin=b"happy\n"))
    assert found == [plain[0] | {"decision": "review"}], "a review may have left a task out"


def test_a_row_that_its_task_cannot_read_takes_no_others_answer(store, moecl, by_word):
    rows = b'{"text": "happy", "label": "bad"}\n{"prompt": "happy", "label": "bad"}\n'
    read, unread = lines(moecl("predict", store, "--task", "auto", stdin=rows))
    assert (read["task"], read["true"]) == ("mood", "bad")
    assert unread == {"label": None, "scores": {}, "task": "mood", "version": 1} | {
        key: read[key] for key in ("route", "familiar")
    }
