"""What a server bears: a queue that is full, slow and large requests, clients that leave, an end in good order."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from live import live, make_store
from moecl.generation import Writing
from moecl.server.queue import Reading, Worker


@pytest.fixture(scope="module")
def store(tmp_path_factory, tiny_folder):
    return make_store(tmp_path_factory.mktemp("store"), tiny_folder, "mood topic head write")


@contextmanager
def stuck(server):
    """The model's thread waits, as it would in a long forward, until told to go on; `on.reached` once it does."""
    on, engine = threading.Event(), server.service.worker.engine
    on.reached, real = threading.Event(), engine.answer

    def answer(*given):
        on.reached.set()
        return on.wait(30) and real(*given)

    engine.answer = answer
    try:
        yield on
    finally:
        on.set()
        engine.answer = real


def until(true, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def asked(server, text: str = "x", **more) -> httpx.Response:
    return server.post("/v1/classify", model="mood", input=text, **more)


def test_rows_of_many_requests_and_tasks_share_a_batch(store):
    with live(store) as server:
        expected = {name: server.classify(name, "a great movie")[0]["scores"] for name in ("mood", "topic", "head")}
        sizes = []
        real = server.service.worker.engine.answer
        server.service.worker.engine.answer = lambda requests: sizes.append(len(requests)) or real(requests)
        with stuck(server) as on, ThreadPoolExecutor(12) as pool:
            first = pool.submit(server.classify, "mood", "a great movie")
            until(on.reached.is_set)
            others = [pool.submit(server.classify, name, "a great movie") for name in list(expected) * 3]
            until(lambda: len(server.service.worker._reads) == 9)
            on.set()
            answers = [one.result()[0] for one in (first, *others)]
        assert sizes == [1, 9]
        for one in answers:
            assert one["scores"] == pytest.approx(expected[one["task"]], rel=1e-3)


def test_a_full_queue_refuses_and_says_when_to_come_back(store):
    with live(store, queue=3) as server, ThreadPoolExecutor(3) as pool:
        with stuck(server) as on:
            taken = [pool.submit(asked, server) for _ in range(3)]
            until(lambda: server.service.rows == 3)
            refused = asked(server)
            on.set()
        assert refused.status_code == 429
        assert refused.json()["error"]["type"] == "rate_limit_error"
        assert 1 <= int(refused.headers["retry-after"]) <= 30
        assert [one.result().status_code for one in taken] == [200] * 3
        assert asked(server).status_code == 200
        many = asked(server, ["x"] * 4)
        assert (many.status_code, "4 texts, at most 3" in many.json()["error"]["message"]) == (400, True)
        assert server.service.rows == 0


def test_texts_are_waited_for_as_long_as_texts_take(store):
    with live(store) as server:
        worker = Worker(server.service.worker.engine, 0.0, server.service.worker.metrics)  # which nothing wakes
        worker.rate, worker._texts_done, worker._texts_took = 100.0, 10.0, 20.0
        worker._writing.update(dict.fromkeys(range(5)))
        assert worker.retry_after(105) == 11
        worker._writing.clear()
        assert worker.retry_after(200) == 2


def test_what_takes_too_long_is_given_up(store):
    with live(store, timeout=0.3) as server:
        with stuck(server):
            late = asked(server)
        assert (late.status_code, late.json()["error"]["code"]) == (504, "timeout")
        until(lambda: asked(server).status_code == 200)
        assert server.service.rows == 0


def test_a_large_request_that_is_given_up_does_not_hold_the_model(store, monkeypatch):
    read = []

    def slow(job, engine):
        read.append(job.rows)
        time.sleep(0.2)
        return run(job, engine)

    run = Reading.run
    monkeypatch.setattr(Reading, "run", slow)
    with live(store, timeout=0.5) as server:
        late = asked(server, ["x"] * 256, gates=True)
        assert late.status_code == 504
        assert asked(server).status_code == 200
        assert sum(read) < 64
        assert server.service.rows == 0


def test_rows_of_a_large_request_are_answered_in_order(store):
    texts = [f"{word} {number}" for number in range(50) for word in ("great", "bad")]
    with live(store) as server:
        alone = {text: server.classify("topic", [text])[0]["label"] for text in texts[:20]}
        for gates in (False, True):
            data = server.classify("topic", texts, gates=gates)
            assert [one["label"] for one in data[:20]] == [*alone.values()]
            assert [one["index"] for one in data] == [*range(100)]


def test_rows_that_the_model_is_still_at_count(store):
    with live(store, queue=3, timeout=0.3) as server:
        with stuck(server):
            assert asked(server, ["x"] * 3).status_code == 504
            assert asked(server).status_code == 429
            assert "moecl_queue_rows 3.0" in server.client.get("/metrics").text
        until(lambda: asked(server).status_code == 200)
        assert "moecl_queue_rows 0.0" in server.client.get("/metrics").text


def test_rows_that_are_answered_count_no_more(store, monkeypatch):
    with live(store, queue=1) as server:
        worker, on = server.service.worker, threading.Event()
        monkeypatch.setattr(worker, "_step", on.wait)  # the model's thread is not done with its round
        assert asked(server).status_code == 200
        assert worker.abandoned == 0
        assert "moecl_queue_rows 0.0" in server.client.get("/metrics").text
        on.set()


def test_a_long_text_in_a_stream_is_given_up(store):
    with live(store, timeout=0.5) as server:
        slow = server.service.worker.decoder.step
        server.service.worker.decoder.step = lambda: time.sleep(0.2) or slow()
        wish = {"model": "write", "prompt": "x", "stream": True, "temperature": 2, "seed": 1, "max_tokens": 200}
        with server.client.stream("POST", "/v1/completions", json=wish) as answer:
            *_, last = [line for line in answer.iter_lines() if line]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "timeout"
        until(lambda: not server.service.worker._writing)


def test_a_client_that_leaves_is_not_worked_for(store):
    with live(store) as server:
        worker = server.service.worker
        with stuck(server) as on:
            for _ in range(3):
                with pytest.raises(httpx.ReadTimeout):
                    httpx.post(f"{server.url}/v1/classify", json={"model": "mood", "input": "x"}, timeout=0.3)
            until(lambda: server.service.rows == 0)
            seen = []
            real, worker._read = worker._read, lambda jobs: seen.extend(jobs) or real(jobs)
            on.set()
            asked(server)
        assert len(seen) == 1, "the two that waited were dropped"
        assert "moecl_cancelled_total 3.0" in server.client.get("/metrics").text


def test_a_client_that_leaves_a_stream(store):
    with live(store) as server:
        worker = server.service.worker
        step = worker.decoder.step
        worker.decoder.step = lambda: time.sleep(0.05) or step()
        wish = {"model": "write", "prompt": "x", "stream": True, "temperature": 2, "seed": 1, "max_tokens": 200}
        with server.client.stream("POST", "/v1/completions", json=wish) as answer:
            lines = answer.iter_lines()  # which closes the stream where it is let go
            assert next(lines)
            assert server.service.rows == 1
        until(lambda: not worker.decoder.cohorts and server.service.rows == 0)
        assert "moecl_cancelled_total 1.0" in server.client.get("/metrics").text
        assert len(server.classify("mood", ["x"])) == 1


def test_a_fault_while_a_row_leaves_does_not_end_the_model(store):
    with live(store) as server:
        worker = server.service.worker
        step = worker.decoder.step
        worker.decoder.step = lambda: time.sleep(0.05) or step()
        worker.decoder.leave = lambda row: 1 / 0
        wish = {"model": "write", "prompt": "x", "temperature": 2, "seed": 1, "max_tokens": 200}
        with server.client.stream("POST", "/v1/completions", json={**wish, "stream": True}) as answer:
            assert next(answer.iter_lines())
        until(lambda: not worker._writing)
        assert server.post("/v1/completions", **{**wish, "max_tokens": 5}).status_code == 200
        assert server.client.get("/readyz").status_code == 200


def test_a_fault_of_one_text_is_not_the_others(store, monkeypatch):
    wish = {"model": "write", "prompt": "x", "max_tokens": 8}
    take = Writing.take
    monkeypatch.setattr(Writing, "take", lambda row, *how: take(row, *how) if row.sampling.seed != 13 else 1 / 0)
    with live(store) as server, ThreadPoolExecutor(3) as pool:
        alone = server.post("/v1/completions", **wish).json()["choices"]
        with stuck(server) as on:
            busy = pool.submit(asked, server)
            until(on.reached.is_set)
            fine = pool.submit(server.post, "/v1/completions", **wish)
            until(lambda: server.service.worker._texts)
            cursed = pool.submit(server.post, "/v1/completions", **wish, temperature=1, seed=13)
            until(lambda: len(server.service.worker._texts) == 2)
            on.set()
        assert [one.result().status_code for one in (busy, fine, cursed)] == [200, 200, 500]
        assert fine.result().json()["choices"] == alone


def test_large_requests_are_not_read(store):
    with live(store, body_bytes=1000) as server:
        assert asked(server, "x" * 500).status_code == 200
        assert asked(server, "x" * 1001).status_code == 413

        def pieces():
            yield b'{"model": "mood", "input": "'
            for _ in range(50):
                yield b"x" * 100

        assert server.client.post("/v1/classify", content=pieces()).status_code == 413


def test_a_request_that_trickles_in_is_given_up(store):
    with live(store, timeout=0.3) as server:
        host, port = server.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=10) as slow:
            slow.sendall(b"POST /v1/classify HTTP/1.1\r\nHost: localhost\r\nContent-Length: 50\r\n\r\n{")
            assert slow.recv(1000).startswith(b"HTTP/1.1 408")


def test_a_fault_of_one_row_is_not_the_others(store):
    with live(store) as server:
        real = server.service.worker.engine.answer

        def broken(requests):
            if any("cursed" in server.service.worker.engine.tokenizer.decode(one.row.input_ids) for one in requests):
                raise RuntimeError("the secret text")
            return real(requests)

        server.service.worker.engine.answer = broken
        with stuck(server) as on, ThreadPoolExecutor(4) as pool:
            server.service.worker.engine.answer = lambda requests: on.wait(30) and broken(requests)
            found = [pool.submit(asked, server, text) for text in ("one", "cursed", "two", "three")]
            until(lambda: server.service.rows == 4)
            on.set()
            answers = [one.result() for one in found]
        server.service.worker.engine.answer = real
        assert [one.status_code for one in answers] == [200, 500, 200, 200]
        assert "secret" not in answers[1].text


# --- the command itself ---


@contextmanager
def served(store: Path, *options: str, **environment: str):
    words = [sys.executable, "-m", "moecl", "serve", str(store), "--port", "0", "--device", "cpu", *options]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env=env)
    try:
        first = process.stderr.readline()
        assert first.startswith("serving "), first + process.stderr.read()
        yield process, first.split(" at ")[1].split(";")[0], first
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def test_a_signal_ends_it_when_all_is_answered(store):
    with served(store) as (process, url, first):
        assert first.startswith("serving mood, topic, head, write at http://127.0.0.1:")
        wish = {"model": "write", "prompt": "x", "stream": True, "temperature": 2, "seed": 1, "max_tokens": 60}
        whole = httpx.post(f"{url}/v1/completions", json={**wish, "stream": False}, timeout=60).json()
        with httpx.stream("POST", f"{url}/v1/completions", json=wish, timeout=60) as answer:
            lines = answer.iter_lines()
            begun = next(lines)
            process.send_signal(signal.SIGTERM)
            events = [json.loads(line[6:]) for line in (begun, *lines) if line and not line.endswith("[DONE]")]
        assert "".join(one["choices"][0]["text"] for one in events) == whole["choices"][0]["text"]
        assert process.wait(30) in (0, -signal.SIGTERM)
        log = [json.loads(line) for line in process.stderr.read().splitlines()]
        assert [(line["event"], line["status"], line["model"]) for line in log] == [("request", 200, "write")] * 2
        assert not any("texts" in line for line in log)
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/healthz")


def test_texts_are_logged_where_asked(store):
    with served(store, "--log-texts") as (process, url, _):
        httpx.post(f"{url}/v1/classify", json={"model": "mood", "input": "hear hear"}, timeout=60)
        process.send_signal(signal.SIGTERM)
        process.wait(30)
        [line] = [json.loads(line) for line in process.stderr.read().splitlines()]
        assert line["texts"] == ["hear hear"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--host", "0.0.0.0"], "--host 0.0.0.0: others can reach it; give --api-key FILE or MOECL_API_KEYS"),
        (["--queue", "0"], "--queue: 0 is out of range; give 1 or more rows"),
        (["--api-key", "nothing.txt"], "--api-key nothing.txt: No such file or directory; give a file"),
        (["--cors", "foo"], "--cors: 'foo' is no origin; give one as https://a.example, or *"),
        (["--thresholds", "nothing.json"], "nothing.json: No such file or directory; give the thresholds.json"),
        (["--max-body", "big"], "--max-body"),
        (["--max-body", "0"], "--max-body: '0' leaves no room; write a number"),
    ],
)
def test_what_cannot_be_served(store, options, message, capsys):
    from moecl.cli import main

    assert main(["serve", str(store), "--port", "0", "--device", "cpu", *options]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_a_port_that_is_taken(store, capsys):
    from moecl.cli import main

    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert main(["serve", str(store), "--port", str(port)]) == 2
    assert f"--port {port}: 127.0.0.1: Address already in use; give another --port" in capsys.readouterr().err
