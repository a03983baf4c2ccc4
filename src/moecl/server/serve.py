"""The process: from a run folder to its end."""

import logging
import os
import socket
import sys
from collections.abc import Callable

import uvicorn

from moecl.errors import RunError
from moecl.server.app import create_app
from moecl.server.guard import JsonLines
from moecl.server.library import Library
from moecl.server.memory import keep_few_kernels
from moecl.server.settings import Settings


def serve(settings: Settings, ready: Callable[[str, Library], None]) -> None:
    """Serve until a signal; `ready` is told the address. Raises MoECLError before anything is served.

    SIGTERM or SIGINT ends it: nothing new is taken, what was taken is finished.
    """
    keep_few_kernels()
    listening = bound(settings)
    with listening:
        write_logs()
        library = Library(
            settings.run, settings.device, settings.expert_memory, settings.thresholds, settings.kv_memory
        )
        config = uvicorn.Config(
            create_app(library, settings),
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=settings.stop_seconds,
        )
        host, port = listening.getsockname()[:2]
        ready(f"http://{f'[{host}]' if ':' in host else host}:{port}", library)
        uvicorn.Server(config).run(sockets=[listening])


def bound(settings: Settings) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        found = socket.create_server((settings.host, settings.port), family=family)
    except OSError as error:
        known = error.errno is not None and error.errno > 0  # a host that has no address has other numbers
        reason = os.strerror(error.errno) if known and error.errno else error.strerror
        raise RunError(f"--port {settings.port}: {settings.host}: {reason}; give another --port, or --host") from error
    # asyncio turns Nagle's algorithm off (which costs an answer 40 ms) only where the protocol is named
    return socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP, fileno=found.detach())


def write_logs() -> None:
    """JSON lines on standard error; uvicorn's only where something is wrong."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    for name, level in (("moecl.server", logging.INFO), ("uvicorn", logging.ERROR)):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)
