"""docs/cli.md and docs/options.md are what their generator writes."""

import importlib.util
from pathlib import Path

import pytest

from moe2dense.cli.app import COMMANDS
from moe2dense.config.options import entries
from moe2dense.config.schema import RunConfig

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def pages():
    spec = importlib.util.spec_from_file_location("generate_reference", DOCS / "generate_reference.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.pages()


@pytest.mark.parametrize("file", ["cli.md", "options.md"])
def test_the_page_is_up_to_date(pages, file):
    text = (DOCS / file).read_text(encoding="utf-8")
    assert text == pages[file], f"docs/{file} is out of date; run `python docs/generate_reference.py`"


def test_nothing_is_left_out(pages):
    assert all(f"\n## {command}\n" in pages["cli.md"] for command, *_ in COMMANDS)
    options = list(entries(RunConfig))
    assert all(f"\n| `{entry.key.rpartition('.')[2]}` |" in pages["options.md"] for entry in options)
    assert pages["options.md"].count("\n| `") == len(options)
