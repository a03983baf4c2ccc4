"""Batches by their number, the next one made ahead by one thread that does not outlive its feed."""

import threading

import pytest
import torch

from moecl import feed as feed_module
from moecl.data.encode import Encoded, collate
from moecl.feed import Feed

ROWS = [Encoded(list(range(3, 5 + length)), [2], length % 2, False) for length in range(7)]
PLAN = [[0, 4], [6, 1], [2], [3, 5]]


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("feed")]


def test_batches_come_by_their_number_from_any_on():
    for order in ([0, 1, 2, 3], [2, 3], [3, 0, 2, 1], [1, 1]):
        with Feed(ROWS, PLAN, pad_id=0) as feed:
            assert len(feed) == 4
            for number in order:
                expected = collate([ROWS[place] for place in PLAN[number]], 0)
                found = feed[number]
                assert found.keys() == expected.keys()
                assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
        assert threads() == []


def test_the_next_one_is_made_meanwhile_each_once(monkeypatch):
    made, ready = [], threading.Event()

    def collate_(rows, pad_id):
        made.append((len(rows[0].input_ids), threading.current_thread().name.startswith("feed")))
        ready.set()
        return collate(rows, pad_id)

    monkeypatch.setattr(feed_module, "collate", collate_)
    with Feed(ROWS, PLAN, pad_id=0) as feed:
        for number in range(4):
            feed[number]
            if number < 3:
                ready.wait(10)
                while len(made) < number + 2:
                    pass
            ready.clear()
    assert made == [(len(ROWS[batch[0]].input_ids), True) for batch in PLAN]


def test_an_error_in_it_surfaces_where_the_batch_is_taken(monkeypatch):
    def collate_(rows, pad_id):
        if len(rows) == 1:
            raise ZeroDivisionError("no such luck")
        return collate(rows, pad_id)

    monkeypatch.setattr(feed_module, "collate", collate_)
    with Feed(ROWS, PLAN, pad_id=0) as feed:
        assert len(feed[0]) == len(feed[1])
        with pytest.raises(ZeroDivisionError, match="no such luck"):
            feed[2]
    assert threads() == []
