"""A method of another package: one file and one entry point."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from moecl.results import Result
from tiny_stream import write_stream

PLUGIN = '''
"""Half a LoRA: sequential LoRA with another name and a setting of its own."""

from typing import ClassVar

from pydantic import Field

from moecl.method_config import LoRAConfig
from moecl.methods.one_lora import LoRAMethod


class HalfConfig(LoRAConfig):
    """Half a LoRA."""

    trains: ClassVar[str] = "half a LoRA"
    stores: ClassVar[str] = "one"

    name: str = "half-lora"
    share: float = Field(default=0.5, gt=0, description="what is left of the LoRA's scale")


class Half(LoRAMethod):
    name, config_type = "half-lora", HalfConfig
    shared = True

    @property
    def scale(self):
        return self.config.share * super().scale
'''


@pytest.fixture
def moecl(tmp_path: Path):
    """The command line where the plug-in is installed."""
    site = tmp_path / "site"
    made = site / "half_lora-1.0.dist-info"
    made.mkdir(parents=True)
    (site / "half_lora.py").write_text(PLUGIN)
    (made / "METADATA").write_text("Metadata-Version: 2.1\nName: half-lora\nVersion: 1.0\n")
    (made / "entry_points.txt").write_text("[moecl.methods]\nhalf-lora = half_lora:Half\n")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])}

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "moecl", *words]
        return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)

    return run


def test_a_plugin_is_listed_learned_and_explained(moecl, tmp_path, tiny_folder):
    assert "half-lora" in moecl("methods").stdout
    settings = {"method": {"name": "half-lora", "rank": 2, "share": 0.25}, "train": {"epochs": 1}}
    path = write_stream(tmp_path / "stream", tiny_folder, **settings)
    done = moecl("train", str(path), "-o", "run")
    assert done.returncode == 0, done.stderr
    assert Result.load(tmp_path / "run" / "result.json").method == "half-lora"
    done = moecl("train", str(path), "-o", "other", "--set", "method.shar=1")
    assert done.returncode == 2
    assert "method.shar: unknown key (did you mean 'share'?)" in done.stderr


def test_a_broken_plugin_is_one_line(moecl, tmp_path, tiny_folder):
    (tmp_path / "site" / "half_lora.py").write_text("import nothing_such")
    path = write_stream(tmp_path / "stream", tiny_folder, method={"name": "half-lora"})
    done = moecl("train", str(path), "-o", "run")
    assert done.returncode == 2
    assert "method half-lora: half_lora:Half cannot be loaded" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
