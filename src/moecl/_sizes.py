"""Sizes of memory and spans of time, as people write them."""

import re

from moecl.errors import ConfigError

EXPERT_MEMORY = 2 * 10**9  # bytes; some 150 tasks of a small base, and no burden to a laptop
KV_MEMORY = 256 * 2**20  # bytes; some 6,000 tokens of a small base in fp32
UNITS = {
    "b": 1,
    **{f"{prefix}b": 1000**power for power, prefix in enumerate("kmgt", start=1)},
    **{f"{prefix}ib": 1024**power for power, prefix in enumerate("kmgt", start=1)},
    **{prefix: 1000**power for power, prefix in enumerate("kmgt", start=1)},
}
REMEDY = "write a number and a unit without a space, such as 2GB or 512MB"


def parse_size(value: str | int, field: str, zero: bool = False) -> int:
    """Bytes, of a number of them or of a text such as 2GB, 1.5GiB or 512M; 0 only where `zero` allows it.

    Raises ConfigError that names `field`.

    >>> parse_size("2GB", "--expert-memory"), parse_size("1.5 kib", "--expert-memory"), parse_size(7, "expert_memory")
    (2000000000, 1536, 7)
    """
    if isinstance(value, int):
        count = value
    else:
        found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([a-zA-Z]*)\s*", value)
        if found is None:
            raise ConfigError(f"{field}: {value!r:.60} is no size; {REMEDY}")
        number, unit = found.groups()
        if unit.lower() not in UNITS and float(number):
            what = f"has the unknown unit {unit!r:.60}" if unit else "has no unit"
            raise ConfigError(f"{field}: {value!r:.60} {what}; {REMEDY}")
        count = int(float(number) * UNITS.get(unit.lower(), 1))
    if count < 0 and zero:
        raise ConfigError(f"{field}: {value!r:.60} is below 0; {REMEDY}")
    if count <= 0 and not zero:
        raise ConfigError(f"{field}: {value!r:.60} leaves no room; {REMEDY}")
    return count


def duration(seconds: float) -> str:
    """
    >>> duration(4.4), duration(372), duration(7500)
    ('4 s', '6 min 12 s', '2 h 5 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60} min {whole % 60} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60} min"


def size(count: float) -> str:
    """
    >>> size(812), size(10_240), size(542_000_000), size(1.3e9)
    ('812 B', '10 kB', '542 MB', '1.3 GB')
    """
    if count < 1000:
        return f"{count:.0f} B"
    for unit in ("kB", "MB"):
        count /= 1000
        if count < 999.5:
            return f"{count:.1f} {unit}" if count < 9.95 else f"{count:.0f} {unit}"
    return f"{count / 1000:.1f} GB"
