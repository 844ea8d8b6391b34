"""Every relative link leads somewhere, anchors included."""

import re

import pytest

from tests.docs.pages import FENCE, ROOT, anchors, pages

LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


@pytest.mark.parametrize("page", pages())
def test_links(page):
    dead = []
    for target in LINK.findall(FENCE.sub("", pages()[page])):
        if re.match(r"\w+:", target):
            continue
        path, _, fragment = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        if not file.exists() or (fragment and fragment not in anchors(file.read_text(encoding="utf-8"))):
            dead.append(target)
    assert not dead


def test_every_page_of_the_site_is_in_its_menu():
    menu = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert {p.name for p in (ROOT / "docs").glob("*.md")} == set(re.findall(r": (\w+\.md)$", menu, re.MULTILINE))
