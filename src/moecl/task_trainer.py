"""Training one task: transformers' Trainer, with whole checkpoints, groups clipped apart and the best step chosen."""

import hashlib
import json
import math
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import itemgetter
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from moecl._atomic import one_line, sync_folder
from moecl.config import Task, TrainConfig
from moecl.data.encode import Encoded, plan_batches
from moecl.errors import RunError, TrainingError
from moecl.feed import Feed
from moecl.methods.base import Method
from moecl.model import MoECL
from moecl.prefix import Prefixes

DIGESTS = "sha256.json"
FUSED = ("cpu", "cuda", "mps")  # where torch has AdamW in one kernel
STATE, BEST, PASSES = "state.safetensors", "best.safetensors", "passes.json"


class Learner(nn.Module):
    """What the Trainer sees: a batch in, the method's whole objective out."""

    def __init__(self, model: MoECL, method: Method, task: Task) -> None:
        super().__init__()
        self.model, self.method, self.task = model, method, task
        self.state = method.state
        self.count = 0  # batches seen; seeds a batch's draws
        self.task_loss: Tensor | None = None  # of the last batch, without the method's penalty

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor,
        label: Tensor,
        prefix: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """input_ids, attention_mask, labels [B, T], label [B] (class ids, for a classifier head), prefix [B, T, D]."""
        targets = label if self.task.head == "classifier" else labels
        wanted = self.method.reads_features and self.training
        output = self.model(input_ids, attention_mask, targets, task=self.task.name, features=wanted, prefix=prefix)
        loss = output.loss
        self.task_loss = loss.detach()
        if self.training:
            self.count += 1
            penalty = self.method.penalty(output.features or {}, self.count, output.query)
            loss = loss if penalty is None else loss + penalty
        return {"loss": loss}


class Passes(TrainerCallback):
    """Validation passes: scores the task under way, keeps the best state and stops early.

    Of equal scores the later counts as better: it has seen more of the data.
    """

    def __init__(
        self, score: Callable[[], float] | None, at: Sequence[int], patience: int | None, state: nn.Module
    ) -> None:
        self.score, self.at, self.patience, self.state = score, set(at), patience, state
        self.curve: list[tuple[int, float]] = []
        self.best: dict[str, Tensor] | None = None
        self.best_step: int | None = None

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        if self.score is None or state.global_step not in self.at:
            return control
        score = self.score()
        self.curve.append((state.global_step, score))
        scores = [value for _, value in self.curve]
        if score == max(scores):
            self.best = {name: tensor.detach().clone() for name, tensor in self.state.state_dict().items()}
            self.best_step = state.global_step
        if self.patience is not None and len(scores) - 1 - scores.index(max(scores)) >= self.patience:
            control.should_training_stop = True
            control.should_save = False  # from a checkpoint of this step, training would go on
        return control

    def restore_best(self) -> None:
        if self.best is not None:
            self.state.load_state_dict(self.best)


class Guard(TrainerCallback):
    """Clips each group on its own, and stops before a step that would ruin the state."""

    def __init__(self, learner: Learner, max_grad_norm: float) -> None:
        self.learner, self.max_grad_norm = learner, max_grad_norm

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        limit = self.max_grad_norm or math.inf
        for name, group in self.learner.method.groups().items():
            norm = nn.utils.clip_grad_norm_(group, limit)
            if not torch.isfinite(norm):
                raise diverged(self.learner.task, state.global_step + 1, name)


def diverged(task: Task, step: int, where: str) -> TrainingError:
    return TrainingError(
        f"task {task.name!r}: the loss is not finite at step {step} ({where}); what was learned before is kept: lower "
        "train.lr or use train.precision fp32, in a new run folder"
    )


class Telling(TrainerCallback):
    """Passes each step's figures on."""

    def __init__(self, learner: Learner, tell: Callable[[int, int, Mapping[str, float]], None]) -> None:
        self.learner, self.tell = learner, tell

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        figures = {}
        if state.global_step == state.max_steps and (loss := self.learner.task_loss) is not None:
            figures["task_loss"] = float(loss)
        self.tell(state.global_step, state.max_steps, figures)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        self.tell(state.global_step, state.max_steps, logs or {})


@dataclass(frozen=True)
class Learned:
    """What training one task left to tell."""

    steps: int
    best_step: int | None
    curve: list[tuple[int, float]]
    figures: dict[str, float]
    trained_parameters: int
    earlier: float  # seconds of starts before this one


@dataclass
class OneDevice(TrainingArguments):
    """Keeps to the base's device: the Trainer would take the first GPU, and spread the rows where there are more."""

    base_device: str = "cpu"

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call]
        self.mixed_precision = "no"  # whatever ACCELERATE_MIXED_PRECISION says: train.precision is what is recorded

    @cached_property
    def _setup_devices(self) -> torch.device:
        TrainingArguments._setup_devices.func(self)  # type: ignore[attr-defined]
        self._n_gpu = min(self._n_gpu, 1)
        device = torch.device(self.base_device)
        if device.type == "cuda":
            torch.cuda.set_device(device)  # accelerate takes the current one
        return device


class TaskTrainer(Trainer):
    """The Trainer with batches planned ahead, our optimizer groups, and checkpoints that are whole or absent."""

    def __init__(self, learner: Learner, feed: Feed, train: TrainConfig, passes: Passes, **kwargs: Any) -> None:
        self.learner, self.passes, self.settings, self.feed = learner, passes, train, feed
        self._draft: str | None = None
        self.figures: dict[str, float] = {}  # the method's, as the checkpoint has them
        self.begun, self.earlier = time.monotonic(), 0.0  # seconds of earlier starts, up to the checkpoint
        super().__init__(model=learner, train_dataset=feed, **kwargs)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """All epochs as one list of batches, so that going on after a kill is an index into it."""
        loader: DataLoader[Any] = DataLoader(
            self.feed,
            batch_sampler=[[number] for number in range(len(self.feed))],
            collate_fn=itemgetter(0),  # they are batches already
            pin_memory=self.args.dataloader_pin_memory,
        )
        return cast(DataLoader[Any], self.accelerator.prepare(loader))

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """AdamW over what the method says it trains, and nothing else, so that nothing else can decay."""
        if self.optimizer is None:
            method, lr = self.learner.method, self.settings.lr
            rates = {name: lr * share for name, share in method.rates().items()}
            if self.settings.discriminator_lr is not None:
                rates["discriminator"] = self.settings.discriminator_lr
            groups = [{"params": group, "lr": rates.get(name, lr)} for name, group in method.groups().items() if group]
            fused = self.learner.model.device.type in FUSED  # hundreds of small tensors, in a third of the time
            self.optimizer = torch.optim.AdamW(groups, weight_decay=self.settings.weight_decay, fused=fused)
        return self.optimizer

    @torch.no_grad()
    def check(self) -> None:
        """No step comes after the last one to find out that it ruined the state: its squares must not overflow."""
        trained = [p for group in self.learner.method.groups().values() for p in group]
        if not torch.isfinite(nn.utils.get_total_norm(trained)):
            raise diverged(self.learner.task, self.state.global_step, "after it")

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        loss = self.learner.task_loss  # None where a checkpoint of the last step leaves none to do
        own = {} if loss is None else {"task_loss": float(loss)}
        super().log(logs | own | self.learner.method.log(), start_time)

    # Checkpoints

    def _get_output_dir(self, trial: Any) -> str:
        return self._draft or str(self.args.output_dir)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write in a draft folder with the digest of each file, then rename it into place and drop the older ones."""
        folder = Path(str(self.args.output_dir))
        draft = folder / "draft"
        with one_line(folder):
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir(parents=True)
            self._draft = str(draft)
            try:
                super()._save_checkpoint(model, trial)
            except RuntimeError as error:  # how torch.save says that it cannot write
                raise RunError(
                    f"{folder}: a checkpoint cannot be written ({str(error).splitlines()[0]}); is the disk full? what "
                    "was saved before is intact: free some space and run it again"
                ) from error
            finally:
                self._draft = None
            [made] = draft.iterdir()
            seal(made)
            older = [path for path in folder.glob("checkpoint-*") if path.name != made.name]
            final = folder / made.name
            shutil.rmtree(final, ignore_errors=True)
            os.replace(made, final)
            draft.rmdir()
            sync_folder(folder)
            for path in older:
                shutil.rmtree(path)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Only what training changes: the method's state, and the best one so far."""
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / STATE).write_bytes(save(self.learner.state.state_dict()))
        if self.passes.best is not None:
            (folder / BEST).write_bytes(save(self.passes.best))
        seen = {
            "curve": self.passes.curve,
            "best_step": self.passes.best_step,
            "count": self.learner.count,
            "figures": self.learner.method.log(),
            "seconds": self.earlier + time.monotonic() - self.begun,
        }
        (folder / PASSES).write_text(json.dumps(seen))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        device = str(self.args.device)
        self.learner.state.load_state_dict(load_file(folder / STATE, device=device))
        if (folder / BEST).exists():
            self.passes.best = load_file(folder / BEST, device=device)
        seen = json.loads((folder / PASSES).read_text())
        self.passes.curve = [(step, score) for step, score in seen["curve"]]
        self.passes.best_step, self.learner.count = seen["best_step"], seen["count"]
        self.figures, self.earlier = seen.get("figures", {}), seen.get("seconds", 0.0)


def seal(folder: Path) -> None:
    """Make a checkpoint's files durable and write their digests."""
    digests = {}
    for path in sorted(folder.iterdir()):
        with path.open("rb") as file:
            digests[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
            os.fsync(file.fileno())
    with (folder / DIGESTS).open("w") as file:
        json.dump(digests, file)
        file.flush()
        os.fsync(file.fileno())
    sync_folder(folder)


def whole(folder: Path) -> bool:
    """Whether a checkpoint's files are those that were sealed, no more and no less, byte for byte."""
    try:
        digests = json.loads((folder / DIGESTS).read_text())
        files = [path for path in folder.iterdir() if path.name != DIGESTS]
        found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    except (OSError, ValueError):
        return False
    return bool(found == digests and {STATE, PASSES, TRAINER_STATE_NAME} <= digests.keys())


def last_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint of a task's folder."""
    found = [path for path in folder.glob("checkpoint-*") if whole(path)]
    return max(found, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def pass_steps(steps: int, epochs: int, an_epoch: int) -> list[int]:
    """The optimizer steps after which to validate: `an_epoch` times an epoch, the last step always among them."""
    count = epochs * an_epoch
    return sorted({max(1, round(steps * (number + 1) / count)) for number in range(count)}) if count else []


def row_losses(
    learner: Learner, rows: Sequence[Encoded], pad_id: int, prefixes: Prefixes | None, seed: int
) -> Iterator[Tensor]:
    """The task's loss on each row alone, without the method's penalty; in an order that the seed draws."""
    places = random.Random(seed).sample(range(len(rows)), len(rows))
    learner.eval()
    try:
        with Feed(rows, [[place] for place in places], pad_id, prefixes) as feed:
            for number in range(len(rows)):
                batch = {name: tensor.to(learner.model.device) for name, tensor in feed[number].items()}
                yield learner(**batch)["loss"]
    finally:
        learner.train()


def learn_task(
    model: MoECL,
    method: Method,
    task: Task,
    rows: Sequence[Encoded],
    train: TrainConfig,
    folder: Path,
    *,
    pad_id: int,
    prefixes: Prefixes | None = None,
    score: Callable[[], float] | None,
    tell: Callable[[int, int, Mapping[str, float]], None],
    trackers: Sequence[TrainerCallback] = (),
) -> Learned:
    """Train the parts that `method.begin(task)` made, from the newest checkpoint in `folder` where there is one.

    Leaves the best state by `score` (the last one without it) in `method.state`. Raises TrainingError, RunError.
    """
    updates = math.ceil(math.ceil(len(rows) / train.batch_size) * train.epochs / train.gradient_accumulation_steps)
    passes = Passes(score, pass_steps(updates, train.epochs, train.evals_per_epoch), train.early_stopping, method.state)
    arguments = OneDevice(
        output_dir=str(folder),
        num_train_epochs=1,
        per_device_train_batch_size=train.batch_size,
        gradient_accumulation_steps=train.gradient_accumulation_steps,
        learning_rate=train.lr,
        lr_scheduler_type="constant_with_warmup" if train.schedule == "constant" else train.schedule,
        warmup_steps=train.warmup_ratio,
        max_grad_norm=0.0,  # Guard clips each group
        save_steps=train.save_steps,
        logging_steps=5,
        logging_nan_inf_filter=False,
        report_to="none",  # `trackers` do
        disable_tqdm=True,
        base_device=str(model.device),
        use_cpu=model.device.type == "cpu",
        dataloader_pin_memory=model.device.type == "cuda",
        remove_unused_columns=False,
        seed=train.seed,
    )
    learner = Learner(model, method, task)
    callbacks = [Guard(learner, train.max_grad_norm), Telling(learner, tell), passes, *trackers]
    lengths = [len(row.input_ids) + len(row.answer_ids) for row in rows]
    plan = plan_batches(lengths, train.batch_size, train.epochs, train.seed)
    with Feed(rows, plan, pad_id, prefixes) as feed:
        trainer = TaskTrainer(learner, feed, train, passes, args=arguments, callbacks=callbacks)
        trainer.pop_callback(PrinterCallback)  # the watcher tells
        checkpoint = last_checkpoint(folder)
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        passes.restore_best()
        trainer.check()
        method.learned(row_losses(learner, rows, pad_id, prefixes, train.seed))
    trained = sum(p.numel() for group in method.groups().values() for p in group)
    figures = method.log() or trainer.figures
    return Learned(trainer.state.global_step, passes.best_step, passes.curve, figures, trained, trainer.earlier)
