"""The rules of the layout, held by reading the code: sizes, places of imports, types at the seams."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "moe2dense"
SEAMS = {"teacher", "student", "model", "blocks", "targets", "job", "head"}
# modules that only an extra brings; they may be missing, so they are imported where they are used
OPTIONAL = {
    "compressed_tensors", "gguf", "grouped_gemm", "lm_eval", "megablocks", "stk", "tensorboard", "trackio", "wandb",
}  # fmt: skip
LAZY = ("cli", "conversion", "__main__")  # packages whose help must not wait for torch
# read by help, lists and the types of plans, which wait for no torch: what needs it is imported where a plan is made
TORCH_FREE = (
    "families/resolve.py", "families/towers.py", "modeling/empty.py", "modeling/shape.py", "student/target/dense_config.py",
    "student/target/pruned.py", "student/target/resolve.py",
)  # fmt: skip


@cache
def modules() -> dict[Path, ast.Module]:
    return {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(PACKAGE.rglob("*.py"))}


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def functions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef)))


def imports_inside(tree: ast.Module) -> Iterator[ast.Import | ast.ImportFrom]:
    """Import statements in functions, each once."""
    seen: set[int] = set()
    for function in functions(tree):
        for node in ast.walk(function):
            if isinstance(node, (ast.Import, ast.ImportFrom)) and id(node) not in seen:
                seen.add(id(node))
                yield node


def roots(node: ast.Import | ast.ImportFrom) -> set[str]:
    """The top packages an import names."""
    names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
    return {name.split(".")[0] for name in names}


def test_the_root_holds_little():
    files = [p.name for p in PACKAGE.iterdir() if p.is_file()]
    assert len(files) <= 4, files


def test_no_module_is_long():
    long = {name_of(p): n for p in modules() if (n := len(p.read_text(encoding="utf-8").splitlines())) > 400}
    assert not long


def test_imports_stand_at_the_top():
    places = [(p, n) for p, tree in modules().items() for n in imports_inside(tree)]
    assert len(places) < 50
    wrong = [
        f"{name_of(p)}:{n.lineno}"
        for p, n in places
        if p.relative_to(PACKAGE).parts[0].removesuffix(".py") not in LAZY
        and p.relative_to(PACKAGE).as_posix() not in TORCH_FREE
        and not roots(n) <= OPTIONAL
    ]
    assert not wrong


def test_transformers_internals_are_used_in_one_file():
    public = {"transformers", "transformers.utils"}
    wrong = [
        f"{name_of(p)}:{node.lineno} {node.module}"
        for p, tree in modules().items()
        if name_of(p) != "moe2dense/modeling/internals.py"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        and (node.module or "").split(".")[0] == "transformers"
        and node.module not in public
    ]
    assert not wrong


def test_seams_have_types():
    """No `Any` for what passes between packages."""
    wrong = []
    for path, tree in modules().items():
        for function in functions(tree):
            arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
            for a in arguments:
                text = ast.unparse(a.annotation) if a.annotation else ""
                if a.arg in SEAMS and text.strip("'\"") in ("Any", "Any | None"):
                    wrong.append(f"{name_of(path)}:{a.lineno} {a.arg}")
    assert not wrong


def test_kinds_are_told_apart_by_type():
    """hasattr(x, "name") on what passes between packages stands for a missing Protocol."""
    wrong = [
        f"{name_of(path)}:{node.lineno} {ast.unparse(node)}"
        for path, tree in modules().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "hasattr"
        and ast.unparse(node.args[0]).split(".")[-1] in SEAMS | {"source", "known", "found"}
    ]
    assert not wrong


@pytest.mark.parametrize(
    "arguments", [["--help"], ["plan", "--help"], ["convert", "--help"], ["list"], ["list", "methods"]], ids=" ".join
)
def test_help_and_list_wait_for_no_torch(arguments):
    code = f"import sys; from moe2dense.__main__ import main; main({arguments!r}); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_packages_say_what_they_are_for_and_load_nothing():
    """A package's front door has a docstring, and importing it imports no torch."""
    packages = [p.parent for p in modules() if p.name == "__init__.py"]
    for package in packages:
        assert ast.get_docstring(modules()[package / "__init__.py"]), name_of(package)
    names = [".".join(p.relative_to(ROOT).parts) for p in packages]
    code = "import sys, importlib\n" + "\n".join(f"importlib.import_module({n!r})" for n in names)
    done = subprocess.run([sys.executable, "-c", f"{code}\nsys.exit('torch' in sys.modules)"], cwd=ROOT)
    assert done.returncode == 0


def test_front_doors_hide_no_module():
    """No module has the name of something that its package exports."""
    import importlib

    for path in modules():
        if path.name == "__init__.py":
            exported = getattr(importlib.import_module(".".join(path.parent.relative_to(ROOT).parts)), "__all__", [])
            places = {p.stem for p in path.parent.glob("*.py")} | {p.name for p in path.parent.iterdir() if p.is_dir()}
            assert not places & set(exported), name_of(path)


def test_docstrings_begin_with_a_capital_and_public_functions_have_one():
    missing = [
        f"{name_of(path)}:{node.lineno} {node.name}"
        for path, tree in modules().items()
        for node in tree.body
        if isinstance(node, (ast.FunctionDef, ast.ClassDef))
        and not node.name.startswith("_")
        and not ast.get_docstring(node)
    ]
    assert not missing
