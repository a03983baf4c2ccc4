"""The rows that a run's config.yaml names, answered anew by the versions that answer now."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moecl._sizes import EXPERT_MEMORY
from moecl.errors import RunError
from moecl.run_folder import RunFolder
from moecl.using import load, open_store, router_of, split_of

if TYPE_CHECKING:
    from moecl.config import StreamConfig
    from moecl.course import Watcher
    from moecl.data.task import Split
    from moecl.engine import Engine
    from moecl.evaluate import Answers
    from moecl.results import Result
    from moecl.review_measure import Pair
    from moecl.routing import Routing
    from moecl.store import Store


def scores(
    run: Path, names: Sequence[str], split: str, device: str, expert_memory: str, watcher: "Watcher"
) -> list[dict[str, Any]]:
    """The score of each named task on the split that the run's config.yaml names, or of all that have one.

    Raises RunError where there is no task, DataError where none has such rows.
    """
    store, config = open_store(run), RunFolder(run).config()
    asked = names or with_rows(run, store, config, split, watcher)
    splits = {(name, split): split_of(config, store.record(name), split, run) for name in asked}
    result = RunFolder(run).last_result()
    for (name, _), rows in splits.items():
        before = result.data.get(name, {}).get(split) if result is not None else None
        if before is not None and before.sha256 != rows.sha256:
            watcher.note(f"{name}: its {split} rows are other ones than the run's")
    found = answered_splits(run, splits, device, expert_memory, watcher)
    return [{"task": name, **vars(answers.score())} for (name, _), answers in found.items()]


def with_rows(run: Path, store: "Store", config: "StreamConfig", split: str, watcher: "Watcher") -> list[str]:
    """The tasks that config.yaml has such rows for; all where none has, so that one is complained of."""
    names = [record.name for record in store.tasks()]
    if not names:
        raise RunError(f"{run}: no task is learned yet; go on with the command that started it")
    known = {task.name for task in config.tasks if getattr(task, split)}
    if not known.intersection(names):
        return names
    for name in names:
        if name not in known:
            watcher.note(f"{name}: no {split} rows in {run / 'config.yaml'}, so no score")
    return [name for name in names if name in known]


def rescorable(run: Path, moved: Iterable[str], splits: Sequence[str], kinds: Collection[str]) -> list[str]:
    """Of tasks that do not answer as they were tested those whose rows can be answered anew: no retired, no deleted.

    Theirs are the `kinds`, and config.yaml names all `splits` of them.
    """
    if not (run / "store").is_dir():
        return []
    named = {task.name for task in RunFolder(run).config().tasks if all(getattr(task, split) for split in splits)}
    records = [one for one in open_store(run).tasks() if one.name in moved and one.task.kind in kinds]
    return [one.name for one in records if one.name in named]


def retested(run: Path, result: "Result", names: Iterable[str], device: str, watcher: "Watcher") -> "Result":
    """A run's result with the last row of R, and what is behind it, as the current versions of `names` answer."""
    from moecl.evidence import items
    from moecl.results import SplitInfo

    splits = splits_of(run, [(name, "test") for name in names])
    found = answered_splits(run, splits, device, EXPERT_MEMORY, watcher)
    last, behind, data = [*result.R[-1]], dict(result.items), dict(result.data)
    for (name, _), answers in found.items():
        split = splits[name, "test"]
        last[result.tasks.index(name)], behind[name] = answers.score().score, items(answers)
        data[name] = {**data.get(name, {}), "test": SplitInfo(sha256=split.sha256, rows=len(split.examples))}
    return result.model_copy(update={"R": [*result.R[:-1], last], "items": behind, "data": data})


def rescored(run: Path, names: Sequence[str], device: str, watcher: "Watcher") -> "dict[str, Pair]":
    """Validation and test rows of classification tasks, as the current versions answer them."""
    from moecl.evidence import as_rows
    from moecl.review_measure import Pair
    from moecl.review_rows import of_rows

    splits = splits_of(run, [(name, split) for name in names for split in ("validation", "test")])
    found = answered_splits(run, splits, device, EXPERT_MEMORY, watcher)
    rows = {key: of_rows(as_rows(answers), f"{' '.join(key)} row") for key, answers in found.items()}
    parts = {record.name: record.parts for record in open_store(run).tasks()}
    return {
        name: Pair(rows[name, "validation"], rows[name, "test"], parts[name], splits[name, "test"].sha256)
        for name in names
    }


def splits_of(run: Path, wanted: Sequence[tuple[str, str]]) -> "dict[tuple[str, str], Split]":
    store, config = open_store(run), RunFolder(run).config()
    return {(name, split): split_of(config, store.record(name), split, run) for name, split in wanted}


def answered_splits(
    run: Path,
    splits: "Mapping[tuple[str, str], Split]",
    device: str,
    expert_memory: int | str,
    watcher: "Watcher",
) -> "dict[tuple[str, str], Answers]":
    from moecl.evaluate import answer_task, prompts

    engine = as_tested(open_store(run), RunFolder(run).config(), device, expert_memory)
    found = {}
    for done, ((name, split), rows) in enumerate(splits.items()):
        watcher.evaluating(len(splits), name, done, len(splits))
        entry = engine.bank[name]
        found[name, split] = answer_task(engine, entry, rows, prompts(engine, entry.task, rows))
    return found


def as_tested(store: "Store", config: "StreamConfig", device: str, expert_memory: int | str) -> "Engine":
    """An engine with the batches and the cache of lower layers that R was measured with: bf16 rounds with them."""
    from moecl.engine import Engine
    from moecl.prefix import prefixes

    model, train = load(store, device, expert_memory), config.train
    known = prefixes(model, store.manifest.base.sha256, train.prefix_cache)
    return Engine(model, batch_tokens=train.eval_batch_tokens, prefixes=known)


def routing(run: Path, split: str, device: str, expert_memory: str) -> "Routing":
    """Every task's split with and without its name; that of the test split is kept for the report."""
    from moecl.routed import measure

    store, config = open_store(run), RunFolder(run).config()
    splits = {record.name: split_of(config, record, split, run) for record in store.tasks()}
    engine = as_tested(store, config, device, expert_memory)
    digests = {record.name: record.parts for record in store.tasks()}
    found = measure(engine, router_of(engine.model, store), splits, split, digests)
    if split == "test":
        found.save(run)
    return found
