"""What keeps the process from growing while it serves."""

import asyncio
import ctypes
import os
import sys

# Kernels that oneDNN, and torch beside it, keep by the shape of what they multiply. Batches hardly repeat theirs, and
# the default's 1024 grow to 200 MB.
KERNELS = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64", "LRU_CACHE_CAPACITY": "64"}
EVERY = 10.0  # seconds


def keep_few_kernels() -> None:
    """To be called before torch makes its first; what the user has set stays."""
    for name, value in KERNELS.items():
        os.environ.setdefault(name, value)


async def give_back() -> None:
    """Return freed memory to the system every ten seconds, until cancelled; it takes some 10 ms.

    malloc keeps holes of 100 MB and more between the experts that stay. Only glibc can be asked for them.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    while hasattr(libc, "malloc_trim"):
        await asyncio.sleep(EVERY)
        await asyncio.to_thread(libc.malloc_trim, 0)  # type: ignore[union-attr]
