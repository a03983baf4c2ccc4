"""A stream learned task by task: a stream or a new task in, a run folder with a store and a result out."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from moecl._sizes import EXPERT_MEMORY, parse_size
from moecl.config import StreamConfig, TaskConfig, anchored, anchored_task
from moecl.course import Progress, Watcher
from moecl.data.task import TaskData, load_task_data
from moecl.errors import AssetError, BaseError, ConfigError, DataError, RunError, TaskError, TrainingError, near
from moecl.evidence import predictions, without_row
from moecl.results import Result
from moecl.run_folder import RunFolder
from moecl.session import Session
from moecl.settled import attach, attach_method, resolve
from moecl.store import Store

__all__ = ["ContinualTrainer", "Watcher", "attach", "attach_method", "learn", "resolve"]


class ContinualTrainer:
    """Learns `config.tasks` in order into `folder`; started again, it goes on where it was stopped.

    `run` returns the result of a finished run at once. `expert_memory` (bytes, or "2GB") bounds what stays in memory of
    the learned tasks' experts. Raises the errors of errors.py; nothing learned is lost.
    """

    def __init__(
        self,
        config: StreamConfig,
        folder: str | Path,
        watcher: Watcher | None = None,
        expert_memory: int | str = EXPERT_MEMORY,
    ) -> None:
        self.asked, self.folder, self.watcher = anchored(config), RunFolder(folder), watcher or Watcher()
        self.expert_memory = parse_size(expert_memory, "expert_memory")

    def run(self) -> Result:
        with self.folder.lock():
            if self.folder.exists():
                self.folder.check_same(self.asked)
                if (result := self.folder.finished()) is not None:
                    self.folder.clear()  # a kill may have come between the result and this
                    return result
                return self._session(self.folder.config()).learn_all(resumed=True)
            self._check_free()
            session = self._session(self.asked)
            self.folder.start(self.asked, session.config, session.environment())
            return session.learn_all(resumed=False)

    def _session(self, config: StreamConfig) -> Session:
        return Session(config, self.folder, self.watcher, self.expert_memory)

    def _check_free(self) -> None:
        """Refuse a folder with anything in it but what a killed first start has left, which is removed."""
        self.folder.check_free()
        if Store.exists(self.folder.store):
            if Store.open(self.folder.store, readonly=True).manifest.tasks:
                raise RunError(
                    f"{self.folder.path}: holds a store with tasks, but no config.yaml; restore it, "
                    "or choose another folder with -o"
                )
            shutil.rmtree(self.folder.store)


def learn(
    folder: str | Path,
    task: TaskConfig,
    replace: bool = False,
    watcher: Watcher | None = None,
    expert_memory: int | str = EXPERT_MEMORY,
) -> Result:
    """Teach a finished run one more task, or with `replace` a task whose rules changed, without the old data.

    Started again after a kill it goes on; after an error it may be given another task, or the same with other rows. A
    task learned again moves to the end of the order, and R is as if it had been the last: without its old row and
    column, the old rows null in the new one but for those that can still be measured (before any task, and just before
    it). Its old version stays in the store. `expert_memory` is as for `ContinualTrainer`.

    Raises TaskError for a name that is taken (or, with `replace`, is not), RunError for an unfinished run.
    """
    run, watcher, memory = RunFolder(folder), watcher or Watcher(), parse_size(expert_memory, "expert_memory")
    task = anchored_task(task)
    if not run.exists():
        run.config()
    with run.lock():
        if run.finished() is None:
            if goes_on(run, task):
                return learn_newest(run, run.config(), watcher, memory, resumed=True)
            run.undo_reopen()
        config, result = run.config(), run.finished()
        assert result is not None
        if (method := config.method).learns_together:  # before the run is reopened
            raise RunError(f"{run.path}: {method.name} learns all tasks at once; run the stream again elsewhere (-o)")
        changed = rolled_back(run, result)
        progress = reopened(result, task.name, changed)
        if replace:
            progress.versions[task.name] = known_version(run, result.tasks, task.name) + 1
            progress.superseded |= last_score(run, result, task.name)
        elif task.name in result.tasks:
            gone = "" if Store.open(run.store).versions(task.name) else " and was deleted"
            raise TaskError(f"task {task.name!r} is learned already{gone}; rename it, or learn it again with --replace")
        tasks = [*(one for one in config.tasks if one.name != task.name), task]
        fields = {name: getattr(config, name) for name in StreamConfig.model_fields}
        extended = StreamConfig(**{**fields, "tasks": tasks})
        load_task_data(task)  # a fault in the new data must not reopen the run
        run.reopen(extended, vars(progress), result)
        for one in changed:  # of the version that does not answer any more
            predictions(run.path, one, "learned").unlink(missing_ok=True)
        return learn_newest(run, extended, watcher, memory, resumed=False)


def learn_newest(run: RunFolder, config: StreamConfig, watcher: Watcher, memory: int, resumed: bool) -> Result:
    """Learn what is left; an error that would come again makes the run the finished one that it was."""
    try:
        return Session(config, run, watcher, memory).learn_all(resumed)
    except (AssetError, BaseError, ConfigError, DataError, TrainingError):
        if not has_newest(run):
            run.undo_reopen()
        raise


def goes_on(run: RunFolder, task: TaskConfig) -> bool:
    """Whether an unfinished run is the learning of `task`, its rows unchanged; False where it is to be started over.

    Raises RunError where the run has something else to finish first.
    """
    before = {split: info["sha256"] for split, info in run.progress().get("data", {}).get(task.name, {}).items()}
    if run.config().tasks[-1] == task and (has_newest(run) or not before or before == digests(load_task_data(task))):
        return True
    if has_newest(run) or not run.is_reopened():
        raise RunError(f"{run.path}: this run is not finished; go on with the command that started it")
    return False


def has_newest(run: RunFolder) -> bool:
    """Whether the newest task's learning is done, so that only its test may be left."""
    name, versions = run.config().tasks[-1].name, run.progress().get("versions", {})
    return bool(Store.open(run.store).manifest.newest().get(name, 0) >= versions.get(name, 1))


def digests(data: TaskData) -> dict[str, str]:
    return {name: split.sha256 for name, split in data.splits().items()}


def known_version(run: RunFolder, known: list[str], name: str) -> int:
    if name not in known:
        raise TaskError(f"no task {name!r} to replace; the tasks are: {', '.join(known)}{near(name, known)}")
    return Store.open(run.store).manifest.newest()[name]


def last_score(run: RunFolder, result: Result, name: str) -> dict[str, float | None]:
    """NAME@VERSION -> score, of the version that the result is about."""
    score, parts = result.R[-1][result.tasks.index(name)], result.digests.get(name)
    versions = Store.open(run.store).versions(name)
    return {record.reference: score for record in versions if dict(record.parts) == parts}


def rolled_back(run: RunFolder, result: Result) -> list[str]:
    """Tasks that another version answers for than the one that R is about."""
    tasks = Store.open(run.store).tasks()
    return [one.name for one in tasks if one.name in result.tasks and result.is_about(one.name, one.parts) is False]


def reopened(result: Result, name: str, changed: Sequence[str] = ()) -> Progress:
    """The progress of a finished run that has `name` still to learn: without its old row and column, if any.

    Without what tasks scored that another version answers for now (`changed`): R never mixes two.
    """
    R = [list(row) for row in result.R]
    for place in map(result.tasks.index, changed):
        for row in R[place + 1 :]:
            row[place] = None
    data = {task: {split: info.model_dump() for split, info in found.items()} for task, found in result.data.items()}
    kept = {task: dict(found) for task, found in result.details.items() if task != name}
    for task in kept.keys() & {*changed}:
        kept[task].pop("drift", None)
    if name in result.tasks:
        place = result.tasks.index(name)
        kept = {task: without_row(found, place + 1) for task, found in kept.items()}
        del R[place + 1], data[name]
        for row in R:
            del row[place]
    for row in R:
        row.append(None)
    superseded = dict(result.superseded)
    return Progress(R, data, kept, superseded=superseded, seconds=result.seconds, resumed=result.resumed)
