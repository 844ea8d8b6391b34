"""Turn a sparse Mixture-of-Experts language model into a dense one that behaves like it.

    import moe2dense as m2d
    m2d.convert("examples/tiny-mixtral", to="3.2m", out="out")

Names are imported when first used, so that `import moe2dense` does not load torch.
"""

from typing import TYPE_CHECKING

import lazy_loader as lazy

from moe2dense.common.versions import __version__

if TYPE_CHECKING:
    from moe2dense.conversion.api import convert as convert
    from moe2dense.conversion.api import plan as plan
    from moe2dense.data.blocks import Blocks as Blocks
    from moe2dense.data.load import load_blocks as load_blocks
    from moe2dense.distillation.api import distill as distill
    from moe2dense.errors import UserError as UserError
    from moe2dense.evaluation.api import evaluate as evaluate
    from moe2dense.exporting.api import export as export
    from moe2dense.reporting.show import report as report
    from moe2dense.student.build.api import build_student as build_student
    from moe2dense.student.store import load_student as load_student
    from moe2dense.student.store import save_student as save_student
    from moe2dense.teacher.load import load_teacher as load_teacher

__getattr__, __dir__, __all__ = lazy.attach(
    __name__,
    submod_attrs={
        "conversion.api": ["convert", "plan"],
        "data.blocks": ["Blocks"],
        "data.load": ["load_blocks"],
        "distillation.api": ["distill"],
        "errors": ["UserError"],
        "evaluation.api": ["evaluate"],
        "exporting.api": ["export"],
        "reporting.show": ["report"],
        "student.build.api": ["build_student"],
        "student.store": ["load_student", "save_student"],
        "teacher.load": ["load_teacher"],
    },
)
__all__ += ["__version__"]
