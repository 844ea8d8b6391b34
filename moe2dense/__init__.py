"""Turn a sparse Mixture-of-Experts language model into a dense one that behaves like it.

    import moe2dense as m2d
    m2d.convert("examples/tiny-mixtral", to="3.2m", out="out")

Names are imported when first used, so that `import moe2dense` does not load torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from moe2dense.common.versions import __version__

_HOME = {
    "convert": "moe2dense.conversion.api:convert",
    "plan": "moe2dense.conversion.api:plan",
    "load_teacher": "moe2dense.teacher.load:load_teacher",
    "build_student": "moe2dense.student.build.api:build_student",
    "load_student": "moe2dense.student.store:load_student",
    "save_student": "moe2dense.student.store:save_student",
    "load_blocks": "moe2dense.data.load:load_blocks",
    "Blocks": "moe2dense.data.blocks:Blocks",
    "distill": "moe2dense.distillation.api:distill",
    "evaluate": "moe2dense.evaluation.api:evaluate",
    "report": "moe2dense.reporting.show:show_report",
    "export": "moe2dense.exporting.api:export",
    "UserError": "moe2dense.errors:UserError",
}

__all__ = [
    "Blocks",
    "UserError",
    "__version__",
    "build_student",
    "convert",
    "distill",
    "evaluate",
    "export",
    "load_blocks",
    "load_student",
    "load_teacher",
    "plan",
    "report",
    "save_student",
]

if TYPE_CHECKING:
    from moe2dense.conversion.api import convert, plan
    from moe2dense.data.blocks import Blocks
    from moe2dense.data.load import load_blocks
    from moe2dense.distillation.api import distill
    from moe2dense.errors import UserError
    from moe2dense.evaluation.api import evaluate
    from moe2dense.exporting.api import export
    from moe2dense.reporting.show import show_report as report
    from moe2dense.student.build.api import build_student
    from moe2dense.student.store import load_student, save_student
    from moe2dense.teacher.load import load_teacher


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'moe2dense' has no attribute {name!r}")
    module, attribute = _HOME[name].split(":")
    return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted([*_HOME, "__version__"])
