"""README is short, fits a terminal, and its blocks are what CI runs."""

import importlib.util
import re

from tests.docs.pages import FENCE, ROOT, pages


def test_readme_is_short():
    assert len(pages()["README.md"].splitlines()) <= 150


def test_what_a_terminal_shows_fits_one():
    """Blocks of code and output are at most 80 columns wide."""
    indented = [line for line in pages()["README.md"].splitlines() if line.startswith("    ")]
    fenced = [line for _, body in FENCE.findall(pages()["README.md"]) for line in body.splitlines()]
    assert fenced and not [line for line in (*indented, *fenced) if len(line) > 80]


def test_ci_runs_every_block():
    """.ci/readme.py finds each bash and python block, and what they contain is a command or compiles."""
    spec = importlib.util.spec_from_file_location("readme", ROOT / ".ci" / "readme.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    blocks = module.BLOCK.findall(pages()["README.md"])
    assert len(blocks) == len(re.findall(r"^```(?:bash|python)$", pages()["README.md"], re.MULTILINE)) >= 4
    for language, code in blocks:
        if language == "python":
            compile(code, "README.md", "exec")
        else:
            joined = code.replace("\\\n", " ")
            assert all(line.startswith("moe2dense ") for line in joined.splitlines())
