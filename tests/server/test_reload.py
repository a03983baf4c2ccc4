"""A store that changes under a running server: the next request has the new model, no answer has two."""

import re
import threading
import time
from pathlib import Path

import pytest

from live import TASKS, learned, live, make_store, statistics
from moecl.engine import Engine
from moecl.errors import StoreError
from moecl.model import MoECL
from moecl.nn.forms import to_tensors
from moecl.review import Target, Thresholds, fit
from moecl.server import library as libraries
from moecl.server.library import Library, expert
from moecl.store import Store, TaskRecord

NAMES = "mood topic write"
TEXTS = ["a great movie", "bad " * 20, "the food"]


@pytest.fixture
def store(tmp_path, tiny_folder):
    return make_store(tmp_path / "store", tiny_folder, NAMES)


def relearn(folder: Path, base: Path, name: str, seed: int) -> TaskRecord:
    """A new version of a task, with other experts."""
    model, store = learned(base, name, seed), Store.open(folder)
    settings = store.tasks()[0].settings
    entry = model.bank[name]
    store.commit([(TaskRecord(task=entry.task, form="gated", settings=settings), to_tensors(entry.parts))])
    return store.record(name)


def until(true, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def version(server, name: str) -> int:
    return server.classify(name, ["x"])[0]["version"]


def test_a_new_version_and_a_new_task_are_served(store, tiny_folder):
    with live(store, reload_seconds=0.05) as server:
        before = server.classify("mood", TEXTS)
        relearn(store, tiny_folder, "mood", 5)
        until(lambda: version(server, "mood") == 2)
        after = server.classify("mood", TEXTS)
        fresh = Engine(MoECL.from_pretrained(store, device="cpu")).predict(TEXTS, "mood")
        assert [one["scores"] for one in after] == [pytest.approx(one.scores, rel=1e-3, abs=1e-5) for one in fresh]
        assert after[0]["scores"] != before[0]["scores"]
        assert after[0]["expert"] == expert(Store.open(store).record("mood"))
        assert server.client.get("/v1/run").json()["tasks"][-1]["versions"] == [1, 2]
        relearn(store, tiny_folder, "head", 1)
        until(lambda: "head" in [one["id"] for one in server.client.get("/v1/models").json()["data"]])
        assert server.classify("head", TEXTS)[0]["label"] in TASKS["head"].labels
        assert 'moecl_reloads_total{outcome="done"} 2.0' in server.client.get("/metrics").text


def test_no_request_is_lost_and_no_answer_has_two_versions(store, tiny_folder):
    """Requests of more rows than one batch takes, while versions come and the objects of old ones go."""
    stop, seen, faults = threading.Event(), set(), []

    def ask(server) -> None:
        while not stop.is_set():
            answer = server.post("/v1/classify", model="mood", input=TEXTS * 30)
            if answer.status_code != 200:
                faults.append(answer.text)
                continue
            data = answer.json()["data"]
            found = {(one["version"], one["expert"]) for one in data}
            scores = {tuple(one["scores"].values()) for one in data[::3]}
            if len(found) > 1 or len({round(first, 3) for first, *_ in scores}) > 1:
                faults.append(f"{found} {scores}")
            seen.update(found)

    with live(store, reload_seconds=0.02, queue=1000) as server:
        server.service.worker.engine.batch_tokens = 200
        threads = [threading.Thread(target=ask, args=(server,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for seed in range(2, 7):
            relearn(store, tiny_folder, "mood", seed)
            until(lambda seed=seed: any(number == seed for number, _ in seen))
        stop.set()
        for thread in threads:
            thread.join()
    assert faults == []
    assert {number for number, _ in seen} >= {2, 3, 4, 5, 6}


def test_a_text_goes_on_as_it_was_begun(store, tiny_folder):
    wish = {"model": "write", "prompt": "x", "temperature": 2, "seed": 1, "max_tokens": 40}
    with live(store, reload_seconds=0.02) as server:
        whole = server.post("/v1/completions", **wish).json()["choices"][0]["text"]
        step = server.service.worker.decoder.step
        server.service.worker.decoder.step = lambda: time.sleep(0.03) or step()
        with server.client.stream("POST", "/v1/completions", json={**wish, "stream": True}) as answer:
            lines = (line for line in answer.iter_lines() if line and not line.endswith("[DONE]"))
            events = [next(lines)]
            relearn(store, tiny_folder, "write", 9)
            until(lambda: server.service.library.now.record("write").version == 2)
            events += lines
        import json

        chunks = [json.loads(line[6:]) for line in events]
        assert "".join(one["choices"][0]["text"] for one in chunks) == whole
        assert {one["system_fingerprint"][:8] for one in chunks} == {"write-v1"}
        other = server.post("/v1/completions", **wish).json()
        assert other["system_fingerprint"].startswith("write-v2")
        assert other["choices"][0]["text"] != whole


def test_a_new_version_reuses_nothing_of_what_the_old_one_read(store, tiny_folder):
    wish = {"model": "write", "prompt": "the food was terrible and sad", "max_tokens": 8}

    def ask(server) -> tuple[str, float, int]:
        answer = server.post("/v1/completions", **wish).json()
        [reused] = re.findall(r"(?m)^moecl_kv_tokens_reused_total (\S+)", server.client.get("/metrics").text)
        return answer["choices"][0]["text"], float(reused), answer["usage"]["prompt_tokens"]

    with live(store, reload_seconds=0.02) as server, live(store, reload_seconds=0.02, kv_memory=0) as plain:
        first, reused, tokens = ask(server)
        assert (ask(server), ask(plain)) == ((first, tokens - 1, tokens), (first, reused, tokens))
        relearn(store, tiny_folder, "write", 9)
        until(lambda: {one.service.library.now.record("write").version for one in (server, plain)} == {2})
        second, reused, _ = ask(server)
        assert (second, reused) == (ask(plain)[0], tokens - 1)
        assert second != first
        assert ask(server)[:2] == (second, 2 * (tokens - 1))
        assert ask(plain)[1] == 0


def test_a_request_whose_objects_are_gone_is_asked_again(store, tiny_folder):
    """A version is chosen when a request comes; before its rows are read, its objects may be removed."""
    with live(store, reload_seconds=0) as server:
        old = Store.open(store).record("mood").parts["task"]
        relearn(store, tiny_folder, "mood", 5)
        (store / "objects" / f"{old}.safetensors").unlink()
        assert version(server, "mood") == 2


def test_a_stream_is_asked_again_too(store, tiny_folder):
    wish = {"model": "write", "prompt": "x", "stream": True, "max_tokens": 3}
    with live(store, reload_seconds=0) as server:
        old = store / "objects" / f"{Store.open(store).record('write').parts['task']}.safetensors"
        kept = old.read_bytes()
        old.unlink()
        gone = server.post("/v1/completions", **wish)
        assert (gone.status_code, gone.json()["error"]["code"]) == (503, "store")
        old.write_bytes(kept)
        relearn(store, tiny_folder, "write", 5)
        old.unlink()
        answer = server.post("/v1/completions", **wish)
        assert answer.status_code == 200
        assert '"system_fingerprint": "write-v2' in answer.text


def test_the_log_says_what_ended_a_stream(store, caplog):
    def broken():
        raise StoreError("the disk has gone")

    with live(store) as server:
        server.service.worker.decoder.step = broken
        answer = server.post("/v1/completions", model="write", prompt="x", stream=True)
        assert '"code": "store"' in answer.text
    assert [record.fields for record in caplog.records if record.getMessage() == "problem"] == [
        {"reason": "the disk has gone"}
    ]


def test_what_cannot_be_read_leaves_the_old_model_serving(store, tiny_folder):
    with live(store, reload_seconds=0.02) as server:
        manifest = store / "manifest.json"
        kept = manifest.read_bytes()
        broken = store / "tmp" / "broken"
        broken.write_bytes(b"{")
        broken.replace(manifest)  # at once: a look at half of it would be a failure of its own
        until(lambda: 'moecl_reloads_total{outcome="failed"} 1.0' in server.client.get("/metrics").text)
        assert version(server, "mood") == 1
        manifest.write_bytes(kept)
        relearn(store, tiny_folder, "mood", 3)
        until(lambda: version(server, "mood") == 2)


def test_what_could_not_be_read_is_tried_again(store, tiny_folder, monkeypatch, caplog):
    with live(store, reload_seconds=0.02) as server:
        library, tries = server.service.library, []
        monkeypatch.setattr(library, "_snapshot", lambda *given: tries.append(given) or 1 / 0)
        relearn(store, tiny_folder, "mood", 3)
        until(lambda: len(tries) > 3)
        assert version(server, "mood") == 1
        monkeypatch.undo()
        until(lambda: version(server, "mood") == 2)
        assert 'moecl_reloads_total{outcome="failed"} 1.0' in server.client.get("/metrics").text
    assert [record.getMessage() for record in caplog.records].count("reload failed") == 1


def test_a_change_while_the_base_is_loaded(store, tiny_folder, monkeypatch):
    """Statistics of the router are read last, as of then; all else of a snapshot is of one manifest."""
    opened = Store.open(store)
    opened.commit(training={**opened.training(), "router": statistics("mood@1").tensors()})

    def load(*given):
        relearn(store, tiny_folder, "mood", 3)
        opened.commit(training={**opened.training(), "router": statistics("mood@1", "mood@2").tensors()})
        return real(*given)

    real = libraries.load
    monkeypatch.setattr(libraries, "load", load)
    library = Library(store, "cpu", "2GB", None)
    assert library.now.record("mood").version == 1
    assert library.now.store.manifest is library.model.bank._manifest
    assert library.now.router.keys == ["mood@1"]
    assert library.reload()
    assert library.now.record("mood").version == 2
    assert library.now.router.keys == ["mood@2"]


def test_a_change_between_the_look_and_the_store_is_noticed(store, tiny_folder, monkeypatch):
    real = libraries.open_store
    monkeypatch.setattr(libraries, "open_store", lambda run: (real(run), relearn(run, tiny_folder, "mood", 3))[0])
    library = Library(store, "cpu", "2GB", None)
    library.reload()
    assert library.now.record("mood").version == 2


def test_a_damaged_object_is_a_fault_of_the_store(store, tiny_folder):
    digest = Store.open(store).record("mood").parts["task"]
    path = store / "objects" / f"{digest}.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with live(store) as server:
        answer = server.post("/v1/classify", model="mood", input="x")
        assert (answer.status_code, answer.json()["error"]["type"]) == (503, "server_error")
        assert str(store) not in answer.text
        assert server.classify("topic", ["x"])


def test_experts_are_loaded_once_for_all_versions(store, tiny_folder):
    library = Library(store, "cpu", "2GB", None)
    library.now.engine.predict(TEXTS, "topic")
    loads = library.model.bank.loaded.loads
    relearn(store, tiny_folder, "mood", 4)
    assert library.reload()
    library.now.engine.predict(TEXTS, "topic")
    assert library.model.bank.loaded.loads == loads
    assert not library.reload()


# --- thresholds ---


def thresholds(folder: Path, store: Path, level: float) -> Path:
    """A file that decides `good` from a share of `level` on, `bad` never."""
    import numpy as np

    from moecl.review import Scored

    record = Store.open(store).record("mood")
    share, given = np.array([level, 0.9]), np.array([0, 1])
    rows = Scored(("good", "bad"), np.arange(2), np.zeros(2, dtype=np.int64), given, share, "0" * 64)
    target = Target.of(0.9, None)
    path = folder / "thresholds.json"
    Thresholds(target=target, tasks={"mood": fit(rows, target, record.parts)}).save(path)
    return path


def test_decisions_by_thresholds(tmp_path, store, tiny_folder):
    path = thresholds(tmp_path, store, 0.5)
    with live(store, thresholds=path, reload_seconds=0.02) as server:
        assert server.client.get("/v1/run").json()["thresholds"]
        rows = [f"{word} {text}" for text in TEXTS for word in ("love", "worst", "price", "food", "sad")]
        data = server.classify("mood", rows)
        expected = ["good" if one["scores"]["good"] >= 0.5 else "review" for one in data]
        assert [one["decision"] for one in data] == expected
        assert set(expected) == {"good", "review"}
        assert server.classify("topic", ["x"])[0]["decision"] == "review", "it has no thresholds"
        thresholds(tmp_path, store, 1.0)
        until(lambda: {one["decision"] for one in server.classify("mood", rows)} == {"review"})


def test_thresholds_of_another_version_decide_nothing(tmp_path, store, tiny_folder):
    path = thresholds(tmp_path, store, 0.0)
    with live(store, thresholds=path, reload_seconds=0.02) as server:
        until(lambda: any(one["decision"] == "good" for one in server.classify("mood", ["love", "bad", "x", "tea"])))
        relearn(store, tiny_folder, "mood", 5)
        until(lambda: version(server, "mood") == 2)
        assert {one["decision"] for one in server.classify("mood", ["love", "bad", "x", "tea"])} == {"review"}


def test_without_a_thresholds_file_all_is_for_review(tmp_path, store, tiny_folder):
    path = thresholds(tmp_path, store, 0.0)
    rows = ["love", "bad", "x", "tea"]
    with live(store, thresholds=path, reload_seconds=0.02) as server:
        assert any(one["decision"] == "good" for one in server.classify("mood", rows))
        path.unlink()
        relearn(store, tiny_folder, "mood", 5)
        until(lambda: version(server, "mood") == 2)
        assert {one["decision"] for one in server.classify("mood", rows)} == {"review"}
        thresholds(tmp_path, store, 0.0)
        until(lambda: any(one["decision"] == "good" for one in server.classify("mood", rows)))


def test_an_older_version_is_not_decided_by_the_current_ones_thresholds(tmp_path, store, tiny_folder):
    relearn(store, tiny_folder, "mood", 5)
    path = thresholds(tmp_path, store, 0.0)
    with live(store, thresholds=path) as server:
        assert any(one["decision"] == "good" for one in server.classify("mood", ["love", "bad", "x", "tea"]))
        assert {one["decision"] for one in server.classify("mood@1", ["love", "bad", "x", "tea"])} == {"review"}


def test_thresholds_that_do_not_fit_at_the_start_are_an_error(tmp_path, store, tiny_folder, capsys, monkeypatch):
    from moecl.cli import main

    monkeypatch.setattr("moecl.server.library.load", lambda *_: pytest.fail("the base was loaded before that"))
    path = thresholds(tmp_path, store, 0.5)
    relearn(store, tiny_folder, "mood", 5)
    assert main(["serve", str(store), "--port", "0", "--device", "cpu", "--thresholds", str(path)]) == 2
    assert "was made before the task or its experts changed" in capsys.readouterr().err
