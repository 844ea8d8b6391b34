"""Run a whole conversion: plan, build, targets, distill, evaluate, report, export.

The one package that knows all stages. Settings come in; a run folder goes out, finished stage by stage and resumable.
(The function is `moe2dense.convert`; a package of that name would hide it.)
"""

from typing import TYPE_CHECKING

import lazy_loader as lazy

if TYPE_CHECKING:
    from moe2dense.conversion.api import convert as convert
    from moe2dense.conversion.api import plan as plan
    from moe2dense.conversion.results import Plan as Plan
    from moe2dense.conversion.results import Result as Result

__getattr__, __dir__, __all__ = lazy.attach(
    __name__, submod_attrs={"api": ["convert", "plan"], "results": ["Plan", "Result"]}
)
