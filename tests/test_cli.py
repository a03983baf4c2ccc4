"""The command line as people use and misuse it. Everything runs in this process but what needs a fresh one."""

import ast
import json
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
from tiny_stream import write_stream


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
        ("check rows.jsonl", "rows.jsonl: a file of rows; give the YAML file that names it"),
        ("report file", "file: a file; give the folder that `moecl train` or `moecl bench` wrote"),
        ("tasks bench", "bench: a bench; give one of its cells, a folder in bench/cells"),
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
    (tmp_path / "file").touch()
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "bench.json").touch()
    assert refuses(*words.split()).startswith(said)


def test_settings_on_the_command_line(learned, refuses, moecl):
    stream = learned / "stream.yaml"
    assert "write it as key=value" in refuses("train", stream, "--set", "train.lr")
    assert "(did you mean 'epochs'?)" in refuses("train", stream, "--set", "train.epoch=2")
    assert "-1 is out of range" in refuses("train", stream, "--set", "train.epochs=-1")
    plan = moecl("train", stream, "--dry-run", "--set", "train.lr=0.5", "--device", "cuda:1").out
    settings = yaml.safe_load(plan)["train"]
    assert (settings["lr"], settings["device"]) == (0.5, "cuda:1")
    assert "device: 'gpu' is none of auto, cpu, cuda" in refuses("check", stream, "--device", "gpu")


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


def test_an_option_that_commands_share_is_declared_once():
    declared = [
        ast.unparse(node)
        for path in Path(cli.__file__).parent.glob("cli*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("typer.Option", "typer.Argument")
    ]
    assert len(declared) == len(set(declared)) > 50


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_out_of_memory(error):
    message, status = terminal.explain(error)
    assert status == 2
    assert message.startswith("out of memory: lower train.batch_size")
    assert "train." not in terminal.explain(error, "predict")[0]


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
