"""Imports point one way only (docs/design.md, data flow); read from the source, so that lazy imports count too."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import moecl
from moecl.method_config import METHODS

SOURCE = Path(moecl.__file__).parent
FILES = {".".join(path.relative_to(SOURCE).with_suffix("").parts): path for path in sorted(SOURCE.rglob("*.py"))}
MODULES = {name.removesuffix(".__init__"): path for name, path in FILES.items() if name != "__init__"}

BOTTOM = {
    "bench_config",
    "errors",
    "config",
    "method_config",
    "compare",
    "discriminant",
    "metrics",
    "results",
    "review",
    "review_measure",
    "review_rows",
    "review_tables",
    "routing",
    "run_folder",
    "stats",
    "_atomic",
    "_explain",
    "_raw",
    "_settings",
    "_markdown",
    "_sizes",
    "_yaml",
}
STORE = {"store", "_audit", "_card", "_manifest", "_objects", "_versions"}
ENGINE = {"engine", "request", "labels", "generation", "kv_prefix", "scoring"}
TRAIN = {"train", "session", "settled", "start", "course", "evidence", "task_trainer", "feed"}
BENCH = {"bench", "bench_cells", "bench_ray", "bench_record", "bench_tune", "bench_worker"}
COMMANDS = {
    *(
        "cli",
        "cli_bench",
        "cli_cache",
        "cli_compare",
        "cli_export",
        "cli_options",
        "cli_review",
        "cli_router",
        "cli_serve",
    ),
    "cli_store",
}
TOP = {
    *(
        "server",
        "cli_report",
        "review_page",
        "show",
        "show_bench",
        "show_store",
        "watch",
        "terminal",
        "using",
        "predict_lines",
        "eval_run",
        "estimate",
        "route_store",
    ),
    "__main__",
    *COMMANDS,
}


def group(module: str) -> str:
    """The row of the table that a module belongs to."""
    package = module.partition(".")[0]
    groups = {"bottom": BOTTOM, "store": STORE, "engine": ENGINE, "train": TRAIN, "bench": BENCH, "top": TOP}
    for name, members in groups.items():
        if package in members:
            return name
    return package


# What each may import, beside itself and the bottom.
ALLOWED = {
    "bottom": set(),
    "nn": set(),
    "data": set(),
    "methods": {"nn", "data"},
    "store": {"nn", "data"},
    "backbone": {"nn", "data"},
    "bank": {"nn", "data", "store"},
    "model": {"nn", "data", "store", "backbone", "bank"},
    "prefix": {"nn", "data", "store", "backbone", "bank", "model"},
    "engine": {"nn", "data", "store", "backbone", "bank", "model", "prefix"},
    "router": {"nn", "data", "store", "bank", "model", "prefix"},
    "export": {"nn", "data", "store", "bank", "engine"},
    "adapter": {"nn", "store", "model"},
    "evaluate": {"data", "engine"},
    "general": {"nn", "data", "model", "engine"},
    "routed": {"data", "engine", "router", "evaluate"},
    "train": {"nn", "methods", "data", "store", "backbone", "bank", "model", "prefix", "engine", "router", "evaluate"},
    "bench": {"train", "data", "methods"},
    "report": set(),
}
LIBRARIES_OF_THE_BOTTOM = {"numpy", "pydantic", "pydantic_core", "yaml"}
LIBRARIES_OF_THE_REPORT = {"jinja2", "matplotlib"}


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text())


def imported(node: ast.AST) -> Iterator[str]:
    """Dotted names of what is imported below `node`, at the top or inside of functions."""
    for one in ast.walk(node):
        if isinstance(one, ast.Import):
            yield from (alias.name for alias in one.names)
        elif isinstance(one, ast.ImportFrom):
            assert one.level == 0, "absolute imports only"
            yield from (f"{one.module}.{alias.name}" for alias in one.names)
        elif isinstance(one, ast.Call) and ast.unparse(one.func).endswith("import_module"):
            yield from (argument.value for argument in one.args[:1] if isinstance(argument, ast.Constant))


def ours(node: ast.AST) -> set[str]:
    """Modules of moecl that are imported below `node`."""
    found = set()
    for name in imported(node):
        parts = name.split(".")[1:] if name.split(".")[0] == "moecl" else []
        while parts and ".".join(parts) not in MODULES:
            parts.pop()
        if parts:
            found.add(".".join(parts))
    return found


def test_every_module_has_its_place():
    assert {group(module) for module in MODULES} <= {*ALLOWED, "top"}


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_one_way(module):
    own = group(module)
    if own == "top":
        return
    reached = {group(other) for other in ours(tree(module))} - {own}
    assert reached <= ALLOWED[own] | {"bottom"}


def test_no_import_is_circular():
    graph = {module: ours(tree(module)) - {module} for module in MODULES}
    tuple(TopologicalSorter(graph).static_order())


@pytest.mark.parametrize("module", [module for module in MODULES if group(module) in ("bottom", "report")])
def test_the_bottom_needs_no_torch(module):
    libraries = {name.split(".")[0] for name in imported(tree(module))} - {"moecl"}
    allowed = LIBRARIES_OF_THE_BOTTOM | (LIBRARIES_OF_THE_REPORT if group(module) == "report" else set())
    assert libraries - set(sys.stdlib_module_names) <= allowed


IN_COMMON = {"methods.base", "methods.one_lora", "methods.added_lora"}  # of several methods


@pytest.mark.parametrize("module", [module for module in MODULES if module.startswith("methods.")])
def test_methods_do_not_know_each_other(module):
    assert {other for other in ours(tree(module)) if other.startswith("methods")} <= IN_COMMON


@pytest.mark.parametrize("module", sorted(COMMANDS))
def test_the_command_line_imports_lazily(module):
    top = ast.Module([one for one in tree(module).body if not ast.unparse(one).startswith("if TYPE_CHECKING")], [])
    for function in [one for one in ast.walk(top) if isinstance(one, ast.FunctionDef)]:
        function.body = []
    assert {group(other) for other in ours(top) - {"terminal"} - COMMANDS} <= {"bottom"}
    assert not {"torch", "transformers"} & {name.split(".")[0] for name in imported(top)}


def test_importing_moecl_costs_no_torch():
    code = "import moecl, sys; print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_public_names():
    assert moecl.__all__ == sorted(moecl.__all__)
    for name in moecl.__all__:
        assert getattr(moecl, name).__name__ == name
    assert set(dir(moecl)) == set(moecl.__all__)
    with pytest.raises(AttributeError, match="nothing_such"):
        _ = moecl.nothing_such


@pytest.mark.parametrize("module", [module for module in MODULES if module not in ("config", "methods")])
def test_no_branch_on_a_methods_name(module):
    compared = [one for one in ast.walk(tree(module)) if isinstance(one, ast.Compare | ast.Match)]
    words = {leaf.value for one in compared for leaf in ast.walk(one) if isinstance(leaf, ast.Constant)}
    assert not words & METHODS.keys()


def test_no_drawer_for_odds_and_ends():
    assert not [module for module in MODULES if re.search(r"(^|\.|_)(utils?|helpers?|common|misc)$", module)]
