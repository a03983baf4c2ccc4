"""`auto`: the router's answer decides which task answers each text."""

from dataclasses import dataclass

import pytest

from live import live, make_store
from moecl.server import library


@dataclass(frozen=True)
class Route:
    task: str | None
    shares: dict[str, float]


class ByWord:
    """Stands in for a router that was fitted: knows `mood` and `write` by a word of the text."""

    def route(self, texts):
        known = {
            "happy": Route("mood", {"mood": 0.9, "write": 0.1}),
            "tell": Route("write", {"mood": 0.2, "write": 0.8}),
        }
        unknown = Route(None, {"mood": 0.5, "write": 0.5})
        return [next((known[word] for word in text.split() if word in known), unknown) for text in texts]


@pytest.fixture
def server(tmp_path, tiny_folder, monkeypatch):
    monkeypatch.setattr(library.Router, "load", lambda model, store: ByWord())
    with live(make_store(tmp_path, tiny_folder, "mood topic write")) as found:
        yield found


def test_each_text_is_answered_by_its_task(server):
    assert [one["id"] for one in server.client.get("/v1/models").json()["data"]] == ["mood", "topic", "write", "auto"]
    assert server.client.get("/v1/models/auto").json()["id"] == "auto"
    texts = ["so happy", "nothing known", {"text": "happy again"}]
    first, unknown, last = server.classify("auto", texts)
    [expected] = server.classify("mood", ["so happy"])
    assert (first["label"], first["task"], first["expert"]) == (expected["label"], "mood", expected["expert"])
    assert first["scores"] == pytest.approx(expected["scores"], rel=1e-3)
    assert first["tasks"] == {"mood": 0.9, "write": 0.1}
    assert last["task"] == "mood"
    assert [unknown[key] for key in ("label", "task", "version", "expert", "scores")] == [None, None, None, None, {}]
    assert unknown["tasks"] == {"mood": 0.5, "write": 0.5}


def test_openais_routes_find_the_task_too(server):
    answer = server.post("/v1/completions", model="auto", prompt="tell all", max_tokens=5).json()
    named = server.post("/v1/completions", model="write", prompt="tell all", max_tokens=5).json()
    assert (answer["model"], answer["choices"]) == ("write", named["choices"])
    chat = server.post("/v1/chat/completions", model="auto", messages=[{"role": "user", "content": "so happy"}]).json()
    assert chat["model"] == "mood"
    refused = server.post("/v1/completions", model="auto", prompt="what")
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "no_task")


def test_what_auto_cannot_answer(server):
    assert server.post("/v1/classify", model="auto", input=["tell me"]).status_code == 400, "it writes text"
    empty = server.post("/v1/classify", model="auto", input=[{"title": "x"}])
    assert (empty.status_code, empty.json()["error"]["param"]) == (400, "input")


@pytest.mark.parametrize("row", ['{"text": "\\ud800 x"}', '{"text": "ok", "more": 1}, {"text": "\\ud800 x"}'])
def test_half_a_surrogate_pair_is_no_text(server, row):
    body = f'{{"model": "auto", "input": [{row}]}}'
    answer = server.client.post("/v1/classify", content=body, headers={"content-type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "input")
    assert "is not valid Unicode" in answer.json()["error"]["message"]


def test_without_a_router_there_is_no_auto(tmp_path, tiny_folder, monkeypatch):
    monkeypatch.setattr(library.Router, "load", lambda model, store: None)
    with live(make_store(tmp_path, tiny_folder, "mood")) as server:
        refused = server.post("/v1/classify", model="auto", input="x")
        assert (refused.status_code, refused.json()["error"]["param"]) == (404, "model")
        assert "auto" not in server.client.get("/v1/models").text
