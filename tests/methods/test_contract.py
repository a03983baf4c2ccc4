"""What every method of the registry promises, each learned from end to end on a tiny stream."""

import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml

from moecl.config import load_task
from moecl.errors import ConfigError, RunError
from moecl.method_config import describe, method_names
from moecl.methods import REGISTRY, find_method
from moecl.model import MoECL
from moecl.results import Result
from moecl.store import Store
from moecl.task_trainer import TaskTrainer
from moecl.train import learn as learn_more
from runs import NAMES, learn, stream
from tiny_stream import task

METHODS = {
    **{
        name: {"name": name} | ({"rank": 8} if "rank" in method.config_type.model_fields else {})
        for name, method in REGISTRY.items()
    },
    "moe-cl, task expert alone": {"name": "moe-cl", "rank": 8, "experts": "task"},
    "moe-cl, shared expert alone": {"name": "moe-cl", "rank": 8, "experts": "shared"},
    "moe-cl, shared expert alone, live": {"name": "moe-cl", "rank": 8, "experts": "shared", "retention": "live"},
    "moe-cl, live": {"name": "moe-cl", "rank": 8, "retention": "live"},
    "moe-cl, no discriminator": {"name": "moe-cl", "rank": 8, "alpha": 0.0},
}
KEEPS = {"moe-cl", "per-task-lora", "mocl", *(name for name in METHODS if "," in name and "live" not in name)}
FULL = ("sequential-full", "osft")  # weights themselves take a smaller step than LoRAs


def train(name: str) -> dict[str, object]:
    return {"epochs": 4, "save_steps": 4, "precision": "fp32", "lr": 0.003 if name in FULL else 0.02}


@dataclass
class Run:
    """A finished run, and what was seen on the way."""

    folder: Path
    result: Result
    base: dict[str, torch.Tensor]
    gradients: set[str]


@pytest.fixture(scope="module", params=METHODS)
def run(request, tmp_path_factory, tiny_folder) -> Run:
    folder = tmp_path_factory.mktemp(re.sub(r"\W+", "-", request.param))
    config = stream(folder, tiny_folder, tasks=3, rows=48, method=METHODS[request.param], train=train(request.param))
    seen: dict[str, torch.Tensor] = {}
    gradients: set[str] = set()
    check = TaskTrainer.check

    def watch(trainer: TaskTrainer) -> None:
        learner = trainer.learner
        said = {id(p) for group in learner.method.groups().values() for p in group}
        for name, p in [*learner.model.base.named_parameters(), *learner.method.state.named_parameters()]:
            assert p.requires_grad == (id(p) in said), name
        gradients.update(learner.method.groups())
        seen.update({name: p.detach().clone() for name, p in learner.model.base.named_parameters()})
        check(trainer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TaskTrainer, "check", watch)
        result = learn(config, folder / "run")
    return Run(folder, result, seen, gradients)


def method_of(run: Run) -> type:
    return find_method(run.result.method)


def keeps(run: Run) -> bool:
    records = Store.open(run.folder / "run" / "store", readonly=True).tasks()
    return not any(record.live for record in records)


def test_it_learns(run):
    """What it answers changes, and is measured where the protocol says so."""
    R = run.result.R
    together = method_of(run).config_type.learns_together
    assert [row == [None] * 3 for row in R] == [False, together, together, False]
    assert R[-1] != R[0]
    assert (run.result.metrics["bwt"] is None) == together


def test_the_base_and_nothing_unsaid_is_trained(run, tiny_folder):
    """Contract 5: gradients only where the method says (watched while it learned), the base bitwise as it was."""
    fresh = MoECL.attach(str(tiny_folder), precision="fp32").base.state_dict()
    assert run.base
    assert all(torch.equal(p, fresh[name]) for name, p in run.base.items())
    assert run.gradients


def test_old_tasks_stay_where_it_says_so(run):
    """A task whose parts do not move on keeps its row of R, bitwise the same objects."""
    if keeps(run):
        for place in range(2):
            assert len({run.result.R[after][place] for after in range(place + 1, 4)}) == 1
        assert run.result.metrics["bwt"] == 0
    else:
        digests = run.result.digests
        moved = {part for part in digests[NAMES[0]] if digests[NAMES[0]][part] == digests[NAMES[2]].get(part)}
        assert moved, "tasks that move on share what moves"


def test_which_methods_keep_old_tasks(run, request):
    assert keeps(run) == (request.node.callspec.params["run"] in KEEPS)


def test_the_store_answers_as_the_run_did(run):
    """Contract 3, of what is loaded again: rows of all tasks in one batch answer as each alone."""
    model = MoECL.from_pretrained(run.folder / "run")
    assert list(model.bank) == NAMES
    with torch.no_grad():
        mixed = model(input_ids=torch.arange(3, 15).view(3, 4), task=NAMES).logits
        alone = torch.cat(
            [model(input_ids=torch.arange(3, 15).view(3, 4)[n : n + 1], task=NAMES[n]).logits for n in range(3)]
        )
    torch.testing.assert_close(mixed, alone, rtol=1e-5, atol=1e-5)


def test_the_same_seed_gives_the_same(run, tmp_path, request, tiny_folder):
    """Contract 8, and 7: stopped in the middle of a task and started again, it ends with the same R and objects."""
    params = request.node.callspec.params["run"]
    config = stream(tmp_path, tiny_folder, tasks=3, rows=48, method=METHODS[params], train=train(params))
    steps = [0]
    save = TaskTrainer._save_checkpoint

    def stop(trainer, *arguments):
        save(trainer, *arguments)
        steps[0] += 1
        if steps[0] == 5:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TaskTrainer, "_save_checkpoint", stop)
        with pytest.raises(KeyboardInterrupt):
            learn(config, tmp_path / "run")
    again = learn(config, tmp_path / "run")
    assert again.resumed == 1
    assert run.result.R == again.R
    assert again.digests == run.result.digests


def test_it_says_what_it_is(run):
    method = method_of(run)
    said = describe(method.name)
    assert all(said.values())
    assert said["name"] in method_names()
    source = sys.modules[method.__module__].__doc__ or ""
    assert "arxiv.org" in source or method.name in ("per-task-lora", "sequential-lora", "sequential-full", "joint")
    assert "Trains:" in source
    assert "Stores:" in source


def test_a_run_goes_on_with_a_new_task(run, tmp_path, tiny_folder):
    """What is kept for further learning serves it."""
    shutil.copytree(run.folder, tmp_path / "copy")
    added = task(tmp_path / "copy", "task3", 3)
    (tmp_path / "copy" / "task.yaml").write_text(yaml.safe_dump(added))
    new = load_task(tmp_path / "copy" / "task.yaml")
    if method_of(run).config_type.learns_together:
        with pytest.raises(RunError, match="all tasks at once"):
            learn_more(tmp_path / "copy" / "run", new)
    else:
        result = learn_more(tmp_path / "copy" / "run", new)
        assert result.tasks == [*NAMES, "task3"]
        assert None not in result.R[4]


@pytest.mark.parametrize("name", [name for name, method in REGISTRY.items() if method.config_type.keeps_rows])
def test_rows_of_several_tasks_need_a_head_in_common(name, tmp_path, tiny_folder):
    config = stream(tmp_path, tiny_folder, method={"name": name}, head="classifier")
    with pytest.raises(ConfigError, match=f"method: {name} trains on rows of several tasks at once.*set head: lm"):
        learn(config, tmp_path / "run")


@pytest.mark.parametrize("name", [name for name, method in REGISTRY.items() if not method.config_type.keeps_rows])
def test_heads_of_their_own(name, tmp_path, tiny_folder):
    config = stream(tmp_path, tiny_folder, method={"name": name}, head="classifier", train={"epochs": 1})
    result = learn(config, tmp_path / "run")
    assert result.metrics["fwt"] is None
    assert None not in result.R[-1]
