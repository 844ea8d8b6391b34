"""The public names, and that they cost nothing until used."""

import subprocess
import sys

import pytest

import moe2dense


@pytest.mark.parametrize("name", [n for n in dir(moe2dense) if not n.startswith("_")])
def test_every_public_name_is_there(name):
    assert callable(getattr(moe2dense, name))


def test_the_names_of_the_design():
    expected = "convert plan load_teacher build_student distill evaluate report export load_blocks Blocks UserError"
    assert set(expected.split()) <= set(dir(moe2dense))


def test_unknown_name():
    with pytest.raises(AttributeError, match="No moe2dense attribute nothing"):
        moe2dense.nothing  # noqa: B018


def test_importing_does_not_load_torch():
    code = "import sys, moe2dense; assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
