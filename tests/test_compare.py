"""The regression gate: which differences fail, which comparisons are refused, and the command."""

import json
import shutil
from pathlib import Path

import pytest
from typer.main import get_command

from moecl.cli import app, main
from moecl.compare import TextLosses, compare_tasks, compare_texts, decide, failed, read_result
from moecl.engine import Engine
from moecl.errors import RunError, UserError
from moecl.general import text_losses
from moecl.model import MoECL
from moecl.results import Items, Result
from moecl.train import learn as learn_task
from runs import QUICK, learn, stream
from test_learn import new


def result(right: dict[str, int], rows: int = 100, sha: str = "ab", **changes) -> Result:
    """A run whose tasks answered so many of their rows right."""
    tasks = list(right)
    scores: list[list[float | None]] = [[None] * len(tasks) for _ in tasks]
    items = {
        name: Items(metric="accuracy", labels=["a", "b"], true=[0] * rows, given=[0] * n + [1] * (rows - n))
        for name, n in right.items()
    }
    fields = {
        "method": "moe-cl",
        "seed": 0,
        "tasks": tasks,
        "R": [*scores, [n / rows for n in right.values()]],
        "seconds": 1,
        "data": {name: {"test": {"sha256": sha * 32, "rows": rows}} for name in tasks},
        "items": items,
    }
    return Result(**(fields | changes))


def verdicts(old: Result, new: Result, max_drop: float = 0.01, decides="point") -> dict[str, tuple]:
    return {one.task: (one.verdict, one.reason) for one in compare_tasks(old, new, max_drop, decides)}


def test_a_drop_fails_and_only_beyond_what_is_allowed():
    old, now = result({"kept": 80, "lost": 80, "edge": 80}), result({"kept": 81, "lost": 78, "edge": 79})
    assert verdicts(old, now) == {"kept": ("pass", None), "lost": ("fail", None), "edge": ("pass", None)}
    lost = compare_tasks(old, now, 0.01, "point")[1]
    assert (lost.old, lost.new, lost.difference, lost.rows) == (0.8, 0.78, -0.02, 100)
    assert lost.low < -0.02 < lost.high <= 0


def test_the_interval_may_decide():
    old, now = result({"a": 80, "b": 80, "c": 80}), result({"a": 78, "b": 50, "c": 80})
    assert [one[0] for one in verdicts(old, now, decides="strict").values()] == ["fail", "fail", "pass"]
    assert [one[0] for one in verdicts(old, now, decides="confident").values()] == ["pass", "fail", "pass"]


def test_tasks_that_one_side_lacks():
    old, now = result({"a": 80, "gone": 80}), result({"a": 80, "added": 70})
    found = compare_tasks(old, now, 0.01, "confident")
    assert [(one.task, one.verdict, one.reason) for one in found] == [
        ("a", "pass", None),
        ("gone", "fail", "not in NEW"),
        ("added", None, "not in OLD"),
    ]
    assert (found[1].old, found[1].new, found[2].old, found[2].new) == (0.8, None, None, 0.7)
    assert failed(found, None) == ["gone"]


def test_a_task_that_is_not_tested_any_more():
    tested = result({"a": 80})
    untested = result({"a": 80}, R=[[None], [None]], items={})
    assert verdicts(tested, untested) == {"a": ("fail", "not tested in NEW")}
    assert verdicts(untested, tested) == {"a": (None, "no score in OLD")}
    assert verdicts(untested, result({"b": 1})) == {"a": (None, "no score in OLD"), "b": (None, "not in OLD")}


def test_other_test_rows_are_refused():
    with pytest.raises(UserError, match=r"task 'a': the test rows differ: OLD has 100 \(sha256 abab.*NEW 90"):
        compare_tasks(result({"a": 80}), result({"a": 80}, rows=90, sha="cd"), 0.01, "point")
    items = {"a": Items(metric="accuracy", labels=["b", "a"], true=[0] * 100, given=[0] * 100)}
    with pytest.raises(UserError, match="true labels"):
        compare_tasks(result({"a": 80}), result({"a": 80}, items=items), 0.01, "point")


def test_a_result_of_an_older_moecl_is_refused():
    with pytest.raises(RunError, match=r"^NEW: its result has a score of task 'a' but not the rows.*train the stream"):
        compare_tasks(result({"a": 80}), result({"a": 80}, items={}), 0.01, "point")


@pytest.mark.parametrize("max_drop", [float("nan"), -0.1, 5])
def test_a_drop_that_means_nothing(max_drop):
    with pytest.raises(UserError, match=r"--max-drop: .* is out of range"):
        compare_tasks(result({"a": 80}), result({"a": 80}), max_drop, "point")


def test_decide_forgives_rounding():
    assert decide(0.89 - 0.9, 0, 0, 0.01, "point") == "pass"
    assert decide(float("nan"), 0, 0, 0.01, "point") == "fail"


# --- texts of no task ---


def test_texts_by_hand():
    old, now = TextLosses(losses=[2.0, 6.0], tokens=[1, 3]), TextLosses(losses=[2.2, 6.6], tokens=[1, 3])
    found = compare_texts(old, now, 0.05, "confident")
    assert (found.old, found.new, found.texts, found.tokens) == (-2.0, pytest.approx(-2.2), 2, 4)
    assert (found.increase, found.low, found.high) == pytest.approx((0.1, 0.1, 0.1))
    assert found.verdict == "fail"
    assert failed([], found) == ["--general"]
    assert compare_texts(now, old, 0.05, "strict").verdict == "pass", "less loss is no drop"
    same = compare_texts(old, old, 0.0, "strict")
    assert (same.increase, same.low, same.high, same.verdict) == (0, 0, 0, "pass")


def test_texts_without_a_token_to_predict():
    some = TextLosses(losses=[0.0, 3.0], tokens=[0, 2])
    assert compare_texts(some, some, 0.01, "point").tokens == 2
    with pytest.raises(UserError, match="no token to predict"):
        compare_texts(*[TextLosses(losses=[0.0], tokens=[0])] * 2, 0.01, "point")
    broken = TextLosses(losses=[0.0, float("nan")], tokens=[0, 2])
    for sides, name in (((broken, some), "OLD"), ((some, broken), "NEW")):
        with pytest.raises(UserError, match=f"{name} gives text 2 a loss that is not finite"):
            compare_texts(*sides, 0.01, "strict")
    with pytest.raises(UserError, match="into other tokens"):
        compare_texts(some, TextLosses(losses=[0.0, 3.0], tokens=[0, 3]), 0.01, "point")


def test_a_texts_loss_is_the_models_own(runs):
    engine = Engine(MoECL.from_pretrained(runs / "old", device="cpu"))
    texts = ["the cat had tea", "a", "one day at sea " * 100]
    base, own = text_losses(engine, texts), text_losses(engine, texts, "task0")
    assert (base.cut, base.tokens[1], base.losses[1]) == (1, 0, 0)
    assert base.tokens[2] == 255, "as many as the base has positions"
    ids = engine.tokenizer(texts[0], return_tensors="pt")["input_ids"]
    for found, task in ((base, None), (own, "task0")):
        loss = engine.model(ids, labels=ids.clone(), task=task).loss * found.tokens[0]
        assert found.losses[0] == pytest.approx(float(loss), rel=1e-5)
    assert base.losses[0] != own.losses[0]
    mixed = text_losses(engine, texts, ["task0", None, None])
    assert mixed.losses[0] == pytest.approx(own.losses[0], rel=1e-5)
    assert mixed.losses[2] == pytest.approx(base.losses[2], rel=1e-5)


# --- the command ---


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_folder) -> Path:
    """A folder with `old`, of two tasks, and `new`, which has learned one more."""
    folder = tmp_path_factory.mktemp("compare")
    learn(stream(folder / "s", tiny_folder, rows=16, train={**QUICK, "precision": "fp32"}), folder / "old")
    shutil.copytree(folder / "old", folder / "new")
    learn_task(folder / "new", new(folder / "n"))
    return folder


@pytest.fixture
def compare(runs, capsys, monkeypatch):
    """Call `moecl compare` in the runs' folder: (status, stdout, the last line of stderr)."""
    monkeypatch.chdir(runs)

    def call(*words) -> tuple[int, str, str]:
        capsys.readouterr()
        status = main(["compare", *map(str, words)])
        found = capsys.readouterr()
        return status, found.out, (found.err.splitlines() or [""])[-1]

    return call


def test_nothing_was_lost(compare, tmp_path):
    status, out, said = compare("old", "new", "-o", tmp_path / "c.json")
    assert (status, said) == (0, "")
    assert "not in OLD" in out
    found = json.loads((tmp_path / "c.json").read_text())
    assert [(one["task"], one["difference"], one["verdict"]) for one in found["tasks"]] == [
        ("task0", 0, "pass"),
        ("task1", 0, "pass"),
        ("new", None, None),
    ]
    assert (found["schema"], found["failed"], found["decides"], found["general"]) == (1, [], "point", None)
    assert json.loads(compare("old/result.json", "new", "--json")[1])["tasks"] == found["tasks"]


def test_the_wrong_way_round(compare):
    status, out, said = compare("new", "old")
    assert (status, said) == (3, "moecl: failed: new (are OLD and NEW the right way round?)")
    assert "fail: not in NEW" in out


@pytest.mark.parametrize("text", ['{"text": "the cat had tea"}\n\n{"text": "one day"}\n', "the cat had tea\none day"])
def test_general_texts_are_the_same_bitwise_where_the_base_is_left_alone(compare, tmp_path, text):
    (tmp_path / "texts").write_text(text)
    status, out, _ = compare("old", "new/result.json", "--general", tmp_path / "texts", "--strict", "--json")
    found = json.loads(out)["general"]
    assert (status, found["texts"], found["increase"], found["low"], found["high"]) == (0, 2, 0, 0, 0)
    assert found["old"] == found["new"] < 0
    out = compare("old", "new", "--general", tmp_path / "texts", "--max-drop", "0")[1]
    assert "loss +0.00% (+0.00% to +0.00%), pass: 2 texts" in out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("olt new", "olt: no such file or folder (did you mean 'old'?); give a run folder or a result.json"),
        ("old no/run", "no/run: no such file or folder; give a run folder or a result.json"),
        ("s new", "s: not a run folder (no result.json); give one that `moecl train STREAM -o RUN` has made"),
        ("s/stream.yaml new", "s/stream.yaml:1: is not JSON"),
        ("old new --strict --confident", "--strict, --confident: they contradict each other; give one"),
        ("old new --max-drop nan", "--max-drop: nan is out of range"),
        ("old new --general no.txt", "no.txt: No such file or directory"),
        ("old new -o no/c.json", "-o no/c.json: no folder no; make it first"),
        ("old", "Missing argument 'NEW'; see `moecl compare --help`"),
    ],
)
def test_misuse(compare, words, said):
    status, out, line = compare(*words.split())
    assert (status, out) == (2, "")
    assert line.startswith(f"moecl: {said}")


def test_folders_that_are_not_what_is_asked_for(runs, tmp_path, compare):
    (tmp_path / "bench" / "cells" / "moe-cl.one.s0").mkdir(parents=True)
    with pytest.raises(RunError, match=r"a bench; give one of its cells, such as .*moe-cl.one.s0"):
        read_result(tmp_path / "bench")
    (tmp_path / "begun").mkdir()
    shutil.copy(runs / "old" / "config.yaml", tmp_path / "begun")
    with pytest.raises(RunError, match="has no result yet; go on with the command"):
        read_result(tmp_path / "begun")
    shutil.copy(runs / "old" / "result.json", tmp_path / "begun")
    (tmp_path / "texts").write_text("one day\n")
    assert compare(tmp_path / "begun", "new")[0] == 0, "a result is enough"
    status, _, line = compare(tmp_path / "begun", "new", "--general", tmp_path / "texts")
    assert (status, "not a run folder" in line) == (2, True)
    (tmp_path / "texts").write_text("")
    assert "the file is empty" in compare("old", "new", "--general", tmp_path / "texts")[2]


def test_help_says_what_decides():
    said = " ".join(get_command(app).commands["compare"].help.split())
    assert "difference itself decides, unless --strict or --confident" in said
