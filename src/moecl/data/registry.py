"""One pinned file from the Python package index, without running any of its code.

The index is the one pip is configured with (index-url, extra-index-url, find-links, cert, proxy; from PIP_* and
pip's files), so that a closed network's mirror serves. Protocol: https://packaging.python.org/specifications/simple-repository-api/
"""

from __future__ import annotations

import ast
import hashlib
import io
import os
import re
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

import requests
from pypi_simple import PYPI_SIMPLE_ENDPOINT, NoSuchProjectError, PyPISimple, UnsupportedRepoVersionError
from requests.adapters import BaseAdapter

from moecl.data.pinned import PinnedFile, Progress
from moecl.errors import AssetError

PAUSES = (0.0, 0.5, 1.5)  # seconds before each attempt
_TIMEOUT = (10, 60)  # seconds to connect, and between two chunks
_CHUNK = 1 << 16


class _RefusedError(Exception):
    """A source that answered, and has not the file: asking again will not help."""


def download(file: PinnedFile, folder: Path, progress: Progress | None = None) -> Path:
    """Fetch `file` into `folder`, going on where an earlier call stopped, and verify it.

    Raises `AssetError` when no source serves it, or serves other bytes; `OSError` when `folder` cannot be written.
    """
    settings = pip_settings()
    session = _session(settings)
    part = folder / f"{file.sha256[:16]}-{file.filename}.part"
    if progress:
        progress("connecting", 0, file.bytes)
    for pause in PAUSES:
        time.sleep(pause)
        failures, again = [], False
        for source in _sources(settings):
            resumed = part.exists()
            try:
                _stream(session, _locate(session, source, file), part, file, progress)
                return _verified(part, file)
            except _RefusedError as reason:
                failures.append(f"{source}: {reason}")
                again = again or (resumed and not part.exists())  # what lay there was the fault: now from the start
            except requests.RequestException as error:
                failures.append(f"{source}: {_reason(error)}")
                again = again or _passing(error)
        if not again:
            break
    why = re.sub(r"//[^/@]*@", "//", "; ".join(failures))  # no passwords
    raise AssetError(f"cannot download {file.filename}: {why or 'pip is set to use no index'}")


def pip_settings() -> dict[str, str]:
    """Return pip's settings by option (`index-url`); where pip is not installed, those of PIP_* alone."""
    settings = {}
    for section in ("global", "download"):  # pip's own order: the command's section wins, then the environment
        for option, value in re.findall(rf"^{section}\.([\w-]+)=(['\"].*)$", _pip_config(), re.MULTILINE):
            settings[option] = str(ast.literal_eval(value))
    named = {key[4:].lower().replace("_", "-"): value for key, value in os.environ.items() if key.startswith("PIP_")}
    return settings | {option: value for option, value in named.items() if value}


@cache  # a second a call
def _pip_config() -> str:
    command = [sys.executable, "-m", "pip", "config", "list"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


def _sources(settings: Mapping[str, str]) -> Iterator[str]:
    """Folders of files (plain paths) first, then indexes (URLs)."""
    for link in settings.get("find-links", "").split():
        path = url2pathname(urlsplit(link).path) if link.startswith("file:") else link
        if os.path.isdir(path):
            yield path
    if settings.get("no-index", "0").lower() in {"1", "true", "yes", "on"}:
        return
    for index in [settings.get("index-url", PYPI_SIMPLE_ENDPOINT), *settings.get("extra-index-url", "").split()]:
        yield index if ":" in index else Path(index).absolute().as_uri()


class _FileAdapter(BaseAdapter):
    """`file:` addresses for requests; a folder answers with its index.html, as pip has it."""

    def send(self, request: requests.PreparedRequest, *args: object, **kwargs: object) -> requests.Response:
        path = Path(url2pathname(urlsplit(str(request.url)).path))
        path = path / "index.html" if path.is_dir() else path
        response = requests.Response()
        response.url, response.request = str(request.url), request
        response.status_code = 200 if path.is_file() else 404
        response.raw = io.BytesIO(path.read_bytes() if path.is_file() else b"")
        response.headers["Content-Type"] = "text/html" if path.suffix == ".html" else "application/octet-stream"
        return response

    def close(self) -> None:
        """Nothing is kept open between two files."""


def _session(settings: Mapping[str, str]) -> requests.Session:
    session = requests.Session()
    session.mount("file:", _FileAdapter())
    # The system's authorities, not requests' own list: a company's proxy signs with its own.
    session.verify = settings.get("cert") or ssl.get_default_verify_paths().cafile or True
    if isinstance(session.verify, str) and not os.path.exists(session.verify):
        raise AssetError(f"PIP_CERT (or cert in pip.conf) names {session.verify}, which does not exist")
    session.cert = settings.get("client-cert")
    if proxy := settings.get("proxy"):
        session.proxies = {"http": proxy, "https": proxy}
    return session


def _locate(session: requests.Session, source: str, file: PinnedFile) -> str:
    """The address of `file` at a source. Raises `_RefusedError`, `requests.RequestException`."""
    if os.path.isdir(source):
        path = Path(source).absolute() / file.filename
        if not path.is_file():
            raise _RefusedError(f"{file.filename} is not there")
        return path.as_uri()
    try:
        page = PyPISimple(source, session=session).get_project_page(file.project, timeout=_TIMEOUT)
    except NoSuchProjectError:
        raise _RefusedError(f"no project {file.project}") from None
    except (ValueError, UnsupportedRepoVersionError) as error:  # a page of another kind, or an address that is none
        raise _RefusedError(f"not a package index ({error})") from None
    found = [package for package in page.packages if package.filename == file.filename]
    if not found:
        raise _RefusedError(f"{file.filename} is not there")
    if found[0].digests.get("sha256", file.sha256) != file.sha256:
        raise _RefusedError(f"its {file.filename} has another sha256 than the pinned one")
    return found[0].url


def _stream(session: requests.Session, url: str, part: Path, file: PinnedFile, progress: Progress | None) -> None:
    """Append to `part` what it still lacks. Raises `requests.RequestException`, `OSError`."""
    done = part.stat().st_size if part.exists() else 0
    if done >= file.bytes:
        return
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={done}-"} if done else {})
    with session.get(url, headers=headers, stream=True, timeout=_TIMEOUT) as response:
        response.raise_for_status()
        if response.status_code != requests.codes.partial_content:
            done = 0
        with part.open("r+b" if done else "wb") as out:
            out.seek(done)
            for chunk in response.iter_content(_CHUNK):
                out.write(chunk)
                done += len(chunk)
                if progress:
                    progress("downloading", min(done, file.bytes), file.bytes)
                if done > file.bytes:
                    break
    if done < file.bytes:
        raise requests.ConnectionError(f"the connection closed after {done} of {file.bytes} bytes")


def _verified(part: Path, file: PinnedFile) -> Path:
    with part.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    if digest != file.sha256:
        part.unlink()  # kept, it would spoil every later try
        raise _RefusedError(f"served other bytes as {file.filename} (sha256 {digest}, pinned {file.sha256})")
    return part


def _passing(error: requests.RequestException) -> bool:
    """Whether the same request may succeed in a moment."""
    status = error.response.status_code if error.response is not None else None
    if status is not None:
        return status == 429 or status >= 500
    return not isinstance(error, (requests.exceptions.SSLError, requests.exceptions.InvalidSchema))


def _reason(error: requests.RequestException) -> str:
    if error.response is not None:
        return f"HTTP status {error.response.status_code}"
    inner = error.args[0] if error.args else error
    return str(getattr(inner, "reason", inner))  # without the address that urllib3 puts around it
