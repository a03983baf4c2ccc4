"""The commands that learn and those that use what was learned."""

import gzip
import io
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from command_lines import Done, calls, parse
from moecl import cli, watch
from moecl.cli import main
from moecl.config import load_stream
from moecl.run_folder import RunFolder

# Learning


def test_train_shows_progress_on_stderr_and_the_result_on_stdout(learned, moecl, tmp_path):
    done = moecl("train", learned / "stream.yaml", "-o", tmp_path / "run")
    assert done.status == 0
    assert done.out.startswith("R: score on each task")
    assert "average accuracy" in done.out
    assert str(tmp_path / "run") in done.out
    assert "precision" in done.said[0]
    assert [line for line in done.said if line.startswith("before any task: task0 ")]
    ends = ("learning task1: step 2 of 2", "learning task1: validation ", "after task1: task0 ")
    assert [line.startswith(end) for line, end in zip(done.said[-3:], ends, strict=True)] == [True] * 3
    again = moecl("train", learned / "stream.yaml", "-o", tmp_path / "run")
    assert (again.status, again.out, again.err) == (0, done.out, "")


def test_a_stopped_run_goes_on_with_the_same_command(learned, moecl, refuses, tmp_path, monkeypatch):
    class Stopping(watch.PlainWatcher):
        def training(self, task, step, steps, figures):
            if task == "task1":
                raise KeyboardInterrupt

    words = ("train", learned / "stream.yaml", "-o", tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(watch, "PlainWatcher", Stopping)
        stopped = moecl(*words)
    assert (stopped.status, stopped.out) == (130, "")
    assert stopped.said[-1] == "moecl: stopped; the same command goes on"
    assert "not finished; go on with the command" in refuses("learn", tmp_path / "run", "--task", learned / "new.yaml")
    half = moecl("tasks", tmp_path / "run")
    assert "task0" in half.out
    assert "task1" not in half.out
    said = refuses(*words, "--set", "train.epochs=3")
    assert "was started with another stream: train.epochs is 3, it was 1; undo the change" in said
    done = moecl(*words)
    assert done.status == 0
    assert "going on: 1 of 2 tasks are learned" in done.said
    whole, gone_on = (RunFolder(folder).finished() for folder in (learned / "run", tmp_path / "run"))
    assert whole.digests == gone_on.digests
    assert whole.R == gone_on.R


def test_learn_and_replace(learned, own, moecl, refuses):
    plan = moecl("learn", own, "--task", learned / "new.yaml", "--dry-run")
    assert plan.out == f"new: 16 train rows, 8 validation rows, 12 test rows; would be learned into {own}\n"
    assert "no task 'new' to replace; the tasks are: task0, task1" in refuses(
        "learn", own, "--task", learned / "new.yaml", "--replace"
    )
    done = moecl("learn", own, "--task", learned / "new.yaml")
    assert done.status == 0
    assert "new" in done.out.splitlines()[2]
    assert "is learned already; rename it, or learn it again with --replace" in refuses(
        "learn", own, "--task", learned / "new.yaml"
    )
    assert moecl("learn", own, "--task", learned / "new.yaml", "--replace").status == 0
    assert "new, version 2" in moecl("tasks", own).out
    assert "--task new: no such file; give a YAML file with the new task's keys" in refuses(
        "learn", own, "--task", "new"
    )


def test_demo_tries_next_what_can_be_run(learned, moecl, tmp_path, monkeypatch):
    tasks = [one.name for one in load_stream(Path(cli.__file__).with_name("demo.yaml")).tasks]
    monkeypatch.setattr("moecl.config.load_stream", lambda *_: load_stream(learned / "stream.yaml"))
    found = calls(moecl("demo", "-o", tmp_path / "run").out.partition("Try next:")[2])
    assert [words[0] for words in found] == ["predict", "tasks", "init", "check"]
    assert parse(found[0])["task"] in tasks
    for words in found:
        parse(words)


# Using


def test_predict(learned, moecl, refuses, tmp_path):
    run = learned / "run"
    plain = moecl("predict", run, "--task", "task1", stdin=b"warm tea\nsour day\n")
    rows = [json.loads(line) for line in plain.out.splitlines()]
    assert [list(row) for row in rows] == [["label", "scores", "task", "version"]] * 2
    assert {(row["task"], row["version"]) for row in rows} == {("task1", 1)}
    assert set(rows[0]["scores"]) == {"good", "bad"}
    assert sum(rows[0]["scores"].values()) == pytest.approx(1, abs=1e-5)
    assert plain.err == ""
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "warm tea", "id": 7}\n\n{"text": "sour day"}\n')
    assert moecl("predict", run, file, "--task", "task1") == plain
    assert moecl("predict", run / "store", file, "--task", "task1") == plain
    assert moecl("predict", run, file, "--task", "task1", "--expert-memory", "2G") == plain
    assert moecl("predict", run, file, "--task", "task1", "--expert-memory", "1kB") == plain
    assert moecl("predict", run, "--task", "task1") == Done(0, "", "")
    assert "--task: which one? the tasks are: task0, task1" in refuses("predict", run, file)
    assert "no task 'tsk1'; the tasks are: task0, task1 (did you mean 'task" in refuses(
        "predict", run, "--task", "tsk1"
    )
    assert "no task '" in refuses("predict", run, "--task", learned / "new.yaml")
    assert "give a file of rows, or of plain lines" in refuses("predict", run, "no.txt", "--task", "task1")
    assert "rows.csv: no such file" in refuses("predict", run, "rows.csv", "--task", "task1")
    table, packed = tmp_path / "rows.csv", tmp_path / "rows.jsonl.gz"
    table.write_text("id,text\n7,warm tea\n8,sour day\n")
    packed.write_bytes(gzip.compress(file.read_bytes()))
    assert moecl("predict", run, table, "--task", "task1") == plain
    assert moecl("predict", run, packed, "--task", "task1") == plain
    assert "give a file of rows, or of plain lines" in refuses("predict", run, tmp_path, "--task", "task1")


def test_predict_decides_by_thresholds(learned, moecl, refuses, tmp_path):
    run = learned / "run"
    texts = learned / "task1.test.jsonl"
    plain = [json.loads(line) for line in moecl("predict", run, texts, "--task", "task1").out.splitlines()]
    assert [row["true"] for row in plain] == [json.loads(line)["label"] for line in texts.read_text().splitlines()]
    scored = tmp_path / "scored.jsonl"
    scored.write_text("".join(json.dumps(row) + "\n" for row in plain))
    files = ("--validation", scored, "--test", scored, "--precision", "0.6", "-o", tmp_path)
    review = json.loads(moecl("review", *files, "--task", "task1", "--json").out)
    thresholds = tmp_path / "thresholds.json"
    found = moecl("predict", run, texts, "--task", "task1", "--thresholds", thresholds).out.splitlines()
    decisions = [json.loads(line)["decision"] for line in found]
    assert sum(one != "review" for one in decisions) == review["total"]["decided"]
    assert {one for row, one in zip(plain, decisions, strict=True) if one != row["label"]} <= {"review"}
    assert [{**row, "decision": one} for row, one in zip(plain, decisions, strict=True)] == list(map(json.loads, found))
    asked = ("predict", run, texts, "--task", "task0", "--thresholds")
    assert "thresholds.json: has no task 'task0', only task1 (did you mean" in refuses(*asked, thresholds)
    assert "no.json: No such file or directory; give the thresholds.json" in refuses(*asked, tmp_path / "no.json")
    thresholds.write_text(thresholds.read_text().replace('"parts": null', '"parts": {"task": "0"}'))
    asked = ("predict", run, texts, "--task", "task1", "--thresholds", thresholds)
    assert "was made before the task or its experts changed; make it again" in refuses(*asked)


@pytest.mark.parametrize(
    ("stdin", "answered", "said"),
    [
        (b'{"text": "a"}\n{"txt": "b"}\n', 1, "stdin:2: text: the row has no such field"),
        (b"a\n\nb\n", 1, "stdin:2: the line is empty"),
        (b'{"text": "a"}\n{"text": \n', 1, "stdin:2:9: broken JSON"),
        (b"\xff\xfea", 0, "stdin:1: not UTF-8: byte 1 of the line is 0xFF"),
    ],
)
def test_predict_answers_the_rows_before_a_faulty_one(stdin, answered, said, learned, moecl):
    done = moecl("predict", learned / "run", "--task", "task1", stdin=stdin)
    assert (done.status, len(done.out.splitlines())) == (2, answered)
    assert done.err.startswith(f"moecl: {said}")


def test_predict_reads_no_further_than_it_answers(learned, capsys, monkeypatch):
    """Endless input is answered as it comes, and a reader that leaves ends it without a word."""
    read = itertools.count()

    class Endless:
        buffer = (b"warm tea %d\n" % next(read) for _ in itertools.count())
        isatty = staticmethod(lambda: False)

    class Closed(io.StringIO):
        written = 0

        def write(self, text: str) -> int:
            Closed.written += 1
            raise BrokenPipeError(32, "Broken pipe")

        def fileno(self) -> int:
            return null

    with open(os.devnull, "w") as opened:
        null = opened.fileno()
        monkeypatch.setattr(sys, "stdin", Endless)
        monkeypatch.setattr(sys, "stdout", Closed())
        try:
            status = main(["predict", str(learned / "run"), "--task", "task1"])
        except SystemExit as left:  # typer's way
            status = left.code
    assert status == 1
    assert Closed.written == 1
    assert next(read) <= 65
    assert capsys.readouterr().err == ""


def test_a_closed_pipe_is_no_error():
    """The help is longer than a pipe holds, and nobody reads it."""
    code = "import sys; from moecl.cli import main; sys.exit(max(main(['train', '--help']) for _ in range(20)))"
    started = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with started:
        started.stdout.close()
        assert started.stderr.read() == b""
    assert started.returncode == 1


def test_eval_and_tasks(learned, moecl, refuses):
    run = learned / "run"
    result = RunFolder(run).finished()
    rows = json.loads(moecl("eval", run, "--json").out)
    assert [(row["task"], row["score"], row["rows"]) for row in rows] == [
        (name, score, 12) for name, score in zip(result.tasks, result.R[-1], strict=True)
    ]
    one = moecl("eval", run, "--task", "task1", "--split", "validation")
    assert "task1" in one.out
    assert "task0" not in one.out
    assert "'tst' is none of test, validation, train (did you mean 'test'?)" in refuses("eval", run, "--split", "tst")
    assert "the tasks are: task0, task1" in refuses("eval", run, "--task", "nosuch")
    told = json.loads(moecl("tasks", run, "--json").out)
    assert [row["parts"] for row in told] == list(result.digests.values())
    assert [row["score"] for row in told] == result.R[-1]
    assert told[0]["parts"]["task"][:12] in moecl("tasks", run).out


def test_eval_tells_of_rows_that_are_other_ones_or_none(own, learned, moecl, refuses, tmp_path):
    config = (own / "config.yaml").read_text()
    rows = learned / "task0.test.jsonl"
    (tmp_path / "fewer.jsonl").write_text("".join(rows.read_text().splitlines(keepends=True)[:5]))
    less = config.replace(f"  test: {learned / 'task1.test.jsonl'}\n", "")
    assert less != config
    (own / "config.yaml").write_text(less.replace(str(rows), str(tmp_path / "fewer.jsonl")))
    done = moecl("eval", own, "--json")
    assert [(row["task"], row["rows"]) for row in json.loads(done.out)] == [("task0", 5)]
    assert "task0: its test rows are other ones than the run's" in done.err
    assert "task1: no test rows in " in done.err
    assert "task 'task1' has no test rows in " in refuses("eval", own, "--task", "task1")


def test_a_run_answers_when_its_data_is_gone(learned, own, moecl, refuses):
    config = (own / "config.yaml").read_text()
    (own / "config.yaml").write_text(config.replace(str(learned), "/nowhere"))
    assert moecl("predict", own, "--task", "task0", stdin=b"warm tea").status == 0
    assert moecl("tasks", own).status == 0
    assert "/nowhere/task0.test.jsonl: no such file" in refuses("eval", own)
