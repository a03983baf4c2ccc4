"""Splits tokenised once: what comes out of the cache is what went in, and another split or encoder finds none."""

import pytest

from moecl.config import Task
from moecl.data.derived import Derived
from moecl.data.encode import Encoder
from moecl.data.task import Example, Split
from moecl.data.tokens import encode_split
from tiny import tiny_tokenizer

TASK = Task(name="t", kind="classification", labels=["good", "bad"])
TEXTS = ["the movie", "it was the best story of a phone " * 9, "", "bad"]


def split(sha256: str = "a") -> Split:
    rows = [Example(text, {"text": text}, ("good", None)[n % 2], None, None, f"f:{n}") for n, text in enumerate(TEXTS)]
    return Split("f", rows, sha256)


@pytest.fixture
def calls(monkeypatch, tmp_path) -> list[int]:
    monkeypatch.setenv("MOECL_CACHE", str(tmp_path))
    found, real = [], Encoder._tokenise
    monkeypatch.setattr(Encoder, "_tokenise", lambda self, *a: found.append(len(a[0])) or real(self, *a))
    return found


def test_a_split_is_tokenised_once(calls):
    tokenizer = tiny_tokenizer()
    encoder = Encoder(tokenizer, TASK, 32)
    kept = Derived("tokens", 10**6, print)
    expected = encoder.encode(split().examples)
    assert [row.cut for row in expected] == [False, True, False, False]
    calls.clear()
    assert encode_split(encoder, split(), kept) == expected
    assert calls == [4, 1]
    for _ in range(2):
        assert encode_split(Encoder(tiny_tokenizer(), TASK, 32), split(), Derived("tokens", 10**6, print)) == expected
    assert calls == [4, 1]
    other = Task(name="t", kind="classification", labels=["bad", "good"])
    for different in (
        lambda: encode_split(encoder, split("b"), kept),
        lambda: encode_split(encoder, split(), kept, answers=False),
        lambda: encode_split(encoder, split(), kept, reserve=1),
        lambda: encode_split(Encoder(tokenizer, other, 32), split(), kept),
        lambda: encode_split(Encoder(tokenizer, TASK, 33), split(), kept),
        lambda: encode_split(encoder, split(), None),
    ):
        calls.clear()
        different()
        assert calls
