"""A task or an expert as a PEFT adapter: PEFT makes of the base what we make of it; a stand-in is measured first."""

import warnings
from pathlib import Path

import pytest
import torch

from moecl.adapter import adapter, write_folder
from moecl.backbone import Backbone
from moecl.bank import Entry
from moecl.config import Task
from moecl.export import one_expert
from moecl.method_config import MoECLConfig
from moecl.model import MoECL
from tiny import FAMILIES, random_parts, tiny_batch, tiny_model

peft = pytest.importorskip("peft")


def attached(family: str = "llama", layers: int | str = "all") -> MoECL:
    return MoECL(Backbone(tiny_model(family), None, family), MoECLConfig(rank=4, adapt_layers=layers))


def logits(model: MoECL, parts: object) -> torch.Tensor:
    model.bank["a"] = Entry(Task(name="a", kind="generation"), parts)
    with torch.no_grad():
        return model(**tiny_batch(), task="a").logits


def by_peft(folder: Path, family: str) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)  # PEFT's own
        loaded = peft.PeftModel.from_pretrained(tiny_model(family), folder)
        with torch.no_grad():
            return loaded(**tiny_batch()).logits


@pytest.mark.parametrize("layers", ["all", 1])
@pytest.mark.parametrize("family", FAMILIES)
def test_peft_runs_an_expert_as_we_do(tmp_path, family, layers):
    model = attached(family, layers)
    parts = random_parts(model.geometry)
    for which in ("task", "shared"):
        lora = one_expert(Entry(Task(name="a", kind="generation"), parts), which)
        write_folder(tmp_path / which, adapter(model, lora))
        found = by_peft(tmp_path / which, family)
        assert torch.allclose(found, logits(model, lora), rtol=1e-5, atol=1e-5)
        assert not torch.allclose(found, bare(model), atol=1e-2)
    assert not torch.allclose(by_peft(tmp_path / "task", family), by_peft(tmp_path / "shared", family), atol=1e-2)


def bare(model: MoECL) -> torch.Tensor:
    with torch.no_grad():
        return model(**tiny_batch()).logits
