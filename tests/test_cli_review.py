"""`moecl review` as people use and misuse it, on runs without a model."""

import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from command_lines import calls, parse
from moecl.cli import main
from moecl.results import Items, Result, SplitInfo
from moecl.review import Thresholds, decide
from moecl.review_rows import of_run, read_scored
from review_runs import LABELS, row, write_drawn_run, write_result, write_rows, write_run, write_seen

DOCS = Path(__file__).parents[1] / "docs" / "review.md"
SURE = [("compliant", "compliant", 0.9), ("violation", "violation", 0.8)]
GENERATED = {"row": 1, "label": "a text", "answer": "a text", "scores": {}}


@pytest.fixture
def say(capsys):
    """Call `moecl review`; what it printed, or the one line with which it refused."""

    def call(*words, status: int = 0) -> str:
        capsys.readouterr()
        assert main(["review", *map(str, words)]) == status
        done = capsys.readouterr()
        if not status:
            return done.out
        [line] = done.err.splitlines()
        assert done.out == ""
        return line.removeprefix("moecl: ")

    return call


@pytest.fixture
def tiny(tmp_path) -> Path:
    return write_run(tmp_path / "run", {"t": {"validation": SURE, "test": SURE}})


# Use


def test_rescoring_needs_a_run(tmp_path, say):
    rows = write_seen(tmp_path / "rows.jsonl", SURE)
    assert say("--validation", rows, "--test", rows, "--rescore", status=2).startswith("--rescore: needs a run")


def test_a_run_is_reviewed(tmp_path, say):
    run, old = write_drawn_run(tmp_path / "mine", 1.5), write_drawn_run(tmp_path / "old", 0.2)
    shown = say(run, "--against", old)
    for words in ("comments", "videos", "all tasks", "A mine against B old", "calibration"):
        assert words in shown
    assert max(map(len, shown.splitlines())) <= 80
    found = json.loads((run / "review" / "review.json").read_text())
    assert {path.name for path in (run / "review").iterdir()} == {
        "thresholds.json",
        "review.json",
        "review.md",
        "review.html",
    }
    assert json.loads(say(run, "--against", old, "--json")) == found
    assert found["total"]["rows"] == 800
    assert found["against"]["total"]["difference"] > 0
    thresholds = Thresholds.load(run / "review" / "thresholds.json")
    for name, pair in of_run(run)[0].items():
        answers = [
            (pair.test.labels[place], share) for place, share in zip(pair.test.given, pair.test.share, strict=True)
        ]
        made = [decide(thresholds.tasks[name], label, {label: share}) for label, share in answers]
        assert sum(one != "review" for one in made) == found["tasks"][name]["decided"]


def test_the_page_stands_alone_and_is_the_same_each_time(tmp_path, say):
    run = write_drawn_run(tmp_path / "a <b> & c", 1.0, rows=40)
    say(run)
    text = (run / "review" / "review.html").read_text()
    say(run)
    assert (run / "review" / "review.html").read_text() == text
    assert "<h1>Review of a &lt;b&gt; &amp; c</h1>" in text
    assert text.count("<svg") == 2
    assert "prefers-color-scheme: dark" in text
    assert not re.search(r"(src|href)=\"(?!#)", text.replace("xlink:href", "href"))
    outside = re.sub(r"<style>.*?</style>", "", text, count=1, flags=re.DOTALL)
    assert not re.findall(r"#0[0-9a-f]0[0-9a-f]0[0-9a-f]\b", outside)
    assert text.count("<table>") == 2


def test_markdown_tables_have_even_rows(tmp_path, say):
    odd = {"scores": {"a|b": 0.9, "*c*": 0.1}, "label": "a|b", "answer": "a|b"}
    path = write_rows(tmp_path / "t.jsonl", [odd])
    say("--validation", path, "--test", path, "-o", tmp_path / "out")
    rows = [line for line in (tmp_path / "out" / "review.md").read_text().splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in rows} == {7, 5}


def test_files_are_reviewed_and_written_only_where_asked(tmp_path, say):
    path = write_seen(tmp_path / "reviews.test.jsonl", SURE)
    assert "reviews" in say("--validation", path, "--test", path)
    assert [one.name for one in tmp_path.iterdir()] == ["reviews.test.jsonl"]
    say("--validation", path, "--test", path, "--task", "mine", "-o", tmp_path / "deep" / "er")
    assert list(Thresholds.load(tmp_path / "deep" / "er" / "thresholds.json").tasks) == ["mine"]


def test_rows_that_set_their_own_thresholds_are_told(tmp_path, say):
    path, other = (write_seen(tmp_path / name, rows) for name, rows in (("v", SURE), ("t", SURE * 2)))
    assert "flattered, as the test rows are the validation rows: mine" in say(
        "--validation", path, "--test", path, "--task", "mine"
    )
    assert "flattered" not in say("--validation", path, "--test", other)


def test_what_predict_writes_is_read(tmp_path):
    runs = write_seen(tmp_path / "run.jsonl", SURE)
    predicted = write_rows(
        tmp_path / "predict.jsonl",
        [
            {"label": one["answer"], "scores": one["scores"], "decision": "review", "true": one["label"]}
            for one in (row(n, *seen) for n, seen in enumerate(SURE, 1))
        ],
    )
    one, two = read_scored(runs), read_scored(predicted)
    assert one is not None
    assert two is not None
    assert (one.labels, one.sha256) == (two.labels, two.sha256)


def test_rows_may_come_in_any_order(tmp_path):
    rows = [row(n, *seen) for n, seen in enumerate(SURE * 3, 1)]
    one, two = (
        read_scored(write_rows(tmp_path / name, order)) for name, order in (("a", rows), ("b", rows[:1] + rows[:0:-1]))
    )
    assert one is not None
    assert two is not None
    assert one.sha256 == two.sha256
    assert np.array_equal(one.share, two.share)


def test_shares_are_compared_as_predict_prints_them(tmp_path):
    [fine] = read_scored(
        write_rows(tmp_path / "fine", [{**row(1, *SURE[0]), "scores": {"compliant": 0.87654349}}])
    ).share
    assert fine == 0.876543


def test_tasks_without_thresholds_are_skipped_with_a_word(tmp_path, say):
    run = write_run(tmp_path / "run", {"t": {"validation": SURE, "test": SURE}, "lone": {"test": SURE}})
    for split in ("validation", "test"):
        write_rows(run / "predictions" / f"stories.{split}.jsonl", [GENERATED])
    write_result(run, ["t", "lone", "stories"])
    shown = say(run)
    assert "skipped lone: no predictions/lone.validation.jsonl" in shown
    assert "skipped stories: a generation task, which has no thresholds" in shown
    assert "skipped" not in say(run, "--task", "t")
    assert "nothing to review (stories: a generation task" in say(run, "--task", "stories", status=2)


def test_a_run_without_its_store_is_reviewed(own, say):
    shutil.rmtree(own / "store")
    (own / "predictions" / "task0.validation.jsonl").unlink()
    assert "skipped task0: no predictions/task0.validation.jsonl" in say(own)


def test_tasks_that_the_second_run_cannot_answer_for_are_told(tmp_path, say):
    both = {name: {"validation": SURE, "test": SURE * 2} for name in ("t", "u")}
    run, other = write_run(tmp_path / "a", both), write_run(tmp_path / "b", {"t": both["t"]})
    assert "not compared: u: B has not learned it" in say(run, "--against", other)
    (other / "predictions" / "t.test.jsonl").unlink()
    said = "nothing to review (t: no predictions/t.test.jsonl)"
    assert said in say(run, "--task", "t", "--against", other, status=2), "what B lacks of it is told"


def test_a_damaged_task_that_is_not_asked_for_is_no_concern(tmp_path, say):
    both = {name: {"validation": SURE, "test": SURE} for name in ("t", "u")}
    run, other = write_run(tmp_path / "a", both), write_run(tmp_path / "b", both)
    (other / "predictions" / "u.test.jsonl").write_text("{")
    assert "t" in say(run, "--task", "t", "--against", other)


def test_rows_with_the_same_labels_may_be_others(tmp_path, say):
    runs = [write_run(tmp_path / name, {"t": {"validation": SURE, "test": SURE}}) for name in "ab"]
    for run, digest in zip(runs, "01", strict=True):
        result = Result.load(run / "result.json")
        data = {"t": {"test": SplitInfo(sha256=digest * 64, rows=len(SURE))}}
        result.model_copy(update={"data": data}).save(run / "result.json")
    assert "its test rows or their labels are others" in say(runs[0], "--against", runs[1], status=2)
    assert say(runs[0], "--against", runs[0])


def test_a_label_called_review_skips_its_task_alone(tmp_path, say):
    run = write_run(tmp_path / "run", {name: {"validation": SURE, "test": SURE} for name in ("t", "u")})
    result = Result.load(run / "result.json")
    items = {"u": Items(metric="accuracy", labels=["ok", "review"], true=[0], given=[0])}
    result.model_copy(update={"items": items}).save(run / "result.json")
    assert "skipped u: its label 'review' is the decision that asks a human" in say(run)


def test_without_matplotlib_the_rest_is_written(tiny, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["review", str(tiny)]) == 0
    assert "review.html not written: its plots need matplotlib" in capsys.readouterr().err
    assert sorted(path.name for path in (tiny / "review").iterdir()) == ["review.json", "review.md", "thresholds.json"]


def test_one_class_that_is_always_right(tmp_path, say):
    only = [("compliant", "compliant", 0.9)] * 3
    run = write_run(tmp_path / "run", {"t": {"validation": only, "test": [("violation", "violation", 1.0)]}})
    shown = say(run)
    assert "never" in shown
    assert "0/1" in shown


# Misuse


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([], "T.jsonl: no rows; give a file with some"),
        (["\n", " \n"], "T.jsonl: no rows"),
        (["{"], r"T.jsonl:1: Invalid JSON: .*; a row is \{"),
        (["[1]"], "T.jsonl:1: Input should be an object"),
        ([{"answer": "a", "scores": {"a": 1}}], "T.jsonl:1: label: Field required; a row is"),
        ([{"label": "a", "scores": {"a": 1}}], "T.jsonl:1: the row has no true label; give `moecl predict` rows with"),
        ([{"label": 1, "answer": "a", "scores": {"a": 1}}], "T.jsonl:1: label: .* string, found 1;"),
        ([{"label": "a", "answer": "a", "scores": {"a": 1.25}}], "scores.a: .* less than or equal to 1, found 1.25"),
        ([{"label": "a", "answer": "a", "scores": {"a": -0.1}}], "scores.a: .* greater than or equal to 0, found -0.1"),
        (['{"label": "a", "answer": "a", "scores": {"a": NaN}}'], "T.jsonl:1: "),
        (
            [{"label": "a", "answer": "a", "scores": {"a": True}}],
            "scores.a: Input should be a valid number, found True",
        ),
        (
            [{"label": "a", "answer": "b", "scores": {"a": 1}}],
            "T.jsonl:1: the answer 'b' has no score; the labels are a",
        ),
        (
            [row(1, *SURE[0]), {**row(2, *SURE[0]), "label": "Violation"}],
            r"T.jsonl:2: the true label 'Violation' has no score \(did you mean 'violation'\?\); the labels are",
        ),
        ([row(1, *SURE[0]), row(1, *SURE[1])], "T.jsonl:2: row: 1 stands in the file twice; remove one"),
        (
            [row(1, *SURE[0]), "", {**GENERATED, "row": 2}],
            "T.jsonl:3: scores: are of none, those before of compliant, v",
        ),
        ([GENERATED], "T.jsonl: no scores, as of a generation task; only a classification has thresholds"),
        ([{"label": "a", "answer": "a", "scores": {"a": 1, "review": 0}}], "the label 'review' is the decision that"),
        ([{"label": "a", "answer": "a", "scores": {"a": 1}}], "validation rows score compliant, violation, the test r"),
    ],
)
def test_faulty_rows(lines, said, tmp_path, say):
    good = write_seen(tmp_path / "V.jsonl", SURE)
    bad = tmp_path / "T.jsonl"
    bad.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    assert re.search(said, say("--validation", good, "--test", bad, status=2))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("", "RUN: missing; give a run folder, or files with --validation and --test"),
        ("--validation V.jsonl", "--test: missing; give"),
        ("--test V.jsonl", "--validation: missing; give"),
        ("RUN --test V.jsonl", "--test: is for rows without a run; leave RUN out"),
        ("no", "no: no such folder; give one that"),
        ("RUN --task tt", "--task: RUN has no task 'tt', only t (did you mean 't'?)"),
        ("RUN --precision 90", "--precision: 90.0 is not above 0 and at most 1; give a share such as 0.9"),
        ("RUN --precision x", "Invalid value for '--precision'"),
        ("RUN --confidence 95", "--confidence: 95.0 is not from 0.5 to below 1"),
        ("RUN --against no", "no: no such folder"),
        ("RUN --against other", "--against: has none of the tasks t; give a run of the same stream"),
        ("RUN --against fewer", "--against: task 't': its test rows or their labels are others"),
        ("--validation no.jsonl --test V.jsonl", "no.jsonl: No such file or directory; give a file of predictions"),
        ("--validation RUN --test V.jsonl", "RUN: Is a directory; give a file of predictions"),
        ("--validation V.jsonl --test V.jsonl --task a --task b", "--task b: files hold one task; give one name"),
        ("bare", "bare/result.json: no such file; the run has no result yet"),
        ("unscored", "unscored: nothing to review (t: no predictions/t.validation.jsonl); a review needs"),
        ("RUN -o V.jsonl", "V.jsonl: "),
    ],
)
def test_misuse(words, said, tmp_path, say, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_run(Path("RUN"), {"t": {"validation": SURE, "test": SURE}})
    write_run(Path("other"), {"u": {"validation": SURE, "test": SURE}})
    write_run(Path("fewer"), {"t": {"validation": SURE, "test": SURE[:1]}})
    write_seen(Path("V.jsonl"), SURE)
    Path("bare").mkdir()
    write_result(Path("unscored"), ["t"])
    assert say(*words.split(), status=2).startswith(said)


# docs/review.md


def test_the_command_lines_of_the_docs_run(tmp_path, say, monkeypatch):
    found = [words for block in re.findall(r"```sh\n(.*?)```", DOCS.read_text(), re.DOTALL) for words in calls(block)]
    assert {words[0] for words in found} == {"review", "predict"}
    monkeypatch.chdir(tmp_path)
    for name, skill in (("runs/mine", 1.5), ("runs/old", 0.3)):
        write_drawn_run(Path(name), skill, rows=60)
    for split in ("validation", "test"):
        shutil.copy(f"runs/mine/predictions/comments.{split}.jsonl", f"{split}.jsonl")
    for words in found:
        parse(words)
        if words[0] == "review":
            say(*words[1:])


def test_the_worked_example_of_the_docs(tmp_path, say):
    validation, test = (
        [(LABELS["cv".index(true)], LABELS["cv".index(answer)], float(share)) for true, answer, share in rows]
        for rows in map(
            re.compile(r"^\d+ +([cv]) +([cv]) +(0\.\d+)", re.MULTILINE).findall,
            re.findall(r"```text\n(row .*?)```", DOCS.read_text(), re.DOTALL),
        )
    )
    paths = [write_seen(tmp_path / name, rows) for name, rows in (("v", validation), ("t", test))]
    found = json.loads(say("--validation", paths[0], "--test", paths[1], "--precision", 0.75, "--json"))
    assert found["tasks"]["t"]["thresholds"] == {"compliant": 0.8, "violation": 0.9}
    assert (found["total"]["stripping_rate"], found["total"]["precision"]) == (0.6, pytest.approx(2 / 3))
    assert found["total"]["classes"]["violation"]["slip_rate"] == pytest.approx(1 / 3)
