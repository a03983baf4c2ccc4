"""The base: loaded whole or refused in one line, on a device and in a dtype that were asked for or can be."""

import json
import shutil
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.utils import logging

from moecl import backbone
from moecl.backbone import (
    batch_tokens,
    dtype_name,
    load_backbone,
    quiet,
    resolve_device,
    resolve_precision,
    weights_sha256,
)
from moecl.errors import BaseError, ConfigError
from tiny import tiny_batch, tiny_model


def test_a_folder_is_loaded(tiny_folder, capfd):
    loaded = load_backbone(str(tiny_folder))
    assert loaded.id == str(tiny_folder)
    assert not loaded.model.training
    assert loaded.tokenizer("fine")["input_ids"]
    expected = tiny_model(vocab_size=384)
    assert torch.equal(loaded.model(**tiny_batch()).logits, expected(**tiny_batch()).logits)
    assert weights_sha256(loaded.model) == weights_sha256(expected)
    assert capfd.readouterr() == ("", "")


def test_a_batch_suits_the_device():
    assert [batch_tokens(device) for device in ("cpu", "cuda:1", "mps")] == [4096, 32768, 8192]


@pytest.mark.parametrize(("precision", "name"), [("fp32", "float32"), ("bf16", "bfloat16"), ("fp16", "float16")])
def test_dtypes(tiny_folder, precision, name):
    assert dtype_name(load_backbone(str(tiny_folder), precision).model) == name


def test_an_asset_is_fetched_with_progress(tiny_folder, monkeypatch):
    said = []

    def resolve(name, progress):
        progress(name, 1, 2)
        return str(tiny_folder)

    monkeypatch.setattr(backbone.assets, "resolve_base", resolve)
    loaded = load_backbone("smollm2-135m-instruct", progress=lambda *told: said.append(told))
    assert loaded.id == "smollm2-135m-instruct"
    assert said == [("smollm2-135m-instruct", 1, 2), ("loading the base", 0, 0)]


def spoiled(tiny_folder, folder, how: str):
    shutil.copytree(tiny_folder, folder)
    weights = folder / "model.safetensors"
    if how == "no weights":
        weights.unlink()
    elif how == "truncated":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif how == "no config":
        (folder / "config.json").unlink()
    elif how == "broken config":
        (folder / "config.json").write_text("{")
    elif how == "no tokenizer":
        for path in [*folder.glob("tokenizer*"), *folder.glob("special*")]:
            path.unlink()
    elif how == "unknown":
        (folder / "config.json").write_text(json.dumps({"model_type": "perceptron"}))
    elif how == "other shapes":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 64}))
    else:
        tensors = load_file(weights)
        name = next(name for name in tensors if "mlp" in name)
        save_file({key: tensor for key, tensor in tensors.items() if key != name}, weights, {"format": "pt"})
    return folder


@pytest.mark.parametrize(
    "how",
    [
        "no weights",
        "truncated",
        "no config",
        "broken config",
        "no tokenizer",
        "unknown",
        "other shapes",
        "a weight less",
    ],
)
def test_what_cannot_be_loaded_is_one_line(tiny_folder, tmp_path, how):
    folder = spoiled(tiny_folder, tmp_path / "base", how)
    with pytest.raises(BaseError, match="base: ") as caught:
        load_backbone(str(folder))
    message = str(caught.value)
    assert "\n" not in message
    assert str(folder) in message
    assert how != "a weight less" or "lacks 1 of the weights of a LlamaForCausalLM (model.layers" in message


def test_a_folder_of_ones_own(tiny_folder, monkeypatch):
    monkeypatch.setenv("HOME", str(tiny_folder.parent))
    assert load_backbone(f"~/{tiny_folder.name}").id == f"~/{tiny_folder.name}"


def test_a_mistyped_asset_is_not_sought_on_the_hub(monkeypatch):
    monkeypatch.setattr(backbone.AutoModelForCausalLM, "from_pretrained", None)
    with pytest.raises(BaseError, match=r"^base: no asset 'smollm2-135m' \(did you mean 'smollm2-135m-instruct'\?\)$"):
        load_backbone("smollm2-135m")


def test_a_name_that_is_nowhere(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # it tries for a minute where there is no net
    with pytest.raises(BaseError, match=r"cannot load 'user/nothing-such'.*smollm2-135m-instruct"):
        load_backbone("user/nothing-such")


def test_quiet_leaves_the_settings_as_they_were():
    level = logging.get_verbosity()
    shown = logging.is_progress_bar_enabled()
    with quiet():
        assert not logging.is_progress_bar_enabled()
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == (level, shown)


# --- device and precision ---


def test_devices(monkeypatch):
    assert resolve_device("cpu") == "cpu"
    for device, why in (("cuda:99", "cannot be used here"), ("nonsense", "is none of auto, cpu, cuda")):
        with pytest.raises(ConfigError, match=f"device: '{device}' {why}") as caught:
            resolve_device(device)
        assert "\n" not in str(caught.value)
    for cuda, mps, expected in [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")]:
        monkeypatch.setattr(torch.cuda, "is_available", lambda cuda=cuda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda mps=mps: mps)
        assert resolve_device("auto") == expected


@pytest.mark.parametrize(
    ("device", "units", "expected"),
    [
        ("cpu", True, "bf16"),
        ("cpu", False, "fp32"),
        ("cuda", (8, 0), "bf16"),
        ("cuda:1", (7, 5), "fp32"),
        ("mps", 0, "fp32"),
    ],
)
def test_precision_is_chosen_from_what_the_processor_can_do(monkeypatch, device, units, expected):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: units)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: units)
    precision, why = resolve_precision("auto", device)
    assert precision == expected
    assert why
    assert resolve_precision("bf16", device) == ("bf16", "as asked")


# --- the digest ---


def test_the_digest_sees_names_types_shapes_and_bytes():
    base = tiny_model()
    digests = {
        weights_sha256(base),
        weights_sha256(tiny_model(seed=1)),
        weights_sha256(tiny_model(dtype=torch.bfloat16)),
    }
    weight = next(base.parameters())
    with torch.no_grad():
        weight[0, 0] += 1e-7
        digests.add(weights_sha256(base))
        weight.data = weight.data.reshape(weight.shape[1], weight.shape[0])
        digests.add(weights_sha256(base))
    assert len(digests) == 5
    assert weights_sha256(tiny_model()) in digests


def test_the_digest_depends_on_no_layout():
    base, other = tiny_model(), tiny_model()
    weight = other.model.layers[0].mlp.up_proj.weight
    weight.data = weight.data.T.contiguous().T
    assert weights_sha256(base) == weights_sha256(other)
    with warnings.catch_warnings(record=True) as caught:
        weights_sha256(base)
    assert caught == []


def test_a_folder_that_is_gone(tmp_path):
    with pytest.raises(BaseError, match=r"no such folder; restore it, or give a hub id or an asset: smollm2"):
        load_backbone(str(tmp_path / "gone"))
