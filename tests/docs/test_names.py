"""Every path and dotted name in the documentation and in docstrings is there."""

import ast
import importlib
import re

import pytest

from tests.docs.pages import ROOT, pages

PACKAGE = ROOT / "moe2dense"
# paths from the root; `<model_type>` and the like are placeholders
PATH = re.compile(r"(?<![\w./-])(?:moe2dense|tests|docs|benchmarks|examples|teachers|students|\.ci)/[\w.*/-]*[\w*/]")
# within code font, a module as the package's own folders name it
INNER = re.compile(r"(?<![\w./-])[a-z_]+(?:/[a-z_]+)*\.py\b")
DOTTED = re.compile(r"(?<![\w./-])moe2dense(?:\.[A-Za-z_]\w*)+")
MADE_LATER = ("moe2dense.toml",)
IN_THE_WHEEL = ("moe2dense/teachers", "moe2dense/students")  # the root's folders, where an installed package has them


def exists(path: str) -> bool:
    """Whether a path is there, seen from the root or from the package; `*` and NAME stand for anything."""
    pattern = path.rstrip("/").replace("NAME", "*")
    return path in IN_THE_WHEEL or any(any(base.glob(pattern)) for base in (ROOT, PACKAGE))


def is_a_module(name: str) -> bool:
    """Whether `losses/tiled.py` or `tiled.py` is a file of the project."""
    places = [PACKAGE, ROOT / "benchmarks", ROOT / "examples", ROOT / "tests"]
    return exists(name) or ("/" not in name and any(any(p.rglob(name)) for p in places))


def resolves(name: str) -> bool:
    """Whether a dotted name is a module, or something in one."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            value = importlib.import_module(".".join(parts[:end]))
        except ImportError:
            continue
        try:
            for part in parts[end:]:
                value = getattr(value, part)
        except AttributeError:
            return False
        return True
    return False


def missing(text: str) -> list[str]:
    """What a text names and is not there."""
    paths = [p for p in PATH.findall(text) if not exists(p)]
    modules = [m for m in INNER.findall(text) if not is_a_module(m)]
    names = [n for n in DOTTED.findall(text) if n not in MADE_LATER and not resolves(n)]
    return sorted({*paths, *modules, *names})


@pytest.mark.parametrize("page", [p for p in pages() if p != "CHANGELOG.md"])
def test_what_pages_name_is_there(page):
    text = pages()[page]
    if page == "docs/architecture.md":  # its list of modules is made from docstrings, below
        text = text[: text.index("<!-- modules -->")]
    assert not missing(text.replace("my/task.yaml", "").replace("teachers/<model_type>.toml", ""))


def docstrings(tree: ast.Module) -> str:
    """All docstrings of a module."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return "\n".join(ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, kinds))


@pytest.mark.parametrize("path", sorted(p.relative_to(ROOT).as_posix() for p in PACKAGE.rglob("*.py")))
def test_what_docstrings_name_is_there(path):
    assert not missing(docstrings(ast.parse((ROOT / path).read_text(encoding="utf-8"))))
