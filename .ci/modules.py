"""Write docs/architecture.md's list of modules from their docstrings. With --check, only say whether it is as it should be."""

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "architecture.md"
BETWEEN = re.compile(r"(<!-- modules -->\n).*(<!-- end of modules -->)", re.DOTALL)
# the layers from the top, then what stands beside them
PACKAGES = (
    "cli", "conversion", "reporting", "distillation", "evaluation", "student", "generation", "teacher", "losses",
    "exporting", "optimizers", "modeling", "config", "data", "families", "weights", "common",
)  # fmt: skip


def paragraph(path: Path) -> str:
    """The first paragraph of a file's docstring, on one line."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return " ".join(text.split("\n\n")[0].split())


def sentence(path: Path) -> str:
    """The first sentence of a file's docstring."""
    first = re.match(r".+?[.](?= [A-Z`]|$)", paragraph(path))
    return first[0] if first else paragraph(path)


def listing(folder: Path) -> list[str]:
    """A package as Markdown: what it is for, then its modules, then its packages."""
    level = "###" if folder.parent.name == "moe2dense" else "####"
    name = folder.relative_to(ROOT).as_posix()
    lines = [f"{level} `{name}/`", "", paragraph(folder / "__init__.py"), ""]
    files = [p for p in sorted(folder.glob("*.py")) if p.name != "__init__.py"]
    lines += [f"- `{p.name}`: {sentence(p)}" for p in files]
    for inner in sorted(p.parent for p in folder.glob("*/__init__.py")):
        lines += ["", *listing(inner)]
    return lines


def modules() -> str:
    """The whole list."""
    package = ROOT / "moe2dense"
    root = [f"- `{p.name}`: {sentence(p)}" for p in sorted(package.glob("*.py"))]
    parts = [["### `moe2dense/`", "", *root], *(listing(package / name) for name in PACKAGES)]
    return "\n".join("\n".join([*part, ""]) for part in parts)


def main() -> int:
    page = PAGE.read_text(encoding="utf-8")
    new = BETWEEN.sub(lambda m: f"{m[1]}\n{modules()}\n{m[2]}", page)
    if "--check" in sys.argv:
        return int(new != page)
    PAGE.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
