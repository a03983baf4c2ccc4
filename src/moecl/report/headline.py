"""A bench in words: who is ahead, how sure that is, what stands beside the race, what is missing."""

from collections.abc import Iterator, Sequence

from moecl.report import ranking
from moecl.report.page import Text
from moecl.report.ranking import BOUND, KEEPS_DATA, Comparison, Standing, best_rival, compare
from moecl.report.read import Bench, CellOfBench
from moecl.report.words import hundredths, listed, p_value, points, score, several
from moecl.stats import Difference


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
        has = "leads with" if rival.mean >= 0 else "has"
        return f"{first.label} {has} {gap}. {NO_ITEMS} {_orders(first, rival)}"
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
        return "They have one order in common."
    counted = f"{'each' if len(ahead) == len(known) else len(ahead)} of {len(known)} orders"
    outside = f", with an interval above 0 in {len(clear) or 'none'}" if any(one.sure for one in known.values()) else ""
    return f"It leads in {counted}{outside}."


def _in_order(order: str, *both: Standing) -> list[Standing]:
    return [found for one in both if (found := one.of_order(order)) is not None]


def beside(found: Sequence[Standing]) -> Iterator[Text]:
    """What stands outside the race: the bound, methods that keep data, and who is ahead on few cells."""
    first = ranking.leader(found)
    for one in found:
        if first is None or one is first or (versus := compare(first, one)) is None:
            continue
        sure = f" (95% interval {_points(versus.sure, versus.mean < 0)})" if versus.sure else ""
        if one.rehearsal_free:
            if versus.mean < 0:
                both = f"on the {several(versus.cells, 'cell')} that both have"
                yield Text(f"{one.label} is {points(versus.mean)} ahead of {first.label} {both}{sure}.")
            continue
        how = KEEPS_DATA[one.method]
        on = f" on the {several(versus.cells, 'cell')} that both have" if versus.cells < len(first.results) else ""
        what = "the bound, no rival" if one.method == BOUND else "not rehearsal-free"
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
