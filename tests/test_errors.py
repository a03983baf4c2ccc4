"""The exception tree, and what every message has in common."""

import inspect

import pytest

from moecl import errors
from moecl.errors import MoECLError, UserError, near

TREE = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, MoECLError)]


@pytest.mark.parametrize("kind", TREE)
def test_every_error_is_of_the_tree_and_in_its_docstring(kind: type[MoECLError]) -> None:
    assert kind.__name__ in (errors.__doc__ or "")
    assert kind.__doc__
    assert kind is MoECLError or issubclass(kind, UserError)


def test_exit_codes() -> None:
    assert MoECLError("x").exit_code == 1
    assert {kind.exit_code for kind in TREE if kind is not MoECLError} == {2}


def test_what_the_user_can_fix_is_a_value_error() -> None:
    assert issubclass(UserError, ValueError)
    assert not issubclass(MoECLError, ValueError)


def test_a_message_is_one_line() -> None:
    assert str(UserError("data.jsonl:3: label: 'a\nb'\r\n  is unknown")) == "data.jsonl:3: label: 'a b' is unknown"


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("posative", " (did you mean 'positive'?)"),
        ("POSITIVE", " (did you mean 'positive'?)"),
        ("zebra", ""),
        ("", ""),
    ],
)
def test_near(word: str, expected: str) -> None:
    assert near(word, ["negative", "positive"]) == expected


def test_near_takes_an_iterator_and_nothing() -> None:
    assert near("a", iter(["A"])) == " (did you mean 'A'?)"
    assert near("a", []) == ""
