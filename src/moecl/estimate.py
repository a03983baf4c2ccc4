"""What `moecl check` finds: the data of every task, and what learning the stream will cost, before any training.

Bytes of the base, of what is trained and of what is stored are counted, and so is what one training step keeps for its
backward pass; seconds, and what that step takes beyond it, are measured.
"""

import resource
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from moecl._sizes import EXPERT_MEMORY
from moecl.backbone import load_backbone
from moecl.bank import Entry
from moecl.config import StreamConfig, Task
from moecl.course import Course, Watcher
from moecl.data.check import describe
from moecl.data.derived import Derived
from moecl.data.encode import Encoded, collate, plan_batches
from moecl.data.task import TaskData, load_task_data
from moecl.data.tokens import MOST_BYTES as TOKEN_BYTES
from moecl.data.tokens import encode_split
from moecl.engine import Engine
from moecl.evaluate import evaluate_task, prompts
from moecl.methods.base import Method
from moecl.model import MoECL
from moecl.prefix import Prefixes
from moecl.router import MOST_ROWS, Features, Statistics
from moecl.session import asked_for, texts
from moecl.settled import attach, attach_method, check_heads, resolve, trackers
from moecl.start import BATCH, ROWS, Starts
from moecl.store import encode
from moecl.task_trainer import Learner

SCRATCH_TOKENS = 4096  # of the step that is timed, padding included
SCRATCH_ANSWERS = 32
SCRATCH_TEXTS = 8  # that are read as the router does
COPIES = 5  # of a trained number: itself, its gradient, AdamW's two moments and the best step's value


def survey(config: StreamConfig, watcher: Watcher) -> dict[str, Any]:
    """`tasks`: what `describe` says of each; `estimate`: what `estimate` does. Writes nothing but
    token ids to the cache. Raises as `train`.
    """
    data = [load_task_data(task) for task in config.tasks]  # faults in data show before the base is loaded
    config = resolve(config, watcher)
    train = config.train
    trackers(train.report_to, watcher)
    torch.set_num_threads(train.threads or torch.get_num_threads())
    process = taken_bytes(torch.device("cpu")) if train.device == "cpu" else 0
    backbone = load_backbone(config.base, train.precision, train.device, watcher.fetching)
    model, method = attach(backbone, config)
    engine = Engine(model, batch_tokens=train.eval_batch_tokens)
    tokens = Derived("tokens", TOKEN_BYTES, watcher.note)
    courses = [course(one, config, engine, tokens) for one in data]
    check_heads(config, [one.task for one in courses])
    for one in courses:
        model.check_fits(one.task)
    found = [
        describe(replace(one, task=of.task), engine.encoder(of.task)) for one, of in zip(data, courses, strict=True)
    ]
    return {"tasks": found, "estimate": estimate(model, method, config, courses, process)}


def course(data: TaskData, config: StreamConfig, engine: Engine, tokens: Derived) -> Course:
    settled = {
        "head": data.task.head or config.head,
        "max_length": data.task.max_length or config.train.max_length,
    }
    task = data.task.model_copy(update=settled)
    return Course(
        task,
        data,
        encode_split(engine.encoder(task), data.train, tokens),
        None if data.validation is None else (data.validation, prompts(engine, task, data.validation, tokens)),
        None if data.test is None else (data.test, prompts(engine, task, data.test, tokens)),
    )


def estimate(
    model: MoECL, method: Method, config: StreamConfig, courses: Sequence[Course], process: int = 0
) -> dict[str, Any]:
    """Seconds of training and of testing, bytes of memory at the peak by what takes them, bytes of disk a task.

    Uses up `method`. `process`: bytes that were taken before the base was loaded.
    """
    answering = [seconds_a_row(model, config, course) for course in courses]
    choosing = starts_seconds(model, method, config, courses)
    first = courses[0]
    model.bank[first.name] = Entry(first.task, method.begin(first.task))
    trained = sum(p.numel() for group in method.groups().values() for p in group)
    batch = scratch_batch(first.train, config, Engine(model).pad_id, model.device)
    prefix = prefix_savings(model, config, courses, answering)
    filling, spared = (0.0, 0.0) if prefix is None else (prefix["filling_seconds"], prefix["evaluation_seconds"])
    if prefix is not None:
        batch["prefix"] = torch.zeros(
            *batch["input_ids"].shape, model.geometry.hidden_size, dtype=model.base.dtype, device=model.device
        )
    if config.train.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    beside = routing_seconds(model, config, courses) + choosing
    step, kept = scratch_step(Learner(model, method, first.task), batch)
    finished = method.finish()
    stored = {part: len(encode(tensors)) for part, tensors in finished.tensors.items()}
    own = sum(size for part, size in stored.items() if part not in finished.moved)
    plans = [padded(course.train, config) for course in courses]
    tokens = batch["input_ids"].numel()
    largest = max(most for _, most in plans)
    memory = {
        "process": process,
        "base": sum(t.numel() * t.element_size() for t in [*model.base.parameters(), *model.base.buffers()]),
        "trained": 4 * COPIES * trained,
        "learned": min(own * (len(courses) - 1), EXPERT_MEMORY),
        "activations": kept * largest // tokens,
    }
    answers = sum(
        seconds * (rows_validated(config, one) + rows_tested(config, place, one))
        for place, (seconds, one) in enumerate(zip(answering, courses, strict=True))
    )
    return {
        "training_seconds": step / tokens * sum(total for total, _ in plans) + filling + beside,
        "evaluation_seconds": answers - spared,
        "memory_bytes": memory,
        "peak_bytes": sum(memory.values()),
        "task_bytes": own,
        "prefix": prefix,
        "how": f"from a scratch step of {tokens} tokens and a few answers on {config.train.device} in "
        f"{config.train.precision}, +-50 %",
    }


def routing_seconds(model: MoECL, config: StreamConfig, courses: Sequence[Course]) -> float:
    """What the router's reading of the rows takes, where nothing is in the cache."""
    if not config.router or model.tokenizer is None:
        return 0.0
    splits = [split for course in courses for split in texts(course) if split]
    some = [split[0] for split in splits][:SCRATCH_TEXTS]
    geometry = model.geometry
    layer = Statistics.empty(geometry.hidden_size, geometry.num_layers).layer
    features = Features(model, model.tokenizer, layer)
    features(some)  # the first time is slower
    started = time.perf_counter()
    features(some)
    return (time.perf_counter() - started) / len(some) * sum(min(len(split), MOST_ROWS) for split in splits)


def starts_seconds(model: MoECL, method: Method, config: StreamConfig, courses: Sequence[Course]) -> float:
    """Seconds in which tasks not yet learned are tried with what they may start from."""
    tried = [starts_tried(method, config, place, course) for place, course in enumerate(courses)]
    if not any(tried):
        return 0.0
    one, starts = next(course for course, count in zip(courses, tried, strict=True) if count), Starts(Engine(model))
    parts = method.preview(one.task)
    assert parts is not None
    starts.loss(one, parts)  # the first one sets things up
    begun = time.monotonic()
    starts.loss(one, parts)
    a_token = (time.monotonic() - begun) / tokens_tried(one)
    return sum(a_token * tokens_tried(course) * count for course, count in zip(courses, tried, strict=True))


def starts_tried(method: Method, config: StreamConfig, place: int, course: Course) -> int:
    """How often the first rows of task `place` (from 0) are tried: when it is learned, and for its cells of R before.

    The most that it may be: which old tasks will be near is not known yet.
    """
    asked = [number for number in range(1, place + 1) if course.test and asked_for(config, number, place)]
    rows = [*asked, place] if place else []
    return sum(method.tried(course.task, old, known) for known, old in zip([0, *rows], rows, strict=False))


def tokens_tried(course: Course) -> int:
    """Of the rows that are tried, padding included."""
    lengths = [len(row.input_ids) + len(row.answer_ids) for row in course.train[:ROWS]]
    batches = [lengths[first : first + BATCH] for first in range(0, len(lengths), BATCH)]
    return sum(len(batch) * max(batch) for batch in batches)


def prefix_savings(
    model: MoECL, config: StreamConfig, courses: Sequence[Course], answering: Sequence[float]
) -> dict[str, Any] | None:
    """What the frozen prefix's cache takes and spares; None where there is none. `answering`: seconds a row, by course.

    `share` of its layers that a forward is spared; `filling_seconds` of training, once for all runs with this base and
    these texts; `training_seconds` and `evaluation_seconds` that a run is spared then.
    """
    if not config.train.prefix_cache or not model.injected.takes_prefix():
        return None
    trained = [row.input_ids + row.answer_ids for course in courses for row in course.train]
    read, spared = [], 0.0
    share = model.injected.below / model.geometry.num_layers
    for place, (course, seconds) in enumerate(zip(courses, answering, strict=True)):
        if Engine(model).reads_once(course.task):
            for scored, times in (
                (course.validation, passes(config)),
                (course.test, cells_tested(config, place, course.task)),
            ):
                rows = scored[1] if scored else []
                read += [row.input_ids for row in rows if times]
                spared += share * seconds * len(rows) * max(times - 1, 0)
    filling = prefix_seconds(model, trained)
    return {
        "bytes": sum(map(len, {tuple(ids) for ids in trained + read}))
        * model.geometry.hidden_size
        * model.base.dtype.itemsize,
        "share": share,
        "filling_seconds": filling,
        "training_seconds": filling * (config.train.epochs - 1),
        "evaluation_seconds": spared,
    }


def prefix_seconds(model: MoECL, texts: Sequence[list[int]]) -> float:
    """Seconds that the prefix takes for all texts, each once."""
    few, prefixes = texts[:SCRATCH_ANSWERS], Prefixes(model, "", 0, lambda message: None)  # keeps nothing
    prefixes.batch(few[:1])  # the first one sets things up
    begun = time.monotonic()
    prefixes.batch(few)
    return (time.monotonic() - begun) / sum(map(len, few)) * sum(map(len, texts))


def passes(config: StreamConfig) -> int:
    """How often validation rows are answered: while their task is learned, and after the last task."""
    return config.train.epochs * config.train.evals_per_epoch + 1


def rows_validated(config: StreamConfig, course: Course) -> int:
    return passes(config) * len(course.validation[1]) if course.validation else 0


def rows_tested(config: StreamConfig, place: int, course: Course) -> int:
    """Test rows of task `place` over all rows of R."""
    return cells_tested(config, place, course.task) * len(course.test[1]) if course.test else 0


def cells_tested(config: StreamConfig, place: int, task: Task) -> int:
    """Rows of R in which a task is answered: with a head of its own not before it is learned."""
    last = len(config.tasks)
    rows = (0, last) if config.method.learns_together else range(last + 1)
    first = last if config.method.learns_together else place + 1
    return sum(asked_for(config, row, place) for row in rows if row >= first or task.head != "classifier")


def padded(rows: Sequence[Encoded], config: StreamConfig) -> tuple[int, int]:
    """(tokens of a task's whole training, of its largest batch), padding included."""
    lengths, plan = planned(rows, config)
    sizes = [len(batch) * max(lengths[place] for place in batch) for batch in plan]
    return sum(sizes), max(sizes)


def planned(rows: Sequence[Encoded], config: StreamConfig) -> tuple[list[int], list[list[int]]]:
    lengths = [len(row.input_ids) + len(row.answer_ids) for row in rows]
    train = config.train
    return lengths, plan_batches(lengths, train.batch_size, train.epochs, train.seed)


def scratch_batch(
    rows: Sequence[Encoded], config: StreamConfig, pad_id: int, device: torch.device
) -> dict[str, Tensor]:
    """The largest batch of a task's training, or as many of its rows as make SCRATCH_TOKENS."""
    lengths, plan = planned(rows, config)
    batch = max(plan, key=lambda batch: len(batch) * max(lengths[place] for place in batch))
    most = max(1, SCRATCH_TOKENS // max(lengths[place] for place in batch))
    return {name: tensor.to(device) for name, tensor in collate([rows[p] for p in batch[:most]], pad_id).items()}


def scratch_step(learner: Learner, batch: dict[str, Tensor]) -> tuple[float, int]:
    """Seconds of one training step, and the bytes it takes: at least what it keeps for its backward pass."""
    learner.train()
    owned = [*learner.parameters(), *learner.buffers(), *batch.values()]

    def forward() -> Tensor:
        loss: Tensor = learner(**batch)["loss"]
        return loss

    before = taken_bytes(learner.model.device)
    torch.autograd.backward(forward())  # the first one sets things up
    begun = time.monotonic()
    loss, kept = kept_bytes(forward, owned)
    torch.autograd.backward(loss)
    after = taken_bytes(learner.model.device)  # waits for the device
    seconds = time.monotonic() - begun
    learner.zero_grad(set_to_none=True)
    return seconds, max(kept, after - before)


class Kept:
    """A tensor that autograd keeps for a backward pass; detached, or an output would hold the node that holds it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach()


def kept_bytes(forward: Callable[[], Tensor], owned: Iterable[Tensor] = ()) -> tuple[Tensor, int]:
    """A loss, and the bytes of all storages that its graph holds, each once, but for those of `owned` tensors.

    Only what still lives when `forward` is done counts: memory that is freed and used again has its address twice.
    """
    living: WeakSet[Kept] = WeakSet()

    def keep(tensor: Tensor) -> Kept:
        kept = Kept(tensor)
        living.add(kept)
        return kept

    with saved_tensors_hooks(keep, lambda kept: kept.tensor):
        loss = forward()
    storages = {kept.tensor.untyped_storage().data_ptr(): kept.tensor.untyped_storage().nbytes() for kept in living}
    for tensor in owned:
        storages.pop(tensor.untyped_storage().data_ptr(), None)
    return loss, sum(storages.values())


def seconds_a_row(model: MoECL, config: StreamConfig, course: Course) -> float:
    """Seconds an answer takes, from a few rows of the test or validation split; 0 where there is neither."""
    scored = course.test or course.validation
    if scored is None:
        return 0.0
    split, rows = scored
    entry = Entry(course.task, attach_method(model, config).begin(course.task))
    engine = Engine(model, bank={course.name: entry}, batch_tokens=config.train.eval_batch_tokens)
    few = replace(split, examples=split.examples[:SCRATCH_ANSWERS])
    evaluate_task(engine, entry, replace(split, examples=split.examples[:1]), rows[:1])  # the first one sets things up
    begun = time.monotonic()
    evaluate_task(engine, entry, few, rows[:SCRATCH_ANSWERS])
    return (time.monotonic() - begun) / len(few.examples)


def taken_bytes(device: torch.device) -> int:
    """The most memory taken so far: of the device where it tells, else of this process."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device)
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
