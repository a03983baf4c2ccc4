"""The bank: what answers for each task, and how it comes out of a store."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moecl.config import MoECLConfig, Task
from moecl.errors import BaseError, StoreError, TaskError, near
from moecl.nn.gated import from_tensors
from moecl.nn.lora import Geometry
from moecl.nn.moe_ffn import Gated
from moecl.store import BaseInfo, Store


@dataclass(frozen=True)
class Entry:
    """A task in the bank, and what answers for it."""

    task: Task
    parts: Gated


def find(bank: Mapping[str, Entry], name: str) -> Entry:
    if (entry := bank.get(name)) is None:
        known = ", ".join(bank) or "none yet"
        raise TaskError(f"no task {name!r}; the tasks are: {known}{near(name, list(bank))}")
    return entry


def modules(parts: Gated) -> list[nn.Module]:
    return [module for module in (parts.shared, parts.task, parts.gate, parts.head) if module is not None]


def load_bank(store: Store, geometry: Geometry, device: torch.device) -> dict[str, Entry]:
    """A store's tasks, each checked against the base's geometry; objects that tasks share are read once."""
    bank: dict[str, Entry] = {}
    objects: dict[str, dict[str, Tensor]] = {}
    for record in store.tasks():
        if record.form != "gated":
            raise StoreError(f"{store.path}: task {record.name!r} has the form {record.form!r}; upgrade moecl")
        for digest in record.parts.values():
            if digest not in objects:
                objects[digest] = store.read(digest)
        found = {part: objects[digest] for part, digest in record.parts.items()}
        with fitting(f"{store.path}: task {record.name!r}"):
            parts = from_tensors(geometry, float(record.settings["scale"]), found)  # type: ignore[arg-type]
        for module in modules(parts):
            module.to(device)
        bank[record.name] = Entry(record.task, parts)
    return bank


def settings_of(store: Store) -> tuple[MoECLConfig, int]:
    """How the last task of a store was learned, and the seed."""
    records = store.tasks()
    known = dict(records[-1].settings) if records else {}
    fields: Any = {name: known[name] for name in MoECLConfig.model_fields if name in known}
    return MoECLConfig(**fields), int(known.get("seed", 0))  # type: ignore[arg-type]


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
    except (RuntimeError, KeyError, IndexError) as error:
        reason = " ".join(str(error).split())[:200]
        raise StoreError(
            f"{what} does not fit the base ({reason}); is it another model's? restore the store from a copy"
        ) from error


def open_store(folder: str | Path) -> Store:
    """The store at `folder`, or of the run at `folder`."""
    inside = Path(folder) / "store"
    return Store.open(inside if Store.exists(inside) and not Store.exists(folder) else folder, readonly=True)
