"""Words that the project has given up do not come back: each thing has the name in docs/concepts.md."""

import re

import pytest

from tests.docs.pages import ROOT, pages

OLD = ("walk", "polish", "fate", "lesson")  # now: build, heal, provenance, batches
WORD = re.compile(rf"(?<![a-z])(?:{'|'.join(OLD)})(?:s|es|ed|ing)?(?![a-z])", re.IGNORECASE)
USUAL = re.compile(r"\b(?:ast|os|Path|path|PACKAGE|ROOT)\.walk\b")  # functions of the standard library
# these name the old words: what was renamed, and the sentence for who still uses them
ALLOWED = ("CHANGELOG.md", "moe2dense/config/renames.py")
CODE = [
    *ROOT.glob("moe2dense/**/*.*"),
    *ROOT.glob("benchmarks/*.py"),
    *ROOT.glob("examples/**/*.toml"),
    *ROOT.glob("*/*.toml"),
]


def old_words(text: str) -> list[str]:
    """Old words of the project in a text."""
    return sorted(set(WORD.findall(USUAL.sub("", text))))


@pytest.mark.parametrize("page", [p for p in pages() if p not in ALLOWED])
def test_pages(page):
    assert not old_words(pages()[page])


def test_code():
    files = [p for p in CODE if p.suffix in (".py", ".toml", ".js", ".css", ".html", ".j2", ".jinja")]
    names = {p.relative_to(ROOT).as_posix(): p for p in files}
    found = {n: w for n, p in names.items() if n not in ALLOWED and (w := old_words(p.read_text(encoding="utf-8")))}
    assert len(names) > 200 and not found
