"""Answers without a task: the router finds each row's, the engine answers; and how much score that costs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moecl.config import Task
from moecl.data.task import Example, Split, text_alone, text_of_any
from moecl.discriminant import LEAST_TASKS
from moecl.engine import Engine, Prediction
from moecl.evaluate import Answers, answer_task, prompts
from moecl.metrics import ANSWER_METRICS
from moecl.request import readable
from moecl.router import Route, Router
from moecl.routing import Point, Routing, TaskRouting

POINTS = 20  # of the abstention curve
NOTHING = ""  # the answer of a row of no task, which no label equals


@dataclass(frozen=True)
class Routed:
    """A row's route, and its answer: None where it is for no task, or for one that cannot read it."""

    route: Route
    prediction: Prediction | None


def predict(
    engine: Engine,
    router: Router,
    rows: Sequence[tuple[str, str | Mapping[str, Any]]],
    max_new_tokens: int | None = None,
) -> list[Routed]:
    """rows: (where it is from, a text or a row's fields). Raises DataError for a row without any task's fields."""
    tasks = [engine.bank[name].task for name in router.tasks]
    routes = router.route([text_of_any(row, tasks, where) for where, row in rows])
    read: dict[int, tuple[str, Example]] = {}
    for place, (route, (where, row)) in enumerate(zip(routes, rows, strict=True)):
        if route.task and (found := readable(row, engine.bank[route.task].task, where)):
            read[place] = route.task, found
    answers = engine.predict([row for _, row in read.values()], [task for task, _ in read.values()], max_new_tokens)
    given = dict(zip(read, answers, strict=True))
    return [Routed(route, given.get(place)) for place, route in enumerate(routes)]


@dataclass(frozen=True)
class Seen:
    """A task's rows: the answers given under its name, those given by the likeliest task [rows], and the figures."""

    answers: Answers
    without: list[str]
    best: NDArray[np.intp]
    familiar: NDArray[np.float64]
    strange: NDArray[np.float64] | None

    def scores(self) -> NDArray[np.float64]:
        """[rows]: the score of each row's answer by the likeliest task."""
        task, pairs = self.answers.task, zip(self.answers.true, self.without, strict=True)
        if task.kind == "classification":
            return np.array([true == given for true, given in pairs], np.float64)
        return np.array([ANSWER_METRICS[task.metric]([true], [given]) or 0.0 for true, given in pairs])


def measure(
    engine: Engine, router: Router, splits: Mapping[str, Split], name: str, digests: Mapping[str, Any]
) -> Routing:
    """Every task's split, with and without its name; `name` is the split's. The router must know the tasks."""
    seen = {task: see(engine, router, task, split) for task, split in splits.items()}
    return Routing(
        split=name,
        wanted=router.statistics.false_accept,
        threshold=router.calibration.threshold,
        tasks=[summed(router, task, one) for task, one in seen.items()],
        curve=curve(list(seen.values())),
        digests={task: dict(digests[task]) for task in seen},
    )


def see(engine: Engine, router: Router, name: str, split: Split) -> Seen:
    entry = engine.bank[name]
    answers = answer_task(engine, entry, split, prompts(engine, entry.task, split))
    features = router.features([text_alone(one, entry.task) for one in split.examples])
    shares, familiar = router.see(features)
    best = shares.argmax(axis=1)
    elsewhere = {place: router.tasks[task] for place, task in enumerate(best) if router.tasks[task] != name}
    without = list(answers.labels)
    for place, given in answered(engine, split.examples, elsewhere).items():
        without[place] = given
    strange = router.familiar_without(name, features) if len(router.tasks) >= LEAST_TASKS else None
    return Seen(answers, without, best, familiar, strange)


def answered(engine: Engine, examples: Sequence[Example], elsewhere: Mapping[int, str]) -> dict[int, str]:
    """What other tasks answer to rows of a task; nothing where they cannot read them."""
    read = {place: as_read(examples[place], engine.bank[task].task) for place, task in elsewhere.items()}
    rows = {place: row for place, row in read.items() if row is not None}
    given = engine.predict(list(rows.values()), [elsewhere[place] for place in rows])
    return dict.fromkeys(elsewhere, NOTHING) | {place: one.label for place, one in zip(rows, given, strict=True)}


def as_read(row: Example, task: Task) -> Example | None:
    fields: dict[str, Any] = {"messages": list(row.messages)} if row.messages is not None else row.fields
    return readable(fields, task, row.where)


def summed(router: Router, name: str, seen: Seen) -> TaskRouting:
    accepted = router.accepts(seen.familiar)
    task, true = seen.answers.task, seen.answers.true
    given = [one if known else NOTHING for one, known in zip(seen.without, accepted, strict=True)]
    own = accepted & (seen.best == router.tasks.index(name))
    return TaskRouting(
        task=name,
        metric=task.metric,
        rows=len(true),
        with_task=seen.answers.score().score,
        without_task=ANSWER_METRICS[task.metric](true, given) or 0.0,
        routed=float(own.mean()),
        unknown=float(1 - accepted.mean()),
        left_out=None if seen.strange is None else float(router.accepts(seen.strange).mean()),
    )


def curve(seen: Sequence[Seen]) -> list[Point]:
    """From every row accepted to a twentieth, over tasks that count alike."""
    levels = np.quantile(np.concatenate([one.familiar for one in seen]), np.arange(POINTS) / POINTS)
    return [point(seen, float(least)) for least in dict.fromkeys(levels.tolist())]


def point(seen: Sequence[Seen], least: float) -> Point:
    coverage = [float((one.familiar >= least).mean()) for one in seen]
    right = [float((one.scores() * (one.familiar >= least)).mean()) for one in seen]
    strange = [float((one.strange >= least).mean()) for one in seen if one.strange is not None]
    return Point(
        threshold=least,
        coverage=float(np.mean(coverage)),
        score=sum(right) / sum(coverage) if sum(coverage) else None,
        false_accept=float(np.mean(strange)) if strange else None,
    )
