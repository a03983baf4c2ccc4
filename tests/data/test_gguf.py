"""The converted GGUF file against transformers' own, on a tiny Llama written with the `gguf` package."""

import errno
import json

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from moecl.data.gguf import convert
from moecl.errors import AssetError

HIDDEN, FFN, LAYERS, HEADS, KV = 64, 96, 2, 4, 2
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["Ġ t", "h e", "Ġt he", "Ġ Ġ"]
TEMPLATE = "{% for message in messages %}{{ message['content'] }}<|im_end|>{% endfor %}"
TEXTS = ["the the  cat", "In 2023, 100% of 3.14", "a<|im_end|>b", "日本 é\n\n\t x", "don't"]


def byte_tokens():
    """GPT-2's printable stand-ins for the 256 bytes."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    shown = {byte: chr(byte) for byte in plain}
    rest = (byte for byte in range(256) if byte not in shown)
    return [*shown.values(), *(chr(256 + i) for i, _ in enumerate(rest))]


def tokens():
    return [*SPECIAL, *byte_tokens(), *(merge.replace(" ", "") for merge in MERGES)]


def interleave(weight, heads):
    """The order of q and k rows that llama.cpp's converter writes."""
    rows, width = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, width).swapaxes(1, 2).reshape(rows, width)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokens()),
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV,
        max_position_embeddings=128,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        tie_word_embeddings=True,
    )
    made = LlamaForCausalLM(config)
    for weight in made.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    return made


@pytest.fixture(scope="module")
def gguf_file(model, tmp_path_factory):
    from gguf import GGMLQuantizationType, GGUFWriter, quants

    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_name("Tiny")
    writer.add_vocab_size(len(tokens()))
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV)
    writer.add_rope_freq_base(100000.0)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens())
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(tokens()) - len(SPECIAL)))
    writer.add_token_merges(MERGES)
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    names = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v"}
    names |= {"self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up"}
    names |= {"mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    names |= {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "model.layers": "blk"}
    for name, weight in model.named_parameters():
        value = weight.detach().numpy()
        if "q_proj" in name or "k_proj" in name:
            value = interleave(value, HEADS if "q_proj" in name else KV)
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        kind = GGMLQuantizationType.Q8_0 if "embd" in name else GGMLQuantizationType.Q4_1
        if value.ndim == 1:
            writer.add_tensor(name, value)
        else:
            writer.add_tensor(name, quants.quantize(np.ascontiguousarray(value), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def folder(gguf_file, tmp_path_factory):
    made = tmp_path_factory.mktemp("converted")
    convert(gguf_file, made)
    return made


@pytest.fixture(scope="module")
def theirs(gguf_file):
    return AutoModelForCausalLM.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name, dtype=torch.float32).eval()


def test_weights_are_transformers_bit_for_bit(folder, theirs, model):
    ours = AutoModelForCausalLM.from_pretrained(folder)
    assert type(ours) is LlamaForCausalLM
    assert dict(ours.named_parameters()).keys() == dict(model.named_parameters()).keys()
    for name, weight in theirs.named_parameters():
        assert torch.equal(ours.get_parameter(name), weight), name
    for name, weight in model.named_parameters():  # and near what was packed: rows are in the right order
        assert (ours.get_parameter(name) - weight).abs().max() < 0.1, name
    ids = torch.tensor([[5, 9, 100, 2, 77]])
    assert torch.equal(ours.eval()(ids).logits, theirs(ids).logits)


def test_the_config_is_clean(folder, model):
    said = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in said
    assert not any("name_or_path" in key for key in said)
    config = LlamaConfig.from_pretrained(folder)
    assert config.architectures == ["LlamaForCausalLM"]
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, 2)
    assert config.rms_norm_eps == 1e-5
    skipped = {"bos_token_id", "eos_token_id", "pad_token_id", "architectures", "dtype", "_name_or_path"}
    expected = {key: value for key, value in model.config.to_dict().items() if key not in skipped}
    assert {key: value for key, value in config.to_dict().items() if key not in skipped} == expected


def test_it_can_be_saved_again(folder, tmp_path):
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"] == 2


def test_tokenizer(folder, gguf_file):
    ours = AutoTokenizer.from_pretrained(folder)
    theirs = AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)
    for text in TEXTS:
        assert ours(text)["input_ids"] == theirs(text)["input_ids"], text
        assert ours.decode(ours(text)["input_ids"]) == text
    assert ours("a").keys() == {"input_ids", "attention_mask"}
    assert (ours.bos_token, ours.eos_token, ours.pad_token, ours.unk_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
        "<|endoftext|>",
    )
    assert ours.convert_tokens_to_ids("<|im_start|>") == 1
    assert ours.model_max_length == 128
    assert ours.chat_template == TEMPLATE
    assert len(ours) == len(tokens())


def test_digits_stand_alone(folder):
    """`smollm` splits them before anything else: the blanks before a number go together."""
    assert AutoTokenizer.from_pretrained(folder).tokenize("a  12") == ["a", "ĠĠ", "1", "2"]


def test_progress_counts_bytes(gguf_file, model, tmp_path):
    calls = []
    convert(gguf_file, tmp_path, lambda *call: calls.append(call))
    total = sum(weight.nbytes for weight in model.parameters())
    assert calls[-1] == ("converting", total, total)
    assert len(calls) == len(list(model.parameters()))


def test_the_same_bytes_each_time(folder, gguf_file, tmp_path):
    convert(gguf_file, tmp_path)
    for path in folder.iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes(), path.name


def test_a_full_disk_is_an_os_error(gguf_file, tmp_path, monkeypatch):
    def fill(*args, **kwargs):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("moecl.data.gguf.save_file", fill)
    with pytest.raises(OSError, match="No space left") as error:
        convert(gguf_file, tmp_path)
    assert error.value.errno == errno.ENOSPC


def cut(content):
    return content[: len(content) // 2]


def cut_in_the_metadata(content):
    return content[:1000]


def not_gguf(content):
    return b"PK" + content[2:]


def nothing(content):
    return b""


def other_model(content):
    return content.replace(b"llama.block_count", b"phi33.block_count")


def no_such_tensor(content):
    return content.replace(b"blk.1.attn_q.weight", b"blk.1.attn_x.weight")


@pytest.mark.parametrize("damage", [cut, cut_in_the_metadata, not_gguf, nothing, other_model, no_such_tensor])
def test_a_damaged_file_is_refused_in_one_line(gguf_file, tmp_path, damage):
    (tmp_path / "bad.gguf").write_bytes(damage(gguf_file.read_bytes()))
    with pytest.raises(
        AssetError, match=r"bad\.gguf: not a whole GGUF file of a Llama \(.*\); fetch it again"
    ) as error:
        convert(tmp_path / "bad.gguf", tmp_path)
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["bad.gguf"]
