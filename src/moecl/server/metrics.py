"""Figures for Prometheus. Label values are routes, statuses and the store's tasks: a request adds none."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128)
CONTENT_TYPE = CONTENT_TYPE_LATEST


class Metrics:
    """One server's figures."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        at = self.registry
        self.requests = Counter("moecl_requests", "Requests answered.", ["route", "status"], registry=at)
        self.seconds = Histogram(
            "moecl_request_seconds", "From a request's first byte to its last.", ["route"], buckets=SECONDS, registry=at
        )
        self.rows = Counter("moecl_rows", "Rows answered.", ["task"], registry=at)
        self.tokens = Counter("moecl_tokens", "Tokens read and written.", ["task", "kind"], registry=at)
        self.reused = Counter("moecl_kv_tokens_reused", "Tokens of prompts that were not read again.", registry=at)
        self.batch = Histogram("moecl_batch_rows", "Rows in one forward.", ["kind"], buckets=ROWS, registry=at)
        self.queue = Gauge("moecl_queue_rows", "Rows under way: waiting or being answered.", registry=at)
        self.cancelled = Counter("moecl_cancelled", "Requests whose client left.", registry=at)
        self.reloads = Counter("moecl_reloads", "Changes of the store.", ["outcome"], registry=at)
        self.tasks = Gauge("moecl_tasks", "Tasks served.", registry=at)

    def answered(self, task: str, rows: int, read: int, written: int) -> None:
        self.rows.labels(task).inc(rows)
        self.tokens.labels(task, "read").inc(read)
        self.tokens.labels(task, "written").inc(written)

    def text(self) -> bytes:
        return generate_latest(self.registry)
