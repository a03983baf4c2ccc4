"""The bank: what answers for each task, and how it comes out of a store."""

import copy
import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from moecl._sizes import EXPERT_MEMORY
from moecl.config import Task
from moecl.errors import BaseError, StoreError, TaskError, near
from moecl.method_config import MoECLConfig
from moecl.nn.call import Parts
from moecl.nn.forms import FORMS, from_tensors
from moecl.nn.fused import Packed
from moecl.nn.lora import Geometry
from moecl.nn.moe_ffn import Gated
from moecl.store import ROUTER, BaseInfo, Manifest, Store, TaskRecord

OURS = MoECLConfig.model_fields["name"].default
Key = tuple[str, ...]  # what an object is read as, and its digest


class Packs(dict[Hashable, Packed]):
    """A task's matrices as the fast path reads them; they count with all the bytes that they can come to."""

    def __init__(self, parts: Gated, itemsize: int) -> None:
        super().__init__()
        self.bytes = itemsize * sum(
            p.numel() for part in (parts.shared, parts.task, parts.gate) for p in part.parameters()
        )


Part = TypeVar("Part", bound=nn.Module | Packs)


class Entry:
    """A task in the bank, and what answers for it: `parts`, given or loaded whenever they are asked for.

    `name` is what the bank knows it by: the task's name, or `NAME@VERSION` for a version that was asked for.
    """

    def __init__(
        self,
        task: Task,
        parts: Parts | Callable[[], Parts],
        name: str | None = None,
        digest: Callable[[], str | None] = lambda: None,
    ) -> None:
        self.task, self._parts, self.name, self._digest = task, parts, name or task.name, digest

    @property
    def parts(self) -> Parts:
        """Raises StoreError where they are to be loaded, and missing, damaged or another base's."""
        return self._parts if isinstance(self._parts, Parts) else self._parts()

    @property
    def held(self) -> Parts | None:
        """The parts, where they are not a store's."""
        return self._parts if isinstance(self._parts, Parts) else None

    @property
    def digest(self) -> str | None:
        """The sha256 of all that the parts are made of; None where they are not a store's, or move on."""
        return self._digest()


class Loaded:
    """Parts out of a store: `limit` bytes of tensors at most, beside what calls under way hold themselves.

    The least recently used are dropped first. What a call still holds after that is found again, never loaded twice.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.bytes, self.loads, self.evictions = limit, 0, 0, 0
        self._kept: OrderedDict[Key, nn.Module | Packs] = OrderedDict()
        self._living: WeakValueDictionary[Key, nn.Module | Packs] = WeakValueDictionary()

    def get(self, key: Key, load: Callable[[], Part]) -> Part:
        if key in self._kept:
            self._kept.move_to_end(key)
            return cast(Part, self._kept[key])
        part = cast(Part | None, self._living.get(key))
        if part is None:
            part = load()
            self.loads += isinstance(part, nn.Module)
        self._kept[key] = self._living[key] = part
        self.bytes += size(part)
        while self.bytes > self.limit:
            self.bytes -= size(self._kept.popitem(last=False)[1])
            self.evictions += 1
        return part

    def clear(self) -> None:
        self._kept.clear()
        self._living.clear()
        self.bytes = 0


class Bank(MutableMapping[str, Entry]):
    """Tasks by name, in the order in which they were learned. Looking at them loads nothing; `Entry.parts` does.

    A store's versions are found too (`NAME@VERSION`, `NAME@ALIAS`), as of when its tasks were taken, but not listed.
    Entries that are put in (those of tasks being learned) are kept as they are. A store's are read when they are used:
    an object that tasks share once for all of them, each hashed the first time. `memory` bounds what stays of them, in
    bytes of tensors; `itemsize` is what a number takes in packed matrices. `moving` are parts that take the place of
    those of tasks with retention live.
    """

    def __init__(
        self, geometry: Geometry, device: torch.device, memory: int = EXPERT_MEMORY, itemsize: int = 4
    ) -> None:
        self.geometry, self.loaded, self.itemsize = geometry, Loaded(memory), itemsize
        self.moving: Mapping[str, nn.Module] = {}
        self._entries: dict[str, Entry] = {}
        self._versions: dict[str, Entry] = {}  # those that were asked for
        self._store: Store | None = None
        self._manifest: Manifest | None = None
        self._like = torch.empty(0, device=device)  # where loaded parts go, and in which dtype
        self._lock = threading.RLock()

    def __getitem__(self, name: str) -> Entry:
        if "@" not in name:
            return self._entries[name]
        try:
            record = self.named(name)
        except TaskError as error:
            raise KeyError(name) from error
        if record.reference not in self._versions:
            assert self._store is not None
            self._versions[record.reference] = self._entry(self._store, record, record.reference)
        return self._versions[record.reference]

    def check_named(self, name: str) -> None:
        """Raises TaskError where the store tells better than a list of tasks why there is no `name`."""
        if "@" in name or (self._manifest is not None and name in self._manifest.retired):
            self.named(name)

    def named(self, name: str) -> TaskRecord:
        """The record that `name` names in the store whose tasks were taken. Raises TaskError."""
        if self._manifest is None:
            raise TaskError(
                f"task {name!r:.100}: versions and aliases are a store's; this model was not loaded from one"
            )
        return self._manifest.record(name)

    @property
    def store(self) -> Store | None:
        """The store whose tasks were taken."""
        return self._store

    def copy_into(self, made: Store) -> None:
        """Put the store whose tasks were taken, as it was then, into one without tasks. Raises StoreError."""
        if self._store is not None and self._manifest is not None:
            self._store.copy_into(made, self._manifest)

    def __setitem__(self, name: str, entry: Entry) -> None:
        self._entries[name] = entry

    def __delitem__(self, name: str) -> None:
        del self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def take(self, store: Store, records: Iterable[TaskRecord] | None = None) -> None:
        """Put a store's tasks in (these; or all, and none that it has no more).

        Raises StoreError for what can be seen without the objects: a damaged one fails its tasks when they are used.
        """
        if records is None:
            records = store.tasks()
            names = {record.name for record in records}
            self._entries = {name: one for name, one in self._entries.items() if one.held is not None or name in names}
        self._store, self._manifest, self._versions = store, store.manifest, {}
        for record in records:
            entry = self._entry(store, record, record.name)
            self._entries.pop(record.name, None)  # learned again, it is the last one
            self._entries[record.name] = entry

    def _entry(self, store: Store, record: TaskRecord, name: str) -> Entry:
        if (form := FORMS.get(record.form)) is None:
            raise StoreError(f"{store.path}: task {record.name!r} has the form {record.form!r}; upgrade moecl")
        wanted = {*form.needs, *(["head"] if record.task.head == "classifier" else [])}
        scaled = form is FORMS["weights"] or isinstance(record.settings.get("scale"), int | float)
        if {part for part in record.parts if not part.startswith("lora-")} != wanted or not scaled:
            raise StoreError(
                f"{store.path}: task {record.name!r} has the parts {', '.join(record.parts)}, not "
                f"{', '.join(sorted(wanted))} and a scale; restore the store from a copy"
            )
        return Entry(record.task, partial(self._parts, store, record), name, partial(self._digest, record))

    def _digest(self, record: TaskRecord) -> str | None:
        if record.live and self.moving:
            return None
        made_of = {"form": record.form, "settings": record.settings, "parts": record.parts}
        return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()

    def emptied(self) -> "Bank":
        """A bank without tasks, for another version of the same store: what is loaded is loaded for both."""
        other = copy.copy(self)
        other._entries = {}
        return other

    def apply(self, fn: Callable[[Tensor], Tensor]) -> None:
        """What `nn.Module._apply` does: parts in memory are changed by `fn`, a store's as they are loaded again."""
        for parts in filter(None, (entry.held for entry in self._entries.values())):
            if isinstance(parts, Gated):
                parts.packs.clear()
            for module in parts.own_modules():
                module._apply(fn)  # type: ignore[no-untyped-call]
        with self._lock:
            self._like = fn(self._like)
            self.loaded.clear()

    def _parts(self, store: Store, record: TaskRecord) -> Parts:
        with self._lock, fitting(f"{store.path}: task {record.name!r}"):
            found = {part: self._part(store, record, part) for part in record.parts}
            parts = FORMS[record.form].build(found, record.settings)
            if not isinstance(parts, Gated) or not parts.frozen or (record.live and self.moving):
                return parts
            key = ("packs", record.form, str(parts.scale), *(record.parts[part] for part in sorted(record.parts)))
            return parts.keeping(self.loaded.get(key, lambda: Packs(parts, self.itemsize)))

    def _part(self, store: Store, record: TaskRecord, part: str) -> nn.Module:
        if record.live and part in self.moving:
            return self.moving[part]
        digest = record.parts[part]

        def load() -> nn.Module:
            # Whoever asks first; a later call may want gradients of what goes through them.
            with torch.inference_mode(False), fitting(f"{store.path}: task {record.name!r}"):
                return from_tensors(self.geometry, part, store.read_again(digest)).to(self._like)

        read_as = part if part in ("gate", "head", "keys", "weights") else "expert"
        with self._lock:
            return self.loaded.get((read_as, digest), load)


def size(part: nn.Module | Packs) -> int:
    if isinstance(part, Packs):
        return part.bytes
    return sum(tensor.numel() * tensor.element_size() for tensor in part.parameters())


def find(bank: Mapping[str, Entry], name: str) -> Entry:
    if (entry := bank.get(name)) is None:
        if isinstance(bank, Bank):
            bank.check_named(name)
        known = ", ".join(bank) or "none yet"
        raise TaskError(f"no task {name!r}; the tasks are: {known}{near(name, list(bank))}")
    return entry


def settings_of(store: Store) -> tuple[MoECLConfig, int]:
    """How the last task of a store was learned, and the seed."""
    records = store.manifest.tasks
    known = {**MoECLConfig.unrecorded, **records[-1].settings} if records else {}
    ours = MoECLConfig.model_fields if known.get("method") in (None, OURS) else ("adapt_layers",)
    fields: Any = {name: known[name] for name in ours if name in known}
    return MoECLConfig(**fields), int(known.get("seed", 0))


def carried(store: Store) -> dict[str, dict[str, Tensor]]:
    """Of a store's state for further learning what is published: MoE-CL's, and the router's statistics.

    That of other methods serves `moecl learn` in its run alone, and may hold rows (replay's). What is a deleted
    task's or version's own stays, too. Raises StoreError.
    """
    records = store.manifest.tasks
    ours = not records or records[-1].settings.get("method") in (None, OURS)
    state = store.training() if ours else store.training(ROUTER)
    own = {"keys": {record.name for record in records}, ROUTER: {record.reference for record in records}}
    for name in state.keys() & own.keys():
        state[name] = {key: tensor for key, tensor in state[name].items() if _whose(key, name) in {"", *own[name]}}
    return state


def _whose(key: str, name: str) -> str:
    """The task or version that a tensor is of; "" of what all have in common.

    >>> _whose("reviews", "keys"), _whose("train.reviews@2.mean", "router"), _whose("train.scatter", "router")
    ('reviews', 'reviews@2', '')
    """
    of = key.partition(".")[2].rpartition(".")[0] if name == ROUTER else key
    return of if name != ROUTER or "@" in of else ""


def check_same_base(store: Store, found: BaseInfo) -> None:
    """Raises BaseError where a store was learned on another base, or on the same one in another dtype."""
    info = store.manifest.base
    if found.sha256 != info.sha256:
        raise BaseError(
            f"{store.path}: learned on base {info.id} ({info.dtype}, sha256 {info.sha256[:12]}...), not on this one "
            f"({found.dtype}, {found.sha256[:12]}...); load the base it was learned on"
        )


@contextmanager
def fitting(what: str) -> Iterator[None]:
    """Turn torch's many lines about tensors that do not fit a base into a StoreError."""
    try:
        yield
    except (RuntimeError, KeyError, IndexError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise StoreError(
            f"{what} does not fit the base ({reason}); is it another model's? restore the store from a copy"
        ) from error


def store_in(folder: str | Path) -> Path:
    """The store that `folder` is, or that of the run that it is."""
    inside = Path(folder) / "store"
    return inside if Store.exists(inside) and not Store.exists(folder) else Path(folder)
