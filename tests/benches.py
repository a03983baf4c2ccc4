"""Tiny benches, and a place to run their cells that costs no process."""

from pathlib import Path
from typing import Any

import yaml

from moecl.bench import Bench, BenchWatcher, Selection
from moecl.bench_cells import Ended, Work, how_it_ended
from moecl.bench_config import BenchConfig, load_bench
from moecl.bench_worker import do
from tiny_stream import write_stream

QUICK = {"epochs": 1, "save_steps": 100, "threads": 1}


def write_bench(folder: Path, base: Path, tasks: int = 2, rows: int = 16, **keys: Any) -> Path:
    """A bench file beside its stream file; `keys` are those of the bench."""
    write_stream(folder, base, tasks, rows=rows, train=QUICK)
    path = folder / "bench.yaml"
    path.write_text(yaml.safe_dump({"stream": "stream.yaml", "methods": ["moe-cl"], **keys}, sort_keys=False))
    return path


def tiny_bench(folder: Path, base: Path, **keys: Any) -> BenchConfig:
    return load_bench(write_bench(folder, base, **keys))


class Here:
    """Cells one after another in this process."""

    slots, cores = 1, 1

    def __init__(self) -> None:
        self.did: list[str] = []
        self.over: list[Ended] = []

    def start(self, id: str, work: Work) -> None:
        self.did.append(id)
        do(work)
        self.over.append(how_it_ended(id, work, 0))

    def ended(self, seconds: float) -> list[Ended]:
        over, self.over = self.over, []
        return over

    def stop(self) -> None:
        pass


def run_here(
    config: BenchConfig, out: Path, watcher: BenchWatcher | None = None, **selection: Any
) -> tuple[Bench, Here]:
    """Plan and run; the bench, and what was run for it."""
    bench, pool = Bench(config, out, Selection(**selection)), Here()
    bench.run(pool, watcher or BenchWatcher())
    return bench, pool
