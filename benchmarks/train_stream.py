"""Learning a stream of real texts: moecl's own trainer against the published way. Examples a second, nothing evaluated.

The published way pads every row to the longest of the data set, and runs the experts one after the other: four base
GEMMs an FFN, every intermediate twice, the discriminator on the mean of a whole y_s. Both sides learn the same tasks
from the same rows with the same head (answers alone), loss, discriminator, clipping and AdamW. moecl's experts
are nested, the published way's apart. moecl's time has its checkpoints and its last check in it.

--data is a folder with a folder for each task: train.jsonl, rows {"text", "label"}, and task.json, {"labels": [...]}.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from measure import Report, Times, add_base, add_precision, alternate, over, parser, positive, run, say, start
from moecl import MoECL, MoECLConfig, Task
from moecl.backbone import Backbone, load_backbone, resolve_precision
from moecl.bank import Entry
from moecl.config import Limit, TaskConfig, TrainConfig
from moecl.data.encode import IGNORED, Encoded, Encoder, collate, plan_batches
from moecl.data.task import load_task_data
from moecl.errors import DataError
from moecl.methods import make_method
from moecl.task_trainer import Learner, learn_task
from sides import published_ffn, replace_ffns, twin

TARGETS = {"speedup_vs_published_way": {">=": 5.0}}
WARMUP_ROWS = 4


@dataclass(frozen=True)
class Course:
    """A task and its encoded rows."""

    task: Task
    rows: list[Encoded]

    @property
    def lengths(self) -> list[int]:
        return [len(row.input_ids) + len(row.answer_ids) for row in self.rows]


def read_courses(data: Path, rows: int, backbone: Backbone, max_length: int) -> list[Course]:
    """The first `rows` rows of every task in `data`, in the order of their names."""
    folders = sorted(path.parent for path in data.glob("*/train.jsonl") if (path.parent / "task.json").is_file())
    if not folders:
        raise DataError(f"--data {data}: no task in it; give a folder of folders with train.jsonl and task.json")
    assert backbone.tokenizer is not None
    courses = []
    for folder in folders:
        config = TaskConfig(
            name=folder.name,
            kind="classification",
            instruction="{text}\nAnswer:",
            labels=json.loads((folder / "task.json").read_text())["labels"],
            train=str(folder / "train.jsonl"),
            limit=Limit(train=rows),
        )
        read = load_task_data(config)
        encoded = Encoder(backbone.tokenizer, read.task, max_length).encode(read.train.examples)
        courses.append(Course(read.task, encoded))
    return courses


class Student:
    """A model that learns course after course, from nothing after `reset`."""

    def __init__(self, backbone: Backbone, train: TrainConfig, nested: bool = True) -> None:
        config = MoECLConfig(nested=nested)
        self.model = MoECL(replace(backbone, model=twin(backbone.model)), config, train.seed).train()
        self.train, self.pad_id = train, pad_id(backbone)
        self.reset()

    def reset(self) -> None:
        self.method = make_method(self.model.config, self.model.geometry, self.train.seed)
        self.model.bank.clear()

    def learn(self, course: Course) -> None:
        self.model.bank[course.task.name] = Entry(course.task, self.method.begin(course.task))
        self.study(course)
        self.method.finish()

    def study(self, course: Course) -> None:
        """moecl's own way: batches of like length, planned ahead."""
        with TemporaryDirectory() as folder:
            learn_task(
                self.model,
                self.method,
                course.task,
                course.rows,
                self.train,
                Path(folder),
                pad_id=self.pad_id,
                score=None,
                tell=lambda step, steps, figures: None,
            )

    def tokens(self, course: Course) -> int:
        """Padding included."""
        lengths = course.lengths
        plan = plan_batches(lengths, self.train.batch_size, self.train.epochs, self.train.seed)
        return sum(len(batch) * max(lengths[place] for place in batch) for batch in plan)


class Published(Student):
    """The published way, every row padded to `longest` tokens, or to the longest of its task where None."""

    def __init__(self, backbone: Backbone, train: TrainConfig, longest: int | None) -> None:
        super().__init__(backbone, train, nested=False)
        self.longest = longest
        replace_ffns(self.model, published_ffn)

    def study(self, course: Course) -> None:
        learner = Learner(self.model, self.method, course.task).train()
        groups = [group for group in self.method.groups().values() if group]
        optimizer = torch.optim.AdamW(
            [parameter for group in groups for parameter in group], lr=self.train.lr, fused=True
        )
        for batch in self.batches(course):
            torch.autograd.backward(learner(**batch)["loss"])
            for group in groups:
                nn.utils.clip_grad_norm_(group, self.train.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def batches(self, course: Course) -> list[dict[str, Tensor]]:
        draw, size = torch.Generator().manual_seed(self.train.seed), self.train.batch_size
        order = [place for _ in range(self.train.epochs) for place in torch.randperm(len(course.rows), generator=draw)]
        groups = [order[begin : begin + size] for begin in range(0, len(order), size)]
        longest = self.longest or max(course.lengths)
        return [widen(collate([course.rows[p] for p in group], self.pad_id), longest, self.pad_id) for group in groups]

    def tokens(self, course: Course) -> int:
        return (self.longest or max(course.lengths)) * len(course.rows) * self.train.epochs


def pad_id(backbone: Backbone) -> int:
    assert backbone.tokenizer is not None
    found = backbone.tokenizer.pad_token_id
    return int(backbone.tokenizer.eos_token_id if found is None else found)


def widen(batch: dict[str, Tensor], length: int, pad: int) -> dict[str, Tensor]:
    """The batch with its rows padded on to `length`."""
    fill = {"input_ids": pad, "attention_mask": 0, "labels": IGNORED}
    missing = length - batch["input_ids"].shape[1]
    return batch | {name: F.pad(batch[name], (0, missing), value=value) for name, value in fill.items()}


def learn_all(students: dict[str, Student], courses: Sequence[Course], rounds: int) -> Times:
    """Seconds of each task, round by round; the sides take turns task by task."""
    warmup = replace(courses[0], rows=courses[0].rows[:WARMUP_ROWS])
    for student in students.values():
        student.learn(warmup)
    times: Times = {name: [] for name in students}
    for number in range(rounds):
        say(f"stream {number + 1} of {rounds}")
        for student in students.values():
            student.reset()
        for course in courses:
            for name, seconds in learn_one(students, course).items():
                times[name].append(seconds)
    return times


def learn_one(students: dict[str, Student], course: Course) -> dict[str, float]:
    say(course.task.name)
    sides = {name: lambda student=student: student.learn(course) for name, student in students.items()}
    return {name: seconds for name, [seconds] in alternate(sides, rounds=1, warmup=0).items()}


def main(argv: Sequence[str] | None = None) -> None:
    options = arguments().parse_args(argv)
    start(options)
    precision, _ = resolve_precision(options.precision, "cpu")
    backbone = load_backbone(options.base, precision)
    backbone.model.requires_grad_(False)
    train = TrainConfig(epochs=options.epochs, batch_size=options.batch_size, max_length=options.max_length)
    courses = read_courses(options.data, options.rows, backbone, train.max_length)
    longest = max(length for course in courses for length in course.lengths)
    students = {
        "moecl": Student(backbone, train),
        "published": Published(backbone, train, longest),
        "published_task_longest": Published(backbone, train, None),
    }
    by_task = learn_all(students, courses, options.rounds)
    count = len(courses)
    times = {
        name: [sum(taken[at : at + count]) for at in range(0, len(taken), count)] for name, taken in by_task.items()
    }
    report = Report("train_stream", TARGETS)
    report.ratio("speedup_vs_published_way", over(times["published"], times["moecl"]))
    report.ratio("speedup_if_padded_to_each_tasks_longest", over(times["published_task_longest"], times["moecl"]))
    examples = train.epochs * sum(len(course.rows) for course in courses)
    report.rates("examples_a_second", times, examples)
    report.seconds("seconds", times)
    names = [course.task.name for course in courses] * options.rounds
    report.figures["speedup_by_task"] = list(zip(names, over(by_task["published"], by_task["moecl"]), strict=True))
    padded = {name: sum(map(student.tokens, courses)) for name, student in students.items()}
    real = train.epochs * sum(length for course in courses for length in course.lengths)
    report.figures["tokens"] = {"real": real, "longest": longest, **padded}
    report.close(options, precision=precision)


def arguments() -> argparse.ArgumentParser:
    made = parser(__doc__, rounds=1)
    made.add_argument("--data", type=Path, required=True, metavar="DIR", help="the tasks' folders")
    add_base(made)
    add_precision(made)
    made.add_argument("--rows", type=positive, default=64, help="of each task, from the first (%(default)s)")
    made.add_argument("--max-length", type=positive, default=512, help="tokens of a row, answer included (%(default)s)")
    made.add_argument("--batch-size", type=positive, default=16, help="rows of a batch (%(default)s)")
    made.add_argument("--epochs", type=positive, default=1, help="passes over the rows (%(default)s)")
    return made


if __name__ == "__main__":
    run(main)
