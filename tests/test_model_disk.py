"""Contract 6: what is saved comes back bitwise, learns on as if it had never been away, or is refused."""

import json
from pathlib import Path

import pytest
import torch

from moecl import model as model_module
from moecl.config import MoECLConfig
from moecl.errors import BaseError, StoreError
from moecl.model import MoECL
from moecl.store import Store
from tiny import tiny_batch, tiny_model, tiny_tokenizer
from tiny_tasks import labelled, stir, task


def stored(folder: Path, tmp_path: Path, **settings) -> tuple[MoECL, Path]:
    model = MoECL.attach(str(folder), MoECLConfig(rank=4, **settings), precision="fp32")
    for seed, name in enumerate("ab"):
        model.add_task(task(name))
        stir(model, seed)
    model.finish_task()
    path = tmp_path / "store"
    model.eval().save_pretrained(path)
    return model, path


def test_saved_and_loaded_is_bitwise_the_same(tiny_folder, tmp_path):
    model, path = stored(tiny_folder, tmp_path)
    batch = tiny_batch()
    expected = model(**batch, task=["a", None, "b"]).logits
    for place in (path, tmp_path):  # a store, and a folder with a store in it, as a run's is
        loaded = MoECL.from_pretrained(place)
        assert torch.equal(loaded(**batch, task=["a", None, "b"]).logits, expected)
        assert loaded.bank["a"].task == model.bank["a"].task
        assert loaded.config == model.config
        assert not loaded.training
    with pytest.raises(StoreError, match="already a store"):
        model.save_pretrained(path)


def test_classifier_heads_are_stored(tiny_folder, tmp_path):
    model = MoECL.attach(str(tiny_folder), MoECLConfig(rank=4))
    model.add_task(task("a", "classifier", ("x", "y", "z")))
    stir(model)
    model.save_pretrained(tmp_path / "s")
    batch = tiny_batch()
    assert torch.equal(
        MoECL.from_pretrained(tmp_path / "s")(**batch, task="a").logits, model.eval()(**batch, task="a").logits
    )


def teach(model: MoECL, name: str, steps: int = 3) -> None:
    model.add_task(task(name))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    model.train()
    for _ in range(steps):
        model(**labelled(tiny_batch()), task=name).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.finish_task()
    model.eval()


@pytest.mark.parametrize("retention", ["exact", "live"])
@pytest.mark.parametrize("gate", ["task", "shared"])
def test_a_loaded_model_learns_on(tiny_folder, tmp_path, retention, gate):
    """As one that was never saved: the shared expert, the discriminator and its memory are taken up."""
    model, path = stored(tiny_folder, tmp_path, retention=retention, gate=gate)
    loaded = MoECL.from_pretrained(path)
    before = model(**tiny_batch(), task="a").logits
    for one in (model, loaded):
        teach(one, "c")
    for name in "abc":
        assert torch.equal(model(**tiny_batch(), task=name).logits, loaded(**tiny_batch(), task=name).logits)
    assert torch.equal(model(**tiny_batch(), task="a").logits, before) == (retention == "exact")


def test_a_stores_parts_are_one_in_a_batch_and_take_gradients(tiny_folder, tmp_path):
    _, path = stored(tiny_folder, tmp_path)
    again = MoECL.from_pretrained(path)
    one, other = again.bank["a"].parts, again.bank["a"].parts
    assert one is not other
    call = again.call_with([one, other, one])
    assert (len(call.parts), call.rows) == (1, None)
    with torch.inference_mode():  # as an engine does, which may be the first to ask
        fresh = MoECL.from_pretrained(path)
        parts = fresh.bank["a"].parts
    assert not any(p.is_inference() for module in parts.own_modules() for p in module.parameters())


def test_saving_leaves_the_open_task_open(tiny_folder, tmp_path):
    model, _ = stored(tiny_folder, tmp_path)
    model.add_task(task("c"))
    stir(model, 9)
    model.save_pretrained(tmp_path / "during")
    loaded = MoECL.from_pretrained(tmp_path / "during")
    assert torch.equal(loaded(**tiny_batch(), task="c").logits, model.eval()(**tiny_batch(), task="c").logits)
    model.train()(**labelled(tiny_batch()), task="c").loss.backward()
    assert all(p.grad is not None for p in model.bank["c"].parts.task.parameters())
    model.finish_task()
    for one in (model, loaded):
        one.add_task(task("d"))
        assert one.learner.adversary.classes == 4
        assert one.learner.adversary.mean.shape[1] == 3


def test_another_base_is_refused(tiny_folder, tmp_path):
    _, path = stored(tiny_folder, tmp_path)
    other = tiny_model(vocab_size=len(tiny_tokenizer()), seed=1)
    with pytest.raises(BaseError, match="not on this one") as caught:
        MoECL.from_pretrained(path, base=other)
    assert "\n" not in str(caught.value)
    with pytest.raises(BaseError, match=r"float32.*bfloat16"):
        MoECL.from_pretrained(path, base=tiny_model(vocab_size=len(tiny_tokenizer()), dtype=torch.bfloat16))
    MoECL.from_pretrained(path, base=tiny_model(vocab_size=len(tiny_tokenizer())))


@pytest.mark.parametrize("damage", ["missing", "truncated", "altered"])
def test_a_damaged_object_is_refused(tiny_folder, tmp_path, damage):
    _, path = stored(tiny_folder, tmp_path)
    found = path / "objects" / f"{Store.open(path).digests('b')['task']}.safetensors"
    data = found.read_bytes()
    if damage == "missing":
        found.unlink()
    else:
        found.write_bytes(data[:-8] if damage == "truncated" else data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(StoreError, match=damage) as caught:
        MoECL.from_pretrained(path)(**tiny_batch(), task="b")
    batch = tiny_batch()
    assert MoECL.from_pretrained(path)(**batch, task="a").logits.isfinite().all(), "the others answer"
    assert "task 'b'" in str(caught.value)
    assert str(found) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("change", ["layers", "swapped", "form", "training"])
def test_what_does_not_fit_is_one_line(tiny_folder, tmp_path, change):
    _, path = stored(tiny_folder, tmp_path)
    manifest = json.loads((path / "manifest.json").read_text())
    for record in manifest["tasks"]:
        if change == "layers":
            record["settings"]["adapt_layers"] = 1
        elif change == "swapped":
            record["parts"]["task"] = record["parts"]["gate"]
        elif change == "form":
            record["form"] = "later"
    if change == "training":
        (path / "training" / f"memory-{manifest['training']['memory']}.safetensors").unlink()
        del manifest["training"]["memory"]
    (path / "manifest.json").write_text(json.dumps(manifest))

    def use() -> None:
        loaded = MoECL.from_pretrained(path)
        loaded.add_task(task("c"))
        loaded(**tiny_batch(), task="a")

    message = {"form": "upgrade", "training": "further learning"}.get(change, "does not fit")
    with pytest.raises(StoreError, match=message) as caught:
        use()
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_a_bf16_base_comes_back_in_bf16(tmp_path, tiny_folder):
    model = MoECL.attach(str(tiny_folder), precision="bf16")
    model.add_task(task())
    stir(model)
    model.save_pretrained(tmp_path / "s")
    loaded = MoECL.from_pretrained(tmp_path / "s")
    assert loaded.base.dtype == torch.bfloat16
    assert {p.dtype for p in loaded.bank["a"].parts.task.parameters()} == {torch.float32}
    assert torch.equal(loaded(**tiny_batch(), task="a").logits, model.eval()(**tiny_batch(), task="a").logits)


# --- the hub, without a network ---


def test_push_to_hub_and_back(tiny_folder, tmp_path, monkeypatch):
    model, _ = stored(tiny_folder, tmp_path)
    uploads = []

    class Api:
        def __init__(self, token=None):
            pass

        def create_repo(self, repo_id, **kwargs):
            return type("Repo", (), {"repo_id": repo_id})

        def upload_folder(self, *, folder_path, ignore_patterns, repo_id, **kwargs):
            uploads.append((repo_id, ignore_patterns))
            (tmp_path / "hub").mkdir()
            for name in ("manifest.json", "README.md"):
                (tmp_path / "hub" / name).write_bytes((folder_path / name).read_bytes())
            for name in ("objects", "training"):  # empty folders do not get to the hub
                (folder_path / name).rename(tmp_path / "hub" / name)
            return "https://hub/commit"

    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", Api)
    monkeypatch.setattr(model_module, "snapshot_download", lambda repo, **kwargs: str(tmp_path / "hub"))
    assert model.push_to_hub("user/model", private=True) == "https://hub/commit"
    assert uploads == [("user/model", [".lock", "audit.jsonl"])]
    assert "base_model" not in (tmp_path / "hub" / "README.md").read_text(), "a folder is no id of the hub"
    assert str(tiny_folder) not in (tmp_path / "hub" / "manifest.json").read_text()
    loaded = MoECL.from_pretrained("user/model", base=str(tiny_folder), revision="main")
    assert torch.equal(loaded(**tiny_batch(), task="b").logits, model(**tiny_batch(), task="b").logits)


@pytest.mark.parametrize("name", ["nowhere/to-be-found", "./no/such/folder"])
def test_nothing_there_is_one_line(name):
    with pytest.raises(StoreError, match="no such folder") as caught:
        MoECL.from_pretrained(name)
    assert "\n" not in str(caught.value)


def test_an_empty_folder_is_no_store(tmp_path):
    with pytest.raises(StoreError, match="empty folder"):
        MoECL.from_pretrained(tmp_path)
