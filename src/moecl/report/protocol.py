"""How a bench was made: what was tuned, what all methods have in common, where it ran."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from moecl.method_config import METHODS
from moecl.report.page import Block, Section, Table, Text
from moecl.report.ranking import Standing
from moecl.report.read import Bench, MethodOfBench
from moecl.report.words import flat, score, settings, several


def tuning(bench: Bench) -> Iterator[Block]:
    tuned = {label: method.tuned for label, method in bench.methods.items() if method.tuned}
    if not tuned:
        yield Text("No trials were run here: every method ran with the settings below.")
    common, own = _apart(bench)
    rows = []
    for label, method in bench.methods.items():
        trials = method.tuned.trials if method.tuned else []
        best = max((trial.score for trial in trials if trial.score is not None), default=None)
        chosen = (settings(method.tuned.chosen) if method.tuned.chosen else "as set") if method.tuned else "-"
        rows.append(
            [
                label,
                method.method,
                settings(own[label]),
                str(len(trials)),
                chosen,
                score(best) if trials else "-",
            ]
        )
    budgets = {len(found.trials) for found in tuned.values()}
    if tuned:
        same = len(budgets) == 1 and len(tuned) == len(bench.methods)
        many = f"{several(budgets.pop(), 'trial')} of each method" if same else "Not as many trials of each method"
        yield Text(f"{many} were scored on validation rows; the best is what its cells ran with.")
    if common:
        yield Text(f"Where the table says nothing else: {settings(common)}.")
    columns = ["label", "method", "settings", "trials", "chosen", "validation score of the chosen"]
    yield Table("Settings of each method, where not the default", columns, rows, words=(1, 2, 4))


def _apart(bench: Bench) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """What is told of most methods, but not of all or not as their default; and of each what is not so."""
    own = _own(bench)
    told = {label: _unusual(method) | own[label] for label, method in bench.methods.items()}
    common = {}
    for key in {key: None for one in told.values() for key in one}:
        values = [repr(one.get(key)) for one in told.values()]
        usual = max(values, key=values.count)
        if values.count(usual) > max(1, len(values) / 2) and all(key in one for one in told.values()):
            common[key] = next(one[key] for one in told.values() if repr(one[key]) == usual)
    return common, {
        label: {key: value for key, value in one.items() if key not in common or repr(common[key]) != repr(value)}
        for label, one in told.items()
    }


def _own(bench: Bench) -> dict[str, dict[str, Any]]:
    """How each method is trained and read where that is not the same for all."""
    plain = {
        label: {"head": method.stream.get("head"), **method.stream.get("train", {}), "seed": None}
        for label, method in bench.methods.items()
    }
    keys = {key: {repr(one.get(key)) for one in plain.values()} for one in plain.values() for key in one}
    return {label: {key: one[key] for key in one if len(keys[key]) > 1} for label, one in plain.items()}


def _unusual(method: MethodOfBench) -> dict[str, Any]:
    """The settings that are not the method's defaults; all of a method that is not known here."""
    if method.method not in METHODS:
        return method.settings
    usual = METHODS[method.method].model_validate({"name": method.method}).model_dump(mode="json")
    return {key: value for key, value in method.settings.items() if key not in usual or usual[key] != value}


def protocol(bench: Bench, level: int) -> list[Section]:
    orders = Table(
        "Orders", ["order", "tasks"], [[name, ", ".join(tasks)] for name, tasks in bench.orders.items()], words=(1,)
    )
    facts = [
        ("base", bench.base),
        ("seeds", ", ".join(map(str, bench.seeds)) or "-"),
        *flat(_without_rows(bench.protocol)),
    ]
    blocks: list[Block] = [
        orders,
        Table("Common to all methods", ["what", "value"], [list(one) for one in facts], words=(1,)),
    ]
    rows = bench.protocol.get("rows")
    if isinstance(rows, Mapping) and all(isinstance(one, Mapping) for one in rows.values()):
        splits = list(dict.fromkeys(split for one in rows.values() for split in one))
        table = [[task, *(str(one.get(split, "-")) for split in splits)] for task, one in rows.items()]
        blocks.append(Table("Rows of each split", ["task", *splits], table))
    blocks += [Text("To run it again, with the file that the bench was started with:"), Text(COMMANDS, "code")]
    return [Section("Protocol", blocks, level)]


COMMANDS = "moecl bench bench.yaml -o OUT\nmoecl report OUT"


def _without_rows(protocol: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in protocol.items() if key != "rows" or not isinstance(value, Mapping)}


def environment(found: Sequence[Standing], level: int) -> list[Section]:
    """Environments as the cells have them, each once."""
    different: dict[str, list[str]] = {}
    lines: dict[str, list[list[str]]] = {}
    for one in found:
        for result in one.results.values():
            flattened = [list(line) for line in flat(result.environment)]
            key = str(flattened)
            lines[key] = flattened
            if one.label not in different.setdefault(key, []):
                different[key].append(one.label)
    blocks: list[Block] = [
        Table(f"Environment of {'all cells' if len(different) == 1 else ', '.join(labels)}", ["what", "value"],
              lines[key], words=(1,))
        for key, labels in different.items() if lines[key]
    ]  # fmt: skip
    return [Section("Environment", blocks, level, folded=True)] if blocks else []
