"""Token ids are those of training on the whole string, cuts fall on the text alone, batches are full and short."""

from functools import cache

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from moecl.config import Task
from moecl.data.encode import MIN_TEXT, Encoded, Encoder, collate, plan_batches, token_batches
from moecl.data.task import Example, read_split
from moecl.errors import BaseError, ConfigError, DataError
from tiny import WORDS

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
BOS, END, UNK = 1, 2, 3
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
# Llama 3's and Qwen 2's: punctuation takes the line breaks behind it into one token.
GLUED = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CORPUS = [WORDS] * 4 + [f"{word}.\n Answer: {word}" for word in WORDS.split()] * 4


def byte_level(split=None):
    tokenizer = Tokenizer(models.BPE())
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)
    parts = [pre_tokenizers.Split(Regex(split), "isolated"), level] if split else [level]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(vocab_size=420, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False),
    )
    return tokenizer


def unigram():
    """As T5 and XGLM: spaces become marks, and one is put in front of the text."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=260, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def sentencepiece_bpe():
    """As Llama 2: no splitting at all, so that merges may cross words; unknown characters become bytes."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(vocab_size=520, special_tokens=SPECIAL + BYTES, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def template_of(single):
    return processors.TemplateProcessing(single=single, special_tokens=[("<s>", BOS), ("</s>", END)])


KINDS = {
    "byte-level": (byte_level, None),
    "glued breaks, BOS": (lambda: byte_level(GLUED), "<s> $A"),
    "unigram, EOS": (unigram, "$A </s>"),
    "sentencepiece, BOS and EOS": (sentencepiece_bpe, "<s> $A </s>"),
}
ONES_BOS = {name: [BOS] if single and "<s>" in single else [] for name, (_, single) in KINDS.items()}
CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@cache
def made(kind):
    build, single = KINDS[kind]
    tokenizer = build()
    if single:
        tokenizer.post_processor = template_of(single)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=CHAT,
    )


def task(instruction="About {text}\nAnswer:", labels=("positive", "negative"), **more):
    return Task(name="t", kind="classification", instruction=instruction, labels=list(labels), **more)


def generation(instruction="{prompt}"):
    return Task(name="g", kind="generation", instruction=instruction)


def row(text, label=None, completion=None, name="text"):
    return Example(text, {name: text}, label, completion, None, "f:1")


def plain(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


every_kind = pytest.mark.parametrize("kind", KINDS)
words = st.lists(
    st.sampled_from([*WORDS.split(), "ünïcödé", "日本語", "🙂", "a\nb", "...", "\t", "x" * 9]), min_size=1, max_size=60
)
texts = st.one_of(words.map(" ".join), st.text(st.characters(codec="utf-8"), min_size=1, max_size=80)).filter(str.strip)


@every_kind
@pytest.mark.parametrize(
    "instruction", ["{text}\nAnswer:", "{text}\nAnswer: ", "{text}\nAnswer:\n", "{text}", "Is {text} bad or good"]
)
def test_answers_are_tokenised_as_in_the_whole_string(kind, instruction):
    tokenizer = made(kind)
    encoder = Encoder(tokenizer, task(instruction, ["positive", "very bad", "Science"]), 128)
    shared = instruction.rstrip(" ")
    space = "" if shared.endswith("\n") else " "
    for label in ("positive", "very bad", "Science"):
        (got,) = encoder.encode([row("the movie was great", label)])
        whole = shared.replace("{text}", "the movie was great") + space + label
        assert got.input_ids + got.answer_ids == [*ONES_BOS[kind], *plain(tokenizer, whole), END]
        assert got.answer_ids == [*encoder.answers[got.label], END]


@every_kind
@settings(max_examples=60, deadline=None)
@given(text=texts, completion=texts)
@example(text="x\n", completion="y")
@example(text="x ", completion=" y")
def test_completions_are_tokenised_as_in_the_whole_string(kind, text, completion):
    tokenizer = made(kind)
    (got,) = Encoder(tokenizer, generation(), 4096).encode([row(text, completion=completion, name="prompt")])
    prompt = text.rstrip(" ")
    glued = prompt[-1:].isspace() or completion[0].isspace()
    before, whole = plain(tokenizer, prompt), plain(tokenizer, prompt + ("" if glued else " ") + completion)
    assert got.input_ids == ONES_BOS[kind] + before
    assert got.answer_ids[-1] == END
    if whole[: len(before)] == before:  # the tokenizer splits there
        assert got.answer_ids == [*whole[len(before) :], END]


@every_kind
@settings(max_examples=60, deadline=None)
@given(text=texts, room=st.integers(MIN_TEXT, 60), label=st.sampled_from(["positive", "very bad"]))
def test_cuts_take_the_end_of_the_text_alone(kind, text, room, label):
    tokenizer = made(kind)
    labels = ("positive", "very bad")
    longest = max(map(len, Encoder(tokenizer, task(labels=labels), 256).answers))
    fixed = len(ONES_BOS[kind]) + len(plain(tokenizer, "About \nAnswer:")) + longest + 1
    encoder = Encoder(tokenizer, task(labels=labels), fixed + room)
    try:
        (got,) = encoder.encode([row(text, label)])
    except DataError as error:  # tokens that join text and instruction may take the last of the room
        assume("fewer than 16" not in str(error))
        raise
    assert len(got.input_ids) + longest + 1 <= fixed + room
    assert got.answer_ids == [*encoder.answers[labels.index(label)], END]
    whole = len(ONES_BOS[kind]) + len(plain(tokenizer, f"About {text}\nAnswer:"))
    if not got.cut:
        assert (len(got.input_ids), got.lost) == (whole, 0)
        return
    assert got.lost == whole - len(got.input_ids) > 0
    kept = [f"About {text[:end]}\nAnswer:" for end in range(len(text))]
    matches = [end for end, cut in enumerate(kept) if ONES_BOS[kind] + plain(tokenizer, cut) == got.input_ids]
    assert matches, "the prompt is the instruction around a prefix of the text"
    assert len(plain(tokenizer, text[: matches[-1]])) >= MIN_TEXT - 1  # a character may be several tokens


def test_the_prompt_does_not_depend_on_the_label_or_on_answers():
    encoder = Encoder(made("byte-level"), task(labels=["a", "superb and lovely food"]), 48)
    long = "great food " * 40
    one, other, none = encoder.encode([row(long, "a"), row(long, "superb and lovely food"), row(long)])
    assert one.input_ids == other.input_ids == none.input_ids
    assert (one.label, other.label, none.label, none.answer_ids) == (0, 1, -1, [])
    (bare,) = encoder.encode([row(long, "a")], answers=False)
    assert (bare.input_ids, bare.answer_ids, bare.label) == (one.input_ids, [], 0)


def test_a_cut_leaves_as_many_whole_tokens_as_fit():
    tokenizer = made("byte-level")
    encoder = Encoder(tokenizer, task(), 40)
    (got,) = encoder.encode([row("great food " * 40, "positive")])
    assert len(got.input_ids) + 1 + max(map(len, encoder.answers)) == 40
    text = tokenizer.decode(got.input_ids)
    assert text.startswith("About great food")
    assert text.endswith("\nAnswer:")


def test_too_little_room_is_refused():
    tokenizer = made("byte-level")
    fixed = len(plain(tokenizer, "About \nAnswer:")) + 1 + len(plain(tokenizer, " positive"))
    Encoder(tokenizer, task(labels=["positive", "bad"]), fixed + MIN_TEXT)
    with pytest.raises(
        DataError, match=f"task 't': max_length: .*fewer than 16 .*set it to {fixed + MIN_TEXT} or more"
    ):
        Encoder(tokenizer, task(labels=["positive", "bad"]), fixed + MIN_TEXT - 1)
    with_title = task("{title}: {text}\nAnswer:")
    long_title = Example("bad", {"title": "great " * 90, "text": "bad"}, "positive", None, None, "f.jsonl:3")
    with pytest.raises(DataError, match=r"f.jsonl:3: .* tokens are cut to max_length 64, .*fewer than 16"):
        Encoder(tokenizer, with_title, 64).encode([long_title])
    long_answer = row("2+2=", completion="great " * 90, name="prompt")
    with pytest.raises(DataError, match=r"f:1: .*fewer than 16"):
        Encoder(tokenizer, generation(), 64).encode([long_answer])


def test_a_classifier_head_needs_no_room_for_answers():
    encoder = Encoder(made("byte-level"), task(head="classifier"), 40)
    (got,) = encoder.encode([row("great food " * 40, "negative")])
    assert (len(got.input_ids), got.answer_ids, got.label) == (40, [], 1)


def test_generation_keeps_room_for_an_answer_to_come():
    encoder = Encoder(made("byte-level"), generation(), 40)
    long = row("great food " * 40, completion="yes", name="prompt")
    (bare,) = encoder.encode([long], answers=False, reserve=10)
    assert (len(bare.input_ids), bare.answer_ids, bare.label) == (30, [], -1)
    (full,) = encoder.encode([long])
    assert len(full.input_ids) + len(full.answer_ids) == 40


def dialogue(*contents, completion=None):
    roles = ["system", "user", "assistant", "user"]
    messages = tuple({"role": role, "content": content} for role, content in zip(roles, contents, strict=False))
    return Example(None, {}, None, completion, messages, "f:1")


@every_kind
def test_dialogues_use_the_chat_template(kind):
    tokenizer = made(kind)
    (got,) = Encoder(tokenizer, generation(), 256).encode([dialogue("be good", "is it bad?", completion="no")])
    whole = "<|system|>be good\n<|user|>is it bad?\n<|assistant|>no"
    before = plain(tokenizer, whole.removesuffix("no"))
    assert got.input_ids == before, "the template alone decides about BOS"
    assert got.answer_ids == [*plain(tokenizer, whole)[len(before) :], END]


def test_dialogues_lose_their_oldest_turns_first():
    tokenizer = made("byte-level")
    turns = ("be good " * 5, "great food " * 10, "awful price " * 10, "bad movie " * 20)
    whole = Encoder(tokenizer, generation(), 4096).encode([dialogue(*turns, completion="yes")])[0]
    length = len(whole.input_ids) + len(whole.answer_ids)
    for limit in range(length, 60, -7):
        encoder = Encoder(tokenizer, generation(), limit)
        try:
            (got,) = encoder.encode([dialogue(*turns, completion="yes")])
        except DataError:
            assert limit < length - 70, "all but 16 tokens of the last turn may go"
            break
        text = tokenizer.decode(got.input_ids)
        system, user, assistant, last = (part.split(">", 1)[1].removesuffix("\n") for part in text.split("<|")[1:-1])
        assert system == turns[0]
        assert turns[1].startswith(user)
        assert turns[2].startswith(assistant)
        assert turns[3].startswith(last)
        assert user == "" or assistant == turns[2]
        assert assistant == "" or last == turns[3]
        assert length - 4 <= len(got.input_ids) + len(got.answer_ids) + got.lost <= length
        assert limit - 4 <= len(got.input_ids) + len(got.answer_ids) <= limit
    else:
        pytest.fail("no limit was too short")


def test_a_chat_template_that_refuses_is_a_data_error():
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level(), eos_token="</s>")
    with pytest.raises(DataError, match="f:1: messages: not what the base's chat template takes"):
        Encoder(tokenizer, generation(), 64).encode([dialogue("x", "y", completion="z")])


def test_bos_written_in_the_instruction_is_not_doubled():
    tokenizer = made("glued breaks, BOS")
    (got,) = Encoder(tokenizer, task("<s>{text}\nAnswer:"), 64).encode([row("great")])
    assert got.input_ids == [BOS, *plain(tokenizer, "great\nAnswer:")]


def test_unusable_tokenizers_and_labels_are_refused():
    tokenizer = made("byte-level")
    with pytest.raises(BaseError, match="no eos_token"):
        Encoder(PreTrainedTokenizerFast(tokenizer_object=byte_level()), task(), 64)
    with pytest.raises(ConfigError, match="task 't': labels: not known yet"):
        Encoder(tokenizer, Task(name="t", kind="classification"), 64)
    lower = byte_level()
    lower.normalizer = normalizers.Lowercase()
    folded = PreTrainedTokenizerFast(tokenizer_object=lower, eos_token="</s>")
    with pytest.raises(DataError, match="labels: 'Yes' has the same tokens as 'yes' here; give it other words"):
        Encoder(folded, task(labels=["yes", "Yes"]), 64)


def test_slow_tokenizers_are_refused():
    class Slow:
        is_fast, name_or_path = False, "old"

    with pytest.raises(BaseError, match=r"no tokenizer\.json"):
        Encoder(Slow(), task(), 64)


def test_the_digest_follows_what_encoding_depends_on():
    tokenizer = made("byte-level")
    digest = Encoder(tokenizer, task(), 64).digest("rows")
    tokenizer(["a", "b b"], padding=True, truncation=True, max_length=8)
    assert Encoder(tokenizer, task(metric="macro_f1"), 64).digest("rows") == digest
    others = [
        Encoder(tokenizer, task(), 64).digest("other rows"),
        Encoder(tokenizer, task(), 65).digest("rows"),
        Encoder(tokenizer, task("{text}"), 64).digest("rows"),
        Encoder(tokenizer, task(labels=["negative", "positive"]), 64).digest("rows"),
        Encoder(made("unigram, EOS"), task(), 64).digest("rows"),
    ]
    assert len({digest, *others}) == 6


@pytest.mark.slow
def test_the_real_tokenizer():
    from moecl.data.assets import fetch

    tokenizer = AutoTokenizer.from_pretrained(fetch("smollm2-135m-instruct"))
    encoder = Encoder(tokenizer, task("What is this?\n\n{text}\nAnswer:", ["positive", "negative"]), 64)
    assert [len(ids) for ids in encoder.answers] == [1, 1]
    (got,) = encoder.encode([row("A lovely, lovely phone. " * 30, "negative")])
    text = tokenizer.decode(got.input_ids + got.answer_ids)
    assert text.startswith("What is this?\n\nA lovely, lovely phone.")
    assert text.endswith("\nAnswer: negative<|im_end|>")
    assert len(got.input_ids) + len(got.answer_ids) == 64
    (chat,) = Encoder(tokenizer, generation(), 128).encode([dialogue("Be brief.", "2+2?", completion="4")])
    assert tokenizer.decode(chat.input_ids).endswith("<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.decode(chat.answer_ids) == "4<|im_end|>"


def test_examples_of_a_file_encode(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "great", "label": "positive"}\n' * 3)
    split = read_split(str(path), task())
    assert len(Encoder(made("byte-level"), task(), 64).encode(split.examples)) == 3
    assert Encoder(made("byte-level"), task(), 64).encode([]) == []


# Batches

PAIR = [Encoded([5, 6, 7], [8, 2], 1, False), Encoded([9], [4], -1, False)]


def test_collate_on_the_right():
    batch = collate(PAIR, pad_id=0)
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[5, 6, 7, 8, 2], [9, 4, 0, 0, 0]],
        "attention_mask": [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]],
        "labels": [[-100, -100, -100, 8, 2], [-100, 4, -100, -100, -100]],
        "label": [1, -1],
    }
    assert {tensor.dtype for tensor in batch.values()} == {torch.long}


def test_collate_on_the_left_without_answers():
    batch = collate(PAIR, pad_id=3, side="left", answers=False)
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[5, 6, 7], [3, 3, 9]],
        "attention_mask": [[1, 1, 1], [0, 0, 1]],
        "label": [1, -1],
    }
    left = collate(PAIR, pad_id=3, side="left")
    assert left["labels"].tolist() == [[-100, -100, -100, 8, 2], [-100, -100, -100, -100, 4]]


lengths = st.lists(st.integers(1, 300), min_size=1, max_size=200)


@settings(deadline=None)
@given(lengths, st.integers(1, 9), st.integers(1, 3), st.integers(0, 2**32 - 1))
def test_plan_has_every_row_once_an_epoch(lengths, batch_size, epochs, seed):
    plan = plan_batches(lengths, batch_size, epochs, seed)
    assert plan == plan_batches(lengths, batch_size, epochs, seed)
    assert plan[: len(plan) // epochs] == plan_batches(lengths, batch_size, 1, seed)
    a_pass = -(-len(lengths) // batch_size)
    assert len(plan) == a_pass * epochs
    for start in range(0, len(plan), a_pass):
        batches = plan[start : start + a_pass]
        assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
        assert sum(len(batch) < batch_size for batch in batches) <= 1


def test_plan_pads_little_and_differs_by_seed_and_epoch():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(10, 200, (1000,), generator=generator).tolist()
    plan = plan_batches(lengths, 16, 2, 0)
    padded = sum(len(batch) * max(lengths[index] for index in batch) for batch in plan)
    assert padded < 1.15 * 2 * sum(lengths)
    first, second = ({frozenset(batch) for batch in half} for half in (plan[:63], plan[63:]))
    assert len(first & second) < 6
    assert plan_batches(lengths, 16, 2, 1) != plan
    means = [sum(lengths[index] for index in batch) / len(batch) for batch in plan[:20]]
    assert means != sorted(means), "short and long batches alternate"


@given(lengths, st.integers(1, 2000), st.one_of(st.none(), st.integers(1, 9)))
def test_token_batches_keep_to_the_budget(lengths, budget, most):
    batches = token_batches(lengths, budget, most)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[index] for index in batch) <= budget
        assert len(batch) <= (most or len(batch))
    ordered = [lengths[index] for batch in batches for index in batch]
    assert ordered == sorted(lengths, reverse=True)
