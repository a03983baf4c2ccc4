"""`moecl serve` over HTTP against direct engine calls: rows a second, p50 and p99 by clients and by tasks.

The server is a process of its own on loopback; a client sends its next row when the last one is answered, and direct
calls take as many rows at once as there are clients. Then twice the load that it bears, and a long load while the store
changes every few seconds: what is refused, what is lost, how memory grows.
"""

import argparse
import asyncio
import os
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from statistics import median, quantiles
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import psutil

from measure import Report, Side, add_base, alternate, counts, over, parser, positive, run, say, start
from moecl import Engine, MoECL, MoECLConfig, Store
from moecl.nn.forms import to_tensors
from moecl.store import TaskRecord
from sides import labelled, stir_parts

TARGETS = {
    "throughput_vs_engine": {">=": 0.7},
    "overload_p99_vs_full": {"<=": 1.5},
    "lost": {"<=": 0.0},
    "memory_growth": {"<=": 1.05},
}
WORDS = [
    *"abcdefgh",
    "food",
    "film",
    "service",
    "price",
    "story",
    "night",
    "crew",
    "rain",
    "late",
    "early",
    "sold",
    "won",
]
FULL = 64  # rows that the overloaded server takes
EXPERTS = "256MB"  # that the server under reloads keeps in memory


def name_of(number: int) -> str:
    return f"task{number}"


def text(draw: random.Random) -> str:
    return " ".join(draw.choices(WORDS, k=draw.randint(20, 40)))


def make_store(folder: Path, base: str, tasks: int, layers: int) -> Path:
    model = MoECL.attach(base, MoECLConfig(adapt_layers=layers))
    for number in range(tasks):
        model.add_task(labelled(name_of(number)))
        stir_parts(model.bank[name_of(number)].parts, number)
    model.finish_task()
    model.save_pretrained(folder)
    return folder


class Server:
    """A process that serves a store."""

    def __init__(self, process: "subprocess.Popen[str]", url: str) -> None:
        self.process, self.url = process, url

    def resident(self) -> int:
        return int(psutil.Process(self.process.pid).memory_info().rss)  # type: ignore[no-untyped-call]


@contextmanager
def serving(store: Path, threads: int | None, *options: str) -> Iterator[Server]:
    words = [sys.executable, "-W", "ignore", "-m", "moecl", "serve", str(store), "--port", "0", *options]
    more = {} if threads is None else {"OMP_NUM_THREADS": str(threads)}
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env={**os.environ, **more}) as process:
        assert process.stderr is not None
        try:
            first = process.stderr.readline()
            if not first.startswith("serving "):
                raise OSError(f"the server does not start: {first.strip()}")
            threading.Thread(target=process.stderr.read, daemon=True).start()  # a full pipe would stop it
            yield Server(process, first.split(" at ")[1].split(";")[0])
        finally:
            process.terminate()


class Load:
    """What clients saw: statuses, seconds of the answers that were given, answers of two versions."""

    def __init__(self) -> None:
        self.statuses: Counter[int] = Counter()
        self.seconds: list[float] = []
        self.mixed = 0

    def take(self, answer: httpx.Response, seconds: float) -> None:
        self.statuses[answer.status_code] += 1
        if answer.status_code == 200:
            self.seconds.append(seconds)
            self.mixed += len({(one["task"], one["version"]) for one in answer.json()["data"]}) > 1

    def lost(self) -> float:
        """The share of requests that were neither answered nor refused in order."""
        return 1 - (self.statuses[200] - self.mixed + self.statuses[429]) / max(1, self.statuses.total())

    def latency(self) -> dict[str, float]:
        ranked = quantiles(self.seconds, n=100, method="inclusive") if len(self.seconds) > 1 else self.seconds * 99
        return {"p50": median(self.seconds), "p99": ranked[98], "answered": len(self.seconds)}


def body(draw: random.Random, tasks: int, rows: int = 1) -> dict[str, Any]:
    return {"model": name_of(draw.randrange(tasks)), "input": [text(draw) for _ in range(rows)]}


def closed(url: str, clients: int, tasks: int, requests: int, load: Load) -> None:
    """`clients` that share `requests`, each with one under way."""

    def client(number: int) -> None:
        draw = random.Random(number)
        with httpx.Client(base_url=url, timeout=120) as line:
            for _ in range(requests // clients):
                send(line, body(draw, tasks), load)

    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(client, range(clients)))


def send(line: httpx.Client, asked: Mapping[str, Any], load: Load) -> None:
    begun = time.perf_counter()
    load.take(line.post("/v1/classify", json=asked), time.perf_counter() - begun)


def direct(engine: Engine, clients: int, tasks: int, requests: int) -> None:
    draw = random.Random(0)
    for _ in range(requests // clients):
        names = [name_of(draw.randrange(tasks)) for _ in range(clients)]
        engine.predict([text(draw) for _ in names], names)


def rate_of(
    report: Report, engine: Engine, server: Server, tasks: int, clients: int, options: argparse.Namespace
) -> float:
    """Rows a second of the server."""
    say(f"{tasks} tasks, {clients} clients")
    requests, load = max(options.requests // clients, 2) * clients, Load()
    sides: dict[str, Side] = {
        "engine": lambda: direct(engine, clients, tasks, requests),
        "server": lambda: closed(server.url, clients, tasks, requests, load),
    }
    times = alternate(sides, options.rounds)
    report.ratio(f"throughput_vs_engine_{clients}_{tasks}", over(times["engine"], times["server"]))
    report.rates(f"rows_a_second_{clients}_{tasks}", times, requests)
    report.figures[f"seconds_{clients}_{tasks}"] = load.latency()
    return float(requests / median(times["server"]))


def measure_throughput(report: Report, stores: Mapping[int, Path], options: argparse.Namespace) -> float:
    """The most rows a second that the server gave."""
    best = 0.0
    for tasks, store in stores.items():
        engine = Engine(MoECL.from_pretrained(store))
        with serving(store, options.threads) as server:
            rates = [rate_of(report, engine, server, tasks, clients, options) for clients in options.clients]
            best = max(best, *rates)
    most = max(options.clients)
    report.worst("throughput_vs_engine", [f"throughput_vs_engine_{most}_{tasks}" for tasks in stores])
    return best


async def opened(url: str, tasks: int, rate: float, seconds: float, load: Load) -> None:
    """A request every 1 / rate seconds, whether or not the last ones are answered."""
    draw, sent = random.Random(0), []
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as line:

        async def one(asked: Mapping[str, Any]) -> None:
            begun = time.perf_counter()
            answer = await line.post("/v1/classify", json=asked)
            load.take(answer, time.perf_counter() - begun)

        begun = time.perf_counter()
        for number in range(int(rate * seconds)):
            await asyncio.sleep(begun + number / rate - time.perf_counter())
            sent.append(asyncio.create_task(one(body(draw, tasks))))
        await asyncio.gather(*sent)


def measure_overload(report: Report, store: Path, tasks: int, rate: float, options: argparse.Namespace) -> None:
    """Twice what it bears: refused is what is too much, and what is taken waits no longer than in a full server."""
    full, over_full = Load(), Load()
    with serving(store, options.threads, "--queue", str(FULL)) as server:
        say(f"{FULL} clients, then {2 * rate:.0f} rows a second for {options.seconds} s")
        closed(server.url, FULL, tasks, int(rate * options.seconds) // FULL * FULL or FULL, full)
        asyncio.run(opened(server.url, tasks, 2 * rate, options.seconds, over_full))
    report.ratio("overload_p99_vs_full", [over_full.latency()["p99"] / full.latency()["p99"]])
    report.figures["full_seconds"], report.figures["overload_seconds"] = full.latency(), over_full.latency()
    report.figures["overload_statuses"] = {str(status): count for status, count in over_full.statuses.items()}


def versions(store: Path) -> Iterator[int]:
    """Two versions of the first task in turn, each a change of the store."""
    model, written = MoECL.from_pretrained(store), Store.open(store)
    record = written.record(name_of(0))
    both = [{key: dict(value) for key, value in to_tensors(model.bank[name_of(0)].parts).items()} for _ in range(2)]
    both[1]["task"] = {name: tensor.clone().mul_(0.5) for name, tensor in both[1]["task"].items()}
    while True:
        for parts in both[::-1]:
            written.commit([(TaskRecord(task=record.task, form=record.form, settings=record.settings), parts)])
            yield written.record(name_of(0)).version


def measure_reloads(report: Report, store: Path, tasks: int, options: argparse.Namespace) -> None:
    """Memory when a tenth of the time has passed, against that at the end."""
    load, stop = Load(), threading.Event()

    def client(number: int, url: str) -> None:
        draw = random.Random(number)
        with httpx.Client(base_url=url, timeout=120) as line:
            while not stop.is_set():
                asked = body(draw, tasks, rows=3)
                send(line, asked if draw.random() < 0.5 else {**asked, "model": name_of(0)}, load)

    with serving(store, options.threads, "--expert-memory", EXPERTS) as server, ThreadPoolExecutor(8) as pool:
        sent = [pool.submit(client, number, server.url) for number in range(8)]
        begun, changes, resident = time.monotonic(), 0, []
        for changes, _ in enumerate(versions(store), 1):
            time.sleep(options.every)
            resident.append(server.resident())
            say(f"reload {changes}: {load.statuses.total()} requests, {resident[-1] >> 20} MB")
            if time.monotonic() - begun > 60 * options.minutes:
                break
        stop.set()
        for one in sent:
            one.result()
    report.ratio("lost", [load.lost()])
    report.ratio("memory_growth", [resident[-1] / resident[len(resident) // 10]])
    report.figures["reloads"] = changes
    report.figures["reload_seconds"] = load.latency()
    report.figures["resident_bytes"] = resident


def main(argv: Sequence[str] | None = None) -> None:
    options = arguments().parse_args(argv)
    start(options)
    report = Report("serve", TARGETS)
    with TemporaryDirectory(dir=options.scratch) as scratch:
        stores = {}
        for tasks in sorted(options.tasks):
            say(f"making a store of {tasks} tasks")
            stores[tasks] = make_store(Path(scratch) / f"store{tasks}", options.base, tasks, options.layers)
        rate = measure_throughput(report, stores, options)
        most = max(stores)
        measure_overload(report, stores[most], most, rate, options)
        measure_reloads(report, stores[most], most, options)
    report.close(options)


def arguments() -> argparse.ArgumentParser:
    made = parser(__doc__ or "", rounds=3)
    add_base(made)
    made.add_argument("--clients", type=counts, default=[1, 8, 32], metavar="N,N", help="clients at once (1,8,32)")
    made.add_argument("--tasks", type=counts, default=[1, 50], metavar="N,N", help="numbers of tasks (1,50)")
    made.add_argument("--layers", type=positive, default=8, help="adapted layers of the base (%(default)s)")
    made.add_argument("--requests", type=positive, default=256, help="of a round (%(default)s)")
    made.add_argument("--seconds", type=positive, default=30, help="of overload (%(default)s)")
    made.add_argument("--minutes", type=float, default=10.0, help="of load with reloads (%(default)s)")
    made.add_argument("--every", type=float, default=10.0, help="seconds between reloads (%(default)s)")
    made.add_argument("--scratch", type=Path, metavar="DIR", help="where to write stores, 1 GB (the system's)")
    return made


if __name__ == "__main__":
    run(main)
