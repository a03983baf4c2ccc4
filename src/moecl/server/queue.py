"""The one thread that runs the model: rows of all requests and tasks share its batches."""

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from moecl.engine import Engine, GateUse
from moecl.generation import Decoder, Piece, Writing
from moecl.request import Prediction, Request
from moecl.server.metrics import Metrics

ROWS = 64  # that are read at once: more would make the texts under way wait
ALONE = 8  # of those that run one by one
RETRY_AFTER = (1, 30)  # seconds
LATELY = 32  # texts, of whose rate the later half counts as much as all before


Answer = tuple[Prediction, dict[int, float] | None]


class Job:
    """What a request wants of the model. Made on an event loop, told there what came out, unless it was cancelled."""

    rows = 1

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.told: asyncio.Queue[Any] = asyncio.Queue()
        self.cancelled = self.ended = False
        self.begun = time.monotonic()

    def tell(self, what: Any) -> None:
        """From the model's thread."""
        self.ended = not isinstance(what, Piece)  # before anybody can hear of it
        try:
            self.loop.call_soon_threadsafe(self.told.put_nowait, what)
        except RuntimeError:  # the loop is closed: nobody waits
            self.cancelled = True

    async def answer(self) -> Any:
        """The next thing that was told. Raises it where it is an error."""
        found = await self.told.get()
        if isinstance(found, Exception):
            raise found
        return found

    async def last(self) -> Any:
        """What all ends with."""
        while isinstance(found := await self.answer(), Piece):
            pass
        return found


class Reading(Job):
    """Rows that are answered in one step; `gates`: each alone, with the gates' use."""

    def __init__(self, requests: Sequence[Request], gates: bool) -> None:
        super().__init__()
        self.requests, self.gates, self.rows = requests, gates, len(requests)

    def run(self, engine: Engine) -> list[Answer]:
        if not self.gates:
            return [(found, None) for found in engine.answer(self.requests)]
        answers: list[Answer] = []
        for request in self.requests:
            use = GateUse()
            [found] = engine.watched(use).answer([request])
            answers.append((found, use.means()))
        return answers


class Routing(Job):
    """Texts whose task is asked for."""

    def __init__(self, route: Callable[[Sequence[str]], list[Any]], texts: Sequence[str]) -> None:
        super().__init__()
        self.route, self.texts, self.rows = route, texts, len(texts)

    def run(self, engine: Engine) -> list[Any]:
        return self.route(self.texts)


class Text(Job):
    """A text that is written: told in pieces, at last its Completion."""

    def __init__(self, writing: Writing) -> None:
        super().__init__()
        self.writing = writing

    def moved(self) -> None:
        if news := self.writing.news():
            self.tell(news)
        if self.writing.reason is not None:
            self.tell(self.writing.completion())


class Worker:
    """Takes jobs in the order in which they came: answers what is read at once, and steps the texts in between."""

    def __init__(self, engine: Engine, wait: float, metrics: Metrics) -> None:
        """`wait`: seconds that a job waits for others where nothing is under way."""
        self.engine, self.wait, self.metrics = engine, wait, metrics
        self.decoder: Decoder = engine.decoder()
        self.rate = 1.0  # rows read a second, lately
        self._texts_done = self._texts_took = 1.0  # texts written to their end, and the seconds of that, lately
        self._reads: deque[Reading | Routing] = deque()
        self._texts: deque[Text] = deque()
        self._writing: dict[int, Text] = {}
        self._running: list[Job] = []
        self._news = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._work, name="model", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and not self._stopping

    @property
    def abandoned(self) -> int:
        """Rows that the thread is at though nobody waits for them any more."""
        return sum(job.rows for job in self._running if job.cancelled and not job.ended)

    def submit(self, job: Job) -> None:
        with self._news:
            (self._texts if isinstance(job, Text) else self._reads).append(job)  # type: ignore[arg-type]
            self._news.notify()

    def stop(self, timeout: float) -> None:
        """Finish what was taken, then end."""
        with self._news:
            self._stopping = True
            self._news.notify()
        self._thread.join(timeout)

    def retry_after(self, rows: int) -> int:
        """Seconds until so many rows are done, those among them that are texts at the rate at which texts end."""
        texts = min(rows, len(self._texts) + len(self._writing))
        seconds = (rows - texts) / self.rate + texts * self._texts_took / self._texts_done
        low, high = RETRY_AFTER
        return max(low, min(high, round(seconds)))

    # On the model's thread

    def _work(self) -> None:
        while (taken := self._take()) is not None:
            reads, texts = taken
            self._running = [*reads, *texts]
            started = read = time.monotonic()
            try:
                self._read(reads)
                read = time.monotonic()
                self._join(texts)
                self._step()
            except Exception as error:  # a thread that ended would leave every later request waiting
                self._fail(error, self._running)
            self._running = []
            if rows := sum(job.rows for job in reads):
                self.rate += 0.1 * (rows / max(1e-4, read - started) - self.rate)
            self._texts_took += time.monotonic() - read
            if self._texts_done > LATELY:
                self._texts_done, self._texts_took = self._texts_done / 2, self._texts_took / 2

    def _fail(self, error: Exception, jobs: Sequence[Job]) -> None:
        """Tell all that is under way, and write from now on with a new decoder."""
        for job in (*jobs, *self._writing.values()):
            job.tell(error)
        self._writing.clear()
        self.decoder = self.engine.decoder()

    def _take(self) -> tuple[list[Reading | Routing], list[Text]] | None:
        """What to do next: jobs that fit, none where texts alone are under way; None at the end."""
        with self._news:
            while not (self._reads or self._texts or self._writing):
                if self._stopping:
                    return None
                self._news.wait()
            if not self._writing:
                self._gather()
            for jobs in (self._reads, self._texts):
                while jobs and jobs[0].cancelled:
                    jobs.popleft()
            reads: list[Reading | Routing] = []
            while self._reads and (not reads or sum(job.rows for job in reads) + self._reads[0].rows <= ROWS):
                job = self._reads.popleft()
                if not job.cancelled:
                    reads.append(job)
            texts: list[Text] = []
            while self._texts and self.decoder.has_room([job.writing for job in (*texts, self._texts[0])]):
                text = self._texts.popleft()
                if not text.cancelled:
                    texts.append(text)
            return reads, texts

    def _gather(self) -> None:
        """Wait a little for rows to share the batch with the first one, as long as more could share it."""
        first = min(jobs[0].begun for jobs in (self._reads, self._texts) if jobs)
        while (left := first + self.wait - time.monotonic()) > 0 and not self._stopping:
            if sum(job.rows for job in (*self._reads, *self._texts)) >= ROWS:
                return
            self._news.wait(left)

    def _read(self, jobs: list[Reading | Routing]) -> None:
        together = [job for job in jobs if isinstance(job, Reading) and not job.gates]
        alone: list[Reading | Routing] = [job for job in jobs if job not in together]
        if together:
            self.metrics.batch.labels("read").observe(sum(job.rows for job in together))
            try:
                found = iter(self.engine.answer([request for job in together for request in job.requests]))
                for job in together:
                    job.tell([(next(found), None) for _ in job.requests])
            except Exception as error:
                if len(together) == 1:
                    together[0].tell(error)
                else:  # whose fault it was
                    alone = [*together, *alone]
        for one in alone:
            if one.cancelled:
                continue
            try:
                one.tell(one.run(self.engine))
            except Exception as error:
                one.tell(error)

    def _join(self, texts: list[Text]) -> None:
        if not texts:
            return
        before = self.engine.kv_tokens_reused
        try:
            self.decoder.join([job.writing for job in texts])
        except Exception as error:
            if len(texts) == 1:
                texts[0].tell(error)
            else:
                for job in texts:
                    self._join([job])
            return
        self.metrics.reused.inc(self.engine.kv_tokens_reused - before)
        for job in texts:
            self._writing[id(job.writing)] = job
        self._moved(texts)

    def _step(self) -> None:
        for job in [job for job in self._writing.values() if job.cancelled]:
            self.decoder.leave(job.writing)
            del self._writing[id(job.writing)]
        if not self._writing:
            return
        self.metrics.batch.labels("write").observe(len(self._writing))
        self._moved([self._writing[id(row)] for row in self.decoder.step()])

    def _moved(self, texts: Sequence[Text]) -> None:
        for job in texts:
            job.moved()
            if job.writing.reason is not None:
                del self._writing[id(job.writing)]
                self._texts_done += 1
