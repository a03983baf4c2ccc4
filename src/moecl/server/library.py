"""The store's model as it is now. A request keeps the version that it was begun with to its end."""

import logging
import os
from copy import copy
from dataclasses import dataclass
from pathlib import Path

from moecl._sizes import KV_MEMORY
from moecl.config import AUTO, Task
from moecl.data.task import template
from moecl.engine import Engine
from moecl.errors import MoECLError, StoreError, TaskError
from moecl.results import Result
from moecl.review import TaskThresholds, Thresholds
from moecl.router import Router
from moecl.run_folder import RESULT, RunFolder
from moecl.server.schema import Run, TaskInfo
from moecl.store import MANIFEST, Store, TaskRecord
from moecl.terminal import quietly
from moecl.using import load, open_store, served_levels

log = logging.getLogger("moecl.server")
Mark = tuple[int, int, int]
Marks = list[Mark | None]


@dataclass(frozen=True)
class Snapshot:
    """One version of everything: tasks, their parts, thresholds, the run's scores. Nothing in it ever changes."""

    store: Store
    engine: Engine
    levels: dict[str, TaskThresholds] | None  # NAME@VERSION -> its own; None without a thresholds file
    result: Result | None
    router: Router | None
    created: int

    def record(self, name: str) -> TaskRecord:
        """Raises TaskError."""
        return self.store.record(name)

    def knows(self, name: str) -> bool:
        """Whether it can be asked: one of `names`, or a version."""
        try:
            self.record(name)
        except TaskError:
            return name in self.names  # auto
        return True

    @property
    def names(self) -> list[str]:
        return [*(record.name for record in self.store.tasks()), *([AUTO] if self.router is not None else [])]

    def run(self) -> Run:
        result = self.result
        return Run(
            base=self.store.manifest.base.id,
            auto=self.router is not None,
            thresholds=self.levels is not None,
            tasks=[self._info(record) for record in self.store.tasks()],
            R=None if result is None else result.R,
            R_tasks=[] if result is None else result.tasks,
            metrics={} if result is None else result.metrics,
        )

    def _info(self, record: TaskRecord) -> TaskInfo:
        task, result = record.task, self.result
        return TaskInfo(
            name=record.name,
            version=record.version,
            versions=[one.version for one in self.store.versions(record.name)],
            kind=task.kind,
            labels=list(task.labels or ()),
            fields=list(dict.fromkeys(template(task.instruction).names)),
            chats=reads_chats(task),
            metric=task.metric,
            score=None if result is None else result.score_of(record.name, record.version, record.parts),
            expert=expert(record),
            parts=record.parts,
        )


class Library:
    """Loads the base once, and the store's manifest each time it changes."""

    def __init__(
        self, run: Path, device: str, expert_memory: str, thresholds: Path | None, kv_memory: int = KV_MEMORY
    ) -> None:
        """Raises RunError, StoreError, BaseError; DataError where the thresholds do not fit."""
        self.thresholds = thresholds
        self.path = open_store(run).path
        self.result_of = run if self.path != run else None
        self._seen = self._marks()  # before anything is read: what changes from here on is seen as a change
        self._failed: Marks | None = None  # for what it was told that it cannot be served
        store = Store.open(self.path, readonly=True)
        if thresholds is not None:
            served_levels(store, thresholds)  # a file that does not fit is an error now, and a warning later
        with quietly():
            self.model = load(store, device, expert_memory)
        self.engine = Engine(self.model, kv_memory=kv_memory)
        self.now = self._snapshot(store, self.engine)

    def reload(self) -> bool:
        """Whether there is something new.

        Raises MoECLError where that cannot be served, the first time that it is tried; the old one then stays.
        """
        marks = self._marks()
        if marks == self._seen:
            return False
        try:
            store = Store.open(self.path, readonly=True)
            bank = self.model.bank.emptied()
            bank.take(store)
            self.now = self._snapshot(store, self.engine.over(bank))
        except Exception:
            if marks == self._failed:
                return False
            self._failed = marks
            raise
        self._seen, self._failed = marks, None
        return True

    def _snapshot(self, store: Store, engine: Engine) -> Snapshot:
        levels = None if self.thresholds is None else self._levels(self.thresholds, store)
        created = int(os.stat(store.path / MANIFEST).st_mtime)
        return Snapshot(store, engine, levels, self._result(), self._router(store), created)

    def _router(self, store: Store) -> Router | None:
        """What finds a text's task: only `auto` needs it."""
        try:
            router = Router.load(self.model, copy(store))  # a copy: reading may refresh it
        except StoreError as error:
            log.warning("router", extra={"fields": {"reason": str(error)}})
            return None
        if router is not None and (unknown := [one.name for one in store.tasks() if one.name not in router.tasks]):
            reason = f"auto never finds {', '.join(unknown)}; make their statistics with `moecl router RUN --fit`"
            log.warning("router", extra={"fields": {"reason": reason}})
        return router

    def _levels(self, path: Path, store: Store) -> dict[str, TaskThresholds]:
        """Thresholds of the tasks. One that has none, or changed under a running server, goes to review as a whole."""
        found: dict[str, TaskThresholds] = {}
        try:
            known = Thresholds.load(path)
        except MoECLError as error:
            log.warning("thresholds", extra={"fields": {"reason": str(error)}})
            return found
        for record in store.tasks():
            if record.task.kind != "classification":
                continue
            try:
                found[record.reference] = known.of(record.name, record.task.labels or (), record.parts, path)
            except MoECLError as error:
                log.warning("thresholds", extra={"fields": {"task": record.name, "reason": str(error)}})
        return found

    def _result(self) -> Result | None:
        """The run's scores, of which a server is not to fail."""
        if self.result_of is None:
            return None
        try:
            return RunFolder(self.result_of).last_result()
        except MoECLError as error:
            log.warning("result", extra={"fields": {"reason": str(error)}})
            return None

    def _marks(self) -> Marks:
        paths = [self.path / MANIFEST, self.thresholds, self.result_of and self.result_of / RESULT]
        return [mark(path) for path in paths if path is not None]


def mark(path: Path) -> Mark | None:
    """What changes where a file is written anew."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


def reads_chats(task: Task) -> bool:
    """Whether a chat is read whole, through the base's template: the task writes, and has no words of its own."""
    return task.kind == "generation" and template(task.instruction).literals == ("", "")


def expert(record: TaskRecord) -> str:
    """The sha256 of the task's own expert, as `moecl tasks` tells it."""
    return record.parts.get("task", next(iter(record.parts.values())))
