"""`moecl export`: parse, call, print."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from moecl.cli_options import Device, RunOrStore
from moecl.errors import ConfigError, near
from moecl.terminal import quietly

if TYPE_CHECKING:
    from moecl.export import Parity

EXAMPLES = """moecl export runs/mine reviews -o reviews-expert --as peft-expert
moecl export runs/mine reviews@2 -o common --as peft-expert --expert shared
moecl export runs/mine reviews -o reviews-lora --as static-lora --max-disagreement 0.02"""
KINDS = ("peft-expert", "static-lora")
REFUSED = 3

out, err = Console(), Console(stderr=True)


def export(
    run: RunOrStore,
    task: Annotated[str, typer.Argument(metavar="NAME", help="A task; NAME@VERSION or NAME@ALIAS, too.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FOLDER", help="The folder to make.")],
    kind: Annotated[str, typer.Option("--as", metavar="KIND", help="peft-expert or static-lora.")],
    expert: Annotated[
        str | None,
        typer.Option(
            "--expert", metavar="NAME", help="For peft-expert: task (default; with the shared one if nested) or shared."
        ),
    ] = None,
    max_disagreement: Annotated[
        float | None,
        typer.Option(
            "--max-disagreement", metavar="SHARE", help="For static-lora: of the validation rows. [default: 0.02]"
        ),
    ] = None,
    device: Device = "auto",
) -> int | None:
    """Write a task as a LoRA in PEFT's format.

    peft-expert: one expert, exactly; a nested task's with the shared one that it adds to. static-lora: the whole task,
    its gate replaced by its mean over the validation rows, an approximation that is measured first; exit 3 and nothing
    written where more answers than --max-disagreement differ. A task of form sum is one LoRA already.
    """
    if kind not in KINDS:
        raise ConfigError(f"--as: {kind!r} is none of {', '.join(KINDS)}{near(kind, KINDS)}")
    if max_disagreement is not None and kind != "static-lora":
        raise ConfigError(f"--max-disagreement {max_disagreement:g}: is for --as static-lora; a {kind} is exact")
    most = 0.02 if max_disagreement is None else max_disagreement
    if not 0 <= most <= 1:
        raise ConfigError(f"--max-disagreement: {most:g} is no share; give a number from 0 to 1")
    if expert is not None and kind != "peft-expert":
        raise ConfigError(f"--expert {expert}: is for --as peft-expert; a {kind} has both")
    from moecl.show import say
    from moecl.using import exported

    with quietly(), err.status("exporting"):
        parity, note = exported(run, task, output, kind, expert, most, device)
    if parity is not None:
        show(parity)
        if parity.disagreement > most:
            differ = f"{parity.disagreement:.1%} of the answers differ, --max-disagreement is {most:.1%}"
            say(err, f"moecl: refused: {differ}; allow more, or write one expert exactly with --as peft-expert")
            return REFUSED
    if note:
        say(err, note)
    say(out, f"written to {output}")
    return None


def show(parity: "Parity") -> None:
    from moecl.show import say, show_score

    say(out, f"{'validation rows':18} {parity.rows}")
    say(out, f"{'same answer':18} {parity.agreement:.1%}")
    say(out, f"{'score':18} {show_score(parity.score)}, the task's own {show_score(parity.exact_score)}")
    say(out, f"{'largest logit gap':18} {parity.largest_logit_gap:.3g}")
    if parity.task_weight:
        weights = parity.task_weight.values()
        say(out, f"{'task expert':18} weighs {min(weights):.2f} to {max(weights):.2f}, by layer")
