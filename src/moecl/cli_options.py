"""Arguments and options that several commands take, each declared once."""

from pathlib import Path
from typing import Annotated

import typer

from moecl._sizes import parse_size
from moecl.errors import ConfigError


def a_size(size: str) -> str:
    parse_size(size, "--expert-memory")
    return size


def some_tokens(tokens: int | None) -> int | None:
    if tokens is not None and tokens < 1:
        raise ConfigError(f"--max-tokens: {tokens} is out of range; give 1 or more tokens")
    return tokens


_RUN = typer.Argument(metavar="RUN", help="A run folder.")
_DEVICE = typer.Option("--device", metavar="DEVICE", help="auto, cpu, cuda, cuda:1, mps ...")

Stream = Annotated[Path, typer.Argument(metavar="STREAM", help="A stream file; `moecl init` writes one.")]
Run = Annotated[Path, _RUN]
MaybeRun = Annotated[Path | None, _RUN]
RunOrStore = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, or a store.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a setting; repeatable.")
]
Device = Annotated[str, _DEVICE]
StreamDevice = Annotated[str | None, _DEVICE]  # None: as the stream says
ExpertMemory = Annotated[
    str,
    typer.Option(
        "--expert-memory",
        metavar="SIZE",
        callback=a_size,
        help="Memory for experts of learned tasks, such as 512MB; others are read from disk when used.",
    ),
]
MaxTokens = Annotated[
    int | None,
    typer.Option(
        "--max-tokens",
        metavar="N",
        callback=some_tokens,
        help="The longest text that a generation task writes; default its max_length.",
    ),
]
ThresholdsFile = Annotated[
    Path | None,
    typer.Option("--thresholds", metavar="FILE", help="thresholds.json of `moecl review`: adds a `decision`."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
