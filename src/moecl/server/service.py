"""From what a request asks to answers: find the task, encode, wait for the model. Knows nothing of HTTP."""

import asyncio
import logging
import math
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from moecl.config import AUTO
from moecl.data.task import Example, template, text_of_any
from moecl.engine import MAX_LENGTH
from moecl.errors import DataError, StoreError
from moecl.generation import Completion, Piece, Sampling
from moecl.request import Prediction, Request, as_example, readable
from moecl.review import REVIEW, decide, rounded
from moecl.router import Route
from moecl.server.library import Library, Snapshot, expert, reads_chats
from moecl.server.metrics import Metrics
from moecl.server.pieces import Pieces
from moecl.server.problems import ApiError, from_ours
from moecl.server.queue import ALONE, ROWS, Answer, Reading, Routing, Text, Worker
from moecl.server.schema import Classified, Message
from moecl.server.settings import Settings
from moecl.store import TaskRecord

log = logging.getLogger("moecl.server")
Row = str | Mapping[str, Any]
Found = TypeVar("Found")
Item = TypeVar("Item")
Asked = Row | Sequence[Message]  # a prompt, or a chat


@dataclass(frozen=True)
class Written:
    """An answer in words: a completion, or a label with every label's share."""

    record: TaskRecord
    text: str
    completion: Completion | None = None
    scores: Mapping[str, float] | None = None
    prompt_tokens: int = 0
    tokens: int = 0


@dataclass(frozen=True)
class Begun:
    """A row on its way."""

    record: TaskRecord
    request: Request
    job: Text | Reading


class Service:
    """Answers requests with what the library has now."""

    def __init__(self, library: Library, settings: Settings, metrics: Metrics) -> None:
        self.library, self.settings, self.metrics = library, settings, metrics
        self.worker = Worker(library.engine, settings.wait_ms / 1000, metrics)
        self.rows = 0  # that are waited for
        metrics.queue.set_function(lambda: self.rows + self.worker.abandoned)
        self._encoding = ThreadPoolExecutor(1, "encode")  # one: a tokenizer is not for several threads at once
        self._looking = asyncio.Lock()
        self._pieces = Pieces(library.engine.tokenizer)
        metrics.tasks.set(len(library.now.store.tasks()))

    # What a request is

    async def classify(self, model: str, rows: Sequence[Row], gates: bool) -> tuple[list[Classified], int]:
        """An answer a row, all by one version of the store; and the tokens that were read."""
        with self._room(len(rows)):
            return await self._again(lambda now: self._classify(now, model, rows, gates))

    async def write(self, model: str, rows: Sequence[Asked], sampling: Sampling) -> list[Written]:
        """A text or a label a row, whole, all by one version of the store."""
        with self._room(len(rows)):
            return await self._again(lambda now: self._write(now, model, rows, sampling))

    async def stream(self, model: str, row: Asked, sampling: Sampling) -> AsyncGenerator[TaskRecord | Piece | Written]:
        """The record first, pieces of the text as they are written, at last the whole."""
        with self._room(1):
            begun, found = await self._again(lambda now: self._first(now, model, row, sampling))
            try:
                yield begun.record
                while isinstance(found, Piece):
                    yield found
                    found = await begun.job.answer()
                written = self._written(begun, found)
                if written.completion is None:
                    yield Piece(written.text)
                yield written
            finally:
                begun.job.cancelled = True

    @contextmanager
    def _room(self, rows: int) -> Iterator[None]:
        """Count rows under way. Raises DataError where they are too many for ever, ApiError where for now."""
        most = self.settings.queue
        if rows > most:
            raise DataError(f"{rows} texts, at most {most} can be asked at once; send fewer")
        if (under_way := self.rows + self.worker.abandoned) + rows > most:
            after = self.worker.retry_after(under_way)
            raise ApiError(429, "too many rows under way; ask again later", code="overloaded", retry_after=after)
        self.rows += rows
        try:
            yield
        finally:
            self.rows -= rows

    async def _again(self, ask: Callable[[Snapshot], Awaitable[Found]]) -> Found:
        """Ask the model as it is; once more where what it was made of has gone from the store meanwhile."""
        now = self.library.now
        try:
            return await ask(now)
        except StoreError as error:
            await self.reload()
            if self.library.now is now:
                raise
            log.info("asked again", extra={"fields": {"reason": str(error)}})
            return await ask(self.library.now)

    def decode(self, token: int) -> tuple[str, bytes]:
        return self._pieces(token)

    # By one version

    async def _classify(
        self, now: Snapshot, model: str, rows: Sequence[Row], gates: bool
    ) -> tuple[list[Classified], int]:
        names, routes = await self._names(now, model, rows)
        records = [None if name is None else self._record(now, name) for name in names]
        asked = {place: one for place, one in enumerate(records) if one is not None and one.task.kind != "generation"}
        if model != AUTO and not asked:
            raise ApiError(400, f"model: {model!r} writes text; ask /v1/completions", param="model")
        read = readable if model == AUTO else as_example  # who names a task knows what it reads
        examples = {
            place: row
            for place, one in asked.items()
            if (row := read(rows[place], one.task, f"row {place + 1}")) is not None
        }
        requests = await self._encoded(now, list(examples.values()), [str(names[place]) for place in examples])
        answers = dict(zip(examples, await self._read(requests, gates), strict=True))
        data = []
        for place, one in enumerate(records):
            found, use = answers.get(place, (None, None))
            data.append(classified(now, place, one, found, use, routes[place]))
        return data, sum(len(request.row.input_ids) for request in requests)

    async def _write(self, now: Snapshot, model: str, rows: Sequence[Asked], sampling: Sampling) -> list[Written]:
        begun = await self._begin(now, model, rows, sampling)
        try:
            return [self._written(one, await one.job.last()) for one in begun]
        finally:
            for one in begun:
                one.job.cancelled = True

    async def _first(self, now: Snapshot, model: str, row: Asked, sampling: Sampling) -> tuple[Begun, Any]:
        """A row, and the first thing that is told of it: until then it can be asked again."""
        [begun] = await self._begin(now, model, [row], sampling)
        try:
            return begun, await begun.job.answer()
        except BaseException:
            begun.job.cancelled = True
            raise

    async def _begin(self, now: Snapshot, model: str, rows: Sequence[Asked], sampling: Sampling) -> list[Begun]:
        texts = [row if isinstance(row, str | Mapping) else last_of_user(row) for row in rows]
        name = only_task((await self._names(now, model, texts))[0])
        record = self._record(now, name)
        room = record.task.max_length or MAX_LENGTH  # a longer answer was never learned
        how = replace(sampling, max_new_tokens=min(sampling.max_new_tokens, room))
        asked, writes = [as_row(record, row) for row in rows], record.task.kind == "generation"
        begun = []
        for request in await self._encoded(now, asked, [name] * len(rows), how.max_new_tokens):
            job = Text(now.engine.writing(request, how)) if writes else Reading([request], gates=False)
            begun.append(Begun(record, request, job))
        for one in begun:
            self.worker.submit(one.job)
        return begun

    def _written(self, begun: Begun, found: Any) -> Written:
        record, request = begun.record, begun.request
        if isinstance(found, Completion):
            self.metrics.answered(record.name, 1, found.prompt_tokens, found.tokens)
            return Written(record, found.text, found, None, found.prompt_tokens, found.tokens)
        [(answer, _)] = found
        words = request.encoder.answers[list(record.task.labels or ()).index(answer.label)]
        read, written = len(request.row.input_ids), 1 if record.task.head == "classifier" else len(words)
        self.metrics.answered(record.name, 1, read, written)
        return Written(record, answer.label, None, answer.scores, read, written)

    async def _names(
        self, now: Snapshot, model: str, rows: Sequence[Row]
    ) -> tuple[list[str | None], list[Route | None]]:
        """The task of each row, None where auto knows none, and under auto what decided it."""
        if model != AUTO:
            self._record(now, model)
            return [model] * len(rows), [None] * len(rows)
        if now.router is None:
            raise ApiError(404, "model: auto needs a router, which this store has not; name a task", param="model")
        tasks = [record.task for record in now.store.tasks()]
        texts = [text_of_any(row, tasks, f"row {place + 1}") for place, row in enumerate(rows)]
        for place, text in enumerate(texts):
            if not text.strip():
                raise DataError(f"row {place + 1}: the text is empty, and auto cannot tell its task; fill it in")
        routes = [one for some in pieces(texts, ALONE) for one in await self._done(Routing(now.router.route, some))]
        return [route.task for route in routes], routes

    def _record(self, now: Snapshot, name: str) -> TaskRecord:
        try:
            return now.record(name)
        except Exception as error:
            raise from_ours(error) from error

    async def _encoded(
        self, now: Snapshot, rows: Sequence[Row | Example], names: Sequence[str], max_new_tokens: int = 1
    ) -> list[Request]:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._encoding, now.engine.requests, rows, names, max_new_tokens)

    async def _read(self, requests: Sequence[Request], gates: bool) -> list[Answer]:
        """Piece by piece: others get their turn between, and what nobody waits for any more is not begun."""
        found: list[Answer] = []
        for some in pieces(requests, ALONE if gates else ROWS):
            found += await self._done(Reading(some, gates))
        for request in requests:
            self.metrics.answered(request.entry.task.name, 1, len(request.row.input_ids), 0)
        return found

    async def _done(self, job: Reading | Routing) -> Any:
        self.worker.submit(job)
        try:
            return await job.answer()
        finally:
            job.cancelled = True

    # The store

    async def reload(self) -> None:
        """Look whether the store has changed. What cannot be served is told in the log, and the old model stays."""
        async with self._looking:
            try:
                changed = await asyncio.to_thread(self.library.reload)
            except Exception as error:
                self.metrics.reloads.labels("failed").inc()
                log.error("reload failed", extra={"fields": {"reason": str(error)}})
                return
        if changed:
            self.metrics.reloads.labels("done").inc()
            tasks = {record.name: record.version for record in self.library.now.store.tasks()}
            self.metrics.tasks.set(len(tasks))
            log.info("reloaded", extra={"fields": {"tasks": tasks}})

    async def watch(self) -> None:
        """Look again and again."""
        while self.settings.reload_seconds:
            await asyncio.sleep(self.settings.reload_seconds)
            await self.reload()


def pieces(rows: Sequence[Item], most: int) -> Iterator[Sequence[Item]]:
    return (rows[start : start + most] for start in range(0, len(rows), most))


def classified(
    now: Snapshot,
    index: int,
    record: TaskRecord | None,
    found: Prediction | None,
    use: Mapping[int, float] | None,
    route: Route | None,
) -> Classified:
    undecided = None if now.levels is None else REVIEW
    who: dict[str, Any] = {"task": None, "version": None, "expert": None}
    if route is not None:
        who["tasks"], who["familiar"] = route.rounded()
    if record is not None:
        who |= {"task": record.name, "version": record.version, "expert": expert(record)}
    if record is None or found is None:
        return Classified(index=index, label=None, scores={}, decision=undecided, **who)
    scores = {label: rounded(share) for label, share in found.scores.items()}
    levels = (now.levels or {}).get(record.reference)
    return Classified(
        index=index,
        label=found.label,
        scores=scores,
        decision=undecided if levels is None else decide(levels, found.label, scores),
        **who,
        gates=None if use is None else {str(layer): rounded(share) for layer, share in use.items()},
    )


def only_task(names: Sequence[str | None]) -> str:
    """The task of all rows: what is written has one model. Raises ApiError."""
    for place, name in enumerate(names):
        if name is None:
            said = f"auto: no task is known for text {place + 1}; name one"
            raise ApiError(400, said, param="model", code="no_task")
    found = dict.fromkeys(name for name in names if name is not None)
    if len(found) > 1:
        said = f"auto: the prompts are for several tasks ({', '.join(found)}); ask one by one, or name a task"
        raise ApiError(400, said, param="model", code="several_tasks")
    return next(iter(found))


def last_of_user(messages: Sequence[Message]) -> str:
    """What is asked in a chat. Raises ApiError."""
    for message in reversed(messages):
        if message.role == "user":
            return message.text
    raise ApiError(400, "messages: no turn is the user's; add one", param="messages")


def as_row(record: TaskRecord, asked: Asked) -> Row:
    """A chat as a row of the task: the whole of it where the task has no instruction of its own, else what is asked."""
    if isinstance(asked, str | Mapping):
        return asked
    task, names = record.task, dict.fromkeys(template(record.task.instruction).names)
    if len(names) > 1:
        said = f"messages: a chat fills one field, not {', '.join(names)}; give objects as prompt to /v1/completions"
        raise ApiError(400, said, param="messages")
    if not reads_chats(task):
        return last_of_user(asked)
    turns = [{"role": "system" if turn.role == "developer" else turn.role, "content": turn.text} for turn in asked]
    if turns[-1]["role"] == "assistant":
        raise ApiError(400, "messages: the last turn is the assistant's; end with the user's", param="messages")
    return {"messages": turns}


def logprob(share: float) -> float:
    return math.log(max(share, 1e-30))
