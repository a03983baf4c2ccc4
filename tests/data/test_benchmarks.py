"""vader4: what is read from the rated files, how it is split, how a stream names a split."""

import hashlib
import io
import json
import os
import tarfile
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fake_index import FakeIndex, make_asset, make_zip
from moecl.data.assets import ASSETS, fetch
from moecl.data.benchmarks import BENCHMARKS, resolve_source
from moecl.data.vader import SIZES, SOURCES, Row, read_rows, split_rows
from moecl.errors import DataError


def tsv(*rows):
    return "\r\n".join("\t".join(row) for row in rows).encode()


def test_rows_are_labelled_by_the_sign_and_neutral_ones_left_out():
    content = tsv(("1_1", "0.5", "fine"), ("1_2", "-2.75", "bad"), ("2_1", "0.49", "so"), ("2_2", "-0.4", "hm"))
    assert read_rows(content) == [Row("1_1", "fine", "positive"), Row("1_2", "bad", "negative")]


def test_text_is_tidied():
    content = tsv(("1", "3", " Skadden &amp;amp; Flom\xa0 &lt;3  café &quot;x&quot;"))
    assert [row.text for row in read_rows(content)] == ['Skadden & Flom <3 café "x"']


def test_repeats_are_left_out_also_of_neutral_texts():
    content = tsv(("1", "0", "So so."), ("2", "2", "so SO."), ("3", "2", "Yes &amp; no"), ("4", "-2", "yes & no"))
    assert [row.id for row in read_rows(content)] == ["3"]


def test_groups():
    assert Row("12_3", "", "positive").group == Row("12_14", "", "negative").group == "12"
    assert Row("12", "", "positive").group == "12"


def make_rows(spec):
    """Rows of (group, positive): group g's sentences are g_0, g_1 ..."""
    return [Row(f"{g}_{i}", f"text {g} {i}", "positive" if good else "negative") for i, (g, good) in enumerate(spec)]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 30), st.booleans()), max_size=120), st.randoms())
def test_splits_are_balanced_disjoint_and_follow_no_order(spec, random):
    rows = make_rows(spec)
    splits = split_rows(rows, {"test": 10, "validation": 4, "train": 40})
    assert list(splits) == ["test", "validation", "train"]
    groups = [{row.group for row in split} for split in splits.values()]
    assert sum(map(len, groups)) == len(set().union(*groups))
    for split, size in zip(splits.values(), (10, 4, 40), strict=True):
        assert len(split) <= size
        assert len({row.id for row in split}) == len(split)
        assert all(a.label != b.label for a, b in pairwise(split))  # so that any limit is balanced
        assert len(split) % 2 == 0
    shuffled = random.sample(rows, len(rows))
    assert split_rows(shuffled, {"test": 10, "validation": 4, "train": 40}) == splits


def test_splits_are_as_large_as_asked():
    rows = make_rows([(i // 3, i % 3 != 0) for i in range(3000)])
    assert {name: len(split) for name, split in split_rows(rows).items()} == SIZES | {"train": 1300}


def test_the_order_never_changes():
    """A change of it would change every result on vader4: raise the asset's `recipe` with it."""
    splits = split_rows(make_rows([(i // 2, i % 2) for i in range(40)]), {"test": 4, "train": 6})
    assert [[row.id for row in split] for split in splits.values()] == [
        ["14_29", "14_28", "0_1", "0_0"],
        ["1_3", "17_34", "17_35", "1_2", "3_7", "3_6"],
    ]


@pytest.fixture
def vader4(monkeypatch, tmp_path):
    """The asset, made from four small files."""
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w:gz") as out:
        for task, name in SOURCES.items():
            rows = [(f"{i}_1", "1.5" if i % 2 else "-1.5", f"{task} says é {i}") for i in range(2400)]
            content = tsv(*rows)
            info = tarfile.TarInfo(f"../../set/{name}")
            info.size = len(content)
            out.addfile(info, io.BytesIO(content))
    archive = make_zip({"pkg/set.tar.gz": tar.getvalue()})
    index = FakeIndex(archive)
    monkeypatch.setenv("MOECL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_INDEX_URL", index.url)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setattr("moecl.data.registry._pip_config", lambda: "")
    for name in ("EXTRA_INDEX_URL", "FIND_LINKS", "CERT"):
        monkeypatch.delenv(f"PIP_{name}", raising=False)
    asset = make_asset(archive, "pkg/set.tar.gz", ASSETS["vader4"].build, name="vader4", kind="benchmark")
    monkeypatch.setitem(ASSETS, "vader4", asset)
    yield index
    index.close()


def test_sources(vader4):
    for task in BENCHMARKS["vader4"]:
        for split, size in SIZES.items():
            lines = resolve_source(f"asset:vader4/{task}/{split}").read_text(encoding="utf-8").splitlines()
            rows = [json.loads(line) for line in lines]
            assert len(rows) == size
            assert rows[0].keys() == {"text", "label", "id"}
            assert rows[0]["text"].startswith(f"{task} says é ")
    assert vader4.asked == [""]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("asset:vader5/tweets/train", r"no benchmark 'vader5' \(did you mean 'vader4'\?\); there are: vader4"),
        ("asset:vader4/tweet/train", r"no task 'tweet' \(did you mean 'tweets'\?\); there are: tweets, amazon, movies"),
        ("asset:vader4/tweets/dev", r"no split 'dev'; there are: test, train, validation"),
        ("asset:vader4", r"no task ''"),
        ("asset:vader4/tweets/train/x", r"nothing goes after the split; write asset:vader4/tweets/train"),
    ],
)
def test_sources_that_do_not_exist(source, message):
    with pytest.raises(DataError, match=f"^{source}: {message}"):
        resolve_source(source)


@pytest.mark.slow
def test_the_real_vader4(tmp_path, monkeypatch):
    monkeypatch.setenv("MOECL_CACHE", str(tmp_path))
    folder = fetch("vader4")
    digest = hashlib.sha256()
    for task in BENCHMARKS["vader4"]:
        texts = Counter()
        for split, size in SIZES.items():
            content = (folder / task / f"{split}.jsonl").read_bytes()
            digest.update(content)
            rows = [json.loads(line) for line in content.decode().splitlines()]
            assert Counter(row["label"] for row in rows) == {"positive": size // 2, "negative": size // 2}
            texts.update(row["text"].casefold() for row in rows)
        assert max(texts.values()) == 1
    assert digest.hexdigest() == "05a403fd15c654753777d38df33169dc91922e8a1fc0f691b7002f8f03a1f1c0"
