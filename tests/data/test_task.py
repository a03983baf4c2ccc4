"""Rows become examples, and a row that cannot be used says where it is and what to do."""

import json

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moecl.config import Task, TaskConfig
from moecl.data.task import example, load_task_data, overlaps, plain_rows, read_split, template
from moecl.errors import ConfigError, DataError

ROWS = [{"text": "a fine film", "label": "positive"}, {"text": "two\nlines, “quoted” é", "label": "negative"}]
REVIEWS = Task(name="reviews", kind="classification", labels=["positive", "negative"])
CHAT = Task(name="chat", kind="generation")


def write(path, content):
    path.write_text(content)
    return str(path)


def jsonl(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def test_limit_takes_the_first_rows_and_changes_the_digest(tmp_path):
    path = write(tmp_path / "x.jsonl", jsonl(ROWS) + "broken\n")
    one, two = read_split(path, REVIEWS, 1), read_split(path, REVIEWS, 2)
    assert one.examples == two.examples[:1]
    assert one.sha256 != two.sha256
    extra = write(tmp_path / "y.jsonl", jsonl([row | {"id": 7} for row in ROWS]))
    assert read_split(extra, REVIEWS).sha256 == two.sha256, "only what is used counts"


GOOD = '{"text": "good", "label": "positive"}\n'
BROKEN = [  # file, content, what the error says after the file's name
    ("a.jsonl", "\n \n", ": no rows"),
    ("a.csv", "text,label\n", ": no rows"),
    ("a.json", "[]", ": no rows"),
    ("a.csv", "I like it,positive\nx,negative\n", ":2: text: the row has no such field, only I like it, positive"),
    (
        "a.jsonl",
        '{"txt": "x", "label": "positive"}',
        ":1: text: the row has no such field, only txt, label (did you mean",
    ),
    (
        "a.jsonl",
        '{"sentence": "x", "label": "positive"}',
        "only sentence, label; correct it in the instruction of task 'reviews'",
    ),
    ("a.jsonl", "{}", ":1: text: the row has no such field, only none at all"),
    ("a.jsonl", '{"text": "x"}', ":1: label: the row has no such field, only text"),
    ("a.jsonl", '{"text": null, "label": "positive"}', ":1: text: null; fill it in"),
    ("a.jsonl", '{"text": "x", "label": NaN}', ":1: label: nan is not a label; give positive, negative"),
    ("a.jsonl", '{"text": NaN, "label": "positive"}', ":1: text: nan is of type float, not a string"),
    ("a.jsonl", '{"text": "x", "label": null}', ":1: label: null; fill it in"),
    ("a.jsonl", '{"text": " \\n", "label": "positive"}', ":1: text: the text is empty"),
    ("a.jsonl", '{"text": 5, "label": "positive"}', ":1: text: 5 is of type int, not a string"),
    ("a.jsonl", '{"text": ["x"], "label": "positive"}', ":1: text: ['x'] is of type list, not a string"),
    ("a.jsonl", '{"text": "\\ud800", "label": "positive"}', r":1: text: '\ud800' at character 1 is not valid Unicode"),
    (
        "a.jsonl",
        GOOD + '{"text": "x", "label": "postive"}',
        ":2: label: 'postive' is not one of positive, negative (did you",
    ),
    (
        "a.jsonl",
        '{"text": "x", "label": "Positive"}',
        ":1: label: 'Positive' is not one of positive, negative (did you",
    ),
    ("a.jsonl", '{"text": "x", "label": 1}', ":1: label: 1 is not one of positive, negative;"),
    (
        "a.jsonl",
        '{"text": "x", "label": ["positive"]}',
        ":1: label: ['positive'] is not a label; give positive, negative",
    ),
    ("a.jsonl", '{"messages": [], "label": "positive"}', ":1: messages: a classification needs rows of text and label"),
]


@pytest.mark.parametrize(("name", "content", "message"), BROKEN, ids=[f"{n}-{m[:40]}" for n, _, m in BROKEN])
def test_what_cannot_be_used_is_named(tmp_path, name, content, message):
    path = write(tmp_path / name, content)
    with pytest.raises(DataError) as error:
        read_split(path, REVIEWS)
    text = str(error.value)
    assert text.startswith(path)
    assert message in text
    assert "\n" not in text


@pytest.mark.parametrize(
    ("labels", "values", "read"),
    [
        (["0", "1"], [0, 1.0, "1"], ["0", "1", "1"]),
        (["true", "false"], [True, False], ["true", "false"]),
        (["True", "False"], [True, False], ["True", "False"]),
        (["0.5", "2"], [0.5, 2], ["0.5", "2"]),
    ],
)
def test_numbers_and_booleans_stand_for_the_labels_they_spell(tmp_path, labels, values, read):
    task = Task(name="t", kind="classification", labels=labels)
    path = write(tmp_path / "x.jsonl", jsonl({"text": "x", "label": value} for value in values))
    assert [row.label for row in read_split(path, task).examples] == read


def config(tmp_path, train, test=None, **more):
    sources = {"train": write(tmp_path / "train.jsonl", jsonl(train))}
    if test is not None:
        sources["test"] = write(tmp_path / "test.jsonl", jsonl(test))
    return TaskConfig(name="t", **({"kind": "classification"} | more), **sources)


def test_the_answer_may_stand_in_a_field_of_any_name(tmp_path):
    path = write(tmp_path / "x.csv", "label,sentence,mood\n7,fine,good\n8,dull,bad\n")
    config = TaskConfig(
        name="m", kind="classification", instruction="{label}: {sentence}", answer_field="mood", train=path
    )
    data = load_task_data(config)
    assert [row.label for row in data.train.examples] == ["good", "bad"]
    assert list(data.task.labels) == ["bad", "good"]
    assert data.train.examples[0].fields == {"label": "7", "sentence": "fine"}
    assert example({"label": "7", "sentence": "fine", "mood": "bad"}, data.task).label == "bad"
    with pytest.raises(DataError, match="mood: 'worse' is not one of bad, good"):
        example({"label": "7", "sentence": "fine", "mood": "worse"}, data.task, answered=True)
    with pytest.raises(DataError, match=r"\{mood\} would show the model the answer"):
        example({"mood": "bad"}, data.task.model_copy(update={"instruction": "{mood}"}))
    told = CHAT.model_copy(update={"answer_field": "reply"})
    assert example({"prompt": "hi", "reply": "ho"}, told, answered=True).completion == "ho"
    with pytest.raises(
        DataError, match=r"reply: the row has no such field, only prompt, completion; rename .*answer_field"
    ):
        example({"prompt": "hi", "completion": "ho"}, told, answered=True)


def test_labels_are_found_in_the_training_rows(tmp_path):
    train = [{"text": str(n), "label": label} for n, label in enumerate(["b", 2, "a", "b"])]
    data = load_task_data(config(tmp_path, train, [{"text": "x", "label": "a"}]))
    assert data.task.labels == {"2": "2", "a": "a", "b": "b"}
    assert (list(data.splits()), data.validation) == (["train", "test"], None)
    with pytest.raises(DataError, match=r"test.jsonl:1: label: 'c' is not one of 2, a, b"):
        load_task_data(config(tmp_path, train, [{"text": "x", "label": "c"}]))
    with pytest.raises(DataError, match="every row has the label 'b'"):
        load_task_data(config(tmp_path, train[:1]))


def test_overlaps_and_duplicates_are_counted(tmp_path):
    train = [{"text": text, "label": label} for text, label in [("x", "a"), ("x ", "b"), ("y", "a"), ("z", "b")]]
    test = [{"text": text, "label": "a"} for text in ["y", " y\n", "new", "x"]]
    data = load_task_data(config(tmp_path, train, test))
    assert overlaps(data) == {("train", "train"): 1, ("test", "test"): 1, ("train", "test"): 3}


def test_instructions_use_any_field_and_keep_braces():
    task = Task(name="t", kind="classification", instruction='{{"{title}" ({n}): {text}}}', labels=["a", "b"])
    row = example({"text": "{title} {{x}} {", "title": "{text}", "n": 3, "more": [1], "label": "a"}, task)
    assert template(task.instruction).fill(row.fields) == '{"{text}" (3): {title} {{x}} {}'
    assert row.label == "a"
    assert (row.text, template(task.instruction).cut) == ("{title} {{x}} {", "text")
    assert template("{a} {b}").cut == "b"
    assert template("{a} {prompt} {b}").cut == "prompt"


@given(st.text(), st.text())
def test_row_content_is_never_read_as_an_instruction(text, title):
    assert template("{title}|{text}|{text}").fill({"text": text, "title": title}) == f"{title}|{text}|{text}"


@pytest.mark.parametrize("instruction", ["{text} {", "} {text}", "{text}}", "{a{text}"])
def test_lone_braces_are_refused(instruction):
    with pytest.raises(ConfigError, match=r"instruction: a lone '[{}]'"):
        template(instruction)


def test_instruction_without_a_field_is_refused():
    with pytest.raises(ConfigError, match="uses no field"):
        template("Is it good? {{text}}")


def test_unknown_placeholder_names_the_fields_there_are():
    task = Task(name="t", kind="classification", instruction="{body}: {text}", labels=["a", "b"])
    with pytest.raises(DataError, match="row: body: the row has no such field, only text, label; task"):
        example({"text": "x", "label": "a"}, task)
    leak = Task(name="t", kind="classification", instruction="{text} {label}", labels=["a", "b"])
    with pytest.raises(DataError, match=r"\{label\} would show the model the answer"):
        example({"text": "x", "label": "a"}, leak)


def turns(*contents, roles=("user", "assistant")):
    return [{"role": roles[n % 2], "content": content} for n, content in enumerate(contents)]


def test_generation_rows(tmp_path):
    rows = [{"prompt": "2+2=", "completion": "4"}, {"messages": turns("hi", "hello", "bye", "see you")}]
    first, second = read_split(write(tmp_path / "x.jsonl", jsonl(rows)), CHAT).examples
    assert (first.text, first.completion, first.messages) == ("2+2=", "4", None)
    assert (second.text, second.completion) == (None, "see you")
    assert second.messages == tuple(turns("hi", "hello", "bye"))
    asked = example({"messages": turns("hi", "hello", "bye")}, CHAT)
    assert (asked.messages, asked.completion) == (second.messages, None)
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist([rows[0] | {"messages": None}, rows[1]]), tmp_path / "x.parquet"
    )
    mixed = read_split(str(tmp_path / "x.parquet"), CHAT)
    assert [row.messages for row in mixed.examples] == [None, second.messages]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "x"}, "completion: the row has no such field, only prompt; rename"),
        ({"prompt": "x", "completion": " "}, "completion: it is empty"),
        ({"prompt": "x", "completion": 4}, "completion: 4 is of type int, not a string"),
        ({"messages": "hello"}, "messages: 'hello' is not a list of turns"),
        ({"messages": []}, r"messages: \[\] is not a list of turns"),
        ({"messages": ["hello"]}, r"messages\[0\]: 'hello' needs a role and a content"),
        ({"messages": [{"role": "user", "content": None}]}, r"messages\[0\]: .* needs a role and a content"),
        ({"messages": turns("x")}, "messages: ends in 'user', not in the assistant's answer"),
        ({"messages": turns("x", " ")}, "messages: the assistant's answer is empty"),
        ({"messages": turns("x", roles=["assistant", "user"])}, "messages: nothing comes before"),
    ],
)
def test_unusable_generation_rows(tmp_path, row, message):
    with pytest.raises(DataError, match=f"x.jsonl:1: {message}"):
        read_split(write(tmp_path / "x.jsonl", jsonl([row])), CHAT)


def to_answer(lines, task, source="stdin"):
    return [example(row, task, place) for place, row in plain_rows(lines, source)]


def test_rows_to_predict_need_no_label():
    lines = ['\ufeff{"text": "a", "label": "unheard of"}\n', "\n", '{"text": "b"}\n']
    assert [(row.text, row.label, row.where) for row in to_answer(lines, REVIEWS)] == [
        ("a", None, "stdin:1"),
        ("b", None, "stdin:3"),
    ]
    plain = [b"\xef\xbb\xbf{a} film\r\n", b'  {"x\n', "déjà vu\n".encode(), b"\n", b"\n"]
    assert [row.text for row in to_answer(plain, REVIEWS, "f")] == ["{a} film", '  {"x', "déjà vu"]
    body = Task(name="t", kind="generation", instruction="Sum up: {body}")
    assert [row.text for row in to_answer(["long story"], body)] == ["long story"]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['{"text": "a"}', "plain"], "stdin:2:1: broken JSON"),
        (['{"text": "a"'], "stdin:1:13: broken JSON"),
        (['{"text": "a"}', '{"text": ""}'], "stdin:2: text: the text is empty"),
        (["a", "", "", "b"], "stdin:2: the line is empty; remove it, or give JSONL rows"),
        ([b"a", b"\xff"], "stdin:2: not UTF-8"),
    ],
)
def test_unusable_rows_to_predict(lines, message):
    with pytest.raises(DataError, match=message):
        to_answer(lines, REVIEWS)


def test_plain_lines_fill_one_field():
    task = Task(name="t", kind="classification", instruction="{title}: {text}", labels=["a", "b"])
    with pytest.raises(DataError, match=r'a plain text fills one field; give .* as JSON: {"title": ..., "text": ...}'):
        to_answer(["x"], task)
