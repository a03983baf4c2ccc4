"""Fixtures for every test. Imports are inside them: the tests of layer 0 stay free of torch."""

import io
import os
import shutil
import sys
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


@pytest.fixture(scope="session")
def learned(tmp_path_factory, tiny_folder) -> Path:
    """A folder with stream.yaml, its data, new.yaml and `run`, learned. Copy it before changing anything."""
    import yaml

    from moecl.cli import main
    from tiny_stream import task, write_stream

    folder = tmp_path_factory.mktemp("learned")
    stream = write_stream(folder, tiny_folder, rows=16, train={"epochs": 1})
    (folder / "new.yaml").write_text(yaml.safe_dump(task(folder, "new", 9, rows=16)))
    assert main(["train", str(stream), "-o", str(folder / "run")]) == 0
    return folder


@pytest.fixture
def own(learned, tmp_path) -> Path:
    """A copy of the learned run for a test that changes it."""
    return Path(shutil.copytree(learned / "run", tmp_path / "run"))


@pytest.fixture
def moecl(capsys, monkeypatch):
    """Call `moecl`; a refusal is one line, exit 2, nothing on stdout."""
    from command_lines import Done
    from moecl.cli import main

    def call(*words, stdin: bytes = b"") -> Done:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        capsys.readouterr()
        done = Done(main([str(word) for word in words]), *capsys.readouterr())
        assert "Traceback" not in done.err
        complaints = [line for line in done.said if line.startswith("moecl: ")]
        assert len(complaints) == (done.status != 0)
        assert complaints == done.said[-1:] or not complaints
        return done

    return call


@pytest.fixture
def refuses(moecl):
    def call(*words, stdin: bytes = b"") -> str:
        done = moecl(*words, stdin=stdin)
        assert (done.status, done.out) == (2, "")
        return done.said[-1].removeprefix("moecl: ")

    return call
