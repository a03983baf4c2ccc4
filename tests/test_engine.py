"""One path from texts to answers: equal to whole forwards row by row, for every way of reading an answer."""

import logging

import pytest
import torch

from moecl.config import MoECLConfig, Task
from moecl.data.encode import Encoder
from moecl.data.task import example
from moecl.engine import Engine, Entry, Trie
from moecl.errors import BaseError, DataError, TaskError
from moecl.generation import Sampling
from moecl.model import MoECL
from tiny import EOS, tiny_model, tiny_tokenizer

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
TASKS = {
    "word": {"labels": ["fine", "sad"]},
    "words": {"labels": {"up": "very good", "down": "very bad indeed", "odd": "so so"}},
    "prefix": {"labels": {"one": "fine", "two": "fine fine", "three": "fine fine bad", "other": "bad"}},
    "more": {"labels": {"x": "the best of", "y": "the worst", "z": "in it"}},
    "head": {"labels": ["p", "q", "r"], "head": "classifier"},
}
TEXTS = ["a great movie", "bad " * 80, "the food was terrible and sad", "x", "happy phone battery " * 4, "price"]


def tasks(names: str) -> list[Task]:
    return [
        Task(name=name, kind="generation") if name == "write" else Task(name=name, kind="classification", **TASKS[name])
        for name in names.split()
    ]


def engine(names: str, family: str = "llama", dtype: torch.dtype = torch.float32, **settings) -> Engine:
    """An engine over tasks whose parts are far from where they start."""
    tokenizer = tiny_tokenizer()
    base = tiny_model(family, vocab_size=len(tokenizer), dtype=dtype)
    model = MoECL.attach(base, MoECLConfig(rank=4), tokenizer=tokenizer)
    draw = torch.Generator().manual_seed(0)
    for task in tasks(names):
        model.add_task(task)
        with torch.no_grad():
            for parameter in model.learner.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.3)
    model.finish_task()
    return Engine(model.eval(), **settings)


@torch.no_grad()
def brute_force(found: Engine, task: Task, text: str) -> dict[str, float]:
    """Each label's share by a whole forward of its own: prompt, words, end."""
    encoder = Encoder(found.tokenizer, task, 512)
    prompt = torch.tensor([found.prompts(task, [example(text, task)])[0].input_ids])
    if task.head == "classifier":
        scores = found.model(prompt, task=task.name).logits[0]
    else:
        one_token = all(len(answer) == 1 for answer in encoder.answers)
        scores = torch.stack(
            [
                log_p(found.model, prompt, torch.tensor([answer if one_token else [*answer, encoder.end]]), task.name)
                for answer in encoder.answers
            ]
        )
    return dict(zip(task.labels, scores.softmax(0).tolist(), strict=True))


def log_p(model: MoECL, prompt: torch.Tensor, answer: torch.Tensor, task: str) -> torch.Tensor:
    logits = model(torch.cat([prompt, answer], dim=1), task=task).logits[0, prompt.shape[1] - 1 : -1].log_softmax(-1)
    return logits.gather(1, answer[0][:, None]).sum()


def check(found: Engine, rows: list[str], names: list[str]) -> None:
    predictions = found.predict(rows, names)
    assert [prediction.task for prediction in predictions] == names
    known = {name: entry.task for name, entry in found.bank.items()}
    for text, name, prediction in zip(rows, names, predictions, strict=True):
        expected = brute_force(found, known[name], text)
        assert prediction.scores == pytest.approx(expected, rel=1e-3, abs=1e-5)
        assert sum(prediction.scores.values()) == pytest.approx(1)
        assert list(prediction.scores) == list(known[name].labels)
        assert prediction.label == max(expected, key=expected.get)


# --- against whole forwards ---


@pytest.mark.parametrize(
    "family", ["llama", "mistral", "gpt2", "opt", "gpt_neox", "phi3", "phi", "qwen3", "gemma2", "gemma3_text"]
)
def test_every_way_of_reading_equals_whole_forwards(family):
    """Rows of several tasks and lengths (some longer than a sliding window of 64), padded on the left, over a cache."""
    names = ["words", "word", "more", "prefix", "words", "more"]
    check(engine("word words prefix more", family), TEXTS, names)


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi", "gpt2"])
def test_labels_are_told_apart_in_float32_on_a_bfloat16_base(family, monkeypatch):
    """Logits rounded to bfloat16 would be equal for one row in fifteen of a task with five labels."""
    monkeypatch.setattr("moecl.nn.inject.HEAD_ROWS", 7)
    found, seen = engine("word words", family, torch.bfloat16), []
    head = found.model.base.get_output_embeddings()
    head.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    cap = getattr(found.model.base.config, "final_logit_softcapping", None)

    def logits(hidden):
        exact = hidden.float() @ head.weight.float().T + (0 if head.bias is None else head.bias.float())
        return exact if cap is None else torch.tanh(exact / cap) * cap

    [given] = found.predict(TEXTS[:1], "word")
    own = [tokens[0] for tokens in found.encoder(tasks("word")[0]).answers]
    assert list(given.scores.values()) == pytest.approx(logits(seen[-1])[0, own].softmax(0).tolist(), rel=1e-5)
    [scored] = found.score(TEXTS[:1], "words", ["up"])
    ids = [*found.encoder(tasks("words")[0]).answers[0], EOS]
    expected = logits(seen[-1]).log_softmax(-1)[range(len(ids)), ids]
    assert list(scored.token_logprobs) == pytest.approx(expected.tolist(), rel=1e-5)


def test_rows_of_different_tasks_differ():
    found = engine("words more")
    assert found.predict(TEXTS[:1], "words")[0].scores != found.predict(TEXTS[:1], "more")[0].scores


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_classifier_heads(family):
    check(engine("head word", family), TEXTS, ["head", "word", "head", "head", "word", "head"])


def test_labels_that_begin_alike():
    check(engine("prefix"), TEXTS, ["prefix"] * len(TEXTS))
    encoder = engine("prefix").encoder(tasks("prefix")[0])
    trie = Trie(encoder)
    assert [len(path) for path in trie.paths] == [1, 3]
    assert [trie.paths[path][: len(label) - 1] for label, path in zip(trie.labels, trie.path_of, strict=True)] == [
        label[:-1] for label in trie.labels
    ]


@pytest.mark.parametrize("budget", [1, 60, 400])
def test_the_answer_depends_on_no_batch(budget):
    """Small budgets split rows, and the labels of one row, over many batches."""
    check(
        engine("words prefix word", batch_tokens=budget), TEXTS, ["words", "prefix", "word", "words", "prefix", "word"]
    )


def test_a_row_alone_and_padded():
    found = engine("words word")
    for name in ("words", "word"):
        together = found.predict(TEXTS, name)
        for text, one in zip(TEXTS, together, strict=True):
            assert found.predict([text], name)[0].scores == pytest.approx(one.scores, rel=1e-3, abs=1e-5)


# --- batches ---


def watched(found: Engine) -> list[tuple[int, int]]:
    """(rows, tokens of a row with what is cached) of each forward to come."""
    seen: list[tuple[int, int]] = []
    found.model.base.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(tuple(kwargs["attention_mask"].shape)), with_kwargs=True
    )
    return seen


@pytest.mark.parametrize("name", ["word", "words", "prefix", "head"])
def test_the_budget_of_tokens_holds(name):
    found = engine(name, batch_tokens=400)
    seen = watched(found)
    found.predict(TEXTS * 3, name)
    assert len(seen) >= 3
    assert all(rows * tokens <= 400 for rows, tokens in seen)
    assert max(rows for rows, _ in seen) > 1


def test_the_paths_of_one_row_are_split_where_they_are_too_many():
    found = engine("prefix words", batch_tokens=100)
    seen = watched(found)
    found.predict([TEXTS[1]], "words")
    assert [rows for rows, _ in seen] == [1, 1, 1, 1]


def test_one_forward_answers_rows_of_one_token_labels():
    found = engine("word words")
    seen = watched(found)
    found.predict(TEXTS, "word")
    assert len(seen) == 1
    seen.clear()
    found.predict(TEXTS, "words")
    assert len(seen) == 2, "the prompts, then what follows them"


# --- requests ---


def test_answers_are_in_the_order_of_the_rows():
    found = engine("word words head write")
    names = ["write", "word", "head", "words", "word", "write"]
    answers = found.predict(TEXTS, names, max_new_tokens=3)
    assert [answer.task for answer in answers] == names
    for text, name, answer in zip(TEXTS, names, answers, strict=True):
        alone = found.predict([text], name, max_new_tokens=3)[0]
        assert (alone.label, set(alone.scores)) == (answer.label, set(answer.scores))


def test_nothing_to_answer():
    assert engine("word").predict([], "word") == []
    assert engine("word").answer([]) == []


def test_rows_may_be_mappings():
    found = engine("word")
    text, mapping = found.predict([TEXTS[0], {"text": TEXTS[0], "more": 1}], "word")
    assert text == mapping


@pytest.mark.parametrize(
    ("rows", "names", "error", "message"),
    [
        (["x"], "wrod", TaskError, r"no task 'wrod'; the tasks are: word, write \(did you mean 'word'\?\)"),
        (["x"], None, TaskError, "the bare base answers no task"),
        (["x", "y"], ["word"], TaskError, "1 names for 2 rows"),
        (
            ["x", {"texts": "y"}],
            ["word"] * 2,
            DataError,
            r"row 2: text: the row has no such field.*did you mean 'texts'",
        ),
        (["x", " "], "word", DataError, "row 2: text: the text is empty"),
    ],
)
def test_faulty_rows(rows, names, error, message):
    with pytest.raises(error, match=message):
        engine("word write").predict(rows, names)


@pytest.mark.parametrize("one", ["food", b"food", {"text": "food"}, example("food", tasks("word")[0])])
def test_a_text_alone_is_no_list_of_its_characters(one):
    found = engine("word write")
    asked = {
        "rows": [lambda: found.predict(one, "word"), lambda: found.score(one, "word", ["fine"])],
        "prompts": [lambda: found.generate(one, "write"), lambda: list(found.stream(one, "write"))],
    }
    for name, ask in [(name, ask) for name, every in asked.items() for ask in every]:
        with pytest.raises(DataError, match=rf"{name}: .*food.* is one alone; give a list"):
            ask()
    with pytest.raises(DataError, match="completions: 'sad' is one alone"):
        found.score(["a", "b", "c"], "word", "sad")


def test_a_tokenizer_is_needed():
    with pytest.raises(BaseError, match="no tokenizer"):
        Engine(MoECL.attach(tiny_model()))


# --- generation ---


def test_a_text_is_written_greedily_to_its_end(monkeypatch):
    found = engine("write word")
    base = found.model.base
    written = found.predict(TEXTS, "write", max_new_tokens=8)
    for text, answer in zip(TEXTS, written, strict=True):
        prompt = torch.tensor([found.tokenizer(text.rstrip(" "))["input_ids"]])
        ids = []
        while len(ids) < 8:
            whole = torch.cat([prompt, torch.tensor([ids], dtype=torch.long)], dim=1)
            ids.append(int(found.model(whole, task="write").logits[0, -1].argmax()))
            if ids[-1] == EOS:
                ids.pop()
                break
        assert answer.label == found.tokenizer.decode(ids, skip_special_tokens=True).strip()
        assert answer.scores == {}
    assert len({answer.label for answer in written}) > 1
    # Settings for chatting that came with the base bend nothing, and give no advice.
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    monkeypatch.setattr(logging.getLogger("transformers"), "handlers", [handler])
    base.generation_config.update(
        do_sample=True, temperature=0.6, top_p=0.9, top_k=3, repetition_penalty=5.0, eos_token_id=[5, 6], max_length=20
    )
    assert found.predict(TEXTS, "write", max_new_tokens=8) == written
    assert said == []


def test_writing_stops_at_the_end_token():
    found = engine("write")
    free = found.predict(TEXTS, "write", max_new_tokens=6)
    bias = torch.zeros(found.model.base.config.vocab_size)
    bias[EOS] = 1e4
    found.model.base.lm_head.register_forward_hook(lambda module, args, out: out + bias)
    assert [answer.label for answer in found.predict(TEXTS, "write", max_new_tokens=6)] == [""] * len(TEXTS)
    assert any(answer.label for answer in free)


def test_a_long_prompt_leaves_room_for_the_answer():
    found = engine("write")
    task = tasks("write")[0].model_copy(update={"max_length": 64})
    rows = [example("sad " * 100, task)]
    assert len(found.prompts(task, rows, max_new_tokens=10)[0].input_ids) == 54
    assert len(found.prompts(task, rows, max_new_tokens=1000)[0].input_ids) == 48


def test_no_more_of_a_prompt_is_cut_than_an_answer_needs():
    found = engine("write")
    task = tasks("write")[0].model_copy(update={"max_length": 144})  # of 256 that the base has
    assert [len(found.prompts(task, [example("sad " * n, task)])[0].input_ids) for n in (111, 150)] == [112, 112]
    assert len(found.prompts(task, [example("sad " * 150, task)], max_new_tokens=1)[0].input_ids) == 143
    assert len(found.prompts(task, [example("sad " * 150, task)], max_new_tokens=120)[0].input_ids) == 112
    longer = task.model_copy(update={"max_length": 200})  # an answer as long as that needs more than the 56 behind it
    assert len(found.prompts(longer, [example("sad " * 250, longer)])[0].input_ids) == 150


def test_a_text_is_as_long_as_its_task_allows():
    found = engine("write")
    short = tasks("write")[0].model_copy(update={"max_length": 100})
    found = found.over({**found.bank, "write": Entry(short, found.bank["write"].parts)})
    bias = torch.zeros(found.model.base.config.vocab_size)
    bias[EOS] = -1e4
    found.model.base.lm_head.register_forward_hook(lambda module, args, out: out + bias)
    [whole] = found.predict(["x"], "write")
    [expected] = found.generate(["x"], "write", Sampling(max_new_tokens=100))
    assert (expected.tokens, expected.text) == (100, whole.label)
    assert found.predict(["x"], "write", 5)[0].label == found.generate(["x"], "write", Sampling(5))[0].text
