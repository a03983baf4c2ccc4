"""How a report writes numbers. What was not measured is said so and never 0."""

from collections.abc import Mapping, Sequence
from typing import Any

from moecl.report.page import MISSING

NUMBERS = {
    "average_accuracy": "average accuracy",
    "bwt": "backward transfer (BWT)",
    "fwt": "forward transfer (FWT)",
    "forgetting": "forgetting",
    "learning_accuracy": "learning accuracy",
}


def score(value: float | None) -> str:
    return MISSING if value is None else f"{value:.3f}"


def signed(value: float | None) -> str:
    """
    >>> signed(-0.0001), signed(0.25), signed(None)
    ('0.000', '+0.250', 'not measured')
    """
    return MISSING if value is None else f"{value:+.3f}" if round(value, 3) else "0.000"


def number(name: str, value: float | None) -> str:
    return signed(value) if name in ("bwt", "fwt") else score(value)


def between(low_high: tuple[float, float] | None, write: Any = score) -> str:
    return MISSING if low_high is None else f"{write(low_high[0])} to {write(low_high[1])}"


def p_value(p: float | None) -> str:
    """
    >>> p_value(0.0009995), p_value(0.04), p_value(1.0)
    ('0.001', '0.040', '1')
    """
    return MISSING if p is None else "1" if p >= 0.9995 else f"{p:.3f}" if p >= 0.0005 else "< 0.001"


def points(value: float) -> str:
    """A difference of scores in points of a hundred, without its sign.

    >>> points(0.0284), points(-0.01)
    ('2.8 points', '1.0 point')
    """
    written = hundredths(abs(value))
    return f"{written} point{'' if written == '1.0' else 's'}"


def hundredths(value: float) -> str:
    """Of the three digits that tables have.

    >>> hundredths(0.0125), f"{0.0125:.3f}", hundredths(-0.0002)
    ('1.3', '0.013', '0.0')
    """
    return f"{round(value, 3) * 100 + 0.0:.1f}"


def count(value: float | None) -> str:
    return MISSING if value is None else f"{round(value):,}"


def several(number: int, what: str) -> str:
    """
    >>> several(1, "task"), several(3, "task")
    ('1 task', '3 tasks')
    """
    return f"{number} {what}{'' if number == 1 else 's'}"


def flat(value: Any, place: str = "") -> list[tuple[str, str]]:
    """A nested value as (dotted key, text), a line a leaf; lists of plain values on one line.

    >>> flat({"a": {"b": 1, "c": [1, 2]}, "d": None})
    [('a.b', '1'), ('a.c', '1, 2'), ('d', '-')]
    """
    if isinstance(value, Mapping):
        return [line for key, one in value.items() for line in flat(one, f"{place}.{key}".lstrip("."))]
    if isinstance(value, list):
        if any(isinstance(one, Mapping | list) for one in value):
            return [line for place_, one in enumerate(value) for line in flat(one, f"{place}[{place_}]")]
        return [(place, ", ".join(map(str, value)) or "-")]
    return [(place, "-" if value is None else str(value))]


def settings(value: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} = {text}" for key, text in flat(value)) or "defaults"


def listed(words: Sequence[str]) -> str:
    """
    >>> listed(["a"]), listed(["a", "b", "c"])
    ('a', 'a, b and c')
    """
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
