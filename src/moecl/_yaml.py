"""YAML that remembers where each value stands, so that an error can name the line.

Differences from plain YAML 1.1: `1e-3` is a number, and a key that appears twice, or that is not text, is an error.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from moecl.errors import ConfigError

Keys = tuple[str | int, ...]
LINES = (".jsonl", ".ndjson")  # of files of rows, a row a line
TABLES = (".json", ".csv", ".tsv", ".parquet")
DATA_EXTENSIONS = (*LINES, *TABLES)  # JSON is YAML, too

_EXPONENT = re.compile(r"[-+]?(?:\d[\d_]*)(?:\.[\d_]*)?[eE][-+]?\d+\Z")
_BREAK = re.compile("[\n\r\x85\u2028\u2029]")
_KINDS = {bool: "a boolean", int: "a number", float: "a number", str: "text", list: "a list", dict: "a mapping"}


class _Loader(yaml.SafeLoader):
    """YAML 1.1 with the numbers of YAML 1.2."""


class _Dumper(getattr(yaml, "CSafeDumper", yaml.SafeDumper)):  # type: ignore[misc]
    """Writes what _Loader reads."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    # The default writes a line break as an empty line inside single quotes, which few people read right, and of the
    # less common breaks (U+0085, U+2028) it loses some.
    style = '"' if _BREAK.search(text) else None
    node: yaml.ScalarNode = dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)
    return node


class _FastLoader(getattr(yaml, "CSafeLoader", _Loader)):  # type: ignore[misc]
    """The same in C, where PyYAML has it: a stream of hundreds of tasks is read in no time."""


for _one in (_Loader, _FastLoader):
    _one.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+0123456789"))
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+0123456789"))
_Dumper.add_representer(str, _represent_text)


@dataclass(frozen=True)
class Mark:
    """Where a value stands ("stream.yaml:14") and how it was written (None for a list or mapping)."""

    where: str
    text: str | None


@dataclass
class Document:
    """Plain data, and for each value's keys its mark."""

    source: str
    data: Any = None
    marks: dict[Keys, Mark] = field(default_factory=dict)

    def where(self, keys: Keys) -> str:
        """The place of a value, or of the nearest thing around it that has one."""
        while keys and keys not in self.marks:
            keys = keys[:-1]
        return self.marks[keys].where if keys in self.marks else self.source

    def text(self, keys: Keys) -> str | None:
        """How a value was written, where it is a scalar."""
        mark = self.marks.get(keys)
        return mark.text if mark else None

    def part(self, keys: Keys) -> "Document":
        """The value at `keys` as a document of its own."""
        data = self.data
        for key in keys:
            data = data[key]
        marks = {known[len(keys) :]: mark for known, mark in self.marks.items() if known[: len(keys)] == keys}
        return Document(self.source, data, marks)

    def put(self, keys: Keys, value: "Document") -> None:
        """Replace the value at `keys` (whose parent exists) by another document's."""
        parent = self.data
        for key in keys[:-1]:
            parent = parent[key]
        parent[keys[-1]] = value.data
        self.marks = {known: mark for known, mark in self.marks.items() if known[: len(keys)] != keys}
        self.marks[keys] = Mark(value.source, "" if value.data is None else None)
        self.marks |= {(*keys, *inner): mark for inner, mark in value.marks.items()}


def kind_of(value: Any) -> str:
    """What YAML took a value for, in words."""
    return (
        "null" if value is None else _KINDS.get(type(value), "a date" if hasattr(value, "year") else "something else")
    )


def show(value: Any, text: str | None = None) -> str:
    """A value for a message, as written where that is known; line breaks escaped, its length bounded."""
    written = repr(value if text is None else text)
    return written if len(written) <= 60 else f"{written[:56]}...'"


def read(path: str | Path) -> Document:
    """Parse a file.

    Raises:
        ConfigError: it is missing, unreadable, a folder, empty, not UTF-8 or not YAML.
    """
    if (name := str(path).lower().removesuffix(".gz")).endswith(DATA_EXTENSIONS) and not name.endswith(".json"):
        raise ConfigError(f"{path}: a file of rows; give the YAML file that names it")
    try:
        content = Path(path).read_bytes()
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; check the path") from None
    except IsADirectoryError:
        raise ConfigError(f"{path}: is a folder; give the path of a YAML file") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"{path}: cannot be read ({reason}); check the path and its permissions") from None
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}:{line}: is not UTF-8 text; save the file as UTF-8") from None
    document = parse(text, str(path), numbered=True)
    if document.data is None:
        raise ConfigError(f"{path}: holds nothing; write its keys (`moecl init` writes an example to start from)")
    return document


def parse(text: str, source: str, *, numbered: bool = False) -> Document:
    """Parse one YAML document; a mark is `source`, followed by the line if `numbered`."""
    document = Document(source)
    try:
        loader, node = _composed(text)
        if node is not None:
            document.data = _Builder(loader, document, numbered).build(node, ())
    except yaml.reader.ReaderError as error:
        place = f"{source}:{text.count(chr(10), 0, error.position) + 1}" if numbered else source
        raise ConfigError(f"{place}: holds U+{error.character:04X}, which YAML forbids; remove it") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{source}:{mark.line + 1}" if numbered and mark else source
        raise ConfigError(f"{place}: is not valid YAML: {error.problem}; {_remedy(error)}") from None
    except RecursionError:
        raise ConfigError(f"{source}: is nested too deeply; write it flatter") from None
    return document


def _composed(text: str) -> tuple[_Loader | _FastLoader, yaml.Node | None]:
    try:
        fast = _FastLoader(text)
        return fast, fast.get_single_node()
    except yaml.YAMLError:  # the slow one tells better what is wrong
        loader = _Loader(text)
        return loader, loader.get_single_node()


def _remedy(error: yaml.MarkedYAMLError) -> str:
    if "\\t" in str(error.problem):
        return "indent with spaces"
    if "mapping values are not allowed" in str(error.problem):
        return "quote a text that has a colon in it, and check the indentation"
    return "check quotes, brackets and indentation near this line"


def dump(data: Any) -> str:
    """YAML that `parse` reads back to equal data."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10**6)


class _Builder:
    """Turns YAML nodes into plain data and records the marks."""

    def __init__(self, loader: _Loader | _FastLoader, document: Document, numbered: bool) -> None:
        self.loader, self.document, self.numbered = loader, document, numbered
        self.flattened: set[int] = set()
        self.open: list[int] = []

    def build(self, node: yaml.Node, keys: Keys, at: yaml.Node | None = None) -> Any:
        """The node's value; `at` is the key in front of it, whose line a message shall name."""
        text = node.value if isinstance(node, yaml.ScalarNode) else None
        self.document.marks[keys] = Mark(self.place(at or node), text)
        if isinstance(node, yaml.ScalarNode):
            return self.scalar(node, keys)
        if id(node) in self.open:
            raise self.error(node, keys, "refers to itself; write the value out")
        if node.tag not in ("tag:yaml.org,2002:map", "tag:yaml.org,2002:seq"):
            raise self.unknown_tag(node, keys)
        self.open.append(id(node))
        value = self.mapping(node, keys) if isinstance(node, yaml.MappingNode) else self.sequence(node, keys)
        self.open.pop()
        return value

    def scalar(self, node: yaml.ScalarNode, keys: Keys) -> Any:
        try:
            return self.loader.construct_object(node)
        except (yaml.YAMLError, ValueError):
            if node.tag != "tag:yaml.org,2002:value" and node.tag not in self.loader.yaml_constructors:
                raise self.unknown_tag(node, keys) from None
            raise self.error(node, keys, f'{show(node.value)} cannot be read; quote it: "{node.value}"') from None

    def sequence(self, node: yaml.Node, keys: Keys) -> list[Any]:
        return [self.build(item, (*keys, index)) for index, item in enumerate(node.value)]

    def mapping(self, node: yaml.MappingNode, keys: Keys) -> dict[str, Any]:
        self.flatten(node, keys)
        items = {self.key(key, keys): (key, item) for key, item in node.value}
        return {name: self.build(item, (*keys, name), at=key) for name, (key, item) in items.items()}

    def flatten(self, node: yaml.MappingNode, keys: Keys) -> None:
        """Refuse repeated keys, then put the pairs that `<<` names before the node's own, which win."""
        if id(node) in self.flattened:
            return
        self.flattened.add(id(node))
        lines: dict[Any, int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in lines:
                first = lines[key.value]
                raise self.error(key, keys, f"the key {key.value!r} is here twice (first in line {first}); remove one")
            lines[str(key.value)] = key.start_mark.line + 1
        try:
            self.loader.flatten_mapping(node)
        except yaml.YAMLError:
            raise self.error(node, keys, "'<<' takes a mapping or a list of them; check what it names") from None

    def key(self, node: yaml.Node, keys: Keys) -> str:
        if not isinstance(node, yaml.ScalarNode):
            raise self.error(node, keys, "a key cannot be a list or a mapping; quote it if it is a text")
        name = self.scalar(node, keys)
        if not isinstance(name, str):
            raise self.error(node, keys, not_text(name, node.value))
        return name

    def place(self, node: yaml.Node) -> str:
        return f"{self.document.source}:{node.start_mark.line + 1}" if self.numbered else self.document.source

    def unknown_tag(self, node: yaml.Node, keys: Keys) -> ConfigError:
        return self.error(node, keys, f"has the unknown tag {node.tag!r}; remove the tag")

    def error(self, node: yaml.Node, keys: Keys, problem: str) -> ConfigError:
        path = dotted(keys)
        return ConfigError(f"{self.place(node)}: {path + ': ' if path else ''}{problem}")


def not_text(value: Any, text: str | None) -> str:
    """What to say where text was wanted and YAML saw something else."""
    if value is None and not text:
        return "holds nothing; give a text"
    if isinstance(value, dict | list):
        return f"was read as {kind_of(value)}; quote the text"
    if text is None:
        return f"{show(value)} is {kind_of(value)}; give a text"
    return f'{show(text)} was read as {kind_of(value)}; quote it: "{text}"'


def dotted(keys: Keys) -> str:
    """The way to a value as messages show it.

    >>> dotted(("tasks", 0, "limit", "train"))
    'tasks[0].limit.train'
    """
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in keys).removeprefix(".")
