"""One training step: moecl, PEFT's LoRA, the slow reference, and the base's forward as a yardstick.

Every side has the same base, batch, rank, head (answers alone) and AdamW, and makes its optimizer step. moecl learns
its second task, with discriminator and memory; PEFT's LoRA is one expert of the same rank on the same projections.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence

import psutil
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from floor import floor, rates, seconds, work_of
from measure import Report, Times, add_base, alternate, over, parser, positive, run, say, start
from moecl import MoECL, MoECLConfig
from moecl.backbone import DTYPES, load_backbone
from moecl.estimate import kept_bytes, taken_bytes
from sides import AnswersOnly, answer_loss, labelled, peft_lora, reference_ffn, replace_ffns, twin

TARGETS = {
    "step_vs_peft_bf16": {"<=": 0.95},
    "step_vs_peft_fp32": {"<=": 1.05},
    "step_vs_reference_bf16": {"<=": 0.6},
    "saved_vs_peft_bf16": {"<=": 0.85},
    "saved_vs_peft_fp32": {"<=": 0.85},
    "peak_vs_peft_bf16": {"<=": 0.85},
    "discriminator_share": {"<=": 0.03},
}
ANSWER = 2  # tokens at the end of each row
LR = 1e-4
ALONE_STEPS, ALONE_ROUNDS = 3, 3

Batch = dict[str, Tensor]


class Learning:
    """A side that learns: its loss, and a step of AdamW on what it trains."""

    def __init__(self, loss: Callable[[], Tensor], trained: Iterable[nn.Parameter], model: nn.Module) -> None:
        self.loss, self.model = loss, model
        self.trained = list(trained)
        self.optimizer = torch.optim.AdamW(self.trained, lr=LR, fused=True)

    def step(self) -> None:
        torch.autograd.backward(self.loss())
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def saved_bytes(self, batch: Batch) -> int:
        """What autograd keeps for backward, each storage once, parameters and inputs apart."""
        return kept_bytes(self.loss, [*self.model.parameters(), *self.model.buffers(), *batch.values()])[1]


def moecl(base: PreTrainedModel, batch: Batch, alpha: float = MoECLConfig().alpha, nested: bool = True) -> Learning:
    model = MoECL.attach(twin(base), MoECLConfig(alpha=alpha, nested=nested)).train()
    model.add_task(labelled("first"))
    model(**{name: tensor[:1] for name, tensor in batch.items()}, task="first")  # something to remember it by
    model.add_task(labelled("second"))
    assert model.learner is not None
    trained = [parameter for group in model.learner.groups().values() for parameter in group]
    return Learning(lambda: model(**batch, task="second").loss, trained, model)


def without_adversary(base: PreTrainedModel, batch: Batch) -> Learning:
    return moecl(base, batch, alpha=0)


def slow_reference(base: PreTrainedModel, batch: Batch) -> Learning:
    side = moecl(base, batch)
    assert isinstance(side.model, MoECL)
    replace_ffns(side.model, reference_ffn)
    return side


def peft(base: PreTrainedModel, batch: Batch) -> Learning:
    own = twin(base)
    head = AnswersOnly(own)
    model = peft_lora(own, MoECLConfig())
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return Learning(lambda: answer_loss(model, head, batch), trained, model)


LEARNING = {"moecl": moecl, "without_adversary": without_adversary, "peft": peft, "reference": slow_reference}


def make_batch(base: PreTrainedModel, rows: int, length: int) -> Batch:
    """Rows of real tokens alone, the last ANSWER of them the answer."""
    ids = torch.randint(3, base.config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(0))
    labels = torch.full_like(ids, -100)
    labels[:, -ANSWER:] = ids[:, -ANSWER:]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def measure(report: Report, options: argparse.Namespace, precision: str) -> None:
    """Steps side by side in one process, bytes saved for backward, and the floor of both."""
    base = load_backbone(options.base, precision).model.requires_grad_(False)
    batch = make_batch(base, options.rows, options.length)
    sides = {name: make(base, batch) for name, make in LEARNING.items()}
    head = AnswersOnly(own := twin(base))

    def forward() -> None:
        with torch.inference_mode():
            answer_loss(own, head, batch)

    say(f"{precision}: {options.rows} x {options.length} tokens")
    times = alternate({**{name: side.step for name, side in sides.items()}, "forward": forward}, options.rounds)
    saved = {name: side.saved_bytes(batch) for name, side in sides.items()}
    add_ratios(report, precision, times, saved)
    work = work_of(base, options.rows, options.length, ANSWER * options.rows)
    counted, rate = floor(work, MoECLConfig().rank, DTYPES[precision].itemsize), rates(work, DTYPES[precision])
    counted |= rate | {f"{side}_seconds": seconds(counted, rate, side) for side in ("moecl", "peft")}
    report.figures[f"floor_{precision}"] = counted


def add_ratios(report: Report, precision: str, times: Times, saved: dict[str, int]) -> None:
    for other in ("peft", "reference"):
        report.ratio(f"step_vs_{other}_{precision}", over(times["moecl"], times[other]))
    report.ratio(f"step_vs_forward_{precision}", over(times["moecl"], times["forward"]))
    share = [ratio - 1 for ratio in over(times["moecl"], times["without_adversary"])]
    report.ratio(f"discriminator_share_{precision}", share)
    report.ratio(f"saved_vs_peft_{precision}", [saved["moecl"] / saved["peft"]])
    report.seconds(f"step_seconds_{precision}", times)
    report.figures[f"saved_bytes_{precision}"] = saved


def measure_peaks(report: Report, options: argparse.Namespace) -> None:
    """Peak memory of processes that each train one side in bf16; first of all, while this process is small."""
    peaks: dict[str, list[dict[str, int]]] = {"moecl": [], "peft": []}
    for _ in range(ALONE_ROUNDS):
        for side, found in peaks.items():
            command = [sys.executable, __file__, "--alone", side, "--base", options.base, "--precision", "bf16"]
            command += ["--rows", str(options.rows), "--length", str(options.length)]
            command += ["--threads", str(torch.get_num_threads())]
            found.append(json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout))
            say(f"{side} alone: peak {found[-1]['peak'] >> 20} MiB, {found[-1]['over'] >> 20} MiB over what was there")
    for kind in ("peak", "over"):
        ours, theirs = ([float(one[kind]) for one in peaks[side]] for side in ("moecl", "peft"))
        report.ratio(f"{kind}_vs_peft_bf16", over(ours, theirs))
    report.figures["peak_bytes_bf16"] = peaks


def train_alone(options: argparse.Namespace) -> None:
    """Train a few steps of one side; prints the peak of this process, and by how much the steps raised it."""
    [precision] = options.precision
    base = load_backbone(options.base, precision).model.requires_grad_(False)
    side = LEARNING[options.alone](base, make_batch(base, options.rows, options.length))
    before = psutil.Process().memory_info().rss  # type: ignore[no-untyped-call]
    for _ in range(ALONE_STEPS):
        side.step()
    peak = taken_bytes(torch.device("cpu"))
    print(json.dumps({"peak": peak, "over": peak - before}))


def main(argv: Sequence[str] | None = None) -> None:
    options = arguments().parse_args(argv)
    start(options)
    if options.alone:
        train_alone(options)
        return
    report = Report("train_step", TARGETS)
    precisions = options.precision or ["bf16", "fp32"]
    if "bf16" in precisions:
        measure_peaks(report, options)
    for precision in precisions:
        measure(report, options, precision)
    report.worst("discriminator_share", [f"discriminator_share_{precision}" for precision in precisions])
    report.close(options)


def arguments() -> argparse.ArgumentParser:
    made = parser(__doc__, rounds=9)
    add_base(made)
    made.add_argument(
        "--precision", action="append", choices=("bf16", "fp32"), help="dtype of the base; may be given twice (both)"
    )
    made.add_argument("--rows", type=positive, default=16, help="texts in the batch (%(default)s)")
    made.add_argument("--length", type=positive, default=96, help="tokens in each (%(default)s)")
    made.add_argument("--alone", choices=LEARNING, help="only the peak memory of one side's steps")
    return made


if __name__ == "__main__":
    run(main)
