"""A store's router statistics: shown, made for tasks that lack them, set for another false-accept rate."""

from pathlib import Path
from typing import Any

from moecl.course import Watcher
from moecl.data.task import text_alone
from moecl.errors import BaseError, RunError
from moecl.model import MoECL
from moecl.router import KeptFeatures, Statistics, read
from moecl.run_folder import RunFolder
from moecl.store import ROUTER, Store
from moecl.using import open_store, split_of


def described(run: Path) -> dict[str, Any]:
    """The current tasks, whether texts can find them, and how."""
    store = open_store(run)
    statistics = read(store)
    known = {} if statistics is None else statistics.known(store.tasks())
    return {
        "tasks": [{"task": one.name, "version": one.version, "known": one.name in known} for one in store.tasks()],
        "layer": None if statistics is None else statistics.layer,
        "false_accept": None if statistics is None else statistics.false_accept,
    }


def change(run: Path, fit: bool, false_accept: float | None, device: str, watcher: Watcher) -> None:
    """Add what tasks lack, from the rows that the run's config.yaml names; set the rate. One commit of the store.

    Raises RunError where there is nothing to set, DataError for rows that are gone, BusyError.
    """
    folder = RunFolder(run)
    folder.config()
    with folder.lock():
        store = Store.open(folder.store)
        statistics = read(store)
        if fit:
            statistics = fitted(folder, store, statistics, device, watcher)
        if statistics is None:
            raise RunError(f"{run}: no router statistics yet; make them with --fit")
        statistics.false_accept = statistics.false_accept if false_accept is None else false_accept
        with store.lock():
            store.commit(training={**store.training(), ROUTER: statistics.tensors()}, what="router")


def fitted(folder: RunFolder, store: Store, statistics: Statistics | None, device: str, watcher: Watcher) -> Statistics:
    missing = [one for one in store.tasks() if statistics is None or one.name not in statistics.known([one])]
    if not missing and statistics is not None:
        return statistics
    model = MoECL.from_store(store, device=device)
    if model.tokenizer is None:
        raise BaseError(f"base: {store.manifest.base.id} has no tokenizer; add one to its folder")
    statistics = statistics or Statistics.empty(model.geometry.hidden_size, model.geometry.num_layers)
    features = KeptFeatures(model, model.tokenizer, statistics.layer, store.manifest.base.sha256)
    config = folder.config()
    held = {task.name for task in config.tasks if task.validation}
    for record in missing:
        watcher.note(f"reading {record.name}")
        train, validation = (
            [text_alone(one, record.task) for one in split_of(config, record, split, folder.path).examples]
            if split == "train" or record.name in held
            else []
            for split in ("train", "validation")
        )
        statistics.learn(features, record.reference, train, validation)
    return statistics
