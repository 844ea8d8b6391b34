"""Filters against brute force, and the sentences for bands that mean nothing."""

import random

import pytest

from moe2dense.errors import UserError
from moe2dense.generation.filters import Filters, NearDuplicates, Sieve, parse_band, script_of


def jaccard(a: str, b: str) -> float:
    def sets(text):
        words = text.lower().split()
        return {tuple(words[i : i + 5]) for i in range(len(words) - 4)}

    x, y = sets(a), sets(b)
    return len(x & y) / len(x | y)


def test_near_duplicates_are_those_of_brute_force():
    rng = random.Random(0)
    base = [" ".join(rng.choice("abcdefghijk") * 2 for _ in range(30)) for _ in range(6)]
    texts = []
    for _ in range(40):
        words = rng.choice(base).split()
        for _ in range(rng.randrange(4)):
            words[rng.randrange(30)] = rng.choice("xyz")
        texts.append(" ".join(words))
    passed: list[str] = []
    index = NearDuplicates(0.5)
    for text in texts:
        wanted = all(jaccard(text, other) < 0.5 for other in passed)
        assert index.add(text) == wanted
        passed += [text] if wanted else []
    assert 6 < len(passed) < 40


def test_short_texts_can_be_duplicates():
    index = NearDuplicates(0.9)
    assert index.add("yes, indeed") and not index.add("Yes indeed!") and index.add("no")


def test_scripts():
    assert script_of("Über den Fluß, 12!") == "LATIN"
    assert script_of("Война и мир, war") == "CYRILLIC"
    assert script_of("戦争と平和 戦争") == "CJK"
    assert script_of("123 ...") == ""


def test_sieve_names_its_reasons():
    sieve = Sieve(Filters(min_tokens=3, nll=(1.0, 2.0), duplicates=0.8, same_script=True))
    assert sieve.keeps("The", "king went to the old castle again", 8, 1.5)
    assert not sieve.keeps("The", "king", 1, 1.5)
    assert not sieve.keeps("The", "   ", 9, 1.5)
    assert not sieve.keeps("The", "queen came from a far country once", 8, 2.5)
    assert not sieve.keeps("The", "Он пошёл домой поздно вечером один", 8, 1.5)
    assert not sieve.keeps("A", "king went to the old castle again", 8, 1.5)
    assert dict(sieve.dropped) == {"min_tokens": 2, "nll": 1, "same_script": 1, "duplicates": 1}


def test_bands():
    assert parse_band("") is None
    assert parse_band("2.5:4") == (2.5, 4.0)
    assert parse_band(":4") == (0.0, 4.0) and parse_band("2:") == (2.0, float("inf"))
    for bad in ("4", "4:2", "a:b", "-1:2"):
        with pytest.raises(UserError, match="LOW:HIGH"):
            parse_band(bad)
