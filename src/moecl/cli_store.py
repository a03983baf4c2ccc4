"""The commands on a run's store: its tasks, their versions, and the log of what was done to them."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from moecl._sizes import size
from moecl.cli_options import AsJson, Device, RunOrStore
from moecl.errors import ConfigError, MoECLError, TaskError
from moecl.terminal import Command, quietly

if TYPE_CHECKING:
    from moecl.store import Store

out, err = Console(), Console(stderr=True)

Task = Annotated[str, typer.Argument(metavar="NAME", help="A task; `moecl tasks RUN` lists them.")]
Version = Annotated[str, typer.Argument(metavar="NAME[@VERSION]", help="A task, or one version of it.")]


def register(app: typer.Typer) -> None:
    for command, examples in COMMANDS.items():
        app.command(cls=Command, epilog=examples)(command)


def tasks(
    run: RunOrStore,
    everything: Annotated[bool, typer.Option("--all", help="Older versions and retired tasks, too.")] = False,
    as_json: AsJson = False,
) -> None:
    """List what a run has learned.

    The score is that of the end of the run, and a sha256 that of the task's own expert.
    """
    from moecl.show_store import show_tasks
    from moecl.using import learned

    rows = learned(run, everything)
    print(json.dumps(rows, ensure_ascii=False)) if as_json else show_tasks(out, rows)


def promote(
    run: RunOrStore,
    task: Version,
    alias: Annotated[str, typer.Option("--as", metavar="ALIAS", help="The alias, in small letters.")] = "prod",
    remove: Annotated[bool, typer.Option("--remove", help="Take the alias away instead.")] = False,
) -> None:
    """Give a version an alias: NAME@prod.

    Wherever a task is named, NAME@ALIAS then is that version, until another one is promoted. NAME alone is not changed.
    """
    with changing(run) as store:
        if remove:
            if "@" in task:
                name = task.partition("@")[0]
                raise TaskError(f"task {task!r}: an alias is a task's, not a version's; give {name} alone")
            store.remove_alias(task, alias)
            done(f"{task}@{alias} is no more")
        else:
            record = store.promote(task, alias)
            done(f"{record.name}@{alias} is now {record.reference}")


def rollback(
    run: RunOrStore,
    task: Task,
    to: Annotated[
        int | None, typer.Option("--to", metavar="VERSION", min=1, help="Default: the one before the current one.")
    ] = None,
) -> None:
    """Let an older version of a task answer again.

    With the answers that it had. The newer one is kept; --to with its number brings it back.
    """
    with changing(run) as store:
        before = store.record(task)
        done(f"{task} is now {store.rollback(task, to).reference}; it was {before.reference}")


def retire(
    run: RunOrStore,
    task: Task,
    undo: Annotated[bool, typer.Option("--undo", help="Bring it back.")] = False,
) -> None:
    """Hide a task.

    It is kept, but not listed, and answers only where its version is named (NAME@VERSION).
    """
    with changing(run) as store:
        if undo:
            done(f"{store.unretire(task).reference} is back")
        else:
            store.retire(task)
            done(f"{task} is retired; `moecl retire {run} {task} --undo` brings it back")


def delete(
    run: RunOrStore,
    task: Version,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Remove a version, or a task whole.

    And the objects that nothing else needs. What other tasks and the state for further learning took from it stays.
    """
    with changing(run) as store:
        gone = ", ".join(record.reference for record in store.would_delete(task))
        if not yes and not sys.stdin.isatty():
            raise ConfigError(f"--yes: {gone} would be deleted for good; say --yes where nobody can be asked")
        if not yes and not typer.confirm(f"Delete {gone} for good?", err=True):
            done("nothing deleted")
            return
        removed = store.delete(task)
        done(f"{gone} deleted: {files(removed.files)}, {size(removed.bytes)}")


def verify(
    run: RunOrStore,
    base: Annotated[bool, typer.Option("--base/--no-base", help="Load the base, and each part into it.")] = True,
    device: Device = "cpu",
) -> None:
    """Check a store, all of it.

    Manifest, sha256 of every object, values that are not finite, the audit log; the base's digest and the shapes that
    it asks for. A line a problem; exit 1 where there is one.
    """
    from moecl.using import open_store, problems_on_base

    store = open_store(run)
    with quietly(), err.status("reading the store"):
        problems = store.verify()
        if base:
            problems = list(dict.fromkeys([*problems, *problems_on_base(store, device)]))
    for problem in problems:
        print(problem)
    if problems:
        raise MoECLError(f"{store.path}: {len(problems)} problem{'s' if len(problems) > 1 else ''}")
    versions, lines = len(store.manifest.tasks), sum(1 for _ in store.audit())
    on = "on its base" if base else "the base was not looked at"
    done(f"{store.path} is whole: {versions} versions, {len(store.manifest.digests())} objects, log of {lines}; {on}")


def gc(run: RunOrStore) -> None:
    """Remove objects that no version needs.

    Parts that were trained on since, and what a killed command left. No task and no version is lost.
    """
    with changing(run) as store:
        removed = store.gc()
        done(f"removed {files(removed.files)}, {size(removed.bytes)}")


def log(
    run: RunOrStore,
    task: Annotated[str | None, typer.Option("--task", metavar="NAME", help="Only lines about it.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show who changed what in a store.

    The audit log, oldest first; with --json a JSON object a line. `moecl verify` tells whether it was altered.
    """
    from moecl.show_store import show_log
    from moecl.using import open_store

    every = list(open_store(run).audit())
    known = {change.task for _, line in every if line is not None for change in line.changes}
    if task is not None and task not in known:
        raise TaskError(f"--task: nothing was done to {task!r}; the log tells of {', '.join(sorted(known))}")
    lines = [
        (number, line)
        for number, line in every
        if task is None or (line is not None and task in {change.task for change in line.changes})
    ]
    if as_json:
        for _, line in lines:
            print("null" if line is None else line.model_dump_json(exclude_defaults=True))
    else:
        show_log(out, lines)


@contextmanager
def changing(run: Path) -> "Iterator[Store]":
    """The store of a run, to change it; nobody may be learning in the run meanwhile."""
    from moecl.run_folder import RunFolder
    from moecl.using import open_store

    store, folder = open_store(run, readonly=False), RunFolder(run)
    if not folder.exists():
        with store.lock():
            yield store
        return
    with folder.lock(), store.lock():
        yield store


def files(count: int) -> str:
    return f"{count} file{'' if count == 1 else 's'}"


def done(message: str) -> None:
    from moecl.show import say

    say(out, message)


COMMANDS: dict[Callable[..., None], str] = {
    tasks: "moecl tasks runs/mine\nmoecl tasks runs/mine --all",
    promote: "moecl promote runs/mine reviews\nmoecl promote runs/mine reviews@2 --as beta\n"
    "moecl promote runs/mine reviews --as beta --remove",
    rollback: "moecl rollback runs/mine reviews\nmoecl rollback runs/mine reviews --to 3",
    retire: "moecl retire runs/mine reviews\nmoecl retire runs/mine reviews --undo",
    delete: "moecl delete runs/mine reviews@1\nmoecl delete runs/mine reviews --yes",
    verify: "moecl verify runs/mine\nmoecl verify runs/mine --no-base",
    gc: "moecl gc runs/mine",
    log: "moecl log runs/mine\nmoecl log runs/mine --task reviews",
}
