"""The rows of a data file or of a data set of the hub, each with the place it came from.

JSONL, JSON (a list of rows, or {"data": [...]}), CSV and TSV (with a header line), each also as .gz, and Parquet.
"""

from __future__ import annotations

import csv
import gzip
import importlib
import json
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from moecl.errors import DataError, near

Row = tuple[str, dict[str, Any]]
"""(where, fields): where is `file:line` for files that have lines, else `file row n`."""

_BOM = b"\xef\xbb\xbf"
_HUB = re.compile(r"(?P<id>[\w-][\w.-]*(?:/[\w-][\w.-]*)?)(?:/(?P<config>[\w.-]+))?(?::(?P<split>\S+))?")
_NAMESPACED = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def read_rows(source: str, split: str = "train") -> Iterator[Row]:
    """The rows of `source`, one at a time, in order.

    `source` is a path, `asset:NAME`, or a hub id: `hub:NAME[/CONFIG][:SPLIT]`, or `USER/NAME` where no such
    file exists; `split` is the hub split where the id names none. Raises `DataError`.
    """
    if source.startswith("asset:"):
        from moecl.data.benchmarks import resolve_source  # only streams that name an asset need it

        return _read_file(Path(resolve_source(source)))
    path = Path(source)
    if source.startswith("hub:") or (_NAMESPACED.fullmatch(source) and not path.exists() and not _reader(path)):
        return _read_hub(source, split)
    return _read_file(path)


def parse_object(text: str, place: str) -> dict[str, Any]:
    """One JSON object; `place` (`file:line`) starts the message of the `DataError`."""
    value = _parse_json(text.rstrip(), place, "JSONL has one object a line")
    if not isinstance(value, dict):
        raise DataError(
            f"{place}: the row is of type {type(value).__name__}, not an object (JSONL has one object a line)"
        )
    return value


def decode_line(raw: bytes, place: str, first: bool = False) -> str:
    """One line as text; a byte order mark is dropped from the first. Raises `DataError` with the byte's position."""
    if first:
        raw = raw.removeprefix(_BOM)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        guess = "UTF-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else "LATIN1"
        raise DataError(
            f"{place}: not UTF-8: byte {error.start + 1} of the line is 0x{raw[error.start]:02X}; "
            f"save the file as UTF-8 (for instance: iconv -f {guess} -t UTF-8)"
        ) from error


def _read_file(path: Path) -> Iterator[Row]:
    if not path.exists():
        raise DataError(_missing(path))
    if path.is_dir():
        names = sorted(child.name for child in path.iterdir() if _reader(child))
        raise DataError(f"{path}: a folder, not a file" + (f"; it holds {', '.join(names[:10])}" if names else ""))
    reader = _reader(path)
    if reader is None:
        raise DataError(f"{path}: unknown kind of file; use .jsonl, .json, .csv or .tsv (each also .gz), or .parquet")
    if path.stat().st_size == 0:
        raise DataError(f"{path}: the file is empty")
    return reader(path)


def _missing(path: Path) -> str:
    if not path.parent.is_dir():
        return f"{path}: no such file, nor the folder {path.parent}"
    return f"{path}: no such file{near(path.name, (child.name for child in path.parent.iterdir()))}"


def _reader(path: Path) -> Callable[[Path], Iterator[Row]] | None:
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    if suffixes[-1:] == [".parquet"]:
        return _read_parquet
    if suffixes[-1:] == [".gz"]:
        suffixes.pop()
    return _TEXT_READERS.get(suffixes[-1]) if suffixes else None


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines, split at line feeds only: JSON strings may hold U+2028, which `splitlines` would split at."""
    try:
        with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as file:
            for number, raw in enumerate(file, 1):
                yield number, decode_line(raw, f"{path}:{number}", first=number == 1)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}: not a whole gzip file ({error}); make it again") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error


def _read_jsonl(path: Path) -> Iterator[Row]:
    for number, line in _lines(path):
        if line.strip():
            place = f"{path}:{number}"
            yield place, parse_object(line, place)


def _read_json(path: Path) -> Iterator[Row]:
    value = _parse_json("".join(line for _, line in _lines(path)), str(path), "rows one a line belong in a .jsonl file")
    rows = value.get("data") if isinstance(value, dict) else value
    if not isinstance(rows, list):
        raise DataError(f"{path}: neither a list of rows nor an object whose 'data' is one")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise DataError(f"{path} row {number}: the row is of type {type(row).__name__}, not an object")
        yield f"{path} row {number}", row


def _parse_json(text: str, place: str, hint: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        at = f"{place}:{error.colno}" if error.lineno == 1 else f"{place}:{error.lineno}:{error.colno}"
        raise DataError(f"{at}: broken JSON: {error.msg} ({hint})") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets nested without end
        raise DataError(f"{place}: unreadable JSON: {error}") from error


def _read_csv(path: Path, delimiter: str = ",") -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)  # Python's limit of 128 KiB a cell is too low for documents
    # strict: an unclosed quote would else swallow the rest of the file in silence.
    reader = csv.reader((line for _, line in _lines(path)), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    start = 1  # of the row: a cell may span lines
    try:
        for cells in reader:
            place, start = f"{path}:{start}", reader.line_num + 1
            if header is None:
                header = _header(cells, place)
            elif cells:
                yield place, _cells(header, cells, place, repr(delimiter))
    except csv.Error as error:
        raise DataError(f"{path}:{start}: broken row: {error}; check the quotes") from error


def _header(cells: list[str], place: str) -> list[str]:
    names = [cell.strip() for cell in cells]
    if len(names) == 1 and re.search(r"[;\t,|]", names[0]):
        raise DataError(f"{place}: one column only, {names[0]!r}: separate .csv with commas and .tsv with tabs")
    if "" in names or len(set(names)) < len(names):
        raise DataError(f"{place}: the header line needs a name for each column, each once; it has {', '.join(names)}")
    return names


def _cells(header: list[str], cells: list[str], place: str, separator: str) -> dict[str, Any]:
    if len(cells) != len(header):
        raise DataError(
            f"{place}: {len(cells)} cells where the header has {len(header)}; quote cells that hold {separator}"
        )
    return dict(zip(header, cells, strict=True))


def _read_tsv(path: Path) -> Iterator[Row]:
    return _read_csv(path, "\t")


def _read_parquet(path: Path) -> Iterator[Row]:
    arrow, parquet = _library("pyarrow"), _library("pyarrow.parquet")
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path} row {number}", row
    except (arrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: unreadable Parquet after row {number}: {_first_line(error)}") from error


_TEXT_READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
}


def _read_hub(source: str, split: str) -> Iterator[Row]:
    match = _HUB.fullmatch(source.removeprefix("hub:"))
    if match is None:
        raise DataError(f"{source}: not a hub id; write hub:NAME[/CONFIG][:SPLIT]")
    split = match["split"] or split
    try:
        rows = _library("datasets").load_dataset(match["id"], match["config"], split=split)
        names = {key: feature.names for key, feature in rows.features.items() if hasattr(feature, "names")}
    except Exception as error:  # the library raises whatever its network, cache and file readers raise
        raise DataError(
            f"{source}: the split {split!r} cannot be loaded from the hub: {_first_line(error)}; behind a mirror set "
            "HF_ENDPOINT, with a warm cache HF_HUB_OFFLINE=1, or give a local file"
        ) from error
    for number, row in enumerate(rows, 1):
        for key, classes in names.items():  # a class is stored as its index, -1 where there is none
            index = row[key]
            row[key] = classes[index] if isinstance(index, int) and 0 <= index < len(classes) else None
        yield f"{source}:{split} row {number}" if not match["split"] else f"{source} row {number}", row


def _library(name: str) -> Any:
    """An untyped library that takes a while to import and that most streams do without."""
    return importlib.import_module(name)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
