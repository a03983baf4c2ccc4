"""What a stream file may not hold: each error names file, line and key, and what to do, in one line."""

from pathlib import Path

import pytest

from moecl.config import MoECLConfig, Task, TrainConfig, load_task
from moecl.errors import ConfigError
from stream_text import PAPER, STREAM, refusal, write


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


# (what of STREAM is replaced, by what, the line and the message)

BAD_VALUES = [
    ("lr: 1e-3", "learning_rate: 1e-3", "5: train.learning_rate: unknown key (did you mean 'lr'?)"),
    ("epochs: 2", "epoch: 2", "4: train.epoch: unknown key (did you mean 'epochs'?)"),
    ("rank: 8", "epochs: 8", "2: method.epochs: unknown key (did you mean 'train.epochs'?)"),
    ("tasks:", "lr: 1\ntasks:", "6: lr: unknown key (did you mean 'train.lr'?)"),
    (
        "limit: {train: 30}",
        "limit: {zebra: 3}",
        "11: tasks[0].limit.zebra: unknown key; remove it, or use one of train, validation, test",
    ),
    ("name: agnews", "nme: agnews", "7: tasks[0].nme: unknown key (did you mean 'name'?)"),
    ("lr: 1e-3", "lr: 1e-3\n  lr: 2", "6: train: the key 'lr' is here twice (first in line 5); remove one"),
    ("tasks:", "on: 1\ntasks:", "6: 'on' was read as a boolean; quote it: \"on\""),
    ("tasks:", "? [a]\n: 1\ntasks:", "6: a key cannot be a list or a mapping; quote it if it is a text"),
    # ranges and types
    ("lr: 1e-3", "lr: 0", "5: train.lr: 0 is out of range; give a number above 0"),
    ("lr: 1e-3", "lr: .nan", "5: train.lr: .nan is out of range; give a number above 0"),
    ("lr: 1e-3", "lr: 1e999", "5: train.lr: 1e999 is out of range; give a number above 0"),
    ("lr: 1e-3", "lr: fast", "5: train.lr: 'fast' was read as text; give a number above 0"),
    ("lr: 1e-3", "lr: [1]", "5: train.lr: was read as a list; give a number above 0"),
    ("lr: 1e-3", "lr:", "5: train.lr: holds nothing; give a number above 0"),
    ("epochs: 2", "epochs: 0", "4: train.epochs: 0 is out of range; give a whole number, 1 or more"),
    ("epochs: 2", "epochs: 1.5", "4: train.epochs: '1.5' was read as a number; give a whole number, 1 or more"),
    ("epochs: 2", "epochs: yes", "4: train.epochs: 'yes' was read as a boolean; give a whole number, 1 or more"),
    ("epochs: 2", "warmup_ratio: 1", "4: train.warmup_ratio: 1 is out of range; give a number, 0 or more, below 1"),
    ("epochs: 2", "seed: -1", "4: train.seed: -1 is out of range; give a whole number, 0 or more, below 4294967296"),
    (
        "epochs: 2",
        "schedule: linar",
        "4: train.schedule: 'linar' is unknown; give linear | cosine | constant (did you mean 'linear'?)",
    ),
    ("epochs: 2", "report_to: wandb", "4: train.report_to: 'wandb' was read as text; give a list of texts"),
    ("epochs: 2", "report_to: [1]", "4: train.report_to: '1' was read as a number; quote it: \"1\""),
    (
        "epochs: 2",
        "gradient_checkpointing: 1",
        "4: train.gradient_checkpointing: '1' was read as a number; give true | false",
    ),
    (
        "epochs: 2",
        "early_stopping: 2\n  evals_per_epoch: 0",
        "4: train.early_stopping: needs validation passes; set evals_per_epoch to 1 or more, or remove it",
    ),
    (
        "train:\n  epochs: 2\n  lr: 1e-3\n",
        "train: fast\n",
        "3: train: 'fast' was read as text; give keys under it: epochs, ",
    ),
    (
        "limit: {train: 30}",
        "limit: 30",
        "11: tasks[0].limit: '30' was read as a number; give keys under it: train, validation, test",
    ),
    (
        "limit: {train: 30}",
        "limit: {train: 0}",
        "11: tasks[0].limit.train: 0 is out of range; give a whole number, 1 or more",
    ),
    # the method
    ("rank: 8", "rank: 0", "2: method.rank: 0 is out of range; give a whole number, 1 or more"),
    ("rank: 8", "adapt_layers: 0", "2: method.adapt_layers: 0 is out of range; give all | whole number, 1 or more"),
    ("rank: 8", "adapt_layers: half", "2: method.adapt_layers: 'half' is unknown; give all | whole number, 1 or more"),
    ("rank: 8", "dropout: 1", "2: method.dropout: 1 is out of range; give a number, 0 or more, below 1"),
    ("moe-cl,", "moecl,", "2: method.name: 'moecl' is not a method; use one of: moe-cl, per-task-lora, "),
    ("moe-cl,", "true,", "2: method.name: 'true' was read as a boolean; quote it: \"true\""),
    ("{name: moe-cl, rank: 8}", "[a]", "2: method: was read as a list; give keys under it: name, adapt_layers, rank, "),
    # labels
    ("[World, Sports]", "[World, yes]", "9: tasks[0].labels: 'yes' was read as a boolean; quote it: \"yes\""),
    (
        "[World, Sports]",
        "\n      - World\n      - 010",
        "11: tasks[0].labels: '010' was read as a number; quote it: \"010\"",
    ),
    ("[World, Sports]", "[1e5, b]", "9: tasks[0].labels: '1e5' was read as a number; quote it: \"1e5\""),
    ("[World, Sports]", "[null, b]", "9: tasks[0].labels: 'null' was read as null; quote it: \"null\""),
    (
        "[World, Sports]",
        "[2024-01-01, b]",
        "9: tasks[0].labels: '2024-01-01' was read as a date; quote it: \"2024-01-01\"",
    ),
    (
        "[World, Sports]",
        "[2024-13-01, b]",
        "9: tasks[0].labels[0]: '2024-13-01' cannot be read; quote it: \"2024-13-01\"",
    ),
    ("[World, Sports]", "[=, b]", "9: tasks[0].labels[0]: '=' cannot be read; quote it: \"=\""),
    ("[World, Sports]", "{yes: a, b: c}", "9: tasks[0].labels: 'yes' was read as a boolean; quote it: \"yes\""),
    ("[World, Sports]", "{a: yes, b: c}", "9: tasks[0].labels: 'yes' was read as a boolean; quote it: \"yes\""),
    ("[World, Sports]", "{a: , b: c}", "9: tasks[0].labels: holds nothing; give a text"),
    ("[World, Sports]", "{a: ' ', b: c}", "9: tasks[0].labels: holds an empty label; give each label a text"),
    ("[World, Sports]", "['', b]", "9: tasks[0].labels: holds an empty label; give each label a text"),
    ("[World, Sports]", "World", "9: tasks[0].labels: 'World' was read as text; give a list, or map to words"),
    ("[World, Sports]", "[World]", "9: tasks[0].labels: a classification needs at least two, not 1; add the others"),
    ("[World, Sports]", "[]", "9: tasks[0].labels: a classification needs at least two, not 0; add the others"),
    ("[World, Sports]", "[World, World]", "9: tasks[0].labels: 'World' is here twice; remove one"),
    ("[World, Sports]", "{a: b, a: c}", "9: tasks[0].labels: the key 'a' is here twice (first in line 9); remove one"),
    (
        "[World, Sports]",
        "{a: x, b: x}",
        "9: tasks[0].labels: 'a' and 'b' are both written 'x'; give each its own words",
    ),
    # names and kinds
    ("name: agnews", "name: a/b", "7: tasks[0].name: 'a/b' cannot be a file name; use letters, digits"),
    ("name: agnews", "name: .a", "7: tasks[0].name: '.a' cannot be a file name; use letters, digits"),
    ("name: agnews", f"name: {'a' * 65}", f"7: tasks[0].name: '{'a' * 55}...' cannot be a file name; use"),
    ("name: agnews", 'name: "a\\n"', "7: tasks[0].name: 'a\\n' cannot be a file name; use letters, digits"),
    ("name: agnews", "name: 2024", "7: tasks[0].name: '2024' was read as a number; quote it: \"2024\""),
    ("name: agnews", "name: v1.2", "12: tasks[1].name: 'v1.2' is used twice (see tasks[0]); rename one"),
    ("name: agnews", "name: V1.2", "12: tasks[1].name: 'v1.2' differs in case only (see tasks[0]); rename one"),
    (
        "kind: classification",
        "kind: clasification",
        "8: tasks[0].kind: 'clasification' is unknown; give classification | generation "
        "(did you mean 'classification'?)",
    ),
    ("    kind: classification\n", "", "7: tasks[0].kind: is missing; add it (classification: a text to one of"),
    ("    train: data/agnews/train.jsonl\n", "", "7: tasks[0].train: is missing; add it (training rows: "),
    (
        "kind: classification",
        "kind: classification\n    metric: rouge_l",
        "9: tasks[0].metric: 'rouge_l' does not fit a classification task; give accuracy or macro_f1",
    ),
    (
        "kind: generation",
        "kind: generation\n    metric: accuracy",
        "14: tasks[1].metric: 'accuracy' does not fit a generation task; give exact_match or rouge_l",
    ),
    (
        "kind: generation",
        "kind: generation\n    head: classifier",
        "14: tasks[1].head: 'classifier' cannot write the text of a generation task; give lm",
    ),
    (
        "kind: generation",
        "kind: generation\n    labels: [a, b]",
        "14: tasks[1].labels: a generation task has none; remove the key, or set kind: classification",
    ),
    (
        "tasks:",
        "head: classifier\ntasks:",
        "13: tasks[1]: a generation task cannot have the stream's head 'classifier'; write `head: lm` in this task",
    ),
    ("tasks:", "preset: papr\ntasks:", "6: preset: 'papr' is unknown; give paper (did you mean 'paper'?)"),
    # instructions
    ("limit: {train: 30}", "instruction: {text}", "11: tasks[0].instruction: was read as a mapping; quote the text"),
    (
        "limit: {train: 30}",
        "instruction: Rate it.",
        "11: tasks[0].instruction: 'Rate it.' has no field of a row in it; write {text} where the row's text belongs",
    ),
    (
        "limit: {train: 30}",
        "instruction: 'Fill {{text}}'",
        "11: tasks[0].instruction: 'Fill {{text}}' has no field of a row in it; write {text} where",
    ),
    (
        "limit: {train: 30}",
        "instruction: 'a } {text}'",
        "11: tasks[0].instruction: 'a } {text}' has a lone '}'; write '}}' for a brace",
    ),
    (
        "limit: {train: 30}",
        "instruction: Answer: {text}",
        "11: is not valid YAML: mapping values are not allowed here; quote a text that has a colon in it",
    ),
    # sources and the base
    (
        "data/agnews/train.jsonl",
        "imdb",
        "10: tasks[0].train: 'imdb' is neither a data file (.jsonl, .ndjson, .json, .csv, .tsv, .parquet) nor a "
        "hub id; write user/name, or hub:user/name/config:split",
    ),
    ("data/agnews/train.jsonl", "[a.jsonl]", "10: tasks[0].train: was read as a list; quote the text"),
    ("data/agnews/train.jsonl", "''", "10: tasks[0].train: holds nothing; give text"),
    ("data/agnews/train.jsonl", '"a\\0.csv"', "10: tasks[0].train: 'a\\x00.csv' can be no path; remove the \\0"),
    (
        "base: smollm2-135m-instruct\n",
        "",
        "1: base: is missing; add it (the base model: an asset's name, a hub id or a folder)",
    ),
    ("base: smollm2-135m-instruct", "base:", "1: base: holds nothing; give a text"),
    # YAML itself
    (
        "  epochs: 2",
        "\tepochs: 2",
        "4: is not valid YAML: found character '\\t' that cannot start any token; indent with spaces",
    ),
    ("[World, Sports]", "[World, Sports", "10: is not valid YAML: "),
    ("base: smollm2", "base: *smollm2", "1: is not valid YAML: found undefined alias"),
    ("base: smollm2-135m-instruct", "base: !!python/object:os.system x", "1: base: has the unknown tag "),
    (
        "[World, Sports]",
        "!!set {a, b}",
        "9: tasks[0].labels: has the unknown tag 'tag:yaml.org,2002:set'; remove the tag",
    ),
    ("[World, Sports]", "&x [a, *x]", "9: tasks[0].labels[1]: refers to itself; write the value out"),
    ("method: {", "method: {<<: 3, ", "2: method: '<<' takes a mapping or a list of them; check what it names"),
]


@pytest.mark.parametrize(("old", "new", "message"), BAD_VALUES, ids=lambda value: str(value)[:40])
def test_a_bad_value(old: str, new: str, message: str) -> None:
    assert old in STREAM
    found = refusal(write(STREAM.replace(old, new, 1)))
    assert found.startswith(f"stream.yaml:{message}"), found


BAD_FILES = [
    ("", " holds nothing; write its keys (`moecl init` writes an example to start from)"),
    ("# base: x\n", " holds nothing; write its keys"),
    ("- a\n", "1: holds a list; write keys, such as `name: value`"),
    ("just text", "1: holds text; write keys, such as `name: value`"),
    (b"base: x\nname: \xff\n", "2: is not UTF-8 text; save the file as UTF-8"),
    (STREAM.encode("utf-16"), "1: is not UTF-8 text; save the file as UTF-8"),
    ("base: x\nname: a\0b\n", "2: holds U+0000, which YAML forbids; remove it"),
    ("base: x\n---\nbase: y\n", "2: is not valid YAML: "),
    ("[" * 600 + "]" * 600, " is nested too deeply; write it flatter"),
    ("base: x\n", "1: tasks: is missing; add it"),
    ("base: x\ntasks:\n", "2: tasks: holds nothing; give a list, each item with keys under it: name, kind, "),
    ("base: x\ntasks: []\n", "2: tasks: holds nothing; give a list, each item with keys under it: name, "),
    ("base: x\ntasks: {a: b}\n", "2: tasks: was read as a mapping; give a list, each item with keys under it: "),
    ("base: x\ntasks:\n- a\n", "3: tasks[0]: 'a' was read as text; give keys under it: name, kind, "),
]


@pytest.mark.parametrize(("content", "message"), BAD_FILES, ids=lambda value: str(value)[:30])
def test_a_bad_file(content: str | bytes, message: str) -> None:
    found = refusal(write(content))
    assert found.startswith(f"stream.yaml:{message}"), found


def test_no_file() -> None:
    write(STREAM)
    assert refusal("gone.yaml") == "gone.yaml: no such file; check the path"
    assert refusal(".") == ".: is a folder; give the path of a YAML file"
    assert refusal("stream.yaml/x").startswith("stream.yaml/x: cannot be read (Not a directory); check the path")
    assert refusal("a\0b").startswith("a\0b: cannot be read (")


# --set, the preset, one task, Python


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.lr", "is no setting; write it as key=value, such as train.lr=1e-4"),
        ("=3", "is no setting; write it as key=value, such as train.lr=1e-4"),
        ("train.lr=-1", "train.lr: -1 is out of range; give a number above 0"),
        ("train.lr=", "train.lr: holds nothing; give a number above 0"),
        ("train.lr=[", "is not valid YAML: "),
        ("train.learning_rate=1", "train.learning_rate: unknown key (did you mean 'lr'?)"),
        ("limit.train=5", "limit: unknown key; remove it, or use one of name, base, "),
        ("base.x=1", "base: has no keys under it; set base itself"),
        (
            "tasks.agnew.name=d",
            "tasks: 'agnew' is not one of them (did you mean 'agnews'?); use one of agnews, v1.2, or a",
        ),
        ("tasks.2.name=d", "tasks: '2' is not one of them; use one of agnews, v1.2, or a number from 0 to 1"),
        ("tasks.agnews.labels=[yes, no]", "tasks[0].labels: 'yes' was read as a boolean; quote it: \"yes\""),
        ("method=ewcc", "method.name: 'ewcc' is not a method; use one of: moe-cl"),
        ("preset=none", "preset: 'none' is unknown; give paper"),
    ],
)
def test_a_bad_override_is_named_as_it_was_typed(override: str, message: str) -> None:
    found = refusal(write(STREAM), [override])
    assert found.startswith(f"--set {override}: {message}"), found


def test_a_file_s_own_error_keeps_its_line_after_an_override() -> None:
    found = refusal(write(STREAM.replace("rank: 8", "rank: 0")), ["train.lr=1", "method.alpha=0"])
    assert found.startswith("stream.yaml:2: method.rank: 0 is out of range")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("train: fast", "train: 'fast' was read as text; give keys under it: epochs, "),
        ("method: [a]", "method: was read as a list; give keys under it: name, "),
        ("method: {zebra: 1}", "method.zebra: unknown key; remove it, or use one of name, "),
        ("method: {name: [a]}", "method.name: was read as a list; quote the text"),
    ],
)
def test_the_preset_hides_no_error(line: str, message: str) -> None:
    found = refusal(write(f"{PAPER}{line}\n"))
    assert found.startswith(f"stream.yaml:12: {message}"), found


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("name: a\nkid: generation\ntrain: a.csv\n", "new.yaml:2: kid: unknown key (did you mean 'kind'?)"),
        ("name: a\nkind: generation\n", "new.yaml:1: train: is missing; add it (training rows"),
        (
            "tasks:\n- name: a\n  kind: zebra\n  train: a.csv",
            "new.yaml:3: kind: 'zebra' is unknown; give classification",
        ),
        ("tasks: []\n", "new.yaml:1: tasks: must be a list of exactly one task; give a file with that task alone"),
        ("base: x\ntasks:\n- name: a\n", "new.yaml:1: base: does not belong in a task's file; remove it"),
        ("tasks: [a]\n", "new.yaml:1: holds text; write keys"),
        ("", "new.yaml: holds nothing; write its keys"),
    ],
)
def test_a_bad_task_file(content: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_task(write(content, "new.yaml"))
    assert str(caught.value).startswith(message)


def test_python_gets_one_line_too() -> None:
    with pytest.raises(ConfigError, match=r"^MoECLConfig: rank: 0 is out of range; give a whole number, 1 or more$"):
        MoECLConfig(rank=0)
    with pytest.raises(ConfigError, match=r"^TrainConfig: learning_rate: unknown key \(did you mean 'lr'\?\)$"):
        TrainConfig(learning_rate=1.0)  # type: ignore[call-arg]
    with pytest.raises(ConfigError, match=r"^Task: labels: True is a boolean; give a text$"):
        Task(name="a", kind="classification", labels=[True, "b"])  # type: ignore[arg-type]
