"""Intervals and p-values against theory, and against the metrics they are of."""

import numpy as np
import pytest

from moecl.errors import UserError
from moecl.metrics import macro_f1
from moecl.results import Items
from moecl.stats import bootstrap, bootstrap_task, interval, paired, paired_task, score

LABELS = ["a", "b", "c"]


def answers(rows: int = 200, right: float = 0.7, seed: int = 0, metric: str = "accuracy", true_seed: int = 9) -> Items:
    """Rows of which about a share of `right` is answered right."""
    true = np.random.default_rng(true_seed).integers(3, size=rows)
    draw = np.random.default_rng(seed)
    given = np.where(draw.random(rows) < right, true, (true + draw.integers(1, 3, size=rows)) % 3)
    return Items(metric=metric, labels=LABELS, true=true.tolist(), given=given.tolist())


@pytest.mark.parametrize("metric", ["accuracy", "macro_f1"])
def test_a_score_is_that_of_metrics_on_any_rows(metric):
    items = answers(metric=metric)
    index = np.random.default_rng(3).integers(3, size=40)  # few rows, so that labels are missing
    true, given = ([getattr(items, side)[i] for i in index] for side in ("true", "given"))
    wanted = macro_f1(true, given) if metric == "macro_f1" else np.mean(np.equal(true, given))
    assert score(items, index) == pytest.approx(wanted, abs=1e-12)


def test_texts_have_scores_of_their_own():
    items = Items(metric="rouge_l", scores=[0.5, 1.0, 0.0])
    assert score(items) == 0.5
    assert score(items, np.array([1, 1])) == 1.0
    assert score(Items(metric="rouge_l")) is None
    assert bootstrap([{"t": items}]).mean() == pytest.approx(0.5, abs=0.02)


def test_macro_f1_is_drawn_as_it_is_scored():
    items = answers(metric="macro_f1")
    draws = bootstrap_task([items])
    assert draws.mean() == pytest.approx(score(items), abs=0.005)
    assert 0.02 < draws.std() < 0.05


def test_the_standard_error_of_a_mean_over_tasks():
    cell = {f"task{n}": answers(400, 0.8, seed=n) for n in range(4)}
    wanted = np.sqrt(sum(p * (1 - p) / 400 for p in map(score, cell.values()))) / 4
    assert bootstrap([cell]).std() == pytest.approx(wanted, rel=0.06)


def test_cells_share_their_rows_so_more_cells_are_not_more_rows():
    one = {"t": answers()}
    assert bootstrap([one]) == pytest.approx(bootstrap([one, one, one]))


def test_intervals_cover_the_truth():
    inside = 0
    for seed in range(200):
        low, high = interval(bootstrap([{"t": answers(150, 0.7, seed, true_seed=seed)}], draws=400))
        inside += low <= 0.7 <= high
    assert 0.90 <= inside / 200 <= 0.99


def test_pairing_takes_out_what_is_hard_about_a_row():
    a = answers(300, 0.7)
    better = [t if place < 12 else g for place, (t, g) in enumerate(zip(a.true, a.given, strict=True))]
    b = a.model_copy(update={"given": better})
    found = paired([{"t": b}], [{"t": a}])
    assert found.mean == pytest.approx(score(b) - score(a))
    assert found.low >= 0
    assert found.high - found.low < 0.5 * np.subtract(*interval(bootstrap_task([a], "t"))[::-1])
    back = paired([{"t": a}], [{"t": b}])
    assert (back.mean, back.low, back.high) == pytest.approx((-found.mean, -found.high, -found.low))
    assert back.p == found.p


def test_p_says_nothing_where_there_is_nothing():
    same = answers()
    assert paired([{"t": same, "u": same}], [{"u": same, "t": same}, {"t": same, "u": same}]).p == 1
    low = sum(paired_task(answers(seed=2 * n), answers(seed=2 * n + 1), draws=300).p < 0.05 for n in range(100))
    assert low <= 12


def test_the_same_call_gives_the_same_draws_in_any_block(monkeypatch):
    cells = [{"t": answers(), "u": answers(90)}]
    whole = bootstrap(cells, draws=50)
    monkeypatch.setattr("moecl.stats._BLOCK", 1000)
    assert np.array_equal(whole, bootstrap(cells, draws=50))
    assert not np.array_equal(whole, bootstrap(cells, draws=50, seed=1))


def test_what_cannot_be_compared_is_refused():
    a = answers(20)
    other = {"rows": answers(21), "metric": answers(20, metric="macro_f1"), "labels": answers(20, true_seed=1)}
    for word, items in other.items():
        with pytest.raises(UserError, match=word):
            paired([{"t": a}], [{"t": items}])
    with pytest.raises(UserError, match="has no test rows"):
        bootstrap([{"t": Items(metric="accuracy")}])
    with pytest.raises(UserError, match="one cell has the tasks t, another u"):
        paired([{"t": a}], [{"u": a}])
    with pytest.raises(UserError, match="a side has no cell"):
        paired([{"t": a}], [])


def test_labels_in_another_order_are_the_same_labels():
    a = answers(50)
    turned = a.model_copy(
        update={"labels": LABELS[::-1], "true": [2 - t for t in a.true], "given": [2 - g for g in a.given]}
    )
    assert paired_task(a, turned).p == 1
