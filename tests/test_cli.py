"""The command line as people use and misuse it. Everything runs in this process but what needs a fresh one."""

import ast
import io
import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from command_lines import Done, all_commands, calls, command, parse
from moecl import cli, terminal, watch
from moecl.cli import main
from moecl.config import load_stream
from moecl.data.derived import Derived
from moecl.method_config import METHODS
from moecl.run_folder import RunFolder
from moecl.store import Store
from tiny_stream import task, write_rows, write_stream


@pytest.fixture(scope="module")
def learned(tmp_path_factory, tiny_folder) -> Path:
    """A folder with stream.yaml, its data, new.yaml and `run`, learned. Copy it before changing anything."""
    folder = tmp_path_factory.mktemp("learned")
    stream = write_stream(folder, tiny_folder, rows=16, train={"epochs": 1})
    (folder / "new.yaml").write_text(yaml.safe_dump(task(folder, "new", 9, rows=16)))
    assert main(["train", str(stream), "-o", str(folder / "run")]) == 0
    return folder


@pytest.fixture
def own(learned, tmp_path) -> Path:
    """A copy of the learned run for a test that changes it."""
    return Path(shutil.copytree(learned / "run", tmp_path / "run"))


def fresh(code: str, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)


# Help and misuse


def test_moecl_alone_is_its_help(moecl):
    done = moecl()
    assert done.status == 0
    assert "Teach a language model" in done.out
    assert "..." not in done.out.partition("Commands:")[2], "a summary does not fit its line"
    assert moecl("-h") == done


def test_version(moecl):
    assert moecl("--version").out.startswith("moecl 0.")


@pytest.mark.parametrize("words", all_commands(), ids=" ".join)
def test_help_teaches(words, moecl):
    found = moecl(*words, "--help").out
    examples = calls(found.partition("Examples:\n")[2])
    assert len(examples) >= 1
    for one in examples:
        parse(one)
        assert one[: len(words)] == words
    assert command(words)[0].help.splitlines()[0] in found.replace("\n  ", " ")


def test_help_of_train_lists_every_key(moecl):
    found = moecl("train", "--help").out
    assert all(key in found for key in ("train.lr <number above 0>", "method.retention", "tasks[].labels", "preset"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("train", "Missing argument 'STREAM'; see `moecl train --help`"),
        ("trian x", "No such command 'trian'. Did you mean 'train'?; see `moecl --help`"),
        ("train s.yaml --sett x", "No such option: --sett (Possible options: --set); see `moecl train --help`"),
        ("train s.yaml more", "Got unexpected extra argument(s) (more); see `moecl train --help`"),
        ("train s.yaml --set", "Option '--set' requires an argument; see `moecl --help`"),
        ("train s.yaml", "s.yaml: no such file; check the path"),
        ("train .", ".: is a folder; give the path of a YAML file"),
        ("check -5", "No such option: -5; see `moecl check --help`"),
        ("check s.yaml", "s.yaml: no such file; check the path"),
        ("learn run", "Missing option '--task'; see `moecl learn --help`"),
        ("learn run --task t.yaml", "run: not a run folder (no config.yaml); make one with `moecl train"),
        ("tasks run", "run: no such folder; give one that `moecl train STREAM -o RUN` has made"),
        ("eval run", "run: no such folder; give one that"),
        ("eval . --task x", ".: not a run folder; give one that"),
        ("predict run --task x", "run: no such folder; give one that"),
        ("predict run --expert-memory 2 GB", "--expert-memory: '2' has no unit; write a number and a unit without a s"),
        ("eval run --expert-memory lots", "--expert-memory: 'lots' is no size; write a number and a unit"),
        ("train s.yaml --expert-memory 0", "--expert-memory: '0' leaves no room; write a number"),
        ("learn run --task t.yaml --expert-memory 2PB", "--expert-memory: '2PB' has the unknown unit 'PB'; write"),
        ("serve run --kv-memory lots", "--kv-memory: 'lots' is no size; write a number and a unit"),
        ("init no/s.yaml", "no/s.yaml: no folder no; make it first"),
        ("fetch vadr4", "no asset 'vadr4' (did you mean 'vader4'?); there are: "),
        ("cache clear x", "no asset 'x'; there are: "),
        ("cache", "Missing command; see `moecl cache --help`"),
    ],
)
def test_misuse(words, said, refuses, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert refuses(*words.split()).startswith(said)


def test_settings_on_the_command_line(learned, refuses, moecl):
    stream = learned / "stream.yaml"
    assert "write it as key=value" in refuses("train", stream, "--set", "train.lr")
    assert "(did you mean 'epochs'?)" in refuses("train", stream, "--set", "train.epoch=2")
    assert "-1 is out of range" in refuses("train", stream, "--set", "train.epochs=-1")
    plan = moecl("train", stream, "--dry-run", "--set", "train.lr=0.5", "--device", "cuda:1").out
    settings = yaml.safe_load(plan)["train"]
    assert (settings["lr"], settings["device"]) == (0.5, "cuda:1")
    assert "train.device: 'gpu' cannot be used here" in refuses("check", stream, "--device", "gpu")


def test_a_dry_run_looks_at_the_folder(learned, refuses, moecl):
    words = ("train", learned / "stream.yaml", "--dry-run", "-o")
    assert f"# is learned in {learned / 'run'}:" in moecl(*words, learned / "run").out
    assert "was started with another stream" in refuses(*words, learned / "run", "--set", "train.lr=0.5")
    assert "not empty and not a run" in refuses(*words, learned)
    assert "# would be learned into" in moecl(*words, learned / "none").out
    assert not (learned / "none").exists()


def test_a_run_that_stopped_learning_more_still_tells_of_the_rest(own, learned, moecl, monkeypatch):
    class Stopping(watch.PlainWatcher):
        def training(self, task, step, steps, figures):
            raise KeyboardInterrupt

    before = json.loads(moecl("tasks", own, "--json").out)
    with monkeypatch.context() as patch:
        patch.setattr(watch, "PlainWatcher", Stopping)
        assert moecl("learn", own, "--task", learned / "new.yaml").status == 130
    assert json.loads(moecl("tasks", own, "--json").out) == before
    assert moecl("compare", learned / "run", own).status == 0
    assert moecl("review", own).status == 0
    assert moecl("report", own).status == 0
    assert "new: learned in part; the numbers are from before it." in (own / "report.md").read_text()


def test_what_needs_no_torch_imports_none():
    """Help, misuse and faults in a stream file come at once."""
    code = (
        "import sys; from moecl.cli import main\n"
        "for words in ('', 'train --help', 'train', 'nosuch', 'train no.yaml', 'check no.yaml', 'predict no',\n"
        "              'serve no', 'cache list', 'methods', 'train --debug no.yaml'): main(words.split())\n"
        "sys.exit(' '.join({'torch', 'transformers', 'datasets'} & set(sys.modules)) or 0)"
    )
    done = fresh(code)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("Traceback") == 1, "--debug shows it, wherever it stands"


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_out_of_memory(error):
    message, status = terminal.explain(error)
    assert status == 2
    assert message.startswith("out of memory: lower train.batch_size")


def test_a_fault_of_ours_is_one_line_too(capsys, monkeypatch):
    def broken(*_: object) -> None:
        raise ZeroDivisionError("two\nlines")

    monkeypatch.setattr("moecl.config.load_stream", broken)
    assert main(["train", "x.yaml"]) == 1
    assert capsys.readouterr().err == (
        "moecl: ZeroDivisionError: two lines (this should not happen: --debug shows where)\n"
    )
    assert main(["--debug", "train", "x.yaml"]) == 1
    assert "Traceback" in capsys.readouterr().err


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


def test_an_option_that_commands_share_is_declared_once():
    declared = [
        ast.unparse(node)
        for path in Path(cli.__file__).parent.glob("cli*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("typer.Option", "typer.Argument")
    ]
    assert len(declared) == len(set(declared)) > 50


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
    assert "give a file of JSONL rows or plain lines" in refuses("predict", run, "no.txt", "--task", "task1")
    assert "rows.csv: a table, and lines are read; make it JSONL" in refuses(
        "predict", run, "rows.csv", "--task", "task1"
    )
    assert "give a file of JSONL rows or plain lines" in refuses("predict", run, tmp_path, "--task", "task1")


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


def test_a_run_answers_when_its_data_is_gone(learned, own, moecl, refuses):
    config = (own / "config.yaml").read_text()
    (own / "config.yaml").write_text(config.replace(str(learned), "/nowhere"))
    assert moecl("predict", own, "--task", "task0", stdin=b"warm tea").status == 0
    assert moecl("tasks", own).status == 0
    assert "/nowhere/task0.test.jsonl: no such file" in refuses("eval", own)


# Preparing


def test_init_and_check(learned, moecl, refuses, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert moecl("init").err.startswith("stream.yaml written: ")
    assert [one.name for one in load_stream("stream.yaml").tasks] == ["reviews"]
    assert refuses("init") == "stream.yaml: exists already; give another name"
    assert refuses("check", "stream.yaml").startswith(
        f"{tmp_path}/data/reviews/train.jsonl: no such file, nor the folder"
    )
    shown = moecl("check", learned / "stream.yaml")
    assert "train       " in shown.out
    assert "memory  " in shown.out
    found = json.loads(moecl("check", learned / "stream.yaml", "--json").out)
    assert [one["task"] for one in found["tasks"]] == ["task0", "task1"]
    assert found["estimate"]["peak_bytes"] > 0


def test_overlaps_and_cuts_are_told_by_check_and_when_training_starts(tiny_folder, moecl, tmp_path):
    stream = write_stream(tmp_path, tiny_folder, tasks=1, rows=16, train={"epochs": 1})
    rows = (tmp_path / "task0.train.jsonl").read_text().splitlines()
    long = json.dumps({"text": "tea " * 90, "label": "good"})
    (tmp_path / "task0.test.jsonl").write_text("\n".join([*rows[:3], long]))
    assert "- 3 rows of test are also in train" in moecl("check", stream).out
    done = moecl("train", stream, "-o", tmp_path / "run")
    assert done.status == 0
    told = [line for line in done.said if line.startswith("task task0: ")]
    assert told == ["task task0: 3 rows of test are also in train; 1 of 4 test rows are cut to max_length"]


def test_the_cache(moecl, tmp_path, monkeypatch):
    monkeypatch.setenv("MOECL_CACHE", str(tmp_path))
    assert moecl("cache", "list") == Done(0, "", f"nothing in {tmp_path}; `moecl fetch` fills it\n")
    assert moecl("cache", "list", "--json").out == "[]\n"
    assert moecl("cache", "clear", "vader4").err == f"cleared vader4 in {tmp_path}\n"


def test_what_the_cache_has_of_users_texts(moecl, tmp_path, monkeypatch):
    monkeypatch.setenv("MOECL_CACHE", str(tmp_path))
    kept = Derived("prefix", 10**6, print)
    kept.put("ab", {"hidden_states": torch.zeros(100)})
    [path] = tmp_path.rglob("*.safetensors")
    said = moecl("cache", "list").out.split()
    assert said == ["prefix", str(path.stat().st_size), "B", "1", "entries", str(tmp_path / "prefix")]
    assert json.loads(moecl("cache", "list", "--json").out) == [
        {"name": "prefix", "path": str(tmp_path / "prefix"), "bytes": path.stat().st_size}
    ]
    assert "derive from your texts" in moecl("cache", "clear", "--help").out
    moecl("cache", "clear", "vader4")
    wrong = moecl("cache", "clear", "prefix", "prefx")
    assert wrong.status == 2
    assert "'prefx' (did you mean 'prefix'?)" in wrong.err
    assert path.exists(), "nothing is removed before all names are known"
    for words in (["prefix"], []):
        kept.put("ab", {"hidden_states": torch.zeros(100)})
        assert moecl("cache", "clear", *words).status == 0
        assert not (tmp_path / "prefix").exists()


def test_methods(moecl):
    assert [one["name"] for one in json.loads(moecl("methods", "--json").out)] == list(METHODS)
    assert "per-task-lora" in moecl("methods").out
    assert "method.fisher_rows" in moecl("methods", "ewc").out
    done = moecl("methods", "ewk")
    assert done.status == 2
    assert "no method 'ewk' (did you mean 'ewc'?)" in done.err


# Bad input


def rows_of(text: str):
    return lambda folder, stream: (folder / "task0.train.jsonl").write_text(text)


def key(name: str, value: object):
    def change(folder: Path, stream: dict) -> None:
        stream["tasks"][0][name] = value

    return change


def raw(old: str, new: str):
    """A change of the stream's text, which is made after it was written."""
    return lambda folder, stream: (old, new)


ROW = '{"text": "a", "label": "good"}\n'
FAULTS = {
    "missing file": (key("train", "nosuch.jsonl"), "{folder}/nosuch.jsonl: no such file"),
    "misspelt file": (key("test", "task0.tset.jsonl"), "(did you mean 'task0.test.jsonl'?)"),
    "missing folder": (key("train", "no/x.jsonl"), "{folder}/no/x.jsonl: no such file, nor the folder {folder}/no"),
    "empty file": (rows_of(""), "{folder}/task0.train.jsonl: the file is empty"),
    "no rows": (rows_of("\n\n"), "{folder}/task0.train.jsonl: no rows; add some"),
    "no field": (
        rows_of(ROW + '{"txt": "a", "label": "good"}\n'),
        "task0.train.jsonl:2: text: the row has no such field",
    ),
    "no label": (rows_of(ROW + '{"text": "a"}\n'), "task0.train.jsonl:2: label: the row has no such field"),
    "unknown label": (
        rows_of(ROW + '{"text": "a", "label": "goood"}\n'),
        "task0.train.jsonl:2: label: 'goood' is not one of good, bad (did you mean 'good'?)",
    ),
    "broken JSON": (rows_of(ROW + ROW + '{"text": "a"\n'), "task0.train.jsonl:3:13: broken JSON"),
    "not UTF-8": (
        lambda folder, stream: (folder / "task0.train.jsonl").write_bytes(ROW.encode() + b'{"text": "\xe9"}'),
        "task0.train.jsonl:2: not UTF-8: byte 11 of the line is 0xE9",
    ),
    "name twice": (lambda folder, stream: stream["tasks"].append(stream["tasks"][0]), "'task0' is used twice"),
    "name no file name": (key("name", "a/b"), "tasks[0].name: 'a/b' cannot be a file name"),
    "unknown key": (key("lables", ["a", "b"]), "tasks[0].lables: unknown key (did you mean 'labels'?)"),
    "wrong type": (lambda folder, stream: stream["train"].update(epochs="two"), "train.epochs: 'two'"),
    "one label": (key("labels", ["good"]), "tasks[0].labels: a classification needs at least two, not 1"),
    "repeated label": (key("labels", ["good", "bad", "good"]), "tasks[0].labels: 'good' is here twice"),
    "unquoted label": (raw("good: fine", "yes: fine"), "tasks[0].labels: "),
    "broken YAML": (raw("good: fine", "good: [fine"), "stream.yaml:"),
    "unknown base": (lambda folder, stream: stream.update(base="./nosuch"), "base: "),
    "unknown asset": (key("train", "asset:vadr4/tweets/train"), "asset:vadr4/tweets/train"),
    "unknown preset": (lambda folder, stream: stream.update(preset="papr"), "preset: 'papr'"),
    "tracker": (lambda folder, stream: stream["train"].update(report_to=["nosuch"]), "train.report_to: "),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_bad_input(fault, tiny_folder, tmp_path, refuses):
    """Each fault names its file, line, key or value, leaves no run behind, and can be corrected in place."""
    path = write_stream(tmp_path, tiny_folder, tasks=1, rows=16, train={"epochs": 1})
    stream = yaml.safe_load(path.read_text())
    change, said = FAULTS[fault]
    replaced = change(tmp_path, stream)
    text = yaml.safe_dump(stream, sort_keys=False)
    path.write_text(text.replace(*replaced) if isinstance(replaced, tuple) else text)
    message = refuses("train", path, "-o", tmp_path / "run")
    assert said.format(folder=tmp_path) in message
    assert not RunFolder(tmp_path / "run").exists()
    if fault not in ("tracker", "unknown base"):
        assert refuses("train", path, "--dry-run") == message


def test_corrected_input_is_learned_in_the_same_folder(tiny_folder, tmp_path, refuses, moecl):
    path = write_stream(tmp_path, tiny_folder, tasks=1, rows=16, train={"epochs": 1})
    good = (tmp_path / "task0.train.jsonl").read_text()
    (tmp_path / "task0.train.jsonl").write_text(good + "{\n")
    refuses("train", path, "-o", tmp_path / "run")
    (tmp_path / "task0.train.jsonl").write_text(good)
    assert moecl("train", path, "-o", tmp_path / "run").status == 0


def test_a_fault_in_a_new_task_leaves_the_run_as_it_was(learned, own, tmp_path, moecl, refuses):
    before = moecl("train", learned / "stream.yaml", "-o", own)
    section = task(tmp_path, "more", 5, rows=16)
    write_rows(tmp_path / "more.train.jsonl", 4, 0, {"goood": ("fine",), "bad": ("grim",)})
    (tmp_path / "more.yaml").write_text(yaml.safe_dump(section))
    assert "'goood' is not one of " in refuses("learn", own, "--task", tmp_path / "more.yaml")
    (tmp_path / "more.yaml").write_text(yaml.safe_dump({**section, "kinds": 1}))
    assert "kinds: unknown key (did you mean 'kind'?)" in refuses("learn", own, "--task", tmp_path / "more.yaml")
    assert "must be a list of exactly one task" in refuses("learn", own, "--task", learned / "stream.yaml")
    assert moecl("train", learned / "stream.yaml", "-o", own) == before


def test_a_loss_that_is_not_finite(learned, moecl, refuses, tmp_path):
    words = ("train", learned / "stream.yaml", "-o", tmp_path / "run")
    said = refuses(*words, "--set", "train.lr=1e30")
    assert "task 'task0': the loss is not finite at step 2" in said
    assert "lower train.lr" in said
    assert moecl("tasks", tmp_path / "run").status == 0


def test_a_run_in_use(learned, own, refuses):
    with RunFolder(own).lock():
        for words in (
            ("train", learned / "stream.yaml", "-o", own, "--set", "train.epochs=1"),
            ("learn", own, "--task", learned / "new.yaml"),
        ):
            (own / "result.json").unlink(missing_ok=True)  # a finished run would be shown, which needs no lock
            said = refuses(*words)
            assert f"{own}: in use by pid {os.getpid()} on " in said
            assert "wait for it to end, or stop it" in said


def test_a_full_disk_loses_nothing(learned, own, refuses, moecl, monkeypatch):
    before = moecl("predict", own, "--task", "task0", stdin=b"warm tea")
    write = os.write

    def full(file: int, data: bytes) -> int:
        if len(data) > 1000:
            raise OSError(28, "No space left on device")
        return write(file, data)

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        said = refuses("learn", own, "--task", learned / "new.yaml")
    assert "the disk is full; what was saved before is intact: free some space and run it again" in said
    assert moecl("predict", own, "--task", "task0", stdin=b"warm tea") == before
    assert moecl("learn", own, "--task", learned / "new.yaml").status == 0
    assert moecl("predict", own, "--task", "task0", stdin=b"warm tea") == before


def test_a_folder_that_cannot_be_used(learned, refuses, tmp_path, monkeypatch):
    stream = learned / "stream.yaml"
    (tmp_path / "file").write_text("")
    assert str(tmp_path / "file") in refuses("train", stream, "-o", tmp_path / "file")
    assert "not empty and not a run (file)" in refuses("train", stream, "-o", tmp_path)

    def forbidden(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", forbidden)
    said = refuses("train", stream, "-o", tmp_path / "run")
    assert (
        said == f"{tmp_path / 'run'}: not writable (Permission denied); change its permissions or choose another folder"
    )


def test_a_damaged_store(own, refuses):
    damaged = own / "store" / "objects" / f"{Store.open(own / 'store').digests('task0')['task']}.safetensors"
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:-4])
    assert f"{damaged}: truncated" in refuses("predict", own, "--task", "task0", stdin=b"x")
    damaged.write_bytes(bytes([*whole[:-1], whole[-1] ^ 1]))
    assert f"{damaged}: altered" in refuses("predict", own, "--task", "task0", stdin=b"x")
    damaged.unlink()
    assert f"{damaged}: missing" in refuses("predict", own, "--task", "task0", stdin=b"x")
    (own / "store" / "manifest.json").write_text("{\n")
    assert "manifest.json:2: broken JSON" in refuses("tasks", own)


def test_another_base(learned, own, tiny_folder, refuses, tmp_path):
    other = Path(shutil.copytree(tiny_folder, tmp_path / "other"))
    weights = other / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(bytes([*content[:-1], content[-1] ^ 1]))
    for name in ("config.yaml", "stream.yaml", "store/manifest.json"):
        (own / name).write_text((own / name).read_text().replace(str(tiny_folder), str(other)))
    assert f"learned on base {other}" in refuses("predict", own, "--task", "task0", stdin=b"x")
    assert f"learned on base {other}" in refuses("learn", own, "--task", learned / "new.yaml")
