"""A task, or one of its experts, as a LoRA adapter in PEFT's format, for programs that know nothing of gates.

An expert alone is a LoRA on the FFN's projections: exact. A whole gated task is not; its stand-in puts a constant in
the gate's place, m = the mean of b over the task's validation tokens, a layer:

    y  = b_s y_s + b_t y_t,  (b_s, b_t) = softmax(G x), a token
    y' = the FFN with the one LoRA  c [m_s B_s, m_t B_t] [A_s; A_t]  at each projection

Nested, the shared expert counts whole at half the scale: 1/2 stands in the place of m_s.

Both agree in the first order of the LoRAs where b is the same for all tokens; the FFN is not linear. So the stand-in is
measured against the task before anything is written.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moecl.bank import Entry
from moecl.data.encode import IGNORED, Encoded, collate, token_batches
from moecl.data.task import Example
from moecl.engine import MAX_ROWS, Engine, GateUse, Request
from moecl.errors import ConfigError, TaskError
from moecl.metrics import ANSWER_METRICS
from moecl.nn.call import run_with
from moecl.nn.lora import Expert
from moecl.nn.moe_ffn import Gated
from moecl.nn.sums import Sum
from moecl.store import Store, TaskRecord

EXPERTS = ("task", "shared")


@dataclass(frozen=True)
class Parity:
    """How far a stand-in's answers are from the task's own, on its validation rows.

    `differ`: rows with another answer. `score`, `exact_score`: the stand-in's and the task's own, by
    the task's metric. `largest_logit_gap`: over the whole vocabulary, at every position of the true answers.
    `task_weight`: layer -> what stands in the gate's place; none where there was no gate.
    """

    rows: int
    differ: int
    score: float | None
    exact_score: float | None
    largest_logit_gap: float
    task_weight: dict[int, float]

    @property
    def disagreement(self) -> float:
        """The share of rows with another answer, exact: 1 less the agreement is not."""
        return self.differ / self.rows

    @property
    def agreement(self) -> float:
        return (self.rows - self.differ) / self.rows


def one_expert(entry: Entry, which: str | None = None) -> Sum:
    """An expert alone: `task` (default) or `shared` of a gated task, or the LoRA of a `sum`. Raises TaskError.

    The task's expert of a nested one comes with the shared one that it adds to, as one LoRA of both ranks.
    """
    parts = entry.parts
    if which != "shared":
        refuse_head(entry)
    if isinstance(parts, Gated):
        if which not in (None, *EXPERTS):
            raise ConfigError(f"--expert: {which!r:.60} is none of {', '.join(EXPERTS)}")
        if which == "shared":
            return Sum(parts.shared, parts.shared_scale)
        whole = dict.fromkeys(parts.shared.geometry.layers, 1.0)
        return averaged(parts, whole) if parts.nested else Sum(parts.task, parts.scale)
    if isinstance(parts, Sum):
        if which is not None:
            raise ConfigError(f"--expert: task {entry.name!r} has one LoRA and no experts to choose from; leave it out")
        return Sum(parts.lora, parts.scale)
    raise no_lora(entry)


def refuse_head(entry: Entry) -> None:
    if entry.parts.head is not None:
        raise TaskError(f"task {entry.name!r}: answers with a classifier head, which no LoRA holds; use head: lm")


def one_lora(engine: Engine, entry: Entry, rows: Sequence[Example]) -> tuple[Sum, Parity]:
    """A whole task as one LoRA, and how far it is from it on `rows`. Raises TaskError where a task cannot be one."""
    parts = entry.parts
    refuse_head(entry)
    if not isinstance(parts, Gated | Sum):
        raise no_lora(entry)
    prompts, gates = engine.prompts(entry.task, rows), GateUse()
    exact = _answers(engine.watched(gates), entry, prompts)
    weights = gates.means() if isinstance(parts, Gated) else {}
    lora = averaged(parts, weights) if isinstance(parts, Gated) else Sum(parts.lora, parts.scale)
    stand_in = Entry(entry.task, lora, entry.name)
    given = _answers(engine, stand_in, prompts)
    differ = sum(one != other for one, other in zip(exact, given, strict=True))
    true, score = [row.label or (row.completion or "").strip() for row in rows], ANSWER_METRICS[entry.task.metric]
    gap = largest_gap(engine, entry, stand_in, engine.encoder(entry.task).encode(rows))
    return lora, Parity(len(rows), differ, score(true, given), score(true, exact), gap, weights)


def averaged(parts: Gated, task_weight: Mapping[int, float]) -> Sum:
    """Both experts as one LoRA of both ranks; `task_weight`: layer -> m_t, in the gate's place."""
    experts = parts.shared, parts.task
    merged = Expert(parts.shared.geometry, sum(expert.rank for expert in experts))
    merged.to(next(parts.shared.parameters()).device)
    with torch.no_grad():
        for layer in merged.geometry.layers:
            of_shared = parts.shared_scale / parts.scale if parts.nested else 1 - task_weight[layer]
            weights = of_shared, task_weight[layer]
            for name in merged.geometry.projections:
                pairs = [expert.pair(layer, name) for expert in experts]
                merged.pair(layer, name).lora_A.copy_(torch.cat([pair.lora_A for pair in pairs]))
                scaled = [pair.lora_B * weight for pair, weight in zip(pairs, weights, strict=True)]
                merged.pair(layer, name).lora_B.copy_(torch.cat(scaled, dim=1))
    return Sum(merged.requires_grad_(False), parts.scale)


def largest_gap(engine: Engine, one: Entry, other: Entry, rows: Sequence[Encoded]) -> float:
    """The largest difference of two entries' logits at the answers of `rows`."""
    lengths = [len(row.input_ids) + len(row.answer_ids) for row in rows]
    batches = [[rows[place] for place in batch] for batch in token_batches(lengths, engine.batch_tokens, MAX_ROWS)]
    return max(float((_logits(engine, one, it) - _logits(engine, other, it)).abs().max()) for it in batches)


def report(parity: Parity) -> dict[str, bytes]:
    """parity.json"""
    return {"parity.json": _json(asdict(parity) | {"agreement": parity.agreement})}


def source(store: Store, record: TaskRecord, kind: str, expert: str | None) -> dict[str, bytes]:
    """moecl.json: what an adapter was made of, and how its task is to be asked."""
    what: dict[str, Any] = {"as": kind, **({} if expert is None else {"expert": expert})}
    told = {"task": record.task.model_dump(mode="json"), "version": record.version, "parts": record.parts}
    return {"moecl.json": _json({**what, **told, "base": store.manifest.base.model_dump(mode="json")})}


def _json(fields: Any) -> bytes:
    return json.dumps(fields, indent=2, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def no_lora(entry: Entry) -> TaskError:
    why = {
        "mix": "its LoRAs are weighed by the text, row by row",
        "weights": "it replaces the base's own weights",
    }
    form = entry.parts.form
    return TaskError(
        f"task {entry.name!r}: form {form} cannot be one LoRA: {why[form]}; learn it with moe-cl or a LoRA method"
    )


def _answers(engine: Engine, entry: Entry, prompts: Sequence[Encoded]) -> list[str]:
    encoder = engine.encoder(entry.task)
    found = engine.over({entry.name: entry}).answer([Request(entry, encoder, row) for row in prompts])
    return [one.label for one in found]


@torch.inference_mode()
def _logits(engine: Engine, entry: Entry, batch: Sequence[Encoded]) -> Tensor:
    """[answer tokens, V] float32"""
    device = engine.model.device
    inputs = {name: tensor.to(device) for name, tensor in collate(batch, engine.pad_id).items()}
    call = engine.model.call(entry.name, len(batch), {entry.name: entry})
    call.attention_mask = inputs["attention_mask"]
    call.answers = F.pad(inputs["labels"][:, 1:] != IGNORED, (0, 1))  # position t predicts token t + 1
    with run_with(call):
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        return engine.model.base(input_ids=ids, attention_mask=mask, use_cache=False).logits.float()  # type: ignore[no-any-return]
