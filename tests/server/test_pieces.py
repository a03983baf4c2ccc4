"""Bytes and offsets of tokens, which join to the text whatever characters it is of."""

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from moecl.generation import Token
from moecl.server.pieces import SPACE, Pieces
from moecl.server.spoken import Offsets, text_logprobs, token_logprob
from tiny import EOS, tiny_tokenizer

TEXTS = [" super?\n", "super", "  \n café ☕️ 東京!", " naïve 🙂🙂\u0301", "great <0x41> \u0120"]


def sentencepiece() -> PreTrainedTokenizerFast:
    """Of characters, and of bytes for those that it lacks."""
    letters = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), SPACE, *"superfancgt?!<0x41>\n"]
    vocabulary = {letter: place for place, letter in enumerate(dict.fromkeys(letters))}
    found = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    spaces = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    found.decoder = decoders.Sequence(spaces)
    return PreTrainedTokenizerFast(tokenizer_object=found, eos_token="</s>")


def words() -> PreTrainedTokenizerFast:
    found = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "dog": 2, "</s>": 3}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=found, eos_token="</s>")


def logprobs(pieces: Pieces, ids: list[int]):
    return [token_logprob(Token(token, -1.0, ((token, -1.0),)), pieces) for token in ids]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("tokenizer", [tiny_tokenizer(), sentencepiece()], ids=["bytes", "sentencepiece"])
def test_bytes_join_to_the_text_and_offsets_point_into_it(tokenizer, text):
    spaced = SPACE in tokenizer.get_vocab()
    found = logprobs(Pieces(tokenizer), tokenizer(text.replace(" ", SPACE) if spaced else text)["input_ids"])
    raw = [bytes(token.bytes) for token in found]
    assert b"".join(raw).decode() == text
    before = [b"".join(raw[:place]).decode(errors="ignore") for place in range(len(raw))]
    assert text_logprobs(found, Offsets()).text_offset == [len(one.lstrip()) for one in before]


def test_offsets_are_those_of_the_trimmed_text():
    tokenizer = tiny_tokenizer()
    told = text_logprobs(logprobs(Pieces(tokenizer), tokenizer(" super? no")["input_ids"]), Offsets())
    assert list(zip(told.tokens, told.text_offset, strict=True)) == [(" super", 0), ("?", 5), (" no", 6)]


def test_tokens_that_are_no_text_are_told_apart():
    tokenizer = tiny_tokenizer()
    pieces, [first, second] = Pieces(tokenizer), tokenizer("\u00e9")["input_ids"]
    assert [pieces(first), pieces(second)] == [("bytes:\\xc3", b"\xc3"), ("bytes:\\xa9", b"\xa9")]
    assert pieces(EOS) == ("</s>", b"")
    top = ((first, -1.0), (second, -2.0))
    [told] = text_logprobs([token_logprob(Token(first, -1.0, top), pieces)], Offsets()).top_logprobs
    assert told == {"bytes:\\xc3": -1.0, "bytes:\\xa9": -2.0}


def test_other_tokenizers_words():
    pieces = Pieces(words())
    assert [pieces(token) for token in (2, 3, 99)] == [("dog", b"dog"), ("</s>", b""), ("", b"")]
