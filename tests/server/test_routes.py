"""OpenAI's API over real HTTP: with its official client, and as plain requests."""

import json
import math

import openai
import pytest

from live import TASKS, Live, live, make_store
from moecl.config import Task
from moecl.engine import Engine
from moecl.generation import Sampling
from moecl.model import MoECL
from moecl.server.library import expert

TEXTS = ["a great movie", "bad " * 30, "the food was terrible and sad"]


@pytest.fixture(scope="module")
def store(tmp_path_factory, tiny_folder):
    return make_store(tmp_path_factory.mktemp("store"), tiny_folder)


@pytest.fixture(scope="module")
def server(store):
    with live(store) as found:
        yield found


@pytest.fixture(scope="module")
def engine(store):
    return Engine(MoECL.from_pretrained(store, device="cpu"))


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none needed", max_retries=0) as found:
        yield found


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


# --- with the official client ---


def test_tasks_are_models(client):
    assert [model.id for model in client.models.list()] == list(TASKS)
    assert client.models.retrieve("mood").owned_by == "moecl"
    with pytest.raises(openai.NotFoundError, match=r"no task 'mod'.*did you mean 'mood'"):
        client.models.retrieve("mod")


def test_a_chat_with_a_task_that_writes(client, engine):
    answer = client.chat.completions.create(model="told", messages=user("a cat"), max_tokens=6)
    [expected] = engine.generate(["a cat"], "told", Sampling(max_new_tokens=6))
    assert answer.choices[0].message.content == expected.text
    assert answer.choices[0].finish_reason == expected.reason
    assert (answer.model, answer.object) == ("told", "chat.completion")
    assert answer.usage.prompt_tokens == expected.prompt_tokens
    assert answer.usage.total_tokens == expected.prompt_tokens + expected.tokens
    digest = expert(engine.model._left.record("told"))[:12]
    assert answer.system_fingerprint == f"told-v1-{digest}"


def test_an_answer_is_a_turn_of_the_next_chat(client):
    turns = user("a cat")
    for _ in range(2):
        answer = client.chat.completions.create(model="told", messages=turns, max_tokens=4)
        turns += [answer.choices[0].message, *user("more")]
    assert len(turns) == 5


def test_a_chat_with_a_task_that_classifies(client, engine):
    turns = [{"role": "system", "content": "Be kind."}, *user("not this"), *user(TEXTS[0])]
    answer = client.chat.completions.create(model="topic", messages=turns, logprobs=True, top_logprobs=2)
    [expected] = engine.predict(TEXTS[:1], "topic")
    choice = answer.choices[0]
    assert (choice.message.content, choice.finish_reason) == (expected.label, "stop")
    [told] = choice.logprobs.content
    assert told.token == expected.label
    assert math.exp(told.logprob) == pytest.approx(expected.scores[expected.label], rel=1e-3)
    assert [one.token for one in told.top_logprobs] == sorted(expected.scores, key=expected.scores.get)[::-1][:2]


def test_the_whole_chat_goes_through_the_template_where_a_task_has_no_instruction(tmp_path, tiny_folder):
    messages = [*user("first"), {"role": "assistant", "content": "yes"}, *user("second")]
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}>"
    with live(make_store(tmp_path, tiny_folder, "write")) as server:
        engine = server.service.library.engine
        engine.tokenizer.chat_template = template
        [expected] = engine.generate([{"messages": messages}], "write", Sampling(max_new_tokens=5))
        assert expected != engine.generate([{"messages": messages[-1:]}], "write", Sampling(max_new_tokens=5))[0]
        answer = server.post("/v1/chat/completions", model="write", messages=messages, max_tokens=5).json()
        assert answer["choices"][0]["message"]["content"] == expected.text
        answer = server.post("/v1/chat/completions", model="write", messages=messages[:2]).json()
        assert "the last turn is the assistant's" in answer["error"]["message"]


def test_a_chat_without_a_template(server):
    answer = server.post("/v1/chat/completions", model="write", messages=user("x"))
    assert (answer.status_code, "chat template" in answer.json()["error"]["message"]) == (400, True)


def test_completions(client, engine):
    answer = client.completions.create(model="write", prompt=TEXTS[:2], max_tokens=5, logprobs=2, stop=["zz"])
    expected = engine.generate(TEXTS[:2], "write", Sampling(max_new_tokens=5, top_logprobs=2))
    assert [choice.text for choice in answer.choices] == [one.text for one in expected]
    assert [choice.index for choice in answer.choices] == [0, 1]
    for choice, one in zip(answer.choices, expected, strict=True):
        assert choice.logprobs.token_logprobs == pytest.approx([t.logprob for t in one.logprobs], rel=1e-3)
        assert len(choice.logprobs.tokens) == len(choice.logprobs.text_offset) == one.tokens
        assert {len(top) for top in choice.logprobs.top_logprobs} == {2}
    label = client.completions.create(model="mood", prompt=TEXTS[0]).choices[0].text
    assert label == engine.predict(TEXTS[:1], "mood")[0].label


def test_prompts_of_several_fields(tmp_path, tiny_folder, monkeypatch):
    both = Task(name="both", kind="generation", instruction="{title}: {text}\nIn short:")
    monkeypatch.setitem(TASKS, "both", both)
    row = {"title": "News", "text": "a great movie"}
    with live(make_store(tmp_path, tiny_folder, "both two")) as server:
        engine = server.service.library.engine
        [expected] = engine.generate([row], "both", Sampling(max_new_tokens=5))
        asked = {"model": "both", "prompt": [row], "max_tokens": 5}
        assert server.post("/v1/completions", **asked).json()["choices"][0]["text"] == expected.text
        with server.client.stream("POST", "/v1/completions", json={**asked, "stream": True}) as answer:
            events = [json.loads(line[6:]) for line in answer.iter_lines() if line and not line.endswith("[DONE]")]
        assert "".join(one["choices"][0]["text"] for one in events) == expected.text
        label = server.post("/v1/completions", model="two", prompt=[row]).json()["choices"][0]["text"]
        assert label == engine.predict([row], "two")[0].label
        for path, wish in (("completions", {"prompt": "x"}), ("chat/completions", {"messages": user("x")})):
            refused = server.post(f"/v1/{path}", model="both", **wish)
            assert (refused.status_code, refused.json()["error"]["param"]) == (400, next(iter(wish)))
            assert "fills one field" in refused.json()["error"]["message"]
        alone = server.post("/v1/completions", model="both", prompt=row).json()["error"]
        assert (alone["param"], "objects go into a list" in alone["message"]) == ("prompt", True)


def test_a_prompt_is_cut_no_more_than_its_answer_needs(tmp_path, tiny_folder, monkeypatch):
    monkeypatch.setitem(TASKS, "short", Task(name="short", kind="generation", max_length=144))
    with live(make_store(tmp_path, tiny_folder, "short")) as server:
        read = [
            server.post("/v1/completions", model="short", prompt="sad " * times, **more).json()["usage"]
            for times, more in ((111, {}), (111, {"max_tokens": 60}), (150, {}), (150, {"max_tokens": 1}))
        ]
    assert [usage["prompt_tokens"] for usage in read] == [112, 112, 112, 143]


def test_seeds_and_temperature(client):
    def write(**how) -> str:
        return client.completions.create(model="write", prompt="x", max_tokens=8, **how).choices[0].text

    greedy = write()
    assert write(temperature=0, seed=5) == greedy
    assert write(temperature=1.5, seed=5) == write(temperature=1.5, seed=5)
    assert len({write(temperature=1.5, seed=seed) for seed in range(5)}) > 1
    assert write(temperature=1.5, seed=5, top_p=1e-6) == greedy


def test_streams_add_up_to_the_whole(client):
    whole = client.chat.completions.create(model="told", messages=user("x"), max_tokens=9, temperature=1, seed=3)
    asked = {"model": "told", "messages": user("x"), "max_tokens": 9, "temperature": 1, "seed": 3}
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    *written, last, usage = chunks
    assert "".join(chunk.choices[0].delta.content or "" for chunk in written) == whole.choices[0].message.content
    assert written[0].choices[0].delta.role == "assistant"
    assert last.choices[0].finish_reason == whole.choices[0].finish_reason
    assert usage.choices == []
    assert usage.usage == whole.usage
    assert len({chunk.id for chunk in chunks}) == 1

    whole = client.completions.create(model="write", prompt="x", max_tokens=7)
    chunks = list(client.completions.create(model="write", prompt="x", max_tokens=7, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    chunks = list(client.chat.completions.create(model="mood", messages=user("x"), stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) in TASKS["mood"].labels


def test_bytes_join_to_the_text(client, engine):
    asked = {"model": "told", "messages": user("a cat"), "max_tokens": 40, "logprobs": True, "top_logprobs": 5}
    choice = client.chat.completions.create(**asked).choices[0]
    joined = b"".join(bytes(token.bytes) for token in choice.logprobs.content)
    assert joined.decode(errors="replace").strip() == choice.message.content
    assert max(joined) > 127, "there are bytes that are no text alone"
    assert all(len({one.token for one in token.top_logprobs}) == 5 for token in choice.logprobs.content)


@pytest.mark.parametrize("model", ["told", "mood"])
def test_streamed_log_p_adds_up_to_the_whole(client, model):
    asked = {"model": model, "messages": user("x"), "max_tokens": 9, "logprobs": True, "top_logprobs": 2, "seed": 3}
    whole = client.chat.completions.create(**asked).choices[0].logprobs.content
    chunks = [chunk.choices[0] for chunk in client.chat.completions.create(**asked, stream=True)]
    told = [token for choice in chunks if choice.logprobs for token in choice.logprobs.content]
    assert [token.token for token in told] == [token.token for token in whole]
    assert [token.logprob for token in told] == pytest.approx([token.logprob for token in whole], rel=1e-3)
    if model == "told":
        assert sum(choice.logprobs is not None for choice in chunks) > 1, "they come with their pieces"


def test_log_p_ends_where_a_stop_begins(client):
    asked = {"model": "told", "messages": user("a cat"), "max_tokens": 40, "logprobs": True}
    whole = client.chat.completions.create(**asked).choices[0]
    asked["stop"] = whole.message.content[9:12]
    cut = client.chat.completions.create(**asked).choices[0]
    assert whole.message.content.startswith(cut.message.content)
    assert 0 < len(cut.logprobs.content) < len(whole.logprobs.content)
    before = b"".join(bytes(token.bytes) for token in cut.logprobs.content[:-1]).decode(errors="replace").lstrip()
    assert cut.message.content.startswith(before.rstrip()), "the last one may hold the stop"
    chunks = [chunk.choices[0] for chunk in client.chat.completions.create(**asked, stream=True)]
    told = [token for choice in chunks if choice.logprobs for token in choice.logprobs.content]
    assert [token.token for token in told] == [token.token for token in cut.logprobs.content]


def test_streamed_text_offsets_go_on(client):
    asked = {"model": "write", "prompt": "x", "max_tokens": 7, "logprobs": 1}
    whole = client.completions.create(**asked).choices[0].logprobs
    chunks = [chunk.choices[0] for chunk in client.completions.create(**asked, stream=True)]
    assert [place for one in chunks if one.logprobs for place in one.logprobs.text_offset] == whole.text_offset


def test_events_end_as_openai_ends_them(server):
    asked = {"model": "mood", "prompt": "x", "stream": True}
    with server.client.stream("POST", "/v1/completions", json=asked) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in answer.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    assert all(json.loads(line.removeprefix("data: "))["object"] == "text_completion" for line in lines[:-1])


def test_the_client_raises_its_own_errors(client):
    with pytest.raises(openai.BadRequestError, match="tools: not supported") as found:
        client.chat.completions.create(model="mood", messages=user("x"), tools=[])
    assert (found.value.param, found.value.code) == ("tools", "unsupported_parameter")
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="nothing", prompt="x")
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    assert missing.value.request_id.startswith("req_")
    with pytest.raises(openai.NotFoundError):
        list(client.completions.create(model="nothing", prompt="x", stream=True))
    with pytest.raises(openai.NotFoundError, match="auto needs a router"):
        client.completions.create(model="auto", prompt="x")


# --- classify ---


@pytest.mark.parametrize("name", ["mood", "topic", "head"])
def test_labels_with_scores_and_who_answered(server, engine, name):
    data = server.classify(name, TEXTS)
    for one, expected in zip(data, engine.predict(TEXTS, name), strict=True):
        assert one["label"] == expected.label
        assert one["scores"] == pytest.approx(expected.scores, rel=1e-3, abs=1e-5)
        assert (one["task"], one["version"], one["decision"]) == (name, 1, None)
        assert one["expert"] == expert(engine.model._left.record(name))
    assert [one["index"] for one in data] == [0, 1, 2]


def test_rows_of_several_fields(server, engine):
    row = {"title": "News", "text": "a great movie"}
    assert server.classify("two", [row])[0]["label"] == engine.predict([row], "two")[0].label
    answer = server.post("/v1/classify", model="two", input=["plain"])
    said = 'row 1: a plain text fills one field; give all that the task reads as JSON: {"title": ..., "text": ...}'
    assert (answer.status_code, answer.json()["error"]["message"]) == (400, said)


def test_the_gates_of_a_row(server, engine):
    [one, _] = server.classify("mood", TEXTS[:2], gates=True)
    assert set(one["gates"]) == {str(layer) for layer in engine.model.geometry.layers}
    assert all(0 < share < 1 for share in one["gates"].values())
    assert server.classify("mood", TEXTS[:1])[0]["gates"] is None


def test_a_task_that_writes_classifies_nothing(server):
    answer = server.post("/v1/classify", model="write", input="x")
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "model")


@pytest.mark.parametrize(
    ("path", "body", "param", "message"),
    [
        ("classify", {"model": "mood"}, "input", "is missing"),
        ("classify", {"model": "mood", "input": []}, "input", "is empty; give one at least"),
        ("classify", {"model": "mood", "input": 3}, "input", "should"),
        ("classify", {"model": "mood", "input": ["x", " "]}, "input", "row 2: text: the text is empty"),
        ("classify", {"model": "mood", "input": ["\ud800"]}, "input[0]", "unicode"),
        ("completions", {"model": "write", "prompt": "x", "n": 2}, "n", "should be 1"),
        ("completions", {"model": "write", "prompt": [1, 2]}, "prompt[0]", "should"),
        ("completions", {"model": "write", "prompt": "x", "stop": ""}, "stop", "should have at least 1 character"),
        ("completions", {"model": "write", "prompt": "x", "stop": ["a"] * 5}, "stop", "at most 4 items, not 5"),
        ("completions", {"model": "write", "prompt": "x", "max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ("completions", {"model": "write", "prompt": "x", "max_tokens": 9999}, "max_tokens", "is more than 1024"),
        (
            "chat/completions",
            {"model": "told", "messages": user("x"), "max_completion_tokens": 9999},
            "max_completion_tokens",
            "is more than 1024; give less, or start the server with a larger --max-tokens",
        ),
        ("completions", {"model": "write", "prompt": "x", "temperature": 3}, "temperature", "less than or equal to 2"),
        ("completions", {"model": "write", "prompt": "x", "logit_bias": {}}, "logit_bias", "not supported"),
        ("completions", {"model": "write", "prompt": ["x", "y"], "stream": True}, "prompt", "can be streamed"),
        ("chat/completions", {"model": "mood", "messages": []}, "messages", "is empty; give one at least"),
        (
            "chat/completions",
            {"model": "mood", "messages": [{"role": "x", "content": ""}]},
            "messages[0].role",
            "'user'",
        ),
        ("chat/completions", {"model": "mood", "messages": user("x"), "top_logprobs": 2}, "top_logprobs", "logprobs"),
        ("chat/completions", {"model": "mood", "messages": [{"role": "system", "content": "x"}]}, "messages", "user's"),
    ],
)
def test_what_is_wrong_is_named(server, path, body, param, message):
    answer = server.client.post(f"/v1/{path}", content=json.dumps(body), headers={"content-type": "application/json"})
    error = answer.json()["error"]
    assert (answer.status_code, error["type"], error["param"]) == (400, "invalid_request_error", param)
    assert message in error["message"]


def test_what_is_no_json(server):
    json_type = {"content-type": "application/json"}
    for content, headers in ((b"{", json_type), (b'{"a": 1}', {}), (b"[]", json_type), (b"\xff", json_type), (b"", {})):
        answer = server.client.post("/v1/classify", content=content, headers=headers)
        assert answer.status_code == 400
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
        assert "JSON" in answer.json()["error"]["message"]


def test_a_number_beyond_all_measure(server):
    content = '{"model": "write", "prompt": "x", "seed": ' + "1" * 5001 + "}"
    answer = server.client.post("/v1/completions", content=content, headers={"content-type": "application/json"})
    assert (answer.status_code, "at most 4,300 digits" in answer.json()["error"]["message"]) == (400, True)


def test_the_log_names_versions(server, caplog):
    caplog.set_level("INFO", "moecl.server")
    for name in ("mood@1", "mood@9", "mood@prod", "nothing"):
        server.post("/v1/classify", model=name, input="x")
    assert server.client.get("/v1/models/mood@1").json()["id"] == "mood@1"
    told = [record.fields for record in caplog.records if record.getMessage() == "request"]
    assert [one["model"] for one in told if "model" in one] == ["mood@1", None, None, None]


def test_other_paths_and_methods(server):
    nothing = server.client.get("/nothing").json()["error"]
    assert nothing["type"] == "not_found_error"
    assert "/openapi.json" in nothing["message"]
    wrong = server.client.get("/v1/classify")
    assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST")
    assert wrong.json()["error"]["message"] == "GET is not for this address; use POST"
    assert server.client.get("/../../etc/passwd").status_code == 404
    assert server.client.get("/page.css/..%2f..%2fapp.py").status_code == 404


# --- for those who run it ---


def test_health_and_figures(server):
    assert server.client.get("/healthz").json() == server.client.get("/readyz").json() == {"status": "ok"}
    for path in ("/surely/not/there", "/v1/models/never-seen"):
        server.client.get(path)
    server.classify("mood", TEXTS)
    text = server.client.get("/metrics").text
    assert 'moecl_rows_total{task="mood"}' in text
    assert 'moecl_tokens_total{kind="read",task="mood"}' in text
    assert "moecl_queue_rows 0.0" in text
    assert "never-seen" not in text
    assert "surely" not in text


def test_what_is_served_is_described(server):
    paths = server.client.get("/openapi.json").json()["paths"]
    assert {"/v1/chat/completions", "/v1/completions", "/v1/models", "/v1/classify"} <= set(paths)
    assert server.client.get("/docs").status_code == 404, "it would load a script from elsewhere"


def test_a_run_without_a_result_has_no_r(server: Live):
    run = server.client.get("/v1/run").json()
    assert (run["R"], run["auto"], run["thresholds"]) == (None, False, False)
    assert [task["name"] for task in run["tasks"]] == list(TASKS)
    assert run["tasks"][3]["fields"] == ["title", "text"]
