"""What a stream will cost, before any training: a scratch step is timed and its saved bytes are counted."""

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks

from moecl.config import StreamConfig
from moecl.data.encode import Encoded, collate, plan_batches
from moecl.engine import Engine
from moecl.model import Entry, MoECL
from moecl.train import attach_method, resolve
from moecl.train import Watcher as Quiet

SCRATCH_ROWS = 8
OPTIMIZER_COPIES = 4  # a trained number, its gradient and AdamW's two moments


def estimate(
    model: MoECL, config: StreamConfig, train: Sequence[Sequence[Encoded]], test: Sequence[Sequence[Encoded]]
) -> dict[str, Any]:
    """Seconds, bytes at the peak and bytes a task, for encoded training and test rows by task. Nothing is changed."""
    config = resolve(config, Quiet())
    method = attach_method(model, config)
    task = config.tasks[0].model_copy(update={"head": "lm"})
    parts = method.begin(task)
    bank, model.bank = model.bank, {task.name: Entry(task, parts)}
    try:
        batch = collate(train[0][:SCRATCH_ROWS], Engine(model).pad_id)
        seconds, saved = scratch_step(model, task.name, batch, method.reads_features)
    finally:
        model.bank = bank
    tokens = batch["input_ids"].numel()
    trained = sum(p.numel() for group in method.groups().values() for p in group)
    stored = sum(p.numel() for module in (parts.shared, parts.task, parts.gate) for p in module.parameters())
    plans = [padded(rows, config) for rows in train]
    cells = len(train) + 1
    tested = cells * sum(len(row.input_ids) for rows in test for row in rows)
    base = sum(p.numel() * p.element_size() for p in model.base.parameters())
    return {
        "training_seconds": seconds["step"] / tokens * sum(total for total, _ in plans),
        "evaluation_seconds": seconds["forward"] / tokens * tested,
        "peak_bytes": base + 4 * OPTIMIZER_COPIES * trained + saved / tokens * max(most for _, most in plans),
        "task_bytes": 4 * stored,
        "how": f"from one scratch step of {tokens} tokens on {config.train.device} in {config.train.precision}; +-50 %",
    }


def padded(rows: Sequence[Encoded], config: StreamConfig) -> tuple[int, int]:
    """(tokens of a task's whole training, of its largest batch), padding included."""
    lengths = [len(row.input_ids) + len(row.answer_ids) for row in rows]
    train = config.train
    sizes = [
        len(batch) * max(lengths[place] for place in batch)
        for batch in plan_batches(lengths, train.batch_size, train.epochs, train.seed)
    ]
    return sum(sizes), max(sizes)


def scratch_step(
    model: MoECL, task: str, batch: dict[str, torch.Tensor], features: bool
) -> tuple[dict[str, float], int]:
    """Seconds of a training step and of a forward alone, and the bytes saved for backward."""
    inputs = {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask", "labels")}
    storages: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    weights = {p.untyped_storage().data_ptr() for p in model.base.parameters()}
    with torch.inference_mode():
        model(**inputs, task=task)  # warm-up
        begun = time.monotonic()
        model(**inputs, task=task)
    forward = time.monotonic() - begun
    begun = time.monotonic()
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(**inputs, task=task, features=features).loss
    loss.backward()
    step = time.monotonic() - begun
    model.zero_grad(set_to_none=True)
    return {"step": step, "forward": forward}, sum(size for at, size in storages.items() if at not in weights)
