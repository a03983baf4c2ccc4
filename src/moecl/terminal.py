"""The manners of a command line: help with examples, errors in one line, other libraries kept quiet."""

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from typer.core import TyperCommand
from typer.exceptions import TyperException

from moecl.errors import MoECLError

if TYPE_CHECKING:
    from moecl.watch import PlainWatcher

QUIET = {
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "TRANSFORMERS_VERBOSITY": "error",
}


class Command(TyperCommand):
    """A command whose epilog is example calls, one a line."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        # typer puts what is required in braces
        return [piece.replace("{", "").replace("}", "") for piece in super().collect_usage_pieces(ctx)]

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        with formatter.section("Examples"):
            for line in (self.epilog or "").splitlines():
                formatter.write(f"  {line}\n")


class CommandWithKeys(Command):
    """And ends with every key of a stream file, from the settings' own descriptions."""

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        from moecl.config import describe_settings

        super().format_epilog(ctx, formatter)
        rows = [(f"{key} <{kind}>", f"{text} [default: {default}]") for key, kind, default, text in describe_settings()]
        with formatter.section("Keys of a stream file, for --set too"):
            formatter.write_dl(rows)


TRAINING = ("train", "learn", "check", "demo", "bench")


def explain(error: Exception, command: str = "train") -> tuple[str, int]:
    """One line for an error, and the exit status: 2 for what the user can fix, 1 for the rest."""
    if isinstance(error, MoECLError):
        return str(error), error.exit_code
    reason = " ".join(str(error).split()) or "no message"
    if isinstance(error, TyperException):
        path = getattr(getattr(error, "ctx", None), "command_path", "moecl")
        return f"{' '.join(error.format_message().split()).rstrip('.')}; see `{path} --help`", error.exit_code
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "allocate memory" in reason:
        remedy = "use a machine with more, another --device, or --expert-memory with less where the command has it"
        if command in TRAINING:
            remedy = "lower train.batch_size or train.max_length, or set train.gradient_checkpointing=true"
            remedy += ", in a new run folder"
        return f"out of memory: {remedy}", 2
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'output'}: {error.strerror}", 2
    return f"{type(error).__name__}: {reason} (this should not happen: --debug shows where)", 1


@contextmanager
def quietly() -> Iterator[None]:
    """Keep other libraries' bars, warnings and advice off the screen; enter it before they are imported."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


@contextmanager
def watched(console: Console) -> Iterator["PlainWatcher"]:
    """A watcher on the screen, and nothing else; what takes seconds to import is imported here."""
    with quietly():
        with console.status("starting"):
            from moecl.watch import watcher
        with watcher(console) as watching:
            yield watching
