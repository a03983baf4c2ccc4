"""`moecl serve`: parse, call, print."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from moecl._sizes import parse_size
from moecl.cli_options import Device, ExpertMemory, RunOrStore, ThresholdsFile
from moecl.errors import ConfigError

if TYPE_CHECKING:
    from moecl.server.library import Library

EXAMPLES = """moecl serve runs/mine
moecl serve runs/mine --thresholds runs/mine/review/thresholds.json
moecl serve runs/mine --host 0.0.0.0 --api-key keys.txt"""

err = Console(stderr=True)


def serve(
    run: RunOrStore,
    host: Annotated[
        str, typer.Option("--host", metavar="HOST", help="Any other than loopback needs keys.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", metavar="PORT", help="0 takes any free one.")] = 8000,
    api_key: Annotated[
        Path | None, typer.Option("--api-key", metavar="FILE", help="Keys, one a line; also from MOECL_API_KEYS.")
    ] = None,
    thresholds: ThresholdsFile = None,
    cors: Annotated[
        list[str] | None,
        typer.Option(
            "--cors", metavar="ORIGIN", help="Let pages of this origin ask, as https://a.example; repeatable."
        ),
    ] = None,
    device: Device = "auto",
    expert_memory: ExpertMemory = "2GB",
    kv_memory: Annotated[
        str,
        typer.Option(
            "--kv-memory", metavar="SIZE", help="Memory for what was read: a next turn reads only what is new; 0 off."
        ),
    ] = "256MiB",
    queue: Annotated[int, typer.Option("--queue", metavar="ROWS", help="Rows under way at once; more get 429.")] = 256,
    wait: Annotated[float, typer.Option("--wait", metavar="MS", help="How long a row waits for others.")] = 3.0,
    timeout: Annotated[float, typer.Option("--timeout", metavar="S", help="What a request may take.")] = 60.0,
    max_body: Annotated[str, typer.Option("--max-body", metavar="SIZE", help="The largest request.")] = "1MB",
    max_tokens: Annotated[int, typer.Option("--max-tokens", metavar="N", help="The longest text written.")] = 1024,
    reload: Annotated[
        float, typer.Option("--reload", metavar="S", help="Look every so often whether the store changed; 0 never.")
    ] = 1.0,
    log_texts: Annotated[bool, typer.Option("--log-texts", help="Put the texts of requests into the log.")] = False,
) -> None:
    """Serve a run over HTTP: OpenAI's API, and a page.

    A task is a model. /v1/chat/completions, /v1/completions and /v1/models are for OpenAI's clients, /v1/classify
    gives labels with scores, /openapi.json describes all. The log is JSON lines on standard error.
    """
    from moecl.server.auth import read_keys
    from moecl.server.settings import Settings
    from moecl.using import open_store, served_levels

    settings = Settings(
        run=run,
        host=host,
        port=port,
        keys=read_keys(api_key, os.environ),
        origins=tuple(cors or ()),
        thresholds=thresholds,
        device=device,
        expert_memory=expert_memory,
        kv_memory=parse_size(kv_memory, "--kv-memory", zero=True),
        queue=queue,
        wait_ms=wait,
        timeout=timeout,
        body_bytes=parse_size(max_body, "--max-body"),
        max_tokens=max_tokens,
        reload_seconds=reload,
        log_texts=log_texts,
    )
    store = open_store(run)  # what is wrong is told before the seconds that the model takes
    if thresholds is not None:
        served_levels(store, thresholds)
    try:
        from moecl.server.serve import serve as serve_run
    except ModuleNotFoundError as error:
        raise ConfigError(f"moecl serve needs {error.name}; pip install 'moecl[serve]'") from error
    serve_run(settings, ready)


def ready(address: str, library: "Library") -> None:
    from moecl.show import say

    names = ", ".join(library.now.names) or "no task yet"
    say(err, f"serving {names} at {address}; Ctrl-C stops")
