"""The harness of every benchmark: sides run in turn, ratios taken round by round, one JSON object as the last line.

A ratio compares two sides within one round and is then reported as the median over rounds, so that a machine that
slows down for a while slows both. No ratio is formed from two medians.
"""

import argparse
import gc
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch

from moecl.errors import MoECLError

PACKAGES = ("moecl", "torch", "transformers", "peft")

Side = Callable[[], object]
Target = Mapping[str, float]  # a comparison ("<=" or ">=") -> a bound; all of them must hold
Times = dict[str, list[float]]  # seconds of each side, one a round


def say(line: str) -> None:
    """A line for a person: stdout is for the result alone."""
    print(line, file=sys.stderr, flush=True)


def alternate(sides: Mapping[str, Side], rounds: int, warmup: int = 1) -> Times:
    """Run every side once a round; seconds, by side. The order turns, so that no side always follows the same one."""
    names = list(sides)
    times: Times = {name: [] for name in names}
    for number in range(-warmup, rounds):
        at = number % len(names)
        order = names[at:] + names[:at]
        for name in order if number % 2 else reversed(order):
            gc.collect()
            begun = time.perf_counter()
            sides[name]()
            taken = time.perf_counter() - begun
            if number >= 0:
                times[name].append(taken)
        if number >= 0:
            say(f"round {number + 1} of {rounds}: " + ", ".join(f"{name} {times[name][-1]:.3f} s" for name in names))
    return times


def over(numerator: Sequence[float], denominator: Sequence[float]) -> list[float]:
    """A ratio a round."""
    return [a / b for a, b in zip(numerator, denominator, strict=True)]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, quartiles and extremes."""
    low, _, high = quantiles(values, method="inclusive") if len(values) > 1 else (values[0],) * 3
    return {"median": median(values), "q1": low, "q3": high, "min": min(values), "max": max(values)}


class Report:
    """What a benchmark found: ratios against their targets, figures, and where it ran."""

    def __init__(self, benchmark: str, targets: Mapping[str, Target]) -> None:
        self.benchmark, self.known = benchmark, targets
        self.ratios: dict[str, float] = {}
        self.figures: dict[str, Any] = {"spread": {}}

    def ratio(self, name: str, values: Sequence[float]) -> None:
        """The median of `values`, one a round; a target where one is set for this name."""
        self.ratios[name] = median(values)
        self.figures["spread"][name] = spread(values)

    def worst(self, name: str, among: Iterable[str]) -> None:
        """The ratio among these, all reported before, that is farthest on the wrong side of the target of `name`."""
        pick = min if ">=" in self.known[name] else max
        chosen = pick(among, key=self.ratios.__getitem__)
        self.ratios[name] = self.ratios[chosen]
        self.figures["spread"][name] = self.figures["spread"][chosen]

    def seconds(self, name: str, times: Times) -> None:
        """Figure `name`: the spread of each side's seconds."""
        self.figures[name] = {side: spread(values) for side, values in times.items()}

    def rates(self, name: str, times: Times, amount: float) -> None:
        """Figure `name`: what each side does a second, at the median, where a round does `amount`."""
        self.figures[name] = {side: amount / median(values) for side, values in times.items()}

    @property
    def targets(self) -> dict[str, Target]:
        return {name: self.known[name] for name in self.ratios if name in self.known}

    def close(self, options: argparse.Namespace, **environment: Any) -> None:
        """Print it, and write it to --json."""
        for name, value in self.ratios.items():
            say(f"{name}: {value:.3f}{verdict(value, self.targets.get(name))}")
        found = {
            "benchmark": self.benchmark,
            "ratios": self.ratios,
            "targets": self.targets,
            "figures": self.figures,
            "environment": machine(options) | environment,
        }
        if options.json:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps(found, indent=1) + "\n")
        print(json.dumps(found), flush=True)


COMPARE: dict[str, Callable[[float, float], bool]] = {"<=": lambda a, b: a <= b, ">=": lambda a, b: a >= b}


def met(value: float, target: Target) -> bool:
    return all(COMPARE[sign](value, bound) for sign, bound in target.items())


def verdict(value: float, target: Target | None) -> str:
    if target is None:
        return ""
    wanted = " and ".join(f"{sign} {bound:g}" for sign, bound in target.items())
    return f" (target {wanted}: {'met' if met(value, target) else 'missed'})"


def machine(options: argparse.Namespace) -> dict[str, Any]:
    """Where and with what a benchmark ran."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "system": platform.system(),
        "python": platform.python_version(),
        "versions": {name: found for name in PACKAGES if (found := installed(name))},
        "commit": commit(),
        "options": {name: told(value) for name, value in vars(options).items() if name != "json"},
    }


def told(value: Any) -> str:
    """An option's value; of paths the names, as where data lie is the machine's own affair."""
    if isinstance(value, list):
        return ", ".join(map(told, value))
    return value.name if isinstance(value, Path) else str(value)


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.machine()


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def commit() -> str | None:
    """The commit this file is from, with a + where the working tree differs; None without git."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")


def parser(description: str, rounds: int) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    made.add_argument("--rounds", type=positive, default=rounds, help=f"times each side is measured ({rounds})")
    made.add_argument("--json", type=Path, metavar="FILE", help="also write the result to this file")
    made.add_argument("--threads", type=positive, metavar="N", help="processor threads (what torch takes)")
    return made


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number from 1 on")
    return value


def counts(text: str) -> list[int]:
    """A list of numbers: 1,10,100."""
    return [positive(part) for part in text.split(",")]


def start(options: argparse.Namespace) -> None:
    """Settle the threads and every draw."""
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)


def run(main: Callable[[Sequence[str] | None], None]) -> None:
    """Call `main` as a script; an error a user can fix is one line."""
    try:
        main(None)
    except (MoECLError, OSError) as error:
        sys.exit(f"error: {error}")
    except ModuleNotFoundError as error:
        sys.exit(f"error: {error}; benchmarks need more than moecl: pip install 'moecl[bench,osft,serve]'")


def add_base(made: argparse.ArgumentParser) -> None:
    made.add_argument("--base", default="smollm2-135m-instruct", help="asset, hub id or folder (%(default)s)")


def add_precision(made: argparse.ArgumentParser) -> None:
    made.add_argument(
        "--precision",
        choices=("auto", "bf16", "fp32"),
        default="auto",
        help="dtype of the base; auto: bf16 where the processor is fast at it (%(default)s)",
    )
