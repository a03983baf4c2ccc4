"""Every kind of file gives the same rows, and whatever cannot be read says where it is and what to do."""

import gzip
import json
import sys
import types

import pyarrow
import pyarrow.parquet
import pytest

from moecl.data.rows import read_rows
from moecl.errors import DataError

ROWS = [{"text": "a fine film", "label": "positive"}, {"text": "two\nlines, “quoted” é", "label": "negative"}]


def write(path, content):
    raw = content if isinstance(content, bytes) else content.encode()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return str(path)


def jsonl(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def read(source, split="train"):
    return [row for _, row in read_rows(source, split)]


def places(source, split="train"):
    return [where for where, _ in read_rows(source, split)]


CSV = 'text,label\n"a fine film",positive\n"two\nlines, “quoted” é",negative\n'
FORMATS = {
    "x.jsonl": jsonl(ROWS),
    "x.ndjson": "\ufeff" + jsonl(ROWS).replace("\n", "\r\n") + "\n\n",
    "x.JSON": json.dumps(ROWS, indent=1),
    "data.json": json.dumps({"data": ROWS}),
    "x.csv": CSV,
    "bom.csv": "\ufeff" + CSV,
    "x.tsv": CSV.replace(",", "\t").replace("lines\t", "lines,"),
    "x.jsonl.gz": jsonl(ROWS),
    "x.csv.gz": CSV,
    "x.json.gz": json.dumps(ROWS),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_holds_the_same_rows(tmp_path, name):
    assert read(write(tmp_path / name, FORMATS[name])) == ROWS


def test_parquet(tmp_path):
    path = str(tmp_path / "x.parquet")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    assert read(path) == ROWS
    assert places(path) == [f"{path} row 1", f"{path} row 2"]


def test_where_rows_come_from(tmp_path):
    cells = write(tmp_path / "x.csv", 'text,label\n"one\n\ntwo",positive\n\nthree,negative\n')
    assert places(cells) == [f"{cells}:2", f"{cells}:6"]
    lines = write(tmp_path / "x.jsonl", "\n" + jsonl([{"text": "a\u2028b"}]) + "\n" + jsonl(ROWS[:1]))
    assert places(lines) == [f"{lines}:2", f"{lines}:4"]
    assert read(lines)[0] == {"text": "a\u2028b"}
    whole = write(tmp_path / "x.json", json.dumps(ROWS))
    assert places(whole) == [f"{whole} row 1", f"{whole} row 2"]


def test_documents_fit_in_a_cell(tmp_path):
    long = "word " * 50_000
    assert read(write(tmp_path / "x.csv", f"text\n{long}\n")) == [{"text": long}]


GOOD = '{"text": "good", "label": "positive"}\n'
BROKEN = [  # file, content, what the error says after the file's name
    ("a.jsonl", "", ": the file is empty"),
    ("a.txt", "hello", ": unknown kind of file; use .jsonl, .json, .csv or .tsv"),
    ("a.parquet", "hello", ": unreadable Parquet"),
    ("a.jsonl", GOOD + '{"text": "x" "label": 1}\n', ":2:14: broken JSON: Expecting ',' delimiter"),
    ("a.jsonl", GOOD + '["x"]\n', ":2: the row is of type list, not an object"),
    ("a.jsonl", "[" * 100_000 + "\n", ":1: unreadable JSON"),
    ("a.jsonl", '{"text": %s}\n' % ("9" * 5000), ":1: unreadable JSON"),
    ("a.json", GOOD + GOOD, ":2:1: broken JSON: Extra data (rows one a line belong in a .jsonl file)"),
    ("a.json", '{"rows": []}', ": neither a list of rows nor an object whose 'data' is one"),
    ("a.json", '[{"text": "x", "label": "positive"}, 3]', " row 2: the row is of type int"),
    ("a.jsonl", GOOD.encode() + '{"text": "é"}'.encode("latin-1"), ":2: not UTF-8: byte 11 of the line is 0xE9"),
    ("a.csv", "text,label\né,positive\n".encode("latin-1"), ":2: not UTF-8: byte 1 of the line is 0xE9"),
    ("a.jsonl", GOOD.encode("utf-16"), ":1: not UTF-8: byte 1 of the line is 0xFF; save the file as UTF-8"),
    ("a.csv", 'text,label\nx,positive\n"y,positive\nz,negative\n', ":3: broken row: unexpected end of data"),
    ("a.csv", "text,label\nx,positive,3\n", ":2: 3 cells where the header has 2; quote cells that hold ','"),
    ("a.csv", "text;label\nx;positive\n", ":1: one column only, 'text;label'"),
    ("a.csv", "text,text\nx,positive\n", ":1: the header line needs a name for each column, each once"),
]


@pytest.mark.parametrize(("name", "content", "message"), BROKEN, ids=[f"{n}-{m[:40]}" for n, _, m in BROKEN])
def test_what_cannot_be_read_is_named(tmp_path, name, content, message):
    path = write(tmp_path / name, content)
    with pytest.raises(DataError) as error:
        read(path)
    text = str(error.value)
    assert text.startswith(path + message)
    assert "\n" not in text


def test_missing_files_and_folders(tmp_path):
    write(tmp_path / "train.jsonl", GOOD)
    with pytest.raises(DataError, match=r"trian.jsonl: no such file \(did you mean 'train.jsonl'\?\)"):
        read(str(tmp_path / "trian.jsonl"))
    with pytest.raises(DataError, match="no such file, nor the folder"):
        read(str(tmp_path / "no" / "x.jsonl"))
    with pytest.raises(DataError, match=r"a folder, not a file; it holds train\.jsonl"):
        read(str(tmp_path))


def test_damaged_gzip(tmp_path):
    path = tmp_path / "x.jsonl.gz"
    for raw in (gzip.compress(GOOD.encode() * 99)[:-20], b"plain"):
        path.write_bytes(raw)
        with pytest.raises(DataError, match="not a whole gzip file"):
            read(str(path))


def test_asset_sources_are_resolved(tmp_path, monkeypatch):
    path = tmp_path / "x.jsonl"
    write(path, GOOD)
    benchmarks = types.SimpleNamespace(resolve_source={"asset:vader4/tweets/train": path}.__getitem__)
    monkeypatch.setitem(sys.modules, "moecl.data.benchmarks", benchmarks)
    assert read("asset:vader4/tweets/train") == [{"text": "good", "label": "positive"}]


class HubRows(list):
    features = types.MappingProxyType(
        {"text": object(), "label": types.SimpleNamespace(names=["positive", "negative"])},
    )


def test_hub_rows_have_the_names_of_their_classes(monkeypatch):
    calls = []

    def load_dataset(*args, **options):
        calls.append((args, options))
        return HubRows([{"text": "x", "label": 1}, {"text": "y", "label": 0}])

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert read("user/name", "validation") == [{"text": "x", "label": "negative"}, {"text": "y", "label": "positive"}]
    assert places("hub:user/name/config:train[:9]", "test")[1] == "hub:user/name/config:train[:9] row 2"
    assert places("hub:imdb") == ["hub:imdb:train row 1", "hub:imdb:train row 2"]
    assert calls == [
        (("user/name", None), {"split": "validation"}),
        (("user/name", "config"), {"split": "train[:9]"}),
        (("imdb", None), {"split": "train"}),
    ]
    unlabelled = HubRows([{"text": "x", "label": -1}])
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=lambda *_, **__: unlabelled))
    assert read("hub:imdb") == [{"text": "x", "label": None}]


def test_hub_failures_are_one_line(monkeypatch):
    def load_dataset(*_, **__):
        raise ConnectionError("no route\nto host")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(DataError, match=r"user/name: .* ConnectionError: no route; .*HF_ENDPOINT.*HF_HUB_OFFLINE"):
        read("user/name")
    with pytest.raises(DataError, match="hub:a b: not a hub id"):
        read("hub:a b")
