"""A store with versions, an alias, a retired task and something for `gc`, and every change that can be made to it."""

from collections.abc import Callable
from pathlib import Path

from moecl.store import Store
from store_parts import BASE, part, parts, record


def versioned(path: Path) -> Store:
    """a: versions 1 and 2, 1 is prod; b: live, its shared part has moved; c: retired."""
    store = Store.create(path, BASE)
    store.commit([(record("a", number=1), parts(1))], training={"memory": part(1)})
    store.commit([(record("b", "live", number=2), parts(2))])
    store.commit([(record("c", number=3), parts(3))])
    store.commit([(record("a", number=4), parts(4))], training={"memory": part(4)})
    store.commit(moved={"shared": part(0.75)})
    store.commit(moved={"shared": part(0.875)})
    store.promote("a@1")
    store.retire("c")
    return store


CHANGES: dict[str, Callable[[Store], object]] = {
    "learn": lambda store: store.commit([(record("d", number=5), parts(5))], training={"memory": part(5)}),
    "promote": lambda store: store.promote("a", "beta"),
    "remove_alias": lambda store: store.remove_alias("a"),
    "rollback": lambda store: store.rollback("a"),
    "retire": lambda store: store.retire("b"),
    "unretire": lambda store: store.unretire("c"),
    "delete": lambda store: store.delete("a"),
    "gc": lambda store: store.gc(),
}
