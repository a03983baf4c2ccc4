"""A server over tiny tasks, on loopback, in this process."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
import uvicorn

from moecl.config import MoECLConfig, Task
from moecl.model import MoECL
from moecl.router import Statistics
from moecl.server.app import create_app
from moecl.server.library import Library
from moecl.server.serve import bound
from moecl.server.settings import Settings
from tiny import HIDDEN

TASKS = {
    "mood": Task(name="mood", kind="classification", labels={"good": "fine", "bad": "sad"}),
    "topic": Task(name="topic", kind="classification", labels={"w": "World news", "s": "Sports", "b": "Business"}),
    "head": Task(name="head", kind="classification", labels={"p": "fine", "q": "sad"}, head="classifier"),
    "two": Task(
        name="two",
        kind="classification",
        labels={"yes": "yes", "no": "no"},
        instruction="{title}: {text}\nIs it?",
    ),
    "write": Task(name="write", kind="generation", instruction="{prompt}"),
    "told": Task(name="told", kind="generation", instruction="Tell of {prompt}."),
}


def stir(model: MoECL, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.learner.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.3)


def learned(base: Path, names: str = "mood topic head two write told", seed: int = 0) -> MoECL:
    """A model of the tiny base with finished tasks that differ much; other seeds answer otherwise."""
    model = MoECL.attach(str(base), MoECLConfig(rank=2), precision="fp32")
    for place, name in enumerate(names.split()):
        model.add_task(TASKS[name])
        stir(model, 100 * seed + place)
    model.finish_task()
    return model.eval()


def make_store(folder: Path, base: Path, names: str = "mood topic head two write told") -> Path:
    learned(base, names).save_pretrained(folder)
    return folder


def statistics(*references: str, rows: int = 8) -> Statistics:
    """A router's, of texts that were never read."""
    found, draws = Statistics.empty(HIDDEN, 2), np.random.default_rng(0)
    for place, reference in enumerate(references):
        for moments in (found.train, found.held):
            moments.add(reference, (draws.normal(size=(rows, HIDDEN)) + 9 * place).astype(np.float32))
    return found


class Live:
    """A running server."""

    def __init__(self, url: str, app: Any) -> None:
        self.url, self.app = url, app
        self.client = httpx.Client(base_url=url, timeout=60)

    @property
    def service(self) -> Any:
        return self.app.state.service

    def post(self, path: str, **body: Any) -> httpx.Response:
        return self.client.post(path, json=body)

    def classify(self, model: str, texts: Any, **more: Any) -> list[dict[str, Any]]:
        answer = self.post("/v1/classify", model=model, input=texts, **more)
        assert answer.status_code == 200, answer.text
        return answer.json()["data"]


@contextmanager
def live(run: Path, **settings: Any) -> Iterator[Live]:
    asked = Settings(run=run, port=0, device="cpu", **settings)
    library = Library(run, "cpu", "2GB", asked.thresholds, asked.kv_memory)
    with bound(asked) as listening:
        app = create_app(library, asked)
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False, timeout_graceful_shutdown=20))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        found = Live(f"http://127.0.0.1:{listening.getsockname()[1]}", app)
        try:
            assert found.client.get("/readyz").status_code == 200
            yield found
        finally:
            found.client.close()
            server.should_exit = True
            thread.join(30)
            assert not thread.is_alive()
