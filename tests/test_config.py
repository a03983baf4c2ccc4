"""Stream files: what is read, what is refused and in which words, and that nothing is lost when one is written."""

import random
from pathlib import Path
from typing import Any

import pytest

from moecl.config import (
    Limit,
    StreamConfig,
    Task,
    TaskConfig,
    TrainConfig,
    describe_settings,
    dump_stream,
    load_stream,
    load_task,
)
from moecl.method_config import METHODS, MethodConfig, MoECLConfig
from stream_text import PAPER, STREAM, refusal, write

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("[!b]*.yaml"))  # but those of benches


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


# Reading


def test_a_stream(tmp_path: Path) -> None:
    stream = load_stream(write(STREAM))
    assert stream == StreamConfig(
        base="smollm2-135m-instruct",
        train=TrainConfig(epochs=2, lr=0.001),
        tasks=[
            TaskConfig(
                name="agnews",
                kind="classification",
                labels={"World": "World", "Sports": "Sports"},
                train=str(tmp_path / "data/agnews/train.jsonl"),
                limit=Limit(train=30),
            ),
            TaskConfig(name="v1.2", kind="generation", train="some-user/some-data"),
        ],
    )
    assert isinstance(stream.method, MoECLConfig)


def test_defaults_go_by_kind() -> None:
    classification = Task(name="a", kind="classification")
    assert (classification.instruction, classification.metric) == ("{text}\nAnswer:", "accuracy")
    assert classification.labels is None
    generation = Task(name="a", kind="generation")
    assert (generation.instruction, generation.metric, generation.labels) == ("{prompt}", "exact_match", {})


def test_a_shorter_way_to_write_things() -> None:
    text = STREAM.replace("{name: moe-cl, rank: 8}", "moe-cl").replace("limit: {train: 30}", "limit:")
    stream = load_stream(write(text.replace("  epochs: 2\n  lr: 1e-3\n", "")))
    assert stream.method == MoECLConfig()
    assert stream.train == TrainConfig()
    assert stream.tasks[0].limit == Limit()


@pytest.mark.parametrize(
    ("written", "value"), [("1e-3", 0.001), ("1E-3", 0.001), ("1.0e-3", 0.001), ("2", 2.0), (".5", 0.5), ("3e+0", 3.0)]
)
def test_numbers(written: str, value: float) -> None:
    stream = load_stream(write(STREAM.replace("1e-3", written)))
    assert stream.train.lr == value
    assert isinstance(stream.train.lr, float)


def test_anchors_merge() -> None:
    text = STREAM.replace("  - name: agnews", "  - &first\n    name: agnews")
    stream = load_stream(write(text + "  - {<<: *first, name: again}\n  - {<<: *first, name: more}\n"))
    assert [task.name for task in stream.tasks] == ["agnews", "v1.2", "again", "more"]
    assert stream.tasks[3].labels == stream.tasks[0].labels


def test_windows_line_ends_and_a_byte_order_mark() -> None:
    expected = load_stream(write(STREAM))
    assert load_stream(write(b"\xef\xbb\xbf" + STREAM.replace("\n", "\r\n").encode())) == expected


# Paths


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("data/a.jsonl", "{folder}/data/a.jsonl"),
        ("data/a.CSV.gz", "{folder}/data/a.CSV.gz"),
        ("./there", "{folder}/there"),
        ("../there", "{parent}/there"),
        ("/abs/there", "/abs/there"),
        ("known", "{folder}/known"),
        ("user/known", "{folder}/user/known"),
        ("user/name", "user/name"),
        ("user/name:train", "user/name:train"),
        ("hub:imdb", "hub:imdb"),
        ("hub:user/name/config:split", "hub:user/name/config:split"),
        ("asset:vader4/tweets/train", "asset:vader4/tweets/train"),
    ],
)
def test_sources(tmp_path: Path, source: str, expected: str) -> None:
    folder = tmp_path / "streams"
    (folder / "user").mkdir(parents=True)
    (folder / "known").touch()
    (folder / "user" / "known").touch()
    (folder / "stream.yaml").write_text(STREAM.replace("data/agnews/train.jsonl", source))
    task = load_stream(folder / "stream.yaml").tasks[0]
    assert task.train == expected.format(folder=folder, parent=tmp_path)


def test_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    text = STREAM.replace("data/agnews/train.jsonl", "~/a.jsonl").replace(
        "base: smollm2-135m-instruct", "base: ~/model"
    )
    stream = load_stream(write(text))
    assert (stream.base, stream.tasks[0].train) == ("/home/me/model", "/home/me/a.jsonl")


def test_a_path_does_not_depend_on_the_current_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    expected = load_stream(write(STREAM))
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path / "below")
    assert load_stream("../stream.yaml") == expected


def test_a_link_keeps_its_name(tmp_path: Path) -> None:
    (tmp_path / "blob").touch()
    (tmp_path / "a.jsonl").symlink_to("blob")
    stream = load_stream(write(STREAM.replace("data/agnews/train.jsonl", "a.jsonl")))
    assert stream.tasks[0].train == str(tmp_path / "a.jsonl")


@pytest.mark.parametrize(
    ("base", "expected"),
    [
        ("smollm2-135m-instruct", "smollm2-135m-instruct"),
        ("user/model", "user/model"),
        ("./model", "{folder}/model"),
        ("models/mine", "{folder}/models/mine"),
        ("models/empty", "models/empty"),
    ],
)
def test_base(tmp_path: Path, base: str, expected: str) -> None:
    (tmp_path / "models" / "mine").mkdir(parents=True)
    (tmp_path / "models" / "mine" / "config.json").touch()
    (tmp_path / "models" / "empty").mkdir()
    stream = load_stream(write(STREAM.replace("smollm2-135m-instruct", base, 1)))
    assert stream.base == expected.format(folder=tmp_path)


# --set


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("train.lr=1e-4", lambda stream: stream.train.lr == 1e-4),
        ("train.threads=2", lambda stream: stream.train.threads == 2),
        ("train.report_to=[]", lambda stream: stream.train.report_to == []),
        ("method.rank=4", lambda stream: stream.method == MoECLConfig(rank=4)),
        ("method=moe-cl", lambda stream: stream.method == MoECLConfig()),
        ("name=first try", lambda stream: stream.name == "first try"),
        ("tasks.0.limit.train=50", lambda stream: stream.tasks[0].limit.train == 50),
        ("tasks.agnews.limit.train=50", lambda stream: stream.tasks[0].limit.train == 50),
        ("tasks[0].limit.train=50", lambda stream: stream.tasks[0].limit.train == 50),
        ("tasks.v1.2.limit.test=5", lambda stream: stream.tasks[1].limit == Limit(test=5)),
        ("tasks.agnews.limit=null", lambda stream: stream.tasks[0].limit == Limit()),
        ("tasks.agnews.labels=[a, b]", lambda stream: stream.tasks[0].labels == {"a": "a", "b": "b"}),
        ("tasks.agnews.instruction='{text} = '", lambda stream: stream.tasks[0].instruction == "{text} = "),
        ("tasks.agnews.train=b.csv", lambda stream: stream.tasks[0].train == str(Path.cwd() / "b.csv")),
    ],
)
def test_an_override(override: str, value: Any) -> None:
    assert value(load_stream(write(STREAM), [override]))


def test_overrides_follow_each_other_and_open_what_is_not_there() -> None:
    text = STREAM.replace("train:\n  epochs: 2\n  lr: 1e-3\n", "").replace("{name: moe-cl, rank: 8}", "moe-cl")
    stream = load_stream(write(text), ["train.lr=1", "train.lr=2", "train.epochs=4", "method.rank=2"])
    assert stream.train == TrainConfig(lr=2, epochs=4)
    assert stream.method == MoECLConfig(rank=2)


# preset: paper


def paper_train(**given: Any) -> TrainConfig:
    paper = {"lr": 2e-4, "weight_decay": 0.01, "batch_size": 8, "epochs": 3}
    code = {"schedule": "constant", "warmup_ratio": 0, "max_grad_norm": 0, "evals_per_epoch": 3}
    return TrainConfig(**{**paper, **code, **given})


def test_the_preset_is_the_paper() -> None:
    stream = load_stream(write(PAPER))
    assert stream.method == MoECLConfig.paper()
    assert stream.head == "classifier"
    assert stream.train == paper_train()
    assert MoECLConfig.paper() == MoECLConfig(
        rank=8,
        lora_alpha=16.0,
        lora_A_lr=1.0,
        dropout=0.05,
        adapt_layers="all",
        nested=False,
        retention="live",
        gate="shared",
        gate_std=0.02,
        alpha=0.1,
        discriminator_memory="none",
    )


def test_given_keys_win_over_the_preset() -> None:
    text = PAPER + "head: lm\nmethod: {dropout: 0, rank: 4}\ntrain: {epochs: 1}\n"
    stream = load_stream(write(text), ["train.batch_size=2"])
    assert stream.head == "lm"
    assert stream.method == MoECLConfig.paper().model_copy(update={"dropout": 0.0, "rank": 4})
    assert stream.train == paper_train(batch_size=2, epochs=1)


def test_the_preset_in_python() -> None:
    task = TaskConfig(name="a", kind="classification", train="a.jsonl")
    stream = StreamConfig(base="x", preset="paper", method=MoECLConfig(rank=2), train=TrainConfig(lr=1), tasks=[task])
    assert stream.method == MoECLConfig.paper().model_copy(update={"rank": 2})
    assert stream.train == paper_train(lr=1)


# Other methods


class OtherConfig(MethodConfig):
    """A second method, as later ones are added."""

    name: str = "other"
    strength: float = 1.0


def test_a_method_that_is_registered_is_read_written_and_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "other", OtherConfig)
    text = STREAM.replace("{name: moe-cl, rank: 8}", "{name: other, strength: 2}")
    stream = load_stream(write(text))
    assert stream.method == OtherConfig(strength=2.0)
    assert load_stream(write(dump_stream(stream))) == stream
    found = refusal(write(text.replace("strength", "strenght")))
    assert found == "stream.yaml:2: method.strenght: unknown key (did you mean 'strength'?)"
    assert load_stream(write(text), ["preset=paper", "tasks.1.head=lm"]).method == OtherConfig(strength=2.0)


# Writing


def test_a_written_stream_is_read_back_equal() -> None:
    for text in (STREAM, PAPER, STREAM.replace("[World, Sports]", "{very negative: terrible, 'yes': '1e-3'}")):
        stream = load_stream(write(text))
        written = dump_stream(stream)
        assert load_stream(write(written, "copy.yaml")) == stream
        assert dump_stream(load_stream("copy.yaml")) == written


def test_every_text_and_number_survives() -> None:
    draw = random.Random(0)
    alphabet = "ab 10.e-+:#'\"\\\n\t[]{}&*!|>%@`,?=~\u00e9\u2028\u0085\ufeff\u00a0\u4e2d\U0001f600\x7f\x07"
    texts = [
        "yes",
        "null",
        "1e-3",
        "1E5",
        "0x10",
        "012",
        "1_0",
        "12:30",
        "2024-01-01",
        "=",
        "<<",
        "~",
        "",
        " ",
        "\n",
        "a" * 300,
    ]
    texts += ["".join(draw.choices(alphabet, k=draw.randint(1, 40))) for _ in range(80)]
    labels = {f"{index}{text}": f"{text}{index}" for index, text in enumerate(texts)}
    labels |= {text: f"word {index}" for index, text in enumerate(texts) if text.strip()}
    for index in range(0, len(texts), 19):
        stream = StreamConfig(
            base=f"x{texts[index]}",
            name=texts[-index],
            train=TrainConfig(lr=draw.random() * 10 ** draw.randint(-12, 12), weight_decay=draw.random()),
            method=MoECLConfig(alpha=draw.random(), lora_alpha=float(10 ** draw.randint(0, 30))),
            tasks=[
                TaskConfig(
                    name="a",
                    kind="classification",
                    instruction="".join(texts[-index:]).replace("{", "{{").replace("}", "}}") + "{text}\n",
                    labels=labels,
                    train="/data/a.jsonl",
                )
            ],
        )
        assert load_stream(write(dump_stream(stream))) == stream


def test_labels_keep_their_order() -> None:
    stream = load_stream(write(STREAM.replace("[World, Sports]", "[c, a, b]")))
    copy = load_stream(write(dump_stream(stream)))
    assert list(copy.tasks[0].labels or ()) == ["c", "a", "b"]


# One task


def test_load_task(tmp_path: Path) -> None:
    expected = TaskConfig(name="a", kind="classification", labels={"x": "x", "y": "y"}, train=str(tmp_path / "a.csv"))
    bare = "name: a\nkind: classification\nlabels: [x, y]\ntrain: a.csv\n"
    assert load_task(write(bare)) == expected
    assert load_task(write("tasks: [{name: a, kind: classification, labels: [x, y], train: a.csv}]\n")) == expected


def test_settings_do_not_change() -> None:
    with pytest.raises(ValueError, match="frozen"):
        MoECLConfig().rank = 4  # type: ignore[misc]


def test_a_config_is_plain_data_and_back() -> None:
    task = TaskConfig(name="a", kind="generation", train="a.jsonl")
    stream = StreamConfig(base="x", tasks=[task])
    assert StreamConfig.model_validate(stream.model_dump()) == stream
    assert Task.model_validate_json(Task(name="a", kind="classification").model_dump_json()).kind == "classification"


# Descriptions and examples


def test_every_setting_is_described_once() -> None:
    rows = describe_settings()
    keys = [key for key, *_ in rows]
    assert len(keys) == len(set(keys))
    assert all(type_ and default and description for _, type_, default, description in rows)
    table = {key: tuple(rest) for key, *rest in rows}
    assert table["train.lr"] == ("number above 0", "0.002", "peak learning rate of AdamW")
    assert table["method.adapt_layers"][:2] == ("all | whole number, 1 or more", "all")
    assert table["train.threads"][:2] == ("whole number, 1 or more", "null")
    assert [key for key, _, default, _ in rows if default == "required"] == [
        *("base", "tasks[].name", "tasks[].kind", "tasks[].train"),
    ]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_an_example_is_valid(path: Path) -> None:
    stream = load_stream(path)
    for task in stream.tasks:
        assert task.validation
        assert task.test
        words = list((task.labels or {}).values())
        assert len(words) > 1
        assert not any(" " in word for word in words)


def test_there_are_three_examples() -> None:
    assert [path.stem for path in EXAMPLES] == ["compliance3", "mtl5", "vader4"]


def test_a_nested_expert_does_not_start_as_a_copy_of_the_shared_one() -> None:
    overrides = ["method.warm_start=shared"]
    assert refusal(write(STREAM), overrides).endswith("as a nested one adds to it; set nested: false too")
    assert load_stream(write(STREAM), [*overrides, "method.nested=false"]).method.warm_start == "shared"
