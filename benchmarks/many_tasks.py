"""What learning, opening and answering cost by the number of tasks: time, resident memory, bytes on disk.

A tiny random model on one thread, so that what grows with the tasks shows beside the work on one of them. The runs are
real folders of which all but the last task are learned (experts drawn, not trained); `ContinualTrainer` learns the
last one. The first task has no adversary, as there is one class; the second has all there is to a step. No task has
test rows: evaluating old tasks costs what there is to evaluate. Answers are those of one task, whose experts are read
from disk anew each time.
"""

import argparse
import json
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from shutil import copytree, ignore_patterns
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from measure import Report, Side, alternate, counts, over, parser, positive, run, say, start
from moecl import ContinualTrainer, Engine, MoECL, MoECLConfig, Store, StreamConfig
from moecl.backbone import load_backbone
from moecl.config import TaskConfig, load_stream
from moecl.course import Progress, Watcher
from moecl.data.task import load_task_data
from moecl.methods import make_method
from moecl.methods.base import Method
from moecl.run_folder import RunFolder
from moecl.settled import resolve
from moecl.store import TaskRecord

TARGETS = {"learn_500_vs_1": {">=": 0.9, "<=": 1.1}, "predict_500_vs_1": {">=": 0.9, "<=": 1.1}}
WORDS = ("the", "a", "day", "cat", "tea", "sea", "warm", "cold", "good", "bad", "great", "poor", "fine", "sad")
HIDDEN, WIDE, LAYERS, RANK = 128, 384, 4, 4
MAX_LENGTH = 64
SMALL_MEMORY = 10**6  # of experts, in the process that uses every task


# Linux's own count, since what getrusage tells of a child begins with what its parent had.
RESIDENT = """
import sys
from moecl import Engine, MoECL

def resident():
    [line] = [line for line in open("/proc/self/status") if line.startswith("VmRSS")]
    return int(line.split()[1]) * 1024

model = MoECL.from_pretrained(sys.argv[1], device="cpu", expert_memory=int(sys.argv[2]))
engine = Engine(model)
engine.predict(["warm tea"], next(iter(model.bank)))
print(resident())
for name in model.bank:
    engine.predict(["warm tea"], name)
print(resident())
"""


def make_base(folder: Path) -> Path:
    alphabet, special = pre_tokenizers.ByteLevel.alphabet(), ["<pad>", "</s>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.train_from_iterator(
        [f" {word}" for word in WORDS] * 8,
        trainers.BpeTrainer(vocab_size=384, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")  # type: ignore[no-untyped-call]
    made.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=HIDDEN,
        intermediate_size=WIDE,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        max_position_embeddings=256,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def write_rows(path: Path, count: int) -> Path:
    draw = random.Random(0)
    rows = [{"text": text(draw), "label": draw.choice(["good", "bad"])} for _ in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def text(draw: random.Random) -> str:
    return " ".join(draw.choices(WORDS, k=draw.randint(30, 50)))


def make_run(folder: Path, base: Path, rows: Path, tasks: int, epochs: int) -> None:
    """A run of `tasks` tasks of which only the last is still to be learned."""
    task = {"kind": "classification", "labels": ["good", "bad"], "train": str(rows), "instruction": "{text} is"}
    train = {"epochs": epochs, "max_length": MAX_LENGTH, "precision": "fp32", "device": "cpu", "report_to": []}
    config = StreamConfig(
        base=str(base),
        method={"name": "moe-cl", "rank": RANK},
        evaluate="seen",
        train=train,
        tasks=[{"name": f"task{number}", **task} for number in range(tasks)],
    )
    model = MoECL.attach(str(base), MoECLConfig(rank=RANK), precision="fp32", device="cpu")
    method, draw = make_method(config.method, model.geometry, 0), torch.Generator().manual_seed(0)
    place = RunFolder(folder)
    folder.mkdir()
    store = Store.create(place.store, model.base_info())
    learned = [drawn(method, one, draw) for one in config.tasks[:-1]]
    if learned:
        store.commit(learned, training=method.export())
    place.start(config, resolve(config, Watcher()), {})
    train_split = load_task_data(config.tasks[0]).train
    known = {"train": {"sha256": train_split.sha256, "rows": len(train_split.examples), "cut": 0}}
    names = [record.name for record, _ in learned]
    cells: list[list[float | None]] = [[None] * tasks for _ in range(tasks)]
    place.save_progress(vars(Progress(cells, dict.fromkeys(names, known), {name: {} for name in names})))


@torch.no_grad()
def drawn(method: Method, task: TaskConfig, draw: torch.Generator) -> tuple[TaskRecord, dict[str, dict[str, Tensor]]]:
    """A finished task of random parts."""
    settled = task.model_copy(update={"head": "lm", "max_length": MAX_LENGTH})
    method.begin(settled)
    for parameter in method.state.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.1)
    done = method.finish()
    return TaskRecord(task=settled, form=done.form, settings={"seed": 0, **done.settings}), done.tensors


def learning(folder: Path, copies: int) -> Side:
    """A side that learns the last task of a run, in a copy of its own each time."""
    fresh = []
    for number in range(copies):
        copy = folder.with_name(f"{folder.name}-{number}")
        # What a store or a run has written is never changed in place, so links are copies.
        copytree(folder, copy, copy_function=os.link, ignore=ignore_patterns(".lock"))
        fresh.append(copy)

    def learn() -> None:
        copy = RunFolder(fresh.pop())
        result = ContinualTrainer(load_stream(copy.path / "stream.yaml"), copy.path).run()
        assert len(result.tasks) == len(Store.open(copy.store).tasks())

    return learn


def measure_learning(report: Report, folders: dict[int, Path], rounds: int) -> None:
    sides = {str(tasks): learning(folder, rounds + 1) for tasks, folder in folders.items()}
    times = alternate(sides, rounds)
    report.seconds("learn_seconds", times)
    *fewer, most = sides
    report.figures["seconds_a_task_known_before"] = {
        few: (median(times[most]) - median(times[few])) / (int(most) - int(few)) for few in fewer
    }
    for few in fewer:
        report.ratio(f"learn_{most}_vs_{few}", over(times[most], times[few]))


def measure_answers(report: Report, base: Path, stores: dict[int, Store], rows: int, rounds: int) -> None:
    """Opening, and rows of one task, by the number of tasks there are."""
    loaded = load_backbone(str(base)).model

    def opening(store: Store) -> Side:
        return lambda: MoECL.from_store(store, base=loaded).detach()

    opened = alternate({str(n): opening(store) for n, store in stores.items()}, rounds)
    report.seconds("load_seconds", opened)
    draw = random.Random(1)
    texts = [text(draw) for _ in range(rows)]
    models = {n: MoECL.from_store(store, base=load_backbone(str(base)).model) for n, store in stores.items()}
    tokenizer = load_backbone(str(base)).tokenizer

    def answering(model: MoECL) -> Side:
        engine, names = Engine(model, tokenizer), list(model.bank)

        def answer() -> None:
            model.bank.loaded.clear()
            engine.predict(texts, draw.choice(names))

        return answer

    times = alternate({str(n): answering(model) for n, model in models.items()}, rounds)
    report.seconds("predict_seconds", times)
    *fewer, most = map(str, stores)
    for few in fewer:
        report.ratio(f"predict_{most}_vs_{few}", over(times[most], times[few]))


def sizes(stores: dict[int, Store]) -> dict[str, Any]:
    """Bytes on disk: of a task's objects, and of training/ a task more."""
    own = {n: median(map(sum, store.bytes().values())) for n, store in stores.items()}
    training = {n: sum(p.stat().st_size for p in (store.path / "training").iterdir()) for n, store in stores.items()}
    few, many = min(training), max(training)
    return {
        "task_bytes": own,
        "training_bytes": training,
        "training_bytes_a_task": (training[many] - training[few]) / (many - few),
        "a_row_a_layer_of_three_tables": 3 * LAYERS * HIDDEN * 4,
    }


def resident(store: Store) -> dict[str, int]:
    """Bytes that a process of its own takes: once it has opened the store, and once it has used every task."""
    words = [sys.executable, "-W", "ignore", "-c", RESIDENT, str(store.path), str(SMALL_MEMORY)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    opened, used = map(int, done.stdout.split())
    return {"opened": opened, "every_task_used": used}


def main(argv: Sequence[str] | None = None) -> None:
    options = arguments().parse_args(argv)
    start(options)
    report = Report("many_tasks", TARGETS)
    with TemporaryDirectory(dir=options.scratch) as scratch:
        place = Path(scratch)
        base, rows = make_base(place / "base"), write_rows(place / "rows.jsonl", options.rows)
        folders = {tasks: place / f"run{tasks}" for tasks in sorted(options.tasks)}
        for tasks, folder in folders.items():
            say(f"making a run with {tasks - 1} tasks learned")
            make_run(folder, base, rows, tasks, options.epochs)
        measure_learning(report, folders, options.rounds)
        stores = {n: Store.open(folder.with_name(f"{folder.name}-0") / "store") for n, folder in folders.items()}
        measure_answers(report, base, stores, options.answers, options.rounds)
        report.figures |= sizes(stores)
        if sys.platform == "linux":
            report.figures["resident_bytes"] = {n: resident(store) for n, store in stores.items()}
    report.close(options)


def arguments() -> argparse.ArgumentParser:
    made = parser(__doc__ or "", rounds=5)
    made.set_defaults(threads=1)
    made.add_argument("--tasks", type=counts, default=[1, 2, 500], metavar="N,N", help="numbers of tasks (1,2,500)")
    made.add_argument("--rows", type=positive, default=640, help="training rows of a task (%(default)s)")
    made.add_argument("--epochs", type=positive, default=3, help="passes over them (%(default)s)")
    made.add_argument("--answers", type=positive, default=256, help="rows to answer (%(default)s)")
    made.add_argument("--scratch", type=Path, metavar="DIR", help="where to write runs, 100 MB (the system's)")
    return made


if __name__ == "__main__":
    run(main)
