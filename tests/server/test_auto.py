"""`auto`: the router's answer decides which task answers each text."""

import pytest

from live import live, make_store, statistics
from moecl.router import Route
from moecl.server import library
from moecl.store import Store


class ByWord:
    """Stands in for a router that was fitted: knows `mood` and `write` by a word of the text."""

    tasks = ("mood", "write")

    def route(self, texts):
        known = {
            "happy": Route("mood", {"mood": 0.9, "write": 0.1}, 0.5),
            "tell": Route("write", {"mood": 0.2, "write": 0.8}, 0.5),
        }
        unknown = Route(None, {"mood": 0.5, "write": 0.5}, 0.5)
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


def test_a_completion_is_of_one_task(server):
    both = server.post("/v1/completions", model="auto", prompt=["tell all", "tell me"], max_tokens=3).json()
    assert (both["model"], len(both["choices"])) == ("write", 2)
    mixed = server.post("/v1/completions", model="auto", prompt=["so happy", "tell all"]).json()["error"]
    assert (mixed["param"], mixed["code"]) == ("model", "several_tasks")
    assert "several tasks (mood, write)" in mixed["message"]
    unknown = server.post("/v1/completions", model="auto", prompt=["tell all", "what"]).json()["error"]
    assert (unknown["code"], "for text 2;" in unknown["message"]) == ("no_task", True)


def test_a_text_for_a_task_that_writes_has_no_label(server):
    texts = ["so happy", "tell me", "what"]
    label, written, unknown = server.classify("auto", texts, gates=True)
    assert label == server.classify("auto", texts[:1], gates=True)[0]
    assert (written["label"], written["scores"], written["task"], written["version"]) == (None, {}, "write", 1)
    assert (written["index"], written["tasks"]) == (1, {"mood": 0.2, "write": 0.8})
    assert unknown["task"] is None
    [alone] = server.classify("auto", ["tell me"])
    assert alone == {**written, "index": 0}


def test_faults_are_told_by_the_rows_own_place(server, monkeypatch):
    router = server.service.library.now.router
    monkeypatch.setattr(
        router, "route", lambda texts: [Route(text if text == "mood" else None, {}, 0.5) for text in texts]
    )
    rows = ["what", "what", {"text": "mood"}, {"title": "no", "label": "x"}]
    *_, answered, unread = server.classify("auto", [*rows[:3], {"prompt": "mood"}])
    assert (answered["task"], unread["task"], unread["label"], unread["scores"]) == ("mood", "mood", None, {})
    assert answered["label"] is not None, "a row that its task cannot read takes no other's answer away"
    refused = server.post("/v1/classify", model="auto", input=rows).json()["error"]
    assert refused["message"].startswith("row 4: the row has no field")


def test_what_is_wrong_is_named_as_the_request_has_it(server):
    for path, wish in (
        ("classify", {"input": ["happy", " "]}),
        ("completions", {"prompt": ["happy", " "]}),
        ("chat/completions", {"messages": [{"role": "user", "content": " "}]}),
    ):
        answer = server.post(f"/v1/{path}", model="auto", **wish)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, next(iter(wish)))
        assert ": the text is empty" in answer.json()["error"]["message"]
    many = server.post("/v1/completions", model="auto", prompt=["tell"] * 257).json()["error"]
    assert (many["param"], many["message"]) == ("prompt", "257 texts, at most 256 can be asked at once; send fewer")


def test_what_auto_cannot_answer(server):
    empty = server.post("/v1/classify", model="auto", input=[{"title": "x"}])
    assert (empty.status_code, empty.json()["error"]["param"]) == (400, "input")


@pytest.mark.parametrize("row", ['{"text": "\\ud800 x"}', '{"text": "ok", "more": 1}, {"text": "\\ud800 x"}'])
def test_half_a_surrogate_pair_is_no_text(server, row):
    body = f'{{"model": "auto", "input": [{row}]}}'
    answer = server.client.post("/v1/classify", content=body, headers={"content-type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "input")
    assert "is not valid Unicode" in answer.json()["error"]["message"]


def test_tasks_that_auto_never_finds_are_told(tmp_path, tiny_folder, monkeypatch, caplog):
    monkeypatch.setattr(library.Router, "load", lambda model, store: ByWord())
    store = make_store(tmp_path, tiny_folder, "mood topic write head")
    library.Library(store, "cpu", "2GB", None)
    [told] = [record.fields["reason"] for record in caplog.records if record.getMessage() == "router"]
    assert told == "auto never finds topic, head; make their statistics with `moecl router RUN --fit`"


def test_damaged_statistics_leave_auto_out(tmp_path, tiny_folder, caplog):
    store = Store.open(make_store(tmp_path, tiny_folder, "mood"))
    store.commit(training={**store.training(), "router": statistics("mood@1").tensors()})
    [path] = (tmp_path / "training").glob("router-*")
    path.write_bytes(path.read_bytes()[:-1])
    with live(tmp_path) as server:
        assert server.classify("mood", ["x"])
        assert server.post("/v1/classify", model="auto", input="x").status_code == 404
    [told] = [record.fields["reason"] for record in caplog.records if record.getMessage() == "router"]
    assert "truncated" in told


def test_without_a_router_there_is_no_auto(tmp_path, tiny_folder, monkeypatch):
    monkeypatch.setattr(library.Router, "load", lambda model, store: None)
    with live(make_store(tmp_path, tiny_folder, "mood")) as server:
        refused = server.post("/v1/classify", model="auto", input="x")
        assert (refused.status_code, refused.json()["error"]["param"]) == (404, "model")
        assert "auto" not in server.client.get("/v1/models").text
