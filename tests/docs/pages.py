"""The pages of documentation, and what they name."""

import re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


@cache
def pages() -> dict[str, str]:
    """Every page by its path from the root."""
    found = [
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/**/*.md"),
        *ROOT.glob("examples/**/*.md"),
        *ROOT.glob(".github/**/*.md"),
    ]
    return {p.relative_to(ROOT).as_posix(): p.read_text(encoding="utf-8") for p in sorted(found)}


def anchor(heading: str) -> str:
    """A heading's anchor, as GitHub and the site make it."""
    text = re.sub(r"`|\*|\[|\]\([^)]*\)", "", heading).strip().lower()
    return re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", text))


def anchors(page: str) -> set[str]:
    """All anchors of a page."""
    return {anchor(h) for h in re.findall(r"^#+ (.+)$", FENCE.sub("", page), re.MULTILINE)}


def rows(page: str) -> set[str]:
    """Names in code font in the first column of a page's tables."""
    cells = [line.split("|")[1] for line in page.splitlines() if line.startswith("|")]
    return {name for cell in cells for name in re.findall(r"`([^`]+)`", cell)}
