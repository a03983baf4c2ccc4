"""The frozen prefix: what a base's layers below the first adapted one give for a text, computed once for good.

They carry no expert and are frozen, so their output depends on the text alone: not on method, task, order or seed.
"""

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
import transformers
from torch import Tensor

from moecl.backbone import dtype_name
from moecl.data.derived import Derived
from moecl.model import MoECL

Side = Literal["left", "right"]


class Prefixes:
    """The prefixes of texts (token ids), from the cache or computed.

    Each text is computed alone, without padding and by one thread: the bits of a row depend on the shape of its batch,
    and so would results on which rows were in the cache already. On a processor as many texts run at once as there are
    threads, which costs no more than a batch of them.
    """

    def __init__(self, model: MoECL, base_sha256: str, most_bytes: int, note: Callable[[str], None]) -> None:
        self.model, self.kept = model, Derived("prefix", most_bytes, note)
        self.space = space(model, base_sha256, model.injected.below)

    def key(self, ids: Sequence[int]) -> str:
        return hashlib.sha256(self.space + json.dumps(list(ids)).encode()).hexdigest()

    def read(self, rows: Sequence[Sequence[int]], side: Side = "right") -> tuple[Tensor, list[int]]:
        """[B, T, D] as far as the cache has it, zeros at padding, and the places of the rows that it lacks.

        Runs no kernel of torch's: a second thread that did would take the first one's processors.
        """
        dtype, width = self.model.base.dtype, self.model.geometry.hidden_size
        zeros = np.zeros((len(rows), max(map(len, rows)), width * dtype.itemsize), np.uint8)
        batch = torch.from_numpy(zeros).view(dtype)
        missing = []
        for place, ids in enumerate(rows):
            found = self.kept.get(self.key(ids))
            if found is None:
                missing.append(place)
            else:
                _bytes(_part(batch, place, len(ids), side))[:] = _bytes(found["hidden_states"])
        return batch, missing

    def fill(self, batch: Tensor, missing: Sequence[int], rows: Sequence[Sequence[int]], side: Side = "right") -> None:
        """Compute what `read` lacked, and keep it."""
        if not missing:
            return
        places: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for place in missing:
            places[tuple(rows[place])].append(place)
        for ids, hidden_states in zip(places, each_alone(self._compute, places, self.model.device), strict=True):
            self.kept.put(self.key(ids), {"hidden_states": hidden_states})
            for place in places[ids]:
                _part(batch, place, len(ids), side).copy_(hidden_states)

    def _compute(self, ids: Sequence[int]) -> Tensor:
        return self.model.injected.prefix(torch.tensor([ids], device=self.model.device))[0].cpu()  # (T, D)

    def batch(self, rows: Sequence[Sequence[int]], side: Side = "right") -> Tensor:
        """[B, T, D] on the base's device, zeros at padding."""
        batch, missing = self.read(rows, side)
        self.fill(batch, missing, rows, side)
        return batch.to(self.model.device)


def space(model: MoECL, base_sha256: str, layer: int) -> bytes:
    """A digest of all that the bits of what enters `layer` for a text depend on, beside the text."""
    base, device = model.base, model.device
    config = {key: value for key, value in base.config.to_dict().items() if not key.startswith("_")}
    on = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    runs = [device.type, on, torch.__version__, transformers.__version__]
    what = [base_sha256, config, base.config._attn_implementation, dtype_name(base), layer]
    return hashlib.sha256(json.dumps([what, runs], sort_keys=True, default=str).encode()).digest()


def each_alone(
    compute: Callable[[Sequence[int]], Tensor], rows: Iterable[Sequence[int]], device: torch.device
) -> Iterator[Tensor]:
    """`compute` of each row, one intra-op thread each; on a processor as many at once as there are threads."""
    threads = torch.get_num_threads()
    at_once = threads if device.type == "cpu" else 1
    try:
        with ThreadPoolExecutor(at_once, initializer=partial(torch.set_num_threads, 1)) as pool:
            yield from pool.map(compute, rows)
    finally:  # each thread has a number of its own, but what new ones start with is shared
        torch.set_num_threads(threads)


def prefixes(
    model: MoECL, base_sha256: str, gigabytes: float, note: Callable[[str], None] = lambda message: None
) -> Prefixes | None:
    """None where they are not wanted (0 gigabytes), or where the base has none."""
    if not gigabytes or not model.injected.takes_prefix():
        return None
    return Prefixes(model, base_sha256, int(gigabytes * 1e9), note)


def _part(batch: Tensor, row: int, length: int, side: Side) -> Tensor:
    return batch[row, :length] if side == "right" else batch[row, batch.shape[1] - length :]


def _bytes(tensor: Tensor) -> Any:
    return tensor.view(torch.uint8).numpy()
