"""The command line: parse, call, print. The only place that exits."""

import json
import os
import sys
import traceback
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from typer.main import get_command

from moecl import cli_bench, cli_cache, cli_compare, cli_export, cli_review, cli_router, cli_serve, cli_store
from moecl.cli_options import (
    AsJson,
    Device,
    ExpertMemory,
    MaxTokens,
    Overrides,
    Run,
    RunOrStore,
    Stream,
    StreamDevice,
    ThresholdsFile,
)
from moecl.errors import ConfigError, RunError, near
from moecl.terminal import Command, CommandWithKeys, explain, quietly, watched

if TYPE_CHECKING:
    from moecl.config import StreamConfig
    from moecl.results import Result

app = typer.Typer(
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode=None,
    help="Teach a language model one task after another, and keep what it learned.",
    epilog="Start with `moecl demo`, then `moecl init` and `moecl check` for a stream of your own.",
)

GOES_ON = ("train", "learn", "demo", "bench")
SPLITS = ("test", "validation", "train")
out, err = Console(), Console(stderr=True)


@app.callback()
def everywhere(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """Options of every command. `main` reads them itself, so that --debug may stand anywhere."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line: errors in one line; 2 for what the user can fix, 1 for the rest, 130 for Ctrl-C."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    words = [word for word in given if word != "--debug"]
    if words[:1] == ["--version"]:
        from importlib.metadata import version

        print(f"moecl {version('moecl')}")
        return 0
    try:
        status = get_command(app).main(words or ["--help"], prog_name="moecl", standalone_mode=False) or 0
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of a pipe left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except typer.Abort:  # at a question
        status = 130
    except Exception as error:
        if len(words) < len(given):
            traceback.print_exc()
        message, status = explain(error, words[0] if words else "")
        complain(message)
    if status == 130:
        complain("stopped" + ("; the same command goes on" if words[0] in GOES_ON else ""))
    return int(status)


def complain(message: str) -> None:
    err.print(f"moecl: {message}", highlight=False, markup=False, soft_wrap=True)


# Learning


@app.command(
    cls=CommandWithKeys,
    epilog="moecl train stream.yaml -o runs/mine\nmoecl train stream.yaml -o runs/slow --set train.lr=1e-4",
)
def train(
    stream: Stream,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="RUN", help="The run folder; default runs/STREAM.")
    ] = None,
    overrides: Overrides = None,
    device: StreamDevice = None,
    expert_memory: ExpertMemory = "2GB",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be done, and stop.")] = False,
) -> None:
    """Learn a stream of tasks.

    Started again with the same command, a run goes on where it was stopped; a finished one shows its result.
    """
    config = read_stream(stream, overrides, device)
    folder = output or Path("runs") / stream.stem
    if dry_run:
        print_plan(config, folder)
    else:
        show_run(learn_stream(config, folder, expert_memory), folder)


def read_stream(stream: Path, overrides: list[str] | None, device: str | None) -> "StreamConfig":
    from moecl.config import load_stream

    return load_stream(stream, [*(overrides or []), *([f"train.device={device}"] if device else [])])


def print_plan(config: "StreamConfig", folder: Path) -> None:
    """The resolved stream as YAML, and what would be done as comments; what the folder holds is looked at, too."""
    from moecl.config import dump_stream
    from moecl.data.task import load_task_data
    from moecl.run_folder import RunFolder

    run = RunFolder(folder)
    if run.exists():
        run.check_same(config)
    elif folder.is_dir():
        run.check_free()
    found = {task.name: load_task_data(task).splits() for task in config.tasks}
    print(dump_stream(config), end="")
    state = "is learned in" if run.last_result() else "would go on in" if run.exists() else "would be learned into"
    print(f"# {state} {folder}:")
    for name, splits in found.items():
        steps = -(-len(splits["train"].examples) // config.train.batch_size) * config.train.epochs
        print(f"#   {name}: {counts(splits)}, {steps} batches")


def counts(splits: dict[str, Any]) -> str:
    return ", ".join(f"{len(split.examples)} {name} rows" for name, split in splits.items())


def learn_stream(config: "StreamConfig", folder: Path, expert_memory: str = "2GB") -> "Result":
    from moecl.run_folder import RunFolder

    run = RunFolder(folder)
    if run.exists():
        run.check_same(config)
        if (result := run.finished()) is not None:  # shown without the seconds that torch takes to load
            return result
    with watched(err) as watching:
        from moecl.train import ContinualTrainer

        return ContinualTrainer(config, folder, watching, expert_memory).run()


def show_run(result: "Result", folder: Path) -> None:
    from moecl.show import show_result

    show_result(out, result, str(folder))


@app.command(
    cls=Command, epilog="moecl learn runs/mine --task new.yaml\nmoecl learn runs/mine --task changed.yaml --replace"
)
def learn(
    run: Run,
    task: Annotated[Path, typer.Option("--task", metavar="FILE", help="A YAML file with the new task's keys.")],
    replace: Annotated[
        bool, typer.Option("--replace", help="Learn a known task again, as a new version; its rules changed.")
    ] = False,
    expert_memory: ExpertMemory = "2GB",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Read the task and its data, and stop.")] = False,
) -> None:
    """Teach a finished run one more task.

    The old tasks' data is not needed. FILE holds what stands under a task of a stream: name, kind, train and so on.
    """
    from moecl.config import load_task
    from moecl.run_folder import RunFolder

    RunFolder(run).config()
    if not task.exists():
        raise ConfigError(f"--task {task}: no such file; give a YAML file with the new task's keys")
    config = load_task(task)
    if dry_run:
        from moecl.data.task import load_task_data

        print(f"{config.name}: {counts(load_task_data(config).splits())}; would be learned into {run}")
        return
    with watched(err) as watching:
        from moecl.train import learn as learn_task

        result = learn_task(run, config, replace, watching, expert_memory)
    show_run(result, run)


@app.command(cls=Command, epilog="moecl demo\nmoecl demo -o runs/mine")
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", metavar="RUN", help="The run folder.")] = Path("runs/demo"),
) -> None:
    """Watch a real model learn four real tasks and keep them.

    Fetches SmolLM2-135M-Instruct and four sentiment data sets, once; takes some minutes on two cores.
    """
    from moecl.config import load_stream

    with resources.as_file(resources.files("moecl") / "demo.yaml") as path:
        config = load_stream(path)
    show_run(learn_stream(config, output), output)
    print("\nTry next:")
    print(f"  echo 'The crowd went home happy.' | moecl predict {output} --task tweets")
    print(f"  moecl tasks {output}")
    print("  moecl init stream.yaml")
    print("  moecl check stream.yaml   # once it names your data")


app.command(cls=cli_bench.BenchCommand, epilog=cli_bench.EPILOG)(cli_bench.bench)


# Using


@app.command(
    cls=Command,
    epilog="moecl predict runs/mine comments.txt --task reviews\n"
    "echo 'I like it.' | moecl predict runs/mine --task reviews\n"
    "moecl predict runs/mine new.jsonl --task reviews --thresholds runs/mine/review/thresholds.json\n"
    "moecl predict runs/mine new.jsonl --task auto",
)
def predict(
    run: RunOrStore,
    file: Annotated[
        Path | None,
        typer.Argument(metavar="FILE", help="Rows (JSONL, CSV ...) or plain lines; else standard input."),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option("--task", metavar="NAME", help="The task that answers: NAME, NAME@VERSION or NAME@ALIAS."),
    ] = None,
    thresholds: ThresholdsFile = None,
    max_tokens: MaxTokens = None,
    device: Device = "auto",
    expert_memory: ExpertMemory = "2GB",
) -> None:
    """Answer texts: one JSON object a row, in order.

    Each has the `label`, the `scores` of all labels, and the `task` and `version` that answered; for a generation task
    `label` is the text that was written. A row's own label, where the task knows it, comes back as `true`. `decision`
    is the label, or `review` for a human, where there are thresholds. Texts longer than the task's max_length are cut
    as they were when it was learned. `--task auto`: each text finds its task (null, as `label`, where it is less
    `familiar` than `moecl router RUN` says), and `route` has each task's share if it is for one of them.
    """
    file = None if file == Path("-") else file
    if file is None and sys.stdin.isatty():
        err.print("rows from the terminal, one a line; Ctrl-D ends", style="dim")
    with quietly():
        from moecl.predict_lines import answers

        for found in answers(run, file, task, device, expert_memory, thresholds, max_tokens):
            print("\n".join(json.dumps(one, ensure_ascii=False) for one in found), flush=True)


@app.command(
    "eval",
    cls=Command,
    epilog="moecl eval runs/mine\nmoecl eval runs/mine --task reviews --split validation\n"
    "moecl eval runs/mine --task auto",
)
def evaluate(
    run: Run,
    tasks: Annotated[
        list[str] | None, typer.Option("--task", metavar="NAME", help="Only this task; repeatable.")
    ] = None,
    split: Annotated[str, typer.Option("--split", metavar="SPLIT", help="test, validation or train.")] = "test",
    device: Device = "auto",
    expert_memory: ExpertMemory = "2GB",
    as_json: AsJson = False,
) -> None:
    """Score a run's tasks as they are now.

    The rows are those of the splits that the run's config.yaml names. `--task auto`: every task with and without its
    name, where texts find their task themselves; of the test split it is kept for `moecl report`.
    """
    from moecl.config import AUTO
    from moecl.eval_run import scores
    from moecl.show import show_scores

    if split not in SPLITS:
        raise ConfigError(f"--split: {split!r} is none of {', '.join(SPLITS)}{near(split, SPLITS)}")
    if AUTO in (tasks or []):
        found = cli_router.evaluate_auto(err, run, tasks or [], split, device, expert_memory)
        print(found.model_dump_json(by_alias=True)) if as_json else cli_router.show_routing(out, found)
        return
    with watched(err) as watching:
        rows = scores(run, tasks or [], split, device, expert_memory, watching)
    print(json.dumps(rows, ensure_ascii=False)) if as_json else show_scores(out, rows)


cli_store.register(app)
app.command(cls=Command, epilog=cli_export.EXAMPLES)(cli_export.export)
app.command(cls=Command, epilog=cli_compare.EXAMPLES)(cli_compare.compare)
app.command(cls=Command, epilog=cli_review.EXAMPLES)(cli_review.review)
app.command(cls=Command, epilog=cli_router.EXAMPLES)(cli_router.router)
app.command(cls=Command, epilog=cli_serve.EXAMPLES)(cli_serve.serve)


# Preparing


@app.command(cls=Command, epilog="moecl init stream.yaml")
def init(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The stream file to write.")] = Path("stream.yaml"),
) -> None:
    """Write a commented stream file to start from."""
    from moecl._atomic import one_line
    from moecl.show import say

    text = (resources.files("moecl") / "template.yaml").read_text(encoding="utf-8")
    if file.exists():
        raise RunError(f"{file}: exists already; give another name")
    if not file.parent.is_dir():
        raise RunError(f"{file}: no folder {file.parent}; make it first")
    with one_line(file), file.open("x", encoding="utf-8") as target:
        target.write(text)
    say(err, f"{file} written: name your data in it, then `moecl check {file}`")


@app.command(cls=Command, epilog="moecl check stream.yaml\nmoecl check stream.yaml --set train.max_length=128")
def check(stream: Stream, overrides: Overrides = None, device: StreamDevice = None, as_json: AsJson = False) -> None:
    """Validate a stream and estimate its cost, without training.

    Reads all rows and the base: counts, balance, token lengths, cuts, duplicates and overlaps; time and memory.
    """
    config = read_stream(stream, overrides, device)
    with watched(err) as watching:
        from moecl.estimate import survey

        found = survey(config, watching)
    if as_json:
        print(json.dumps(found, ensure_ascii=False))
    else:
        from moecl.show import show_check

        show_check(out, found["tasks"], found["estimate"])


app.command(cls=Command, epilog=cli_cache.EXAMPLES)(cli_cache.fetch)
app.add_typer(cli_cache.app, name="cache")


@app.command(
    cls=Command, epilog="moecl report runs/mine\nmoecl report out/bench\nmoecl report runs/a runs/b -o ab.html"
)
def report(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR", help="Run folders, or what `moecl bench` wrote.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="The page; default report.html in DIR, for several here."),
    ] = None,
) -> None:
    """Show runs and benches on one HTML page that opens offline.

    The same is written as Markdown beside it. Benches of the same base and tasks are taken as one.
    """
    from moecl.cli_report import report as write_report

    write_report(folders, output, out)


@app.command(cls=Command, epilog="moecl methods\nmoecl methods ewc\nmoecl methods --json")
def methods(
    name: Annotated[str | None, typer.Argument(metavar="[METHOD]", help="Only this one, with its keys.")] = None,
    as_json: AsJson = False,
) -> None:
    """List the methods: what each trains, stores, needs."""
    from moecl.method_config import describe, method_names
    from moecl.show import show_method, show_methods

    known = method_names()
    if name is not None and name not in known:
        raise ConfigError(f"no method {name!r}{near(name, known)}; there are: {', '.join(known)}")
    found = [describe(one) for one in (known if name is None else [name])]
    if as_json:
        print(json.dumps(found, ensure_ascii=False))
    elif name is None:
        show_methods(out, found)
    else:
        show_method(out, found[0])
