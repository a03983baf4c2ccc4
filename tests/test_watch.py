"""What a run shows while it goes: plain lines, or one bar that leaves nothing behind."""

import io
import re

import pytest
from rich.console import Console

from moecl import watch
from moecl.watch import LiveWatcher, PlainWatcher, watcher


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass only when told to."""
    now = [0.0]
    monkeypatch.setattr(watch.time, "monotonic", lambda: now[0])
    return now


def plain() -> tuple[PlainWatcher, io.StringIO]:
    file = io.StringIO()
    return PlainWatcher(Console(file=file, width=40)), file


def test_plain_lines_are_few_and_whole(clock):
    told, file = plain()
    with told:
        told.note("a note [that] is longer than the forty columns of this terminal: it is not broken")
        for step in range(1, 31):
            clock[0] += 1
            told.training("news", step, 30, {})
            if step % 5 == 0:
                told.training("news", step, 30, {"task_loss": 1 / step, "learning_rate": 1})
        told.training("news", 30, 30, {"train_loss": 1.0})
        told.validated("news", 0.5)
        told.row(0, ["news", "mail"], [0.5, None])
        told.row(1, ["news", "mail"], [0.75, 0.5])
        told.training("mail", 1, 1, {})
    assert file.getvalue().splitlines() == [
        "a note [that] is longer than the forty columns of this terminal: it is not broken",
        "learning news: step 11 of 30, loss 0.1",
        "learning news: step 22 of 30, loss 0.05",
        "learning news: step 30 of 30, loss 0.04",
        "learning news: validation 0.500",
        "before any task: news 0.500, mail -",
        "after news: news 0.750, mail 0.500",
        "learning mail: step 1 of 1",
    ]


def test_plain_fetching_and_testing(clock):
    told, file = plain()
    told.fetching("waiting for another process", 0, 0)
    for done in range(0, 100, 3):
        clock[0] += 0.5
        told.fetching("downloading", done * 1_000_000, 99_000_000)
    told.fetching("loading the base", 0, 0)
    for done in range(3):
        clock[0] += 6
        told.evaluating(2, f"t{done}", done, 3)
    assert file.getvalue().splitlines() == [
        "waiting for another process",
        "downloading: 0 of 99 MB",
        "downloading: 63 of 99 MB",
        "loading the base",
        "testing t1: 2 of 3 tasks",
    ]


@pytest.mark.parametrize("width", [40, 80])
def test_a_live_bar_fits_and_is_gone_at_the_end(width):
    file = io.StringIO()
    console = Console(file=file, width=width, force_terminal=True, legacy_windows=False)
    name = "a-name-" * 9
    with LiveWatcher(console) as told:
        told.fetching("waiting for another process", 0, 0)
        told.fetching("downloading [x]", 5_000_000, 93_000_000)
        for step in range(3):
            told.training(name, 12000 + step, 99999, {"task_loss": 2379.998 / (step + 1)})
            told.progress.refresh()
        told.validated(name, 0.5)
        told.evaluating(1, name, 3, 12)
        told.progress.refresh()
    written = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", file.getvalue())
    bars = [line.rstrip() for line in re.split(r"[\r\n]", written) if "━" in line]
    assert max(map(len, bars)) < width - 2, "^C must fit behind it"
    if width == 80:
        assert any("12000/99999 loss 2380" in line for line in bars)
        assert any(line.startswith("testing") and "3/12" in line for line in bars)
    assert f"learning {name}: validation 0.500" in written.replace("\r", "\n").splitlines()
    assert file.getvalue().endswith("\x1b[2K"), "the line of the bar is erased"


def test_a_bar_starts_anew_for_what_is_new():
    told = LiveWatcher(Console(file=io.StringIO(), force_terminal=True))
    told.training("a", 7, 9, {"task_loss": 1.0})
    told.training("b", 1, 9, {})
    [bar] = told.progress.tasks
    assert (bar.description, bar.completed, bar.total, bar.fields["figures"]) == ("learning b", 1, 9, "")
    told.fetching("loading the base", 0, 0)
    [bar] = told.progress.tasks
    assert bar.total is None


def test_who_watches():
    assert isinstance(watcher(Console(file=io.StringIO(), force_terminal=True)), LiveWatcher)
    assert not isinstance(watcher(Console(file=io.StringIO())), LiveWatcher)
    dumb = Console(file=io.StringIO(), force_terminal=True, _environ={"TERM": "dumb"})
    assert not isinstance(watcher(dumb), LiveWatcher)
