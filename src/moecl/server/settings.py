"""What `moecl serve` was asked for."""

import math
import re
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

from moecl._sizes import KV_MEMORY
from moecl.errors import ConfigError

ORIGIN = re.compile(r"https?://[^/\s@]+")


@dataclass(frozen=True)
class Settings:
    """`wait_ms`: how long a row waits for others where the model is idle. `queue`: rows under way; more get 429.

    `timeout`: seconds that a request may take. `reload_seconds`: how often the store is looked at; 0 never.
    """

    run: Path
    host: str = "127.0.0.1"
    port: int = 8000
    keys: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    thresholds: Path | None = None
    device: str = "auto"
    expert_memory: str = "2GB"
    kv_memory: int = KV_MEMORY
    queue: int = 256
    wait_ms: float = 3.0
    timeout: float = 60.0
    body_bytes: int = 1 << 20
    max_tokens: int = 1024
    reload_seconds: float = 1.0
    log_texts: bool = False

    def __post_init__(self) -> None:
        """Raises ConfigError."""
        checks = {
            "--port": (0 <= self.port <= 65535, self.port, "0 (any free one) to 65535"),
            "--queue": (self.queue >= 1, self.queue, "1 or more rows"),
            "--wait": (0 <= self.wait_ms <= 1000, self.wait_ms, "0 to 1000 milliseconds"),
            "--timeout": (0 < self.timeout < float("inf"), self.timeout, "seconds above 0"),
            "--max-tokens": (self.max_tokens >= 1, self.max_tokens, "1 or more"),
            "--reload": (0 <= self.reload_seconds < float("inf"), self.reload_seconds, "seconds, 0 for never"),
        }
        for option, (fine, value, wanted) in checks.items():
            if not fine:
                raise ConfigError(f"{option}: {value} is out of range; give {wanted}")
        for origin in self.origins:
            if origin != "*" and not ORIGIN.fullmatch(origin):
                raise ConfigError(f"--cors: {origin!r:.100} is no origin; give one as https://a.example, or *")
        if not self.loopback and not self.keys:
            raise ConfigError(
                f"--host {self.host}: others can reach it; give --api-key FILE or MOECL_API_KEYS, or leave --host out"
            )

    @property
    def stop_seconds(self) -> int:
        """How long what was taken may take to end once the server is told to."""
        return math.ceil(self.timeout) + 1

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach it."""
        if self.host == "localhost":
            return True
        try:
            return ip_address(self.host).is_loopback
        except ValueError:
            return False
