"""Methods x orders x seeds: each cell a run folder of its own, so that it resumes, and is never run twice."""

import re
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moecl._atomic import lock_file, one_line
from moecl.bench_cells import Ended, Pool, Work, read_news
from moecl.bench_config import BenchConfig, portable, slug
from moecl.bench_record import (
    SCHEMA,
    Cell,
    Job,
    Trial,
    changes_under,
    filled,
    protocol,
    read_record,
    refuse,
    write_record,
)
from moecl.bench_tune import chosen, trial_settings, trial_stream, validation_score
from moecl.config import StreamConfig
from moecl.errors import ConfigError, RunError, near
from moecl.run_folder import LOCK, RESULT, RunFolder, differences

TICK = 0.25  # seconds between two looks at what runs


class BenchWatcher:
    """Told what happens; draws nothing. The command line has ones that do."""

    def happened(self, bench: "Bench", job: Job) -> None: ...

    def tick(self, bench: "Bench") -> None: ...


@dataclass(frozen=True)
class Selection:
    """The part of a bench that is to be run; empty: all of it."""

    only: str | None = None
    methods: Sequence[str] = ()
    orders: Sequence[str] = ()
    seeds: Sequence[int] = ()

    def takes(self, cell: Cell) -> bool:
        given = ((self.methods, cell.label), (self.orders, cell.order), (self.seeds, cell.seed))
        return all(not some or one in some for some, one in given) and bool(re.search(self.only or "", cell.id))

    def check(self, config: BenchConfig) -> None:
        """Refuse names that the bench file does not have."""
        for flag, given, known in (
            ("--methods", self.methods, [*config.methods]),
            ("--orders", self.orders, [*config.orders]),
            ("--seeds", [str(seed) for seed in self.seeds], [str(seed) for seed in config.seeds]),
        ):
            for name in given:
                if name not in known:
                    raise ConfigError(f"{flag}: {name!r} is none of {', '.join(known)}{near(name, known)}")
        try:
            re.compile(self.only or "")
        except re.error as error:
            raise ConfigError(f"--only: {self.only!r} is no regular expression ({error}); correct it") from None


@dataclass
class Bench:
    """A bench and how far it is. `threads` are a cell's, where the files leave them open; kept from the first start.

    Raises ConfigError for wrong settings, RunError where `out` was started with others.
    """

    config: BenchConfig
    out: Path
    selection: Selection = field(default_factory=Selection)
    threads: int = 1
    slots: int = 1

    def __post_init__(self) -> None:
        if RunFolder(self.out).exists():
            raise RunError(f"{self.out}: a run folder; give the bench another with -o")
        self.selection.check(self.config)
        self.record = read_record(self.out)
        self.threads = self.record.get("threads", self.threads)
        self.tuned: dict[str, dict[str, Any] | None] = {}
        self.parameters: dict[str, Any] = {}
        self.cells = [
            Cell(id, label, self.out / "cells" / id, order=order, seed=seed)
            for label in self.config.methods
            for order in self.config.orders
            for seed in self.config.seeds
            for id in [f"{slug(label)}.{slug(order)}.s{seed}"]
        ]
        self.wanted = [cell for cell in self.cells if self.selection.takes(cell)]
        if not self.wanted:
            raise ConfigError("no cell of the bench is asked for; --dry-run without --only lists them all")
        self.trials = {label: self._trials_of(label) for label in self.config.methods}
        for label in self.config.methods:
            self._check_tune(label)
            self.config.stream_of(label)  # refuses what is wrong in any, before anything runs
            self._settle_trials(label)
        self._recall_failures()

    # The plan

    def _trials_of(self, label: str) -> list[Trial]:
        if (tune := self.config.tune) is None:
            return []
        order = next(iter(self.config.orders.values()))
        found = []
        tried = (self._recorded(label).get("tune") or {}).get("trials", [])
        for number, settings in enumerate(trial_settings(self.config, tune, label, tried), 1):
            id = f"{slug(label)}.trial{number}"
            stream = trial_stream(self.config, tune, label, settings, order)
            folder = self.out / "trials" / slug(label) / str(number)
            found.append(Trial(id, label, folder, self._settled(stream, tune.seed, order, id), settings=settings))
        return found

    def _settled(self, stream: StreamConfig, seed: int, order: Sequence[str], name: str | None = None) -> StreamConfig:
        """A stream with its tasks in order, its seed and its threads."""
        tasks = {task.name: task for task in stream.tasks}
        train = stream.train.model_copy(update={"seed": seed, "threads": stream.train.threads or self.threads})
        return stream.model_copy(update={"name": name, "train": train, "tasks": [tasks[one] for one in order]})

    def _check_tune(self, label: str) -> None:
        """Once a trial or a cell is there, what was tried before must be tried now too; more may be."""
        jobs = [job for job in (*self.trials[label], *self.cells) if job.label == label and job.started()]
        if jobs and self._recorded(label) and (changes := self._retuned(label)):
            raise refuse(self.out, changes, jobs)

    def _retuned(self, label: str) -> list[str]:
        """How the trials of now differ from those recorded; more of them are no difference."""
        known, now = self._recorded(label).get("tune"), self._tune(label)
        if known and now:
            now["trials"] = now["trials"][: len(known["trials"])]
        return differences(known, now, f"tune of {label}")

    def _recorded(self, label: str) -> dict[str, Any]:
        """What bench.json said of a method when this bench was opened."""
        found: dict[str, Any] = self.record.get("methods", {}).get(label, {})
        return found

    def _begun(self, label: str) -> bool:
        return any(cell.started() for cell in self.cells if cell.label == label)

    def _all_trials(self) -> Iterator[Trial]:
        return (trial for trials in self.trials.values() for trial in trials)

    def _tune(self, label: str) -> dict[str, Any] | None:
        """All that a method's choice depends on, beside its plain settings."""
        if (tune := self.config.tune) is None:
            return None
        tried = [dict(trial.settings or {}) for trial in self.trials[label]]
        order = next(iter(self.config.orders.values()))
        return {"seed": tune.seed, "order": order, "set": self.config.applicable(label, tune.set), "trials": tried}

    def _recall_failures(self) -> None:
        """What failed last time is shown so until it is tried again."""
        for known in self.record.get("cells", []):
            for cell in self.cells:
                if (cell.id, cell.status) == (known["id"], "waiting") and known["status"] == "failed":
                    cell.fail(known["reason"])

    # Choosing hyper-parameters

    def _settle_trials(self, label: str) -> None:
        """Choose a method's settings as soon as all its trials are over, and take up its cells."""
        if label in self.tuned:
            return
        known = self._known_choice(label)
        if self.config.tune is None or known:
            self.tuned[label] = known
            self._adopt(label)
            return
        for trial in self.trials[label]:
            if trial.status == "waiting" and trial.started():
                self._take_up(trial)
            if trial.status == "done" and trial.score is None:
                self._score(trial)
        # A loss that is not finite is these settings' fault, and a trial all the same; another failure is not.
        if all(trial.status == "done" or trial.kind == "TrainingError" for trial in self.trials[label]):
            found = [{"settings": one.settings, "score": one.score, "reason": one.reason} for one in self.trials[label]]
            if any(trial["score"] is not None for trial in found):
                self._choose(label, {"trials": found, "chosen": chosen(found)})

    def _choose(self, label: str, choice: dict[str, Any]) -> None:
        """Take a choice; not where cells were run with another, of a smaller grid. Raises RunError then."""
        self.tuned[label] = choice
        try:
            self._adopt(label)
        except RunError:
            del self.tuned[label]
            raise

    def _known_choice(self, label: str) -> dict[str, Any] | None:
        """The choice of an earlier start, unless its grid, or (before a cell was run) a plain setting is another."""
        method = self._recorded(label)
        if self.config.tune is None or (known := method.get("tuned")) is None:
            return None
        if len(known["trials"]) < len(self.trials[label]) or self._retuned(label):
            return None
        now = self._described(label, self.config.stream_of(label, known["chosen"]))
        return dict(known) if self._begun(label) or filled(method["stream"]) == now else None

    def _take_up(self, trial: Trial) -> None:
        assert trial.stream is not None
        if RunFolder(trial.folder).exists():
            RunFolder(trial.folder).check_same(trial.stream)
        trial.look()

    def _score(self, trial: Trial) -> None:
        assert trial.result is not None
        try:
            trial.score = validation_score(trial.result)
        except RunError as error:
            trial.fail(str(error))

    def _adopt(self, label: str) -> None:
        """Give a method's cells their streams, and take up those that are done."""
        plain = self._stream(label)
        now = self._described(label, plain)
        for cell in (cell for cell in self.cells if cell.label == label):
            tasks = self.config.orders[cell.order]
            cell.stream = self._settled(plain, cell.seed, tasks, cell.id)
            if not cell.started():
                continue
            if changes := changes_under(cell, self.record, now, tasks):
                raise refuse(self.out, changes, [one for one in self.cells if one.label == label and one.started()])
            cell.look()
            self._take_in(cell)

    def _stream(self, label: str) -> StreamConfig:
        """A method's stream with the settings that were chosen; its own ones before."""
        return self.config.stream_of(label, (self.tuned.get(label) or {}).get("chosen", {}))

    def _described(self, label: str, stream: StreamConfig) -> dict[str, Any]:
        """What all cells of a method have in common, in no words of this machine."""
        names = [task.name for task in stream.tasks]
        return portable(self._settled(stream, 0, names), Path(self.config.stream).parent)

    # Running

    def run(self, pool: Pool, watcher: BenchWatcher) -> None:
        """Run what is left; started again, go on. BusyError where another bench works in the folder."""
        for folder in (self.out / "logs", self.out / "news"):
            with one_line(folder):
                folder.mkdir(parents=True, exist_ok=True)
        for job in self.jobs():
            if job.status == "failed" and job.result is None and not self._is_spoilt(job):
                job.status = "waiting"
        with lock_file(self.out / LOCK), self._tidied(pool):
            for job in (*self._all_trials(), *self.cells):
                self._discard(job)
            self.save()
            while self._fill(pool, watcher):
                for ended in pool.ended(TICK):
                    watcher.happened(self, self._end(ended))
                watcher.tick(self)

    def _is_spoilt(self, job: Job) -> bool:
        """Whether trying again is of no use: its result is there and cannot be read."""
        return (job.folder / RESULT).is_file()

    @contextmanager
    def _tidied(self, pool: Pool) -> Iterator[None]:
        """Whatever happens, no worker is left behind and bench.json says how far all is."""
        try:
            yield
        finally:
            pool.stop()
            for job in self.jobs():
                if job.status == "running":
                    job.status = "waiting"
            self.save()
            shutil.rmtree(self.out / "news", ignore_errors=True)

    def jobs(self) -> list[Job]:
        """What is asked for: the trials that its methods still need, then the cells."""
        labels = {cell.label for cell in self.wanted}
        trials = [trial for trial in self._all_trials() if trial.label in labels and not self._is_chosen(trial)]
        return [*trials, *self.wanted]

    def _is_chosen(self, trial: Trial) -> bool:
        return trial.label in self.tuned and trial.result is None

    def running(self) -> list[Job]:
        return [job for job in self.jobs() if job.status == "running"]

    def _fill(self, pool: Pool, watcher: BenchWatcher) -> bool:
        """Start what there is room for; whether anything runs."""
        ready = [job for job in self.jobs() if job.status == "waiting" and job.stream is not None]
        for job in ready[: max(0, pool.slots - len(self.running()))]:
            job.status, job.reason, job.begun = "running", None, time.monotonic()
            pool.start(job.id, self._work(job))
            self.save()
            watcher.happened(self, job)
        return bool(self.running())

    def _work(self, job: Job) -> Work:
        assert job.stream is not None
        news, log = self.out / "news" / f"{job.id}.json", self.out / "logs" / f"{job.id}.log"
        news.unlink(missing_ok=True)
        threads = job.stream.train.threads or self.threads
        return Work(job.stream.model_dump(mode="json"), str(job.folder), str(news), str(log), threads)

    def _end(self, ended: Ended) -> Job:
        job = next(job for job in self.jobs() if job.id == ended.id)
        if ended.reason is not None:
            job.fail(ended.reason, ended.kind)
        else:
            job.status = "waiting"
            job.look()
            if job.result is None and job.status == "waiting":
                job.fail("it ended, but left no result.json; is the folder on storage that all workers see?")
        if isinstance(job, Cell):
            self._take_in(job)
        self._discard(job)
        if isinstance(job, Trial):
            self._go_on_with(job)
        self.save()
        return job

    def _go_on_with(self, trial: Trial) -> None:
        """Let a method's cells run, or say why they cannot."""
        cells = [cell for cell in self.cells if cell.label == trial.label]
        try:
            self._settle_trials(trial.label)
        except RunError as error:
            for cell in cells:
                cell.fail(str(error))
        if trial.label not in self.tuned and trial.status == "failed":
            for cell in cells:
                cell.reason = f"its settings are not chosen: {trial.id} failed"

    def _take_in(self, cell: Cell) -> None:
        """Check a finished cell's rows, and note what it trained."""
        if cell.result is not None:
            self._check_rows(cell)
        if cell.result is not None:
            trained = {task: found.get("trained_parameters") for task, found in cell.result.details.items()}
            self.parameters.setdefault(cell.label, trained)

    def _discard(self, job: Job) -> None:
        """Remove a finished job's weights, where none are wanted."""
        if job.result is not None and self.config.keep == "result":
            for name in ("store", "checkpoints"):
                shutil.rmtree(job.folder / name, ignore_errors=True)

    def _check_rows(self, cell: Cell) -> None:
        """Cells are compared row by row, so all are tested on the same rows; and a method's are trained on the same.

        Of two that differ the one that was done before stays.
        """
        known = {one["id"] for one in self.record.get("cells", []) if one["status"] == "done"}
        for other in self.cells:
            if other is cell or other.result is None or cell.result is None:
                continue
            for task, splits in cell.result.data.items():
                theirs = other.result.data.get(task, {})
                same = {"test"} if other.label != cell.label else theirs.keys()
                changed = [
                    name
                    for name in splits
                    if name in same & theirs.keys() and splits[name].sha256 != theirs[name].sha256
                ]
                if changed:
                    wrong, right = (other, cell) if cell.id in known and other.id not in known else (cell, other)
                    wrong.result = None
                    wrong.fail(
                        f"its {changed[0]} rows of task {task!r} are not those of {right.id}; restore them, and remove "
                        f"{wrong.folder}, so that it is run again"
                    )
                    break

    # What is told

    def news(self, job: Job) -> dict[str, Any]:
        """How far a running job is: `doing`, `step`, `steps`; nothing where it has not told yet."""
        return read_news(self.out / "news" / f"{job.id}.json")

    def failed(self) -> list[Job]:
        return [job for job in self.jobs() if job.status == "failed"]

    def seconds_left(self) -> float | None:
        """From what finished jobs took; None before the first."""
        total = 0.0
        for job in self.jobs():
            if job.status in ("waiting", "running"):
                if (expected := self._expected(job)) is None:
                    return None
                total += max(0.0, expected - (time.monotonic() - job.begun if job.status == "running" else 0.0))
        return total / self.slots

    def _expected(self, job: Job) -> float | None:
        """The mean of what is done: of the same sort and method, else of the same sort."""
        done = [
            (one.label == job.label, one.result.seconds)
            for one in (*self._all_trials(), *self.cells)
            if type(one) is type(job) and one.result is not None
        ]
        same = [seconds for own, seconds in done if own] or [seconds for _, seconds in done]
        return sum(same) / len(same) if same else None

    def save(self) -> None:
        write_record(self.out, self.as_record())

    def as_record(self) -> dict[str, Any]:
        """bench.json."""
        methods = {label: self._method_record(label) for label in self.config.methods}
        streams = {label: method["stream"] for label, method in methods.items()}
        base = next(iter(streams.values()))["base"]
        return {
            "schema": SCHEMA,
            "name": self.config.name,
            "base": Path(base).name if base.startswith(".") else base,
            "orders": self.config.orders,
            "seeds": self.config.seeds,
            "threads": self.threads,
            "methods": methods,
            "protocol": protocol(streams, self.cells),
            "cells": [
                {
                    "id": cell.id,
                    "method": cell.label,
                    "order": cell.order,
                    "seed": cell.seed,
                    "status": self._status(cell),
                    "reason": cell.reason,
                }
                for cell in self.cells
            ],
        }

    def _status(self, cell: Cell) -> str:
        """A finished cell stays so while more trials of its method are run."""
        known = cell.label not in self.tuned and (cell.folder / RESULT).is_file()
        return "done" if known and cell.status == "waiting" else cell.status

    def _method_record(self, label: str) -> dict[str, Any]:
        if label not in self.tuned and self._begun(label) and (before := self._recorded(label)):
            return before  # until the new trials of a grown grid are over: its cells are of the smaller one's choice
        stream = self._described(label, self._stream(label))
        return {
            "method": self.config.method(label),
            "settings": {key: value for key, value in stream["method"].items() if key != "name"},
            "tune": self._tune(label),
            "tuned": self.tuned.get(label),
            "trained_parameters": self.parameters.get(label),
            "stream": stream,
        }
