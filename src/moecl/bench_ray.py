"""Cells as tasks of a Ray cluster."""

import os
from dataclasses import asdict
from importlib import import_module
from typing import Any

from moecl.bench_cells import Ended, Work, how_it_ended
from moecl.errors import ConfigError


class Cluster:
    """Runs cells on the Ray cluster at `address` ("local": a new one on this machine), `jobs` at once or one a node.

    Raises ConfigError where Ray is not installed or the cluster cannot be reached.
    """

    def __init__(self, address: str, jobs: int | None = None) -> None:
        try:
            ray: Any = import_module("ray")
        except ImportError:
            raise ConfigError("--ray: Ray is not installed; pip install 'moecl[ray]'") from None
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # its own default to come, and no warning
        dashboard = {"include_dashboard": False} if address == "local" else {}
        try:
            ray.init(address=address, log_to_driver=False, logging_level="ERROR", **dashboard)
        except (ConnectionError, RuntimeError, ValueError) as error:
            message = " ".join(str(error).split())[:200]
            raise ConfigError(f"--ray {address}: {message}; give the address of a running cluster, or local") from None
        self.ray = ray
        has = ray.cluster_resources()
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        self.slots = jobs or len(nodes)
        self.widest = int(max(node.get("CPU", 1) for node in nodes))  # a cell runs on one node, or waits forever
        self.cores = min(int(has.get("CPU", 1)), self.widest * self.slots)
        self.gpus = min(1.0, has.get("GPU", 0.0) / self.slots)  # without a share Ray hides the GPUs from a task
        self.running: dict[Any, tuple[str, Work]] = {}

    def start(self, id: str, work: Work) -> None:
        # A worker of its own for each, which ends with it; the bench itself decides what is tried again.
        options = {"num_cpus": min(work.threads, self.widest), "num_gpus": self.gpus, "max_calls": 1, "max_retries": 0}
        # The workers have working directories of their own.
        given = asdict(work) | {key: os.path.abspath(getattr(work, key)) for key in ("folder", "news", "log")}
        self.running[self.ray.remote(**options)(do).remote(given)] = id, work

    def ended(self, seconds: float) -> list[Ended]:
        over, _ = self.ray.wait([*self.running], num_returns=1, timeout=seconds)
        return [self._take(reference) for reference in over]

    def _take(self, reference: Any) -> Ended:
        id, work = self.running.pop(reference)
        try:
            self.ray.get(reference)
        except self.ray.exceptions.RayError as error:
            return Ended(id, f"Ray: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
        return how_it_ended(id, work, 0)

    def stop(self) -> None:
        for reference in self.running:
            self.ray.cancel(reference, force=True)
        self.running.clear()
        self.ray.shutdown()


def do(work: dict[str, Any]) -> None:
    """In a worker of the cluster: the cell, its prints in its log."""
    log = os.open(work["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    for stream in (1, 2):
        os.dup2(log, stream)
    from moecl.bench_worker import do as do_cell

    do_cell(Work(**work))
