"""A stream file before it is validated: overrides put in, paths made absolute.

`os.path` and not pathlib where a text may be no path at all: it answers where pathlib raises.
"""

import os
import re
from pathlib import Path
from typing import Any

from moecl import _yaml
from moecl._yaml import DATA_EXTENSIONS, Document, Keys, Mark, dotted, kind_of, show
from moecl.errors import ConfigError, near

_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*(:\S+)?")


def require_mapping(document: Document) -> None:
    """Refuse a file that holds no keys."""
    if not isinstance(document.data, dict):
        raise ConfigError(f"{document.where(())}: holds {kind_of(document.data)}; write keys, such as `name: value`")


def override(document: Document, setting: str) -> None:
    """Put a `key=value` of the command line into the document; the value is YAML."""
    source = f"--set {setting}"
    key, equals, value = setting.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"{source}: is no setting; write it as key=value, such as train.lr=1e-4")
    new = _yaml.parse(value, source)
    document.put(_way(document, key.strip(), source), new)


def _way(document: Document, key: str, source: str) -> Keys:
    """The keys that a dotted key stands for; mappings that are not there yet are made on the way."""
    keys: Keys = ()
    node, rest = document.data, re.sub(r"\[(\d+)\]", r".\1", key)  # tasks[0].name, as messages write it, is good too
    while True:
        part: str | int
        if isinstance(node, list):
            part, rest = _item(node, rest, dotted(keys), source)
        elif isinstance(node, dict):
            part, _, rest = rest.partition(".")
        else:
            raise ConfigError(f"{source}: {dotted(keys)}: has no keys under it; set {dotted(keys)} itself")
        keys = (*keys, part)
        if not rest:
            return keys
        if isinstance(node, dict):
            if node.get(part) is None:
                document.marks[keys] = Mark(source, None)
            node[part] = _opened(node.get(part), keys)
        node = node[part]


def _opened(value: Any, keys: Keys) -> Any:
    """A value that keys can be put under, where it stands for a mapping."""
    if value is None:
        return {}
    return {"name": value} if keys == ("method",) and isinstance(value, str) else value


def _item(items: list[Any], rest: str, name: str, source: str) -> tuple[int, str]:
    """The item that `rest` begins with, by its name (which may have dots in it) or its number, and what follows."""
    named = {item["name"]: index for index, item in enumerate(items) if isinstance(item, dict) and _text(item, "name")}
    for known in sorted(named, key=len, reverse=True):
        if rest == known or rest.startswith(f"{known}."):
            return named[known], rest[len(known) + 1 :]
    first, _, rest = rest.partition(".")
    if first.isdecimal() and int(first) < len(items):
        return int(first), rest
    choices = f"use one of {', '.join(named)}, or a number from 0 to {len(items) - 1}" if items else "there is none"
    raise ConfigError(f"{source}: {name}: {show(first)} is not one of them{near(first, named)}; {choices}")


def _text(mapping: dict[str, Any], key: str) -> str | None:
    value = mapping.get(key)
    return value if isinstance(value, str) else None


def resolve_base(document: Document, folder: Path) -> None:
    """Make the base absolute where it is a folder: written as one (./ ../ / ~), or there and with a model in it."""
    base = _path(document, document.data, ("base",))
    if base and (_is_written_as_path(base) or os.path.isfile(folder / base / "config.json")):
        document.data["base"] = os.path.realpath(folder / os.path.expanduser(base))


def resolve_sources(document: Document, keys: Keys, folder: Path) -> None:
    """Make the paths of the task at `keys` absolute."""
    task = document.data
    for key in keys:
        task = task[key]
    for split in ("train", "validation", "test") if isinstance(task, dict) else ():
        if source := _path(document, task, (*keys, split)):
            task[split] = _resolved(source, document, (*keys, split), folder)


def _path(document: Document, parent: dict[str, Any], keys: Keys) -> str | None:
    """The text at `keys`, whose last is one of the parent's, where there is one."""
    text = _text(parent, str(keys[-1]))
    if text and "\0" in text:
        raise ConfigError(f"{document.where(keys)}: {dotted(keys)}: {show(text)} can be no path; remove the \\0")
    return text


def _resolved(source: str, document: Document, keys: Keys, folder: Path) -> str:
    if source.startswith(("asset:", "hub:")):
        return source
    path = folder / os.path.expanduser(source)
    is_data = source.lower().removesuffix(".gz").endswith(DATA_EXTENSIONS)
    if is_data or _is_written_as_path(source) or os.path.exists(path):
        # Links are kept: the file may be one to a name without an extension, its folder one to where data lies here.
        return os.path.abspath(path)
    if _HUB_ID.fullmatch(source):
        return source
    raise ConfigError(
        f"{document.where(keys)}: {dotted(keys)}: {show(source)} is neither a data file ({', '.join(DATA_EXTENSIONS)}) "
        "nor a hub id; write user/name, or hub:user/name/config:split"
    )


def _is_written_as_path(text: str) -> bool:
    return text.startswith(("./", "../", "/", "~")) or text in (".", "..")
