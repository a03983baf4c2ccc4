"""A run that has learned, for the command line: opened, listed, exported. Torch is imported where it is needed."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moecl._sizes import EXPERT_MEMORY
from moecl.errors import AssetError, BaseError, DataError, MoECLError, RunError, StoreError
from moecl.review import TaskThresholds, Thresholds
from moecl.run_folder import RunFolder, refuse_bench

if TYPE_CHECKING:
    from moecl.config import StreamConfig
    from moecl.data.task import Split
    from moecl.export import Parity
    from moecl.model import MoECL
    from moecl.results import Result
    from moecl.router import Router
    from moecl.store import Store, TaskRecord


def learned(run: Path, everything: bool = False) -> list[dict[str, Any]]:
    """A row a task, its score that of the end of the run, of an older version that when it was learned again.

    With `everything` also older versions and retired tasks, by task and version.
    """
    store, result = open_store(run), RunFolder(run).last_result()
    manifest = store.manifest
    records = store.tasks()
    if everything:
        names = list(dict.fromkeys(record.name for record in manifest.tasks))
        records = [record for name in names for record in manifest.versions(name)]
    return [
        {
            "task": record.name,
            "version": record.version,
            "versions": len(manifest.versions(record.name)),
            "current": not record.superseded,
            "retired": record.name in manifest.retired,
            "aliases": manifest.aliases_of(record),
            "kind": record.task.kind,
            "labels": list(record.task.labels or ()),
            "metric": record.task.metric,
            "score": result.score_of(record.name, record.version, record.parts) if result else None,
            "bytes": store.bytes_of(record),
            "parts": dict(record.parts),
        }
        for record in records
    ]


def not_as_tested(run: Path, result: "Result | None" = None) -> dict[str, str]:
    """Task -> why it does not answer as the result of a run says; nothing where the run has no store."""
    if not (run / "store").is_dir() or (result := result or RunFolder(run).last_result()) is None:
        return {}
    manifest, found = open_store(run).manifest, {}
    current = {record.name: record for record in manifest.current()}
    for name in result.tasks:
        if name in manifest.retired:
            found[name] = "retired"
        elif name not in current:
            found[name] = "deleted"
        elif result.is_about(name, current[name].parts) is False:
            found[name] = f"version {current[name].version} answers, which was not tested last"
    return found


def levels_of(
    records: Iterable["TaskRecord"], path: Path, known: Thresholds | None = None
) -> dict[str, TaskThresholds]:
    """The thresholds of classification tasks, by name. Raises DataError where one's are missing or of other parts."""
    known = known or Thresholds.load(path)
    return {
        one.name: known.of(one.name, one.task.labels or (), one.parts, path)
        for one in records
        if one.task.kind == "classification"
    }


def served_levels(store: "Store", path: Path) -> dict[str, TaskThresholds]:
    """The same of the tasks that the file names: all else a server leaves to a human."""
    known = Thresholds.load(path)
    return levels_of((one for one in store.tasks() if one.name in known.tasks), path, known)


def router_of(model: "MoECL", store: "Store") -> "Router":
    """A store's router, which must know every task. Raises RunError."""
    from moecl.router import Router

    router = Router.load(model, store)
    known = () if router is None else router.tasks
    if router is None or len(known) < len(store.tasks()):
        missing = ", ".join(one.name for one in store.tasks() if one.name not in known) or "any task"
        run = store.path.parent if store.path.name == "store" else store.path
        raise RunError(
            f"{store.path}: has no router statistics of {missing}, which `auto` needs; make them with "
            f"`moecl router {run} --fit`"
        )
    return router


def exported(
    run: Path, name: str, output: Path, kind: str, expert: str | None, max_disagreement: float, device: str
) -> "tuple[Parity | None, str]":
    """Write a task as an adapter, unless its parity is refused; and what else is to be known."""
    store = open_store(run)
    record = store.record(name)
    rows = split_of(RunFolder(run).config(), record, "validation", run).examples if kind == "static-lora" else []
    from moecl.adapter import adapter, check_free, write_folder
    from moecl.data.assets import is_asset, resolve_base
    from moecl.engine import Engine
    from moecl.export import one_expert, one_lora, report, source
    from moecl.store import Store

    check_free(output)
    engine = Engine(load(store, device))
    entry, parity = engine.bank[name], None
    if kind == "static-lora":
        lora, parity = one_lora(engine, entry, rows)
        if parity.disagreement > max_disagreement:
            return parity, ""
    else:
        lora = one_expert(entry, expert)
    files = adapter(engine.model, lora) | source(store, record, kind, expert)
    write_folder(output, files | ({} if parity is None else report(parity)))
    base, notes = store.manifest.base.id, []
    if is_asset(base):
        notes.append(f"{base} is moecl's own name; for PEFT the base is {resolve_base(base)}")
    try:
        Store.open(store.path).log_export(record, kind)
    except MoECLError as error:
        notes.append(f"not in the store's log: {error}")
    return parity, "\n".join(notes)


def split_of(config: "StreamConfig", record: "TaskRecord", split: str, run: Path) -> "Split":
    """A split of a task as the run's config.yaml names it. Raises DataError where it names none."""
    from moecl.data.task import read_split

    source = next((task for task in config.tasks if task.name == record.name), None)
    rows = None if source is None else getattr(source, split)
    if source is None or rows is None:
        where = run / "config.yaml"
        raise DataError(f"task {record.name!r} has no {split} rows in {where}; name them there")
    return read_split(rows, record.task, getattr(source.limit, split), split)


def open_store(run: Path, readonly: bool = True) -> "Store":
    """The store of a run, or the folder itself where it is one."""
    if not run.is_dir():
        raise RunError(f"{run}: no such folder; give one that `moecl train STREAM -o RUN` has made")
    from moecl.bank import store_in
    from moecl.store import Store

    if not Store.exists(found := store_in(run)):
        refuse_bench(run)
        raise RunError(f"{run}: not a run folder; give one that `moecl train STREAM -o RUN` has made")
    return Store.open(found, readonly=readonly)


def load(store: "Store", device: str, expert_memory: int | str = EXPERT_MEMORY) -> "MoECL":
    from moecl.model import MoECL

    return MoECL.from_store(store, device=device, expert_memory=expert_memory)


def problems_on_base(store: "Store", device: str) -> list[str]:
    """A line for each version whose parts do not fit the base that the store names, or for that base."""
    from moecl.model import MoECL

    try:
        model = MoECL.from_store(store, device=device)
    except (BaseError, StoreError, AssetError) as error:
        return [str(error)]
    found = []
    for record in store.manifest.tasks:
        try:
            _ = model.bank[record.reference].parts
        except StoreError as error:
            found.append(str(error))
    return found
