"""What the README and the examples promise can be done as written."""

import re
import tomllib
from importlib import resources
from pathlib import Path

import pytest

import moecl
from command_lines import calls, command, parse
from moecl import MoECL
from moecl.config import load_stream
from moecl.data.benchmarks import BENCHMARKS, SPLITS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
STREAMS = [*sorted((ROOT / "examples").glob("[!b]*.yaml")), *sorted(Path(moecl.__file__).parent.glob("*.yaml"))]


def test_the_python_block_runs_as_it_is(tiny_folder, tmp_path, capsys):
    [block] = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(compile(block, "README.md", "exec"), {"base": str(tiny_folder), "folder": tmp_path / "store"})
    assert capsys.readouterr().out.strip() in ("good", "bad")
    assert list(MoECL.from_pretrained(tmp_path / "store").bank) == ["mood"]


def test_every_command_line_parses():
    found = calls(README)
    assert {words[0] for words in found} >= {"init", "check", "train", "learn", "predict", "eval", "tasks"}
    for words in found:
        parse(words)


def test_every_command_that_is_named_is_one():
    named = [words.split() for words in re.findall(r"`moecl ([a-z][a-z -]*)`", README)]
    assert ["train"] in named
    for words in named:
        command([word for word in words if not word.startswith("-")])


def test_every_file_that_is_named_is_there():
    source = Path(moecl.__file__).parent
    for name in re.findall(r"`(\w+\.py)`", README):
        assert (source / name).is_file(), name
    for name in re.findall(r"\]\(([\w/.-]+)\)", README):
        assert (ROOT / name).is_file(), name


@pytest.mark.parametrize("path", STREAMS, ids=lambda path: path.stem)
def test_every_stream_is_valid(path):
    config = load_stream(path)
    for task in config.tasks:
        for source in (task.train, task.validation, task.test):
            if source and source.startswith("asset:"):
                benchmark, name, split = source.removeprefix("asset:").split("/")
                assert name in BENCHMARKS[benchmark]
                assert split in SPLITS


def test_the_wheel_holds_what_the_commands_read():
    pattern = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["moecl"]
    assert {"py.typed", "*.yaml"} <= set(pattern)
    for name in ("py.typed", "demo.yaml", "template.yaml"):
        assert resources.files("moecl").joinpath(name).is_file()
