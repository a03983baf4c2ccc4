"""What keeps the server from growing."""

import asyncio
import os
import socket
import sys
import types

from moecl.server import memory
from moecl.server.serve import bound
from moecl.server.settings import Settings


def test_few_kernels_unless_somebody_says_otherwise(monkeypatch):
    monkeypatch.delenv("LRU_CACHE_CAPACITY", raising=False)
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "7")
    memory.keep_few_kernels()
    assert (os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"], os.environ["LRU_CACHE_CAPACITY"]) == ("7", "64")
    monkeypatch.delenv("LRU_CACHE_CAPACITY")


def test_memory_is_given_back_again_and_again(monkeypatch):
    asked = []
    monkeypatch.setattr(memory, "EVERY", 0.0)
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: types.SimpleNamespace(malloc_trim=asked.append))

    async def some_time():
        task = asyncio.create_task(memory.give_back())
        while len(asked) < 3:
            await asyncio.sleep(0)
        task.cancel()

    asyncio.run(some_time())
    assert set(asked) == {0}
    monkeypatch.setattr(sys, "platform", "darwin")
    asyncio.run(memory.give_back())  # ends at once


def test_answers_are_not_held_back(tmp_path):
    """asyncio sets TCP_NODELAY only on sockets whose protocol is named."""
    with bound(Settings(run=tmp_path, port=0)) as listening:
        assert listening.proto == socket.IPPROTO_TCP
