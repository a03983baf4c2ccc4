"""Sizes as people write them, and what is said of those that are none."""

import pytest

from moecl._sizes import parse_size
from moecl.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("2GB", 2 * 10**9),
        ("2 GB", 2 * 10**9),
        ("2G", 2 * 10**9),
        ("1.5gib", 3 * 2**29),
        (".5MB", 500_000),
        ("512m", 512 * 10**6),
        ("3kB", 3000),
        ("7b", 7),
        ("1TB", 10**12),
        (4096, 4096),
    ],
)
def test_sizes(text, count):
    assert parse_size(text, "--expert-memory") == count


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("2", "'2' has no unit"),
        ("lots", "'lots' is no size"),
        ("", "'' is no size"),
        ("GB", "'GB' is no size"),
        ("-2GB", "'-2GB' is no size"),
        ("1e9", "'1e9' is no size"),
        ("2GB 3", "'2GB 3' is no size"),
        ("2 gigs", "'2 gigs' has the unknown unit 'gigs'"),
        ("2PB", "'2PB' has the unknown unit 'PB'"),
        ("0", "'0' leaves no room; "),
        ("0.0GB", "'0.0GB' leaves no room"),
        (0, "0 leaves no room"),
        (-1, "-1 leaves no room"),
    ],
)
def test_what_is_no_size_is_one_line(text, said):
    with pytest.raises(ConfigError) as caught:
        parse_size(text, "--expert-memory")
    assert str(caught.value).startswith(f"--expert-memory: {said}")
    assert str(caught.value).endswith("such as 2GB or 512MB")


@pytest.mark.parametrize("none", ["0", "0MB", 0])
def test_nothing_is_a_size_where_it_is_allowed(none):
    assert parse_size(none, "--kv-memory", zero=True) == 0


def test_less_than_nothing_is_none():
    with pytest.raises(ConfigError, match="--kv-memory: -1 is below 0; write a number"):
        parse_size(-1, "--kv-memory", zero=True)
