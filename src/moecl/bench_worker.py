"""One cell's worker: learns its stream and tells how far it is. It ends when the bench does."""

import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from moecl._atomic import atomic_write
from moecl.bench_cells import Work
from moecl.config import StreamConfig
from moecl.errors import MoECLError
from moecl.train import ContinualTrainer, Watcher

EVERY = 0.5  # seconds between two words on how far a cell is


class News(Watcher):
    """Tells how far a cell is, in a small file that the bench reads."""

    def __init__(self, path: Path) -> None:
        self.path, self.said = path, 0.0

    def note(self, message: str) -> None:
        print(message, flush=True)

    def training(self, task: str, step: int, steps: int, figures: Mapping[str, float]) -> None:
        self.tell(task=task, doing=f"learning {task}", step=step, steps=steps)

    def evaluating(self, after: int, task: str, done: int, total: int) -> None:
        self.tell(doing=f"testing {task}", step=done + 1, steps=total)

    def row(self, after: int, tasks: Sequence[str], scores: Sequence[float | None]) -> None:
        print(f"after {after} tasks: {list(scores)}", flush=True)

    def tell(self, **news: Any) -> None:
        if time.monotonic() - self.said > EVERY:
            atomic_write(self.path, json.dumps(news).encode())
            self.said = time.monotonic()


def do(work: Work) -> None:
    """Learn the cell's stream, or go on with it; how that ended is its last news."""
    news = Path(work.news)
    try:
        ContinualTrainer(StreamConfig.model_validate(work.stream), work.folder, News(news)).run()
        last: dict[str, str | None] = {"reason": None}
    except Exception as error:
        traceback.print_exc()
        last = {"reason": reason(error, work.log), "kind": type(error).__name__}
    atomic_write(news, json.dumps(last).encode())


def reason(error: Exception, log: str) -> str:
    """One line."""
    if isinstance(error, MoECLError):
        return str(error)
    message = " ".join(str(error).split())[:200] or "no message"
    return f"{type(error).__name__}: {message} (more in {log})"


def leave_with(bench: IO[bytes]) -> None:
    """The pipe from the bench ends when the bench does, however it does."""
    bench.read()
    os._exit(1)


def main() -> None:
    work = Work(**json.loads(sys.stdin.buffer.readline()))
    threading.Thread(target=leave_with, args=(sys.stdin.buffer,), daemon=True).start()
    do(work)
    sys.stdout.flush()
    os._exit(0)  # the thread above holds stdin, which an ordinary exit would wait for


if __name__ == "__main__":
    main()
