"""One process's work on a run: base, data, method and store in memory, from the first task to the result."""

import platform
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from moecl._sizes import EXPERT_MEMORY
from moecl.backbone import load_backbone
from moecl.bank import Entry, check_same_base, fitting
from moecl.config import StreamConfig, Task, TaskConfig
from moecl.course import Course, Progress, Scored, Watcher
from moecl.data.derived import Derived
from moecl.data.task import TaskData, load_task_data, overlaps, read_split, text_alone
from moecl.data.tokens import MOST_BYTES as TOKEN_BYTES
from moecl.data.tokens import encode_split
from moecl.engine import Engine
from moecl.errors import AssetError, ConfigError, DataError, RunError
from moecl.evaluate import Answers, answer_task, prompts
from moecl.evidence import Evidence
from moecl.methods.base import Finished, Method
from moecl.prefix import prefixes
from moecl.results import Items, Result, SplitInfo
from moecl.router import KeptFeatures, Statistics
from moecl.run_folder import CONFIG, RunFolder
from moecl.settled import attach, attach_method, check_heads, resolve, trackers
from moecl.start import Start, Starts
from moecl.store import ROUTER, Store, TaskRecord
from moecl.task_trainer import Learned, learn_task

PACKAGES = ("moecl", "torch", "transformers", "accelerate", "safetensors", "numpy")


def resolved(config: StreamConfig, folder: RunFolder, watcher: Watcher) -> StreamConfig:
    """What is left to the machine settled. Raises ConfigError where a run was begun on a device that is not here."""
    try:
        return resolve(config, watcher)
    except ConfigError as error:
        if not folder.exists():
            raise
        raise ConfigError(f"{folder.path / CONFIG}: train.{error} there: the run was begun elsewhere") from error


class Session:
    """One process's work on a run, which holds the run's lock."""

    def __init__(
        self, config: StreamConfig, folder: RunFolder, watcher: Watcher, expert_memory: int = EXPERT_MEMORY
    ) -> None:
        self.started, self.expert_memory = time.monotonic(), expert_memory
        self.folder, self.watcher = folder, watcher
        self.config = resolved(config, folder, watcher)
        self.progress = Progress(**folder.progress())
        self.trackers = trackers(self.config.train.report_to, watcher)
        train = self.config.train
        torch.set_num_threads(train.threads or torch.get_num_threads())
        store = Store.open(folder.store) if Store.exists(folder.store) else None
        learned = {record.name: record for record in store.tasks()} if store else {}
        newest = store.manifest.newest() if store else {}
        self.courses = [  # faults in data first
            self._read(task, learned.get(task.name), newest.get(task.name, 0)) for task in self.config.tasks
        ]
        together = self.config.method.learns_together
        self.evidence = Evidence(
            folder, self.progress, [task.name for task in self.config.tasks], watcher.note, together
        )
        backbone = load_backbone(config.base, train.precision, train.device, watcher.fetching)
        assert backbone.tokenizer is not None
        self.tokenizer = backbone.tokenizer
        self.model, self.method = attach(backbone, self.config)
        self.store = self._checked(store)
        self.prefixes = prefixes(self.model, self.store.manifest.base.sha256, train.prefix_cache, watcher.note)
        self._engine = Engine(self.model, self.tokenizer, None, train.eval_batch_tokens, self.prefixes)
        self.starts = Starts(self._engine)
        self.tokens = Derived("tokens", TOKEN_BYTES, watcher.note)
        self.statistics: Statistics | None = None
        check_heads(self.config, [course.task for course in self.courses])
        for course in self.courses:
            self._encode(course)
        self.model.train()
        if train.gradient_checkpointing:
            self.model.gradient_checkpointing_enable()
        self._take_up()

    def _read(self, config: TaskConfig, learned: TaskRecord | None, newest: int) -> Course:
        """A task still to learn with all its rows; of a learned one those that score it, if they are still the same.

        `newest`: the greatest number that a version of it ever had, whichever answers now.
        """
        if newest < self.progress.versions.get(config.name, 1):
            data = load_task_data(config)
            update = {
                "head": data.task.head or self.config.head,
                "max_length": data.task.max_length or self.config.train.max_length,
            }
            course = Course(data.task.model_copy(update=update), data)
            course.test = None if data.test is None else (data.test, [])
            course.validation = None if data.validation is None else (data.validation, [])
            return course
        if learned is None:
            self.watcher.note(f"task {config.name}: not tested any more (it was retired or deleted)")
            return Course(config)
        if config.name not in self.progress.details:
            raise RunError(
                f"{self.folder.path}: its store has task {config.name!r}, but neither result.json nor progress.json "
                "tells of it; restore the one that is missing"
            )
        course = Course(learned.task)
        course.validation = self._read_again(config, course.task, "validation", "validated")
        course.test = self._read_again(config, course.task, "test", "tested")
        return course

    def _read_again(self, config: TaskConfig, task: Task, name: str, what: str) -> Scored | None:
        source = getattr(config, name)
        if source is None:
            return None
        try:
            split = read_split(source, task, getattr(config.limit, name), name)
        except (AssetError, DataError) as error:
            self.watcher.note(f"task {task.name}: not {what} any more ({error})")
            return None
        before = self.progress.data.get(task.name, {}).get(name, {}).get("sha256")
        if before not in (None, split.sha256):
            self.watcher.note(f"task {task.name}: not {what} any more (its {name} rows changed)")
            return None
        return split, []

    def _encode(self, course: Course) -> None:
        engine = self.engine()
        course.validation, course.test = (
            None if found is None else (found[0], prompts(engine, course.task, found[0], self.tokens))
            for found in (course.validation, course.test)
        )
        if course.data is None:
            return
        self.model.check_fits(course.task)
        course.train = encode_split(engine.encoder(course.task), course.data.train, self.tokens)
        rows = {"train": course.train}
        rows |= {name: found[1] for name in ("validation", "test") if (found := getattr(course, name)) is not None}
        before = self.progress.data.get(course.name, {})
        self.progress.data[course.name] = {
            name: {"sha256": split.sha256, "rows": len(split.examples), "cut": sum(row.cut for row in rows[name])}
            for name, split in course.data.splits().items()
        }
        if found := remarks(course.data, self.progress.data[course.name]):
            self.watcher.note(f"task {course.name}: {'; '.join(found)}")
        if self.config.train.early_stopping and course.validation is None:
            self.watcher.note(f"task {course.name}: never stopped early, for it has no validation rows")
        for name, info in self.progress.data[course.name].items():
            if before and before.get(name, {}).get("sha256") != info["sha256"]:
                raise RunError(
                    f"{self.folder.path}: the {name} rows of task {course.name!r} changed since the run began; "
                    "restore them, or start another run with -o"
                )

    def _checked(self, store: Store | None) -> Store:
        info = self.model.base_info()
        if store is None:
            return Store.create(self.folder.store, info)
        check_same_base(store, info)
        return store

    def _take_up(self) -> None:
        """The tasks that the store has, and the method's state after them."""
        self.model.load_tasks(self.store, self.expert_memory)
        if self.store.manifest.begun:
            with fitting(f"{self.store.path}: its state for further learning"):
                state = self.store.training()
                if ROUTER in state:
                    self.statistics = Statistics.of(state.pop(ROUTER))
                self.method.restore(state)
        self.model.bank.moving = self.method.moving()
        for course in self.courses:
            if course.data is not None:
                self.model.bank.pop(course.name, None)

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
        if resumed:
            self.watcher.note(f"going on: {len(self.model.bank)} of {len(self.courses)} tasks are learned")
        self.earlier = progress.seconds
        for number in range(len(self.courses) + 1):
            if self._advance(number):
                progress.seconds = self.earlier + time.monotonic() - self.started
                self.folder.save_progress(vars(progress))
        return self._finish()

    def _advance(self, number: int) -> bool:
        """Learn what is due after `number - 1` tasks and measure row `number` of R; whether anything was left to do."""
        due = [course for course in self._due(number) if course.data is not None]
        if due:
            self._learn(due)
        if measures := len(self.progress.R) == number:
            self._evaluate_row(number)
        elif ahead := number == len(self.courses) - 1:
            self._look_ahead(self.courses[-1])
            return ahead
        return bool(due) or measures

    def _due(self, number: int) -> list[Course]:
        """The tasks to learn as the `number`-th: that one; where all are learned together, all of them as the last."""
        if self.config.method.learns_together:
            return self.courses if number == len(self.courses) else []
        return self.courses[number - 1 : number] if number else []

    def _learn(self, courses: Sequence[Course]) -> None:
        """Learn a task, or several at once."""
        begun, [*_, course] = time.monotonic(), courses
        for one in courses:
            if self.progress.versions.get(one.name, 1) > 1:
                self.method.forget(one.name)
        rows = self.method.rehearse([row for one in courses for row in one.train])
        start = self._start(course, self.method)
        parts = self.method.begin(course.task, None if start is None else start.parts)
        for one in courses:
            self.model.bank[one.name] = Entry(one.task, parts)
        learned = learn_task(
            self.model,
            self.method,
            course.task,
            rows,
            self.config.train,
            self.folder.checkpoints / course.name,
            pad_id=self.engine().pad_id,
            prefixes=self.prefixes,
            score=(lambda: self._validate(courses)) if any(one.validation for one in courses) else None,
            tell=lambda step, steps, figures: self.watcher.training(course.name, step, steps, figures),
            trackers=[make(self.folder, course.name) for make in self.trackers],
        )
        if courses[-1].name not in self.progress.details:  # else it was counted when the process was killed after this
            self.earlier += learned.earlier  # of the process that was killed while it learned this
        self.progress.seconds = self.earlier + time.monotonic() - self.started
        seconds = (learned.earlier + time.monotonic() - begun) / len(courses)
        for one in courses:
            self.progress.details[one.name] = details(learned) | {
                "seconds": seconds,
                "start": None if start is None else start.name,
            }
        self.folder.save_progress(vars(self.progress))  # before the commit, after which the task is not learned again
        finished = self.method.finish()
        records = [self._record(one.task, finished) for one in courses]
        training = {**self.method.export(), **self._learn_routes(courses)}
        self.store.commit([(record, finished.tensors) for record in records], training, finished.moved or None)
        self.model.bank.moving = self.method.moving()
        self.model.bank.take(self.store, [self.store.record(one.name) for one in courses])
        for one in courses:
            one.data, one.train = None, []
        shutil.rmtree(self.folder.checkpoints / course.name, ignore_errors=True)

    def _start(self, course: Course, method: Method) -> Start | None:
        """What a task not yet learned starts from, if not afresh."""
        old = {} if method is not self.method else {n: e for n, e in self.model.bank.items() if n != course.name}
        return self.starts.best(method, course, old)

    def _learn_routes(self, courses: Sequence[Course]) -> dict[str, dict[str, Tensor]]:
        """The router's statistics with these tasks added, as the store keeps them; nothing where there are none."""
        if self.config.router:
            geometry = self.model.geometry
            if self.statistics is None:
                self.statistics = Statistics.empty(geometry.hidden_size, geometry.num_layers)
            self.statistics.keep(self.store.manifest.tasks)
            base = self.store.manifest.base.sha256
            features = KeptFeatures(self.model, self.tokenizer, self.statistics.layer, base, self.watcher.note)
            for course in courses:
                reference = f"{course.name}@{self.store.manifest.next_version(course.name)}"
                self.statistics.learn(features, reference, *texts(course))
        return {} if self.statistics is None else {ROUTER: self.statistics.tensors()}

    def _record(self, task: Task, finished: Finished) -> TaskRecord:
        return TaskRecord(task=task, form=finished.form, settings={"seed": self.config.train.seed, **finished.settings})

    def engine(self, bank: Mapping[str, Entry] | None = None) -> Engine:
        return self._engine.over(self.model.bank if bank is None else bank)

    def _validate(self, courses: Sequence[Course]) -> float:
        """The mean score of the tasks under way, over those with a validation split."""
        found = [self._answers(one, one.validation, self.method) for one in courses]
        scores = [answers.score().score for answers in found if answers is not None]
        self.watcher.validated(courses[-1].name, score := sum(scores) / len(scores))
        return score

    # Evaluating

    def _evaluate_row(self, number: int) -> None:
        """Row `number` of R: every task that is asked for, after `number` tasks were learned."""
        wanted = [course for place, course in enumerate(self.courses) if asked_for(self.config, number, place)]
        if self.config.method.learns_together and 0 < number < len(self.courses):
            wanted = []  # nothing is learned yet
        row: dict[str, float | None] = {}
        for done, course in enumerate(wanted):
            self.watcher.evaluating(number, course.name, done, len(wanted))
            answers = self._answers(course, course.test, self.method)
            row[course.name] = None if answers is None else answers.score().score
            if course.name in self.model.bank:
                self.evidence.tested(number, course.name, answers)
            if number == len(self.courses):
                self.evidence.validated(course.name, self._answers(course, course.validation, self.method))
        names = [course.name for course in self.courses]
        self.progress.R.append([row.get(name) for name in names])
        self.watcher.row(number, names, self.progress.R[-1])

    def _look_ahead(self, newest: Course) -> None:
        """The cells of a task that came after the run had ended: before any task, and just before it is learned."""
        if self.config.evaluate == "seen" or newest.name in self.model.bank or self.config.method.learns_together:
            return
        for number, method in ((0, attach_method(self.model, self.config)), (len(self.courses) - 1, self.method)):
            if self.progress.R[number][-1] is None:
                answers = self._answers(newest, newest.test, method)
                self.progress.R[number][-1] = None if answers is None else answers.score().score

    def _answers(self, course: Course, split: Scored | None, method: Method) -> Answers | None:
        """A learned task with its own parts, another with those it would start from; None without rows."""
        if split is None:
            return None
        entry = self.model.bank.get(course.name)
        if entry is None:
            start = self._start(course, method)
            parts = method.preview(course.task) if start is None else start.parts
            if parts is None:
                return None
            entry = Entry(course.task, parts)
        return answer_task(self.engine({course.name: entry}), entry, *split)

    def _finish(self) -> Result:
        names = [course.name for course in self.courses]
        digests = {record.name: dict(record.parts) for record in self.store.tasks()}
        for name, sizes in self.store.bytes().items():
            self.progress.details[name] |= {"bytes": sizes.own, "shared_bytes": sizes.shared}
        result = Result(
            name=self.config.name or self.folder.path.name,
            method=self.config.method.name,
            seed=self.config.train.seed,
            tasks=names,
            R=self.progress.R,
            seconds=self.progress.seconds,
            data={
                name: {split: SplitInfo(**info) for split, info in self.progress.data[name].items()} for name in names
            },
            details=self.progress.details,
            items={name: Items(**self.progress.items[name]) for name in names if name in self.progress.items},
            environment=self.environment(),
            digests={name: digests[name] for name in names if name in digests},
            superseded=self.progress.superseded,
            resumed=self.progress.resumed,
        )
        self.store.write_card(result.markdown())
        self.folder.finish(result)
        return result


def remarks(data: TaskData, info: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What makes a task's scores mean less than they seem to: rows that splits share, rows that were cut."""
    shared = [(one, other, rows) for (one, other), rows in overlaps(data).items() if one != other]
    cut = [(name, split["cut"], split["rows"]) for name, split in info.items() if split["cut"]]
    return [
        *(f"{rows} rows of {other} are also in {one}" for one, other, rows in shared),
        *(f"{count} of {rows} {name} rows are cut to max_length" for name, count, rows in cut),
    ]


def texts(course: Course) -> Iterator[list[str]]:
    """What the router learns of a task: its training texts, and its validation texts."""
    assert course.data is not None
    for split in (course.data.train, course.data.validation):
        yield [text_alone(one, course.task) for one in split.examples] if split is not None else []


def asked_for(config: StreamConfig, number: int, place: int) -> bool:
    """Whether the cell of task `place` (from 0) after `number` tasks is asked for by `evaluate`."""
    ahead = {"seen": 0, "next": 1, "all": len(config.tasks)}[config.evaluate]
    return place < number + ahead or (number == 0 and config.evaluate == "next")


def details(learned: Learned) -> dict[str, Any]:
    return {
        "steps": learned.steps,
        "best_step": learned.best_step,
        "validation": learned.curve,
        "trained_parameters": learned.trained_parameters,
        **learned.figures,
    }
