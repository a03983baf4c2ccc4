"""The commands on a store, as people use and misuse them."""

import io
import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save

from command_lines import calls, parse
from moecl import cli_store, export
from moecl.cli import main
from moecl.run_folder import RunFolder
from moecl.store import Store
from tiny_stream import task, write_stream


@pytest.fixture(scope="module")
def versions(tmp_path_factory, tiny_folder) -> Path:
    """A run of two tasks, task0 in two versions, two of them with one gate: its first step does not move it. Copy it
    before changing anything.
    """
    folder = tmp_path_factory.mktemp("versions")
    stream = write_stream(folder, tiny_folder, rows=16, train={"epochs": 1, "precision": "fp32"})
    (folder / "again.yaml").write_text(yaml.safe_dump(task(folder, "task0", 9, rows=16)))
    assert main(["train", str(stream), "-o", str(folder / "run")]) == 0
    assert main(["learn", str(folder / "run"), "--task", str(folder / "again.yaml"), "--replace"]) == 0
    return folder / "run"


@pytest.fixture
def run(versions, tmp_path) -> Path:
    return Path(shutil.copytree(versions, tmp_path / "run"))


def listed(moecl, run, *words):
    return json.loads(moecl("tasks", run, "--json", *words).out)


def test_from_one_version_to_another(moecl, refuses, run, tmp_path):
    assert [(row["task"], row["version"], row["versions"]) for row in listed(moecl, run)] == [
        ("task1", 1, 1),
        ("task0", 2, 2),
    ]
    assert all(row["score"] is not None for row in listed(moecl, run))
    assert moecl("promote", run, "task0@1").out == "task0@prod is now task0@1\n"
    [old, new, other] = listed(moecl, run, "--all")
    assert (old["version"], old["aliases"], old["current"]) == (1, ["prod"], False)
    assert old["score"] is not None, "that of when it was learned again"
    assert (new["version"], new["aliases"], new["current"]) == (2, [], True)
    assert old["bytes"] == new["bytes"] == other["bytes"]
    shown = moecl("tasks", run, "--all").out.splitlines()
    assert shown[1].startswith("task0, version 1, @prod")
    assert shown[2].startswith("task0, version 2, current")
    assert shown[3].startswith("task1 ")

    def answered(name):
        return moecl("predict", run, "--task", name, stdin=b"the day food\n").out

    first, second = answered("task0@1"), answered("task0")
    assert first != second
    assert answered("task0@prod") == first
    assert answered("task0@2") == second
    assert moecl("rollback", run, "task0").out == "task0 is now task0@1; it was task0@2\n"
    assert answered("task0") == first
    assert {row["task"]: row["score"] for row in listed(moecl, run)}["task0"] == old["score"]
    reviewed = moecl("review", run)
    said = " ".join((reviewed.out + reviewed.err).split())
    assert "task0: version 1 answers, which was not tested last; --rescore answers its rows anew" in said
    assert list(json.loads(moecl("review", run, "--json").out)["tasks"]) == ["task1"]
    again = moecl("review", run, "--rescore", "--json")
    assert list(json.loads(again.out)["tasks"]) == ["task1", "task0"]
    thresholds = json.loads((run / "review" / "thresholds.json").read_text())
    assert thresholds["tasks"]["task0"]["parts"] == old["parts"]
    decided = moecl("predict", run, "--task", "task0", "--thresholds", run / "review" / "thresholds.json", stdin=b"x\n")
    assert "decision" in json.loads(decided.out)
    gate = moecl("compare", run, run)
    assert gate.status == 3
    said = "version 1 answers, which was not tested last (--rescore answers its rows anew)"
    assert f"in NEW {said}" in " ".join(gate.out.split())
    whole = shutil.copytree(run, tmp_path / "whole")
    assert moecl("rollback", whole, "task0", "--to", 2).status == 0
    assert f"in OLD {said}" in " ".join(moecl("compare", run, whole).out.split())
    rescored = json.loads(moecl("compare", run, whole, "--rescore", "--json").out)["tasks"][1]
    assert (rescored["task"], rescored["verdict"], rescored["old"]) == ("task0", "pass", old["score"])
    assert moecl("report", run).status == 0
    assert "task0: version 1 answers, which was not tested last; its scores are" in (run / "report.md").read_text()
    assert moecl("compare", run, run / "result.json").status == 3, "the run of the file, too"
    against = moecl("review", run, "--against", run, "--json")
    assert list(json.loads(against.out)["against"]["tasks"]) == ["task1"]
    against = moecl("review", run, "--against", run, "--rescore", "--json")
    assert list(json.loads(against.out)["against"]["tasks"]) == ["task1", "task0"]
    assert refuses("delete", run, "task0@1").endswith(
        "first (`moecl rollback RUN task0 --to 2`), or delete the whole task (task0)"
    )
    none = "task 'task0' has no version older than its current one, 1; --to 2 goes forward"
    assert refuses("rollback", run, "task0") == none
    assert moecl("rollback", run, "task0", "--to", 2).out == "task0 is now task0@2; it was task0@1\n"
    assert answered("task0") == second
    assert "an alias is a task's, not a version's; give task0 alone" in refuses("promote", run, "task0@1", "--remove")
    assert moecl("promote", run, "task0", "--as", "prod", "--remove").out == "task0@prod is no more\n"
    assert "alias '1': is no alias but a version" in refuses("promote", run, "task0", "--as", "1", "--remove")
    assert "has no alias 'prod'" in refuses("predict", run, "--task", "task0@prod", stdin=b"x\n")


def test_scores_by_version(moecl, run):
    found = json.loads(moecl("eval", run, "--task", "task0@1", "--task", "task0", "--json").out)
    assert [one["task"] for one in found] == ["task0@1", "task0"]
    again = json.loads(moecl("eval", run, "--task", "task0", "--json").out)
    assert again == found[1:]


def test_retire(moecl, refuses, run):
    told = moecl("retire", run, "task0").out
    assert told == f"task0 is retired; `moecl retire {run} task0 --undo` brings it back\n"
    assert [row["task"] for row in listed(moecl, run)] == ["task1"]
    assert [row["retired"] for row in listed(moecl, run, "--all")] == [True, True, False]
    assert "retired" in moecl("tasks", run, "--all").out
    assert "'task0' is retired; name its version (task0@2)" in refuses("eval", run, "--task", "task0")
    assert moecl("predict", run, "--task", "task0@2", stdin=b"x\n").status == 0
    assert moecl("retire", run, "task0", "--undo").out == "task0@2 is back\n"
    assert "'task0' is not retired" in refuses("retire", run, "task0", "--undo")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_delete_asks(moecl, refuses, run, monkeypatch, capsys):
    assert refuses("delete", run, "task0@1").startswith("--yes: task0@1 would be deleted for good; say --yes")
    assert "current version" in refuses("delete", run, "task0@2", "--yes")
    for answer, status, left in (("n\n", "nothing deleted\n", 2), ("y\n", "task0@1 deleted: 2 files, ", 1)):
        monkeypatch.setattr(sys, "stdin", Terminal(answer))
        assert main(["delete", str(run), "task0@1"]) == 0
        told = capsys.readouterr()
        assert told.out.lstrip().startswith(status)  # typer leaves a space behind a question
        assert "Delete task0@1 for good? [y/N]" in told.err
        assert len(Store.open(run / "store").versions("task0")) == left
    monkeypatch.setattr(sys, "stdin", Terminal(""))  # Ctrl-D
    assert main(["delete", str(run), "task0"]) == 130
    assert capsys.readouterr().err.endswith("moecl: stopped\n")
    assert moecl("delete", run, "task0", "--yes").out.startswith("task0@2 deleted: 3 files, ")
    assert [row["task"] for row in listed(moecl, run, "--all")] == ["task1"]


def test_verify(moecl, run):
    done = moecl("verify", run)
    assert (done.status, done.out) == (0, f"{run}/store is whole: 3 versions, 8 objects, log of 4; on its base\n")
    store = Store.open(run / "store")
    old, new = (store.path / "objects" / f"{store.digests(name)['task']}.safetensors" for name in ("task0@1", "task0"))
    old.write_bytes(old.read_bytes()[:-7])
    new.unlink()
    done = moecl("verify", run)
    assert (done.status, done.said) == (1, [f"moecl: {run}/store: 2 problems"])
    problems = sorted(done.out.splitlines())
    assert ["truncated" in one for one in problems] == [one.startswith(str(old)) for one in problems]
    assert ["missing" in one for one in problems] == [one.startswith(str(new)) for one in problems]
    assert moecl("verify", run, "--no-base").out.splitlines() == done.out.splitlines()


def test_verify_looks_at_shapes_and_base(moecl, run, tiny_folder, tmp_path):
    """A part of another base, whose bytes are what they say they are."""
    store = Store.open(run / "store")
    record = store.record("task1")
    tensors = load_file(store.path / "objects" / f"{record.parts['task']}.safetensors")
    wide = {name: tensor.repeat(2, 2) for name, tensor in tensors.items()}
    store.commit(
        [
            (
                record.model_copy(),
                {"task": wide, "gate": store.read(record.parts["gate"]), "shared": store.read(record.parts["shared"])},
            )
        ]
    )
    store.rollback("task1")
    assert moecl("verify", run, "--no-base").status == 0
    done = moecl("verify", run)
    assert done.status == 1
    assert "task 'task1' does not fit the base" in done.out
    base = tmp_path / "base"
    shutil.copytree(tiny_folder, base)
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"] + 1
    (base / "model.safetensors").write_bytes(save(weights, metadata={"format": "pt"}))
    manifest = store.path / "manifest.json"
    manifest.write_text(manifest.read_text().replace(str(tiny_folder), str(base)))
    done = moecl("verify", run)
    assert done.status == 1
    assert "learned on base" in done.out
    assert "does not end with manifest.json as it is" in done.out


def test_an_edited_log(moecl, run):
    path = run / "store" / "audit.jsonl"
    path.write_text(path.read_text().replace('"learn"', '"lore"', 1))
    done = moecl("verify", run, "--no-base")
    assert (done.status, done.out.count("\n")) == (1, 1)
    assert "audit.jsonl:2: altered" in done.out
    assert ["2", "-", "altered"] in [line.split()[:3] for line in moecl("log", run).out.splitlines()]
    assert moecl("log", run, "--json").out.splitlines()[1] == "null"


def test_log(moecl, run, monkeypatch):
    moecl("promote", run, "task1")
    moecl("rollback", run, "task0")
    lines = [json.loads(line) for line in moecl("log", run, "--json").out.splitlines()]
    assert [line["what"] for line in lines] == ["create", "learn", "learn", "learn", "promote", "rollback"]
    assert [(one["before"]["version"], one["after"]["version"]) for one in lines[-1]["changes"]] == [(2, 1)]
    assert [line["previous"] for line in lines[1:]] == [line["sha256"] for line in lines[:-1]]
    own = moecl("log", run, "--task", "task1").out.splitlines()
    assert [line.split()[0] for line in own[1:] if line[0] != " "] == ["3", "5"]
    monkeypatch.setattr(cli_store.out, "width", 80)
    shown = moecl("log", run).out
    assert max(map(len, shown.splitlines())) <= 80
    assert "promote prod" in shown
    assert "task0@2 -> @1" in shown


def test_gc(moecl, run):
    assert moecl("gc", run).out == "removed 0 files, 0 B\n"
    spare = run / "store" / "objects" / f"{'0' * 64}.safetensors"
    spare.write_bytes(b"1234")
    assert moecl("gc", run).out == "removed 1 file, 4 B\n"
    assert not spare.exists()


def test_nothing_is_changed_while_the_run_learns(refuses, run):
    with RunFolder(run).lock():
        for words in (("promote", "task0"), ("rollback", "task0"), ("retire", "task0"), ("delete", "task0@1", "--yes")):
            assert f"{run}: in use by pid {os.getpid()}" in refuses(words[0], run, *words[1:])
        assert "in use by" in refuses("gc", run)


def test_a_store_without_a_run(moecl, run, tmp_path):
    store = shutil.copytree(run / "store", tmp_path / "alone")
    assert moecl("promote", store, "task0").status == 0
    assert moecl("verify", store, "--no-base").status == 0
    assert {path.name for path in store.iterdir()} == {path.name for path in (run / "store").iterdir()}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("promote", "RUN", "task"), "no task 'task'; the tasks are: task1, task0 (did you mean"),
        (("promote", "RUN", "task0", "--as", "Prod"), "task 'task0@Prod': behind @ stands a version"),
        (("promote", "RUN", "task0", "--as", "3"), "alias '3': is no alias but a version; begin it with a letter"),
        (("promote", "RUN", "task0", "--as", "2", "--remove"), "alias '2': is no alias but a version; begin it with"),
        (("rollback", "RUN", "task0", "--to", "7"), "task 'task0' has no version 7; it has 1, 2"),
        (("rollback", "RUN", "task0", "--to", "0"), "Invalid value for '--to'"),
        (("retire", "RUN", "task0@2"), "task 'task0@2': give the task's name alone, 'task0'"),
        (("verify", "nowhere"), "nowhere: no such folder"),
        (("export", "RUN", "task0", "-o", "x", "--as", "lora"), "--as: 'lora' is none of peft-expert, static-lora"),
        (("export", "RUN", "task0", "--as", "peft-expert"), "Missing option '--output'"),
        (("export", "RUN", "task0@5", "-o", "x", "--as", "peft-expert"), "task 'task0' has no version 5"),
        (("export", "RUN", "task0", "-o", "RUN", "--as", "peft-expert"), "is there already; give another name"),
        (
            ("export", "RUN", "task0", "-o", "x", "--as", "static-lora", "--expert", "shared"),
            "--expert shared: is for --as peft-expert",
        ),
        (
            ("export", "RUN", "task0", "-o", "x", "--as", "static-lora", "--max-disagreement", "2"),
            "--max-disagreement: 2 is no share; give a number from 0 to 1",
        ),
        (
            ("export", "RUN", "task0", "-o", "x", "--as", "peft-expert", "--max-disagreement", "0.02"),
            "--max-disagreement 0.02: is for --as static-lora; a peft-expert is exact",
        ),
    ],
)
def test_misuse(refuses, versions, tmp_path, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    before = {path: path.read_bytes() for path in versions.rglob("*") if path.is_file()}
    assert said in refuses(*(versions if word == "RUN" else word for word in words))
    assert {path: path.read_bytes() for path in versions.rglob("*") if path.is_file()} == before


def test_export(moecl, run, tmp_path):
    moecl("promote", run, "task0@1")
    folder = tmp_path / "out"
    done = moecl("export", run, "task0@prod", "-o", folder, "--as", "peft-expert", "--expert", "shared")
    assert (done.status, done.out) == (0, f"written to {folder}\n")
    assert {path.name for path in folder.iterdir()} == {
        *("adapter_config.json", "adapter_model.safetensors", "moecl.json")
    }
    told = json.loads((folder / "moecl.json").read_text())
    store = Store.open(run / "store")
    assert (told["version"], told["parts"]) == (1, store.record("task0@1").parts)
    assert (told["as"], told["expert"], told["task"]["name"]) == ("peft-expert", "shared", "task0")
    [*_, (_, line)] = store.audit()
    assert (line.what, line.detail, line.changes[0].after.version) == ("export", {"as": "peft-expert"}, 1)
    assert store.verify() == []


def test_export_measures_first(moecl, run, tmp_path):
    folder = tmp_path / "out"
    words = ("export", run, "task0", "-o", folder, "--as", "static-lora")
    done = moecl(*words, "--max-disagreement", 1)
    assert done.status == 0
    parity = json.loads((folder / "parity.json").read_text())
    assert parity["rows"] == 8
    assert f"same answer        {parity['agreement']:.1%}\n" in done.out
    assert len(parity["task_weight"]) == 2
    lines = len(list(Store.open(run / "store").audit()))
    if parity["agreement"] == 1:  # a tiny task's stand-in may well be as good
        assert moecl(*words[:4], tmp_path / "again", *words[5:]).status == 0
        lines += 1
    assert len(list(Store.open(run / "store").audit())) == lines


def test_export_refuses_what_differs(moecl, run, tmp_path, monkeypatch):
    real, found = export.one_lora, {"rows": 4, "differ": 1}
    monkeypatch.setattr(export, "one_lora", lambda *given: (real(*given)[0], replace(real(*given)[1], **found)))
    words = ("export", run, "task0", "--as", "static-lora", "-o", tmp_path / "out")
    done = moecl(*words)
    assert done.status == 3
    assert done.said[-1] == (
        "moecl: refused: 25.0% of the answers differ, --max-disagreement is 2.0%; allow more, or write one expert "
        "exactly with --as peft-expert"
    )
    assert "same answer        75.0%" in done.out
    assert not (tmp_path / "out").exists()
    assert [line.what for _, line in Store.open(run / "store").audit()][-1] == "learn"
    found |= {"rows": 50}  # just what is allowed
    assert moecl(*words).status == 0


def test_export_from_a_store_that_cannot_be_written(moecl, run, tmp_path):
    with Store.open(run / "store").lock():
        done = moecl("export", run, "task0", "-o", tmp_path / "out", "--as", "peft-expert")
    assert done.status == 0
    assert (tmp_path / "out" / "adapter_config.json").exists()
    assert any(line.startswith("not in the store's log: ") for line in done.said)


def test_a_static_lora_needs_validation_rows(refuses, run, tmp_path):
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text("\n".join(line for line in text.splitlines() if "validation:" not in line))
    said = refuses("export", run, "task0", "-o", tmp_path / "out", "--as", "static-lora")
    assert "task 'task0' has no validation rows in " in said


def test_the_command_lines_of_the_docs_can_be_run():
    text = (Path(__file__).parents[1] / "docs" / "store.md").read_text()
    found = [call for block in text.split("```sh\n")[1:] for call in calls(block.partition("```")[0])]
    assert len(found) >= 8
    for words in found:
        parse(words)
