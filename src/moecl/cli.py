"""The command line: parse, call, print. The only place that exits."""

import json
import os
import sys
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib import resources
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO

import typer
from rich.console import Console
from typer.core import TyperCommand

from moecl.errors import ConfigError, DataError, MoECLError, RunError

if TYPE_CHECKING:
    from moecl.config import StreamConfig
    from moecl.results import Result

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Teach a language model one task after another, and keep what it learned.",
    epilog="Start with `moecl demo`, then `moecl init` and `moecl check` for a stream of your own.",
)
cache_app = typer.Typer(no_args_is_help=True, help="What was fetched, and where it is.")
app.add_typer(cache_app, name="cache")

STEP = 64  # rows that `predict` answers before it prints
out, err = Console(), Console(stderr=True)

Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a setting, e.g. train.lr=5e-4; repeatable.")
]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]


@app.callback()
def everywhere(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """Options of every command. `main` reads --debug itself, so that it may stand anywhere."""


def main() -> None:
    """Run the command line: errors in one line, exit 2 for what the user can fix, 1 for the rest."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    debug = len(arguments) < len(sys.argv) - 1
    if arguments == ["--version"]:
        from importlib.metadata import version

        print(f"moecl {version('moecl')}")
        return
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        app(arguments)
    except BrokenPipeError:  # the reader of a pipe left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(complain("stopped; the same command goes on where it was", 130))
    except Exception as error:
        if debug:
            traceback.print_exc()
        if isinstance(error, MoECLError):
            sys.exit(complain(str(error), error.exit_code))
        reason = " ".join(str(error).split()) or "no message"
        sys.exit(complain(f"{type(error).__name__}: {reason} (this should not happen: --debug shows where)", 1))


def complain(message: str, status: int) -> int:
    err.print(f"moecl: {message}", highlight=False, markup=False, soft_wrap=True)
    return status


# Learning


class WithKeys(TyperCommand):
    """A command whose help ends with every key of a stream file, from the settings' own descriptions."""

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        from moecl.config import describe_settings

        rows = [(f"{key} <{kind}>", f"{text} [default: {default}]") for key, kind, default, text in describe_settings()]
        with formatter.section("Keys of a stream file, for --set too"):
            formatter.write_dl(rows)


@app.command(cls=WithKeys)
def train(
    stream: Annotated[Path, typer.Argument(metavar="STREAM", help="A stream file; `moecl init` writes one.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="RUN", help="The run folder; default runs/STREAM.")
    ] = None,
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be done, and stop.")] = False,
) -> None:
    """Learn a stream of tasks.

    Started again with the same command, a run goes on where it was stopped; a finished one shows its result.
    """
    from moecl.config import load_stream

    config = load_stream(stream, overrides or [])
    folder = output or Path("runs") / stream.stem
    if dry_run:
        print_plan(config, folder)
    else:
        show_run(learn_stream(config, folder), folder)


def print_plan(config: "StreamConfig", folder: Path) -> None:
    """The resolved stream as YAML, and what would be done as comments."""
    from moecl.config import dump_stream
    from moecl.data.task import load_task_data

    print(dump_stream(config), end="")
    print(f"# would be learned into {folder}:")
    for task in config.tasks:
        splits = load_task_data(task).splits()
        counts = ", ".join(f"{len(split.examples)} {name} rows" for name, split in splits.items())
        steps = -(-len(splits["train"].examples) // config.train.batch_size) * config.train.epochs
        print(f"#   {task.name}: {counts}, {steps} batches")


def learn_stream(config: "StreamConfig", folder: Path) -> "Result":
    with quietly():
        from moecl.train import ContinualTrainer
        from moecl.watch import watcher

        with watcher(err) as watching:
            return ContinualTrainer(config, folder, watching).run()


def show_run(result: "Result", folder: Path) -> None:
    from moecl.show import show_result

    show_result(out, result, str(folder))


@app.command()
def learn(
    run: Run,
    task: Annotated[Path, typer.Option("--task", metavar="FILE", help="A YAML file with the new task's keys.")],
    replace: Annotated[
        bool, typer.Option("--replace", help="Learn a known task again, as a new version; its rules changed.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Read the task and its data, and stop.")] = False,
) -> None:
    """Teach a finished run one more task, without the old tasks' data."""
    from moecl.config import load_task

    config = load_task(task)
    if dry_run:
        from moecl.data.task import load_task_data

        data = load_task_data(config)
        counts = ", ".join(f"{len(split.examples)} {name} rows" for name, split in data.splits().items())
        print(f"{config.name}: {counts}; would be learned into {run}")
        return
    with quietly():
        from moecl.train import learn as learn_task
        from moecl.watch import watcher

        with watcher(err) as watching:
            result = learn_task(run, config, replace, watching)
    show_run(result, run)


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", metavar="RUN", help="The run folder.")] = Path("runs/demo"),
) -> None:
    """Watch a real language model learn four real tasks in a row and keep them: some minutes on two cores."""
    from moecl.config import load_stream

    with resources.as_file(resources.files("moecl") / "demo.yaml") as path:
        config = load_stream(path)
    show_run(learn_stream(config, output), output)
    print("\nTry next:")
    print(f"  echo 'The crowd went home happy.' | moecl predict {output} --task tweets")
    print(f"  moecl tasks {output}")
    print("  moecl init stream.yaml && moecl check stream.yaml")


# Using


@app.command()
def predict(
    run: Run,
    task: Annotated[str, typer.Option("--task", metavar="NAME", help="The task that answers; `moecl tasks RUN` lists them.")],
    file: Annotated[
        Path | None, typer.Argument(metavar="[FILE]", help="JSONL rows or plain lines; default standard input.")
    ] = None,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda, mps ...")] = "auto",
) -> None:
    """Answer texts: one JSON object a row, in order, with `label` and `scores`."""
    from moecl.store import Store

    Store.open(store_of(run), readonly=True).record(task)  # an unknown task shows before the base is loaded
    with quietly():
        from moecl.data.task import rows_from_lines
        from moecl.engine import Engine

        engine = Engine(load(run, device))
        with lines_of(file) as lines:
            rows = rows_from_lines(lines, engine.bank[task].task, "stdin" if file is None else str(file))
            for chunk in chunks(rows):
                for prediction in engine.predict(chunk, task):
                    print(json.dumps({"label": prediction.label, "scores": prediction.scores}, ensure_ascii=False))
                sys.stdout.flush()


def chunks(rows: Iterable[Any]) -> Iterator[list[Any]]:
    rows = iter(rows)
    while chunk := list(islice(rows, STEP)):
        yield chunk


@contextmanager
def lines_of(file: Path | None) -> Iterator[BinaryIO]:
    if file is None:
        yield sys.stdin.buffer
        return
    try:
        with file.open("rb") as lines:
            yield lines
    except OSError as error:
        raise DataError(f"{file}: {error.strerror}; give a file of JSONL rows or plain lines") from error


def store_of(run: Path) -> Path:
    """The store of a run, or the folder itself where it is one."""
    from moecl.store import Store

    if not run.is_dir():
        raise RunError(f"{run}: no such folder; give a run folder, as `moecl train` makes them")
    return run if Store.exists(run) else run / "store"


def load(run: Path, device: str = "auto") -> Any:
    from moecl.model import MoECL
    from moecl.store import Store

    return MoECL.from_store(Store.open(store_of(run), readonly=True), device=device)


@app.command("eval")
def evaluate(
    run: Run,
    tasks: Annotated[
        list[str] | None, typer.Option("--task", metavar="NAME", help="Only this task; repeatable.")
    ] = None,
    split: Annotated[str, typer.Option("--split", help="test, validation or train.")] = "test",
    as_json: AsJson = False,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda, mps ...")] = "auto",
) -> None:
    """Score a run's tasks as they are now, on the splits that its config names."""
    from moecl.run_folder import RunFolder
    from moecl.show import show_scores
    from moecl.store import Store

    if split not in ("test", "validation", "train"):
        raise ConfigError(f"--split: {split!r} is none of test, validation, train")
    config = RunFolder(run).config()
    store = Store.open(store_of(run), readonly=True)
    names = [store.record(name).name for name in tasks] if tasks else [record.name for record in store.tasks()]
    sources = {task.name: task for task in config.tasks}
    rows = []
    with quietly():
        from moecl.data.task import read_split
        from moecl.engine import Engine
        from moecl.evaluate import evaluate_task

        engine = Engine(load(run, device), batch_tokens=config.train.eval_batch_tokens)
        for name in names:
            source = getattr(sources[name], split)
            if source is None:
                raise DataError(f"task {name!r} has no {split} rows in {run / 'config.yaml'}; choose another --split")
            entry = engine.bank[name]
            found = read_split(source, entry.task, getattr(sources[name].limit, split), split)
            encoded = engine.encoder(entry.task).encode(found.examples, answers=False)
            rows.append({"task": name, **vars(evaluate_task(engine, entry, found, encoded))})
    print(json.dumps(rows, ensure_ascii=False)) if as_json else show_scores(out, rows)


@app.command()
def tasks(run: Run, as_json: AsJson = False) -> None:
    """List what a run has learned."""
    from moecl.run_folder import RunFolder
    from moecl.show import show_tasks
    from moecl.store import Store

    store, result = Store.open(store_of(run), readonly=True), RunFolder(run).finished()
    last = dict(zip(result.tasks, result.R[-1], strict=True)) if result else {}
    rows = [
        {
            "task": record.name,
            "version": record.version,
            "kind": record.task.kind,
            "labels": list(record.task.labels or ()),
            "metric": record.task.metric,
            "score": last.get(record.name),
            "bytes": sum(store.bytes(record.name)),
            "parts": dict(record.parts),
        }
        for record in store.tasks()
    ]
    print(json.dumps(rows, ensure_ascii=False)) if as_json else show_tasks(out, rows)


# Preparing


@app.command()
def init(
    file: Annotated[Path, typer.Argument(metavar="[FILE]", help="The stream file to write.")] = Path("stream.yaml"),
) -> None:
    """Write a commented stream file to start from."""
    from moecl._atomic import one_line

    text = (resources.files("moecl") / "template.yaml").read_text(encoding="utf-8")
    with one_line(file):
        try:
            with file.open("x", encoding="utf-8") as target:
                target.write(text)
        except FileExistsError as error:
            raise RunError(f"{file}: exists already; give another name") from error
    print(f"{file} written: name your data in it, then `moecl check {file}`")


@app.command()
def check(
    stream: Annotated[Path, typer.Argument(metavar="STREAM", help="A stream file.")],
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Validate a stream, its data and its base, and estimate time and memory, without training."""
    from moecl.config import load_stream
    from moecl.data.task import load_task_data
    from moecl.show import show_check

    config = load_stream(stream, overrides or [])
    data = [load_task_data(task) for task in config.tasks]
    with quietly():
        from moecl.backbone import load_backbone
        from moecl.data.check import describe
        from moecl.data.encode import Encoder
        from moecl.estimate import estimate
        from moecl.train import Watcher, attach, resolve
        from moecl.watch import watcher

        with watcher(err) as watching:
            settled = resolve(config, Watcher())
            train = settled.train
            backbone = load_backbone(settled.base, train.precision, train.device, watching.fetching)
        assert backbone.tokenizer is not None
        encoders = [Encoder(backbone.tokenizer, one.task, one.task.max_length or train.max_length) for one in data]
        found = [describe(one, encoder) for one, encoder in zip(data, encoders, strict=True)]
        sides = [(encoder.encode(one.train.examples), one.test) for one, encoder in zip(data, encoders, strict=True)]
        tests = [
            encoder.encode(test.examples, answers=False) if test else []
            for (_, test), encoder in zip(sides, encoders, strict=True)
        ]
        cost = estimate(attach(backbone, settled)[0], settled, [rows for rows, _ in sides], tests)
    if as_json:
        print(json.dumps({"tasks": found, "estimate": cost}, ensure_ascii=False))
    else:
        show_check(out, found, cost)


@app.command()
def fetch(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME]...", help="Assets to fetch; default all that there are.")
    ] = None,
) -> None:
    """Fetch models and data ahead, for a machine that will have no network."""
    with quietly():
        from moecl.data.assets import ASSETS
        from moecl.data.assets import fetch as fetch_asset
        from moecl.watch import watcher

        for name in names or ASSETS:
            with watcher(err) as watching:
                path = fetch_asset(name, watching.fetching)
            print(f"{name}: {path}")


@cache_app.command("list")
def cache_list(as_json: AsJson = False) -> None:
    """List what is in the cache."""
    from moecl.data.assets import cache_dir, cached

    found = cached()
    if as_json:
        print(json.dumps([{"name": it.name, "path": str(it.path), "bytes": it.bytes} for it in found]))
        return
    for asset in found:
        print(f"{asset.name}  {asset.bytes / 1e6:.1f} MB  {asset.when:%Y-%m-%d}  {asset.path}")
    if not found:
        print(f"nothing in {cache_dir()}; `moecl fetch` fills it, MOECL_CACHE names another folder")


@cache_app.command("clear")
def cache_clear(
    names: Annotated[list[str] | None, typer.Argument(metavar="[NAME]...", help="Only these assets.")] = None,
) -> None:
    """Remove fetched assets; they are fetched again when needed."""
    from moecl.data.assets import cache_dir, clear

    clear(names or None)
    print(f"cleared {', '.join(names) if names else 'all'} in {cache_dir()}")


@app.command()
def methods() -> None:
    """List the methods a stream can name."""
    from moecl.config import METHODS

    for name, settings in METHODS.items():
        print(f"{name:18} {(settings.__doc__ or '').strip().splitlines()[0]}")


@contextmanager
def quietly() -> Iterator[None]:
    """Keep other libraries' bars and advice out of what we print."""
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    yield
