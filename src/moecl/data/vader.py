"""The benchmark vader4: four domains of human-rated sentiment, as balanced splits.

Tweets, Amazon reviews, movie reviews and New York Times editorials, each sentence rated by 20 people or more.
Source: Hutto & Gilbert, *VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media Text*,
ICWSM 2014.
"""

from __future__ import annotations

import hashlib
import html
import io
import json
import tarfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

SOURCES = {  # task -> the file that holds it
    "tweets": "tweets_GroundTruth.txt",
    "amazon": "amazonReviewSnippets_GroundTruth.txt",
    "movies": "movieReviewSnippets_GroundTruth.txt",
    "nyt": "nytEditorialSnippets_GroundTruth.txt",
}
SIZES = {"test": 500, "validation": 200, "train": 1400}  # rows, half of each label, in the order they are filled
LABELS = ("positive", "negative")
NEUTRAL = 0.5  # |mean rating|, of 4, below which raters do not agree on a sign


@dataclass(frozen=True)
class Row:
    """One sentence. `group` is the review or article that it comes from."""

    id: str
    text: str
    label: str

    @property
    def group(self) -> str:
        """`12` of `12_3`; tweets and movie snippets are numbered through, with no review named: each is its own."""
        return self.id.partition("_")[0]


def read_rows(content: bytes) -> list[Row]:
    """Read the rated sentences of a file of lines `id TAB mean rating TAB text`; neutral ones and repeats left out."""
    rows, seen = [], set()
    for line in content.decode("utf-8").splitlines():
        key, rating, text = line.split("\t")
        text = _tidy(text)
        repeated = text.casefold() in seen
        seen.add(text.casefold())
        if not repeated and abs(float(rating)) >= NEUTRAL:
            rows.append(Row(key, text, LABELS[float(rating) < 0]))
    return rows


def _tidy(text: str) -> str:
    while (plain := html.unescape(text)) != text:  # some entities were escaped twice
        text = plain
    return " ".join(text.split())


def split_rows(rows: Iterable[Row], sizes: Mapping[str, int] = SIZES) -> dict[str, list[Row]]:
    """Make balanced splits, no group on two sides, labels taking turns; the same for the same rows on every machine.

    Each split takes whole groups until it has half its size of each label; the last takes all that are left.
    """
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.group, []).append(row)
    queue = iter(sorted(groups.values(), key=lambda group: _rank(group[0].group)))
    splits = {}
    for name, size in sizes.items():
        taken: dict[str, list[Row]] = {label: [] for label in LABELS}
        while min(map(len, taken.values())) < size // 2 and (group := next(queue, None)):
            for row in group:
                taken[row.label].append(row)
        half = min(size // 2, *map(len, taken.values()))
        sides = [sorted(taken[label], key=lambda row: _rank(row.id))[:half] for label in LABELS]
        splits[name] = list(chain.from_iterable(zip(*sides, strict=True)))
    return splits


def _rank(key: str) -> str:
    """A place in an order that follows nothing in the data, and that no library's version can change."""
    return hashlib.sha256(f"vader4/{key}".encode()).hexdigest()


def write_splits(archive: bytes, folder: Path) -> None:
    """Write `TASK/SPLIT.jsonl` for the four tasks, rows `{"text", "label", "id"}`."""
    with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as tar:
        members = {Path(member.name).name: member for member in tar.getmembers()}
        for task, source in SOURCES.items():
            file = tar.extractfile(members[source])
            assert file is not None, source
            (folder / task).mkdir()
            for split, rows in split_rows(read_rows(file.read())).items():
                lines = [json.dumps({"text": r.text, "label": r.label, "id": r.id}, ensure_ascii=False) for r in rows]
                (folder / task / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
