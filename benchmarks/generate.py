"""Greedy decoding with a KV cache, batch 1 and 16: moecl, the base, and PEFT's LoRA (not merged).

Tokens a second, of prompt and answer together with what surrounds them: transformers' `generate` on every side.
moecl answers for one task; with a task a row as a figure.
"""

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from measure import Report, Side, add_base, add_precision, alternate, counts, over, parser, positive, run, say, start
from moecl import MoECL, MoECLConfig
from moecl.backbone import load_backbone, resolve_precision
from sides import labelled, peft_lora, stir, stir_parts, twin

TARGETS = {"decode_vs_base": {">=": 0.8}, "decode_vs_peft": {">=": 1.0}}


def name_of(number: int) -> str:
    return f"task{number}"


def moecl(base: PreTrainedModel, tasks: int) -> MoECL:
    model = MoECL.attach(twin(base), MoECLConfig())
    for number in range(tasks):
        model.add_task(labelled(name_of(number)))
        stir_parts(model.bank[name_of(number)].parts, number)
    model.finish_task()
    return model.eval()


def peft(base: PreTrainedModel) -> Any:
    model = peft_lora(twin(base), MoECLConfig()).eval()
    stir(model, only="lora_")
    return model


def prompts(vocab_size: int, rows: int, length: int) -> dict[str, Tensor]:
    ids = torch.randint(3, vocab_size, (rows, length), generator=torch.Generator().manual_seed(rows))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def greedy(base: PreTrainedModel, tokens: int) -> dict[str, Any]:
    """Exactly `tokens` new ones, whatever the base's own settings are."""
    pad = base.generation_config.pad_token_id or 0
    return {"do_sample": False, "num_beams": 1, "min_new_tokens": tokens, "max_new_tokens": tokens, "pad_token_id": pad}


def main(argv: Sequence[str] | None = None) -> None:
    options = arguments().parse_args(argv)
    start(options)
    report = Report("generate", TARGETS)
    precision, _ = resolve_precision(options.precision, "cpu")
    base = load_backbone(options.base, precision).model.requires_grad_(False)
    sides = Sides(base, max(options.batches), options.tokens)
    for rows in options.batches:
        say(f"batch {rows}, {options.tokens} new tokens")
        times = alternate(sides.of(prompts(base.config.vocab_size, rows, options.length)), options.rounds)
        for other in ("base", "peft"):
            report.ratio(f"decode_vs_{other}_{rows}", over(times[other], times["moecl"]))
        report.ratio(f"many_vs_one_task_{rows}", over(times["moecl"], times["moecl_many_tasks"]))
        report.rates(f"tokens_a_second_{rows}", times, rows * options.tokens)
        report.seconds(f"seconds_{rows}", times)
    for other in ("base", "peft"):
        report.worst(f"decode_vs_{other}", [f"decode_vs_{other}_{rows}" for rows in options.batches])
    report.close(options, precision=precision)


class Sides:
    """The models that decode."""

    def __init__(self, base: PreTrainedModel, tasks: int, tokens: int) -> None:
        self.base: Any = base
        self.moecl, self.peft = moecl(base, tasks), peft(base)
        self.settings = greedy(base, tokens)

    def of(self, prompt: dict[str, Tensor]) -> dict[str, Side]:
        names = [name_of(row) for row in range(len(prompt["input_ids"]))]
        asked = prompt | self.settings
        return {
            "moecl": lambda: self.moecl.generate(**asked, task=name_of(0)),
            "moecl_many_tasks": lambda: self.moecl.generate(**asked, task=names),
            "base": lambda: self.base.generate(**asked),
            "peft": lambda: self.peft.generate(**asked),
        }


def arguments() -> argparse.ArgumentParser:
    made = parser(__doc__, rounds=7)
    add_base(made)
    add_precision(made)
    made.add_argument("--batches", type=counts, default=[1, 16], metavar="N,N", help="rows decoded at once (1,16)")
    made.add_argument("--length", type=positive, default=32, help="tokens of each prompt (%(default)s)")
    made.add_argument("--tokens", type=positive, default=32, help="tokens to write (%(default)s)")
    return made


if __name__ == "__main__":
    run(main)
