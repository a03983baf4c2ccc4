"""A stream learned task by task: data in, a run folder with a store and a result out."""

import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from moecl.backbone import Backbone, load_backbone, resolve_device, resolve_precision
from moecl.config import MoECLConfig, StreamConfig, Task, TaskConfig
from moecl.data.encode import Encoded
from moecl.data.task import Split, TaskData, load_task_data, read_split
from moecl.engine import Engine
from moecl.errors import BaseError, DataError, RunError, TaskError, near
from moecl.evaluate import Score, evaluate_task
from moecl.methods import make_method
from moecl.methods.base import Method
from moecl.model import Entry, MoECL
from moecl.results import Result, SplitInfo
from moecl.run_folder import RunFolder
from moecl.store import Store, TaskRecord
from moecl.task_trainer import Learned, learn_task

PACKAGES = ("moecl", "torch", "transformers", "accelerate", "safetensors", "numpy")
EVAL_BATCH_TOKENS = {"cpu": 4096, "mps": 8192, "cuda": 32768}


class Watcher:
    """Told what happens; draws nothing. The command line has ones that do."""

    def note(self, message: str) -> None: ...

    def fetching(self, what: str, done: int, total: int) -> None: ...

    def training(self, task: str, step: int, steps: int, figures: Mapping[str, float]) -> None: ...

    def validated(self, task: str, score: float) -> None: ...

    def evaluating(self, after: int, task: str, done: int, total: int) -> None: ...

    def row(self, after: int, tasks: Sequence[str], scores: Sequence[float | None]) -> None: ...


@dataclass
class Course:
    """One task as the run sees it. A learned task keeps only what scores it."""

    task: Task
    data: TaskData | None = None  # None once learned
    train: list[Encoded] = field(default_factory=list)
    validation: list[Encoded] = field(default_factory=list)
    test: tuple[Split, list[Encoded]] | None = None

    @property
    def name(self) -> str:
        return self.task.name


@dataclass
class Progress:
    """How far a run is, beside what its store tells. `versions`: those of tasks that are learned again."""

    R: list[list[float | None]] = field(default_factory=list)
    data: dict[str, dict[str, Any]] = field(default_factory=dict)
    details: dict[str, dict[str, Any]] = field(default_factory=dict)
    versions: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    resumed: int = 0


class ContinualTrainer:
    """Learns `config.tasks` in order into `folder`; started again, it goes on where it was stopped.

    `run` returns the result of a finished run at once. Raises the errors of errors.py; nothing learned is lost.
    """

    def __init__(self, config: StreamConfig, folder: str | Path, watcher: Watcher | None = None) -> None:
        self.asked, self.folder, self.watcher = config, RunFolder(folder), watcher or Watcher()

    def run(self) -> Result:
        with self.folder.lock():
            if self.folder.exists():
                self.folder.check_same(self.asked)
                if (result := self.folder.finished()) is not None:
                    return result
                return Session(self.folder.config(), self.folder, self.watcher).learn_all(resumed=True)
            self.folder.check_free()
            session = Session(self.asked, self.folder, self.watcher)
            self.folder.start(self.asked, session.config, session.environment())
            return session.learn_all(resumed=False)


def learn(folder: str | Path, task: TaskConfig, replace: bool = False, watcher: Watcher | None = None) -> Result:
    """Teach a finished run one more task, or with `replace` a task whose rules changed, without the old data.

    Started again after a kill it goes on. A task learned again moves to the end of the order; its old version stays in
    the store. Raises TaskError for a name that is taken (or, with `replace`, is not), RunError for an unfinished run.
    """
    run, watcher = RunFolder(folder), watcher or Watcher()
    with run.lock():
        config, result = run.config(), run.finished()
        known = [one.name for one in config.tasks]
        if result is None:
            if config.tasks[-1] != task:
                raise RunError(f"{run.path}: this run is not finished; go on with the command that started it")
            return Session(config, run, watcher).learn_all(resumed=True)
        if task.name in known and not replace:
            raise TaskError(f"task {task.name!r} is learned already; rename it, or learn it again with --replace")
        if replace and task.name not in known:
            raise TaskError(f"no task {task.name!r} to replace; the tasks are: {', '.join(known)}{near(task.name, known)}")
        tasks = [one for one in config.tasks if one.name != task.name]
        extended = config.model_copy(update={"tasks": [*tasks, task]})
        progress = reopened(result, task.name)
        if replace:
            progress.versions[task.name] = Store.open(run.store).record(task.name).version + 1
        load_task_data(task)  # a fault in the new data must not reopen the run
        run.reopen(extended, result.environment, vars(progress))
        return Session(extended, run, watcher).learn_all(resumed=False)


def reopened(result: Result, name: str) -> Progress:
    """The progress of a finished run that has `name` still to learn: without its old row and column, if any."""
    R = [list(row) for row in result.R]
    data = {task: {split: info.model_dump() for split, info in found.items()} for task, found in result.data.items()}
    kept = {task: dict(found) for task, found in result.details.items() if task != name}
    if name in result.tasks:
        place = result.tasks.index(name)
        del R[place + 1], data[name]
        for row in R:
            del row[place]
    for row in R:
        row.append(None)
    return Progress(R, data, kept, seconds=result.seconds, resumed=result.resumed)


class Session:
    """One process's work on a run: base, data and method in memory."""

    def __init__(self, config: StreamConfig, folder: RunFolder, watcher: Watcher) -> None:
        self.started = time.monotonic()
        self.folder, self.watcher = folder, watcher
        self.config = resolve(config, watcher)
        self.progress = Progress(**folder.progress())
        train = self.config.train
        torch.set_num_threads(train.threads or torch.get_num_threads())
        store = Store.open(folder.store) if Store.exists(folder.store) else None
        self.courses = [self._read(task, store) for task in self.config.tasks]  # faults in data show first
        backbone = load_backbone(config.base, train.precision, train.device, watcher.fetching)
        assert backbone.tokenizer is not None
        self.tokenizer = backbone.tokenizer
        self.model, self.method = attach(backbone, self.config)
        self.store = self._checked(store)
        for course in self.courses:
            self._encode(course)
        self.model.train()
        if train.gradient_checkpointing:
            self.model.gradient_checkpointing_enable()
        self._take_up()

    def _read(self, config: TaskConfig, store: Store | None) -> Course:
        """A task still to learn with all its rows; of a learned one the test rows, if they are still the same."""
        wanted = self.progress.versions.get(config.name, 1)
        learned = [record for record in store.tasks() if record.name == config.name] if store else []
        if not learned or learned[0].version < wanted:
            data = load_task_data(config)
            update = {
                "head": data.task.head or self.config.head,
                "max_length": data.task.max_length or self.config.train.max_length,
            }
            test = None if data.test is None else (data.test, [])
            return Course(data.task.model_copy(update=update), data, test=test)
        course = Course(learned[0].task)
        if config.test is not None:
            try:
                split = read_split(config.test, course.task, config.limit.test, "test")
            except DataError as error:
                self.watcher.note(f"task {config.name}: not tested any more ({error})")
                return course
            before = self.progress.data.get(config.name, {}).get("test", {}).get("sha256")
            if before not in (None, split.sha256):
                self.watcher.note(f"task {config.name}: not tested any more (its test rows changed)")
            else:
                course.test = (split, [])
        return course

    def _encode(self, course: Course) -> None:
        encoder = self.engine().encoder(course.task)
        if course.test is not None:
            course.test = (course.test[0], encoder.encode(course.test[0].examples, answers=False))
        if course.data is None:
            return
        course.train = encoder.encode(course.data.train.examples)
        if course.data.validation is not None:
            course.validation = encoder.encode(course.data.validation.examples, answers=False)
        rows = {"train": course.train, "validation": course.validation, "test": course.test[1] if course.test else []}
        self.progress.data[course.name] = {
            name: {"sha256": split.sha256, "rows": len(split.examples), "cut": sum(row.cut for row in rows[name])}
            for name, split in course.data.splits().items()
        }

    def _checked(self, store: Store | None) -> Store:
        info = self.model.base_info()
        if store is None:
            return Store.create(self.folder.store, info)
        if store.manifest.base.sha256 != info.sha256:
            raise BaseError(
                f"{store.path}: learned on base {store.manifest.base.id} with sha256 "
                f"{store.manifest.base.sha256[:12]}..., this base has {info.sha256[:12]}...; restore that base"
            )
        return store

    def _take_up(self) -> None:
        """The tasks that the store has, and the method's state after them."""
        self.model.load_tasks(self.store)
        if self.model.bank:
            self.method.restore(self.store.training())
        to_learn = {course.name for course in self.courses if course.data is not None}
        self.model.bank = {
            name: Entry(entry.task, self.method.adopt(entry.parts))
            for name, entry in self.model.bank.items()
            if name not in to_learn
        }

    def environment(self) -> dict[str, Any]:
        train = self.config.train
        return {
            "versions": {name: version(name) for name in PACKAGES},
            "python": platform.python_version(),
            "machine": platform.machine(),
            "system": platform.system(),
            "device": train.device,
            "precision": train.precision,
            "threads": train.threads,
            "base": self.store.manifest.base.model_dump(),
        }

    # Learning

    def learn_all(self, resumed: bool) -> Result:
        progress = self.progress
        progress.resumed += resumed
        earlier = progress.seconds
        for number in range(len(self.courses) + 1):
            if number and self.courses[number - 1].name not in self.model.bank:
                self._learn_one(self.courses[number - 1])
            if len(progress.R) == number:
                self._evaluate_row(number)
            elif number == len(self.courses) - 1:
                self._look_ahead(self.courses[-1])
            progress.seconds = earlier + time.monotonic() - self.started
            self.folder.save_progress(vars(progress))
        return self._finish()

    def _learn_one(self, course: Course) -> None:
        begun, name = time.monotonic(), course.name
        assert course.data is not None
        self.model.bank[name] = Entry(course.task, self.method.begin(course.task))
        learned = learn_task(
            self.model,
            self.method,
            course.task,
            course.train,
            self.config.train,
            self.folder.checkpoints / name,
            pad_id=self.pad_id,
            score=None if course.data.validation is None else lambda: self._validate(course),
            tell=lambda step, steps, figures: self.watcher.training(name, step, steps, figures),
            trackers=self._trackers(name),
        )
        self.progress.details[name] = details(learned) | {"seconds": time.monotonic() - begun}
        self.folder.save_progress(vars(self.progress))  # before the commit, after which the task is not learned again
        finished = self.method.finish()
        record = TaskRecord(
            task=course.task,
            form=finished.form,
            settings={**finished.settings, "adapt_layers": getattr(self.config.method, "adapt_layers", "all")},
        )
        self.store.commit([(record, finished.tensors)], training=self.method.export(), moved=finished.moved or None)
        self.model.bank[name] = Entry(course.task, self.method.adopt(finished.parts))

    @property
    def pad_id(self) -> int:
        return self.engine().pad_id

    def engine(self, bank: Mapping[str, Entry] | None = None) -> Engine:
        return Engine(self.model, self.tokenizer, bank, self.config.train.eval_batch_tokens)

    def _validate(self, course: Course) -> float:
        assert course.data is not None and course.data.validation is not None
        entry = self.model.bank[course.name]
        score = evaluate_task(self.engine(), entry, course.data.validation, course.validation).score
        self.watcher.validated(course.name, score)
        return score

    def _trackers(self, name: str) -> list[Any]:
        if "tensorboard" not in self.config.train.report_to:
            return []
        from torch.utils.tensorboard import SummaryWriter
        from transformers.integrations import TensorBoardCallback

        return [TensorBoardCallback(SummaryWriter(str(self.folder.tensorboard / name)))]  # type: ignore[no-untyped-call]

    # Evaluating

    def _evaluate_row(self, number: int) -> None:
        """Row `number` of R: every task that is asked for, after `number` tasks were learned."""
        wanted = [course for place, course in enumerate(self.courses) if self._asked_for(number, place)]
        row: dict[str, float | None] = {}
        for done, course in enumerate(wanted):
            self.watcher.evaluating(number, course.name, done, len(wanted))
            score = self._score(course, self.method)
            row[course.name] = None if score is None else score.score
            if score is not None and course.name in self.model.bank:
                self.progress.details[course.name]["per_class_recall"] = score.per_class_recall
        names = [course.name for course in self.courses]
        self.progress.R.append([row.get(name) for name in names])
        self.watcher.row(number, names, self.progress.R[-1])

    def _asked_for(self, number: int, place: int) -> bool:
        """Whether the cell of task `place` (from 0) after `number` tasks is asked for by `evaluate`."""
        ahead = {"seen": 0, "next": 1, "all": len(self.courses)}[self.config.evaluate]
        return place < number + ahead or (number == 0 and self.config.evaluate == "next")

    def _look_ahead(self, newest: Course) -> None:
        """The cells of a task that came after the run had ended: before any task, and just before it is learned."""
        if self.config.evaluate == "seen" or newest.name in self.model.bank:
            return
        for number, method in ((0, attach_method(self.model, self.config)), (len(self.courses) - 1, self.method)):
            if self.progress.R[number][-1] is None and (score := self._score(newest, method)) is not None:
                self.progress.R[number][-1] = score.score

    def _score(self, course: Course, method: Method) -> Score | None:
        """A learned task with its own parts, another with those it would start from; None without test rows."""
        if course.test is None:
            return None
        entry = self.model.bank.get(course.name)
        if entry is None:
            parts = method.preview(course.task)
            if parts is None:
                return None
            entry = Entry(course.task, parts)
        return evaluate_task(self.engine({course.name: entry}), entry, *course.test)

    def _finish(self) -> Result:
        names = [course.name for course in self.courses]
        for name in names:
            sizes = self.store.bytes(name)
            self.progress.details[name] |= {"bytes": sizes.own, "shared_bytes": sizes.shared}
        result = Result(
            name=self.config.name or self.folder.path.name,
            method=self.config.method.name,
            seed=self.config.train.seed,
            tasks=names,
            R=self.progress.R,
            seconds=self.progress.seconds,
            data={name: {split: SplitInfo(**info) for split, info in self.progress.data[name].items()} for name in names},
            details=self.progress.details,
            environment=self.environment(),
            digests={name: self.store.digests(name) for name in names},
            resumed=self.progress.resumed,
        )
        self.folder.finish(result)
        return result


def details(learned: Learned) -> dict[str, Any]:
    return {
        "steps": learned.steps,
        "best_step": learned.best_step,
        "validation": learned.curve,
        "trained_parameters": learned.trained_parameters,
        **learned.figures,
    }


def attach(backbone: Backbone, config: StreamConfig) -> tuple[MoECL, Method]:
    settings = config.method if isinstance(config.method, MoECLConfig) else MoECLConfig()
    model = MoECL(backbone, settings, config.train.seed)
    return model, attach_method(model, config)


def attach_method(model: MoECL, config: StreamConfig) -> Method:
    method = make_method(config.method, model.geometry, config.train.seed)
    method.state.to(model.device)
    return method


def resolve(config: StreamConfig, watcher: Watcher) -> StreamConfig:
    """Settle what is left to the machine, once: a run that goes on elsewhere keeps to it."""
    train = config.train
    device = resolve_device(train.device)
    precision, why = resolve_precision(train.precision, device)
    if train.precision == "auto":
        watcher.note(f"precision {precision}: {why}")
    settled = {
        "device": device,
        "precision": precision,
        "threads": train.threads or torch.get_num_threads(),
        "eval_batch_tokens": train.eval_batch_tokens or EVAL_BATCH_TOKENS[device.partition(":")[0]],
    }
    return config.model_copy(update={"train": train.model_copy(update=settled)})
