"""Thresholds and what they come to, held to brute force and to exact arithmetic."""

from fractions import Fraction
from math import comb

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moecl.errors import ConfigError, DataError, TaskError
from moecl.review import (
    Scored,
    Target,
    Thresholds,
    decide,
    decided,
    fit,
    interval,
    loosest,
    lower_bound,
    tail,
)
from moecl.review_measure import DRAWS, Pair, calibration, measure, resampled, review, total
from moecl.review_tables import slipped_table
from review_runs import LABELS

HALF = Target.of(0.5, None)
COARSE = st.integers(0, 8).map(lambda eighths: eighths / 8)  # so that scores tie
ROWS = st.lists(st.tuples(st.sampled_from((0, 1, 2)), st.sampled_from((0, 1, 2)), COARSE), min_size=1, max_size=30)


def scored(rows, labels=("a", "b", "c")) -> Scored:
    true, answer, share = (np.array(column) for column in zip(*rows, strict=True))
    return Scored(tuple(labels), np.arange(1, len(rows) + 1), true, answer, share, "0" * 64)


# Bounds


@given(st.integers(1, 60), st.data(), st.integers(1, 99))
def test_tail_is_the_binomial_one(rows, data, percent):
    right, chance = data.draw(st.integers(0, rows)), Fraction(percent, 100)
    exact = sum(comb(rows, k) * chance**k * (1 - chance) ** (rows - k) for k in range(right, rows + 1))
    assert tail(right, rows, percent / 100) == pytest.approx(float(exact), rel=1e-9)


def test_tail_at_the_ends():
    assert [tail(0, 5, 0.0), tail(1, 5, 0.0), tail(5, 5, 1.0), tail(0, 0, 0.5)] == [1, 0, 1, 1]


@given(st.integers(1, 200), st.data())
def test_the_bound_is_where_the_tail_crosses(rows, data):
    right = data.draw(st.integers(1, rows))
    bound = lower_bound(right, rows, 0.95)
    assert tail(right, rows, bound) == pytest.approx(0.05, rel=1e-6)
    assert bound < right / rows


def test_known_intervals():
    assert lower_bound(0, 10, 0.95) == 0
    assert lower_bound(100_000, 100_000, 0.95) == pytest.approx(0.05 ** (1 / 100_000))
    assert interval(0, 0) is None
    assert interval(0, 10) == (0, pytest.approx(1 - 0.025**0.1))
    assert interval(81, 263) == pytest.approx((0.2527, 0.3676), abs=1e-4)  # Newcombe 1998, table I


@given(st.integers(1, 80), st.data(), st.sampled_from([0.5, 0.8, 0.9, 0.95]), st.sampled_from([0.5, 0.9, 0.99]))
def test_a_target_is_reached_where_the_bound_reaches_it(rows, data, precision, confidence):
    right = data.draw(st.integers(0, rows))
    bound = lower_bound(right, rows, confidence)
    if abs(bound - precision) > 1e-9:
        assert Target.of(precision, confidence).reached(right, rows) == (bound >= precision)


# Thresholds


@given(ROWS, st.sampled_from([0.3, 0.5, 0.75, 0.9, 1.0]), st.sampled_from([None, 0.5, 0.8]))
def test_the_threshold_is_the_loosest_of_all(rows, precision, confidence):
    if confidence is not None and precision == 1:
        return
    target, found = Target.of(precision, confidence), scored(rows)
    thresholds = fit(found, target)
    for place, label in enumerate(found.labels):
        own = [(true == answer, share) for true, answer, share in rows if answer == place]
        good = []
        for level in sorted({share for _, share in own}):
            reach = [right for right, share in own if share >= level]
            if target.reached(sum(reach), len(reach)):
                good.append(level)
        one = thresholds.labels[label]
        assert one.threshold == (good[0] if good else None)
        assert one.answered == len(own)
        reach = [right for right, share in own if good and share >= good[0]]
        assert (one.decided, one.right) == (len(reach), sum(reach))


@given(ROWS)
def test_rows_are_decided_one_by_one_as_together(rows):
    found = scored(rows)
    thresholds = fit(found, HALF)
    together = decided(thresholds, found)
    for (_, answer, share), done in zip(rows, together, strict=True):
        label = found.labels[answer]
        assert decide(thresholds, label, {label: share}) == (label if done else "review")


def test_ties_stand_and_fall_together():
    share, right = np.array([0.9, 0.8, 0.8, 0.8, 0.7]), np.array([True, True, False, True, True])
    assert loosest(share, right, Target.of(0.9, None)) == 0.9
    assert loosest(share, right, Target.of(0.8, None)) == 0.7  # above it, 3 of 4 miss the target
    assert loosest(share[:0], right[:0], HALF) is None


def test_a_precision_that_is_exactly_the_target_reaches_it():
    for right, rows in [(9, 10), (27, 30), (63, 70), (900, 1000)]:
        assert Target.of(0.9, None).reached(right, rows)
        assert not Target.of(0.9, None).reached(right - 1, rows)


def test_a_bound_needs_enough_rows():
    sure = Target.of(0.9, 0.95)
    assert [sure.reached(rows, rows) for rows in (1, 28, 29, 100)] == [False, False, True, True]


def test_classes_that_are_never_decided():
    absent = fit(scored([(0, 0, 0.9), (0, 1, 0.8)]), Target.of(0.9, None))
    assert [absent.labels[label].threshold for label in "abc"] == [0.9, None, None]
    alone = fit(scored([(0, 0, 0.9), (0, 0, 0.4)]), Target.of(0.9, None))
    assert [alone.labels[label].threshold for label in "abc"] == [0.4, None, None]
    assert decide(absent, "b", {"b": 1.0}) == "review"


@pytest.mark.parametrize(
    ("precision", "confidence", "said"),
    [
        (0.0, None, "--precision: 0.0 is not above 0"),
        (90, None, "--precision: 90 is not above 0 and at most 1"),
        (float("nan"), None, "--precision: nan"),
        (0.9, 95, "--confidence: 95 is not from 0.5"),
        (0.9, 0.05, "--confidence: 0.05 is not from 0.5"),
        (1.0, 0.95, "--precision: no number of rows shows"),
    ],
)
def test_targets_that_mean_nothing(precision, confidence, said):
    with pytest.raises(ConfigError, match=said):
        Target.of(precision, confidence)


# On test rows


def test_a_worked_example():
    validation = [(0, 0, 0.9), (0, 0, 0.8), (1, 0, 0.7), (1, 1, 0.9), (0, 1, 0.6)]
    test = [(0, 0, 0.95), (1, 0, 0.85), (0, 0, 0.75), (1, 1, 0.9), (1, 1, 0.7)]
    thresholds = fit(scored(validation, LABELS), Target.of(0.9, None))
    assert [one.threshold for one in thresholds.labels.values()] == [0.8, 0.9]
    found = measure(thresholds, scored(test, LABELS))
    assert (found.rows, found.decided, found.right) == (5, 3, 2)
    assert (found.stripping_rate, found.precision) == (0.6, pytest.approx(2 / 3))
    compliant, violation = found.classes["compliant"], found.classes["violation"]
    assert (compliant.stripping_rate, violation.stripping_rate) == (0.4, 0.2)
    assert (compliant.precision, violation.precision) == (0.5, 1)
    assert (violation.true, violation.slipped, violation.slip_rate) == (3, 1, pytest.approx(1 / 3))
    assert (compliant.true, compliant.slipped) == (2, 0)


@given(ROWS, ROWS, ROWS)
def test_rates_add_up(rows, first, second):
    thresholds = fit(scored(rows), HALF)
    one, two = (measure(thresholds, scored(test)) for test in (first, second))
    together, summed = measure(thresholds, scored(first + second)), total([one, two])
    assert summed.model_dump() == {key: value for key, value in together.model_dump().items() if key in dict(summed)}
    assert sum(found.decided for found in one.classes.values()) == one.decided
    assert sum(found.slipped for found in one.classes.values()) == one.decided - one.right


def test_a_total_has_the_classes_that_all_tasks_have():
    many, two = ([(0, 0, 0.9), (1, 1, 0.9)], ("x", "b", "y")), ([(0, 0, 0.9), (1, 1, 0.9)], ("b", "c"))
    found = total([measure(fit(rows, HALF), rows) for rows in (scored(*many), scored(*two))])
    assert list(found.classes) == ["b"]
    assert (found.decided, found.classes["b"].decided) == (4, 2)


@given(ROWS)
def test_calibration_by_hand(rows):
    found = scored(rows)
    error, bins = calibration(found.share, found.right())
    expected = Fraction(0)
    for number in range(10):
        inside = [
            (Fraction(share), true == answer)
            for true, answer, share in rows
            if number < share * 10 <= number + 1 or (number == 0 and share == 0)
        ]
        assert bins[number].rows == len(inside)
        expected += abs(sum(share for share, _ in inside) - sum(right for _, right in inside))
    assert error == pytest.approx(float(expected / len(rows)))


# A against B


def pair(validation, test) -> Pair:
    return Pair(scored(validation, LABELS), scored(test, LABELS))


SURE = [(0, 0, 0.9), (1, 1, 0.9), (0, 0, 0.8), (1, 1, 0.8)]
UNSURE = [(0, 0, 0.9), (1, 1, 0.4), (0, 0, 0.8), (1, 0, 0.7)]


def test_a_against_b():
    _, found = review({"t": pair(SURE, SURE)}, HALF, against={"t": pair(SURE, UNSURE), "more": pair(SURE, SURE)})
    assert found.against is not None
    change = found.against.tasks["t"]
    assert (change.a.stripping_rate, change.b.stripping_rate) == (1, 0.5)
    assert (change.difference, change.saved_per_1000) == (0.5, 500)
    assert change.interval == (0, 1)
    assert found.against.total == change
    assert [side.classes["violation"].slip_rate for side in (change.a, change.b)] == [0, 0]
    wrong = [(0, 0, 0.9), (1, 0, 0.9), (0, 0, 0.8), (1, 1, 0.8)]
    _, slipping = review({"t": pair(SURE, wrong)}, HALF, against={"t": pair(SURE, SURE)})
    assert slipped_table(slipping.against).lines[0].cells == ("t", "violation", "50.0 %", "0.0 %")
    _, same = review({"t": pair(SURE, SURE)}, HALF, against={"t": pair(SURE, SURE)})
    assert same.against is not None
    assert same.against.total.interval == (0, 0)


def test_the_bootstrap_draws_rows():
    difference = np.array([1] * 30 + [0] * 60 + [-1] * 10)
    draws = resampled(difference, np.random.default_rng(1))
    rows = np.random.default_rng(2).choice(difference, (DRAWS, 100)).sum(axis=1)
    assert draws.mean() == pytest.approx(rows.mean(), abs=0.4)
    assert draws.std() == pytest.approx(rows.std(), rel=0.05)


def test_runs_that_cannot_be_compared():
    with pytest.raises(TaskError, match="--against: has none of the tasks t"):
        review({"t": pair(SURE, SURE)}, HALF, against={"u": pair(SURE, SURE)})
    with pytest.raises(DataError, match="--against: task 't': its test rows or their labels are others"):
        review({"t": pair(SURE, SURE)}, HALF, against={"t": pair(SURE, SURE[:3])})


# The thresholds file


def thresholds_file(tmp_path):
    thresholds, _ = review({"t": Pair(scored(SURE, LABELS), scored(SURE, LABELS), {"task": "f" * 64})}, HALF)
    thresholds.save(tmp_path / "thresholds.json")
    return thresholds, tmp_path / "thresholds.json"


def test_a_thresholds_file_comes_back(tmp_path):
    thresholds, path = thresholds_file(tmp_path)
    assert Thresholds.load(path) == thresholds
    assert thresholds.of("t", reversed(LABELS), {"task": "f" * 64}, path) == thresholds.tasks["t"]


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ('"schema": 1', '"schema": 2', "schema: Input should be 1, found 2; make it again"),
        ('"threshold": 0.8', '"threshold": 1.5', "threshold: Input should be less than or equal to 1, found 1.5"),
        ('"threshold": 0.8', '"threshold": "0.8"', "threshold: Input should be a valid number, found '0.8'"),
        ('"rows"', '"row"', "rows: Field required"),
        ("{", "", "Invalid JSON"),
    ],
)
def test_an_altered_thresholds_file_is_refused(before, after, said, tmp_path):
    _, path = thresholds_file(tmp_path)
    path.write_text(path.read_text().replace(before, after, 1))
    with pytest.raises(DataError, match=said) as caught:
        Thresholds.load(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_thresholds_of_something_else_are_refused(tmp_path):
    thresholds, path = thresholds_file(tmp_path)
    with pytest.raises(DataError, match="no such file".capitalize()):
        Thresholds.load(tmp_path / "no.json")
    with pytest.raises(DataError, match=r"has no task 'tt', only t \(did you mean 't'\?\)"):
        thresholds.of("tt", LABELS, None, path)
    with pytest.raises(DataError, match="is for the labels compliant, violation, the run's are good, bad"):
        thresholds.of("t", ("good", "bad"), None, path)
    with pytest.raises(DataError, match="was made before the task or its experts changed"):
        thresholds.of("t", LABELS, {"task": "e" * 64}, path)
