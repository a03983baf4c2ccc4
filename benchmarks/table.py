"""The measured numbers of docs/benchmarks.md, rendered from benchmarks/results/ so that they cannot drift.

python benchmarks/table.py            print them
python benchmarks/table.py --write    put them into docs/benchmarks.md
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from measure import met, run
from moecl.report.bench import sections
from moecl.report.page import Figure, Page, Section, markdown
from moecl.report.read import Bench, merged, read
from moecl.review_measure import Change, Review
from moecl.review_tables import against_table, slipped_most

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parent.parent / "docs" / "benchmarks.md"
MARK = "<!-- {}{} -->"
BENCHES = (("mtl5", "mtl5-third-seed"), ("compliance3",), ("ablations",))  # those of a group are one
QUALITY = ("", "Methods", "Who is ahead", "By task", "What was tuned")  # of a bench's report; the rest is its protocol

Result = dict[str, Any]


def read_results(folder: Path = RESULTS) -> list[Result]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def render(results: Sequence[Result]) -> str:
    """Every ratio against its target, what single benchmarks have beside ratios, and where each ran."""
    if not results:
        return "Nothing is measured yet."
    own = [list(rows(result)) for result in results for rows in (floors, layers, abstention, growth)]
    tables = [list(ratios(results)), *own, list(machines(results))]
    return "\n\n".join("\n".join(lines) for lines in tables if lines)


def ratios(results: Sequence[Result]) -> Iterator[str]:
    yield "| benchmark | ratio | target | measured | quartiles | |"
    yield "|---|---|---|---|---|---|"
    for result in results:
        targets, spreads = result["targets"], result["figures"].get("spread", {})
        for name in sorted(result["ratios"], key=lambda name: name not in targets):
            value, target = result["ratios"][name], targets.get(name)
            wanted = " and ".join(f"{sign} {bound:g}" for sign, bound in (target or {}).items())
            around = spreads.get(name)
            between = f"{around['q1']:.3f} to {around['q3']:.3f}" if around else ""
            verdict = "" if target is None else "met" if met(value, target) else "**missed**"
            yield f"| {result['benchmark']} | `{name}` | {wanted} | {value:.3f} | {between} | {verdict} |"


def floors(result: Result) -> Iterator[str]:
    """How far each side's step is from what was counted, where a result has it."""
    figures = result["figures"]
    found = [name for name in figures if name.startswith("floor_")]
    if found:
        yield "| step | side | base GFLOP | LoRA GFLOP | FFN GB | floor s | measured s | measured / floor |"
        yield "|---|---|---|---|---|---|---|---|"
    for name in found:
        floor, precision = figures[name], name.removeprefix("floor_")
        for side in floor["lora_flops"]:
            counted = [floor["base_flops"][side] / 1e9, floor["lora_flops"][side] / 1e9, floor["ffn_bytes"] / 1e9]
            least, taken = floor[f"{side}_seconds"], figures[f"step_seconds_{precision}"][side]["median"]
            numbers = " | ".join(f"{value:.3g}" for value in [*counted, least, taken, taken / least])
            yield f"| {precision} | {side} | {numbers} |"


def layers(result: Result) -> Iterator[str]:
    """What the router was chosen from: on validation rows, the share sent to their task / how well none's stand out."""
    streams = {name: found["validation"] for name, found in result["figures"].get("streams", {}).items()}
    if streams:
        yield f"| read of a text | {' | '.join(streams)} |"
        yield f"|---|{'---|' * len(streams)}"
        for what in next(iter(streams.values())):
            cells = [" / ".join(f"{value:.3f}" for value in found[what].values()) for found in streams.values()]
            yield f"| {what.replace('_', ' ')} | {' | '.join(cells)} |"


def abstention(result: Result) -> Iterator[str]:
    """On test rows: what a wanted rate of false accepts comes to."""
    known = result["figures"].get("streams", {})
    streams = {name: found["abstention"] for name, found in known.items() if "abstention" in found}
    if streams:
        yield "| stream | wanted | false accepts | accepted of the tasks' own | of these right |"
        yield "|---|---|---|---|---|"
        for name, points in streams.items():
            for point in points:
                yield f"| {name} | {' | '.join(f'{value:.3g}' for value in point.values())} |"


def growth(result: Result) -> Iterator[str]:
    """How the router does as tasks come, and what a store pays for it."""
    figures = result["figures"]
    if right := figures.get("right_by_tasks"):
        kept = figures["bytes"]
        yield f"| tasks | {' | '.join(right)} |"
        yield f"|---|{'---|' * len(right)}"
        yield f"| rows sent to their task | {' | '.join(f'{share:.3f}' for share in right.values())} |"
        sizes = [kept["once"] + int(tasks) * kept["a_task"] for tasks in right]
        yield f"| bytes in the store | {' | '.join(f'{size:,}' for size in sizes)} |"


def machines(results: Sequence[Result]) -> Iterator[str]:
    for result in results:
        where = result["environment"]
        versions = ", ".join(f"{name} {number}" for name, number in where["versions"].items())
        precision = f", {where['precision']}" if "precision" in where else ""
        yield (
            f"- {result['benchmark']}: {where['date']}, {where['processor']}, {where['threads']} threads{precision}, "
            f"{versions}, commit {where['commit']}"
        )


def quality(folder: Path = RESULTS / "quality") -> str:
    """What `moecl report` says of each bench that has a finished cell, and what reviews of its cells came to."""
    parts = []
    for group in BENCHES:
        folders = [folder / name for name in group if (folder / name / "bench.json").is_file()]
        found = [bench for where in folders if isinstance(bench := read(where), Bench) and bench.results]
        parts += [of_bench(bench) for bench in merged(found)]
        parts += ["\n".join(reviews(where)) for where in folders]
    return "\n\n".join(filter(None, parts)) or "Nothing is measured yet."


def reviews(bench: Path) -> Iterator[str]:
    """Reviews of cells, one against another, all tasks together: reviews/A_against_B/review.json; and their means."""
    found: dict[tuple[str, str], list[Change]] = {}
    for path in sorted(bench.glob("reviews/*/review.json")):
        a, b = path.parent.name.split("_against_")
        against = Review.model_validate_json(path.read_text()).against
        assert against is not None
        if not found:
            head = (
                "A",
                "B",
                "rate A",
                "rate B",
                "A - B in points (95 %)",
                "saved in 1000",
                "precision A, B",
                "slipped most A, B",
            )
            yield f"#### What needs no human\n\n| {' | '.join(head)} |\n|{'---|' * len(head)}"
        found.setdefault((a.split(".")[0], b.split(".")[0]), []).append(against.total)
        worst, of_a, of_b = slipped_most(against.total)
        cells = against_table(against, a, b).lines[-1].cells[1:]
        yield f"| {' | '.join((a, b, *cells, f'{worst} {of_a}, {of_b}'))} |"
    for (a, b), changes in found.items():
        rates = [f"{100 * fmean(getattr(change, side).stripping_rate for change in changes):.1f} %" for side in "ab"]
        points = 100 * fmean(change.difference for change in changes)
        yield f"| **{a}**, mean | {b} | {rates[0]} | {rates[1]} | **{points:+.1f}** | {10 * points:.0f} | | |"


def of_bench(bench: Bench) -> str:
    named, level = f"Bench {bench.name}", 3
    parts, _, _ = sections(bench, named)
    shown = [
        Section(part.title, [block for block in part.blocks if not isinstance(block, Figure)], part.level + 1)
        for part in parts
        if part.title in (named, *QUALITY)
    ]
    assert shown[0].level == level
    return markdown(Page("", shown)).partition("\n\n")[2].strip()


def placed(page: str, name: str, measured: str) -> str:
    """The page with what stands between the marks `name` replaced."""
    begin, end = MARK.format("", name), MARK.format("/", name)
    before, _, rest = page.partition(begin)
    _, _, after = rest.partition(end)
    return f"{before}{begin}\n\n{measured}\n\n{end}{after}"


def whole(page: str) -> str:
    """The page as it should be."""
    return placed(placed(page, "measured", render(read_results())), "quality", quality())


def main(argv: Sequence[str] | None = None) -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--write", action="store_true", help="put them into docs/benchmarks.md")
    if made.parse_args(argv).write:
        PAGE.write_text(whole(PAGE.read_text()))
    else:
        print(render(read_results()), quality(), sep="\n\n")


if __name__ == "__main__":
    run(main)
