"""What the command line does with a run that has learned: list, answer, score. Torch is imported where it is needed."""

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moecl._sizes import EXPERT_MEMORY
from moecl._yaml import TABLES
from moecl.config import AUTO
from moecl.errors import AssetError, BaseError, DataError, MoECLError, RunError, StoreError, TaskError
from moecl.review import REVIEW, TaskThresholds, Thresholds, decide, rounded
from moecl.run_folder import RunFolder, refuse_bench

if TYPE_CHECKING:
    from moecl.config import StreamConfig
    from moecl.course import Watcher
    from moecl.data.task import Split
    from moecl.engine import Engine, Prediction
    from moecl.evaluate import Answers
    from moecl.export import Parity
    from moecl.model import MoECL
    from moecl.results import Result
    from moecl.review_measure import Pair
    from moecl.routed import Routed
    from moecl.router import Router
    from moecl.routing import Routing
    from moecl.store import Store, TaskRecord

STEP = 64  # rows that are answered at once


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


def answers(
    run: Path,
    file: Path | None,
    task: str | None,
    device: str,
    expert_memory: str,
    thresholds: Path | None = None,
    max_tokens: int | None = None,
) -> Iterator[list[dict[str, Any]]]:
    """Labels and scores of the rows of a file or of standard input, in order, some rows at a time.

    With a thresholds file also the decisions. Raises RunError, TaskError and DataError before the base is loaded where
    it can.
    """
    store = open_store(run)
    if task == AUTO:
        yield from routed_answers(store, file, device, expert_memory, thresholds, max_tokens)
        return
    asked = task or only_task(store)
    record = store.record(asked)
    levels = (
        None
        if thresholds is None
        else Thresholds.load(thresholds).of(record.name, record.task.labels or (), record.parts, thresholds)
    )
    with lines_of(file) as lines:
        first = next(lines, None)
        if first is None:
            return
        from moecl.data.task import rows_from_lines
        from moecl.engine import Engine

        engine = Engine(load(store, device, expert_memory))
        rows = rows_from_lines(chain([first], lines), record.task, "stdin" if file is None else str(file))
        for chunk in chunks(rows, 1 if file is None and sys.stdin.isatty() else STEP):
            found = engine.predict(chunk, asked, max_tokens)
            yield [answer(one, record, row.label, levels) for one, row in zip(found, chunk, strict=True)]


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


def routed_answers(
    store: "Store",
    file: Path | None,
    device: str,
    expert_memory: str,
    thresholds: Path | None,
    max_tokens: int | None,
) -> Iterator[list[dict[str, Any]]]:
    """The same where nobody says which task: lines also have the task that answered, and what decided it."""
    records = {one.name: one for one in store.tasks()}
    levels = None if thresholds is None else levels_of(records.values(), thresholds)
    with lines_of(file) as lines:
        first = next(lines, None)
        if first is None:
            return
        from moecl.data.task import plain_rows
        from moecl.engine import Engine
        from moecl.routed import predict

        model = load(store, device, expert_memory)
        engine, router = Engine(model), router_of(model, store)
        rows = plain_rows(chain([first], lines), "stdin" if file is None else str(file))
        for chunk in chunks(rows, 1 if file is None and sys.stdin.isatty() else STEP):
            yield [
                routed_answer(one, records, true_label(row, engine, one.route.task), levels)
                for one, (_, row) in zip(predict(engine, router, chunk, max_tokens), chunk, strict=True)
            ]


def routed_answer(
    found: "Routed", records: Mapping[str, "TaskRecord"], true: str | None, levels: Mapping[str, TaskThresholds] | None
) -> dict[str, Any]:
    """A line of `moecl predict --task auto`; with thresholds what they do not decide is left to a human."""
    task = found.route.task
    if task is None or found.prediction is None:
        line: dict[str, Any] = {"label": None, "scores": {}, "task": None, "version": None}
    else:
        line = answer(found.prediction, records[task], true, (levels or {}).get(task))
    if levels is not None:
        line.setdefault("decision", REVIEW)
    shares, familiar = found.route.rounded()
    return {**line, "route": shares, "familiar": familiar}


def true_label(row: str | Mapping[str, Any], engine: "Engine", task: str | None) -> str | None:
    """A row's own label, where it is one of its task's."""
    if task is None or isinstance(row, str):
        return None
    from moecl.data.task import example

    return example(row, engine.bank[task].task).label


def router_of(model: "MoECL", store: "Store") -> "Router":
    """A store's router, which must know every task. Raises RunError."""
    from moecl.router import Router

    router = Router.load(model, store)
    known = () if router is None else router.tasks
    if router is None or len(known) < len(store.tasks()):
        missing = ", ".join(one.name for one in store.tasks() if one.name not in known) or "any task"
        raise RunError(
            f"--task auto: {store.path} has no router statistics of {missing}; make them with `moecl router RUN --fit`"
        )
    return router


def answer(
    found: "Prediction", record: "TaskRecord", true: str | None, levels: TaskThresholds | None
) -> dict[str, Any]:
    """A line of `moecl predict`: what answered is named as the server names it."""
    scores = {label: rounded(score) for label, score in found.scores.items()}
    line = {"label": found.label, "scores": scores, "task": record.name, "version": record.version}
    if levels is not None:
        line["decision"] = decide(levels, found.label, scores)
    return line if true is None else {**line, "true": true}


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


def rescorable(run: Path, moved: Iterable[str]) -> list[str]:
    """Of tasks that do not answer as they were tested those whose rows can be answered anew: no retired, no deleted."""
    named = {task.name for task in RunFolder(run).config().tasks if task.validation and task.test}
    records = [one for one in open_store(run).tasks() if one.name in moved and one.task.kind == "classification"]
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

    wanted = [(name, split) for name in names for split in ("validation", "test")]
    found = answered(run, wanted, device, EXPERT_MEMORY, watcher)
    rows = {key: of_rows(as_rows(answers), f"{' '.join(key)} row") for key, answers in found.items()}
    records = {record.name: record for record in open_store(run).tasks()}
    return {name: Pair(rows[name, "validation"], rows[name, "test"], records[name].parts) for name in names}


def answered(
    run: Path, wanted: Sequence[tuple[str, str]], device: str, expert_memory: int | str, watcher: "Watcher"
) -> "dict[tuple[str, str], Answers]":
    """What tasks answer now, by task and split of config.yaml; the rows are read before the base is loaded."""
    return answered_splits(run, splits_of(run, wanted), device, expert_memory, watcher)


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
        if 1 - parity.agreement > max_disagreement:
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


def only_task(store: "Store") -> str:
    names = [record.name for record in store.tasks()]
    if len(names) != 1:
        raise TaskError(f"--task: which one? the tasks are: {', '.join(names) or 'none yet'}")
    return names[0]


def chunks(rows: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Rows by the `size`; those before a faulty one still come, then its error."""
    chunk: list[Any] = []
    try:
        for row in rows:
            chunk.append(row)
            if len(chunk) == size:
                yield chunk
                chunk = []
    except MoECLError:
        if chunk:
            yield chunk
        raise
    if chunk:
        yield chunk


@contextmanager
def lines_of(file: Path | None) -> Iterator[Iterator[bytes]]:
    if file is None:
        yield iter(sys.stdin.buffer)
        return
    if file.suffix == ".gz":
        raise DataError(f"{file}: is packed; `gunzip -c {file} | moecl predict ...` answers its lines")
    if file.suffix in TABLES:
        raise DataError(f"{file}: a table, and lines are read; make it JSONL, a row a line, with the columns as keys")
    try:
        opened = file.open("rb")
    except OSError as error:
        raise DataError(f"{file}: {error.strerror}; give a file of JSONL rows or plain lines") from error
    with opened:
        yield iter(opened)
