"""Texts written token by token, and scores of given ones: equal to whole forwards row by row."""

from dataclasses import replace

import pytest
import torch

from moecl.bank import Entry
from moecl.config import MoECLConfig, Task
from moecl.engine import Engine
from moecl.errors import ConfigError, DataError, TaskError
from moecl.generation import Completion, Sampling, draw, settled
from moecl.model import MoECL
from moecl.nn.lora import Expert
from moecl.nn.sums import Keys, Mix
from tiny import EOS, HIDDEN, tiny_model, tiny_tokenizer

WRITERS = ["a", "b", "c"]
ROWS = ["a great movie", "bad " * 80, "the food was terrible and sad", "x", "happy phone battery " * 4, "price"]
NAMES = ["a", "b", "c", "a", "b", "c"]
WILD = Sampling(max_new_tokens=8, temperature=1.0, seed=7)
FAMILIES = ["llama", "gpt2", "opt", "gemma3_text", "mistral"]  # the last two with a sliding window of 64


def stirred(model: MoECL, draw: torch.Generator) -> None:
    with torch.no_grad():
        for parameter in model.learner.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.3)


def engine(family: str = "llama", **settings) -> Engine:
    tokenizer, draws = tiny_tokenizer(), torch.Generator().manual_seed(0)
    model = MoECL.attach(tiny_model(family, vocab_size=len(tokenizer)), MoECLConfig(rank=4), tokenizer=tokenizer)
    for name in WRITERS:
        model.add_task(Task(name=name, kind="generation", instruction="{prompt}"))
        stirred(model, draws)
    for name, head in (("label", "lm"), ("head", "classifier")):
        labels = {"up": "very good", "down": "bad"}
        model.add_task(Task(name=name, kind="classification", labels=labels, head=head))
        stirred(model, draws)
    model.finish_task()
    return Engine(model.eval(), **settings)


@torch.no_grad()
def greedy(found: Engine, prompt: str, name: str, tokens: int) -> tuple[list[int], list[float]]:
    """Ids and their log p by a whole forward a token."""
    ids = found.prompts(found.bank[name].task, [as_row(found, prompt, name)], tokens)[0].input_ids
    written, logprobs = [], []
    while len(written) < tokens:
        logits = found.model(torch.tensor([ids + written]), task=name).logits[0, -1].log_softmax(-1)
        if (best := int(logits.argmax())) == EOS:
            break
        written.append(best)
        logprobs.append(float(logits[best]))
    return written, logprobs


def as_row(found: Engine, prompt: str, name: str):
    from moecl.data.task import example

    return example(prompt, found.bank[name].task)


# --- against whole forwards ---


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_many_tasks_equal_whole_forwards(family):
    found = engine(family)
    answers = found.generate(ROWS, NAMES, Sampling(max_new_tokens=6, top_logprobs=2))
    for prompt, name, answer in zip(ROWS, NAMES, answers, strict=True):
        ids, logprobs = greedy(found, prompt, name, 6)
        assert [token.id for token in answer.logprobs] == ids
        assert [token.logprob for token in answer.logprobs] == pytest.approx(logprobs, rel=1e-3, abs=1e-4)
        assert all(token.top[0][1] == pytest.approx(token.logprob) for token in answer.logprobs)
        assert answer.text == found.tokenizer.decode(ids).strip()
        assert (answer.task, answer.tokens) == (name, len(ids))
        assert answer.reason == ("length" if len(ids) == 6 else "stop")
    assert len({answer.text for answer in found.generate(ROWS[:1] * 3, WRITERS)}) == 3, "the tasks differ"


def test_what_predict_writes_is_the_same():
    found = engine()
    written = found.generate(ROWS, NAMES, Sampling(max_new_tokens=8))
    assert [one.label for one in found.predict(ROWS, NAMES, max_new_tokens=8)] == [one.text for one in written]


def test_a_form_that_weighs_each_row_by_its_text():
    found = engine()
    draws = torch.Generator().manual_seed(3)
    loras = [Expert(found.model.geometry, 2) for _ in range(2)]
    with torch.no_grad():
        for parameter in [p for lora in loras for p in lora.parameters()]:
            parameter.copy_(torch.randn(parameter.shape, generator=draws) * 0.3)
    keys = Keys(torch.randn(2, HIDDEN, generator=draws))
    mixed = Mix(tuple(lora.requires_grad_(False) for lora in loras), (keys.requires_grad_(False),), 2.0, 8.0)
    bank = {**found.bank, "mix": Entry(found.bank["a"].task.model_copy(update={"name": "mix"}), mixed)}
    found = found.over(bank)
    names = ["mix", "mix", "a", "mix", "b", "mix"]
    together = found.generate(ROWS, names, Sampling(max_new_tokens=6))
    alone = [found.generate([row], name, Sampling(max_new_tokens=6))[0] for row, name in zip(ROWS, names, strict=True)]
    assert together == alone
    assert together[0] != found.generate(ROWS[:1], "a", Sampling(max_new_tokens=6))[0]


# --- sampling ---


@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize("budget", [None, 150])
def test_a_sampled_row_does_not_depend_on_its_neighbours(family, budget):
    found = engine(family, batch_tokens=budget)
    each = [replace(WILD, seed=seed, top_p=1 - seed / 20) for seed in range(len(ROWS))]
    together = found.generate(ROWS, NAMES, each)
    alone = [found.generate([ROWS[i]], NAMES[i], each[i])[0] for i in range(len(ROWS))]
    assert together == alone
    backwards = found.generate(ROWS[::-1], NAMES[::-1], each[::-1])
    assert backwards[::-1] == together


def test_seeds():
    found = engine()
    same = found.generate([ROWS[0]] * 2, "a", WILD)
    assert same[0] == same[1]
    other = found.generate([ROWS[0]] * 2, "a", [WILD, replace(WILD, seed=8)])
    assert other[0] == same[0]
    assert other[1] != same[0]
    unseeded = found.generate([ROWS[0]] * 2, "a", replace(WILD, seed=None))
    assert unseeded[0] != unseeded[1]


@pytest.mark.parametrize("top_p", [1.0, 0.5])
@pytest.mark.parametrize("temperature", [1e-310, 5e-324, 1e-6])
def test_a_temperature_that_is_hardly_one_is_greedy(temperature, top_p):
    logits = torch.tensor([1.0, 900.0, -3.0, 2.0])
    cold = Sampling(temperature=temperature, top_p=top_p)
    assert [draw(logits, cold, torch.Generator().manual_seed(seed)) for seed in range(3)] == [1, 1, 1]


def test_draws_follow_the_probabilities():
    logits, draws = torch.tensor([0.1, 0.5, 0.15, 0.25]).log(), torch.Generator().manual_seed(0)

    def shares(temperature: float, top_p: float) -> list[float]:
        how = Sampling(temperature=temperature, top_p=top_p)
        found = torch.tensor([draw(logits, how, draws) for _ in range(4000)])
        return (found.bincount(minlength=4) / 4000).tolist()

    assert shares(1.0, 1.0) == pytest.approx([0.1, 0.5, 0.15, 0.25], abs=0.03)
    assert shares(1.0, 0.7) == pytest.approx([0, 2 / 3, 0, 1 / 3], abs=0.03)
    assert shares(1.0, 0.5) == [0, 1, 0, 0], "the first token that reaches top_p is the last one"
    squares = torch.tensor([0.01, 0.25, 0.0225, 0.0625])
    assert shares(0.5, 1.0) == pytest.approx((squares / squares.sum()).tolist(), abs=0.03)
    assert shares(1e-4, 1.0) == [0, 1, 0, 0]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens: 0 is out of range; give 1 or more"),
        ({"temperature": -1.0}, "temperature: -1.0"),
        ({"temperature": float("nan")}, "temperature: nan"),
        ({"top_p": 0.0}, "top_p: 0.0"),
        ({"stop": "end"}, "stop: 'end'"),
        ({"stop": ("",)}, "stop: "),
    ],
)
def test_what_cannot_be_sampled(wrong, message):
    with pytest.raises(ConfigError, match=message):
        Sampling(**wrong)


# --- the end of a text ---


def test_stop_strings_end_a_text_and_are_no_part_of_it():
    found = engine()
    [whole] = found.generate(ROWS[:1], "a", Sampling(max_new_tokens=12))
    middle = len(whole.text) // 2
    stop = whole.text[middle : middle + 3]
    [cut] = found.generate(ROWS[:1], "a", Sampling(max_new_tokens=12, stop=("never there", stop)))
    assert cut.text == whole.text[: whole.text.index(stop)].strip()
    assert cut.reason == "stop"
    assert cut.tokens < whole.tokens


def test_the_stream_adds_up_to_the_text():
    found = engine()
    stops = [(), tuple(one.text[3:6] for one in found.generate(ROWS, NAMES, WILD) if one.text[3:6].strip())]
    for stop in stops:
        how = replace(WILD, stop=stop)
        texts, ends = dict.fromkeys(range(len(ROWS)), ""), {}
        for place, piece in found.stream(ROWS, NAMES, how):
            assert place not in ends
            if isinstance(piece, Completion):
                ends[place] = piece
            else:
                assert piece
                texts[place] += piece
        assert [ends[place] for place in texts] == found.generate(ROWS, NAMES, how)
        assert {place: end.text for place, end in ends.items()} == texts


def test_rows_are_streamed_while_others_are_written():
    pieces = list(engine().stream(ROWS[:2], "a", Sampling(max_new_tokens=5)))
    order = [place for place, _ in pieces]
    assert order != sorted(order)


def test_what_may_still_change_is_held_back():
    assert settled("one two ", []) == "one two"
    assert settled("half a \ufffd\ufffd", []) == "half a"
    assert settled("to the E", ["END", "STOP"]) == "to the"
    assert settled("to the EX", ["END"]) == "to the EX"


def test_the_base_has_so_many_positions_and_no_more():
    found = engine()
    task = Task(name="long", kind="generation", max_length=256)
    found = found.over({"long": Entry(task, found.bank["a"].parts)})
    [answer] = found.generate(["x " * 150], "long", Sampling(max_new_tokens=500))
    assert answer.prompt_tokens + answer.tokens <= 256
    assert answer.reason in ("length", "stop")


# --- joining and leaving ---


@pytest.mark.parametrize(("family", "cohorts"), [("llama", 1), ("gpt2", 1), ("gemma3_text", 2)])
def test_rows_join_and_leave_between_steps(family, cohorts):
    found = engine(family)
    each = [replace(WILD, max_new_tokens=tokens, seed=tokens) for tokens in (12, 4, 9)]
    alone = [found.generate([ROWS[i]], NAMES[i], each[i])[0] for i in range(3)]
    requests = [found.requests([ROWS[i]], NAMES[i], each[i].max_new_tokens)[0] for i in range(3)]
    first, second, third = (found.writing(*pair) for pair in zip(requests, each, strict=True))
    decoder = found.decoder()
    decoder.join([first, second])
    decoder.step()
    decoder.join([third])
    assert len(decoder.cohorts) == cohorts
    assert len(decoder.rows) == 3
    while decoder.cohorts:
        decoder.step()
    assert [one.completion() for one in (first, second, third)] == alone


def test_a_row_that_nobody_waits_for_leaves():
    found = engine()
    requests = found.requests(ROWS[:2], ["a", "b"])
    first, second = (found.writing(request, Sampling(max_new_tokens=9)) for request in requests)
    decoder = found.decoder()
    decoder.join([first, second])
    decoder.leave(first)
    assert decoder.rows == [second]
    while decoder.cohorts:
        decoder.step()
    assert second.completion() == found.generate(ROWS[1:2], "b", Sampling(max_new_tokens=9))[0]


@pytest.mark.parametrize("fails", ["a draw", "at last"])
def test_a_join_that_fails_leaves_no_trace(fails, monkeypatch):
    found = engine()
    each = [replace(WILD, seed=seed) for seed in range(4)]
    alone = [found.generate([ROWS[i]], NAMES[i], each[i])[0] for i in range(4)]
    decoder = found.decoder()
    first, second, third, cursed = (
        found.writing(found.requests([ROWS[i]], [NAMES[i]], 8)[0], how) for i, how in enumerate(each)
    )
    decoder.join([first])
    decoder.step()
    with monkeypatch.context() as patch:
        if fails == "a draw":
            patch.setattr(cursed, "take", lambda *_: 1 / 0)
        else:
            real = decoder._together
            patch.setattr(decoder, "_together", lambda *both: (real(*both), 1 / 0))
        with pytest.raises(ZeroDivisionError):
            decoder.join([second, third, cursed])
    assert decoder.rows == [first]
    assert second.ids == third.ids == []
    decoder.join([second, third])
    while decoder.cohorts:
        decoder.step()
    assert [one.completion() for one in (first, second, third)] == alone[:3]


def test_columns_that_nobody_fills_are_dropped():
    found = engine()
    requests = found.requests(ROWS[1:3], ["a", "b"])
    long = found.writing(requests[0], Sampling(max_new_tokens=2))
    short = found.writing(requests[1], Sampling(max_new_tokens=9))
    decoder = found.decoder()
    decoder.join([long, short])
    decoder.step()
    [cohort] = decoder.cohorts
    assert cohort.rows == [short]
    assert bool(cohort.mask.all())
    assert cohort.cache.get_seq_length() == cohort.mask.shape[1]


def test_the_budget_of_tokens_holds():
    found = engine(batch_tokens=200)
    seen = []
    found.model.base.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(tuple(kwargs["attention_mask"].shape)), with_kwargs=True
    )
    found.generate(["a great movie"] * 20, "a", Sampling(max_new_tokens=10))
    assert max(rows for rows, _ in seen) > 1
    assert all(rows * width <= 200 for rows, width in seen)


def test_a_row_keeps_the_parts_it_was_begun_with():
    found = engine()
    [request] = found.requests(ROWS[:1], "a")
    bank = {"a": Entry(found.bank["a"].task, lambda: next(parts))}
    parts = iter([found.bank["a"].parts, found.bank["b"].parts])
    [moving] = found.over(bank).requests(ROWS[:1], "a")
    still, moved = (found.writing(one, Sampling(max_new_tokens=6)) for one in (request, moving))
    decoder = found.decoder()
    decoder.join([still, moved])
    while decoder.cohorts:
        decoder.step()
    assert still.completion() == moved.completion()


# --- what is refused ---


def test_a_task_of_labels_writes_nothing():
    with pytest.raises(TaskError, match="'label' answers with a label and writes no text; use predict"):
        engine().generate(["x"], "label")


def test_samplings_must_match_rows():
    with pytest.raises(TaskError, match="sampling: 1 for 2 rows; give one, or one a row"):
        engine().generate(["x", "y"], "a", [WILD])


# --- given answers ---


@torch.no_grad()
def likelihood(found: Engine, prompt: str, name: str, answer: str) -> float:
    encoder = found.encoder(found.bank[name].task)
    words = (found.bank[name].task.labels or {}).get(answer, answer)
    ids = found.prompts(found.bank[name].task, [as_row(found, prompt, name)])[0].input_ids
    tail = [*found.tokenizer(f" {words}")["input_ids"], encoder.end]
    logits = found.model(torch.tensor([ids + tail]), task=name).logits[0, len(ids) - 1 : -1].log_softmax(-1)
    return float(logits.gather(1, torch.tensor(tail)[:, None]).sum())


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
def test_scores_equal_whole_forwards(family):
    found = engine(family, batch_tokens=300)
    rows, names = [ROWS[0], ROWS[2], *ROWS[3:]], ["a", "label", "b", "label", "c"]
    answers = ["fine", "up", "the best of", "down", "good"]
    scores = found.score(rows, names, answers)
    for row, name, answer, score in zip(rows, names, answers, scores, strict=True):
        assert (score.task, score.answer) == (name, answer)
        assert score.logprob == pytest.approx(likelihood(found, row, name, answer), rel=1e-3, abs=1e-3)
        assert score.logprob == pytest.approx(sum(score.token_logprobs))


def test_a_greedy_text_is_as_likely_as_its_tokens_said():
    found = engine()
    [written] = found.generate(ROWS[:1], "a", Sampling(max_new_tokens=4, top_logprobs=0))
    ids = [token.id for token in written.logprobs]
    if found.tokenizer(f" {written.text}")["input_ids"] == ids:  # a text may have other tokens when read again
        [score] = found.score(ROWS[:1], "a", [written.text])
        assert score.token_logprobs[:-1] == pytest.approx([t.logprob for t in written.logprobs], rel=1e-3, abs=1e-4)


def test_scores_of_a_classifier_head():
    found = engine()
    [up, down] = found.score([ROWS[0]] * 2, "head", ["up", "down"])
    shares = found.predict(ROWS[:1], "head")[0].scores
    assert torch.tensor([up.logprob, down.logprob]).exp().tolist() == pytest.approx([shares["up"], shares["down"]])
    assert up.token_logprobs == ()


def test_rows_may_bring_their_answers():
    found = engine()
    rows = [{"text": "x", "label": "up"}, {"prompt": "y", "completion": "fine"}]
    assert found.score(rows, ["label", "a"]) == found.score(["x", "y"], ["label", "a"], ["up", "fine"])


@pytest.mark.parametrize(
    ("rows", "names", "answers", "error", "message"),
    [
        (["x"], "label", ["upp"], DataError, r"row 1: 'upp' is no label; give one of up, down \(did you mean 'up'\?\)"),
        (["x"], "label", [" "], DataError, "row 1: label: no answer to score"),
        (["x"], "a", None, DataError, "row 1: completion: the row has no such field"),
        (["x", "y"], "a", ["z"], DataError, "completions: 1 for 2 rows; give one a row"),
        (["x"], None, ["z"], TaskError, "the bare base answers no task"),
    ],
)
def test_answers_that_cannot_be_scored(rows, names, answers, error, message):
    with pytest.raises(error, match=message):
        engine().score(rows, names, answers)
