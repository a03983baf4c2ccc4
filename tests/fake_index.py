"""A package index on loopback, with the faults of real ones, and archives to serve."""

from __future__ import annotations

import hashlib
import io
import json
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from moecl.data.assets import Asset
from moecl.data.pinned import PinnedFile


def make_zip(members: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return out.getvalue()


def make_asset(archive: bytes, member: str, build, **changes) -> Asset:
    """An asset `tiny` made from `member` of `archive`, which the index serves as project `tiny-pkg`."""
    with zipfile.ZipFile(io.BytesIO(archive)) as opened:
        content = opened.read(member)
    said = {
        "name": "tiny",
        "kind": "model",
        "description": "a tiny asset",
        "licence": "Apache-2.0",
        "archive": pin(archive),
        "member": member,
        "member_sha256": hashlib.sha256(content).hexdigest(),
        "disk": 1000,
        "build": build,
    }
    return Asset(**said | changes)


def pin(content: bytes) -> PinnedFile:
    return PinnedFile("tiny-pkg", "tiny_pkg-1.0-py3-none-any.whl", hashlib.sha256(content).hexdigest(), len(content))


class FakeIndex:
    """Serves one file of the project `tiny-pkg`; `asked` lists what was asked for it: the Range header or ""."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.file = pin(content)
        self.says: str | None = self.file.sha256  # the digest on the project's page
        self.html = False
        self.ranges = True  # whether it knows the Range header
        self.faults: list[int | str] = []  # for the next answers: an HTTP status, "cut" or "stall" half-way
        self.asked: list[str] = []
        self.logins: list[str] = []
        self.stalled = threading.Event()
        index = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                index.answer(self)

            def log_message(self, *args: object) -> None:
                """Not into the tests' output."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.server.handle_error = lambda *args: None  # a client that goes away is no news
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/simple"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        self.logins.append(request.headers.get("Authorization", ""))
        if request.path == f"/files/{self.file.filename}":
            self._send_file(request)
        elif request.path == "/simple/tiny-pkg/":
            self._send_page(request)
        else:
            request.send_error(404)

    def _send_page(self, request: BaseHTTPRequestHandler) -> None:
        link = f"../../files/{self.file.filename}"
        if self.html:
            digest = f"#sha256={self.says}" if self.says else ""
            kind, body = "text/html", f'<html><body><a href="{link}{digest}">{self.file.filename}</a></body></html>'
        else:
            hashes = {"sha256": self.says} if self.says else {}
            kind = "application/vnd.pypi.simple.v1+json"
            files = [{"filename": self.file.filename, "url": link, "hashes": hashes}]
            body = json.dumps({"meta": {"api-version": "1.0"}, "name": "tiny-pkg", "files": files})
        request.send_response(200)
        request.send_header("Content-Type", kind)
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        request.wfile.write(body.encode())

    def _send_file(self, request: BaseHTTPRequestHandler) -> None:
        asked = request.headers.get("Range", "")
        self.asked.append(asked)
        fault = self.faults.pop(0) if self.faults else None
        if isinstance(fault, int):
            request.send_error(fault)
            return
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and self.ranges else 0
        body = self.content[start:]
        request.send_response(206 if start else 200)
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        request.wfile.write(body[: len(body) // 2] if fault else body)
        if fault == "stall":
            request.wfile.flush()
            self.stalled.set()
            threading.Event().wait(60)
