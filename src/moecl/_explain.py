"""What the settings are, in words: for `--help` and the docs, and for one-line errors in place of pydantic's."""

import re
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, PydanticCustomError, PydanticUndefined

from moecl._yaml import Document, Keys, dotted, kind_of, not_text, show
from moecl.errors import ConfigError, near

# Names that people know from elsewhere and that no spelling rule connects with ours.
_KNOWN_ELSEWHERE = {
    "learning_rate": "lr",
    "num_train_epochs": "epochs",
    "num_epochs": "epochs",
    "per_device_train_batch_size": "batch_size",
    "max_seq_length": "max_length",
    "max_len": "max_length",
    "lr_scheduler_type": "schedule",
    "scheduler": "schedule",
    "patience": "early_stopping",
    "bf16": "precision",
    "dtype": "precision",
    "r": "rank",
    "lora_dropout": "dropout",
    "lora_rank": "rank",
    "layers": "adapt_layers",
    "model": "base",
    "base_model": "base",
    "prompt": "instruction",
    "template": "instruction",
    "classes": "labels",
    "label": "answer_field",
    "label_field": "answer_field",
    "label_column": "answer_field",
    "target": "answer_field",
    "type": "kind",
    "valid": "validation",
    "dev": "validation",
    "eval": "validation",
    "algorithm": "method",
}


class Setting(NamedTuple):
    """One key of a stream file: the key with its parents, the values it takes, its default and what it means."""

    key: str
    type: str
    default: str
    description: str


def settings(
    model: type[BaseModel], classes: Mapping[str, type[BaseModel]] | None = None, at: str = ""
) -> list[Setting]:
    """The settings of a model and of the models in it, in order; `classes` replaces a key's annotated class."""
    found: list[Setting] = []
    for name, info in model.model_fields.items():
        key = at + name
        inner, many = _inner_model(info.annotation)
        inner = (classes or {}).get(key, inner)
        if inner is None:
            words = _extra(info, "type") or _type_words(info.annotation, info.metadata)
            found.append(Setting(key, words, _default_words(info), info.description or ""))
        else:
            found += settings(inner, classes, f"{key}[]." if many else f"{key}.")
    return found


def _inner_model(annotation: Any) -> tuple[type[BaseModel] | None, bool]:
    many = typing.get_origin(annotation) is list
    inner = typing.get_args(annotation)[0] if many else annotation
    return (inner, many) if isinstance(inner, type) and issubclass(inner, BaseModel) else (None, False)


def _extra(info: FieldInfo, name: str) -> str:
    """Words that a field has for what its annotation cannot say."""
    return str(info.json_schema_extra.get(name, "")) if isinstance(info.json_schema_extra, dict) else ""


def _default_words(info: FieldInfo) -> str:
    if words := _extra(info, "default"):
        return words
    default = info.get_default(call_default_factory=True, validated_data={})
    if default is PydanticUndefined:
        return "required"
    if isinstance(default, list):
        return f"[{', '.join(map(str, default))}]"
    return "null" if default is None else str(default).lower() if isinstance(default, bool) else str(default)


def _type_words(annotation: Any, metadata: list[Any]) -> str:
    """The values that an annotation allows, such as "whole number, 1 or more"."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _type_words(arguments[0], list(arguments[1:]))
    if origin in (typing.Union, types.UnionType):
        return " | ".join(_type_words(part, metadata) for part in arguments if part is not type(None))
    if origin is Literal:
        return " | ".join(map(str, arguments))
    if origin in (list, dict):
        return "list of texts" if origin is list else "list, or map to words"
    words = {bool: "true | false", int: "whole number", float: "number", str: "text"}
    return words.get(annotation, str(annotation)) + _range_words(metadata)


def _range_words(metadata: list[Any]) -> str:
    bounds: dict[str, Any] = {}
    for item in metadata:
        for name in ("gt", "ge", "lt", "le"):
            for part in getattr(item, "metadata", [item]):  # Field(...) inside Annotated nests its own
                if hasattr(part, name):
                    bounds[name] = getattr(part, name)
    low = f" above {bounds['gt']}" if "gt" in bounds else f", {bounds['ge']} or more" if "ge" in bounds else ""
    high = f" below {bounds['lt']}" if "lt" in bounds else f" at most {bounds['le']}" if "le" in bounds else ""
    return f"{low},{high}".rstrip(",") if high else low


def problem(message: str, *at: str | int) -> PydanticCustomError:
    """An error for a validator to raise; `at` leads from the validated value to the one at fault."""
    return PydanticCustomError("moecl", "{message}", {"message": message, "at": at})


def not_a_text(value: Any, *at: str | int) -> PydanticCustomError:
    """An error for a validator that wanted text at `at`."""
    return PydanticCustomError("moecl_not_text", "not a text", {"value": value, "at": at})


def explain(error: ValidationError, known: list[Setting], document: Document) -> ConfigError:
    """The first of pydantic's complaints as one line: place, key, what is wrong, what to do."""
    details = min(error.errors(include_url=False), key=_urgency)
    return _one_line(details, {setting.key: setting for setting in known}, document)


def _urgency(details: ErrorDetails) -> int:
    # A misspelt key is also a missing one, and the first says more. Of a union's two
    # complaints, the one about a range is about the member that the value was meant for.
    ranks = {"extra_forbidden": 0, "greater_than": 1, "greater_than_equal": 1, "missing": 3}
    return ranks.get(details["type"], 2)


def _one_line(details: ErrorDetails, known: Mapping[str, Setting], document: Document) -> ConfigError:
    context = details.get("ctx", {})
    keys: Keys = (*details["loc"], *context.get("at", ()))
    path = keys if details["type"] == "extra_forbidden" else _known_part(keys, known)
    written = document.text(keys) if keys in document.marks else document.text(path)
    text = _words(details, path, known, written)
    return ConfigError(": ".join(part for part in (document.where(keys), dotted(path), text) if part))


def _known_part(keys: Keys, known: Mapping[str, Setting]) -> Keys:
    """`keys` without what pydantic appends for the members of a union."""
    names = "\n".join(known)
    while keys and not re.search(rf"^{re.escape(_pattern(keys))}($|\.|\[)", names, re.MULTILINE):
        keys = keys[:-1]
    return keys


def _pattern(keys: Keys) -> str:
    return re.sub(r"\[\d+\]", "[]", dotted(keys))


def _words(details: ErrorDetails, path: Keys, known: Mapping[str, Setting], written: str | None) -> str:
    kind, value = details["type"], details["input"]
    if kind == "moecl":
        return str(details["ctx"]["message"])
    if kind in ("moecl_not_text", "string_type"):
        return not_text(details.get("ctx", {}).get("value", value), written)
    if kind == "extra_forbidden":
        return _unknown_key(path, known)
    setting = known.get(_pattern(path))
    if kind == "missing":
        return f"is missing; add it ({setting.description if setting else 'see `moecl init`'})"
    wanted = _wanted(setting.type) if setting else _wanted_section(path, known)
    if kind == "literal_error" and isinstance(value, str):
        return f"{show(value)} is unknown; give {wanted}{near(value, wanted.split(' | '))}"
    if kind in ("too_short", "string_too_short") or (value is None and not written):
        return f"holds nothing; give {wanted}"
    if kind in ("greater_than", "greater_than_equal", "less_than", "less_than_equal", "finite_number"):
        return f"{written or value} is out of range; give {wanted}"
    shown = "was" if isinstance(value, dict | list) else f"{show(value, written)} was"
    return f"{shown} read as {kind_of(value)}; give {wanted}"


def _wanted(type_words: str) -> str:
    return f"a {type_words}" if type_words.startswith(("whole", "number", "list")) else type_words


def _wanted_section(path: Keys, known: Mapping[str, Setting]) -> str:
    keys = f"keys under it: {', '.join(_children(path, known))}"
    return f"a list, each item with {keys}" if any(key.startswith(f"{_pattern(path)}[]") for key in known) else keys


def _children(path: Keys, known: Mapping[str, Setting]) -> list[str]:
    """The keys that may stand directly under a mapping or under the items of a list."""
    start = _pattern(path)
    pattern = re.compile(rf"{re.escape(start)}(?:\[\])?\.(\w+)" if start else r"(\w+)")
    return list(dict.fromkeys(found[1] for found in map(pattern.match, known) if found))


def _unknown_key(path: Keys, known: Mapping[str, Setting]) -> str:
    name, siblings = str(path[-1]), _children(path[:-1], known)
    if _KNOWN_ELSEWHERE.get(name) in siblings:
        return f"unknown key (did you mean {_KNOWN_ELSEWHERE[name]!r}?)"
    if close := near(name, siblings):
        return f"unknown key{close}"
    meant = {name, _KNOWN_ELSEWHERE.get(name)}
    elsewhere = [key for key in known if key.rpartition(".")[2] in meant]
    if elsewhere:
        return f"unknown key (did you mean '{elsewhere[0]}'?)"
    return f"unknown key; remove it, or use one of {', '.join(siblings)}"
