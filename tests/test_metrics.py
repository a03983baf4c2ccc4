"""R -> numbers, answers -> numbers."""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from moecl import metrics
from moecl.errors import UserError

NAN = float("nan")
# Rows: before any task, after 1, 2, 3 tasks. Small eighths, so that every mean below is exact.
R = np.array(
    [
        [0.125, 0.25, 0.5],
        [0.875, 0.5, 0.25],
        [0.5, 0.75, 0.625],
        [0.625, 0.5, 1.0],
    ]
)
NUMBERS = [
    metrics.average_accuracy,
    metrics.bwt,
    metrics.fwt,
    metrics.forgetting,
    metrics.learning_accuracy,
]


def literal(R: Any) -> dict[str, float]:
    """The definitions of the design, with its indices from 1, term by term."""
    tasks = len(R) - 1

    def cell(i: int, j: int) -> float:
        return float(R[i][j - 1])

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    last = range(1, tasks)
    return {
        "average_accuracy": mean([cell(tasks, j) for j in range(1, tasks + 1)]),
        "bwt": mean([cell(tasks, j) - cell(j, j) for j in last]),
        "fwt": mean([cell(j - 1, j) - cell(0, j) for j in range(2, tasks + 1)]),
        "forgetting": mean([max(cell(i, j) for i in range(j, tasks)) - cell(tasks, j) for j in last]),
        "learning_accuracy": mean([cell(j, j) for j in range(1, tasks + 1)]),
    }


def test_numbers_by_hand() -> None:
    assert metrics.average_accuracy(R) == pytest.approx((0.625 + 0.5 + 1) / 3)
    assert metrics.bwt(R) == (-0.25 - 0.25) / 2
    assert metrics.fwt(R) == (0.25 + 0.125) / 2
    assert metrics.forgetting(R) == (0.25 + 0.25) / 2
    assert metrics.learning_accuracy(R) == pytest.approx((0.875 + 0.75 + 1) / 3)


@pytest.mark.parametrize("tasks", [2, 3, 7])
def test_numbers_are_the_definitions(tasks: int) -> None:
    scores = np.random.default_rng(tasks).random((tasks + 1, tasks))
    assert metrics.summary(scores) == pytest.approx(literal(scores))


def test_forgetting_counts_a_best_score_after_learning() -> None:
    assert metrics.forgetting([[0, 0, 0], [0.5, 0, 0], [0.75, 0.5, 0], [0.25, 0.5, 1]]) == 0.25


def test_one_task_has_no_transfer() -> None:
    assert metrics.summary([[0.5], [0.75]]) == {
        "average_accuracy": 0.75,
        "bwt": None,
        "fwt": None,
        "forgetting": None,
        "learning_accuracy": 0.75,
    }


def test_no_task_has_no_number() -> None:
    assert set(metrics.summary(np.empty((1, 0))).values()) == {None}


# number -> for each cell of R, whether the definition reads it
NEEDS = {
    metrics.average_accuracy: "... ... ... xxx",
    metrics.bwt: "... x.. .x. xx.",
    metrics.fwt: ".xx .x. ..x ...",
    metrics.forgetting: "... x.. xx. xx.",
    metrics.learning_accuracy: "... x.. .x. ..x",
}


@pytest.mark.parametrize("number", NUMBERS)
def test_a_missing_cell_makes_a_number_none_only_if_it_is_needed(number: Callable[..., float | None]) -> None:
    for i, row in enumerate(NEEDS[number].split()):
        for j, mark in enumerate(row):
            scores = R.copy()
            scores[i, j] = NAN
            assert (number(scores) is None) == (mark == "x"), (i, j)
            assert number(scores) == (None if mark == "x" else number(R))


def test_a_task_without_test_rows_is_in_no_number() -> None:
    """R of three tasks whose second is never tested says what R of the other two does, but for the rows in between."""
    none = None
    R = [[0.25, none, 0.5], [0.75, none, 0.5], [0.5, none, 0.625], [0.5, none, 1.0]]
    assert metrics.summary(R) == {
        "average_accuracy": 0.75,
        "bwt": -0.25,
        "fwt": 0.125,
        "forgetting": 0.25,
        "learning_accuracy": 0.875,
    }
    assert set(metrics.summary([[none], [none]]).values()) == {None}


def test_a_task_learned_before_is_not_unseen() -> None:
    R = [[0.25, 0.5, 0.5], [0.75, 0.625, 0.5], [0.5, 0.75, 1.0], [0.5, 0.75, 1.0]]
    assert metrics.fwt(R) == (0.125 + 0.5) / 2
    assert metrics.fwt(R, again=[2]) == 0.125
    assert metrics.summary(R, again=[1, 2])["fwt"] is None


def test_none_is_not_measured() -> None:
    assert metrics.fwt([[None, None], [0.5, None], [0.5, 0.5]]) is None
    assert metrics.bwt([[None, None], [0.5, None], [0.25, 0.5]]) == -0.25


def test_joint_training_has_no_transfer() -> None:
    joint = metrics.summary([[0.25, 0.25], [NAN, NAN], [0.5, 1.0]])
    assert joint["average_accuracy"] == 0.75
    assert joint["bwt"] is joint["fwt"] is joint["forgetting"] is None


@pytest.mark.parametrize("bad", [[[0.5, 0.5]], [[0.5], [0.5], [0.5]], [0.5], [[0.5], [0.5, 0.5]], "R", {}])
def test_another_shape_is_refused(bad: Any) -> None:
    with pytest.raises(UserError, match="R: "):
        metrics.bwt(bad)


def test_accuracy() -> None:
    assert metrics.accuracy(["a", "b"], ["a", "a"]) == 0.5
    assert metrics.accuracy(np.array([0, 1]), np.array([0, 1])) == 1
    assert metrics.accuracy([], []) is None


@pytest.mark.parametrize("score", list(metrics.ANSWER_METRICS.values()))
def test_answers_must_pair_up_and_nothing_is_unmeasured(score: Callable[..., float | None]) -> None:
    assert score([], []) is None
    with pytest.raises(UserError, match="1 predictions for 2 rows"):
        score(["a", "b"], ["a"])


def test_macro_f1_weights_labels_equally() -> None:
    # 9 right answers of one label say nothing of the other.
    assert metrics.macro_f1(["a"] * 9 + ["b"], ["a"] * 10) == pytest.approx((2 * 9 / 19 + 0) / 2)
    assert metrics.macro_f1(["a", "b"], ["a", "b"]) == 1


def test_macro_f1_counts_a_label_that_is_only_predicted() -> None:
    assert metrics.macro_f1(["a", "a"], ["a", "b"]) == pytest.approx((2 / 3 + 0) / 2)


def test_confusion_and_recall() -> None:
    true, pred = ["a", "a", "b", "a"], ["a", "b", "b", "c"]
    assert metrics.confusion(true, pred, ["c", "b", "a"]).tolist() == [[0, 0, 0], [0, 1, 0], [1, 1, 1]]
    assert metrics.per_class_recall(true, pred, ["a", "b", "c"]) == {"a": pytest.approx(1 / 3), "b": 1.0, "c": None}


def test_confusion_refuses_an_unknown_label() -> None:
    with pytest.raises(UserError, match="'z' is not one of the labels"):
        metrics.confusion(["a"], ["z"], ["a"])


def test_exact_match_ignores_white_space_around_only() -> None:
    assert metrics.exact_match(["a b", "a b", "a b", "a b"], ["a b\n", " a b", "a  b", "A b"]) == 0.5


def longest(a: list[str], b: list[str]) -> int:
    table = np.zeros((len(a) + 1, len(b) + 1), dtype=int)
    for i, left in enumerate(a):
        for j, right in enumerate(b):
            best = max(table[i, j + 1], table[i + 1, j])
            table[i + 1, j + 1] = table[i, j] + 1 if left == right else best
    return int(table[-1, -1])


def test_rouge_l_is_the_table_of_the_textbook() -> None:
    draw = random.Random(0)
    for _ in range(40):
        a, b = ([draw.choice("wxyz") for _ in range(draw.randint(1, 90))] for _ in range(2))
        expected = 2 * longest(a, b) / (len(a) + len(b))
        assert metrics.rouge_l([" ".join(a)], [" ".join(b)]) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("true", "pred", "score"),
    [("", "", 1), ("a", "", 0), ("", "a", 0), ("A  B", "a b", 1), ("a b", "b a", 0.5), ("a b c d", "a c", 2 / 3)],
)
def test_rouge_l(true: str, pred: str, score: float) -> None:
    assert metrics.rouge_l([true], [pred]) == pytest.approx(score)


def test_rouge_l_is_a_mean_over_rows() -> None:
    assert metrics.rouge_l(["a", "b"], ["a", "c"]) == 0.5
