"""Telling rows apart: closed form, whatever the order of the tasks; calibrated by rows that are drawn."""

import random

import numpy as np
import pytest

from moecl.discriminant import (
    TEMPERATURES,
    Discriminant,
    Drawn,
    Moments,
    Whitener,
    calibrate,
    log_shares,
    oracle_shrinkage,
    reach_of,
)

WIDTH = 24


def rows(place: int, count: int = 120, scale: float = 1.0, seed: int = 0) -> np.ndarray:
    """Of task `place`: a mean of its own, one covariance with strong correlations, features of different units."""
    mix = np.random.default_rng(99).normal(size=(WIDTH, WIDTH)) * np.geomspace(0.01, 10, WIDTH)
    mean = np.random.default_rng(place).normal(size=WIDTH) @ mix * 0.8
    draws = np.random.default_rng([place, seed, 7])
    return mean + scale * draws.normal(size=(count, WIDTH)) @ mix


def moments(order, count: int = 120, seed: int = 0) -> Moments:
    made = Moments(WIDTH)
    for place in order:
        made.add(f"task{place}", rows(place, count, seed=seed))
    return made


def drawn_around(seen: Discriminant, whitener: Whitener, origin: np.ndarray, held: Moments) -> list[np.ndarray]:
    drawn = Drawn(held, whitener, len(seen.tasks))
    return [whitener((held.means[t] - origin)[None]) + drawn.rows * drawn.factors(t) for t in seen.tasks]


def discriminant(found: Moments) -> tuple[Discriminant, Whitener, np.ndarray]:
    names = sorted(found.means)
    means = np.stack([found.means[name] for name in names])
    whitener = Whitener(found)
    return Discriminant(names, whitener(means - means.mean(axis=0))), whitener, means.mean(axis=0)


def test_it_is_the_formula_term_by_term():
    found = moments(range(3))
    seen, whitener, origin = discriminant(found)
    x = np.concatenate([rows(place, 5, seed=1) for place in range(3)])
    correlations, deviations = found.correlations()
    inverse = np.linalg.inv(correlations * np.outer(deviations, deviations))
    means = np.stack([found.means[f"task{place}"] for place in range(3)]) - origin
    expected = (x - origin) @ inverse @ means.T - np.einsum("td,de,te->t", means, inverse, means) / 2
    scores, familiar = seen.see(whitener(x - origin))
    np.testing.assert_allclose(scores, expected, rtol=1e-8, atol=1e-8)
    along = (x - origin) @ inverse @ means.T
    lengths = [np.sqrt(np.einsum("td,de,te->t", one, inverse, one)) for one in (x - origin, means)]
    np.testing.assert_allclose(familiar, (along / np.outer(*lengths)).max(axis=1), rtol=1e-8)
    assert (scores.argmax(axis=1) == np.repeat(range(3), 5)).mean() > 0.7


def test_the_order_of_the_tasks_does_not_matter():
    x, shares, thresholds = rows(4, seed=3), [], []
    for seed in range(4):
        order = random.Random(seed).sample(range(5), 5)
        train, held = moments(order), moments(order, 40, seed=1)
        seen, whitener, origin = discriminant(train)
        far = drawn_around(seen, whitener, origin, held)
        calibration = calibrate(seen, far, 0.1)
        shares.append(np.exp(log_shares(seen.see(whitener(x - origin))[0], calibration.temperature)))
        thresholds.append((calibration.threshold, calibration.temperature))
    for share, threshold in zip(shares, thresholds, strict=True):
        np.testing.assert_allclose(share, shares[0], atol=1e-4)
        np.testing.assert_allclose(threshold, thresholds[0], atol=1e-4)


def test_what_is_stored_is_what_there_is():
    made = moments(range(3))
    again = Moments.of(made.tensors("train"), "train")
    assert again.width == WIDTH
    for name in ("means", "powers", "spreads", "freedom"):
        np.testing.assert_equal(getattr(again, name), getattr(made, name))
    np.testing.assert_array_equal(again.scatter, made.scatter)
    for one in (made, again):
        one.add("later", rows(7))
    np.testing.assert_array_equal(again.scatter, made.scatter)
    sizes = {name: tensor.nbytes for name, tensor in made.tensors("train").items()}
    assert sum(size for name, size in sizes.items() if "task" in name) == 3 * 4 * (WIDTH + 2), "a mean and two numbers"


def test_a_task_is_forgotten_but_for_how_its_rows_scattered():
    made = moments(range(3))
    scatter = made.scatter.copy()
    made.keep(["task0", "task2"])
    assert list(made.means) == list(made.powers) == list(made.spreads) == ["task0", "task2"]
    np.testing.assert_array_equal(made.scatter, scatter)


@pytest.mark.parametrize(("count", "held_rows"), [(120, 60), (400, 5)])
def test_a_wanted_rate_is_about_what_rows_of_left_out_tasks_reach(count, held_rows):
    """Of rows that neither means nor calibration have seen; of five validation rows of 24 features, too."""
    tasks, wanted = range(6), (0.05, 0.2)
    seen, whitener, origin = discriminant(moments(tasks, count))
    strange = [seen.without(f"task{t}").see(whitener(rows(t, 400, seed=9) - origin))[1] for t in tasks]
    accepted = []
    for seed in range(1, 5):
        far = drawn_around(seen, whitener, origin, moments(tasks, held_rows, seed))
        least = [calibrate(seen, far, rate).threshold for rate in wanted]
        assert least[0] > least[1]
        accepted.append([np.mean([one >= threshold for one in strange]) for threshold in least])
    assert np.mean(accepted, axis=0) == pytest.approx(wanted, abs=0.03)


def test_the_temperature_makes_shares_honest():
    train, held = moments(range(4), 10), moments(range(4), 60, seed=1)
    seen, whitener, origin = discriminant(train)
    far = drawn_around(seen, whitener, origin, held)
    temperature = calibrate(seen, far, 0.1).temperature
    fresh = [seen.see(whitener(rows(t, 400, seed=2) - origin))[0] for t in range(4)]
    loss = {one: -np.mean([log_shares(s, one)[:, t].mean() for t, s in enumerate(fresh)]) for one in TEMPERATURES}
    assert temperature > 1, "ten rows a task of 24 features are too sure"
    assert loss[temperature] < loss[1.0]
    assert loss[temperature] < min(loss.values()) + 0.05


def test_uneven_rows_are_drawn_uneven():
    draws = np.random.default_rng(5)
    even, made = rows(0, 2000), Moments(WIDTH)
    uneven = even.mean(axis=0) + (even - even.mean(axis=0)) * np.exp(draws.normal(size=(2000, 1)) * 0.5)
    made.add("even", even)
    made.add("uneven", uneven)
    drawn = Drawn(made, white := Whitener(made), 2)
    for task, of in (("even", white(even)), ("uneven", white(uneven))):
        mine, theirs = (((x - x.mean(axis=0)) ** 2).sum(axis=1) for x in (drawn.rows * drawn.factors(task), of))
        assert mine.mean() == pytest.approx(theirs.mean(), rel=0.2)
        assert mine.std() / mine.mean() == pytest.approx(theirs.std() / theirs.mean(), rel=0.25)


@pytest.mark.parametrize(("tasks", "threshold"), [(1, False), (2, False), (3, True)])
def test_unknown_takes_three_tasks(tasks, threshold):
    train = moments(range(tasks))
    seen, whitener, origin = discriminant(train)
    found = calibrate(seen, [whitener(rows(t) - origin) for t in range(tasks)], 0.1)
    assert (found.threshold is not None) == threshold


@pytest.mark.parametrize("tasks", [1, 2, 5])
def test_almost_none_of_a_tasks_rows_lie_beyond_its_reach_and_gross_strangers_do(tasks):
    seen, whitener, origin = discriminant(moments(range(tasks)))
    white = [whitener(rows(t, 400, seed=2) - origin) for t in range(tasks)]
    reach = calibrate(seen, [whitener(rows(t, seed=1) - origin) for t in range(tasks)], 0.1).reach
    for place, own in enumerate(white):
        at = np.full(len(own), place)
        assert (seen.away(own, at) <= reach[place]).mean() > 0.98
        assert (seen.away(5 * (own - seen.means[place]) + seen.means[place], at) > reach[place]).all()


def test_reach_is_endless_where_rows_do_not_tell_it():
    assert reach_of(np.array([1.0])) == reach_of(np.array([0.0, 1.0])) == np.inf


def test_degenerate_rows_stay_finite():
    made = Moments(WIDTH)
    made.add("one", np.ones((1, WIDTH)))
    made.add("same", np.zeros((5, WIDTH)))
    seen, whitener, origin = discriminant(made)
    scores, familiar = seen.see(whitener(np.zeros((2, WIDTH)) - origin))
    assert np.isfinite(scores).all()
    assert np.isfinite(familiar).all()
    assert oracle_shrinkage(np.eye(WIDTH), 0) == 1.0
