"""What every request passes: its host, its key, its size; and what is told of it afterwards."""

import asyncio
import json
import logging
import secrets
import time
import traceback
from collections.abc import Iterable
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from moecl.server.auth import Keys
from moecl.server.metrics import Metrics
from moecl.server.problems import ApiError
from moecl.server.settings import Settings

log = logging.getLogger("moecl.server")
FREE = frozenset({"/", "/page.css", "/page.js", "/healthz", "/readyz"})  # that need no key: they tell nothing
LOCAL = frozenset({"localhost", "127.0.0.1", "[::1]"})
HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
    (
        b"content-security-policy",
        b"default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
        b"base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    ),
]


class Guard:
    """ASGI middleware, the outermost but for CORS."""

    def __init__(self, app: ASGIApp, settings: Settings, metrics: Metrics) -> None:
        self.app, self.settings, self.metrics = app, settings, metrics
        self.keys = Keys(settings.keys)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        answer = Answer(send)
        scope.setdefault("state", {})["told"] = answer.told
        try:
            headers = dict(scope["headers"])
            self._check(scope["path"], headers)
            body = await self._body(headers, receive)
            await self.app(scope, replayed(body, receive), answer.send)
        except ApiError as error:
            await answer.problem(error, scope, receive)
        except Exception as error:
            log.error("fault", extra={"fields": {"id": answer.id, "fault": faults(error)}})
            await answer.problem(ApiError(500, "a fault of the server; its log says more"), scope, receive)
        finally:
            self._tell(scope, answer)

    def _check(self, path: str, headers: dict[bytes, bytes]) -> None:
        """Raises ApiError. Without keys only this machine may ask, and no page that pretends to be it."""
        if not self.keys:
            host = headers.get(b"host", b"").decode("latin-1")
            name = host if host.endswith("]") else host.rpartition(":")[0] or host
            if name.lower() not in {*LOCAL, self.settings.host}:
                raise ApiError(403, "the header Host names another machine; ask for localhost, or serve with keys")
        elif path not in FREE and not self.keys.allow(headers.get(b"authorization", b"")):
            raise ApiError(401, "no such key; send Authorization: Bearer KEY", code="invalid_api_key")

    async def _body(self, headers: dict[bytes, bytes], receive: Receive) -> bytes:
        """All of it, before anything is done. Raises ApiError where it is too large or too slow."""
        most = self.settings.body_bytes
        large = ApiError(413, f"the request has more than {most} bytes", code="request_too_large")
        if int(headers.get(b"content-length", b"0")) > most:
            raise large
        body, more = b"", True
        try:
            async with asyncio.timeout(self.settings.timeout):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ApiError(400, "the client left")
                    body, more = body + message.get("body", b""), message.get("more_body", False)
                    if len(body) > most:
                        raise large
        except TimeoutError:
            raise ApiError(408, "the request came too slowly", code="timeout") from None
        return body

    def _tell(self, scope: Scope, answer: "Answer") -> None:
        route = getattr(scope.get("route"), "path", "other")  # ours, never what was asked for
        seconds = time.monotonic() - answer.begun
        self.metrics.requests.labels(route, str(answer.status)).inc()
        self.metrics.seconds.labels(route).observe(seconds)
        told = answer.told if self.settings.log_texts else {k: v for k, v in answer.told.items() if k != "texts"}
        fields = {"id": answer.id, "route": route, "status": answer.status, "seconds": round(seconds, 4), **told}
        log.info("request", extra={"fields": fields})


class Answer:
    """What is sent, with what every answer has; and what is told of it in the log."""

    def __init__(self, send: Send) -> None:
        self._send, self.id, self.begun = send, f"req_{secrets.token_hex(12)}", time.monotonic()
        self.status = 0  # until something is sent
        self.told: dict[str, Any] = {}

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message["headers"] = [*message["headers"], *HEADERS, (b"x-request-id", self.id.encode())]
        await self._send(message)

    async def problem(self, error: ApiError, scope: Scope, receive: Receive) -> None:
        if not self.status:
            await error.response()(scope, receive, self.send)


def replayed(body: bytes, receive: Receive) -> Receive:
    """A body that was read, then what comes after it: the client's leaving."""
    waiting = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Message:
        return waiting.pop() if waiting else await receive()

    return again


def faults(error: BaseException) -> list[str]:
    """Where an error came from. Not its message, which may quote a request."""
    frames: Iterable[traceback.FrameSummary] = traceback.extract_tb(error.__traceback__)
    return [type(error).__name__, *(f"{frame.name}:{frame.lineno}" for frame in frames)]


class JsonLines(logging.Formatter):
    """A log line as a JSON object."""

    def format(self, record: logging.LogRecord) -> str:
        when = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"
        line = {"time": when, "level": record.levelname.lower(), "event": record.getMessage()}
        return json.dumps({**line, **getattr(record, "fields", {})}, ensure_ascii=False, default=str)
