"""How likely a model holds given answers to be."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from moecl.config import Task
from moecl.data.encode import collate
from moecl.data.task import Example, example
from moecl.errors import DataError, near
from moecl.model import MoECL
from moecl.nn.call import run_with
from moecl.request import Request, Row, as_example, parts_of, positions


@dataclass(frozen=True)
class Likelihood:
    """log p of an answer behind its prompt: the sum over its tokens, the end of the answer among them.

    Under a classifier head it is the log of the label's share, and there are no tokens.
    """

    task: str
    answer: str
    logprob: float
    token_logprobs: tuple[float, ...] = ()


def answered(row: Row, task: Task, answer: str | None, where: str) -> Example:
    """The row with this answer, or with its own where that is None. Raises DataError."""
    if answer is None and not isinstance(row, Example):
        return example(row, task, where, answered=True)
    found = as_example(row, task, where)
    field = "label" if task.kind == "classification" else "completion"
    answer = getattr(found, field) if answer is None else answer
    if not isinstance(answer, str) or not answer.strip():
        raise DataError(f"{where}: {field}: no answer to score; give `completions`, or rows that have theirs")
    if task.labels and answer not in task.labels:
        known = ", ".join(task.labels)
        raise DataError(f"{where}: {answer!r:.60} is no label; give one of {known}{near(answer, task.labels)}")
    changed: dict[str, Any] = {field: answer}
    return replace(found, **changed)


@torch.inference_mode()
def token_logprobs(model: MoECL, batch: Sequence[Request], pad_id: int) -> list[tuple[float, ...]]:
    """log p of each answer's tokens, in one forward over prompts and answers."""
    padded = {
        name: tensor.to(model.device)
        for name, tensor in collate([request.row for request in batch], pad_id, side="left").items()
    }
    ids, mask, labels = padded["input_ids"], padded["attention_mask"], padded["labels"]
    wanted = torch.zeros_like(ids, dtype=torch.bool)
    wanted[:, :-1] = labels[:, 1:] != -100  # position t predicts token t + 1
    call = model.call_with(parts_of(batch))
    call.attention_mask = mask * (labels == -100)  # a text is weighed by what is asked
    call.answers, call.tokens = wanted, slice(None)
    with run_with(call):
        logits = model.base(input_ids=ids, attention_mask=mask, position_ids=positions(mask), use_cache=False).logits
    found = logits.log_softmax(-1).gather(1, labels[:, 1:][wanted[:, :-1]][:, None])[:, 0]
    return [tuple(part.tolist()) for part in found.split([len(request.row.answer_ids) for request in batch])]
