"""`moecl router`, and `moecl eval --task auto`: parse, call, print."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from moecl.cli_options import AsJson, Device, Run
from moecl.errors import ConfigError
from moecl.terminal import quietly, watched

if TYPE_CHECKING:
    from moecl.routing import Routing

EXAMPLES = """moecl router runs/mine
moecl router runs/mine --fit
moecl router runs/mine --false-accept 0.01"""

out, err = Console(), Console(stderr=True)


def router(
    run: Run,
    fit: Annotated[
        bool, typer.Option("--fit", help="Read the training rows of tasks that have no statistics yet.")
    ] = False,
    false_accept: Annotated[
        float | None,
        typer.Option("--false-accept", metavar="SHARE", help="Of texts of no task, how many may be taken for one."),
    ] = None,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Show how texts find their task, or make that possible.

    A run learns it with its tasks (`router: true` in the stream). For a run made before that, or without it, --fit
    reads the rows that its config.yaml names, on --device. `moecl predict RUN --task auto` uses it, `moecl eval RUN
    --task auto` measures it.
    """
    if false_accept is not None and not 0 < false_accept < 1:
        raise ConfigError(
            f"--false-accept: {false_accept:g} is out of range; give a share between 0 and 1, such as 0.05"
        )
    with watched(err) as watching:
        from moecl.route_store import change, described

        if fit or false_accept is not None:
            change(run, fit, false_accept, device, watching)
        found = described(run)
    if as_json:
        import json

        print(json.dumps(found))
        return
    show_router(out, found)


def show_router(console: Console, found: dict[str, Any]) -> None:
    from moecl.show import plain_table, say

    table = plain_table("task", version="right", routed="left")
    for row in found["tasks"]:
        table.add_row(row["task"], str(row["version"]), "yes" if row["known"] else "no: never chosen until --fit")
    console.print(table)
    if found["layer"] is None:
        say(console, "no router statistics; make them with --fit")
        return
    say(console, f"layers read   {found['layer']}")
    say(console, f"false accept  {found['false_accept']:g} of texts of no task, as far as tasks left out can tell")


def evaluate_auto(
    console: Console, run: Path, names: list[str], split: str, device: str, expert_memory: str
) -> "Routing":
    """What `moecl eval RUN --task auto` measures."""
    if len(names) > 1:
        raise ConfigError("--task auto: it measures every task; give no other")
    with quietly(), console.status("answering with and without the task"):
        from moecl.eval_run import routing

        return routing(run, split, device, expert_memory)


def show_routing(console: Console, found: "Routing") -> None:
    from moecl.show import plain_table, say, show_score

    sides = ("with task", "without", "routed right", "unknown", "false accepts")
    table = plain_table("task", "metric", **dict.fromkeys(sides, "right"))
    for one in found.tasks:
        scores = (one.with_task, one.without_task, one.routed, one.unknown, one.left_out)
        table.add_row(one.task, one.metric, *map(show_score, scores))
    console.print(table)
    if found.threshold is None:
        say(console, "unknown: only what lies far from all tasks; more takes three tasks, each to be left out in turn")
        return
    say(
        console,
        f"unknown: less familiar than {found.threshold:.3f}, set for {found.wanted:g} of texts of no task accepted",
    )
    say(console, "false accepts: the task's texts that would be taken for another's, had it not been learned")
