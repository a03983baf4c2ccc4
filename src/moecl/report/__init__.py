"""Runs and benches -> one HTML page that opens offline, and the same as Markdown."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from moecl._atomic import atomic_write
from moecl.errors import RunError
from moecl.report import bench as of_bench
from moecl.report import compared
from moecl.report import run as of_run
from moecl.report.page import Page, Section, Table, html, markdown
from moecl.report.read import Bench, Run, merged, read


@dataclass(frozen=True)
class Written:
    """Where a report is, and the tables that say the most."""

    html: Path
    markdown: Path
    headlines: list[str]
    tables: list[Table]


def make(
    folders: Sequence[Path], output: Path | None = None, notes: Callable[[Path], Sequence[str]] = lambda folder: ()
) -> Written:
    """Write the report of run and bench folders to `output`, and as Markdown beside it.

    Without `output`: report.html in the folder, or in the current one for several. `notes`: of a run folder, what is
    to be said beside its result.

    Raises:
        RunError: a folder is no run's and no bench's, or the report cannot be written.
        UserError: results cannot be compared, or what draws the report is not installed.
    """
    target = output or (folders[0] if len(folders) == 1 else Path()) / "report.html"
    if target.suffix.lower() not in (".html", ".htm"):
        raise RunError(f"{target}: a report is HTML; give a name that ends in .html")
    found = [
        replace(one, notes=[*one.notes, *notes(folder)]) if isinstance(one, Run) else one
        for folder, one in ((folder, read(folder)) for folder in folders)
    ]
    page, headlines, tables = page_of(found)
    beside = target.with_suffix(".md")
    files = {target: html(page), beside: markdown(page)}
    if not target.parent.is_dir():
        raise RunError(f"{target}: no folder {target.parent}; make it first")
    for path, text in files.items():
        atomic_write(path, text.encode())
    return Written(target, beside, headlines, tables)


def page_of(found: Sequence[Run | Bench]) -> tuple[Page, list[str], list[Table]]:
    """The page, its headlines, and the tables that say the most."""
    runs = [one for one in found if isinstance(one, Run)]
    sections: list[Section] = []
    headlines: list[str] = []
    tables: list[Table] = []
    for bench in merged([one for one in found if isinstance(one, Bench)]):
        more, words, table = of_bench.sections(bench, f"Bench {bench.name or ''}".rstrip() if len(found) > 1 else "")
        sections += more
        headlines += words
        tables += [table] if table else []
    if len(runs) > 1:
        side_by_side = compared.table(runs)
        sections.append(Section(f"{len(runs)} runs compared", [side_by_side]))
        tables.append(side_by_side)
    for run in runs:
        more, by_task = of_run.sections(run, f"Run {run.name}" if len(found) > 1 else "")
        sections += more
        tables += [by_task] if len(runs) == 1 else []
    names = [one.name for one in found if one.name]
    title = f"{'Bench' if not runs else 'Run' if len(found) == 1 else 'Report'}: {', '.join(names[:4])}"
    return Page(f"{title}{' and more' if len(names) > 4 else ''}".rstrip(": "), sections), headlines, tables
