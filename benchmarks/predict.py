"""Answering rows of many tasks in one batch, each row by a random task among 1, 10, 100 ... of them.

Sides: moecl's mixed batch; the base's forward on the same padded batches; PEFT's LoRA with adapter_names=, one adapter
of the same rank a task, which is half of what moecl runs; moecl one task at a time. Rows are tokenised beforehand,
every side forms the logits of the last position alone.
"""

import argparse
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from measure import Report, Side, add_base, add_precision, alternate, counts, over, parser, positive, run, say, start
from moecl import Engine, MoECL, MoECLConfig, Store
from moecl.backbone import Backbone, load_backbone, resolve_precision
from moecl.data.encode import Encoded, collate, token_batches
from moecl.engine import MAX_ROWS, Prediction, Request
from moecl.errors import BaseError
from moecl.nn.forms import to_tensors
from moecl.nn.lora import Expert, Gate
from moecl.nn.moe_ffn import Nested
from moecl.request import last_only
from moecl.store import TaskRecord
from sides import LABELS, AnswersOnly, labelled, peft_lora, stir, stir_parts, twin

TARGETS = {
    "one_task_vs_base": {">=": 0.85},
    "hundred_tasks_vs_base": {">=": 0.75},
    "hundred_tasks_vs_peft": {">=": 2.0},
}
WORDS = {1: "one_task", 10: "ten_tasks", 100: "hundred_tasks", 1000: "thousand_tasks"}
SHORTEST, LONGEST = 30, 60  # tokens of a row
AT_ONCE = 50  # tasks in memory while the store is written
MOST_ADAPTERS = 100  # PEFT keeps them all in memory

Batch = tuple[list[int], dict[str, Tensor]]  # places of its rows, and their padded inputs


def name_of(number: int) -> str:
    return f"task{number}"


def write_store(model: MoECL, folder: Path, tasks: int) -> Store:
    """A store of `tasks` tasks with two random experts each, as retention `exact` leaves them."""
    store = Store.create(folder, model.base_info())
    settings = {"scale": model.config.lora_alpha / model.config.rank, **model.config.model_dump(exclude={"name"})}

    def record(n: int) -> TaskRecord:
        return TaskRecord(task=labelled(name_of(n)), form=Nested.form, settings=settings)

    for begin in range(0, tasks, AT_ONCE):
        numbers = range(begin, min(begin + AT_ONCE, tasks))
        store.commit([(record(n), drawn(model, n)) for n in numbers])
    return store


def drawn(model: MoECL, seed: int) -> dict[str, dict[str, Tensor]]:
    """A task's stored tensors, small and random."""
    config, geometry = model.config, model.geometry
    shared, task = Expert(geometry, config.rank), Expert(geometry, config.rank)
    parts = Nested(shared, task, Gate(geometry), config.lora_alpha / config.rank)
    stir_parts(parts, seed)
    return to_tensors(parts)


def make_rows(vocab_size: int, count: int) -> list[Encoded]:
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(SHORTEST, LONGEST + 1, (count,), generator=draw).tolist()
    ids = [torch.randint(3, vocab_size, (length,), generator=draw).tolist() for length in lengths]
    return [Encoded(row, [], -1, cut=False) for row in ids]


def choose_tasks(rows: int, tasks: int) -> list[str]:
    chosen = torch.randint(0, tasks, (rows,), generator=torch.Generator().manual_seed(tasks))
    return [name_of(number) for number in chosen.tolist()]


def requests(engine: Engine, rows: Sequence[Encoded], names: Sequence[str]) -> list[Request]:
    entries = [engine.bank[name] for name in names]
    return [Request(entry, engine.encoder(entry.task), row) for entry, row in zip(entries, rows, strict=True)]


def check_labels(engine: Engine) -> None:
    """A label of several tokens would be read in more than one forward."""
    encoder = engine.encoder(labelled(name_of(0)))
    if any(len(tokens) > 1 for tokens in encoder.answers):
        raise BaseError(f"--base: {' or '.join(LABELS)} takes several of its tokens; measure another base")


def batches(engine: Engine, rows: Sequence[Encoded]) -> list[Batch]:
    """The batches that the engine forms of these rows, when all are answered by a word."""
    found = token_batches([len(row.input_ids) for row in rows], engine.batch_tokens, MAX_ROWS)
    padded = (collate([rows[place] for place in batch], engine.pad_id, side="left", answers=False) for batch in found)
    return [(places, with_positions(one)) for places, one in zip(found, padded, strict=True)]


def with_positions(padded: dict[str, Tensor]) -> dict[str, Tensor]:
    mask = padded["attention_mask"]
    positions = (mask.cumsum(dim=1) - 1).clamp_min(0)
    return {"input_ids": padded["input_ids"], "attention_mask": mask, "position_ids": positions}


def forward(model: Any, head: AnswersOnly, batch: Batch, **kwargs: Any) -> Tensor:
    """Logits [B, V] of each row's last position."""
    head.wanted = last_only(batch[1]["input_ids"])
    with torch.inference_mode():
        logits: Tensor = model(**batch[1], use_cache=False, **kwargs).logits
    return logits


def task_by_task(engine: Engine, given: Sequence[Request]) -> list[Prediction]:
    """The same answers, one call of the engine for the rows of each task."""
    places: dict[str, list[int]] = defaultdict(list)
    for place, request in enumerate(given):
        places[request.entry.task.name].append(place)
    found: dict[int, Prediction] = {}
    for own in places.values():
        found |= zip(own, engine.answer([given[place] for place in own]), strict=True)
    return [found[place] for place in range(len(given))]


class Adapters:
    """PEFT's model with so many adapters; `answer` runs a batch, each row with its own."""

    def __init__(self, base: PreTrainedModel, config: MoECLConfig, tasks: int) -> None:
        own = twin(base)
        self.head = AnswersOnly(own)
        self.model = peft_lora(own, config, [name_of(number) for number in range(tasks)]).eval()
        stir(self.model, only="lora_")

    def answer(self, batch: Batch, names: Sequence[str]) -> Tensor:
        return forward(self.model, self.head, batch, adapter_names=[names[place] for place in batch[0]])


def sides_of(engine: Engine, base: PreTrainedModel, rows: Sequence[Encoded], tasks: int) -> dict[str, Side]:
    names = choose_tasks(len(rows), tasks)
    given, formed = requests(engine, rows, names), batches(engine, rows)
    head = AnswersOnly(own := twin(base))
    sides: dict[str, Side] = {
        "moecl": lambda: engine.answer(given),
        "base": lambda: [forward(own, head, batch) for batch in formed],
        "task_by_task": lambda: task_by_task(engine, given),
    }
    if tasks <= MOST_ADAPTERS:
        adapters = Adapters(base, engine.model.config, tasks)
        sides["peft"] = lambda: [adapters.answer(batch, names) for batch in formed]
    return sides


def measure(
    report: Report, engine: Engine, base: PreTrainedModel, rows: Sequence[Encoded], tasks: int, rounds: int
) -> None:
    say(f"{tasks} tasks")
    times = alternate(sides_of(engine, base, rows, tasks), rounds)
    word = WORDS.get(tasks, f"{tasks}_tasks")
    for side, seconds in times.items():
        if side != "moecl":
            report.ratio(f"{word}_vs_{side}", over(seconds, times["moecl"]))
    report.rates(f"{word}_rows_a_second", times, len(rows))
    report.seconds(f"{word}_seconds", times)


def main(argv: Sequence[str] | None = None) -> None:
    options = arguments().parse_args(argv)
    start(options)
    report = Report("predict", TARGETS)
    precision, _ = resolve_precision(options.precision, "cpu")
    loaded = load_backbone(options.base, precision)
    base = loaded.model.requires_grad_(False)
    model = MoECL(Backbone(twin(base), loaded.tokenizer, loaded.id), MoECLConfig()).eval()
    with TemporaryDirectory(dir=options.scratch) as folder:
        say(f"writing a store of {max(options.tasks)} tasks")
        model.load_tasks(write_store(model, Path(folder) / "store", max(options.tasks)))
        engine = Engine(model)
        check_labels(engine)
        rows = make_rows(base.config.vocab_size, options.rows)
        for tasks in options.tasks:
            measure(report, engine, base, rows, tasks, options.rounds)
    report.close(options, precision=precision)


def arguments() -> argparse.ArgumentParser:
    made = parser(__doc__, rounds=7)
    add_base(made)
    add_precision(made)
    made.add_argument("--rows", type=positive, default=64, help="texts to answer (%(default)s)")
    made.add_argument("--tasks", type=counts, default=[1, 10, 100], metavar="N,N", help="numbers of tasks (1,10,100)")
    made.add_argument(
        "--scratch", type=Path, metavar="DIR", help="where to write the store, 12 MB a task (the system's)"
    )
    return made


if __name__ == "__main__":
    run(main)
