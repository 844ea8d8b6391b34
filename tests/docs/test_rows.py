"""Whatever a user can name has a row in the documentation."""

import subprocess
import sys

import pytest

from moe2dense.distillation.regimes.registry import REGIMES
from moe2dense.distillation.targets.registry import TARGET_FORMATS
from moe2dense.losses.registry import DIVERGENCES, FEATURE_KINDS, LAYER_MAPS
from moe2dense.student.ffn.methods import METHODS
from moe2dense.student.init_spec import STEPS
from tests.docs.pages import ROOT, pages, rows

TOLD = {
    "docs/students.md": ("layerwise", *METHODS, *STEPS),
    "docs/distillation.md": (*DIVERGENCES, *FEATURE_KINDS, *LAYER_MAPS, *TARGET_FORMATS),
    "docs/regimes.md": tuple(REGIMES),
    "examples/README.md": tuple(p.stem for p in ROOT.glob("examples/recipes/*.toml")),
}


@pytest.mark.parametrize("page", TOLD)
def test_every_name_has_a_row(page):
    assert not set(TOLD[page]) - rows(pages()[page])


def test_every_example_is_named():
    index = rows(pages()["examples/README.md"])
    there = {f"{p.name}/" if p.is_dir() else p.name for p in (ROOT / "examples").iterdir()}
    assert not there - index - {"README.md", "__pycache__/"}


def test_the_list_of_modules_is_current():
    """docs/architecture.md says of each module what its docstring says; `make docs` writes it."""
    done = subprocess.run([sys.executable, ROOT / ".ci" / "modules.py", "--check"])
    assert done.returncode == 0, "run `make docs`"
