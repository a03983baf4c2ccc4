"""Fixtures for every test. Imports are inside them: the tests of layer 0 stay free of torch."""

import os
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory) -> str | None:
    """What a run keeps of its texts stays out of the user's cache."""
    before = os.environ.get("MOECL_CACHE")
    os.environ["MOECL_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    return before


@pytest.fixture(autouse=True)
def _real_assets(request, monkeypatch, _own_cache):
    """But the assets that slow tests need are there."""
    if request.node.get_closest_marker("slow"):
        monkeypatch.setenv("MOECL_CACHE", _own_cache) if _own_cache else monkeypatch.delenv("MOECL_CACHE")


@pytest.fixture
def tiny_llama():
    """A two-layer random Llama of the test's own: frozen, eval mode, vocabulary `tiny.VOCAB`."""
    from tiny import tiny_model

    return tiny_model("llama")


@pytest.fixture
def tiny_tokenizer():
    """A byte-level BPE of 384 tokens."""
    from tiny import tiny_tokenizer

    return tiny_tokenizer()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    """A folder that `from_pretrained` reads: a tiny Llama and its tokenizer. Read it, never write to it."""
    from tiny import tiny_model, tiny_tokenizer

    folder = tmp_path_factory.mktemp("tiny-llama")
    tokenizer = tiny_tokenizer()
    tiny_model("llama", vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
