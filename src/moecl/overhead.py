"""What learning a stream takes beside steps and answers: the router reads its texts, and starts are tried."""

import time
from collections.abc import Sequence

from moecl.config import StreamConfig
from moecl.course import Course
from moecl.engine import Engine
from moecl.methods.moe_cl import STARTS
from moecl.model import MoECL
from moecl.router import Features, Statistics, spread
from moecl.session import asked_for, attach_method, texts
from moecl.start import BATCH, ROWS, Starts

SCRATCH_TEXTS = 32


def router_seconds(model: MoECL, config: StreamConfig, courses: Sequence[Course]) -> float:
    """Seconds in which the router reads the tasks' texts, once for all runs with this base and these texts."""
    if not config.router:
        return 0.0
    assert model.tokenizer is not None
    geometry = model.geometry
    layer = Statistics.empty(geometry.hidden_size, geometry.num_layers).layer
    features = Features(model, model.tokenizer, layer)
    read = [text for course in courses for split in texts(course) for text in spread(split)]
    few = read[:SCRATCH_TEXTS]
    features(few[:1])  # the first one sets things up
    begun = time.monotonic()
    features(few)
    seconds = time.monotonic() - begun
    return seconds / max(1, sum(map(len, features.tokens(few)))) * sum(map(len, features.tokens(read)))


def starts_seconds(model: MoECL, config: StreamConfig, courses: Sequence[Course]) -> float:
    """Seconds in which tasks not yet learned are tried with what they may start from."""
    tried = [starts_tried(config, place, course) for place, course in enumerate(courses)]
    if not any(tried):
        return 0.0
    one, starts = next(course for course, count in zip(courses, tried, strict=True) if count), Starts(Engine(model))
    parts = attach_method(model, config).preview(one.task)
    assert parts is not None
    starts.loss(one, parts)  # the first one sets things up
    begun = time.monotonic()
    starts.loss(one, parts)
    a_token = (time.monotonic() - begun) / tokens_tried(one)
    return sum(a_token * tokens_tried(course) * count for course, count in zip(courses, tried, strict=True))


def starts_tried(config: StreamConfig, place: int, course: Course) -> int:
    """How often the first rows of task `place` (from 0) are tried: when it is learned, and for its cells of R before.

    Each time afresh and with the nearest old tasks; with those that never change once, so that this is the most: which
    will be near is not known yet.
    """
    method = config.method
    experts = getattr(method, "experts", "both")
    if getattr(method, "warm_start", None) != "nearest" or experts == "shared" or course.task.head == "classifier":
        return 0
    never_change = experts == "task" or getattr(method, "retention", None) == "exact"
    asked = [number for number in range(1, place + 1) if course.test and asked_for(config, number, place)]
    count = known = 0
    for old in [*asked, place] if place else []:
        count += 1 + min(old - known if never_change else old, STARTS)
        known = old
    return count


def tokens_tried(course: Course) -> int:
    """Of the rows that are tried, padding included."""
    lengths = [len(row.input_ids) + len(row.answer_ids) for row in course.train[:ROWS]]
    batches = [lengths[first : first + BATCH] for first in range(0, len(lengths), BATCH)]
    return sum(len(batch) * max(batch) for batch in batches)
