"""Where a bench's cells run: each in a process of its own, so that memory is returned and a crash contained."""

import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

LOST = "its process ended without a word (status {status}); {log} may tell why"
KILLED = (
    "its process was killed (signal {signal}); where memory ran out, use fewer --jobs or a smaller train.batch_size"
)


@dataclass(frozen=True)
class Work:
    """What a worker is given, all plain data: the stream, the run folder, the files for its news and its prints."""

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


def read_news(path: str | Path) -> dict[str, Any]:
    """What a cell told last; nothing where it has not yet."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


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
                [sys.executable, "-m", "moecl.bench_worker"],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                bufsize=0,
                start_new_session=True,
                env={**os.environ, "OMP_NUM_THREADS": str(work.threads), "TOKENIZERS_PARALLELISM": "false"},
            )
        self.running[id] = process, work
        assert process.stdin is not None
        with suppress(BrokenPipeError):  # one that is gone already is found so
            process.stdin.write(json.dumps(asdict(work)).encode() + b"\n")

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
