import pytest

from moe2dense.common.units import parse_bytes, parse_count, show_bytes, show_count, show_seconds
from moe2dense.errors import UserError


@pytest.mark.parametrize(
    ("text", "value"),
    [("500k", 500_000), ("7b", 7_000_000_000), ("3.2M", 3_200_000), ("1_000", 1000), (12, 12), ("0", 0)],
)
def test_counts(text, value):
    assert parse_count(text) == value


@pytest.mark.parametrize(
    ("text", "value"), [("300MB", 300_000_000), ("2GiB", 2**31), ("1.5 gb", 1_500_000_000), ("64", 64)]
)
def test_bytes(text, value):
    assert parse_bytes(text) == value


@pytest.mark.parametrize("text", ["", "many", "7x", "-3", "1e5 b c"])
def test_refused_with_the_argument_named(text):
    with pytest.raises(UserError, match="--tokens must be a number"):
        parse_count(text, "--tokens")


def test_shown():
    assert show_count(7_241_732_096) == "7.24B"
    assert show_count(12) == "12"
    assert show_bytes(93_400_000_000) == "93.4 GB"
    assert show_seconds(93784) == "1 d 2 h"
    assert show_seconds(0.2) == "0 s"
