"""How a bench chooses hyper-parameters: as many trials for each method, scored on validation rows alone."""

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

from moecl._yaml import show
from moecl.bench_config import BenchConfig, TuneConfig
from moecl.config import StreamConfig
from moecl.errors import ConfigError, RunError
from moecl.results import Result

MOST_DRAWN = 1000  # combinations looked at, of a grid that may be of any size


def trial_settings(
    config: BenchConfig, tune: TuneConfig, label: str, tried: Sequence[Mapping[str, Any]] = ()
) -> list[dict[str, Any]]:
    """What each trial of a method changes: nothing in the first, then combinations drawn from the grid of its search.

    What was `tried` before and is still in the grid comes first, in its order: a grid may grow.

    Raises:
        ConfigError: a value is wrong, or the grid has too few combinations that differ.
    """
    search = {**config.applicable(label, tune.search), **tune.methods.get(label, {})}
    plain = config.stream_of(label)
    for key, values in search.items():
        for value in values:
            config.stream_of(label, {key: value})  # refuses a wrong one before anything runs
    found: list[dict[str, Any]] = [{}]
    seen = [plain]
    again = (dict(changes) for changes in tried if all(value in search.get(key, ()) for key, value in changes.items()))
    for changes in chain(again, _drawn(search, tune.seed)):
        if len(found) == tune.trials:
            break
        if (stream := config.stream_of(label, changes)) not in seen:
            found.append(changes)
            seen.append(stream)
    if len(found) < tune.trials:
        raise ConfigError(
            f"tune.trials: {tune.trials}, but method {show(label)} has {len(found)} different settings to try, "
            "its plain ones included; lower it, or give more values under tune.search or tune.methods"
        )
    return found


def _drawn(search: Mapping[str, Sequence[Any]], seed: int) -> Iterator[dict[str, Any]]:
    """Combinations of the grid in an order that the seed decides: methods with one grid try the same."""
    total = math.prod(map(len, search.values()))
    for number in random.Random(seed).sample(range(total), min(total, MOST_DRAWN)):
        changes = {}
        for key, values in search.items():
            number, place = divmod(number, len(values))
            changes[key] = values[place]
        yield changes


def trial_stream(
    config: BenchConfig, tune: TuneConfig, label: str, changes: Mapping[str, Any], order: Sequence[str]
) -> StreamConfig:
    """What a trial, which learns the tasks of `order`, learns: they have no test rows, so that none can be read."""
    stream = config.stream_of(label, config.applicable(label, tune.set), changes)
    for task in stream.tasks:
        if task.validation is None and task.name in order:
            raise ConfigError(
                f"tune: task {show(task.name)} has no validation rows to choose by; give it some, or remove tune"
            )
    tasks = [task.model_copy(update={"test": None}) for task in stream.tasks]
    return stream.model_copy(update={"tasks": tasks, "evaluate": "seen"})


def validation_score(result: Result) -> float:
    """The mean over tasks of the score on validation rows after the last task.

    Raises:
        RunError: a task has none.
    """
    scores: dict[str, float] = {}
    for task in result.tasks:
        if (score := result.details.get(task, {}).get("validation_final")) is None:
            raise RunError(f"{result.name}: task {show(task)} has no validation_final in its details; run it again")
        scores[task] = score
    return math.fsum(scores.values()) / len(scores)


def chosen(trials: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The settings with the greatest score; of equal ones the first, which is the plain one where it is among them.

    >>> chosen([{"settings": {}, "score": 0.5}, {"settings": {"train.lr": 1e-2}, "score": None}])
    {}
    """
    scored = [trial for trial in trials if trial["score"] is not None]
    return dict(max(scored, key=lambda trial: trial["score"])["settings"])
