"""One cell in a process of its own: memory is returned, a crash is contained, and it ends when the bench does."""

import json
import os
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Protocol

from moecl._atomic import atomic_write
from moecl.config import StreamConfig
from moecl.errors import MoECLError
from moecl.session import Watcher
from moecl.train import ContinualTrainer

EVERY = 0.5  # seconds between two words on how far a cell is
LOST = "its process ended without a word (status {status}); {log} may tell why"
KILLED = "its process was killed (signal {signal}); where memory ran out, use fewer --jobs or a smaller train.batch_size"


@dataclass(frozen=True)
class Work:
    """What a worker is given, all of it plain data: the stream, the run folder, and files for its news and its prints."""

    stream: dict[str, Any]
    folder: str
    news: str
    log: str
    threads: int


@dataclass(frozen=True)
class Ended:
    """How a cell ended: `reason` is None where it has its result, `kind` the type of the error where there was one."""

    id: str
    reason: str | None = None
    kind: str | None = None


class Pool(Protocol):
    """Where cells run."""

    slots: int
    cores: int

    def start(self, id: str, work: Work) -> None: ...

    def ended(self, seconds: float) -> list[Ended]:
        """Those that ended since the last call, waited for at most so long."""

    def stop(self) -> None:
        """End all that run; what they have learned is kept."""


class News(Watcher):
    """Tells how far a cell is, in a small file that the bench reads."""

    def __init__(self, path: Path) -> None:
        self.path, self.said = path, 0.0

    def note(self, message: str) -> None:
        print(message, flush=True)

    def training(self, task: str, step: int, steps: int, figures: Mapping[str, float]) -> None:
        self.tell(doing=f"learning {task}", step=step, steps=steps)

    def evaluating(self, after: int, task: str, done: int, total: int) -> None:
        self.tell(doing=f"testing {task}", step=done, steps=total)

    def row(self, after: int, tasks: Sequence[str], scores: Sequence[float | None]) -> None:
        print(f"after {after} tasks: {list(scores)}", flush=True)

    def tell(self, **news: Any) -> None:
        if time.monotonic() - self.said > EVERY:
            atomic_write(self.path, json.dumps(news).encode())
            self.said = time.monotonic()


def read_news(path: str | Path) -> dict[str, Any]:
    """What a cell told last; nothing where it has not yet."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def do(work: Work) -> None:
    """Learn the cell's stream, or go on with it; how that ended is its last news."""
    news = Path(work.news)
    try:
        ContinualTrainer(StreamConfig.model_validate(work.stream), work.folder, News(news)).run()
        last = {"reason": None}
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


def how_it_ended(id: str, work: Work, status: int) -> Ended:
    last = read_news(work.news)
    if "reason" in last:
        return Ended(id, last["reason"], last.get("kind"))
    words = KILLED.format(signal=-status) if status < 0 else LOST.format(status=status, log=work.log)
    return Ended(id, words)


class Processes:
    """Cells as processes of this machine."""

    def __init__(self, slots: int) -> None:
        self.slots, self.cores = slots, os.cpu_count() or 1
        self.running: dict[str, tuple[subprocess.Popen[bytes], Work]] = {}

    def start(self, id: str, work: Work) -> None:
        # A session of its own: Ctrl-C is for the bench, which then ends its workers.
        with open(work.log, "ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "moecl.bench_cells"],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env={**os.environ, "OMP_NUM_THREADS": str(work.threads), "TOKENIZERS_PARALLELISM": "false"},
            )
        self.running[id] = process, work
        assert process.stdin is not None
        process.stdin.write(json.dumps(asdict(work)).encode() + b"\n")
        process.stdin.flush()

    def ended(self, seconds: float) -> list[Ended]:
        until = time.monotonic() + seconds
        while True:
            over = [id for id, (process, _) in self.running.items() if process.poll() is not None]
            if over or time.monotonic() > until:
                return [self._take(id) for id in over]
            time.sleep(0.05)

    def _take(self, id: str) -> Ended:
        process, work = self.running.pop(id)
        assert process.stdin is not None
        process.stdin.close()
        return how_it_ended(id, work, process.returncode)

    def stop(self) -> None:
        for process, _ in self.running.values():
            process.kill()
        for id in [*self.running]:
            self.running[id][0].wait()
            self._take(id)


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
