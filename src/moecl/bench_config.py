"""A bench file: methods x orders x seeds over one stream. Every key is described here, once."""

import copy
import json
import os
import re
from collections.abc import Iterable, Mapping
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic.config import JsonDict

from moecl import _raw, _yaml
from moecl._explain import Setting, explain, problem, settings
from moecl._yaml import Document, show
from moecl.config import StreamConfig, stream_in
from moecl.errors import ConfigError, near
from moecl.method_config import method_names, method_settings

OWN_ORDER = "stream"  # the name of the only order where none is given
_BENCHES_OWN = ("base", "method", "method.name", "tasks", "train.seed")  # what no `set` or search may change
_NOT_IN_A_SLUG = re.compile(r"[^a-z0-9_-]+")


def _as_mapping(value: Any) -> Any:
    """Changes given as --set takes them, as a mapping."""
    if value is None:
        return {}
    if not isinstance(value, list):
        return value
    found: dict[str, Any] = {}
    for index, item in enumerate(value):
        key, equals, text = item.partition("=") if isinstance(item, str) else ("", "", "")
        if not equals or not key.strip():
            raise problem(f"{show(item)} is no setting; write it as key=value, such as train.lr=1e-4", index)
        found[key.strip()] = _yaml.parse(text, f"set: {item}").data
    return found


def _check_free(changes: Mapping[str, Any]) -> None:
    for key in changes:
        if key in _BENCHES_OWN:
            raise problem(f"{show(key)} is the bench's own to set; remove it (see base, methods, orders, seeds)", key)


Changes = Annotated[dict[str, Any], BeforeValidator(_as_mapping)]
Search = dict[str, Annotated[list[Any], Field(min_length=1)]]
CHANGES: JsonDict = {"type": "map or list, as --set takes them", "default": "none"}
SEARCH: JsonDict = {"type": "map: key to list of values", "default": "none"}


class _Keys(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class TuneConfig(_Keys):
    """How hyper-parameters are chosen: on validation splits only, with as many trials for each method."""

    trials: int = Field(ge=1, description="trials of each method; the first is always its plain settings")
    seed: int = Field(default=1000, ge=0, lt=2**32, description="seed of the trials, and of which values they try")
    set: Changes = Field(
        default_factory=dict,
        description="what a trial does otherwise than a cell, to cost less",
        json_schema_extra=CHANGES,
    )
    search: Search = Field(
        default_factory=dict,
        description="values to try, for all methods; a key method.* for those that have it",
        json_schema_extra=SEARCH,
    )
    methods: dict[str, Search] = Field(
        default_factory=dict,
        description="further keys to search, or other values, for one method",
        json_schema_extra={"type": "map: label to such a map", "default": "none"},
    )

    @model_validator(mode="after")
    def _searches_settings(self) -> Self:
        for at, search in [
            (("search",), self.search),
            *((("methods", label), one) for label, one in self.methods.items()),
        ]:
            for key in search:
                if not key.startswith(("train.", "method.")) or key in _BENCHES_OWN:
                    raise problem(f"{show(key)} cannot be searched; give keys under train. or method.", *at, key)
        _check_free(self.set)
        return self


class BenchConfig(_Keys):
    """Methods x orders x seeds over one stream."""

    name: str | None = Field(default=None, description="the bench's name, for reports; null: the file's")
    stream: str = Field(
        min_length=1,
        description="the stream file (path relative to this one): base, train, head and tasks; not its method",
    )
    set: Changes = Field(
        default_factory=dict,
        description="changes to the stream for all methods; a key method.* goes to the methods that have it",
        json_schema_extra=CHANGES,
    )
    methods: dict[str, dict[str, Any]] = Field(
        min_length=1,
        description="label: the method's settings, its registry `name` where the label is another, and `set`, what it "
        "changes in the stream; or a list of names",
        json_schema_extra={"type": "map or list"},
    )
    orders: dict[str, list[str]] = Field(
        default_factory=dict,
        description="name: tasks in the order in which they are learned",
        json_schema_extra={"type": "map: name to list of tasks", "default": "the stream's own"},
    )
    seeds: Annotated[list[Annotated[int, Field(ge=0, lt=2**32)]], Field(min_length=1)] = Field(
        default_factory=lambda: [0],
        description="each method learns each order once with each",
        json_schema_extra={"type": "list of whole numbers"},
    )
    tune: TuneConfig | None = Field(
        default=None,
        description="how hyper-parameters are chosen, on validation splits only; null: not at all",
    )
    keep: Literal["all", "result"] = Field(
        default="all", description="of a finished cell: everything, or all but its store and checkpoints"
    )

    _read: Document | None = PrivateAttr(None)

    @field_validator("methods", mode="before")
    @classmethod
    def _by_label(cls, value: Any) -> Any:
        if isinstance(value, list):
            value = _labelled(value)
        if not isinstance(value, Mapping):
            return value
        return {label: {} if given is None else given for label, given in value.items()}

    @field_validator("set")
    @classmethod
    def _leaves_the_benchs_own(cls, value: dict[str, Any]) -> dict[str, Any]:
        _check_free(value)
        return value

    @model_validator(mode="after")
    def _goes_together(self) -> Self:
        for label, given in self.methods.items():
            name = given.get("name", label)
            if name not in (known := method_names()):
                hint = f"use one of: {', '.join(known)}{near(str(name), known)}"
                remedy = hint if "name" in given else f"give its registry name under `name`, {hint}"
                raise problem(
                    f"{show(name)} is not a method; {remedy}", "methods", label, *(["name"] * ("name" in given))
                )
        for what, names in (("methods", self.methods), ("orders", self.orders)):
            _check_slugs(what, names)
        if len({*self.seeds}) < len(self.seeds):
            raise problem("holds a seed twice; remove one", "seeds")
        fields = {
            f"method.{field}" for label in self.methods for field in method_settings(self.method(label)).model_fields
        }
        for_all: list[tuple[tuple[str, ...], Mapping[str, Any]]] = [(("set",), self.set)]
        if self.tune:
            for_all += [(("tune", "set"), self.tune.set), (("tune", "search"), self.tune.search)]
        for at, changes in for_all:
            for key in changes:
                if key.startswith("method.") and not any(key == one or key.startswith(f"{one}.") for one in fields):
                    raise problem(f"no method of this bench has {show(key)}{near(key, fields)}; remove it", *at, key)
        for label in self.tune.methods if self.tune else ():
            if label not in self.methods:
                raise problem(f"no method {show(label)} here{near(label, self.methods)}", "tune", "methods", label)
        return self

    def method(self, label: str) -> str:
        """The registry's name of a method."""
        return str(self.methods[label].get("name", label))

    def applicable(self, label: str, changes: Mapping[str, Any]) -> dict[str, Any]:
        """What of changes for all methods is for this one."""
        fields = method_settings(self.method(label)).model_fields
        return {
            key: value for key, value in changes.items() if not key.startswith("method.") or key.split(".")[1] in fields
        }

    def unused_settings(self) -> str:
        """What the stream's own `method` sets, in words: it is for no method of a bench."""
        method = self._stream([]).method
        own, plain = method.model_dump(), type(method)().model_dump()
        return ", ".join(f"{key}: {value}" for key, value in own.items() if value != plain[key])

    def stream_of(self, label: str, *changes: Mapping[str, Any]) -> StreamConfig:
        """The stream as a method learns it; the later changes win.

        Raises:
            ConfigError: the stream file or a setting is wrong.
        """
        own = {key: value for key, value in self.methods[label].items() if key not in ("name", "set")}
        layers = [
            {"method": {"name": self.method(label)}},
            self.applicable(label, self.set),
            {f"method.{key}": value for key, value in own.items()},
            _own_changes(label, self.methods[label]),
            *changes,
        ]
        pairs = chain.from_iterable(layer.items() for layer in layers)
        try:
            return self._stream([f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in pairs])
        except ConfigError as error:
            raise ConfigError(f"method {show(label)}: {str(error).removeprefix('--set ')}") from None

    def _stream(self, overrides: Iterable[str]) -> StreamConfig:
        """The stream file is read once: a bench under way does not change with it."""
        if self._read is None:
            self._read = _yaml.read(self.stream)
        return stream_in(copy.deepcopy(self._read), self.stream, overrides)


def _labelled(given: list[Any]) -> dict[str, Any]:
    """Methods in a list: names, or a name with its settings each."""
    found: dict[str, Any] = {}
    for index, item in enumerate(given):
        own = {item: None} if isinstance(item, str) else item
        if not isinstance(own, dict) or len(own) != 1:
            raise problem(f"{show(item)} is no method; give its name, or name: {{its settings}}", index)
        if (label := str(*own)) in found:
            raise problem(f"{show(label)} is here twice; give them labels of their own (label: {{name: ...}})", index)
        found |= own
    return found


def _own_changes(label: str, given: Mapping[str, Any]) -> dict[str, Any]:
    try:
        changes = _as_mapping(given.get("set"))
        if not isinstance(changes, dict):
            raise ConfigError(f"methods.{label}.set: {show(changes)} is no map of settings; write key: value")
        _check_free(changes)
    except ConfigError:
        raise
    except ValueError as error:  # pydantic's, for validators
        raise ConfigError(f"methods.{label}.set: {error}") from None
    return changes


def _check_slugs(what: str, names: Iterable[str]) -> None:
    """Folders are named by slugs: each must be something, and its own."""
    first: dict[str, str] = {}
    for name in names:
        if not slug(name):
            raise problem(f"{show(name)} has no letter or digit for a folder's name; give it one", what, name)
        if (other := first.setdefault(slug(name), name)) != name:
            raise problem(
                f"{show(name)} and {show(other)} would share the folder {slug(name)!r}; rename one", what, name
            )


def slug(name: str) -> str:
    """A label as part of a folder's name.

    >>> slug("No discriminator, alpha=0")
    'no-discriminator-alpha-0'
    """
    return _NOT_IN_A_SLUG.sub("-", name.casefold()).strip("-")


def describe_bench() -> list[Setting]:
    """Every key of a bench file as (key, type, default, description)."""
    return settings(BenchConfig, {"tune": TuneConfig})


def load_bench(path: str | Path) -> BenchConfig:
    """Read a bench file; its stream's path is made absolute and `orders` filled in.

    Raises:
        ConfigError: one line with the file, the line and the key.
    """
    document = _yaml.read(path)
    _raw.require_mapping(document)
    config = _validated(document)
    stream = Path(path).parent.resolve() / os.path.expanduser(config.stream)
    config = config.model_copy(update={"stream": str(stream), "name": config.name or Path(path).stem})
    own = [task.name for task in config._stream([]).tasks]
    for order, names in config.orders.items():
        for index, name in enumerate(names):
            at = ("orders", order, index)
            if name not in own:
                raise _wrong(document, at, f"no task {show(name)} in {stream.name}{near(name, own)}")
            if name in names[:index]:
                raise _wrong(document, at, f"{show(name)} is here twice; remove one")
        if not names:
            raise _wrong(document, ("orders", order), "holds nothing; give the tasks' names")
    return config.model_copy(update={"orders": config.orders or {OWN_ORDER: own}})


def _validated(document: Document) -> BenchConfig:
    try:
        return BenchConfig.model_validate(document.data)
    except ValidationError as error:
        raise explain(error, describe_bench(), document) from None


def _wrong(document: Document, keys: _yaml.Keys, message: str) -> ConfigError:
    return ConfigError(f"{document.where(keys)}: {_yaml.dotted(keys)}: {message}")


def portable(config: StreamConfig, folder: Path) -> dict[str, Any]:
    """A stream as plain data that says nothing of the machine: paths relative to `folder`."""
    data = config.model_dump(mode="json")
    data["base"] = _relative(data["base"], folder)
    for task in data["tasks"]:
        for split in ("train", "validation", "test"):
            task[split] = task[split] and _relative(task[split], folder)
    return data


def _relative(source: str, folder: Path) -> str:
    return os.path.relpath(source, folder) if os.path.isabs(source) else source
