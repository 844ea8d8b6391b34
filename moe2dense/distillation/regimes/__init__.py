"""Training regimes: each changes where the text, the targets or the models of a training run come from.

A name and options come in, a `Regime` for `distill` goes out. A new regime is one module and one row of registry.py.
"""

from typing import TYPE_CHECKING

import lazy_loader as lazy

if TYPE_CHECKING:
    from moe2dense.distillation.regimes.make import make_regime
    from moe2dense.distillation.regimes.mtp import load_heads
    from moe2dense.distillation.regimes.registry import REGIMES

__all__ = ["REGIMES", "load_heads", "make_regime"]

__getattr__, __dir__, _ = lazy.attach(
    __name__, submod_attrs={"make": ["make_regime"], "mtp": ["load_heads"], "registry": ["REGIMES"]}
)
