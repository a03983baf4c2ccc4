"""Texts of no task: how well a model predicts them, whoever of its tasks, or none, is to answer."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from moecl.compare import TextLosses
from moecl.data.encode import IGNORED, token_batches
from moecl.engine import MAX_LENGTH, Engine
from moecl.model import TaskNames
from moecl.nn.call import run_with

BATCH_TOKENS = 1024  # every token's logits are held, V numbers each


def text_losses(engine: Engine, texts: Sequence[str], route: TaskNames = None) -> TextLosses:
    """-log p of each text's tokens but its first, summed, as `route` answers: None is the base, else a task (a text).

    Texts are cut at MAX_LENGTH tokens, or at the base's positions. The batches depend on the texts alone.
    """
    positions = getattr(engine.model.base.config, "max_position_embeddings", None) or MAX_LENGTH
    limit = min(positions, MAX_LENGTH)
    whole = engine.tokenizer(list(texts), verbose=False)["input_ids"]
    rows = [ids[:limit] for ids in whole]
    losses = [0.0] * len(rows)
    places = [place for place, ids in enumerate(rows) if len(ids) > 1]
    for batch in token_batches([len(rows[place]) for place in places], BATCH_TOKENS):
        chosen = [places[member] for member in batch]
        own = route if route is None or isinstance(route, str) else [route[place] for place in chosen]
        losses_of = _losses(engine, [rows[place] for place in chosen], own)
        for place, loss in zip(chosen, losses_of, strict=True):
            losses[place] = loss
    cut = sum(len(ids) > limit for ids in whole)
    return TextLosses(losses=losses, tokens=[max(len(ids) - 1, 0) for ids in rows], cut=cut)


@torch.inference_mode()
def _losses(engine: Engine, rows: Sequence[Sequence[int]], route: TaskNames) -> list[float]:
    longest = max(map(len, rows))
    ids, labels = (
        torch.tensor([[*row, *[fill] * (longest - len(row))] for row in rows], device=engine.model.device)
        for fill in (engine.pad_id, IGNORED)
    )
    call = engine.model.call(route, len(ids), engine.bank)  # the language model's own words, whatever a task's head
    call.attention_mask = (labels != IGNORED).long()
    with run_with(call):
        logits = engine.model.base(ids, attention_mask=call.attention_mask, use_cache=False).logits[
            :, :-1
        ]  # (B, T - 1, V)
    found = F.cross_entropy(logits.float().mT, labels[:, 1:], ignore_index=IGNORED, reduction="none")
    return [float(loss) for loss in found.sum(dim=1)]
