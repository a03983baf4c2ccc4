"""The sections of a bench: which method is ahead, how sure that is, and what it cost."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from moecl._sizes import duration, size
from moecl.method_config import METHODS
from moecl.report import plots, ranking
from moecl.report.page import MISSING, Block, Cell, Figure, Section, Table, Text
from moecl.report.ranking import BOUND, KEEPS_DATA, OURS, Comparison, Standing, best_rival, compare, standings
from moecl.report.read import Bench, CellOfBench, MethodOfBench
from moecl.report.words import (
    between,
    count,
    flat,
    hundredths,
    listed,
    number,
    p_value,
    points,
    score,
    settings,
    several,
    signed,
)
from moecl.stats import Difference

ABOUT = (
    "Intervals and p: bootstrap over test rows, 2,000 draws, paired between methods; they do not count how results "
    "vary with the seed, which the standard deviation (SD) shows."
)


def sections(bench: Bench, title: str) -> tuple[list[Section], list[str], Table | None]:
    """The sections, what stands at the top in words, and the table of methods and orders."""
    found, level = standings(bench), 3 if title else 2
    said = headline(found)
    warnings = [Text(line, "warning") for line in unfinished(bench)]
    first = Section(title, [*warnings, Text(said, "headline"), *_beside(found)])
    words = [*(line.text for line in warnings), said]
    if not found:
        return [first, *_protocol(bench, level)], words, None
    table = by_order(bench, found)
    parts: dict[str, list[Block]] = {
        "Methods": [*_dots(found), table, transfer(found)],
        "Who is ahead": [*_significance(found)],
        "By task": [by_task(bench, found)],
        "Cost against accuracy": [*_cost(found)],
        "What was tuned": [*_tuning(bench)],
    }
    shown = [Section(name, blocks, level) for name, blocks in parts.items() if blocks]
    return [first, *shown, *_protocol(bench, level), *_environment(found, level)], words, table


# In words


def headline(found: Sequence[Standing]) -> str:
    """Is the leader better, and how sure are we: one paragraph."""
    first = ranking.leader(found)
    if first is None:
        return "No rehearsal-free method has a finished cell yet, so there is no leader."
    rival = best_rival(first, found)
    if rival is None:
        return f"{first.label} reaches {score(first.mean)}; no rival has a finished cell in common with it yet."
    on = f" on the {several(rival.cells, 'cell')} that both have" if rival.cells < len(first.results) else ""
    gap = f"{score(first.mean)} average accuracy; {rival.other.label}, the closest rival, is {_side(rival.mean)}{on}"
    if rival.sure is None:
        return f"{first.label} leads with {gap}. {NO_ITEMS} {_orders(first, rival)}"
    verdict = f"{gap} (95% interval {_points(rival.sure)}, p = {p_value(rival.sure.p)}). {_orders(first, rival)}"
    if rival.sure.low > 0:
        behind = [str(seed) for seed, gap in rival.by_seed.items() if gap <= 0]
        if behind:
            return f"{first.label} is ahead of its best rival, but not with seed {listed(behind)}: {verdict}"
        return f"{first.label} is better than its best rival: {verdict}"
    return f"{first.label} is not shown to be better: {verdict}"


NO_ITEMS = "How sure that is cannot be said: not all results hold test items of the same tasks."


def _points(sure: Difference, turned: bool = False) -> str:
    low, high = (-sure.high, -sure.low) if turned else (sure.low, sure.high)
    return f"{hundredths(low)} to {hundredths(high)} points"


def _side(ahead: float) -> str:
    """Where the other stands."""
    return "level with it" if round(ahead, 3) == 0 else f"{points(ahead)} {'behind' if ahead > 0 else 'ahead'}"


def _orders(first: Standing, rival: Comparison) -> str:
    """Whether the lead holds in each order."""
    orders = sorted({order for order, _ in first.results.keys() & rival.other.results.keys()})
    compared = {order: compare(*_in_order(order, first, rival.other)) for order in orders}
    known = {order: one for order, one in compared.items() if one is not None}
    ahead = [order for order, one in known.items() if one.mean > 0]
    clear = [order for order in ahead if (sure := known[order].sure) is not None and sure.low > 0]
    if len(known) < 2:
        return "Both ran one order only."
    counted = f"{'each' if len(ahead) == len(known) else len(ahead)} of {len(known)} orders"
    outside = f", with an interval above 0 in {len(clear) or 'none'}" if any(one.sure for one in known.values()) else ""
    return f"It leads in {counted}{outside}."


def _in_order(order: str, *both: Standing) -> list[Standing]:
    return [found for one in both if (found := one.of_order(order)) is not None]


def _beside(found: Sequence[Standing]) -> Iterator[Text]:
    """What stands outside the race: the bound, methods that keep data, and who is ahead on few cells."""
    first = ranking.leader(found)
    for one in found:
        if first is None or one is first or (versus := compare(first, one)) is None:
            continue
        if one.rehearsal_free:
            if versus.mean < 0:
                both = several(versus.cells, "cell")
                yield Text(f"{one.label} is {points(versus.mean)} ahead of {first.label} on the {both} that both have.")
            continue
        how = KEEPS_DATA[one.method]
        on = f" on the {several(versus.cells, 'cell')} that both have" if versus.cells < len(first.results) else ""
        what = "the bound, no rival" if one.method == BOUND else "not rehearsal-free"
        sure = f" (95% interval {_points(versus.sure, versus.mean < 0)})" if versus.sure else ""
        yield Text(
            f"{one.label} ({what}: {how}) reaches {score(one.mean)}; {first.label} is "
            f"{points(versus.mean)} {'above' if versus.mean >= 0 else 'below'} it{on}{sure}."
        )


def unfinished(bench: Bench) -> list[str]:
    """Cells that are missing from the numbers, and why."""
    lines = []
    for status, said in {"failed": "failed", "running": "still running", "waiting": "not run yet"}.items():
        cells = [cell for cell in bench.cells if cell.status == status]
        if cells:
            lines.append(
                f"{len(cells)} of {several(len(bench.cells), 'cell')} {said}, not in any number: {_named(cells)}."
            )
    return lines


def _named(cells: Sequence[CellOfBench]) -> str:
    shown = [f"{cell.id}{f' ({cell.reason.rstrip(chr(46))})' if cell.reason else ''}" for cell in cells[:8]]
    return f"{'; '.join(shown)}{f'; and {len(cells) - 8} more' if len(cells) > 8 else ''}"


# Tables


def name_of(one: Standing) -> str:
    if one.rehearsal_free:
        return one.label
    return f"{one.label} ({'bound' if one.method == BOUND else 'keeps data'})"


def by_order(bench: Bench, found: Sequence[Standing]) -> Table:
    """Methods x orders: mean and SD over seeds, and the interval of the whole."""
    first = ranking.leader(found)
    orders = [order for order in bench.orders if any(cell.order == order for cell in bench.cells)]
    planned = {label: sum(cell.method == label for cell in bench.cells) for label in bench.methods}
    rows = []
    for one in found:
        mark: Any = "strong" if one is first else "" if one.rehearsal_free else "muted"
        cells = [_mean_sd(one.of_order(order)) for order in orders]
        done = f"{len(one.results)} of {planned[one.label]}"
        whole = [score(one.mean), between(one.interval()), _sd(one)]
        rows.append([Cell(text, mark=mark) for text in [name_of(one), *whole, *cells, done]])
    return Table(
        "Average accuracy after the last task, by order (mean ± SD over seeds)",
        ["method", "all orders", "95% interval", "SD over seeds", *orders, "cells"],
        rows,
        " ".join([ABOUT, *_grey(found)]),
    )


def _grey(found: Sequence[Standing]) -> list[str]:
    keep = [f"{one.label} {KEEPS_DATA[one.method]}" for one in found if not one.rehearsal_free]
    return [f"In grey, as not rehearsal-free: {listed(keep)}."] if keep else []


def _mean_sd(one: Standing | None) -> str:
    if one is None:
        return MISSING
    spread = one.spread()
    return score(one.mean) + (f" ± {spread:.3f}" if spread is not None else "")


def _sd(one: Standing) -> str:
    value, seeds = one.spread(), {seed for _, seed in one.results}
    return f"{value:.3f}" if value is not None else "one seed" if len(seeds) == 1 else MISSING


def transfer(found: Sequence[Standing]) -> Table:
    names = {"bwt": "BWT", "fwt": "FWT", "forgetting": "forgetting", "learning_accuracy": "learning accuracy"}
    rows = [[name_of(one), *(number(key, one.number(key)) for key in names), _told_the_task(one)] for one in found]
    note = (
        "BWT below 0: old tasks were forgotten. FWT above 0: earlier tasks helped new ones. Told the task: whether an "
        "answer depends on being told which task it is for; the others answer all tasks with the same weights."
    )
    return Table("Transfer and forgetting, means over cells", ["method", *names.values(), "told the task"], rows, note)


def _told_the_task(one: Standing) -> str:
    known = METHODS.get(one.method)
    return MISSING if known is None else "yes" if known.needs_task else "no"


def _significance(found: Sequence[Standing]) -> Iterator[Block]:
    first = ranking.leader(found)
    others = [
        compared
        for one in found
        if first and one is not first and one.method != BOUND and (compared := compare(first, one))
    ]
    if first and others:
        yield _compared(f"{first.label}, the leader, less each other method", others)
    ours = next((one for one in found if one.method == OURS), None)  # the best of them: standings are sorted
    rival = best_rival(ours, found) if ours else None
    if ours and rival and rival.other.method != ours.method:
        yield _compared(f"{ours.label} less its best rival", [rival])


def _compared(caption: str, others: Sequence[Comparison]) -> Table:
    known = [one.p for one in others if one.p is not None]
    adjusted = iter(ranking.holm(known))
    rows = []
    for one in others:
        sure = between((one.sure.low, one.sure.high), signed) if one.sure else MISSING
        corrected = p_value(next(adjusted)) if one.p is not None else MISSING
        rows.append([name_of(one.other), str(one.cells), signed(one.mean), sure, p_value(one.p), corrected])
    return Table(
        caption,
        ["method", "cells in common", "difference", "95% interval", "p", "p, Holm"],
        rows,
        "On the cells that both have. p is two-sided; Holm's allows for how many comparisons the table makes.",
    )


def by_task(bench: Bench, found: Sequence[Standing]) -> Table:
    tasks = bench.tasks()
    best = {
        task: max((v for one in found if one.rehearsal_free and (v := _task_mean(one, task)) is not None), default=None)
        for task in tasks
    }
    rows: list[list[str | Cell]] = []
    for one in found:
        cells: list[str | Cell] = [name_of(one)]
        for task in tasks:
            value = _task_mean(one, task)
            strong = value is not None and value == best[task] and one.rehearsal_free
            cells.append(Cell(score(value), mark="strong" if strong else ""))
        rows.append(cells)
    return Table(
        "Each task's score after the last task, means over cells", ["method", *tasks], rows,
        "Bold: the best rehearsal-free method of a task.",
    )  # fmt: skip


def _task_mean(one: Standing, task: str) -> float | None:
    return ranking.mean(
        [result.R[-1][result.tasks.index(task)] for result in one.results.values() if task in result.tasks]
    )


# Plots and cost


def _dots(found: Sequence[Standing]) -> Iterator[Figure]:
    first = ranking.leader(found)
    bound = next((one.mean for one in found if one.method == BOUND), None)
    rows = []
    for one in found:
        if one.mean is not None and one.method != BOUND:
            low, high = one.interval() or (one.mean, one.mean)
            rows.append((name_of(one), one.mean, low, high, one is first))
    if rows:
        told = "; ".join(f"{label} {value:.3f}" for label, value, *_ in rows)
        yield Figure(
            plots.intervals("methods", f"Dot plot of average accuracy. {told}", rows, "average accuracy", bound),
            "Average accuracy and its 95% interval over test rows, the leader with a diamond."
            + (" Dashed: joint training, the bound." if bound is not None else ""),
        )


def _cost(found: Sequence[Standing]) -> Iterator[Block]:
    first = ranking.leader(found)
    costs = {one.label: _costs(one) for one in found}
    shown = [
        (name_of(one), costs[one.label]["seconds"] / 60, one.mean, one is first)
        for one in found
        if one.mean is not None
    ]
    told = "; ".join(f"{label} {value:.3f} in {minutes:.1f} min" for label, minutes, value, _ in shown)
    if shown:
        yield Figure(
            plots.points(
                "time", f"Scatter plot of accuracy by time. {told}", shown, "minutes a run", "average accuracy"
            ),
            "Time of a run against average accuracy: up and left is better.",
        )
    stored = [(label, costs[one.label]["kept"], one.mean, one is first) for one in found
              if one.mean is not None and costs[one.label]["kept"] for label in [name_of(one)]]  # fmt: skip
    if len({kept for _, kept, *_ in stored}) > 1:
        scaled = [(label, kept / 1e6, value, strong) for label, kept, value, strong in stored]
        told = "; ".join(f"{label} {value:.3f} with {mega:.1f} MB" for label, mega, value, _ in scaled)
        yield Figure(
            plots.points(
                "stored", f"Scatter plot of accuracy by storage. {told}", scaled, "MB stored a task", "average accuracy"
            ),
            "What a task leaves on disk against average accuracy.",
        )
    rows = []
    for one in found:
        cost = costs[one.label]
        sizes = [MISSING if cost[key] is None else size(cost[key]) for key in ("bytes", "shared_bytes")]
        rows.append([name_of(one), duration(cost["seconds"]), count(cost["trained_parameters"]), *sizes])
    yield Table(
        "What a run and a task cost, means over cells",
        ["method", "time of a run", "trained parameters a task", "stored a task", "stored, shared"],
        rows,
        "Times are wall clock, on the machine named below; other work on it counts.",
    )


def _costs(one: Standing) -> dict[str, Any]:
    details = [result.details.get(task, {}) for result in one.results.values() for task in result.tasks]
    found: dict[str, Any] = {
        key: ranking.mean([each.get(key) for each in details])
        for key in ("trained_parameters", "bytes", "shared_bytes")
    }
    found["kept"] = None if found["bytes"] is None else found["bytes"] + (found["shared_bytes"] or 0)
    found["seconds"] = ranking.mean([result.seconds for result in one.results.values()])
    return found


# How it was made


def _tuning(bench: Bench) -> Iterator[Block]:
    tuned = {label: method.tuned for label, method in bench.methods.items() if method.tuned}
    if not tuned:
        yield Text("No trials were run here: every method ran with the settings below.")
    common, own = _apart(bench)
    rows = []
    for label, method in bench.methods.items():
        trials = method.tuned.trials if method.tuned else []
        best = max((trial.score for trial in trials if trial.score is not None), default=None)
        chosen = settings(method.tuned.chosen) if method.tuned else "-"
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


def _protocol(bench: Bench, level: int) -> list[Section]:
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


def _environment(found: Sequence[Standing], level: int) -> list[Section]:
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
