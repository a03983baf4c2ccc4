"""The cache: what is fetched once, trusted, refused, shared by processes and left by dead ones."""

import errno
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from fake_index import FakeIndex, make_asset, make_zip
from moecl.data import assets
from moecl.data.assets import ASSETS, cached, clear, fetch, is_asset, resolve_base, verify
from moecl.errors import AssetError

MEMBER = random.Random(0).randbytes(400_000)
ARCHIVE = make_zip({"pkg/data.bin": MEMBER, "../evil.txt": b"out of the folder", "pkg/__init__.py": b"1 / 0"})


def build(content, folder, progress):
    (folder / "sub").mkdir()
    (folder / "sub" / "whole.bin").write_bytes(content)
    progress("converting", len(content), len(content))


@pytest.fixture
def index(monkeypatch, tmp_path):
    """An empty cache, and an index that serves the asset `tiny`."""
    monkeypatch.setenv("MOECL_CACHE", str(tmp_path / "cache"))
    for name in ("EXTRA_INDEX_URL", "FIND_LINKS", "CERT"):
        monkeypatch.delenv(f"PIP_{name}", raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setattr("moecl.data.registry._pip_config", lambda: "")
    monkeypatch.setattr("moecl.data.registry.PAUSES", (0.0,))
    monkeypatch.setitem(ASSETS, "tiny", make_asset(ARCHIVE, "pkg/data.bin", build))
    served = FakeIndex(ARCHIVE)
    monkeypatch.setenv("PIP_INDEX_URL", served.url)
    yield served
    served.close()


def in_cache(tmp_path):
    return sorted(str(path.relative_to(tmp_path / "cache")) for path in (tmp_path / "cache").rglob("*"))


def whole(tmp_path):
    """All that one fetch of `tiny` leaves."""
    version = ASSETS["tiny"].version
    files = ["", "/asset.json", "/sub", "/sub/whole.bin"]
    return ["tiny", *(f"tiny/{version}{file}" for file in files), "tiny/lock"]


def test_fetch(index, tmp_path):
    calls = []
    folder = fetch("tiny", lambda *call: calls.append(call))
    assert (folder / "sub" / "whole.bin").read_bytes() == MEMBER
    assert in_cache(tmp_path) == sorted(whole(tmp_path))
    assert not list(tmp_path.rglob("evil*"))
    assert [call[0] for call in calls] == sorted(
        (call[0] for call in calls), key=["connecting", "downloading", "converting"].index
    )
    verify("tiny")
    assert json.loads((folder / "asset.json").read_text())["licence"] == "Apache-2.0"


def test_a_warm_cache_touches_no_network_and_needs_no_writing(index, monkeypatch):
    folder = fetch("tiny")
    seen = {path: path.stat().st_mtime_ns for path in folder.parent.rglob("*")}

    def refuse(*args, **kwargs):
        raise AssertionError("network")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert fetch("tiny") == fetch("tiny", offline=True) == Path(resolve_base("tiny")) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.parent.rglob("*")} == seen


def test_offline_and_cold(index, tmp_path):
    with pytest.raises(AssetError, match=r"tiny: .* is not there.*moecl fetch tiny.*connected machine.*MOECL_CACHE"):
        fetch("tiny", offline=True)
    assert not (tmp_path / "cache").exists()


def test_unreachable(index, monkeypatch):
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    with pytest.raises(AssetError, match=r"tiny: cannot download.*refused.*PIP_INDEX_URL.*pip.conf.*moecl fetch tiny"):
        fetch("tiny")


def test_unknown(index):
    with pytest.raises(
        AssetError, match=r"no asset 'vadre4' \(did you mean 'vader4'\?\); there are: smollm2.*, vader4"
    ):
        fetch("vadre4")


def test_a_copied_cache_serves(index, tmp_path, monkeypatch):
    fetch("tiny")
    shutil.copytree(tmp_path / "cache", tmp_path / "copy")
    monkeypatch.setenv("MOECL_CACHE", str(tmp_path / "copy"))
    assert fetch("tiny", offline=True).is_relative_to(tmp_path / "copy")
    verify("tiny")


@pytest.mark.parametrize("damage", ["cut", "removed", "record"])
def test_a_damaged_folder_is_made_again(index, damage):
    folder = fetch("tiny")
    file = folder / ("asset.json" if damage == "record" else "sub/whole.bin")
    if damage == "removed":
        file.unlink()
    else:
        os.truncate(file, 10)
    assert cached() == []
    with pytest.raises(AssetError, match=r"missing or cut short|cannot be read"):
        fetch("tiny", offline=True)
    assert (fetch("tiny") / "sub" / "whole.bin").read_bytes() == MEMBER
    assert len(index.asked) == 2


def test_verify_reads_every_byte(index):
    file = fetch("tiny") / "sub" / "whole.bin"
    file.write_bytes(MEMBER[:-1] + bytes([MEMBER[-1] ^ 1]))
    with pytest.raises(
        AssetError, match=r"whole.bin was altered; run `moecl cache clear tiny`, then `moecl fetch tiny`"
    ):
        verify("tiny")


def test_another_member_than_pinned(index, monkeypatch):
    monkeypatch.setitem(ASSETS, "tiny", make_asset(ARCHIVE, "pkg/data.bin", build, member_sha256="0" * 64))
    with pytest.raises(AssetError, match=r"pkg/data.bin in tiny_pkg.* has another sha256 than pinned"):
        fetch("tiny")
    assert cached() == []


def test_too_little_space(index, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(AssetError, match=r"tiny needs 0 MB of disk .* has 0 MB free; .*MOECL_CACHE"):
        fetch("tiny")
    assert index.asked == []


def test_the_disk_fills_up(index, tmp_path, monkeypatch):
    def fill(content, folder, progress):
        (folder / "part").write_bytes(content[:1000])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder / "part"))

    monkeypatch.setitem(ASSETS, "tiny", make_asset(ARCHIVE, "pkg/data.bin", fill))
    with pytest.raises(AssetError, match="disk is full"):
        fetch("tiny")
    assert not list(tmp_path.rglob("part"))
    monkeypatch.setitem(ASSETS, "tiny", make_asset(ARCHIVE, "pkg/data.bin", build))
    assert (fetch("tiny") / "sub" / "whole.bin").read_bytes() == MEMBER
    assert len(index.asked) == 1  # the download was kept


def test_a_cache_that_is_no_folder(index, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MOECL_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(AssetError, match="file/cache: Not a directory"):
        fetch("tiny")
    assert cached() == []


def test_cached_and_clear(index, tmp_path, monkeypatch):
    folder = fetch("tiny")
    monkeypatch.setitem(ASSETS, "tiny", make_asset(ARCHIVE, "pkg/data.bin", build, recipe=2))
    newer = fetch("tiny")
    assert newer != folder
    found = cached()
    assert [(entry.name, entry.path, entry.bytes) for entry in found] == [
        ("tiny", folder, len(MEMBER)),
        ("tiny", newer, len(MEMBER)),
    ]
    assert all(entry.when.tzinfo for entry in found)
    with pytest.raises(AssetError, match="no asset 'tinny'"):
        clear(["tinny"])
    clear(["vader4"])
    assert cached() == found
    clear()
    assert cached() == []
    assert in_cache(tmp_path) == ["tiny", "tiny/lock"]


def test_bases(index, tmp_path):
    assert is_asset("tiny")
    assert not is_asset("org/model")
    assert resolve_base("org/model") == "org/model"
    assert resolve_base(str(tmp_path)) == str(tmp_path)
    assert resolve_base("tiny") == str(fetch("tiny"))
    with pytest.raises(
        AssetError, match="base 'vader4' is a benchmark, not a model; models are: smollm2-135m-instruct"
    ):
        resolve_base("vader4")


def test_home_is_the_default(monkeypatch, tmp_path):
    monkeypatch.delenv("MOECL_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert assets.cache_dir() == tmp_path / ".cache" / "moecl"


OTHER = """
import os, sys, time
from pathlib import Path
from fake_index import make_asset
from moecl.data import assets, registry

registry.PAUSES = (0.0,)
registry._pip_config = lambda: ""

def build(content, folder, progress):
    (folder / "sub").mkdir()
    (folder / "sub" / "whole.bin").write_bytes(content)
    {then}

assets.ASSETS["tiny"] = make_asset(Path({archive!r}).read_bytes(), "pkg/data.bin", build)
print(assets.fetch("tiny"))
"""


@pytest.fixture
def start(index, tmp_path):
    """Start another process that fetches `tiny`; `then` is run at the end of its build."""
    (tmp_path / "archive").write_bytes(ARCHIVE)
    started = []

    def go(then="pass"):
        code = textwrap.dedent(OTHER).format(then=then, archive=str(tmp_path / "archive"))
        path = os.pathsep.join(["src", "tests"])
        env = {**os.environ, "PYTHONPATH": path}
        started.append(subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, text=True))
        return started[-1]

    yield go
    for process in started:
        process.kill()
        process.communicate()


def wait_for(happened):
    deadline = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


def test_two_processes_fetch_once(index, start, tmp_path):
    then = f"time.sleep(0.3); Path({str(tmp_path / 'built')!r}).open('a').write('x')"
    first, second = start(then), start(then)
    said = [process.communicate(timeout=60)[0].strip() for process in (first, second)]
    assert said == [str(assets.cache_dir() / "tiny" / ASSETS["tiny"].version)] * 2
    assert index.asked == [""]
    assert (tmp_path / "built").read_text() == "x"


def test_killed_while_downloading(index, start, tmp_path):
    index.faults = ["stall"]
    process = start()
    assert index.stalled.wait(60)
    wait_for(lambda: any(part.stat().st_size for part in tmp_path.rglob("*.part")))
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert cached() == []
    assert (fetch("tiny") / "sub" / "whole.bin").read_bytes() == MEMBER
    assert index.asked[1].startswith("bytes=")
    assert in_cache(tmp_path) == sorted(whole(tmp_path))


def test_killed_while_converting(index, start, tmp_path):
    process = start(f"Path({str(tmp_path / 'building')!r}).touch(); time.sleep(60)")
    wait_for((tmp_path / "building").exists)
    told = []

    def waiting(what, done, total):
        if what.startswith("waiting") and not told:
            process.send_signal(signal.SIGKILL)
        told.append(what)

    assert (fetch("tiny", waiting) / "sub" / "whole.bin").read_bytes() == MEMBER
    assert told[0] == "waiting for another process"
    assert in_cache(tmp_path) == sorted(whole(tmp_path))
    assert len(index.asked) == 1  # the dead process's download is used


@pytest.mark.slow
def test_the_real_model(tmp_path, monkeypatch):
    """Download, convert, compare with what transformers reads from the same bytes, and let it speak."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.setenv("MOECL_CACHE", str(tmp_path))
    kept = {}

    def keep(content, folder, progress):
        (tmp_path / "model.gguf").write_bytes(content)
        kept["build"](content, folder, progress)

    asset = ASSETS["smollm2-135m-instruct"]
    kept["build"] = asset.build
    monkeypatch.setitem(ASSETS, asset.name, assets.Asset(**{**vars(asset), "build": keep}))
    folder = fetch(asset.name)
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    assert {n for n, _ in model.named_parameters()} == {n for n, _ in theirs.named_parameters()}
    for name, weight in theirs.named_parameters():
        assert torch.equal(model.get_parameter(name), weight), name
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    said = tokenizer.decode(model.generate(**prompt, max_new_tokens=4, do_sample=False)[0])
    assert said.startswith("The capital of France is Paris.")
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
