"""The routes."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable
from contextlib import aclosing, asynccontextmanager, suppress
from importlib import resources
from typing import Any, TypeVar

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.params import Security
from fastapi.responses import JSONResponse, Response, StreamingResponse
from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from moecl.errors import MoECLError
from moecl.generation import Sampling
from moecl.server import spoken
from moecl.server.guard import Guard, faults
from moecl.server.library import Library
from moecl.server.memory import give_back
from moecl.server.metrics import CONTENT_TYPE, Metrics
from moecl.server.problems import ApiError, from_ours, from_validation
from moecl.server.schema import (
    ERRORS,
    Chat,
    ChatWish,
    Classification,
    ClassifyWish,
    CompletionWish,
    Health,
    Model,
    Models,
    Run,
    TextCompletion,
    Usage,
    Wish,
)
from moecl.server.service import Service
from moecl.server.settings import Settings

PAGE = {"/": "index.html", "/page.css": "page.css", "/page.js": "page.js"}
TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript"}
INPUTS = {"/v1/classify": "input", "/v1/completions": "prompt", "/v1/chat/completions": "messages"}
SSE: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}}

log = logging.getLogger("moecl.server")
api = APIRouter(responses=ERRORS)
Found = TypeVar("Found")


def create_app(library: Library, settings: Settings) -> FastAPI:
    """The service as an ASGI application; its model's thread lives as long as its lifespan."""
    metrics = Metrics()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service = app.state.service = Service(library, settings, metrics)
        service.worker.start()
        beside = [asyncio.create_task(service.watch()), asyncio.create_task(give_back())]
        yield
        for one in beside:
            one.cancel()
        await asyncio.to_thread(service.worker.stop, settings.stop_seconds)

    bearer = [Security(HTTPBearer(auto_error=False))] if settings.keys else []
    app = FastAPI(title="moecl", docs_url=None, redoc_url=None, lifespan=lifespan, version=version())
    app.include_router(api, dependencies=bearer)
    app.add_exception_handler(ApiError, _ours)
    app.add_exception_handler(MoECLError, _ours)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)
    app.add_middleware(Guard, settings=settings, metrics=metrics)
    if settings.origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.origins,
            allow_methods=["*"],
            allow_headers=["*"],  # OpenAI's client sends some of its own
            expose_headers=["Retry-After", "x-request-id"],
        )
    return app


def version() -> str:
    from importlib.metadata import version as version_of

    return version_of("moecl")


async def _ours(request: Request, error: Exception) -> Response:
    found = from_ours(error, INPUTS.get(request.url.path))
    if found.status >= 500:
        log.error("problem", extra={"fields": {"reason": str(error)}})
    return found.response()


async def _invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return from_validation(error).response()


async def _http(request: Request, error: Exception) -> Response:
    """What the framework refuses, in words that help."""
    assert isinstance(error, HTTPException)
    allowed = (error.headers or {}).get("Allow", "")
    said = {
        400: "the body is not JSON in UTF-8, with numbers of at most 4,300 digits",
        404: "nothing is at this address; /openapi.json lists those that there are",
        405: f"{request.method} is not for this address; use {allowed}",
    }
    answer = ApiError(error.status_code, said.get(error.status_code, str(error.detail))).response()
    answer.headers.update(error.headers or {})
    return answer


def service_of(request: Request) -> Service:
    found: Service = request.app.state.service
    return found


async def awaited(request: Request, work: Awaitable[Found]) -> Found:
    """Its result, unless the client leaves or time runs out: then it is cancelled."""
    service, task = service_of(request), asyncio.ensure_future(work)
    gone = asyncio.ensure_future(left(request))
    try:
        await asyncio.wait({task, gone}, timeout=service.settings.timeout, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        if gone.done():
            service.metrics.cancelled.inc()
            raise ApiError(400, "the client left")
        raise late(service)
    finally:
        for one in (task, gone):
            one.cancel()
        with suppress(asyncio.CancelledError, Exception):
            await task


async def left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def late(service: Service) -> ApiError:
    return ApiError(504, f"not answered within {service.settings.timeout:g} seconds", code="timeout")


# OpenAI's


@api.get("/v1/models", tags=["openai"])
async def models(request: Request) -> Models:
    """The tasks; `auto` too where the store has a router."""
    now = service_of(request).library.now
    return Models(data=[Model(id=name, created=now.created) for name in now.names])


@api.get("/v1/models/{model}", tags=["openai"])
async def model(request: Request, model: str) -> Model:
    now = service_of(request).library.now
    if not now.knows(model):
        now.record(model)
    return Model(id=model, created=now.created)


@api.post("/v1/chat/completions", tags=["openai"], response_model=Chat, responses=SSE)
async def chat(request: Request, wish: ChatWish) -> Any:
    """An answer to a chat: the text that a generation task writes, the label that a classification gives."""
    if wish.max_completion_tokens is not None and wish.max_tokens is not None:
        raise ApiError(400, "max_tokens: give it or max_completion_tokens, not both", param="max_tokens")
    if wish.top_logprobs is not None and not wish.logprobs:
        raise ApiError(400, "top_logprobs: needs logprobs: true", param="top_logprobs")
    service = service_of(request)
    top = (wish.top_logprobs or 0) if wish.logprobs else None
    field = "max_tokens" if wish.max_completion_tokens is None else "max_completion_tokens"
    sampling = sampled(service, wish, wish.max_completion_tokens or wish.max_tokens, top, field)
    told(request, wish.model, 1, [message.text for message in wish.messages])
    if wish.stream:
        return await streamed(request, wish, wish.messages, sampling)
    [answer] = await awaited(request, service.write(wish.model, [wish.messages], sampling))
    return JSONResponse(spoken.chat(answer, service.decode, top).model_dump())


@api.post("/v1/completions", tags=["openai"], response_model=TextCompletion, responses=SSE)
async def completions(request: Request, wish: CompletionWish) -> Any:
    """A text behind each prompt, or its label."""
    service = service_of(request)
    sampling = sampled(service, wish, wish.max_tokens, wish.logprobs)
    prompts = [wish.prompt] if isinstance(wish.prompt, str) else wish.prompt
    told(request, wish.model, len(prompts), prompts)
    if wish.stream:
        if len(prompts) > 1:
            raise ApiError(400, "prompt: one prompt can be streamed, not several", param="prompt")
        return await streamed(request, wish, prompts[0], sampling)
    answers = await awaited(request, service.write(wish.model, prompts, sampling))
    return JSONResponse(spoken.completions(answers, service.decode, wish.logprobs).model_dump())


def sampled(
    service: Service, wish: Wish, max_tokens: int | None, top: int | None, field: str = "max_tokens"
) -> Sampling:
    most = service.settings.max_tokens
    if max_tokens is not None and max_tokens > most:
        more = f"{field}: {max_tokens} is more than {most}; give less, or start the server with a larger --max-tokens"
        raise ApiError(400, more, param=field)
    if wish.stream_options is not None and not wish.stream:
        raise ApiError(400, "stream_options: needs stream: true", param="stream_options")
    return Sampling(
        max_new_tokens=max_tokens or most,
        temperature=wish.temperature or 0.0,
        top_p=1.0 if wish.top_p is None else wish.top_p,
        seed=wish.seed,
        stop=wish.stops,
        top_logprobs=top,
    )


async def streamed(request: Request, wish: Wish, asked: Any, sampling: Sampling) -> StreamingResponse:
    """Server-sent events. What goes wrong before the first one is an answer of its own."""
    service = service_of(request)
    pieces = service.stream(wish.model, asked, sampling)
    deadline = asyncio.get_running_loop().time() + service.settings.timeout
    first = await awaited(request, anext(pieces))

    async def whole() -> AsyncIterator[Any]:
        yield first
        async with aclosing(pieces), asyncio.timeout_at(deadline):
            async for piece in pieces:
                yield piece

    async def events() -> AsyncIterator[bytes]:
        say = spoken.chat_events if isinstance(wish, ChatWish) else spoken.text_events
        with_usage = wish.stream_options is not None and wish.stream_options.include_usage
        try:
            async for event in say(whole(), service.decode, sampling.top_logprobs, with_usage):
                yield event
        except TimeoutError:
            yield spoken.event(late(service).body())
        except MoECLError as error:
            log.error("problem", extra={"fields": {"reason": str(error)}})
            yield spoken.event(from_ours(error).body())
        except Exception as error:
            log.error("fault", extra={"fields": {"fault": faults(error)}})
            yield spoken.event(from_ours(error).body())
        except (asyncio.CancelledError, GeneratorExit):
            service.metrics.cancelled.inc()
            raise

    return StreamingResponse(events(), media_type="text/event-stream")


# Ours


@api.post("/v1/classify", tags=["moecl"])
async def classify(request: Request, wish: ClassifyWish) -> Classification:
    """A label for each text, with all labels' scores, and who answered."""
    rows = [wish.input] if isinstance(wish.input, str) else wish.input
    told(request, wish.model, len(rows), rows)
    data, tokens = await awaited(request, service_of(request).classify(wish.model, rows, wish.gates))
    return Classification(model=wish.model, data=data, usage=Usage.of(tokens, 0))


@api.get("/v1/run", tags=["moecl"])
async def run(request: Request) -> Run:
    """The tasks with their versions, and R."""
    return service_of(request).library.now.run()


def told(request: Request, model: str, rows: int, texts: Any) -> None:
    """For the log. The model only where it is one of ours."""
    now = service_of(request).library.now
    request.state.told.update(model=model if now.knows(model) else None, rows=rows, texts=texts)


# For those who run it


@api.get("/healthz", tags=["health"])
async def healthz() -> Health:
    """Whether the process answers."""
    return Health(status="ok")


@api.get("/readyz", tags=["health"])
async def readyz(request: Request) -> Health:
    """Whether the model answers: 503 where its thread has ended."""
    if not service_of(request).worker.alive:
        raise ApiError(503, "the model's thread has ended; start the server again", code="stopping")
    return Health(status="ok")


@api.get("/metrics", tags=["health"], response_class=Response)
async def metrics(request: Request) -> Response:
    return Response(service_of(request).metrics.text(), media_type=CONTENT_TYPE)


def _page(path: str, name: str) -> None:
    body = (resources.files("moecl.server") / "page" / name).read_bytes()

    async def page() -> Response:
        return Response(body, media_type=TYPES[name.rpartition(".")[2]])

    api.get(path, include_in_schema=False)(page)


for _path, _name in PAGE.items():
    _page(_path, _name)
