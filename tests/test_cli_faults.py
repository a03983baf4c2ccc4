"""Bad input, a full disk, a damaged store: one line, exit 2, nothing lost."""

import os
import shutil
from pathlib import Path

import pytest
import yaml

from moecl.run_folder import RunFolder
from moecl.store import Store
from tiny_stream import task, write_rows, write_stream


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
    assert refuses("train", stream, "-o", tmp_path / "file") == f"{tmp_path / 'file'}: a file; give a folder with -o"
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
