"""Requests that nobody should send: all that the description allows, and 2,000 that it does not."""

import json
import random
import re
import socket
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings

from live import TASKS, live, make_store

ROOT = Path(__file__).parents[2]
NAMES = "mood topic head two write told"
POSTS = ("/v1/classify", "/v1/completions", "/v1/chat/completions")
CHECKS = [
    schemathesis.checks.not_a_server_error,
    schemathesis.checks.status_code_conformance,
    schemathesis.checks.content_type_conformance,
    schemathesis.checks.response_schema_conformance,
]
GETS = ("/v1/models", "/v1/models/mood", "/v1/run", "/healthz", "/readyz", "/metrics", "/", "/openapi.json")


@pytest.fixture(scope="module")
def server(tmp_path_factory, tiny_folder):
    store = make_store(tmp_path_factory.mktemp("store"), tiny_folder, NAMES)
    with live(store, body_bytes=20_000, max_tokens=32, log_texts=True) as found:
        found.client.headers["connection"] = "close"
        yield found


def test_all_that_is_described_is_answered_as_described(server):
    """schemathesis draws requests from the OpenAPI schema: statuses, content types and answers are those it names."""
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    seen: set[str] = set()
    for found in schema.get_all_operations():
        operation = found.ok()

        @given(case=operation.as_strategy())
        @settings(
            max_examples=40,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        )
        def ask(case):
            answer = case.call(base_url=server.url, timeout=60)
            assert answer.status_code < 500, answer.text
            seen.add(case.operation.path)
            case.validate_response(answer, checks=CHECKS)

        ask()
    assert set(POSTS) <= seen
    assert server.classify("mood", ["x"])


ODD = [
    *(None, True, False, 0, -1, 1, 2**63, -(2**70), 1e308, 0.5, "", " ", "x", "\x00", "\ud800", "\u202e", [], {}),
    *("{text}", "{{7*7}}", "../../etc/passwd", "a" * 5000, "mood", "write", "auto", "mood@prod", "NaN", "%s%n", "<b>"),
]


def odd(draw: random.Random, depth: int = 0):
    """A JSON value that is seldom right."""
    if depth > 2 or draw.random() < 0.6:
        return draw.choice(ODD)
    if draw.random() < 0.5:
        return [odd(draw, depth + 1) for _ in range(draw.randrange(4))]
    return {str(odd(draw, 3))[:20]: odd(draw, depth + 1) for _ in range(draw.randrange(4))}


FIELDS = (
    "model", "input", "prompt", "messages", "max_tokens", "temperature", "top_p", "seed", "stop", "stream", "logprobs",
    "top_logprobs", "n", "gates", "stream_options", "tools", "user", "suffix", "role", "content",
)  # fmt: skip


def bad_body(draw: random.Random) -> bytes:
    """A right request of which some fields are not, or something that is no request at all."""
    body = {
        "model": draw.choice(list(TASKS)),
        "input": "x",
        "prompt": "x",
        "messages": [{"role": "user", "content": "x"}],
    }
    kind = draw.randrange(6)
    if kind == 0:
        return draw.randbytes(draw.randrange(200))
    if kind == 1:
        return json.dumps(odd(draw)).encode()
    if kind == 2:
        return b"[" * draw.randrange(1, 9000) + b'{"a":' * draw.randrange(1000)
    for field in draw.sample(list(body), draw.randrange(3)):
        del body[field]
    for field in draw.sample(FIELDS, draw.randrange(1, 4)):
        body[field] = odd(draw)
    text = json.dumps(body)
    if kind == 3:
        text = text[: draw.randrange(len(text))]
    if kind == 4:
        text = text.replace('"x"', draw.choice(["NaN", "Infinity", "1" * 5000, "-0", '"\\u0000"', '"\\ud83d"']))
    return text.encode()


PATHS = [*POSTS * 9, *GETS, "/v1/models/%00", "/%2e%2e/%2e%2e/etc/passwd", "/v1/models/" + "a" * 3000]
METHODS = ["POST"] * 60 + ["GET", "PUT", "DELETE", "HEAD", "OPTIONS", "BREW"]
TYPES = ["application/json"] * 8 + ["text/plain", "multipart/form-data", "application/json; charset=utf-7", ""]
HEADERS = ["Authorization: \xff", "X: " + "y" * 9000, "Cookie: a=b", "Bad Header: 1", "Expect: 100-continue"]


def bad_request(draw: random.Random) -> bytes:
    """Bytes on the wire."""
    body = bad_body(draw)
    length = len(body) if draw.random() < 0.9 else draw.choice([0, 5, 10**9, -1, "x"])
    lines = [
        f"{draw.choice(METHODS)} {draw.choice(PATHS)} HTTP/1.1",
        f"Host: {draw.choice(['localhost'] * 9 + ['evil.example'])}",
        f"Content-Type: {draw.choice(TYPES)}",
        f"Content-Length: {length}",
        "Connection: close",
        *([draw.choice(HEADERS)] if draw.random() < 0.1 else []),
    ]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def answer_of(url: str, request: bytes) -> bytes:
    host, port = urlsplit(url).netloc.split(":")
    with socket.create_connection((host, int(port)), timeout=60) as line:
        try:
            line.sendall(request)
            line.shutdown(socket.SHUT_WR)
            return b"".join(iter(lambda: line.recv(1 << 16), b""))
        except (BrokenPipeError, ConnectionResetError):  # it was refused before it was read
            return b""


def test_two_thousand_bad_requests(server, caplog, capfd):
    before = {name: server.classify(name, ["a great movie", "bad"]) for name in ("mood", "topic", "head")}
    draw, statuses = random.Random(0), {}
    for number in range(2000):
        request = bad_request(draw)
        answer = answer_of(server.url, request)
        status = int(answer[9:12] or 0)
        statuses[status] = statuses.get(status, 0) + 1
        assert status < 500, (number, request[:300], answer[:300])
        assert b"Traceback" not in answer
        if status >= 400 and answer.partition(b"\r\n\r\n")[2].startswith(b"{"):
            assert set(json.loads(answer.partition(b"\r\n\r\n")[2])["error"]) == {"message", "type", "param", "code"}
    assert statuses[400] > 1000, statuses
    assert statuses.get(200, 0) > 0, "some are right after all"
    assert server.service.rows == 0
    for name, expected in before.items():
        assert server.classify(name, ["a great movie", "bad"]) == expected
    said = capfd.readouterr()
    assert "Traceback" not in said.err + said.out
    assert not [record for record in caplog.records if record.getMessage() == "fault"]


def test_the_example_for_openais_client(server):
    words = [sys.executable, str(ROOT / "examples" / "openai_client.py"), server.url, "a great movie"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=100, check=True)
    answers = dict(re.split(": ", line, maxsplit=1) for line in done.stdout.splitlines() if ": " in line)
    assert answers["mood"] == server.classify("mood", ["a great movie"])[0]["label"]
    assert answers["topic"] == server.classify("topic", ["a great movie"])[0]["label"]
    assert "fills one field" in answers["two"]
    assert "told" in answers


def test_the_page_needs_nothing_from_elsewhere(server):
    page = server.client.get("/")
    assert page.headers["content-type"].startswith("text/html")
    for path in ("/", "/page.css", "/page.js"):
        text = server.client.get(path).text
        assert not re.findall(r"https?://|//cdn|@import|url\(", text)
        assert "innerHTML" not in text
    assert set(re.findall(r'(?:src|href)="([^"]+)"', page.text)) == {"page.css", "page.js", "data:,"}
    assert not re.findall(r"<script>|<style|style=| on\w+=", page.text), "its policy forbids them"
    named = re.findall(r'find\("([\w-]+)"\)', server.client.get("/page.js").text)
    assert set(named) <= set(re.findall(r'id="([\w-]+)"', page.text))
