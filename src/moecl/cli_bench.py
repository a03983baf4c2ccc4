"""`moecl bench`: what its words mean, and what it prints."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from moecl.cli_options import AsJson
from moecl.errors import ConfigError
from moecl.terminal import Command, quietly

if TYPE_CHECKING:
    from moecl.bench import Bench
    from moecl.bench_cells import Pool
    from moecl.bench_config import BenchConfig

out, err = Console(), Console(stderr=True)

EPILOG = """\
moecl bench bench.yaml -o out --jobs 2
moecl bench bench.yaml -o out --dry-run
moecl bench bench.yaml -o out --methods moe-cl,ewc --orders order1 --seeds 0
moecl bench bench.yaml -o /shared/out --ray auto"""


class BenchCommand(Command):
    """Its help ends with every key of a bench file, from the settings' own descriptions."""

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        from moecl.bench_config import describe_bench

        super().format_epilog(ctx, formatter)
        rows = [(f"{key} <{kind}>", f"{text} [default: {default}]") for key, kind, default, text in describe_bench()]
        with formatter.section("Keys of a bench file"):
            formatter.write_dl(rows)


def bench(
    file: Annotated[Path, typer.Argument(metavar="BENCH", help="A bench file; its keys are below.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="OUT", help="The bench's folder; default runs/BENCH. See --ray."),
    ] = None,
    jobs: Annotated[
        int | None, typer.Option("--jobs", metavar="N", min=1, help="Cells at once; default 1, with --ray one a node.")
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(
            "--ray",
            metavar="ADDRESS",
            help="Run the cells on a Ray cluster (moecl[ray]): its address, auto, or local. OUT, the data and the base "
            "must be on storage that all its workers see under the same path.",
        ),
    ] = None,
    only: Annotated[
        str | None, typer.Option("--only", metavar="REGEX", help="Only cells with it in METHOD.ORDER.sSEED.")
    ] = None,
    methods: Annotated[list[str] | None, typer.Option("--methods", metavar="A,B", help="Only these methods.")] = None,
    orders: Annotated[list[str] | None, typer.Option("--orders", metavar="A,B", help="Only these orders.")] = None,
    seeds: Annotated[list[str] | None, typer.Option("--seeds", metavar="0,1", help="Only these seeds.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the cells and how far they are, and stop.")] = False,
    as_json: AsJson = False,
) -> int:
    """Compare methods: each on each order with each seed.

    A cell is a run folder in OUT/cells. Started again with the same command, a bench goes on where it was stopped: a
    finished cell is never run again, a failed one is tried again. OUT/bench.json tells the state of all cells.
    The exit status is 1 where a cell failed; the others are run all the same.
    """
    from moecl.bench import Selection

    selection = Selection(only, listed(methods), listed(orders), [a_seed(seed) for seed in listed(seeds)])
    folder = output or Path("runs") / file.stem
    with quietly():
        found = planned(file, folder, selection, jobs) if dry_run else run(file, folder, selection, jobs, ray)
    if as_json:
        print(json.dumps(found.as_record(), ensure_ascii=False))
    else:
        from moecl.show_bench import show_bench

        show_bench(out, found)
    return int(bool(found.failed()) and not dry_run)


def listed(words: list[str] | None) -> list[str]:
    """With commas, or the option given once more."""
    return [word.strip() for word in ",".join(words or ()).split(",") if word.strip()]


def a_seed(word: str) -> int:
    if not word.isdecimal():
        raise ConfigError(f"--seeds: {word!r} is no seed; give whole numbers, such as 0,1")
    return int(word)


def planned(file: Path, folder: Path, selection: Any, jobs: int | None) -> "Bench":
    from moecl.bench import Bench

    slots = jobs or 1
    return Bench(bench_of(file), folder, selection, threads(os.cpu_count() or 1, slots), slots)


def bench_of(file: Path) -> "BenchConfig":
    from moecl.bench_config import load_bench
    from moecl.show import say

    config = load_bench(file)
    if unused := config.unused_settings():
        say(err, f"{Path(config.stream).name}: method: {unused} is not used in a bench; put method.* under `set`")
    return config


def threads(cores: int, slots: int) -> int:
    """Of a cell: OMP_NUM_THREADS where it is set, as for `train`, else its part of the cores."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return int(asked) if asked.isdecimal() and int(asked) else max(1, cores // slots)


def run(file: Path, folder: Path, selection: Any, jobs: int | None, ray: str | None) -> "Bench":
    from moecl.bench import Bench
    from moecl.show_bench import bench_watcher

    config = bench_of(file)
    with err.status("starting"):
        pool = pool_for(jobs, ray)
    found = Bench(config, folder, selection, threads(pool.cores, pool.slots), pool.slots)
    with bench_watcher(err) as watcher:
        found.run(pool, watcher)
    return found


def pool_for(jobs: int | None, ray: str | None) -> "Pool":
    if ray is None:
        from moecl.bench_cells import Processes

        return Processes(jobs or 1)
    from moecl.bench_ray import Cluster

    return Cluster(ray, jobs)
