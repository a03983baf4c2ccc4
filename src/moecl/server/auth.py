"""Keys: who may ask."""

import hashlib
import hmac
from collections.abc import Iterable, Mapping
from pathlib import Path

from moecl.errors import ConfigError

VARIABLE = "MOECL_API_KEYS"


def read_keys(file: Path | None, environment: Mapping[str, str]) -> tuple[str, ...]:
    """Keys of a file, one a line (`#` begins a remark), and of the environment, with commas. Raises ConfigError."""
    lines: list[str] = []
    if file is not None:
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not UTF-8"
            raise ConfigError(f"--api-key {file}: {reason}; give a file with a key a line") from error
    written = [line for line in map(str.strip, lines) if line and not line.startswith("#")]
    given = environment.get(VARIABLE, "")
    keys = (*written, *filter(None, map(str.strip, given.split(","))))
    if given.strip() and len(keys) == len(written):
        raise ConfigError(f"{VARIABLE}: holds no key; give keys with commas between them, or unset it")
    if file is not None and not keys:
        raise ConfigError(f"--api-key {file}: holds no key; write one a line")
    if odd := [key for key in keys if not key.isascii() or not key.isprintable() or " " in key]:
        raise ConfigError(f"--api-key: key {keys.index(odd[0]) + 1} has a space or no plain ASCII; make another")
    return keys


class Keys:
    """Compares in a time that tells nothing: digests of equal length, all keys each time."""

    def __init__(self, keys: Iterable[str]) -> None:
        self.digests = [digest(key.encode()) for key in keys]

    def __bool__(self) -> bool:
        return bool(self.digests)

    def allow(self, header: bytes) -> bool:
        """Whether `Authorization: Bearer KEY` has one of the keys."""
        scheme, _, key = header.partition(b" ")
        given = digest(key.strip())
        same = [hmac.compare_digest(given, known) for known in self.digests]
        return scheme.lower() == b"bearer" and any(same)


def digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
